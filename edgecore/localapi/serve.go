package localapi

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apiserver/pkg/authentication/user"
	kubeauthorizer "k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
	"k8s.io/apiserver/pkg/endpoints/request"

	"github.com/skerry-io/skerry/edgecore/apifacade"
)

// devicesPath is where the API of devices stands; Kubernetes' has no such path.
const devicesPath = "/v1/"

// What local clients may take of the node at once.
const (
	maxConns = 256
	maxShort = 32
	maxLong  = 256 // watches, followed logs, exec

	// answerWithin bounds an answer that is no watch or stream.
	answerWithin = time.Minute
)

// handler serves one listener.
func (s *Server) handler(admin bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		who, err := s.auth.authenticate(r, admin)
		if err != nil {
			s.log.Debug("local client refused", "remote", r.RemoteAddr, "path", r.URL.Path, "why", err)
			s.fail(w, apierrors.NewUnauthorized("Unauthorized"))
			return
		}
		if r.Header.Get("Impersonate-User") != "" || r.Header.Get("Impersonate-Group") != "" || r.Header.Get("Impersonate-Uid") != "" {
			s.fail(w, apierrors.NewForbidden(schema.GroupResource{Resource: "users"}, r.Header.Get("Impersonate-User"),
				errors.New("nobody is impersonated on an edge node; do it at the cluster's API server")))
			return
		}
		r.Header.Del("Authorization")
		r = r.WithContext(request.WithUser(r.Context(), who))
		if err := s.serve(w, r, who); err != nil {
			s.fail(w, err)
		}
	})
}

// serve does a request of someone known; an error is still to be told.
func (s *Server) serve(w http.ResponseWriter, r *http.Request, who user.Info) error {
	if s.cfg.Devices != nil && strings.HasPrefix(r.URL.Path, devicesPath) {
		s.cfg.Devices.ServeHTTP(w, r)
		return nil
	}
	stream := parseStream(r.URL.Path)
	places := s.short
	if stream != nil || isWatch(r) {
		places = s.long
	}
	select {
	case places <- struct{}{}:
		defer func() { <-places }()
	default:
		return apierrors.NewTooManyRequests("local clients ask more than this node answers at once", 1)
	}
	if stream != nil {
		return s.serveStream(w, r, who, stream)
	}
	if places != s.long {
		// Not all writers know deadlines; these do.
		if err := http.NewResponseController(w).SetWriteDeadline(time.Now().Add(answerWithin)); err != nil && !errors.Is(err, http.ErrNotSupported) {
			return apierrors.NewInternalError(err)
		}
		defer func() { _ = http.NewResponseController(w).SetWriteDeadline(time.Time{}) }()
	}
	if review := reviewOf(r); review != nil {
		return s.serveReview(w, r, who, review)
	}
	if r.Method != http.MethodGet {
		return s.may.readOnly(attributesOfWrite(r, who))
	}
	s.api.ServeHTTP(w, r)
	return nil
}

func isWatch(r *http.Request) bool { return r.URL.Query().Has("watch") }

// authorize implements apifacade.Config.Authorize.
func (s *Server) authorize(r *http.Request, a apifacade.Access) error {
	who, ok := request.UserFrom(r.Context())
	if !ok {
		return apierrors.NewUnauthorized("Unauthorized")
	}
	attr := kubeauthorizer.AttributesRecord{
		User: who, Verb: a.Verb, Namespace: a.Namespace, APIGroup: a.Group, APIVersion: a.Version,
		Resource: a.Resource, Subresource: a.Subresource, Name: a.Name, Path: a.Path, ResourceRequest: a.Resource != "",
	}
	if !slices.Contains(reads, a.Verb) {
		return s.may.readOnly(attr)
	}
	return s.permit(r.Context(), attr)
}

func (s *Server) permit(ctx context.Context, attr kubeauthorizer.AttributesRecord) error {
	ok, reason, err := s.may.allowed(ctx, attr.User, attr)
	switch {
	case err != nil:
		return apierrors.NewInternalError(err)
	case !ok:
		return responsewriters.ForbiddenStatusError(attr, reason)
	}
	return nil
}

// attributesOfWrite reads as much of a path as the refusal tells.
func attributesOfWrite(r *http.Request, who user.Info) kubeauthorizer.AttributesRecord {
	a := kubeauthorizer.AttributesRecord{User: who, Path: r.URL.Path, Verb: map[string]string{
		http.MethodPost: "create", http.MethodPut: "update", http.MethodPatch: "patch", http.MethodDelete: "delete",
	}[r.Method]}
	if a.Verb == "" {
		a.Verb = strings.ToLower(r.Method)
	}
	info, err := writeInfo.NewRequestInfo(r)
	if err != nil || !info.IsResourceRequest {
		return a
	}
	a.Verb, a.ResourceRequest = info.Verb, true
	a.APIGroup, a.APIVersion, a.Resource, a.Subresource = info.APIGroup, info.APIVersion, info.Resource, info.Subresource
	a.Namespace, a.Name = info.Namespace, info.Name
	return a
}

var writeInfo = &request.RequestInfoFactory{
	APIPrefixes: sets.NewString("api", "apis"), GrouplessAPIPrefixes: sets.NewString("api"),
}

// fail answers with a Status.
func (s *Server) fail(w http.ResponseWriter, err error) {
	status := metav1.Status{Code: http.StatusInternalServerError, Status: metav1.StatusFailure, Message: err.Error()}
	var api apierrors.APIStatus
	if errors.As(err, &api) {
		status = api.Status()
	}
	status.Kind, status.APIVersion = "Status", "v1"
	if status.Details != nil && status.Details.RetryAfterSeconds > 0 {
		w.Header().Set("Retry-After", "1")
	}
	s.respond(w, int(status.Code), status)
}

func (s *Server) respond(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	if err := json.NewEncoder(w).Encode(v); err != nil {
		s.log.Debug("local client went away", "err", err)
	}
}
