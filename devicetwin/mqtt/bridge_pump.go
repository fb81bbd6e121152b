package mqtt

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"sync"
	"sync/atomic"
	"time"
)

// Queue holds records in order until they are acknowledged.
type Queue interface {
	// Append returns once record is as safe as the queue makes it.
	// ErrQueueFull: it is dropped.
	Append(ctx context.Context, record []byte) error
	// Next returns the oldest record that it has not returned yet, and waits for
	// one. After a restart it begins with the oldest that was not acknowledged.
	Next(ctx context.Context) (id uint64, record []byte, err error)
	// Ack says that the record id, and all before it, need not come again.
	Ack(id uint64) error
	// Len is how many are not acknowledged.
	Len() int
}

// ErrQueueFull says that a Queue has no room.
var ErrQueueFull = errors.New("the queue is full")

// MemoryQueue is a Queue that a restart empties.
type MemoryQueue struct {
	max int

	mu      sync.Mutex
	records [][]byte
	first   uint64        // id of records[0]
	next    uint64        // id of what Next returns
	grown   chan struct{} // closed and made anew by Append
}

// NewMemoryQueue holds at most max records.
func NewMemoryQueue(max int) *MemoryQueue {
	return &MemoryQueue{max: max, grown: make(chan struct{})}
}

func (q *MemoryQueue) Append(_ context.Context, record []byte) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.records) >= q.max {
		return ErrQueueFull
	}
	q.records = append(q.records, record)
	close(q.grown)
	q.grown = make(chan struct{})
	return nil
}

func (q *MemoryQueue) Next(ctx context.Context) (uint64, []byte, error) {
	for {
		q.mu.Lock()
		if i := q.next - q.first; i < uint64(len(q.records)) {
			defer q.mu.Unlock()
			q.next++
			return q.next - 1, q.records[i], nil
		}
		grown := q.grown
		q.mu.Unlock()
		select {
		case <-grown:
		case <-ctx.Done():
			return 0, nil, ctx.Err()
		}
	}
}

func (q *MemoryQueue) Ack(id uint64) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.records) > 0 && q.first <= id {
		q.records[0] = nil
		q.records = q.records[1:]
		q.first++
	}
	return nil
}

func (q *MemoryQueue) Len() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.records)
}

// pump brings what is in a queue to a broker.
type pump struct {
	b       *Bridge
	queue   Queue
	to      Broker
	carried *atomic.Uint64
	origin  []UserProperty // of what it is given
	heard   []string       // filters by which the broker gives back what it is given
	fast    chan Message   // QoS 0
	woken   chan struct{}  // something waits, or may go on
	grown   chan struct{}  // something was put
	moved   chan struct{}  // something was carried
	open    []flight       // sent, or to be sent again; owned by run and its parts
	seed    maphash.Seed

	mu      sync.Mutex
	waiting map[string]int // how many in the queue are of a topic of the broker
	echoes  map[uint64]echo
	fading  []fade
	last    map[string]uint64 // by topic of the broker, the last word: given or heard
	order   []string          // of last
}

type flight struct {
	id uint64
	m  Message
	s  *sending // nil: not sent on this connection
}

type echo struct {
	n     int
	until time.Time
}

type fade struct {
	sum   uint64
	until time.Time
}

const (
	echoFor    = time.Minute
	maxEchoes  = 1 << 14
	maxLast    = 1 << 13
	maxFast    = 256
	pumpRetry  = time.Second
	recordKind = 1
	maxExpiry  = math.MaxUint32 * time.Second // MQTT's
)

func newPump(b *Bridge, q Queue, to Broker, carried *atomic.Uint64) *pump {
	return &pump{
		b: b, queue: q, to: to, carried: carried,
		fast:    make(chan Message, maxFast),
		woken:   make(chan struct{}, 1),
		grown:   make(chan struct{}, 1),
		moved:   make(chan struct{}, 1),
		seed:    maphash.MakeSeed(),
		waiting: make(map[string]int),
		echoes:  make(map[uint64]echo),
		last:    make(map[string]uint64),
	}
}

func (p *pump) poke() {
	select {
	case p.woken <- struct{}{}:
	default:
	}
}

