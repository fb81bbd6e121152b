package devicetwin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
)

// disk is a DB in memory that can lose what was only noted.
type disk struct {
	mu      sync.Mutex
	inc     string
	epoch   uint64
	data    map[string]map[string][]byte
	dirty   map[[2]string]func() []byte
	err     error // of Commit
	commits int
}

func newDisk() *disk {
	return &disk{inc: "00000000000000aa", epoch: 1, data: make(map[string]map[string][]byte), dirty: make(map[[2]string]func() []byte)}
}

func (d *disk) Incarnation() string { return d.inc }
func (d *disk) Epoch() uint64       { return d.epoch }

func (d *disk) Load(bucket string, fn func(string, []byte) error) error {
	for _, k := range slices.Sorted(maps.Keys(d.data[bucket])) {
		if err := fn(k, d.data[bucket][k]); err != nil {
			return err
		}
	}
	return nil
}

func (d *disk) Commit(ctx context.Context, muts ...Mut) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil {
		return d.err
	}
	d.commits++
	for _, m := range muts {
		d.put(m.Bucket, m.Key, m.Value)
	}
	return nil
}

func (d *disk) put(bucket, key string, value []byte) {
	if d.data[bucket] == nil {
		d.data[bucket] = make(map[string][]byte)
	}
	if d.data[bucket][key] = value; value == nil {
		delete(d.data[bucket], key)
	}
}

func (d *disk) Dirty(bucket, key string, encode func() []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dirty[[2]string{bucket, key}] = encode
}

// flush writes what was noted.
func (d *disk) flush() {
	d.mu.Lock()
	dirty := d.dirty
	d.dirty = make(map[[2]string]func() []byte)
	d.mu.Unlock()
	for k, encode := range dirty {
		raw := encode()
		d.mu.Lock()
		d.put(k[0], k[1], raw)
		d.mu.Unlock()
	}
}

// cut is the power going and coming back: what was only noted is lost.
func (d *disk) cut() *disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := newDisk()
	n.inc, n.epoch = d.inc, d.epoch+1
	for b, kv := range d.data {
		n.data[b] = maps.Clone(kv)
	}
	return n
}

// device is a Driver with one device behind it.
type gadget struct {
	mu       sync.Mutex
	t        *Twins
	echo     bool // it reports what it was told
	delay    time.Duration
	err      error
	writes   []WriteRequest
	now, max int // Writes of one property at once
	cmds     []CommandRequest
	answer   func(context.Context, CommandRequest) (json.RawMessage, error)
	asked    int
	at       []time.Time
}

func (g *gadget) Set([]Bound, []*v1alpha1.DeviceDiscovery) {}

func (g *gadget) Write(ctx context.Context, w WriteRequest) error {
	g.mu.Lock()
	g.writes = append(g.writes, w)
	g.at = append(g.at, time.Now())
	g.now++
	g.max = max(g.max, g.now)
	err, delay, echo := g.err, g.delay, g.echo
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		g.now--
		g.mu.Unlock()
	}()
	if delay > 0 {
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if err == nil && echo {
		g.t.Report(w.Device, []Reading{{Property: w.Property, Value: w.Value}})
	}
	return err
}

func (g *gadget) Command(ctx context.Context, c CommandRequest) (json.RawMessage, error) {
	g.mu.Lock()
	g.cmds = append(g.cmds, c)
	answer, err := g.answer, g.err
	g.mu.Unlock()
	if answer != nil {
		return answer(ctx, c)
	}
	return nil, err
}

func (g *gadget) Refresh(context.Context, Key) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.asked++
	return nil
}

func (g *gadget) set(fn func(*gadget)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	fn(g)
}

func (g *gadget) told() []any {
	g.mu.Lock()
	defer g.mu.Unlock()
	var out []any
	for _, w := range g.writes {
		out = append(out, w.Value)
	}
	return out
}

var trv = Key{"home", "trv"}

