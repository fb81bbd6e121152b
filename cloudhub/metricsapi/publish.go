package metricsapi

import (
	"context"
	"fmt"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/client-go/kubernetes"
	apiregistrationv1 "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"
	aggregator "k8s.io/kube-aggregator/pkg/client/clientset_generated/clientset"
	"k8s.io/metrics/pkg/apis/metrics"
	metricsv1beta1 "k8s.io/metrics/pkg/apis/metrics/v1beta1"
)

// publish makes the group known: an APIService, so that discovery lists it,
// and the ClusterRole that adds reading it to the built-in view, edit and
// admin roles. It never fails the server's start; it tries again until done.
func (a *API) publish(hook genericapiserver.PostStartHookContext) error {
	services, err := aggregator.NewForConfig(hook.LoopbackClientConfig)
	if err != nil {
		return fmt.Errorf("metrics API: %w", err)
	}
	client, err := kubernetes.NewForConfig(hook.LoopbackClientConfig)
	if err != nil {
		return fmt.Errorf("metrics API: %w", err)
	}
	go func() {
		told := false
		wait.PollUntilContextCancel(hook, 500*time.Millisecond, true, func(ctx context.Context) (bool, error) { //nolint:errcheck // ends with the server
			err := publishService(ctx, services)
			if err == nil {
				err = publishRole(ctx, client)
			}
			if err != nil && !told {
				told = true
				a.cfg.Log.Warn("making the metrics API known failed; it is tried again", "err", err)
			}
			return err == nil, nil
		})
	}()
	return nil
}

func publishService(ctx context.Context, client aggregator.Interface) error {
	version := metricsv1beta1.SchemeGroupVersion
	_, err := client.ApiregistrationV1().APIServices().Create(ctx, &apiregistrationv1.APIService{
		ObjectMeta: metav1.ObjectMeta{Name: version.Version + "." + version.Group},
		Spec: apiregistrationv1.APIServiceSpec{
			Group:                version.Group,
			Version:              version.Version,
			GroupPriorityMinimum: 100,
			VersionPriority:      100,
		},
	}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("create the APIService of %s: %w", version, err)
	}
	return nil
}

func publishRole(ctx context.Context, client kubernetes.Interface) error {
	_, err := client.RbacV1().ClusterRoles().Create(ctx, &rbacv1.ClusterRole{
		ObjectMeta: metav1.ObjectMeta{
			Name: "system:aggregated-metrics-reader",
			Labels: map[string]string{
				"rbac.authorization.k8s.io/aggregate-to-view":  "true",
				"rbac.authorization.k8s.io/aggregate-to-edit":  "true",
				"rbac.authorization.k8s.io/aggregate-to-admin": "true",
			},
		},
		Rules: []rbacv1.PolicyRule{{APIGroups: []string{metrics.GroupName}, Resources: []string{"pods", "nodes"}, Verbs: []string{"get", "list", "watch"}}},
	}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("create the role of metrics readers: %w", err)
	}
	return nil
}
