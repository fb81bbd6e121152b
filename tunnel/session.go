package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"
)

// Session is one tunnel: many streams over one WebSocket. All methods may be
// called from any goroutine.
//
// Two kinds of goroutine belong to it: one read loop, which never waits for a
// stream or for the link to take something, and a writer, which exists only
// while something waits to be sent that the caller could not send itself.
// Close waits for both.
type Session struct {
	// Set before the session starts.
	cfg   Config
	hub   bool
	ws    *websocket.Conn
	raw   net.Conn // beneath WebSocket and TLS; closed first, as that never blocks
	probe *probe   // nil where the socket cannot be asked
	mem   *Memory
	base  time.Time // what stamps count from; has a monotonic reading
	tasks sync.WaitGroup
	done  chan struct{} // closed when the session has ended
	drain chan struct{} // closed when a GOAWAY was sent or came
	ready chan struct{} // one token: something waits for Accept

	in readState // the read loop's

	lastHeard atomic.Int64 // nanoseconds since base
	lastMoved atomic.Int64 // when ClassStream last moved data
	rttMin    atomic.Int64 // zero until measured
	rttLast   atomic.Int64
	rttAsked  atomic.Int64 // when the last ping was queued
	bytesIn   [numClasses]atomic.Uint64
	framesIn  atomic.Uint64
	msgsIn    atomic.Uint64
	windows   atomic.Int64 // sum of the receive windows

	// mu guards what follows and the sending half of every stream. It is never
	// held across I/O. Lock order: Stream.wmu, mu, Stream.rmu.
	mu         sync.Mutex
	err        error // why it ended
	streams    map[uint64]*Stream
	unaccepted []*Stream
	nextID     uint64 // of the next stream opened here
	peerID     uint64 // highest id the peer opened
	ownOpen    int    // streams opened here that count against the peer's limit
	peerOpen   int    // streams the peer opened that count against ours
	peerLimit  int
	peer       hello
	away       GoAway        // what was announced, once drain is closed
	drained    chan struct{} // made by Drain, closed when no stream is left
	awayTimer  *time.Timer
	rttMinAt   int64
	keep       keepalive
	out        sendState
}

// Client starts the edge's end of a session over ws, which it owns from here.
func Client(ws *websocket.Conn, cfg Config) (*Session, error) { return newSession(ws, cfg, false) }

// Server starts the hub's end of a session over ws, which it owns from here.
func Server(ws *websocket.Conn, cfg Config) (*Session, error) { return newSession(ws, cfg, true) }

func newSession(ws *websocket.Conn, cfg Config, hub bool) (*Session, error) {
	cfg, err := cfg.withDefaults(hub)
	if err != nil {
		return nil, err
	}
	s := &Session{
		cfg: cfg, hub: hub, ws: ws, raw: rawConn(ws.NetConn()), mem: cfg.Memory, base: time.Now(),
		done: make(chan struct{}), drain: make(chan struct{}), ready: make(chan struct{}, 1),
		streams: make(map[uint64]*Stream), nextID: 2, peerLimit: helloStreams,
	}
	if hub {
		s.nextID = 1
	}
	s.lastMoved.Store(-int64(time.Hour))
	if err := tuneConn(s.raw); err != nil {
		cfg.Log.Debug("tunnel: socket options not set", "err", err)
	}
	s.probe = newProbe(s.raw)
	s.in.init(s)
	s.out.init()

	s.mu.Lock()
	defer s.mu.Unlock()
	own := hello{version: Version, streams: uint64(cfg.MaxStreams), interval: cfg.PingMax}
	if !hub {
		own.interval = s.startKeepaliveLocked()
	}
	s.out.hello = control{typ: frameHello, data: appendHello(nil, own)}
	s.pushControlLocked(s.out.hello)
	s.pushPingLocked()
	s.armKeepaliveLocked(cfg.HelloTimeout)
	s.tasks.Go(s.readLoop)
	s.kickLocked(false)
	return s, nil
}

// rawConn finds the connection beneath TLS and other wrappers.
func rawConn(c net.Conn) net.Conn {
	for {
		inner, ok := c.(interface{ NetConn() net.Conn })
		if !ok || inner.NetConn() == nil {
			return c
		}
		c = inner.NetConn()
	}
}

