package main

import (
	"fmt"
	"strconv"
	"sync"

	"k8s.io/apimachinery/pkg/types"
)

// book holds what the churn has asked for, as far as it cannot be asked of the
// cloud: what must be there because its writer was told so, and what may be
// gone.
type book struct {
	mu        sync.Mutex
	gone      map[types.UID]bool
	all       bool // that all may be gone
	config    int  // last value tried
	acked     int  // last value that was acknowledged
	static    map[string]string
	statics   int
	jobs      int
	open      map[string]bool // jobs that were acknowledged and not yet deleted
	created   int
	done      int
	ran       map[string]container // jobs' containers that ended well
	crashes   map[types.UID]int
	jobsTwice int
}

func newBook() *book {
	return &book{gone: map[types.UID]bool{}, static: map[string]string{}, open: map[string]bool{},
		ran: map[string]container{}, crashes: map[types.UID]int{}}
}

func (b *book) deleted(uid types.UID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.gone[uid] = true
}

func (b *book) allDeleted() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.all = true
}

func (b *book) isDeleted(uid types.UID) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.all || b.gone[uid]
}

func (b *book) nextConfig() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.config++
	return strconv.Itoa(b.config)
}

func (b *book) ackConfig(v string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if n, err := strconv.Atoi(v); err == nil {
		b.acked = n
	}
}

// checkConfig tells what is wrong with a ConfigMap that holds v: a write that
// was acknowledged may only be followed by a later one.
func (b *book) checkConfig(v string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if n, err := strconv.Atoi(v); err != nil || n < b.acked || n > b.config {
		return fmt.Errorf("the ConfigMap holds %q; %d was acknowledged, %d tried", v, b.acked, b.config)
	}
	return nil
}

func (b *book) nextStatic(node string) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.statics++
	b.static[node] = fmt.Sprintf("version %d", b.statics)
	return b.static[node]
}

func (b *book) noStatic(node string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.static, node)
}

func (b *book) wantStatic(node string) (message string, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	message, ok = b.static[node]
	return message, ok
}

func (b *book) nextJob() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.jobs++
	return fmt.Sprintf("job-%d", b.jobs)
}

func (b *book) ackJob(name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.open[name] = true
	b.created++
}

func (b *book) jobDone(name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.open[name] {
		delete(b.open, name)
		b.done++
	}
}

func (b *book) jobsOpen() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.open)
}

// openJobs are those that must be there.
func (b *book) openJobs() map[string]bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	open := map[string]bool{}
	for name := range b.open {
		open[name] = true
	}
	return open
}

// jobRan notes that a job's container has ended well; a second of the same pod
// did the work twice.
func (b *book) jobRan(node string, c container, t *tally) {
	b.mu.Lock()
	was, twice := b.ran[string(c.uid)]
	twice = twice && was.id != c.id
	b.ran[string(c.uid)] = c
	if twice {
		b.jobsTwice++
	}
	b.mu.Unlock()
	if twice {
		t.violate("%s: a job's pod was done and has run again: %s, then %s", node, was, c)
	}
}

// mayCrash allows a pod to be killed twice.
func (b *book) mayCrash(uid types.UID) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.crashes[uid]++
	return b.crashes[uid] <= 2
}
