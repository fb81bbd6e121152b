package telemetry

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/mqtt"
	"github.com/skerry-io/skerry/devicetwin/telemetry/seglog"
)

const (
	cursorBucket = "cursor"
	// maxRoutes bounds the logs, each of which has a writer and files of its own.
	maxRoutes = 64
	// unusedFor is how long the log of a route that is gone is kept: the route
	// may have been applied anew, or was missing by mistake.
	unusedFor = 10 * time.Minute
	tryAgain  = 15 * time.Second // to open a log
)

// ErrNoRoute: there is no such TelemetryRoute on this node.
var ErrNoRoute = errors.New("no such TelemetryRoute")

// Cursors is where sinks' cursors outlive the process; twindb.DB is one.
type Cursors interface {
	Load(bucket string, fn func(key string, value []byte) error) error
	Dirty(bucket, key string, encode func() []byte)
}

// Config of a Router.
type Config struct {
	Dir     string  // where the logs are; required
	Node    string  // this node's name; required
	Cursors Cursors // required
	// Secret returns the data of a Secret, nil when it is not on the node. It is
	// asked at each new connection of a sink.
	Secret func(namespace, name string) map[string][]byte
	// DeviceTopics are the filters of what a device publishes.
	DeviceTopics func(devicetwin.Bound) []string
	// Now is the wall clock, and whether it can be believed; nil: time.Now,
	// believed.
	Now func() (time.Time, bool)
	Log *slog.Logger // nil discards

	free func() (free, total uint64, err error) // of the disk; nil asks it
}

func (c *Config) setDefaults() error {
	if c.Dir == "" || c.Node == "" || c.Cursors == nil {
		return errors.New("telemetry: Dir, Node and Cursors are required")
	}
	if c.Secret == nil {
		c.Secret = func(string, string) map[string][]byte { return nil }
	}
	if c.DeviceTopics == nil {
		c.DeviceTopics = func(devicetwin.Bound) []string { return nil }
	}
	if c.Now == nil {
		c.Now = func() (time.Time, bool) { return time.Now(), true }
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}

// Router has the routes of a node.
type Router struct {
	cfg   Config
	clock clock
	hub   hubLink

	ctx    context.Context // of all that Set starts; ended by Run
	cancel context.CancelFunc

	table atomic.Pointer[table] // what Observe and Capture go by
	bad   atomic.Uint64         // observations that could not be encoded

	mu     sync.Mutex // guards the following, and Set
	closed bool
	given  []*v1alpha1.TelemetryRoute // as Set was told
	bound  []devicetwin.Bound
	again  time.Time // when to try once more to open the logs that could not be; zero: there are none
	routes map[devicetwin.Key]*route
	unused map[string]time.Time // directories, since when
	replay *replay
}

// table is which route gets what. It does not change.
type table struct {
	routes  map[devicetwin.Key]*route
	devices map[devicetwin.Key]map[string][]*route // by property
	topics  tree[*route]
	// captured are the topics of devices: true where a sync route has their
	// properties.
	captured tree[bool]
	filters  []string
	sync     bool // something is to be captured
}

// route is one TelemetryRoute and its log.
type route struct {
	key   devicetwin.Key
	uid   string
	spec  v1alpha1.TelemetryRouteSpec
	log   *seglog.Log
	err   error // why there is no log
	sinks []*sender
	stop  func() // ends sinks and log, and waits
}

func (r *route) sync() bool { return r.spec.Capture == "sync" }

// New makes a Router without routes.
func New(cfg Config) (*Router, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("telemetry: %w", err)
	}
	var boot [8]byte
	_, _ = rand.Read(boot[:]) // never fails
	r := &Router{
		cfg: cfg, clock: clock{cfg.Now, hex.EncodeToString(boot[:]), time.Now()},
		routes: map[devicetwin.Key]*route{}, unused: map[string]time.Time{},
	}
	r.hub.up, r.hub.since = make(chan struct{}), time.Now()
	r.table.Store(&table{})
	var err error
	if r.replay, err = r.openReplay(); err != nil {
		return nil, fmt.Errorf("telemetry: %w", err)
	}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r, nil
}

// Run sends until ctx ends, and returns once everything has stopped and is on
// the disk. Set, Observe and Capture may be called before.
func (r *Router) Run(ctx context.Context) error {
	second := time.NewTicker(time.Second)
	defer second.Stop()
	for {
		select {
		case <-second.C:
			r.replay.tick(r.cfg.Cursors)
			r.sweep()
			r.reopen()
		case <-ctx.Done():
			r.Close()
			return nil
		}
	}
}

// Close ends a Router that is not run. It may be called again.
func (r *Router) Close() {
	r.cancel()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return
	}
	r.closed = true
	for _, rt := range r.routes {
		rt.stop()
	}
	r.replay.settle(r.cfg.Cursors, time.Now().Add(-atRest))
	r.replay.close()
}

// Set tells all the routes and devices there are. What it captures from then on
// it captures when it has returned.
func (r *Router) Set(routes []*v1alpha1.TelemetryRoute, devices []devicetwin.Bound) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.setLocked(routes, devices)
}

