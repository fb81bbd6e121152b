package telemetry

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/mqtt"
	"github.com/skerry-io/skerry/devicetwin/telemetry/seglog"
	"github.com/skerry-io/skerry/devicetwin/twindb"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// memory keeps cursors, as they are when flush is called.
type memory struct {
	mu    sync.Mutex
	dirty map[string]func() []byte
	kept  map[string][]byte
}

func newMemory() *memory {
	return &memory{dirty: map[string]func() []byte{}, kept: map[string][]byte{}}
}

func (m *memory) Load(bucket string, fn func(key string, value []byte) error) error {
	m.mu.Lock()
	kept := maps.Clone(m.kept)
	m.mu.Unlock()
	for k, v := range kept {
		if name, ok := strings.CutPrefix(k, bucket+"|"); ok {
			if err := fn(name, v); err != nil {
				return err
			}
		}
	}
	return nil
}

func (m *memory) Dirty(bucket, key string, encode func() []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.dirty[bucket+"|"+key] = encode
}

func (m *memory) flush() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for k, encode := range m.dirty {
		m.kept[k] = encode()
	}
	clear(m.dirty)
}

func roomy() (uint64, uint64, error) { return 1 << 40, 1 << 40, nil }

// start runs a Router; stop ends it and waits.
func start(t testing.TB, cfg Config) (r *Router, stop func()) {
	t.Helper()
	cfg.Node, cfg.free = "pi-01", roomy
	r, err := New(cfg)
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			must(t, <-done)
		})
	}
	t.Cleanup(stop)
	return r, stop
}

func newRoute(name string, from v1alpha1.RouteSource, to ...v1alpha1.RouteSink) *v1alpha1.TelemetryRoute {
	return &v1alpha1.TelemetryRoute{
		ObjectMeta: metav1.ObjectMeta{Namespace: "home", Name: name, UID: types.UID("uid-" + name)},
		Spec:       v1alpha1.TelemetryRouteSpec{From: from, To: to},
	}
}

func plug(name string, labels map[string]string) devicetwin.Bound {
	return devicetwin.Bound{
		Device: &v1alpha1.Device{ObjectMeta: metav1.ObjectMeta{Namespace: "home", Name: name, Labels: labels}},
		Model: &v1alpha1.DeviceModel{Spec: v1alpha1.DeviceModelSpec{Properties: []v1alpha1.Property{
			{Name: "power", Type: "float64"}, {Name: "relay", Type: "bool"}, {Name: "energy", Type: "float64", Telemetry: "named"},
		}}},
	}
}

func topicsOf(b devicetwin.Bound) []string { return []string{"tele/" + b.Device.Name + "/#"} }

func observation(dev, prop string, v any) devicetwin.Observation {
	return devicetwin.Observation{Device: devicetwin.Key{Namespace: "home", Name: dev}, Property: prop, Value: v, Received: time.Now(), Quality: v1alpha1.QualityGood}
}

// hook is a webhook that keeps what it took.
type hook struct {
	*httptest.Server
	mu    sync.Mutex
	code  int // of the answer; 0: 200
	lines []sent
}

type sent struct {
	ID       string          `json:"id"`
	Device   string          `json:"device"`
	Property string          `json:"property"`
	Value    json.RawMessage `json:"value"`
	Topic    string          `json:"topic"`
	Text     string          `json:"text"`
	TS       int64           `json:"ts"`
	Quality  string          `json:"quality"`
	Backfill bool            `json:"backfill"`
	Gap      *struct {
		Count int `json:"count"`
	} `json:"gap"`
}

func newHook(t testing.TB) *hook {
	h := &hook{}
	h.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		b, err := io.ReadAll(req.Body)
		if err != nil {
			return
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.code != 0 {
			w.WriteHeader(h.code)
			return
		}
		for l := range strings.Lines(string(b)) {
			var s sent
			if err := json.Unmarshal([]byte(l), &s); err != nil {
				t.Errorf("%q: %v", l, err)
			}
			h.lines = append(h.lines, s)
		}
	}))
	t.Cleanup(h.Close)
	return h
}

