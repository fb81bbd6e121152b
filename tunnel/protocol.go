package tunnel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// The wire format, whole. A stranger should be able to write a peer from this
// comment and the constants below it.
//
// # Connection
//
// The edge dials the hub over TLS and upgrades to a WebSocket (RFC 6455) with
// the subprotocol "skerry.mux.v1" and no extensions. Only binary messages are
// used; a text message is a protocol error. A message carries one or more
// whole frames and is at most MaxMessage bytes, so that with its WebSocket
// header it fits one TLS record. Frames never span messages.
//
// # Frame
//
//	type    1 byte    low four bits: frame type; high four bits: flags, zero in version 1
//	stream  uvarint   stream id; 0 for HELLO, PING, PONG, GOAWAY
//	length  uvarint   bytes of payload
//	payload length bytes
//
// A uvarint is that of encoding/binary (7 bits a byte, least significant
// first), below 2^62 and at most 9 bytes.
//
// # Frames
//
//	HELLO  1  first frame each side sends, once. Payload: uvarint version, then
//	          settings until the end: uvarint key, uvarint length, value. Unknown
//	          keys are skipped. Neither side waits for the other's HELLO: until
//	          it arrives the defaults below hold.
//	OPEN   2  opens the stream. Payload: 1 byte class, uvarint length and bytes
//	          of the kind, the rest is the target. Data may follow at once. The
//	          acceptor refuses by RESET. The opener's ids strictly increase: odd
//	          ids are the hub's, even ids the edge's, 0 is no stream.
//	DATA   3  1 or more bytes of the stream, in order.
//	FIN    4  no payload. The sender writes no more; the other direction lives.
//	RESET  5  payload: uvarint code. Ends both directions. What came before a FIN
//	          stays readable; otherwise unread data is dropped. No frame for
//	          the stream follows.
//	CREDIT 6  payload: uvarint offset. The receiver of this frame may send the
//	          stream's bytes up to this absolute offset. It never falls; a lower
//	          value is ignored. Both directions of each stream start at
//	          InitialWindow. A byte beyond the credit is a protocol error.
//	PING   7  payload: 8-byte stamp, uvarint interval in milliseconds. The
//	          receiver answers PONG with the stamp. An edge's interval says
//	          that it will be heard again within that time; the hub takes the
//	          session for dead when it heard nothing for 25 s longer. A
//	          hub sends 0, which promises nothing.
//	PONG   8  payload: the 8-byte stamp.
//	GOAWAY 9  payload: uvarint code, uvarint deadline in ms, uvarint slot in ms,
//	          uvarint length and bytes of an alternate URL, the rest is a reason
//	          for people. Deadline 0: the session is over. Otherwise: open no new
//	          streams here, wait slot, dial the alternate (or the same) hub,
//	          and let streams finish here until the deadline.
//
// Frames for a stream that is over are skipped; frames for an id its owner
// never opened are a protocol error, as are unknown types, flags, a length
// that does not fit the type or the message, and an OPEN with a wrong or
// reused id. Against a protocol error the receiver sends GOAWAY
// (CloseProtocol) and ends the session.
//
// # HELLO settings
//
//	1  uvarint  streams the peer may have open at once (default 64)
//	2  uvarint  edge: first ping interval in ms; hub: longest it accepts, 0 any
//
// # History
//
//	2026-11-21  version 1: first.
const (
	// Subprotocol is the WebSocket subprotocol both ends must agree on.
	Subprotocol = "skerry.mux.v1"

	// Version is the protocol version sent in HELLO.
	Version = 1

	// MaxMessage is the largest WebSocket message: one TLS record of 16 KiB
	// less the WebSocket header and some room.
	MaxMessage = 16<<10 - 64

	// InitialWindow is the credit each direction of a stream starts with.
	InitialWindow = 64 << 10

	maxKind       = 64
	maxTarget     = 1024
	maxReason     = 256
	maxAlternate  = 512
	maxUvarint    = 1<<62 - 1
	maxHeader     = 1 + 9 + 3 // type, id, length of at most MaxMessage
	helloStreams  = 64        // streams one may open before the peer's HELLO
	maxHello      = 1024
	maxCloseFrame = 3*9 + 9 + maxAlternate + maxReason
)

type frameType uint8

