package mqtt

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
)

// Each test here is a thing that mochi-mqtt 2.7.9 by itself gets wrong.

// numbered publishes count messages of QoS 1 and gives once all are acknowledged.
func (w *wire) numbered(topic string, from, count int) {
	w.t.Helper()
	const window = 50
	unacked := 0
	for i := from; i < from+count; i++ {
		w.write(publishOf(topic, fmt.Sprint(i), 1, uint16(i%60000+1)))
		if unacked++; unacked == window {
			for ; unacked > 0; unacked-- {
				w.wantAck()
			}
		}
	}
	for ; unacked > 0; unacked-- {
		w.wantAck()
	}
}

func (w *wire) wantAck() {
	w.t.Helper()
	if pk := w.want(packets.Puback); pk.ReasonCode != 0 {
		w.t.Fatalf("PUBACK %#x", pk.ReasonCode)
	}
}

// take reads a message of QoS 1 and acknowledges it.
func (w *wire) take() packets.Packet {
	w.t.Helper()
	pk := w.want(packets.Publish)
	w.write(ackOf(packets.Puback, pk.PacketID))
	return pk
}

func TestMochiOrderOfQueuedMessages(t *testing.T) {
	b := startEmbedded(t, EmbeddedConfig{})
	sub := dialWire(t, b.addr(), connectAs("sub", 4, false))
	sub.subscribe(packets.Subscription{Filter: "q", Qos: 1})
	sub.net.Close()
	eventually(t, "it is away", func() bool { return b.Stats().Clients == 0 })

	dialWire(t, b.addr(), connectAs("pub", 4, true)).numbered("q", 0, 1000)

	sub = dialWire(t, b.addr(), connectAs("sub", 4, false))
	if !sub.connack.SessionPresent {
		t.Fatal("the session is gone")
	}
	for i := range 1000 {
		if got := string(sub.take().Payload); got != fmt.Sprint(i) {
			t.Fatalf("message %d is %s", i, got)
		}
	}
	sub.ping()
}

// In flight when the connection ends, and more behind: both in order, the
// former marked as sent before.
func TestMochiOrderOfInflightMessages(t *testing.T) {
	b := startEmbedded(t, EmbeddedConfig{})
	connect := connectAs("sub", 5, false)
	connect.Properties = packets.Properties{ReceiveMaximum: 30, SessionExpiryInterval: 100, SessionExpiryIntervalFlag: true}
	sub := dialWire(t, b.addr(), connect)
	sub.subscribe(packets.Subscription{Filter: "q", Qos: 2})
	pub := dialWire(t, b.addr(), connectAs("pub", 4, true))
	pub.numbered("q", 0, 100)
	for range 30 {
		sub.want(packets.Publish)
	}
	sub.net.Close()
	eventually(t, "it is away", func() bool { return b.Stats().Clients == 1 })
	connect.Properties.ReceiveMaximum = 7
	sub = dialWire(t, b.addr(), connect)
	for i := range 100 {
		pk := sub.take()
		if string(pk.Payload) != fmt.Sprint(i) || pk.FixedHeader.Dup != (i < 30) {
			t.Fatalf("message %d is %s, dup %v", i, pk.Payload, pk.FixedHeader.Dup)
		}
	}
}

// After a restart nothing that was queued is there, which CONNACK says, and the
// client stays connected.
func TestMochiRestartWithQueuedMessages(t *testing.T) {
	addr := freeAddr(t)
	db := newMemoryDB()
	cfg := EmbeddedConfig{Listeners: []ListenerConfig{{Address: addr}}, Retained: db}
	b, stop := runEmbedded(t, cfg)
	sub := dialWire(t, addr, connectAs("sub", 4, false))
	sub.subscribe(packets.Subscription{Filter: "q/#", Qos: 1})
	sub.net.Close()
	eventually(t, "it is away", func() bool { return b.Stats().Clients == 0 })
	pub := dialWire(t, addr, connectAs("pub", 4, true))
	pub.numbered("q/1", 0, 100)
	pub.write(retained(publishOf("q/kept", "kept", 1, 1)))
	pub.wantAck()
	stop()

	startEmbedded(t, cfg)
	for range 5 {
		sub = dialWire(t, addr, connectAs("sub", 4, false))
		if sub.connack.SessionPresent {
			sub.net.Close()
			continue
		}
		sub.ping()
		sub.subscribe(packets.Subscription{Filter: "q/#", Qos: 1})
		if got := sub.take(); string(got.Payload) != "kept" || !got.FixedHeader.Retain {
			t.Fatalf("got %q", got.Payload)
		}
		sub.ping()
		sub.write(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Disconnect}})
		sub.wantClosed()
	}
}

