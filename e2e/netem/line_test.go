package netem

import (
	"errors"
	"io"
	"math"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// ends are the two files of a line: reads take what the test sends, writes are
// kept with their times.
type ends struct {
	in chan []byte // closed at the end

	mu  sync.Mutex
	got []arrival
}

type arrival struct {
	at   time.Time
	size int
}

func (e *ends) Read(p []byte) (int, error) {
	b, ok := <-e.in
	if !ok {
		return 0, io.EOF
	}
	if b == nil {
		return 0, syscall.ENETDOWN
	}
	return copy(p, b), nil
}

func (e *ends) Write(p []byte) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.got = append(e.got, arrival{time.Now(), len(p)})
	return len(p), nil
}

func (e *ends) arrived() []arrival {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.got
}

// carry runs a line in virtual time and waits for its end.
func carry(t *testing.T, s Shape, send func(l *Line, e *ends)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		l, e := NewLine(s, 1), &ends{in: make(chan []byte)}
		done := make(chan struct{})
		go func() { defer close(done); l.Carry(e, e) }()
		send(l, e)
		close(e.in)
		<-done
	})
}

func TestEachPacketIsDelayed(t *testing.T) {
	carry(t, Shape{Delay: 2 * time.Second}, func(_ *Line, e *ends) {
		began := time.Now()
		for i := range 3 {
			e.in <- make([]byte, i+1)
			time.Sleep(100 * time.Millisecond)
		}
		time.Sleep(5 * time.Second)
		got := e.arrived()
		if len(got) != 3 {
			t.Fatalf("%d packets arrived of 3", len(got))
		}
		for i, a := range got {
			if want := time.Duration(i)*100*time.Millisecond + 2*time.Second; a.at.Sub(began) != want || a.size != i+1 {
				t.Errorf("packet %d of %d bytes arrived after %s, want %s", i, a.size, a.at.Sub(began), want)
			}
		}
	})
}

func TestARateAndItsQueue(t *testing.T) {
	carry(t, Shape{Rate: 1000, Queue: 2500}, func(l *Line, e *ends) {
		began := time.Now()
		for range 5 {
			e.in <- make([]byte, 1000)
		}
		time.Sleep(time.Minute)
		got := e.arrived()
		if carried, lost := l.Stats(); len(got) != 2 || carried != 2 || lost != 3 {
			t.Fatalf("%d packets arrived; carried %d, lost %d; the queue holds 2 of 5", len(got), carried, lost)
		}
		for i, a := range got {
			if took := a.at.Sub(began); took != time.Duration(i+1)*time.Second {
				t.Errorf("packet %d arrived after %s at 1000 bytes a second", i, took)
			}
		}
	})
}

func TestLossIsAShareAndCanChange(t *testing.T) {
	const n = 10_000
	carry(t, Shape{Loss: 0.3}, func(l *Line, e *ends) {
		for range n {
			e.in <- []byte{0}
		}
		synctest.Wait()
		if share := 1 - float64(len(e.arrived()))/n; math.Abs(share-0.3) > 0.02 {
			t.Errorf("%.3f of the packets were lost, want 0.3", share)
		}
		before := len(e.arrived())
		l.Set(Shape{Loss: 1})
		e.in <- []byte{0}
		synctest.Wait()
		l.Set(Shape{})
		e.in <- []byte{0}
		synctest.Wait()
		if after := len(e.arrived()); after != before+1 {
			t.Errorf("%d of two packets arrived, the first of them on a line that loses all", after-before)
		}
	})
}

func TestALinkThatGoesDownIsNotTheEnd(t *testing.T) {
	carry(t, Shape{}, func(_ *Line, e *ends) {
		e.in <- nil
		e.in <- []byte{0}
		synctest.Wait()
		if len(e.arrived()) != 1 {
			t.Error("nothing is carried after ENETDOWN")
		}
	})
}

func TestTheEndDoesNotWaitForPackets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, e := NewLine(Shape{Delay: time.Hour}, 1), &ends{in: make(chan []byte)}
		began := time.Now()
		go func() { e.in <- []byte{0}; close(e.in) }()
		l.Carry(e, broken{})
		if took := time.Since(began); took != 0 {
			t.Errorf("Carry returned %s after its reader's end", took)
		}
	})
}

type broken struct{}

func (broken) Write([]byte) (int, error) { return 0, errors.New("broken") }
