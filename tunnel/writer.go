package tunnel

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"time"

	"github.com/gorilla/websocket"
)

// sendState is what waits to be sent, and who sends. Session.mu guards it.
//
// Whoever finds something to send and nobody sending becomes the writer: the
// caller of Write itself if the socket has room (no hand-over), else a
// goroutine that stays until nothing is left. The read loop always leaves it
// to a goroutine, as it must not wait for the link.
type sendState struct {
	writing bool  // somebody builds or sends a message; mu is free meanwhile
	last    bool  // the session has ended: only the final GOAWAY still goes out
	broken  error // the link takes nothing any more

	hello     control   // the first frame
	control   []control // class 0, in order
	wsPong    []byte    // answer to a WebSocket ping, which a proxy might send
	pongWaits bool      // a PONG is in control; a newer stamp takes its place
	pingWaits bool      // a PING is in control
	pong      uint64    // stamp for the PONG

	sync     fifo // streams of ClassSync with something to send
	fresh    fifo // of ClassStream: those that send little
	rest     fifo // the others
	debt     int  // what ClassSync sent while ClassStream waited
	freshRun int  // what fresh streams sent while others waited

	pace      pacer
	paced     bool // rest has to wait for paceTimer
	paceTimer *time.Timer

	hdr     [maxHeader]byte // scratch; on the stack these would be allocated anew each time
	payload [32]byte

	bytes            [numClasses]uint64
	frames, messages uint64
}

// control is a frame of class 0.
type control struct {
	typ  frameType
	id   uint64
	val  uint64  // RESET: code
	data []byte  // payload, where it is not built when it is sent
	st   *Stream // CREDIT
}

type listed uint8

const (
	unlisted listed = iota
	inSync
	inFresh
	inRest
)

func (o *sendState) init() { o.control = make([]control, 0, 4) }

// drop forgets what waits: the session has ended.
func (o *sendState) drop() {
	o.control, o.wsPong = nil, nil
	o.sync, o.fresh, o.rest = fifo{}, fifo{}, fifo{}
}

// pushControlLocked queues a frame of class 0. Their number is bounded by the
// streams, but for refusals of a peer that opens streams and takes no answers.
func (s *Session) pushControlLocked(c control) {
	if s.err != nil {
		return
	}
	s.out.control = append(s.out.control, c)
	if len(s.out.control) > 4*s.cfg.MaxStreams+controlMargin && len(s.out.control) > 4*s.ownOpen+controlMargin {
		s.tasks.Go(func() {
			s.end(&CloseError{Code: CloseOverload, Reason: "too many control frames wait to be sent"}, false)
		})
	}
}

// sendableLocked says whether the stream has something the link may carry.
func (st *Stream) sendableLocked() bool {
	if st.failed != nil {
		return false
	}
	if len(st.pend) > 0 {
		return st.sent < st.credit
	}
	return st.finWanted && !st.finSent
}

// activateLocked puts a stream that has something to send in its list. As in
// RFC 8290, those that send little go first, which favours keystrokes without
// anybody labelling them. What is little is a token bucket's matter, filled
// while the stream has nothing to send: it has nothing between two Writes
// either, so that this alone does not say much.
func (s *Session) activateLocked(st *Stream) {
	if st.listed != unlisted || !st.sendableLocked() || s.err != nil {
		return
	}
	if st.req.Class == ClassSync {
		st.listed = inSync
		s.out.sync.push(st)
		return
	}
	now := s.now()
	st.tokens = min(quantum, st.tokens+int(float64(now-st.tokensAt)*s.sparseRate()/float64(time.Second)))
	if st.tokens >= quantum/8 {
		st.listed = inFresh
		s.out.fresh.push(st)
		return
	}
	st.listed, st.deficit = inRest, quantum
	s.out.rest.push(st)
}

// sparseRate is how many bytes a second are little: an eighth of the link, or,
// where the link's rate does not matter, so much that only bulk comes by it.
func (s *Session) sparseRate() float64 {
	if p := &s.out.pace; p.minRTT >= paceRTT && p.rate > 0 {
		return p.rate / 8
	}
	return 16 << 20
}

// kickLocked sees to it that what waits is sent. With inline set the caller may
// send it itself if the socket has room; it must not be the read loop.
func (s *Session) kickLocked(inline bool) {
	if s.err != nil || inline && s.writeInlineLocked() && !s.out.waits() {
		return
	}
	s.startWriterLocked()
}

func (s *Session) startWriterLocked() {
	if !s.out.writing && s.out.broken == nil && s.out.waits() {
		s.out.writing = true
		s.tasks.Go(s.writeLoop)
	}
}

func (o *sendState) waits() bool {
	return len(o.control) > 0 || o.wsPong != nil || o.sync.len()+o.fresh.len() > 0 || o.rest.len() > 0 && !o.paced
}

