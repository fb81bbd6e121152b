package controlplane

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/component-helpers/auth/rbac/reconciliation"
	"k8s.io/kubernetes/plugin/pkg/auth/authorizer/rbac/bootstrappolicy"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
)

// SystemNamespace holds the hub's own objects.
const SystemNamespace = "skerry-system"

// hubRules are what the hub may do as itself, in the whole cluster: read what
// nodes are fed, keep pods on nodes that are cut off, and look after devices. What a node writes
// or asks for is done as that node, by impersonationRules.
func hubRules() []rbacv1.PolicyRule {
	read := []string{"get", "list", "watch"}
	return []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Verbs: read, Resources: []string{
			"pods", "nodes", "services", "configmaps", "secrets", "persistentvolumeclaims", "persistentvolumes", "namespaces",
			"serviceaccounts",
		}},
		{APIGroups: []string{"discovery.k8s.io"}, Verbs: read, Resources: []string{"endpointslices"}},
		{APIGroups: []string{"node.k8s.io"}, Verbs: read, Resources: []string{"runtimeclasses"}},
		{APIGroups: []string{"storage.k8s.io"}, Verbs: read, Resources: []string{"csidrivers", "volumeattachments"}},
		// By these a node authorises clients on the device.
		{APIGroups: []string{rbacv1.GroupName}, Verbs: read, Resources: []string{"roles", "rolebindings", "clusterroles", "clusterrolebindings"}},
		{Verbs: []string{"get"}, NonResourceURLs: []string{"/.well-known/openid-configuration", "/openid/v1/jwks"}},
		{APIGroups: []string{""}, Verbs: []string{"patch"}, Resources: []string{"pods"}}, // tolerations
		{APIGroups: []string{"", "events.k8s.io"}, Verbs: []string{"create", "patch", "update"}, Resources: []string{"events"}},
		// Devices: their definitions, what nodes are fed of them, their status, and
		// the Devices that discoveries make.
		{APIGroups: []string{"apiextensions.k8s.io"}, Verbs: []string{"get", "create", "patch"}, Resources: []string{"customresourcedefinitions"}},
		{APIGroups: []string{v1alpha1.Group}, Verbs: read, Resources: []string{v1alpha1.Devices, v1alpha1.Models, v1alpha1.Discoveries, v1alpha1.Routes}},
		{APIGroups: []string{v1alpha1.Group}, Verbs: []string{"patch"}, Resources: []string{
			v1alpha1.Devices + "/status", v1alpha1.Discoveries + "/status", v1alpha1.Routes + "/status",
		}},
		{APIGroups: []string{v1alpha1.Group}, Verbs: []string{"create", "patch", "delete"}, Resources: []string{v1alpha1.Devices}},
		{APIGroups: []string{"authentication.k8s.io"}, Verbs: []string{"create"}, Resources: []string{"tokenreviews"}},
		{APIGroups: []string{"authorization.k8s.io"}, Verbs: []string{"create"}, Resources: []string{"subjectaccessreviews"}},
	}
}

// impersonationRules let the hub act as any node in what a kubelet does, and as
// a user in the patch of a Device and nothing else. The former are the built-in
// rules of nodes, verb by verb; the Node authorizer and NodeRestriction still
// judge each request as that node's, and RBAC a user's as that user's.
func impersonationRules() []rbacv1.PolicyRule {
	rules := []rbacv1.PolicyRule{{
		APIGroups: []string{"authentication.k8s.io"},
		Resources: []string{"nodes"},
		Verbs:     []string{"impersonate:arbitrary-node"},
	}}
	for _, node := range bootstrappolicy.NodeRules() {
		rule := *node.DeepCopy()
		for i, verb := range rule.Verbs {
			rule.Verbs[i] = "impersonate-on:arbitrary-node:" + verb
		}
		rules = append(rules, rule)
	}
	// What a user wants of a device through the hub is done as that user. The
	// hub may be any user or service account, but only to patch a Device.
	return append(rules,
		rbacv1.PolicyRule{APIGroups: []string{"authentication.k8s.io"}, Resources: []string{"users", "groups"}, Verbs: []string{"impersonate:user-info"}},
		rbacv1.PolicyRule{APIGroups: []string{"authentication.k8s.io"}, Resources: []string{"serviceaccounts"}, Verbs: []string{"impersonate:serviceaccount"}},
		rbacv1.PolicyRule{APIGroups: []string{v1alpha1.Group}, Resources: []string{v1alpha1.Devices}, Verbs: []string{
			"impersonate-on:user-info:patch", "impersonate-on:serviceaccount:patch", "impersonate-on:arbitrary-node:patch",
		}},
	)
}

