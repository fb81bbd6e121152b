package tunnel

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/gorilla/websocket"
)

// readState belongs to the read loop. Nothing in it refers to a message once
// readMessage has returned.
type readState struct {
	msg      io.Reader // gorilla's reader of the current message
	buf      [512]byte // bytes of the message that were read ahead
	r, w     int
	ended    bool // the message has no bytes beyond buf
	greeted  bool // HELLO came
	lastID   uint64
	last     *Stream // the stream of lastID, as frames come in runs
	junk     int     // useless frames the peer may still send
	junkTime int64
}

func (in *readState) init(s *Session) {
	in.junk = junkBurst
	s.ws.SetReadLimit(MaxMessage)
	s.ws.SetPongHandler(func(string) error { return s.countJunk("WebSocket pong") })
	s.ws.SetPingHandler(func(data string) error {
		s.mu.Lock()
		s.out.wsPong = []byte(data)
		s.kickLocked(false)
		s.mu.Unlock()
		return s.countJunk("WebSocket ping")
	})
	s.ws.SetCloseHandler(func(int, string) error { return nil })
}

// protocolError is the peer's fault.
type protocolError struct{ reason string }

func (e *protocolError) Error() string { return e.reason }

func protocolErrorf(format string, args ...any) error {
	return &protocolError{fmt.Sprintf(format, args...)}
}

// readLoop reads until the session ends. It waits for nothing but the link.
func (s *Session) readLoop() {
	var err error
	for err == nil {
		err = s.readMessage()
	}
	var bad *protocolError
	switch {
	case errors.As(err, &bad):
		s.end(&CloseError{Code: CloseProtocol, Reason: bad.reason}, true)
	case errors.Is(err, websocket.ErrReadLimit):
		s.end(&CloseError{Code: CloseProtocol, Reason: fmt.Sprintf("message larger than %d bytes", MaxMessage)}, true)
	default:
		s.end(s.linkError("read", err), false)
	}
	// The peer may still be sending; were its bytes left unread, TCP would
	// reset the connection and with it our last message. The farewell's
	// timer bounds this.
	_, _ = io.Copy(io.Discard, s.raw)
	_ = s.raw.Close()
	s.mu.Lock()
	s.keep.timer.Stop()
	s.mu.Unlock()
}

// readMessage reads and handles one message.
func (s *Session) readMessage() error {
	typ, r, err := s.ws.NextReader()
	if err != nil {
		return err
	}
	if typ != websocket.BinaryMessage {
		return protocolErrorf("text message")
	}
	in := &s.in
	in.msg, in.r, in.w, in.ended = r, 0, 0, false
	defer func() { in.msg, in.last, in.lastID = nil, nil, 0 }()
	s.msgsIn.Add(1)
	s.lastHeard.Store(s.now())
	for n := 0; ; n++ {
		h, err := in.header()
		if err == io.EOF {
			if n == 0 {
				return s.countJunk("empty message")
			}
			return nil
		}
		if err != nil {
			return err
		}
		if err := s.handleFrame(h); err != nil {
			return err
		}
	}
}

// header reads the next frame's header; io.EOF means that the message is over.
func (in *readState) header() (header, error) {
	for {
		h, n, err := parseHeader(in.buf[in.r:in.w])
		switch {
		case err == nil:
			in.r += n
			return h, nil
		case !errors.Is(err, errShort):
			return h, protocolErrorf("%v", err)
		case in.ended && in.r == in.w:
			return h, io.EOF
		case in.ended:
			return h, protocolErrorf("%v", errShort)
		}
		if err := in.fill(); err != nil {
			return h, err
		}
	}
}

// fill reads ahead at least a byte or notes the message's end.
func (in *readState) fill() error {
	in.w = copy(in.buf[:], in.buf[in.r:in.w])
	in.r = 0
	n, err := in.msg.Read(in.buf[in.w:])
	in.w += n
	if err == io.EOF {
		in.ended = true
		return nil
	}
	return err
}

// payload returns the next n bytes, at most len(in.buf), until the next read.
func (in *readState) payload(n int) ([]byte, error) {
	for in.w-in.r < n {
		if in.ended {
			return nil, protocolErrorf("%v", errShort)
		}
		if err := in.fill(); err != nil {
			return nil, err
		}
	}
	p := in.buf[in.r : in.r+n]
	in.r += n
	return p, nil
}