// reopen tries again to open the logs that could not be opened.
func (r *Router) reopen() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.again.IsZero() && time.Now().After(r.again) {
		r.setLocked(r.given, r.bound)
	}
}

func (r *Router) setLocked(routes []*v1alpha1.TelemetryRoute, devices []devicetwin.Bound) {
	if r.closed {
		return
	}
	r.given, r.bound, r.again = routes, devices, time.Time{}
	routes = slices.SortedFunc(slices.Values(routes), func(a, b *v1alpha1.TelemetryRoute) int {
		return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
	})
	if len(routes) > maxRoutes {
		r.cfg.Log.Error("more TelemetryRoutes than a node takes", "routes", len(routes), "limit", maxRoutes)
		routes = routes[:maxRoutes]
	}
	next := map[devicetwin.Key]*route{}
	for _, o := range routes {
		key := devicetwin.Key{Namespace: o.Namespace, Name: o.Name}
		old := r.routes[key]
		if old != nil && old.err == nil && old.uid == string(o.UID) && sameButFrom(old.spec, o.Spec) {
			keep := *old
			keep.spec = o.Spec
			next[key] = &keep
			delete(r.routes, key)
		}
	}
	for key, old := range r.routes { // gone, or to be begun anew
		old.stop()
		r.unused[r.dirOf(key, old.uid)] = time.Now()
	}
	for _, o := range routes {
		key := devicetwin.Key{Namespace: o.Namespace, Name: o.Name}
		if next[key] == nil {
			next[key] = r.begin(key, o)
		}
		delete(r.unused, r.dirOf(key, string(o.UID)))
	}
	r.routes = next
	r.table.Store(r.tabulate(next, devices))
	r.noteUnused()
}

// sameButFrom tells whether the log and the sinks can go on as they are.
func sameButFrom(a, b v1alpha1.TelemetryRouteSpec) bool {
	a.From, b.From = v1alpha1.RouteSource{}, v1alpha1.RouteSource{}
	a.Capture, b.Capture = "", ""
	return equality.Semantic.DeepEqual(a, b)
}

// dirOf is the directory of a route's log. A route that was deleted and made
// again is another one.
func (r *Router) dirOf(key devicetwin.Key, uid string) string {
	return filepath.Join(r.cfg.Dir, key.Namespace+"_"+key.Name+"_"+strings.NewReplacer("/", "_", ".", "_").Replace(uid))
}

// begin opens a route's log and starts its sinks.
func (r *Router) begin(key devicetwin.Key, o *v1alpha1.TelemetryRoute) *route {
	rt := &route{key: key, uid: string(o.UID), spec: o.Spec, stop: func() {}}
	maxBytes := int64(0)
	if q := o.Spec.Buffer.MaxBytes; q != "" {
		n, err := resource.ParseQuantity(q)
		if err != nil {
			r.cfg.Log.Error("a TelemetryRoute's buffer.maxBytes is no quantity", "route", key, "error", err)
		} else {
			maxBytes = max(n.Value(), 1<<20)
		}
	}
	log, err := seglog.Open(seglog.Config{
		Dir: r.dirOf(key, rt.uid), MaxBytes: maxBytes, MaxAge: o.Spec.Buffer.MaxAge.Duration, Policy: o.Spec.Buffer.Policy,
		Alarm: o.Spec.Lane == "alarm", Series: seriesOf, Now: r.cfg.Now, Free: r.cfg.free, Log: r.cfg.Log,
	})
	if err != nil {
		rt.err = err
		r.again = time.Now().Add(tryAgain)
		r.cfg.Log.Error("a TelemetryRoute has no log; what it is to capture is refused, and it is tried again", "route", key, "after", tryAgain, "error", err)
		return rt
	}
	rt.log = log
	ctx, cancel := context.WithCancel(r.ctx)
	var wg sync.WaitGroup
	for i := range o.Spec.To {
		s, err := r.newSender(rt, i)
		if err != nil { // its cursor is unreadable; from the oldest on
			r.cfg.Log.Warn("a sink begins at the oldest record", "route", key, "sink", i, "error", err)
		}
		rt.sinks = append(rt.sinks, s)
	}
	for _, s := range rt.sinks {
		wg.Go(func() { s.run(ctx, rt.sinks) })
	}
	rt.stop = func() {
		cancel()
		wg.Wait()
		if err := log.Close(); err != nil {
			r.cfg.Log.Error("a telemetry log did not close", "route", key, "error", err)
		}
	}
	return rt
}

