package devices

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apiserver/pkg/authentication/serviceaccount"
	"k8s.io/apiserver/pkg/authentication/user"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/value"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// Path is where the hub serves twins:
//
//	GET    /v1/twins[/NAMESPACE[/NAME]]   one, or those of a namespace or all;
//	                                      ?labelSelector= ?fieldSelector= ?watch=1 ?resume=
//	PATCH  /v1/twins/NAMESPACE/NAME       {"desired":{"relay":true}}, If-Match
//	PATCH  /v1/twins[/NAMESPACE]          the same to all that a selector selects
//	POST   /v1/twins/NAMESPACE/NAME/commands/COMMAND?timeout=5s   {"id":"a1","args":{}}
//	POST   /v1/twins/NAMESPACE/NAME/refresh
//
// Reading takes the right to get, list or watch devices/twin, a command or a
// refresh that to create devices/commands. A PATCH is a patch of the Device by
// the caller, and the API server's to judge. Nothing is changed by a GET.
const Path = "/v1/twins"

const (
	maxBody = 1 << 20

	// patchTries is how often a patch is made anew because the Device was
	// changed meanwhile.
	patchTries = 8

	// bulkPerNode is how many devices of a node a bulk patch reaches in a
	// second: one call must not switch a whole plant at once.
	bulkPerNode = 20
)

// Identify tells who a request is from.
type Identify func(*http.Request) (user.Info, error)

// Handler serves twins below prefix+Path. identify nil means by bearer token.
// Where streams cannot be, watches are refused.
func (d *Devices) Handler(prefix string, identify Identify, streams bool) http.Handler {
	if identify == nil {
		identify = d.access.caller
	}
	mux := http.NewServeMux()
	handle := func(pattern string, h func(http.ResponseWriter, *http.Request, user.Info) error) {
		method, path, _ := strings.Cut(pattern, " ")
		mux.HandleFunc(method+" "+prefix+Path+path, func(w http.ResponseWriter, r *http.Request) {
			u, err := identify(r)
			if err == nil {
				r.Body = http.MaxBytesReader(w, r.Body, maxBody)
				err = h(w, r, u)
			}
			if err != nil {
				refuse(w, err)
			}
		})
	}
	list := func(w http.ResponseWriter, r *http.Request, u user.Info) error {
		if r.URL.Query().Get("watch") == "" || r.URL.Query().Get("watch") == "0" || r.URL.Query().Get("watch") == "false" {
			return d.serveList(w, r, u)
		}
		if !streams {
			return status(http.StatusBadRequest, "watch at the hub's own address: this one ends a request after a minute")
		}
		return d.serveWatch(w, r, u)
	}
	handle("GET ", list)
	handle("GET /{namespace}", list)
	handle("GET /{namespace}/{name}", d.serveOne)
	handle("PATCH ", d.serveBulk)
	handle("PATCH /{namespace}", d.serveBulk)
	handle("PATCH /{namespace}/{name}", d.servePatch)
	handle("POST /{namespace}/{name}/commands/{command}", d.serveCommand)
	handle("POST /{namespace}/{name}/refresh", d.serveRefresh)
	return mux
}

// failure is an answer that is no success.
type failure struct {
	Code    int               `json:"code"`
	Message string            `json:"message"`
	Props   map[string]string `json:"props,omitempty"` // what is wrong with each
}

func (f *failure) Error() string { return f.Message }

func status(code int, format string, args ...any) error {
	return &failure{Code: code, Message: fmt.Sprintf(format, args...)}
}

func asFailure(err error) *failure {
	var f *failure
	var forbidden errForbidden
	var api apierrors.APIStatus
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &f):
		return f
	case errors.Is(err, errUnauthenticated):
		return &failure{Code: http.StatusUnauthorized, Message: err.Error()}
	case errors.As(err, &forbidden):
		return &failure{Code: http.StatusForbidden, Message: err.Error()}
	case errors.As(err, &large):
		return &failure{Code: http.StatusRequestEntityTooLarge, Message: err.Error()}
	case errors.As(err, &api) && api.Status().Code != 0:
		return &failure{Code: int(api.Status().Code), Message: api.Status().Message}
	case errors.Is(err, errAway):
		return &failure{Code: http.StatusServiceUnavailable, Message: err.Error()}
	}
	return &failure{Code: http.StatusInternalServerError, Message: err.Error()}
}

