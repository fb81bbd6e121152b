package telemetry

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/skerry-io/skerry/devicetwin/mqtt"
)

// A bridge's queue: in order, over a restart from the oldest that was not
// acknowledged, and full when it is full.
func TestQueue(t *testing.T) {
	mem := newMemory()
	cfg := QueueConfig{Dir: t.TempDir(), Name: "bridge", Cursors: mem, MaxBytes: 1 << 20}
	q, err := OpenQueue(cfg)
	must(t, err)
	for n := range 10 {
		must(t, q.Append(t.Context(), fmt.Append(nil, n)))
	}
	next := func(want int) uint64 {
		t.Helper()
		id, rec, err := q.Next(t.Context())
		must(t, err)
		if string(rec) != fmt.Sprint(want) {
			t.Fatalf("%s came, want %d", rec, want)
		}
		return id
	}
	next(0)
	second := next(1)
	third := next(2)
	must(t, q.Ack(second))
	must(t, q.Ack(second))
	if q.Len() != 8 {
		t.Errorf("%d wait", q.Len())
	}
	mem.flush()
	must(t, q.Ack(third)) // the cursor of which is lost
	mem.dirty = map[string]func() []byte{}
	must(t, q.Close())

	q, err = OpenQueue(cfg)
	must(t, err)
	for n := 2; n < 10; n++ {
		must(t, q.Ack(next(n)))
	}
	short, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, rec, err := q.Next(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%q %v", rec, err)
	}
	for err = nil; err == nil; {
		err = q.Append(t.Context(), make([]byte, 50<<10))
	}
	if !errors.Is(err, mqtt.ErrQueueFull) {
		t.Errorf("a full queue: %v", err)
	}
	for q.Len() > 0 {
		id, _, err := q.Next(t.Context())
		must(t, err)
		must(t, q.Ack(id))
	}
	waitFor(t, "room", func() bool { return q.Append(t.Context(), []byte("x")) == nil })
	must(t, q.Close())
}
