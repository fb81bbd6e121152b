package tunnel

import (
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// Stream is one byte stream of a session. It is a net.Conn with half-close
// (CloseWrite) and abort (Reset).
type Stream struct {
	s      *Session
	id     uint64
	req    OpenRequest
	opened bool // here, not by the peer

	wmu sync.Mutex // one Write at a time

	// Guarded by s.mu: the sending half and what is common to both.
	wcond     sync.Cond
	pend      []byte // what the blocked Write still has to send
	sent      uint64 // offset of the next byte
	credit    uint64 // offset up to which the peer takes bytes
	deficit   int    // what it may send before it is another's turn
	tokens    int    // what it may send before it counts as one that sends much
	tokensAt  int64
	listed    listed
	finWanted bool // FIN goes out once pend is empty
	finSent   bool
	abandon   bool // RESET(CodeClosed) follows the FIN
	peerFin   bool
	failed    *ResetError // reset by either end
	accepted  bool
	closed    bool // Close or Reset was called: the application is done with it
	slot      bool // counts against a limit of open streams
	wdeadline deadline
	granting  bool // a CREDIT waits to be sent
	grant     uint64
	stall     *time.Timer // nil unless SetStallTimeout was called

	// Guarded by rmu: the receiving half.
	rmu       sync.Mutex
	rcond     sync.Cond
	buf       receiveBuffer
	received  uint64 // offset of the next byte from the peer
	consumed  uint64 // offset of the next byte for Read
	granted   uint64 // offset the peer may send up to
	window    uint64
	turnStart int64 // when this turn of the window began
	turnFrom  uint64
	lastRead  int64
	eof       bool  // FIN came
	rerr      error // nothing more can be read
	rclosed   bool  // what comes is dropped
	uncharged bool  // the window is no longer charged to the budgets
	rdeadline deadline
}

var _ net.Conn = (*Stream)(nil)

func newStream(s *Session, id uint64, req OpenRequest, opened bool) *Stream {
	st := &Stream{
		s: s, id: id, req: req, opened: opened, accepted: opened, slot: true,
		credit: InitialWindow, granted: InitialWindow, window: InitialWindow,
	}
	st.wcond.L, st.rcond.L = &s.mu, &st.rmu
	st.turnStart = s.now()
	st.lastRead, st.tokens, st.tokensAt = st.turnStart, quantum, st.turnStart
	s.windows.Add(InitialWindow)
	s.mem.used.Add(InitialWindow)
	return st
}

// Kind is what the opener asked for.
func (st *Stream) Kind() string { return st.req.Kind }

// Target is what the opener asked the kind's server for.
func (st *Stream) Target() string { return st.req.Target }

// Class is how the stream shares the link.
func (st *Stream) Class() Class { return st.req.Class }

// Session is what carries the stream.
func (st *Stream) Session() *Session { return st.s }

// LocalAddr returns the session's address at this end.
func (st *Stream) LocalAddr() net.Addr { return st.s.LocalAddr() }

// RemoteAddr returns the session's address at the peer.
func (st *Stream) RemoteAddr() net.Addr { return st.s.RemoteAddr() }

// Read reads what has come; after the peer's FIN it returns io.EOF, after a
// reset a *ResetError, after the session's end why it ended.
func (st *Stream) Read(p []byte) (int, error) {
	st.rmu.Lock()
	for {
		switch {
		case st.rclosed:
			st.rmu.Unlock()
			return 0, net.ErrClosed
		case st.rdeadline.passed:
			st.rmu.Unlock()
			return 0, os.ErrDeadlineExceeded
		case len(p) == 0:
			st.rmu.Unlock()
			return 0, nil
		}
		if st.buf.size > 0 {
			n := st.buf.read(st.s.mem, p)
			st.consumed += uint64(n)
			offset, more := st.consumedLocked()
			st.rmu.Unlock()
			if more {
				st.sendCredit(offset)
			}
			return n, nil
		}
		if st.eof {
			st.rmu.Unlock()
			return 0, io.EOF
		}
		if st.rerr != nil {
			err := st.rerr
			st.rmu.Unlock()
			return 0, err
		}
		st.rcond.Wait()
	}
}

// Write sends p and returns when all of it is in messages on their way, or at
// the write deadline with how much is.
func (st *Stream) Write(p []byte) (int, error) {
	st.wmu.Lock()
	defer st.wmu.Unlock()
	s := st.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := st.writeErrLocked(); err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, nil
	}
	st.pend = p
	s.activateLocked(st)
	var err error
	for len(st.pend) > 0 && err == nil {
		wrote := st.sendableLocked() && s.writeInlineLocked()
		// The lock was free while that wrote: the stream may have ended, or
		// somebody may have sent the rest, and have told nobody who waits.
		if err = st.writeErrLocked(); wrote || err != nil || len(st.pend) == 0 {
			continue
		}
		s.kickLocked(false)
		st.wcond.Wait()
		err = st.writeErrLocked()
	}
	n := len(p) - len(st.pend)
	if n == len(p) {
		err = nil
	}
	st.pend = nil
	s.activateLocked(st) // a FIN may have waited
	s.kickLocked(false)
	return n, err
}

