package seglog

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func roomy() (uint64, uint64, error) { return 1 << 40, 1 << 40, nil }

func mustOpen(t testing.TB, cfg Config) *Log {
	t.Helper()
	if cfg.Free == nil {
		cfg.Free = roomy
	}
	l, err := Open(cfg)
	must(t, err)
	t.Cleanup(func() { must(t, l.Close()) })
	return l
}

func mustReader(t testing.TB, l *Log, saved []byte) *Reader {
	t.Helper()
	r, err := l.NewReader(saved)
	must(t, err)
	t.Cleanup(r.Close)
	return r
}

func rec(n int) Record {
	return Record{Kind: 1, TS: int64(n), Payload: fmt.Appendf(nil, "record %d %s", n, strings.Repeat("x", 80))}
}

func number(r Record) int {
	n := -1
	_, _ = fmt.Sscanf(string(r.Payload), "record %d", &n)
	return n
}

func appendN(t testing.TB, l *Log, from, to int) {
	t.Helper()
	var recs []Record
	for n := from; n < to; n++ {
		recs = append(recs, rec(n))
	}
	must(t, l.Append(context.Background(), recs...))
}

// drain reads and acknowledges all there is now.
func drain(t testing.TB, r *Reader) (got []Record) {
	t.Helper()
	for {
		r.pause = time.Time{}
		b, _, err := r.collect(100, 1<<20)
		must(t, err)
		if len(b.Records) == 0 {
			return got
		}
		r.Ack(b)
		got = append(got, b.Records...)
	}
}

// tally counts what came and what was told to be missing.
func tally(t testing.TB, recs []Record) (numbers []int, missing int) {
	t.Helper()
	for _, r := range recs {
		if r.Kind == KindGap {
			g, err := ParseGap(r)
			must(t, err)
			missing += int(g.Count)
			continue
		}
		numbers = append(numbers, number(r))
	}
	return numbers, missing
}

func compressed(l *Log) bool { return len(l.ended()) == 0 }

func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no %s", what)
		}
	}
}

// Records come back in order, with the same IDs, from compressed segments and
// others, over restarts, from the cursor on.
func TestReadingBack(t *testing.T) {
	cfg := Config{Dir: filepath.Join(t.TempDir(), "log"), SegmentBytes: 10 << 10}
	l := mustOpen(t, cfg)
	ids := map[string]int{}
	for n := 0; n < 1000; n += 10 {
		appendN(t, l, n, n+10)
	}
	r := mustReader(t, l, nil)
	for _, rec := range drain(t, r) {
		ids[rec.ID] = number(rec)
	}
	if len(ids) != 1000 {
		t.Fatalf("%d IDs", len(ids))
	}
	waitFor(t, "compression", func() bool { return compressed(l) })
	if s := l.Stats(); s.Segments < 10 || s.Records != 1000 || s.Size > 100<<10 {
		t.Errorf("stats %+v", s)
	}
	half := mustReader(t, l, nil)
	b, err := half.Next(t.Context(), 500, 1<<20)
	must(t, err)
	half.Ack(b)
	cursor := half.Cursor()
	if n := half.Behind(); n != 500 {
		t.Errorf("behind by %d", n)
	}
	must(t, l.Close())

	l = mustOpen(t, cfg)
	appendN(t, l, 1000, 1010)
	for from, saved := range map[int][]byte{0: nil, 500: cursor} {
		got := drain(t, mustReader(t, l, saved))
		if len(got) != 1010-from {
			t.Fatalf("%d records from %d on", len(got), from)
		}
		for i, rec := range got {
			if number(rec) != from+i {
				t.Fatalf("%d in place of %d", number(rec), from+i)
			}
			if n, ok := ids[rec.ID]; ok != (number(rec) < 1000) || ok && n != number(rec) {
				t.Fatalf("%s was record %d, is %d", rec.ID, n, number(rec))
			}
		}
	}
}

func TestOfferedRecordsAreWrittenSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustOpen(t, Config{Dir: t.TempDir()})
		r := mustReader(t, l, nil)
		for n := range 20 {
			l.Offer(rec(n))
		}
		start := time.Now()
		b, err := r.Next(t.Context(), 100, 1<<20)
		must(t, err)
		if took := time.Since(start); len(b.Records) != 20 || took > 200*time.Millisecond {
			t.Errorf("%d records after %v", len(b.Records), took)
		}
		if s := l.Stats(); s.Syncs != 1 {
			t.Errorf("%d syncs", s.Syncs)
		}
		must(t, l.Close())
		if _, err := r.Next(t.Context(), 1, 1); !errors.Is(err, ErrClosed) {
			t.Errorf("next: %v", err)
		}
		if err := l.Append(t.Context(), rec(1)); !errors.Is(err, ErrClosed) {
			t.Errorf("append: %v", err)
		}
	})
}

func TestWhatIsTooLarge(t *testing.T) {
	l := mustOpen(t, Config{Dir: t.TempDir()})
	if err := l.Append(t.Context(), Record{Payload: make([]byte, MaxPayload+1)}); err == nil {
		t.Error("taken")
	}
	for range 10 { // more than waits to be written
		l.Offer(Record{Kind: 1, Payload: make([]byte, MaxPayload)})
	}
	appendN(t, l, 0, 1)
	numbers, missing := tally(t, drain(t, mustReader(t, l, nil)))
	if len(numbers)+missing != 11 || uint64(missing) != l.Stats().Dropped {
		t.Errorf("%d came, %d missing, %+v", len(numbers), missing, l.Stats())
	}
	if _, err := Open(Config{Dir: t.TempDir(), Policy: "dropAll"}); err == nil {
		t.Error("an unknown policy was taken")
	}
}

// Under each policy the bytes stay within the bound, and a reader learns of
// each record that it either comes or is missing.
func TestBounds(t *testing.T) {
	for _, policy := range []string{DropOldest, DropNewest, Thin} {
		t.Run(policy, func(t *testing.T) {
			cfg := Config{Dir: t.TempDir(), Policy: policy, MaxBytes: 128 << 10, SegmentBytes: 16 << 10,
				Series: func(r Record) string { return fmt.Sprint(number(r) % 2) }}
			l := mustOpen(t, cfg)
			rng := rand.New(rand.NewPCG(1, 2))
			noise := func(n int) Record { // does not compress
				b := fmt.Appendf(nil, "record %d ", n)
				for range 80 {
					b = append(b, byte(rng.Uint32()))
				}
				return Record{Kind: 1, TS: int64(n), Payload: b}
			}
			early := mustReader(t, l, nil)
			const all = 4000
			full := 0
			for n := 0; n < all; n += 20 {
				var recs []Record
				for i := range 20 {
					recs = append(recs, noise(n+i))
				}
				if err := l.Append(t.Context(), recs...); errors.Is(err, ErrFull) {
					full += 20
				} else {
					must(t, err)
				}
				if n == 400 {
					b, err := early.Next(t.Context(), 333, 1<<20)
					must(t, err)
					early.Ack(b)
				}
				if s := l.Stats(); s.Size > cfg.MaxBytes {
					t.Fatalf("%d bytes", s.Size)
				}
				if policy == Thin {
					waitFor(t, "compression", func() bool { return compressed(l) })
				}
			}
			cursor := early.Cursor()
			must(t, l.Close())
			l = mustOpen(t, cfg) // what was dropped is known after a restart
			numbers, missing := tally(t, drain(t, mustReader(t, l, cursor)))
			t.Logf("%d refused, %d came, from %d to %d, %d missing, %+v", full, len(numbers), numbers[0], numbers[len(numbers)-1], missing, l.Stats())
			if 333+len(numbers)+missing+full != all || len(numbers) < 500 || full+missing == 0 {
				t.Errorf("of %d: 333 came, then %d, %d are missing, %d were refused", all, len(numbers), missing, full)
			}
			if !slices.IsSorted(numbers) || numbers[0] < 333 {
				t.Error("not in order")
			}
			switch policy {
			case DropNewest:
				if numbers[0] != 333 || missing != 0 {
					t.Errorf("the oldest were dropped: %d is first", numbers[0])
				}
			case DropOldest:
				if numbers[len(numbers)-1] != all-1 || full != 0 {
					t.Error("the newest was not kept")
				}
			case Thin:
				odd := 0
				for _, n := range numbers {
					odd += n % 2
				}
				if numbers[len(numbers)-1] != all-1 || odd < len(numbers)/3 || odd > 2*len(numbers)/3 {
					t.Errorf("%d of %d are of the one series", odd, len(numbers))
				}
			}
		})
	}
}

