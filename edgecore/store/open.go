package store

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
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
	if c.FlushAfter <= 0 {
		c.FlushAfter = 10 * time.Minute
	}
	if c.LockTimeout <= 0 {
		c.LockTimeout = 2 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}

// damage is the error for anything on disk that cannot be trusted.
type damage struct {
	path  string
	cause error
}

func damaged(path string, cause error) error { return &damage{path, cause} }

func (d *damage) Error() string {
	return fmt.Sprintf("store %s is %v: %v; put back a copy with `edgecore reset --restore COPY`, or run `edgecore reset --keep-identity` and let the node fetch its objects from the cloud again", d.path, ErrDamaged, d.cause)
}

func (d *damage) Unwrap() []error { return []error{ErrDamaged, d.cause} }

// cause is what is wrong, without the way out.
func cause(err error) error {
	var d *damage
	if errors.As(err, &d) {
		return d.cause
	}
	return err
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
	ledger, said, bad, err := openLedger(cfg.Path)
	if err != nil {
		return nil, err
	}
	s, err := openWith(cfg, ledger, said, bad)
	if err != nil {
		ledger.close()
		return nil, err
	}
	return s, nil
}

func openWith(cfg Config, ledger *ledger, said *ledgerPage, bad error) (*Store, error) {
	info, err := os.Stat(cfg.Path)
	missing := errors.Is(err, fs.ErrNotExist) || err == nil && info.Size() == 0
	if err != nil && !missing {
		return nil, fmt.Errorf("store %s: %w", cfg.Path, err)
	}
	if missing && said == nil {
		if bad != nil {
			return nil, damaged(cfg.Path, fmt.Errorf("the file is missing or empty, and its ledger of pods is unreadable: %w", bad))
		}
		if err := makeNew(cfg); err != nil {
			return nil, err
		}
		missing = false
	}
	sealer, err := openKey(cfg)
	if err != nil {
		return nil, err
	}
	var s *Store
	if missing {
		err = damaged(cfg.Path, errors.New("the file is missing or empty"))
	} else if s, err = loadChecked(cfg, sealer, said); errors.Is(err, errForeign) {
		return nil, err
	}
	var mended *Mended
	if errors.Is(err, ErrDamaged) {
		why := cause(err)
		if mended, err = mend(cfg, sealer, said, why); err != nil {
			return nil, damaged(cfg.Path, fmt.Errorf("%w; it cannot be mended: %w", why, err))
		}
		s, err = loadChecked(cfg, sealer, said)
	}
	if err != nil {
		return nil, err
	}
	s.ledger, s.mended = ledger, mended
	if bad != nil {
		cfg.Log.Warn("the store's ledger of pods was unreadable; it is made anew from the store, which is whole", "store", cfg.Path, "error", bad)
	}
	if mended != nil {
		cfg.Log.Error("THE STORE WAS DAMAGED and has been mended; what is old in it the next sync brings up to date",
			"store", cfg.Path, "cause", mended.Cause, "pods", mended.Pods, "objects", mended.Objects, "missing", mended.Missing, "aside", mended.Aside)
	}
	if !s.ledger.says(s.meta, s.pods) {
		if err := s.ledger.write(s.meta, s.pods); err != nil {
			s.db.Close()
			return nil, fmt.Errorf("store %s: %w", cfg.Path, err)
		}
		s.wear.add(ClassLedger, s.ledger.lastWrite)
	}
	s.outbox.boundLocked() // nobody else is here yet
	s.reserve()
	s.start()
	return s, nil
}

// makeNew makes an empty store where there never was one.
func makeNew(cfg Config) error {
	key, err := readOrMakeKey(cfg.KeyFile)
	if err != nil {
		return fmt.Errorf("store %s: %w", cfg.Path, err)
	}
	sealer, err := newSealer(key)
	if err != nil {
		return fmt.Errorf("store %s: %w", cfg.Path, err)
	}
	fresh := contents{meta: metaRecord{Format: format, StoreID: rand.Text(), RV: 1}}
	if _, err = writeFresh(cfg.Path+".new", sealer, fresh); err == nil {
		err = replace(cfg.Path+".new", cfg.Path)
	}
	if err != nil {
		return fmt.Errorf("store %s: create: %w", cfg.Path, err)
	}
	return nil
}

