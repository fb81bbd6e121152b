package tunnel

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// seedMessages is one message of each kind of frame and some that are broken.
func seedMessages() [][]byte {
	f := frames{}.hello().open(2).data(2, 5)
	return [][]byte{
		f,
		f.add(frameFin, 2, nil),
		f.add(frameReset, 2, number(8)),
		f.add(frameCredit, 2, number(1<<20)),
		f.add(framePing, 0, appendPing(nil, 12345, 50*time.Second)),
		f.add(framePong, 0, make([]byte, 8)),
		f.add(frameGoAway, 0, appendGoAway(nil, GoAway{Code: CloseDrain, Deadline: time.Minute, Slot: time.Second, Alternate: "wss://other/", Reason: "upgrade"})),
		f[:len(f)-1],
		{byte(frameData), 2, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1},
		{0xff, 0, 0},
		nil,
	}
}

// FuzzDecode feeds messages to the decoders: they must not panic, must take no
// more than there is, and what they accept must survive encoding.
func FuzzDecode(f *testing.F) {
	for _, msg := range seedMessages() {
		f.Add(msg)
	}
	f.Fuzz(func(t *testing.T, msg []byte) {
		for len(msg) > 0 {
			h, n, err := parseHeader(msg)
			if err != nil {
				return
			}
			if n < 3 || n > 19 || n > len(msg) {
				t.Fatalf("header of %d bytes", n)
			}
			if again, _, err := parseHeader(appendHeader(nil, h.typ, h.id, h.length)); err != nil || again != h {
				t.Fatalf("%+v became %+v, %v", h, again, err)
			}
			if h.length > MaxMessage {
				t.Fatalf("length %d", h.length)
			}
			if h.length > len(msg)-n {
				return
			}
			checkPayload(t, h, msg[n:n+h.length])
			msg = msg[n+h.length:]
		}
	})
}

func checkPayload(t *testing.T, h header, p []byte) {
	switch h.typ {
	case frameHello:
		if v, err := parseHello(p); err == nil {
			if again, err := parseHello(appendHello(nil, v)); err != nil || again != v {
				t.Fatalf("%+v became %+v, %v", v, again, err)
			}
		}
	case frameOpen:
		if v, err := parseOpen(p); err == nil {
			if again, err := parseOpen(appendOpen(nil, v.Class, v.Kind, v.Target)); err != nil || again != v {
				t.Fatalf("%+v became %+v, %v", v, again, err)
			}
		}
	case framePing:
		if stamp, interval, err := parsePing(p); err == nil {
			if s, i, err := parsePing(appendPing(nil, stamp, interval)); err != nil || s != stamp || i != interval {
				t.Fatalf("%d %v became %d %v, %v", stamp, interval, s, i, err)
			}
		}
	case frameGoAway:
		if v, err := parseGoAway(p); err == nil {
			b := appendGoAway(nil, v)
			if again, err := parseGoAway(b); err != nil || again != v || len(b) > maxCloseFrame {
				t.Fatalf("%+v became %+v, %v", v, again, err)
			}
		}
	case frameReset, frameCredit:
		_, _ = parseOnlyUvarint(p)
	case framePong:
		_, _ = parsePong(p)
	}
}

// FuzzSession feeds messages to a session: it goes on and answers, or ends with
// a protocol error or the peer's goodbye.
func FuzzSession(f *testing.F) {
	for _, msg := range seedMessages() {
		if hello := len(frames{}.hello()); len(msg) > hello {
			f.Add(msg[hello:])
		}
	}
	f.Fuzz(func(t *testing.T, msg []byte) {
		if len(msg) > MaxMessage {
			return
		}
		ws, hub := newRawEdge(t, Config{CloseGrace: time.Millisecond}, nil)
		pong := make(chan struct{})
		go func() {
			defer close(pong)
			want := frames{}.add(framePong, 0, []byte("\x00goodbye"))
			for {
				_, got, err := ws.ReadMessage()
				if err != nil || bytes.Contains(got, want) {
					return
				}
			}
		}()
		_ = ws.WriteMessage(websocket.BinaryMessage, frames{}.hello())
		_ = ws.WriteMessage(websocket.BinaryMessage, msg)
		_ = ws.WriteMessage(websocket.BinaryMessage, frames{}.add(framePing, 0, []byte("\x00goodbye\x01")))
		select {
		case <-pong:
		case <-time.After(10 * time.Second):
			t.Fatal("the session neither answers nor ends")
		}
		var closed *CloseError
		if err := hub.Err(); err != nil && (!errors.As(err, &closed) || closed.Code != CloseProtocol && !closed.Remote) {
			var link *LinkError
			if !errors.As(err, &link) {
				t.Fatalf("session ended with %v", err)
			}
		}
	})
}

func TestHelloSkipsUnknownSettings(t *testing.T) {
	b := appendSetting(nil, 99, 5)
	b = append(number(7), b...)
	b = appendSetting(b, settingStreams, 12)
	h, err := parseHello(b)
	if err != nil || h.version != 7 || h.streams != 12 {
		t.Errorf("%+v, %v", h, err)
	}
}

// The longest of each frame fits its limit and a message.
func TestLongestFrames(t *testing.T) {
	g := appendGoAway(nil, GoAway{
		Code: 1<<32 - 1, Deadline: 1<<63 - 1, Slot: 1<<63 - 1,
		Alternate: strings.Repeat("a", maxAlternate), Reason: strings.Repeat("r", maxReason),
	})
	o := appendOpen(nil, ClassStream, strings.Repeat("k", maxKind), strings.Repeat("t", maxTarget))
	for typ, p := range map[frameType][]byte{frameGoAway: g, frameOpen: o, frameHello: appendHello(nil, hello{1, maxUvarint, 1<<63 - 1})} {
		if _, most := typ.payloadLimits(); len(p) > most {
			t.Errorf("%v of %d bytes is beyond %d", typ, len(p), most)
		}
	}
	if _, err := parseGoAway(g); err != nil {
		t.Error(err)
	}
	if _, err := parseOpen(o); err != nil {
		t.Error(err)
	}
}
