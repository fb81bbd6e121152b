package mqtt

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
)

func TestEmbeddedMQTT5(t *testing.T) {
	b := startEmbedded(t, EmbeddedConfig{})
	pub := dialWire(t, b.addr(), connectAs("pub", 5, true))
	if p := pub.connack.Properties; p.MaximumPacketSize != 256<<10 || p.TopicAliasMaximum != 32 || p.ReceiveMaximum != 1024 {
		t.Errorf("CONNACK %+v", p)
	}
	send := func(pk packets.Packet) {
		t.Helper()
		pk.FixedHeader.Qos, pk.PacketID = 1, 1
		pub.write(pk)
		pub.wantAck()
	}
	t.Run("properties are passed on", func(t *testing.T) {
		sub := dialWire(t, b.addr(), connectAs("sub", 5, true))
		sub.subscribe(packets.Subscription{Filter: "p/#", Qos: 1, Identifier: 7})
		pk := publishOf("p/a", "x", 1, 1)
		pk.Properties = packets.Properties{ContentType: "text/plain", ResponseTopic: "answer", CorrelationData: []byte("c"),
			PayloadFormat: 1, PayloadFormatFlag: true, MessageExpiryInterval: 100,
			User: []packets.UserProperty{{Key: "k", Val: "1"}, {Key: "k", Val: "2"}}}
		send(pk)
		got := sub.take().Properties
		if got.ContentType != "text/plain" || got.ResponseTopic != "answer" || string(got.CorrelationData) != "c" ||
			got.PayloadFormat != 1 || got.MessageExpiryInterval < 90 || got.MessageExpiryInterval > 100 ||
			!slices.Equal(got.User, pk.Properties.User) || !slices.Equal(got.SubscriptionIdentifier, []int{7}) {
			t.Errorf("got %+v", got)
		}
	})
	t.Run("this node has them too", func(t *testing.T) {
		var got heard
		subscribe(t, b, "n", 1, got.handle)
		publish(t, b, Message{Topic: "n", QoS: 1, Response: "r", Correlation: []byte("c"), ContentType: "t", User: []UserProperty{{"a", "b"}}})
		eventually(t, "it comes", func() bool { return got.len() == 1 })
		if m := got.msgs[0]; m.Response != "r" || string(m.Correlation) != "c" || m.ContentType != "t" || len(m.User) != 1 {
			t.Errorf("got %+v", m)
		}
	})
	t.Run("no local", func(t *testing.T) {
		sub := dialWire(t, b.addr(), connectAs("local", 5, true))
		sub.subscribe(packets.Subscription{Filter: "l", Qos: 0, NoLocal: true})
		sub.write(publishOf("l", "own", 0, 0))
		sub.ping()
	})
	t.Run("retain handling", func(t *testing.T) {
		send(retained(publishOf("h", "kept", 1, 1)))
		sub := dialWire(t, b.addr(), connectAs("handling", 5, true))
		sub.subscribe(packets.Subscription{Filter: "h", RetainHandling: 1})
		if pk := sub.want(packets.Publish); !pk.FixedHeader.Retain {
			t.Error("not marked as retained")
		}
		sub.subscribe(packets.Subscription{Filter: "h", RetainHandling: 1})
		sub.subscribe(packets.Subscription{Filter: "h", RetainHandling: 2})
		sub.ping() // nothing came
		sub.subscribe(packets.Subscription{Filter: "h", RetainAsPublished: true})
		sub.want(packets.Publish)
		send(retained(publishOf("h", "kept", 1, 1)))
		if pk := sub.want(packets.Publish); !pk.FixedHeader.Retain {
			t.Error("not as published")
		}
		sub.subscribe(packets.Subscription{Filter: "h", RetainHandling: 2})
		send(retained(publishOf("h", "kept", 1, 1)))
		if pk := sub.want(packets.Publish); pk.FixedHeader.Retain {
			t.Error("marked as retained")
		}
	})
	t.Run("topic aliases", func(t *testing.T) {
		var got heard
		subscribe(t, b, "alias/#", 1, got.handle)
		pk := publishOf("alias/1", "x", 1, 1)
		pk.Properties.TopicAlias, pk.Properties.TopicAliasFlag = 3, true
		send(pk)
		pk.TopicName = ""
		send(pk)
		if all := strings.Join(got.all(), " "); all != "alias/1=x alias/1=x" {
			t.Errorf("heard %s", all)
		}
		for _, alias := range []uint16{4, 33} {
			other := dialWire(t, b.addr(), connectAs("", 5, true))
			pk.Properties.TopicAlias, pk.PacketID, pk.FixedHeader.Qos = alias, 1, 1
			other.write(pk)
			if reason := other.wantClosed(); reason != 0x82 && reason != 0x94 {
				t.Errorf("alias %d: DISCONNECT %#x", alias, reason)
			}
		}
	})
	t.Run("overlapping subscriptions", func(t *testing.T) {
		sub := dialWire(t, b.addr(), connectAs("over", 5, true))
		sub.subscribe(packets.Subscription{Filter: "o/+", Qos: 0, Identifier: 1})
		sub.subscribe(packets.Subscription{Filter: "o/#", Qos: 1, Identifier: 2})
		send(publishOf("o/1", "x", 1, 1))
		got := sub.take()
		ids := got.Properties.SubscriptionIdentifier
		slices.Sort(ids)
		if got.FixedHeader.Qos != 1 || !slices.Equal(ids, []int{1, 2}) {
			t.Errorf("QoS %d, ids %v", got.FixedHeader.Qos, ids)
		}
		sub.ping()
	})
	t.Run("shared subscriptions", func(t *testing.T) {
		send(retained(publishOf("s/1", "kept", 1, 1)))
		var subs [3]*wire
		for i := range subs {
			subs[i] = dialWire(t, b.addr(), connectAs(fmt.Sprint("shared", i), 5, true))
			subs[i].subscribe(packets.Subscription{Filter: "$share/group/s/+", Qos: 1})
			subs[i].ping()
		}
		for range 30 {
			send(publishOf("s/1", "x", 1, 1))
		}
		for _, s := range subs {
			for range 10 {
				s.take()
			}
			s.ping()
		}
		subs[0].net.Close()
		eventually(t, "one is gone", func() bool { return !b.present("shared0") })
		for range 30 {
			send(publishOf("s/1", "x", 1, 1))
		}
		for _, s := range subs[1:] {
			for range 15 {
				s.take()
			}
			s.ping()
		}
	})
	t.Run("a message that its receiver cannot take", func(t *testing.T) {
		connect := connectAs("small", 5, true)
		connect.Properties.MaximumPacketSize = 100
		sub := dialWire(t, b.addr(), connect)
		sub.subscribe(packets.Subscription{Filter: "m", Qos: 1})
		send(publishOf("m", strings.Repeat("x", 200), 1, 1))
		send(publishOf("m", "small", 1, 1))
		if pk := sub.take(); string(pk.Payload) != "small" {
			t.Errorf("got %d bytes", len(pk.Payload))
		}
	})
	t.Run("a message whose time is over", func(t *testing.T) {
		connect := connectAs("late", 5, false)
		connect.Properties.SessionExpiryInterval, connect.Properties.SessionExpiryIntervalFlag = 100, true
		sub := dialWire(t, b.addr(), connect)
		sub.subscribe(packets.Subscription{Filter: "e", Qos: 1})
		sub.net.Close()
		eventually(t, "it is away", func() bool { return !b.present("late") })
		publish(t, b, Message{Topic: "e", Payload: []byte("short"), QoS: 1, Expiry: time.Millisecond})
		publish(t, b, Message{Topic: "e", Payload: []byte("long"), QoS: 1, Expiry: time.Hour})
		time.Sleep(2 * time.Millisecond) // the expiry itself
		sub = dialWire(t, b.addr(), connect)
		if pk := sub.take(); string(pk.Payload) != "long" || pk.Properties.MessageExpiryInterval < 3500 {
			t.Errorf("got %q, %d", pk.Payload, pk.Properties.MessageExpiryInterval)
		}
	})
	t.Run("session expiry is what is kept", func(t *testing.T) {
		connect := connectAs("expiry", 5, true)
		connect.Properties.SessionExpiryInterval, connect.Properties.SessionExpiryIntervalFlag = 1<<32-1, true
		sub := dialWire(t, b.addr(), connect)
		if got := sub.connack.Properties.SessionExpiryInterval; got != 3600 {
			t.Errorf("CONNACK says %d s", got)
		}
		bye := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Disconnect}}
		bye.Properties.SessionExpiryInterval, bye.Properties.SessionExpiryIntervalFlag = 0, true
		sub.write(bye)
		sub.wantClosed()
		connect.Connect.Clean = false
		eventually(t, "it is gone", func() bool { return !b.present("expiry") })
		if sub = dialWire(t, b.addr(), connect); sub.connack.SessionPresent {
			t.Error("the session is there though DISCONNECT ended it")
		}
	})
}

