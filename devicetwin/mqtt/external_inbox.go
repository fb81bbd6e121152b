package mqtt

import (
	"context"
	"hash/maphash"
	"sync"
	"sync/atomic"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"
)

// arrival is a message that came.
type arrival struct {
	Message
	link *link
	m    paho.Message

	left    atomic.Int32 // of handlers and capture, who have not returned
	refused atomic.Bool  // by one of them
}

// inbox holds what came and has yet to be handled, in order, within bounds.
type inbox struct {
	e *External

	mu      sync.Mutex
	queue   []*arrival // from first on
	first   int
	bytes   int
	latest  map[string]*arrival // by topic, what in queue may give way to a newer one
	busy    int                 // taken out, and not handled yet
	space   chan struct{}       // closed and made anew when something was taken out
	arrived chan struct{}       // pokes run
	woken   bool                // the subscriptions have changed
}

func newInbox(e *External) *inbox {
	return &inbox{
		e:       e,
		latest:  make(map[string]*arrival),
		space:   make(chan struct{}),
		arrived: make(chan struct{}, 1),
	}
}

func (b *inbox) len() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.queue) - b.first + b.busy
}

func (b *inbox) wake() {
	b.mu.Lock()
	b.woken = true
	b.mu.Unlock()
	b.poke()
}

func (b *inbox) poke() {
	select {
	case b.arrived <- struct{}{}:
	default:
	}
}

// stall is how long put may hold up the client's reading; it must stay below
// the time in which an answer to a ping has to be read.
const stall = 5 * time.Second

// put adds a. In a queue more than half full, a message that the broker does
// not wait for takes the place of an older one of its topic. In a full queue it
// is dropped; but one that will not come again (retained: the only word there
// is) or that the broker waits for holds up reading, until it has room or, for
// long without, the connection is given up.
func (b *inbox) put(a *arrival) {
	patience := time.NewTimer(stall)
	defer patience.Stop()
	for {
		if a.link.leaving.Load() {
			return
		}
		space, done := b.try(a)
		if done {
			return
		}
		select {
		case <-space:
			patience.Reset(stall)
		case <-a.link.left:
			return // it comes again
		case <-patience.C:
			a.link.fail(errStalled)
			return
		}
	}
}

// try adds a, or drops it, or returns what is closed when there may be room.
func (b *inbox) try(a *arrival) (space <-chan struct{}, done bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	most, mostBytes := b.e.cfg.QueueMessages, b.e.cfg.QueueBytes
	n := len(b.queue) - b.first
	sheddable := a.QoS == 0
	if sheddable && (n >= most/2 || b.bytes >= mostBytes/2) {
		if older := b.latest[a.Topic]; older != nil && older.Retain == a.Retain {
			b.bytes += len(a.Payload) - len(older.Payload)
			older.Message = a.Message
			older.link, older.m = a.link, a.m
			b.e.counts.shed.Add(1)
			return nil, true
		}
	}
	if n >= most || n > 0 && b.bytes+len(a.Payload) > mostBytes {
		if sheddable && !a.Retain {
			b.e.counts.shed.Add(1)
			return nil, true
		}
		return b.space, false
	}
	b.queue = append(b.queue, a)
	b.bytes += len(a.Payload)
	if sheddable {
		b.latest[a.Topic] = a
	}
	b.poke()
	return nil, true
}

// take takes the oldest out.
func (b *inbox) take() *arrival {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.first == len(b.queue) {
		return nil
	}
	a := b.queue[b.first]
	b.queue[b.first] = nil
	b.first++
	if b.first == len(b.queue) {
		b.queue, b.first = b.queue[:0], 0
	} else if b.first > 1024 && b.first > len(b.queue)/2 {
		n := copy(b.queue, b.queue[b.first:])
		clear(b.queue[n:])
		b.queue, b.first = b.queue[:n], 0
	}
	b.bytes -= len(a.Payload)
	if b.latest[a.Topic] == a {
		delete(b.latest, a.Topic)
	}
	b.busy++
	close(b.space)
	b.space = make(chan struct{})
	return a
}

// settle waits, at most for d, until what came has been handled.
func (b *inbox) settle(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	for {
		b.mu.Lock()
		idle := b.first == len(b.queue) && b.busy == 0
		space := b.space
		b.mu.Unlock()
		if idle {
			return
		}
		select {
		case <-space:
		case <-timer.C:
			return
		}
	}
}

