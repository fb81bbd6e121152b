package store

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// kills is how often TestNoAcknowledgedWriteIsLostToSIGKILL kills; for a longer
// run: go test ./edgecore/store -run SIGKILL -kills 5000 -timeout 2h
var kills = flag.Int("kills", 200, "how many times to kill a store under churn")

// truth is what the child said before it was killed. A line of intent, with a
// question mark, goes before what it may or may not have done.
type truth struct {
	status  map[string]int    // pod -> highest acknowledged
	pods    map[string]string // acknowledged, by name: uid
	leaving map[string]bool   // uids whose end was begun
	ended   map[string]string // uids whose end was acknowledged: name
	telling map[string]bool   // uids whose end the cloud may have been told
	tokens  map[string]bool
	lines   int
}

func (tr *truth) take(f []string) {
	tr.lines++
	switch f[0] {
	case "status":
		n := 0
		_, _ = fmt.Sscan(f[2], &n)
		tr.status[f[1]] = max(tr.status[f[1]], n)
	case "pod":
		tr.pods[f[1]] = f[2]
	case "?end":
		tr.leaving[f[2]] = true
	case "end":
		tr.ended[f[2]] = f[1]
	case "?told":
		tr.telling[f[1]] = true
	case "token":
		tr.tokens[f[1]] = true
	default:
		tr.lines--
	}
}

// hold checks a reopened store against what was said.
func (tr *truth) hold(t *testing.T, s *Store, round int) {
	t.Helper()
	if s.Mended() != nil {
		t.Fatalf("round %d: a killed process left damage: %+v", round, s.Mended())
	}
	for name, want := range tr.status {
		o, ok := s.Get(podKey(name))
		got, _ := at(t, o.Body, "status", "n").(float64)
		if !ok || int(got) < want {
			t.Fatalf("round %d: %s is at %v, %d was acknowledged", round, name, got, want)
		}
		if want > 0 && !hasEntry(s, podKey(name), OpStatus, o.UID) {
			t.Fatalf("round %d: the status of %s is not in the outbox", round, name)
		}
	}
	for name, uid := range tr.pods {
		o, ok := s.Get(podKey(name))
		switch _, ended := tr.ended[uid]; {
		case ended && ok:
			t.Fatalf("round %d: %s is back", round, name)
		case ended && !tr.telling[uid] && !hasEntry(s, podKey(name), OpDelete, uid):
			t.Fatalf("round %d: that %s has ended is not in the outbox", round, name)
		case !ended && !tr.leaving[uid] && (!ok || o.UID != uid):
			t.Fatalf("round %d: %s is lost", round, name)
		}
	}
	for key := range tr.tokens {
		if _, ok := s.Private("token", key); !ok {
			t.Fatalf("round %d: token %s is lost", round, key)
		}
	}
	if c, err := os.Stat(goodPath(s.cfg.Path)); err == nil && c.Size() > 0 {
		cfg := s.cfg
		cfg.Path = goodPath(s.cfg.Path)
		g, err := load(cfg, s.sealer)
		if err != nil {
			t.Fatalf("round %d: the good copy is not: %v", round, err)
		}
		must(t, g.db.Close())
	}
}

// A child process writes and says on its standard output what was acknowledged;
// it is killed in the middle, again and again. Whatever it said must be in the
// store, and no kill may look like damage.
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
	tr := &truth{map[string]int{}, map[string]string{}, map[string]bool{}, map[string]string{}, map[string]bool{}, map[string]bool{}, 0}
	for round := range *kills {
		cmd := exec.Command(os.Args[0], "-test.run=^TestNoAcknowledgedWriteIsLostToSIGKILL$")
		cmd.Env = append(os.Environ(), fmt.Sprintf("SKERRY_STORE_CRASH=%s", dir), fmt.Sprintf("SKERRY_STORE_ROUND=%d", round))
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		var timer *time.Timer
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			if timer == nil { // from its first word on
				timer = time.AfterFunc(time.Duration(rand.IntN(120_000))*time.Microsecond, func() { _ = cmd.Process.Kill() })
			}
			if f := strings.Fields(lines.Text()); len(f) > 1 {
				tr.take(f)
			}
		}
		if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != -1 {
			t.Fatalf("round %d: the child ended by itself: %v", round, err)
		}
		timer.Stop()
		s, err := Open(cfg)
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		tr.hold(t, s, round)
		must(t, s.Close())
	}
	t.Logf("%d kills, %d acknowledgements, %d pods came, %d went", *kills, tr.lines, len(tr.pods), len(tr.ended))
	if tr.lines < *kills || len(tr.ended) == 0 || len(tr.tokens) == 0 {
		t.Error("hardly anything was acknowledged between the kills")
	}
}

func hasEntry(s *Store, k Key, op Op, uid string) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.outbox.byID[entryID{k, uid, op}] != nil
}

func writeUntilKilled(t *testing.T, dir string) {
	s, err := Open(Config{Path: filepath.Join(dir, "edge.db"), LockTimeout: 5 * time.Second})
	must(t, err)
	var wg sync.WaitGroup
	var out sync.Mutex
	var lost atomic.Bool // the parent is gone
	say := func(format string, args ...any) {
		out.Lock()
		defer out.Unlock()
		if _, err := fmt.Printf(format+"\n", args...); err != nil {
			lost.Store(true)
		}
	}
	for i := range 3 { // the kubelet reports
		wg.Go(func() {
			k := podKey(fmt.Sprintf("p%d", i))
			o, _ := s.Get(k)
			n, _ := at(t, o.Body, "status", "n").(float64)
			for v := int(n) + 1; !lost.Load(); v++ {
				patchStatus(t, s, k, fmt.Sprintf(`{"n":%d}`, v))
				say("status %s %d", k.Name, v)
			}
		})
	}
	wg.Go(func() { // pods come and go, with a token each
		for i := 0; !lost.Load(); i++ {
			name := fmt.Sprintf("c%s-%d", os.Getenv("SKERRY_STORE_ROUND"), i)
			uid := "u" + name
			upsertPod(t, s, name, uid, "1", "")
			say("pod %s %s", name, uid)
			must(t, s.Local(context.Background(), func(tx *Tx) error { return tx.PutPrivate("token", name, "u0", []byte("t")) }))
			say("token %s", name)
			if i%4 != 0 {
				say("?end %s %s", name, uid)
				kubeletDelete(t, s, podKey(name))
				say("end %s %s", name, uid)
			}
			kubeletEvent(t, s, name)
		}
	})
	wg.Go(func() { // the cloud hears of ends
		for !lost.Load() {
			batch, _, _ := s.outbox.take(time.Now(), LaneState)
			for _, p := range batch {
				if p.Op == OpDelete {
					say("?told %s", p.UID)
					s.outbox.Done(p.ID)
				} else {
					s.outbox.Retry(p.ID)
				}
			}
			time.Sleep(time.Millisecond)
		}
	})
	wg.Go(func() { // copies are made
		for !lost.Load() {
			_, _, err := s.copyGood()
			must(t, err)
			time.Sleep(20 * time.Millisecond)
		}
	})
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
