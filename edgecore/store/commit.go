package store

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime/debug"
	"time"

	bolt "go.etcd.io/bbolt"
)

const (
	// maxBatch bounds how many writes share a commit.
	maxBatch = 256
	// rvBlock is how many resourceVersions a commit sets aside. Memory-only
	// objects use them up without a commit; after a restart the store goes on
	// behind the block, so that no resourceVersion is ever given out twice.
	rvBlock = 1 << 16
)

type write struct {
	ctx      context.Context
	fn       func(*Tx) error
	done     chan struct{}
	err      error
	panicked any
}

// soon is what is on disk as it was a while ago. Objects, of which only what the
// kubelet or the cloud repeats anyway has changed (a heartbeat, the cloud's
// revision), wait for Close or for their next change; private values and Events
// for the next flush.
type soon struct {
	objects map[Key]struct{}
	private map[privateKey]struct{}
}

func newSoon() soon {
	return soon{objects: map[Key]struct{}{}, private: map[privateKey]struct{}{}}
}

// maxSoon bounds the objects that wait.
const maxSoon = 1024

func (s *Store) commitLoop() {
	flush := time.NewTimer(s.flushAfter())
	defer flush.Stop()
	for {
		select {
		case w := <-s.writes:
			s.commitBatch(s.gather(w), nothing)
		case <-flush.C:
			s.commitBatch(nil, waiting)
			flush.Reset(s.flushAfter())
		case <-s.healer.C:
			s.commitBatch(nil, waiting)
		case <-s.closing:
			s.commitBatch(nil, everything)
			for {
				select {
				case w := <-s.writes:
					w.err = ErrClosed
					close(w.done)
				default:
					return
				}
			}
		}
	}
}

// gather takes what queued up while the last commit was being synced.
func (s *Store) gather(first *write) []*write {
	batch := []*write{first}
	for len(batch) < maxBatch {
		select {
		case w := <-s.writes:
			batch = append(batch, w)
		default:
			return batch
		}
	}
	return batch
}

// flush is what of that which waits a commit takes along.
type flush uint8

const (
	nothing flush = iota
	waiting
	everything // the store is closed
)

// commitBatch makes the writes one commit.
func (s *Store) commitBatch(writes []*write, flush flush) {
	batch := newLayer(nil, s.rv)
	batch.flush = flush
	var applied []*write
	for _, w := range writes {
		l := newLayer(batch, batch.rv)
		if w.err = s.apply(w, l); w.err != nil || w.panicked != nil {
			close(w.done)
			continue
		}
		l.merge()
		applied = append(applied, w)
	}
	s.evictEvents(batch)
	err := s.persist(batch)
	for _, w := range applied {
		w.err = err
		close(w.done)
	}
}

func (s *Store) apply(w *write, l *layer) (err error) {
	defer func() {
		if r := recover(); r != nil {
			w.panicked = fmt.Sprintf("store: write panicked: %v\n%s", r, debug.Stack())
		}
	}()
	if err := w.ctx.Err(); err != nil {
		return err
	}
	return w.fn(&Tx{s, l})
}

// persist brings a batch to disk, if it holds anything that has to be there,
// and then into view.
func (s *Store) persist(b *layer) error {
	pods := s.podsAfter(b)
	s.outbox.pin(b)
	if pods == nil && !s.durable(b) {
		s.publish(b, nil, nil)
		s.wait(b)
		return nil
	}
	if err := s.heal(); err != nil {
		s.noteDisk(err)
		s.publish(b, nil, err)
		return err
	}
	c := s.changeOf(b)
	err := s.commit(c, pods)
	s.noteDisk(err)
	s.publish(b, c, err)
	if err != nil {
		s.outbox.giveBack(c.removed)
		return err
	}
	s.settle(c)
	return nil
}

// durable tells whether a batch has to reach the disk now.
func (s *Store) durable(b *layer) bool {
	for k := range b.objects {
		if _, late := b.soon.objects[k]; !late && !volatile(k.Resource) {
			return true
		}
	}
	for k := range b.private {
		if _, late := b.soon.private[k]; !late {
			return true
		}
	}
	for _, st := range b.outbox {
		if st.recorded() {
			return true
		}
	}
	return len(b.parked) > 0 || b.epoch != nil || b.rv > s.meta.RV || s.allObjects(b) ||
		b.flush >= waiting && (len(s.soon.private) > 0 || s.broken != nil || s.outbox.waits(s.filed, 0))
}

// allObjects tells whether the objects that wait go with this batch.
func (s *Store) allObjects(b *layer) bool {
	return b.flush == everything && (len(s.soon.objects) > 0 || s.outbox.anyTold()) || len(s.soon.objects) > maxSoon
}

// wait notes what of a batch is in memory only.
func (s *Store) wait(b *layer) {
	for k := range b.soon.objects {
		s.soon.objects[k] = struct{}{}
	}
	for k := range b.soon.private {
		s.soon.private[k] = struct{}{}
	}
}