func trvModel() *v1alpha1.DeviceModel {
	return &v1alpha1.DeviceModel{
		ObjectMeta: metav1.ObjectMeta{Name: "trv"},
		Spec: v1alpha1.DeviceModelSpec{
			Profile: "json",
			Properties: []v1alpha1.Property{
				{Name: "temp", Type: "float64", Access: "r", Min: "-40", Max: "80"},
				{Name: "setpoint", Type: "float64", Access: "rw", Min: "5", Max: "30", Step: "0.5", Tolerance: 0.25},
				{Name: "mode", Type: "enum", Enum: []string{"heat", "off", "eco"}, Access: "rw", Authority: "edge"},
				{Name: "boost", Type: "int64", Access: "rw", Authority: "lww"},
				{Name: "fixed", Type: "bool", Access: "rw", LocalOverride: &v1alpha1.LocalOverride{When: "never"}},
				{Name: "free", Type: "bool", Access: "rw", LocalOverride: &v1alpha1.LocalOverride{When: "always"}},
				{Name: "beep", Type: "bool", Access: "w"},
			},
			Commands: []v1alpha1.Command{
				{Name: "identify", Params: []v1alpha1.CommandParam{{Name: "seconds", Type: "int64", Max: "60"}}},
				{Name: "later", Delivery: "queue", TTL: metav1.Duration{Duration: time.Minute}},
				{Name: "again", Idempotent: true},
				{Name: "seen", Reflect: "mode==off"},
			},
		},
	}
}

func trvDevice(gen int64, desired map[string]string) *v1alpha1.Device {
	d := &v1alpha1.Device{ObjectMeta: metav1.ObjectMeta{Namespace: "home", Name: "trv", UID: "u1", Generation: gen}}
	d.Spec.ModelRef.Name = "trv"
	for p, v := range desired {
		if d.Spec.Desired == nil {
			d.Spec.Desired = make(map[string]v1alpha1.JSON)
		}
		d.Spec.Desired[p] = v1alpha1.JSON{Raw: []byte(v)}
	}
	return d
}

type rig struct {
	*testing.T
	tw     *Twins
	disk   *disk
	gadget *gadget
	cancel context.CancelFunc
	done   chan struct{}
	model  *v1alpha1.DeviceModel

	mu     sync.Mutex
	events []Event
}

// newRig runs Twins over a disk in a bubble of virtual time.
func newRig(t *testing.T, d *disk) *rig {
	r := &rig{T: t, disk: d, gadget: &gadget{echo: true}, model: trvModel()}
	r.start()
	return r
}

func (r *rig) start() {
	tw, err := New(Config{
		DB: r.disk, Now: func() (time.Time, bool) { return time.Now(), true },
		Events: func(e Event) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.events = append(r.events, e)
		},
	})
	if err != nil {
		r.Fatal(err)
	}
	r.tw, r.gadget.t = tw, tw
	tw.Use(r.gadget)
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel, r.done = cancel, make(chan struct{})
	go func() {
		defer close(r.done)
		tw.Run(ctx)
	}()
}

func (r *rig) stop() { r.cancel(); <-r.done }

// reboot cuts the power.
func (r *rig) reboot() {
	r.stop()
	r.disk = r.disk.cut()
	r.start()
}

func (r *rig) set(d *v1alpha1.Device) {
	r.tw.Set([]Bound{{Device: d, Model: r.model}}, nil)
	synctest.Wait()
}

func (r *rig) report(property string, v any) {
	r.tw.Report(trv, []Reading{{Property: property, Value: v}})
	synctest.Wait()
}

func (r *rig) doc() *Doc {
	r.Helper()
	synctest.Wait()
	doc, ok := r.tw.Get(trv)
	if !ok {
		r.Fatal("there is no twin")
	}
	return doc
}

func (r *rig) want(property, want, state string) {
	r.Helper()
	if p := r.doc().Properties[property]; string(p.Want) != want || p.State != state {
		r.Errorf("%s: want %s, state %s (%s); expected %s, %s", property, p.Want, p.State, p.Message, want, state)
	}
}

func (r *rig) reported(property, v, quality string) {
	r.Helper()
	p := r.doc().Properties[property]
	if p.Reported == nil || string(p.Reported.Value) != v || p.Reported.Quality != quality {
		r.Errorf("%s: reported %+v, expected %s %s", property, p.Reported, v, quality)
	}
}

func (r *rig) phase(want string) {
	r.Helper()
	if doc := r.doc(); doc.Phase != want {
		r.Errorf("phase %s (%s), expected %s", doc.Phase, doc.Reason, want)
	}
}