// What was offered and did not fit is told in its place.
func TestOffersToAFullLog(t *testing.T) {
	l := mustOpen(t, Config{Dir: t.TempDir(), Policy: DropNewest, MaxBytes: 32 << 10, SegmentBytes: 16 << 10})
	n := 0
	for l.Append(t.Context(), rec(n)) == nil {
		n++
	}
	for i := range 50 {
		l.Offer(rec(n + i))
	}
	waitFor(t, "drop", func() bool { return l.Stats().Dropped == 50 })
	r := mustReader(t, l, nil)
	if numbers, missing := tally(t, drain(t, r)); len(numbers) != n || missing != 0 {
		t.Errorf("%d of %d, %d missing", len(numbers), n, missing)
	}
	l.Trim(r.Oldest())
	waitFor(t, "room", func() bool { return l.Append(context.Background(), rec(n+50)) == nil })
	if numbers, missing := tally(t, drain(t, r)); len(numbers) != 1 || missing != 50 {
		t.Errorf("%v came, %d missing", numbers, missing)
	}
	if numbers, missing := tally(t, drain(t, mustReader(t, l, nil))); missing != 50 || !slices.Contains(numbers, n+50) {
		t.Errorf("a new reader: %d came, %d missing", len(numbers), missing)
	}
}

func TestAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		trusted := false
		var mu sync.Mutex
		now := func() (time.Time, bool) {
			mu.Lock()
			defer mu.Unlock()
			return time.Now(), trusted
		}
		l := mustOpen(t, Config{Dir: t.TempDir(), MaxAge: 8 * time.Hour, Now: now})
		appendN(t, l, 0, 10)
		time.Sleep(20 * time.Hour) // with a clock that may be wrong nothing is old
		if s := l.Stats(); s.Records != 10 {
			t.Errorf("stats %+v", s)
		}
		mu.Lock()
		trusted = true
		mu.Unlock()
		for n := 10; n < 30; n++ {
			appendN(t, l, n, n+1)
			time.Sleep(time.Hour)
		}
		numbers, missing := tally(t, drain(t, mustReader(t, l, nil)))
		if len(numbers) < 7 || len(numbers) > 11 || numbers[len(numbers)-1] != 29 || missing != 0 {
			t.Errorf("%v, %d missing", numbers, missing)
		}
		must(t, l.Close())
	})
}

// On a disk that others fill the log grows no more, but alarms do.
func TestADiskThatIsShortOfRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		free := atomic.Uint64{}
		free.Store(100 << 30)
		disk := func() (uint64, uint64, error) { return free.Load(), 200 << 30, nil }
		l := mustOpen(t, Config{Dir: t.TempDir(), Free: disk, SegmentBytes: 16 << 10})
		alarms := mustOpen(t, Config{Dir: t.TempDir(), Free: disk, SegmentBytes: 16 << 10, Alarm: true})
		both := func(n int) {
			appendN(t, l, n, n+100)
			appendN(t, alarms, n, n+100)
			time.Sleep(2 * time.Second)
		}
		for n := range 10 {
			both(n * 100)
		}
		free.Store(19 << 30)
		for n := range 100 {
			both(1000 + n*100)
		}
		s, a := l.Stats(), alarms.Stats()
		if !s.Short || s.Dropped == 0 || a.Short || a.Dropped != 0 || s.Records+s.Dropped != 11000 {
			t.Errorf("log %+v\nalarms %+v", s, a)
		}
		free.Store(100 << 30)
		both(11000)
		if s := l.Stats(); s.Short {
			t.Errorf("still short: %+v", s)
		}
		must(t, l.Close())
		must(t, alarms.Close())
	})
}

