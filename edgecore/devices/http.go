package devices

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/endpoints/request"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/telemetry"
	"github.com/skerry-io/skerry/edgecore/connlimit"
)

// The API over HTTP, below /v1/:
//
//	GET   twins[/NS]               {"items":[…]}; of a namespace, or of all
//	GET   twins/NS/NAME            the twin; its ETag is its version
//	GET   …?watch=1                the same, then each change, as server-sent events
//	PATCH twins/NS/NAME            {"desired":{…},"ttl":"10m"}; If-Match, null gives up
//	POST  twins/NS/NAME/commands/C?timeout=5s   {"id":"…","args":{…}}
//	POST  twins/NS/NAME/refresh
//	POST  telemetry/NS/ROUTE                    a JSON value a line; 202 is on disk
//
// Nothing is changed by a GET. An error is {"code":…,"message":…}.
const (
	apiPrefix = "/v1/"

	maxAPIConns = 256 // of the socket
	maxShort    = 64
	maxWatches  = 128

	maxPatchBody     = 256 << 10
	maxTelemetryBody = 1 << 20

	answerWithin = time.Minute
	// recheck is how often a watch's right is looked at again: a role may be
	// taken away, and a pod may end, while it lasts.
	recheck = 15 * time.Second
	// keepAlive is how often a watch without changes says so.
	keepAlive = 25 * time.Second
)

// api serves pods and the administrator. It outlives the running parts.
type api struct {
	part *Part
	log  *slog.Logger
	mux  *http.ServeMux

	short, watches chan struct{}
}

func newAPI(p *Part) *api {
	a := &api{part: p, log: p.log, mux: http.NewServeMux(), short: make(chan struct{}, maxShort), watches: make(chan struct{}, maxWatches)}
	handle := func(pattern string, h func(w http.ResponseWriter, r *http.Request, c *call) error) {
		method, path, _ := strings.Cut(pattern, " ")
		a.mux.HandleFunc(method+" "+apiPrefix+path, func(w http.ResponseWriter, r *http.Request) {
			if err := a.serve(w, r, h); err != nil {
				a.fail(w, err)
			}
		})
	}
	handle("GET twins", a.list)
	handle("GET twins/{namespace}", a.list)
	handle("GET twins/{namespace}/{name}", a.get)
	handle("PATCH twins/{namespace}/{name}", a.patch)
	handle("POST twins/{namespace}/{name}/commands/{command}", a.command)
	handle("POST twins/{namespace}/{name}/refresh", a.refresh)
	handle("POST telemetry/{namespace}/{name}", a.telemetry)
	return a
}

// call is one request of someone known.
type call struct {
	*running
	access Access
	who    user.Info
	key    devicetwin.Key
}

func (c *call) permit(ctx context.Context, r right) error {
	return permit(ctx, c.access, c.who, r, c.key.Namespace, c.key.Name)
}

// serve bounds a request and finds what it is about.
func (a *api) serve(w http.ResponseWriter, r *http.Request, h func(http.ResponseWriter, *http.Request, *call) error) error {
	who, ok := request.UserFrom(r.Context())
	if !ok {
		return refuse(http.StatusUnauthorized, "Unauthorized")
	}
	now, err := a.part.now()
	if err != nil {
		return err
	}
	places := a.short
	if isWatch(r) {
		places = a.watches
	}
	select {
	case places <- struct{}{}:
		defer func() { <-places }()
	default:
		w.Header().Set("Retry-After", "1")
		return refuse(http.StatusTooManyRequests, "local clients ask more of this node than it answers at once")
	}
	within := answerWithin
	if isWatch(r) {
		within = 2 * keepAlive // for each event
	} else if d, err := timeoutOf(r); err != nil {
		return err
	} else if d > 0 {
		within += d
	}
	if err := http.NewResponseController(w).SetWriteDeadline(time.Now().Add(within)); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return err
	}
	defer func() { _ = http.NewResponseController(w).SetWriteDeadline(time.Time{}) }()
	return h(w, r, &call{now, a.part.cfg.Access, who, devicetwin.Key{Namespace: r.PathValue("namespace"), Name: r.PathValue("name")}})
}

func isWatch(r *http.Request) bool {
	v := r.URL.Query().Get("watch")
	return r.Method == http.MethodGet && v != "" && v != "0" && v != "false"
}