func TestMochiDeafAfterFastReconnect(t *testing.T) {
	b := startEmbedded(t, EmbeddedConfig{})
	pub := dialWire(t, b.addr(), connectAs("pub", 4, true))
	for i := range 600 {
		sub := dialWire(t, b.addr(), connectAs("sub", 4+byte(i%2), true))
		sub.subscribe(packets.Subscription{Filter: "s", Qos: 1})
		pub.numbered("s", i, 1)
		if got := string(sub.want(packets.Publish).Payload); got != fmt.Sprint(i) {
			t.Fatalf("connection %d heard %s", i, got)
		}
		switch i % 3 { // unacknowledged in each case
		case 0:
			sub.net.Close()
		case 1:
			sub.write(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Disconnect}})
		case 2: // it is taken over
		}
	}
}

// A subscriber with a session comes and goes: all that was acknowledged to the
// publisher arrives, and in order.
func TestMochiLossWhileTheSubscriberReconnects(t *testing.T) {
	const count = 10000
	b := startEmbedded(t, EmbeddedConfig{})
	first := dialWire(t, b.addr(), connectAs("sub", 4, false))
	first.subscribe(packets.Subscription{Filter: "s", Qos: 1})
	pub := dialWire(t, b.addr(), connectAs("pub", 4, true))
	var wg sync.WaitGroup
	wg.Go(func() { pub.numbered("s", 0, count) })
	next, reconnects := 0, 0
	w := first
	for next < count {
		// Some are read and not acknowledged, some not even read.
		for range 37 {
			pk, err := w.next()
			if err != nil {
				t.Fatal(err)
			}
			if n := fmt.Sprint(next); string(pk.Payload) == n {
				next++
			} else if !pk.FixedHeader.Dup {
				t.Fatalf("got %s (dup %v), want %s", pk.Payload, pk.FixedHeader.Dup, n)
			}
			if err := w.tryWrite(ackOf(packets.Puback, pk.PacketID)); err != nil {
				t.Fatal(err)
			}
			if next == count {
				break
			}
		}
		if next < count {
			if reconnects%2 == 0 {
				w.net.Close()
			}
			w = dialWire(t, b.addr(), connectAs("sub", 4, false))
			if !w.connack.SessionPresent {
				t.Fatal("the session is gone")
			}
			reconnects++
		}
	}
	wg.Wait()
	if reconnects < 200 {
		t.Errorf("only %d reconnects", reconnects)
	}
}

// A subscriber that is slow holds up its publisher; nothing is lost.
func TestMochiSlowSubscriber(t *testing.T) {
	const count = 30000
	b := startEmbedded(t, EmbeddedConfig{Limits: Limits{QueueMessages: 500}})
	sub := dialWire(t, b.addr(), connectAs("sub", 4, true))
	sub.subscribe(packets.Subscription{Filter: "s", Qos: 1})
	other := dialWire(t, b.addr(), connectAs("other", 4, true))
	other.subscribe(packets.Subscription{Filter: "s", Qos: 0})
	var wg sync.WaitGroup
	for range 3 {
		pub := dialWire(t, b.addr(), connectAs("", 4, true))
		wg.Go(func() { pub.numbered("s", 0, count/3) })
	}
	eventually(t, "the publishers are held up", func() bool { return b.blockedPublishers() == 3 })
	for range count {
		sub.take()
	}
	wg.Wait()
	sub.ping()
	if s := b.Stats(); s.SlowEnded != 0 {
		t.Errorf("%+v", s)
	}
}

func (b *Embedded) blockedPublishers() (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for c := range b.open {
		if c.blocked.Load() {
			n++
		}
	}
	return n
}

// One that takes nothing at all is ended after a while, is told so, and its
// publisher goes on.
func TestMochiStalledSubscriber(t *testing.T) {
	b := startEmbedded(t, EmbeddedConfig{Limits: Limits{QueueMessages: 50, Inflight: 10, Stall: 200 * time.Millisecond}})
	connect := connectAs("sub", 5, false)
	connect.Properties = packets.Properties{SessionExpiryInterval: 100, SessionExpiryIntervalFlag: true}
	sub := dialWire(t, b.addr(), connect)
	sub.subscribe(packets.Subscription{Filter: "s", Qos: 1})
	pub := dialWire(t, b.addr(), connectAs("pub", 4, true))
	pub.numbered("s", 0, 100)
	if reason := sub.wantClosed(); reason != packets.ErrQuotaExceeded.Code {
		t.Errorf("DISCONNECT %#x", reason)
	}
	if s := b.Stats(); s.SlowEnded != 1 {
		t.Errorf("%+v", s)
	}
	if sub = dialWire(t, b.addr(), connect); sub.connack.SessionPresent {
		t.Error("CONNACK says that the session is still there")
	}
}