func (h *hook) sink() v1alpha1.RouteSink {
	return v1alpha1.RouteSink{Webhook: &v1alpha1.WebhookSink{URL: h.URL}}
}

func (h *hook) answer(code int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.code = code
}

func (h *hook) took() []sent {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.lines)
}

// wait waits for n lines.
func (h *hook) wait(t testing.TB, n int) []sent {
	t.Helper()
	waitFor(t, fmt.Sprintf("%d records", n), func() bool { return len(h.took()) >= n })
	return h.took()
}

func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no %s", what)
		}
	}
}

// Which route carries what.
func TestWhatARouteCarries(t *testing.T) {
	all, lab, named, topics := newHook(t), newHook(t), newHook(t), newHook(t)
	r, _ := start(t, Config{Dir: t.TempDir(), Cursors: newMemory()})
	r.Set([]*v1alpha1.TelemetryRoute{
		newRoute("all", v1alpha1.RouteSource{DeviceSelector: &metav1.LabelSelector{}}, all.sink()),
		newRoute("lab", v1alpha1.RouteSource{DeviceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"room": "lab"}}, Properties: []string{"power"}}, lab.sink()),
		newRoute("named", v1alpha1.RouteSource{}, named.sink()),
		newRoute("topics", v1alpha1.RouteSource{Topics: []string{"raw/+/x", "bad/#/x"}}, topics.sink()),
	}, []devicetwin.Bound{plug("a", map[string]string{"room": "lab"}), plug("b", nil)})
	for _, dev := range []string{"a", "b", "stranger"} {
		for i, prop := range []string{"power", "relay", "energy", "unknown"} {
			r.Observe(observation(dev, prop, float64(i)+0.5))
		}
	}
	must(t, r.Capture(mqtt.Message{Topic: "raw/1/x", Payload: []byte("on")}))
	must(t, r.Capture(mqtt.Message{Topic: "raw/1/y", Payload: []byte("off")}))
	must(t, r.Append(t.Context(), devicetwin.Key{Namespace: "home", Name: "named"}, "skerry/v1/telemetry/home/named", []byte("by hand")))
	if err := r.Append(t.Context(), devicetwin.Key{Namespace: "home", Name: "none"}, "t", nil); !errors.Is(err, ErrNoRoute) {
		t.Errorf("to no route: %v", err)
	}
	for _, c := range []struct {
		h    *hook
		want string
	}{
		{all, "a/energy=2.5 a/power=0.5 a/relay=1.5 b/energy=2.5 b/power=0.5 b/relay=1.5"},
		{lab, "a/power=0.5"},
		{named, "a/energy=2.5 b/energy=2.5 skerry/v1/telemetry/home/named=by hand"},
		{topics, "raw/1/x=on"},
	} {
		var got []string
		for _, l := range c.h.wait(t, strings.Count(c.want, "=")) {
			if l.Topic != "" {
				got = append(got, l.Topic+"="+l.Text)
				continue
			}
			got = append(got, l.Device+"/"+l.Property+"="+string(l.Value))
		}
		slices.Sort(got)
		if strings.Join(got, " ") != c.want {
			t.Errorf("got  %q\nwant %q", got, c.want)
		}
	}
	if got := r.Topics(); !slices.Equal(got, []string{"raw/+/x"}) {
		t.Errorf("topics %q", got)
	}
	waitFor(t, "acknowledgement", func() bool {
		s := r.Status()
		return len(s) == 4 && s[0].Sinks[0].Sent == 6 && s[0].Sinks[0].Behind == 0 && s[0].Sinks[0].Kind == "webhook"
	})
}

