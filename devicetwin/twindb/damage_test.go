package twindb

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/skerry-io/skerry/devicetwin"
)

// kills is how often the SIGKILL test kills; for a longer run:
// go test ./devicetwin/twindb -run SIGKILL -kills 2000 -timeout 1h
var kills = flag.Int("kills", 20, "how many times to kill a database under churn")

// A child process commits and says on its standard output what was acknowledged;
// it is killed in the middle, again and again. Whatever it said must be there,
// the epoch must have risen, and no kill may look like damage.
func TestNoAcknowledgedCommitIsLostToSIGKILL(t *testing.T) {
	if path := os.Getenv("SKERRY_TWINDB_CRASH"); path != "" {
		commitUntilKilled(t, path)
		return
	}
	path := filepath.Join(t.TempDir(), "devices.db")
	d := mustOpen(t, path)
	inc, epoch := d.Incarnation(), d.Epoch()
	must(t, d.Close())
	acked := map[string]int{}
	lines := 0
	for round := range *kills {
		cmd := exec.Command(os.Args[0], "-test.run=^TestNoAcknowledgedCommitIsLostToSIGKILL$")
		cmd.Env = append(os.Environ(), "SKERRY_TWINDB_CRASH="+path)
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		var timer *time.Timer
		in := bufio.NewScanner(out)
		for in.Scan() {
			if timer == nil { // from its first word on
				timer = time.AfterFunc(time.Duration(rand.IntN(80_000))*time.Microsecond, func() { _ = cmd.Process.Kill() })
			}
			var key string
			var n int
			if c, _ := fmt.Sscanf(in.Text(), "acked %s %d", &key, &n); c == 2 {
				acked[key] = max(acked[key], n)
				lines++
			}
		}
		if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != -1 {
			t.Fatalf("round %d: the child ended by itself: %v", round, err)
		}
		timer.Stop()
		d, err := Open(Config{Path: path})
		must(t, err)
		if d.Mended() != nil {
			t.Fatalf("round %d: a killed process left damage: %+v", round, d.Mended())
		}
		if d.Incarnation() != inc || d.Epoch() < epoch+2 {
			t.Fatalf("round %d: incarnation %s, epoch %d after %d", round, d.Incarnation(), d.Epoch(), epoch)
		}
		epoch = d.Epoch()
		have := map[string]int{}
		must(t, d.Load("cmd", func(k string, v []byte) error {
			_, err := fmt.Sscanf(string(v), "%d", new(int))
			n := 0
			_, _ = fmt.Sscanf(string(v), "%d", &n)
			have[k] = n
			return err
		}))
		for key, n := range acked {
			if have[key] < n {
				t.Fatalf("round %d: %s is at %d, %d was acknowledged", round, key, have[key], n)
			}
		}
		must(t, d.Close())
	}
	t.Logf("%d kills, %d acknowledgements", *kills, lines)
	if lines < *kills {
		t.Error("hardly anything was acknowledged between the kills")
	}
}

func commitUntilKilled(t *testing.T, path string) {
	d, err := Open(Config{Path: path, LockTimeout: 5 * time.Second})
	must(t, err)
	last := map[string]int{}
	must(t, d.Load("cmd", func(k string, v []byte) error {
		n := 0
		_, err := fmt.Sscanf(string(v), "%d", &n)
		last[k] = n
		return err
	}))
	var lost atomic.Bool // the parent is gone
	var wg sync.WaitGroup
	for w := range 4 {
		key := fmt.Sprint("w", w)
		wg.Go(func() {
			for n := last[key] + 1; !lost.Load(); n++ {
				v := fmt.Sprintf("%d %s", n, strings.Repeat("x", n%3000))
				must(t, d.Commit(context.Background(), devicetwin.Mut{Bucket: "cmd", Key: key, Value: []byte(v)}))
				if _, err := fmt.Printf("acked %s %d\n", key, n); err != nil {
					lost.Store(true)
				}
				d.Dirty("twin", fmt.Sprint("d", n%100), func() []byte { return []byte(v) })
				if n%7 == 0 {
					must(t, d.Flush(context.Background()))
				}
			}
		})
	}
	wg.Wait()
}

