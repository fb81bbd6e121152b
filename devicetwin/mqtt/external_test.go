package mqtt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/eclipse/paho.mqtt.golang/packets"
)

// heard collects messages.
type heard struct {
	mu   sync.Mutex
	msgs []Message
}

func (h *heard) handle(m Message) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	m.Payload = bytes.Clone(m.Payload)
	h.msgs = append(h.msgs, m)
	return nil
}

func (h *heard) len() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.msgs)
}

func (h *heard) all() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var all []string
	for _, m := range h.msgs {
		all = append(all, m.Topic+"="+string(m.Payload))
	}
	return all
}

func subscribe(t testing.TB, b Broker, filter string, qos byte, h Handler) (cancel func()) {
	t.Helper()
	cancel, err := b.Subscribe(filter, qos, h)
	if err != nil {
		t.Fatal(err)
	}
	return cancel
}

func publish(t testing.TB, b Broker, m Message) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := b.Publish(ctx, m); err != nil {
		t.Fatal(err)
	}
}

func TestExternalTalksToMosquitto(t *testing.T) {
	m := startMosquitto(t)
	m.pub("-t", "kept/x", "-m", "old", "-r", "-q", "1")
	var a heard
	e := runExternal(t, ExternalConfig{URL: m.url(), Node: "n1"}, func(e *External) {
		subscribe(t, e, "kept/#", 1, a.handle)
		subscribe(t, e, "dev/+/state", 1, a.handle)
	})
	subscribed(t, e)
	m.pub("-t", "dev/1/state", "-m", "on", "-q", "1")
	m.pub("-t", "dev/2/state", "-m", "off", "-q", "0")
	eventually(t, "three messages", func() bool { return a.len() == 3 })
	if got := a.all(); !slices.Equal(got, []string{"kept/x=old", "dev/1/state=on", "dev/2/state=off"}) {
		t.Errorf("got %v", got)
	}
	if !a.msgs[0].Retain || a.msgs[1].Retain {
		t.Error("which was retained is not told")
	}

	publish(t, e, Message{Topic: "dev/3/state", Payload: []byte("mine"), QoS: 2})
	publish(t, e, Message{Topic: "dev/3/state", Payload: []byte("mine too")})
	eventually(t, "own messages", func() bool { return a.len() == 5 })

	st := e.State()
	if st.Mode != ModeExternal || st.Address != m.url() || !st.Connected || st.Error != "" || st.Since.IsZero() {
		t.Errorf("state %+v", st)
	}
}

// TestExternalResubscribes: the broker has lost everything with its restart.
func TestExternalResubscribes(t *testing.T) {
	m := startMosquitto(t)
	var a heard
	e := runExternal(t, ExternalConfig{URL: m.url()}, func(e *External) { subscribe(t, e, "a/#", 1, a.handle) })
	subscribed(t, e)
	for i := range 3 {
		m.kill()
		eventually(t, "loss noticed", func() bool { return !e.State().Connected })
		if err := e.Publish(context.Background(), Message{Topic: "a/b", QoS: 1}); !errors.Is(err, ErrNotConnected) {
			t.Errorf("published without a connection: %v", err)
		}
		m.start()
		connected(t, e)
		subscribed(t, e)
		m.pub("-t", "a/b", "-m", fmt.Sprint(i), "-q", "1")
		eventually(t, "message after reconnect", func() bool { return a.len() == i+1 })
	}
	if s := e.Stats(); s.Connects != 4 {
		t.Errorf("%d connects", s.Connects)
	}
}

// TestExternalSessionKeeps: what came while the node was off, or before it had
// subscribed, is handed over.
func TestExternalSessionKeeps(t *testing.T) {
	m := startMosquitto(t)
	cfg := ExternalConfig{URL: m.url(), Node: "n1"}
	e := newExternal(t, cfg)
	stop := runUntilEnd(t, e)
	var a heard
	subscribe(t, e, "a/#", 1, a.handle)
	subscribed(t, e)
	stop()
	for i := range 30 {
		m.pub("-t", "a/b", "-m", fmt.Sprint(i), "-q", "1")
	}
	again := runExternal(t, cfg, nil)
	eventually(t, "a window of unclaimed messages", func() bool { return again.Stats().Received == 20 })
	if n := again.Stats().Acked; n != 0 {
		t.Errorf("%d messages acknowledged that nobody has taken", n)
	}
	subscribe(t, again, "a/#", 1, a.handle)
	eventually(t, "all that was queued", func() bool { return a.len() == 30 })
	for i, got := range a.all() {
		if got != fmt.Sprintf("a/b=%d", i) {
			t.Fatalf("message %d is %s", i, got)
		}
	}
}

