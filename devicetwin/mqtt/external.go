package mqtt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// ErrUnacknowledged says that a message was sent, and that the connection, or
// the caller's patience, ended before the broker's word came: it may have been
// taken. Who sends it again must bear a duplicate.
var ErrUnacknowledged = errors.New("sent to the MQTT broker, but not acknowledged")

// ExternalConfig is how to be a client of a broker.
type ExternalConfig struct {
	// URL is mqtt://, mqtts://, ws:// or wss://; required. Over TLS the broker
	// is always verified.
	URL string
	// ClientID, with "-" and Node behind it, names the session at the broker.
	// It must stay the same over restarts. Zero means skerry.
	ClientID string
	Node     string
	// Username, Password (or PasswordFile), CAFile (zero: the system's), CertFile and
	// KeyFile are read at each connect, so that they can be changed in place.
	Username     string
	Password     string
	PasswordFile string
	CAFile       string
	CertFile     string
	KeyFile      string
	// Bridge asks the broker to take this client for a bridge: it then does not
	// give it back what it published, and tells of each message whether it is to
	// be retained, so that Retain may mean either. One that knows nothing of it
	// is asked for an ordinary connection.
	Bridge bool
	// CleanSession has the broker keep nothing while there is no connection.
	// What it had handed over and was not acknowledged is then lost with it.
	CleanSession bool
	// Capture, if there is one, is called with every message beside the
	// handlers, in order within a topic and otherwise in parallel, so that many
	// can share one fsync. A message is acknowledged when it and they have
	// returned nil.
	Capture func(Message) error
	// Will is what the broker publishes when the connection is lost; Birth what
	// is published after each connect.
	Will, Birth *Message
	// MinBackoff and MaxBackoff bound the time between attempts to connect,
	// which grows and is jittered. Zero means 1s and 60s.
	MinBackoff, MaxBackoff time.Duration
	// KeepAlive is how long the connection may be silent; zero means 30s.
	KeepAlive time.Duration
	// AckTimeout is after how long without acknowledgement of a message the
	// connection is given up; zero means 30s.
	AckTimeout time.Duration
	// Window is how many messages may be unacknowledged at once; zero means 20,
	// which is what mosquitto itself keeps in flight.
	Window int
	// MaxPacket is the longest message that is taken; zero means 256 KiB.
	// Longer ones are dropped and acknowledged.
	MaxPacket int
	// QueueMessages and QueueBytes bound what was received and has yet to be
	// handled. Zero means 4096, and 32 MiB.
	QueueMessages, QueueBytes int
	// Unclaimed is for how long after Run began a message that no subscription
	// wants is held back unacknowledged: a resumed session brings messages
	// before all have subscribed. Zero means 30s.
	Unclaimed time.Duration
	// OnState is told of each change of State. It must not block.
	OnState func(State)
	Log     *slog.Logger // nil discards
}

// External is a client of a broker that is there already.
//
// It speaks MQTT 3.1.1. What MQTT 5 adds to a Message does not travel, but
// Expiry bounds how long a message waits here to be sent. QoS 2 is carried as
// QoS 1: a message is sent once per Publish and never again behind the caller's
// back, so that there is no replay that QoS 2 would cut; and what a broker
// delivers more than once is cut by those who cannot bear it, by its id.
//
// Nothing is kept here for later. Publish tells the truth of one connection,
// and the caller's own record (the twin, the log of a route) is what makes up
// for a connection that ended. The client library's store, which knows neither
// fsync nor order, and its reconnecting, which completes tokens of messages
// that were never delivered, are not used: each connection is a client of its
// own.
//
// While there are no more unacknowledged messages than the queue holds, a slow
// handler slows the broker down, by not acknowledging. What the broker does not
// wait for (QoS 0) is shed: first all but the newest of a topic, then whatever
// comes.
type External struct {
	cfg    ExternalConfig
	url    *url.URL
	id     string
	log    *slog.Logger
	often  *sampled // what others can make happen often
	inbox  *inbox
	counts counters

	mu       sync.Mutex
	subs     []*subscription // in order of Subscribe
	routes   *routes         // of subs
	link     *link           // nil: not connected
	state    State
	refused  string    // of subscriptions, as told in State
	epoch    uint64    // of the last link
	plain    plainness // owned by Run
	resubbed chan struct{}
}

type counters struct {
	connects, lost                   atomic.Uint64
	received, acked                  atomic.Uint64
	shed, oversize, invalid, refused atomic.Uint64
	unclaimed                        atomic.Uint64
}