// A sink that is gone holds up nobody, and gets all when it is back, what is
// new first; over a restart it goes on where it was.
func TestOutage(t *testing.T) {
	good, bad := newHook(t), newHook(t)
	bad.answer(http.StatusServiceUnavailable)
	cfg := Config{Dir: t.TempDir(), Cursors: newMemory()}
	r, stop := start(t, cfg)
	routes := []*v1alpha1.TelemetryRoute{newRoute("all", v1alpha1.RouteSource{Topics: []string{"#"}, Properties: []string{"power"}}, good.sink(), bad.sink(),
		v1alpha1.RouteSink{MQTT: &v1alpha1.MQTTSink{URL: "mqtt://127.0.0.1:1", Topic: "t"}},
		v1alpha1.RouteSink{Webhook: &v1alpha1.WebhookSink{URL: good.URL, SecretRef: &v1alpha1.SecretRef{Name: "gone"}}},
	)}
	devices := []devicetwin.Bound{plug("a", nil)}
	r.Set(routes, devices)
	const n = 3000
	for i := range n {
		r.Observe(observation("a", "power", i))
	}
	good.wait(t, n)
	waitFor(t, "trouble", func() bool {
		s := r.Status()[0].Sinks
		return s[1].Error != "" && s[2].Error != "" && strings.Contains(s[3].Error, "home/gone") && s[0].Error == "" && s[0].Behind == 0
	})
	cfg.Cursors.(*memory).flush()
	stop()

	r, _ = start(t, cfg)
	bad.answer(0)
	r.Set(routes, devices)
	r.Observe(observation("a", "power", n))
	good.wait(t, n+1)
	lines := bad.wait(t, n+1)
	seen := map[string]bool{}
	late := 0
	for _, l := range lines {
		if seen[l.ID] {
			t.Errorf("%s came twice", l.ID)
		}
		seen[l.ID] = true
		if l.Backfill {
			late++
		}
	}
	if len(seen) != n+1 || late < n/2 {
		t.Errorf("%d came, %d of them late", len(seen), late)
	}
	ids := map[string]bool{}
	for _, l := range good.took() {
		ids[l.ID] = true
	}
	if !maps.Equal(ids, seen) || len(good.took()) != n+1 {
		t.Errorf("the good sink has %d records, %d IDs", len(good.took()), len(ids))
	}
}

// What a sink refuses is given up and counted, and the rest goes on.
func TestRefusal(t *testing.T) {
	h := newHook(t)
	h.answer(http.StatusUnprocessableEntity)
	r, _ := start(t, Config{Dir: t.TempDir(), Cursors: newMemory()})
	r.Set([]*v1alpha1.TelemetryRoute{newRoute("all", v1alpha1.RouteSource{Topics: []string{"#"}}, h.sink())}, nil)
	key := devicetwin.Key{Namespace: "home", Name: "all"}
	must(t, r.Append(t.Context(), key, "t", []byte("1"), []byte("2")))
	waitFor(t, "refusal", func() bool { return r.Status()[0].Sinks[0].Refused == 2 })
	h.answer(0)
	must(t, r.Append(t.Context(), key, "t", []byte("three")))
	if got := h.wait(t, 1); got[0].Text != "" && got[0].Text != "three" {
		t.Errorf("%+v", got)
	}
}

// What a sync route captured, and the twins may not have flushed, comes back
// after a power cut.
func TestCapturedMessagesComeBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := Config{Dir: t.TempDir(), Cursors: newMemory(), DeviceTopics: topicsOf}
		r, stop := start(t, cfg)
		route := newRoute("power", v1alpha1.RouteSource{Properties: []string{"power"}}, v1alpha1.RouteSink{Hub: &v1alpha1.HubSink{}})
		route.Spec.Capture = "sync"
		r.Set([]*v1alpha1.TelemetryRoute{route}, []devicetwin.Bound{plug("a", nil)})
		for i := range 100 {
			must(t, r.Capture(mqtt.Message{Topic: "tele/a/SENSOR", Payload: fmt.Append(nil, i), Retain: i == 99, From: "a"}))
			must(t, r.Capture(mqtt.Message{Topic: "tele/b/SENSOR", Payload: []byte("not asked for")}))
			time.Sleep(time.Second)
		}
		cfg.Cursors.(*memory).flush()
		for i := 100; i < 105; i++ {
			must(t, r.Capture(mqtt.Message{Topic: "tele/a/SENSOR", Payload: fmt.Append(nil, i)}))
		}
		mem := cfg.Cursors.(*memory)
		lost := newMemory()
		lost.kept = maps.Clone(mem.kept) // as a power cut leaves it
		stop()
		mem.flush() // as an orderly end does
		again, end := start(t, cfg)
		n := 0
		for range again.Captured() {
			n++
		}
		if n < 5 || n > 8 {
			t.Errorf("%d messages come back after an orderly end", n)
		}
		end()

		cfg.Cursors = lost
		r, stop = start(t, cfg)
		for range 2 { // as often as one likes
			var got []int
			for m, err := range r.Captured() {
				must(t, err)
				n := 0
				_, err = fmt.Sscan(string(m.Payload), &n)
				must(t, err)
				if m.Topic != "tele/a/SENSOR" || m.Retain != (n == 99) || m.Received.IsZero() {
					t.Errorf("%+v", m)
				}
				got = append(got, n)
			}
			if len(got) < 13 || len(got) > 18 || // captured within settled of the flush, or after it
				got[len(got)-1] != 104 || !slices.IsSorted(got) {
				t.Errorf("came back: %v", got)
			}
		}
		stop()
	})
}

