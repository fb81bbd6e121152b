package devicetwin

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/value"
)

// Errors of a Driver, to be wrapped.
var (
	// ErrNotConnected: it was certainly not sent.
	ErrNotConnected = errors.New("there is no connection to the device")
	// ErrRejected: the device itself refused.
	ErrRejected = errors.New("the device refused")
)

// Config of Twins.
type Config struct {
	Node string // required
	DB   DB     // required
	// Now is the date as the hub has it, and whether there is reason to believe
	// it. Required.
	Now func() (t time.Time, sure bool)
	Log *slog.Logger // nil discards

	// What others are told. None of these may block or call back into Twins
	// for long; nil: nobody.
	Events    func(Event)
	Observe   func(Observation) // each reading taken; of one device in order
	OnCommand func(Key, CommandStatus)

	// WriteRate is how many writes to devices are begun per second, so that one
	// edit of many Devices does not switch a whole plant at once; WriteBurst of
	// them go without waiting. Zero means 20 and 40.
	WriteRate, WriteBurst int
}

const (
	// ringSize is how many changes a watcher may be behind before it is given
	// a snapshot.
	ringSize = 8192
	// maxReadings is of one call.
	maxReadings = 4096
)

// Twins is the twins of a node. It is a Sink.
type Twins struct {
	cfg    Config
	inc    string
	epoch  uint64
	start  time.Time
	driver Driver // before Run

	// serial orders what has to be on the disk before it holds, by device. It
	// is taken before mu and held while a Commit is waited for; mu never is.
	serial stripes

	mu          sync.Mutex
	seq         uint64
	devices     map[Key]*device
	models      map[string]*model
	restored    map[Key]*restored // until the first Set
	discoveries map[Key]*discovery
	ring        []ringEntry // newest at (ringNext-1) mod ringSize
	ringNext    int
	forgotten   uint64         // the seq up to which the ring no longer goes
	waiting     chan struct{}  // closed at the next change; nil: nobody waits
	unstored    map[Key]string // what the storer has to look at; the UID that went, or ""
	jobs        []job          // writes
	urgent      []job          // commands and refreshes
	conv        *conversation
	due         time.Time // when timers looks next; zero: never

	kickStore, kickJobs, kickTimers chan struct{}

	stats struct{ readings, bad, unknown, writes atomic.Uint64 }
}

// stripes are locks that many keys share.
type stripes [64]chan struct{}

var stripeSeed = maphash.MakeSeed()

