package main

import (
	"strings"
	"testing"
	"time"
)

func TestOverlap(t *testing.T) {
	for _, c := range []struct {
		name   string
		a1, a2 int64
		b1, b2 int64
		want   bool
	}{
		{"one after the other", 10, 20, 30, 40, false},
		{"the other way round", 30, 40, 10, 20, false},
		{"the second runs on", 10, 20, 30, 0, false},
		{"the first ends when the second starts", 10, 20, 20, 0, false},
		{"the first ends late", 10, 31, 30, 40, true},
		{"the first runs on", 10, 0, 30, 40, true},
		{"both run on", 10, 0, 30, 0, true},
		{"one within the other", 10, 40, 20, 30, true},
	} {
		if got := overlap(c.a1, c.a2, c.b1, c.b2); got != c.want {
			t.Errorf("%s: %t, want %t", c.name, got, c.want)
		}
	}
}

func TestGrow(t *testing.T) {
	var sum, at uint64
	for _, now := range []uint64{5, 9, 2, 3, 3} { // it starts anew after 9
		sum, at = grow(sum, at, now)
	}
	if sum != 12 {
		t.Errorf("sum %d, want 12", sum)
	}
}

func TestABookTellsWhatIsLost(t *testing.T) {
	b := newBook()
	b.ackConfig(b.nextConfig())
	b.nextConfig() // tried, and its answer lost
	for v, ok := range map[string]bool{"0": false, "1": true, "2": true, "3": false, "": false} {
		if err := b.checkConfig(v); (err == nil) != ok {
			t.Errorf("the ConfigMap at %q: %v", v, err)
		}
	}
	tally := newTally(false)
	b.jobRan("edge-1", container{id: "a", uid: "1"}, tally)
	b.jobRan("edge-1", container{id: "a", uid: "1"}, tally)
	b.jobRan("edge-1", container{id: "b", uid: "2"}, tally)
	if len(tally.violations) != 0 {
		t.Errorf("violations: %v", tally.violations)
	}
	b.jobRan("edge-1", container{id: "c", uid: "2"}, tally)
	if len(tally.violations) != 1 {
		t.Errorf("a job's pod that ran twice: %v", tally.violations)
	}
	if b.isDeleted("x") {
		t.Error("a pod may be gone that nobody has deleted")
	}
}

func TestMemoryThatGrowsIsTold(t *testing.T) {
	s := &soak{t: newTally(false), gauges: map[string]*gauge{}}
	s.gaugeOf("cloudhub").rest = []float64{200, 300, 310, 305, 310, 300, 311, 309}
	if s.checkMemory(); len(s.t.violations) != 0 {
		t.Errorf("violations: %v", s.t.violations)
	}
	s.gaugeOf("cloudhub").rest = []float64{100, 150, 200, 250, 300, 350, 400, 450}
	if s.checkMemory(); len(s.t.violations) != 1 {
		t.Errorf("memory that grows: %v", s.t.violations)
	}
	s.gaugeOf("cloudhub").rest = nil
	s.gaugeOf("cloudhub").anon = []float64{100, maxHubAnonMB + 1}
	if s.checkMemory(); len(s.t.violations) != 2 {
		t.Errorf("memory above the bound: %v", s.t.violations)
	}
}

func TestReport(t *testing.T) {
	s := &soak{cfg: config{time: time.Minute, seed: 3}, began: time.Now(), t: newTally(false), book: newBook(), gauges: map[string]*gauge{}}
	s.t.fault("power cycle", 2*time.Second)
	s.t.fault("power cycle", 0)
	s.t.violate("it broke")
	text := s.report()
	for _, want := range []string{"**1 violations.**", "it broke", "| power cycle | 2 | 2.0 s | 2.0 s | 2.0 s |", "SEED=3"} {
		if !strings.Contains(text, want) {
			t.Errorf("the report lacks %q:\n%s", want, text)
		}
	}
}
