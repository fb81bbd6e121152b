package seglog

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"
)

// write is the writer's loop, until Close.
func (l *Log) write() {
	defer l.wg.Done()
	var flush <-chan time.Time // nil: nothing was offered, and nothing wakes an idle node
	chores := time.NewTicker(housekeeping)
	defer chores.Stop()
	for {
		select {
		case <-l.kick:
			l.writePending()
			l.trimmed()
		case <-l.offered:
			if flush == nil {
				flush = time.After(l.cfg.FlushEvery)
			}
		case <-flush:
			flush = nil
			l.writePending()
		case <-chores.C:
			l.tidy()
		case <-l.closing:
			l.writePending()
			if l.file != nil {
				if err := l.file.Close(); err != nil {
					l.cfg.Log.Warn("a segment did not close", "log", l.cfg.Dir, "error", err)
				}
			}
			return
		}
	}
}

// turnLocked wakes the readers.
func (l *Log) turnLocked() {
	close(l.grown)
	l.grown = make(chan struct{})
}

// take takes what waits to be written, behind a record of what was lost before.
func (l *Log) take() (batch []*entry, lost uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	batch, lost = l.pending, l.lost
	l.pending, l.pendingBytes = nil, 0
	close(l.room)
	l.room = make(chan struct{})
	if lost > 0 && len(batch) > 0 {
		batch = append([]*entry{{rec: Gap{Count: lost}.record(batch[0].rec.TS)}}, batch...)
	}
	return batch, lost
}

func (l *Log) writePending() {
	batch, lost := l.take()
	gap := lost > 0
	for len(batch) > 0 {
		n, err := l.writeSome(batch)
		if err != nil {
			l.giveUp(batch, gap, err)
			return
		}
		if gap {
			l.mu.Lock()
			l.lost -= lost
			l.mu.Unlock()
			gap = false
		}
		for _, e := range batch[:n] {
			e.settle(nil)
		}
		batch = batch[n:]
	}
}

// giveUp answers those who wait, and counts the rest as lost. Nothing is kept
// for another try: the next gap record tells of it.
func (l *Log) giveUp(batch []*entry, gap bool, err error) {
	if gap {
		batch = batch[1:]
	}
	lost := uint64(0)
	for _, e := range batch {
		if e.done == nil {
			lost++
		}
		e.settle(err)
	}
	l.mu.Lock()
	l.lost += lost
	l.stats.Dropped += lost
	l.stats.Error = err.Error()
	l.mu.Unlock()
	if !l.troubled {
		l.troubled = true
		l.cfg.Log.Error("a telemetry log takes no records", "log", l.cfg.Dir, "error", err)
	}
}

func (e *entry) settle(err error) {
	w := e.done
	if w == nil {
		return
	}
	w.err = cmp.Or(w.err, err)
	if w.left--; w.left == 0 {
		close(w.done)
	}
}

// writeSome writes as many records as the active segment takes, one at least,
// and has them on disk when it returns.
func (l *Log) writeSome(batch []*entry) (n int, err error) {
	l.mu.Lock()
	active := l.segs[len(l.segs)-1]
	l.mu.Unlock()
	if l.file == nil || active.end >= l.cfg.SegmentBytes || active.closed {
		if active, err = l.rotate(); err != nil {
			return 0, err
		}
	}
	l.buf = l.buf[:0]
	for n < len(batch) && (n == 0 || active.end+int64(len(l.buf)) < l.cfg.SegmentBytes) {
		l.buf = appendRecord(l.buf, active.segment, uint32(active.end)+uint32(len(l.buf)), batch[n].rec)
		n++
	}
	if err := l.makeRoom(int64(len(l.buf))); err != nil {
		return 0, err
	}
	_, err = l.file.WriteAt(l.buf, active.end)
	if err == nil {
		err = datasync(l.file)
	}
	if err != nil {
		// After a failed sync the kernel forgets what it could not write: what
		// follows goes into another file.
		l.abandon(active)
		return 0, fmt.Errorf("log %s: %w: %w", l.cfg.Dir, ErrDisk, err)
	}
	l.mu.Lock()
	active.end += int64(len(l.buf))
	active.size = active.end
	active.count += uint32(n)
	active.kept += uint32(n)
	l.stats.Appended += uint64(n)
	l.stats.Bytes += uint64(len(l.buf))
	l.stats.Syncs++
	l.stats.Error = ""
	l.turnLocked()
	l.mu.Unlock()
	if l.troubled {
		l.troubled = false
		l.cfg.Log.Info("a telemetry log takes records again", "log", l.cfg.Dir)
	}
	if cap(l.buf) > 1<<20 {
		l.buf = nil
	}
	return n, nil
}

// abandon ends a segment before what could not be written to it.
func (l *Log) abandon(active *segment) {
	if l.file != nil {
		_ = l.file.Truncate(active.end) // if it fails, readers stop before it all the same
		_ = l.file.Close()
		l.file = nil
	}
	l.mu.Lock()
	active.closed = true
	l.mu.Unlock()
}

// rotate begins a segment, and has the one before compressed.
func (l *Log) rotate() (*segment, error) {
	if err := l.makeRoom(fileCost); err != nil {
		return nil, err
	}
	l.mu.Lock()
	last := l.segs[len(l.segs)-1]
	l.mu.Unlock()
	s, f, err := l.create(last.segment + 1)
	if err != nil {
		return nil, fmt.Errorf("log %s: a new segment: %w: %w", l.cfg.Dir, ErrDisk, err)
	}
	if l.file != nil {
		if err := l.file.Close(); err != nil {
			l.cfg.Log.Warn("a segment did not close", "log", l.cfg.Dir, "error", err)
		}
	}
	l.file = f
	l.mu.Lock()
	last.closed = true
	l.segs = append(l.segs, s)
	l.turnLocked()
	l.mu.Unlock()
	l.wakeSealer()
	return s, nil
}