// Before the clock is right readings are told apart by the time since the
// start, and have their times once it is.
func TestTimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var sure bool
		off := -20 * 365 * 24 * time.Hour
		c := clock{func() (time.Time, bool) { return time.Now().Add(off), sure }, "boot", time.Now()}
		sendable := func(o devicetwin.Observation) func(c clock) edgeapi.TelemetryRecord {
			rec, err := c.record(o)
			must(t, err)
			return func(c clock) edgeapi.TelemetryRecord {
				out, err := c.telemetry(rec, false)
				must(t, err)
				return out
			}
		}
		o := observation("a", "power", 1.5)
		o.Received = time.Now().Add(off)
		early := sendable(o)
		was := time.Now().UnixMilli()
		o.TS = time.Now()
		own := sendable(o)
		time.Sleep(time.Hour)
		if got := early(c); got.Quality != v1alpha1.QualityUncertain {
			t.Errorf("with a clock that is wrong: %+v", got)
		}
		sure, off = true, 0
		if got := early(c); got.TS != was || got.Quality != "" {
			t.Errorf("resolved: %+v, want %d", got, was)
		}
		if got := own(c); got.TS != was || got.Quality != v1alpha1.QualityUncertain {
			t.Errorf("with a time of its own: %+v", got)
		}
		other := c
		other.boot = "another"
		if got := early(other); got.Quality != v1alpha1.QualityUncertain {
			t.Errorf("after a restart: %+v", got)
		}
		for _, c2 := range []struct {
			ts         time.Duration
			historical bool
			believed   bool
		}{{0, false, true}, {-time.Hour, false, true}, {-48 * time.Hour, false, false}, {48 * time.Hour, false, false}, {-48 * time.Hour, true, true}, {48 * time.Hour, true, false}} {
			o := observation("a", "power", 1.5)
			o.TS = o.Received.Add(c2.ts)
			o.Historical = c2.historical
			got := sendable(o)(c)
			want := o.Received
			if c2.believed {
				want = o.TS
			}
			if got.TS != want.UnixMilli() || got.Backfill != c2.historical || (got.Received != 0) != (c2.ts != 0 && c2.believed) {
				t.Errorf("%+v: %+v", c2, got)
			}
		}
	})
}

func TestValues(t *testing.T) {
	c := clock{func() (time.Time, bool) { return time.Now(), true }, "boot", time.Now()}
	for _, v := range []struct {
		value any
		want  string
	}{{true, "true"}, {int64(1<<62 + 1), "4611686018427387905"}, {0.1, "0.1"}, {"a", `"a"`}, {[]byte{1}, `"AQ=="`}, {json.RawMessage(`{"a":1}`), `{"a":1}`}} {
		rec, err := c.record(observation("a", "p", v.value))
		must(t, err)
		out, err := c.telemetry(rec, false)
		must(t, err)
		if string(out.Value) != v.want || *out.Device != (edgeapi.DeviceRef{Namespace: "home", Name: "a"}) || out.Property != "p" {
			t.Errorf("%v: %+v", v.value, out)
		}
	}
	if _, err := c.record(observation("a", "p", func() {})); err == nil {
		t.Error("a value of no type was taken")
	}
}