// tabulate works out which route gets what.
func (r *Router) tabulate(routes map[devicetwin.Key]*route, devices []devicetwin.Bound) *table {
	t := &table{routes: routes, devices: map[devicetwin.Key]map[string][]*route{}}
	for _, rt := range routes {
		for _, f := range rt.spec.From.Topics {
			if err := mqtt.CheckFilter(f); err != nil {
				r.cfg.Log.Error("a TelemetryRoute's topic is none", "route", rt.key, "error", err)
				continue
			}
			t.topics.add(f, rt)
			t.filters = append(t.filters, f)
			t.sync = t.sync || rt.sync()
		}
	}
	for _, d := range devices {
		if d.Device == nil || d.Model == nil {
			continue
		}
		key := devicetwin.Key{Namespace: d.Device.Namespace, Name: d.Device.Name}
		props := map[string][]*route{}
		captured := false
		for _, p := range d.Model.Spec.Properties {
			for _, rt := range routes {
				if rt.key.Namespace == key.Namespace && rt.wants(d, p) {
					props[p.Name] = append(props[p.Name], rt)
					captured = captured || rt.sync()
				}
			}
		}
		if len(props) > 0 {
			t.devices[key] = props
		}
		for _, f := range r.cfg.DeviceTopics(d) {
			t.captured.add(f, captured)
		}
		t.sync = t.sync || captured
	}
	slices.Sort(t.filters)
	t.filters = slices.Compact(t.filters)
	return t
}

// wants tells whether a route carries a property of a device.
func (r *route) wants(d devicetwin.Bound, p v1alpha1.Property) bool {
	if p.Telemetry == r.key.Name {
		return true
	}
	from := r.spec.From
	if from.DeviceSelector == nil && len(from.Properties) == 0 {
		return false
	}
	if len(from.Properties) > 0 && !slices.Contains(from.Properties, p.Name) {
		return false
	}
	if from.DeviceSelector == nil {
		return true
	}
	sel, err := metav1.LabelSelectorAsSelector(from.DeviceSelector)
	return err == nil && sel.Matches(labels.Set(d.Device.Labels))
}

// Observe takes a reading. It does not block.
func (r *Router) Observe(o devicetwin.Observation) {
	routes := r.table.Load().devices[o.Device][o.Property]
	if len(routes) == 0 {
		return
	}
	rec, err := r.clock.record(o)
	if err != nil {
		if r.bad.Add(1) == 1 {
			r.cfg.Log.Warn("a reading is no telemetry", "error", err)
		}
		return
	}
	for _, rt := range routes {
		if rt.log != nil {
			rt.log.Offer(rec)
		}
	}
}

// Topics are the filters of all routes, for a broker that has to be subscribed
// to for Capture to see them.
func (r *Router) Topics() []string { return slices.Clone(r.table.Load().filters) }

// Append puts payloads into a route, and returns once they are on the disk.
func (r *Router) Append(ctx context.Context, key devicetwin.Key, topic string, payloads ...[]byte) error {
	rt := r.table.Load().routes[key]
	switch {
	case rt == nil:
		return fmt.Errorf("%s: %w", key, ErrNoRoute)
	case rt.log == nil:
		return rt.err
	}
	now, _ := r.cfg.Now()
	recs := make([]seglog.Record, len(payloads))
	for i, p := range payloads {
		recs[i] = encodeMessage(mqtt.Message{Topic: topic, Payload: p, Received: now})
	}
	return rt.log.Append(ctx, recs...)
}

// noteUnused finds the directories of routes that are gone.
func (r *Router) noteUnused() {
	names, err := os.ReadDir(r.cfg.Dir)
	if err != nil {
		r.cfg.Log.Warn("telemetry logs cannot be listed", "error", err)
		return
	}
	used := map[string]bool{r.replayDir(): true}
	for key, rt := range r.routes {
		used[r.dirOf(key, rt.uid)] = true
	}
	for _, e := range names {
		path := filepath.Join(r.cfg.Dir, e.Name())
		if _, noted := r.unused[path]; e.IsDir() && !used[path] && !noted {
			r.unused[path] = time.Now()
		}
	}
}

// sweep removes what has been unused for long enough, cursors included.
func (r *Router) sweep() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for path, since := range r.unused {
		if time.Since(since) < unusedFor {
			continue
		}
		delete(r.unused, path)
		if err := os.RemoveAll(path); err != nil {
			r.cfg.Log.Warn("the log of a route that is gone stays", "error", err)
			continue
		}
		for i := range maxSinks {
			r.cfg.Cursors.Dirty(cursorBucket, cursorKey(path, i), func() []byte { return nil })
		}
	}
}

// RouteStatus is how a route does on this node.
type RouteStatus struct {
	Route devicetwin.Key `json:"route"`
	Error string         `json:"error,omitempty"`
	Log   seglog.Stats   `json:"log"`
	Sinks []SinkStatus   `json:"sinks"`
}

// Status tells how all routes do, by name.
func (r *Router) Status() []RouteStatus {
	var out []RouteStatus
	for _, rt := range r.table.Load().routes {
		s := RouteStatus{Route: rt.key}
		if rt.log != nil {
			s.Log = rt.log.Stats()
		}
		if rt.err != nil {
			s.Error = rt.err.Error()
		}
		for _, k := range rt.sinks {
			s.Sinks = append(s.Sinks, k.status())
		}
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b RouteStatus) int { return strings.Compare(a.Route.String(), b.Route.String()) })
	return out
}
