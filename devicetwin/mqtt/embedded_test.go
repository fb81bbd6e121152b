package mqtt

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
)

// startEmbedded runs a broker until the test ends.
func startEmbedded(t testing.TB, cfg EmbeddedConfig) *Embedded {
	t.Helper()
	b, _ := runEmbedded(t, cfg)
	return b
}

// runEmbedded runs one until stop, or the test's end.
func runEmbedded(t testing.TB, cfg EmbeddedConfig) (b *Embedded, stop func()) {
	t.Helper()
	if cfg.Listeners == nil {
		cfg.Listeners = []ListenerConfig{{Address: "127.0.0.1:0"}}
	}
	if cfg.Log == nil {
		cfg.Log = testLog(t)
	}
	b, err := NewEmbedded(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- b.Run(ctx) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			if err := <-ended; err != nil {
				t.Errorf("Run: %v", err)
			}
		})
	}
	t.Cleanup(stop)
	eventually(t, "the broker listens", func() bool { return b.State().Connected })
	return b, stop
}

// wire is an MQTT client that says exactly what a test has it say.
type wire struct {
	t       testing.TB
	net     net.Conn
	r       *bufio.Reader
	version byte
	connack packets.Packet
}

func (b *Embedded) addr() string { return b.Addrs()[0].String() }

// connectAs is CONNECT in the version given.
func connectAs(id string, version byte, clean bool) packets.Packet {
	return packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Connect}, ProtocolVersion: version,
		Connect: packets.ConnectParams{ProtocolName: []byte("MQTT"), ClientIdentifier: id, Clean: clean, Keepalive: 60}}
}

func dialWire(t testing.TB, addr string, connect packets.Packet) *wire {
	t.Helper()
	w, err := tryWire(t, addr, connect)
	if err != nil {
		t.Fatal(err)
	}
	if w.connack.ReasonCode != 0 {
		t.Fatalf("CONNACK %#x", w.connack.ReasonCode)
	}
	return w
}

func tryWire(t testing.TB, addr string, connect packets.Packet) (*wire, error) {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { c.Close() })
	return wireOver(t, c, connect)
}

func wireOver(t testing.TB, c net.Conn, connect packets.Packet) (*wire, error) {
	w := &wire{t: t, net: c, r: bufio.NewReader(c), version: connect.ProtocolVersion}
	var buf bytes.Buffer
	if err := connect.ConnectEncode(&buf); err != nil {
		return nil, err
	}
	if _, err := c.Write(buf.Bytes()); err != nil {
		return nil, err
	}
	pk, err := w.next()
	if err != nil {
		return nil, err
	}
	if pk.FixedHeader.Type != packets.Connack {
		return nil, fmt.Errorf("got packet type %d, want CONNACK", pk.FixedHeader.Type)
	}
	w.connack = pk
	return w, nil
}

// next reads a packet.
func (w *wire) next() (pk packets.Packet, err error) {
	w.net.SetReadDeadline(time.Now().Add(30 * time.Second))
	first, err := w.r.ReadByte()
	if err != nil {
		return pk, err
	}
	if err := pk.FixedHeader.Decode(first); err != nil {
		return pk, err
	}
	n, _, err := packets.DecodeLength(w.r)
	if err != nil {
		return pk, err
	}
	pk.FixedHeader.Remaining, pk.ProtocolVersion = n, w.version
	body := make([]byte, n)
	if _, err := io.ReadFull(w.r, body); err != nil {
		return pk, err
	}
	switch pk.FixedHeader.Type {
	case packets.Connack:
		err = pk.ConnackDecode(body)
	case packets.Publish:
		err = pk.PublishDecode(body)
	case packets.Puback:
		err = pk.PubackDecode(body)
	case packets.Pubrec:
		err = pk.PubrecDecode(body)
	case packets.Pubrel:
		err = pk.PubrelDecode(body)
	case packets.Pubcomp:
		err = pk.PubcompDecode(body)
	case packets.Suback:
		err = pk.SubackDecode(body)
	case packets.Unsuback:
		err = pk.UnsubackDecode(body)
	case packets.Disconnect:
		err = pk.DisconnectDecode(body)
	}
	return pk, err
}

// want reads a packet of a type.
func (w *wire) want(kind byte) packets.Packet {
	w.t.Helper()
	pk, err := w.next()
	if err != nil {
		w.t.Fatalf("waiting for packet type %d: %v", kind, err)
	}
	if pk.FixedHeader.Type != kind {
		w.t.Fatalf("got packet type %d (reason %#x), want %d", pk.FixedHeader.Type, pk.ReasonCode, kind)
	}
	return pk
}

// wantClosed reads until the connection ends, and gives the DISCONNECT's reason.
func (w *wire) wantClosed() (reason byte) {
	w.t.Helper()
	for {
		pk, err := w.next()
		if errors.Is(err, io.EOF) || isReset(err) {
			return reason
		}
		if err != nil {
			w.t.Fatalf("waiting for the end: %v", err)
		}
		if pk.FixedHeader.Type == packets.Disconnect {
			reason = pk.ReasonCode
		}
	}
}

func isReset(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && !op.Timeout()
}

func (w *wire) write(pk packets.Packet) {
	w.t.Helper()
	if err := w.tryWrite(pk); err != nil {
		w.t.Fatal(err)
	}
}

