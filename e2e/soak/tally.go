package main

import (
	"fmt"
	"os"
	"sync"
	"time"
)

// maxViolations bounds those that are kept; more only count.
const maxViolations = 50

// tally gathers what the report tells.
type tally struct {
	verbose bool

	mu         sync.Mutex
	violations []string
	unkept     int
	once       map[string]bool
	faults     map[string][]time.Duration // until in step; zero where it could not be told
	agreement  []time.Duration
	mounts     []time.Duration
	steps      map[string]*stepCount
	counts     map[string]int
	notes      []string
}

type stepCount struct {
	done, failed int
	last         string // error
}

func newTally(verbose bool) *tally {
	return &tally{verbose: verbose, once: map[string]bool{}, faults: map[string][]time.Duration{},
		steps: map[string]*stepCount{}, counts: map[string]int{}}
}

// violate notes a broken promise, with its evidence.
func (t *tally) violate(format string, args ...any) {
	text := time.Now().UTC().Format("15:04:05 ") + fmt.Sprintf(format, args...)
	fmt.Fprintln(os.Stderr, "soak: VIOLATION", text)
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.violations) == maxViolations {
		t.unkept++
		return
	}
	t.violations = append(t.violations, text)
}

func (t *tally) violateOnce(key, format string, args ...any) {
	t.mu.Lock()
	seen := t.once[key]
	t.once[key] = true
	t.mu.Unlock()
	if !seen {
		t.violate(format, args...)
	}
}

func (t *tally) saidf(format string, args ...any) {
	if t.verbose {
		fmt.Fprintln(os.Stderr, time.Now().UTC().Format("15:04:05"), fmt.Sprintf(format, args...))
	}
}

func (t *tally) fault(name string, inStep time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.faults[name] = append(t.faults[name], inStep)
}

func (t *tally) agreed(took time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.agreement = append(t.agreement, took)
}

func (t *tally) mounted(took time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.mounts = append(t.mounts, took)
}

func (t *tally) step(name string, err error) {
	if err != nil {
		t.saidf("step %s: %v", name, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	c := t.steps[name]
	if c == nil {
		c = &stepCount{}
		t.steps[name] = c
	}
	c.done++
	if err != nil {
		c.failed++
		c.last = err.Error()
	}
}

func (t *tally) count(name string, n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.counts[name] += n
}

func (t *tally) note(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.notes = append(t.notes, fmt.Sprintf(format, args...))
}
