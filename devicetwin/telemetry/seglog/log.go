package seglog

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// Policies: what gives way when a bound is reached.
const (
	DropOldest = "dropOldest"
	DropNewest = "dropNewest"
	// Thin keeps every second record of each series of the oldest segment, then
	// every fourth, down to one in sixteen, before it is dropped.
	Thin = "thin"
)

var (
	// ErrClosed: the log was closed.
	ErrClosed = errors.New("the log is closed")
	// ErrFull: a bound is reached and the policy keeps what is there.
	ErrFull = errors.New("the log is full")
	// ErrDisk: the disk did not take it.
	ErrDisk = errors.New("the disk does not take it")
)

const (
	maxPending   = 4 << 20 // bytes that wait to be written
	writeAt      = 256 << 10
	minSegment   = 16 << 10
	maxSegments  = 1 << 14
	housekeeping = time.Minute
	fileCost     = 4096 // what a file takes at least
)

// Config of a Log.
type Config struct {
	Dir          string // required
	SegmentBytes int64  // zero means 4 MiB, or an eighth of MaxBytes if that is less
	MaxBytes     int64  // on disk; zero means 256 MiB
	MaxAge       time.Duration
	Policy       string        // zero means DropOldest
	FlushEvery   time.Duration // of what was offered; zero means 200ms
	// Alarm logs are written to a disk on which others have to stop.
	Alarm bool
	// Series names what a record is one of many of, for Thin; nil: all are one.
	Series func(Record) string
	// Now is the wall clock and whether it can be trusted: nothing is dropped
	// by age before it can, nor any age counted. nil: time.Now, trusted.
	Now func() (time.Time, bool)
	// Free tells the bytes that are free of the file system's, and all of them;
	// nil asks it.
	Free func() (free, total uint64, err error)
	Log  *slog.Logger // nil discards
}