// After an outage live data comes first, and what is late within a fifth of the
// time; all of it comes, over a restart too.
func TestLiveDataLeads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := Config{Dir: t.TempDir()}
		l := mustOpen(t, cfg)
		r := mustReader(t, l, nil)
		appendN(t, l, 0, 5000)
		r.Split()
		appendN(t, l, 5000, 5001)
		b, err := r.Next(t.Context(), 100, 1<<20)
		must(t, err)
		if b.Backfill || len(b.Records) != 1 || number(b.Records[0]) != 5000 {
			t.Fatalf("first came %d records from %d on, backfill %t", len(b.Records), number(b.Records[0]), b.Backfill)
		}
		r.Ack(b)
		seen := map[int]bool{5000: true}
		var sending [2]time.Duration
		start := time.Now()
		next := 5001
		for restarted := false; len(seen) < next; {
			if next < 5100 {
				appendN(t, l, next, next+1)
				next++
			}
			b, err := r.Next(t.Context(), 100, 1<<20)
			must(t, err)
			lane := 0
			if b.Backfill {
				lane = 1
			}
			took := 100 * time.Millisecond
			time.Sleep(took)
			sending[lane] += took
			r.Ack(b)
			for _, rec := range b.Records {
				if seen[number(rec)] {
					t.Fatalf("%d came twice", number(rec))
				}
				seen[number(rec)] = true
			}
			if next == 5100 && sending[1] > 0 && !restarted {
				if share := float64(sending[1]) / float64(time.Since(start)); share > 0.25 || share < 0.1 {
					t.Errorf("the backfill had %.0f %% of the time", share*100)
				}
				restarted = true
				saved := r.Cursor()
				r.Close()
				must(t, l.Close())
				l = mustOpen(t, cfg)
				r = mustReader(t, l, saved)
			}
		}
		for n := range next {
			if !seen[n] {
				t.Fatalf("%d never came", n)
			}
		}
		must(t, l.Close())
	})
}

// kills is how often the SIGKILL test kills.
var kills = flag.Int("kills", 20, "how many times to kill a log under churn")

// A child appends, and says what was acknowledged, and what it read; it is
// killed in the middle. What was acknowledged is there under one ID for good.
func TestNoAcknowledgedRecordIsLostToSIGKILL(t *testing.T) {
	if dir := os.Getenv("SKERRY_SEGLOG_CRASH"); dir != "" {
		appendUntilKilled(t, dir)
		return
	}
	dir := t.TempDir()
	acked, ids := map[string]bool{}, map[string]string{}
	for round := range *kills {
		cmd := exec.Command(os.Args[0], "-test.run=^TestNoAcknowledgedRecordIsLostToSIGKILL$")
		cmd.Env = append(os.Environ(), "SKERRY_SEGLOG_CRASH="+dir, fmt.Sprint("SKERRY_SEGLOG_ROUND=", round))
		out, err := cmd.StdoutPipe()
		must(t, err)
		cmd.Stderr = os.Stderr
		must(t, cmd.Start())
		var timer *time.Timer
		in := bufio.NewScanner(out)
		for in.Scan() {
			if timer == nil {
				timer = time.AfterFunc(time.Duration(rand.IntN(60_000))*time.Microsecond, func() { _ = cmd.Process.Kill() })
			}
			f := strings.Fields(in.Text())
			switch {
			case len(f) == 2 && f[0] == "acked":
				acked[f[1]] = true
			case len(f) == 3 && f[0] == "read":
				if had, ok := ids[f[1]]; ok && had != f[2] {
					t.Fatalf("round %d: %s is %s, it was %s", round, f[1], f[2], had)
				}
				ids[f[1]] = f[2]
			}
		}
		if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != -1 {
			t.Fatalf("round %d: the child ended by itself: %v", round, err)
		}
		timer.Stop()
	}
	l := mustOpen(t, Config{Dir: dir, SegmentBytes: 32 << 10, Log: slog.New(slog.NewTextHandler(os.Stderr, nil))})
	there := map[string]int{}
	for _, rec := range drain(t, mustReader(t, l, nil)) {
		if rec.Kind == KindGap {
			t.Errorf("a gap: %s", rec.Payload)
			continue
		}
		name := string(rec.Payload[:strings.IndexByte(string(rec.Payload), ' ')])
		there[name]++
		if had, ok := ids[rec.ID]; ok && had != name {
			t.Errorf("%s is %s, it was %s", rec.ID, name, had)
		}
	}
	for name := range acked {
		if there[name] != 1 {
			t.Errorf("%s is there %d times", name, there[name])
		}
	}
	if t.Failed() {
		files, err := filepath.Glob(filepath.Join(dir, "*"))
		t.Logf("files: %v %q", err, files)
	}
	t.Logf("%d kills, %d acknowledged, %d read meanwhile, %d there", *kills, len(acked), len(ids), len(there))
	if len(acked) < *kills || len(ids) < *kills {
		t.Error("hardly anything was acknowledged between the kills")
	}
}

