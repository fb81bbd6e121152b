package feed

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	kubetypes "k8s.io/kubernetes/pkg/kubelet/types"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// revision returns what tells two versions of an object apart for a node. For
// most it is the resourceVersion. A pod's, a Node's and a device's changes with
// every status that was written of it, so theirs is a digest of the part that
// the cloud owns; it is also the same in every replica of the hub.
func revision(obj runtime.Object) (string, error) {
	switch o := obj.(type) {
	case *corev1.Pod:
		return digest(cloudPod(o))
	case *corev1.Node:
		return digest(cloudNode(o))
	}
	if part, ok := cloudDevice(obj); ok {
		return digest(part)
	}
	return obj.(metav1.Object).GetResourceVersion(), nil
}

func digest(part any) (string, error) {
	b, err := json.Marshal(part)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(b)
	return base64.RawURLEncoding.EncodeToString(sum[:12]), nil
}

// cloudPod is the part of a pod that the cloud owns.
func cloudPod(p *corev1.Pod) *corev1.Pod {
	out := &corev1.Pod{ObjectMeta: p.ObjectMeta, Spec: p.Spec}
	out.ResourceVersion = ""
	out.ManagedFields = nil
	for _, c := range p.Status.Conditions {
		if !kubetypes.PodConditionByKubelet(c.Type) {
			out.Status.Conditions = append(out.Status.Conditions, c)
		}
	}
	return out
}

// cloudNode is the part of a Node that the cloud owns.
func cloudNode(n *corev1.Node) *corev1.Node {
	out := &corev1.Node{ObjectMeta: n.ObjectMeta, Spec: n.Spec}
	out.ResourceVersion = ""
	out.ManagedFields = nil
	return out
}

// body returns the object's JSON with apiVersion and kind. known says that the
// node has this very object (the same UID) already.
func (s *source) body(obj runtime.Object, known bool) (json.RawMessage, error) {
	var part any = obj
	if down, ok := cloudDevice(obj); ok {
		part = down
	}
	if known {
		switch o := obj.(type) {
		case *corev1.Pod:
			part = cloudPod(o)
		case *corev1.Node:
			part = cloudNode(o)
		}
	}
	// Informer objects are shared and carry no TypeMeta.
	b, err := json.Marshal(part)
	if err != nil {
		return nil, err
	}
	if len(b) < 3 || b[0] != '{' {
		return nil, fmt.Errorf("unexpected JSON for %s", s.kind)
	}
	head := fmt.Sprintf(`{"kind":%q,"apiVersion":%q,`, s.kind, s.version)
	return append([]byte(head), b[1:]...), nil
}

// refsOf returns the on-demand objects that obj names.
func refsOf(obj runtime.Object) []edgeapi.Ref {
	switch o := obj.(type) {
	case *corev1.Pod:
		return podRefs(o)
	case *corev1.PersistentVolumeClaim:
		if o.Spec.VolumeName != "" {
			return []edgeapi.Ref{{Resource: "persistentvolumes", Name: o.Spec.VolumeName}}
		}
	case *corev1.ServiceAccount:
		return subjectRefs(o)
	case *rbacv1.RoleBinding:
		return roleRef(o.RoleRef, o.Namespace)
	case *rbacv1.ClusterRoleBinding:
		return roleRef(o.RoleRef, "")
	case *v1alpha1.Device:
		return deviceRefs(o)
	case *v1alpha1.TelemetryRoute:
		return routeRefs(o)
	}
	return nil
}

func podRefs(p *corev1.Pod) []edgeapi.Ref {
	seen := map[edgeapi.Ref]bool{}
	var refs []edgeapi.Ref
	add := func(resource string) podutil.Visitor {
		return func(name string) bool {
			ref := edgeapi.Ref{Resource: resource, Namespace: p.Namespace, Name: name}
			if name != "" && !seen[ref] {
				seen[ref] = true
				refs = append(refs, ref)
			}
			return true
		}
	}
	podutil.VisitPodConfigmapNames(p, add("configmaps"))
	podutil.VisitPodSecretNames(p, add("secrets"))
	add("serviceaccounts")(p.Spec.ServiceAccountName)
	for i := range p.Spec.Volumes {
		v := &p.Spec.Volumes[i]
		switch {
		case v.PersistentVolumeClaim != nil:
			add("persistentvolumeclaims")(v.PersistentVolumeClaim.ClaimName)
		case v.Ephemeral != nil:
			add("persistentvolumeclaims")(p.Name + "-" + v.Name)
		}
	}
	return refs
}
