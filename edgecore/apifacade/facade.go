package apifacade

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/edgecore/store"
)

// maxRequestBody is the API server's own limit.
const maxRequestBody = 3 << 20

// TokenSource answers TokenRequests.
type TokenSource interface {
	CreateToken(ctx context.Context, namespace, serviceAccount string, req *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error)
}

// Config is what the facade needs.
type Config struct {
	Store         *store.Store  // required
	NodeName      string        // required; the node whose pods, Node and CSINode are written here
	Tokens        TokenSource   // nil: TokenRequests are answered 503
	BookmarkEvery time.Duration // between bookmarks on a quiet watch; zero means 1m
	Log           *slog.Logger  // nil discards

	// View is an object as this facade's clients are to see it: its body, or
	// another. Nil shows all as it is stored.
	View func(o *store.Object) []byte
	// Authorize is asked before anything is done or told; what it returns is
	// the answer. Nil: whoever reaches the facade may do all that it offers.
	Authorize func(r *http.Request, a Access) error
	// Notice is sent as a warning with every list, if not empty. Nil: none is.
	Notice func() string
}

// Access is what a request is about to do, as the facade itself has read it:
// what is authorised and what is done cannot differ.
type Access struct {
	Verb        string // of the Kubernetes API: get, list, watch, create, …
	Group       string
	Version     string
	Resource    string // empty for what is about the API itself, see Path
	Subresource string
	Namespace   string
	Name        string // also of a list or watch of metadata.name=
	Path        string
}

// Facade is an http.Handler.
type Facade struct {
	cfg   Config
	table map[string]*resource // by group/resource
}

// New checks cfg; it starts nothing.
func New(cfg Config) (*Facade, error) {
	switch {
	case cfg.Store == nil:
		return nil, errors.New("apifacade: Store is required")
	case cfg.NodeName == "":
		return nil, errors.New("apifacade: NodeName is required")
	}
	if cfg.BookmarkEvery <= 0 {
		cfg.BookmarkEvery = time.Minute
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	f := &Facade{cfg: cfg, table: map[string]*resource{}}
	for _, r := range resources() {
		f.table[r.group+"/"+r.name] = r
	}
	return f, nil
}

// ServeHTTP answers one request of the Kubernetes API.
func (f *Facade) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	format, ok := negotiate(r)
	if !ok {
		f.fail(w, r, apierrors.NewGenericServerResponse(http.StatusNotAcceptable, r.Method, groupResource("", ""), "",
			"only application/json is served here", 0, true))
		return
	}
	if f.serveMeta(w, r) {
		return
	}
	q, err := f.parse(r)
	if err == nil {
		q.format = format
		err = f.dispatch(w, r, q)
	}
	if err != nil {
		f.fail(w, r, err)
	}
}

// request is a parsed path.
type request struct {
	*resource
	namespace   string
	name        string
	subresource string
	format      format
}

func (q *request) key() store.Key {
	return store.Key{Resource: q.resource.name, Namespace: q.namespace, Name: q.name}
}

var errNoSuchPath = &apierrors.StatusError{ErrStatus: metav1.Status{
	Status: metav1.StatusFailure, Code: http.StatusNotFound, Reason: metav1.StatusReasonNotFound,
	Message: "the server could not find the requested resource", Details: &metav1.StatusDetails{},
}}

// parse reads /api/v1/... and /apis/GROUP/VERSION/... paths.
func (f *Facade) parse(r *http.Request) (*request, error) {
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	var group, version string
	switch {
	case len(parts) >= 3 && parts[0] == "api":
		version, parts = parts[1], parts[2:]
	case len(parts) >= 4 && parts[0] == "apis":
		group, version, parts = parts[1], parts[2], parts[3:]
	default:
		return nil, errNoSuchPath
	}
	q := &request{}
	if len(parts) >= 3 && parts[0] == "namespaces" {
		q.namespace, parts = parts[1], parts[2:]
	}
	if len(parts) > 3 || q.namespace == "" && len(parts) > 0 && parts[0] == "namespaces" {
		return nil, errNoSuchPath
	}
	for _, p := range parts {
		if p == "" {
			return nil, errNoSuchPath
		}
	}
	q.resource = f.table[group+"/"+parts[0]]
	if q.resource == nil || q.resource.version != version {
		return nil, errNoSuchPath
	}
	if len(parts) > 1 {
		q.name = parts[1]
	}
	if len(parts) > 2 {
		q.subresource = parts[2]
	}
	if q.namespace != "" && !q.namespaced || q.namespace == "" && q.namespaced && q.name != "" {
		return nil, errNoSuchPath
	}
	return q, nil
}