// Who is away and gets more than is kept loses its session, and CONNACK says so.
func TestMochiAwayTooLong(t *testing.T) {
	b := startEmbedded(t, EmbeddedConfig{Limits: Limits{QueueMessages: 50, Stall: 200 * time.Millisecond}})
	sub := dialWire(t, b.addr(), connectAs("sub", 4, false))
	sub.subscribe(packets.Subscription{Filter: "s", Qos: 1})
	sub.net.Close()
	eventually(t, "it is away", func() bool { return b.Stats().Clients == 0 })
	dialWire(t, b.addr(), connectAs("pub", 4, true)).numbered("s", 0, 100)
	if sub = dialWire(t, b.addr(), connectAs("sub", 4, false)); sub.connack.SessionPresent {
		t.Error("CONNACK says that the session is still there")
	}
}

// Who publishes in one go more than its queue holds to itself, and two who do
// to each other, do not wait for themselves.
func TestMochiOwnMessages(t *testing.T) {
	b := startEmbedded(t, EmbeddedConfig{Limits: Limits{QueueMessages: 400, Inflight: 10, Stall: 20 * time.Second}})
	var pair [2]*wire
	for i := range pair {
		pair[i] = dialWire(t, b.addr(), connectAs(fmt.Sprint("c", i), 4, true))
		pair[i].subscribe(packets.Subscription{Filter: "both", Qos: 1})
	}
	const each = 450
	for i := range each {
		for _, w := range pair {
			w.write(publishOf("both", fmt.Sprint(i), 1, uint16(i+1)))
		}
	}
	var wg sync.WaitGroup
	for _, w := range pair {
		wg.Go(func() {
			acks, messages := 0, 0
			for acks < each || messages < 2*each {
				pk, err := w.next()
				if err != nil {
					t.Errorf("after %d acknowledgements and %d messages: %v", acks, messages, err)
					return
				}
				if pk.FixedHeader.Type == packets.Puback {
					acks++
					continue
				}
				messages++
				if err := w.tryWrite(ackOf(packets.Puback, pk.PacketID)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if s := b.Stats(); s.SlowEnded != 0 {
		t.Errorf("%+v", s)
	}
}

func TestMochiRetainedFlood(t *testing.T) {
	const count = 50000
	db := newMemoryDB()
	addr := freeAddr(t)
	cfg := EmbeddedConfig{Listeners: []ListenerConfig{{Address: addr}}, Retained: db}
	b, stop := runEmbedded(t, cfg)
	pub := dialWire(t, addr, connectAs("pub", 4, true))
	for i := range count {
		pub.write(retained(publishOf(fmt.Sprintf("flood/%d/%d", i%100, i), fmt.Sprint(i), 0, 0)))
	}
	pub.ping()
	check := func(version byte) {
		t.Helper()
		sub := dialWire(t, addr, connectAs("sub", version, true))
		sub.subscribe(packets.Subscription{Filter: "#", Qos: 1})
		seen := map[string]bool{}
		for range count {
			pk := sub.want(packets.Publish)
			if !pk.FixedHeader.Retain {
				t.Fatalf("%s is not marked as retained", pk.TopicName)
			}
			if pk.FixedHeader.Qos > 0 {
				sub.write(ackOf(packets.Puback, pk.PacketID))
			}
			seen[pk.TopicName] = true
		}
		if len(seen) != count {
			t.Fatalf("%d of %d retained messages came", len(seen), count)
		}
		sub.ping()
	}
	check(4)
	var here heard
	subscribe(t, b, "flood/#", 1, here.handle)
	if here.len() != count {
		t.Errorf("%d of %d retained messages came to this node", here.len(), count)
	}
	stop()
	b, _ = runEmbedded(t, cfg)
	check(5)
	if n := b.Stats().Retained; n != count {
		t.Errorf("%d retained", n)
	}
}

// Retained messages go when they are replaced, or when their sender said so.
func TestMochiRetainedLifetime(t *testing.T) {
	b := startEmbedded(t, EmbeddedConfig{})
	pub := dialWire(t, b.addr(), connectAs("pub", 5, true))
	pub.write(retained(publishOf("for/ever", "x", 1, 1)))
	pub.wantAck()
	short := retained(publishOf("for/now", "x", 1, 2))
	short.Properties.MessageExpiryInterval = 3600
	pub.write(short)
	pub.wantAck()
	b.retained.expire(time.Now().Add(59 * time.Minute))
	if n := b.Stats().Retained; n != 2 {
		t.Errorf("%d retained after 59 minutes", n)
	}
	b.retained.expire(time.Now().Add(10 * 365 * 24 * time.Hour))
	sub := dialWire(t, b.addr(), connectAs("sub", 5, true))
	sub.subscribe(packets.Subscription{Filter: "for/#"})
	if pk := sub.want(packets.Publish); pk.TopicName != "for/ever" {
		t.Errorf("got %q", pk.TopicName)
	}
	sub.ping()
}

func TestMochiPropertiesInPuback(t *testing.T) {
	b := startEmbedded(t, EmbeddedConfig{})
	pub := dialWire(t, b.addr(), connectAs("pub", 5, true))
	for qos := range byte(3) {
		pk := publishOf("p", "x", qos, uint16(qos))
		pk.Properties.User = []packets.UserProperty{{Key: "a", Val: "b"}}
		pk.Properties.ContentType, pk.Properties.ResponseTopic = "text/plain", "answer"
		pk.Properties.CorrelationData = []byte("c")
		pub.write(pk)
		if qos == 0 {
			continue
		}
		if ack := pub.want([]byte{0, packets.Puback, packets.Pubrec}[qos]); ack.FixedHeader.Remaining != 2 {
			t.Errorf("QoS %d: the acknowledgement has %d bytes", qos, ack.FixedHeader.Remaining)
		}
	}
}

// Packet ids of the two directions have nothing to do with each other.
func TestMochiSamePacketIDBothWays(t *testing.T) {
	b := startEmbedded(t, EmbeddedConfig{})
	c := dialWire(t, b.addr(), connectAs("c", 5, true))
	c.subscribe(packets.Subscription{Filter: "in", Qos: 2})
	publish(t, b, Message{Topic: "in", Payload: []byte("x"), QoS: 2})
	in := c.want(packets.Publish)
	// While that is unacknowledged, the client uses its id for its own.
	c.write(publishOf("out", "y", 2, in.PacketID))
	c.want(packets.Pubrec)
	c.write(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Subscribe, Qos: 1}, PacketID: in.PacketID,
		Filters: packets.Subscriptions{{Filter: "other"}}})
	if codes := c.want(packets.Suback).ReasonCodes; codes[0] != 0 {
		t.Errorf("SUBACK %#x", codes)
	}
	c.write(ackOf(packets.Pubrec, in.PacketID))
	if pk := c.want(packets.Pubrel); pk.PacketID != in.PacketID || pk.ReasonCode != 0 {
		t.Errorf("PUBREL %+v", pk)
	}
	c.write(ackOf(packets.Pubrel, in.PacketID))
	if pk := c.want(packets.Pubcomp); pk.ReasonCode != 0 {
		t.Errorf("PUBCOMP %#x", pk.ReasonCode)
	}
	c.write(ackOf(packets.Pubcomp, in.PacketID))
	c.ping()
}

// A SUBSCRIBE of MQTT 5 that ends before the options of a filter.
func TestMochiSubscribeCutShort(t *testing.T) {
	b := startEmbedded(t, EmbeddedConfig{})
	c := dialWire(t, b.addr(), connectAs("c", 5, true))
	c.net.Write([]byte{packets.Subscribe<<4 | 2, 6, 0, 1, 0, 0, 1, 'a'})
	c.wantClosed()
	dialWire(t, b.addr(), connectAs("c", 5, true)).ping()
	if n := b.Stats().DecoderPanics; n != 1 {
		t.Errorf("%d panics; has mochi mended it?", n)
	}
}

// The will of a connection that was taken over comes before the new one is in.
func TestMochiWillBeforeBirth(t *testing.T) {
	b := startEmbedded(t, EmbeddedConfig{})
	var got heard
	subscribe(t, b, "state", 1, got.handle)
	connect := connectAs("dev", 4, true)
	connect.Connect.WillFlag, connect.Connect.WillTopic, connect.Connect.WillPayload = true, "state", []byte("dead")
	for i := range 50 {
		w := dialWire(t, b.addr(), connect)
		w.write(publishOf("state", fmt.Sprint("born ", i), 1, 1))
		w.wantAck()
	}
	all := got.all()
	if len(all) != 99 {
		t.Fatalf("%d messages", len(all))
	}
	for i := range 49 {
		if all[2*i] != fmt.Sprint("state=born ", i) || all[2*i+1] != "state=dead" {
			t.Fatalf("got %q", all[2*i:2*i+2])
		}
	}
}