// Stats are counts since the start.
type Stats struct {
	Connects  uint64 // connections made
	Received  uint64 // messages that came
	Acked     uint64 // of these, acknowledged
	Shed      uint64 // QoS 0 messages dropped because the queue was full
	Oversize  uint64 // messages dropped because they were too long
	Invalid   uint64 // messages dropped because their topic is none
	Refused   uint64 // messages that a handler refused
	Unclaimed uint64 // messages that no subscription wanted
	Queued    int    // messages received and not handled yet
}

// NewExternal checks cfg; it dials nothing.
func NewExternal(cfg ExternalConfig) (*External, error) {
	u, err := brokerURL(cfg.URL)
	if err != nil {
		return nil, err
	}
	if (cfg.CertFile == "") != (cfg.KeyFile == "") {
		return nil, errors.New("mqtt: a client certificate needs its key, and a key its certificate")
	}
	if cfg.PasswordFile+cfg.Password != "" && cfg.Username == "" {
		return nil, errors.New("mqtt: a password needs a username") // [MQTT-3.1.2-22]
	}
	for _, m := range []*Message{cfg.Will, cfg.Birth} {
		if m != nil {
			if err := CheckTopic(m.Topic); err != nil {
				return nil, fmt.Errorf("mqtt: %w", err)
			}
		}
	}
	orDuration(&cfg.MinBackoff, time.Second)
	orDuration(&cfg.MaxBackoff, 60*time.Second)
	orDuration(&cfg.KeepAlive, 30*time.Second)
	orDuration(&cfg.AckTimeout, 30*time.Second)
	orDuration(&cfg.Unclaimed, 30*time.Second)
	orInt(&cfg.Window, 20)
	orInt(&cfg.MaxPacket, 256<<10)
	orInt(&cfg.QueueMessages, 4096)
	orInt(&cfg.QueueBytes, 32<<20)
	cfg.MaxBackoff = max(cfg.MaxBackoff, cfg.MinBackoff)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	id := cfg.ClientID
	if id == "" {
		id = "skerry"
	}
	if cfg.Node != "" {
		id += "-" + cfg.Node
	}
	e := &External{
		cfg:      cfg,
		url:      u,
		id:       id,
		log:      cfg.Log.With("broker", u.Redacted()),
		routes:   &routes{},
		state:    State{Mode: ModeExternal, Address: u.Redacted(), Error: "not connected yet"},
		resubbed: make(chan struct{}, 1),
	}
	e.often = newSampled(e.log, time.Minute)
	e.inbox = newInbox(e)
	return e, nil
}

func orDuration(d *time.Duration, def time.Duration) {
	if *d <= 0 {
		*d = def
	}
}

func orInt(n *int, def int) {
	if *n <= 0 {
		*n = def
	}
}

// brokerURL reads where a broker is, and gives the port that goes without
// saying.
func brokerURL(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil {
		return nil, fmt.Errorf("mqtt: the broker's URL: %w", err)
	}
	port := ""
	switch u.Scheme {
	case "mqtt", "tcp":
		port = "1883"
	case "mqtts", "ssl", "tls":
		port = "8883"
	case "ws":
		port = "80"
	case "wss":
		port = "443"
	default:
		return nil, fmt.Errorf("mqtt: the broker's URL %q: the scheme must be mqtt, mqtts, ws or wss", u.Redacted())
	}
	if u.User != nil {
		// It would be shown wherever the address is.
		return nil, fmt.Errorf("mqtt: the broker's URL %q has a user in it: set username and passwordFile instead", u.Redacted())
	}
	if u.Hostname() == "" {
		return nil, fmt.Errorf("mqtt: the broker's URL %q names no host", s)
	}
	if u.Port() == "" {
		u.Host += ":" + port
	}
	return u, nil
}

// Run connects, and again whenever the connection ends, until ctx ends. That
// there is no broker is told in State and is not an error.
func (e *External) Run(ctx context.Context) error {
	handled := make(chan struct{})
	work, stop := context.WithCancel(context.Background())
	go func() {
		defer close(handled)
		e.inbox.run(work)
	}()
	defer func() {
		stop()
		<-handled
	}()

	var backoff time.Duration
	for {
		began := time.Now()
		err := e.connection(ctx)
		if ctx.Err() != nil {
			e.setState(false, "stopped")
			return nil
		}
		if time.Since(began) > max(10*time.Second, backoff) {
			backoff = 0
		}
		backoff = min(max(2*backoff, e.cfg.MinBackoff), e.cfg.MaxBackoff)
		e.setState(false, err.Error())
		timer := time.NewTimer(jitter(backoff))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
		}
	}
}

