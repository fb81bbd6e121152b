package devices

import (
	"container/heap"
	"time"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// The budget of status writes. A write of 3 kB costs etcd 13 to 65 kB of disk
// on each member, so it is small and the same however many devices there are
// and whatever they do: a device's values are written once in an interval that
// grows with the number of devices, and what a user waits for (a phase, an
// alarm, a desired value that was reached) soon, out of a share that values
// cannot take.
const (
	// writesPerSecond is for the whole cluster. Writes are that far apart, so
	// no second has more.
	writesPerSecond = 50

	// minInterval is between two writes of a device's values.
	minInterval = time.Minute

	// debounce is how long a transition waits for what comes with it.
	debounce = 2 * time.Second

	// urgentGap is between transitions of one device in the long run, of which
	// urgentBurst may come at once: a flapping device has no right to the share
	// of the others.
	urgentGap   = 10 * time.Second
	urgentBurst = 3

	// reserve: one write in so many is a transition if one is due.
	reserve = 3
)

// scheduler decides whose status is to be written next. It knows no clock and
// writes nothing; its caller holds Devices.mu.
type scheduler struct {
	entries map[edgeapi.DeviceRef]*entry
	normal  queue // by due time
	urgent  queue
	streak  int // writes of values since the last transition
}

type entry struct {
	ref    edgeapi.DeviceRef
	last   time.Time // when it was looked at last
	credit time.Time // GCRA's theoretical arrival time of transitions
	normal slot
	urgent slot
	again  time.Time // after a failure: not before
	failed int
}

type slot struct {
	e     *entry
	due   time.Time
	index int // in its queue, from 1; 0: not queued
}

func newScheduler() *scheduler {
	return &scheduler{entries: map[edgeapi.DeviceRef]*entry{}, streak: reserve}
}

func (s *scheduler) entry(ref edgeapi.DeviceRef) *entry {
	e := s.entries[ref]
	if e == nil {
		e = &entry{ref: ref}
		e.normal.e, e.urgent.e = e, e
		s.entries[ref] = e
	}
	return e
}

func (s *scheduler) interval() time.Duration {
	return max(minInterval, time.Duration(len(s.entries))*time.Second/writesPerSecond)
}

// changed says that a device's values changed.
func (s *scheduler) changed(ref edgeapi.DeviceRef, now time.Time) {
	e := s.entry(ref)
	due := later(e.last.Add(minInterval), now.Add(debounce), e.again) // next knows the interval
	switch {
	case e.normal.index == 0:
		s.push(&s.normal, &e.normal, due)
	case due.Before(e.normal.due):
		e.normal.due = due
		heap.Fix(&s.normal, e.normal.index-1)
	}
}

// transition says that something changed that is to be told soon.
func (s *scheduler) transition(ref edgeapi.DeviceRef, now time.Time) {
	e := s.entry(ref)
	if e.urgent.index == 0 {
		allowed := e.credit.Add(-(urgentBurst - 1) * urgentGap)
		s.push(&s.urgent, &e.urgent, later(now.Add(debounce), allowed, e.again))
	}
}

// delay puts off what was scheduled of a device's values.
func (s *scheduler) delay(ref edgeapi.DeviceRef, until time.Time) {
	if e := s.entries[ref]; e != nil && e.normal.index > 0 && until.After(e.normal.due) {
		e.normal.due = until
		heap.Fix(&s.normal, e.normal.index-1)
	}
}

func (s *scheduler) forget(ref edgeapi.DeviceRef) {
	e := s.entries[ref]
	if e == nil {
		return
	}
	s.remove(&s.normal, &e.normal)
	s.remove(&s.urgent, &e.urgent)
	delete(s.entries, ref)
}

// next takes the device whose status is to be written now. If none is, it
// returns how long to wait for one; zero means until something changes.
func (s *scheduler) next(now time.Time) (ref edgeapi.DeviceRef, urgent, ok bool, wait time.Duration) {
	// A slot that came due before the interval had grown goes back.
	for len(s.normal) > 0 && !s.normal[0].due.After(now) {
		head := s.normal[0]
		due := later(head.e.last.Add(s.interval()), head.e.again)
		if head.e.last.IsZero() || !due.After(now) {
			break
		}
		head.due = due
		heap.Fix(&s.normal, 0)
	}
	normalDue := len(s.normal) > 0 && !s.normal[0].due.After(now)
	urgentDue := len(s.urgent) > 0 && !s.urgent[0].due.After(now)
	var e *entry
	switch {
	case urgentDue && (!normalDue || s.streak >= reserve-1):
		e, urgent = s.urgent[0].e, true
		s.streak = 0
	case normalDue:
		e = s.normal[0].e
		s.streak++
	default:
		for _, q := range []queue{s.normal, s.urgent} {
			if len(q) > 0 {
				if w := q[0].due.Sub(now); wait == 0 || w < wait {
					wait = w
				}
			}
		}
		return edgeapi.DeviceRef{}, false, false, wait
	}
	// One write tells all.
	s.remove(&s.normal, &e.normal)
	s.remove(&s.urgent, &e.urgent)
	return e.ref, urgent, true, 0
}

// wrote says that the status was written, or needed no write.
func (s *scheduler) wrote(ref edgeapi.DeviceRef, now time.Time, urgent, written bool) {
	e := s.entries[ref]
	if e == nil {
		return
	}
	e.last, e.failed, e.again = now, 0, time.Time{}
	if written && urgent {
		e.credit = later(e.credit, now).Add(urgentGap)
	}
}

// failed says that the write did not succeed. It is tried again, later each
// time.
func (s *scheduler) failedWrite(ref edgeapi.DeviceRef, now time.Time) {
	e := s.entries[ref]
	if e == nil {
		return
	}
	e.failed = min(e.failed+1, 6)
	e.again = now.Add(time.Second << e.failed)
	s.transition(ref, now)
}

func (s *scheduler) waiting() int { return len(s.normal) + len(s.urgent) }

func (s *scheduler) push(q *queue, sl *slot, due time.Time) {
	sl.due = due
	heap.Push(q, sl)
}

func (s *scheduler) remove(q *queue, sl *slot) {
	if sl.index > 0 {
		heap.Remove(q, sl.index-1)
	}
}

func later(times ...time.Time) time.Time {
	out := times[0]
	for _, t := range times[1:] {
		if t.After(out) {
			out = t
		}
	}
	return out
}

// queue is a heap of slots by due time.
type queue []*slot

func (q queue) Len() int           { return len(q) }
func (q queue) Less(i, j int) bool { return q[i].due.Before(q[j].due) }
func (q queue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].index, q[j].index = i+1, j+1
}

func (q *queue) Push(x any) {
	sl := x.(*slot)
	*q = append(*q, sl)
	sl.index = len(*q)
}

func (q *queue) Pop() any {
	old := *q
	sl := old[len(old)-1]
	old[len(old)-1] = nil
	*q = old[:len(old)-1]
	sl.index = 0
	return sl
}
