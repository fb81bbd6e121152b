package store

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"
)

const format = 1

var keyCheck = []byte("keycheck")

func (c *Config) setDefaults() error {
	if c.Path == "" {
		return errors.New("store: Path is required")
	}
	if c.KeyFile == "" {
		c.KeyFile = c.Path + ".key"
	}
	if c.History <= 0 {
		c.History = 256
	}
	if c.MaxEvents <= 0 {
		c.MaxEvents = 512
	}
	if c.LockTimeout <= 0 {
		c.LockTimeout = 2 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}

// damaged is the error for anything on disk that cannot be trusted.
func damaged(path string, cause error) error {
	return fmt.Errorf("store %s is %w: %w; put back a copy with `edgecore reset --restore COPY`, or run `edgecore reset --keep-identity` and let the node fetch its objects from the cloud again", path, ErrDamaged, cause)
}

// Open loads the store at cfg.Path, or makes a new one where there never was
// one. It holds a lock until Close.
func Open(cfg Config) (*Store, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(cfg.Path), 0o700); err != nil {
		return nil, fmt.Errorf("store %s: %w", cfg.Path, err)
	}
	lock, err := lockFile(cfg.Path, cfg.LockTimeout)
	if err != nil {
		return nil, err
	}
	s, err := open(cfg)
	if err != nil {
		lock.Close()
		return nil, err
	}
	s.lock = lock
	return s, nil
}

func open(cfg Config) (*Store, error) {
	mark, err := readMarker(cfg.Path)
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(cfg.Path)
	isNew := errors.Is(err, fs.ErrNotExist) || err == nil && info.Size() == 0
	if err != nil && !isNew {
		return nil, fmt.Errorf("store %s: %w", cfg.Path, err)
	}
	var key []byte
	if isNew {
		if mark != nil && mark.Pods {
			return nil, damaged(cfg.Path, errors.New("the file is missing or empty, though it held pods"))
		}
		if key, err = readOrMakeKey(cfg.KeyFile); err != nil {
			return nil, fmt.Errorf("store %s: %w", cfg.Path, err)
		}
		if err := create(cfg.Path, key); err != nil {
			return nil, fmt.Errorf("store %s: create: %w", cfg.Path, err)
		}
		mark = nil
	} else if key, err = readKey(cfg.KeyFile); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("store %s: its key file %s is missing, so its secrets cannot be read; put the key file back, or run `edgecore reset --keep-identity`", cfg.Path, cfg.KeyFile)
		}
		return nil, fmt.Errorf("store %s: %w", cfg.Path, err)
	}
	s, err := load(cfg, key)
	if err != nil {
		return nil, err
	}
	if err := s.checkMarker(mark); err != nil {
		s.db.Close()
		return nil, err
	}
	s.start()
	return s, nil
}

func (s *Store) checkMarker(mark *marker) error {
	pods := s.count("pods") > 0
	switch {
	case mark == nil: // new, or an older copy put back without it
	case mark.StoreID != s.storeID:
		return damaged(s.cfg.Path, errors.New("it is not the database its marker file belongs to"))
	case mark.Pods && !pods:
		return damaged(s.cfg.Path, errors.New("it holds no pods, though its marker file says it did"))
	}
	if mark != nil {
		s.marker = *mark
	}
	if mark != nil && mark.Pods == pods {
		return nil
	}
	return s.writeMarker(pods)
}

// lockFile keeps other processes out. It is a file of its own, so that the
// database can be examined before bbolt opens it.
func lockFile(path string, timeout time.Duration) (*os.File, error) {
	f, err := os.OpenFile(path+".lock", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("store %s: %w", path, err)
	}
	deadline := time.NewTimer(timeout)
	defer deadline.Stop()
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			f.Close()
			return nil, fmt.Errorf("store %s: lock: %w", path, err)
		}
		select {
		case <-again.C:
		case <-deadline.C:
			f.Close()
			return nil, fmt.Errorf("store %s is %w: stop it first, or give this one another data directory", path, ErrLocked)
		}
	}
}

func boltOptions(timeout time.Duration) *bolt.Options {
	// The freelist is rebuilt at open from the pages in use; not writing it
	// saves a page or more per commit.
	return &bolt.Options{Timeout: timeout, NoFreelistSync: true, FreelistType: bolt.FreelistMapType}
}

// create makes the file under another name, so that a file at path is always whole.
func create(path string, key []byte) error {
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	sealer, err := newSealer(key)
	if err != nil {
		return err
	}
	db, err := bolt.Open(tmp, 0o600, boltOptions(time.Second))
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bolt.Tx) error {
		for _, name := range allBuckets() {
			if _, err := tx.CreateBucket(name); err != nil {
				return err
			}
		}
		b := tx.Bucket(bucketMeta)
		check, err := sealer.seal("keycheck", nil, keyCheck)
		if err != nil {
			return err
		}
		if err := b.Put(keyCheck, check); err != nil {
			return err
		}
		return putMeta(b, metaRecord{Format: format, StoreID: rand.Text(), RV: 1})
	})
	if cerr := db.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return syncDir(filepath.Dir(path))
}

func putMeta(b *bolt.Bucket, m metaRecord) error {
	p, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return b.Put([]byte("state"), frame(bucketMeta, []byte("state"), p))
}

