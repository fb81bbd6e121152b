package mqtt

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func openQueue(t testing.TB, dir string, max int64) *LogQueue {
	t.Helper()
	q, err := OpenLogQueue(LogQueueConfig{Dir: dir, MaxBytes: max, Log: testLog(t)})
	if err != nil {
		t.Fatal(err)
	}
	return q
}

// TestLogQueue: what was not acknowledged is there after a restart, in order,
// and what was is not.
func TestLogQueue(t *testing.T) {
	dir, ctx := t.TempDir(), context.Background()
	q := openQueue(t, dir, 0)
	for i := range 10 {
		if err := q.Append(ctx, fmt.Append(nil, i)); err != nil {
			t.Fatal(err)
		}
	}
	next := func(want int) uint64 {
		t.Helper()
		id, record, err := q.Next(ctx)
		if err != nil || string(record) != fmt.Sprint(want) {
			t.Fatalf("%q %v, want %d", record, err, want)
		}
		return id
	}
	for i := range 3 {
		next(i)
	}
	id := next(3)
	next(4)
	if err := q.Ack(id); err != nil {
		t.Fatal(err)
	}
	if q.Len() != 6 {
		t.Errorf("%d left", q.Len())
	}
	if err := q.Close(); err != nil {
		t.Fatal(err)
	}
	q = openQueue(t, dir, 0)
	for i := 4; i < 10; i++ {
		id = next(i)
	}
	if err := q.Ack(id); err != nil || q.Len() != 0 {
		t.Errorf("%d left, %v", q.Len(), err)
	}
	// It died, and what was noted is damaged: all comes again.
	if err := q.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "cursor.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	q = openQueue(t, dir, 0)
	next(0)
	if err := q.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestLogQueueBound: the oldest go, and are counted.
func TestLogQueueBound(t *testing.T) {
	q := openQueue(t, t.TempDir(), 256<<10)
	defer q.Close()
	ctx := context.Background()
	noise := make([]byte, 8<<10) // that does not compress
	source := rand.NewChaCha8([32]byte{})
	for i := range 100 {
		_, _ = source.Read(noise)
		if err := q.Append(ctx, append(fmt.Appendf(nil, "%d ", i), noise...)); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "drops counted", func() bool { return q.Dropped() > 0 })
	if _, record, err := q.Next(ctx); err != nil || bytes.HasPrefix(record, []byte("0 ")) {
		t.Errorf("%.10q, %v", record, err)
	}
}

// TestBridgeFromEmbedded: what devices say to the embedded broker while the node
// is cut off outlives a restart of the node and is carried once it is connected,
// retained where it is to be; and nothing loops.
func TestBridgeFromEmbedded(t *testing.T) {
	dir := t.TempDir()
	there := startMosquitto(t, "persistence true", "persistence_location %d/")
	hear := listen(t, there, "site/#")
	start := func() (*Embedded, *LogQueue, func()) {
		local, err := NewEmbedded(EmbeddedConfig{Log: testLog(t)})
		if err != nil {
			t.Fatal(err)
		}
		stopLocal := runUntilEnd(t, local)
		q := openQueue(t, dir, 0)
		b, err := NewBridge(BridgeConfig{Name: "b1", Local: local, NoNotifications: true, Out: q, Log: testLog(t),
			Remote: ExternalConfig{URL: there.url(), MinBackoff: 10 * time.Millisecond, MaxBackoff: 50 * time.Millisecond},
			Topics: topics(t, `topic # both 1 "" site/`)})
		if err != nil {
			t.Fatal(err)
		}
		stop := runUntilEnd(t, b)
		eventually(t, "bridge subscribed", func() bool { return len(b.remote.currentRoutes().wild) == 1 })
		return local, q, func() {
			stop()
			stopLocal()
			if err := q.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	there.stop()
	local, q, stop := start()
	const n = 50
	for i := range n {
		publish(t, local, Message{Topic: "dev/1", QoS: 1, Payload: fmt.Append(nil, i)})
	}
	publish(t, local, Message{Topic: "dev/2", QoS: 1, Retain: true, Payload: []byte("kept")})
	eventually(t, "all queued", func() bool { return q.Len() == n+1 })
	stop()
	there.start()
	local, q, stop = start()
	defer stop()
	var here heard
	defer subscribe(t, local, "#", 1, here.handle)()
	eventually(t, "all heard", func() bool { return hear.len() == n+1 && q.Len() == 0 })
	for i, got := range hear.all()[:n] {
		if got != fmt.Sprintf("site/dev/1=%d", i) {
			t.Fatalf("at %d: %s", i, got)
		}
	}
	if kept := listen(t, there, "site/dev/2"); !eventuallyLen(kept, 1) || !kept.msgs[0].Retain {
		t.Error("not retained there")
	}
	there.pub("-t", "site/cmd", "-m", "go", "-q", "1")
	publish(t, local, Message{Topic: "end", QoS: 1})
	eventually(t, "the end there", func() bool { return hear.len() >= n+3 })
	eventually(t, "command here", func() bool { return here.len() >= 2 })
	for _, s := range here.all() {
		if s != "cmd=go" && s != "end=" {
			t.Errorf("here came %s", s)
		}
	}
	if hear.len() != n+3 {
		t.Errorf("there came %v", hear.all()[n:])
	}
}
