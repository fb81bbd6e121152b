package mqtt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"
	"github.com/eclipse/paho.mqtt.golang/packets"
)

// link is one connection, with a client of its own: a client that reconnects
// completes the tokens of messages that it never delivered, so what a token
// says is only worth something within one connection.
type link struct {
	e     *External
	epoch uint64

	private bool // the broker is asked to take us for a bridge, and does if it accepts

	client paho.Client
	conn   *packetConn   // set by dial, before client is connected
	lost   chan struct{} // closed when the client has given up the connection
	out    chan *sending
	window chan struct{} // a token per message in flight

	leaving atomic.Bool // nothing more is taken in

	done chan struct{} // closed when the link has ended
	left chan struct{} // closed too if it was ended by this side
	once sync.Once
	why  error // set before they are closed

	// Owned by the client's goroutine that calls received.
	publishes uint64

	settled  atomic.Pointer[routes] // those that the broker has granted, or refused
	began    time.Time
	replayAt atomic.Int64 // when a retained message came last, or settled changed; unix ns

	// Owned by subscribe.
	granted map[string]byte
	refused map[string]bool
}

func newLink(e *External, epoch uint64) *link {
	return &link{
		e:       e,
		epoch:   epoch,
		began:   time.Now(),
		lost:    make(chan struct{}),
		out:     make(chan *sending),
		window:  make(chan struct{}, e.cfg.Window),
		done:    make(chan struct{}),
		left:    make(chan struct{}),
		granted: make(map[string]byte),
		refused: make(map[string]bool),
	}
}

// fail ends the link from this side; the first reason stays. What comes while it
// ends is not taken in.
func (l *link) fail(why error) {
	l.once.Do(func() {
		l.why = why
		close(l.left)
		close(l.done)
	})
}

// gone ends the link because the other side has. All that came is taken in: it
// may be what a broker had acknowledged and not saved when it died.
func (l *link) gone(why error) {
	l.once.Do(func() {
		l.why = why
		close(l.done)
	})
}

// connect dials and says CONNECT.
func (l *link) connect(ctx context.Context) error {
	cfg := &l.e.cfg
	opts := paho.NewClientOptions()
	opts.Servers = []*url.URL{l.e.url}
	opts.SetClientID(l.e.id)
	opts.SetProtocolVersion(4)
	if l.private = cfg.Bridge && l.e.plain == plainUnknown; l.private {
		opts.SetProtocolVersion(0x84)
	} else if l.e.plain == plainNext {
		l.e.plain = plainUnknown
	}
	opts.SetCleanSession(cfg.CleanSession)
	opts.SetAutoReconnect(false)
	opts.SetConnectRetry(false)
	opts.SetConnectTimeout(connectTimeout)
	opts.SetWriteTimeout(writeTimeout)
	opts.SetKeepAlive(cfg.KeepAlive)
	// A flood of retained messages may stand before a PINGRESP.
	opts.SetPingTimeout(cfg.KeepAlive)
	opts.SetStore(noStore{})
	opts.SetOrderMatters(true)
	opts.SetAutoAckDisabled(true)
	opts.SetDefaultPublishHandler(func(_ paho.Client, m paho.Message) { l.received(m) })
	opts.SetConnectionLostHandler(func(_ paho.Client, err error) {
		l.gone(fmt.Errorf("connection lost: %w", err))
		close(l.lost)
	})
	if cfg.Username != "" {
		opts.SetUsername(cfg.Username)
	}
	opts.SetPassword(cfg.Password)
	if cfg.PasswordFile != "" {
		password, err := os.ReadFile(cfg.PasswordFile)
		if err != nil {
			return fmt.Errorf("the password for the MQTT broker: %w", err)
		}
		opts.SetPassword(strings.TrimRight(string(password), "\r\n"))
	}
	if w := cfg.Will; w != nil {
		opts.SetBinaryWill(w.Topic, w.Payload, min(w.QoS, 1), w.Retain)
	}
	connected := func() bool { return true }
	opts.SetCustomOpenConnectionFn(func(*url.URL, paho.ClientOptions) (net.Conn, error) {
		raw, err := dial(ctx, l.e.url, cfg)
		if err != nil {
			return nil, err
		}
		conn := newPacketConn(raw, cfg.MaxPacket)
		l.conn = conn
		connected = context.AfterFunc(ctx, func() { conn.fail(ctx.Err()) })
		return conn, nil
	})

	l.client = paho.NewClient(opts)
	token := l.client.Connect().(*paho.ConnectToken)
	<-token.Done()
	connected()
	err := token.Error()
	if err == nil {
		return nil
	}
	if l.private && (token.ReturnCode() == packets.ErrRefusedBadProtocolVersion || errors.Is(err, errStrange)) {
		l.e.plain = plainAlways
	} else if l.private && errors.Is(err, io.EOF) {
		l.e.plain = plainNext
	}
	return connectError(token.ReturnCode(), err)
}

