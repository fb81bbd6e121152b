package mqtt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
)

// What is not captured is not acknowledged, is given to nobody and not kept.
func TestEmbeddedCapture(t *testing.T) {
	var full atomic.Bool
	var captured heard
	capture := func(m Message) error {
		if full.Load() {
			return errors.New("the disk is full")
		}
		return captured.handle(m)
	}
	t.Run("one by one", func(t *testing.T) { testCapture(t, EmbeddedConfig{Capture: capture}, &full, &captured) })
	full.Store(false)
	captured = heard{}
	t.Run("all", func(t *testing.T) {
		testCapture(t, EmbeddedConfig{CaptureAll: func(ms []Message) error {
			for _, m := range ms {
				if err := capture(m); err != nil {
					return err
				}
			}
			return nil
		}}, &full, &captured)
	})
}

func testCapture(t *testing.T, cfg EmbeddedConfig, full *atomic.Bool, captured *heard) {
	b := startEmbedded(t, cfg)
	var got heard
	subscribe(t, b, "#", 1, got.handle)
	v5 := dialWire(t, b.addr(), connectAs("v5", 5, true))
	v5.write(retained(publishOf("a", "1", 1, 1)))
	v5.wantAck()
	if captured.len() != 1 || got.len() != 1 {
		t.Fatalf("captured %d, heard %d", captured.len(), got.len())
	}
	if m := captured.msgs[0]; m.From != "v5" || m.Topic != "a" || m.QoS != 1 || !m.Retain || m.Received.IsZero() {
		t.Errorf("captured %+v", m)
	}
	full.Store(true)
	v5.write(retained(publishOf("a", "2", 1, 2)))
	if pk := v5.want(packets.Puback); pk.ReasonCode != packets.ErrQuotaExceeded.Code {
		t.Errorf("PUBACK %#x", pk.ReasonCode)
	}
	v5.write(publishOf("a", "2", 2, 3))
	if pk := v5.want(packets.Pubrec); pk.ReasonCode != packets.ErrQuotaExceeded.Code {
		t.Errorf("PUBREC %#x", pk.ReasonCode)
	}
	v5.write(publishOf("a", "2", 0, 0))
	v5.ping()
	for qos := byte(1); qos <= 2; qos++ {
		v3 := dialWire(t, b.addr(), connectAs("v3", 4, true))
		v3.write(publishOf("a", "2", qos, 4))
		v3.wantClosed()
	}
	if got.len() != 1 {
		t.Errorf("heard %q", got.all())
	}
	if m := b.retained.get("a"); string(m.Payload) != "1" {
		t.Errorf("kept %q", m.Payload)
	}
	if s := b.Stats(); s.CaptureFailed != 5 {
		t.Errorf("%+v", s)
	}
}

// One of many that cannot be captured is refused alone.
func TestEmbeddedCaptureSingly(t *testing.T) {
	refuse := errors.New("no")
	b := startEmbedded(t, EmbeddedConfig{
		CaptureAll: func(ms []Message) error {
			for _, m := range ms {
				if string(m.Payload) == "bad" {
					return refuse
				}
			}
			return nil
		},
		Capture: func(m Message) error {
			if string(m.Payload) == "bad" {
				return refuse
			}
			return nil
		}})
	c := dialWire(t, b.addr(), connectAs("c", 5, true))
	var buf bytes.Buffer
	for i := range 20 {
		pk := publishOf("a", map[bool]string{true: "bad", false: "good"}[i == 7], 1, uint16(i+1))
		pk.ProtocolVersion = 5
		pk.PublishEncode(&buf)
	}
	c.net.Write(buf.Bytes())
	for i := range 20 {
		if pk := c.want(packets.Puback); (pk.ReasonCode != 0) != (i == 7) {
			t.Errorf("PUBACK of message %d: %#x", i, pk.ReasonCode)
		}
	}
	if n := b.Stats().CaptureFailed; n != 1 {
		t.Errorf("%d were not captured", n)
	}
}