// The log of a route that is gone is kept for a while, and then goes with its
// cursors.
func TestARouteThatIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := newMemory()
		cfg := Config{Dir: t.TempDir(), Cursors: mem}
		r, stop := start(t, cfg)
		rt := newRoute("a", v1alpha1.RouteSource{Topics: []string{"#"}}, v1alpha1.RouteSink{Hub: &v1alpha1.HubSink{}})
		key := devicetwin.Key{Namespace: "home", Name: "a"}
		set := func(routes ...*v1alpha1.TelemetryRoute) { r.Set(routes, nil) }
		set(rt)
		must(t, r.Append(t.Context(), key, "t", []byte("1")))
		set()
		time.Sleep(unusedFor / 2)
		set(rt) // it was a mistake
		time.Sleep(unusedFor)
		if s := r.Status(); len(s) != 1 || s[0].Sinks[0].Behind != 1 || s[0].Sinks[0].Error == "" {
			t.Fatalf("status %+v", s)
		}
		changed := rt.DeepCopy()
		changed.Spec.Buffer.Policy = seglog.Thin
		set(changed) // goes on with what there is
		if s := r.Status(); s[0].Sinks[0].Behind != 1 {
			t.Errorf("status %+v", s)
		}
		again := rt.DeepCopy()
		again.UID = "another"
		set(again)
		if s := r.Status(); s[0].Sinks[0].Behind != 0 {
			t.Errorf("status %+v", s)
		}
		stop()
		r, stop = start(t, cfg) // what is unused is found after a restart
		set(again)
		time.Sleep(unusedFor + 2*time.Second)
		dirs, err := os.ReadDir(cfg.Dir)
		must(t, err)
		if len(dirs) != 2 {
			t.Errorf("left: %v", dirs)
		}
		mem.flush()
		for k, v := range mem.kept {
			if strings.Contains(k, "uid-a") && v != nil {
				t.Errorf("left: %s %s", k, v)
			}
		}
		stop()
	})
}

// A disk that takes nothing: what is to be captured is refused, what is not
// goes on.
func TestCaptureOnAFullLog(t *testing.T) {
	r, _ := start(t, Config{Dir: t.TempDir(), Cursors: newMemory()})
	full := newRoute("full", v1alpha1.RouteSource{Topics: []string{"sync/#"}}, v1alpha1.RouteSink{Hub: &v1alpha1.HubSink{}})
	full.Spec.Capture = "sync"
	full.Spec.Buffer = v1alpha1.RouteBuffer{Policy: seglog.DropNewest, MaxBytes: "1Mi"}
	r.Set([]*v1alpha1.TelemetryRoute{full}, nil)
	noise := make([]byte, 100<<10)
	for i := range noise {
		noise[i] = byte(rand.Uint32())
	}
	var err error
	for i := 0; err == nil && i < 100; i++ {
		err = r.Capture(mqtt.Message{Topic: "sync/a", Payload: noise})
	}
	if !errors.Is(err, seglog.ErrFull) {
		t.Errorf("error %v", err)
	}
	must(t, r.Capture(mqtt.Message{Topic: "other", Payload: noise}))
}

