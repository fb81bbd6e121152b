package store

import (
	"context"
	"slices"
	"time"
)

// Watch is a position in one resource's history. It holds no buffer and no
// goroutine: one that falls too far behind gets ErrExpired, and one that is
// forgotten costs nothing.
type Watch struct {
	s        *Store
	ctx      context.Context
	resource string
	pos      uint64
}

// Watch follows a resource from a resourceVersion on, exclusively. It is
// ErrExpired when that is older than the history kept, and ErrFuture when the
// store has not got that far. The watch ends with ctx.
func (s *Store) Watch(ctx context.Context, resource string, fromRV uint64) (*Watch, error) {
	s.mu.RLock()
	rv, t := s.rv, s.tables[resource]
	var floor uint64
	if t != nil {
		floor = t.floor
	}
	s.mu.RUnlock()
	if t == nil { // only the committer makes tables
		floor = s.startRV
		err := s.Local(ctx, func(tx *Tx) error {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.table(resource)
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	switch {
	case fromRV > rv:
		return nil, ErrFuture
	case fromRV < floor:
		return nil, ErrExpired
	}
	return &Watch{s, ctx, resource, fromRV}, nil
}

// Next returns what happened since the last call and the store-wide
// resourceVersion up to which the watch is now complete. It waits for at most
// idle (zero: without limit) and then returns no events.
func (w *Watch) Next(ctx context.Context, idle time.Duration) ([]Event, uint64, error) {
	var timeout <-chan time.Time
	if idle > 0 {
		t := time.NewTimer(idle)
		defer t.Stop()
		timeout = t.C
	}
	for {
		events, changed, err := w.take()
		if err != nil || len(events) > 0 {
			return events, w.pos, err
		}
		select {
		case <-changed:
		case <-timeout:
			return nil, w.pos, nil
		case <-w.s.closing:
			return nil, w.pos, ErrClosed
		case <-ctx.Done():
			return nil, w.pos, ctx.Err()
		case <-w.ctx.Done():
			return nil, w.pos, w.ctx.Err()
		}
	}
}

func (w *Watch) take() ([]Event, <-chan struct{}, error) {
	w.s.mu.RLock()
	defer w.s.mu.RUnlock()
	t := w.s.tables[w.resource]
	if w.pos < t.floor {
		return nil, nil, ErrExpired
	}
	from := w.pos
	w.pos = w.s.rv
	i, _ := slices.BinarySearchFunc(t.ring, from+1, func(e Event, rv uint64) int {
		switch {
		case e.Object.RV < rv:
			return -1
		case e.Object.RV > rv:
			return 1
		}
		return 0
	})
	if i == len(t.ring) {
		return nil, t.changed, nil
	}
	return slices.Clone(t.ring[i:]), nil, nil
}

// record appends a commit's events to the histories and wakes the watchers. A
// history has room for the largest recent commit twice over, so that one large
// delta does not expire a watcher that was up to date.
func (s *Store) record(events []Event) {
	fresh := map[*table]int{}
	for _, e := range events {
		t := s.table(e.Object.Resource)
		t.ring = append(t.ring, e)
		fresh[t]++
	}
	for t, n := range fresh {
		t.limit = max(s.cfg.History, 2*n, t.limit-n)
		if len(t.ring) > t.limit+t.limit/4 { // a quarter of slack: copy seldom
			cut := len(t.ring) - t.limit
			t.floor = t.ring[cut-1].Object.RV
			t.ring = append(make([]Event, 0, t.limit+t.limit/4+1), t.ring[cut:]...)
		}
		close(t.changed)
		t.changed = make(chan struct{})
	}
}
