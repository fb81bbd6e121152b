package localapi

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"

	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/authentication/user"
	kubeauthorizer "k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/kubernetes/plugin/pkg/auth/authorizer/rbac"

	"github.com/skerry-io/skerry/edgecore/store"
)

// authorizer judges by the RBAC objects in the store, as Kubernetes does.
type authorizer struct {
	node string
	rbac *rbac.RBACAuthorizer
}

func newAuthorizer(s *store.Store, node string) *authorizer {
	o := &accessObjects{store: s, decoded: map[store.Key]decoded{}}
	return &authorizer{node: node, rbac: rbac.New(o, o, o, o)}
}

// reads are the verbs that this API has.
var reads = []string{"get", "list", "watch"}

// allowed tells whether u may do it here, and if not, why.
func (a *authorizer) allowed(ctx context.Context, u user.Info, attr kubeauthorizer.Attributes) (bool, string, error) {
	if slices.Contains(u.GetGroups(), user.SystemPrivilegedGroup) {
		return true, "", nil
	}
	decision, reason, err := a.rbac.Authorize(ctx, attr)
	if err != nil {
		return false, "", fmt.Errorf("authorise %s: %w", u.GetName(), err)
	}
	return decision == kubeauthorizer.DecisionAllow, reason, nil
}

// readOnly is the answer to a write.
func (a *authorizer) readOnly(attr kubeauthorizer.Attributes) error {
	gr := schema.GroupResource{Group: attr.GetAPIGroup(), Resource: attr.GetResource()}
	what := attr.GetPath()
	if attr.GetResource() != "" {
		what = gr.String()
	}
	if sub := attr.GetSubresource(); sub != "" {
		what += "/" + sub
	}
	return apierrors.NewForbidden(gr, attr.GetName(), fmt.Errorf(
		"cannot %s %s here: edge node %s is read-only for local clients, as its store follows the cluster; do it at the cluster's API server, and the change comes down by itself",
		attr.GetVerb(), what, a.node))
}

// accessObjects hands RBAC objects from the store to the evaluation.
type accessObjects struct {
	store *store.Store

	mu      sync.Mutex
	decoded map[store.Key]decoded
}

type decoded struct {
	rv  uint64
	obj any
}

// maxDecoded bounds what is kept decoded; a node has a few dozen.
const maxDecoded = 1024

func decode[T any](a *accessObjects, o *store.Object) (*T, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if d, ok := a.decoded[o.Key]; ok && d.rv == o.RV {
		return d.obj.(*T), nil
	}
	obj := new(T)
	if err := json.Unmarshal(o.Body, obj); err != nil {
		return nil, fmt.Errorf("%s: %w", o.Key, err)
	}
	if len(a.decoded) >= maxDecoded {
		clear(a.decoded)
	}
	a.decoded[o.Key] = decoded{o.RV, obj}
	return obj, nil
}

func getAccess[T any](a *accessObjects, k store.Key) (*T, error) {
	o, ok := a.store.Get(k)
	if !ok {
		return nil, apierrors.NewNotFound(schema.GroupResource{Group: rbacv1.GroupName, Resource: k.Resource}, k.Name)
	}
	return decode[T](a, &o)
}

func listAccess[T any](a *accessObjects, resource, namespace string) ([]*T, error) {
	objects, _ := a.store.List(resource, namespace)
	all := make([]*T, 0, len(objects))
	for i := range objects {
		o, err := decode[T](a, &objects[i])
		if err != nil {
			return nil, err
		}
		all = append(all, o)
	}
	return all, nil
}

func (a *accessObjects) GetRole(_ context.Context, namespace, name string) (*rbacv1.Role, error) {
	return getAccess[rbacv1.Role](a, store.Key{Resource: "roles", Namespace: namespace, Name: name})
}

func (a *accessObjects) GetClusterRole(_ context.Context, name string) (*rbacv1.ClusterRole, error) {
	return getAccess[rbacv1.ClusterRole](a, store.Key{Resource: "clusterroles", Name: name})
}

// ListRoleBindings is asked for one namespace only; the store takes an empty
// one for all.
func (a *accessObjects) ListRoleBindings(_ context.Context, namespace string) ([]*rbacv1.RoleBinding, error) {
	if namespace == "" {
		return nil, nil
	}
	return listAccess[rbacv1.RoleBinding](a, "rolebindings", namespace)
}

func (a *accessObjects) ListClusterRoleBindings(context.Context) ([]*rbacv1.ClusterRoleBinding, error) {
	return listAccess[rbacv1.ClusterRoleBinding](a, "clusterrolebindings", "")
}