// Open opens a stream. It does not wait for the peer, whose refusal shows as a
// *ResetError on the stream.
func (s *Session) Open(ctx context.Context, req OpenRequest) (*Stream, error) {
	if req.Class == 0 {
		req.Class = ClassStream
	}
	if err := req.check(); err != nil {
		return nil, fmt.Errorf("tunnel: open stream: %w", err)
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("tunnel: open %s stream: %w", req.Kind, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.err != nil:
		return nil, fmt.Errorf("tunnel: open %s stream: %w", req.Kind, s.err)
	case s.drainingLocked():
		return nil, ErrDraining
	case s.ownOpen >= s.peerLimit:
		return nil, ErrTooManyStreams
	}
	st := newStream(s, s.nextID, req, true)
	s.nextID += 2
	s.ownOpen++
	s.streams[st.id] = st
	s.pushControlLocked(control{typ: frameOpen, id: st.id, data: appendOpen(nil, req.Class, req.Kind, req.Target)})
	s.kickLocked(true)
	return st, nil
}

// Accept waits for a stream the peer opened. The caller must Close or Reset it.
func (s *Session) Accept(ctx context.Context) (*Stream, error) {
	for {
		if st := s.acceptNow(); st != nil {
			return st, nil
		}
		select {
		case <-s.ready:
		case <-s.done:
			return nil, s.Err()
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (s *Session) acceptNow() *Stream {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.unaccepted) > 0 {
		st := s.unaccepted[0]
		s.unaccepted[0] = nil
		s.unaccepted = s.unaccepted[1:]
		if st.cutLocked() { // nobody is going to miss it
			s.releaseSlotLocked(st)
			continue
		}
		st.accepted = true
		if len(s.unaccepted) > 0 {
			s.signalAccept()
		} else {
			s.unaccepted = nil
		}
		return st
	}
	return nil
}

func (s *Session) signalAccept() {
	select {
	case s.ready <- struct{}{}:
	default:
	}
}

// Done is closed when the session has ended; Err then tells why.
func (s *Session) Done() <-chan struct{} { return s.done }

// Err returns why the session ended, or nil while it lives.
func (s *Session) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// LocalAddr returns the address of this end.
func (s *Session) LocalAddr() net.Addr { return s.ws.LocalAddr() }

// RemoteAddr returns the address of the peer, or of the proxy between.
func (s *Session) RemoteAddr() net.Addr { return s.ws.RemoteAddr() }

// Close ends the session and its streams and waits until all that it started
// has stopped, which takes at most about Config.CloseGrace.
func (s *Session) Close() error { return s.CloseWith(CloseNormal, "") }

// CloseWith is Close with a reason for the peer.
func (s *Session) CloseWith(code uint32, reason string) error {
	s.end(&CloseError{Code: code, Reason: reason}, true)
	s.tasks.Wait()
	return nil
}

// end ends the session; only the first call counts. If tell is set, the peer is
// told, within CloseGrace. It does not wait.
func (s *Session) end(err error, tell bool) {
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		return
	}
	s.err = err
	close(s.done)
	s.lostLocked()
	s.stopKeepaliveLocked()
	if s.awayTimer != nil {
		s.awayTimer.Stop()
	}
	streams := s.streams
	s.streams = nil
	for _, st := range s.unaccepted {
		st.accepted = true
	}
	s.unaccepted = nil
	s.out.drop()
	if s.out.paceTimer != nil {
		s.out.paceTimer.Stop()
	}
	for _, st := range streams {
		st.wcond.Broadcast()
		st.stopTimersLocked()
	}
	if tell {
		s.farewellLocked(err)
	} else {
		_ = s.raw.Close()
	}
	s.mu.Unlock()

	for _, st := range streams {
		st.sessionEnded(err)
	}
	s.logEnd(err)
}

// farewellLocked sends a last GOAWAY if the link takes it in time, and closes
// the connection. The writer closes its half after the GOAWAY, the peer then
// closes, and the read loop notices; the timer is for when this does not come
// about. A write that is blocked now is ended by the timer too.
func (s *Session) farewellLocked(err error) {
	g := GoAway{Code: CloseNormal}
	var closed *CloseError
	if errors.As(err, &closed) {
		g = GoAway{Code: closed.Code, Reason: closed.Reason[:min(len(closed.Reason), maxReason)]}
	}
	s.out.last = true
	if s.out.messages == 0 {
		s.out.control = append(s.out.control, s.out.hello) // nothing may come before it
	}
	s.out.control = append(s.out.control, control{typ: frameGoAway, data: appendGoAway(nil, g)})
	s.keep.timer = time.AfterFunc(s.cfg.CloseGrace, func() { _ = s.raw.Close() })
	s.startWriterLocked()
}

func (s *Session) logEnd(err error) {
	var closed *CloseError
	if errors.As(err, &closed) && closed.Code == CloseProtocol {
		s.cfg.Log.Warn("tunnel: session ended", "err", err)
		return
	}
	s.cfg.Log.Debug("tunnel: session ended", "err", err)
}

// Stats is what a session did so far.
type Stats struct {
	BytesIn, BytesOut       [numClasses]uint64 // payload by class; 0 is the session's own frames
	FramesIn, FramesOut     uint64
	MessagesIn, MessagesOut uint64
	Streams                 int           // open now
	Windows                 int64         // sum of the receive windows
	RTT, MinRTT             time.Duration // zero until measured
	LastHeard               time.Time     // when the last message came
	Started                 time.Time
	PingInterval            time.Duration // announced last by the edge; zero before
}

// Stats returns what the session did so far.
func (s *Session) Stats() Stats {
	st := Stats{
		FramesIn: s.framesIn.Load(), MessagesIn: s.msgsIn.Load(), Windows: s.windows.Load(),
		RTT: time.Duration(s.rttLast.Load()), MinRTT: time.Duration(s.rttMin.Load()),
		LastHeard: s.base.Add(time.Duration(s.lastHeard.Load())), Started: s.base,
	}
	for i := range s.bytesIn {
		st.BytesIn[i] = s.bytesIn[i].Load()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	st.BytesOut, st.FramesOut, st.MessagesOut = s.out.bytes, s.out.frames, s.out.messages
	st.Streams = len(s.streams)
	st.PingInterval = s.keep.announced
	return st
}

// now is the time since the session began, in nanoseconds.
func (s *Session) now() int64 { return int64(time.Since(s.base)) }
