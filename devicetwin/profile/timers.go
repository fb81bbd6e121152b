package profile

import (
	"container/heap"
	"context"
	"sync"
	"time"
)

// timers call functions later, all on the goroutine of run. What they call must
// not block. Nothing is cancelled: a function looks whether it is still wanted.
type timers struct {
	mu    sync.Mutex
	queue timerQueue
	woken chan struct{} // of one
}

type timer struct {
	at time.Time
	fn func()
}

func newTimers() *timers { return &timers{woken: make(chan struct{}, 1)} }

func (t *timers) after(wait time.Duration, fn func()) {
	t.mu.Lock()
	heap.Push(&t.queue, timer{time.Now().Add(wait), fn})
	t.mu.Unlock()
	select {
	case t.woken <- struct{}{}:
	default:
	}
}

func (t *timers) run(ctx context.Context) error {
	for {
		wait := t.runDue()
		clock := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			clock.Stop()
			return ctx.Err()
		case <-t.woken:
			clock.Stop()
		case <-clock.C:
		}
	}
}

// runDue calls what is due and tells how long nothing else is.
func (t *timers) runDue() time.Duration {
	for {
		t.mu.Lock()
		if len(t.queue) == 0 {
			t.mu.Unlock()
			return time.Hour
		}
		if wait := time.Until(t.queue[0].at); wait > 0 {
			t.mu.Unlock()
			return wait
		}
		due := heap.Pop(&t.queue).(timer)
		t.mu.Unlock()
		due.fn()
	}
}

type timerQueue []timer

func (q timerQueue) Len() int           { return len(q) }
func (q timerQueue) Less(i, j int) bool { return q[i].at.Before(q[j].at) }
func (q timerQueue) Swap(i, j int)      { q[i], q[j] = q[j], q[i] }
func (q *timerQueue) Push(x any)        { *q = append(*q, x.(timer)) }
func (q *timerQueue) Pop() any {
	old := *q
	last := old[len(old)-1]
	old[len(old)-1] = timer{}
	*q = old[:len(old)-1]
	return last
}
