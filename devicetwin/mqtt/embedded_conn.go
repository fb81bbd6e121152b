package mqtt

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	mochi "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"
)

const (
	writeChunk = 16 << 10 // of one write to a client
	ackChunk   = 4 << 10  // of acknowledgements that wait for more
	// maxConnect is the most that a connection may send before it has been
	// authenticated: three fields of 64 KiB are nobody's CONNECT.
	maxConnect = 64 << 10
)

// conn is one connection of a client. mochi reads and writes through it.
type conn struct {
	net.Conn
	b           *Embedded
	listener    *listener
	no          uint64
	loopback    bool
	from        string // its address, if it is not this machine's
	deciding    bool   // it has not said who it is; guarded by b.mu
	certificate *x509.Certificate

	// Owned by the reading goroutine.
	ctx     context.Context // until it has been let in
	cl      *mochi.Client
	head    []byte            // of the first packet, read ahead
	sniffed bool              // the first packet is a CONNECT of a bearable size
	arrived []unanswered      // to be answered before the next read, or what is not PUBLISH
	acks    []byte            // to be written before the next read
	aliases map[uint16]string // inbound
	left    bool              // DISCONNECT came: no will

	// Set before the session is attached, then constant.
	id        string
	principal Principal
	version   byte
	window    int    // unacknowledged messages it takes
	maxPacket uint32 // 0: any
	session   *session
	present   bool // the session was there before
	expiring  time.Duration
	will      *stored
	willDelay time.Duration
	started   atomic.Bool // the writer runs; what is above can be read by anyone

	blocked   atomic.Bool   // its reading goroutine waits for another's queue
	wake      chan struct{} // there may be something to write
	closeOnce sync.Once
	closed    chan struct{}
	written   chan struct{} // closed when the writer has ended
	finished  chan struct{} // closed when nothing of it is left

	wmu sync.Mutex // held while writing

	// Guarded by the session's mu.
	expiry      time.Duration // of the session, once away
	resend      []*outgoing
	outstanding int // sent on this connection and not acknowledged
}

var errFirstPacket = errors.New("the first packet is not a CONNECT of a bearable size")