// present says whether a client is connected.
func (b *Embedded) present(id string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	for c := range b.open {
		if c.session != nil && c.id == id {
			return true
		}
	}
	return false
}

func TestEmbeddedWills(t *testing.T) {
	sessions := make(chan Session, 100)
	b := startEmbedded(t, EmbeddedConfig{Sessions: func(s Session) { sessions <- s }})
	var got heard
	subscribe(t, b, "#", 2, got.handle)
	expect := func(want ...string) {
		t.Helper()
		eventually(t, fmt.Sprint("heard ", want), func() bool { return slices.Equal(got.all(), want) })
	}
	will := func(id string, version byte) packets.Packet {
		connect := connectAs(id, version, true)
		connect.Connect.WillFlag, connect.Connect.WillRetain, connect.Connect.WillQos = true, true, 1
		connect.Connect.WillTopic, connect.Connect.WillPayload = "will/"+id, []byte("Offline")
		return connect
	}
	bye := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Disconnect}}

	c := dialWire(t, b.addr(), will("a", 4))
	if s := <-sessions; s.Client != "a" || !s.Connected {
		t.Errorf("session %+v", s)
	}
	c.write(bye)
	c.wantClosed()
	if s := <-sessions; s.Client != "a" || s.Connected {
		t.Errorf("session %+v", s)
	}
	expect()
	dialWire(t, b.addr(), will("a", 4)).net.Close()
	expect("will/a=Offline")
	if m := b.retained.get("will/a"); m == nil || m.From != "a" {
		t.Errorf("kept %+v", m)
	}
	bye.ReasonCode = packets.CodeDisconnectWillMessage.Code
	dialWire(t, b.addr(), will("b", 5)).write(bye)
	expect("will/a=Offline", "will/b=Offline")

	// One that is delayed comes not at all if its client does within that time.
	delayed := will("d", 5)
	delayed.Connect.Clean = false
	delayed.Connect.WillProperties.WillDelayInterval = 20
	delayed.Properties.SessionExpiryInterval, delayed.Properties.SessionExpiryIntervalFlag = 60, true
	dialWire(t, b.addr(), delayed).net.Close()
	eventually(t, "it is away", func() bool { return !b.present("d") })
	b.expireSessions(time.Now().Add(10 * time.Second))
	c = dialWire(t, b.addr(), delayed)
	if !c.connack.SessionPresent {
		t.Error("the session is gone")
	}
	b.expireSessions(time.Now().Add(time.Hour))
	c.net.Close()
	eventually(t, "it is away", func() bool { return !b.present("d") })
	expect("will/a=Offline", "will/b=Offline")
	b.expireSessions(time.Now().Add(21 * time.Second))
	expect("will/a=Offline", "will/b=Offline", "will/d=Offline")
	if s := b.Stats(); s.Sessions != 1 {
		t.Errorf("%+v", s)
	}
	b.expireSessions(time.Now().Add(61 * time.Second))
	if s := b.Stats(); s.Sessions != 0 {
		t.Errorf("%+v", s)
	}
	// A topic that is none refuses the client.
	bad := will("x", 5)
	bad.Connect.WillTopic = "a/#"
	if w, err := tryWire(t, b.addr(), bad); err != nil || w.connack.ReasonCode != packets.ErrTopicNameInvalid.Code {
		t.Errorf("a will to a/#: %v", err)
	}
}