func (c *Config) setDefaults() error {
	if c.Dir == "" {
		return errors.New("seglog: Dir is required")
	}
	c.MaxBytes = cmp.Or(max(c.MaxBytes, 0), 256<<20)
	c.SegmentBytes = cmp.Or(max(c.SegmentBytes, 0), max(min(4<<20, c.MaxBytes/8), minSegment))
	if c.SegmentBytes > 1<<30 {
		return fmt.Errorf("seglog %s: SegmentBytes %d is more than 1 GiB", c.Dir, c.SegmentBytes)
	}
	c.MaxAge = cmp.Or(max(c.MaxAge, 0), 72*time.Hour)
	c.FlushEvery = cmp.Or(max(c.FlushEvery, 0), 200*time.Millisecond)
	switch c.Policy = cmp.Or(c.Policy, DropOldest); c.Policy {
	case DropOldest, DropNewest, Thin:
	default:
		return fmt.Errorf("seglog %s: policy %q; want %s, %s or %s", c.Dir, c.Policy, DropOldest, DropNewest, Thin)
	}
	if c.Series == nil {
		c.Series = func(Record) string { return "" }
	}
	if c.Now == nil {
		c.Now = func() (time.Time, bool) { return time.Now(), true }
	}
	if c.Free == nil {
		c.Free = func() (uint64, uint64, error) {
			var st syscall.Statfs_t
			if err := syscall.Statfs(c.Dir, &st); err != nil {
				return 0, 0, err
			}
			return st.Bavail * uint64(st.Bsize), st.Blocks * uint64(st.Bsize), nil
		}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}

// Log is a queue on disk. Its methods may be called from any goroutine.
type Log struct {
	cfg         Config
	incarnation string

	kick      chan struct{} // something is to be written now
	offered   chan struct{} // something is to be written soon
	closing   chan struct{}
	wg        sync.WaitGroup
	closeOnce sync.Once
	toSeal    chan struct{} // a segment may have ended

	mu           sync.Mutex // guards the following
	segs         []*segment // by number; the last one is active
	drops        drops
	pending      []*entry
	pendingBytes int
	room         chan struct{} // closed when pending was taken
	grown        chan struct{} // closed when a reader could go on
	lost         uint64        // offered, and neither written nor told in a gap record
	limit        int64         // bytes on disk, less than MaxBytes on a disk that is short of room
	stats        Stats
	trim         uint64 // segments before it are not needed any more
	closed       bool

	// The writer's own.
	file     *os.File
	buf      []byte
	checked  time.Time // of the free disk
	troubled bool
}

// segment is one file. Its fields are guarded by Log.mu.
type segment struct {
	header
	path   string
	zst    bool
	size   int64  // bytes of the file
	end    int64  // of a .log: up to where it is on disk, and readable
	count  uint32 // records appended
	kept   uint32 // of them still there
	level  int    // how often it was thinned
	closed bool   // nothing is appended any more
	since  time.Time
}

// cost is what a segment takes of the disk.
func (s *segment) cost() int64 { return max(s.size, fileCost) }

// entry is a record that waits to be written.
type entry struct {
	rec  Record
	done *waiter // nil: nobody waits
}

// waiter is a call of Append.
type waiter struct {
	left int
	err  error
	done chan struct{}
}

// Stats of a Log since Open.
type Stats struct {
	Appended uint64    `json:"appended"` // records on disk
	Bytes    uint64    `json:"bytes"`    // written to the disk, compressed copies included
	Syncs    uint64    `json:"syncs"`
	Dropped  uint64    `json:"dropped"` // records given up because of a bound or the disk
	Size     int64     `json:"size"`    // on disk
	Segments int       `json:"segments"`
	Records  uint64    `json:"records"` // there to be read
	Short    bool      `json:"short"`   // the disk is short of room
	Error    string    `json:"error,omitempty"`
	Oldest   time.Time `json:"oldest,omitzero"` // segment
}

// Append appends records, all in a row, and returns once they are on the disk.
// When ctx ends first the outcome is not known.
func (l *Log) Append(ctx context.Context, recs ...Record) error {
	w := &waiter{left: len(recs), done: make(chan struct{})}
	if len(recs) == 0 {
		return nil
	}
	size, err := l.sizeOf(recs)
	if err != nil {
		return err
	}
	for {
		l.mu.Lock()
		if l.closed {
			l.mu.Unlock()
			return ErrClosed
		}
		if l.pendingBytes == 0 || l.pendingBytes+size <= maxPending {
			break
		}
		room := l.room
		l.mu.Unlock()
		select {
		case <-room:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	for _, r := range recs {
		l.pending = append(l.pending, &entry{r, w})
	}
	l.pendingBytes += size
	l.mu.Unlock()
	l.wake()
	select {
	case <-w.done:
		return w.err
	case <-ctx.Done():
		return fmt.Errorf("log %s: whether it was written is not known: %w", l.cfg.Dir, ctx.Err())
	}
}

// Offer appends records soon, and does not wait. What cannot be kept until then
// is counted and told by a gap record. The payloads must not be changed.
func (l *Log) Offer(recs ...Record) {
	size, err := l.sizeOf(recs)
	l.mu.Lock()
	if err != nil || l.closed || l.pendingBytes+size > maxPending {
		l.lost += uint64(len(recs))
		l.stats.Dropped += uint64(len(recs))
		l.mu.Unlock()
		return
	}
	for _, r := range recs {
		l.pending = append(l.pending, &entry{r, nil})
	}
	l.pendingBytes += size
	now := l.pendingBytes >= writeAt
	l.mu.Unlock()
	if now {
		l.wake()
		return
	}
	select {
	case l.offered <- struct{}{}:
	default:
	}
}

func (l *Log) sizeOf(recs []Record) (int, error) {
	size := 0
	for _, r := range recs {
		if len(r.Payload) > MaxPayload {
			return 0, fmt.Errorf("log %s: a record of %d bytes; the limit is %d", l.cfg.Dir, len(r.Payload), MaxPayload)
		}
		size += recordHead + len(r.Payload)
	}
	return size, nil
}

func (l *Log) wake() {
	select {
	case l.kick <- struct{}{}:
	default:
	}
}

// Incarnation is the first part of the IDs of records appended now.
func (l *Log) Incarnation() string { return l.incarnation }

// Stats tells how the log does.
func (l *Log) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.stats
	s.Size, s.Segments = l.usageLocked(), len(l.segs)
	s.Short = l.limit < l.cfg.MaxBytes
	for _, seg := range l.segs {
		s.Records += uint64(seg.kept)
	}
	if c := l.segs[0].created; c != 0 {
		s.Oldest = time.UnixMilli(c)
	}
	return s
}

func (l *Log) usageLocked() int64 {
	n := int64(0)
	for _, s := range l.segs {
		n += s.cost()
	}
	return n
}

// End is the position after the last record on disk.
func (l *Log) End() Pos {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.endLocked()
}

func (l *Log) endLocked() Pos {
	a := l.segs[len(l.segs)-1]
	return Pos{a.segment, uint32(a.size), a.count}
}

// Close writes what waits and ends the log. Readers of it end with ErrClosed.
func (l *Log) Close() error {
	l.closeOnce.Do(func() {
		l.mu.Lock()
		l.closed = true
		l.mu.Unlock()
		close(l.closing)
		l.wg.Wait()
	})
	return nil
}

func newIncarnation() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

func (l *Log) logPath(n uint64) string {
	return filepath.Join(l.cfg.Dir, fmt.Sprintf("%016x.log", n))
}

func (l *Log) zstPath(n uint64, count, kept uint32, level int) string {
	return filepath.Join(l.cfg.Dir, fmt.Sprintf("%016x.%d.%d.%d.zst", n, count, kept, level))
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// readUpTo reads the first n bytes of a file, fewer if it is shorter.
func readUpTo(path string, n int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, n))
}
