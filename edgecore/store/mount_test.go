package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// mountAt mounts a file system of its own for the test; needs root.
func mountAt(t *testing.T, args ...string) string {
	t.Helper()
	dir := t.TempDir()
	run(t, "mount", append(args, dir)...)
	t.Cleanup(func() {
		for syscall.Unmount(dir, syscall.MNT_DETACH) == nil { // one may lie on another
		}
	})
	return dir
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
}

// fillUp takes all the room there is and returns what gives it back.
func fillUp(t *testing.T, dir string) (free func()) {
	t.Helper()
	path := filepath.Join(dir, "filler")
	f, err := os.Create(path)
	must(t, err)
	defer f.Close()
	for _, size := range []int{64 << 10, 4096, 1} {
		for err = nil; err == nil; {
			_, err = f.Write(make([]byte, size))
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("fill: %v", err)
		}
	}
	return func() { must(t, os.Remove(path)) }
}

func status(t testing.TB, s *Store, name string, n int) error {
	t.Helper()
	return s.Local(context.Background(), func(tx *Tx) error {
		cur, ok := tx.Get(podKey(name))
		if !ok {
			return fs.ErrNotExist
		}
		tx.MarkDirty(Mark{Op: OpStatus, Key: cur.Key, UID: cur.UID})
		_, err := tx.Put(cur.Key, cur.UID, podBody(name, cur.UID, fmt.Sprintf(`,"status":{"n":%d,"pad":%q}`, n, strings.Repeat("x", n%3000))))
		return err
	})
}

// On a disk that is full to the last byte, the kubelet's statuses, deletions and
// Events go on, from the room that was set aside; what needs more is refused and
// changes nothing; and when there is room again all goes on.
func TestAFullFileSystem(t *testing.T) {
	dir := mountAt(t, "-t", "tmpfs", "-o", "size=4m", "tmpfs")
	cfg := Config{Path: filepath.Join(dir, "edge.db"), LockTimeout: time.Second}
	s := mustOpen(t, cfg)
	for i := range 10 {
		upsertPod(t, s, fmt.Sprintf("p%d", i), fmt.Sprintf("u%d", i), "1", "")
	}
	free := fillUp(t, dir)
	big := Delta{Upserts: []Upsert{{podKey("big"), "ub", "1", podBody("big", "ub", fmt.Sprintf(`,"status":{"pad":%q}`, strings.Repeat("x", 1<<20)))}}}
	for round := range 3 {
		for i := range 100 {
			if err := status(t, s, fmt.Sprintf("p%d", i%5), round*100+i); err != nil {
				t.Fatalf("a status, round %d: %v", round, err)
			}
			kubeletEvent(t, s, fmt.Sprintf("e%d", i))
		}
		kubeletDelete(t, s, podKey(fmt.Sprintf("p%d", 5+round)))
		err := s.ApplyDelta(t.Context(), big)
		if !errors.Is(err, ErrDisk) || !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), cfg.Path) {
			t.Fatalf("more than there is room for: %v", err)
		}
		if tr := s.Trouble(); tr == nil || !strings.Contains(tr.Error, "no space") {
			t.Errorf("trouble: %+v", tr)
		}
		if _, _, err := s.copyGood(); round == 0 && err == nil {
			t.Error("a copy was made where there is no room")
		}
	}
	if list, _ := s.List("pods", ""); len(list) != 7 {
		t.Errorf("%d pods to serve", len(list))
	}
	free()
	apply(t, s, big)
	if tr := s.Trouble(); tr != nil {
		t.Errorf("trouble after all: %+v", tr)
	}
	if _, _, err := s.copyGood(); err != nil {
		t.Error(err)
	}
	must(t, s.Close())
	s = mustOpen(t, cfg)
	if list, _ := s.List("pods", ""); len(list) != 8 || s.Mended() != nil {
		t.Errorf("%d pods after a restart, mended %+v", len(list), s.Mended())
	}
}

// A file system that the kernel turned read-only after an error: writes say so,
// reads go on; once another is mounted in its place the store goes on without a restart.
func TestAReadOnlyFileSystem(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image")
	must(t, os.WriteFile(image, nil, 0o600))
	must(t, os.Truncate(image, 32<<20))
	run(t, "mkfs.ext4", "-q", image)
	dir := mountAt(t, "-o", "loop", image)
	cfg := Config{Path: filepath.Join(dir, "edge.db"), LockTimeout: time.Second}
	s := mustOpen(t, cfg)
	upsertPod(t, s, "a", "u1", "1", "")
	must(t, status(t, s, "a", 1))

	run(t, "mount", "-o", "remount,abort", dir)
	for n := range 3 {
		if err := status(t, s, "a", 2+n); !errors.Is(err, ErrDisk) {
			t.Fatalf("a status on a dead file system: %v", err)
		}
	}
	t.Logf("it says: %s", s.Trouble().Error)
	if o, ok := s.Get(podKey("a")); !ok || at(t, o.Body, "status", "n") != float64(1) {
		t.Errorf("to serve: %s", o.Body)
	}
	kubeletEvent(t, s, "e") // needs no disk

	// The dead one lives until the last file on it is closed, so what is mounted
	// in its place is another.
	must(t, syscall.Unmount(dir, syscall.MNT_DETACH))
	must(t, copyFile(image+".new", image))
	run(t, "mount", "-o", "loop", image+".new", dir)
	deadline := time.After(20 * time.Second)
	for {
		err := status(t, s, "a", 9)
		if err == nil {
			break
		}
		select {
		case <-deadline:
			t.Fatalf("still: %v", err)
		case <-time.After(50 * time.Millisecond):
		}
	}
	upsertPod(t, s, "b", "u2", "1", "")
	must(t, s.Close())
	s = mustOpen(t, cfg)
	o, _ := s.Get(podKey("a"))
	if list, _ := s.List("pods", ""); len(list) != 2 || at(t, o.Body, "status", "n") != float64(9) || s.Mended() != nil {
		t.Errorf("%d pods after a restart, a is %s, mended %+v", len(list), o.Body, s.Mended())
	}
}

// A store whose file is taken away under it does not go on writing into nowhere.
func TestAFileThatWasRemovedIsMadeAnew(t *testing.T) {
	cfg := testConfig(t)
	s := mustOpen(t, cfg)
	upsertPod(t, s, "a", "u1", "1", "")
	must(t, os.Remove(cfg.Path))
	must(t, status(t, s, "a", 1))
	must(t, os.WriteFile(cfg.Path+".x", []byte("replaced"), 0o600))
	must(t, os.Rename(cfg.Path+".x", cfg.Path))
	must(t, status(t, s, "a", 2))
	must(t, s.Close())
	s = mustOpen(t, cfg)
	if o, _ := s.Get(podKey("a")); at(t, o.Body, "status", "n") != float64(2) || s.Mended() != nil {
		t.Errorf("after a restart: %s, mended %+v", o.Body, s.Mended())
	}
}
