// Package walltime owns what this node believes the date to be. Intervals are
// nobody's business here: they are measured by the monotonic clock everywhere,
// and no jump of the wall clock touches them.
//
// A board without a battery wakes in 1970, or whenever its firmware was built,
// and stays there until NTP answers, which on a cut-off node is never. Then
// certificates look not yet valid and tokens look good for years. So the node
// keeps a floor: a moment that has certainly passed. It comes from the hub's
// clock alone, learnt over the tunnel and counted on by the time since boot; a
// floor taken from this machine's clock, which may also be ahead by years for a
// minute, would lock the node out for good.
//
// Once the hub's time was learnt, in this process, it also wins over a clock
// that is ahead. Before that a clock ahead is believed: nothing tells it from
// one that is right after a long time in a drawer.
//
// The package never sets the machine's clock, and writes to flash about once a
// day.
package walltime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// tolerance is how far the machine's clock may be off before the hub's
	// time wins: round trips and NTP's own corrections stay below it.
	tolerance = time.Minute

	// keepEvery is how much the floor advances before it is written again.
	keepEvery = 24 * time.Hour

	maxFile = 4 << 10
)

// Config of a Clock.
type Config struct {
	Path  string           // of the floor; required
	Least time.Time        // a moment known to have passed, such as a certificate's issue
	Wall  func() time.Time // nil means time.Now
	// Boot is the time since boot, suspension included; nil asks the kernel.
	Boot func() time.Duration
	// Disciplined tells whether something keeps the machine's clock right; nil
	// asks the kernel.
	Disciplined func() bool
	Log         *slog.Logger // nil discards
}

// Clock is safe for concurrent use.
type Clock struct {
	cfg  Config
	wake chan struct{}

	mu     sync.Mutex
	at     time.Time     // certainly passed,
	boot   time.Duration // when the time since boot was this
	learnt bool          // at is the hub's, from this process
	kept   time.Time     // the floor on disk
}

type record struct {
	Version int       `json:"version"`
	Floor   time.Time `json:"floor"`
}

// Open reads the floor. One that cannot be read is made anew: the node must
// start.
func Open(cfg Config) (*Clock, error) {
	if cfg.Path == "" {
		return nil, errors.New("walltime: Path is required")
	}
	if cfg.Wall == nil {
		cfg.Wall = time.Now
	}
	if cfg.Boot == nil {
		cfg.Boot = sinceBoot
	}
	if cfg.Disciplined == nil {
		cfg.Disciplined = disciplined
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	c := &Clock{cfg: cfg, wake: make(chan struct{}, 1), at: cfg.Least, boot: cfg.Boot()}
	floor, err := read(cfg.Path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		cfg.Log.Warn("the floor of this node's clock cannot be read; it is made anew once the hub's time is known", "err", err)
	}
	c.kept = floor
	if floor.After(c.at) {
		c.at = floor
	}
	if wall := cfg.Wall(); wall.Before(c.at) {
		cfg.Log.Warn("this machine's clock is behind; working from the last time known", "clock", wall.UTC(), "known", c.at.UTC())
	}
	return c, nil
}

func sinceBoot() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("walltime: CLOCK_BOOTTIME: " + err.Error()) // since Linux 2.6.39
	}
	return time.Duration(ts.Nano())
}

// disciplined is what NTP clients tell the kernel.
func disciplined() bool {
	const timeError = 5 // TIME_ERROR of adjtimex(2)
	state, err := unix.Adjtimex(&unix.Timex{})
	return err == nil && state != timeError
}

// Sure tells whether there is reason to believe Now: the hub has told its time
// to this process, or NTP keeps the machine's clock.
func (c *Clock) Sure() bool {
	c.mu.Lock()
	learnt := c.learnt
	c.mu.Unlock()
	return learnt || c.cfg.Disciplined()
}

// Now is what the date is, as far as this node can tell. It has no monotonic
// reading: it is for stamps and for judging those of others.
func (c *Clock) Now() time.Time {
	now, _ := c.judge()
	return now
}

// Off is by how much the machine's clock is known to be wrong: positive if it is
// ahead; zero if it is right or nobody knows.
func (c *Clock) Off() time.Duration {
	_, off := c.judge()
	return off
}

func (c *Clock) judge() (now time.Time, off time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	wall, known := c.cfg.Wall().Round(0), c.knownLocked()
	off = wall.Sub(known)
	switch {
	case c.learnt && off.Abs() > tolerance, !c.learnt && off < 0:
		return known, off
	}
	return wall, 0
}

// knownLocked is the last moment known, counted on.
func (c *Clock) knownLocked() time.Time { return c.at.Add(c.cfg.Boot() - c.boot) }

// Learn takes the hub's time, which arrived just now.
func (c *Clock) Learn(hub time.Time) {
	if hub.IsZero() {
		return
	}
	hub = hub.Round(0)
	c.mu.Lock()
	if c.learnt && hub.Before(c.knownLocked().Add(-tolerance)) {
		c.cfg.Log.Warn("the hub's clock went back", "to", hub.UTC(), "from", c.knownLocked().UTC())
	}
	c.at, c.boot, c.learnt = hub, c.cfg.Boot(), true
	off := c.cfg.Wall().Round(0).Sub(hub)
	c.mu.Unlock()
	if off.Abs() > tolerance {
		c.cfg.Log.Warn("this machine's clock is not the hub's; certificates and tokens go by the hub's", "off", off.Round(time.Second))
	}
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Run keeps the floor on disk until ctx ends.
func (c *Clock) Run(ctx context.Context) error {
	for {
		if err := c.keep(); err != nil {
			c.cfg.Log.Warn("the floor of this node's clock is not kept", "err", err)
		}
		timer := time.NewTimer(keepEvery)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-c.wake:
			timer.Stop()
		case <-timer.C:
		}
	}
}

// keep writes the floor if it has advanced enough.
func (c *Clock) keep() error {
	c.mu.Lock()
	floor, kept := c.knownLocked().Truncate(time.Second), c.kept
	// A floor that a hub with a wrong clock once gave is taken back when a hub
	// and this machine agree about an earlier time.
	agreed := c.learnt && c.cfg.Wall().Round(0).Sub(floor).Abs() <= tolerance
	c.mu.Unlock()
	if ahead := floor.Sub(kept); floor.IsZero() || ahead < keepEvery && !(agreed && ahead < -keepEvery) {
		return nil
	}
	if err := write(c.cfg.Path, floor); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.kept = floor
	return nil
}

func read(path string) (time.Time, error) {
	info, err := os.Stat(path)
	if err != nil {
		return time.Time{}, err
	}
	if info.Size() > maxFile {
		return time.Time{}, fmt.Errorf("%s: too large", path)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return time.Time{}, err
	}
	floor, err := decode(b)
	if err != nil {
		return time.Time{}, fmt.Errorf("%s: %w", path, err)
	}
	return floor, nil
}

func decode(b []byte) (time.Time, error) {
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return time.Time{}, err
	}
	if r.Version != 1 {
		return time.Time{}, fmt.Errorf("version %d is not known", r.Version)
	}
	return r.Floor, nil
}

// write replaces the file so that its old or its new content is there.
func write(path string, floor time.Time) error {
	b, err := json.Marshal(record{1, floor.UTC()})
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".tmp") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // gone by then if all went well
	_, err = f.Write(append(b, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
