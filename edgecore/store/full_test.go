package store

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A disk that takes no more refuses the write, changes nothing, and is no
// problem any more once there is room. In a process of its own: the limit on
// the size of files that stands in for a full disk holds for all of it.
func TestFullDisk(t *testing.T) {
	if dir := os.Getenv("SKERRY_STORE_FULL"); dir != "" {
		fillDisk(t, Config{Path: filepath.Join(dir, "edge.db"), LockTimeout: time.Second})
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestFullDisk$")
	cmd.Env = append(os.Environ(), "SKERRY_STORE_FULL="+t.TempDir())
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func fillDisk(t *testing.T, cfg Config) {
	s := mustOpen(t, cfg)
	upsertPod(t, s, "a", "u1", "1", "")
	patchStatus(t, s, podKey("a"), `{"phase":"Running"}`)
	events, rv := follow(t, s, "pods"), s.RV()

	signal.Ignore(syscall.SIGXFSZ)
	info, err := os.Stat(cfg.Path)
	must(t, err)
	var old syscall.Rlimit
	must(t, syscall.Getrlimit(syscall.RLIMIT_FSIZE, &old))
	must(t, syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: uint64(info.Size()), Max: old.Max}))
	big := podBody("big", "u2", fmt.Sprintf(`,"status":{"pad":%q}`, strings.Repeat("x", 1<<20)))
	err = s.ApplyDelta(t.Context(), Delta{Upserts: []Upsert{{podKey("big"), "u2", "1", big}}})
	if err == nil || !strings.Contains(err.Error(), "commit") || !strings.Contains(err.Error(), cfg.Path) {
		t.Errorf("write to a full disk: %v", err)
	}
	if _, ok := s.Get(podKey("big")); ok || s.RV() != rv || len(events()) != 0 {
		t.Error("a refused write can be seen")
	}
	if d := s.Outbox().Depth(); d != 1 {
		t.Errorf("outbox: %d", d)
	}
	must(t, syscall.Setrlimit(syscall.RLIMIT_FSIZE, &old))

	apply(t, s, Delta{Upserts: []Upsert{{podKey("big"), "u2", "1", big}}})
	patchStatus(t, s, podKey("a"), `{"phase":"Failed"}`)
	must(t, s.Close())
	s = mustOpen(t, cfg)
	if o, _ := s.Get(podKey("a")); at(t, o.Body, "status", "phase") != "Failed" {
		t.Errorf("after all: %s", o.Body)
	}
	if _, ok := s.Get(podKey("big")); !ok {
		t.Error("the pod that found room later is gone")
	}
}

// When the file's state is unknown nothing is built on it: the write is refused,
// and the store made anew from memory before the next.
func TestABrokenFileIsMadeAnew(t *testing.T) {
	cfg := testConfig(t)
	s := mustOpen(t, cfg)
	upsertPod(t, s, "a", "u1", "1", "")
	patchStatus(t, s, podKey("a"), `{"phase":"Running"}`)
	kubeletEvent(t, s, "e")
	must(t, s.db.Close())
	write := func() error {
		return s.ApplyDelta(t.Context(), Delta{Upserts: []Upsert{{podKey("b"), "u2", "1", podBody("b", "u2", "")}}})
	}
	if err := write(); !errors.Is(err, ErrDisk) {
		t.Fatalf("a write that cannot be: %v", err)
	}
	if _, ok := s.Get(podKey("b")); ok {
		t.Error("a refused write can be seen")
	}
	if tr := s.Trouble(); tr == nil || !strings.Contains(tr.Error, "commit") {
		t.Errorf("trouble: %+v", tr)
	}
	must(t, write())
	if tr := s.Trouble(); tr != nil {
		t.Errorf("trouble after a good write: %+v", tr)
	}
	must(t, s.Close())
	s = mustOpen(t, cfg)
	if s.Mended() != nil {
		t.Errorf("mended: %+v", s.Mended())
	}
	if list, _ := s.List("pods", ""); len(list) != 2 || s.Outbox().Depth() != 2 {
		t.Errorf("%d pods, outbox %d", len(list), s.Outbox().Depth())
	}
}

// With no room for a new file either, the store waits for it without a restart.
func TestMadeAnewWhenThereIsRoom(t *testing.T) {
	cfg := testConfig(t)
	s := mustOpen(t, cfg)
	upsertPod(t, s, "a", "u1", "1", "")
	must(t, s.db.Close())
	must(t, os.Mkdir(cfg.Path+".new", 0o700)) // stands in its way
	must(t, os.WriteFile(cfg.Path+".new/x", nil, 0o600))
	for range 3 {
		err := s.Local(t.Context(), func(tx *Tx) error {
			_, err := tx.Put(podKey("a"), "u1", podBody("a", "u1", `,"status":{"phase":"Running"}`))
			return err
		})
		if !errors.Is(err, ErrDisk) {
			t.Fatalf("acknowledged: %v", err)
		}
	}
	if list, _ := s.List("pods", ""); len(list) != 1 {
		t.Error("reads ended with the writes")
	}
	must(t, os.RemoveAll(cfg.Path+".new"))
	for s.Trouble() != nil { // by itself, with no write to bring it about
		select {
		case <-t.Context().Done():
			t.Fatal("still in trouble")
		case <-time.After(10 * time.Millisecond):
		}
	}
	patchStatus(t, s, podKey("a"), `{"phase":"Running"}`)
}