const (
	frameHello  frameType = 1
	frameOpen   frameType = 2
	frameData   frameType = 3
	frameFin    frameType = 4
	frameReset  frameType = 5
	frameCredit frameType = 6
	framePing   frameType = 7
	framePong   frameType = 8
	frameGoAway frameType = 9
)

const (
	settingStreams  = 1
	settingInterval = 2
)

func (t frameType) String() string {
	names := [...]string{"0", "HELLO", "OPEN", "DATA", "FIN", "RESET", "CREDIT", "PING", "PONG", "GOAWAY"}
	if int(t) < len(names) {
		return names[t]
	}
	return fmt.Sprint(uint8(t))
}

// payloadLimits gives the least and largest payload of a type.
func (t frameType) payloadLimits() (least, most int) {
	switch t {
	case frameHello:
		return 1, maxHello
	case frameOpen:
		return 2, 1 + 2 + maxKind + maxTarget
	case frameData:
		return 1, MaxMessage
	case frameFin:
		return 0, 0
	case frameReset, frameCredit:
		return 1, 9
	case framePing:
		return 9, 8 + 9
	case framePong:
		return 8, 8
	case frameGoAway:
		return 4, maxCloseFrame
	}
	return 0, -1
}

// ofStream says whether the type belongs to a stream rather than the session.
func (t frameType) ofStream() bool { return t >= frameOpen && t <= frameCredit }

type header struct {
	typ    frameType
	id     uint64
	length int
}

// errShort means that the bytes end inside what is being decoded.
var errShort = errors.New("truncated frame")

func appendHeader(b []byte, typ frameType, id uint64, length int) []byte {
	b = append(b, byte(typ))
	b = binary.AppendUvarint(b, id)
	return binary.AppendUvarint(b, uint64(length))
}

// parseHeader decodes and checks a frame header and returns how many bytes it
// took. It checks all that can be known without the session's state.
func parseHeader(b []byte) (header, int, error) {
	if len(b) == 0 {
		return header{}, 0, errShort
	}
	h := header{typ: frameType(b[0] & 0x0f)}
	if b[0]>>4 != 0 {
		return h, 0, fmt.Errorf("unknown flags in %v frame: %#x", h.typ, b[0]>>4)
	}
	least, most := h.typ.payloadLimits()
	if most < 0 {
		return h, 0, fmt.Errorf("unknown frame type %d", uint8(h.typ))
	}
	id, n, err := parseUvarint(b[1:])
	if err != nil {
		return h, 0, err
	}
	length, m, err := parseUvarint(b[1+n:])
	if err != nil {
		return h, 0, err
	}
	if length < uint64(least) || length > uint64(most) {
		return h, 0, fmt.Errorf("%v frame of stream %d has %d bytes; %d to %d are allowed", h.typ, id, length, least, most)
	}
	if h.typ.ofStream() != (id != 0) {
		return h, 0, fmt.Errorf("%v frame with stream id %d", h.typ, id)
	}
	h.id, h.length = id, int(length)
	return h, 1 + n + m, nil
}

func parseUvarint(b []byte) (v uint64, n int, err error) {
	v, n = binary.Uvarint(b)
	switch {
	case n == 0 && len(b) < 9:
		return 0, 0, errShort
	case n <= 0 || n > 9 || v > maxUvarint:
		return 0, 0, errors.New("number too large")
	}
	return v, n, nil
}

// parseOnlyUvarint decodes a payload that is one uvarint.
func parseOnlyUvarint(b []byte) (uint64, error) {
	v, n, err := parseUvarint(b)
	if err == nil && n != len(b) {
		err = errors.New("bytes after the number")
	}
	return v, err
}

func appendOpen(b []byte, class Class, kind, target string) []byte {
	b = append(b, byte(class))
	b = binary.AppendUvarint(b, uint64(len(kind)))
	b = append(b, kind...)
	return append(b, target...)
}

func parseOpen(b []byte) (OpenRequest, error) {
	if len(b) == 0 {
		return OpenRequest{}, errShort
	}
	req := OpenRequest{Class: Class(b[0])}
	kind, rest, err := parseBytes(b[1:])
	if err != nil {
		return req, err
	}
	req.Kind, req.Target = string(kind), string(rest)
	return req, req.check()
}

