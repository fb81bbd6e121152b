package twindb

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/skerry-io/skerry/devicetwin"
)

const (
	groupWait = 5 * time.Millisecond // for others to share a commit
	groupOps  = 64                   // that share one at most

	minInterval = 5 * time.Second // between flushes
	maxInterval = time.Minute
	copyEvery   = 24 * time.Hour
	minHeal     = time.Second
	maxHeal     = time.Minute
	day         = 24 * time.Hour
)

// op is one call that waits for the disk.
type op struct {
	muts  []devicetwin.Mut
	flush bool
	call  uint64
	done  chan error // has room for the answer
}

// write is the writer's loop, until Close.
func (d *DB) write() {
	defer close(d.stopped)
	flush := time.NewTimer(d.interval)
	defer flush.Stop()
	for {
		select {
		case o := <-d.ops:
			d.commit(d.gather(o), false)
		case <-flush.C:
			d.commit(nil, true)
			d.copyDaily()
		case <-d.closing:
			d.closeErr = d.commit(nil, true)
			return
		}
		flush.Reset(max(time.Until(d.lastFlush.Add(d.interval)), groupWait))
	}
}

// gather takes what others ask for within groupWait of the first.
func (d *DB) gather(first *op) []*op {
	ops := []*op{first}
	wait := time.NewTimer(groupWait)
	defer wait.Stop()
	for len(ops) < groupOps {
		select {
		case o := <-d.ops:
			ops = append(ops, o)
		case <-wait.C:
			return ops
		case <-d.closing:
			return ops
		}
	}
	return ops
}

// commit makes ops one transaction. What is dirty goes along on a flush, and
// also when half the time to the next one has passed.
func (d *DB) commit(ops []*op, flush bool) error {
	flush = flush || time.Since(d.lastFlush) >= d.interval/2
	changes, calls := records{}, map[slot]uint64{}
	for _, o := range ops {
		flush = flush || o.flush
		for _, m := range o.muts {
			s := slot{m.Bucket, m.Key}
			changes[s], calls[s] = m.Value, o.call
		}
	}
	var waited map[slot]dirty
	if flush {
		waited = d.encodeDirty(changes, calls)
	}
	d.wrote = false
	err := d.persist(changes)
	if err != nil || d.wrote {
		d.noteDisk(err)
	}
	if err == nil {
		d.settle(changes, calls, waited)
	}
	if flush {
		d.lastFlush = time.Now()
		d.pace()
	}
	for _, o := range ops {
		o.done <- err
	}
	return err
}

// encodeDirty adds what is dirty to changes, but for what a later call of
// Commit has put.
func (d *DB) encodeDirty(changes records, calls map[slot]uint64) map[slot]dirty {
	d.mu.Lock()
	waited := maps.Clone(d.dirty)
	d.mu.Unlock()
	for s, w := range waited {
		if w.call < calls[s] {
			continue
		}
		v := w.encode()
		if err := check(s, v); err != nil {
			d.cfg.Log.Error("a changed record is not written", "database", d.cfg.Path, "error", err)
			d.mu.Lock()
			d.stats.Dropped++
			d.mu.Unlock()
			continue
		}
		changes[s] = v
	}
	return waited
}

// settle notes what is on disk now. What a failed commit held stays dirty.
func (d *DB) settle(changes records, calls map[slot]uint64, waited map[slot]dirty) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for s, v := range changes {
		d.bytes += len(v) - len(d.kept[s])
		if v == nil {
			delete(d.kept, s)
		} else {
			d.kept[s] = v
		}
	}
	for s, call := range calls {
		if w, ok := d.dirty[s]; ok && w.call < call {
			delete(d.dirty, s)
		}
	}
	for s, w := range waited {
		if d.dirty[s].call == w.call {
			delete(d.dirty, s)
		}
	}
	if len(waited) > 0 {
		d.stats.Flushes++
	}
}

// pace sets the time to the next flush by what this one cost, and what was
// written beside it.
func (d *DB) pace() {
	cost := float64(d.unpaid) / float64(d.cfg.BytesPerDay) * float64(day)
	d.interval = min(max(time.Duration(cost), minInterval), maxInterval)
	d.unpaid = 0
	d.mu.Lock()
	d.stats.Interval = d.interval
	d.mu.Unlock()
}

// persist brings changes to the disk, but for those that change nothing.
func (d *DB) persist(changes records) error {
	if err := d.heal(); err != nil {
		return err
	}
	next := d.state
	next.Counts = maps.Clone(d.state.Counts)
	d.mu.Lock()
	size := d.bytes
	for s, v := range changes {
		old, had := d.kept[s]
		if had == (v != nil) && bytes.Equal(old, v) {
			delete(changes, s)
			continue
		}
		size += len(v) - len(old)
		switch {
		case v == nil:
			next.Counts[s.bucket]--
		case !had:
			next.Counts[s.bucket]++
		}
	}
	d.mu.Unlock()
	if len(changes) == 0 {
		return nil
	}
	if size > maxBytes {
		return fmt.Errorf("twin database %s: %d bytes of records; the limit is %d", d.cfg.Path, size, maxBytes)
	}
	next.Seq++
	var pages int64
	err := guard(func() error {
		return d.bolt.Update(func(tx *bolt.Tx) error {
			before := tx.Stats()
			tx.OnCommit(func() { after := tx.Stats(); pages = after.GetPageAlloc() - before.GetPageAlloc() })
			return put(tx, changes, next)
		})
	})
	if err != nil {
		err = fmt.Errorf("twin database %s: commit: %w: %w", d.cfg.Path, ErrDisk, err)
		if seq, e := d.seqOnDisk(); e != nil || seq != d.state.Seq {
			d.breakOff(err)
		}
		return err
	}
	d.state = next
	d.count(uint64(pages)+uint64(d.bolt.Info().PageSize), true) // and the meta page
	return nil
}

