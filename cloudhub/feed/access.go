package feed

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/authentication/serviceaccount"
	"k8s.io/apiserver/pkg/authentication/user"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// A node authorises clients on the device by itself, by the RBAC objects that
// concern the service accounts of its pods. They are found along the way that
// evaluation takes: a pod names a service account; that is known by subjects, its
// own and its groups'; a subject has bindings; a binding names a role.
//
// A subject is no object and never sent. It stands among the refs so that a
// binding which starts or stops to name it reaches the nodes concerned, and no
// others.
const subjects = "#subjects"

const bySubject = "subject"

// subjectOf is the service account or group that a binding's subject stands
// for; empty for one that no service account can be, such as a person.
func subjectOf(s rbacv1.Subject, bindingNamespace string) string {
	switch s.Kind {
	case rbacv1.ServiceAccountKind:
		ns := s.Namespace
		if ns == "" {
			ns = bindingNamespace
		}
		if ns == "" {
			return ""
		}
		return serviceaccount.MakeUsername(ns, s.Name)
	case rbacv1.UserKind:
		if strings.HasPrefix(s.Name, serviceaccount.ServiceAccountUsernamePrefix) {
			return s.Name
		}
	case rbacv1.GroupKind:
		if s.Name == user.AllAuthenticated || s.Name == serviceaccount.AllServiceAccountsGroup ||
			strings.HasPrefix(s.Name, serviceaccount.ServiceAccountGroupPrefix) {
			return s.Name
		}
	}
	return ""
}

// subjectsOf lists what a binding's subjects stand for; nil if obj is none.
func subjectsOf(obj any) []string {
	var all []rbacv1.Subject
	ns := ""
	switch o := obj.(type) {
	case *rbacv1.RoleBinding:
		all, ns = o.Subjects, o.Namespace
	case *rbacv1.ClusterRoleBinding:
		all = o.Subjects
	}
	var names []string
	for _, s := range all {
		if name := subjectOf(s, ns); name != "" {
			names = append(names, name)
		}
	}
	return names
}

func subjectRef(name string) edgeapi.Ref { return edgeapi.Ref{Resource: subjects, Name: name} }

// subjectRefs are the subjects that a service account is.
func subjectRefs(sa *corev1.ServiceAccount) []edgeapi.Ref {
	refs := []edgeapi.Ref{
		subjectRef(serviceaccount.MakeUsername(sa.Namespace, sa.Name)),
		subjectRef(user.AllAuthenticated),
	}
	for _, group := range serviceaccount.MakeGroupNames(sa.Namespace) {
		refs = append(refs, subjectRef(group))
	}
	return refs
}

// roleRef is the role that a binding gives.
func roleRef(r rbacv1.RoleRef, namespace string) []edgeapi.Ref {
	switch {
	case r.Kind == "ClusterRole":
		return []edgeapi.Ref{{Resource: "clusterroles", Name: r.Name}}
	case r.Kind == "Role" && namespace != "":
		return []edgeapi.Ref{{Resource: "roles", Namespace: namespace, Name: r.Name}}
	}
	return nil
}

// bindingsOf lists the bindings that name a subject.
func (f *Feed) bindingsOf(subject string) []edgeapi.Ref {
	var refs []edgeapi.Ref
	for _, resource := range []string{"clusterrolebindings", "rolebindings"} {
		objs, err := f.byName[resource].indexer.ByIndex(bySubject, subject)
		if err != nil {
			f.log.Error("bindings have no index", "resource", resource, "err", err)
			return nil
		}
		for _, obj := range objs {
			refs = append(refs, refTo(resource, obj))
		}
	}
	return refs
}

// slimAccess leaves out of RBAC objects what no node needs: people and groups
// that are none of a service account's are not a device's business.
func slimAccess(obj runtime.Object) {
	keep := func(all []rbacv1.Subject, ns string) []rbacv1.Subject {
		var kept []rbacv1.Subject
		for _, s := range all {
			if subjectOf(s, ns) != "" {
				kept = append(kept, s)
			}
		}
		return kept
	}
	switch o := obj.(type) {
	case *rbacv1.RoleBinding:
		o.Annotations, o.Subjects = nil, keep(o.Subjects, o.Namespace)
	case *rbacv1.ClusterRoleBinding:
		o.Annotations, o.Subjects = nil, keep(o.Subjects, "")
	case *rbacv1.Role:
		o.Annotations = nil
	case *rbacv1.ClusterRole:
		o.Annotations = nil // .rules are complete: the control plane aggregates
	}
}
