package devicetwin

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// modelRuns is how many random histories are played; for a longer run:
// go test ./devicetwin -run Model -models 20000 -timeout 1h
var modelRuns = flag.Int("models", 250, "how many random histories to play against the conflict table")

// world is two sides that edit, what is between them, and the answer of the
// table in devices.md §2, kept in the plainest way there is.
type world struct {
	*rig
	rnd *rand.Rand
	log []string
	hub *hub
	l   *link

	// The cloud's object, and an earlier one that an etcd backup holds.
	gen    int64
	spec   map[string]string
	at     map[string]time.Time
	uid    int
	backup *struct {
		gen  int64
		spec map[string]string
		at   map[string]time.Time
	}
	lagging bool // connected, but the object has not come down

	// The answer.
	seenGen  int64
	seenUID  int
	seen     map[string]string
	seenAt   map[string]time.Time
	override map[string]expected

	counter  float64 // the device's, ever rising
	lastHub  string  // version of temp at the hub
	deviceUp bool
}

type expected struct {
	v       string
	base    int64
	since   time.Time
	expires time.Time
}

func (w *world) logf(format string, args ...any) {
	w.log = append(w.log, fmt.Sprintf("%v ", time.Since(w.tw.start))+fmt.Sprintf(format, args...))
}

func (w *world) object() *v1alpha1.Device {
	d := trvDevice(w.gen, w.spec)
	d.UID = uidOf(w.uid)
	times, _ := json.Marshal(w.at)
	d.Annotations = map[string]string{v1alpha1.AnnotationDesiredTimes: string(times)}
	return d
}

var authorities = map[string]string{"setpoint": "cloud", "free": "cloud", "mode": "edge", "boost": "lww"}

func (w *world) valueFor(p string) string {
	switch p {
	case "setpoint":
		return fmt.Sprint(5 + w.rnd.IntN(25))
	case "free":
		return fmt.Sprint(w.rnd.IntN(2) == 0)
	case "mode":
		return []string{`"heat"`, `"off"`, `"eco"`}[w.rnd.IntN(3)]
	}
	return fmt.Sprint(w.rnd.IntN(1000))
}

// deliver brings the object down, and the table to its answer.
func (w *world) deliver() {
	w.lagging = false
	w.set(w.object())
	w.expire()
	switch {
	case w.uid != w.seenUID || w.gen < w.seenGen:
		w.override = make(map[string]expected)
	case w.gen > w.seenGen:
		for p, o := range w.override {
			if w.spec[p] == w.seen[p] || w.gen <= o.base {
				continue
			}
			switch authorities[p] {
			case "cloud":
				delete(w.override, p)
			case "lww":
				// Of a property taken out of the spec no time is known: it is
				// when the node hears of it.
				if at, ok := w.at[p]; !ok || !at.Truncate(time.Millisecond).Before(o.since.Truncate(time.Millisecond)) {
					delete(w.override, p)
				}
			}
		}
	}
	w.seenGen, w.seenUID, w.seen, w.seenAt = w.gen, w.uid, maps.Clone(w.spec), maps.Clone(w.at)
}

func (w *world) expire() {
	for p, o := range w.override {
		if !o.expires.After(time.Now()) {
			delete(w.override, p)
		}
	}
}

// local sets something on the node and says what the answer must be.
func (w *world) local() {
	ps := []string{"setpoint", "free", "mode", "boost"}
	p := ps[w.rnd.IntN(len(ps))]
	v := w.valueFor(p)
	ttl := time.Duration(w.rnd.IntN(120)+1) * time.Minute
	connected := w.tw.Connected()
	now := time.Now()
	w.expire()
	want := 200
	switch {
	case p == "setpoint" && connected:
		want = 403
	case p == "free" && connected && w.spec[p] != w.seen[p]:
		want = 409
	case p == "boost" && w.seen[p] != "" && !w.seenAt[p].Before(now):
		want = 409
	}
	res := w.tw.SetDesired(context.Background(), trv, Patch{Props: map[string]json.RawMessage{p: json.RawMessage(v)}, TTL: ttl, By: "console"})
	w.logf("local %s=%s for %v: %d %s", p, v, ttl, res.Code, res.State)
	if res.Code != want {
		w.fail("local %s=%s: %+v, expected %d", p, v, res, want)
	}
	if res.Code == 200 {
		w.override[p] = expected{v: v, base: w.seenGen, since: now, expires: now.Add(ttl)}
	}
}