// filled makes a closed database with records in two buckets, and a good copy
// that is one commit older.
func filled(t testing.TB) (path, incarnation string, epoch uint64) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "devices.db")
	d := mustOpen(t, path)
	var muts []devicetwin.Mut
	for i := range 200 {
		muts = append(muts, devicetwin.Mut{Bucket: "twin", Key: fmt.Sprintf("d%03d", i), Value: fmt.Appendf(nil, "%d %s", i, strings.Repeat("x", 300))})
	}
	must(t, d.Commit(t.Context(), muts...))
	commit(t, d, "override", "d000", "on")
	must(t, d.Close())
	d = mustOpen(t, path)
	commit(t, d, "override", "d000", "off")
	must(t, d.Close())
	return path, d.Incarnation(), d.Epoch()
}

func restored(t *testing.T, path string) (twins int, override string) {
	t.Helper()
	c, err := readFile(path)
	must(t, err)
	if c.damage != nil {
		t.Fatal(c.damage)
	}
	for s, v := range c.records {
		if s.bucket == "twin" {
			twins++
			if want := fmt.Sprintf("%d ", twinNumber(s.key)); !strings.HasPrefix(string(v), want) {
				t.Fatalf("%s is %.20q", s.key, v)
			}
		}
	}
	return twins, string(c.records[slot{"override", "d000"}])
}

func twinNumber(key string) (n int) {
	_, _ = fmt.Sscanf(key, "d%d", &n)
	return n
}

func TestKindsOfDamage(t *testing.T) {
	page := func(path string, n int, edit func(p []byte)) {
		b, err := os.ReadFile(path)
		must(t, err)
		edit(b[n*os.Getpagesize():])
		must(t, os.WriteFile(path, b, 0o600))
	}
	for _, c := range []struct {
		name     string
		do       func(path string)
		sameInc  bool
		twins    int
		override string
		cause    string
	}{
		{"missing", func(p string) { must(t, os.Remove(p)) }, true, 200, "on", "missing"},
		{"empty", func(p string) { must(t, os.Truncate(p, 0)) }, true, 200, "on", "no valid meta page"},
		{"rubbish", func(p string) { must(t, os.WriteFile(p, []byte(strings.Repeat("no database", 5000)), 0o600)) }, true, 200, "on", "no valid meta page"},
		{"cut off", func(p string) { must(t, os.Truncate(p, 8*4096)) }, true, 200, "", ""},
		{"one meta page", func(p string) { page(p, 1, func(b []byte) { b[20] ^= 1 }) }, true, 200, "", "meta page"},
		{"both meta pages", func(p string) {
			page(p, 0, func(b []byte) { b[20] ^= 1 })
			page(p, 1, func(b []byte) { b[20] ^= 1 })
		}, true, 200, "on", "no valid meta page"},
		{"and its copy", func(p string) { must(t, os.Truncate(p, 0)); must(t, os.Truncate(goodPath(p), 100)) }, false, 0, "", "no valid meta page"},
		{"and its epoch", func(p string) { must(t, os.Truncate(p, 0)); must(t, os.Truncate(identPath(p), 3)) }, false, 200, "on", "no valid meta page"},
		{"and all beside it", func(p string) {
			must(t, os.Truncate(p, 0))
			must(t, os.Remove(goodPath(p)))
			must(t, os.Remove(identPath(p)))
		}, false, 0, "", "no valid meta page"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path, inc, epoch := filled(t)
			c.do(path)
			d := mustOpen(t, path)
			m := d.Mended()
			if m == nil || !strings.Contains(m.Cause, c.cause) {
				t.Fatalf("mended %+v, want %q", m, c.cause)
			}
			if c.name != "missing" {
				if _, err := os.Stat(m.Aside); err != nil || m.Aside != corruptPath(path) {
					t.Errorf("the damaged file: %v", err)
				}
			}
			if same := d.Incarnation() == inc; same != c.sameInc || same && d.Epoch() <= epoch {
				t.Errorf("incarnation %s (was %s), epoch %d (was %d)", d.Incarnation(), inc, d.Epoch(), epoch)
			}
			must(t, d.Close())
			twins, override := restored(t, path)
			if twins != c.twins || c.override != "" && override != c.override {
				t.Errorf("%d twins, override %q; %+v", twins, override, m)
			}
			if d := mustOpen(t, path); d.Mended() != nil {
				t.Errorf("mended again: %+v", d.Mended())
			}
		})
	}
}