// payloadInto fills p.
func (in *readState) payloadInto(p []byte) error {
	n := copy(p, in.buf[in.r:in.w])
	in.r += n
	if n == len(p) {
		return nil
	}
	_, err := io.ReadFull(in.msg, p[n:])
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return protocolErrorf("%v", errShort)
	}
	return err
}

// skip passes over n bytes.
func (in *readState) skip(n int) error {
	for n > 0 {
		k := min(n, len(in.buf))
		if _, err := in.payload(k); err != nil {
			return err
		}
		n -= k
	}
	return nil
}

func (s *Session) handleFrame(h header) error {
	s.framesIn.Add(1)
	in := &s.in
	if in.greeted == (h.typ == frameHello) {
		if in.greeted {
			return protocolErrorf("second HELLO")
		}
		return protocolErrorf("%v before HELLO", h.typ)
	}
	if h.typ == frameData {
		return s.handleData(h)
	}
	s.bytesIn[classControl].Add(uint64(h.length))
	var p []byte
	var err error
	if h.length <= len(in.buf) {
		p, err = in.payload(h.length)
	} else {
		p = make([]byte, h.length) // HELLO, OPEN and GOAWAY may be longer, up to their limits
		err = in.payloadInto(p)
	}
	if err != nil {
		return err
	}
	switch h.typ {
	case frameHello:
		err = s.handleHello(p)
	case frameOpen:
		err = s.handleOpen(h.id, p)
	case framePing:
		err = s.handlePing(p)
	case framePong:
		err = s.handlePong(p)
	case frameGoAway:
		err = s.handleGoAway(p)
	default:
		err = s.handleStreamFrame(h, p)
	}
	var bad *protocolError
	if err != nil && !errors.As(err, &bad) && !errors.Is(err, errSessionOver) {
		return protocolErrorf("%v frame of stream %d: %v", h.typ, h.id, err)
	}
	return err
}

// errSessionOver stops the read loop after the peer's last frame.
var errSessionOver = errors.New("session over")

func (s *Session) handleHello(p []byte) error {
	h, err := parseHello(p)
	if err != nil {
		return err
	}
	if h.version < 1 {
		return fmt.Errorf("version %d", h.version)
	}
	s.in.greeted = true
	s.mu.Lock()
	defer s.mu.Unlock()
	s.peer = h
	if h.streams > 0 {
		s.peerLimit = int(min(h.streams, 1<<20))
	}
	s.greetedLocked(h)
	return nil
}

