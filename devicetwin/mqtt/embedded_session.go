package mqtt

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// session is what the broker owes a client, connected or away.
type session struct {
	b     *Embedded
	id    string
	owner atomic.Pointer[Principal] // as it last connected
	done  chan struct{}             // closed when it has ended

	mu       sync.Mutex
	conn     *conn // nil: away
	ended    bool
	subs     map[string]*clientSub // by filter as subscribed, also in the tree
	queue    fifo
	backlog  []backlog // retained messages that a subscription is still owed
	inflight map[uint16]*outgoing
	received map[uint16]struct{} // QoS 2 that is taken but not released [MQTT-4.3.3-2]
	lastID   uint16
	lastSent uint64        // orders inflight
	room     chan struct{} // closed when there is room again; nil: nobody waits
	expiry   time.Duration // once away
	expires  time.Time     // while away
	left     time.Time     // when it went away
	will     *stored       // while away: to be sent at willAt
	willAt   time.Time
}

// outgoing is a message for one session.
type outgoing struct {
	m        *stored
	qos      byte
	retain   bool
	ids      []int // subscription identifiers
	packetID uint16
	sent     uint64 // order of its first sending
	again    bool   // it has been sent on an earlier connection
	released bool   // QoS 2: PUBREC came, PUBCOMP is waited for
}

func (o *outgoing) size() int { return len(o.m.Payload) + len(o.m.Topic) + 128 }

// backlog is the retained messages that one subscription is still owed.
type backlog struct {
	kept  []*stored
	since uint64 // newer ones come by the queue
	qos   byte
	ids   []int
}

// fifo is the messages that wait.
type fifo struct {
	items []*outgoing
	head  int
	bytes int
}

func (f *fifo) len() int { return len(f.items) - f.head }

func (f *fifo) push(o *outgoing) {
	f.items = append(f.items, o)
	f.bytes += o.size()
}

func (f *fifo) peek() *outgoing { return f.items[f.head] }

func (f *fifo) pop() {
	f.bytes -= f.items[f.head].size()
	f.items[f.head] = nil
	f.head++
	switch {
	case f.head == len(f.items):
		f.items, f.head = f.items[:0], 0
		if cap(f.items) > 256 {
			f.items = nil
		}
	case f.head > 64 && f.head > len(f.items)/2:
		n := copy(f.items, f.items[f.head:])
		clear(f.items[n:])
		f.items, f.head = f.items[:n], 0
	}
}

func newSession(b *Embedded, c *conn) *session {
	return &session{b: b, id: c.id, done: make(chan struct{}), subs: map[string]*clientSub{},
		inflight: map[uint16]*outgoing{}, received: map[uint16]struct{}{}}
}

// put queues o. If it must wait, it is given what to wait for.
func (s *session) put(o *outgoing, from *conn) (room <-chan struct{}) {
	s.mu.Lock()
	if s.ended {
		s.mu.Unlock()
		return nil
	}
	full := s.queue.len() >= s.b.limit.QueueMessages || s.queue.bytes+o.size() > s.b.limit.QueueBytes && s.queue.len() > 0
	away := s.conn == nil
	switch {
	case o.qos == 0 && (away || full):
		s.mu.Unlock()
		if full {
			s.b.stats.dropped.Add(1)
		}
		return nil
	case !full:
	case away && time.Since(s.left) >= s.b.limit.Stall:
		// It is not waited for any more.
		s.mu.Unlock()
		s.b.endSlow(s)
		return nil
	case from == nil || !away && (s.conn == from || s.conn.blocked.Load()):
		// Waiting could be for ever: its acknowledgements are read by who waits.
		if s.queue.len() >= 4*s.b.limit.QueueMessages || s.queue.bytes >= 4*s.b.limit.QueueBytes {
			s.mu.Unlock()
			s.b.endSlow(s)
			return nil
		}
	default:
		if s.room == nil {
			s.room = make(chan struct{})
		}
		room = s.room
		s.mu.Unlock()
		return room
	}
	s.queue.push(o)
	c := s.conn
	s.mu.Unlock()
	if c != nil {
		c.poke()
	}
	return nil
}

func (s *session) present() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.conn != nil
}

// movedLocked tells who waits once there is room for an eighth of the queue: to
// be woken for each message would cost more than it.
func (s *session) movedLocked() {
	l := &s.b.limit
	if s.room != nil && s.queue.len() <= l.QueueMessages-l.QueueMessages/8-1 && s.queue.bytes <= l.QueueBytes-l.QueueBytes/8 {
		close(s.room)
		s.room = nil
	}
}

// attachLocked gives the session to a connection. What was in flight is sent
// again, in the order of its first sending [MQTT-4.6.0-1].
func (s *session) attachLocked(c *conn) {
	s.conn, s.expiry = c, c.expiry
	s.owner.Store(&c.principal)
	s.will, s.willAt, s.expires = nil, time.Time{}, time.Time{}
	c.resend = make([]*outgoing, 0, len(s.inflight))
	for _, o := range s.inflight {
		o.again = true
		c.resend = append(c.resend, o)
	}
	slices.SortFunc(c.resend, func(x, y *outgoing) int { return cmp.Compare(x.sent, y.sent) })
}

