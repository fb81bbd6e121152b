package metricsapi

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	statsv1alpha1 "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
)

func newTestCollector(t *testing.T, source Source, change func(*Config)) *collector {
	t.Helper()
	cfg := Config{Source: source}
	if change != nil {
		change(&cfg)
	}
	a, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return a.collector
}

func TestAskedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := newNodes()
		source.summaries["a"] = &statsv1alpha1.Summary{}
		source.ask = func(context.Context, string) { time.Sleep(time.Second) }
		c := newTestCollector(t, source, nil)
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				if got := c.all(t.Context()); len(got) != 1 {
					t.Errorf("%d answers", len(got))
				}
			})
		}
		wg.Wait()
		time.Sleep(14 * time.Second)
		c.all(t.Context())
		if source.asked["a"] != 1 {
			t.Errorf("asked %d times within the cache's time", source.asked["a"])
		}
		time.Sleep(2 * time.Second)
		c.all(t.Context())
		if source.asked["a"] != 2 {
			t.Errorf("asked %d times after it", source.asked["a"])
		}
		// A node that has gone leaves the list and, in time, the cache.
		delete(source.summaries, "a")
		source.summaries["b"] = &statsv1alpha1.Summary{}
		if got := c.all(t.Context()); got["a"] != nil || got["b"] == nil {
			t.Errorf("after a has gone: %v", got)
		}
		time.Sleep(time.Minute)
		c.all(t.Context())
		if len(c.byNode) != 1 {
			t.Errorf("%d answers kept", len(c.byNode))
		}
	})
}

func TestSlowNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := newNodes()
		source.summaries["slow"], source.summaries["quick"] = &statsv1alpha1.Summary{}, &statsv1alpha1.Summary{}
		source.ask = func(ctx context.Context, node string) {
			if node == "slow" {
				<-ctx.Done()
			}
		}
		c := newTestCollector(t, source, nil)
		began := time.Now()
		got := c.all(t.Context())
		if got["quick"] == nil || got["slow"] != nil {
			t.Errorf("got %v", got)
		}
		if took := time.Since(began); took != 5*time.Second {
			t.Errorf("took %s", took)
		}
		// Its failure is remembered for a little while.
		c.all(t.Context())
		if source.asked["slow"] != 1 {
			t.Errorf("asked %d times", source.asked["slow"])
		}
		time.Sleep(retryAfter)
		c.all(t.Context())
		if source.asked["slow"] != 2 {
			t.Errorf("asked %d times", source.asked["slow"])
		}
	})
}

// TestAskerGone lets the client whose question is under way leave: another
// that waits for the same answer still gets one.
func TestAskerGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := newNodes()
		source.summaries["a"] = &statsv1alpha1.Summary{}
		source.ask = func(ctx context.Context, _ string) {
			select {
			case <-time.After(2 * time.Second):
			case <-ctx.Done():
			}
		}
		c := newTestCollector(t, source, nil)
		leaving, leave := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := c.one(leaving, "a"); err == nil {
				t.Error("the one who left got an answer")
			}
		})
		synctest.Wait()
		wg.Go(func() {
			if _, err := c.one(t.Context(), "a"); err != nil {
				t.Errorf("the one who stayed: %v", err)
			}
		})
		synctest.Wait()
		leave()
		wg.Wait()
	})
}

func TestBoundedAndStopped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := newNodes()
		var mu sync.Mutex
		now, most := 0, 0
		source.ask = func(ctx context.Context, _ string) {
			mu.Lock()
			now++
			most = max(most, now)
			mu.Unlock()
			select {
			case <-time.After(time.Second):
			case <-ctx.Done():
			}
			mu.Lock()
			now--
			mu.Unlock()
		}
		for i := range 100 {
			source.summaries[fmt.Sprint(i)] = &statsv1alpha1.Summary{}
		}
		c := newTestCollector(t, source, func(cfg *Config) { cfg.MaxConcurrent = 8 })
		stop, cancel := context.WithCancel(t.Context())
		c.stop = stop
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() { c.all(t.Context()) })
		}
		wg.Wait()
		if most != 8 {
			t.Errorf("%d questions at a time, want 8", most)
		}
		time.Sleep(time.Minute)
		cancel()
		began := time.Now()
		if got := c.all(t.Context()); len(got) != 0 || time.Since(began) != 0 {
			t.Errorf("after the server's stop: %d answers in %s", len(got), time.Since(began))
		}
	})
}

func TestNoSource(t *testing.T) {
	if _, err := New(Config{}); err == nil {
		t.Error("an API without a source")
	}
}
