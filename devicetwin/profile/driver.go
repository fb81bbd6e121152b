package profile

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/mqtt"
	"golang.org/x/sync/errgroup"
)

// Config of a Driver.
type Config struct {
	Node   string          // name of this node; required
	Broker mqtt.Broker     // required
	Sink   devicetwin.Sink // required
	// Twins is asked by KubeEdge's topics; nil leaves twin/get and expected
	// values unanswered with an error.
	Twins Twins
	// ExternalSocket is where the mappers of profile external connect; "" has
	// none.
	ExternalSocket string
	Log            *slog.Logger // nil discards
}

// Twins is what KubeEdge's topics and mappers need of the twins.
type Twins interface {
	// SetDesired has values wanted from the node itself. by says who did it.
	SetDesired(ctx context.Context, dev devicetwin.Key, props map[string]any, by string) error
	// View tells what a device says and what is wanted of it; false: there is
	// no such device.
	View(dev devicetwin.Key) (map[string]PropertyView, bool)
}

// PropertyView is one property as it stands. Values are as in a Reading; nil:
// there is none.
type PropertyView struct {
	Reported   any
	ReportedAt time.Time
	Desired    any // the effective one
	DesiredAt  time.Time
}

// Driver implements devicetwin.Driver over MQTT.
type Driver struct {
	cfg         Config
	log         *slog.Logger
	expressions *expressions
	seq         atomic.Int64
	outbox      chan mqtt.Message
	jobs        chan func(context.Context)
	dropped     atomic.Int64
	timers      *timers
	changed     chan struct{} // of one: the subscriptions may need work
	asks        chan struct{} // of one: refreshes are wanted
	subscribed  chan struct{} // closed after the first time

	// lock order: mu, then a device's or a session's; never two of those.
	mu          sync.Mutex
	devices     map[devicetwin.Key]*device
	refreshes   []asking // to be sent, each once
	members     *hwMembership
	ext         *external // nil: none
	discoveries map[devicetwin.Key]*discovery
	candidates  budget
	nodes       map[spID]*spNode
	hosts       map[string]bool // Sparkplug host ids that were told to be online

	subs map[string]*subscription // of Run alone
}

var _ devicetwin.Driver = (*Driver)(nil)

// New checks cfg; it starts nothing.
func New(cfg Config) (*Driver, error) {
	switch {
	case cfg.Node == "":
		return nil, errors.New("profile: Config.Node is required")
	case cfg.Broker == nil:
		return nil, errors.New("profile: Config.Broker is required")
	case cfg.Sink == nil:
		return nil, errors.New("profile: Config.Sink is required")
	}
	d := &Driver{
		cfg:         cfg,
		log:         cmp.Or(cfg.Log, slog.New(slog.DiscardHandler)),
		expressions: newExpressions(),
		outbox:      make(chan mqtt.Message, 1024),
		jobs:        make(chan func(context.Context), 256),
		members:     &hwMembership{},
		discoveries: map[devicetwin.Key]*discovery{},
		nodes:       map[spID]*spNode{},
		hosts:       map[string]bool{},
		timers:      newTimers(),
		changed:     make(chan struct{}, 1),
		asks:        make(chan struct{}, 1),
		subscribed:  make(chan struct{}),
		devices:     map[devicetwin.Key]*device{},
		subs:        map[string]*subscription{},
	}
	d.members.driver = d
	if cfg.ExternalSocket != "" {
		d.ext = newExternal(d, cfg.ExternalSocket)
	}
	// Answers to a run before this one do not match.
	d.seq.Store(time.Now().Unix() % (1 << 20) << 10)
	return d, nil
}

// nextSeq is small enough for devices that count in 31 bits.
func (d *Driver) nextSeq() int64 { return d.seq.Add(1)&(1<<31-1) | 1<<30 }

// Subscribed is closed once Run has subscribed to what the first Set wants. A
// broker that lets devices in before loses the first that they say.
func (d *Driver) Subscribed() <-chan struct{} { return d.subscribed }