func (st *Stream) writeErrLocked() error {
	switch {
	case st.failed != nil:
		return st.failed
	case st.closed || st.finWanted:
		return net.ErrClosed
	case st.s.err != nil:
		return st.s.err
	case st.wdeadline.passed:
		return os.ErrDeadlineExceeded
	}
	return nil
}

// CloseWrite tells the peer that no more comes; reading goes on.
func (st *Stream) CloseWrite() error {
	st.s.mu.Lock()
	defer st.s.mu.Unlock()
	switch {
	case st.failed != nil:
		return st.failed
	case st.closed:
		return net.ErrClosed
	case st.s.err != nil:
		return st.s.err
	}
	st.finLocked()
	return nil
}

// finLocked queues the FIN and lets a blocked Write go.
func (st *Stream) finLocked() {
	if st.finWanted {
		return
	}
	st.finWanted = true
	st.wcond.Broadcast()
	st.s.activateLocked(st)
	st.s.kickLocked(true)
}

// Close ends both directions. What was written still arrives; what was not read
// is dropped, and the peer's further writes fail with CodeClosed.
func (st *Stream) Close() error {
	s := st.s
	s.mu.Lock()
	if st.closed {
		s.mu.Unlock()
		return nil
	}
	st.closed = true
	if st.failed == nil && s.err == nil {
		st.abandon = !st.peerFin
		if st.finSent && st.abandon {
			s.pushControlLocked(control{typ: frameReset, id: st.id, val: uint64(CodeClosed)})
			st.failed = &ResetError{Code: CodeClosed}
			s.kickLocked(true)
		}
		st.finLocked()
		s.removeIfOverLocked(st)
	}
	st.wcond.Broadcast()
	st.stopTimersLocked()
	s.releaseSlotLocked(st)
	s.mu.Unlock()
	st.dropUnread(nil)
	return nil
}

// Reset ends both directions at once and tells the peer the code.
func (st *Stream) Reset(code uint32) error {
	s := st.s
	s.mu.Lock()
	if st.closed {
		s.mu.Unlock()
		return nil
	}
	st.closed = true
	if s.err == nil {
		s.resetLocked(st, code)
	}
	st.stopTimersLocked()
	s.releaseSlotLocked(st)
	s.mu.Unlock()
	st.dropUnread(nil)
	return nil
}

// resetLocked resets a stream from here; the application may still hold it.
func (s *Session) resetLocked(st *Stream, code uint32) {
	if st.failed != nil || s.err != nil || st.finSent && st.peerFin {
		return
	}
	st.failed = &ResetError{Code: code}
	s.pushControlLocked(control{typ: frameReset, id: st.id, val: uint64(code)})
	s.removeIfOverLocked(st)
	st.wcond.Broadcast()
	s.kickLocked(true)
}