// namespaceRules are the hub's rights in single namespaces.
func namespaceRules() map[string][]rbacv1.PolicyRule {
	all := []string{"get", "list", "watch", "create", "update", "patch", "delete"}
	return map[string][]rbacv1.PolicyRule{
		// The authority, join tokens and the register of nodes.
		SystemNamespace: {{APIGroups: []string{""}, Resources: []string{"secrets", "configmaps"}, Verbs: all}},
		// Heartbeats of nodes whose tunnel is up.
		corev1.NamespaceNodeLease: {{APIGroups: []string{"coordination.k8s.io"}, Resources: []string{"leases"}, Verbs: all}},
	}
}

// userRoles add the devices' API to the built-in roles view, edit and admin.
// devices/twin are live values, devices/desired what a pod on the node may set,
// devices/commands what a device may be told to do.
func userRoles() []rbacv1.ClusterRole {
	objects := []string{v1alpha1.Devices, v1alpha1.Models, v1alpha1.Discoveries, v1alpha1.Routes}
	aggregate := func(name string, to []string, rules ...rbacv1.PolicyRule) rbacv1.ClusterRole {
		role := rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{}}, Rules: rules}
		for _, t := range to {
			role.Labels["rbac.authorization.k8s.io/aggregate-to-"+t] = "true"
		}
		return role
	}
	return []rbacv1.ClusterRole{
		aggregate("skerry:devices-view", []string{"view", "edit", "admin"}, rbacv1.PolicyRule{
			APIGroups: []string{v1alpha1.Group}, Verbs: []string{"get", "list", "watch"},
			Resources: append([]string{v1alpha1.Devices + "/twin"}, objects...),
		}),
		aggregate("skerry:devices-edit", []string{"edit", "admin"},
			rbacv1.PolicyRule{
				APIGroups: []string{v1alpha1.Group}, Verbs: []string{"create", "update", "patch", "delete", "deletecollection"}, Resources: objects,
			},
			rbacv1.PolicyRule{
				APIGroups: []string{v1alpha1.Group}, Verbs: []string{"create", "update", "patch"},
				Resources: []string{v1alpha1.Devices + "/desired", v1alpha1.Devices + "/commands"},
			}),
		// The way to twins through the API server: what may be done there is
		// judged by the rules above.
		{ObjectMeta: metav1.ObjectMeta{Name: twinsRole}, Rules: []rbacv1.PolicyRule{{
			NonResourceURLs: []string{"/skerry/v1/twins", "/skerry/v1/twins/*"}, Verbs: []string{"get", "patch", "post"},
		}}},
	}
}

const twinsRole = "skerry:twins"

// bootstrapIdentity gives the hub's user its rights, no more and no less, and
// returns once the API server grants them.
func bootstrapIdentity(ctx context.Context, loopback, hub *rest.Config) error {
	admin, err := kubernetes.NewForConfig(loopback)
	if err != nil {
		return fmt.Errorf("control plane: client of the API server: %w", err)
	}
	if err := reconcileRights(ctx, admin); err != nil {
		return fmt.Errorf("control plane: give %s its rights: %w", hubUser, err)
	}
	client, err := kubernetes.NewForConfig(hub)
	if err != nil {
		return fmt.Errorf("control plane: client of the hub: %w", err)
	}
	return awaitRights(ctx, client)
}

