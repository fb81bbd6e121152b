package mqtt

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"sync"
	"sync/atomic"
	"time"

	mochi "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"
	"golang.org/x/sync/errgroup"
)

// EmbeddedConfig is what an Embedded broker is made from.
type EmbeddedConfig struct {
	// Listeners are where devices connect. None: the broker is reached from
	// within this process alone.
	Listeners []ListenerConfig
	// Capture is called with each message that a client publishes, and with
	// wills, before anything else is done with it: it returns once what has to
	// outlive the power is on the disk. Its error refuses the message. It blocks
	// only its publisher, and is called by several of them at a time.
	Capture func(Message) error
	// CaptureAll, if not nil, is called in place of Capture, with messages that
	// came together from one client, in their order: one wait for the disk is
	// then for all of them. At its error Capture, if not nil, is asked for each;
	// else it refuses them all.
	CaptureAll func([]Message) error
	// Auth says who a client is; nil: Anonymous, which is for loopback alone.
	Auth Authenticator
	// ACL says what a client may do; nil: anonymous clients on loopback use all
	// but the reserved topics.
	ACL ACL
	// Retained keeps the retained messages of clients over a restart; nil: RAM
	// only. What this node itself publishes is not in it: it says that again.
	Retained RetainedDB
	Limits   Limits
	// Sessions is told of clients that come and go, in order for each. It does
	// not block.
	Sessions func(Session)
	Log      *slog.Logger // nil discards
}

// Limits bound what clients can make the broker hold. Zero fields have the
// defaults named.
type Limits struct {
	Clients          int           // connected at a time; 1000
	Pending          int           // connections that have not said who they are; 64
	ConnectTimeout   time.Duration // for TLS, CONNECT and authentication; 10 s
	PacketBytes      int           // of one packet; 256 KiB
	Inflight         int           // unacknowledged to one client; 1024
	QueueMessages    int           // waiting for one client; 4096
	QueueBytes       int           // 4 MiB
	Stall            time.Duration // a full queue that has not made room for this long ends its session; 10 s
	WriteTimeout     time.Duration // of one write to a client; 20 s
	AwaySessions     int           // kept for clients that are not connected; 200
	SessionExpiry    time.Duration // of a session whose client is away; 1 h
	Subscriptions    int           // of one client; 1000
	TopicLevels      int           // 64
	TopicBytes       int           // 4096
	TopicAliases     int           // of one client; 32
	RetainedMessages int           // 65536
	RetainedBytes    int           // 32 MiB
	SelfQueue        int           // messages of this node waiting for its own subscriptions; 4096
}

func (l Limits) withDefaults() Limits {
	l.Clients = cmp.Or(l.Clients, 1000)
	l.Pending = cmp.Or(l.Pending, 64)
	l.ConnectTimeout = cmp.Or(l.ConnectTimeout, 10*time.Second)
	l.PacketBytes = cmp.Or(l.PacketBytes, 256<<10)
	l.Inflight = min(cmp.Or(l.Inflight, 1024), 32<<10)
	l.QueueMessages = cmp.Or(l.QueueMessages, 4096)
	l.QueueBytes = cmp.Or(l.QueueBytes, 4<<20)
	l.Stall = cmp.Or(l.Stall, 10*time.Second)
	l.WriteTimeout = cmp.Or(l.WriteTimeout, 20*time.Second)
	l.AwaySessions = cmp.Or(l.AwaySessions, 200)
	l.SessionExpiry = cmp.Or(l.SessionExpiry, time.Hour)
	l.Subscriptions = cmp.Or(l.Subscriptions, 1000)
	l.TopicLevels = cmp.Or(l.TopicLevels, 64)
	l.TopicBytes = cmp.Or(l.TopicBytes, 4096)
	l.TopicAliases = min(cmp.Or(l.TopicAliases, 32), math.MaxUint16)
	l.RetainedMessages = cmp.Or(l.RetainedMessages, 65536)
	l.RetainedBytes = cmp.Or(l.RetainedBytes, 32<<20)
	l.SelfQueue = cmp.Or(l.SelfQueue, 4096)
	return l
}

