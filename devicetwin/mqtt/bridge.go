package mqtt

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

// BridgeConfig is what a Bridge carries, and between what.
type BridgeConfig struct {
	// Name names the bridge at both ends: its client id, its notifications, the
	// origin it gives to what it carries. Required, and to be unique among the
	// bridges that meet at a broker.
	Name   string
	Topics []BridgeTopic
	// Local is this side. It is run by others. If it is an External, give the
	// bridge one of its own with Bridge set.
	Local Broker
	// Remote is the other side. ClientID zero means Name; Will, Birth, Bridge
	// and OnState are the bridge's.
	Remote ExternalConfig
	// NoPrivate does not ask the remote broker to take us for a bridge.
	NoPrivate bool
	// Out and In hold what is on its way, each way; nil means a MemoryQueue of
	// 1000 messages, which is mosquitto's.
	Out, In Queue
	// LocalCleanSession does not keep for the other side what comes here while
	// it is not connected.
	LocalCleanSession bool
	// Notifications are "1" and "0", retained, on NotificationTopic, here and,
	// unless NotificationsHere, there. Zero means skerry/bridge/<name>/state:
	// under $SYS, where mosquitto has it, brokers let no client write.
	NoNotifications   bool
	NotificationTopic string
	NotificationsHere bool
	// Reserved says which topics of this side the other must not write to; nil:
	// none.
	Reserved func(topic string) bool
	// Lazy connects when Threshold messages (zero means 10) wait to go out, and
	// not before, until none has gone either way for IdleTimeout (zero means
	// 60s).
	Lazy        bool
	IdleTimeout time.Duration
	Threshold   int
	Log         *slog.Logger // nil discards
}

// Bridge carries messages between this side's broker and another, with what
// mosquitto's bridges can be told.
//
// What it has taken in at QoS 1 it has put into a Queue before it is
// acknowledged, and takes out when the other side has acknowledged it: at least
// once, in order. QoS 0 is carried while there is a connection.
//
// Loops are cut by origin. Where messages have properties (the embedded broker)
// each that the bridge brings carries its name in the user property
// skerry-bridge and is not carried back. MQTT 3.1.1 has none: there the remote
// broker is asked to take us for a bridge, as mosquitto asks (try_private), by
// the version number 0x84; it then leaves out what came from us, and tells of
// each message whether it is to be retained. A broker that knows nothing of it
// refuses, and an ordinary connection is made; then what was published is
// remembered for a minute, and an equal message on the same topic within it is
// taken for its echo, once. Loops over a third broker are cut by none of it.
//
// What was retained comes again with each connect. It is not carried if it is
// what this bridge itself has put there, nor while newer words for its topic
// wait. And of topics carried both ways what was retained there is carried here,
// not the reverse: otherwise after each restart the two sides would exchange
// their values.
type Bridge struct {
	cfg    BridgeConfig
	log    *slog.Logger
	often  *sampled // what the brokers can make happen often
	remote *External
	topic  string // of notifications
	counts bridgeCounters

	changed chan struct{} // pokes connection and notify: State, or what waits
	out, in *pump
}

type bridgeCounters struct {
	out, in, dropped, echoes, stale, expired atomic.Uint64
}

// BridgeStats are counts since the start.
type BridgeStats struct {
	Out, In         uint64 // messages carried, acknowledged by the side they went to
	Dropped         uint64 // for want of room, of a connection (QoS 0), or refused
	Echoes          uint64 // that came back from the side they had been carried to
	Stale           uint64 // retained messages that this bridge knew better
	Expired         uint64 // that were to be carried before they were
	WaitOut, WaitIn int
}

// originProperty is the user property that names the bridge a message came by.
const originProperty = "skerry-bridge"

