package tunnel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// frames builds a message.
type frames []byte

func (f frames) add(typ frameType, id uint64, payload []byte) frames {
	return append(appendHeader(slices.Clip(f), typ, id, len(payload)), payload...)
}

func (f frames) hello() frames {
	return f.add(frameHello, 0, appendHello(nil, hello{version: Version, streams: 100, interval: time.Minute}))
}

func (f frames) open(id uint64) frames {
	return f.add(frameOpen, id, appendOpen(nil, ClassStream, "k", "t"))
}

func (f frames) data(id uint64, n int) frames { return f.add(frameData, id, make([]byte, n)) }

func number(v uint64) []byte { return binary.AppendUvarint(nil, v) }

// Whatever a peer sends that the protocol does not allow ends the session, with
// a reason that the peer is told.
func TestBadPeer(t *testing.T) {
	greeted := frames{}.hello()
	opened := greeted.open(2)
	cases := []struct {
		name   string
		send   []byte
		reason string
	}{
		{"no HELLO", frames{}.open(2), "before HELLO"},
		{"second HELLO", greeted.hello(), "second HELLO"},
		{"HELLO of version 0", frames{}.add(frameHello, 0, []byte{0}), "version 0"},
		{"HELLO with a setting beyond its end", frames{}.add(frameHello, 0, []byte{1, 1, 200, 1}), "truncated"},
		{"unknown type", append(slices.Clip(greeted), 0x0f, 0, 0), "unknown frame type 15"},
		{"type 0", append(slices.Clip(greeted), 0, 0, 0), "unknown frame type 0"},
		{"flags", append(slices.Clip(greeted), 0x10|byte(frameData), 2, 0), "flags"},
		{"length beyond the type", append(slices.Clip(greeted), byte(frameData), 2, 0xff, 0xff, 0x7f), "bytes"},
		{"length of a petabyte", append(slices.Clip(greeted), byte(frameData), 2, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f), "bytes"},
		{"length beyond a number", append(slices.Clip(greeted), append([]byte{byte(frameData), 2}, bytes.Repeat([]byte{0xff}, 12)...)...), "number too large"},
		{"length beyond the message", append(slices.Clip(opened), byte(frameData), 2, 100, 1, 2, 3), "truncated"},
		{"truncated header", append(slices.Clip(opened), byte(frameData), 2), "truncated"},
		{"truncated number", append(slices.Clip(opened), byte(frameData), 0x80), "truncated"},
		{"empty DATA", opened.add(frameData, 2, nil), "0 bytes"},
		{"FIN with payload", opened.add(frameFin, 2, []byte{1}), "1 bytes"},
		{"DATA of stream 0", greeted.data(0, 1), "stream id 0"},
		{"PING with a stream", greeted.add(framePing, 2, make([]byte, 9)), "stream id 2"},
		{"OPEN of the hub's parity", greeted.open(1), "not the peer's to open"},
		{"OPEN twice", opened.open(2), "after 2"},
		{"OPEN that goes back", greeted.open(10).open(8), "after 10"},
		{"OPEN with class 0", greeted.add(frameOpen, 2, appendOpen(nil, 0, "k", "")), "unknown class 0"},
		{"OPEN with class 9", greeted.add(frameOpen, 2, appendOpen(nil, 9, "k", "")), "unknown class 9"},
		{"OPEN without kind", greeted.add(frameOpen, 2, appendOpen(nil, ClassStream, "", "t")), "kind of 0 bytes"},
		{"OPEN with a long kind", greeted.add(frameOpen, 2, appendOpen(nil, ClassStream, strings.Repeat("k", 65), "")), "kind of 65 bytes"},
		{"OPEN with a kind beyond the payload", greeted.add(frameOpen, 2, []byte{2, 100, 'k'}), "truncated"},
		{"DATA of a stream never opened", greeted.data(2, 1), "never opened"},
		{"DATA of a stream the hub never opened", greeted.data(7, 1), "never opened"},
		{"CREDIT of a stream never opened", greeted.add(frameCredit, 4, number(1)), "never opened"},
		{"RESET of a stream never opened", greeted.add(frameReset, 4, number(1)), "never opened"},
		{"DATA after FIN", opened.add(frameFin, 2, nil).data(2, 1), "after FIN"},
		{"second FIN", opened.add(frameFin, 2, nil).add(frameFin, 2, nil), "second FIN"},
		{"RESET code too large", opened.add(frameReset, 2, number(1<<32)), "code too large"},
		{"CREDIT too large", opened.add(frameCredit, 2, number(maxUvarint)), "offset too large"},
		{"CREDIT with a tail", opened.add(frameCredit, 2, append(number(1<<20), 0)), "bytes after the number"},
		{"GOAWAY without fields", greeted.add(frameGoAway, 0, make([]byte, 3)), "3 bytes"},
		{"GOAWAY with an alternate beyond it", greeted.add(frameGoAway, 0, []byte{0, 1, 0, 99}), "truncated"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			noLeaks(t)
			ws, hub := newRawEdge(t, Config{}, nil)
			write(t, ws, websocket.BinaryMessage, c.send)
			wantProtocolError(t, ws, hub, c.reason)
		})
	}
	t.Run("text", func(t *testing.T) {
		noLeaks(t)
		ws, hub := newRawEdge(t, Config{}, nil)
		write(t, ws, websocket.TextMessage, greeted)
		wantProtocolError(t, ws, hub, "text message")
	})
	t.Run("message too large", func(t *testing.T) {
		noLeaks(t)
		ws, hub := newRawEdge(t, Config{}, nil)
		write(t, ws, websocket.BinaryMessage, make([]byte, MaxMessage+1))
		wantProtocolError(t, nil, hub, "larger than")
	})
	t.Run("more than the credit", func(t *testing.T) {
		noLeaks(t)
		ws, hub := newRawEdge(t, Config{}, nil)
		write(t, ws, websocket.BinaryMessage, opened)
		for range InitialWindow / (8 << 10) {
			write(t, ws, websocket.BinaryMessage, frames{}.data(2, 8<<10))
		}
		write(t, ws, websocket.BinaryMessage, frames{}.data(2, 1))
		wantProtocolError(t, ws, hub, "beyond its credit")
	})
}