// writeInlineLocked sends one message if nobody else sends and the socket takes
// it without waiting.
func (s *Session) writeInlineLocked() bool {
	if s.out.writing || s.out.broken != nil || s.err != nil || s.probe == nil || !s.probe.writable() {
		return false
	}
	s.out.writing = true
	s.tasks.Add(1)
	wrote := s.writeMessageLocked()
	s.out.writing = false
	if s.err != nil {
		s.startWriterLocked() // for the farewell, which waited for this write
	}
	s.tasks.Done()
	return wrote
}

// writeLoop is the writer goroutine.
func (s *Session) writeLoop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.writeMessageLocked() {
	}
	s.out.writing = false
}

// writeMessageLocked builds one message from what waits and sends it; mu is
// free while it does. It returns false if nothing is left to send.
func (s *Session) writeMessageLocked() bool {
	if s.out.wsPong != nil {
		return s.writePongLocked()
	}
	last := s.out.last
	w, err := s.fillLocked()
	if w == nil && err == nil {
		return false
	}
	s.mu.Unlock()
	if err == nil {
		err = w.Close()
	}
	if err == nil && last {
		closeWrite(s.raw)
	}
	s.mu.Lock()
	if err != nil {
		s.brokenLocked(err)
		return false
	}
	s.keep.lastSent = s.now()
	return !last
}

// brokenLocked notes that writing failed. The session's end is left to the read
// loop for a moment: the peer's last words may be there to be read.
func (s *Session) brokenLocked(err error) {
	if s.out.broken == nil && s.err == nil {
		s.armKeepaliveLocked(s.cfg.CloseGrace)
	}
	s.out.broken = s.linkError("write", err)
}

func (s *Session) writePongLocked() bool {
	data := s.out.wsPong
	s.out.wsPong = nil
	s.mu.Unlock()
	w, err := s.ws.NextWriter(websocket.PongMessage)
	if err == nil {
		if _, err = w.Write(data); err == nil {
			err = w.Close()
		}
	}
	s.mu.Lock()
	if err != nil {
		s.brokenLocked(err)
	}
	return err == nil
}

// leastRoom is enough for a FIN and the RESET that may follow it.
const leastRoom = 2*maxHeader + 9

// message is a WebSocket message being filled.
type message struct {
	s    *Session
	w    io.WriteCloser
	room int
	err  error
}

// fillLocked builds a message straight in gorilla's buffer, which holds a whole
// one: nothing here waits for the link.
func (s *Session) fillLocked() (io.WriteCloser, error) {
	m := message{s: s, room: MaxMessage}
	s.fillControlLocked(&m)
	// An OPEN that did not fit must not be overtaken by its stream's data. Where
	// there is room at all, there is enough for the stream's last frames, so
	// that each pick gets somewhere.
	bulk := s.bulkLocked()
	for len(s.out.control) == 0 && m.err == nil && m.room >= leastRoom && s.err == nil {
		st, limit := s.pickLocked(bulk)
		if st == nil {
			break
		}
		rest := st.listed == inRest
		if n := s.fillStreamLocked(&m, st, limit); rest {
			bulk = max(0, bulk-n)
		}
	}
	if m.w != nil {
		s.out.messages++
	}
	return m.w, m.err
}

func (m *message) frame(class Class, typ frameType, id uint64, payload []byte) {
	if m.w == nil {
		if m.w, m.err = m.s.ws.NextWriter(websocket.BinaryMessage); m.err != nil {
			return
		}
	}
	o := &m.s.out
	hdr := appendHeader(o.hdr[:0], typ, id, len(payload))
	m.write(hdr)
	if len(payload) > 0 {
		m.write(payload)
	}
	m.room -= len(hdr) + len(payload)
	o.frames++
	o.bytes[class] += uint64(len(payload))
}

func (m *message) write(b []byte) {
	if m.err == nil {
		_, m.err = m.w.Write(b)
	}
}

// fillControlLocked puts in what fits of class 0.
func (s *Session) fillControlLocked(m *message) {
	o := &s.out
	var num [8 + binary.MaxVarintLen64]byte
	done := 0
	for _, c := range o.control {
		if m.err != nil || m.room < maxHeader+max(len(c.data), len(num)) {
			break
		}
		done++
		switch c.typ {
		case frameCredit:
			c.st.granting = false
			if c.st.failed == nil && !c.st.peerFin {
				m.frame(classControl, c.typ, c.id, binary.AppendUvarint(o.scratch(), c.st.grant))
			}
		case frameReset:
			m.frame(classControl, c.typ, c.id, binary.AppendUvarint(o.scratch(), c.val))
		case framePong:
			o.pongWaits = false
			m.frame(classControl, c.typ, 0, binary.BigEndian.AppendUint64(o.scratch(), o.pong))
		case framePing:
			m.frame(classControl, c.typ, 0, s.pingPayloadLocked(o.scratch()))
		default:
			m.frame(classControl, c.typ, c.id, c.data)
		}
	}
	if done == len(o.control) && cap(o.control) > 64 {
		o.control = nil // a burst is over; an idle session keeps little
		return
	}
	left := copy(o.control, o.control[done:])
	clear(o.control[left:])
	o.control = o.control[:left]
}

