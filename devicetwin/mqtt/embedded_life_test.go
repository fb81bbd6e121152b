package mqtt

import (
	"errors"
	"fmt"
	"net"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
)

// The broker stops whatever its clients and their messages wait for, and leaves
// nothing behind.
func TestEmbeddedStops(t *testing.T) {
	before := runtime.NumGoroutine()
	b, stop := runEmbedded(t, EmbeddedConfig{Limits: Limits{QueueMessages: 10, Inflight: 5, Stall: time.Hour, ConnectTimeout: time.Hour}})
	stranger, err := net.Dial("tcp", b.addr())
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	deaf := dialWire(t, b.addr(), connectAs("deaf", 5, true))
	deaf.subscribe(packets.Subscription{Filter: "a", Qos: 1})
	willed := connectAs("pub", 4, true)
	willed.Connect.WillFlag, willed.Connect.WillTopic, willed.Connect.WillPayload = true, "will", []byte("x")
	pub := dialWire(t, b.addr(), willed)
	for i := range 100 {
		pub.write(publishOf("a", "x", 1, uint16(i+1)))
	}
	eventually(t, "the publisher is held up", func() bool { return b.blockedPublishers() == 1 })
	// Another of its name waits for it.
	go tryWire(t, b.addr(), connectAs("pub", 4, true))
	var got heard
	subscribe(t, b, "will", 1, got.handle)
	stop()
	if reason := deaf.wantClosed(); reason != packets.ErrServerShuttingDown.Code {
		t.Errorf("DISCONNECT %#x", reason)
	}
	pub.wantClosed()
	if s := b.Stats(); s.Clients != 0 || b.State().Connected || len(b.open) != 0 {
		t.Errorf("%+v", s)
	}
	// At most that of the connection that was lost while it was waited for.
	if got.len() > 1 {
		t.Errorf("wills at the end: %q", got.all())
	}
	eventually(t, "no goroutine is left", func() bool { return runtime.NumGoroutine() <= before })
}

// Who is silent for one and a half times its keep-alive is gone, and its will
// says so.
func TestEmbeddedKeepAlive(t *testing.T) {
	b := startEmbedded(t, EmbeddedConfig{})
	var got heard
	subscribe(t, b, "will", 1, got.handle)
	connect := connectAs("c", 4, true)
	connect.Connect.Keepalive = 1
	connect.Connect.WillFlag, connect.Connect.WillTopic, connect.Connect.WillPayload = true, "will", []byte("x")
	start := time.Now()
	dialWire(t, b.addr(), connect).wantClosed()
	if waited := time.Since(start); waited < time.Second {
		t.Errorf("closed after %v", waited)
	}
	eventually(t, "its will comes", func() bool { return got.len() == 1 })
}

// A handler may publish, also to what it hears itself; nothing waits for it.
func TestEmbeddedHandlerPublishes(t *testing.T) {
	b := startEmbedded(t, EmbeddedConfig{Limits: Limits{SelfQueue: 10}})
	var rounds atomic.Int32
	subscribe(t, b, "ball", 1, func(m Message) error {
		if rounds.Add(1) < 100 {
			publish(t, b, Message{Topic: "ball", Payload: []byte("x"), QoS: 1})
		}
		return nil
	})
	dialWire(t, b.addr(), connectAs("c", 4, true)).numbered("ball", 0, 1)
	eventually(t, "a hundred rounds", func() bool { return rounds.Load() == 100 })

	// What is published faster than it is heard is refused, not held.
	release := make(chan struct{})
	cancel := subscribe(t, b, "slow", 1, func(Message) error {
		<-release
		return nil
	})
	var err error
	for range 100 {
		if err = b.Publish(t.Context(), Message{Topic: "slow", QoS: 1}); err != nil {
			break
		}
	}
	if !errors.Is(err, errSelfQueue) {
		t.Errorf("%v", err)
	}
	close(release)
	cancel()
	var got heard
	cancel = subscribe(t, b, "later", 1, got.handle)
	cancel()
	if err := b.Publish(t.Context(), Message{Topic: "later", QoS: 1}); err != nil || got.len() != 0 {
		t.Errorf("%v, heard %q after cancel", err, got.all())
	}
	for topic, want := range map[string]string{"a/#": "wildcard", "": "empty", "a/\xff": "UTF-8", strings.Repeat("a/", 70): "levels"} {
		if err := b.Publish(t.Context(), Message{Topic: topic}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("publish to %q: %v", topic, err)
		}
	}
}

