package store

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A child process writes and says on its standard output what was acknowledged;
// it is killed in the middle. Whatever it said must be in the store.
func TestNoAcknowledgedWriteIsLostToSIGKILL(t *testing.T) {
	if dir := os.Getenv("SKERRY_STORE_CRASH"); dir != "" {
		writeUntilKilled(t, dir)
		return
	}
	dir := t.TempDir()
	cfg := Config{Path: filepath.Join(dir, "edge.db"), LockTimeout: 5 * time.Second}
	s := mustOpen(t, cfg)
	for i := range 4 {
		upsertPod(t, s, fmt.Sprintf("p%d", i), fmt.Sprintf("u%d", i), "1", "")
	}
	must(t, s.Close())
	acked := map[string]int{}
	for round := range 6 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestNoAcknowledgedWriteIsLostToSIGKILL$")
		cmd.Env = append(os.Environ(), "SKERRY_STORE_CRASH="+dir)
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		timer := time.AfterFunc(time.Duration(150+40*round)*time.Millisecond, func() { _ = cmd.Process.Kill() })
		lines := bufio.NewScanner(out)
		n := 0
		for lines.Scan() {
			f := strings.Fields(lines.Text())
			if len(f) != 3 || f[0] != "acked" {
				continue
			}
			v, err := strconv.Atoi(f[2])
			must(t, err)
			acked[f[1]] = max(acked[f[1]], v)
			n++
		}
		timer.Stop()
		if err := cmd.Wait(); err == nil {
			t.Fatal("the child ended by itself")
		}
		s := mustOpen(t, cfg)
		for name, want := range acked {
			o, ok := s.Get(podKey(name))
			got, _ := at(t, o.Body, "status", "n").(float64)
			if !ok || int(got) < want {
				t.Fatalf("round %d: %s is at %v, %d was acknowledged", round, name, got, want)
			}
			if want > 0 && !hasEntry(s, podKey(name)) {
				t.Fatalf("round %d: %s is not in the outbox", round, name)
			}
		}
		must(t, s.Close())
		t.Logf("round %d: %d writes acknowledged before the kill", round, n)
	}
}

func hasEntry(s *Store, k Key) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for id := range s.outbox.byID {
		if id.key == k && id.op == OpStatus {
			return true
		}
	}
	return false
}

func writeUntilKilled(t *testing.T, dir string) {
	s, err := Open(Config{Path: filepath.Join(dir, "edge.db"), LockTimeout: 5 * time.Second})
	must(t, err)
	var wg sync.WaitGroup
	var out sync.Mutex
	var lost atomic.Bool // the parent is gone
	for i := range 4 {
		wg.Go(func() {
			k := podKey(fmt.Sprintf("p%d", i))
			o, _ := s.Get(k)
			n, _ := at(t, o.Body, "status", "n").(float64)
			for v := int(n) + 1; !lost.Load(); v++ {
				patchStatus(t, s, k, fmt.Sprintf(`{"n":%d}`, v))
				out.Lock()
				if _, err := fmt.Printf("acked %s %d\n", k.Name, v); err != nil {
					lost.Store(true)
				}
				out.Unlock()
			}
		})
	}
	wg.Wait()
}

// A copy of the file taken at any moment between two writes of a page is what a
// power cut leaves; it must open, and hold all that was acknowledged before.
func TestCopiesTakenWhileWritingOpen(t *testing.T) {
	cfg := testConfig(t)
	s := mustOpen(t, cfg)
	upsertPod(t, s, "a", "u1", "1", "")
	stop := make(chan struct{})
	var acked atomic.Int64
	var wg sync.WaitGroup
	wg.Go(func() {
		for v := int64(1); ; v++ {
			select {
			case <-stop:
				return
			default:
			}
			patchStatus(t, s, podKey("a"), fmt.Sprintf(`{"n":%d,"pad":%q}`, v, strings.Repeat("x", int(v%9000))))
			acked.Store(v)
		}
	})
	opened := 0
	for i := range 40 {
		before := acked.Load()
		dir := t.TempDir()
		copied := filepath.Join(dir, "edge.db")
		// The data pages first and the meta pages last: no order of the copy's
		// own makes it inconsistent, except that a page may be reused in between.
		must(t, copyFile(copied, cfg.Path))
		must(t, copyFile(copied+".key", cfg.Path+".key"))
		c, err := Open(Config{Path: copied})
		if err != nil {
			if !strings.Contains(err.Error(), "damaged") {
				t.Fatal(err)
			}
			continue // refused, not misread
		}
		opened++
		o, ok := c.Get(podKey("a"))
		n, _ := at(t, o.Body, "status", "n").(float64)
		if !ok || int64(n) < before {
			t.Errorf("copy %d is at %v, %d was acknowledged before", i, n, before)
		}
		must(t, c.Close())
	}
	close(stop)
	wg.Wait()
	t.Logf("%d of 40 copies opened, the rest were refused; %d writes", opened, acked.Load())
	if opened == 0 {
		t.Error("no copy opened")
	}
}

func TestConcurrentWritesShareCommits(t *testing.T) {
	s := mustOpen(t, testConfig(t))
	const writers, each = 16, 20
	for i := range writers {
		upsertPod(t, s, fmt.Sprintf("p%d", i), fmt.Sprintf("u%d", i), "1", "")
	}
	before := s.Commits()
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			for v := range each {
				patchStatus(t, s, podKey(fmt.Sprintf("p%d", i)), fmt.Sprintf(`{"n":%d}`, v))
			}
		})
	}
	wg.Wait()
	n := s.Commits() - before
	t.Logf("%d writes in %d commits, %d bytes to disk in all", writers*each, n, s.BytesWritten())
	if n >= writers*each {
		t.Errorf("%d commits for %d writes", n, writers*each)
	}
	if s.BytesWritten() == 0 {
		t.Error("no bytes counted")
	}
}

func TestFailedWritesLeaveNoTrace(t *testing.T) {
	s := mustOpen(t, testConfig(t))
	upsertPod(t, s, "a", "u1", "1", "")
	events := follow(t, s, "pods")
	rv := s.RV()
	err := s.Local(t.Context(), func(tx *Tx) error {
		if _, err := tx.Put(podKey("a"), "u1", []byte(`{"status":{"x":1}}`)); err != nil {
			return err
		}
		tx.MarkDirty(Mark{Op: OpStatus, Key: podKey("a"), UID: "u1"})
		return os.ErrInvalid
	})
	if err != os.ErrInvalid {
		t.Errorf("error: %v", err)
	}
	func() {
		defer func() {
			if recover() == nil {
				t.Error("a panic in a write was swallowed")
			}
		}()
		_ = s.Local(t.Context(), func(tx *Tx) error { panic("boom") })
	}()
	if got := events(); len(got) != 0 || s.RV() != rv || s.Outbox().Depth() != 0 {
		t.Errorf("events %v, rv %d (was %d), outbox %d", got, s.RV(), rv, s.Outbox().Depth())
	}
	must(t, s.Close())
	if err := s.Local(t.Context(), func(*Tx) error { return nil }); err != ErrClosed {
		t.Errorf("write after close: %v", err)
	}
}