func (w *wire) tryWrite(pk packets.Packet) error {
	var buf bytes.Buffer
	pk.ProtocolVersion = w.version
	var err error
	switch pk.FixedHeader.Type {
	case packets.Publish:
		pk.Mods.AllowResponseInfo = true
		err = pk.PublishEncode(&buf)
	case packets.Puback:
		err = pk.PubackEncode(&buf)
	case packets.Pubrec:
		err = pk.PubrecEncode(&buf)
	case packets.Pubrel:
		err = pk.PubrelEncode(&buf)
	case packets.Pubcomp:
		err = pk.PubcompEncode(&buf)
	case packets.Subscribe:
		err = pk.SubscribeEncode(&buf)
	case packets.Unsubscribe:
		err = pk.UnsubscribeEncode(&buf)
	case packets.Disconnect:
		err = pk.DisconnectEncode(&buf)
	case packets.Pingreq:
		err = pk.PingreqEncode(&buf)
	default:
		err = fmt.Errorf("packet type %d", pk.FixedHeader.Type)
	}
	if err != nil {
		return err
	}
	_, err = w.net.Write(buf.Bytes())
	return err
}

func (w *wire) subscribe(filters ...packets.Subscription) []byte {
	w.t.Helper()
	pk := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Subscribe, Qos: 1}, PacketID: 9, Filters: filters}
	if id := filters[0].Identifier; id > 0 {
		pk.Properties.SubscriptionIdentifier = []int{id}
	}
	w.write(pk)
	return w.want(packets.Suback).ReasonCodes
}

func publishOf(topic, payload string, qos byte, id uint16) packets.Packet {
	return packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Publish, Qos: qos}, TopicName: topic,
		Payload: []byte(payload), PacketID: id}
}

func retained(pk packets.Packet) packets.Packet {
	pk.FixedHeader.Retain = true
	return pk
}

func ackOf(kind byte, id uint16) packets.Packet {
	pk := packets.Packet{FixedHeader: packets.FixedHeader{Type: kind}, PacketID: id}
	if kind == packets.Pubrel {
		pk.FixedHeader.Qos = 1
	}
	return pk
}

// ping comes back once all that was sent before is done.
func (w *wire) ping() {
	w.t.Helper()
	w.write(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Pingreq}})
	w.want(packets.Pingresp)
}

func TestEmbeddedBasics(t *testing.T) {
	for _, version := range []byte{3, 4, 5} {
		t.Run(fmt.Sprintf("v%d", version), func(t *testing.T) {
			b := startEmbedded(t, EmbeddedConfig{})
			var got heard
			subscribe(t, b, "a/#", 1, got.handle)
			connect := connectAs("c", version, true)
			if version == 3 {
				connect.Connect.ProtocolName = []byte("MQIsdp")
			}
			c := dialWire(t, b.addr(), connect)
			if codes := c.subscribe(packets.Subscription{Filter: "a/+/c", Qos: 2}); !bytes.Equal(codes, []byte{2}) {
				t.Fatalf("SUBACK %v", codes)
			}
			c.write(publishOf("a/b/c", "0", 0, 0))
			if pk := c.want(packets.Publish); string(pk.Payload) != "0" || pk.TopicName != "a/b/c" {
				t.Errorf("got %q", pk.Payload)
			}
			c.write(publishOf("a/b/c", "1", 1, 7))
			one, other := c.want2(packets.Publish, packets.Puback)
			if string(one.Payload) != "1" || one.FixedHeader.Qos != 1 || other.PacketID != 7 {
				t.Errorf("got %+v, %+v", one, other)
			}
			c.write(ackOf(packets.Puback, one.PacketID))
			c.write(publishOf("a/b/c", "2", 2, 8))
			one, other = c.want2(packets.Publish, packets.Pubrec)
			if string(one.Payload) != "2" || one.FixedHeader.Qos != 2 || other.PacketID != 8 {
				t.Errorf("got %+v, %+v", one, other)
			}
			c.write(ackOf(packets.Pubrel, 8))
			c.want(packets.Pubcomp)
			c.write(ackOf(packets.Pubrec, one.PacketID))
			c.want(packets.Pubrel)
			c.write(ackOf(packets.Pubcomp, one.PacketID))
			c.ping()
			eventually(t, "this node hears all", func() bool { return got.len() == 3 })
			publish(t, b, Message{Topic: "a/x/c", Payload: []byte("node"), QoS: 1})
			if pk := c.want(packets.Publish); string(pk.Payload) != "node" {
				t.Errorf("got %q", pk.Payload)
			}
			eventually(t, "this node hears itself", func() bool { return got.len() == 4 })
			c.write(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Unsubscribe, Qos: 1}, PacketID: 3,
				Filters: packets.Subscriptions{{Filter: "a/+/c"}}})
			c.want(packets.Unsuback)
			c.write(publishOf("a/b/c", "gone", 0, 0))
			c.ping()
			c.write(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Disconnect}})
			c.wantClosed()
			eventually(t, "nobody is left", func() bool { return b.Stats().Clients == 0 && b.Stats().Sessions == 0 })
		})
	}
}

// want2 reads two packets that may come in either order.
func (w *wire) want2(x, y byte) (packets.Packet, packets.Packet) {
	w.t.Helper()
	first, err1 := w.next()
	second, err2 := w.next()
	if err := errors.Join(err1, err2); err != nil {
		w.t.Fatal(err)
	}
	if first.FixedHeader.Type == y {
		first, second = second, first
	}
	if first.FixedHeader.Type != x || second.FixedHeader.Type != y {
		w.t.Fatalf("got packet types %d and %d, want %d and %d", first.FixedHeader.Type, second.FixedHeader.Type, x, y)
	}
	return first, second
}