// jitter is between a half of d and d, so that a fleet that lost its broker at
// once does not come back at once.
func jitter(d time.Duration) time.Duration {
	return d/2 + rand.N(d/2+1)
}

// connection makes one connection and lives it out. It returns why it ended.
func (e *External) connection(ctx context.Context) error {
	e.mu.Lock()
	e.epoch++
	l := newLink(e, e.epoch)
	e.mu.Unlock()

	if err := l.connect(ctx); err != nil {
		if e.plain == plainUnknown || !l.private {
			return err
		}
		e.log.Info("the broker does not take this client for a bridge; an ordinary connection is made")
		l = newLink(e, l.epoch)
		if err := l.connect(ctx); err != nil {
			return err
		}
	}
	e.counts.connects.Add(1)
	e.mu.Lock()
	e.link, e.refused = l, ""
	e.mu.Unlock()
	e.setState(true, "")

	err := l.run(ctx)

	e.mu.Lock()
	e.link = nil
	e.mu.Unlock()
	return err
}

// setState tells of a change, and logs it once.
func (e *External) setState(connected bool, why string) {
	e.mu.Lock()
	was := e.state
	e.state.Connected = connected
	e.state.Error = why
	if connected {
		e.state.Error = e.refused
	}
	if connected != was.Connected {
		e.state.Since = time.Now()
	}
	now := e.state
	e.mu.Unlock()

	if now.Connected == was.Connected && now.Error == was.Error {
		return
	}
	switch {
	case now.Connected && now.Error != "":
		e.log.Warn("MQTT broker refuses", "error", now.Error)
	case now.Connected:
		e.log.Info("connected to the MQTT broker")
	case why != "stopped":
		e.log.Warn("no connection to the MQTT broker", "error", now.Error)
	}
	if e.cfg.OnState != nil {
		e.cfg.OnState(now)
	}
}

// setRefused tells which subscriptions the broker has refused.
func (e *External) setRefused(filters []string) {
	e.mu.Lock()
	if len(filters) > 0 {
		more := ""
		if len(filters) > 5 {
			more = fmt.Sprintf(" and %d more", len(filters)-5)
			filters = filters[:5]
		}
		e.refused = "the broker refuses subscriptions to " + strings.Join(filters, ", ") + more + ": allow them for this client there"
	} else {
		e.refused = ""
	}
	connected := e.link != nil
	e.mu.Unlock()
	if connected {
		e.setState(true, "")
	}
}

// State is what is known now.
func (e *External) State() State {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.state
}

// Stats are counts since the start.
func (e *External) Stats() Stats {
	c := &e.counts
	return Stats{
		Connects:  c.connects.Load(),
		Received:  c.received.Load(),
		Acked:     c.acked.Load(),
		Shed:      c.shed.Load(),
		Oversize:  c.oversize.Load(),
		Invalid:   c.invalid.Load(),
		Refused:   c.refused.Load(),
		Unclaimed: c.unclaimed.Load(),
		Queued:    e.inbox.len(),
	}
}

// Subscribe has h called for what matches filter. Of filters of which one
// covers the other only the wider goes to the broker, so that a message comes
// once; of two that merely overlap it may bring it once for each. Retained
// messages come again after each connect, marked as such. Subscribe before Run:
// a session that is resumed brings what was queued at once.
func (e *External) Subscribe(filter string, qos byte, h Handler) (cancel func(), err error) {
	if err := CheckFilter(filter); err != nil {
		return nil, fmt.Errorf("mqtt: %w", err)
	}
	if qos > 2 {
		return nil, fmt.Errorf("mqtt: there is no QoS %d", qos)
	}
	s := &subscription{filter: filter, qos: min(qos, 1), handle: h}
	e.mu.Lock()
	e.setSubsLocked(append(e.subs[:len(e.subs):len(e.subs)], s))
	e.mu.Unlock()
	e.subscriptionsChanged()

	return func() {
		e.mu.Lock()
		kept := make([]*subscription, 0, len(e.subs))
		for _, other := range e.subs {
			if other != s {
				kept = append(kept, other)
			}
		}
		e.setSubsLocked(kept)
		e.mu.Unlock()
		e.subscriptionsChanged()
		s.end()
	}, nil
}