// A log that cannot be opened refuses what it is to capture, and is opened as
// soon as that can be.
func TestALogThatCannotBeOpened(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := Config{Dir: t.TempDir(), Cursors: newMemory()}
		r, stop := start(t, cfg)
		rt := newRoute("a", v1alpha1.RouteSource{Topics: []string{"a"}}, v1alpha1.RouteSink{Hub: &v1alpha1.HubSink{}})
		rt.Spec.Capture = "sync"
		key := devicetwin.Key{Namespace: "home", Name: "a"}
		dir := r.dirOf(key, "uid-a")
		must(t, os.WriteFile(dir, nil, 0o600)) // stands in its way
		r.Set([]*v1alpha1.TelemetryRoute{rt}, nil)
		if err := r.Capture(mqtt.Message{Topic: "a"}); err == nil || r.Status()[0].Error == "" {
			t.Errorf("captured without a log: %v", err)
		}
		must(t, os.Remove(dir))
		time.Sleep(tryAgain + 2*time.Second)
		must(t, r.Capture(mqtt.Message{Topic: "a"}))
		must(t, r.Capture(mqtt.Message{Topic: "a", Retain: true}))                 // had been kept
		must(t, r.Capture(mqtt.Message{Topic: "a", Retain: true, From: "device"})) // to be kept
		if s := r.Status()[0]; s.Error != "" || s.Sinks[0].Behind != 2 {
			t.Errorf("status %+v", s)
		}
		stop()
	})
}

// hub is the other end of a conversation.
type hub struct {
	conn *edgeapi.Conn
	end  func()
}

func converse(t *testing.T, r *Router) hub {
	t.Helper()
	a, b := net.Pipe()
	done := make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer close(done)
		if err := r.Converse(ctx, edgeapi.NewConn(a)); err == nil {
			t.Error("a conversation ended without an error")
		}
	}()
	h := hub{edgeapi.NewConn(b), sync.OnceFunc(func() { cancel(); a.Close(); b.Close(); <-done })}
	t.Cleanup(h.end)
	m, err := h.conn.Receive()
	must(t, err)
	if hello, ok := m.(edgeapi.TelemetryHello); !ok || hello.Version != edgeapi.TelemetryVersion {
		t.Fatalf("hello: %+v", m)
	}
	must(t, h.conn.Send(edgeapi.TelemetryWelcome{Version: edgeapi.TelemetryVersion, Now: time.Now()}))
	return h
}

func (h hub) batch(t *testing.T) edgeapi.TelemetryBatch {
	t.Helper()
	m, err := h.conn.Receive()
	must(t, err)
	b, ok := m.(edgeapi.TelemetryBatch)
	if !ok {
		t.Fatalf("%T", m)
	}
	return b
}

// To the hub: what it did not acknowledge comes again with the same IDs, over
// the next stream or after its wait.
func TestHubSink(t *testing.T) {
	r, _ := start(t, Config{Dir: t.TempDir(), Cursors: newMemory()})
	other := newHook(t)
	r.Set([]*v1alpha1.TelemetryRoute{newRoute("up", v1alpha1.RouteSource{Topics: []string{"#"}}, other.sink(), v1alpha1.RouteSink{Hub: &v1alpha1.HubSink{}})}, nil)
	key := devicetwin.Key{Namespace: "home", Name: "up"}
	must(t, r.Append(t.Context(), key, "t", []byte{0xff}, []byte("2")))
	other.wait(t, 2) // is not held up

	h := converse(t, r)
	first := h.batch(t)
	if first.Route != (edgeapi.DeviceRef{Namespace: "home", Name: "up"}) || first.Sink != 1 || len(first.Records) != 2 || first.Seq != 1 || string(first.Records[0].Payload) != "\xff" {
		t.Fatalf("batch %+v", first)
	}
	h.end()
	h = converse(t, r)
	again := h.batch(t)
	if again.Records[0].ID != first.Records[0].ID || len(again.Records) != 2 {
		t.Errorf("again: %+v", again)
	}
	must(t, h.conn.Send(edgeapi.TelemetryAck{Seq: 99, Code: 200})) // of nothing
	must(t, h.conn.Send(edgeapi.TelemetryAck{Seq: again.Seq, Code: 503, Message: "no room", RetryAfter: 10}))
	third := h.batch(t)
	must(t, h.conn.Send(edgeapi.TelemetryAck{Seq: third.Seq, Code: 409})) // it has yet to see the route as it is now
	third = h.batch(t)
	must(t, h.conn.Send(edgeapi.TelemetryAck{Seq: third.Seq, Code: 200}))
	waitFor(t, "acknowledgement", func() bool { s := r.Status()[0].Sinks[1]; return s.Sent == 2 && s.Behind == 0 && s.Error == "" })
	must(t, r.Append(t.Context(), key, "t", []byte("3")))
	fourth := h.batch(t)
	must(t, h.conn.Send(edgeapi.TelemetryAck{Seq: fourth.Seq, Code: 422}))
	waitFor(t, "refusal", func() bool { s := r.Status()[0].Sinks[1]; return s.Refused == 1 && s.Behind == 0 })
}