// timeoutOf reads ?timeout=; zero means that none was given.
func timeoutOf(r *http.Request) (time.Duration, error) {
	text := r.URL.Query().Get("timeout")
	if text == "" {
		return 0, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < 0 || d > maxCommandTimeout {
		return 0, refuse(http.StatusBadRequest, "timeout %.40q: use 1s to %s", text, maxCommandTimeout)
	}
	return d, nil
}

const maxCommandTimeout = 5 * time.Minute

func (a *api) list(w http.ResponseWriter, r *http.Request, c *call) error {
	if isWatch(r) {
		return a.watch(w, r, c, mayWatch)
	}
	if err := c.permit(r.Context(), mayList); err != nil {
		return err
	}
	items := []*devicetwin.Doc{}
	for _, d := range c.twins.List() {
		if c.key.Namespace == "" || d.Namespace == c.key.Namespace {
			items = append(items, d)
		}
	}
	a.respond(w, http.StatusOK, map[string]any{"items": items})
	return nil
}

func (a *api) get(w http.ResponseWriter, r *http.Request, c *call) error {
	if isWatch(r) {
		return a.watch(w, r, c, mayWatch)
	}
	if err := c.permit(r.Context(), mayGet); err != nil {
		return err
	}
	d, ok := c.twins.Get(c.key)
	if !ok {
		return noDevice(c)
	}
	tag := etag(d.Version)
	w.Header().Set("ETag", tag)
	if r.Header.Get("If-None-Match") == tag {
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	a.respond(w, http.StatusOK, d)
	return nil
}

func etag(v v1alpha1.Version) string { return `"` + v.String() + `"` }

func noDevice(c *call) error {
	return refuse(http.StatusNotFound, "there is no device %s on node %s", c.key, c.cfg.NodeName)
}

// patchBody is a merge patch of what is desired.
type patchBody struct {
	ID      string                     `json:"id,omitempty"`
	Desired map[string]json.RawMessage `json:"desired"`
	TTL     string                     `json:"ttl,omitempty"`
}

func (a *api) patch(w http.ResponseWriter, r *http.Request, c *call) error {
	if err := c.permit(r.Context(), maySet); err != nil {
		return err
	}
	var body patchBody
	if err := readJSON(w, r, maxPatchBody, &body); err != nil {
		return err
	}
	p, err := body.patch(c.who.GetName())
	if err != nil {
		return err
	}
	if match := r.Header.Get("If-Match"); match != "" && match != "*" {
		v, err := v1alpha1.ParseVersion(strings.Trim(strings.TrimPrefix(match, "W/"), `"`))
		if err != nil {
			return refuse(http.StatusBadRequest, "If-Match: %v", err)
		}
		p.Base = &v
	}
	res := c.twins.SetDesired(r.Context(), c.key, p)
	if !res.Version.IsZero() {
		w.Header().Set("ETag", etag(res.Version))
	}
	a.respond(w, res.Code, res)
	return nil
}

// patch checks what is written.
func (b patchBody) patch(by string) (devicetwin.Patch, error) {
	p := devicetwin.Patch{ID: b.ID, Props: b.Desired, By: by}
	if len(b.Desired) == 0 {
		return p, refuse(http.StatusUnprocessableEntity, `"desired" is required: an object of property and value; null gives a local value up`)
	}
	if b.TTL != "" {
		d, err := time.ParseDuration(b.TTL)
		if err != nil || d <= 0 {
			return p, refuse(http.StatusUnprocessableEntity, `"ttl" %.40q is not a time like 10m`, b.TTL)
		}
		p.TTL = d
	}
	return p, nil
}

// commandBody has what a command is told.
type commandBody struct {
	ID   string                     `json:"id,omitempty"`
	Args map[string]json.RawMessage `json:"args,omitempty"`
}

func (a *api) command(w http.ResponseWriter, r *http.Request, c *call) error {
	if err := c.permit(r.Context(), mayCommand); err != nil {
		return err
	}
	var body commandBody
	if err := readJSON(w, r, maxPatchBody, &body); err != nil {
		return err
	}
	timeout, err := timeoutOf(r)
	if err != nil {
		return err
	}
	res := c.twins.Command(r.Context(), c.key, devicetwin.CommandCall{
		Name: r.PathValue("command"), ID: body.ID, Args: body.Args, Timeout: timeout, By: c.who.GetName(),
	})
	a.respond(w, res.Code, res)
	return nil
}

func (a *api) refresh(w http.ResponseWriter, r *http.Request, c *call) error {
	if err := c.permit(r.Context(), mayCommand); err != nil {
		return err
	}
	if _, ok := c.twins.Get(c.key); !ok {
		return noDevice(c)
	}
	if err := c.twins.Refresh(r.Context(), c.key); err != nil {
		return err
	}
	a.respond(w, http.StatusAccepted, map[string]string{"state": "sent"})
	return nil
}

// maxRecords is how many may come at once.
const maxRecords = 10_000

func (a *api) telemetry(w http.ResponseWriter, r *http.Request, c *call) error {
	if err := c.permit(r.Context(), mayTelemeter); err != nil {
		return err
	}
	raw, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxTelemetryBody))
	if err != nil {
		return tooLarge(err, maxTelemetryBody)
	}
	records, err := parseRecords(raw)
	if err != nil {
		return err
	}
	switch err := c.routes.Append(r.Context(), c.key, telemetryTopics+c.key.String(), records...); {
	case errors.Is(err, telemetry.ErrNoRoute):
		return refuse(http.StatusNotFound, "there is no TelemetryRoute %s on node %s", c.key, c.cfg.NodeName)
	case err != nil:
		return refuse(http.StatusServiceUnavailable, "%v", err)
	}
	a.respond(w, http.StatusAccepted, map[string]int{"records": len(records)})
	return nil
}