func appendUntilKilled(t *testing.T, dir string) {
	l, err := Open(Config{Dir: dir, SegmentBytes: 32 << 10, Log: slog.New(slog.NewTextHandler(os.Stderr, nil))})
	must(t, err)
	var wg sync.WaitGroup
	var lost atomic.Bool // the parent is gone
	say := func(format string, args ...any) {
		if _, err := fmt.Printf(format+"\n", args...); err != nil {
			lost.Store(true)
		}
	}
	for w := range 4 {
		wg.Go(func() {
			for n := 0; !lost.Load(); n++ {
				name := fmt.Sprintf("r%s-w%d-%d", os.Getenv("SKERRY_SEGLOG_ROUND"), w, n)
				must(t, l.Append(context.Background(), Record{Kind: 1, Payload: []byte(name + " " + strings.Repeat("x", n%700))}))
				say("acked %s", name)
			}
		})
	}
	wg.Go(func() {
		r, err := l.NewReader(nil)
		must(t, err)
		for !lost.Load() {
			b, err := r.Next(context.Background(), 50, 1<<20)
			must(t, err)
			for _, rec := range b.Records {
				say("read %s %s", rec.ID, rec.Payload[:strings.IndexByte(string(rec.Payload), ' ')])
			}
		}
	})
	wg.Wait()
}

// A bit that goes bad costs records of its segment, and they are told missing.
func TestDamage(t *testing.T) {
	for _, zst := range []bool{false, true} {
		cfg := Config{Dir: t.TempDir(), SegmentBytes: 16 << 10}
		l := mustOpen(t, cfg)
		appendN(t, l, 0, 1000)
		waitFor(t, "compression", func() bool { return compressed(l) })
		must(t, l.Close())
		pattern := "*.zst"
		if !zst {
			pattern = "*.log"
		}
		files, err := filepath.Glob(filepath.Join(cfg.Dir, pattern))
		must(t, err)
		b, err := os.ReadFile(files[len(files)/2])
		must(t, err)
		b[len(b)/2] ^= 4
		must(t, os.WriteFile(files[len(files)/2], b, 0o600))
		l = mustOpen(t, cfg)
		numbers, missing := tally(t, drain(t, mustReader(t, l, nil)))
		t.Logf("compressed %t: %d came, %d missing", zst, len(numbers), missing)
		if len(numbers) == 1000 || !slices.IsSorted(numbers) || zst && len(numbers)+missing != 1000 {
			t.Errorf("compressed %t: %d came, %d missing", zst, len(numbers), missing)
		}
		appendN(t, l, 1000, 1010)
		must(t, l.Close())
	}
	// A file that is no segment is put aside, and no number is used again.
	cfg := Config{Dir: t.TempDir()}
	must(t, os.WriteFile(filepath.Join(cfg.Dir, "0000000000000007.log"), []byte(strings.Repeat("?", 100)), 0o600))
	must(t, os.WriteFile(filepath.Join(cfg.Dir, "0000000000000009.3.3.0.zst"), []byte("?"), 0o600))
	must(t, os.WriteFile(filepath.Join(cfg.Dir, "gaps.json"), []byte("?"), 0o600))
	l := mustOpen(t, cfg)
	appendN(t, l, 0, 1)
	if got := drain(t, mustReader(t, l, nil)); len(got) != 1 || got[0].at.Segment != 10 {
		t.Errorf("%+v", got)
	}
	if _, err := l.NewReader([]byte("?")); err == nil {
		t.Error("a cursor of rubbish was taken")
	}
}