// NewBridge checks cfg; it starts nothing.
func NewBridge(cfg BridgeConfig) (*Bridge, error) {
	if cfg.Name == "" || CheckTopic("bridge/"+cfg.Name) != nil {
		return nil, fmt.Errorf("mqtt: a bridge needs a name that can be in a topic, not %q", cfg.Name)
	}
	fail := func(err error) (*Bridge, error) { return nil, fmt.Errorf("mqtt: bridge %s: %w", cfg.Name, err) }
	if cfg.Local == nil {
		return fail(errors.New("no local broker"))
	}
	if len(cfg.Topics) == 0 {
		return fail(errors.New("no topics"))
	}
	for _, t := range cfg.Topics {
		if err := t.check(); err != nil {
			return fail(err)
		}
	}
	if cfg.Lazy {
		for _, t := range cfg.Topics {
			if t.in() {
				return fail(fmt.Errorf("%s: a bridge that starts lazily hears nothing of the other side", t))
			}
		}
	}
	orDuration(&cfg.IdleTimeout, 60*time.Second)
	orInt(&cfg.Threshold, 10)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Out == nil {
		cfg.Out = NewMemoryQueue(1000)
	}
	if cfg.In == nil {
		cfg.In = NewMemoryQueue(1000)
	}
	b := &Bridge{
		cfg:     cfg,
		log:     cfg.Log.With("bridge", cfg.Name),
		topic:   cfg.NotificationTopic,
		changed: make(chan struct{}, 1),
	}
	if b.topic == "" {
		b.topic = "skerry/bridge/" + cfg.Name + "/state"
	}
	if err := CheckTopic(b.topic); err != nil {
		return fail(err)
	}
	b.often = newSampled(b.log, time.Minute)

	remote := cfg.Remote
	if remote.ClientID == "" {
		remote.ClientID = cfg.Name
	}
	if remote.Log == nil {
		remote.Log = b.log
	}
	remote.Bridge = !cfg.NoPrivate
	remote.OnState = func(State) { b.poke() }
	if !cfg.NoNotifications && !cfg.NotificationsHere {
		remote.Birth = &Message{Topic: b.topic, Payload: []byte("1"), QoS: 1, Retain: true}
		remote.Will = &Message{Topic: b.topic, Payload: []byte("0"), QoS: 1, Retain: true}
	}
	var err error
	if b.remote, err = NewExternal(remote); err != nil {
		return fail(err)
	}

	b.out = newPump(b, cfg.Out, b.remote, &b.counts.out)
	b.in = newPump(b, cfg.In, cfg.Local, &b.counts.in)
	b.in.origin = []UserProperty{{Key: originProperty, Value: cfg.Name}}
	_, localIsExternal := cfg.Local.(*External)
	for _, t := range cfg.Topics {
		// What is published to a side that is also heard comes back.
		if t.in() {
			b.out.heard = append(b.out.heard, t.remote())
		}
		if t.out() && localIsExternal {
			b.in.heard = append(b.in.heard, t.local())
		}
	}
	return b, nil
}

// Run carries until ctx ends.
func (b *Bridge) Run(ctx context.Context) error {
	var cancels []func()
	defer func() {
		for _, cancel := range cancels {
			cancel()
		}
	}()
	for i, t := range b.cfg.Topics {
		if t.out() {
			cancel, err := b.cfg.Local.Subscribe(t.local(), t.QoS, func(m Message) error { return b.carryOut(ctx, i, m) })
			if err != nil {
				return fmt.Errorf("bridge %s: %w", b.cfg.Name, err)
			}
			cancels = append(cancels, cancel)
		}
		if t.in() {
			cancel, err := b.remote.Subscribe(t.remote(), t.QoS, func(m Message) error { return b.carryIn(ctx, i, m) })
			if err != nil {
				return fmt.Errorf("bridge %s: %w", b.cfg.Name, err)
			}
			cancels = append(cancels, cancel)
		}
	}

	var parts sync.WaitGroup
	// The remote connection outlives ctx by what it takes to say that we go.
	remote, stop := context.WithCancel(context.WithoutCancel(ctx))
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		b.connect(ctx, remote)
	}()
	parts.Go(func() { b.out.run(ctx) })
	parts.Go(func() { b.in.run(ctx) })
	parts.Go(func() { b.notify(ctx) })

	<-ctx.Done()
	parts.Wait()
	b.farewell()
	stop()
	<-gone
	return nil
}

// connect keeps the remote connection: all the time, or while there is need.
func (b *Bridge) connect(ctx, remote context.Context) {
	if !b.cfg.Lazy {
		_ = b.remote.Run(remote)
		return
	}
	for ctx.Err() == nil {
		if !b.out.await(ctx, b.cfg.Threshold) {
			return
		}
		session, stop := context.WithCancel(remote)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_ = b.remote.Run(session)
		}()
		b.out.idle(ctx, b.cfg.IdleTimeout)
		if ctx.Err() != nil {
			// Run says farewell, and ends remote.
			<-ended
			stop()
			return
		}
		b.farewell()
		stop()
		<-ended
	}
}

