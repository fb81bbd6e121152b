package mqtt

import (
	"bytes"
	"errors"
	"io"
	"net"
	"testing"

	"github.com/eclipse/paho.mqtt.golang/packets"
)

// scripted is a connection that says what it was given, in pieces.
type scripted struct {
	net.Conn
	text  []byte
	piece int
}

func (s *scripted) Read(p []byte) (int, error) {
	if len(s.text) == 0 {
		return 0, io.EOF
	}
	n := copy(p, s.text[:min(len(s.text), max(s.piece, 1))])
	s.text = s.text[n:]
	return n, nil
}

func encoded(t testing.TB, ps ...packets.ControlPacket) []byte {
	var b bytes.Buffer
	for _, p := range ps {
		if err := p.Write(&b); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

func packetOf(topic string, qos byte, size int) *packets.PublishPacket {
	return &packets.PublishPacket{FixedHeader: packets.FixedHeader{MessageType: packets.Publish, Qos: qos}, MessageID: 7, TopicName: topic, Payload: make([]byte, size)}
}

// TestPacketConnCuts: what is too long is cut, whatever the pieces it comes in,
// and nothing else is changed.
func TestPacketConnCuts(t *testing.T) {
	text := encoded(t, packetOf("a", 1, 50), packetOf("a/long", 1, 100_000), packetOf("b/long", 0, 2_000_000), packetOf("a", 0, 100),
		packets.NewControlPacket(packets.Pingresp))
	for _, piece := range []int{1, 7, 1 << 20} {
		c := newPacketConn(&scripted{text: text, piece: piece}, 200)
		for i, want := range []struct {
			topic string
			size  int
			cut   bool
		}{{"a", 50, false}, {"a/long", 0, true}, {"b/long", 0, true}, {"a", 100, false}} {
			p, err := packets.ReadPacket(c)
			if err != nil {
				t.Fatal(err)
			}
			m := p.(*packets.PublishPacket)
			if m.TopicName != want.topic || len(m.Payload) != want.size || c.wasCut(uint64(i+1)) != want.cut {
				t.Errorf("message %d: %s with %d bytes", i, m.TopicName, len(m.Payload))
			}
			if m.Qos == 1 && m.MessageID != 7 {
				t.Errorf("message %d has lost its identifier", i)
			}
		}
		if p, err := packets.ReadPacket(c); err != nil {
			t.Error(err)
		} else if _, ok := p.(*packets.PingrespPacket); !ok {
			t.Errorf("got %v", p)
		}
	}
}

// TestPacketConnRefuses: what would take the client library beyond its arrays,
// or much memory.
func TestPacketConnRefuses(t *testing.T) {
	suback := func(codes int) []byte {
		p := packets.NewControlPacket(packets.Suback).(*packets.SubackPacket)
		p.MessageID, p.ReturnCodes = 1, make([]byte, codes)
		return encoded(t, p)
	}
	for name, text := range map[string][]byte{
		"length of 5 bytes":     {0x30, 0xff, 0xff, 0xff, 0xff, 0x01},
		"PUBACK of 1 MiB":       {0x40, 0x80, 0x80, 0x40},
		"SUBACK with too much":  suback(3),
		"PUBLISH without topic": {0x32, 0x80, 0x80, 0x40, 0xff, 0xff},
	} {
		c := newPacketConn(&scripted{text: text, piece: 1000}, 200)
		c.expectCodes(2)
		if p, err := packets.ReadPacket(c); err == nil {
			t.Errorf("%s: %v", name, p)
		}
	}
	c := newPacketConn(&scripted{text: suback(2), piece: 1000}, 200)
	c.expectCodes(2)
	if _, err := packets.ReadPacket(c); err != nil {
		t.Error(err)
	}
}

// FuzzPacketConn: what comes out is packets within bounds, and the same whatever
// the pieces.
func FuzzPacketConn(f *testing.F) {
	f.Add(encoded(f, packetOf("a", 1, 50), packetOf("a/long", 2, 1000)), 3)
	f.Add([]byte{0x90, 3, 0, 1, 0}, 1)
	f.Add([]byte{0x30, 0xff, 0xff, 0xff, 0x7f, 0, 1, 'a'}, 2)
	f.Fuzz(func(t *testing.T, text []byte, piece int) {
		read := func(piece int) []byte {
			c := newPacketConn(&scripted{text: text, piece: piece}, 100)
			c.expectCodes(1)
			var out bytes.Buffer
			_, err := io.Copy(&out, io.LimitReader(c, int64(len(text))+16))
			if errors.Is(err, io.ErrShortBuffer) {
				t.Error(err)
			}
			return out.Bytes()
		}
		a, b := read(1), read(piece)
		if !bytes.Equal(a, b) {
			t.Errorf("%x by bytes, %x by pieces of %d", a, b, piece)
		}
		if len(a) > len(text) {
			t.Errorf("%d bytes of %d", len(a), len(text))
		}
		for r := bytes.NewReader(a); r.Len() > 0; {
			first, _ := r.ReadByte()
			n, err := readLength(r)
			if err != nil {
				break
			}
			if first>>4 == kindPublish && n > 100 && n > 4+65535 {
				t.Errorf("a packet of %d bytes", n)
			}
			if _, err := r.Seek(int64(n), io.SeekCurrent); err != nil {
				break
			}
		}
	})
}