// settle notes what a commit brought to disk.
func (s *Store) settle(c *change) {
	for k := range c.objects {
		delete(s.soon.objects, k)
	}
	for k := range c.private {
		delete(s.soon.private, k)
	}
}

// change is what one transaction writes; nil values are removals.
type change struct {
	objects map[Key]*Object
	parked  map[Key]*Object
	private map[privateKey]*privateValue
	outbox  map[entryID]*staged
	removed []uint64 // outbox entries
	events  filing
	untold  map[Key]bool
	meta    metaRecord // but for Counts
}

// changeOf collects what goes to disk with a batch. What the cloud has
// acknowledged leaves it with each commit.
func (s *Store) changeOf(b *layer) *change {
	c := &change{objects: b.objects, parked: b.parked, private: b.private, outbox: b.outbox}
	if s.allObjects(b) {
		c.objects = map[Key]*Object{}
		for k := range s.soon.objects {
			c.objects[k] = s.stored(k)
		}
		for _, k := range s.outbox.told() {
			if o := s.stored(k); o != nil {
				c.objects[k] = o
			}
		}
		maps.Copy(c.objects, b.objects)
	}
	if b.flush >= waiting {
		c.private = map[privateKey]*privateValue{}
		for k := range s.soon.private {
			c.private[k] = s.private[k]
		}
		maps.Copy(c.private, b.private)
	}
	c.removed = s.outbox.takeAcked(b)
	if b.flush >= waiting || s.outbox.waits(s.filed, rideAfter) {
		c.events = s.outbox.file(s.filed)
	}
	c.untold = s.outbox.untold(b, c.objects)
	c.meta = s.meta
	c.meta.Seq++
	c.meta.RV = b.rv + rvBlock
	c.meta.Outbox = s.outbox.lastID
	c.meta.Dropped = s.outbox.dropsNow()
	if b.epoch != nil {
		c.meta.Epoch = *b.epoch
	}
	if b.content {
		c.meta.Content = c.meta.Seq
	}
	return c
}

// commit writes the transaction, and the ledger in step with it.
func (s *Store) commit(c *change, pods podSet) error {
	if pods == nil {
		pods = s.pods
	}
	if err := s.note(s.meta, pods.without(s.pods)); err != nil {
		return fmt.Errorf("store %s: commit: %w: %w", s.cfg.Path, ErrDisk, err)
	}
	var alloc int64
	var parts [classes]int
	counts := s.meta.Counts
	err := s.guard(func() error {
		return s.db.Update(func(tx *bolt.Tx) error {
			w := writer{tx: tx, sealer: s.sealer, parts: &parts, counts: &counts}
			err := w.change(c)
			c.meta.Counts = counts
			if err == nil {
				err = putMeta(tx.Bucket(bucketMeta), c.meta)
			}
			stats := tx.Stats()
			tx.OnCommit(func() { after := tx.Stats(); alloc = after.GetPageAlloc() - stats.GetPageAlloc() })
			return err
		})
	})
	if err != nil {
		err = fmt.Errorf("store %s: commit: %w: %w", s.cfg.Path, ErrDisk, err)
		if !s.diskUnchanged() {
			s.breakOff(err)
		}
		return err
	}
	s.wear.commit(uint64(alloc)+uint64(s.db.Info().PageSize), &parts) // and the meta page
	s.filed.settle(c.events)
	s.pods = pods
	if err := s.note(c.meta, pods); err != nil {
		// The commit stands; the next one tries again.
		s.cfg.Log.Error("the store's ledger of pods is not up to date", "error", err)
	}
	s.reserve()
	return nil
}

// note brings the ledger to what pods are, if it says something else.
func (s *Store) note(m metaRecord, pods podSet) error {
	if s.ledger.says(m, pods) {
		return nil
	}
	if err := s.ledger.write(m, pods); err != nil {
		return err
	}
	s.wear.add(ClassLedger, s.ledger.lastWrite)
	return nil
}

// publish makes a batch visible (commitErr nil) and ends its hold on the outbox.
func (s *Store) publish(b *layer, c *change, commitErr error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if commitErr != nil {
		s.outbox.unpinLocked(b)
		return
	}
	s.rv = b.rv
	if c != nil {
		s.meta = c.meta
	}
	for k, o := range b.objects {
		t := s.table(k.Resource)
		if o == nil {
			delete(t.objects, k)
		} else {
			t.objects[k] = o
		}
	}
	for k, o := range b.parked {
		if o == nil {
			delete(s.parked, k)
		} else {
			s.parked[k] = o
		}
	}
	for k, v := range b.private {
		if v == nil {
			delete(s.private, k)
		} else {
			s.private[k] = v
		}
	}
	for _, uid := range b.graves {
		s.gone.add(uid)
	}
	s.record(b.events)
	s.outbox.publishLocked(b)
	if b.epoch != nil && *b.epoch != s.epoch {
		s.epoch = *b.epoch
		close(s.syncChanged)
		s.syncChanged = make(chan struct{})
	}
}

