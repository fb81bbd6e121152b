package controlplane

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// TestHubIdentity runs against one plane, with two nodes that each have a pod
// with a secret.
func TestHubIdentity(t *testing.T) {
	cfg := testConfig(t.TempDir())
	cfg.APIServerArgs = []string{"--default-not-ready-toleration-seconds=42"} // a later flag wins
	p := start(t, cfg)
	ctx := t.Context()
	admin := client(t, p.admin(t))
	hub := client(t, p.HubClientConfig())

	as := func(user string, groups ...string) kubernetes.Interface {
		cfg := rest.CopyConfig(p.HubClientConfig())
		cfg.Impersonate = rest.ImpersonationConfig{UserName: user, Groups: groups}
		return client(t, cfg)
	}
	edgeA := as("system:node:edge-a")
	edgeB := as("system:node:edge-b")

	if info, err := os.Stat(p.AdminKubeconfigPath()); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("admin.kubeconfig: %v, %v", info, err)
	}
	awaitServiceAccount(t, admin)
	for name, edge := range map[string]kubernetes.Interface{"edge-a": edgeA, "edge-b": edgeB} {
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"kubernetes.io/hostname": name}}}
		if _, err := edge.CoreV1().Nodes().Create(ctx, node, metav1.CreateOptions{}); err != nil {
			t.Fatalf("register %s as itself: %v", name, err)
		}
		createPod(t, admin, name, "pod-"+name, "secret-"+name)
	}
	podA, err := hub.CoreV1().Pods("default").Get(ctx, "pod-edge-a", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}

	t.Run("tolerations", func(t *testing.T) {
		got := make(map[string]int64)
		for _, toleration := range podA.Spec.Tolerations {
			if toleration.TolerationSeconds != nil {
				got[toleration.Key] = *toleration.TolerationSeconds
			}
		}
		if got["node.kubernetes.io/unreachable"] != 300 || got["node.kubernetes.io/not-ready"] != 42 {
			t.Errorf("tolerations %v", got)
		}
	})

	// The node authorizer learns of pods by a watch.
	await(t, "edge-a to be allowed its pod's secret", func() error {
		_, err := edgeA.CoreV1().Secrets("default").Get(ctx, "secret-edge-a", metav1.GetOptions{})
		return err
	})

	token := func(edge kubernetes.Interface, pod *corev1.Pod) error {
		request := &authenticationv1.TokenRequest{}
		if pod != nil {
			request.Spec.BoundObjectRef = &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID}
		}
		_, err := edge.CoreV1().ServiceAccounts("default").CreateToken(ctx, "default", request, metav1.CreateOptions{})
		return err
	}
	status := func(edge kubernetes.Interface, pod string) error {
		_, err := edge.CoreV1().Pods("default").Patch(ctx, pod, types.StrategicMergePatchType, []byte(`{"status":{"message":"seen"}}`), metav1.PatchOptions{}, "status")
		return err
	}
	lease := func(edge kubernetes.Interface, node string) error {
		_, err := edge.CoordinationV1().Leases(corev1.NamespaceNodeLease).Create(ctx, &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: node}}, metav1.CreateOptions{})
		return err
	}
	secret := func(c kubernetes.Interface, namespace string) error {
		_, err := c.CoreV1().Secrets(namespace).Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{GenerateName: "made-"}}, metav1.CreateOptions{})
		return err
	}
	get := func(c kubernetes.Interface, node string) error {
		_, err := c.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
		return err
	}

	for _, tc := range []struct {
		what    string
		allowed bool
		err     error
	}{
		{"a node reads itself", true, get(edgeA, "edge-a")},
		{"a node patches its status", true, patchNodeStatus(ctx, edgeA, "edge-a")},
		{"a node patches another's status", false, patchNodeStatus(ctx, edgeA, "edge-b")},
		{"a node reports its pod", true, status(edgeA, "pod-edge-a")},
		{"a node reports another's pod", false, status(edgeA, "pod-edge-b")},
		{"a node reads another's secret", false, func() error {
			_, err := edgeA.CoreV1().Secrets("default").Get(ctx, "secret-edge-b", metav1.GetOptions{})
			return err
		}()},
		{"a node lists secrets", false, func() error {
			_, err := edgeA.CoreV1().Secrets("default").List(ctx, metav1.ListOptions{})
			return err
		}()},
		{"a node gets a token for its pod", true, token(edgeA, podA)},
		{"a node gets a token for another's pod", false, token(edgeB, podA)},
		{"a node gets an unbound token", false, token(edgeA, nil)},
		{"a node makes its lease", true, lease(edgeA, "edge-a")},
		{"a node makes another's lease", false, lease(edgeA, "edge-b")},
		{"a node makes an event", true, event(ctx, edgeA)},
		{"a node deletes another's pod", false, edgeB.CoreV1().Pods("default").Delete(ctx, "pod-edge-a", metav1.DeleteOptions{})},
		{"a node deletes its pod", true, edgeB.CoreV1().Pods("default").Delete(ctx, "pod-edge-b", metav1.DeleteOptions{})},
		{"a node deletes a node", false, edgeA.CoreV1().Nodes().Delete(ctx, "edge-b", metav1.DeleteOptions{})},

		{"impersonating a node with its group", false, get(as("system:node:edge-a", "system:nodes"), "edge-a")},
		{"impersonating a user", false, get(as("alice"), "edge-a")},
		{"impersonating an administrator", false, get(as("alice", "system:masters"), "edge-a")},
		{"impersonating a service account", false, get(as("system:serviceaccount:kube-system:default"), "edge-a")},

		{"the hub reads nodes", true, get(hub, "edge-a")},
		{"the hub reads secrets", true, func() error {
			_, err := hub.CoreV1().Secrets("").List(ctx, metav1.ListOptions{})
			return err
		}()},
		{"the hub writes its own secrets", true, secret(hub, SystemNamespace)},
		{"the hub writes secrets elsewhere", false, secret(hub, "default")},
		{"the hub renews leases", true, func() error {
			_, err := hub.CoordinationV1().Leases(corev1.NamespaceNodeLease).Patch(ctx, "edge-a", types.MergePatchType, []byte(`{"spec":{"leaseDurationSeconds":40}}`), metav1.PatchOptions{})
			return err
		}()},
		{"the hub changes a node", false, patchNodeStatus(ctx, hub, "edge-a")},
		{"the hub deletes a pod", false, hub.CoreV1().Pods("default").Delete(ctx, "pod-edge-a", metav1.DeleteOptions{})},
		{"the hub makes a pod's toleration", true, func() error {
			_, err := hub.CoreV1().Pods("default").Patch(ctx, "pod-edge-a", types.JSONPatchType,
				[]byte(`[{"op":"add","path":"/spec/tolerations/0","value":{"key":"node.kubernetes.io/not-ready","operator":"Exists","effect":"NoExecute"}}]`), metav1.PatchOptions{})
			return err
		}()},
		{"the hub asks about a token", true, func() error {
			_, err := hub.AuthenticationV1().TokenReviews().Create(ctx, &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: "x"}}, metav1.CreateOptions{})
			return err
		}()},
		{"the hub asks what somebody may do", true, func() error {
			_, err := hub.AuthorizationV1().SubjectAccessReviews().Create(ctx, &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
				User: "alice", ResourceAttributes: &authorizationv1.ResourceAttributes{Verb: "get", Resource: "pods"}}}, metav1.CreateOptions{})
			return err
		}()},
		{"the hub gives itself rights", false, func() error {
			_, err := hub.RbacV1().ClusterRoles().Patch(ctx, hubUser, types.MergePatchType, []byte(`{"rules":[]}`), metav1.PatchOptions{})
			return err
		}()},
	} {
		switch {
		case tc.allowed && tc.err != nil:
			t.Errorf("%s: %v", tc.what, tc.err)
		case !tc.allowed && !apierrors.IsForbidden(tc.err):
			t.Errorf("%s: %v; want it forbidden", tc.what, tc.err)
		}
	}

	t.Run("no stranger", func(t *testing.T) {
		anonymous := rest.AnonymousClientConfig(p.admin(t))
		if err := get(client(t, anonymous), "edge-a"); !apierrors.IsForbidden(err) && !apierrors.IsUnauthorized(err) {
			t.Errorf("anonymous: %v", err)
		}
		c, err := rest.HTTPClientFor(anonymous)
		if err != nil {
			t.Fatal(err)
		}
		res, err := c.Get(p.URL() + "/readyz")
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != http.StatusOK {
			t.Errorf("/readyz: %s", res.Status)
		}
	})
}