func (w *world) fail(format string, args ...any) {
	w.Helper()
	w.Fatalf("%s\n%s", fmt.Sprintf(format, args...), strings.Join(w.log, "\n"))
}

func (w *world) edit() {
	w.gen++
	for range w.rnd.IntN(2) + 1 {
		p := []string{"setpoint", "free", "mode", "boost"}[w.rnd.IntN(4)]
		if w.rnd.IntN(8) == 0 {
			delete(w.spec, p)
			delete(w.at, p)
			w.logf("cloud generation %d takes %s out", w.gen, p)
			continue
		}
		if v := w.valueFor(p); v != w.spec[p] {
			w.spec[p], w.at[p] = v, time.Now()
			w.logf("cloud generation %d sets %s=%s", w.gen, p, v)
		}
	}
	switch {
	case w.l == nil:
	case w.rnd.IntN(4) == 0:
		w.lagging = true
	default:
		w.deliver()
	}
}

func (w *world) connect() {
	if w.l == nil {
		w.l = connect(w.tw, w.hub)
		w.logf("connected")
		time.Sleep(100 * time.Millisecond)
		w.deliver()
	}
}

func (w *world) disconnect() {
	if w.l != nil {
		w.l.cut()
		w.l = nil
		w.logf("cut")
	}
}

func (w *world) step() {
	switch w.rnd.IntN(16) {
	case 0, 1, 2:
		w.edit()
	case 3, 4, 5, 6:
		w.local()
	case 7:
		w.connect()
	case 8:
		w.disconnect()
	case 9:
		up := w.l != nil
		w.disconnect()
		w.logf("power cut, disk: %s", w.disk.data[bucketOverride])
		w.reboot()
		w.set(w.storedObject())
		if up && w.rnd.IntN(2) == 0 {
			w.connect()
		}
	case 10:
		w.logf("flush")
		w.disk.flush()
	case 11:
		d := time.Duration(w.rnd.IntN(3600)) * time.Second
		w.logf("%v pass", d)
		time.Sleep(d)
	case 12:
		w.counter++
		w.logf("the device says temp=%v", w.counter/1000)
		w.tw.Report(trv, []Reading{{Property: "temp", Value: w.counter / 1000}})
	case 13:
		w.deviceUp = !w.deviceUp
		w.logf("the device is there: %v", w.deviceUp)
		w.presence()
	case 14:
		switch w.rnd.IntN(3) {
		case 0:
			// The hub is restarted and remembers nothing.
			up := w.l != nil
			w.disconnect()
			base := w.hub.base
			w.hub = newHub()
			w.hub.base, w.hub.uid, w.lastHub = base, string(uidOf(w.uid)), ""
			w.logf("the hub is made anew")
			if up {
				w.connect()
			}
		case 1:
			w.backup = &struct {
				gen  int64
				spec map[string]string
				at   map[string]time.Time
			}{w.gen, maps.Clone(w.spec), maps.Clone(w.at)}
			w.logf("etcd is backed up at generation %d", w.gen)
		case 2:
			if w.backup != nil && w.backup.gen < w.seenGen {
				w.gen, w.spec, w.at = w.backup.gen, maps.Clone(w.backup.spec), maps.Clone(w.backup.at)
				w.logf("etcd is restored to generation %d", w.gen)
				w.backup = nil
				if w.l != nil {
					w.deliver()
				} else {
					// Edits that hide that it went back are out of the table's
					// sight; have the node see it.
					w.connect()
				}
			}
		}
	case 15:
		if w.rnd.IntN(6) == 0 {
			w.uid++
			w.gen, w.spec, w.at, w.backup = 1, map[string]string{}, map[string]time.Time{}, nil
			w.logf("the Device is made anew")
			w.hub.mu.Lock()
			delete(w.hub.values, refOf(trv))
			w.hub.uid = string(uidOf(w.uid))
			w.hub.mu.Unlock()
			w.lastHub = ""
			w.connect()
			if w.lagging || w.seenUID != w.uid {
				w.deliver()
			}
		}
	}
	synctest.Wait()
	w.watchHub()
}

// storedObject is what the node's own store has of the object.
func (w *world) storedObject() *v1alpha1.Device {
	d := trvDevice(w.seenGen, w.seen)
	d.UID = uidOf(w.seenUID)
	times, _ := json.Marshal(w.seenAt)
	d.Annotations = map[string]string{v1alpha1.AnnotationDesiredTimes: string(times)}
	return d
}