// parseRecords reads a JSON value a line. All are good, or none is taken.
func parseRecords(raw []byte) ([][]byte, error) {
	var records [][]byte
	n := 0
	for line := range bytes.Lines(raw) {
		n++
		line = bytes.TrimSpace(line)
		switch {
		case len(line) == 0:
		case !json.Valid(line):
			return nil, refuse(http.StatusBadRequest, "line %d is no JSON value; none of the records was taken", n)
		case len(records) == maxRecords:
			return nil, refuse(http.StatusRequestEntityTooLarge, "more than %d records; none was taken", maxRecords)
		default:
			records = append(records, line)
		}
	}
	if len(records) == 0 {
		return nil, refuse(http.StatusBadRequest, "no records: a JSON value a line is expected")
	}
	return records, nil
}

// readJSON reads a body; an empty one leaves v as it is.
func readJSON(w http.ResponseWriter, r *http.Request, most int64, v any) error {
	raw, err := io.ReadAll(http.MaxBytesReader(w, r.Body, most))
	if err != nil {
		return tooLarge(err, most)
	}
	if len(bytes.TrimSpace(raw)) == 0 {
		return nil
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return refuse(http.StatusBadRequest, "the body is not what is expected here: %v", err)
	}
	if dec.More() {
		return refuse(http.StatusBadRequest, "the body goes on after its JSON value")
	}
	return nil
}

func tooLarge(err error, most int64) error {
	var large *http.MaxBytesError
	if errors.As(err, &large) {
		return refuse(http.StatusRequestEntityTooLarge, "the body is larger than %d bytes", most)
	}
	return refuse(http.StatusBadRequest, "the body could not be read: %v", err)
}

// problem is how errors are told.
type problem struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
}

func (a *api) fail(w http.ResponseWriter, err error) {
	code := http.StatusInternalServerError
	var known *apiError
	switch {
	case errors.As(err, &known):
		code = known.code
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		code = http.StatusGatewayTimeout
	case errors.Is(err, devicetwin.ErrNotConnected):
		code = http.StatusServiceUnavailable
	}
	if code == http.StatusServiceUnavailable && w.Header().Get("Retry-After") == "" {
		w.Header().Set("Retry-After", "1")
	}
	a.respond(w, code, problem{code, err.Error()})
}

func (a *api) respond(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	if err := json.NewEncoder(w).Encode(v); err != nil {
		a.log.Debug("a client of the devices' API went away", "err", err)
	}
}

// socket is the API for pods that mount its directory.
type socket struct {
	path string
	net.Listener
}

// listenSocket opens the socket. Everyone may connect, and nobody gets anything
// without a token: a pod's user id says nothing of who it is.
func listenSocket(path string) (*socket, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("devices.api.socket: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("devices.api.socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("devices.api.socket: %w; choose another with devices.api.socket, or \"off\"", err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		l.Close()
		return nil, fmt.Errorf("devices.api.socket: %w", err)
	}
	return &socket{path, l}, nil
}

// serveSocket serves pods until ctx ends.
func (a *api) serveSocket(ctx context.Context, s *socket) error {
	srv := &http.Server{
		Handler:           http.HandlerFunc(a.authenticated),
		ReadHeaderTimeout: 10 * time.Second, ReadTimeout: time.Minute, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10,
		BaseContext: func(net.Listener) context.Context { return ctx },
		ErrorLog:    slog.NewLogLogger(a.log.Handler(), slog.LevelDebug),
	}
	stopped := context.AfterFunc(ctx, func() { srv.Close() })
	defer stopped()
	if err := srv.Serve(connlimit.New(s.Listener, maxAPIConns)); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve %s: %w", s.path, err)
	}
	return nil
}

// authenticated takes a pod's token.
func (a *api) authenticated(w http.ResponseWriter, r *http.Request) {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		token = ""
	}
	who, err := a.part.cfg.Access.Authenticate(strings.TrimSpace(token))
	if err != nil {
		a.log.Debug("local client refused", "path", r.URL.Path, "why", err)
		a.fail(w, refuse(http.StatusUnauthorized, "Unauthorized"))
		return
	}
	r.Header.Del("Authorization")
	a.mux.ServeHTTP(w, r.WithContext(request.WithUser(r.Context(), who)))
}