func (r *rig) patch(property, v string) Result {
	return r.tw.SetDesired(context.Background(), trv, Patch{Props: map[string]json.RawMessage{property: json.RawMessage(v)}, By: "console"})
}

func (r *rig) hadEvent(reason string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.ContainsFunc(r.events, func(e Event) bool { return e.Reason == reason })
}

func virtual(t *testing.T, fn func(r *rig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, newDisk())
		defer func() { r.stop() }()
		fn(r)
	})
}

func TestADesiredValueReachesTheDevice(t *testing.T) {
	virtual(t, func(r *rig) {
		r.set(trvDevice(1, map[string]string{"setpoint": "20.5"}))
		r.want("setpoint", "20.5", v1alpha1.DesiredApplied)
		r.reported("setpoint", "20.5", v1alpha1.QualityGood)
		r.phase(v1alpha1.PhaseOnline)
		if doc := r.doc(); doc.Generation != 1 || string(r.disk.data[bucketModel]["home/trv"]) == "" {
			r.Errorf("generation %d; on the disk: %s", doc.Generation, r.disk.data[bucketModel]["home/trv"])
		}
		// Within the tolerance nothing is to do.
		r.report("setpoint", 20.7)
		r.set(trvDevice(2, map[string]string{"setpoint": "20.5"}))
		if told := r.gadget.told(); len(told) != 1 {
			r.Errorf("told %v", told)
		}
		delta, _ := r.tw.Delta(trv)
		if len(delta.Props) != 0 {
			r.Errorf("delta %+v", delta)
		}
	})
}

func TestABadReadingDoesNotReplaceAGoodOne(t *testing.T) {
	virtual(t, func(r *rig) {
		r.set(trvDevice(1, nil))
		r.report("temp", 21.5)
		before := r.doc().Version
		for range 1000 {
			r.tw.Report(trv, []Reading{{Property: "temp", Value: 1000.0}, {Property: "temp", Bad: errors.New("no number")}, {Property: "temp", Value: "hot"}})
		}
		r.reported("temp", "21.5", v1alpha1.QualityBad)
		if n := r.doc().Version.Seq - before.Seq; n > 2 {
			r.Errorf("%d changes of 3,000 bad readings", n)
		}
		if len(r.events) != 1 {
			r.Errorf("%d events of 3,000 bad readings: %v", len(r.events), r.events)
		}
		r.report("temp", 22.0)
		r.reported("temp", "22", v1alpha1.QualityGood)
	})
}

func TestAReadingThatRepeatsIsNoChange(t *testing.T) {
	virtual(t, func(r *rig) {
		r.set(trvDevice(1, nil))
		r.report("temp", 21.5)
		before := r.doc()
		time.Sleep(time.Minute)
		r.report("temp", 21.5)
		after := r.doc()
		if after.Version != before.Version || !after.Properties["temp"].Reported.Received.After(before.Properties["temp"].Reported.Received) {
			r.Errorf("before %+v, after %+v", before.Properties["temp"].Reported, after.Properties["temp"].Reported)
		}
	})
}

func TestTimes(t *testing.T) {
	virtual(t, func(r *rig) {
		r.set(trvDevice(1, nil))
		now := time.Now()
		r.tw.Report(trv, []Reading{{Property: "temp", Value: 1.0, TS: now.Add(-time.Hour)}})
		r.reported("temp", "1", v1alpha1.QualityGood)
		if ts := r.doc().Properties["temp"].Reported.TS; !ts.Equal(now.Add(-time.Hour).Truncate(time.Millisecond)) {
			r.Errorf("ts %v", ts)
		}
		r.tw.Report(trv, []Reading{{Property: "temp", Value: 2.0, TS: now.AddDate(-1, 0, 0)}})
		r.reported("temp", "2", v1alpha1.QualityUncertain)
		if ts := r.doc().Properties["temp"].Reported.TS; now.Sub(ts) > time.Second {
			r.Errorf("ts %v of a clock that is a year behind", ts)
		}
		// Said late, it is for telemetry only.
		r.tw.Report(trv, []Reading{{Property: "temp", Value: 3.0, Historical: true}})
		r.reported("temp", "2", v1alpha1.QualityUncertain)
	})
}