// TestExternalDropsWhatNobodyWants: what a session brings and nobody claims
// must not block the broker's window for good.
func TestExternalDropsWhatNobodyWants(t *testing.T) {
	m := startMosquitto(t)
	cfg := ExternalConfig{URL: m.url(), Unclaimed: 200 * time.Millisecond}
	e := newExternal(t, cfg)
	stop := runUntilEnd(t, e)
	subscribe(t, e, "old/#", 1, func(Message) error { return nil })
	subscribed(t, e)
	stop()
	for i := range 30 {
		m.pub("-t", "old/b", "-m", fmt.Sprint(i), "-q", "1")
	}
	var a heard
	again := runExternal(t, cfg, func(e *External) { subscribe(t, e, "new/#", 1, a.handle) })
	eventually(t, "unclaimed messages dropped", func() bool { return again.Stats().Unclaimed == 30 })
	subscribed(t, again)
	m.pub("-t", "new/b", "-m", "x", "-q", "1")
	eventually(t, "wanted message", func() bool { return a.len() == 1 })
}

// TestExternalComesOnce: a message that several filters want comes once, and
// retained messages come to a subscriber that is late and covered by another.
func TestExternalComesOnce(t *testing.T) {
	m := startMosquitto(t, "allow_duplicate_messages true")
	m.pub("-t", "a/kept", "-m", "k", "-r")
	var wide, narrow, late heard
	e := runExternal(t, ExternalConfig{URL: m.url()}, func(e *External) {
		subscribe(t, e, "a/#", 0, wide.handle)
		subscribe(t, e, "a/+/c", 1, narrow.handle)
		subscribe(t, e, "a/b/c", 1, narrow.handle)
	})
	subscribed(t, e)
	eventually(t, "retained", func() bool { return wide.len() == 1 })
	m.pub("-t", "a/b/c", "-m", "1", "-q", "1")
	m.pub("-t", "a/end", "-m", "1", "-q", "1")
	eventually(t, "messages", func() bool { return wide.len() == 3 })
	if got := e.Stats().Received; got != 3 {
		t.Errorf("%d messages came for 3", got)
	}
	if narrow.len() != 2 {
		t.Errorf("narrow filters heard %v", narrow.all())
	}

	cancel := subscribe(t, e, "a/kept", 1, late.handle)
	eventually(t, "retained for the late one", func() bool { return late.len() == 1 })
	subscribed(t, e)
	before := e.Stats().Received
	m.pub("-t", "a/kept", "-m", "2", "-q", "1")
	eventually(t, "message for the late one", func() bool { return late.len() == 2 })
	if got := e.Stats().Received - before; got != 1 {
		t.Errorf("it came %d times", got)
	}
	cancel()
	m.pub("-t", "a/kept", "-m", "3", "-q", "1")
	m.pub("-t", "a/b/c", "-m", "3", "-q", "1")
	eventually(t, "message after cancel", func() bool { return narrow.len() == 4 })
	if late.len() != 2 {
		t.Error("heard after cancel")
	}
}

func TestWireFilters(t *testing.T) {
	for _, c := range []struct {
		subs    map[string]byte
		refused []string
		want    map[string]byte
	}{
		{map[string]byte{"a": 0, "b/+": 1}, nil, map[string]byte{"a": 0, "b/+": 1}},
		{map[string]byte{"#": 0, "a/#": 0, "a/b": 1}, nil, map[string]byte{"#": 1}},
		{map[string]byte{"#": 0, "a/#": 0, "a/b": 1}, []string{"#"}, map[string]byte{"#": 0, "a/#": 1}},
		{map[string]byte{"#": 0, "$SYS/#": 0}, nil, map[string]byte{"#": 0, "$SYS/#": 0}},
		{map[string]byte{"a/#": 0, "$share/g/a/b": 1}, nil, map[string]byte{"a/#": 0, "$share/g/a/b": 1}},
		{map[string]byte{"a/+": 0, "+/b": 1}, nil, map[string]byte{"a/+": 0, "+/b": 1}},
	} {
		var subs []*subscription
		for f, q := range c.subs {
			subs = append(subs, &subscription{filter: f, qos: q})
		}
		refused := make(map[string]bool)
		for _, f := range c.refused {
			refused[f] = true
		}
		if got := wireFilters(subs, refused); fmt.Sprint(got) != fmt.Sprint(c.want) {
			t.Errorf("%v: %v, want %v", c.subs, got, c.want)
		}
	}
}