// An older file put back is served, under numbers that nobody has seen.
func TestAnotherOnesFile(t *testing.T) {
	path, inc, _ := filled(t)
	other, otherInc, _ := filled(t)
	b, err := os.ReadFile(other)
	must(t, err)
	must(t, os.WriteFile(path, b, 0o600))
	d := mustOpen(t, path)
	if d.Mended() != nil || d.Incarnation() == inc || d.Incarnation() == otherInc {
		t.Errorf("mended %+v, incarnation %s", d.Mended(), d.Incarnation())
	}
	wantAll(t, d, "override", "d000=off")
}

// Whatever bit goes bad or wherever the file is cut off, it opens; a record is
// as it was, or as in the copy, or missing and counted.
func TestAnyDamageOpens(t *testing.T) {
	path, _, _ := filled(t)
	whole, err := os.ReadFile(path)
	must(t, err)
	good, err := os.ReadFile(goodPath(path))
	must(t, err)
	rng := rand.New(rand.NewPCG(1, 2))
	mended := 0
	for i := range 100 {
		bad := append([]byte(nil), whole...)
		switch i % 3 {
		case 0:
			bad[rng.IntN(len(bad))] ^= byte(1 << rng.IntN(8))
		case 1: // page headers and element tables are where it hurts
			bad[rng.IntN(len(bad)/4096)*4096+rng.IntN(128)] ^= byte(1 << rng.IntN(8))
		case 2:
			bad = bad[:rng.IntN(len(bad))]
		}
		must(t, os.WriteFile(path, bad, 0o600))
		must(t, os.WriteFile(goodPath(path), good, 0o600))
		d, err := Open(Config{Path: path})
		must(t, err)
		if d.Mended() != nil {
			mended++
		}
		must(t, d.Close())
		twins, override := restored(t, path)
		if twins != 200 || override != "on" && override != "off" || d.Mended() == nil && override != "off" {
			t.Fatalf("round %d: %d twins, override %q, mended %+v", i, twins, override, d.Mended())
		}
	}
	t.Logf("%d of 100 mended", mended)
	if mended < 30 {
		t.Error("hardly any was damaged")
	}
}

func FuzzReadPages(f *testing.F) {
	path, _, _ := filled(f)
	whole, err := os.ReadFile(path)
	must(f, err)
	f.Add(whole, uint32(5000), byte(3))
	f.Add(whole[:9000], uint32(16), byte(255))
	f.Fuzz(func(t *testing.T, b []byte, at uint32, x byte) {
		if len(b) > 0 {
			b = append([]byte(nil), b...)
			b[int(at)%len(b)] ^= x
		}
		c := readPages(strings.NewReader(string(b)), int64(len(b)))
		if c.damage == nil && c.state.Incarnation == "" {
			t.Error("whole, and without a state")
		}
	})
}

func FuzzIdent(f *testing.F) {
	f.Add([]byte("00000000\n{}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if id := decodeIdent(b); id != nil && len(id.Incarnation) != 16 {
			t.Errorf("%+v", id)
		}
	})
}

// mountTmpfs mounts a file system of its own for the test; needs root.
func mountTmpfs(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size="+size, "tmpfs", dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, out)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
	return dir
}