func (f *Facade) dispatch(w http.ResponseWriter, r *http.Request, q *request) error {
	verb := ""
	switch r.Method {
	case http.MethodGet:
		verb = "get"
		if watching(r) {
			verb = "watch"
		} else if q.name == "" {
			verb = "list"
		}
	case http.MethodPost:
		if q.name == "" || q.subresource != "" {
			verb = "create"
		}
	case http.MethodPut:
		verb = "update"
	case http.MethodPatch:
		verb = "patch"
	case http.MethodDelete:
		if verb = "delete"; q.name == "" {
			verb = "deletecollection"
		}
	}
	if err := f.authorize(r, q, verb); err != nil {
		return err
	}
	verbs := q.verbs
	if q.subresource != "" {
		verbs = q.subresources[q.subresource]
		if verbs == nil {
			return errNoSuchPath
		}
	}
	if verb == "" || !verbs.has(verb) || q.name == "" && (verb == "update" || verb == "patch") {
		return apierrors.NewMethodNotSupported(q.gr(), strings.ToLower(r.Method))
	}
	switch {
	case q.subresource == "token":
		return f.token(w, r, q)
	case verb == "get":
		return f.get(w, r, q)
	case verb == "list":
		return f.list(w, r, q)
	case verb == "watch":
		return f.watch(w, r, q)
	case verb == "create":
		return f.create(w, r, q)
	case verb == "update":
		return f.put(w, r, q)
	case verb == "patch":
		return f.patch(w, r, q)
	default:
		return f.delete(w, r, q)
	}
}

func (f *Facade) authorize(r *http.Request, q *request, verb string) error {
	if f.cfg.Authorize == nil {
		return nil
	}
	a := Access{
		Verb: verb, Group: q.group, Version: q.version, Resource: q.resource.name, Subresource: q.subresource,
		Namespace: q.namespace, Name: q.name, Path: r.URL.Path,
	}
	if verb == "list" || verb == "watch" {
		o, err := parseOptions(q, r.URL.Query())
		if err != nil {
			return err
		}
		a.Name = o.sel.name
	}
	return f.cfg.Authorize(r, a)
}

// view is the object's body for this facade's clients.
func (f *Facade) view(o *store.Object) []byte {
	if f.cfg.View == nil {
		return o.Body
	}
	return f.cfg.View(o)
}

// watching reads the watch parameter as an API server does: anything but a no
// is a yes.
func watching(r *http.Request) bool {
	v, ok := r.URL.Query()["watch"]
	return ok && len(v) > 0 && v[0] != "0" && !strings.EqualFold(v[0], "false")
}

// readBody reads a limited body and checks its type.
func readBody(w http.ResponseWriter, r *http.Request, types ...string) ([]byte, string, error) {
	media := types[0]
	if ct := r.Header.Get("Content-Type"); ct != "" {
		m, _, err := mime.ParseMediaType(ct)
		if err != nil {
			m = ct
		}
		media = m
	}
	known := false
	for _, t := range types {
		known = known || t == media
	}
	if !known {
		return nil, "", apierrors.NewGenericServerResponse(http.StatusUnsupportedMediaType, r.Method, groupResource("", ""), "",
			fmt.Sprintf("the body's media type %q is not supported, use %s", media, strings.Join(types, " or ")), 0, true)
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxRequestBody))
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return nil, "", apierrors.NewRequestEntityTooLargeError(fmt.Sprintf("limit is %d", maxRequestBody))
	}
	if err != nil {
		return nil, "", apierrors.NewBadRequest("the body could not be read: " + err.Error())
	}
	return body, media, nil
}

func (f *Facade) respond(w http.ResponseWriter, code int, body []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(code)
	if _, err := w.Write(body); err != nil {
		f.cfg.Log.Debug("client went away", "error", err)
	}
}

func (f *Facade) respondValue(w http.ResponseWriter, code int, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return apierrors.NewInternalError(err)
	}
	f.respond(w, code, body)
	return nil
}

// fail answers with a Status.
func (f *Facade) fail(w http.ResponseWriter, r *http.Request, err error) {
	if r.Context().Err() != nil && !errors.Is(err, store.ErrClosed) {
		err = apierrors.NewTimeoutError("the request was cancelled", 0)
	}
	status := statusOf(err)
	if status.Code >= 500 && status.Code != http.StatusServiceUnavailable && status.Code != http.StatusGatewayTimeout {
		f.cfg.Log.Error("request failed", "method", r.Method, "path", r.URL.Path, "error", err)
	}
	if status.Details != nil && status.Details.RetryAfterSeconds > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(status.Details.RetryAfterSeconds)))
	}
	if merr := f.respondValue(w, int(status.Code), status); merr != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}

func statusOf(err error) metav1.Status {
	var api apierrors.APIStatus
	switch {
	case errors.As(err, &api):
	case errors.Is(err, store.ErrExpired):
		api = apierrors.NewResourceExpired("the resourceVersion is older than the history kept")
	case errors.Is(err, store.ErrClosed):
		api = apierrors.NewServiceUnavailable("the node's store is closed")
	case errors.Is(err, store.ErrDisk): // told by the store itself, once
		api = apierrors.NewServiceUnavailable(err.Error())
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		api = apierrors.NewTimeoutError("the request was cancelled", 0)
	default:
		api = apierrors.NewInternalError(err)
	}
	s := api.Status()
	s.Kind, s.APIVersion = "Status", "v1"
	if s.Code == 0 {
		s.Code = http.StatusInternalServerError
	}
	return s
}