// parseBytes decodes a uvarint length and that many bytes.
func parseBytes(b []byte) (val, rest []byte, err error) {
	l, n, err := parseUvarint(b)
	if err != nil {
		return nil, nil, err
	}
	if l > uint64(len(b)-n) {
		return nil, nil, errShort
	}
	return b[n : n+int(l)], b[n+int(l):], nil
}

type hello struct {
	version  uint64
	streams  uint64        // 0: not said
	interval time.Duration // 0: not said
}

func appendHello(b []byte, h hello) []byte {
	b = binary.AppendUvarint(b, h.version)
	b = appendSetting(b, settingStreams, h.streams)
	return appendSetting(b, settingInterval, uint64(h.interval/time.Millisecond))
}

func appendSetting(b []byte, key, value uint64) []byte {
	var num [binary.MaxVarintLen64]byte
	n := binary.PutUvarint(num[:], value)
	b = binary.AppendUvarint(b, key)
	b = binary.AppendUvarint(b, uint64(n))
	return append(b, num[:n]...)
}

func parseHello(b []byte) (hello, error) {
	var h hello
	version, n, err := parseUvarint(b)
	if err != nil {
		return h, err
	}
	h.version = version
	for b = b[n:]; len(b) > 0; {
		key, n, err := parseUvarint(b)
		if err != nil {
			return h, err
		}
		val, rest, err := parseBytes(b[n:])
		if err != nil {
			return h, err
		}
		b = rest
		switch key {
		case settingStreams:
			if h.streams, err = parseOnlyUvarint(val); err != nil {
				return h, err
			}
		case settingInterval:
			if h.interval, err = parseMillis(val); err != nil {
				return h, err
			}
		}
	}
	return h, nil
}

// parseMillis decodes milliseconds, at most a day: longer is no interval
// anyone means, and it keeps arithmetic on it from overflowing.
func parseMillis(b []byte) (time.Duration, error) {
	v, err := parseOnlyUvarint(b)
	return millis(v), err
}

func millis(v uint64) time.Duration {
	const day = 24 * time.Hour
	if v > uint64(day/time.Millisecond) {
		return day
	}
	return time.Duration(v) * time.Millisecond
}

func appendPing(b []byte, stamp uint64, interval time.Duration) []byte {
	b = binary.BigEndian.AppendUint64(b, stamp)
	return binary.AppendUvarint(b, uint64(interval/time.Millisecond))
}

func parsePing(b []byte) (stamp uint64, interval time.Duration, err error) {
	if len(b) < 9 {
		return 0, 0, errShort
	}
	interval, err = parseMillis(b[8:])
	return binary.BigEndian.Uint64(b), interval, err
}

func parsePong(b []byte) (stamp uint64, err error) {
	if len(b) != 8 {
		return 0, errShort
	}
	return binary.BigEndian.Uint64(b), nil
}

// GoAway is what one end tells the other before it leaves.
type GoAway struct {
	Code      uint32        // why; a Close code
	Deadline  time.Duration // until the session ends; 0: now
	Slot      time.Duration // how long the edge waits before it dials anew
	Alternate string        // URL to dial instead; empty: the same
	Reason    string        // for people
}

func appendGoAway(b []byte, g GoAway) []byte {
	b = binary.AppendUvarint(b, uint64(g.Code))
	b = binary.AppendUvarint(b, uint64(g.Deadline/time.Millisecond))
	b = binary.AppendUvarint(b, uint64(g.Slot/time.Millisecond))
	b = binary.AppendUvarint(b, uint64(len(g.Alternate)))
	b = append(b, g.Alternate...)
	return append(b, g.Reason...)
}

func parseGoAway(b []byte) (GoAway, error) {
	var g GoAway
	var nums [3]uint64
	for i := range nums {
		v, n, err := parseUvarint(b)
		if err != nil {
			return g, err
		}
		nums[i], b = v, b[n:]
	}
	alt, rest, err := parseBytes(b)
	if err != nil {
		return g, err
	}
	if len(alt) > maxAlternate || len(rest) > maxReason || nums[0] > 1<<32-1 {
		return g, errors.New("field too large")
	}
	g.Code, g.Deadline, g.Slot = uint32(nums[0]), millis(nums[1]), millis(nums[2])
	g.Alternate, g.Reason = string(alt), string(rest)
	return g, nil
}