// On a disk that is full, commits fail and change nothing, what is dirty waits,
// and all goes on when there is room.
func TestAFullFileSystem(t *testing.T) {
	dir := mountTmpfs(t, "2m")
	path := filepath.Join(dir, "devices.db")
	d := mustOpen(t, path)
	commit(t, d, "override", "a", "on")
	filler := filepath.Join(dir, "filler")
	fill, err := os.Create(filler)
	must(t, err)
	for err = nil; err == nil; {
		_, err = fill.Write(make([]byte, 4096))
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	must(t, fill.Close())

	big := devicetwin.Mut{Bucket: "twin", Key: "big", Value: make([]byte, 300<<10)}
	for range 3 {
		if err := d.Commit(t.Context(), big); !errors.Is(err, ErrDisk) || !strings.Contains(err.Error(), path) {
			t.Fatalf("more than there is room for: %v", err)
		}
		if tr := d.Trouble(); tr == nil {
			t.Error("no trouble is told")
		}
		d.Dirty("twin", "late", func() []byte { return make([]byte, 200<<10) })
		if err := d.Flush(t.Context()); !errors.Is(err, ErrDisk) {
			t.Errorf("a flush: %v", err)
		}
	}
	if s := d.Stats(); s.Dirty != 1 || s.Records != 1 {
		t.Errorf("stats %+v", s)
	}
	// What is there says nothing of the disk.
	_ = d.Commit(t.Context(), devicetwin.Mut{Bucket: "override", Key: "a", Value: []byte("on")})
	if d.Trouble() == nil {
		t.Error("the trouble is over without a write")
	}
	must(t, os.Remove(filler))
	deadline := time.Now().Add(20 * time.Second)
	for err = d.Commit(t.Context(), big); err != nil; err = d.Commit(t.Context(), big) {
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	must(t, d.Flush(t.Context()))
	if tr := d.Trouble(); tr != nil {
		t.Errorf("trouble after all: %+v", tr)
	}
	must(t, d.Close())
	d = mustOpen(t, path)
	if s := d.Stats(); s.Records != 3 || d.Mended() != nil {
		t.Errorf("after a restart: %+v, mended %+v", s, d.Mended())
	}
}

// A file system that the kernel turned read-only after an error: commits say so,
// and once another is mounted in its place all goes on without a restart.
func TestAReadOnlyFileSystem(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image")
	run := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
		}
	}
	for _, path := range []string{image, image + ".new"} {
		must(t, os.WriteFile(path, nil, 0o600))
		must(t, os.Truncate(path, 16<<20))
		run("mkfs.ext4", "-q", path)
	}
	dir := t.TempDir()
	run("mount", "-o", "loop", image, dir)
	t.Cleanup(func() {
		for syscall.Unmount(dir, syscall.MNT_DETACH) == nil { // one may lie on another
		}
	})
	path := filepath.Join(dir, "devices.db")
	d := mustOpen(t, path)
	commit(t, d, "override", "a", "on")
	run("mount", "-o", "remount,abort", dir)
	for range 3 {
		if err := d.Commit(t.Context(), devicetwin.Mut{Bucket: "override", Key: "a", Value: []byte("off")}); !errors.Is(err, ErrDisk) {
			t.Fatalf("a commit on a dead file system: %v", err)
		}
	}
	wantAll(t, d, "override", "a=on")
	d.Dirty("twin", "t", func() []byte { return []byte("late") })
	must(t, syscall.Unmount(dir, syscall.MNT_DETACH))
	run("mount", "-o", "loop", image+".new", dir)
	for deadline := time.Now().Add(20 * time.Second); d.Flush(t.Context()) != nil; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still: %+v", d.Trouble())
		}
	}
	commit(t, d, "override", "a", "off")
	must(t, d.Close())
	d = mustOpen(t, path)
	wantAll(t, d, "override", "a=off")
	wantAll(t, d, "twin", "t=late")
	must(t, d.Close())
}

// Noted changes are bounded while the disk takes nothing, and a file that is
// taken away is made anew.
func TestAFileThatIsTakenAway(t *testing.T) {
	path := filepath.Join(t.TempDir(), "devices.db")
	d := mustOpen(t, path)
	commit(t, d, "override", "a", "on")
	must(t, os.Remove(path))
	must(t, os.Mkdir(path, 0o700)) // stands in its way
	must(t, os.WriteFile(filepath.Join(path, "x"), nil, 0o600))
	if err := d.Commit(t.Context(), devicetwin.Mut{Bucket: "twin", Key: "b", Value: []byte("1")}); !errors.Is(err, ErrDisk) {
		t.Fatalf("acknowledged: %v", err)
	}
	for i := range maxDirty + 10 {
		d.Dirty("twin", fmt.Sprint(i), func() []byte { return []byte("v") })
	}
	if s := d.Stats(); s.Dirty != maxDirty || s.Dropped != 10 {
		t.Errorf("stats %+v", s)
	}
	must(t, os.RemoveAll(path))
	for d.Trouble() != nil { // by itself, with the next flush
		if err := d.Flush(t.Context()); err != nil && !errors.Is(err, ErrDisk) {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	must(t, d.Close())
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	d = mustOpen(t, path)
	if s := d.Stats(); s.Records != maxDirty+1 || d.Mended() != nil {
		t.Errorf("after a restart: %+v, mended %+v", s, d.Mended())
	}
}