func patchNodeStatus(ctx context.Context, c kubernetes.Interface, node string) error {
	_, err := c.CoreV1().Nodes().PatchStatus(ctx, node, []byte(`{"status":{"addresses":[{"type":"InternalIP","address":"100.64.0.7"}]}}`))
	return err
}

func event(ctx context.Context, c kubernetes.Interface) error {
	_, err := c.CoreV1().Events("default").Create(ctx, &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{GenerateName: "pulled-", Namespace: "default"},
		InvolvedObject: corev1.ObjectReference{Kind: "Pod", Namespace: "default", Name: "pod-edge-a"},
		Reason:         "Pulled",
		Type:           corev1.EventTypeNormal,
	}, metav1.CreateOptions{})
	return err
}

func createPod(t *testing.T, c kubernetes.Interface, node, name, secret string) {
	t.Helper()
	_, err := c.CoreV1().Secrets("default").Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: secret}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.CoreV1().Pods("default").Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PodSpec{
			NodeName:   node,
			Containers: []corev1.Container{{Name: "c", Image: "example.invalid/c:1"}},
			Volumes:    []corev1.Volume{{Name: "s", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: secret}}}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
}

// awaitServiceAccount waits for what the controller manager makes; pods are
// refused before.
func awaitServiceAccount(t *testing.T, c kubernetes.Interface) {
	t.Helper()
	await(t, "the default service account", func() error {
		_, err := c.CoreV1().ServiceAccounts("default").Get(t.Context(), "default", metav1.GetOptions{})
		return err
	})
}