// scratch is where small payloads are built.
func (o *sendState) scratch() []byte { return o.payload[:0] }

// pickLocked chooses the stream whose turn it is and how much it may send; those
// that send much may come to bulk bytes.
func (s *Session) pickLocked(bulk int) (*Stream, int) {
	o := &s.out
	for {
		streams := o.fresh.len()
		if bulk > 0 {
			streams += o.rest.len()
		}
		if o.sync.len() > 0 && (streams == 0 || o.debt < 9*quantum) {
			st := o.sync.pop()
			if !st.sendableLocked() {
				st.listed = unlisted
				continue
			}
			o.sync.push(st) // round robin
			if streams == 0 {
				o.debt = 0
				if o.sync.len() == 1 {
					return st, MaxMessage
				}
			}
			return st, quantum
		}
		if streams == 0 {
			return nil, 0
		}
		q := &o.fresh
		if o.fresh.len() == 0 || bulk > 0 && o.rest.len() > 0 && o.freshRun >= 16*quantum {
			q = &o.rest
			o.freshRun = 0
		}
		st := q.front()
		switch {
		case !st.sendableLocked():
			q.pop()
			st.listed, st.tokensAt = unlisted, s.now()
		case st.listed == inFresh && st.tokens > 0:
			return st, st.tokens
		case st.listed == inFresh:
			q.pop()
			st.listed, st.deficit = inRest, quantum
			o.rest.push(st)
		case st.deficit <= 0:
			q.pop()
			st.deficit += quantum
			o.rest.push(st)
		case streams == 1 && o.sync.len() == 0:
			return st, bulk
		default:
			return st, min(st.deficit, bulk)
		}
	}
}

// fillStreamLocked puts in up to limit bytes of the stream, and its end. It
// returns how many bytes.
func (s *Session) fillStreamLocked(m *message, st *Stream, limit int) int {
	n := min(len(st.pend), limit, m.room-maxHeader)
	if left := st.credit - st.sent; uint64(n) > left {
		n = int(left)
	}
	if n > 0 {
		m.frame(st.req.Class, frameData, st.id, st.pend[:n])
		st.pend = st.pend[n:]
		st.sent += uint64(n)
		s.accountLocked(st, n)
		if len(st.pend) == 0 {
			st.wcond.Signal()
		}
	}
	if len(st.pend) > 0 || !st.finWanted || st.finSent || m.room < leastRoom {
		return n
	}
	st.finSent = true
	m.frame(st.req.Class, frameFin, st.id, nil)
	if st.abandon {
		m.frame(classControl, frameReset, st.id, binary.AppendUvarint(s.out.scratch(), uint64(CodeClosed)))
		st.failed = &ResetError{Code: CodeClosed}
	}
	s.removeIfOverLocked(st)
	return n
}

// accountLocked keeps the books pickLocked decides by.
func (s *Session) accountLocked(st *Stream, n int) {
	o := &s.out
	if st.req.Class == ClassSync {
		if o.fresh.len()+o.rest.len() > 0 {
			o.debt += n
		}
		return
	}
	// Alone it may send more; that is not held against it.
	st.deficit, st.tokens = max(0, st.deficit-n), max(0, st.tokens-n)
	o.debt = max(0, o.debt-9*n)
	if st.listed == inFresh && o.rest.len() > 0 {
		o.freshRun += n
	}
	if s.moved(s.now()) {
		s.wakeKeepaliveLocked()
	}
}

// closeWrite sends what was written and then the end, so that the peer gets the
// last message rather than a TCP reset.
func closeWrite(c net.Conn) {
	if half, ok := c.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite()
		return
	}
	_ = c.Close()
}

// linkError tells what happened to the connection.
func (s *Session) linkError(op string, err error) error {
	if errors.Is(err, net.ErrClosed) {
		err = errors.New("connection closed")
	}
	return &LinkError{Op: op, Peer: s.RemoteAddr().String(), Err: err}
}

// fifo is a queue of streams that keeps its array.
type fifo struct {
	q    []*Stream
	head int
}

func (f *fifo) len() int       { return len(f.q) - f.head }
func (f *fifo) front() *Stream { return f.q[f.head] }

func (f *fifo) push(st *Stream) {
	if f.head > 32 && f.head*2 > len(f.q) {
		n := copy(f.q, f.q[f.head:])
		clear(f.q[n:])
		f.q, f.head = f.q[:n], 0
	}
	f.q = append(f.q, st)
}

func (f *fifo) pop() *Stream {
	st := f.q[f.head]
	f.q[f.head] = nil
	f.head++
	if f.head == len(f.q) {
		f.q, f.head = f.q[:0], 0
		if cap(f.q) > 64 {
			f.q = nil
		}
	}
	return st
}