// Embedded is a broker in this process.
//
// mochi-mqtt is its transport and no more: framing, codec, CONNECT, keep-alive
// and DISCONNECT. Everything that a promise hangs on is done here, in its
// OnPacketRead hook, because each of mochi 2.7.9's own ways breaks one: queued
// messages leave it in random order, an acknowledged one is dropped when its
// subscriber is slow or reconnects, the cleanup of an old connection removes
// the subscriptions of the new one of the same name, retained messages go after
// 24 hours, and a SUBSCRIBE cut short takes the process down. To mochi each
// connection is therefore a client with a name of its own that never subscribes
// to anything; sessions, queues, windows and retained messages are ours.
//
// What is promised:
//
//   - A message of QoS 1 or 2 is acknowledged after Capture, all handlers of
//     this node and the retained store have taken it, and after it is in the
//     queue of every session it goes to. Each queue is in order.
//   - A queue that is full holds up who publishes to it (QoS 0 is dropped
//     instead and counted). If an eighth of it has not become free within
//     Limits.Stall, its session is ended and its client disconnected, which it
//     is told (reason 0x97), as it is by "session present: no" when it returns:
//     nothing is lost in silence, and nobody holds up the others for long.
//     Who subscribes to what it publishes itself is not held up by itself; its
//     queue may grow to four times the limit.
//   - A session whose client is away is kept in RAM, at most
//     Limits.SessionExpiry, and ended once its queue is full and it has been
//     away for Limits.Stall. It does not outlive the process. It bridges a
//     reconnect; it is no store: who must not miss a value reads the twin.
//   - A client of a name that is taken is let in after the old one has gone and
//     its will is published; only the same principal can take a name over.
//   - Where a message is refused, MQTT 5 is told so in the acknowledgement
//     (Capture or handler: 0x97; ACL: 0x87). MQTT 3.1.1 cannot be: after a
//     failed Capture or handler its connection is dropped; what the ACL refuses
//     is acknowledged and dropped, as other brokers do, since devices say more
//     than their mappings need.
//   - Wills are not sent when the broker itself stops.
type Embedded struct {
	cfg   EmbeddedConfig
	limit Limits
	log   *slog.Logger
	mochi *mochi.Server
	acl   ACL
	auth  Authenticator
	slow  *sampled // what clients can make happen often is logged now and then

	retained retainedStore
	tree     tree
	seq      atomic.Uint64 // of messages, in the order of their coming
	self     chan selfMessage
	closing  chan struct{}
	conns    sync.WaitGroup
	stats    embeddedCounters

	// Lock order: mu, then tree.mu, then a session's mu, then retained.mu.
	mu        sync.Mutex
	closed    bool
	sessions  map[string]*session
	open      map[*conn]struct{}
	connected int
	// Connections that have not said who they are: how many, and by address.
	pendingAll int
	pending    map[string]int
	listeners  []*listener
	since      time.Time
	failure    error
	connNo     uint64
}

type selfMessage struct {
	to *inline
	m  *stored
}

// stored is a message on its way or kept; immutable.
type stored struct {
	Message
	seq     uint64
	expires time.Time // zero: never
	format  byte      // payload format indicator, see formatText
}

// Payload format indicators, plus one: zero says that there was none.
const (
	formatBytes = 1
	formatText  = 2
)

func (m *stored) expired(now time.Time) bool { return !m.expires.IsZero() && now.After(m.expires) }

// NewEmbedded checks cfg and loads the retained messages; it starts nothing.
func NewEmbedded(cfg EmbeddedConfig) (*Embedded, error) {
	b := &Embedded{cfg: cfg, limit: cfg.Limits.withDefaults(), log: cfg.Log, acl: cfg.ACL, auth: cfg.Auth,
		closing: make(chan struct{}), sessions: map[string]*session{}, open: map[*conn]struct{}{}, pending: map[string]int{}}
	if b.log == nil {
		b.log = slog.New(slog.DiscardHandler)
	}
	if b.auth == nil {
		b.auth = Anonymous{}
	}
	if b.acl == nil {
		b.acl = NewACLTable(ACLConfig{Local: true})
	}
	b.slow = newSampled(b.log, time.Minute)
	b.self = make(chan selfMessage, b.limit.SelfQueue)
	for _, l := range cfg.Listeners {
		if err := l.check(); err != nil {
			return nil, err
		}
	}
	b.retained = retainedStore{db: cfg.Retained, messages: b.limit.RetainedMessages, bytes: b.limit.RetainedBytes}
	lost, err := b.retained.load(time.Now())
	if err != nil {
		return nil, fmt.Errorf("mqtt: load the retained messages: %w", err)
	}
	if lost > 0 {
		b.log.Warn("retained messages could not be restored", "lost", lost)
	}
	return b, b.newTransport()
}