// connectError says what to do about a refusal.
func connectError(code byte, err error) error {
	switch code {
	case packets.ErrRefusedBadUsernameOrPassword, packets.ErrRefusedNotAuthorised:
		return fmt.Errorf("the MQTT broker refuses this client: %w; check username and passwordFile, or the client certificate", err)
	case packets.ErrRefusedIDRejected:
		return fmt.Errorf("the MQTT broker refuses this client: %w; set another clientID", err)
	}
	return fmt.Errorf("connect to the MQTT broker: %w", err)
}

// run serves the connection until it ends or ctx does, and returns why.
func (l *link) run(ctx context.Context) error {
	var parts sync.WaitGroup
	parts.Go(l.subscribe)
	parts.Go(l.write)
	if b := l.e.cfg.Birth; b != nil {
		parts.Go(func() { _ = l.announce(*b) })
	}

	select {
	case <-l.done:
	case <-ctx.Done():
		// Acknowledge what was handled, so that it does not come again, and say
		// goodbye, else the broker would publish the will.
		l.leaving.Store(true)
		l.e.inbox.settle(time.Second)
		l.client.Disconnect(1000)
		l.fail(errors.New("stopped"))
		l.conn.fail(l.why)
		parts.Wait()
		return l.why
	}
	// The client does not take a closed connection for a lost one, so the
	// reason reaches it as an error of reading.
	l.conn.fail(l.why)
	<-l.lost
	parts.Wait()
	return l.why
}

// announce publishes Birth. If it fails the link has ended.
func (l *link) announce(m Message) error {
	ctx, cancel := context.WithTimeout(context.Background(), l.e.cfg.AckTimeout)
	defer cancel()
	m.QoS = min(m.QoS, 1)
	s, err := l.send(ctx, m)
	if err != nil {
		return err
	}
	return s.wait(ctx)
}

// received is called by the client for each message, in order, on the goroutine
// that everything it reads goes through, answers to pings too: it only enqueues.
func (l *link) received(m paho.Message) {
	l.publishes++
	e := l.e
	e.counts.received.Add(1)
	switch {
	case l.conn.wasCut(l.publishes):
		e.counts.oversize.Add(1)
		e.often.Warn("a message was too long and is dropped", "topic", m.Topic(), "limit", e.cfg.MaxPacket)
		e.ack(m)
		return
	case CheckTopic(m.Topic()) != nil:
		e.counts.invalid.Add(1)
		e.ack(m)
		return
	}
	if m.Retained() {
		l.replayAt.Store(time.Now().UnixNano())
	}
	e.inbox.put(&arrival{
		link: l,
		m:    m,
		Message: Message{
			Topic:     m.Topic(),
			Payload:   m.Payload(),
			QoS:       m.Qos(),
			Retain:    m.Retained(),
			Dup:       m.Duplicate(),
			AskRetain: l.private && m.Retained(),
			Received:  time.Now(),
		},
	})
}

// ack acknowledges m to the broker. That of a connection that has ended goes
// nowhere, and the message comes again.
func (e *External) ack(m paho.Message) {
	m.Ack()
	e.counts.acked.Add(1)
}