// A child captures and sends to a webhook here; it is killed in the middle,
// again and again. Every record that was acknowledged to the device arrives, and
// by their IDs none arrives twice.
func TestNothingIsLostToSIGKILL(t *testing.T) {
	if url := os.Getenv("SKERRY_TELEMETRY_URL"); url != "" {
		captureUntilKilled(t, os.Getenv("SKERRY_TELEMETRY_DIR"), url)
		return
	}
	const kills = 12
	h := newHook(t)
	dir := t.TempDir()
	acked := map[string]bool{}
	round := func(n int, last bool) {
		cmd := exec.Command(os.Args[0], "-test.run=^TestNothingIsLostToSIGKILL$")
		cmd.Env = append(os.Environ(), "SKERRY_TELEMETRY_DIR="+dir, "SKERRY_TELEMETRY_URL="+h.URL, fmt.Sprint("SKERRY_TELEMETRY_ROUND=", n))
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		var timer *time.Timer
		in := bufio.NewScanner(out)
		for in.Scan() {
			f := strings.Fields(in.Text())
			if len(f) != 2 || f[0] != "acked" {
				continue
			}
			acked[f[1]] = true
			if timer == nil {
				d := time.Duration(rand.IntN(80_000)) * time.Microsecond
				if last {
					// Until all has arrived that was ever acknowledged.
					go func() {
						for deadline := time.Now().Add(20 * time.Second); !arrived(h, maps.Clone(acked)) && time.Now().Before(deadline); {
							time.Sleep(20 * time.Millisecond)
						}
						_ = cmd.Process.Kill()
					}()
					timer = time.NewTimer(0)
					break
				}
				timer = time.AfterFunc(d, func() { _ = cmd.Process.Kill() })
			}
		}
		_, _ = io.Copy(io.Discard, out)
		if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != -1 {
			t.Fatalf("round %d: the child ended by itself: %v", n, err)
		}
	}
	for n := range kills {
		round(n, false)
	}
	round(kills, true)
	names, twice := map[string]string{}, 0
	for _, l := range h.took() {
		if l.Gap != nil {
			t.Errorf("a gap: %+v", l)
		}
		if had, ok := names[l.ID]; ok {
			twice++
			if had != l.Text {
				t.Errorf("%s is %s, it was %s", l.ID, l.Text, had)
			}
		}
		names[l.ID] = l.Text
	}
	count := map[string]int{}
	for _, name := range names {
		count[name]++
	}
	for name := range acked {
		if count[name] != 1 {
			t.Errorf("%s arrived under %d IDs", name, count[name])
		}
	}
	t.Logf("%d kills, %d acknowledged, %d arrived, %d of them more than once", kills, len(acked), len(names), twice)
	if len(acked) < kills {
		t.Error("hardly anything was acknowledged between the kills")
	}
}

func arrived(h *hook, acked map[string]bool) bool {
	for _, l := range h.took() {
		delete(acked, l.Text)
	}
	return len(acked) == 0
}