// What comes together is captured together, is answered in its order, and holds
// up nothing.
func TestEmbeddedCaptureTogether(t *testing.T) {
	var mu sync.Mutex
	var batches []int
	b := startEmbedded(t, EmbeddedConfig{ACL: NewACLTable(ACLConfig{Local: true}), CaptureAll: func(ms []Message) error {
		mu.Lock()
		defer mu.Unlock()
		batches = append(batches, len(ms))
		return nil
	}})
	c := dialWire(t, b.addr(), connectAs("c", 5, true))
	c.subscribe(packets.Subscription{Filter: "a", Qos: 0})
	var buf bytes.Buffer
	for i := range 200 {
		pk := publishOf("a", fmt.Sprint(i), 1, uint16(i+1))
		if i%10 == 3 {
			pk.TopicName = "skerry/v1/x" // it may not
		}
		pk.ProtocolVersion = 5
		pk.PublishEncode(&buf)
	}
	buf.Write([]byte{packets.Pingreq << 4, 0})
	if _, err := c.net.Write(buf.Bytes()); err != nil {
		t.Fatal(err)
	}
	acks, messages := 0, 0
	for {
		pk, err := c.next()
		if err != nil {
			t.Fatal(err)
		}
		if pk.FixedHeader.Type == packets.Pingresp {
			break
		}
		switch pk.FixedHeader.Type {
		case packets.Puback:
			if refused := acks%10 == 3; int(pk.PacketID) != acks+1 || (pk.ReasonCode == 0x87) != refused {
				t.Fatalf("PUBACK of %d is %d, %#x", acks+1, pk.PacketID, pk.ReasonCode)
			}
			acks++
		case packets.Publish:
			messages++
		}
	}
	for ; messages < 180; messages++ {
		c.want(packets.Publish)
	}
	mu.Lock()
	defer mu.Unlock()
	total := 0
	for _, n := range batches {
		total += n
	}
	if acks != 200 || total != 180 || len(batches) > 60 {
		t.Errorf("%d acknowledgements; captured %v", acks, batches)
	}
}

// What a handler of this node refuses is not acknowledged either.
func TestEmbeddedHandlerRefuses(t *testing.T) {
	b := startEmbedded(t, EmbeddedConfig{})
	subscribe(t, b, "a", 1, func(m Message) error {
		if string(m.Payload) == "bad" {
			return errors.New("no")
		}
		return nil
	})
	v5 := dialWire(t, b.addr(), connectAs("v5", 5, true))
	v5.write(publishOf("a", "bad", 1, 1))
	if pk := v5.want(packets.Puback); pk.ReasonCode != packets.ErrQuotaExceeded.Code {
		t.Errorf("PUBACK %#x", pk.ReasonCode)
	}
	v3 := dialWire(t, b.addr(), connectAs("v3", 4, false))
	v3.write(publishOf("a", "bad", 2, 1))
	v3.wantClosed()
	// The message comes again, and is taken once.
	v3 = dialWire(t, b.addr(), connectAs("v3", 4, false))
	again := publishOf("a", "good", 2, 1)
	again.FixedHeader.Dup = true
	v3.write(again)
	v3.want(packets.Pubrec)
	if n := b.Stats().HandlerFailed; n != 2 {
		t.Errorf("%d handlers failed", n)
	}
}

// A message of QoS 2 is taken once, also when its publisher did not hear so.
func TestEmbeddedExactlyOnce(t *testing.T) {
	b := startEmbedded(t, EmbeddedConfig{})
	var got heard
	subscribe(t, b, "a", 2, got.handle)
	c := dialWire(t, b.addr(), connectAs("c", 4, false))
	c.write(publishOf("a", "x", 2, 5))
	c.want(packets.Pubrec)
	c.net.Close()
	c = dialWire(t, b.addr(), connectAs("c", 4, false))
	again := publishOf("a", "x", 2, 5)
	again.FixedHeader.Dup = true
	c.write(again)
	c.want(packets.Pubrec)
	c.write(ackOf(packets.Pubrel, 5))
	c.want(packets.Pubcomp)
	c.write(ackOf(packets.Pubrel, 5))
	c.want(packets.Pubcomp)
	c.write(publishOf("a", "y", 2, 5))
	c.want(packets.Pubrec)
	if fmt.Sprint(got.all()) != "[a=x a=y]" {
		t.Errorf("heard %q", got.all())
	}
}

