package tunnel

import (
	"context"
	"fmt"
	"net"
	"sync"
	"time"
)

// keepalive decides when the link was silent for too long. One timer drives it
// and no goroutine. Session.mu guards it.
//
// Only the edge pings, and only when it has sent or heard nothing for the
// interval; each ping announces the next interval. The hub merely checks that
// it heard something within the announced interval and DeadGrace. Any traffic
// counts.
type keepalive struct {
	timer     *time.Timer
	greeted   bool
	lastSent  int64
	announced time.Duration // the edge is heard again within this
	idle      *pingInterval // edge: the interval learned for quiet times

	pingAt   int64 // edge: when the unanswered ping went out, 0 for none
	pingIdle bool  // it tested the quiet interval

	stamp   int64 // of the last PING sent; answers to later ones are not ours
	waiting []pingWaiter
}

type pingWaiter struct {
	from int64 // counts from a PING stamped then or later
	rtt  chan time.Duration
}

func (s *Session) startKeepaliveLocked() time.Duration {
	k := &s.keep
	k.idle = s.cfg.learned
	if k.idle == nil {
		k.idle = new(pingInterval)
	}
	k.announced = k.idle.start(s.cfg, networkOf(s.LocalAddr()))
	return k.announced
}

// networkOf tells apart the networks an edge may be in.
func networkOf(local net.Addr) string {
	host, _, err := net.SplitHostPort(local.String())
	if err != nil {
		return local.String()
	}
	return host
}

// armKeepaliveLocked makes the check come after d.
func (s *Session) armKeepaliveLocked(d time.Duration) {
	d = max(d, time.Millisecond)
	if s.out.broken != nil {
		return // the check that ends the session is due
	}
	if s.keep.timer == nil {
		s.keep.timer = time.AfterFunc(d, s.checkLink)
		return
	}
	s.keep.timer.Reset(d)
}

func (s *Session) stopKeepaliveLocked() {
	s.keep.timer.Stop()
	for _, w := range s.keep.waiting {
		close(w.rtt)
	}
	s.keep.waiting = nil
}

// greetedLocked takes note of the peer's HELLO.
func (s *Session) greetedLocked(h hello) {
	s.keep.greeted = true
	if s.hub {
		s.promisedLocked(h.interval)
	}
	if s.err == nil {
		s.armKeepaliveLocked(0)
	}
}

// promisedLocked takes the edge's word for when it is heard again. An edge that
// promises nothing, or beyond the hub's cap, is held to the cap.
func (s *Session) promisedLocked(interval time.Duration) {
	limit := s.cfg.PingMax
	if limit == 0 {
		limit = time.Hour
	}
	if interval <= 0 || interval > limit {
		interval = limit
	}
	s.keep.announced = max(interval, time.Second)
}

// checkLink is the timer's.
func (s *Session) checkLink() {
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		return
	}
	if err := s.out.broken; err != nil {
		s.mu.Unlock()
		s.end(err, false)
		return
	}
	now := s.now()
	var why string
	switch {
	case !s.keep.greeted:
		if left := s.cfg.HelloTimeout - time.Duration(now); left > 0 {
			s.armKeepaliveLocked(left)
		} else {
			why = fmt.Sprintf("no HELLO within %v", s.cfg.HelloTimeout)
		}
	case s.hub:
		why = s.checkEdgeLocked(now)
	default:
		why = s.pingHubLocked(now)
	}
	s.mu.Unlock()
	if why != "" {
		s.end(&CloseError{Code: CloseDead, Reason: why}, true)
	}
}

// checkEdgeLocked is the hub's check.
func (s *Session) checkEdgeLocked(now int64) (dead string) {
	limit := s.silenceLocked()
	quiet := time.Duration(now - s.lastHeard.Load())
	if quiet >= limit {
		return fmt.Sprintf("nothing heard for %v", quiet.Round(time.Second))
	}
	s.armKeepaliveLocked(limit - quiet)
	return ""
}

// silenceLocked is how long the hub bears to hear nothing.
func (s *Session) silenceLocked() time.Duration { return s.keep.announced + s.cfg.DeadGrace }

// Probe asks the hub for a sign of life now, as after a change of the network,
// in place of at the next ping: without one within Config.PongTimeout the
// session ends. It is the edge's, and does nothing while a ping is unanswered.
func (s *Session) Probe() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil || s.hub || !s.keep.greeted || s.keep.pingAt > 0 && s.lastHeard.Load() < s.keep.pingAt {
		return
	}
	s.keep.pingAt, s.keep.pingIdle = max(s.now(), 1), false
	s.pushPingLocked()
	s.kickLocked(false)
	s.armKeepaliveLocked(s.cfg.PongTimeout)
}

// pingHubLocked is the edge's check.
func (s *Session) pingHubLocked(now int64) (dead string) {
	k := &s.keep
	heard := s.lastHeard.Load()
	if k.pingAt > 0 && heard < k.pingAt {
		if silent := time.Duration(now - k.pingAt); silent >= s.cfg.PongTimeout {
			return fmt.Sprintf("no answer to a ping for %v", silent.Round(time.Second))
		}
		s.armKeepaliveLocked(s.cfg.PongTimeout - time.Duration(now-k.pingAt))
		return ""
	}
	k.pingAt = 0
	interval, busy := s.intervalLocked(now)
	// The hub must hear us within what was announced; we want to hear it
	// within what holds now.
	due := min(heard+int64(interval), k.lastSent+int64(min(interval, k.announced)))
	if now < due {
		s.armKeepaliveLocked(time.Duration(due - now))
		return ""
	}
	k.pingAt, k.pingIdle = max(now, 1), !busy
	s.pushPingLocked()
	s.kickLocked(false)
	s.armKeepaliveLocked(s.cfg.PongTimeout)
	return ""
}

