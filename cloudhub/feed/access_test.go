package feed

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"sync/atomic"
	"testing"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

func binding(ns, name, role string, subjects ...rbacv1.Subject) *rbacv1.RoleBinding {
	return &rbacv1.RoleBinding{ObjectMeta: objectMeta(ns, name, name), Subjects: subjects,
		RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: role}}
}

func clusterBinding(name, role string, subjects ...rbacv1.Subject) *rbacv1.ClusterRoleBinding {
	return &rbacv1.ClusterRoleBinding{ObjectMeta: objectMeta("", name, name), Subjects: subjects,
		RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role}}
}

func account(ns, name string) rbacv1.Subject {
	return rbacv1.Subject{Kind: rbacv1.ServiceAccountKind, Namespace: ns, Name: name}
}

func group(name string) rbacv1.Subject {
	return rbacv1.Subject{APIGroup: rbacv1.GroupName, Kind: rbacv1.GroupKind, Name: name}
}

func person(name string) rbacv1.Subject {
	return rbacv1.Subject{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: name}
}

func role(ns, name string) *rbacv1.Role {
	return &rbacv1.Role{ObjectMeta: objectMeta(ns, name, name)}
}

func clusterRole(name string) *rbacv1.ClusterRole {
	return &rbacv1.ClusterRole{ObjectMeta: objectMeta("", name, name)}
}

func serviceAccount(ns, name string) *corev1.ServiceAccount {
	return &corev1.ServiceAccount{ObjectMeta: objectMeta(ns, name, ns+"-"+name)}
}

func podOf(ns, name, node, sa string) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: objectMeta(ns, name, name), Spec: corev1.PodSpec{NodeName: node, ServiceAccountName: sa}}
}

// access lists the RBAC objects and service accounts that the edge has.
func (e *edge) access() []string {
	var out []string
	for ref := range e.have {
		switch ref.Resource {
		case "serviceaccounts", "roles", "rolebindings", "clusterroles", "clusterrolebindings":
			out = append(out, ref.Resource+"/"+ref.Name)
		}
	}
	slices.Sort(out)
	return out
}

func (e *edge) wantAccess(want ...string) {
	e.t.Helper()
	slices.Sort(want)
	e.until("the RBAC objects", func() bool { return slices.Equal(e.access(), want) })
}