func openKey(cfg Config) (*sealer, error) {
	key, err := readKey(cfg.KeyFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("store %s: its key file %s is missing, so its secrets cannot be read; put the key file back, or run `edgecore reset --keep-identity`", cfg.Path, cfg.KeyFile)
	}
	if err != nil {
		return nil, fmt.Errorf("store %s: %w", cfg.Path, err)
	}
	sealer, err := newSealer(key)
	if err != nil {
		return nil, fmt.Errorf("store %s: %w", cfg.Path, err)
	}
	return sealer, nil
}

var errForeign = errors.New("it is not the database its ledger of pods belongs to")

// loadChecked loads the database and holds it against its ledger.
func loadChecked(cfg Config, sealer *sealer, said *ledgerPage) (*Store, error) {
	s, err := load(cfg, sealer)
	if err != nil {
		return nil, err
	}
	s.pods = podsOf(s.tables["pods"])
	if err := s.checkLedger(said); err != nil {
		return nil, errors.Join(damaged(cfg.Path, err), s.db.Close())
	}
	return s, nil
}

func (s *Store) checkLedger(said *ledgerPage) error {
	if said == nil { // an older copy put back without it
		return nil
	}
	if said.StoreID != s.meta.StoreID {
		return errForeign
	}
	if s.meta.Seq < said.Seq {
		return fmt.Errorf("it is older than it was: of %d commits it has %d", said.Seq, s.meta.Seq)
	}
	missing := podSet{}
	for uid, note := range said.Pods {
		if _, ok := s.pods[uid]; !ok {
			missing[uid] = note
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("pods are missing from it: %s", missing.names())
	}
	return nil
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

// load reads the whole file into a Store that is not started yet.
func load(cfg Config, sealer *sealer) (s *Store, err error) {
	if err := preflight(cfg.Path); err != nil {
		return nil, damaged(cfg.Path, err)
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
		if s.file, err = os.Stat(s.cfg.Path); err != nil {
			return fmt.Errorf("store %s: open: %w", s.cfg.Path, err)
		}
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
	m, err := decodeMeta(meta.Get(stateKey))
	if err != nil {
		return err
	}
	if _, err := s.sealer.open("keycheck", nil, meta.Get(keyCheck)); err != nil {
		return fmt.Errorf("key file %s is not the one this store was made with", s.cfg.KeyFile)
	}
	s.meta = m
	s.epoch = m.Epoch
	s.rv, s.startRV = m.RV, m.RV
	s.outbox.lastID, s.outbox.highest = m.Outbox, m.Outbox
	s.outbox.drops = m.Dropped

	var got counts
	var untolds []*Object
	err = tx.Bucket(bucketObjects).ForEach(func(k, v []byte) error {
		o, untold, err := s.sealer.decodeObject(bucketObjects, k, v)
		if err != nil {
			return err
		}
		got.Objects++
		s.table(o.Resource).objects[o.Key] = o
		if untold {
			untolds = append(untolds, o)
		}
		return nil
	})
	if err != nil {
		return err
	}
	err = tx.Bucket(bucketParked).ForEach(func(k, v []byte) error {
		o, _, err := s.sealer.decodeObject(bucketParked, k, v)
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
	slices.SortFunc(untolds, func(a, b *Object) int { return cmp.Compare(a.RV, b.RV) })
	for _, o := range untolds {
		id := entryID{o.Key, o.UID, OpStatus}
		if s.outbox.byID[id] == nil {
			s.outbox.lastID++
			s.outbox.insertLocked(&entry{entryID: id, id: s.outbox.lastID})
		}
	}
	err = tx.Bucket(bucketEvents).ForEach(func(k, v []byte) error {
		e, err := decodeEvent(k, v)
		if err != nil {
			return err
		}
		got.Events++
		s.table("events").objects[e.key] = &Object{Key: e.key, UID: e.uid, RV: e.rv, Body: bytes.Clone(e.body)}
		s.outbox.insertLocked(&entry{entryID: entryID{e.key, e.uid, OpEvent}, id: e.id})
		s.filed[e.id] = 0
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
		s.ledger.close()
		if s.db != nil {
			s.closeErr = s.db.Close()
		}
		s.closeErr = errors.Join(s.closeErr, s.lock.Close())
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
