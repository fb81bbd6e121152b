package twindb

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/skerry-io/skerry/devicetwin"
)

// Bounds of what is kept.
const (
	MaxKey   = 1 << 10
	MaxValue = 1 << 20
	// maxDirty bounds the records that wait for a flush, as when the disk takes
	// nothing for long. What is beyond is not noted, and counted.
	maxDirty = 1 << 16
	// maxBytes bounds all records together: they are in memory too.
	maxBytes = 256 << 20
)

var (
	// ErrClosed: the database was closed.
	ErrClosed = errors.New("the twin database is closed")
	// ErrLocked: another process has it open.
	ErrLocked = errors.New("in use by another edgecore")
	// ErrDisk: the disk did not take a write. Nothing of it was done, and
	// writes go on as soon as the disk takes them.
	ErrDisk = errors.New("the disk does not take it")
)

// Config of a DB.
type Config struct {
	Path        string        // of the file; required
	BytesPerDay uint64        // that flushes keep to, as far as a minute between them does; zero means 2 GB
	LockTimeout time.Duration // for another process to let go of the file; zero means 2s
	Log         *slog.Logger  // nil discards
}

func (c *Config) setDefaults() error {
	if c.Path == "" {
		return errors.New("twindb: Path is required")
	}
	c.BytesPerDay = cmp.Or(c.BytesPerDay, 2_000_000_000)
	c.LockTimeout = cmp.Or(c.LockTimeout, 2*time.Second)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}

// slot is where a record is.
type slot struct{ bucket, key string }

// records are all of them, by slot.
type records map[slot][]byte

// DB is an open database. It implements devicetwin.DB.
type DB struct {
	cfg    Config
	lock   *os.File
	ident  ident
	mended *Mended // nil: it was whole

	ops       chan *op
	closing   chan struct{}
	stopped   chan struct{}
	closeOnce sync.Once
	closeErr  error

	mu      sync.Mutex // guards the following
	calls   uint64     // orders Commit and Dirty
	dirty   map[slot]dirty
	kept    records // what is on disk; written by the writer alone
	bytes   int     // of kept
	stats   Stats
	trouble *Trouble

	// The writer's own.
	state     state // of the last commit
	wrote     bool  // something since the disk was last judged
	bolt      *bolt.DB
	file      os.FileInfo
	broken    error // why nothing may be built on the file
	healAt    time.Time
	healWait  time.Duration
	lastFlush time.Time
	interval  time.Duration // between flushes
	unpaid    uint64        // bytes written since the last flush
	copyAt    time.Time
}

// dirty is a record that has changed.
type dirty struct {
	call   uint64
	encode func() []byte
}

// Stats of a DB since Open.
type Stats struct {
	Bytes    uint64        `json:"bytes"` // written to the disk, whole pages, copies included
	Commits  uint64        `json:"commits"`
	Flushes  uint64        `json:"flushes"`  // commits that carried records that had waited
	Dirty    int           `json:"dirty"`    // records that wait now
	Dropped  uint64        `json:"dropped"`  // changes not noted: too many, or too large
	Interval time.Duration `json:"interval"` // between flushes, now
	Records  int           `json:"records"`
	Size     int           `json:"size"` // bytes of the records
}

// Trouble is what is wrong with the disk.
type Trouble struct {
	Error string    `json:"error"`
	Since time.Time `json:"since"`
}

// Incarnation names this database: 16 hexadecimal digits, new when the records
// could not be kept.
func (d *DB) Incarnation() string { return d.ident.Incarnation }

// Epoch is higher than at any Open before.
func (d *DB) Epoch() uint64 { return d.ident.Epoch }

// Mended tells what was done to a damaged file at Open; nil when it was whole.
func (d *DB) Mended() *Mended { return d.mended }

// Trouble tells why the disk takes no writes; nil while it does.
func (d *DB) Trouble() *Trouble {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.trouble == nil {
		return nil
	}
	t := *d.trouble
	return &t
}