// write sends a message, reading nothing.
func write(t *testing.T, ws *websocket.Conn, typ int, msg []byte) {
	t.Helper()
	sent := make(chan error, 1)
	go func() { sent <- ws.WriteMessage(typ, msg) }()
	select {
	case err := <-sent:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the session does not read")
	}
}

// wantProtocolError waits for the session's end and, unless ws is nil, checks
// that the peer is told the same.
func wantProtocolError(t *testing.T, ws *websocket.Conn, s *Session, reason string) {
	t.Helper()
	var told GoAway
	if ws != nil {
		told = readGoAway(t, ws)
	}
	select {
	case <-s.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("the session goes on")
	}
	var closed *CloseError
	if !errors.As(s.Err(), &closed) || closed.Code != CloseProtocol || !strings.Contains(closed.Reason, reason) {
		t.Errorf("session ended with %v; want a protocol error with %q", s.Err(), reason)
	}
	if ws != nil && (told.Code != CloseProtocol || !strings.Contains(told.Reason, reason)) {
		t.Errorf("peer was told %+v", told)
	}
}

func readGoAway(t *testing.T, ws *websocket.Conn) GoAway {
	t.Helper()
	for {
		_, msg, err := ws.ReadMessage()
		if err != nil {
			t.Fatalf("no GOAWAY before %v", err)
		}
		for len(msg) > 0 {
			h, n, err := parseHeader(msg)
			if err != nil {
				t.Fatal(err)
			}
			if h.typ == frameGoAway {
				g, err := parseGoAway(msg[n : n+h.length])
				if err != nil {
					t.Fatal(err)
				}
				return g
			}
			msg = msg[n+h.length:]
		}
	}
}