func (b *Embedded) newTransport() error {
	caps := mochi.NewDefaultServerCapabilities()
	caps.MaximumClients = math.MaxInt64 // ours are counted before
	caps.MaximumMessageExpiryInterval = 0
	caps.MaximumClientWritesPending = 1 // of a queue that is not used
	caps.MaximumPacketSize = uint32(b.limit.PacketBytes)
	caps.ReceiveMaximum = uint16(b.limit.Inflight)
	caps.MaximumInflight = uint16(b.limit.Inflight)
	caps.TopicAliasMaximum = uint16(b.limit.TopicAliases)
	caps.Compatibilities.NoInheritedPropertiesOnAck = true
	// Its log would have whole packets, passwords among them.
	b.mochi = mochi.New(&mochi.Options{Capabilities: caps, Logger: slog.New(slog.DiscardHandler),
		SysTopicResendInterval: math.MaxInt32, ClientNetReadBufferSize: 4096})
	return b.mochi.AddHook(&hook{b: b}, nil)
}

// Run listens, and serves until ctx ends.
func (b *Embedded) Run(ctx context.Context) error {
	if err := b.listen(); err != nil {
		b.mu.Lock()
		b.failure = err
		b.mu.Unlock()
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	for _, l := range b.listeners {
		g.Go(func() error { return b.accept(ctx, l) })
	}
	g.Go(func() error { return b.sweep(ctx) })
	g.Go(func() error { return b.serveSelf(ctx) })
	g.Go(func() error {
		<-ctx.Done()
		b.shut()
		return nil
	})
	err := g.Wait()
	b.conns.Wait()
	return err
}

// shut closes what is open.
func (b *Embedded) shut() {
	b.mu.Lock()
	b.closed = true
	close(b.closing)
	open := make([]*conn, 0, len(b.open))
	for c := range b.open {
		open = append(open, c)
	}
	listeners := b.listeners
	b.listeners, b.since = nil, time.Time{}
	b.mu.Unlock()
	for _, l := range listeners {
		l.Close()
	}
	for _, c := range open {
		c.kick(packets.ErrServerShuttingDown)
	}
}

// sweep ends what has had its time.
func (b *Embedded) sweep(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			b.expireSessions(now)
			if n%30 == 0 {
				b.retained.expire(now)
			}
		}
	}
}

// serveSelf brings this node's messages to its own handlers: one that publishes
// is not called again before it has returned.
func (b *Embedded) serveSelf(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case s := <-b.self:
			if err := s.to.call(s.m, false); err != nil {
				b.slow.Warn("a handler refused a message of this node", "topic", s.m.Topic, "error", err)
			}
		}
	}
}

// errSelfQueue says that a Publish found no room; Limits.SelfQueue bounds it.
var errSelfQueue = errors.New("this node's subscriptions have not kept up with what it publishes; try again")

// Publish never waits for a client, so that a Handler may call it: a client
// that is too slow is treated as the comment of Embedded says, without holding
// up.
func (b *Embedded) Publish(_ context.Context, m Message) error {
	if err := b.checkTopic(m.Topic); err != nil {
		return err
	}
	if m.QoS > 2 {
		return fmt.Errorf("mqtt: QoS %d of a message to %q: want 0, 1 or 2", m.QoS, m.Topic)
	}
	s := &stored{Message: m}
	s.Payload = append([]byte(nil), m.Payload...)
	s.From, s.Dup, s.Received = "", false, time.Now()
	if m.Expiry > 0 {
		s.expires = s.Received.Add(m.Expiry)
	}
	return b.take(nil, s)
}

// inline is a subscription of this node itself.
type inline struct {
	b      *Embedded
	filter string
	qos    byte
	h      Handler

	mu        sync.Mutex // held while h is called
	cancelled bool
}

// call gives m to the handler.
func (in *inline) call(m *stored, kept bool) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.callLocked(m, kept)
}