// TestExternalTellsWhatIsRefused: mosquitto with an ACL plugin, VerneMQ, EMQX
// and the cloud's brokers answer 0x80; here a broker that does so for one.
func TestExternalTellsWhatIsRefused(t *testing.T) {
	b := startFakeBroker(t)
	b.refuse = "secret/#"
	var a heard
	e := runExternal(t, ExternalConfig{URL: b.url()}, func(e *External) {
		subscribe(t, e, "secret/#", 1, a.handle)
		subscribe(t, e, "secret/mine", 1, a.handle)
	})
	subscribed(t, e)
	eventually(t, "refusal told", func() bool { return strings.Contains(e.State().Error, "secret/#") })
	if !e.State().Connected {
		t.Error("not connected")
	}
	// What the refused one would have covered is asked for by itself.
	eventually(t, "the covered one", func() bool { return b.granted("secret/mine") })
}

// TestExternalUnacknowledged: a broker that never answers is left after the
// timeout, and the publisher is told that it may have been taken.
func TestExternalUnacknowledged(t *testing.T) {
	b := startFakeBroker(t)
	b.mute.Store(true)
	e := runExternal(t, ExternalConfig{URL: b.url(), AckTimeout: 300 * time.Millisecond, MinBackoff: time.Millisecond, MaxBackoff: 10 * time.Millisecond}, nil)
	connected(t, e)
	err := e.Publish(context.Background(), Message{Topic: "a", QoS: 1})
	if !errors.Is(err, ErrUnacknowledged) {
		t.Errorf("got %v", err)
	}
	b.mute.Store(false)
	eventually(t, "a second connection", func() bool { return e.Stats().Connects >= 2 && e.State().Connected })
	publish(t, e, Message{Topic: "a", QoS: 1})

	// The caller's patience ends first.
	b.mute.Store(true)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if err := e.Publish(ctx, Message{Topic: "a", QoS: 1}); !errors.Is(err, ErrUnacknowledged) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

// TestExternalTokensOfLostConnections: the client library completes with nil, at
// the next connection, what it never delivered.
func TestExternalTokensOfLostConnections(t *testing.T) {
	b := startFakeBroker(t)
	b.mute.Store(true)
	e := runExternal(t, ExternalConfig{URL: b.url(), Window: 5}, nil)
	connected(t, e)
	results := make(chan error, 12)
	for range cap(results) {
		go func() { results <- e.Publish(context.Background(), Message{Topic: "a", QoS: 1}) }()
	}
	eventually(t, "a window full", func() bool { return b.publishes.Load() == 5 })
	b.cut()
	sent, unsent := 0, 0
	for range cap(results) {
		switch err := <-results; {
		case errors.Is(err, ErrUnacknowledged):
			sent++
		case errors.Is(err, ErrNotConnected):
			unsent++
		default:
			t.Errorf("got %v", err)
		}
	}
	if sent != 5 || unsent != 7 {
		t.Errorf("%d sent and %d not, of a window of 5", sent, unsent)
	}
}

// TestExternalKeepsOrder: what is sent by one caller arrives in order.
func TestExternalKeepsOrder(t *testing.T) {
	m := startMosquitto(t)
	var a heard
	e := runExternal(t, ExternalConfig{URL: m.url()}, func(e *External) { subscribe(t, e, "o", 1, a.handle) })
	subscribed(t, e)
	ctx := context.Background()
	var last *sending
	for i := range 1000 {
		s, err := e.send(ctx, Message{Topic: "o", QoS: 1, Payload: fmt.Appendf(nil, "%d", i)})
		if err != nil {
			t.Fatal(err)
		}
		last = s
	}
	if err := last.wait(ctx); err != nil {
		t.Fatal(err)
	}
	eventually(t, "all", func() bool { return a.len() == 1000 })
	for i, got := range a.all() {
		if got != fmt.Sprintf("o=%d", i) {
			t.Fatalf("at %d: %s", i, got)
		}
	}
}

// TestExternalRefusedMessageComesAgain: what a handler or the capture could not
// keep is not acknowledged.
func TestExternalRefusedMessageComesAgain(t *testing.T) {
	m := startMosquitto(t)
	var a heard
	var handler, capture atomic.Int32
	e := runExternal(t, ExternalConfig{URL: m.url(), Capture: func(m Message) error {
		if capture.Add(1) == 2 {
			return errors.New("disk full")
		}
		return nil
	}}, func(e *External) {
		subscribe(t, e, "a", 1, func(m Message) error {
			if handler.Add(1) == 1 {
				return errors.New("no")
			}
			return a.handle(m)
		})
	})
	subscribed(t, e)
	m.pub("-t", "a", "-m", "x", "-q", "1")
	eventually(t, "taken at the third time", func() bool { return e.Stats().Acked == 1 })
	if s := e.Stats(); s.Refused != 2 || s.Connects != 3 || a.len() != 2 {
		t.Errorf("%+v, heard %d", s, a.len())
	}
}

// TestExternalSlowHandler: while a handler is stuck the connection lives, and
// the broker is held up by its window.
func TestExternalSlowHandler(t *testing.T) {
	m := startMosquitto(t, "max_queued_messages 0")
	release := make(chan struct{})
	var a heard
	e := runExternal(t, ExternalConfig{URL: m.url(), KeepAlive: time.Second}, func(e *External) {
		subscribe(t, e, "a", 1, func(m Message) error { <-release; return a.handle(m) })
	})
	subscribed(t, e)
	pub := runExternal(t, ExternalConfig{URL: m.url(), ClientID: "pub"}, nil)
	connected(t, pub)
	for i := range 500 {
		publish(t, pub, Message{Topic: "a", QoS: 1, Payload: fmt.Appendf(nil, "%d", i)})
	}
	// More than two keep-alives on, an unanswered ping would have ended it.
	timer := time.NewTimer(2500 * time.Millisecond)
	<-timer.C
	s := e.Stats()
	if s.Connects != 1 || s.Received != 20 || s.Acked != 0 {
		t.Errorf("%+v", s)
	}
	publish(t, e, Message{Topic: "b", QoS: 1}) // the other way is free
	close(release)
	eventually(t, "all", func() bool { return a.len() == 500 })
}

// TestExternalBounds: what a broker sends without waiting for us stays within
// the queue, the newest of each topic arrives, and no retained message is lost.
func TestExternalBounds(t *testing.T) {
	b := startFakeBroker(t)
	gate := make(chan struct{})
	var a heard
	e := runExternal(t, ExternalConfig{URL: b.url(), QueueMessages: 100, KeepAlive: time.Minute}, func(e *External) {
		subscribe(t, e, "#", 1, func(m Message) error { <-gate; return a.handle(m) })
	})
	subscribed(t, e)
	for i := range 10_000 {
		b.send(&packets.PublishPacket{TopicName: fmt.Sprintf("t/%d", i%40), Payload: fmt.Appendf(nil, "%d", i)}, 0, false)
	}
	eventually(t, "the flood read", func() bool { return e.Stats().Received == 10_000 })
	if s := e.Stats(); s.Queued > 101 || s.Shed < 9_800 {
		t.Errorf("%+v", s)
	}
	go func() {
		for i := range 1000 {
			b.send(&packets.PublishPacket{TopicName: fmt.Sprintf("r/%d", i)}, 0, true)
		}
	}()
	close(gate)
	newest, retained := make(map[string]string), make(map[string]bool)
	eventually(t, "retained messages", func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		for _, m := range a.msgs {
			if m.Retain {
				retained[m.Topic] = true
			} else {
				newest[m.Topic] = string(m.Payload)
			}
		}
		return len(retained) == 1000
	})
	for i := range 40 {
		if got, want := newest[fmt.Sprintf("t/%d", i)], fmt.Sprint(9960+i); got != want {
			t.Errorf("t/%d is %q, want %s", i, got, want)
		}
	}
}