// load reads the whole file into a Store that is not started yet.
func load(cfg Config, key []byte) (s *Store, err error) {
	if err := preflight(cfg.Path); err != nil {
		return nil, damaged(cfg.Path, err)
	}
	sealer, err := newSealer(key)
	if err != nil {
		return nil, fmt.Errorf("store %s: %w", cfg.Path, err)
	}
	s = newStore(cfg, sealer)
	if err := s.openBolt(); err != nil {
		return nil, err
	}
	if err := s.readAll(); err != nil {
		s.db.Close()
		return nil, err
	}
	return s, nil
}

// guard turns what bbolt panics over, and faults in its mapping, into damage.
func (s *Store) guard(fn func() error) (err error) {
	old := debug.SetPanicOnFault(true)
	defer func() {
		debug.SetPanicOnFault(old)
		if r := recover(); r != nil {
			err = damaged(s.cfg.Path, fmt.Errorf("%v", r))
		}
	}()
	return fn()
}

func (s *Store) openBolt() error {
	return s.guard(func() error {
		db, err := bolt.Open(s.cfg.Path, 0o600, boltOptions(s.cfg.LockTimeout))
		switch {
		case errors.Is(err, bolt.ErrTimeout):
			return fmt.Errorf("store %s is %w: stop it first, or give this one another data directory", s.cfg.Path, ErrLocked)
		case errors.Is(err, bolt.ErrInvalid), errors.Is(err, bolt.ErrVersionMismatch), errors.Is(err, bolt.ErrChecksum):
			return damaged(s.cfg.Path, err)
		case err != nil:
			return fmt.Errorf("store %s: open: %w", s.cfg.Path, err)
		}
		s.db = db
		return nil
	})
}

func (s *Store) readAll() error {
	return s.guard(func() error {
		return s.db.View(func(tx *bolt.Tx) error {
			var first error
			for err := range tx.Check() {
				if first == nil {
					first = err
				}
			}
			if first == nil {
				first = s.decode(tx)
			}
			if first != nil {
				return damaged(s.cfg.Path, first)
			}
			return nil
		})
	})
}

func (s *Store) decode(tx *bolt.Tx) error {
	for _, name := range allBuckets() {
		if tx.Bucket(name) == nil {
			return fmt.Errorf("bucket %q is missing", name)
		}
	}
	meta := tx.Bucket(bucketMeta)
	p, err := unframe(bucketMeta, []byte("state"), meta.Get([]byte("state")))
	if err != nil {
		return fmt.Errorf("meta record: %w", err)
	}
	var m metaRecord
	if err := json.Unmarshal(p, &m); err != nil {
		return fmt.Errorf("meta record: %w", err)
	}
	if m.Format != format {
		return fmt.Errorf("format %d is not this program's (%d)", m.Format, format)
	}
	if _, err := s.sealer.open("keycheck", nil, meta.Get(keyCheck)); err != nil {
		return fmt.Errorf("key file %s is not the one this store was made with", s.cfg.KeyFile)
	}
	s.storeID, s.epoch = m.StoreID, m.Epoch
	s.rv, s.startRV, s.reserved = m.RV, m.RV, m.RV
	s.disk = m.Counts
	s.outbox.lastID = m.Outbox

	var got counts
	err = tx.Bucket(bucketObjects).ForEach(func(k, v []byte) error {
		o, err := s.sealer.decodeObject(bucketObjects, k, v)
		if err != nil {
			return err
		}
		got.Objects++
		s.table(o.Resource).objects[o.Key] = o
		return nil
	})
	if err != nil {
		return err
	}
	err = tx.Bucket(bucketParked).ForEach(func(k, v []byte) error {
		o, err := s.sealer.decodeObject(bucketParked, k, v)
		if err != nil {
			return err
		}
		got.Parked++
		s.parked[o.Key] = o
		return nil
	})
	if err != nil {
		return err
	}
	err = tx.Bucket(bucketOutbox).ForEach(func(k, v []byte) error {
		e, err := decodeOutbox(k, v)
		if err != nil {
			return err
		}
		got.Outbox++
		s.outbox.insertLocked(e)
		if e.op == OpDelete {
			s.gone.add(e.uid)
		}
		return nil
	})
	if err != nil {
		return err
	}
	err = tx.Bucket(bucketPrivate).ForEach(func(k, v []byte) error {
		pk, pv, err := s.sealer.decodePrivate(k, v)
		if err != nil {
			return err
		}
		got.Private++
		s.private[pk] = pv
		return nil
	})
	if err != nil {
		return err
	}
	if got != m.Counts {
		return fmt.Errorf("it holds %+v, the last commit left %+v", got, m.Counts)
	}
	return nil
}

// Close ends all watches and waits for the write under way.
func (s *Store) Close() error {
	s.closeOnce.Do(func() {
		close(s.closing)
		<-s.stopped
		s.closeErr = errors.Join(s.db.Close(), s.lock.Close())
	})
	return s.closeErr
}

// WaitSynced returns when a complete first sync has been committed.
func (s *Store) WaitSynced(ctx context.Context) error {
	for {
		s.mu.RLock()
		synced, changed := s.epoch != "", s.syncChanged
		s.mu.RUnlock()
		if synced {
			return nil
		}
		select {
		case <-changed:
		case <-s.closing:
			return ErrClosed
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