// fill encodes what may be sent now into out, up to about limit bytes.
func (s *session) fill(c *conn, out []byte, limit int) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn != c {
		return out
	}
	now := time.Now()
	for len(out) < limit {
		o, pop := s.nextLocked(c, now)
		if o == nil {
			break
		}
		if o.released {
			out = appendAck(out, packetPubrel, o.packetID, 0, c.version)
			c.outstanding++
			pop()
			continue
		}
		if o.qos > 0 && o.packetID == 0 {
			o.packetID = s.nextIDLocked()
		}
		before := len(out)
		out = appendPublish(out, o, c.version, now)
		switch {
		case o.m.expired(now) && !o.again:
			s.b.stats.expired.Add(1)
			out = out[:before]
		case c.maxPacket > 0 && len(out)-before > int(c.maxPacket):
			s.b.stats.tooLarge.Add(1) // [MQTT-3.1.2-25]: as if it had been sent
			out = out[:before]
			delete(s.inflight, o.packetID)
		default:
			s.b.stats.sent.Add(1)
			if o.qos > 0 {
				c.outstanding++
				if !o.again {
					s.lastSent++
					o.sent = s.lastSent
					s.inflight[o.packetID] = o
				}
			}
		}
		pop()
	}
	return out
}

// nextLocked is what comes next, and how to take it off; nil: nothing may be
// sent now. The order is: what was in flight before, retained messages, the
// queue. What has to wait for the window holds up what is behind it.
func (s *session) nextLocked(c *conn, now time.Time) (o *outgoing, pop func()) {
	open := c.outstanding < c.window
	if len(c.resend) > 0 {
		if !open {
			return nil, nil
		}
		return c.resend[0], func() { c.resend = c.resend[1:] }
	}
	for len(s.backlog) > 0 {
		run := &s.backlog[0]
		if len(run.kept) == 0 {
			s.backlog = s.backlog[1:]
			continue
		}
		kept := run.kept[0]
		m := s.b.retained.get(kept.Topic)
		if m == nil || m.seq > run.since && m != kept || m.expired(now) || !s.b.acl.May(*s.owner.Load(), m.Topic, false) {
			run.kept = run.kept[1:] // gone, or it comes by the queue
			continue
		}
		o := &outgoing{m: m, qos: min(m.QoS, run.qos), retain: true, ids: run.ids}
		if o.qos > 0 && !open {
			return nil, nil
		}
		return o, func() { run.kept = run.kept[1:] }
	}
	if s.queue.len() == 0 {
		return nil, nil
	}
	o = s.queue.peek()
	if o.qos > 0 && !open {
		return nil, nil
	}
	return o, func() {
		s.queue.pop()
		s.movedLocked()
	}
}

func (s *session) nextIDLocked() uint16 {
	for {
		s.lastID++
		if s.lastID == 0 {
			continue
		}
		if _, used := s.inflight[s.lastID]; !used {
			return s.lastID
		}
	}
}

// acked ends the exchange of a message: PUBACK, PUBCOMP, or PUBREC with an error.
func (s *session) acked(c *conn, id uint16) (known bool) {
	s.mu.Lock()
	o := s.inflight[id]
	if o != nil && s.conn == c {
		delete(s.inflight, id)
		c.doneLocked(o)
	}
	s.mu.Unlock()
	c.poke()
	return o != nil
}

// pubrec notes that the client has taken a message of QoS 2.
func (s *session) pubrec(id uint16) (known bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.inflight[id]
	if o == nil || o.qos != 2 {
		return false
	}
	o.released = true
	o.m = &stored{} // its content is not needed any more
	return true
}

// doneLocked takes o out of what the connection waits for: it is either sent,
// or still to be sent again.
func (c *conn) doneLocked(o *outgoing) {
	for i, r := range c.resend {
		if r == o {
			c.resend = slices.Delete(c.resend, i, i+1)
			return
		}
	}
	c.outstanding--
}

// remember notes a message of QoS 2 as taken; false: it already was.
func (s *session) remember(id uint16) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, had := s.received[id]; had {
		return false
	}
	s.received[id] = struct{}{}
	return true
}

func (s *session) has(id uint16) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, had := s.received[id]
	return had
}

func (s *session) taken() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.received)
}

// release forgets a message of QoS 2 that the client will not send again.
func (s *session) release(id uint16) (known bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, known = s.received[id]
	delete(s.received, id)
	return known
}

// endLocked takes a session out of everything; it is given its connection, if
// it has one. The caller holds b.mu.
func (b *Embedded) endLocked(s *session) *conn {
	if b.sessions[s.id] == s {
		delete(b.sessions, s.id)
	}
	s.mu.Lock()
	if s.ended {
		s.mu.Unlock()
		return nil
	}
	s.ended = true
	c, subs := s.conn, s.subs
	s.subs, s.queue, s.backlog = nil, fifo{}, nil
	close(s.done)
	s.mu.Unlock()
	for _, sub := range subs {
		b.tree.unsubscribe(s, sub)
	}
	return c
}

// expireSessions ends sessions whose clients did not come back, and sends
// wills that were delayed.
func (b *Embedded) expireSessions(now time.Time) {
	var wills []*stored
	b.mu.Lock()
	for _, s := range b.sessions {
		s.mu.Lock()
		over := s.conn == nil && now.After(s.expires)
		if s.conn == nil && s.will != nil && (over || now.After(s.willAt)) {
			wills = append(wills, s.will)
			s.will = nil
		}
		s.mu.Unlock()
		if over {
			b.endLocked(s)
		}
	}
	b.mu.Unlock()
	for _, w := range wills {
		b.sendWill(w)
	}
}