// run handles what comes until ctx ends.
func (b *inbox) run(ctx context.Context) {
	lanes := b.e.startCapture()
	defer lanes.stop()
	claimed := time.NewTimer(b.e.cfg.Unclaimed)
	defer claimed.Stop()
	var unclaimed []*arrival // in order; nothing wants them yet
	holding := true
	for {
		b.mu.Lock()
		woken := b.woken
		b.woken = false
		b.mu.Unlock()
		routes := b.e.currentRoutes()
		if woken {
			// Before anything newer.
			kept := unclaimed[:0]
			for _, a := range unclaimed {
				if !b.handle(a, routes, lanes) {
					kept = append(kept, a)
				}
			}
			clear(unclaimed[len(kept):])
			unclaimed = kept
		}
		if a := b.take(); a != nil {
			if b.handle(a, routes, lanes) {
				continue
			}
			// QoS 0 does not come again, but then nobody was promised it.
			if holding && a.QoS > 0 && len(unclaimed) < b.e.cfg.QueueMessages {
				unclaimed = append(unclaimed, a)
				continue
			}
			b.e.counts.unclaimed.Add(1)
			b.begin(a, 1)
			b.end(a, nil)
			continue
		}
		select {
		case <-b.arrived:
		case <-claimed.C:
			holding = false
			for _, a := range unclaimed {
				b.e.counts.unclaimed.Add(1)
				b.begin(a, 1)
				b.end(a, nil)
			}
			unclaimed = nil
		case <-ctx.Done():
			return
		}
	}
}

// handle has all who want a take it; false: nobody does.
func (b *inbox) handle(a *arrival, routes *routes, lanes *lanes) bool {
	subs := routes.find(a.Topic)
	if len(subs) == 0 {
		return false
	}
	if lanes == nil {
		b.begin(a, len(subs))
	} else {
		b.begin(a, len(subs)+1)
		lanes.put(a)
	}
	for _, s := range subs {
		b.end(a, s.call(a.Message))
	}
	return true
}

func (b *inbox) begin(a *arrival, parts int) { a.left.Store(int32(parts)) }

// end says that one of those who take a has returned. When all have, a is
// acknowledged; refused by one it is not, and, since MQTT has a broker send
// again only on a new connection, the connection is given up.
func (b *inbox) end(a *arrival, err error) {
	if err != nil {
		b.e.counts.refused.Add(1)
		if a.QoS > 0 && !a.refused.Swap(true) {
			a.link.fail(refusedError{a.Topic, err})
		}
	}
	if a.left.Add(-1) > 0 {
		return
	}
	if !a.refused.Load() {
		if a.QoS > 0 {
			b.e.ack(a.m)
		}
	}
	b.mu.Lock()
	b.busy--
	close(b.space)
	b.space = make(chan struct{})
	b.mu.Unlock()
}

type refusedError struct {
	topic string
	err   error
}

func (e refusedError) Error() string {
	return "a message of topic " + e.topic + " could not be kept: " + e.err.Error()
}

func (e refusedError) Unwrap() error { return e.err }

type stalledError struct{}

func (stalledError) Error() string {
	return "what came is not handled: nothing was taken from a full queue for " + stall.String()
}

var errStalled = stalledError{}

// lanes run Capture: messages of a topic one after the other, those of
// different topics beside each other.
type lanes struct {
	seed    maphash.Seed
	queues  []chan *arrival
	running sync.WaitGroup
}

const captureLanes = 64

// startCapture starts the lanes; nil if there is no Capture.
func (e *External) startCapture() *lanes {
	if e.cfg.Capture == nil {
		return nil
	}
	l := &lanes{seed: maphash.MakeSeed(), queues: make([]chan *arrival, captureLanes)}
	for i := range l.queues {
		q := make(chan *arrival, 16)
		l.queues[i] = q
		l.running.Go(func() {
			for a := range q {
				e.inbox.end(a, e.cfg.Capture(a.Message))
			}
		})
	}
	return l
}

func (l *lanes) put(a *arrival) {
	l.queues[maphash.String(l.seed, a.Topic)%uint64(len(l.queues))] <- a
}

func (l *lanes) stop() {
	if l == nil {
		return
	}
	for _, q := range l.queues {
		close(q)
	}
	l.running.Wait()
}