func (e *External) setSubsLocked(subs []*subscription) {
	e.subs = subs
	e.routes = newRoutes(subs)
}

func (e *External) subscriptionsChanged() {
	select {
	case e.resubbed <- struct{}{}:
	default:
	}
	e.inbox.wake()
}

// currentRoutes is which subscriptions there are; it is not changed in place.
func (e *External) currentRoutes() *routes {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.routes
}

// Publish sends m and returns once the broker has acknowledged it on the same
// connection, or, of QoS 0, once it was written. ErrNotConnected, or the
// context's error alone: it was not sent. ErrUnacknowledged: it may have been.
func (e *External) Publish(ctx context.Context, m Message) error {
	s, err := e.send(ctx, m)
	if err != nil {
		return err
	}
	return s.wait(ctx)
}

// send hands m to the connection, once the window has room. Messages are sent
// in the order of calls. What has become of it the sending tells.
func (e *External) send(ctx context.Context, m Message) (*sending, error) {
	if err := CheckTopic(m.Topic); err != nil {
		return nil, fmt.Errorf("mqtt: publish: %w", err)
	}
	if m.QoS > 2 {
		return nil, fmt.Errorf("mqtt: publish to %s: there is no QoS %d", m.Topic, m.QoS)
	}
	if len(m.Payload) > e.cfg.MaxPacket {
		return nil, fmt.Errorf("mqtt: publish to %s: %d bytes, and %d are the most", m.Topic, len(m.Payload), e.cfg.MaxPacket)
	}
	if m.Expiry > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, m.Expiry)
		defer cancel()
	}
	e.mu.Lock()
	l := e.link
	e.mu.Unlock()
	if l == nil {
		return nil, ErrNotConnected
	}
	m.QoS = min(m.QoS, 1)
	m.Payload = bytes.Clone(m.Payload)
	return l.send(ctx, m)
}

// plainness is whether Bridge was refused.
type plainness int

const (
	plainUnknown plainness = iota
	plainNext              // the connection was cut at CONNECT: try without, once
	plainAlways            // it said so
)

// private says that the broker takes this client for a bridge.
func (e *External) private() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.link != nil && e.link.private
}

// What a broker has retained comes right after it has granted a subscription;
// when none has come for replayQuiet it is taken to be through, and in any case
// after replayLongest.
const (
	replayQuiet   = 200 * time.Millisecond
	replayLongest = 10 * time.Second
)

// replayed says that what the broker had retained has come and was handled.
func (e *External) replayed() bool {
	e.mu.Lock()
	l, routes := e.link, e.routes
	e.mu.Unlock()
	switch {
	case l == nil:
		return false
	case time.Since(l.began) > replayLongest:
		return true
	}
	return l.settled.Load() == routes && e.inbox.len() == 0 && time.Since(time.Unix(0, l.replayAt.Load())) > replayQuiet
}

// subscription is one Subscribe.
type subscription struct {
	filter  string
	qos     byte
	handle  Handler
	fetched uint64 // epoch of the link on which its retained messages were asked for; owned by link.subscribe

	running sync.Mutex
	ended   bool // guarded by running
}

// call has the handler take m, unless the subscription has ended.
func (s *subscription) call(m Message) error {
	s.running.Lock()
	defer s.running.Unlock()
	if s.ended {
		return nil
	}
	return s.handle(m)
}

// end waits for the handler to have returned; it is not called again.
func (s *subscription) end() {
	s.running.Lock()
	s.ended = true
	s.running.Unlock()
}

// routes finds the subscriptions that want a topic. It is immutable.
type routes struct {
	exact map[string][]*subscription
	wild  []*subscription
}

func newRoutes(subs []*subscription) *routes {
	r := &routes{exact: make(map[string][]*subscription, len(subs))}
	for _, s := range subs {
		if strings.ContainsAny(s.filter, "+#") || strings.HasPrefix(s.filter, "$share/") {
			r.wild = append(r.wild, s)
		} else {
			r.exact[s.filter] = append(r.exact[s.filter], s)
		}
	}
	return r
}

func (r *routes) find(topic string) []*subscription {
	found := r.exact[topic]
	found = found[:len(found):len(found)]
	for _, s := range r.wild {
		if Match(s.filter, topic) {
			found = append(found, s)
		}
	}
	return found
}