func (w *world) presence() {
	state, err := v1alpha1.PhaseOnline, error(nil)
	if !w.deviceUp {
		state, err = v1alpha1.PhaseOffline, fmt.Errorf("gone: %w", ErrNotConnected)
	}
	w.gadget.set(func(g *gadget) { g.err = err })
	w.tw.Sight(trv, Sighting{Evidence: EvidenceAvailability, State: state})
}

// watchHub: what the hub shows never goes back.
func (w *world) watchHub() {
	w.hub.mu.Lock()
	defer w.hub.mu.Unlock()
	v, ok := w.hub.values[refOf(trv)]["temp"]
	if !ok {
		return
	}
	if w.lastHub != "" && v.Version != w.lastHub && !newer(v.Version, w.lastHub) {
		w.fail("the hub's value went back from %s to %s", w.lastHub, v.Version)
	}
	w.lastHub = v.Version
}

// quiet has all come together and compares.
func (w *world) quiet() {
	w.connect()
	if w.lagging {
		w.deliver()
	}
	w.deviceUp = true
	w.presence()
	time.Sleep(2 * reachMost)
	synctest.Wait()
	w.expire()
	w.logf("quiet; expected overrides %+v, spec %v", w.override, w.seen)
	doc := w.doc()
	state := w.hub.state(trv)
	overrides := make(map[string]edgeapi.TwinOverride)
	for _, o := range state.Overrides {
		overrides[o.Property] = o
	}
	if state.UID != doc.UID || state.ObservedGeneration != w.gen || state.Phase != v1alpha1.PhaseOnline {
		w.fail("the hub has %+v, expected generation %d", state, w.gen)
	}
	for p := range authorities {
		want, o := w.spec[p], w.override[p]
		if o.v != "" {
			want = o.v
		}
		got := doc.Properties[p]
		if string(got.Want) != want || (got.Override != nil) != (o.v != "") {
			w.fail("%s: wanted %s (override %+v), the table says %s", p, got.Want, got.Override, want)
		}
		if want != "" && (got.State != v1alpha1.DesiredApplied || got.Reported == nil || string(got.Reported.Value) != want || w.hub.has(trv, p) != want) {
			w.fail("%s: state %s %q, reported %+v, the hub has %s; wanted %s", p, got.State, got.Message, got.Reported, w.hub.has(trv, p), want)
		}
		if _, ok := overrides[p]; ok != (o.v != "") {
			w.fail("%s: override at the hub %+v, expected %+v", p, overrides[p], o)
		}
		if w.spec[p] != "" {
			td := state.Desired[p]
			expect := v1alpha1.DesiredApplied
			if o.v != "" && o.v != w.spec[p] {
				expect = v1alpha1.DesiredOverridden
			}
			if td.State != expect {
				w.fail("%s: the hub has state %+v, expected %s", p, td, expect)
			}
		}
	}
	temp := ""
	if r := doc.Properties["temp"].Reported; r != nil {
		temp = string(r.Value)
	}
	if at := w.hub.has(trv, "temp"); at != temp {
		w.fail("temp is %s on the node and %s at the hub", temp, at)
	}
}

func TestModelOfTheConflictTable(t *testing.T) {
	for seed := range uint64(*modelRuns) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			virtual(t, func(r *rig) {
				w := &world{
					rig: r, rnd: rand.New(rand.NewPCG(seed, 4)), hub: newHub(), gen: 1, deviceUp: true,
					spec: map[string]string{"setpoint": "20"}, at: map[string]time.Time{"setpoint": time.Now()},
					override: make(map[string]expected),
				}
				defer func() { w.disconnect() }()
				w.hub.base = func(b edgeapi.TwinBase) int {
					if b.UID != string(uidOf(w.uid)) {
						return 409
					}
					for _, p := range b.Properties {
						if w.spec[p] != w.seen[p] && w.gen != b.Generation {
							return 409
						}
					}
					return 200
				}
				w.deliver()
				w.seenUID = w.uid
				for range 6 {
					for range w.rnd.IntN(20) + 1 {
						time.Sleep(time.Duration(w.rnd.IntN(2000)+1) * time.Millisecond)
						w.step()
					}
					w.quiet()
				}
			})
		})
	}
}

func uidOf(n int) types.UID { return types.UID(fmt.Sprint("u", n)) }