// put writes records, sorted so that those of a page come one after another.
func put(tx *bolt.Tx, changes records, st state) error {
	order := slices.SortedFunc(maps.Keys(changes), func(a, b slot) int {
		if c := strings.Compare(a.bucket, b.bucket); c != 0 {
			return c
		}
		return strings.Compare(a.key, b.key)
	})
	for _, s := range order {
		b, err := tx.CreateBucketIfNotExists([]byte(s.bucket))
		if err != nil {
			return fmt.Errorf("bucket %s: %w", s.bucket, err)
		}
		// A twin is some 800 bytes: with half-full pages, bbolt's default, each
		// would cost a page of two.
		b.FillPercent = 0.9
		if v := changes[s]; v == nil {
			err = b.Delete([]byte(s.key))
		} else {
			err = b.Put([]byte(s.key), seal(s, v))
		}
		if err != nil {
			return fmt.Errorf("bucket %s, key %q: %w", s.bucket, s.key, err)
		}
	}
	b, err := tx.CreateBucketIfNotExists([]byte(stateBucket))
	if err != nil {
		return err
	}
	return b.Put([]byte(stateKey), seal(slot{stateBucket, stateKey}, st.encode()))
}

func (d *DB) count(n uint64, commit bool) {
	d.wrote = true
	d.unpaid += n
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stats.Bytes += n
	if commit {
		d.stats.Commits++
	}
}

// noteDisk keeps what became of the last commit, and tells when that changes.
func (d *DB) noteDisk(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case err == nil && d.trouble != nil:
		d.cfg.Log.Info("the disk takes writes again", "database", d.cfg.Path, "after", time.Since(d.trouble.Since).Round(time.Millisecond))
		d.trouble = nil
	case err != nil && d.trouble == nil:
		d.cfg.Log.Error("the disk takes no writes; twins go on in memory, and nothing is acknowledged until it does", "error", err)
		d.trouble = &Trouble{Error: err.Error(), Since: time.Now()}
	case err != nil:
		d.trouble.Error = err.Error()
	}
}

// breakOff notes that the file may hold a commit that was not acknowledged, or
// pages that only the page cache has: after a failed sync the kernel forgets
// what it could not write. Nothing is built on such a file.
func (d *DB) breakOff(err error) {
	d.broken = err
	d.healAt, d.healWait = time.Now(), minHeal
}

// heal makes a file whose state is not known anew from memory. It tries at once
// and then with a wait that doubles.
func (d *DB) heal() error {
	if d.broken == nil {
		if info, err := os.Stat(d.cfg.Path); d.bolt != nil && err == nil && os.SameFile(info, d.file) {
			return nil
		}
		d.breakOff(fmt.Errorf("twin database %s: %w: the file was removed or replaced", d.cfg.Path, ErrDisk))
	}
	if time.Now().Before(d.healAt) {
		return d.broken
	}
	why := d.broken
	if err := d.remake(); err != nil {
		d.broken = fmt.Errorf("twin database %s: made anew: %w: %w", d.cfg.Path, ErrDisk, err)
		d.healAt = time.Now().Add(d.healWait)
		d.healWait = min(2*d.healWait, maxHeal)
		return d.broken
	}
	d.cfg.Log.Warn("the twin database was made anew from memory", "database", d.cfg.Path, "error", why)
	d.broken = nil
	return nil
}

func (d *DB) remake() error {
	st := d.state
	st.Seq += 2 // past what the failed commit may have left
	n, err := writeFresh(d.cfg.Path+".new", st, d.snapshot())
	if err != nil {
		return err
	}
	d.count(n, false)
	if d.bolt != nil {
		if err := guard(d.bolt.Close); err != nil {
			d.cfg.Log.Debug("the old database did not close", "error", err)
		}
		d.bolt = nil
	}
	if err := replace(d.cfg.Path+".new", d.cfg.Path); err != nil {
		return err
	}
	d.state = st
	return d.openBolt()
}

// openBolt opens the file that this process has just made.
func (d *DB) openBolt() error {
	return guard(func() error {
		db, err := bolt.Open(d.cfg.Path, 0o600, boltOptions())
		if err != nil {
			return err
		}
		d.bolt = db
		d.file, err = os.Stat(d.cfg.Path)
		return err
	})
}

func (d *DB) seqOnDisk() (seq uint64, err error) {
	err = guard(func() error {
		return d.bolt.View(func(tx *bolt.Tx) error {
			b := tx.Bucket([]byte(stateBucket))
			if b == nil {
				return errors.New("no state")
			}
			v, err := unseal(slot{stateBucket, stateKey}, b.Get([]byte(stateKey)))
			if err != nil {
				return err
			}
			st, err := decodeState(v)
			seq = st.Seq
			return err
		})
	})
	return seq, err
}

// copyDaily makes the good copy anew once a day, from memory: nothing that the
// disk did to the file gets into it.
func (d *DB) copyDaily() {
	if time.Now().Before(d.copyAt) || d.broken != nil {
		return
	}
	good := goodPath(d.cfg.Path)
	n, err := writeFresh(good+".new", d.state, d.snapshot())
	if err == nil {
		d.count(n, false)
		err = replace(good+".new", good)
	}
	if err != nil {
		d.copyAt = time.Now().Add(time.Hour)
		d.cfg.Log.Error("the twin database's good copy could not be made; the older one stays", "copy", good, "error", err)
		return
	}
	d.copyAt = time.Now().Add(copyEvery)
}
