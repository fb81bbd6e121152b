package store

import (
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

// When the file's state is unknown nothing is acknowledged any more.
func TestBrokenFileStopsWrites(t *testing.T) {
	s, err := Open(testConfig(t))
	must(t, err)
	must(t, s.db.Close())
	for range 2 {
		err := s.ApplyDelta(t.Context(), Delta{Upserts: []Upsert{{podKey("a"), "u", "1", podBody("a", "u", "")}}})
		if err == nil {
			t.Fatal("acknowledged")
		}
		if _, ok := s.Get(podKey("a")); ok {
			t.Error("a refused write can be seen")
		}
	}
	if err := s.Local(t.Context(), func(*Tx) error { return nil }); err == nil || !strings.Contains(err.Error(), "restart edgecore") {
		t.Errorf("after a failed commit: %v", err)
	}
	_ = s.Close()
}
