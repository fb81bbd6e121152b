package walltime

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"
)

// hands are a machine's clocks.
type hands struct {
	wall time.Time
	boot time.Duration
}

func (h *hands) pass(d time.Duration) { h.wall, h.boot = h.wall.Add(d), h.boot+d }

func (h *hands) open(t *testing.T, path string, least time.Time) *Clock {
	t.Helper()
	c, err := Open(Config{Path: path, Least: least, Wall: func() time.Time { return h.wall }, Boot: func() time.Duration { return h.boot }})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func near(t *testing.T, what string, got, want time.Time) {
	t.Helper()
	if d := got.Sub(want); d.Abs() > time.Second {
		t.Errorf("%s: %v, want %v", what, got.UTC(), want.UTC())
	}
}

var (
	epoch  = time.Unix(0, 0)
	truth  = time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	issued = truth.Add(-40 * 24 * time.Hour)
)

func TestTheClockOfABoardWithoutABattery(t *testing.T) {
	path := filepath.Join(t.TempDir(), "clock.json")
	h := &hands{wall: epoch}
	c := h.open(t, path, issued)
	near(t, "before the hub is known", c.Now(), issued)
	h.pass(time.Hour)
	near(t, "an hour later", c.Now(), issued.Add(time.Hour))
	c.Learn(truth)
	h.pass(time.Hour)
	near(t, "by the hub", c.Now(), truth.Add(time.Hour))
	if off := c.Off(); off > -time.Hour*24*365*50 {
		t.Errorf("off by %v", off)
	}
	h.wall = truth.Add(time.Hour) // NTP
	near(t, "after NTP", c.Now(), h.wall)
	if off := c.Off(); off != 0 {
		t.Errorf("off by %v", off)
	}
	if err := c.keep(); err != nil {
		t.Fatal(err)
	}

	// Power off for a week, alone: the floor is what is known.
	h = &hands{wall: epoch}
	c = h.open(t, path, issued)
	h.pass(time.Minute)
	near(t, "after a boot alone", c.Now(), truth.Add(time.Hour+time.Minute))
	// A drawer, with a battery.
	h = &hands{wall: truth.Add(200 * 24 * time.Hour)}
	c = h.open(t, path, issued)
	near(t, "a clock ahead is believed", c.Now(), h.wall)
}

// A clock that jumps ahead by years for a minute leaves nothing behind, and one
// that jumps about is no concern once the hub's time is known.
func TestJumps(t *testing.T) {
	path := filepath.Join(t.TempDir(), "clock.json")
	h := &hands{wall: truth.Add(70 * 365 * 24 * time.Hour)}
	c := h.open(t, path, issued)
	if err := c.keep(); err != nil {
		t.Fatal(err)
	}
	h.wall = truth
	near(t, "after the jump back", c.Now(), truth)
	c.Learn(truth)
	for _, wall := range []time.Time{epoch, truth.Add(80 * 365 * 24 * time.Hour), truth.Add(-30 * time.Minute)} {
		h.wall = wall
		near(t, "by the hub", c.Now(), truth)
		if c.Off() == 0 {
			t.Errorf("%v passes for right", wall)
		}
	}
	h.wall = truth.Add(20 * time.Second)
	near(t, "a little off is the machine's to mend", c.Now(), h.wall)
	if err := c.keep(); err != nil {
		t.Fatal(err)
	}
	h.wall = epoch
	near(t, "the floor", h.open(t, path, time.Time{}).Now(), truth)
}

// A hub's wrong clock is not kept for good.
func TestAFloorTooHighIsTakenBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "clock.json")
	h := &hands{wall: truth}
	c := h.open(t, path, issued)
	wrong := truth.Add(300 * 24 * time.Hour)
	c.Learn(wrong)
	near(t, "by the hub", c.Now(), wrong)
	if err := c.keep(); err != nil {
		t.Fatal(err)
	}
	h.wall = epoch // one of the two alone is no proof
	c.Learn(truth)
	if err := c.keep(); err != nil {
		t.Fatal(err)
	}
	near(t, "the floor", h.open(t, path, issued).Now(), wrong)
	h.wall = truth
	if err := c.keep(); err != nil {
		t.Fatal(err)
	}
	near(t, "the floor", h.open(t, path, issued).Now(), truth)
}

func TestTheFloorIsWrittenRarely(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "clock.json")
		start := time.Now()
		c, err := Open(Config{Path: path, Least: start, Boot: func() time.Duration { return time.Since(start) }})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- c.Run(ctx) }()
		writes, last := 0, ""
		for range 10 * 24 * 6 { // ten days of reconnecting every ten minutes
			time.Sleep(10 * time.Minute)
			c.Learn(time.Now())
			synctest.Wait()
			if b, err := os.ReadFile(path); err == nil && string(b) != last {
				writes++
				last = string(b)
			}
		}
		if writes < 9 || writes > 11 {
			t.Errorf("%d writes in ten days", writes)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) != 1 {
			t.Errorf("left behind: %v %v", left, err)
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%v %v", info.Mode(), err)
		}
	})
}

func TestADamagedFloor(t *testing.T) {
	path := filepath.Join(t.TempDir(), "clock.json")
	for _, text := range []string{"", "{", `{"version":9}`, `{"version":1,"floor":"soon"}`, string(make([]byte, maxFile+1))} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		h := &hands{wall: epoch}
		c := h.open(t, path, issued)
		near(t, "without a floor", c.Now(), issued)
		c.Learn(truth)
		if err := c.keep(); err != nil {
			t.Fatal(err)
		}
		if floor, err := read(path); err != nil || !floor.Equal(truth) {
			t.Errorf("%v %v", floor, err)
		}
	}
}

func TestTheKernelsClocks(t *testing.T) {
	c, err := Open(Config{Path: filepath.Join(t.TempDir(), "clock.json")})
	if err != nil {
		t.Fatal(err)
	}
	near(t, "now", c.Now(), time.Now())
	a := sinceBoot()
	time.Sleep(2 * time.Millisecond)
	if b := sinceBoot(); b <= a || a <= 0 {
		t.Errorf("%v, then %v", a, b)
	}
}

func FuzzFloor(f *testing.F) {
	f.Add([]byte(`{"version":1,"floor":"2026-11-24T12:00:00Z"}`))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = decode(b) })
}

func TestWhoIsBelieved(t *testing.T) {
	ntp := false
	c, err := Open(Config{Path: filepath.Join(t.TempDir(), "clock.json"), Disciplined: func() bool { return ntp }})
	if err != nil {
		t.Fatal(err)
	}
	if c.Sure() {
		t.Error("nobody has told the time")
	}
	ntp = true
	if !c.Sure() {
		t.Error("NTP keeps the clock")
	}
	ntp = false
	c.Learn(truth)
	if !c.Sure() {
		t.Error("the hub has told its time")
	}
}