// create makes the file of segment n, on disk when it returns.
func (l *Log) create(n uint64) (*segment, *os.File, error) {
	now, trusted := l.cfg.Now()
	s := &segment{header: header{incarnation: l.incarnation, segment: n}, path: l.logPath(n), size: headerSize, end: headerSize, since: time.Now()}
	if trusted {
		s.created = now.UnixMilli()
	}
	f, err := os.OpenFile(s.path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, nil, err
	}
	_, err = f.WriteAt(s.encode(), 0)
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = syncDir(l.cfg.Dir)
	}
	if err != nil {
		return nil, nil, errors.Join(err, f.Close(), os.Remove(s.path))
	}
	l.mu.Lock()
	l.stats.Bytes += fileCost
	l.mu.Unlock()
	return s, f, nil
}

// makeRoom keeps the log within its bounds when need bytes more are written.
func (l *Log) makeRoom(need int64) error {
	l.checkDisk()
	for {
		l.mu.Lock()
		over := l.usageLocked()+need > l.limit || len(l.segs) > maxSegments
		limit := l.limit
		var oldest *segment
		if len(l.segs) > 1 {
			oldest = l.segs[0]
		}
		l.mu.Unlock()
		switch {
		case !over:
			return nil
		case l.cfg.Policy == DropNewest || oldest == nil:
			return fmt.Errorf("log %s: %w: %d bytes are the limit", l.cfg.Dir, ErrFull, limit)
		case l.cfg.Policy == Thin && l.thin():
		default:
			if err := l.drop(oldest); err != nil {
				return err
			}
		}
	}
}

// floor is what of the disk telemetry leaves free.
func (l *Log) floor(total uint64) uint64 {
	if l.cfg.Alarm {
		return 64 << 20
	}
	return max(total/10, 512<<20)
}

// checkDisk has the log stop growing on a disk that is short of room.
func (l *Log) checkDisk() {
	if time.Since(l.checked) < time.Second {
		return
	}
	l.checked = time.Now()
	free, total, err := l.cfg.Free()
	short := err == nil && free < l.floor(total)
	l.mu.Lock()
	defer l.mu.Unlock()
	was := l.limit < l.cfg.MaxBytes
	switch {
	case short && !was:
		l.limit = min(l.usageLocked(), l.cfg.MaxBytes-1)
		l.cfg.Log.Warn("the disk is short of room: a telemetry log grows no more", "log", l.cfg.Dir, "free", free, "size", l.limit)
	case !short && err == nil && was:
		l.limit = l.cfg.MaxBytes
		l.cfg.Log.Info("the disk has room again", "log", l.cfg.Dir, "free", free)
	}
}

// drop gives up a segment. What it held is noted first, for readers to tell.
func (l *Log) drop(s *segment) error {
	return l.remove(s, uint64(s.count))
}

// remove takes a segment away; count of its records are missed by who has not
// read it.
func (l *Log) remove(s *segment, count uint64) error {
	l.mu.Lock()
	next := l.drops.with(drop{s.segment, s.segment, count})
	l.mu.Unlock()
	if err := l.saveDrops(next); err != nil {
		// On a disk that is full the segment is what makes room.
		l.cfg.Log.Warn("how many records were dropped may be forgotten with a restart", "log", l.cfg.Dir, "error", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := os.Remove(s.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("log %s: %w: %w", l.cfg.Dir, ErrDisk, err)
	}
	l.drops = next
	l.segs = slices.DeleteFunc(l.segs, func(o *segment) bool { return o == s })
	if count > 0 {
		l.stats.Dropped += uint64(s.kept)
	}
	l.turnLocked()
	return nil
}

// Trim gives up what lies before pos in whole segments: all readers are past it.
func (l *Log) Trim(pos Pos) {
	l.mu.Lock()
	trim := max(l.trim, pos.Segment)
	changed := trim != l.trim
	l.trim = trim
	l.mu.Unlock()
	if changed {
		l.wake()
	}
}

func (l *Log) trimmed() {
	for {
		l.mu.Lock()
		var s *segment
		if len(l.segs) > 1 && l.segs[0].segment < l.trim {
			s = l.segs[0]
		}
		l.mu.Unlock()
		if s == nil {
			return
		}
		if err := l.remove(s, 0); err != nil {
			l.cfg.Log.Warn("a segment that was read stays", "error", err)
			return
		}
	}
}

// tidy does what time brings about: old segments go, and one that was long
// begun ends, so that its turn comes.
func (l *Log) tidy() {
	l.expire()
	l.mu.Lock()
	active := l.segs[len(l.segs)-1]
	old := active.count > 0 && time.Since(active.since) > min(max(l.cfg.MaxAge/8, time.Minute), time.Hour)
	l.mu.Unlock()
	if old {
		if _, err := l.rotate(); err != nil && !errors.Is(err, ErrFull) {
			l.cfg.Log.Warn("a telemetry log began no new segment", "error", err)
		}
	}
}

// expire drops segments that ended more than MaxAge ago: a later one was begun
// then.
func (l *Log) expire() {
	for {
		now, trusted := l.cfg.Now()
		l.mu.Lock()
		var s *segment
		for _, next := range l.segs[1:] {
			if next.created != 0 { // and all before it are older
				if trusted && now.Sub(time.UnixMilli(next.created)) > l.cfg.MaxAge {
					s = l.segs[0]
				}
				break
			}
		}
		l.mu.Unlock()
		if s == nil {
			return
		}
		if err := l.drop(s); err != nil {
			l.cfg.Log.Warn("an old segment stays", "error", err)
			return
		}
	}
}