// Stats tells what was written.
func (d *DB) Stats() Stats {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.stats
	s.Dirty, s.Records, s.Size = len(d.dirty), len(d.kept), d.bytes
	return s
}

// Load calls fn with the records of a bucket in the order of their keys, as
// they are on disk. The value must not be changed. fn may use the DB.
func (d *DB) Load(bucket string, fn func(key string, value []byte) error) error {
	for _, s := range d.slots(bucket) {
		d.mu.Lock()
		v, ok := d.kept[s]
		d.mu.Unlock()
		if !ok {
			continue
		}
		if err := fn(s.key, v); err != nil {
			return fmt.Errorf("twin database %s: bucket %s, key %q: %w", d.cfg.Path, s.bucket, s.key, err)
		}
	}
	return nil
}

func (d *DB) slots(bucket string) []slot {
	d.mu.Lock()
	defer d.mu.Unlock()
	var found []slot
	for s := range d.kept {
		if s.bucket == bucket {
			found = append(found, s)
		}
	}
	slices.SortFunc(found, func(a, b slot) int { return strings.Compare(a.key, b.key) })
	return found
}

// Commit puts records, a nil value removing one, all or none, and returns once
// that is on the disk. When ctx ends first the outcome is not known. A change
// noted by Dirty before the call does not overwrite what is put here.
//
// The caller must not hold what the encode function of a Dirty record needs:
// it may be called before Commit returns.
func (d *DB) Commit(ctx context.Context, muts ...devicetwin.Mut) error {
	for _, m := range muts {
		if err := check(slot{m.Bucket, m.Key}, m.Value); err != nil {
			return fmt.Errorf("twin database %s: %w", d.cfg.Path, err)
		}
	}
	return d.do(ctx, &op{muts: muts, done: make(chan error, 1)})
}

// Dirty notes that a record has changed. encode is called on a goroutine of the
// DB, once, when it is written; nil removes the record. Of several calls for
// one record the last one counts. Dirty does not block.
func (d *DB) Dirty(bucket, key string, encode func() []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls++
	s := slot{bucket, key}
	if _, known := d.dirty[s]; !known && len(d.dirty) >= maxDirty {
		d.stats.Dropped++
		return
	}
	d.dirty[s] = dirty{d.calls, encode}
}

// Flush writes what is dirty now.
func (d *DB) Flush(ctx context.Context) error {
	return d.do(ctx, &op{flush: true, done: make(chan error, 1)})
}

func (d *DB) do(ctx context.Context, o *op) error {
	d.mu.Lock()
	d.calls++
	o.call = d.calls
	d.mu.Unlock()
	select {
	case d.ops <- o:
	case <-ctx.Done():
		return ctx.Err()
	case <-d.closing:
		return ErrClosed
	}
	select {
	case err := <-o.done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("twin database %s: whether it was written is not known: %w", d.cfg.Path, ctx.Err())
	}
}

// Close flushes what is dirty and ends the DB.
func (d *DB) Close() error {
	d.closeOnce.Do(func() {
		close(d.closing)
		<-d.stopped
		if d.bolt != nil {
			d.closeErr = errors.Join(d.closeErr, guard(d.bolt.Close))
		}
		d.closeErr = errors.Join(d.closeErr, d.lock.Close())
	})
	return d.closeErr
}

func check(s slot, value []byte) error {
	switch {
	case s.bucket == "" || len(s.bucket) > 64 || s.bucket == stateBucket:
		return fmt.Errorf("%.80q is no name for a bucket", s.bucket)
	case s.key == "" || len(s.key) > MaxKey:
		return fmt.Errorf("bucket %s: a key of %d bytes; it has 1 to %d", s.bucket, len(s.key), MaxKey)
	case len(value) > MaxValue:
		return fmt.Errorf("bucket %s, key %q: a value of %d bytes; the limit is %d", s.bucket, s.key, len(value), MaxValue)
	}
	return nil
}

// snapshot is what the file should hold.
func (d *DB) snapshot() records {
	d.mu.Lock()
	defer d.mu.Unlock()
	return maps.Clone(d.kept)
}
