package mqtt

import (
	"bytes"
	"log/slog"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
)

// Whatever a client sends, the broker goes on, and holds nothing for it once it
// has gone.
func FuzzEmbedded(f *testing.F) {
	add := func(pks ...packets.Packet) {
		var buf bytes.Buffer
		for _, pk := range pks {
			switch pk.FixedHeader.Type {
			case packets.Connect:
				pk.ConnectEncode(&buf)
			case packets.Publish:
				pk.PublishEncode(&buf)
			case packets.Subscribe:
				pk.SubscribeEncode(&buf)
			case packets.Unsubscribe:
				pk.UnsubscribeEncode(&buf)
			case packets.Pubrel:
				pk.PubrelEncode(&buf)
			case packets.Pubrec:
				pk.PubrecEncode(&buf)
			case packets.Disconnect:
				pk.DisconnectEncode(&buf)
			}
		}
		f.Add(buf.Bytes())
	}
	for _, version := range []byte{4, 5} {
		connect := connectAs("c", version, false)
		connect.Connect.WillFlag, connect.Connect.WillTopic, connect.Connect.WillPayload = true, "will", []byte("x")
		as := func(pk packets.Packet) packets.Packet {
			pk.ProtocolVersion = version
			return pk
		}
		sub := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Subscribe, Qos: 1}, PacketID: 1,
			Filters: packets.Subscriptions{{Filter: "#", Qos: 2}, {Filter: "$share/g/a/+", Qos: 1}}}
		unsub := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Unsubscribe, Qos: 1}, PacketID: 2,
			Filters: packets.Subscriptions{{Filter: "#"}}}
		aliased := publishOf("a/b", "x", 1, 3)
		aliased.Properties.TopicAlias, aliased.Properties.TopicAliasFlag = 1, true
		add(connect, as(sub), as(retained(publishOf("a/b", "x", 2, 2))), as(ackOf(packets.Pubrel, 2)), as(ackOf(packets.Pubrec, 1)))
		add(connect, as(aliased), as(unsub), as(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Disconnect}}))
	}
	f.Add([]byte("\x10\x0d\x00\x04MQTT\x05\x02\x00\x3c\x00\x00\x00\x82\x06\x00\x01\x00\x00\x01a"))
	b := startEmbedded(f, EmbeddedConfig{Log: slog.New(slog.DiscardHandler), Limits: Limits{RetainedMessages: 100, AwaySessions: 10,
		ConnectTimeout: 2 * time.Second}})
	addr := b.addr()
	f.Fuzz(func(t *testing.T, raw []byte) {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		c.(*net.TCPConn).SetLinger(0)
		c.Write(raw)
		c.(*net.TCPConn).CloseWrite()
		c.SetReadDeadline(time.Now().Add(20 * time.Second))
		for buf := make([]byte, 4096); err == nil; {
			_, err = c.Read(buf)
		}
		c.Close()
		eventually(t, "the connection is gone", func() bool {
			b.mu.Lock()
			defer b.mu.Unlock()
			return len(b.open) == 0 && b.pendingAll == 0 && b.connected == 0
		})
		if s := b.Stats(); s.Sessions > 10 || s.Retained > 100 {
			t.Errorf("%+v", s)
		}
		if n := runtime.NumGoroutine(); n > 60 {
			t.Errorf("%d goroutines", n)
		}
	})
}

func FuzzRetainedRecord(f *testing.F) {
	m := &stored{Message: Message{Topic: "a/b", Payload: []byte("x"), QoS: 1, From: "c", Response: "r", Correlation: []byte("1"),
		ContentType: "t", User: []UserProperty{{"a", "b"}}, Received: time.Unix(5, 6)}, expires: time.Unix(7, 8), format: formatText}
	f.Add("a/b", encodeRetained(m))
	f.Add("a/+", encodeRetained(m))
	f.Fuzz(func(t *testing.T, topic string, record []byte) {
		m, err := decodeRetained(topic, record)
		if err != nil {
			return
		}
		again, err := decodeRetained(topic, encodeRetained(m))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(encodeRetained(again), encodeRetained(m)) || !bytes.Equal(m.Payload, again.Payload) {
			t.Errorf("%+v became %+v", m, again)
		}
	})
}

// The retained store finds what Match finds, whatever is put, replaced and
// removed.
func FuzzRetainedMatch(f *testing.F) {
	f.Add("a/b\na\n$SYS/x\na/\n/a", "a/#")
	f.Add("a/b\na\n$SYS/x", "#")
	f.Add("a/b\na\n$SYS/x", "+/+")
	f.Add("a/b\na\n$SYS/x\na/b", "$SYS/#")
	f.Fuzz(func(t *testing.T, topics, filter string) {
		if CheckFilter(filter) != nil || strings.HasPrefix(filter, "$share/") {
			return
		}
		r := retainedStore{messages: 1000, bytes: 1 << 20}
		kept := map[string]bool{}
		for topic := range strings.SplitSeq(topics, "\n") {
			if CheckTopic(topic) != nil {
				continue
			}
			m := &stored{Message: Message{Topic: topic, Retain: true}}
			if !kept[topic] { // the second time removes it
				m.Payload = []byte("x")
			}
			if err := r.keep(m); err != nil {
				return
			}
			kept[topic] = !kept[topic]
		}
		want := 0
		for topic, there := range kept {
			if there && Match(filter, topic) {
				want++
			}
		}
		found := r.match(filter)
		if len(found) != want {
			t.Errorf("%q of %q: %d found, want %d", filter, topics, len(found), want)
		}
		for _, m := range found {
			if !Match(filter, m.Topic) {
				t.Errorf("%q is not for %q", m.Topic, filter)
			}
			r.drop(m.Topic, nil)
		}
		for topic := range kept {
			r.drop(topic, nil)
		}
		if r.count != 0 || r.size != 0 || len(r.root.next) != 0 {
			t.Errorf("%d messages, %d bytes and %d nodes are left", r.count, r.size, len(r.root.next))
		}
	})
}

// The tree of subscriptions finds what Match finds, and is empty in the end.
func FuzzTree(f *testing.F) {
	f.Add("a/b\na/+\n#\n+/#\n$SYS/#\na/#", "a/b")
	f.Add("a/#\n+\n#", "a")
	f.Add("#\n+/x\n$SYS/+", "$SYS/x")
	f.Fuzz(func(t *testing.T, filters, topic string) {
		if CheckTopic(topic) != nil {
			return
		}
		var tr tree
		subs := map[*session]*clientSub{}
		want := 0
		for filter := range strings.SplitSeq(filters, "\n") {
			if CheckFilter(filter) != nil || strings.HasPrefix(filter, "$share/") {
				continue
			}
			s := &session{id: filter}
			subs[s] = &clientSub{filter: filter}
			tr.subscribe(s, subs[s])
			if Match(filter, topic) {
				want++
			}
		}
		if _, targets := tr.match(topic, ""); len(targets) != want {
			t.Errorf("%q of %q: %d, want %d", topic, filters, len(targets), want)
		}
		for s, sub := range subs {
			tr.unsubscribe(s, sub)
		}
		if len(tr.root.next) != 0 {
			t.Errorf("%d nodes are left", len(tr.root.next))
		}
	})
}
