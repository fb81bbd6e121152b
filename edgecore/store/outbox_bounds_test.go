package store

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func entries(s *Store, op Op) (n int) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for id := range s.outbox.byID {
		if id.op == op {
			n++
		}
	}
	return n
}

// What waits for the cloud while a node is away for long is bounded: the last
// statuses of pods that are gone go first, that they are gone goes last, what is
// dropped is counted, and all of it is as bounded after a restart.
func TestStatesAreBounded(t *testing.T) {
	cfg := testConfig(t)
	s := mustOpen(t, cfg)
	upsertPod(t, s, "stays", "us", "1", "")
	patchStatus(t, s, podKey("stays"), `{"phase":"Running"}`)
	const gone = 600
	pad := strings.Repeat("x", 10<<10)
	for i := 0; i < gone; i += 50 { // many in one commit, for the test's time
		must(t, s.Local(t.Context(), func(tx *Tx) error {
			for j := i; j < i+50; j++ {
				name, uid := fmt.Sprintf("p%d", j), fmt.Sprintf("u%d", j)
				if _, err := tx.put(podKey(name), uid, "1", mustDoc(t, podBody(name, uid, fmt.Sprintf(`,"status":{"phase":"Failed","pad":%q}`, pad)))); err != nil {
					return err
				}
				tx.MarkDirty(Mark{Op: OpStatus, Key: podKey(name), UID: uid})
				if _, err := tx.Delete(podKey(name)); err != nil {
					return err
				}
				tx.MarkDirty(Mark{Op: OpDelete, Key: podKey(name), UID: uid})
			}
			return nil
		}))
	}
	check := func(when string) {
		t.Helper()
		if s.outbox.last > maxLastBytes || s.outbox.states > maxStates {
			t.Errorf("%s: %d entries, %d bytes", when, s.outbox.states, s.outbox.last)
		}
		if n := entries(s, OpDelete); n != gone {
			t.Errorf("%s: %d deletions of %d", when, n, gone)
		}
		kept := entries(s, OpStatus) - 1
		if kept < 300 || s.outbox.DroppedStates() != uint64(gone-kept) {
			t.Errorf("%s: %d last statuses, %d dropped", when, kept, s.outbox.DroppedStates())
		}
		if hasEntry(s, podKey("p0"), OpStatus, "u0") || !hasEntry(s, podKey("p599"), OpStatus, "u599") || !hasEntry(s, podKey("stays"), OpStatus, "us") {
			t.Errorf("%s: not the oldest were dropped", when)
		}
	}
	check("away")
	if d := s.Outbox().Unreported(); d.States == 0 || d.Since.IsZero() {
		t.Errorf("unreported: %+v", d)
	}
	must(t, s.Close())
	s = mustOpen(t, cfg)
	check("after a restart")
}

func mustDoc(t testing.TB, body []byte) doc {
	d, err := parseDoc(body)
	must(t, err)
	return d
}

// A static pod whose manifest changes all the time while the node is away leaves
// nothing but what it is now.
func TestMirrorPodsThatCameAndWent(t *testing.T) {
	s := mustOpen(t, testConfig(t))
	k := podKey("static")
	for i := range 20 {
		uid := fmt.Sprintf("m%d", i)
		must(t, s.Local(t.Context(), func(tx *Tx) error {
			if _, ok := tx.Get(k); ok {
				old, err := tx.Delete(k)
				if err != nil {
					return err
				}
				tx.MarkDirty(Mark{Op: OpDelete, Key: k, UID: old.UID})
			}
			_, err := tx.Put(k, uid, []byte(`{"metadata":{"annotations":{"kubernetes.io/config.mirror":"h"}}}`))
			tx.MarkDirty(Mark{Op: OpCreate, Key: k, UID: uid})
			return err
		}))
		patchStatus(t, s, k, `{"phase":"Running"}`)
	}
	if n := s.Outbox().Depth(); n != 2 { // the last one's create and status
		t.Errorf("%d entries", n)
	}
}

// What is made while away survives a restart without a commit of its own:
// Events with their counts and times in their order, ends of Jobs, deletions.
func TestMadeAwaySurvives(t *testing.T) {
	cfg := testConfig(t)
	s := mustOpen(t, cfg)
	upsertPod(t, s, "job", "uj", "1", `,"status":{"phase":"Running"}`)
	upsertPod(t, s, "gone", "ug", "1", `,"status":{"phase":"Running"}`)
	before := s.Commits()
	for _, name := range []string{"first", "second", "third"} {
		kubeletEvent(t, s, name)
	}
	for range 4 {
		kubeletEvent(t, s, "first") // keeps its place
	}
	if n := s.Commits() - before; n != 0 {
		t.Errorf("events cost %d commits", n)
	}
	patchStatus(t, s, podKey("job"), `{"phase":"Succeeded","containerStatuses":[{"state":{"terminated":{"finishedAt":"2026-01-01T03:14:00Z"}}}]}`)
	patchStatus(t, s, podKey("gone"), `{"phase":"Failed"}`)
	kubeletDelete(t, s, podKey("gone"))
	must(t, s.Close())

	s = mustOpen(t, cfg)
	var got []string
	for s.Outbox().Depth() > 0 {
		for _, p := range mustNext(t, s) {
			got = append(got, string(p.Op)+" "+p.Key.Name)
			switch {
			case p.Key.Name == "first" && at(t, p.Body, "count") != float64(5):
				t.Errorf("count: %s", p.Body)
			case p.Op == OpEvent && at(t, p.Body, "firstTimestamp") != "2026-01-01T00:00:00Z":
				t.Errorf("time: %s", p.Body)
			case p.Key.Name == "job" && !strings.Contains(string(p.Body), "03:14"):
				t.Errorf("the Job's end: %s", p.Body)
			}
			s.Outbox().Done(p.ID)
		}
	}
	same(t, "told", got, "status gone", "status job", "event first", "event second", "event third", "delete gone")
	if list, _ := s.List("events", ""); len(list) != 3 {
		t.Errorf("%d events for local clients", len(list))
	}
	must(t, s.Close())
	s = mustOpen(t, cfg)
	if n := s.Outbox().Depth(); n != 0 {
		t.Errorf("%d entries are told again", n)
	}
}