// writer puts records into one transaction and counts them.
type writer struct {
	tx     *bolt.Tx
	sealer *sealer
	parts  *[classes]int
	counts *counts
}

func (w writer) change(c *change) error {
	for k, o := range c.objects {
		if volatile(k.Resource) {
			continue
		}
		if err := w.object(bucketObjects, k, o, c.untold[k], &w.counts.Objects); err != nil {
			return err
		}
	}
	for k, o := range c.parked {
		if err := w.object(bucketParked, k, o, false, &w.counts.Parked); err != nil {
			return err
		}
	}
	for _, id := range c.removed {
		if err := w.set(bucketOutbox, idKey(id), nil, &w.counts.Outbox, ClassOutbox); err != nil {
			return err
		}
	}
	for _, st := range c.outbox {
		if err := w.entry(st); err != nil {
			return err
		}
	}
	for k, v := range c.private {
		if err := w.private(k, v); err != nil {
			return err
		}
	}
	return w.events(c.events)
}

// set puts or (val nil) deletes, and keeps count of the bucket's records.
func (w writer) set(bucket, key, val []byte, n *int, c Class) error {
	w.parts[c] += len(key) + len(val)
	b := w.tx.Bucket(bucket)
	had := b.Get(key) != nil
	if val == nil {
		if had {
			*n--
		}
		return b.Delete(key)
	}
	if !had {
		*n++
	}
	return b.Put(key, val)
}

func (w writer) object(bucket []byte, k Key, o *Object, untold bool, n *int) error {
	var rec []byte
	if o != nil {
		var err error
		if rec, err = w.sealer.encodeObject(bucket, o, untold); err != nil {
			return err
		}
	}
	if err := w.set(bucket, k.encode(), rec, n, classOf(k.Resource)); err != nil {
		return fmt.Errorf("%s: %w", k, err)
	}
	return nil
}

func (w writer) private(k privateKey, v *privateValue) error {
	var rec []byte
	if v != nil {
		var err error
		if rec, err = w.sealer.encodePrivate(k, v); err != nil {
			return err
		}
	}
	if err := w.set(bucketPrivate, privateDBKey(k), rec, &w.counts.Private, ClassPrivate); err != nil {
		return fmt.Errorf("private %s: %w", k.kind, err)
	}
	return nil
}

func (w writer) entry(st *staged) error {
	if !st.recorded() {
		return nil
	}
	var rec []byte
	if st.next != nil && st.next.recorded() {
		if st.base != nil && st.base.recorded() && st.base.sameRecord(st.next) {
			return nil // the common case: one more change to an object already waiting
		}
		var err error
		if rec, err = encodeOutbox(st.next); err != nil {
			return err
		}
	}
	return w.set(bucketOutbox, idKey(st.id), rec, &w.counts.Outbox, ClassOutbox)
}

func (w writer) events(f filing) error {
	for _, id := range f.remove {
		if err := w.set(bucketEvents, idKey(id), nil, &w.counts.Events, ClassEvents); err != nil {
			return err
		}
	}
	for _, e := range f.put {
		rec, err := encodeEvent(e)
		if err != nil {
			return err
		}
		if err := w.set(bucketEvents, idKey(e.id), rec, &w.counts.Events, ClassEvents); err != nil {
			return err
		}
	}
	return nil
}

// evictEvents keeps the Event objects within their bounds, least recently
// changed first.
func (s *Store) evictEvents(b *layer) {
	all := map[Key]*Object{}
	touched := false
	for k, o := range b.objects {
		if k.Resource == "events" {
			touched = true
			all[k] = o
		}
	}
	if !touched {
		return
	}
	for k, o := range s.tables["events"].objectsOrNil() {
		if _, staged := all[k]; !staged {
			all[k] = o
		}
	}
	n, size := 0, 0
	for k, o := range all {
		if o == nil {
			delete(all, k)
			continue
		}
		n++
		size += len(o.Body)
	}
	tx := &Tx{s, b}
	for n > s.cfg.MaxEvents || size > maxEventBytes {
		var oldest *Object
		for _, o := range all {
			if oldest == nil || o.RV < oldest.RV {
				oldest = o
			}
		}
		if oldest == nil {
			return
		}
		delete(all, oldest.Key)
		n--
		size -= len(oldest.Body)
		if err := tx.remove(oldest); err != nil {
			s.cfg.Log.Error("cannot evict an event", "event", oldest.Name, "error", errors.Unwrap(err))
			return
		}
	}
}

func (t *table) objectsOrNil() map[Key]*Object {
	if t == nil {
		return nil
	}
	return t.objects
}