// At a released message the exchange goes on with PUBREL, not with the message.
func TestEmbeddedReleasedIsNotSentAgain(t *testing.T) {
	b := startEmbedded(t, EmbeddedConfig{})
	c := dialWire(t, b.addr(), connectAs("c", 4, false))
	c.subscribe(packets.Subscription{Filter: "a", Qos: 2})
	publish(t, b, Message{Topic: "a", Payload: []byte("x"), QoS: 2})
	in := c.want(packets.Publish)
	c.write(ackOf(packets.Pubrec, in.PacketID))
	c.want(packets.Pubrel)
	c.net.Close()
	c = dialWire(t, b.addr(), connectAs("c", 4, false))
	if pk := c.want(packets.Pubrel); pk.PacketID != in.PacketID {
		t.Errorf("PUBREL of %d", pk.PacketID)
	}
	c.write(ackOf(packets.Pubcomp, in.PacketID))
	c.ping()
	c.net.Close()
	dialWire(t, b.addr(), connectAs("c", 4, false)).ping()
}

func TestEmbeddedBadPackets(t *testing.T) {
	b := startEmbedded(t, EmbeddedConfig{Limits: Limits{PacketBytes: 64 << 10}})
	text := func(s string) string { return string([]byte{byte(len(s) >> 8), byte(len(s))}) + s }
	publishRaw := func(topic string) string {
		body := text(topic) + "x"
		return string([]byte{0x30, byte(len(body))}) + body
	}
	bad := map[string]string{
		"a topic that is not UTF-8":   publishRaw("a/\xff"),
		"a topic with a zero byte":    publishRaw("a/\x00"),
		"an empty topic":              publishRaw(""),
		"a topic with a wildcard":     publishRaw("a/#"),
		"QoS 3":                       "\x36\x06" + text("a") + "\x00\x01x",
		"packet id 0":                 "\x32\x06" + text("a") + "\x00\x00x",
		"a packet that is too large":  "\x30\xff\xff\x7f",
		"a second CONNECT":            "\x10\x0d" + text("MQTT") + "\x04\x02\x00\x3c" + text("c"),
		"a length of five bytes":      "\x30\xff\xff\xff\xff\x01",
		"a type that is none":         "\xff\x00",
		"a filter that is not UTF-8":  "\x82\x08\x00\x01" + text("a/\xff") + "\x00",
		"a SUBSCRIBE of nothing":      "\x82\x02\x00\x01",
		"a SUBSCRIBE with flags of 0": "\x80\x06\x00\x01" + text("a") + "\x00",
		"CONNACK":                     "\x20\x02\x00\x00",
	}
	for name, raw := range bad {
		t.Run(name, func(t *testing.T) {
			c := dialWire(t, b.addr(), connectAs("c", 4, true))
			c.net.Write([]byte(raw))
			c.wantClosed()
		})
	}
	first := map[string]string{
		"not MQTT":             "GET / HTTP/1.1\r\n\r\n",
		"a CONNECT of 200 MiB": "\x10\x80\x80\x80\x64",
		"a CONNECT of another": "\x10\x0c" + text("XXXX") + "\x04\x02\x00\x3c" + text(""),
		"PUBLISH":              publishRaw("a"),
	}
	for name, raw := range first {
		t.Run(name, func(t *testing.T) {
			c, err := net.Dial("tcp", b.addr())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.Write([]byte(raw))
			c.SetReadDeadline(time.Now().Add(30 * time.Second))
			for {
				if _, err := c.Read(make([]byte, 100)); err != nil {
					var timeout net.Error
					if errors.As(err, &timeout) && timeout.Timeout() {
						t.Error("the connection is still open")
					}
					break
				}
			}
		})
	}
	dialWire(t, b.addr(), connectAs("c", 4, true)).ping()
}

