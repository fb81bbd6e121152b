package twindb

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/skerry-io/skerry/devicetwin"
)

var _ devicetwin.DB = (*DB)(nil)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func mustOpen(t testing.TB, path string) *DB {
	t.Helper()
	d, err := Open(Config{Path: path})
	must(t, err)
	t.Cleanup(func() { _ = d.Close() })
	return d
}

func commit(t testing.TB, d *DB, bucket, key, value string) {
	t.Helper()
	must(t, d.Commit(context.Background(), devicetwin.Mut{Bucket: bucket, Key: key, Value: []byte(value)}))
}

// all is what a bucket holds, as key=value.
func all(t testing.TB, d *DB, bucket string) []string {
	t.Helper()
	var got []string
	must(t, d.Load(bucket, func(k string, v []byte) error { got = append(got, k+"="+string(v)); return nil }))
	return got
}

func wantAll(t testing.TB, d *DB, bucket string, want ...string) {
	t.Helper()
	if got := all(t, d, bucket); strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("bucket %s holds %q, want %q", bucket, got, want)
	}
}

func TestRecordsOutliveAClose(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sub", "devices.db")
	d := mustOpen(t, path)
	inc := d.Incarnation()
	if len(inc) != 16 || d.Epoch() != 1 || d.Mended() != nil {
		t.Fatalf("a new one: incarnation %q, epoch %d, mended %+v", inc, d.Epoch(), d.Mended())
	}
	commit(t, d, "twin", "b", "2")
	commit(t, d, "twin", "a", "1")
	commit(t, d, "override", "a", "")
	must(t, d.Commit(t.Context(), devicetwin.Mut{Bucket: "twin", Key: "gone"}, devicetwin.Mut{Bucket: "twin", Key: "c", Value: []byte("3")}))
	must(t, d.Commit(t.Context(), devicetwin.Mut{Bucket: "twin", Key: "b"}))
	d.Dirty("twin", "late", func() []byte { return []byte("5") })
	d.Dirty("twin", "late", func() []byte { return []byte("6") })
	must(t, d.Close())
	if err := d.Commit(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("commit after close: %v", err)
	}
	for epoch := range uint64(3) {
		d = mustOpen(t, path)
		if d.Incarnation() != inc || d.Epoch() != epoch+2 || d.Mended() != nil {
			t.Fatalf("again: incarnation %q of %q, epoch %d, mended %+v", d.Incarnation(), inc, d.Epoch(), d.Mended())
		}
		wantAll(t, d, "twin", "a=1", "c=3", "late=6")
		wantAll(t, d, "override", "a=")
		must(t, d.Close())
	}
	for _, name := range []string{path, goodPath(path), identPath(path)} {
		info, err := os.Stat(name)
		must(t, err)
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", name, info.Mode())
		}
	}
}

func TestWhatIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "devices.db")
	d := mustOpen(t, path)
	for _, m := range []devicetwin.Mut{
		{Key: "k"},
		{Bucket: stateBucket, Key: "k"},
		{Bucket: "b"},
		{Bucket: "b", Key: strings.Repeat("k", MaxKey+1)},
		{Bucket: "b", Key: "k", Value: make([]byte, MaxValue+1)},
	} {
		if err := d.Commit(t.Context(), m); err == nil {
			t.Errorf("bucket %q, key %.9q, %d bytes: taken", m.Bucket, m.Key, len(m.Value))
		}
	}
	d.Dirty("b", "large", func() []byte { return make([]byte, MaxValue+1) })
	d.Dirty("b", "k", func() []byte { return []byte("v") })
	must(t, d.Flush(t.Context()))
	wantAll(t, d, "b", "k=v")
	if s := d.Stats(); s.Dropped != 1 || s.Dirty != 0 {
		t.Errorf("stats %+v", s)
	}
	if _, err := Open(Config{Path: path, LockTimeout: time.Millisecond}); !errors.Is(err, ErrLocked) {
		t.Errorf("opened twice: %v", err)
	}
}

// Writers that ask at the same time share commits, and what changes nothing is
// not written.
func TestWritersShareCommits(t *testing.T) {
	d := mustOpen(t, filepath.Join(t.TempDir(), "devices.db"))
	const writers, each = 32, 10
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				commit(t, d, "cmd", fmt.Sprint(w), fmt.Sprint(i))
			}
		})
	}
	wg.Wait()
	s := d.Stats()
	t.Logf("%d writes in %d commits, %d bytes", writers*each, s.Commits, s.Bytes)
	if s.Commits > writers*each/2 {
		t.Errorf("%d commits for %d writes of %d writers", s.Commits, writers*each, writers)
	}
	commit(t, d, "cmd", "0", fmt.Sprint(each-1))
	if n := d.Stats().Commits; n != s.Commits {
		t.Error("a write of what is there cost a commit")
	}
}

