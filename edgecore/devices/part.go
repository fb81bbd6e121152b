// Package devices runs a node's devices: it wires their twins to the node's own
// copy of their objects, to MQTT, to telemetry and to the hub, and serves pods
// and the administrator on the machine.
//
// It owns the part's life. Nothing is started, no file made and no port opened
// before there is a device, a discovery or a route, or a listener that the
// configuration names. A failure of the part, such as a port that is taken, ends
// neither pods nor edgecore: the part is started again, at growing intervals,
// and tells what is wrong in edgecore's status and in the Node's condition
// DevicesReady. It waits for no network.
//
// It never maps a message (devicetwin/profile does), never decides about a value
// (devicetwin does), and writes no object but Events.
//
// # What pods may
//
// A pod is known by its service account's token, over HTTP as a bearer token and
// over MQTT as the password of user pod, and gets what RBAC gives it, as the
// node knows it: get, list and watch of devices/twin, patch of devices/desired,
// create of devices/commands and of telemetryroutes/records, in the group
// devices.skerry.dev. See http.go and topics.go for the requests.
//
// Telemetry names its route by namespace and name, since routes are namespaced
// and an external broker does not tell who publishes.
package devices

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/endpoints/request"

	"github.com/skerry-io/skerry/devicetwin/mqtt"
	"github.com/skerry-io/skerry/devicetwin/telemetry"
	"github.com/skerry-io/skerry/edgecore/link"
	"github.com/skerry-io/skerry/tunnel"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// Part is the devices of a node.
type Part struct {
	cfg Config
	log *slog.Logger
	api *api

	mu      sync.Mutex
	present *running      // nil: not running
	changed chan struct{} // closed when present changes
	problem error         // why it is not running, or was ended last
	since   time.Time     // of the present state
	objects set
}

// New checks cfg; it starts nothing.
func New(cfg Config) (*Part, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	p := &Part{cfg: cfg, log: cfg.Log, changed: make(chan struct{}), since: time.Now()}
	p.api = newAPI(p)
	return p, nil
}

const (
	minRestart = time.Second
	maxRestart = time.Minute
	// steadyAfter is how long the part has to run for the next restart to be
	// the quickest again.
	steadyAfter = 5 * time.Minute
	// settle is how long objects that change together are waited for.
	settle = 20 * time.Millisecond
)

