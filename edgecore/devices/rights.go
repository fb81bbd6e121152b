package devices

import (
	"context"
	"fmt"
	"net/http"

	"k8s.io/apiserver/pkg/authentication/user"
	kubeauthorizer "k8s.io/apiserver/pkg/authorization/authorizer"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
)

// right is what a caller may do, in the words of RBAC. The hub judges its
// callers by the same.
type right struct{ verb, resource, subresource string }

var (
	mayGet       = right{"get", v1alpha1.Devices, "twin"}
	mayList      = right{"list", v1alpha1.Devices, "twin"}
	mayWatch     = right{"watch", v1alpha1.Devices, "twin"}
	maySet       = right{"patch", v1alpha1.Devices, "desired"}
	mayCommand   = right{"create", v1alpha1.Devices, "commands"}
	mayTelemeter = right{"create", v1alpha1.Routes, "records"}
)

// attributes are for one object, or for all of a namespace (name ""), or for
// all.
func (r right) attributes(who user.Info, namespace, name string) kubeauthorizer.Attributes {
	return kubeauthorizer.AttributesRecord{
		User: who, Verb: r.verb, Namespace: namespace, Name: name,
		APIGroup: v1alpha1.Group, APIVersion: v1alpha1.APIVersion, Resource: r.resource, Subresource: r.subresource, ResourceRequest: true,
	}
}

// apiError is an answer that is none of what was asked for.
type apiError struct {
	code    int
	message string
}

func (e *apiError) Error() string { return e.message }

func refuse(code int, format string, args ...any) error {
	return &apiError{code, fmt.Sprintf(format, args...)}
}

// permit returns nil if who has the right.
func permit(ctx context.Context, a Access, who user.Info, r right, namespace, name string) error {
	ok, reason, err := a.Allowed(ctx, r.attributes(who, namespace, name))
	switch {
	case err != nil:
		return refuse(http.StatusInternalServerError, "%v", err)
	case ok:
		return nil
	}
	what := fmt.Sprintf("%s %s/%s in API group %s", r.verb, r.resource, r.subresource, v1alpha1.Group)
	switch {
	case name != "":
		what += fmt.Sprintf(", %s in namespace %s", name, namespace)
	case namespace != "":
		what += fmt.Sprintf(" in namespace %s", namespace)
	}
	if reason != "" {
		reason = ": " + reason
	}
	return refuse(http.StatusForbidden, "%s may not %s%s", who.GetName(), what, reason)
}