// Run listens and speaks until ctx ends.
func (d *Driver) Run(ctx context.Context) error {
	defer d.unsubscribe()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.subscribe(ctx) })
	g.Go(func() error { return d.speak(ctx) })
	g.Go(func() error { return d.ask(ctx) })
	g.Go(func() error { return d.timers.run(ctx) })
	g.Go(func() error { return d.work(ctx) })
	if d.ext != nil {
		g.Go(func() error { return d.ext.run(ctx) })
	}
	err := g.Wait()
	d.hostsOffline()
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// Set implements devicetwin.Driver. A device that did not change is left as it
// is, with what its profile has learnt.
func (d *Driver) Set(devices []devicetwin.Bound, discoveries []*v1alpha1.DeviceDiscovery) {
	var bad []*device
	d.mu.Lock()
	next := make(map[devicetwin.Key]*device, len(devices))
	for _, b := range devices {
		key := devicetwin.Key{Namespace: b.Device.Namespace, Name: b.Device.Name}
		old := d.devices[key]
		if old != nil && old.print == fingerprint(b) {
			next[key] = old
			continue
		}
		dev := compile(b, env{node: d.cfg.Node, expressions: d.expressions, driver: d})
		next[key] = dev
		if dev.err != nil || len(dev.problems) > 0 {
			bad = append(bad, dev)
		}
		for _, r := range dev.refresh {
			if r.start {
				d.wantRefreshLocked(dev, r)
			}
			if r.interval > 0 {
				d.repeat(dev, r)
			}
		}
	}
	var gone []*device
	for key, old := range d.devices {
		if next[key] != old {
			gone = append(gone, old)
			old.gone.Store(true)
		}
	}
	d.devices = next
	d.setMembersLocked()
	d.setNodesLocked()
	d.setDiscoveriesLocked(discoveries)
	d.refreshes = slices.DeleteFunc(d.refreshes, func(a asking) bool { return a.device.gone.Load() })
	d.mu.Unlock()

	if d.ext != nil {
		d.ext.changed()
	}
	// Elsewhere: whoever calls Set may hold what the sink waits for.
	d.timers.after(0, func() {
		for _, old := range gone {
			if old.stop != nil {
				old.stop()
			}
		}
		for _, dev := range bad {
			d.tellProblems(dev)
		}
	})
	d.resubscribe()
}

// tellProblems puts what is wrong with a mapping where people look: at the
// property.
func (d *Driver) tellProblems(dev *device) {
	var readings []devicetwin.Reading
	if dev.err != nil {
		d.log.Warn("device without a mapping", "device", dev.key.String(), "err", dev.err)
		for _, name := range dev.names {
			readings = append(readings, devicetwin.Reading{Property: name, Bad: dev.err})
		}
	}
	for name, err := range dev.problems {
		d.log.Warn("part of a device's mapping is void", "device", dev.key.String(), "property", name, "err", err)
		if dev.err == nil && slices.Contains(dev.names, name) {
			readings = append(readings, devicetwin.Reading{Property: name, Bad: err})
		}
	}
	if len(readings) > 0 {
		d.cfg.Sink.Report(dev.key, readings)
	}
}

// Problems tells what is wrong with a device's mapping, for people.
func (d *Driver) Problems(key devicetwin.Key) []error {
	d.mu.Lock()
	dev := d.devices[key]
	d.mu.Unlock()
	if dev == nil {
		return nil
	}
	var errs []error
	if dev.err != nil {
		errs = append(errs, dev.err)
	}
	for _, name := range slices.Sorted(maps.Keys(dev.problems)) {
		errs = append(errs, dev.problems[name])
	}
	return errs
}

// device that can be spoken to.
func (d *Driver) device(key devicetwin.Key) (*device, error) {
	d.mu.Lock()
	dev := d.devices[key]
	d.mu.Unlock()
	if dev == nil {
		return nil, fmt.Errorf("device %s: not on this node", key)
	}
	if dev.err != nil {
		return nil, fmt.Errorf("device %s: %w", key, dev.err)
	}
	return dev, nil
}

// resubscribe has Run look at the subscriptions again.
func (d *Driver) resubscribe() {
	select {
	case d.changed <- struct{}{}:
	default:
	}
}

// subscription is one filter at the broker, and who wants it.
type subscription struct {
	routes atomic.Pointer[[]*route]
	cancel func()
}

// handle gives m to all that want it. It runs on the broker's goroutine and
// does not wait for anything but the lock of a device: so the broker's own
// order is kept, nothing is queued here, and what is acknowledged has reached
// the sink.
func (s *subscription) handle(d *Driver, m mqtt.Message) error {
	p := &packet{Message: m}
	for _, r := range *s.routes.Load() {
		d.deliver(r, p)
	}
	return nil
}

func (d *Driver) deliver(r *route, p *packet) {
	dev := r.device
	if dev == nil {
		r.handle(p, nil)
		return
	}
	dev.mu.Lock()
	defer dev.mu.Unlock()
	if dev.gone.Load() {
		return
	}
	out := applyAll(r.reads, p, nil)
	if r.handle != nil {
		out = r.handle(p, out)
	}
	if len(out) > 0 {
		d.cfg.Sink.Report(dev.key, out)
	}
	// On a filter for many devices, only what was of use was this one's.
	if r.spoken && !p.Retain && (len(out) > 0 || !strings.ContainsAny(r.filter, "+#")) {
		d.cfg.Sink.Sight(dev.key, devicetwin.Sighting{Evidence: devicetwin.EvidenceMessage, State: v1alpha1.PhaseOnline})
	}
}