// Run runs the part until ctx ends, and returns once all it started has stopped.
func (p *Part) Run(ctx context.Context) error {
	var s *socket
	if p.cfg.Socket != "" {
		var err error
		if s, err = listenSocket(p.cfg.Socket); err != nil {
			// A path that cannot be is no reason to end a node.
			p.log.Error("pods do not find the devices' API", "err", err)
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	if s != nil {
		g.Go(func() error { return p.api.serveSocket(ctx, s) })
	}
	kick := make(chan struct{}, 1)
	g.Go(func() error {
		return follow(ctx, p.cfg.Store, func() {
			select {
			case kick <- struct{}{}:
			default:
			}
		})
	})
	g.Go(func() error { return p.keep(ctx, kick) })
	err := g.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// keep runs the part whenever there is something for it to do.
func (p *Part) keep(ctx context.Context, kick <-chan struct{}) error {
	o := &objects{store: p.cfg.Store, node: p.cfg.NodeName}
	wait := minRestart
	for {
		s := o.read()
		p.note(s)
		if s.empty() && !p.cfg.MQTT.named() {
			select {
			case <-kick:
				continue
			case <-ctx.Done():
				return nil
			}
		}
		began := time.Now()
		err := p.runOnce(ctx, o, kick)
		if ctx.Err() != nil {
			return nil
		}
		if time.Since(began) > steadyAfter {
			wait = minRestart
		}
		p.log.Error("the devices' part has ended; it is started again", "err", err, "in", wait)
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil
		}
		wait = min(2*wait, maxRestart)
	}
}

// runOnce runs the part until it fails or ctx ends.
func (p *Part) runOnce(ctx context.Context, o *objects, kick <-chan struct{}) error {
	r, err := p.assemble(ctx)
	if err != nil {
		p.set(nil, err)
		return err
	}
	// What it has is told before anyone asks for it.
	s := o.read()
	r.apply(s)
	r.replay()
	p.note(s)
	g, runCtx := errgroup.WithContext(ctx)
	r.start(runCtx, g)
	g.Go(func() error {
		for {
			select {
			case <-kick:
			case <-runCtx.Done():
				return nil
			}
			t := time.NewTimer(settle)
			select {
			case <-t.C:
			case <-runCtx.Done():
				t.Stop()
				return nil
			}
			s := o.read()
			r.apply(s)
			p.note(s)
		}
	})
	p.set(r, nil)
	err = g.Wait()
	if err == nil && ctx.Err() == nil {
		err = errors.New("it ended by itself")
	}
	p.set(nil, err)
	return errors.Join(err, r.close())
}

// set tells what runs now.
func (p *Part) set(r *running, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if (r == nil) != (p.present == nil) || p.problem == nil && err != nil {
		p.since = time.Now()
	}
	p.present, p.problem = r, err
	close(p.changed)
	p.changed = make(chan struct{})
}

// note keeps what was read, for the status, and tells once of what is new among
// what cannot be read.
func (p *Part) note(s set) {
	p.mu.Lock()
	old := p.objects
	p.objects = s
	p.mu.Unlock()
	for name, err := range s.unreadable {
		if was := old.unreadable[name]; was == nil || was.Error() != err.Error() {
			p.log.Error("an object cannot be read; the others are not affected", "object", name, "err", err)
		}
	}
}

// errNotRunning is told while there is nothing to ask.
var errNotRunning = errors.New("no devices are served on this node")

// now is what runs now.
func (p *Part) now() (*running, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.present != nil:
		return p.present, nil
	case p.problem != nil:
		return nil, refuse(http.StatusServiceUnavailable, "the devices' part of edgecore is not running: %v", p.problem)
	}
	return nil, refuse(http.StatusServiceUnavailable, "%v: it has none", errNotRunning)
}

// await returns what runs, once it does.
func (p *Part) await(ctx context.Context) (*running, error) {
	for {
		p.mu.Lock()
		r, changed := p.present, p.changed
		p.mu.Unlock()
		if r != nil {
			return r, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Streams are the conversations with the hub.
func (p *Part) Streams() []link.Stream {
	stream := func(kind string, class tunnel.Class, hold func(*running, context.Context, conversation) error) link.Stream {
		return link.Stream{
			Kind: kind, Class: class,
			Await: func(ctx context.Context) error { _, err := p.await(ctx); return err },
			Serve: func(ctx context.Context, st *tunnel.Stream) error {
				r, err := p.await(ctx)
				if err != nil {
					return err
				}
				ctx, cancel := context.WithCancel(ctx)
				defer cancel()
				// It ends with the part that holds it.
				defer context.AfterFunc(r.ctx, func() {
					cancel()
					st.Reset(tunnel.CodeCancelled)
				})()
				return hold(r, ctx, conversation{edgeapi.NewConn(st), st})
			},
		}
	}
	return []link.Stream{
		stream(edgeapi.KindTwins, tunnel.ClassSync, func(r *running, ctx context.Context, c conversation) error { return r.twins.Converse(ctx, c) }),
		stream(edgeapi.KindTelemetry, tunnel.ClassStream, func(r *running, ctx context.Context, c conversation) error { return r.routes.Converse(ctx, c.Conn) }),
	}
}

// conversation is one with the hub, over a stream.
type conversation struct {
	*edgeapi.Conn
	stream *tunnel.Stream
}

// Close ends what waits in Send and Receive too.
func (c conversation) Close() error {
	c.stream.Reset(tunnel.CodeCancelled)
	return nil
}

// adminName is who the administrator of the device is, as for the local API.
const adminName = "skerry:device-admin"

// Pods is the API for callers that are known already, as request.UserFrom tells.
func (p *Part) Pods() http.Handler { return p.api.mux }

// Admin is the API for whoever may open edgecore's own socket.
func (p *Part) Admin() http.Handler {
	admin := &user.DefaultInfo{Name: adminName, Groups: []string{user.SystemPrivilegedGroup, user.AllAuthenticated}}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.api.mux.ServeHTTP(w, r.WithContext(request.WithUser(r.Context(), admin)))
	})
}

// Status is what is told of the part.
type Status struct {
	Running     bool                    `json:"running"`
	Since       time.Time               `json:"since"`
	Problem     string                  `json:"problem,omitempty"`
	Devices     int                     `json:"devices"`
	Phases      map[string]int          `json:"phases,omitempty"`
	Discoveries int                     `json:"discoveries,omitempty"`
	Routes      int                     `json:"routes,omitempty"`
	Unreadable  map[string]string       `json:"unreadable,omitempty"`
	MQTT        *mqtt.State             `json:"mqtt,omitempty"`
	MQTTReason  string                  `json:"mqttReason,omitempty"` // why that broker
	Bridges     []BridgeStatus          `json:"bridges,omitempty"`
	Telemetry   []telemetry.RouteStatus `json:"telemetry,omitempty"`
	Written     uint64                  `json:"writtenBytes,omitempty"`
	DiskTrouble string                  `json:"diskTrouble,omitempty"`
	Mended      string                  `json:"mended,omitempty"`
}

// Status returns it.
func (p *Part) Status() Status {
	p.mu.Lock()
	st := Status{
		Running: p.present != nil, Since: p.since,
		Devices: len(p.objects.devices), Discoveries: len(p.objects.discoveries), Routes: len(p.objects.routes),
	}
	if p.problem != nil {
		st.Problem = p.problem.Error()
	}
	for name, err := range p.objects.unreadable {
		if st.Unreadable == nil {
			st.Unreadable = map[string]string{}
		}
		st.Unreadable[name] = err.Error()
	}
	r := p.present
	p.mu.Unlock()
	if r != nil {
		r.status(&st)
	}
	return st
}

// Conditions are the Node's, of this part. There is none on a node that never
// had devices.
func (p *Part) Conditions() []corev1.NodeCondition {
	st := p.Status()
	c := corev1.NodeCondition{Type: ConditionReady, Status: corev1.ConditionTrue, Reason: "Serving", LastTransitionTime: metav1.NewTime(st.Since)}
	switch {
	case st.Problem != "":
		c.Status, c.Reason, c.Message = corev1.ConditionFalse, "NotRunning", st.Problem
	case !st.Running:
		return nil
	case len(st.Unreadable) > 0:
		p.mu.Lock()
		c.Reason, c.Message = "ObjectUnreadable", p.objects.problems()
		p.mu.Unlock()
		c.Status = corev1.ConditionFalse
	case st.DiskTrouble != "":
		c.Status, c.Reason, c.Message = corev1.ConditionFalse, "DiskTakesNoWrites", st.DiskTrouble
	case st.MQTT != nil && !st.MQTT.Connected:
		c.Status, c.Reason = corev1.ConditionFalse, "MQTTNotConnected"
		c.Message = fmt.Sprintf("%s broker %s: %s", st.MQTT.Mode, st.MQTT.Address, st.MQTT.Error)
	case st.MQTT != nil:
		c.Message = fmt.Sprintf("%s MQTT broker at %s", st.MQTT.Mode, st.MQTT.Address)
	}
	c.Message = c.Message[:min(len(c.Message), maxMessage)]
	return []corev1.NodeCondition{c}
}

// files of the part, below Config.Dir.
const (
	databaseFile = "devices.db"
	telemetryDir = "telemetry"
)