// TestExternalRetainedFlood: 50,000 retained messages, of either QoS.
func TestExternalRetainedFlood(t *testing.T) {
	m := startMosquitto(t, "max_queued_messages 0", "max_queued_bytes 0")
	const n = 50_000
	fill := rawClient(t, m.addr, "fill")
	for i := range n {
		fill.write(&packets.PublishPacket{
			FixedHeader: packets.FixedHeader{MessageType: packets.Publish, Retain: true, Qos: byte(i % 50 / 49)},
			MessageID:   uint16(i%60000 + 1), TopicName: fmt.Sprintf("home/%d/config", i), Payload: bytes.Repeat([]byte("x"), 300),
		})
	}
	fill.flush()
	fill.sync()
	for _, qos := range []byte{0, 1} {
		topics := make(map[string]bool)
		var mu sync.Mutex
		live := make(chan struct{})
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		e := newExternal(t, ExternalConfig{URL: m.url(), ClientID: fmt.Sprint("reader", qos), QueueMessages: 1000})
		subscribe(t, e, "home/#", qos, func(m Message) error {
			mu.Lock()
			defer mu.Unlock()
			if m.Retain {
				topics[m.Topic] = true
			}
			return nil
		})
		subscribe(t, e, "live", 1, func(Message) error { close(live); return nil })
		stop := runUntilEnd(t, e)
		deadline := time.Now().Add(60 * time.Second)
		for done := false; !done; time.Sleep(5 * time.Millisecond) {
			mu.Lock()
			done = len(topics) == n
			mu.Unlock()
			if time.Now().After(deadline) {
				t.Fatalf("QoS %d: %d of %d came; %+v", qos, len(topics), n, e.Stats())
			}
			if q := e.Stats().Queued; q > 1001 {
				t.Fatalf("QoS %d: %d queued", qos, q)
			}
		}
		runtime.ReadMemStats(&after)
		t.Logf("QoS %d: heap in use %d KiB before, %d KiB after", qos, before.HeapInuse>>10, after.HeapInuse>>10)
		m.pub("-t", "live", "-m", "x", "-q", "1")
		<-live
		stop()
	}
}

