package store

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"
)

// contents is all that a database holds, apart from memory-only objects.
type contents struct {
	meta    metaRecord
	objects []*Object
	parked  []*Object
	untold  map[Key]bool
	outbox  []*entry // recorded ones
	events  []filedEvent
	private map[privateKey]*privateValue
}

// snapshot is what the database should hold. It is complete without the disk:
// a store is in memory whole.
func (s *Store) snapshot() contents {
	s.mu.RLock()
	defer s.mu.RUnlock()
	c := contents{meta: s.meta, untold: map[Key]bool{}, private: maps.Clone(s.private)}
	c.meta.Outbox = max(c.meta.Outbox, s.outbox.highest)
	c.meta.Dropped = s.outbox.drops
	for resource, t := range s.tables {
		if volatile(resource) {
			continue
		}
		for k, o := range t.objects {
			c.objects = append(c.objects, o)
			c.untold[k] = s.outbox.byID[entryID{k, o.UID, OpStatus}] != nil
		}
	}
	c.parked = slices.Collect(maps.Values(s.parked))
	for el := s.outbox.order.Front(); el != nil; el = el.Next() {
		switch e := el.Value.(*entry); {
		case e.op == OpEvent:
			if o := s.stored(e.key); o != nil && o.UID == e.uid {
				c.events = append(c.events, filedEvent{e.id, e.gen, e.key, e.uid, o.RV, o.Body})
			}
		case e.recorded():
			c.outbox = append(c.outbox, &entry{entryID: e.entryID, id: e.id, labels: e.labels, annotations: e.annotations, last: e.last})
		}
	}
	return c
}

// writeFresh makes a database at path, on disk when it returns, and tells how
// many bytes that took. On an error nothing is left at path.
func writeFresh(path string, sealer *sealer, c contents) (written uint64, err error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, removeIfThere(path))
		}
	}()
	opts := boltOptions(time.Second)
	opts.NoSync = true // once, at the end
	db, err := bolt.Open(path, 0o600, opts)
	if err != nil {
		return 0, err
	}
	err = db.Update(func(tx *bolt.Tx) error { return fill(tx, sealer, c) })
	if err == nil {
		err = db.View(func(tx *bolt.Tx) error { written = uint64(tx.Size()); return nil })
	}
	if err == nil {
		err = db.Sync()
	}
	return written, errors.Join(err, db.Close())
}

func fill(tx *bolt.Tx, sealer *sealer, c contents) error {
	for _, name := range allBuckets() {
		if _, err := tx.CreateBucket(name); err != nil {
			return err
		}
	}
	check, err := sealer.seal("keycheck", nil, keyCheck)
	if err != nil {
		return err
	}
	if err := tx.Bucket(bucketMeta).Put(keyCheck, check); err != nil {
		return err
	}
	var parts [classes]int
	c.meta.Counts = counts{}
	w := writer{tx: tx, sealer: sealer, parts: &parts, counts: &c.meta.Counts}
	byKey := func(a, b *Object) int { return strings.Compare(string(a.Key.encode()), string(b.Key.encode())) }
	slices.SortFunc(c.objects, byKey)
	slices.SortFunc(c.parked, byKey)
	for _, o := range c.objects {
		if err := w.object(bucketObjects, o.Key, o, c.untold[o.Key], &c.meta.Counts.Objects); err != nil {
			return err
		}
	}
	for _, o := range c.parked {
		if err := w.object(bucketParked, o.Key, o, false, &c.meta.Counts.Parked); err != nil {
			return err
		}
	}
	for _, e := range c.outbox {
		if err := w.entry(&staged{id: e.id, next: e}); err != nil {
			return err
		}
	}
	if err := w.events(filing{put: c.events}); err != nil {
		return err
	}
	for k, v := range c.private {
		if err := w.private(k, v); err != nil {
			return err
		}
	}
	return putMeta(tx.Bucket(bucketMeta), c.meta)
}

// replace puts the file at from in to's place, for good.
func replace(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return errors.Join(err, removeIfThere(from))
	}
	return syncDir(filepath.Dir(to))
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func goodPath(path string) string { return path + ".good" }

// The last good copy lies beside the database. It is written from memory, not
// from the file, so that nothing the disk did to the file gets into it; for the
// same reason it shares no blocks with it, as a reflink would.
//
// It need not be of the last minute: the ledger says which pods there are and
// which have ended, and what else is old in it the next sync brings up to date.
// So it is made when what is there has changed, not how it is doing, and seldom
// enough to stay a small part of the day's bytes.
const (
	copySettle = time.Minute
	minCopy    = time.Hour
	maxCopy    = 24 * time.Hour
	copyShare  = 4 // copies may take a quarter of the day's bytes
)

// copyLoop keeps the good copy until the store is closed.
func (s *Store) copyLoop() {
	tick := time.NewTicker(copySettle)
	defer tick.Stop()
	var have, size uint64
	var last time.Time
	first := true
	for {
		select {
		case <-s.closing:
			return
		case <-tick.C:
		}
		if first {
			have, first = s.copiedContent(), false
		}
		s.mu.RLock()
		content := s.meta.Content
		s.mu.RUnlock()
		if content == have || !last.IsZero() && time.Since(last) < s.copyEvery(size) {
			continue
		}
		last = time.Now()
		n, of, err := s.copyGood()
		if err != nil {
			s.cfg.Log.Error("the store's last good copy could not be made; the older one stays", "error", err)
			continue
		}
		have, size = of, n
	}
}

// copyEvery is how long a copy of size stands at least.
func (s *Store) copyEvery(size uint64) time.Duration {
	share := s.cfg.BytesPerDay / copyShare
	if share == 0 {
		return minCopy
	}
	return min(max(time.Duration(float64(24*time.Hour)*float64(size)/float64(share)), minCopy), maxCopy)
}

// copyGood makes the last good copy anew and returns its size and the content
// it is of.
func (s *Store) copyGood() (size, content uint64, err error) {
	c := s.snapshot()
	good := goodPath(s.cfg.Path)
	if size, err = writeFresh(good+".new", s.sealer, c); err == nil {
		s.wear.add(ClassCopies, size)
		err = replace(good+".new", good)
	}
	if err != nil {
		return 0, 0, fmt.Errorf("store %s: copy to %s: %w", s.cfg.Path, good, err)
	}
	return size, c.meta.Content, nil
}

// copiedContent reads the copy whole and tells which content it is of; 0 when
// there is none that is good.
func (s *Store) copiedContent() uint64 {
	cfg := s.cfg
	cfg.Path = goodPath(cfg.Path)
	if _, err := os.Stat(cfg.Path); err != nil {
		return 0
	}
	c, err := load(cfg, s.sealer)
	if err != nil {
		s.cfg.Log.Warn("the store's last good copy is not good any more; it will be made anew", "error", err)
		return 0
	}
	defer c.db.Close()
	s.mu.RLock()
	defer s.mu.RUnlock()
	if c.meta.StoreID != s.meta.StoreID {
		return 0
	}
	return c.meta.Content
}