// await tries until f succeeds.
func await(t testing.TB, what string, f func() error) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("waiting for %s: %v", what, err)
		}
	}
}

// TestSchedules makes sure that the scheduler and the controllers work, by the
// time it takes from a Deployment to scheduled pods on a fresh plane.
func TestSchedules(t *testing.T) {
	began := time.Now()
	p := start(t, testConfig(t.TempDir()))
	c := client(t, p.admin(t))
	createReadyNode(t, c, "edge-a")
	createDeployment(t, c, 3)
	await(t, "three scheduled pods", func() error {
		pods, err := c.CoreV1().Pods("default").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		scheduled := 0
		for _, pod := range pods.Items {
			if pod.Spec.NodeName == "edge-a" {
				scheduled++
			}
		}
		if scheduled != 3 {
			return fmt.Errorf("%d of %d pods are scheduled", scheduled, len(pods.Items))
		}
		return nil
	})
	t.Logf("from nothing to three scheduled pods of a Deployment: %s", time.Since(began))
}

func createReadyNode(t *testing.T, c kubernetes.Interface, name string) {
	t.Helper()
	node, err := c.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	now := metav1.Now()
	node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "KubeletReady", LastHeartbeatTime: now, LastTransitionTime: now}}
	node.Status.Allocatable = corev1.ResourceList{"cpu": resource.MustParse("4"), "memory": resource.MustParse("4Gi"), "pods": resource.MustParse("110")}
	node.Status.Capacity = node.Status.Allocatable
	if _, err := c.CoreV1().Nodes().UpdateStatus(t.Context(), node, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func createDeployment(t *testing.T, c kubernetes.Interface, replicas int32) {
	t.Helper()
	labels := map[string]string{"app": "demo"}
	_, err := c.AppsV1().Deployments("default").Create(t.Context(), &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "demo"},
		Spec: appsv1.DeploymentSpec{
			Replicas: &replicas,
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "example.invalid/c:1"}}},
			},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
}
