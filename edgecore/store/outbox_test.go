package store

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

func mustNext(t testing.TB, s *Store) []Pending {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	p, err := s.Outbox().Next(ctx, LaneAll)
	if err != nil {
		t.Fatalf("outbox: %v", err)
	}
	return p
}

func TestOutboxCoalesces(t *testing.T) {
	s := mustOpen(t, testConfig(t))
	upsertPod(t, s, "a", "u1", "1", "")
	upsertPod(t, s, "b", "u2", "1", "")
	for i := range 5 {
		patchStatus(t, s, podKey("a"), fmt.Sprintf(`{"phase":"%d"}`, i))
	}
	patchStatus(t, s, podKey("b"), `{"phase":"x"}`)
	if d := s.Outbox().Depth(); d != 2 {
		t.Errorf("depth %d", d)
	}
	p := mustNext(t, s)
	if len(p) != 2 || p[0].Key.Name != "a" || at(t, p[0].Body, "status", "phase") != "4" {
		t.Fatalf("pending: %+v", p)
	}
	// What changes while it is out is sent again, and not before the answer.
	patchStatus(t, s, podKey("a"), `{"phase":"late"}`)
	s.Outbox().Done(p[1].ID)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if again, err := s.Outbox().Next(ctx, LaneAll); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("handed out twice: %+v %v", again, err)
	}
	s.Outbox().Done(p[0].ID)
	p = mustNext(t, s)
	if len(p) != 1 || at(t, p[0].Body, "status", "phase") != "late" {
		t.Fatalf("pending: %+v", p)
	}
	// Release: answers to the old session are void.
	s.Outbox().Release()
	s.Outbox().Done(p[0].ID)
	p2 := mustNext(t, s)
	if len(p2) != 1 || p2[0].ID == p[0].ID {
		t.Fatalf("after release: %+v", p2)
	}
	s.Outbox().Done(p2[0].ID)
	if d := s.Outbox().Depth(); d != 0 {
		t.Errorf("depth %d", d)
	}
}