func refuse(w http.ResponseWriter, err error) {
	f := asFailure(err)
	if f.Code == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", "Bearer")
	}
	if f.Code == http.StatusServiceUnavailable || f.Code == http.StatusTooManyRequests {
		w.Header().Set("Retry-After", "5")
	}
	answerJSON(w, f.Code, f)
}

func answerJSON(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(v) // the caller has gone
}

func (d *Devices) twinOf(namespace, name string) (*Twin, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	tw := d.twins[refOf(namespace, name)]
	if tw == nil {
		return nil, status(http.StatusNotFound, "there is no Device %s/%s", namespace, name)
	}
	return d.twinLocked(tw), nil
}

func (d *Devices) serveOne(w http.ResponseWriter, r *http.Request, u user.Info) error {
	namespace, name := r.PathValue("namespace"), r.PathValue("name")
	if err := d.access.may(r.Context(), u, "get", "twin", namespace, name); err != nil {
		return err
	}
	t, err := d.twinOf(namespace, name)
	if err != nil {
		return err
	}
	w.Header().Set("ETag", t.etag())
	if slices.Contains(r.Header.Values("If-None-Match"), t.etag()) {
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	answerJSON(w, http.StatusOK, t)
	return nil
}

// selection is which twins a request is about.
type selection struct {
	namespace string
	labels    labels.Selector
	fields    fields.Selector
}

// Fields that a selector may name.
var selectable = []string{"metadata.name", "metadata.namespace", "spec.nodeName", "spec.modelRef.name", "status.phase"}

func selectionOf(r *http.Request) (selection, error) {
	q := r.URL.Query()
	s := selection{namespace: r.PathValue("namespace")}
	var err error
	if s.labels, err = labels.Parse(q.Get("labelSelector")); err != nil {
		return s, status(http.StatusBadRequest, "labelSelector: %v", err)
	}
	if s.fields, err = fields.ParseSelector(q.Get("fieldSelector")); err != nil {
		return s, status(http.StatusBadRequest, "fieldSelector: %v", err)
	}
	for _, f := range s.fields.Requirements() {
		if !slices.Contains(selectable, f.Field) {
			return s, status(http.StatusBadRequest, "fieldSelector: %s is not one of %s", f.Field, strings.Join(selectable, ", "))
		}
	}
	return s, nil
}

func (s selection) matches(t *Twin) bool {
	return (s.namespace == "" || s.namespace == t.Namespace) && s.labels.Matches(labels.Set(t.Labels)) &&
		s.fields.Matches(fields.Set{
			"metadata.name": t.Name, "metadata.namespace": t.Namespace, "spec.nodeName": t.Node, "spec.modelRef.name": t.Model, "status.phase": t.Phase,
		})
}

// batchTwins is how many documents are made without giving the nodes' frames a
// turn.
const batchTwins = 128

// all returns the twins of a selection in order, and the number of the last
// change that is certainly in them.
func (d *Devices) all(s selection) ([]*Twin, uint64) {
	d.mu.Lock()
	since := d.change
	refs := make([]edgeapi.DeviceRef, 0, len(d.twins))
	for ref := range d.twins {
		if s.namespace == "" || ref.Namespace == s.namespace {
			refs = append(refs, ref)
		}
	}
	d.mu.Unlock()
	slices.SortFunc(refs, func(a, b edgeapi.DeviceRef) int { return strings.Compare(key(a), key(b)) })
	var out []*Twin
	for batch := range slices.Chunk(refs, batchTwins) {
		d.mu.Lock()
		for _, ref := range batch {
			if tw := d.twins[ref]; tw != nil {
				if t := d.twinLocked(tw); s.matches(t) {
					out = append(out, t)
				}
			}
		}
		d.mu.Unlock()
	}
	return out, since
}

func (d *Devices) serveList(w http.ResponseWriter, r *http.Request, u user.Info) error {
	s, err := selectionOf(r)
	if err != nil {
		return err
	}
	if err := d.access.may(r.Context(), u, "list", "twin", s.namespace, ""); err != nil {
		return err
	}
	twins, since := d.all(s)
	if twins == nil {
		twins = []*Twin{}
	}
	answerJSON(w, http.StatusOK, map[string]any{"items": twins, "resume": d.resumeToken(since)})
	return nil
}

// change is the body of a PATCH.
type change struct {
	Desired map[string]json.RawMessage `json:"desired"` // null: nothing is desired any more
}

func changeOf(r *http.Request) (change, error) {
	var c change
	dec := json.NewDecoder(r.Body)
	dec.DisallowUnknownFields()
	if err := dec.Decode(&c); err != nil {
		if large := (*http.MaxBytesError)(nil); errors.As(err, &large) {
			return c, err
		}
		return c, status(http.StatusBadRequest, `body: %v; want {"desired":{"PROPERTY":VALUE}}`, err)
	}
	if len(c.Desired) == 0 {
		return c, status(http.StatusBadRequest, `body: nothing is desired; want {"desired":{"PROPERTY":VALUE}}`)
	}
	return c, nil
}

func (d *Devices) servePatch(w http.ResponseWriter, r *http.Request, u user.Info) error {
	c, err := changeOf(r)
	if err != nil {
		return err
	}
	res, err := d.patch(r.Context(), u, refOf(r.PathValue("namespace"), r.PathValue("name")), c, r.Header.Get("If-Match"))
	if err != nil {
		return err
	}
	answerJSON(w, http.StatusOK, res)
	return nil
}

// patched is the answer to a PATCH, for one device.
type patched struct {
	Namespace  string            `json:"namespace"`
	Name       string            `json:"name"`
	Code       int               `json:"code"`
	Generation int64             `json:"generation,omitempty"` // of the Device, with the change in it
	Message    string            `json:"message,omitempty"`
	Props      map[string]string `json:"props,omitempty"`
}

// patch changes what is desired in the Device's spec, as the user.
func (d *Devices) patch(ctx context.Context, u user.Info, ref edgeapi.DeviceRef, c change, ifMatch string) (*patched, error) {
	d.patches.Add(1)
	devices := d.cfg.Dynamic.Resource(v1alpha1.Resource(v1alpha1.Devices)).Namespace(ref.Namespace)
	for try := 1; ; try++ {
		// A stranger learns nothing from an error before the API server has
		// judged: what is there is looked up with the caller's rights.
		if err := d.access.may(ctx, u, "patch", "", ref.Namespace, ref.Name); err != nil {
			return nil, err
		}
		got, err := devices.Get(ctx, ref.Name, metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		var dev v1alpha1.Device
		b, err := got.MarshalJSON()
		if err == nil {
			err = json.Unmarshal(b, &dev)
		}
		if err != nil {
			return nil, fmt.Errorf("decode Device %s/%s: %w", ref.Namespace, ref.Name, err)
		}
		if ifMatch != "" && ifMatch != "*" {
			uid, generation, err := desiredOf(ifMatch)
			if err != nil {
				return nil, status(http.StatusBadRequest, "%v", err)
			}
			if uid != string(dev.UID) || generation != dev.Generation {
				return nil, status(http.StatusPreconditionFailed, "the Device is at generation %d, If-Match has %d: read it again", dev.Generation, generation)
			}
		}
		if f := d.wrong(&dev, c); f != nil {
			return nil, f
		}
		desired := map[string]json.RawMessage{}
		for p, v := range dev.Spec.Desired {
			desired[p] = v.Raw
		}
		for p, v := range c.Desired {
			if len(v) == 0 || string(bytes.TrimSpace(v)) == "null" {
				delete(desired, p)
			} else {
				desired[p] = v
			}
		}
		body, err := json.Marshal([]map[string]any{
			{"op": "replace", "path": "/metadata/resourceVersion", "value": dev.ResourceVersion},
			{"op": "add", "path": "/spec/desired", "value": desired},
		})
		if err != nil {
			return nil, status(http.StatusBadRequest, "body: %v", err)
		}
		generation, err := d.patchAs(ctx, u, ref, body)
		if apierrors.IsConflict(err) && try < patchTries {
			continue // its status was written meanwhile, most often
		}
		if err != nil {
			return nil, err
		}
		return &patched{Namespace: ref.Namespace, Name: ref.Name, Code: http.StatusOK, Generation: generation}, nil
	}
}

// wrong tells what of a change the model does not allow.
func (d *Devices) wrong(dev *v1alpha1.Device, c change) error {
	d.mu.Lock()
	m := d.models[dev.Spec.ModelRef.Name]
	d.mu.Unlock()
	if m == nil {
		return nil // the Device will say so
	}
	want := map[string]v1alpha1.JSON{}
	for p, v := range c.Desired {
		if string(bytes.TrimSpace(v)) != "null" {
			want[p] = v1alpha1.JSON{Raw: v}
		}
	}
	bad := value.CheckDesired(m.object, want)
	if len(bad) == 0 {
		return nil
	}
	f := &failure{Code: http.StatusUnprocessableEntity, Props: map[string]string{}}
	for _, p := range slices.Sorted(maps.Keys(bad)) {
		f.Props[p] = bad[p].Error()
	}
	f.Message = fmt.Sprintf("DeviceModel %s does not allow that", m.object.Name)
	return f
}

// patchAs patches a Device as the user: the API server authorizes, admits and
// audits it as the user's.
func (d *Devices) patchAs(ctx context.Context, u user.Info, ref edgeapi.DeviceRef, body []byte) (int64, error) {
	req := d.cfg.Client.CoreV1().RESTClient().Patch(types.JSONPatchType).
		AbsPath("/apis", v1alpha1.Group, v1alpha1.APIVersion, "namespaces", ref.Namespace, v1alpha1.Devices, ref.Name).
		Param("fieldManager", "skerry-twins").
		Body(body)
	_, _, notServiceAccount := serviceaccount.SplitUsername(u.GetName())
	switch {
	case slices.Contains(u.GetGroups(), user.SystemPrivilegedGroup):
		// Nobody may be impersonated who may do everything: the hub does it, and
		// says for whom.
		d.log.Info("a Device is patched for an administrator", "device", key(ref), "user", u.GetName())
	case notServiceAccount == nil, strings.HasPrefix(u.GetName(), "system:node:"):
		// Constrained impersonation knows their groups by itself.
		req = req.SetHeader("Impersonate-User", u.GetName())
	default:
		req = req.SetHeader("Impersonate-User", u.GetName())
		if groups := slices.DeleteFunc(slices.Clone(u.GetGroups()), func(g string) bool { return g == user.AllAuthenticated }); len(groups) > 0 {
			req = req.SetHeader("Impersonate-Group", groups...)
		}
	}
	raw, err := req.Do(ctx).Raw()
	if err != nil {
		return 0, err
	}
	var got metav1.PartialObjectMetadata
	if err := json.Unmarshal(raw, &got); err != nil {
		return 0, fmt.Errorf("answer to the patch of %s/%s: %w", ref.Namespace, ref.Name, err)
	}
	return got.Generation, nil
}

// serveBulk patches all twins of a selection, and tells of each in a line.
func (d *Devices) serveBulk(w http.ResponseWriter, r *http.Request, u user.Info) error {
	s, err := selectionOf(r)
	if err != nil {
		return err
	}
	if s.labels.Empty() && s.fields.Empty() {
		return status(http.StatusBadRequest, "a change of many devices needs a labelSelector or fieldSelector")
	}
	c, err := changeOf(r)
	if err != nil {
		return err
	}
	if err := d.access.may(r.Context(), u, "list", "twin", s.namespace, ""); err != nil {
		return err
	}
	twins, _ := d.all(s)
	byNode := map[string][]*Twin{}
	for _, t := range twins {
		byNode[t.Node] = append(byNode[t.Node], t)
	}
	w.Header().Set("Content-Type", "application/jsonl")
	w.WriteHeader(http.StatusOK)
	var mu sync.Mutex // guards out
	out := json.NewEncoder(w)
	flush := http.NewResponseController(w)
	g, ctx := errgroup.WithContext(r.Context())
	g.SetLimit(64) // nodes at a time
	for _, node := range slices.Sorted(maps.Keys(byNode)) {
		g.Go(func() error {
			pace := time.NewTicker(time.Second / bulkPerNode)
			defer pace.Stop()
			for i, t := range byNode[node] {
				if i > 0 {
					select {
					case <-ctx.Done():
						return ctx.Err()
					case <-pace.C:
					}
				}
				res, err := d.patch(ctx, u, refOf(t.Namespace, t.Name), c, "")
				if err != nil {
					f := asFailure(err)
					res = &patched{Namespace: t.Namespace, Name: t.Name, Code: f.Code, Message: f.Message, Props: f.Props}
				}
				mu.Lock()
				err = out.Encode(res)
				if err == nil {
					_ = flush.Flush() // where it cannot, the end does it
				}
				mu.Unlock()
				if err != nil {
					return err
				}
			}
			return nil
		})
	}
	_ = g.Wait() // the caller has gone, or sees all lines
	return nil
}

// call is the body of a command.
type call struct {
	ID   string                     `json:"id"` // idempotency key
	Args map[string]json.RawMessage `json:"args,omitempty"`
}

func (d *Devices) serveCommand(w http.ResponseWriter, r *http.Request, u user.Info) error {
	ref := refOf(r.PathValue("namespace"), r.PathValue("name"))
	if err := d.access.may(r.Context(), u, "create", "commands", ref.Namespace, ref.Name); err != nil {
		return err
	}
	var c call
	dec := json.NewDecoder(r.Body)
	dec.DisallowUnknownFields()
	if err := dec.Decode(&c); err != nil && !errors.Is(err, io.EOF) {
		if large := (*http.MaxBytesError)(nil); errors.As(err, &large) {
			return err
		}
		return status(http.StatusBadRequest, `body: %v; want {"id":"KEY","args":{}}`, err)
	}
	if len(c.ID) > 64 {
		return status(http.StatusBadRequest, "id: %d bytes, at most 64", len(c.ID))
	}
	name := r.PathValue("command")
	timeout, err := d.commandTimeout(ref, name, c.Args, r.URL.Query())
	if err != nil {
		return err
	}
	d.commands.Add(1)
	body, err := json.Marshal(edgeapi.TwinCommand{ID: c.ID, Name: name, Args: c.Args})
	if err != nil {
		return status(http.StatusBadRequest, "args: %v", err)
	}
	return d.ask(w, r, u, ref, edgeapi.TwinRequest{Op: edgeapi.TwinOpCommand, Timeout: timeout.Milliseconds(), Body: body})
}

// commandTimeout checks a command against the model.
func (d *Devices) commandTimeout(ref edgeapi.DeviceRef, name string, args map[string]json.RawMessage, q url.Values) (time.Duration, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	tw := d.twins[ref]
	if tw == nil {
		return 0, status(http.StatusNotFound, "there is no Device %s/%s", ref.Namespace, ref.Name)
	}
	m := d.models[tw.device.Spec.ModelRef.Name]
	if m == nil {
		return 0, status(http.StatusUnprocessableEntity, "there is no DeviceModel %s", tw.device.Spec.ModelRef.Name)
	}
	i := slices.IndexFunc(m.object.Spec.Commands, func(c v1alpha1.Command) bool { return c.Name == name })
	if i < 0 {
		return 0, status(http.StatusNotFound, "DeviceModel %s has no command %.80s", m.object.Name, name)
	}
	cmd := &m.object.Spec.Commands[i]
	if err := value.CheckArgs(cmd, args); err != nil {
		return 0, status(http.StatusUnprocessableEntity, "args: %v", err)
	}
	timeout := cmd.Timeout.Duration
	if text := q.Get("timeout"); text != "" {
		t, err := time.ParseDuration(text)
		if err != nil || t < time.Second || t > maxRequestTimeout {
			return 0, status(http.StatusBadRequest, "timeout: %.40q is no duration from 1s to %s", text, maxRequestTimeout)
		}
		timeout = t
	}
	return timeout, nil
}

func (d *Devices) serveRefresh(w http.ResponseWriter, r *http.Request, u user.Info) error {
	ref := refOf(r.PathValue("namespace"), r.PathValue("name"))
	if err := d.access.may(r.Context(), u, "create", "commands", ref.Namespace, ref.Name); err != nil {
		return err
	}
	if _, err := d.twinOf(ref.Namespace, ref.Name); err != nil {
		return err
	}
	return d.ask(w, r, u, ref, edgeapi.TwinRequest{Op: edgeapi.TwinOpRefresh})
}

// ask passes a request to the device's node, and its answer back.
func (d *Devices) ask(w http.ResponseWriter, r *http.Request, u user.Info, ref edgeapi.DeviceRef, req edgeapi.TwinRequest) error {
	req.By = u.GetName()[:min(len(u.GetName()), 128)]
	reply, err := d.request(r.Context(), ref, req)
	if err != nil {
		return err
	}
	if reply.Code < 200 || reply.Code > 599 {
		reply.Code = http.StatusBadGateway
	}
	if reply.Code >= 300 {
		answerJSON(w, reply.Code, &failure{Code: reply.Code, Message: reply.Message})
		return nil
	}
	if len(reply.Body) == 0 {
		reply.Body = json.RawMessage(fmt.Sprintf(`{"code":%d}`, reply.Code))
	}
	answerJSON(w, reply.Code, reply.Body)
	return nil
}