// A record that changes and changes is written once per flush, and no change is
// written over what was committed after it.
func TestDirtyRecords(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := mustOpen(t, filepath.Join(t.TempDir(), "devices.db"))
		defer d.Close()
		encoded := 0
		for i := range 100 {
			d.Dirty("twin", "a", func() []byte { encoded++; return fmt.Append(nil, i) })
		}
		time.Sleep(minInterval - time.Second)
		synctest.Wait()
		wantAll(t, d, "twin")
		time.Sleep(time.Second + groupWait)
		synctest.Wait()
		wantAll(t, d, "twin", "a=99")
		if s := d.Stats(); encoded != 1 || s.Commits != 1 || s.Flushes != 1 {
			t.Errorf("encoded %d times, %+v", encoded, s)
		}

		d.Dirty("twin", "a", func() []byte { return []byte("before") })
		commit(t, d, "twin", "a", "committed")
		must(t, d.Flush(t.Context()))
		wantAll(t, d, "twin", "a=committed")
		d.Dirty("twin", "a", func() []byte { return []byte("after") })
		time.Sleep(minInterval/2 + time.Second)
		synctest.Wait()
		wantAll(t, d, "twin", "a=committed")
		commit(t, d, "cmd", "x", "y") // takes along what has waited half its time
		wantAll(t, d, "twin", "a=after")

		d.Dirty("twin", "a", func() []byte { return nil })
		must(t, d.Flush(t.Context()))
		wantAll(t, d, "twin")
	})
}

// A day of readings costs no more than the budget: few devices flush every 5 s,
// many ones less often.
func TestBudget(t *testing.T) {
	for _, c := range []struct {
		devices  int
		rate     float64 // messages/s of each
		interval time.Duration
	}{
		{30, 3, minInterval},
		{1000, 0.2, 0},
		{1000, 3, 0},
	} {
		t.Run(fmt.Sprintf("%dx%g", c.devices, c.rate), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := mustOpen(t, filepath.Join(t.TempDir(), "devices.db"))
				defer d.Close()
				rng := rand.New(rand.NewPCG(1, 2))
				twin := func(dev int) []byte {
					b := make([]byte, 800)
					for i := range b {
						b[i] = byte('a' + rng.IntN(26))
					}
					return b
				}
				for dev := range c.devices {
					d.Dirty("twin", fmt.Sprintf("home/device-%d", dev), func() []byte { return twin(dev) })
				}
				must(t, d.Flush(t.Context()))
				start, before := time.Now(), d.Stats()
				const span, step = 10 * time.Minute, time.Second
				for time.Since(start) < span {
					time.Sleep(step)
					for n := float64(c.devices) * c.rate * step.Seconds(); n > 0; n-- {
						dev := rng.IntN(c.devices)
						d.Dirty("twin", fmt.Sprintf("home/device-%d", dev), func() []byte { return twin(dev) })
					}
				}
				synctest.Wait()
				s := d.Stats()
				perDay := float64(s.Bytes-before.Bytes) * float64(day) / float64(time.Since(start))
				t.Logf("%.2f GB a day, %d flushes in %v, every %v now", perDay/1e9, s.Flushes-before.Flushes, span, s.Interval)
				if perDay > 2.1e9 {
					t.Errorf("%.2f GB a day", perDay/1e9)
				}
				if c.interval != 0 && s.Interval != c.interval {
					t.Errorf("a flush every %v, want %v", s.Interval, c.interval)
				}
				if s.Interval > maxInterval || s.Dirty > c.devices {
					t.Errorf("stats %+v", s)
				}
			})
		})
	}
}

// The good copy is made anew every day, from memory.
func TestDailyCopy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "devices.db")
		d := mustOpen(t, path)
		defer d.Close()
		commit(t, d, "twin", "a", "1")
		if _, err := os.Stat(goodPath(path)); err == nil {
			t.Error("a copy of nothing")
		}
		time.Sleep(copyEvery + minInterval + time.Second)
		synctest.Wait()
		c, err := readFile(goodPath(path))
		must(t, err)
		if c.damage != nil || !bytes.Equal(c.records[slot{"twin", "a"}], []byte("1")) || c.state.Incarnation != d.Incarnation() {
			t.Errorf("the copy: %+v", c)
		}
	})
}

// A day of 30 devices' 3 messages a second, from half a minute of it, by the
// kernel's count and by the DB's own.
func BenchmarkDay(b *testing.B) {
	diskBytes := func() (n int64) {
		raw, err := os.ReadFile("/proc/self/io")
		must(b, err)
		if _, after, ok := strings.Cut(string(raw), "\nwrite_bytes: "); ok {
			_, _ = fmt.Sscan(after, &n)
		}
		return n
	}
	for b.Loop() {
		d := mustOpen(b, filepath.Join(b.TempDir(), "devices.db"))
		rng := rand.New(rand.NewPCG(1, 2))
		for dev := range 30 {
			d.Dirty("twin", fmt.Sprintf("home/device-%d", dev), func() []byte { return make([]byte, 800) })
		}
		must(b, d.Flush(b.Context()))
		before, counted, start := diskBytes(), d.Stats().Bytes, time.Now()
		tick := time.NewTicker(time.Second / 90)
		for time.Since(start) < 30*time.Second {
			<-tick.C
			d.Dirty("twin", fmt.Sprintf("home/device-%d", rng.IntN(30)), func() []byte {
				v := make([]byte, 800)
				for i := range v {
					v[i] = byte(rng.Uint32())
				}
				return v
			})
		}
		tick.Stop()
		must(b, d.Flush(b.Context()))
		perDay := 86400 / time.Since(start).Seconds() / 1e9
		b.ReportMetric(float64(diskBytes()-before)*perDay, "GB/day")
		b.ReportMetric(float64(d.Stats().Bytes-counted)*perDay, "countedGB/day")
		must(b, d.Close())
	}
}
