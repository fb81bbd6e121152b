package localapi

import (
	"io"
	"net/http"
	"slices"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/authentication/user"
	kubeauthorizer "k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/client-go/kubernetes/scheme"
)

// Reviews ask who one is and what one may do; they are created, and nothing is
// kept of them.
const maxReview = 64 << 10

type review struct{ group, resource string }

// reviewOf recognises a request for one; nil if it is none.
func reviewOf(r *http.Request) *review {
	if r.Method != http.MethodPost {
		return nil
	}
	switch r.URL.Path {
	case "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews":
		return &review{authorizationv1.GroupName, "selfsubjectaccessreviews"}
	case "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews":
		return &review{authorizationv1.GroupName, "selfsubjectrulesreviews"}
	case "/apis/authentication.k8s.io/v1/selfsubjectreviews":
		return &review{authenticationv1.GroupName, "selfsubjectreviews"}
	}
	return nil
}

func (s *Server) serveReview(w http.ResponseWriter, r *http.Request, who user.Info, q *review) error {
	err := s.permit(r.Context(), kubeauthorizer.AttributesRecord{
		User: who, Verb: "create", APIGroup: q.group, APIVersion: "v1", Resource: q.resource, ResourceRequest: true, Path: r.URL.Path,
	})
	if err != nil {
		return err
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxReview))
	if err != nil {
		return apierrors.NewBadRequest("the body could not be read: " + err.Error())
	}
	var answer any
	switch q.resource {
	case "selfsubjectaccessreviews":
		answer, err = s.accessReview(r, who, body)
	case "selfsubjectrulesreviews":
		answer, err = s.rulesReview(r, who, body)
	default:
		answer = whoAmI(who)
	}
	if err != nil {
		return err
	}
	s.respond(w, http.StatusCreated, answer)
	return nil
}

func (s *Server) accessReview(r *http.Request, who user.Info, body []byte) (any, error) {
	var in authorizationv1.SelfSubjectAccessReview
	if err := decodeInto(body, &in); err != nil {
		return nil, err
	}
	attr := kubeauthorizer.AttributesRecord{User: who}
	switch {
	case in.Spec.ResourceAttributes != nil:
		a := in.Spec.ResourceAttributes
		attr.ResourceRequest, attr.Verb, attr.Namespace, attr.Name = true, a.Verb, a.Namespace, a.Name
		attr.APIGroup, attr.APIVersion, attr.Resource, attr.Subresource = a.Group, a.Version, a.Resource, a.Subresource
	case in.Spec.NonResourceAttributes != nil:
		attr.Verb, attr.Path = in.Spec.NonResourceAttributes.Verb, in.Spec.NonResourceAttributes.Path
	default:
		return nil, apierrors.NewBadRequest("spec.resourceAttributes or spec.nonResourceAttributes is required")
	}
	in.Kind, in.APIVersion = "SelfSubjectAccessReview", authorizationv1.SchemeGroupVersion.String()
	if !slices.Contains(reads, attr.Verb) && !s.actsInContainers(who, attr) {
		in.Status = authorizationv1.SubjectAccessReviewStatus{Denied: true, Reason: s.may.readOnly(attr).Error()}
		return in, nil
	}
	ok, reason, err := s.may.allowed(r.Context(), who, attr)
	if err != nil {
		return nil, apierrors.NewInternalError(err)
	}
	in.Status = authorizationv1.SubjectAccessReviewStatus{Allowed: ok, Reason: reason}
	return in, nil
}

// decodeInto reads JSON or, as client-go prefers, protobuf.
func decodeInto(body []byte, into runtime.Object) error {
	if err := runtime.DecodeInto(scheme.Codecs.UniversalDeserializer(), body, into); err != nil {
		return apierrors.NewBadRequest("the body could not be read: " + err.Error())
	}
	return nil
}

// actsInContainers tells of the one thing that is done here and is no read.
func (s *Server) actsInContainers(who user.Info, attr kubeauthorizer.AttributesRecord) bool {
	return slices.Contains(who.GetGroups(), user.SystemPrivilegedGroup) && attr.Verb == "create" && attr.APIGroup == "" &&
		attr.Resource == "pods" && slices.Contains([]string{"exec", "attach", "portforward"}, attr.Subresource)
}

func (s *Server) rulesReview(r *http.Request, who user.Info, body []byte) (any, error) {
	var in authorizationv1.SelfSubjectRulesReview
	if err := decodeInto(body, &in); err != nil {
		return nil, err
	}
	if in.Spec.Namespace == "" {
		return nil, apierrors.NewBadRequest("spec.namespace is required")
	}
	in.Kind, in.APIVersion = "SelfSubjectRulesReview", authorizationv1.SchemeGroupVersion.String()
	in.Status.ResourceRules, in.Status.NonResourceRules = []authorizationv1.ResourceRule{}, []authorizationv1.NonResourceRule{}
	if slices.Contains(who.GetGroups(), user.SystemPrivilegedGroup) {
		in.Status.ResourceRules = append(in.Status.ResourceRules, authorizationv1.ResourceRule{Verbs: reads, APIGroups: []string{"*"}, Resources: []string{"*"}})
		in.Status.NonResourceRules = append(in.Status.NonResourceRules, authorizationv1.NonResourceRule{Verbs: []string{"get"}, NonResourceURLs: []string{"*"}})
		return in, nil
	}
	resources, paths, incomplete, err := s.may.rbac.RulesFor(r.Context(), who, in.Spec.Namespace)
	in.Status.Incomplete = incomplete
	if err != nil {
		in.Status.EvaluationError = err.Error() // a role that a binding names is not there
	}
	for _, x := range resources {
		in.Status.ResourceRules = append(in.Status.ResourceRules, authorizationv1.ResourceRule{
			Verbs: x.GetVerbs(), APIGroups: x.GetAPIGroups(), Resources: x.GetResources(), ResourceNames: x.GetResourceNames(),
		})
	}
	for _, x := range paths {
		in.Status.NonResourceRules = append(in.Status.NonResourceRules, authorizationv1.NonResourceRule{Verbs: x.GetVerbs(), NonResourceURLs: x.GetNonResourceURLs()})
	}
	return in, nil
}

func whoAmI(who user.Info) any {
	out := authenticationv1.SelfSubjectReview{}
	out.Kind, out.APIVersion = "SelfSubjectReview", authenticationv1.SchemeGroupVersion.String()
	out.Status.UserInfo = authenticationv1.UserInfo{Username: who.GetName(), UID: who.GetUID(), Groups: who.GetGroups()}
	for k, v := range who.GetExtra() {
		if out.Status.UserInfo.Extra == nil {
			out.Status.UserInfo.Extra = map[string]authenticationv1.ExtraValue{}
		}
		out.Status.UserInfo.Extra[k] = v
	}
	return out
}