func (s *Session) handleOpen(id uint64, p []byte) error {
	req, err := parseOpen(p)
	if err != nil {
		return err
	}
	if s.own(id) {
		return protocolErrorf("OPEN with id %d, which is not the peer's to open", id)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if id <= s.peerID {
		return protocolErrorf("OPEN with id %d after %d", id, s.peerID)
	}
	s.peerID = id
	if s.err != nil {
		return nil
	}
	code := CodeRefused
	switch {
	case s.peerOpen >= s.cfg.MaxStreams:
		code = CodeLimit
	case len(s.unaccepted) < s.cfg.AcceptBacklog:
		st := newStream(s, id, req, false)
		s.peerOpen++
		s.streams[id] = st
		s.unaccepted = append(s.unaccepted, st)
		s.signalAccept()
		return nil
	}
	s.pushControlLocked(control{typ: frameReset, id: id, val: uint64(code)})
	s.kickLocked(false)
	return s.countJunk("refused OPEN")
}

// own says whether ids like this are opened here.
func (s *Session) own(id uint64) bool { return (id%2 == 1) == s.hub }

// lookup finds a stream; nil without an error means that it is over.
func (s *Session) lookup(h header) (*Stream, error) {
	in := &s.in
	if in.last != nil && in.lastID == h.id {
		return in.last, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.streams[h.id]
	switch {
	case st != nil:
		in.last, in.lastID = st, h.id
	case s.own(h.id) && h.id >= s.nextID, !s.own(h.id) && h.id > s.peerID:
		return nil, protocolErrorf("%v frame of stream %d, which was never opened", h.typ, h.id)
	}
	return st, nil
}

func (s *Session) handleData(h header) error {
	st, err := s.lookup(h)
	if err != nil {
		return err
	}
	in := &s.in
	n := h.length
	if st == nil {
		// What was under way when the stream ended; each byte of it was
		// covered by credit, but that is no longer known.
		if n < 64 {
			if err := s.countJunk("DATA of an ended stream"); err != nil {
				return err
			}
		}
		return in.skip(n)
	}
	s.bytesIn[st.req.Class].Add(uint64(n))
	if st.req.Class == ClassStream {
		if s.moved(s.lastHeard.Load()) {
			s.mu.Lock()
			s.wakeKeepaliveLocked()
			s.mu.Unlock()
		}
	}
	st.rmu.Lock()
	if st.eof {
		st.rmu.Unlock()
		return protocolErrorf("DATA after FIN on stream %d", h.id)
	}
	if st.received+uint64(n) > st.granted {
		st.rmu.Unlock()
		return protocolErrorf("DATA on stream %d beyond its credit", h.id)
	}
	st.received += uint64(n)
	for n > 0 {
		if st.rclosed || st.rerr != nil {
			st.buf.drop(s.mem)
			st.rmu.Unlock()
			return in.skip(n)
		}
		p := st.buf.space(s.mem, n)
		st.rmu.Unlock()
		err := in.payloadInto(p)
		st.rmu.Lock()
		if err != nil {
			st.buf.filled(0)
			st.rmu.Unlock()
			return err
		}
		st.buf.filled(len(p))
		n -= len(p)
		st.rcond.Broadcast()
	}
	if st.rclosed || st.rerr != nil {
		st.buf.drop(s.mem)
	}
	st.rmu.Unlock()
	return nil
}

// handleStreamFrame handles FIN, RESET and CREDIT.
func (s *Session) handleStreamFrame(h header, p []byte) error {
	st, err := s.lookup(h)
	if err != nil {
		return err
	}
	var val uint64
	if h.typ != frameFin {
		if val, err = parseOnlyUvarint(p); err != nil {
			return err
		}
	}
	if st == nil {
		return nil // it ended here before the peer knew
	}
	switch h.typ {
	case frameFin:
		return s.handleFin(st)
	case frameReset:
		if val > 1<<32-1 {
			return errors.New("code too large")
		}
		s.handleReset(st, uint32(val))
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if val <= st.credit {
		return s.countJunk("CREDIT that grants nothing")
	}
	if val > maxUvarint-MaxMessage {
		return errors.New("offset too large")
	}
	st.credit = val
	s.activateLocked(st)
	s.kickLocked(false)
	return nil
}

func (s *Session) handleFin(st *Stream) error {
	st.rmu.Lock()
	twice := st.eof
	st.eof = true
	st.rcond.Broadcast()
	st.rmu.Unlock()
	if twice {
		return protocolErrorf("second FIN on stream %d", st.id)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	st.peerFin = true
	s.removeIfOverLocked(st)
	return nil
}

// handleReset ends a stream the peer reset. After its FIN what came before
// stays readable.
func (s *Session) handleReset(st *Stream, code uint32) {
	s.in.last = nil
	err := &ResetError{Code: code, Remote: true}
	s.mu.Lock()
	if st.failed == nil {
		st.failed = err
	}
	s.removeIfOverLocked(st)
	st.wcond.Broadcast()
	keep := st.peerFin
	s.mu.Unlock()
	if !keep {
		st.dropUnread(err)
	}
}

// removeIfOverLocked forgets a stream when no more frames of it are due.
func (s *Session) removeIfOverLocked(st *Stream) {
	if st.failed == nil && !(st.finSent && st.peerFin) || s.streams[st.id] != st {
		return
	}
	delete(s.streams, st.id)
	s.releaseSlotLocked(st)
	st.releaseWindow()
	s.drainedLocked()
}

// releaseSlotLocked stops counting a stream once it is over on the wire and the
// application is done with it: a peer that opens and resets in a loop must not
// get more handlers running than its limit.
func (s *Session) releaseSlotLocked(st *Stream) {
	over := s.streams[st.id] != st
	unseen := !st.accepted && st.cutLocked()
	if !st.slot || !over || !(st.closed || unseen) {
		return
	}
	st.slot = false
	if st.opened {
		s.ownOpen--
	} else {
		s.peerOpen--
	}
}

// cutLocked says whether the stream was reset before all that the peer meant to
// send had come.
func (st *Stream) cutLocked() bool { return st.failed != nil && !st.peerFin }

// countJunk bounds frames that are allowed but of no use.
func (s *Session) countJunk(what string) error {
	in := &s.in
	in.junk--
	if in.junk > 0 {
		return nil
	}
	now := s.now()
	in.junk = int(min(junkBurst, (now-in.junkTime)*junkPerSecond/int64(time.Second)))
	in.junkTime = now
	if in.junk <= 0 {
		return protocolErrorf("flood of useless frames, last %s", what)
	}
	return nil
}