func captureUntilKilled(t *testing.T, dir, url string) {
	db, err := twindb.Open(twindb.Config{Path: filepath.Join(dir, "devices.db"), LockTimeout: 5 * time.Second})
	must(t, err)
	r, _ := start(t, Config{Dir: filepath.Join(dir, "telemetry"), Cursors: db})
	route := newRoute("all", v1alpha1.RouteSource{Topics: []string{"#"}}, v1alpha1.RouteSink{Webhook: &v1alpha1.WebhookSink{URL: url}})
	route.Spec.Capture = "sync"
	r.Set([]*v1alpha1.TelemetryRoute{route}, nil)
	last := os.Getenv("SKERRY_TELEMETRY_ROUND") == "12"
	var lost atomic.Bool
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for n := 0; !lost.Load() && !(last && n > 0); n++ {
				name := fmt.Sprintf("r%s-w%d-%d", os.Getenv("SKERRY_TELEMETRY_ROUND"), w, n)
				must(t, r.Capture(mqtt.Message{Topic: "a/b", Payload: []byte(name)}))
				if _, err := fmt.Printf("acked %s\n", name); err != nil {
					lost.Store(true)
				}
				if n%10 == 0 {
					must(t, db.Flush(context.Background()))
				}
			}
		})
	}
	wg.Wait()
	select {} // until killed
}

func FuzzDecodeMessage(f *testing.F) {
	f.Add(encodeMessage(mqtt.Message{Topic: "a/b", Payload: []byte("x"), Retain: true}).Payload)
	f.Add([]byte{0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decodeMessage(seglog.Record{Payload: b})
		if err != nil {
			return
		}
		again, err := decodeMessage(encodeMessage(m))
		if err != nil || again.Topic != m.Topic || string(again.Payload) != string(m.Payload) || again.Retain != m.Retain {
			t.Errorf("%+v is not %+v: %v", again, m, err)
		}
	})
}

func FuzzReading(f *testing.F) {
	f.Add(byte(kindReading), []byte(`{"d":"home/a","p":"power","v":1.5,"r":1,"b":"x","m":9}`))
	f.Add(byte(seglog.KindGap), []byte(`{"from":"","to":"","count":3}`))
	c := clock{func() (time.Time, bool) { return time.Unix(1, 0), true }, "x", time.Now()}
	f.Fuzz(func(t *testing.T, kind byte, b []byte) {
		rec := seglog.Record{Kind: kind, Payload: b, ID: "i"}
		seriesOf(rec)
		if out, err := c.telemetry(rec, false); err == nil {
			if _, err := json.Marshal(out); err != nil {
				t.Error(err)
			}
		}
	})
}

// The tree finds what one match after another would.
func FuzzTree(f *testing.F) {
	f.Add("a/+/#", "#", "a/b", "a/b/c")
	f.Add("+/+", "$SYS/#", "/", "$SYS/x")
	f.Fuzz(func(t *testing.T, f1, f2, f3, topic string) {
		var tr tree[string]
		want := map[string]bool{}
		for _, filter := range []string{f1, f2, f3} {
			if mqtt.CheckFilter(filter) == nil {
				tr.add(filter, filter)
				if mqtt.Match(filter, topic) {
					want[filter] = true
				}
			}
		}
		if mqtt.CheckTopic(topic) != nil {
			return
		}
		got := map[string]bool{}
		tr.match(topic, func(s string) { got[s] = true })
		if !maps.Equal(got, want) {
			t.Errorf("%q: %v, want %v", topic, got, want)
		}
	})
}

// Messages captured durably, by so many publishers at once.
func BenchmarkCapture(b *testing.B) {
	for _, publishers := range []int{1, 10, 50} {
		b.Run(fmt.Sprint(publishers), func(b *testing.B) {
			r, stop := start(b, Config{Dir: b.TempDir(), Cursors: newMemory()})
			defer stop()
			route := newRoute("all", v1alpha1.RouteSource{Topics: []string{"#"}}, v1alpha1.RouteSink{Hub: &v1alpha1.HubSink{}})
			route.Spec.Capture = "sync"
			r.Set([]*v1alpha1.TelemetryRoute{route}, nil)
			payload := []byte(strings.Repeat("x", 120))
			var left atomic.Int64
			left.Store(int64(b.N))
			b.ResetTimer()
			var wg sync.WaitGroup
			for p := range publishers {
				topic := fmt.Sprintf("sensors/%d/data", p)
				wg.Go(func() {
					for left.Add(-1) >= 0 {
						must(b, r.Capture(mqtt.Message{Topic: topic, Payload: payload}))
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "messages/s")
		})
	}
}