// What a broker had kept, or what was captured before a restart, is taken where
// nothing newer is known, and is no more than uncertain.
func TestWhatWasKept(t *testing.T) {
	virtual(t, func(r *rig) {
		r.set(trvDevice(1, nil))
		kept := func(v float64, ago time.Duration) {
			r.tw.Report(trv, []Reading{{Property: "temp", Value: v, TS: time.Now().Add(-ago), Retained: true}})
		}
		kept(20, time.Hour)
		r.reported("temp", "20", v1alpha1.QualityUncertain)
		kept(21, time.Minute)
		r.reported("temp", "21", v1alpha1.QualityUncertain)
		kept(20, time.Hour) // older than what is known
		r.reported("temp", "21", v1alpha1.QualityUncertain)
		r.phase(v1alpha1.PhaseUnknown)
		r.report("temp", 22.0)
		version := r.doc().Version
		r.tw.Report(trv, []Reading{{Property: "temp", Value: 22.0, Retained: true}})
		r.reported("temp", "22", v1alpha1.QualityGood)
		if v := r.doc().Version; v != version {
			r.Errorf("version %v, was %v", v, version)
		}
	})
}

func TestACommandIsNotBehindWrites(t *testing.T) {
	virtual(t, func(r *rig) {
		var bound []Bound
		for i := range 300 {
			d := trvDevice(1, map[string]string{"beep": "true", "setpoint": "20"})
			d.Name, d.UID = fmt.Sprintf("d%d", i), types.UID(fmt.Sprint(i))
			bound = append(bound, Bound{Device: d, Model: r.model})
		}
		r.gadget.set(func(g *gadget) { g.delay = time.Hour }) // devices that do not answer
		r.tw.Set(bound, nil)
		time.Sleep(10 * time.Second)
		began := time.Now()
		if s := r.tw.Command(context.Background(), Key{"home", "d250"}, CommandCall{Name: "identify"}); s.State != CommandSucceeded {
			r.Errorf("%+v", s)
		}
		if took := time.Since(began); took > 100*time.Millisecond {
			r.Errorf("a command waited %v", took)
		}
	})
}

func TestAfterARestartValuesAreStaleAndKeepTheirVersions(t *testing.T) {
	virtual(t, func(r *rig) {
		r.set(trvDevice(1, map[string]string{"setpoint": "20"}))
		r.report("temp", 21.5)
		r.disk.flush()
		version := r.doc().Properties["temp"].Reported.Version
		r.report("temp", 25.0) // lost with the power
		r.reboot()
		r.gadget.set(func(g *gadget) { g.writes = nil; g.echo = false })
		r.set(trvDevice(1, map[string]string{"setpoint": "20"}))
		r.phase(v1alpha1.PhaseUnknown)
		r.reported("temp", "21.5", v1alpha1.QualityStale)
		if v := r.doc().Properties["temp"].Reported.Version; v != version {
			r.Errorf("version %v, was %v", v, version)
		}
		if v := r.doc().Version; v.Epoch != version.Epoch+1 {
			r.Errorf("the twin's version %v", v)
		}
		// It is taken to have what it had; when it comes it is told again
		// unless it says so itself.
		if told := r.gadget.told(); len(told) != 0 {
			r.Errorf("told %v", told)
		}
		r.report("temp", 21.5)
		r.reported("temp", "21.5", v1alpha1.QualityGood)
		if v := r.doc().Properties["temp"].Reported.Version; v.Epoch != version.Epoch+1 {
			r.Errorf("version %v of what was said anew", v)
		}
		time.Sleep(settle + time.Second)
		synctest.Wait()
		if told := r.gadget.told(); len(told) != 1 {
			r.Errorf("told %v after it came back", told)
		}
	})
}

