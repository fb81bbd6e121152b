package store

import (
	"sync"
	"time"
)

// Class says what bytes on the disk were written for.
type Class uint8

const (
	ClassPods    Class = iota // pods, their statuses included
	ClassNode                 // the Node
	ClassObjects              // all other objects
	ClassOutbox               // what the cloud has to hear of
	ClassEvents               // Events that wait for the cloud
	ClassPrivate              // service account tokens
	ClassLedger               // which pods there are, see ledger
	ClassCopies               // the last good copy, and the store made anew
	ClassStore                // the store's own bookkeeping
	classes
)

func (c Class) String() string {
	return [...]string{"pods", "node", "objects", "outbox", "events", "tokens", "ledger", "copies", "store"}[c]
}

func classOf(resource string) Class {
	switch resource {
	case "pods":
		return ClassPods
	case "nodes":
		return ClassNode
	}
	return ClassObjects
}

// Wear is what the store wrote to the disk.
type Wear struct {
	Since   time.Time         `json:"since"`
	Total   uint64            `json:"total"`
	LastDay uint64            `json:"lastDay"` // in the last 24 hours, of this run
	Classes map[string]uint64 `json:"classes"`
	Commits uint64            `json:"commits"`
	Budget  uint64            `json:"budget"`           // bytes a day; 0 is none
	Spaced  bool              `json:"spaced,omitempty"` // over the budget: what may wait waits longer
}

// wear counts bytes written: exactly in all, and by class in proportion to the
// records a transaction carried, since records share pages.
//
// Days are counted on the monotonic clock in hours, so that a clock set anew
// changes nothing.
type wear struct {
	mu      sync.Mutex
	start   time.Time
	hours   [24]uint64
	hour    int // hours since start that hours is up to date with
	total   uint64
	commits uint64
	classes [classes]uint64
}

func (w *wear) add(c Class, n uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.addLocked(c, n)
}

func (w *wear) addLocked(c Class, n uint64) {
	w.turnLocked()
	w.hours[w.hour%len(w.hours)] += n
	w.total += n
	w.classes[c] += n
}

// commit adds a transaction of n bytes that carried parts.
func (w *wear) commit(n uint64, parts *[classes]int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.commits++
	sum := uint64(0)
	for _, p := range parts {
		sum += uint64(p)
	}
	left := n
	for c, p := range parts {
		if sum > 0 {
			share := n * uint64(p) / sum
			w.addLocked(Class(c), share)
			left -= share
		}
	}
	w.addLocked(ClassStore, left)
}

// turnLocked clears the hours that have passed since the last count.
func (w *wear) turnLocked() {
	now := int(time.Since(w.start) / time.Hour)
	for n := 0; w.hour < now && n < len(w.hours); n++ {
		w.hour++
		w.hours[w.hour%len(w.hours)] = 0
	}
	w.hour = max(w.hour, now)
}

func (w *wear) lastDayLocked() uint64 {
	w.turnLocked()
	n := uint64(0)
	for _, h := range w.hours {
		n += h
	}
	return n
}

func (w *wear) lastDay() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.lastDayLocked()
}

// Wear tells what the store wrote since Open.
func (s *Store) Wear() Wear {
	s.wear.mu.Lock()
	defer s.wear.mu.Unlock()
	out := Wear{
		Since: s.wear.start.Round(0), Total: s.wear.total, LastDay: s.wear.lastDayLocked(), Commits: s.wear.commits,
		Classes: map[string]uint64{}, Budget: s.cfg.BytesPerDay,
	}
	out.Spaced = s.cfg.BytesPerDay > 0 && out.LastDay > s.cfg.BytesPerDay
	for c, n := range s.wear.classes {
		out.Classes[Class(c).String()] = n
	}
	return out
}

// BytesWritten is how many bytes were written to disk since Open.
func (s *Store) BytesWritten() uint64 {
	s.wear.mu.Lock()
	defer s.wear.mu.Unlock()
	return s.wear.total
}

// Commits is how many transactions reached the disk since Open.
func (s *Store) Commits() uint64 {
	s.wear.mu.Lock()
	defer s.wear.mu.Unlock()
	return s.wear.commits
}

// spaced is how many times longer what may wait does when the day's budget is
// used up. An acknowledged write never waits.
const spaced = 6

// flushAfter is how long what may wait does now.
func (s *Store) flushAfter() time.Duration {
	if s.cfg.BytesPerDay > 0 && s.wear.lastDay() > s.cfg.BytesPerDay {
		return spaced * s.cfg.FlushAfter
	}
	return s.cfg.FlushAfter
}