// After a power cut, too, once they waited for a while: a flush takes them along.
func TestEventsSurviveAPowerCut(t *testing.T) {
	cfg := testConfig(t)
	cfg.FlushAfter = 10 * time.Millisecond
	s := mustOpen(t, cfg)
	kubeletEvent(t, s, "e")
	onDisk := func() int {
		copied := testConfig(t)
		must(t, copyFile(copied.Path, cfg.Path))
		must(t, copyFile(copied.Path+".key", cfg.Path+".key"))
		c, err := Open(copied)
		if err != nil {
			return -1 // torn: it was being written
		}
		defer c.Close()
		return entries(c, OpEvent)
	}
	await := func(want int) {
		t.Helper()
		for onDisk() != want {
			select {
			case <-t.Context().Done():
				t.Fatalf("never %d on disk", want)
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	await(1)
	for _, p := range mustNext(t, s) {
		s.Outbox().Done(p.ID)
	}
	await(0) // and leave with a later one
}

// Retries and waits go by the monotonic clock: a wall clock that jumps years
// changes nothing for times that have a monotonic reading, so all that are kept
// must have one.
func TestTheTimeOfDayDoesNotMatter(t *testing.T) {
	s := newStore(Config{MaxEvents: 1}, nil)
	e := &entry{entryID: entryID{podKey("a"), "u", OpDelete}, id: 1}
	s.outbox.insertLocked(e)
	p, _, _ := s.outbox.take(time.Now(), LaneAll)
	s.Outbox().Retry(p[0].ID)
	s.breakOff(ErrDisk)
	for what, at := range map[string]time.Time{"retry": e.notBefore, "mark": e.marked, "wear": s.wear.start, "heal": s.healAt} {
		if !strings.Contains(at.String(), "m=") {
			t.Errorf("%s is kept as a time of day", what)
		}
	}
}

func TestBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore(Config{MaxEvents: 1, BytesPerDay: 1000, FlushAfter: time.Minute}, nil)
		s.wear.add(ClassPods, 2000)
		if got := s.flushAfter(); got != spaced*time.Minute {
			t.Errorf("over the budget what may wait waits %v", got)
		}
		time.Sleep(23 * time.Hour)
		if got := s.wear.lastDay(); got != 2000 {
			t.Errorf("after 23 h: %d", got)
		}
		time.Sleep(2 * time.Hour)
		if got := s.wear.lastDay(); got != 0 {
			t.Errorf("after 25 h: %d", got)
		}
		if got := s.flushAfter(); got != time.Minute {
			t.Errorf("within the budget it waits %v", got)
		}
		time.Sleep(1000 * time.Hour)
		s.wear.add(ClassPods, 7)
		if got := s.wear.lastDay(); got != 7 {
			t.Errorf("long after: %d", got)
		}
	})
}

// What need not be durable is not written, and is when the store is closed.
func TestSoon(t *testing.T) {
	cfg := testConfig(t)
	s := mustOpen(t, cfg)
	k := Key{"nodes", "", "n"}
	beat := func(v int) {
		t.Helper()
		must(t, s.Local(t.Context(), func(tx *Tx) error {
			tx.Soon()
			_, err := tx.Put(k, "u", fmt.Appendf(nil, `{"status":{"n":%d}}`, v))
			return errors.Join(err, tx.PutPrivate("token", "t", "", fmt.Appendf(nil, "%d", v)))
		}))
	}
	beat(0)
	before := s.BytesWritten()
	for v := range 50 {
		beat(v + 1)
	}
	if n := s.BytesWritten() - before; n != 0 {
		t.Errorf("%d bytes written", n)
	}
	if o, _ := s.Get(k); at(t, o.Body, "status", "n") != float64(50) {
		t.Errorf("not visible: %s", o.Body)
	}
	must(t, s.Close())
	s = mustOpen(t, cfg)
	if o, _ := s.Get(k); at(t, o.Body, "status", "n") != float64(50) {
		t.Errorf("after Close: %s", o.Body)
	}
	if v, _ := s.Private("token", "t"); string(v) != "50" {
		t.Errorf("after Close: %q", v)
	}
}