func TestADeviceThatTellsWhatItHasIsNotToldAgain(t *testing.T) {
	virtual(t, func(r *rig) {
		r.set(trvDevice(1, map[string]string{"setpoint": "20"}))
		r.tw.Sight(trv, Sighting{Evidence: EvidenceAvailability, State: v1alpha1.PhaseOffline})
		r.phase(v1alpha1.PhaseOffline)
		r.reported("setpoint", "20", v1alpha1.QualityStale)
		r.gadget.set(func(g *gadget) { g.writes = nil })
		r.tw.Sight(trv, Sighting{Evidence: EvidenceAvailability, State: v1alpha1.PhaseOnline})
		time.Sleep(settle / 2)
		r.report("setpoint", 20.0)
		time.Sleep(time.Minute)
		synctest.Wait()
		if told := r.gadget.told(); len(told) != 0 {
			r.Errorf("told %v", told)
		}
		r.reported("setpoint", "20", v1alpha1.QualityGood)
	})
}

func TestOneWriteAtATimeAndTheLatestWins(t *testing.T) {
	virtual(t, func(r *rig) {
		r.gadget.set(func(g *gadget) { g.delay = time.Second; g.echo = false })
		r.set(trvDevice(1, map[string]string{"setpoint": "10"}))
		for gen := int64(2); gen < 20; gen++ {
			r.set(trvDevice(gen, map[string]string{"setpoint": fmt.Sprint(10 + gen)}))
		}
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if told := r.gadget.told(); !slices.Equal(told, []any{10.0, 29.0}) {
			r.Errorf("told %v", told)
		}
		if r.gadget.max != 1 {
			r.Errorf("%d writes of one property at once", r.gadget.max)
		}
		r.want("setpoint", "29", v1alpha1.DesiredSent)
		// Not confirmed: told again, with growing pauses.
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		r.want("setpoint", "29", v1alpha1.DesiredTimeout)
		if n := len(r.gadget.told()); n < 5 || n > 9 {
			r.Errorf("told %d times in ten minutes", n)
		}
		r.report("setpoint", 29.0)
		r.want("setpoint", "29", v1alpha1.DesiredApplied)
	})
}

func TestARefusalIsNotRepeated(t *testing.T) {
	virtual(t, func(r *rig) {
		r.gadget.set(func(g *gadget) { g.err = fmt.Errorf("%w: child lock", ErrRejected) })
		r.set(trvDevice(1, map[string]string{"setpoint": "10"}))
		time.Sleep(time.Hour)
		r.want("setpoint", "10", v1alpha1.DesiredRejected)
		if n := len(r.gadget.told()); n != 1 || !r.hadEvent(ReasonDesiredRejected) {
			r.Errorf("told %d times; events %v", n, r.events)
		}
		r.gadget.set(func(g *gadget) { g.err = nil })
		r.tw.Sight(trv, Sighting{Evidence: EvidenceAvailability, State: v1alpha1.PhaseOffline})
		r.tw.Sight(trv, Sighting{Evidence: EvidenceAvailability, State: v1alpha1.PhaseOnline})
		r.want("setpoint", "10", v1alpha1.DesiredApplied)
	})
}

func TestNothingIsSentToADeviceThatIsAway(t *testing.T) {
	virtual(t, func(r *rig) {
		r.set(trvDevice(1, nil))
		r.report("setpoint", 10.0)
		r.tw.Sight(trv, Sighting{Evidence: EvidenceAvailability, State: v1alpha1.PhaseOffline})
		r.set(trvDevice(2, map[string]string{"setpoint": "20"}))
		time.Sleep(time.Hour)
		r.want("setpoint", "20", v1alpha1.DesiredPending)
		if told := r.gadget.told(); len(told) != 0 {
			r.Errorf("told %v", told)
		}
		r.report("temp", 20.0)
		r.want("setpoint", "20", v1alpha1.DesiredApplied)
	})
}

func TestNotConnectedIsTriedAgain(t *testing.T) {
	virtual(t, func(r *rig) {
		r.gadget.set(func(g *gadget) { g.err = fmt.Errorf("publish: %w", ErrNotConnected) })
		r.set(trvDevice(1, map[string]string{"setpoint": "10"}))
		time.Sleep(30 * time.Second)
		r.want("setpoint", "10", v1alpha1.DesiredPending)
		r.gadget.set(func(g *gadget) { g.err = nil })
		time.Sleep(2 * reachMost)
		r.want("setpoint", "10", v1alpha1.DesiredApplied)
	})
}