// put takes a message that is to be carried.
func (p *pump) put(ctx context.Context, m Message) error {
	if m.QoS == 0 {
		m.Payload = append([]byte(nil), m.Payload...)
		select {
		case p.fast <- m:
			p.remember(m)
		default:
			p.b.counts.dropped.Add(1)
		}
		return nil
	}
	p.mu.Lock()
	p.waiting[m.Topic]++
	p.mu.Unlock()
	err := p.queue.Append(ctx, appendRecord(nil, m))
	if err != nil {
		p.settled(m.Topic)
		if errors.Is(err, ErrQueueFull) {
			p.b.counts.dropped.Add(1)
			return nil
		}
		return fmt.Errorf("bridge %s: %w", p.b.cfg.Name, err)
	}
	p.remember(m)
	select {
	case p.grown <- struct{}{}:
	default:
	}
	return nil
}

// settled says that one of topic no longer waits.
func (p *pump) settled(topic string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.waiting[topic]--; p.waiting[topic] <= 0 {
		delete(p.waiting, topic)
	}
}

// remember notes the last word on a topic.
func (p *pump) remember(m Message) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.last[m.Topic]; !ok {
		if len(p.order) == maxLast {
			delete(p.last, p.order[0])
			p.order = p.order[1:]
		}
		p.order = append(p.order, m.Topic)
	}
	p.last[m.Topic] = p.sum(m)
}

// knowsBetter says that a retained message of the broker's is no news, or older
// than what it is about to be given.
func (p *pump) knowsBetter(m Message) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	last, ok := p.last[m.Topic]
	return ok && last == p.sum(m) || p.waiting[m.Topic] > 0
}

func (p *pump) sum(m Message) uint64 {
	var h maphash.Hash
	h.SetSeed(p.seed)
	_, _ = h.WriteString(m.Topic)
	_ = h.WriteByte(0)
	_, _ = h.Write(m.Payload)
	return h.Sum64()
}

// expect notes that the broker may give m back.
func (p *pump) expect(m Message) {
	heard := false
	for _, filter := range p.heard {
		heard = heard || Match(filter, m.Topic)
	}
	if !heard {
		return
	}
	sum, until := p.sum(m), time.Now().Add(echoFor)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fadeLocked()
	e := p.echoes[sum]
	p.echoes[sum] = echo{e.n + 1, until}
	p.fading = append(p.fading, fade{sum, until})
}

// fadeLocked forgets what did not come back.
func (p *pump) fadeLocked() {
	now := time.Now()
	for len(p.fading) > 0 && (now.After(p.fading[0].until) || len(p.fading) >= maxEchoes) {
		f := p.fading[0]
		p.fading = p.fading[1:]
		if e, ok := p.echoes[f.sum]; ok && !e.until.After(f.until) {
			delete(p.echoes, f.sum)
		}
	}
}

// isEcho says that m is what the broker was given here, and takes note.
func (p *pump) isEcho(m Message) bool {
	if len(p.heard) == 0 {
		return false
	}
	sum := p.sum(m)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fadeLocked()
	e, ok := p.echoes[sum]
	if !ok {
		return false
	}
	if e.n--; e.n == 0 {
		delete(p.echoes, sum)
	} else {
		p.echoes[sum] = e
	}
	return true
}