// TestExternalTooLong: a message of 10 MB is dropped, acknowledged, and does not
// come back; the next is heard.
func TestExternalTooLong(t *testing.T) {
	m := startMosquitto(t, "max_inflight_messages 1")
	var a heard
	e := runExternal(t, ExternalConfig{URL: m.url()}, func(e *External) { subscribe(t, e, "a/#", 1, a.handle) })
	subscribed(t, e)
	big := filepath.Join(t.TempDir(), "big")
	if err := os.WriteFile(big, make([]byte, 10_000_000), 0o600); err != nil {
		t.Fatal(err)
	}
	m.pub("-t", "a/big", "-q", "1", "-f", big)
	m.pub("-t", "a/big", "-q", "0", "-f", big)
	m.pub("-t", "a/x", "-m", "small", "-q", "1")
	eventually(t, "the small one", func() bool { return a.len() == 1 })
	if s := e.Stats(); s.Oversize != 2 || s.Connects != 1 {
		t.Errorf("%+v", s)
	}
	if err := e.Publish(context.Background(), Message{Topic: "a", Payload: make([]byte, 10_000_000)}); err == nil {
		t.Error("10 MB published")
	}
}

func TestExternalConfigErrors(t *testing.T) {
	for _, c := range []struct {
		cfg  ExternalConfig
		want string
	}{
		{ExternalConfig{}, "scheme"},
		{ExternalConfig{URL: "http://x"}, "scheme"},
		{ExternalConfig{URL: "mqtt://"}, "no host"},
		{ExternalConfig{URL: "mqtt://u:secret@x"}, "passwordFile"},
		{ExternalConfig{URL: "mqtt://x", PasswordFile: "f"}, "username"},
		{ExternalConfig{URL: "mqtts://x", CertFile: "f"}, "key"},
		{ExternalConfig{URL: "mqtt://x", Will: &Message{Topic: "a/#"}}, "wildcard"},
	} {
		_, err := NewExternal(c.cfg)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v", c.cfg, err)
		}
		if err != nil && strings.Contains(err.Error(), "secret") {
			t.Errorf("tells the password: %v", err)
		}
	}
	e, err := NewExternal(ExternalConfig{URL: "mqtts://host"})
	if err != nil || e.State().Address != "mqtts://host:8883" {
		t.Errorf("%+v %v", e.State(), err)
	}
	if _, err := e.Subscribe("a#", 0, nil); err == nil {
		t.Error("bad filter passes")
	}
	if err := e.Publish(context.Background(), Message{Topic: "a/+"}); err == nil || errors.Is(err, ErrNotConnected) {
		t.Error("bad topic passes")
	}
}