func TestWhatCannotBeReadIsToldOnce(t *testing.T) {
	virtual(t, func(r *rig) {
		r.set(trvDevice(1, map[string]string{"beep": "true"}))
		time.Sleep(time.Hour)
		r.want("beep", "true", v1alpha1.DesiredApplied)
		if told := r.gadget.told(); len(told) != 1 {
			r.Errorf("told %v", told)
		}
	})
}

func TestManyWritesArePaced(t *testing.T) {
	virtual(t, func(r *rig) {
		var bound []Bound
		for i := range 200 {
			d := trvDevice(1, map[string]string{"beep": "true"})
			d.Name, d.UID = fmt.Sprintf("d%d", i), types.UID(fmt.Sprint(i))
			bound = append(bound, Bound{Device: d, Model: r.model})
		}
		r.tw.Set(bound, nil)
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := len(r.gadget.at); n != 200 {
			r.Fatalf("%d writes", n)
		}
		// 40 at once, then 20 a second.
		if took := r.gadget.at[199].Sub(r.gadget.at[0]); took < 7*time.Second || took > 9*time.Second {
			r.Errorf("200 writes took %v", took)
		}
	})
}

func TestLiveness(t *testing.T) {
	virtual(t, func(r *rig) {
		r.model.Spec.Liveness = &v1alpha1.Liveness{ExpectedInterval: metav1.Duration{Duration: time.Minute}}
		r.set(trvDevice(1, nil))
		r.phase(v1alpha1.PhaseUnknown)
		// What the broker had kept is no evidence.
		r.tw.Sight(trv, Sighting{Evidence: EvidenceAvailability, State: v1alpha1.PhaseOnline, Retained: true})
		r.tw.Report(trv, []Reading{{Property: "temp", Value: 20.0, Retained: true}})
		r.phase(v1alpha1.PhaseUnknown)
		r.reported("temp", "20", v1alpha1.QualityUncertain)
		r.report("temp", 21.0)
		r.phase(v1alpha1.PhaseOnline)
		time.Sleep(140 * time.Second)
		r.phase(v1alpha1.PhaseOnline)
		time.Sleep(20 * time.Second)
		r.phase(v1alpha1.PhaseStale)
		r.reported("temp", "21", v1alpha1.QualityStale)
		// Fresh data is above a will.
		r.report("temp", 22.0)
		time.Sleep(time.Minute)
		r.tw.Sight(trv, Sighting{Evidence: EvidenceAvailability, State: v1alpha1.PhaseOffline})
		r.phase(v1alpha1.PhaseOffline)
		r.report("temp", 22.0)
		r.phase(v1alpha1.PhaseOnline)
		r.reported("temp", "22", v1alpha1.QualityGood)
		// A parent takes its children with it.
		r.tw.Sight(trv, Sighting{Evidence: EvidenceParent, State: v1alpha1.PhaseOffline})
		r.phase(v1alpha1.PhaseOffline)
		r.tw.Sight(trv, Sighting{Evidence: EvidenceParent, State: v1alpha1.PhaseOnline})
		r.phase(v1alpha1.PhaseUnknown)
		r.report("temp", 22.0)
		r.phase(v1alpha1.PhaseOnline)
		r.tw.Forget("BrokerLost")
		r.phase(v1alpha1.PhaseUnknown)
	})
}

func TestAWillOfAnOldSession(t *testing.T) {
	virtual(t, func(r *rig) {
		r.set(trvDevice(1, nil))
		// With a session of our own broker it is known to be old.
		r.tw.Sight(trv, Sighting{Evidence: EvidenceSession, State: v1alpha1.PhaseOnline})
		r.tw.Sight(trv, Sighting{Evidence: EvidenceAvailability, State: v1alpha1.PhaseOffline})
		r.phase(v1alpha1.PhaseOnline)
		r.tw.Sight(trv, Sighting{Evidence: EvidenceSession, State: v1alpha1.PhaseOffline})
		r.phase(v1alpha1.PhaseOffline)
		// Without, the device is asked, and its answer is above the will.
		r.tw.Sight(trv, Sighting{Evidence: EvidenceAvailability, State: v1alpha1.PhaseOnline})
		synctest.Wait()
		asked := r.gadget.asked
		r.tw.Sight(trv, Sighting{Evidence: EvidenceAvailability, State: v1alpha1.PhaseOffline})
		synctest.Wait()
		if r.gadget.asked != asked+1 {
			r.Errorf("asked %d times", r.gadget.asked-asked)
		}
	})
}