// run carries until ctx ends.
func (p *pump) run(ctx context.Context) {
	var parts sync.WaitGroup
	defer parts.Wait()
	parts.Go(func() { p.runFast(ctx) })
	for ctx.Err() == nil {
		retry := pumpRetry
		if p.to.State().Connected {
			if !p.replayed() {
				retry = replayQuiet / 2
			} else {
				p.carry(ctx)
			}
		}
		if ctx.Err() != nil {
			return
		}
		timer := time.NewTimer(retry)
		select {
		case <-p.woken:
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// replayed says that the broker has told what it had retained, as far as can be
// known. Until then nothing is sent to it: of a topic for which something waits
// what it had retained is old.
func (p *pump) replayed() bool {
	e, ok := p.to.(*External)
	return !ok || len(p.heard) == 0 || e.replayed()
}

// runFast carries QoS 0, apart: it waits for nobody.
func (p *pump) runFast(ctx context.Context) {
	for {
		select {
		case m := <-p.fast:
			p.expect(m)
			m.User = p.origin
			if err := p.to.Publish(ctx, m); err != nil {
				p.b.counts.dropped.Add(1)
			} else {
				p.done()
			}
		case <-ctx.Done():
			return
		}
	}
}

func (p *pump) done() {
	p.carried.Add(1)
	select {
	case p.moved <- struct{}{}:
	default:
	}
}

// carry sends what is open and then what comes, as far as the window lets it,
// until something fails. What is then open is sent again by the next carry.
func (p *pump) carry(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	sent := make(chan flight, 1024)
	var acked []uint64
	var acking sync.WaitGroup
	acking.Go(func() {
		failed := false
		for f := range sent {
			err := f.s.wait(ctx)
			if failed {
				continue
			}
			if err != nil && !p.hopeless(err, f.m) {
				failed = true
				cancel()
				continue
			}
			if err := p.queue.Ack(f.id); err != nil {
				p.b.often.Warn("a queue cannot note what was carried", "error", err)
			}
			acked = append(acked, f.id)
			p.settled(f.m.Topic)
			if err == nil {
				p.done()
			}
		}
	})
	again := p.open
	for {
		var f flight
		if len(again) > 0 {
			f, again = again[0], again[1:]
		} else {
			id, record, err := p.queue.Next(ctx)
			if err != nil {
				break
			}
			m, err := parseRecord(record)
			if err != nil {
				p.b.often.Warn("a record of the queue cannot be read and is dropped", "error", err)
				m = Message{}
			}
			f = flight{id: id, m: m}
			p.open = append(p.open, f)
		}
		s, err := p.send(ctx, f.m)
		if err != nil && !p.hopeless(err, f.m) {
			break
		}
		if err != nil {
			s = &sending{done: closed, err: err}
		}
		f.s = s
		sent <- f
	}
	close(sent)
	cancel()
	acking.Wait()
	p.open = p.open[len(acked):]
}

var closed = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

// hopeless says that m will never be taken, and counts it.
func (p *pump) hopeless(err error, m Message) bool {
	if errors.Is(err, ErrNotConnected) || errors.Is(err, ErrUnacknowledged) ||
		errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return false
	}
	if errors.Is(err, errExpired) {
		p.b.counts.expired.Add(1)
		return true
	}
	p.b.counts.dropped.Add(1)
	p.b.often.Warn("a message cannot be carried", "topic", m.Topic, "error", err)
	return true
}

var errExpired = errors.New("expired")

// send hands m to the broker, in order.
func (p *pump) send(ctx context.Context, m Message) (*sending, error) {
	if m.Expiry > 0 {
		if m.Expiry -= time.Since(m.Received); m.Expiry <= 0 {
			return nil, errExpired
		}
	}
	p.expect(m)
	m.User = p.origin
	if e, ok := p.to.(*External); ok {
		return e.send(ctx, m)
	}
	return &sending{done: closed}, p.to.Publish(ctx, m)
}

// await waits until n wait to be carried.
func (p *pump) await(ctx context.Context, n int) bool {
	for p.queue.Len() < n {
		select {
		case <-p.grown:
		case <-ctx.Done():
			return false
		}
	}
	return true
}

// idle waits until nothing was carried for d, and nothing waits.
func (p *pump) idle(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	for {
		select {
		case <-p.moved:
		case <-timer.C:
			if p.queue.Len() == 0 {
				return
			}
		case <-ctx.Done():
			return
		}
		timer.Reset(d)
	}
}

// A record is kind[1] flags[1] received[varint ms] expiry[varint ms]
// topic[uvarint length, bytes] payload. Flags are QoS, and 4 for Retain.

func appendRecord(b []byte, m Message) []byte {
	flags := m.QoS
	if m.Retain {
		flags |= 4
	}
	b = append(b, recordKind, flags)
	b = binary.AppendVarint(b, m.Received.UnixMilli())
	b = binary.AppendVarint(b, m.Expiry.Milliseconds())
	b = binary.AppendUvarint(b, uint64(len(m.Topic)))
	b = append(b, m.Topic...)
	return append(b, m.Payload...)
}

func parseRecord(b []byte) (Message, error) {
	if len(b) < 2 || b[0] != recordKind || b[1]&3 == 3 || b[1] > 7 {
		return Message{}, errors.New("not a record of a bridge")
	}
	m := Message{QoS: b[1] & 3, Retain: b[1]&4 != 0}
	b = b[2:]
	received, n := binary.Varint(b)
	if n <= 0 {
		return Message{}, errors.New("no time")
	}
	b = b[n:]
	expiry, n := binary.Varint(b)
	if n <= 0 || expiry < 0 || expiry > int64(maxExpiry/time.Millisecond) {
		return Message{}, errors.New("no expiry")
	}
	b = b[n:]
	length, n := binary.Uvarint(b)
	if n <= 0 || length > uint64(len(b)-n) {
		return Message{}, errors.New("no topic")
	}
	b = b[n:]
	m.Received, m.Expiry = time.UnixMilli(received), time.Duration(expiry)*time.Millisecond
	m.Topic, m.Payload = string(b[:length]), b[length:]
	return m, CheckTopic(m.Topic)
}