func (in *inline) callLocked(m *stored, kept bool) error {
	if in.cancelled || m.expired(time.Now()) {
		return nil
	}
	out := m.Message
	out.Retain, out.AskRetain = kept, m.Retain
	out.QoS = min(out.QoS, in.qos)
	return in.h(out)
}

// Subscribe calls h on the reading goroutine of each publisher, one message at
// a time; with what this node itself publishes it is called on another one.
// Retained messages are given to it before Subscribe returns. Neither cancel
// nor Subscribe with the same Handler may be called by it.
func (b *Embedded) Subscribe(filter string, qos byte, h Handler) (cancel func(), err error) {
	if err := CheckFilter(filter); err != nil {
		return nil, fmt.Errorf("mqtt: subscribe: %w", err)
	}
	if qos > 2 {
		return nil, fmt.Errorf("mqtt: subscribe to %q: QoS %d: want 0, 1 or 2", filter, qos)
	}
	in := &inline{b: b, filter: unshared(filter), qos: qos, h: h}
	in.mu.Lock()
	b.tree.subscribeInline(in)
	since := b.seq.Load()
	for _, m := range b.retained.match(in.filter) {
		if m.seq > since {
			continue // it waits for in.mu
		}
		if err := in.callLocked(m, true); err != nil {
			b.slow.Warn("a handler refused a retained message", "topic", m.Topic, "error", err)
		}
	}
	in.mu.Unlock()
	return func() {
		b.tree.unsubscribeInline(in)
		in.mu.Lock()
		in.cancelled = true
		in.mu.Unlock()
	}, nil
}

// State tells where the broker listens; it is connected while it does.
func (b *Embedded) State() State {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := State{Mode: "embedded", Connected: !b.since.IsZero(), Since: b.since, Clients: b.connected}
	for i, l := range b.listeners {
		if i > 0 {
			s.Address += " "
		}
		s.Address += l.Addr().String()
	}
	if b.failure != nil {
		s.Error = b.failure.Error()
	}
	return s
}

// Addrs are where it listens, in the order of the config; none before Run does.
func (b *Embedded) Addrs() []net.Addr {
	b.mu.Lock()
	defer b.mu.Unlock()
	addrs := make([]net.Addr, len(b.listeners))
	for i, l := range b.listeners {
		addrs[i] = l.Addr()
	}
	return addrs
}

// EmbeddedStats are counts since the start, and of now.
type EmbeddedStats struct {
	Clients, Sessions          int // connected; and with those that are away
	Retained, RetainedBytes    int
	Received, Sent             uint64 // messages
	CaptureFailed              uint64
	HandlerFailed              uint64
	Denied                     uint64 // publications that the ACL refused
	AuthFailed                 uint64
	RetainedRefused            uint64 // not kept, for want of room
	Dropped                    uint64 // QoS 0, for want of room
	Expired                    uint64 // messages whose time was over before they were sent
	TooLarge                   uint64 // for their receiver
	SlowEnded                  uint64 // sessions that were ended because their queue was full
	RefusedConnections         uint64 // for want of room
	Malformed, DecoderPanics   uint64
	TakenOver, SessionsResumed uint64
}

type embeddedCounters struct {
	received, sent, captureFailed, handlerFailed, denied, authFailed, retainedRefused, dropped, expired, tooLarge,
	slowEnded, refused, malformed, panics, takenOver, resumed atomic.Uint64
}

// Stats are counts for metrics.
func (b *Embedded) Stats() EmbeddedStats {
	c := &b.stats
	s := EmbeddedStats{Received: c.received.Load(), Sent: c.sent.Load(), CaptureFailed: c.captureFailed.Load(),
		HandlerFailed: c.handlerFailed.Load(), Denied: c.denied.Load(), AuthFailed: c.authFailed.Load(),
		RetainedRefused: c.retainedRefused.Load(), Dropped: c.dropped.Load(), Expired: c.expired.Load(),
		TooLarge: c.tooLarge.Load(), SlowEnded: c.slowEnded.Load(), RefusedConnections: c.refused.Load(),
		Malformed: c.malformed.Load(), DecoderPanics: c.panics.Load(), TakenOver: c.takenOver.Load(),
		SessionsResumed: c.resumed.Load()}
	s.Retained, s.RetainedBytes = b.retained.usage()
	b.mu.Lock()
	s.Clients, s.Sessions = b.connected, len(b.sessions)
	b.mu.Unlock()
	return s
}