// Read is mochi's: its buffer is empty, so that what came in it is captured at
// a time, and what was answered meanwhile goes out in one write.
func (c *conn) Read(p []byte) (int, error) {
	if err := c.settle(); err != nil {
		return 0, c.drop(err)
	}
	if err := c.flush(); err != nil {
		return 0, err
	}
	if !c.sniffed {
		if err := c.sniff(); err != nil {
			c.b.stats.malformed.Add(1)
			return 0, err
		}
		c.sniffed = true
	}
	if len(c.head) > 0 {
		n := copy(p, c.head)
		c.head = c.head[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}

// sniff reads the fixed header of the first packet: mochi would make room for
// whatever length a stranger names.
func (c *conn) sniff() error {
	var b [5]byte
	for n := range b {
		if _, err := io.ReadFull(c.Conn, b[n:n+1]); err != nil {
			return err
		}
		c.head = b[:n+1]
		if n == 0 && b[0] != packets.Connect<<4 {
			return errFirstPacket
		}
		if n > 0 && b[n]&0x80 == 0 {
			break
		}
	}
	length := 0
	for i, v := range c.head[1:] {
		length |= int(v&0x7f) << (7 * i)
	}
	if c.head[len(c.head)-1]&0x80 != 0 || length > maxConnect {
		return errFirstPacket
	}
	return nil
}

// Write writes whole packets.
func (c *conn) Write(p []byte) (int, error) {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	c.Conn.SetWriteDeadline(time.Now().Add(c.b.limit.WriteTimeout))
	return c.Conn.Write(p)
}

// SetDeadline is mochi's keep-alive, which is about reading.
func (c *conn) SetDeadline(t time.Time) error {
	return c.Conn.SetReadDeadline(t)
}

func (c *conn) Close() error {
	err := net.ErrClosed
	c.closeOnce.Do(func() {
		close(c.closed)
		err = c.Conn.Close()
	})
	return err
}

func (c *conn) flush() error {
	if len(c.acks) == 0 {
		return nil
	}
	_, err := c.Write(c.acks)
	c.acks = c.acks[:0]
	return err
}

// ack answers a packet; it is written with the next flush.
func (c *conn) ack(kind byte, id uint16, reason byte) error {
	c.acks = appendAck(c.acks, kind, id, reason, c.version)
	if len(c.acks) >= ackChunk {
		return c.flush()
	}
	return nil
}

// poke has the writer look.
func (c *conn) poke() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// write is the writer: it alone sends messages.
func (c *conn) write() {
	defer close(c.written)
	out := make([]byte, 0, 4<<10)
	for {
		out = c.session.fill(c, out[:0], writeChunk)
		if len(out) > 0 {
			if _, err := c.Write(out); err != nil {
				c.Close()
				return
			}
			if cap(out) > 4*writeChunk {
				out = make([]byte, 0, writeChunk)
			}
			continue
		}
		select {
		case <-c.wake:
		case <-c.closed:
			return
		}
	}
}

// kick disconnects the client, telling it why where its MQTT can. It does not
// wait for one that does not read.
func (c *conn) kick(code packets.Code) {
	if c.wmu.TryLock() {
		if c.started.Load() && c.version == 5 {
			c.Conn.SetWriteDeadline(time.Now().Add(time.Second))
			c.Conn.Write([]byte{packets.Disconnect << 4, 2, code.Code, 0})
		}
		c.wmu.Unlock()
	}
	c.Close()
}

func (c *conn) kickSlow() { c.kick(packets.ErrQuotaExceeded) }

// finish lets go of all that the connection held. Its will is out before the
// next client of its name is let in: a device that is back is not told dead by
// its past.
func (c *conn) finish() {
	b := c.b
	c.Close()
	if c.cl != nil {
		b.mochi.Clients.Delete(c.cl.ID) // mochi keeps those whose session it thinks it has
	}
	if c.session != nil {
		if c.started.Load() {
			<-c.written
		}
		c.detach()
	}
	b.mu.Lock()
	delete(b.open, c)
	b.decidedLocked(c)
	b.mu.Unlock()
	close(c.finished)
}

func (c *conn) detach() {
	b, s := c.b, c.session
	now := time.Now()
	will := c.will
	b.mu.Lock()
	b.connected--
	if c.left || b.closed {
		will = nil
	}
	s.mu.Lock()
	s.conn = nil
	s.expiry = c.expiry
	s.left, s.expires = now, now.Add(s.expiry)
	end := s.expiry <= 0 && !s.ended
	ended := s.ended
	if delay := min(c.willDelay, s.expiry); will != nil && delay > 0 && !ended {
		s.will, s.willAt = will, now.Add(delay)
		will = nil
	}
	s.mu.Unlock()
	wills := []*stored{will}
	if end {
		b.endLocked(s)
	} else if !ended {
		wills = append(wills, b.boundAwayLocked())
	}
	b.mu.Unlock()
	for _, w := range wills {
		b.sendWill(w)
	}
	if b.cfg.Sessions != nil {
		b.cfg.Sessions(Session{Client: c.id, User: c.principal.Name})
	}
}

// boundAwayLocked ends the session whose client is away for longest, if there
// are too many. It is given the will that this sets free.
func (b *Embedded) boundAwayLocked() (will *stored) {
	var oldest *session
	away := 0
	for _, s := range b.sessions {
		s.mu.Lock()
		if s.conn == nil {
			away++
			if oldest == nil || s.expires.Before(oldest.expires) {
				oldest = s
			}
		}
		s.mu.Unlock()
	}
	if away <= b.limit.AwaySessions {
		return nil
	}
	b.endLocked(oldest)
	return oldest.takeWill()
}

func (s *session) takeWill() *stored {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.will
	s.will = nil
	return w
}

// sendWill publishes the will of a client that is gone; nil: it has none.
func (b *Embedded) sendWill(w *stored) {
	if w == nil {
		return
	}
	m := *w
	m.Received = time.Now()
	if m.Expiry > 0 {
		m.expires = m.Received.Add(m.Expiry)
	}
	if err := b.capture([]unanswered{{m: &m}}); err != nil {
		b.stats.captureFailed.Add(1)
		b.slow.Warn("a will could not be captured", "topic", m.Topic, "client", m.From, "error", err)
	}
	if err := b.take(nil, &m); err != nil {
		b.slow.Warn("a will was not taken whole", "topic", m.Topic, "client", m.From, "error", err)
	}
}