// What clients retained is there after a restart; what the node itself said is
// not, since it says it again.
func TestEmbeddedRetainedDB(t *testing.T) {
	db := newMemoryDB()
	b, stop := runEmbedded(t, EmbeddedConfig{Retained: db})
	c := dialWire(t, b.addr(), connectAs("c", 5, true))
	keep := func(topic, payload string, change func(*packets.Packet)) {
		t.Helper()
		pk := retained(publishOf(topic, payload, 1, 1))
		if change != nil {
			change(&pk)
		}
		c.write(pk)
		c.wantAck()
	}
	keep("a/1", "one", func(pk *packets.Packet) { pk.Properties.ContentType = "text/plain" })
	keep("a/2", "gone", nil)
	keep("a/2", "", nil)
	keep("a/3", "old", nil)
	keep("a/4", "short", func(pk *packets.Packet) { pk.Properties.MessageExpiryInterval = 1000 })
	keep("a/5", "over", func(pk *packets.Packet) { pk.Properties.MessageExpiryInterval = 1 })
	publish(t, b, Message{Topic: "a/3", Payload: []byte("the node's"), Retain: true})
	publish(t, b, Message{Topic: "skerry/v1/twin/a/b", Payload: []byte("the node's"), Retain: true})
	stop()
	eventually(t, "a/5 is over", func() bool { return b.retained.get("a/5").expired(time.Now()) })
	db.Dirty(RetainedBucket, "broken", func() []byte { return []byte{9, 9} })
	db.Dirty("other", "a/6", func() []byte { return []byte("x") })

	b, _ = runEmbedded(t, EmbeddedConfig{Retained: db})
	var got heard
	subscribe(t, b, "#", 2, got.handle)
	if all := fmt.Sprint(got.all()); all != "[a/1=one a/4=short]" && all != "[a/4=short a/1=one]" {
		t.Errorf("restored %s", all)
	}
	for _, m := range got.msgs {
		if m.Topic == "a/1" && (m.From != "c" || m.QoS != 1 || !m.Retain || m.ContentType != "text/plain") {
			t.Errorf("restored %+v", m)
		}
	}
	if n := len(db.records); n != 3 { // those and the other bucket's
		t.Errorf("%d records", n)
	}
}

// The client of this package, which is paho's, with this broker.
func TestEmbeddedWithExternal(t *testing.T) {
	addr := freeAddr(t)
	cfg := EmbeddedConfig{Listeners: []ListenerConfig{{Address: addr}}, Retained: newMemoryDB()}
	b, stop := runEmbedded(t, cfg)
	var far, near heard
	e := runExternal(t, ExternalConfig{URL: "mqtt://" + addr}, func(e *External) { subscribe(t, e, "to/far/#", 1, far.handle) })
	subscribe(t, b, "to/near/#", 1, near.handle)
	subscribed(t, e)
	const count = 1000
	for i := range count {
		publish(t, b, Message{Topic: "to/far/1", Payload: []byte(fmt.Sprint(i)), QoS: 1})
		publish(t, e, Message{Topic: "to/near/1", Payload: []byte(fmt.Sprint(i)), QoS: 1})
	}
	eventually(t, "all come", func() bool { return far.len() == count && near.len() == count })
	for i, m := range far.msgs {
		if string(m.Payload) != fmt.Sprint(i) {
			t.Fatalf("message %d is %s", i, m.Payload)
		}
	}
	// It comes back to a broker that has forgotten its session.
	publish(t, e, Message{Topic: "to/far/kept", Payload: []byte("kept"), QoS: 1, Retain: true})
	eventually(t, "it comes", func() bool { return far.len() == count+1 })
	stop()
	eventually(t, "it is cut", func() bool { return !e.State().Connected })
	b, _ = runEmbedded(t, cfg)
	eventually(t, "it is back", func() bool { return e.State().Connected })
	eventually(t, "it has what is retained", func() bool { return far.len() >= count+2 })
	publish(t, b, Message{Topic: "to/far/1", Payload: []byte("again"), QoS: 1})
	eventually(t, "it hears", func() bool { return strings.HasSuffix(fmt.Sprint(far.all()), "to/far/1=again]") })
}