// A full file system: who waits is told, what was offered is counted, and all
// goes on when there is room.
func TestAFullFileSystem(t *testing.T) {
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, out)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
	l := mustOpen(t, Config{Dir: filepath.Join(dir, "log"), SegmentBytes: 64 << 10, Policy: DropNewest})
	appendN(t, l, 0, 10)
	filler := filepath.Join(dir, "filler")
	f, err := os.Create(filler)
	must(t, err)
	for err = nil; err == nil; {
		_, err = f.Write(make([]byte, 4096))
	}
	must(t, f.Close())
	n := 10
	for err = nil; err == nil; n++ {
		err = l.Append(t.Context(), rec(n))
	}
	if !errors.Is(err, ErrDisk) || !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	n-- // the last one was refused
	l.Offer(rec(-5), rec(-6))
	waitFor(t, "drop", func() bool { return l.Stats().Dropped == 2 })
	if s := l.Stats(); s.Error == "" {
		t.Errorf("no trouble is told: %+v", s)
	}
	must(t, os.Remove(filler))
	appendN(t, l, n, n+10)
	numbers, missing := tally(t, drain(t, mustReader(t, l, nil)))
	if len(numbers) != n+10 || missing != 2 || l.Stats().Error != "" {
		t.Errorf("%d of %d came, %d missing, %+v", len(numbers), n+10, missing, l.Stats())
	}
	must(t, l.Close())
	l = mustOpen(t, l.cfg)
	if again, missing := tally(t, drain(t, mustReader(t, l, nil))); !slices.Equal(again, numbers) || missing != 2 {
		t.Errorf("after a restart %d of %d, %d missing", len(again), len(numbers), missing)
	}
}

// A power cut between the making of a compressed segment and the removal of
// what it was made of leaves both; one goes, and no record with it.
func TestASegmentThatIsThereTwice(t *testing.T) {
	cfg := Config{Dir: t.TempDir(), SegmentBytes: 16 << 10}
	l := mustOpen(t, cfg)
	appendN(t, l, 0, 10)
	must(t, l.Close())
	logs, err := filepath.Glob(filepath.Join(cfg.Dir, "*.log"))
	must(t, err)
	b, err := os.ReadFile(logs[0])
	must(t, err)
	l = mustOpen(t, cfg)
	waitFor(t, "compression", func() bool { return compressed(l) })
	must(t, l.Close())
	for range 2 {
		must(t, os.WriteFile(logs[0], b, 0o600))
		l = mustOpen(t, cfg)
		if numbers, missing := tally(t, drain(t, mustReader(t, l, nil))); len(numbers) != 10 || missing != 0 {
			t.Errorf("%v came, %d missing", numbers, missing)
		}
		if _, err := os.Stat(logs[0]); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("still there: %v", err)
		}
		must(t, l.Close())
	}
}

func TestConcurrentUse(t *testing.T) {
	l := mustOpen(t, Config{Dir: t.TempDir(), SegmentBytes: 16 << 10, MaxBytes: 1 << 20})
	var wg sync.WaitGroup
	const writers, each = 8, 200
	for w := range writers {
		wg.Go(func() {
			for n := range each {
				must(t, l.Append(context.Background(), rec(w*each+n)))
			}
		})
	}
	var seen atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	var readers sync.WaitGroup
	for range 3 {
		readers.Go(func() {
			r, err := l.NewReader(nil)
			must(t, err)
			defer r.Close()
			for n := 0; n < writers*each; {
				b, err := r.Next(ctx, 37, 1<<20)
				must(t, err)
				r.Ack(b)
				n += len(b.Records)
				seen.Add(int64(len(b.Records)))
			}
		})
	}
	wg.Wait()
	readers.Wait()
	cancel()
	if n := seen.Load(); n != 3*writers*each {
		t.Errorf("%d records read", n)
	}
}