func TestAccessThatConcernsANode(t *testing.T) {
	client, f := start(t,
		podOf("shop", "a", "n1", "reader"),
		serviceAccount("shop", "reader"), serviceAccount("shop", "other"), serviceAccount("bank", "reader"),
		role("shop", "direct"), role("bank", "across"), role("shop", "user"), role("shop", "foreign"), role("shop", "late"),
		clusterRole("everyone"), clusterRole("accounts"), clusterRole("namespace"), clusterRole("people"), clusterRole("bank"),
		binding("shop", "direct", "direct", rbacv1.Subject{Kind: rbacv1.ServiceAccountKind, Name: "reader"}, person("jane")), // of the binding's namespace
		binding("bank", "across", "across", account("shop", "reader")),
		binding("shop", "user", "user", person("system:serviceaccount:shop:reader")),
		binding("shop", "foreign", "foreign", account("shop", "other"), account("bank", "reader"), person("jane")),
		binding("shop", "dangling", "missing", account("shop", "reader")),
		clusterBinding("everyone", "everyone", group("system:authenticated")),
		clusterBinding("accounts", "accounts", group("system:serviceaccounts")),
		clusterBinding("namespace", "namespace", group("system:serviceaccounts:shop")),
		clusterBinding("bank", "bank", group("system:serviceaccounts:bank")),
		clusterBinding("people", "people", person("jane"), group("admins"), group("system:unauthenticated")),
	)
	e := connect(t, f, "n1", nil)
	e.sync()
	base := []string{
		"serviceaccounts/reader", "roles/direct", "roles/across", "roles/user",
		"rolebindings/direct", "rolebindings/across", "rolebindings/user", "rolebindings/dangling",
		"clusterroles/everyone", "clusterroles/accounts", "clusterroles/namespace",
		"clusterrolebindings/everyone", "clusterrolebindings/accounts", "clusterrolebindings/namespace",
	}
	e.wantAccess(base...)

	// Nobody but service accounts is named to a device.
	var b rbacv1.RoleBinding
	if err := json.Unmarshal(e.have[edgeapi.Ref{Resource: "rolebindings", Namespace: "shop", Name: "direct"}].Body, &b); err != nil {
		t.Fatal(err)
	}
	if len(b.Subjects) != 1 || b.Subjects[0].Name != "reader" || b.Kind != "RoleBinding" || b.APIVersion != "rbac.authorization.k8s.io/v1" {
		t.Errorf("binding %+v", b)
	}

	ctx := t.Context()
	rbac := client.RbacV1()
	// A binding starts and stops to concern the node.
	late := binding("shop", "late", "late", person("jane"))
	if _, err := rbac.RoleBindings("shop").Create(ctx, late, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	late = late.DeepCopy()
	late.Subjects, late.ResourceVersion = append(late.Subjects, account("shop", "reader")), "2"
	if _, err := rbac.RoleBindings("shop").Update(ctx, late, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	e.wantAccess(append([]string{"rolebindings/late", "roles/late"}, base...)...)
	late = late.DeepCopy()
	late.Subjects, late.ResourceVersion = []rbacv1.Subject{person("jane")}, "3"
	if _, err := rbac.RoleBindings("shop").Update(ctx, late, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	e.wantAccess(base...)

	// So does a role that is made later, or changes.
	if _, err := rbac.Roles("shop").Create(ctx, role("shop", "missing"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	e.wantAccess(append([]string{"roles/missing"}, base...)...)
	missing := role("shop", "missing")
	missing.Rules, missing.ResourceVersion = []rbacv1.PolicyRule{{Verbs: []string{"get"}}}, "2"
	if _, err := rbac.Roles("shop").Update(ctx, missing, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	ref := edgeapi.Ref{Resource: "roles", Namespace: "shop", Name: "missing"}
	e.until("the role's rules", func() bool { return e.have[ref].Rev == "2" })
	if err := rbac.RoleBindings("shop").Delete(ctx, "dangling", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	e.wantAccess(slices.DeleteFunc(slices.Clone(base), func(s string) bool { return s == "rolebindings/dangling" })...)

	// With the account's last pod everything leaves.
	if err := client.CoreV1().Pods("shop").Delete(ctx, "a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	e.wantAccess()
}

func TestAccessWithoutTheAccount(t *testing.T) {
	client, f := start(t, podOf("shop", "a", "n1", "reader"), role("shop", "r"), binding("shop", "r", "r", account("shop", "reader")))
	e := connect(t, f, "n1", nil)
	e.sync()
	e.wantAccess()
	if _, err := client.CoreV1().ServiceAccounts("shop").Create(t.Context(), serviceAccount("shop", "reader"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	e.wantAccess("serviceaccounts/reader", "roles/r", "rolebindings/r")
}

// What left the set while the node was away leaves the node on its return.
func TestAccessOfANodeThatWasAway(t *testing.T) {
	_, f := start(t, podOf("shop", "a", "n1", "reader"), serviceAccount("shop", "reader"))
	have := map[edgeapi.Ref]edgeapi.Upsert{}
	for _, ref := range []edgeapi.Ref{
		{Resource: "rolebindings", Namespace: "shop", Name: "gone"}, {Resource: "clusterroles", Name: "gone"}, {Resource: "serviceaccounts", Namespace: "bank", Name: "gone"},
	} {
		have[ref] = edgeapi.Upsert{Ref: ref, UID: "u", Rev: "1"}
	}
	e := connect(t, f, "n1", have)
	e.sync()
	e.wantAccess("serviceaccounts/reader")
}

func TestTokenIssuer(t *testing.T) {
	var known atomic.Pointer[edgeapi.TokenIssuer]
	_, f := startWith(t, Config{Issuer: func(context.Context) (edgeapi.TokenIssuer, error) {
		if i := known.Load(); i != nil {
			return *i, nil
		}
		return edgeapi.TokenIssuer{}, errors.New("not yet")
	}})
	old := edgeapi.Upsert{Ref: edgeapi.IssuerRef(), UID: edgeapi.IssuerUID, Rev: "old", Body: json.RawMessage("{}")}
	e := connect(t, f, "n1", map[edgeapi.Ref]edgeapi.Upsert{old.Ref: old})
	e.sync()
	if e.have[old.Ref].Rev != "old" {
		t.Fatal("a hub that does not know the issuer yet has changed the node's")
	}
	issuer := edgeapi.NewTokenIssuer("https://cluster", []string{"api"}, []byte(`{"keys":[]}`))
	if err := f.setIssuer(issuer); err != nil {
		t.Fatal(err)
	}
	e.until("the issuer", func() bool { return e.have[old.Ref].Rev != "old" })
	var got edgeapi.TokenIssuer
	if err := json.Unmarshal(e.have[old.Ref].Body, &got); err != nil || got.Issuer != "https://cluster" || got.Kind == "" || got.APIVersion == "" || got.Metadata.Name != old.Ref.Name {
		t.Errorf("issuer %+v (%v)", got, err)
	}
	// A node that has it is not sent it again.
	again := connect(t, f, "n2", map[edgeapi.Ref]edgeapi.Upsert{old.Ref: e.have[old.Ref]})
	if ups, dels := again.sync(); ups != 0 || dels != 0 {
		t.Errorf("%d upserts, %d deletions", ups, dels)
	}
}