func TestASleepyDevice(t *testing.T) {
	virtual(t, func(r *rig) {
		r.model.Spec.Liveness = &v1alpha1.Liveness{ExpectedInterval: metav1.Duration{Duration: time.Hour}, Sleepy: true}
		r.set(trvDevice(1, nil))
		r.report("setpoint", 10.0)
		r.phase(v1alpha1.PhaseOnline)
		time.Sleep(awake + time.Second)
		r.phase(v1alpha1.PhaseSleeping)
		r.reported("setpoint", "10", v1alpha1.QualityGood)
		r.set(trvDevice(2, map[string]string{"setpoint": "20"}))
		time.Sleep(time.Minute)
		if told := r.gadget.told(); len(told) != 0 {
			r.Errorf("told %v in its sleep", told)
		}
		r.report("temp", 20.0)
		r.want("setpoint", "20", v1alpha1.DesiredApplied)
		time.Sleep(3 * time.Hour)
		r.phase(v1alpha1.PhaseStale)
	})
}

func TestADeviceThatCameAnewBeginsAnew(t *testing.T) {
	virtual(t, func(r *rig) {
		r.set(trvDevice(1, nil))
		r.report("temp", 21.0)
		r.patch("setpoint", "25")
		r.disk.flush()
		d := trvDevice(1, nil)
		d.UID = "u2"
		r.set(d)
		r.disk.flush()
		if doc := r.doc(); doc.UID != "u2" || doc.Properties["temp"].Reported != nil || doc.Properties["setpoint"].Override != nil {
			r.Errorf("%+v", doc)
		}
		r.tw.Set(nil, nil)
		synctest.Wait()
		r.disk.flush()
		for bucket, kv := range r.disk.data {
			if len(kv) != 0 {
				r.Errorf("left in %s: %s", bucket, kv)
			}
		}
	})
}

func TestAModelThatChanged(t *testing.T) {
	virtual(t, func(r *rig) {
		r.set(trvDevice(1, map[string]string{"boost": "3"}))
		r.report("temp", 21.0)
		m := trvModel()
		m.Spec.Properties[0] = v1alpha1.Property{Name: "humidity", Type: "float64", Access: "r"}
		m.Spec.Properties = append(m.Spec.Properties, trvModel().Spec.Properties[0])
		m.Spec.Properties[3].Type = "string"
		r.model = m
		r.set(trvDevice(1, map[string]string{"boost": "3"}))
		r.reported("temp", "21", v1alpha1.QualityGood)
		if p := r.doc().Properties["boost"]; p.State != v1alpha1.DesiredInvalid || p.Reported != nil {
			r.Errorf("boost %+v", p)
		}
		// Without a model the device stays as it was.
		r.tw.Set([]Bound{{Device: trvDevice(2, nil)}}, nil)
		r.reported("temp", "21", v1alpha1.QualityGood)
		if r.doc().Problem == "" {
			r.Error("no problem is told")
		}
	})
}

func TestTheDiskTakesNothing(t *testing.T) {
	virtual(t, func(r *rig) {
		r.set(trvDevice(1, nil))
		r.disk.mu.Lock()
		r.disk.err = errors.New("no space left on device")
		r.disk.mu.Unlock()
		if res := r.patch("setpoint", "25"); res.Code != 503 {
			r.Errorf("%+v", res)
		}
		r.set(trvDevice(2, map[string]string{"setpoint": "20"}))
		r.want("setpoint", "20", v1alpha1.DesiredApplied) // it holds all the same
		stored := func() int64 {
			r.tw.mu.Lock()
			defer r.tw.mu.Unlock()
			return r.tw.devices[trv].stored
		}
		if stored() != 1 {
			r.Errorf("generation %d is called stored", stored())
		}
		r.disk.mu.Lock()
		r.disk.err = nil
		r.disk.mu.Unlock()
		time.Sleep(time.Minute)
		synctest.Wait()
		if stored() != 2 {
			r.Errorf("generation %d is stored after the disk came back", stored())
		}
	})
}
