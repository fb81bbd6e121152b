package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"runtime/debug"

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

func (s *Store) commitLoop() {
	for {
		select {
		case w := <-s.writes:
			s.commitBatch(s.gather(w))
		case <-s.closing:
			s.commitBatch(nil) // what can ride along with a commit has waited for this one
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

func (s *Store) commitBatch(writes []*write) {
	batch := newLayer(nil, s.rv)
	batch.last = len(writes) == 0
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
	err := s.failed
	if err == nil {
		s.evictEvents(batch)
		err = s.persist(batch)
	}
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

// persist brings a batch to disk and then into view.
func (s *Store) persist(b *layer) error {
	removed := s.pinOutbox(b)
	err := s.commitMarked(b, removed)
	s.publish(b, err)
	if err != nil {
		s.outbox.giveBack(removed)
		return err
	}
	if s.count("pods") > 0 && !s.marker.Pods {
		if err := s.writeMarker(true); err != nil {
			// The commit stands; only the guard against a lost file is missing.
			s.cfg.Log.Error("store's marker is not up to date", "error", err)
		}
	}
	return nil
}

func (s *Store) commitMarked(b *layer, removed []uint64) error {
	pods := s.count("pods")
	for k, o := range b.objects {
		if k.Resource != "pods" {
			continue
		}
		if had := s.stored(k) != nil; had && o == nil {
			pods--
		} else if !had && o != nil {
			pods++
		}
	}
	if pods == 0 && s.marker.Pods {
		if err := s.writeMarker(false); err != nil {
			return err
		}
	}
	if !b.persistent() && len(removed) == 0 && b.rv <= s.reserved && !(b.last && len(s.lazy) > 0) {
		maps.Copy(s.lazy, b.lazy)
		return nil
	}
	late := map[Key]*Object{}
	for k := range s.lazy {
		if _, staged := b.objects[k]; !staged {
			late[k] = s.stored(k)
		}
	}
	next := s.disk
	epoch := s.epoch
	if b.epoch != nil {
		epoch = *b.epoch
	}
	var alloc int64
	err := s.db.Update(func(tx *bolt.Tx) error {
		if err := s.writeObjects(tx, bucketObjects, b.objects, &next.Objects); err != nil {
			return err
		}
		if err := s.writeObjects(tx, bucketObjects, late, &next.Objects); err != nil {
			return err
		}
		if err := s.writeObjects(tx, bucketParked, b.parked, &next.Parked); err != nil {
			return err
		}
		if err := s.writeOutbox(tx, b, removed, &next.Outbox); err != nil {
			return err
		}
		if err := s.writePrivate(tx, b, &next.Private); err != nil {
			return err
		}
		err := putMeta(tx.Bucket(bucketMeta), metaRecord{
			Format: format, StoreID: s.storeID, RV: b.rv + rvBlock, Outbox: s.outbox.lastID, Epoch: epoch, Counts: next,
		})
		stats := tx.Stats()
		tx.OnCommit(func() { after := tx.Stats(); alloc = after.GetPageAlloc() - stats.GetPageAlloc() })
		return err
	})
	if err != nil {
		err = fmt.Errorf("store %s: commit: %w", s.cfg.Path, err)
		if !s.diskUnchanged() {
			s.failed = fmt.Errorf("%w; the disk may hold a write that was not acknowledged, restart edgecore", err)
		}
		return err
	}
	s.disk, s.reserved = next, b.rv+rvBlock
	clear(s.lazy)
	s.commits.Add(1)
	s.bytesWritten.Add(uint64(alloc) + uint64(s.db.Info().PageSize)) // and the meta page
	return nil
}

// diskUnchanged tells whether the file still holds the last good commit: after
// a failed sync bbolt may go on from the failed one, which memory does not have.
func (s *Store) diskUnchanged() bool {
	same := false
	err := s.guard(func() error {
		return s.db.View(func(tx *bolt.Tx) error {
			p, err := unframe(bucketMeta, []byte("state"), tx.Bucket(bucketMeta).Get([]byte("state")))
			if err != nil {
				return err
			}
			var m metaRecord
			if err := json.Unmarshal(p, &m); err != nil {
				return err
			}
			same = m.RV == s.reserved && m.Counts == s.disk
			return nil
		})
	})
	return err == nil && same
}

func (b *layer) persistent() bool {
	for k := range b.objects {
		if _, lazy := b.lazy[k]; !lazy && !volatile(k.Resource) {
			return true
		}
	}
	for id := range b.outbox {
		if id.op != OpEvent {
			return true
		}
	}
	return len(b.parked) > 0 || len(b.private) > 0 || b.epoch != nil
}

// set puts or (val nil) deletes, and keeps count of the bucket's records.
func set(b *bolt.Bucket, key, val []byte, n *int) error {
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

func (s *Store) writeObjects(tx *bolt.Tx, bucket []byte, objects map[Key]*Object, n *int) error {
	b := tx.Bucket(bucket)
	for k, o := range objects {
		if volatile(k.Resource) {
			continue
		}
		var rec []byte
		if o != nil {
			var err error
			if rec, err = s.sealer.encodeObject(bucket, o); err != nil {
				return err
			}
		}
		if err := set(b, k.encode(), rec, n); err != nil {
			return fmt.Errorf("%s: %w", k, err)
		}
	}
	return nil
}

func (s *Store) writePrivate(tx *bolt.Tx, l *layer, n *int) error {
	b := tx.Bucket(bucketPrivate)
	for k, v := range l.private {
		var rec []byte
		if v != nil {
			var err error
			if rec, err = s.sealer.encodePrivate(k, v); err != nil {
				return err
			}
		}
		if err := set(b, privateDBKey(k), rec, n); err != nil {
			return fmt.Errorf("private %s: %w", k.kind, err)
		}
	}
	return nil
}

func (s *Store) writeOutbox(tx *bolt.Tx, l *layer, removed []uint64, n *int) error {
	b := tx.Bucket(bucketOutbox)
	for _, id := range removed {
		if err := set(b, outboxDBKey(id), nil, n); err != nil {
			return err
		}
	}
	for id, st := range l.outbox {
		if id.op == OpEvent {
			continue
		}
		var rec []byte
		if st.next != nil {
			if st.base != nil && st.base.sameRecord(st.next) {
				continue // the common case: one more change to an object already waiting
			}
			var err error
			if rec, err = encodeOutbox(st.next); err != nil {
				return err
			}
		}
		if err := set(b, outboxDBKey(st.id), rec, n); err != nil {
			return err
		}
	}
	return nil
}

// publish makes a batch visible (commitErr nil) and ends its hold on the outbox.
func (s *Store) publish(b *layer, commitErr error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if commitErr != nil {
		s.outbox.unpinLocked(b)
		return
	}
	s.rv = b.rv
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

// evictEvents keeps the Event objects within their bound, least recently
// changed first.
func (s *Store) evictEvents(b *layer) {
	n := s.count("events")
	for k, o := range b.objects {
		if k.Resource != "events" {
			continue
		}
		if had := s.stored(k) != nil; had && o == nil {
			n--
		} else if !had && o != nil {
			n++
		}
	}
	tx := &Tx{s, b}
	for ; n > s.cfg.MaxEvents; n-- {
		var oldest *Object
		consider := func(o *Object) {
			if o != nil && (oldest == nil || o.RV < oldest.RV) {
				oldest = o
			}
		}
		for k, o := range s.tables["events"].objectsOrNil() {
			if _, staged := b.objects[k]; !staged {
				consider(o)
			}
		}
		for k, o := range b.objects {
			if k.Resource == "events" {
				consider(o)
			}
		}
		if oldest == nil {
			return
		}
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