// State is that of the remote connection.
func (b *Bridge) State() State { return b.remote.State() }

// Stats are counts since the start.
func (b *Bridge) Stats() BridgeStats {
	c := &b.counts
	return BridgeStats{
		Out: c.out.Load(), In: c.in.Load(), Dropped: c.dropped.Load(), Echoes: c.echoes.Load(),
		Stale: c.stale.Load(), Expired: c.expired.Load(), WaitOut: b.cfg.Out.Len(), WaitIn: b.cfg.In.Len(),
	}
}

func (b *Bridge) poke() {
	select {
	case b.changed <- struct{}{}:
	default:
	}
	b.out.poke()
}

// carryOut takes what this side has, for the topic line i.
func (b *Bridge) carryOut(ctx context.Context, i int, m Message) error {
	for _, u := range m.User {
		if u.Key == originProperty && u.Value == b.cfg.Name {
			b.counts.echoes.Add(1)
			return nil
		}
	}
	for _, t := range b.cfg.Topics[:i] {
		if _, ok := t.toRemote(m.Topic); ok && t.out() {
			return nil // the first line that matches has it
		}
	}
	t := b.cfg.Topics[i]
	topic, ok := t.toRemote(m.Topic)
	if !ok {
		return nil
	}
	switch {
	case !isPrivate(b.cfg.Local) && b.in.isEcho(m):
		b.counts.echoes.Add(1)
		return nil
	case m.Retain && (b.in.knowsBetter(m) || t.in() && !isBridge(b.cfg.Local)):
		b.counts.stale.Add(1)
		return nil
	}
	b.in.remember(m)
	connected := b.remote.State().Connected
	m.Topic, m.QoS, m.Retain = topic, min(m.QoS, t.QoS, 1), m.Retain || m.AskRetain
	if !connected && (m.QoS == 0 || b.cfg.LocalCleanSession) {
		b.counts.dropped.Add(1)
		return nil
	}
	return b.out.put(ctx, m)
}

// carryIn takes what the other side has.
func (b *Bridge) carryIn(ctx context.Context, i int, m Message) error {
	for _, t := range b.cfg.Topics[:i] {
		if _, ok := t.toLocal(m.Topic); ok && t.in() {
			return nil
		}
	}
	t := b.cfg.Topics[i]
	topic, ok := t.toLocal(m.Topic)
	if !ok {
		return nil
	}
	switch {
	case !isPrivate(b.remote) && b.out.isEcho(m):
		b.counts.echoes.Add(1)
		return nil
	case m.Retain && b.out.knowsBetter(m):
		b.counts.stale.Add(1)
		return nil
	}
	if b.cfg.Reserved != nil && b.cfg.Reserved(topic) {
		b.counts.dropped.Add(1)
		b.often.Warn("what the other side says to a reserved topic is not carried", "topic", topic)
		return nil
	}
	b.out.remember(m)
	m.Topic, m.QoS = topic, min(m.QoS, t.QoS, 1)
	return b.in.put(ctx, m)
}

func isBridge(b Broker) bool {
	e, ok := b.(*External)
	return ok && e.cfg.Bridge
}

// isPrivate says that b does not give back what it is given.
func isPrivate(b Broker) bool {
	e, ok := b.(*External)
	return ok && e.private()
}

// notify tells this side of the connection.
func (b *Bridge) notify(ctx context.Context) {
	if b.cfg.NoNotifications {
		return
	}
	said := ""
	for {
		word := "0"
		if b.remote.State().Connected {
			word = "1"
		}
		var again <-chan time.Time
		if word != said {
			if err := b.say(b.cfg.Local, ctx, word); err != nil {
				again = time.After(time.Second)
			} else {
				said = word
			}
		}
		select {
		case <-b.changed:
		case <-again:
		case <-ctx.Done():
			return
		}
	}
}

func (b *Bridge) say(to Broker, ctx context.Context, word string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return to.Publish(ctx, Message{Topic: b.topic, Payload: []byte(word), QoS: 1, Retain: true,
		User: b.in.origin})
}

// farewell says "0" where the will would have, had the connection been cut.
func (b *Bridge) farewell() {
	if b.cfg.NoNotifications {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	var both sync.WaitGroup
	both.Go(func() { _ = b.say(b.cfg.Local, ctx, "0") })
	if !b.cfg.NotificationsHere {
		both.Go(func() { _ = b.say(b.remote, ctx, "0") })
	}
	both.Wait()
}