// intervalLocked is how long the edge lets the link be silent now.
func (s *Session) intervalLocked(now int64) (d time.Duration, busy bool) {
	d = s.keep.idle.get()
	if limit := s.peer.interval; limit > 0 {
		d = min(d, limit)
	}
	if now-s.lastMoved.Load() < int64(busyFor) && s.cfg.BusyPing < d {
		return s.cfg.BusyPing, true
	}
	return d, false
}

// moved notes that ClassStream moved data. It returns true if the edge's timer
// must look again, as the link was quiet before.
func (s *Session) moved(now int64) bool {
	before := s.lastMoved.Swap(now)
	return !s.hub && now-before > int64(s.cfg.BusyPing)
}

// wakeKeepaliveLocked makes the edge's timer look again when it has become busy.
func (s *Session) wakeKeepaliveLocked() {
	if s.err == nil && s.keep.greeted {
		s.armKeepaliveLocked(0)
	}
}

// pushPingLocked queues a PING, from either end; the hub's only measures.
func (s *Session) pushPingLocked() {
	if !s.out.pingWaits {
		s.out.pingWaits = true
		s.pushControlLocked(control{typ: framePing})
	}
}

// pingPayloadLocked builds the PING when it is sent, so that its stamp is true.
func (s *Session) pingPayloadLocked(b []byte) []byte {
	k, now := &s.keep, s.now()
	s.out.pingWaits = false
	k.stamp = max(now, k.stamp+1)
	s.rttAsked.Store(now)
	var interval time.Duration
	if !s.hub {
		interval, _ = s.intervalLocked(now)
		k.announced = interval
		if k.pingAt > 0 {
			k.pingAt = max(now, 1)
		}
	}
	return appendPing(b, uint64(k.stamp), interval)
}

func (s *Session) handlePing(p []byte) error {
	stamp, interval, err := parsePing(p)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.out.pong = stamp
	if !s.out.pongWaits {
		s.out.pongWaits = true
		s.pushControlLocked(control{typ: framePong})
	}
	if s.hub && s.err == nil {
		s.promisedLocked(interval)
		s.armKeepaliveLocked(s.silenceLocked())
	}
	s.kickLocked(false)
	return s.countJunk("PING")
}

func (s *Session) handlePong(p []byte) error {
	stamp, err := parsePong(p)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	k, now := &s.keep, s.now()
	if stamp > uint64(k.stamp) || int64(stamp) > now {
		return s.countJunk("PONG that nobody asked for")
	}
	rtt := time.Duration(now - int64(stamp))
	s.noteRTT(rtt)
	if k.pingAt > 0 && int64(stamp) >= k.pingAt {
		k.pingAt = 0
		if k.pingIdle {
			k.idle.good(s.cfg)
		}
	}
	left := k.waiting[:0]
	for _, w := range k.waiting {
		if int64(stamp) >= w.from {
			w.rtt <- rtt
		} else {
			left = append(left, w)
		}
	}
	clear(k.waiting[len(left):])
	k.waiting = left
	return s.countJunk("PONG")
}

// Ping asks the peer for an answer and returns how long it took.
func (s *Session) Ping(ctx context.Context) (time.Duration, error) {
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		return 0, s.Err()
	}
	w := pingWaiter{from: s.now(), rtt: make(chan time.Duration, 1)}
	s.keep.waiting = append(s.keep.waiting, w)
	s.pushPingLocked()
	s.kickLocked(false)
	s.mu.Unlock()
	select {
	case rtt, ok := <-w.rtt:
		if !ok {
			return 0, s.Err()
		}
		return rtt, nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.keep.waiting {
		if s.keep.waiting[i].rtt == w.rtt {
			s.keep.waiting = append(s.keep.waiting[:i], s.keep.waiting[i+1:]...)
			break
		}
	}
	return 0, fmt.Errorf("tunnel: ping: %w", ctx.Err())
}

// noteRTT records a round trip. The least one is forgotten after some minutes,
// as the path may have changed. Session.mu is held.
func (s *Session) noteRTT(rtt time.Duration) {
	s.rttLast.Store(int64(rtt))
	now := s.now()
	if least := s.rttMin.Load(); least == 0 || int64(rtt) <= least || now-s.rttMinAt > int64(rttMemory) {
		s.rttMin.Store(max(int64(rtt), 1))
		s.rttMinAt = now
	}
}

const rttMemory = 10 * time.Minute

// lostLocked tells the learned interval when the link failed with its ping
// unanswered: something on the way may have forgotten the connection.
func (s *Session) lostLocked() {
	if s.keep.idle != nil && s.keep.pingAt > 0 && s.keep.pingIdle {
		s.keep.idle.lost(s.cfg)
	}
}

// pingInterval is the longest silence the network is known to bear. A Dialer
// keeps it over sessions.
type pingInterval struct {
	mu       sync.Mutex
	interval time.Duration
	run      int // good pings at this interval
	network  string
}

// start returns the interval to begin with: what was learned, if in the same
// network.
func (p *pingInterval) start(cfg Config, network string) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.interval == 0 || p.network != network {
		p.interval, p.run, p.network = cfg.PingInterval, 0, network
	}
	return p.interval
}

func (p *pingInterval) get() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.interval
}

func (p *pingInterval) good(cfg Config) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.run++; p.run >= 3 && p.interval < cfg.PingMax {
		p.interval, p.run = min(p.interval+cfg.PingStep, cfg.PingMax), 0
	}
}

func (p *pingInterval) lost(cfg Config) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.interval, p.run = max(p.interval/2, min(minPing, cfg.PingInterval)), 0
}