func reconcileRights(ctx context.Context, admin kubernetes.Interface) error {
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: SystemNamespace}}
	if _, err := admin.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("create namespace %s: %w", SystemNamespace, err)
	}
	subject := rbacv1.Subject{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: hubUser}
	roles := reconciliation.ClusterRoleModifier{Client: admin.RbacV1().ClusterRoles()}
	bindings := reconciliation.ClusterRoleBindingClientAdapter{Client: admin.RbacV1().ClusterRoleBindings()}
	cluster := &rbacv1.ClusterRole{
		ObjectMeta: metav1.ObjectMeta{Name: hubUser},
		Rules:      slices.Concat(hubRules(), impersonationRules()),
	}
	if err := reconcileRole(reconciliation.ClusterRoleRuleOwner{ClusterRole: cluster}, roles); err != nil {
		return err
	}
	binding := reconciliation.ClusterRoleBindingAdapter{ClusterRoleBinding: &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: hubUser},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: hubUser},
		Subjects:   []rbacv1.Subject{subject},
	}}
	if err := reconcileBinding(binding, bindings); err != nil {
		return err
	}
	twins := reconciliation.ClusterRoleBindingAdapter{ClusterRoleBinding: &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: twinsRole},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: twinsRole},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.GroupKind, Name: user.AllAuthenticated}},
	}}
	if err := reconcileBinding(twins, bindings); err != nil {
		return err
	}
	for _, role := range userRoles() {
		if err := reconcileRole(reconciliation.ClusterRoleRuleOwner{ClusterRole: &role}, roles); err != nil {
			return err
		}
	}
	for namespace, rules := range namespaceRules() {
		meta := metav1.ObjectMeta{Namespace: namespace, Name: hubUser}
		role := reconciliation.RoleRuleOwner{Role: &rbacv1.Role{ObjectMeta: meta, Rules: rules}}
		if err := reconcileRole(role, reconciliation.RoleModifier{Client: admin.RbacV1(), NamespaceClient: admin.CoreV1().Namespaces()}); err != nil {
			return err
		}
		binding := reconciliation.RoleBindingAdapter{RoleBinding: &rbacv1.RoleBinding{
			ObjectMeta: meta,
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: hubUser},
			Subjects:   []rbacv1.Subject{subject},
		}}
		if err := reconcileBinding(binding, reconciliation.RoleBindingClientAdapter{Client: admin.RbacV1(), NamespaceClient: admin.CoreV1().Namespaces()}); err != nil {
			return err
		}
	}
	return nil
}

func reconcileRole(role reconciliation.RuleOwner, client reconciliation.RuleOwnerModifier) error {
	o := reconciliation.ReconcileRoleOptions{Role: role, Client: client, Confirm: true, RemoveExtraPermissions: true}
	if _, err := o.Run(); err != nil {
		return fmt.Errorf("role %s in namespace %q: %w", role.GetName(), role.GetNamespace(), err)
	}
	return nil
}

func reconcileBinding(binding reconciliation.RoleBinding, client reconciliation.RoleBindingModifier) error {
	o := reconciliation.ReconcileRoleBindingOptions{RoleBinding: binding, Client: client, Confirm: true, RemoveExtraSubjects: true}
	if _, err := o.Run(); err != nil {
		return fmt.Errorf("binding %s in namespace %q: %w", binding.GetName(), binding.GetNamespace(), err)
	}
	return nil
}

// awaitRights waits until the authorizer has seen the new roles; it learns of
// them through a watch of its own.
func awaitRights(ctx context.Context, hub kubernetes.Interface) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	attributes := []authorizationv1.ResourceAttributes{
		{Group: "apiextensions.k8s.io", Resource: "customresourcedefinitions", Verb: "patch"},
		{Group: v1alpha1.Group, Resource: v1alpha1.Routes, Verb: "watch"},
		{Group: "authentication.k8s.io", Resource: "nodes", Verb: "impersonate:arbitrary-node"},
		{Group: rbacv1.GroupName, Resource: "rolebindings", Verb: "watch"},
		{Namespace: SystemNamespace, Resource: "secrets", Verb: "create"},
		{Namespace: corev1.NamespaceNodeLease, Group: "coordination.k8s.io", Resource: "leases", Verb: "update"},
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for i := 0; i < len(attributes); {
		review, err := hub.AuthorizationV1().SelfSubjectAccessReviews().Create(ctx, &authorizationv1.SelfSubjectAccessReview{
			Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &attributes[i]},
		}, metav1.CreateOptions{})
		if err != nil && !apierrors.IsForbidden(err) && !errors.Is(err, context.DeadlineExceeded) {
			return fmt.Errorf("control plane: ask for the rights of %s: %w", hubUser, err)
		}
		if err == nil && review.Status.Allowed {
			i++
			continue
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("control plane: %s was not granted its rights in time (%s %s)", hubUser, attributes[i].Verb, attributes[i].Resource)
		}
	}
	return nil
}