// Floods of what is allowed once end the session, and nothing grows with them.
func TestFloods(t *testing.T) {
	cases := map[string]func(i int) frames{
		"PING": func(int) frames { return frames{}.add(framePing, 0, make([]byte, 9)) },
		"PONG": func(int) frames { return frames{}.add(framePong, 0, make([]byte, 8)) },
		"CREDIT that grants nothing": func(i int) frames {
			if i == 0 {
				return frames{}.open(2)
			}
			return frames{}.add(frameCredit, 2, number(1))
		},
		"OPEN": func(i int) frames { return frames{}.open(uint64(2 + 2*i)) },
		"OPEN and RESET": func(i int) frames {
			return frames{}.open(uint64(2+2*i)).add(frameReset, uint64(2+2*i), number(0))
		},
		"DATA of an ended stream": func(i int) frames {
			if i == 0 {
				return frames{}.open(2).add(frameReset, 2, number(0))
			}
			return frames{}.data(2, 1)
		},
		"GOAWAY":        func(int) frames { return frames{}.add(frameGoAway, 0, []byte{0, 1, 0, 0}) },
		"empty message": func(int) frames { return nil },
	}
	for name, frame := range cases {
		for _, reads := range []bool{true, false} {
			sub := name
			if !reads {
				sub += " without reading"
			}
			t.Run(sub, func(t *testing.T) {
				noLeaks(t)
				ws, hub := newRawEdge(t, Config{PingMax: time.Hour}, nil)
				if reads {
					go func() {
						for {
							if _, _, err := ws.ReadMessage(); err != nil {
								return
							}
						}
					}()
				}
				write(t, ws, websocket.BinaryMessage, frames{}.hello())
				before := heap()
				for i := 0; hub.Err() == nil; i++ {
					if err := ws.WriteMessage(websocket.BinaryMessage, frame(i)); err != nil {
						break
					}
					if i > 100_000 {
						t.Fatal("the session bears it")
					}
				}
				<-hub.Done()
				var closed *CloseError
				if !errors.As(hub.Err(), &closed) || closed.Code != CloseProtocol && closed.Code != CloseOverload {
					t.Errorf("session ended with %v", hub.Err())
				}
				if grown := heap() - before; grown > 4<<20 {
					t.Errorf("heap grew by %d bytes", grown)
				}
			})
		}
	}
}

func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// A peer that sends its credit in frames of a byte costs the memory of the
// bytes, not of the frames.
func TestSmallFramesTakeLittleMemory(t *testing.T) {
	noLeaks(t)
	ws, hub := newRawEdge(t, Config{}, nil)
	go func() { // the hub has something to say
		for {
			if _, _, err := ws.ReadMessage(); err != nil {
				return
			}
		}
	}()
	write(t, ws, websocket.BinaryMessage, frames{}.hello().open(2))
	st := acceptStream(t, hub)
	before := heap()
	var msg frames
	for range 4000 {
		msg = msg.data(2, 1)
	}
	for range 15 {
		write(t, ws, websocket.BinaryMessage, msg)
	}
	write(t, ws, websocket.BinaryMessage, frames{}.add(frameFin, 2, nil))
	grown := heap() - before
	if n, err := io.Copy(io.Discard, st); n != 15*4000 || err != nil {
		t.Errorf("read %d bytes, %v", n, err)
	}
	if grown > 256<<10 {
		t.Errorf("60 KiB in frames of one byte took %d bytes", grown)
	}
	st.Close()
}

// A WebSocket ping, as a proxy may send, is answered.
func TestWebSocketPing(t *testing.T) {
	noLeaks(t)
	ws, _ := newRawEdge(t, Config{}, nil)
	pong := make(chan string, 1)
	ws.SetPongHandler(func(data string) error { pong <- data; return nil })
	go func() {
		for {
			if _, _, err := ws.ReadMessage(); err != nil {
				return
			}
		}
	}()
	if err := ws.WriteControl(websocket.PingMessage, []byte("proxy"), time.Now().Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	select {
	case got := <-pong:
		if got != "proxy" {
			t.Errorf("pong %q", got)
		}
	case <-time.After(10 * time.Second):
		t.Error("no pong")
	}
}