// dropUnread frees what was not read. With an error that is what Read returns
// from now on, without one the stream is closed here.
func (st *Stream) dropUnread(err error) {
	st.rmu.Lock()
	defer st.rmu.Unlock()
	if err == nil {
		st.rclosed = true
		st.rdeadline.stop()
	} else if st.rerr == nil {
		st.rerr = err
	}
	st.buf.drop(st.s.mem)
	st.rcond.Broadcast()
}

// sessionEnded lets readers have what came and then the reason.
func (st *Stream) sessionEnded(err error) {
	st.rmu.Lock()
	defer st.rmu.Unlock()
	if st.rerr == nil {
		st.rerr = err
	}
	st.releaseWindowLocked()
	st.rcond.Broadcast()
}

func (st *Stream) stopTimersLocked() {
	st.wdeadline.stop()
	if st.stall != nil {
		st.stall.Stop()
	}
}

// SetDeadline sets both deadlines.
func (st *Stream) SetDeadline(t time.Time) error {
	if err := st.SetReadDeadline(t); err != nil {
		return err
	}
	return st.SetWriteDeadline(t)
}

// SetReadDeadline makes Read fail with os.ErrDeadlineExceeded from t on; the
// zero time means never.
func (st *Stream) SetReadDeadline(t time.Time) error {
	st.rmu.Lock()
	defer st.rmu.Unlock()
	if st.rclosed {
		return net.ErrClosed
	}
	st.rdeadline.set(t, &st.rcond)
	return nil
}

// SetWriteDeadline makes Write fail with os.ErrDeadlineExceeded from t on, also
// while it waits for credit; the zero time means never.
func (st *Stream) SetWriteDeadline(t time.Time) error {
	st.s.mu.Lock()
	defer st.s.mu.Unlock()
	if st.closed {
		return net.ErrClosed
	}
	st.wdeadline.set(t, &st.wcond)
	return nil
}

// SetStallTimeout resets the stream with CodeStalled once its receive window has
// been full and nothing was read for d, or up to twice that; zero means never.
// It is for streams whose bytes are not worth keeping for a reader that has
// gone, as logs: an exec may well wait.
func (st *Stream) SetStallTimeout(d time.Duration) {
	st.s.mu.Lock()
	defer st.s.mu.Unlock()
	if st.stall != nil {
		st.stall.Stop()
		st.stall = nil
	}
	if d <= 0 || st.closed || st.failed != nil || st.s.err != nil {
		return
	}
	var seen uint64
	full := false
	var timer *time.Timer
	timer = time.AfterFunc(d, func() {
		st.rmu.Lock()
		stuck := full && seen == st.consumed
		seen, full = st.consumed, st.granted == st.received && st.buf.size > 0
		st.rmu.Unlock()
		st.s.mu.Lock()
		defer st.s.mu.Unlock()
		switch {
		case st.stall != timer || st.closed || st.failed != nil || st.s.err != nil:
			return
		case stuck:
			st.s.resetLocked(st, CodeStalled)
			st.dropUnread(&ResetError{Code: CodeStalled})
		default:
			timer.Reset(d)
		}
	})
	st.stall = timer
}

// deadline wakes a condition's waiters when its time has come. The condition's
// lock guards it.
type deadline struct {
	passed bool
	timer  *time.Timer
}

func (d *deadline) set(t time.Time, cond *sync.Cond) {
	d.stop()
	d.passed = false
	if t.IsZero() {
		return
	}
	wait := time.Until(t)
	if wait <= 0 {
		d.passed = true
		cond.Broadcast()
		return
	}
	var timer *time.Timer
	timer = time.AfterFunc(wait, func() {
		cond.L.Lock()
		defer cond.L.Unlock()
		if d.timer == timer { // not set anew meanwhile
			d.passed = true
			cond.Broadcast()
		}
	})
	d.timer = timer
}

func (d *deadline) stop() {
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
}