// fakeBroker does what brokers should not, or not often.
type fakeBroker struct {
	t      *testing.T
	l      net.Listener
	refuse string // filter
	// refuseBridge is the code for clients that say they are bridges; 255: none.
	refuseBridge byte
	mute         atomic.Bool
	publishes    atomic.Int32

	mu      sync.Mutex
	conn    net.Conn
	filters map[string]bool
}

func startFakeBroker(t *testing.T) *fakeBroker {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &fakeBroker{t: t, l: l, filters: make(map[string]bool)}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			b.mu.Lock()
			b.conn = c
			b.mu.Unlock()
			serving.Go(func() { b.serve(c) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		b.cut()
		serving.Wait()
	})
	return b
}

func (b *fakeBroker) url() string { return "mqtt://" + b.l.Addr().String() }

func (b *fakeBroker) cut() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.conn != nil {
		b.conn.Close()
	}
}

func (b *fakeBroker) granted(filter string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.filters[filter]
}

func (b *fakeBroker) send(p *packets.PublishPacket, qos byte, retain bool) {
	p.FixedHeader = packets.FixedHeader{MessageType: packets.Publish, Qos: qos, Retain: retain}
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := p.Write(b.conn); err != nil {
		b.t.Error(err)
	}
}

func (b *fakeBroker) answer(p packets.ControlPacket) {
	b.mu.Lock()
	defer b.mu.Unlock()
	_ = p.Write(b.conn)
}

func (b *fakeBroker) serve(c net.Conn) {
	defer c.Close()
	for {
		p, err := packets.ReadPacket(c)
		if err != nil {
			return
		}
		switch p := p.(type) {
		case *packets.ConnectPacket:
			ack := packets.NewControlPacket(packets.Connack).(*packets.ConnackPacket)
			if p.ProtocolVersion&0x80 != 0 {
				ack.ReturnCode = b.refuseBridge
			}
			if ack.ReturnCode == 255 {
				return
			}
			b.answer(ack)
		case *packets.SubscribePacket:
			ack := packets.NewControlPacket(packets.Suback).(*packets.SubackPacket)
			ack.MessageID = p.MessageID
			for i, f := range p.Topics {
				code := p.Qoss[i]
				if f == b.refuse {
					code = 0x80
				} else {
					b.mu.Lock()
					b.filters[f] = true
					b.mu.Unlock()
				}
				ack.ReturnCodes = append(ack.ReturnCodes, code)
			}
			b.answer(ack)
		case *packets.PublishPacket:
			b.publishes.Add(1)
			if p.Qos == 1 && !b.mute.Load() {
				ack := packets.NewControlPacket(packets.Puback).(*packets.PubackPacket)
				ack.MessageID = p.MessageID
				b.answer(ack)
			}
		case *packets.PingreqPacket:
			b.answer(packets.NewControlPacket(packets.Pingresp))
		case *packets.DisconnectPacket:
			return
		}
	}
}

// raw is a client of bare packets.
type raw struct {
	t    testing.TB
	conn net.Conn
	buf  bytes.Buffer
}

func rawClient(t testing.TB, addr, id string) *raw {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	r := &raw{t: t, conn: conn}
	c := packets.NewControlPacket(packets.Connect).(*packets.ConnectPacket)
	c.ProtocolName, c.ProtocolVersion, c.CleanSession, c.ClientIdentifier = "MQTT", 4, true, id
	r.write(c)
	r.flush()
	if p, err := packets.ReadPacket(conn); err != nil || p.(*packets.ConnackPacket).ReturnCode != 0 {
		t.Fatalf("CONNECT: %v %v", p, err)
	}
	return r
}

func (r *raw) write(p packets.ControlPacket) {
	if err := p.Write(&r.buf); err != nil {
		r.t.Fatal(err)
	}
}

// flush sends what was written, reading nothing: answers must fit the socket's
// buffer, or sync must follow.
func (r *raw) flush() {
	r.t.Helper()
	if _, err := r.conn.Write(r.buf.Bytes()); err != nil {
		r.t.Fatal(err)
	}
	r.buf.Reset()
}

// sync waits until the broker has handled all.
func (r *raw) sync() {
	r.t.Helper()
	r.write(packets.NewControlPacket(packets.Pingreq))
	r.flush()
	for {
		p, err := packets.ReadPacket(r.conn)
		if err != nil && !errors.Is(err, io.EOF) {
			r.t.Fatal(err)
		}
		if _, ok := p.(*packets.PingrespPacket); ok || err != nil {
			return
		}
	}
}
