package apifacade

import (
	"strings"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// verbSet is what may be done with a resource.
type verbSet []string

func (v verbSet) has(verb string) bool {
	for _, have := range v {
		if have == verb {
			return true
		}
	}
	return false
}

func verbs(s string) verbSet { return strings.Fields(s) }

// resource is one served resource. An empty group is the core group.
type resource struct {
	group, version string
	name, singular string
	kind           string
	short          []string
	namespaced     bool
	verbs          verbSet
	subresources   map[string]verbSet
	new            func() metav1.Object // for what is written here; nil when read-only
	fields         []string             // field selectors besides metadata's
	gated          bool                 // not served before the first sync
}

func (r *resource) gr() schema.GroupResource { return groupResource(r.group, r.name) }

func (r *resource) apiVersion() string {
	return schema.GroupVersion{Group: r.group, Version: r.version}.String()
}

func groupResource(group, name string) schema.GroupResource {
	return schema.GroupResource{Group: group, Resource: name}
}

// resources lists all that is served. What is not here is 404, which is what
// the kubelet expects of a cluster without the feature.
func resources() []*resource {
	const rbac = rbacv1.GroupName
	read := verbs("get list watch")
	status := map[string]verbSet{"status": verbs("get patch update")}
	return []*resource{
		{version: "v1", name: "pods", singular: "pod", kind: "Pod", short: []string{"po"}, namespaced: true, gated: true,
			verbs: verbs("get list watch create delete"), subresources: status,
			fields: []string{"spec.nodeName", "status.phase", "spec.serviceAccountName", "spec.restartPolicy", "status.podIP"},
			new:    func() metav1.Object { return &corev1.Pod{} }},
		{version: "v1", name: "nodes", singular: "node", kind: "Node", short: []string{"no"},
			verbs: verbs("get list watch create patch update"), subresources: status,
			fields: []string{"spec.unschedulable"},
			new:    func() metav1.Object { return &corev1.Node{} }},
		{version: "v1", name: "services", singular: "service", kind: "Service", short: []string{"svc"}, namespaced: true, gated: true,
			verbs: read, fields: []string{"spec.clusterIP", "spec.type"}},
		{version: "v1", name: "configmaps", singular: "configmap", kind: "ConfigMap", short: []string{"cm"}, namespaced: true, verbs: read},
		{version: "v1", name: "secrets", singular: "secret", kind: "Secret", namespaced: true, verbs: read, fields: []string{"type"}},
		{version: "v1", name: "persistentvolumeclaims", singular: "persistentvolumeclaim", kind: "PersistentVolumeClaim", short: []string{"pvc"}, namespaced: true, verbs: read},
		{version: "v1", name: "persistentvolumes", singular: "persistentvolume", kind: "PersistentVolume", short: []string{"pv"}, verbs: read},
		{version: "v1", name: "serviceaccounts", singular: "serviceaccount", kind: "ServiceAccount", short: []string{"sa"}, namespaced: true, verbs: read,
			subresources: map[string]verbSet{"token": verbs("create")}},
		{version: "v1", name: "events", singular: "event", kind: "Event", short: []string{"ev"}, namespaced: true,
			verbs: verbs("get list watch create update patch delete"),
			fields: []string{"involvedObject.kind", "involvedObject.namespace", "involvedObject.name", "involvedObject.uid",
				"involvedObject.apiVersion", "involvedObject.fieldPath", "reason", "reportingComponent", "source", "type"},
			new: func() metav1.Object { return &corev1.Event{} }},
		{group: "coordination.k8s.io", version: "v1", name: "leases", singular: "lease", kind: "Lease", namespaced: true,
			verbs: verbs("get list watch create update patch delete"),
			new:   func() metav1.Object { return &coordinationv1.Lease{} }},
		{group: rbac, version: "v1", name: "roles", singular: "role", kind: "Role", namespaced: true, verbs: read},
		{group: rbac, version: "v1", name: "rolebindings", singular: "rolebinding", kind: "RoleBinding", namespaced: true, verbs: read},
		{group: rbac, version: "v1", name: "clusterroles", singular: "clusterrole", kind: "ClusterRole", verbs: read},
		{group: rbac, version: "v1", name: "clusterrolebindings", singular: "clusterrolebinding", kind: "ClusterRoleBinding", verbs: read},
		{group: "discovery.k8s.io", version: "v1", name: "endpointslices", singular: "endpointslice", kind: "EndpointSlice", namespaced: true, verbs: read},
		{group: "node.k8s.io", version: "v1", name: "runtimeclasses", singular: "runtimeclass", kind: "RuntimeClass", verbs: read},
		{group: "storage.k8s.io", version: "v1", name: "csidrivers", singular: "csidriver", kind: "CSIDriver", verbs: read},
		{group: "storage.k8s.io", version: "v1", name: "csinodes", singular: "csinode", kind: "CSINode",
			verbs: verbs("get list watch create update patch delete"),
			new:   func() metav1.Object { return &storagev1.CSINode{} }},
	}
}