// sight tells of a device's being there. Its lock is held.
func (d *Driver) sight(dev *device, s devicetwin.Sighting) {
	if s.Evidence != devicetwin.EvidenceParent {
		if s.State == v1alpha1.PhaseOnline && dev.state != s.State {
			d.refreshOnline(dev, s.Retained)
		}
		dev.state = s.State
	}
	d.cfg.Sink.Sight(dev.key, s)
}

// subscribe keeps the broker's subscriptions as the devices need them.
func (d *Driver) subscribe(ctx context.Context) error {
	for first := true; ; first = false {
		d.reconcile()
		if first {
			close(d.subscribed)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-d.changed:
		}
	}
}

func (d *Driver) reconcile() {
	want := map[string][]*route{}
	for _, r := range d.routes() {
		want[r.filter] = append(want[r.filter], r)
	}
	for filter, s := range d.subs {
		if len(want[filter]) == 0 {
			s.cancel()
			delete(d.subs, filter)
		}
	}
	for _, filter := range slices.Sorted(maps.Keys(want)) {
		routes := want[filter]
		old := d.subs[filter]
		if old != nil {
			known := *old.routes.Load()
			old.routes.Store(&routes)
			if !slices.ContainsFunc(routes, func(r *route) bool { return !slices.Contains(known, r) }) {
				continue
			}
			// Who is new needs what the broker kept: subscribe again, and only
			// then end the old subscription, so that nothing falls between.
		}
		s := &subscription{}
		s.routes.Store(&routes)
		cancel, err := d.cfg.Broker.Subscribe(filter, 1, func(m mqtt.Message) error { return s.handle(d, m) })
		if err != nil {
			d.log.Warn("subscribe", "filter", filter, "err", err)
			continue
		}
		s.cancel = cancel
		d.subs[filter] = s
		if old != nil {
			old.cancel()
		}
	}
}

// routes that are wanted now.
func (d *Driver) routes() []*route {
	d.mu.Lock()
	devices := slices.Collect(maps.Values(d.devices))
	all := slices.Clone(d.members.routes)
	for _, n := range d.nodes {
		all = append(all, n.routes...)
	}
	for _, x := range d.discoveries {
		all = append(all, x.routes...)
	}
	d.mu.Unlock()
	slices.SortFunc(devices, func(a, b *device) int {
		return cmp.Or(cmp.Compare(a.key.Namespace, b.key.Namespace), cmp.Compare(a.key.Name, b.key.Name))
	})
	for _, dev := range devices {
		if dev.err != nil {
			continue
		}
		all = append(all, dev.routes...)
		dev.mu.Lock()
		all = append(all, dev.extra...)
		dev.mu.Unlock()
	}
	return all
}

func (d *Driver) unsubscribe() {
	for filter, s := range d.subs {
		s.cancel()
		delete(d.subs, filter)
	}
}

// later publishes m when there is time, in order. It does not block: a handler
// must not wait for the broker. Beyond the outbox's bound m is dropped; all
// that is sent so is asked for again by whoever missed it.
func (d *Driver) later(m mqtt.Message) {
	select {
	case d.outbox <- m:
	default:
		if n := d.dropped.Add(1); n&(n-1) == 0 {
			d.log.Warn("answers dropped; the broker takes none", "topic", m.Topic, "dropped", n)
		}
	}
}

// job has fn done in order with all other jobs, outside of the broker's
// goroutine: it may wait. Beyond the bound it is dropped; who asked asks again.
func (d *Driver) job(dev *device, fn func(context.Context)) {
	select {
	case d.jobs <- fn:
	default:
		if n := d.dropped.Add(1); n&(n-1) == 0 {
			d.log.Warn("requests dropped; too many at once", "device", dev.key.String(), "dropped", n)
		}
	}
}

func (d *Driver) work(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case fn := <-d.jobs:
			one, cancel := context.WithTimeout(ctx, defaultTimeout)
			fn(one)
			cancel()
		}
	}
}

func (d *Driver) speak(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case m := <-d.outbox:
			for {
				one, cancel := context.WithTimeout(ctx, defaultTimeout)
				err := d.publish(one, m)
				cancel()
				if !errors.Is(err, mqtt.ErrNotConnected) {
					if err != nil && ctx.Err() == nil {
						d.log.Debug("an answer was not sent", "err", err)
					}
					break
				}
				if err := pause(ctx, refreshRetry); err != nil {
					return err
				}
			}
		}
	}
}