func FuzzDecodeRecord(f *testing.F) {
	f.Add(appendRecord(nil, 3, 40, rec(1)), uint64(3), uint32(40))
	f.Add([]byte{9, 0, 0, 0, 0, 0, 0, 0}, uint64(0), uint32(0))
	f.Fuzz(func(t *testing.T, b []byte, segment uint64, offset uint32) {
		r, n, err := decodeRecord(b, segment, offset)
		if err != nil {
			return
		}
		if again := appendRecord(nil, segment, offset, r); string(again) != string(b[:n]) {
			t.Errorf("%x is not %x", again, b[:n])
		}
	})
}

func FuzzSegment(f *testing.F) {
	dir := f.TempDir()
	l, err := Open(Config{Dir: dir, SegmentBytes: 16 << 10, Free: roomy})
	must(f, err)
	appendN(f, l, 0, 400)
	waitFor(f, "compression", func() bool { return compressed(l) })
	must(f, l.Close())
	must(f, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && path != l.dropsPath() {
			b, err := os.ReadFile(path)
			must(f, err)
			f.Add(b, strings.HasSuffix(path, ".zst"))
		}
		return err
	}))
	f.Fuzz(func(t *testing.T, b []byte, zst bool) {
		name := "0000000000000001.log"
		if zst {
			name = "0000000000000001.400.400.0.zst"
		}
		path := filepath.Join(t.TempDir(), name)
		must(t, os.WriteFile(path, b, 0o600))
		s, ok := parseName(path)
		if !ok {
			t.Fatal(name)
		}
		src, err := openSource(s)
		if err != nil {
			return
		}
		defer src.close()
		at := Pos{Segment: 1, Offset: headerSize}
		for n := 0; err == nil; n++ {
			_, err = src.next(&at, int64(len(b)))
			if n > 1<<20 {
				t.Fatal("no end")
			}
		}
	})
}

// Synced appends from 1, 10 and 50 publishers, and what a record costs on disk.
func BenchmarkAppend(b *testing.B) {
	for _, publishers := range []int{1, 10, 50} {
		b.Run(fmt.Sprint(publishers), func(b *testing.B) {
			l, err := Open(Config{Dir: b.TempDir()})
			must(b, err)
			defer l.Close()
			payload := []byte(strings.Repeat("x", 120))
			var left atomic.Int64
			left.Store(int64(b.N))
			before := diskBytes()
			b.ResetTimer()
			var wg sync.WaitGroup
			for range publishers {
				wg.Go(func() {
					for left.Add(-1) >= 0 {
						must(b, l.Append(context.Background(), Record{Kind: 1, Payload: payload}))
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "records/s")
			b.ReportMetric(float64(diskBytes()-before)/float64(b.N), "diskB/record")
		})
	}
}

// A day of 30 devices' 3 messages a second, from half a minute of it.
func BenchmarkDay(b *testing.B) {
	for b.Loop() {
		l, err := Open(Config{Dir: b.TempDir()})
		must(b, err)
		before, start := diskBytes(), time.Now()
		payload := []byte(strings.Repeat("x", 120))
		tick := time.NewTicker(time.Second / 90)
		for time.Since(start) < 30*time.Second {
			<-tick.C
			l.Offer(Record{Kind: 1, Payload: payload})
		}
		tick.Stop()
		must(b, l.Close())
		b.ReportMetric(float64(diskBytes()-before)/time.Since(start).Seconds()*86400/1e9, "GB/day")
		b.ReportMetric(float64(l.Stats().Appended)/time.Since(start).Seconds(), "records/s")
	}
}

// diskBytes is what this process had written to disks, by the kernel's count.
func diskBytes() (n int64) {
	b, err := os.ReadFile("/proc/self/io")
	if err != nil {
		return 0
	}
	if _, after, ok := strings.Cut(string(b), "\nwrite_bytes: "); ok {
		_, _ = fmt.Sscan(after, &n)
	}
	return n
}