func (s *stripes) lock(ctx context.Context, k Key) (unlock func(), err error) {
	c := s[maphash.Comparable(stripeSeed, k)%uint64(len(s))]
	select {
	case c <- struct{}{}:
		return func() { <-c }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// device is one twin. Twins.mu guards it.
type device struct {
	key      Key
	uid      string
	labels   map[string]string
	model    *model
	gone     bool
	specSeen bool // the spec has been compared with what the disk had

	gen    int64 // of the spec that holds
	stored int64 // that is on the disk
	ver    uint64

	props []prop // as model.props
	live  liveness
	due   time.Time // when it is to be looked at; zero: never

	pending *restored // of the disk, until there is a model to read it with
	orphan  bool      // without a model

	dirty    bool // noted with the DB
	upState  bool // to be told to the hub
	upQueued bool
	sentSeen time.Time

	refreshing bool
	commanding bool // one is on its way
	cmds       []*command
	results    []Result // of the latest Patches with an ID
	lastEvent  map[string]time.Time
}

// prop is one property of a twin.
type prop struct {
	rep    reported
	want   *want
	up     bool  // to be told to the hub
	lastUp int64 // milliseconds since start
	sent   any   // the value the hub was last sent
}

// reported is what a device said.
type reported struct {
	v       any    // nil with q: nothing good yet
	q       string // "": never
	ts, rx  int64  // Unix milliseconds; ts 0: it gave none
	epoch   uint64
	seq     uint64
	inc     string // "": this one
	message string
}

// model is a DeviceModel made ready. It is immutable and shared.
type model struct {
	name    string
	hash    [32]byte
	problem string
	props   []property
	index   map[string]int
	spec    *v1alpha1.DeviceModelSpec

	interval time.Duration
	sleepy   bool
}

type property struct {
	*v1alpha1.Property
	typ       *value.Type
	authority string
}

// New reads what the DB has; it starts nothing.
func New(cfg Config) (*Twins, error) {
	if cfg.DB == nil || cfg.Now == nil {
		return nil, errors.New("devicetwin: a DB and a clock are required")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.WriteRate <= 0 {
		cfg.WriteRate = 20
	}
	if cfg.WriteBurst <= 0 {
		cfg.WriteBurst = 40
	}
	t := &Twins{
		cfg: cfg, inc: cfg.DB.Incarnation(), epoch: cfg.DB.Epoch(), start: time.Now(),
		devices: make(map[Key]*device), discoveries: make(map[Key]*discovery),
		restored: make(map[Key]*restored), unstored: make(map[Key]string),
		kickStore: make(chan struct{}, 1), kickJobs: make(chan struct{}, 1), kickTimers: make(chan struct{}, 1),
	}
	for i := range t.serial {
		t.serial[i] = make(chan struct{}, 1)
	}
	if err := t.load(); err != nil {
		return nil, fmt.Errorf("devicetwin: read the twins: %w", err)
	}
	return t, nil
}

// Use names the driver; before Set and Run. A driver needs a Sink, so it is
// made after Twins.
func (t *Twins) Use(d Driver) { t.driver = d }

// Run serves until ctx ends, and returns once all it started has stopped.
func (t *Twins) Run(ctx context.Context) error {
	if t.driver == nil {
		return errors.New("devicetwin: run without a driver")
	}
	var wg sync.WaitGroup
	for _, loop := range []func(context.Context){t.storer, t.dispatcher, t.timers} {
		wg.Go(func() { loop(ctx) })
	}
	wg.Wait()
	return nil
}

// Set tells which devices and discoveries there are, all of them at each call.
// It does not block.
func (t *Twins) Set(bound []Bound, discoveries []*v1alpha1.DeviceDiscovery) {
	var fx effects
	t.mu.Lock()
	t.models = t.compileLocked(bound, &fx)
	there := make(map[Key]bool, len(bound))
	for _, b := range bound {
		k := Key{b.Device.Namespace, b.Device.Name}
		there[k] = true
		t.setLocked(k, b, &fx)
	}
	for k, d := range t.devices {
		if !there[k] {
			t.dropLocked(d, &fx)
		}
	}
	// What the disk has of devices that are not ours any more.
	for k, r := range t.restored {
		if !there[k] {
			t.unstored[k] = r.uid()
		}
	}
	t.restored = nil
	maps.DeleteFunc(t.discoveries, func(k Key, _ *discovery) bool {
		return !slices.ContainsFunc(discoveries, func(d *v1alpha1.DeviceDiscovery) bool {
			return k == Key{d.Namespace, d.Name}
		})
	})
	for _, d := range discoveries {
		if k := (Key{d.Namespace, d.Name}); t.discoveries[k] == nil {
			t.discoveries[k] = &discovery{}
		}
	}
	t.mu.Unlock()
	poke(t.kickStore)
	t.flush(&fx)
	if t.driver != nil {
		t.driver.Set(bound, discoveries)
	}
}

// setLocked makes the twin of one Device as the Device is now.
func (t *Twins) setLocked(k Key, b Bound, fx *effects) {
	d := t.devices[k]
	uid := string(b.Device.UID)
	if d != nil && d.uid != uid {
		t.dropLocked(d, fx)
		d = nil
	}
	var m *model
	switch {
	case b.Model != nil:
		m = t.models[b.Model.Name]
	case d != nil:
		m = d.model // it may come back; until then the device is as it was
	default:
		m = noModel(b.Device.Spec.ModelRef.Name)
	}
	if d == nil {
		d = &device{key: k, uid: uid, model: m, props: make([]prop, len(m.props))}
		d.live = liveness{phase: v1alpha1.PhaseUnknown, reason: "NotHeardYet", base: time.Now()}
		t.devices[k] = d
		d.pending = t.restored[k]
		if b.Model != nil {
			t.adoptRestoredLocked(d)
		}
		t.changedLocked(d, fx)
		d.upStateLocked(t)
		t.scheduleLivenessLocked(d)
	}
	if !maps.Equal(d.labels, b.Device.Labels) {
		d.labels = maps.Clone(b.Device.Labels)
		t.changedLocked(d, fx)
	}
	remodelled := d.model.hash != m.hash
	if remodelled {
		t.remodelLocked(d, m, fx)
	}
	d.model = m
	if orphan := b.Model == nil; orphan != d.orphan {
		d.orphan = orphan
		t.changedLocked(d, fx)
	}
	if m.problem != "" && remodelled {
		t.eventLocked(d, fx, true, ReasonModelInvalid, m.problem)
	}
	if b.Model == nil {
		return // what is desired cannot be read
	}
	t.setDesiredLocked(d, b.Device, remodelled, fx)
	if remodelled {
		t.unstored[k] = t.unstored[k]
	}
}

// dropLocked forgets a twin, on the disk too.
func (t *Twins) dropLocked(d *device, fx *effects) {
	d.gone = true
	for _, c := range d.cmds {
		if !c.Done() {
			t.endLocked(d, c, CommandFailed, 404, "the device was deleted", nil, fx)
		}
	}
	delete(t.devices, d.key)
	t.unstored[d.key] = d.uid
	t.seq++
	t.ringLocked(ringEntry{seq: t.seq, d: d, deleted: true})
}

// remodelLocked carries what still fits over into another model.
func (t *Twins) remodelLocked(d *device, m *model, fx *effects) {
	old := d.props
	oldIndex := d.model.index
	d.props = make([]prop, len(m.props))
	for i, p := range m.props {
		j, ok := oldIndex[p.Name]
		if !ok {
			continue
		}
		was := old[j]
		if was.rep.v != nil {
			v, err := p.typ.Parse(value.JSON(was.rep.v))
			if err != nil {
				was.rep = reported{}
			} else {
				was.rep.v = v
			}
		}
		was.sent = nil
		if w := was.want; w != nil {
			// What is on its way stays so: there are never two at once.
			w.token++
			if w.over != nil {
				if v, err := p.typ.ParseDesired(value.JSON(w.over.v)); err != nil {
					w.over = nil
				} else {
					o := *w.over
					o.v = v
					w.over = &o
				}
			}
		}
		d.props[i] = was
	}
	d.model = m
	t.adoptRestoredLocked(d)
	d.live.base = time.Now()
	t.scheduleLivenessLocked(d)
	t.dirtyLocked(d, fx)
	t.unstored[d.key] = t.unstored[d.key]
	t.changedLocked(d, fx)
	d.upStateLocked(t)
	for i := range d.props {
		d.upPropLocked(t, i)
	}
}

// compileLocked makes the models of bound ready. What did not change stays the
// one it was.
func (t *Twins) compileLocked(bound []Bound, fx *effects) map[string]*model {
	out := make(map[string]*model)
	for _, b := range bound {
		if b.Model == nil || out[b.Model.Name] != nil {
			continue
		}
		raw, err := json.Marshal(&b.Model.Spec)
		if err != nil {
			raw = []byte(err.Error())
		}
		hash := sha256.Sum256(raw)
		if was := t.models[b.Model.Name]; was != nil && was.hash == hash {
			out[b.Model.Name] = was
			continue
		}
		out[b.Model.Name] = compileModel(b.Model, hash)
	}
	return out
}

func noModel(name string) *model {
	return &model{name: name, problem: fmt.Sprintf("the DeviceModel %.64q is not here", name), index: map[string]int{}, spec: &v1alpha1.DeviceModelSpec{}}
}

func compileModel(dm *v1alpha1.DeviceModel, hash [32]byte) *model {
	spec := dm.Spec.DeepCopy()
	m := &model{name: dm.Name, hash: hash, index: make(map[string]int), spec: spec}
	var problems []string
	for i := range spec.Properties {
		p := &spec.Properties[i]
		typ, err := value.Compile(p)
		if err != nil {
			problems = append(problems, err.Error())
			continue
		}
		if _, twice := m.index[p.Name]; twice {
			problems = append(problems, fmt.Sprintf("property %.64q is there twice", p.Name))
			continue
		}
		m.index[p.Name] = len(m.props)
		c := property{Property: p, typ: typ, authority: p.Authority}
		if c.authority == "" {
			c.authority = v1alpha1.AuthorityCloud
		}
		m.props = append(m.props, c)
	}
	if l := spec.Liveness; l != nil {
		m.interval, m.sleepy = l.ExpectedInterval.Duration, l.Sleepy
	}
	m.problem = strings.Join(problems, "; ")
	return m
}

// effects is what is to be done once mu has been released, because others are
// called.
type effects struct {
	events       []Event
	observations []Observation
	commands     []commandChange
	dirty        []*device
}

func (t *Twins) flush(fx *effects) {
	for _, d := range fx.dirty {
		k := d.key
		t.cfg.DB.Dirty(bucketTwin, k.String(), func() []byte { return t.encodeTwin(k) })
	}
	if t.cfg.Events != nil {
		for _, e := range fx.events {
			t.cfg.Events(e)
		}
	}
	if t.cfg.Observe != nil {
		for _, o := range fx.observations {
			t.cfg.Observe(o)
		}
	}
	if t.cfg.OnCommand != nil {
		for _, c := range fx.commands {
			t.cfg.OnCommand(c.key, c.status)
		}
	}
}

// eventLocked tells people, once a minute for each reason.
func (t *Twins) eventLocked(d *device, fx *effects, warning bool, reason, message string) {
	now := time.Now()
	if last, ok := d.lastEvent[reason]; ok && now.Sub(last) < time.Minute {
		return
	}
	if d.lastEvent == nil {
		d.lastEvent = make(map[string]time.Time)
	}
	d.lastEvent[reason] = now
	fx.events = append(fx.events, Event{Device: d.key, UID: d.uid, Warning: warning, Reason: reason, Message: message})
}

// nextLocked is the version of what is about to change of d.
func (t *Twins) nextLocked(d *device) uint64 {
	t.seq++
	d.ver = t.seq
	return t.seq
}

// changedLocked has watchers look at d.
func (t *Twins) changedLocked(d *device, fx *effects) {
	t.nextLocked(d)
	t.ringLocked(ringEntry{seq: d.ver, d: d})
}

func (t *Twins) dirtyLocked(d *device, fx *effects) {
	if !d.dirty {
		d.dirty = true
		fx.dirty = append(fx.dirty, d)
	}
}

func (t *Twins) versionLocked(d *device) v1alpha1.Version {
	return v1alpha1.Version{Incarnation: t.inc, Epoch: t.epoch, Seq: d.ver}
}

func (t *Twins) versionOf(r *reported) v1alpha1.Version {
	if r.q == "" {
		return v1alpha1.Version{}
	}
	inc := r.inc
	if inc == "" {
		inc = t.inc
	}
	return v1alpha1.Version{Incarnation: inc, Epoch: r.epoch, Seq: r.seq}
}

// fresh tells whether r was said to this process.
func (t *Twins) fresh(r *reported) bool { return r.q != "" && r.inc == "" && r.epoch == t.epoch }

// quality is what r is worth now: what was said to an earlier process may have
// changed since.
func (t *Twins) quality(r *reported) string {
	if !t.fresh(r) && r.q != v1alpha1.QualityBad {
		return v1alpha1.QualityStale
	}
	return r.q
}

// wakeLocked has timers look at d at that time.
func (t *Twins) wakeLocked(d *device, at time.Time) {
	if d.due.IsZero() || at.Before(d.due) {
		d.due = at
	}
	if t.due.IsZero() || at.Before(t.due) {
		t.due = at
		poke(t.kickTimers)
	}
}

// timers does what time brings: liveness, overrides that end, writes that are
// tried again, commands that expire.
func (t *Twins) timers(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.kickTimers:
		case <-timer.C:
		}
		var fx effects
		now := time.Now()
		t.mu.Lock()
		if !t.due.IsZero() && !t.due.After(now) {
			t.due = time.Time{}
			for _, d := range t.devices {
				if d.due.IsZero() {
					continue
				}
				if !d.due.After(now) {
					d.due = time.Time{}
					t.timeLocked(d, now, &fx) // sets due anew
					continue
				}
				if t.due.IsZero() || d.due.Before(t.due) {
					t.due = d.due
				}
			}
		}
		next := t.due
		t.mu.Unlock()
		t.flush(&fx)
		if next.IsZero() {
			timer.Stop()
		} else {
			timer.Reset(max(time.Until(next), 10*time.Millisecond))
		}
	}
}

func (t *Twins) timeLocked(d *device, now time.Time, fx *effects) {
	t.livenessTimeLocked(d, now, fx)
	t.overridesTimeLocked(d, now, fx)
	t.commandsTimeLocked(d, now, fx)
	for i := range d.props {
		t.considerLocked(d, i, now, fx)
	}
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Stats are counters since start.
type Stats struct {
	Devices  int
	Readings uint64 // taken or not
	Bad      uint64 // of them: could not be used
	Unknown  uint64 // of them: of no device or property
	Writes   uint64 // begun
}

// Stats returns them.
func (t *Twins) Stats() Stats {
	t.mu.Lock()
	n := len(t.devices)
	t.mu.Unlock()
	return Stats{n, t.stats.readings.Load(), t.stats.bad.Load(), t.stats.unknown.Load(), t.stats.writes.Load()}
}