// Filters tells what topics a device publishes to and what it subscribes to,
// as its model has it: what a broker has to let it do.
func Filters(node string, b devicetwin.Bound) (publishes, subscribes []string) {
	if b.Device == nil {
		return nil, nil
	}
	dev := compile(b, env{node: node})
	if dev.err != nil {
		return nil, nil
	}
	for _, r := range dev.routes {
		if r.spoken || r.told {
			publishes = append(publishes, r.filter)
		}
	}
	add := func(w *write) {
		if w != nil && w.topic != "" {
			subscribes = append(subscribes, w.topic)
		}
	}
	for _, p := range dev.readings {
		add(p.write)
	}
	for _, c := range dev.commands {
		add(c.write)
	}
	for _, r := range dev.refresh {
		add(r.write)
	}
	publishes = append(publishes, dev.morePublished...)
	subscribes = append(subscribes, dev.moreSubscribed...)
	slices.Sort(publishes)
	slices.Sort(subscribes)
	return slices.Compact(publishes), slices.Compact(subscribes)
}

// Refresh implements devicetwin.Driver. Where the model has no way of asking
// there is nothing to do.
func (d *Driver) Refresh(ctx context.Context, key devicetwin.Key) error {
	dev, err := d.device(key)
	if err != nil {
		return err
	}
	if dev.ownRefresh != nil {
		return dev.ownRefresh(ctx)
	}
	for _, r := range dev.refresh {
		if err := d.askOnce(ctx, dev, r); err != nil {
			return fmt.Errorf("device %s: refresh: %w", key, err)
		}
	}
	return nil
}

func (d *Driver) askOnce(ctx context.Context, dev *device, r *refresh) error {
	if dev.ownRefresh != nil {
		return dev.ownRefresh(ctx)
	}
	// A device that comes is asked by the twin and by its model.
	if now := time.Now().UnixNano(); now-r.asked.Load() < int64(refreshOnce) {
		return nil
	} else {
		r.asked.Store(now)
	}
	_, err := d.send(ctx, dev, r.write, 0, 0, func(string) (word, bool) { return word{}, false })
	if err != nil {
		r.asked.Store(0)
	}
	return err
}

// refreshOnline asks a device that has come. One that had come already, as a
// retained message tells, was asked when this driver started. Its lock is held.
func (d *Driver) refreshOnline(dev *device, before bool) {
	for _, r := range dev.refresh {
		if r.online && !(r.start && before) {
			d.timers.after(0, func() {
				d.mu.Lock()
				defer d.mu.Unlock()
				if d.devices[dev.key] == dev {
					d.wantRefreshLocked(dev, r)
				}
			})
		}
	}
}

func (d *Driver) wantRefreshLocked(dev *device, r *refresh) {
	if !slices.Contains(d.refreshes, asking{dev, r}) {
		d.refreshes = append(d.refreshes, asking{dev, r})
	}
	select {
	case d.asks <- struct{}{}:
	default:
	}
}

// repeat asks every interval, for as long as the device is there.
func (d *Driver) repeat(dev *device, r *refresh) {
	d.timers.after(r.interval, func() {
		d.mu.Lock()
		here := d.devices[dev.key] == dev
		if here {
			d.wantRefreshLocked(dev, r)
		}
		d.mu.Unlock()
		if here {
			d.repeat(dev, r)
		}
	})
}

const (
	refreshPace  = 10 * time.Millisecond // the questions to many devices are no burst
	refreshRetry = time.Second           // while there is no broker
	refreshOnce  = 500 * time.Millisecond
)

// ask sends the refreshes that are wanted, one after another.
func (d *Driver) ask(ctx context.Context) error {
	for {
		wait := refreshPace
		dev, r := d.nextRefresh()
		if r == nil {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-d.asks:
			}
			continue
		}
		one, cancel := context.WithTimeout(ctx, defaultTimeout)
		err := d.askOnce(one, dev, r)
		cancel()
		switch {
		case errors.Is(err, devicetwin.ErrNotConnected) && dev.ext == nil:
			d.mu.Lock()
			if d.devices[dev.key] == dev {
				d.wantRefreshLocked(dev, r)
			}
			d.mu.Unlock()
			wait = refreshRetry
		case err != nil:
			d.log.Debug("refresh", "device", dev.key.String(), "err", err)
		}
		if err := pause(ctx, wait); err != nil {
			return err
		}
	}
}

func pause(ctx context.Context, wait time.Duration) error {
	clock := time.NewTimer(wait)
	defer clock.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-clock.C:
		return nil
	}
}

// asking is a refresh that is wanted.
type asking struct {
	device  *device
	refresh *refresh
}

func (d *Driver) nextRefresh() (*device, *refresh) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.refreshes) > 0 {
		next := d.refreshes[0]
		d.refreshes = slices.Delete(d.refreshes, 0, 1)
		return next.device, next.refresh
	}
	return nil, nil
}
