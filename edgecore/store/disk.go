package store

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"
)

// ErrDisk: the disk did not take a write. Nothing of it was done; the store goes
// on from memory, and takes writes again as soon as the disk does.
var ErrDisk = errors.New("the disk does not take it")

const (
	minHeal = time.Second
	maxHeal = time.Minute
)

// Trouble is what is wrong with the disk.
type Trouble struct {
	Error string    `json:"error"`
	Since time.Time `json:"since"`
}

// Trouble tells why the disk takes no writes; nil while it does.
func (s *Store) Trouble() *Trouble {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.trouble == nil {
		return nil
	}
	t := *s.trouble
	return &t
}

// noteDisk keeps what became of the last commit, and tells when that changes.
func (s *Store) noteDisk(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case err == nil && s.trouble != nil:
		s.cfg.Log.Info("the disk takes writes again", "store", s.cfg.Path, "after", time.Since(s.trouble.Since).Round(time.Millisecond))
		s.trouble = nil
	case err != nil && s.trouble == nil:
		s.cfg.Log.Error("the disk takes no writes; pods keep running from memory, and no write is acknowledged until it does", "error", err)
		s.trouble = &Trouble{Error: err.Error(), Since: time.Now()}
	case err != nil:
		s.trouble.Error = err.Error()
	}
}

// breakOff notes that the file may hold a commit that was not acknowledged, or
// pages that only the page cache has: after a failed sync the kernel forgets
// what it could not write. Nothing is built on such a file.
func (s *Store) breakOff(err error) {
	s.broken = err
	s.healAt, s.healWait = time.Now(), minHeal
	s.healer.Reset(s.healWait)
}

// inPlace tells whether the database is still the file at its path. One that was
// removed or replaced, or whose file system was mounted anew, would take writes
// that nobody finds after a restart.
func (s *Store) inPlace() bool {
	if s.db == nil {
		return false
	}
	info, err := os.Stat(s.cfg.Path)
	return err == nil && os.SameFile(info, s.file)
}

// heal makes a database whose state is unknown anew from memory, in blocks of
// its own. It tries at once and then with a wait that doubles.
func (s *Store) heal() error {
	if s.broken == nil {
		if s.inPlace() {
			return nil
		}
		s.breakOff(fmt.Errorf("store %s: %w: the file was removed or replaced", s.cfg.Path, ErrDisk))
	}
	if time.Now().Before(s.healAt) {
		return s.broken
	}
	if err := s.remake(); err != nil {
		s.broken = fmt.Errorf("store %s: made anew: %w: %w", s.cfg.Path, ErrDisk, err)
		s.healAt = time.Now().Add(s.healWait)
		s.healer.Reset(s.healWait)
		s.healWait = min(2*s.healWait, maxHeal)
		return s.broken
	}
	s.cfg.Log.Warn("the store was made anew from memory", "store", s.cfg.Path, "error", s.broken)
	s.broken = nil
	return nil
}

func (s *Store) remake() error {
	c := s.snapshot()
	c.meta.Seq += 2 // past what the failed commit may have left
	n, err := writeFresh(s.cfg.Path+".new", s.sealer, c)
	if err != nil {
		return err
	}
	s.wear.add(ClassCopies, n)
	if err := replace(s.cfg.Path+".new", s.cfg.Path); err != nil {
		return err
	}
	if s.db != nil {
		if err := s.guard(s.db.Close); err != nil {
			s.cfg.Log.Debug("the old database did not close", "error", err)
		}
		s.db = nil
	}
	s.ledger.close() // made anew with the next write
	if err := s.openBolt(); err != nil {
		return err
	}
	m, err := s.metaOnDisk()
	if err != nil {
		return err
	}
	s.filed = filed{}
	for _, e := range c.events {
		s.filed[e.id] = e.gen
	}
	s.mu.Lock()
	s.meta = m
	s.mu.Unlock()
	return nil
}

// metaOnDisk reads the meta record.
func (s *Store) metaOnDisk() (m metaRecord, err error) {
	err = s.guard(func() error {
		return s.db.View(func(tx *bolt.Tx) error {
			m, err = decodeMeta(tx.Bucket(bucketMeta).Get(stateKey))
			return err
		})
	})
	return m, err
}

// diskUnchanged tells whether the file still holds the last good commit: after
// a failed sync bbolt may go on from the failed one, which memory does not have.
func (s *Store) diskUnchanged() bool {
	m, err := s.metaOnDisk()
	return err == nil && m.Seq == s.meta.Seq
}

// reserved is room in the file that is set aside on disk, so that a full disk
// stops new objects before it stops statuses and deletions.
const reserved = 256 << 10

// reserve sets room aside when less than that is free in the file. A disk that
// is full already has none to give; the next commit asks again.
func (s *Store) reserve() {
	if time.Now().Before(s.reserveAt) {
		return
	}
	var high int64
	if err := s.db.View(func(tx *bolt.Tx) error { high = tx.Size(); return nil }); err != nil {
		return
	}
	info, err := os.Stat(s.cfg.Path)
	if err != nil {
		return
	}
	page := int64(s.db.Info().PageSize)
	size := info.Size()
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		size = min(size, st.Blocks*512) // holes are no room
	}
	if size-high+int64(s.db.Stats().FreePageN)*page >= reserved {
		return
	}
	if err := allocate(s.cfg.Path, high+2*reserved); err != nil {
		s.reserveAt = time.Now().Add(time.Minute)
		s.cfg.Log.Debug("no room set aside in the store", "error", err)
	}
}

// allocate gives the file at path room on disk up to size.
func allocate(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	err = syscall.Fallocate(int(f.Fd()), 0, 0, size)
	if err != nil {
		return err // some file systems cannot
	}
	return f.Sync()
}