func TestEmbeddedLimits(t *testing.T) {
	b := startEmbedded(t, EmbeddedConfig{Limits: Limits{Clients: 2, Subscriptions: 2, TopicLevels: 4, TopicBytes: 20,
		RetainedMessages: 3, RetainedBytes: 3000, AwaySessions: 2}})
	c := dialWire(t, b.addr(), connectAs("c", 5, true))
	codes := c.subscribe(packets.Subscription{Filter: "1"}, packets.Subscription{Filter: "2"}, packets.Subscription{Filter: "3"},
		packets.Subscription{Filter: "a/b/c/d/e"}, packets.Subscription{Filter: strings.Repeat("x", 21)},
		packets.Subscription{Filter: "a/b#"}, packets.Subscription{Filter: "1"})
	if want := "[0 0 151 143 143 143 0]"; fmt.Sprint(codes) != want {
		t.Errorf("SUBACK %v, want %v", codes, want)
	}
	reason := func(topic, payload string) byte {
		c.write(retained(publishOf(topic, payload, 1, 1)))
		return c.want(packets.Puback).ReasonCode
	}
	for topic, want := range map[string]byte{"a/b/c/d/e": 0x90, strings.Repeat("x", 21): 0x90, "$SYS/x": 0x87, "skerry/v1/x": 0x87} {
		if got := reason(topic, "x"); got != want {
			t.Errorf("PUBACK of %q %#x, want %#x", topic, got, want)
		}
	}
	for i, want := range []byte{0, 0, 0, 0x97, 0x97} {
		if got := reason(fmt.Sprint("r", i), "x"); got != want {
			t.Errorf("PUBACK of retained message %d %#x, want %#x", i, got, want)
		}
	}
	if got := reason("r1", strings.Repeat("x", 3000)); got != 0x97 {
		t.Errorf("PUBACK of a large retained message %#x", got)
	}
	for _, payload := range []string{"other", ""} { // replaced, removed
		if got := reason("r1", payload); got != 0 {
			t.Errorf("PUBACK %#x", got)
		}
	}
	if got := reason("r4", "x"); got != 0 {
		t.Errorf("PUBACK after there is room %#x", got)
	}
	if s := b.Stats(); s.Retained != 3 || s.RetainedRefused != 3 {
		t.Errorf("%+v", s)
	}
	dialWire(t, b.addr(), connectAs("c2", 4, true))
	if w, err := tryWire(t, b.addr(), connectAs("c3", 4, true)); err != nil || w.connack.ReasonCode != 3 {
		t.Errorf("the third client: %v", err)
	}
	// Its own name's old connection is not in its way.
	dialWire(t, b.addr(), connectAs("c2", 4, true)).net.Close()
	for i := range 5 {
		var w *wire
		eventually(t, "there is room", func() bool {
			var err error
			w, err = tryWire(t, b.addr(), connectAs(fmt.Sprint("away", i), 4, false))
			return err == nil && w.connack.ReasonCode == 0
		})
		w.net.Close()
	}
	eventually(t, "two sessions of those away are kept", func() bool {
		s := b.Stats()
		return s.Clients == 1 && s.Sessions == 3
	})
}

func TestEmbeddedStrangersAreBounded(t *testing.T) {
	b := startEmbedded(t, EmbeddedConfig{Limits: Limits{Pending: 3, ConnectTimeout: 300 * time.Millisecond}})
	var wg sync.WaitGroup
	start := time.Now()
	for range 3 {
		c, err := net.Dial("tcp", b.addr())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		wg.Go(func() { c.Read(make([]byte, 1)) }) // until it is closed
	}
	eventually(t, "the room is taken", func() bool {
		c, err := net.Dial("tcp", b.addr())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		c.Read(make([]byte, 1))
		return b.Stats().RefusedConnections > 0
	})
	wg.Wait()
	if waited := time.Since(start); waited < 300*time.Millisecond {
		t.Errorf("closed after %v", waited)
	}
	eventually(t, "there is room again", func() bool {
		w, err := tryWire(t, b.addr(), connectAs("c", 4, true))
		return err == nil && w.connack.ReasonCode == 0
	})
}

func TestEmbeddedListenerConfig(t *testing.T) {
	for want, l := range map[string]ListenerConfig{
		"beyond loopback":       {Address: "0.0.0.0:1883"},
		"beyond loopback and":   {Address: ":1883"},
		"want tcp or unix":      {Network: "udp", Address: "127.0.0.1:1883"},
		"a unix socket has no":  {Network: "unix", Address: "/x", TLS: &TLSConfig{}},
		"there is no client CA": {Address: ":8883", TLS: &TLSConfig{RequireClientCert: true}},
		"no such file":          {Address: ":8883", TLS: &TLSConfig{CertFile: "/nowhere", KeyFile: "/nowhere"}},
		"missing port":          {Address: "127.0.0.1"},
	} {
		if _, err := NewEmbedded(EmbeddedConfig{Listeners: []ListenerConfig{l}}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q", l, err, want)
		}
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	b, err := NewEmbedded(EmbeddedConfig{Listeners: []ListenerConfig{{Address: "127.0.0.1:0"}, {Address: taken.Addr().String()}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Run(context.Background()); err == nil || b.State().Error == "" || b.State().Connected {
		t.Errorf("%v, %+v", err, b.State())
	}
}
