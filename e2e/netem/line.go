// Package netem carries packets as a bad network does: late, slowly, or not at
// all. Kernels often come without the qdisc of that name; this does the same
// in user space, between two files that hold a packet a read, such as TUN
// devices.
//
// It knows nothing of what is in a packet, and never changes, reorders or
// repeats one.
package netem

import (
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Shape says how packets fare on a Line. The zero Shape carries all at once.
type Shape struct {
	Rate  int           // bytes a second; zero means no limit
	Queue int           // bytes that wait for their turn, what exceeds them is lost; zero means 64 KiB. Counts with Rate alone
	Delay time.Duration // of each packet that is carried
	Loss  float64       // share of packets lost, 0 to 1
}

const (
	defaultQueue = 64 << 10
	// maxFlight bounds the packets on their way; what comes on top is lost.
	maxFlight = 1 << 14
	// maxPacket is what a read may bring: 64 KiB with the headers of the link.
	maxPacket = 66 << 10
)

// Line is one direction of a link. Its methods may be called from any
// goroutine.
type Line struct {
	carried, lost atomic.Uint64

	mu    sync.Mutex
	shape Shape
	rnd   *rand.Rand
	free  time.Time // when the last packet accepted so far will have left
}

// NewLine makes a line that loses the same packets for the same seed.
func NewLine(s Shape, seed uint64) *Line {
	return &Line{shape: s, rnd: rand.New(rand.NewPCG(seed, 0))}
}

// Set changes the shape for the packets that come from now on.
func (l *Line) Set(s Shape) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.shape = s
}

// Stats returns how many packets were carried and lost.
func (l *Line) Stats() (carried, lost uint64) { return l.carried.Load(), l.lost.Load() }

type packet struct {
	at time.Time
	p  []byte
}

// Carry moves packets until a read fails, as it does when from is closed. What
// is on its way then is lost.
func (l *Line) Carry(from io.Reader, to io.Writer) {
	flight := make(chan packet, maxFlight)
	ended := make(chan struct{})
	var deliverer sync.WaitGroup
	deliverer.Go(func() { l.deliver(to, flight, ended) })
	defer deliverer.Wait()
	defer close(ended)
	buf := make([]byte, maxPacket)
	for {
		n, err := from.Read(buf)
		if errors.Is(err, syscall.ENETDOWN) {
			continue // told once when a link goes down; the next read waits for its return
		}
		if err != nil {
			return
		}
		at, ok := l.departs(n)
		if !ok {
			l.lost.Add(1)
			continue
		}
		select {
		case flight <- packet{at, append([]byte(nil), buf[:n]...)}:
		default:
			l.lost.Add(1)
		}
	}
}

// departs tells when a packet of n bytes arrives at the other end, if it does.
func (l *Line) departs(n int) (at time.Time, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s, now := l.shape, time.Now()
	if s.Loss > 0 && l.rnd.Float64() < s.Loss {
		return at, false
	}
	if s.Rate <= 0 {
		return now.Add(s.Delay), true
	}
	if s.Queue == 0 {
		s.Queue = defaultQueue
	}
	if l.free.Before(now) {
		l.free = now
	}
	if backlog := l.free.Sub(now).Seconds() * float64(s.Rate); int(backlog)+n > s.Queue {
		return at, false
	}
	l.free = l.free.Add(time.Duration(float64(n) / float64(s.Rate) * float64(time.Second)))
	return l.free.Add(s.Delay), true
}

// deliver writes packets in the order they came, each at its time or, when an
// earlier one is later, right after that.
func (l *Line) deliver(to io.Writer, flight <-chan packet, ended <-chan struct{}) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		var p packet
		select {
		case p = <-flight:
		case <-ended:
			return
		}
		if wait := time.Until(p.at); wait > 0 {
			timer.Reset(wait)
			select {
			case <-timer.C:
			case <-ended:
				return
			}
		}
		// A link that does not take a packet loses it.
		if _, err := to.Write(p.p); err != nil {
			l.lost.Add(1)
			continue
		}
		l.carried.Add(1)
	}
}
