package link

import (
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

const soonStalled = 300 * time.Millisecond

func impatient(c *Config) { c.stall = soonStalled }

// A hub that keeps its tunnel up and does nothing is left for another try, at
// whatever point it stops.
func TestAHubThatStalls(t *testing.T) {
	for _, c := range []struct {
		name, says string
		stall      func(t *testing.T, r *rig)
	}{
		{"takes no stream", "its welcome", func(_ *testing.T, r *rig) { r.session() }},
		{"no welcome", "its welcome", func(_ *testing.T, r *rig) { r.hello() }},
		{"no differences", "its differences", func(_ *testing.T, r *rig) { r.welcome() }},
		{"differences without an end", "its differences", func(_ *testing.T, r *rig) {
			r.welcome().delta(edgeapi.Delta{Seq: 1, Upserts: []edgeapi.Upsert{upsert("configmaps", "m", "u9", "")}})
		}},
		{"no results", "without the result of any write", func(_ *testing.T, r *rig) {
			c := r.synced()
			r.report("a", "u1", "x")
			receive[edgeapi.Write](c)
		}},
		{"some results", "without the result of any write", func(_ *testing.T, r *rig) {
			c := r.synced()
			for i := range 3 {
				r.report(fmt.Sprint("p", i), fmt.Sprint("u", i), "x")
			}
			for range 3 {
				w := receive[edgeapi.Write](c)
				if w.Name == "p0" {
					c.result(w, 200)
				}
			}
		}},
		{"stops reading", "it took no data|the result of any write", func(t *testing.T, r *rig) {
			r.synced()
			for i := range 40 { // the stream's credit is 64 KiB
				r.report(fmt.Sprint("p", i), fmt.Sprint("u", i), noise(t, 40<<10))
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			log := new(journal)
			r := newRig(t, openStore(t), impatient, func(c *Config) { c.Log = slog.New(slog.NewTextHandler(log, nil)) })
			began := time.Now()
			c.stall(t, r)
			r.await("the reason", func() bool {
				said := log.String()
				return slices.ContainsFunc(strings.Split(c.says, "|"), func(s string) bool { return strings.Contains(said, s) })
			})
			if took := time.Since(began); took < soonStalled {
				t.Errorf("given up after %v", took)
			}
			r.session()
		})
	}
}

// journal keeps what was logged, as the next tunnel soon has another reason.
type journal struct {
	mu sync.Mutex
	b  strings.Builder
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.b.Write(p)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.b.String()
}

// noise is text that does not compress well.
func noise(t *testing.T, n int) string {
	t.Helper()
	var b strings.Builder
	x := uint32(n)
	for b.Len() < n {
		x = x*1664525 + 1013904223
		fmt.Fprintf(&b, "%08x", x)
	}
	return b.String()
}

// One that has nothing to say is not one that stalls.
func TestAQuietHubIsKept(t *testing.T) {
	r := newRig(t, openStore(t), impatient)
	c := r.synced()
	r.report("a", "u1", "x")
	c.result(receive[edgeapi.Write](c), 200)
	time.Sleep(3 * soonStalled)
	if !r.State().Connected || c.session.Err() != nil {
		t.Fatalf("%+v", r.State())
	}
	c.delta(edgeapi.Delta{Seq: 2, Upserts: []edgeapi.Upsert{upsert("configmaps", "m", "u9", "")}})
}