// sending is a message on its way out.
type sending struct {
	m    Message
	done chan struct{}
	err  error // set before done is closed
}

func (s *sending) finish(err error) {
	s.err = err
	close(s.done)
}

// wait returns what has become of it.
func (s *sending) wait(ctx context.Context) error {
	select {
	case <-s.done:
		return s.err
	default:
	}
	select {
	case <-s.done:
		return s.err
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", ErrUnacknowledged, ctx.Err())
	}
}

// send hands m to write, once the window has room.
func (l *link) send(ctx context.Context, m Message) (*sending, error) {
	if m.QoS > 0 {
		select {
		case l.window <- struct{}{}:
		case <-l.done:
			return nil, ErrNotConnected
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	s := &sending{m: m, done: make(chan struct{})}
	var err error
	select {
	case l.out <- s:
		return s, nil
	case <-l.done:
		err = ErrNotConnected
	case <-ctx.Done():
		err = ctx.Err()
	}
	if m.QoS > 0 {
		<-l.window
	}
	return nil, err
}

// write gives the client what is to be sent, one after the other.
func (l *link) write() {
	var waiting sync.WaitGroup
	defer waiting.Wait()
	for {
		select {
		case s := <-l.out:
			token := l.client.Publish(s.m.Topic, s.m.QoS, s.m.Retain, s.m.Payload)
			waiting.Go(func() { l.await(s, token) })
		case <-l.done:
			return
		}
	}
}

// await tells s what becomes of it. A broker that takes a message and never
// says so has, to judge by the field, forgotten it: nothing but a new connection
// makes it answer.
func (l *link) await(s *sending, token paho.Token) {
	timer := time.NewTimer(l.e.cfg.AckTimeout)
	defer timer.Stop()
	if s.m.QoS > 0 {
		defer func() { <-l.window }()
	}
	select {
	case <-token.Done():
		s.finish(publishError(token))
		return
	case <-timer.C:
		l.fail(fmt.Errorf("the MQTT broker has not acknowledged a message for %v", l.e.cfg.AckTimeout))
	case <-l.done:
	}
	// The client leaves the tokens of a kept session open when the connection
	// ends; and of those it completes only what came before the end counts.
	select {
	case <-token.Done():
		s.finish(publishError(token))
	default:
		s.finish(fmt.Errorf("%w: %w", ErrUnacknowledged, l.why))
	}
}

func publishError(token paho.Token) error {
	err := token.Error()
	switch {
	case err == nil:
		return nil
	case errors.Is(err, paho.ErrNotConnected):
		return ErrNotConnected
	}
	return fmt.Errorf("%w: %w", ErrUnacknowledged, err)
}

// subscribe keeps the broker's idea of what we want equal to ours: all of it
// after each connect, since a broker may have lost a session, and changes as
// they come.
func (l *link) subscribe() {
	first := true
	for {
		if err := l.reconcile(first); err != nil {
			l.gone(err)
			return
		}
		first = false
		select {
		case <-l.e.resubbed:
		case <-l.done:
			return
		}
	}
}

func (l *link) reconcile(first bool) error {
	l.e.mu.Lock()
	subs, routes := l.e.subs, l.e.routes
	l.e.mu.Unlock()

	want := wireFilters(subs, l.refused)
	ask := make(map[string]byte)
	for filter, qos := range want {
		if had, ok := l.granted[filter]; (!ok || had < qos) && !l.refused[filter] {
			ask[filter] = qos
		}
	}
	for _, s := range subs {
		if s.fetched == l.epoch {
			continue
		}
		s.fetched = l.epoch
		// Retained messages come with a SUBSCRIBE of this filter, or, at the
		// first, of the one that covers it.
		if !first && !l.refused[s.filter] {
			ask[s.filter] = max(s.qos, want[s.filter])
		}
	}
	if len(ask) > 0 {
		if err := l.ask(ask); err != nil {
			return err
		}
		// What was to cover others and was refused leaves them uncovered.
		again := wireFilters(subs, l.refused)
		for filter := range again {
			if _, ok := l.granted[filter]; !ok && !l.refused[filter] {
				return l.reconcile(first)
			}
		}
		want = again
	}
	if err := l.drop(want); err != nil {
		return err
	}
	l.replayAt.Store(time.Now().UnixNano())
	l.settled.Store(routes)
	return nil
}

// subscribeBatch bounds one SUBSCRIBE.
const subscribeBatch = 100

// ask subscribes to filters.
func (l *link) ask(filters map[string]byte) error {
	names := make([]string, 0, len(filters))
	for f := range filters {
		names = append(names, f)
	}
	slices.Sort(names)
	refusals := len(l.refused)
	for batch := range slices.Chunk(names, subscribeBatch) {
		request := make(map[string]byte, len(batch))
		for _, f := range batch {
			request[f] = filters[f]
		}
		l.conn.expectCodes(len(batch))
		token := l.client.SubscribeMultiple(request, nil).(*paho.SubscribeToken)
		if err := l.answered(token, "SUBSCRIBE"); err != nil {
			return err
		}
		results := token.Result()
		for _, f := range batch {
			code, ok := results[f]
			if !ok {
				return fmt.Errorf("the MQTT broker's SUBACK leaves out %s", f)
			}
			if code >= 0x80 {
				l.refused[f] = true
				delete(l.granted, f)
			} else {
				// A lower QoS than asked for is all there is; do not ask on.
				l.granted[f] = filters[f]
			}
		}
	}
	if len(l.refused) != refusals {
		l.e.setRefused(slices.Sorted(maps.Keys(l.refused)))
	}
	return nil
}

// drop unsubscribes from what is not wanted.
func (l *link) drop(want map[string]byte) error {
	var names []string
	for f := range l.granted {
		if _, ok := want[f]; !ok {
			names = append(names, f)
		}
	}
	slices.Sort(names)
	for batch := range slices.Chunk(names, subscribeBatch) {
		if err := l.answered(l.client.Unsubscribe(batch...), "UNSUBSCRIBE"); err != nil {
			return err
		}
		for _, f := range batch {
			delete(l.granted, f)
		}
	}
	return nil
}

func (l *link) answered(token paho.Token, what string) error {
	timer := time.NewTimer(l.e.cfg.AckTimeout)
	defer timer.Stop()
	select {
	case <-token.Done():
		if err := token.Error(); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		return nil
	case <-timer.C:
		return fmt.Errorf("the MQTT broker has not answered a %s for %v", what, l.e.cfg.AckTimeout)
	case <-l.done:
		return l.why
	}
}

// wireFilters is what to subscribe to for subs: those filters that no other
// covers, each with the highest QoS of all it stands for. One that the broker
// refused covers nothing.
func wireFilters(subs []*subscription, refused map[string]bool) map[string]byte {
	all := make(map[string]byte, len(subs))
	var wild []string
	for _, s := range subs {
		if had, ok := all[s.filter]; !ok {
			all[s.filter] = s.qos
			if strings.ContainsAny(s.filter, "+#") && !strings.HasPrefix(s.filter, "$share/") && !refused[s.filter] {
				wild = append(wild, s.filter)
			}
		} else {
			all[s.filter] = max(had, s.qos)
		}
	}
	// The widest of all that cover a filter is itself covered by none, because
	// no two distinct filters cover each other.
	wire := make(map[string]byte, len(all))
	for filter, qos := range all {
		top := filter
		if !strings.HasPrefix(filter, "$share/") {
			for _, w := range wild {
				if w != top && Covers(w, top) {
					top = w
				}
			}
		}
		wire[top] = max(wire[top], qos)
	}
	return wire
}

// noStore keeps nothing: see External.
type noStore struct{}

func (noStore) Open()                             {}
func (noStore) Put(string, packets.ControlPacket) {}
func (noStore) Get(string) packets.ControlPacket  { return nil }
func (noStore) All() []string                     { return nil }
func (noStore) Del(string)                        {}
func (noStore) Close()                            {}
func (noStore) Reset()                            {}