func TestOutboxKeepsOrderPerName(t *testing.T) {
	s := mustOpen(t, testConfig(t))
	k := podKey("a")
	put := func(uid string) {
		if err := s.Local(t.Context(), func(tx *Tx) error {
			_, err := tx.Put(k, uid, []byte(`{"metadata":{"annotations":{"kubernetes.io/config.mirror":"h"}}}`))
			tx.MarkDirty(Mark{Op: OpCreate, Key: k, UID: uid})
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	upsertPod(t, s, "a", "u1", "1", "")
	kubeletDelete(t, s, k)
	put("u2")
	patchStatus(t, s, k, `{"phase":"x"}`)
	var got []string
	for s.Outbox().Depth() > 0 {
		p := mustNext(t, s)
		if len(p) != 1 {
			t.Fatalf("%d of one name at once", len(p))
		}
		got = append(got, string(p[0].Op)+" "+p[0].UID)
		s.Outbox().Done(p[0].ID)
	}
	same(t, "order", got, "delete u1", "create u2", "status u2")
}

func TestOutboxRetryBacksOff(t *testing.T) {
	s := mustOpen(t, testConfig(t))
	upsertPod(t, s, "a", "u1", "1", "")
	patchStatus(t, s, podKey("a"), `{"phase":"x"}`)
	p := mustNext(t, s)
	var waits []time.Duration
	for range 12 {
		s.Outbox().Retry(p[0].ID)
		_, _, wait := s.outbox.take(time.Now(), LaneAll)
		waits = append(waits, wait.Round(time.Second))
		p, _, _ = s.outbox.take(time.Now().Add(maxRetry+time.Second), LaneAll)
		if len(p) != 1 {
			t.Fatal("not handed out after its wait")
		}
	}
	if p[0].Attempt != 12 || waits[0] != time.Second || waits[3] != 8*time.Second || waits[11] != maxRetry {
		t.Errorf("attempt %d, waits %v", p[0].Attempt, waits)
	}
	s.Outbox().Retry(p[0].ID)
	s.Outbox().Release() // a new session tries at once
	if p, _, _ := s.outbox.take(time.Now(), LaneAll); len(p) != 1 {
		t.Error("not handed out in a new session")
	}
}

func TestOutboxEventsAreBounded(t *testing.T) {
	cfg := testConfig(t)
	cfg.MaxEvents = 10
	s := mustOpen(t, cfg)
	commits := s.Commits()
	for i := range 25 {
		k := Key{"events", "default", fmt.Sprintf("e%d", i)}
		if err := s.Local(t.Context(), func(tx *Tx) error {
			_, err := tx.Put(k, "u", []byte(`{}`))
			tx.MarkDirty(Mark{Op: OpEvent, Key: k, UID: "u"})
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	if list, _ := s.List("events", ""); len(list) != 10 || s.Outbox().Depth() != 10 || s.Outbox().Dropped() != 15 {
		t.Errorf("%d kept, %d pending, %d dropped", len(list), s.Outbox().Depth(), s.Outbox().Dropped())
	}
	if n := s.Commits() - commits; n > 1 { // one sets a block of resourceVersions aside
		t.Errorf("events cost %d commits", n)
	}
	upsertPod(t, s, "a", "u1", "1", "")
	patchStatus(t, s, podKey("a"), `{"phase":"x"}`)
	for lane, op := range map[Lane]Op{LaneState: OpStatus, LaneEvents: OpEvent} {
		p, _, _ := s.outbox.take(time.Now(), lane)
		for _, e := range p {
			if e.Op != op {
				t.Errorf("lane %d hands out %s", lane, e.Op)
			}
		}
		if len(p) == 0 {
			t.Errorf("lane %d is empty", lane)
		}
	}
	s.outbox.Release()
	if p := mustNext(t, s); p[0].Op != OpStatus || p[1].Key.Name != "e15" {
		t.Errorf("events before status, or out of order: %+v", p[:2])
	}
}

func TestOutboxNextWakes(t *testing.T) {
	s := mustOpen(t, testConfig(t))
	upsertPod(t, s, "a", "u1", "1", "")
	got := make(chan []Pending)
	go func() {
		p, err := s.Outbox().Next(t.Context(), LaneAll)
		if err != nil {
			t.Error(err)
		}
		got <- p
	}()
	patchStatus(t, s, podKey("a"), `{"phase":"x"}`)
	if p := <-got; len(p) != 1 {
		t.Errorf("%+v", p)
	}
}

func TestNextWaitsOutTheBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore(Config{MaxEvents: 1}, nil)
		e := &entry{entryID: entryID{podKey("a"), "u", OpDelete}, id: 1}
		s.outbox.insertLocked(e)
		start := time.Now()
		for range 3 {
			p, err := s.Outbox().Next(t.Context(), LaneAll)
			if err != nil {
				t.Fatal(err)
			}
			s.Outbox().Retry(p[0].ID)
		}
		if took := time.Since(start); took != 3*time.Second { // 1 s, then 2 s
			t.Errorf("third try after %v", took)
		}
	})
}

// kubeletEvent makes an Event as the kubelet does, or counts it up.
func kubeletEvent(t testing.TB, s *Store, name string) {
	t.Helper()
	k := Key{"events", "default", name}
	must(t, s.Local(context.Background(), func(tx *Tx) error {
		n := 1
		if cur, ok := tx.Get(k); ok {
			c, _ := at(t, cur.Body, "count").(float64)
			n = int(c) + 1
		}
		_, err := tx.Put(k, "u"+name, fmt.Appendf(nil, `{"count":%d,"firstTimestamp":"2026-01-01T00:00:00Z"}`, n))
		tx.MarkDirty(Mark{Op: OpEvent, Key: k, UID: "u" + name})
		return err
	}))
}
