package twindb

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"
)

const (
	format      = 1
	stateBucket = "_state"
	stateKey    = "state"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// state is the record that every transaction writes. By Counts a reader knows
// that nothing is missing.
type state struct {
	Format      int            `json:"format"`
	Incarnation string         `json:"incarnation"`
	Epoch       uint64         `json:"epoch"`
	Seq         uint64         `json:"seq"` // of the transaction
	Counts      map[string]int `json:"counts"`
}

func (s state) encode() []byte {
	b, err := json.Marshal(s)
	if err != nil {
		panic(err) // numbers and strings
	}
	return b
}

func decodeState(b []byte) (state, error) {
	var s state
	if err := json.Unmarshal(b, &s); err != nil {
		return state{}, fmt.Errorf("state record: %w", err)
	}
	if s.Format != format {
		return state{}, fmt.Errorf("state record: format %d; this edgecore reads %d", s.Format, format)
	}
	if len(s.Incarnation) != 16 {
		return state{}, fmt.Errorf("state record: incarnation %.40q", s.Incarnation)
	}
	if s.Counts == nil {
		s.Counts = map[string]int{}
	}
	return s, nil
}

// seal puts a checksum of a record and of where it belongs before its value.
func seal(s slot, value []byte) []byte {
	b := make([]byte, 4, 4+len(value))
	binary.LittleEndian.PutUint32(b, checksum(s, value))
	return append(b, value...)
}

func unseal(s slot, b []byte) ([]byte, error) {
	if len(b) < 4 {
		return nil, fmt.Errorf("bucket %s, key %q: record is cut off", s.bucket, s.key)
	}
	if binary.LittleEndian.Uint32(b) != checksum(s, b[4:]) {
		return nil, fmt.Errorf("bucket %s, key %q: checksum mismatch", s.bucket, s.key)
	}
	return b[4:], nil
}

func checksum(s slot, value []byte) uint32 {
	c := crc32.Checksum([]byte(s.bucket), castagnoli)
	c = crc32.Update(c, castagnoli, []byte{0})
	c = crc32.Update(c, castagnoli, []byte(s.key))
	c = crc32.Update(c, castagnoli, []byte{0})
	return crc32.Update(c, castagnoli, value)
}

func boltOptions() *bolt.Options {
	// The freelist is rebuilt at open from the pages in use; not writing it
	// saves a page or more per commit.
	return &bolt.Options{Timeout: time.Second, NoFreelistSync: true, FreelistType: bolt.FreelistMapType}
}

// guard turns what bbolt panics over, and faults in its mapping, into errors.
func guard(fn func() error) (err error) {
	old := debug.SetPanicOnFault(true)
	defer func() {
		debug.SetPanicOnFault(old)
		if r := recover(); r != nil {
			err = fmt.Errorf("bbolt: %v", r)
		}
	}()
	return fn()
}

// writeFresh makes a file at path, on disk when it returns, and tells how many
// bytes that took. On an error nothing is left at path.
func writeFresh(path string, st state, all records) (written uint64, err error) {
	if err := removeIfThere(path); err != nil {
		return 0, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, removeIfThere(path))
		}
	}()
	st.Counts = map[string]int{}
	for s := range all {
		st.Counts[s.bucket]++
	}
	opts := boltOptions()
	opts.NoSync = true // once, at the end
	err = guard(func() error {
		db, err := bolt.Open(path, 0o600, opts)
		if err != nil {
			return err
		}
		// Twice, so that each of the two meta pages tells of all records.
		err = db.Update(func(tx *bolt.Tx) error { return put(tx, all, st) })
		if err == nil {
			err = db.Update(func(tx *bolt.Tx) error { return put(tx, nil, st) })
		}
		if err == nil {
			err = db.View(func(tx *bolt.Tx) error { written = uint64(tx.Size()); return nil })
		}
		if err == nil {
			err = db.Sync()
		}
		return errors.Join(err, db.Close())
	})
	return written, err
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

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func goodPath(path string) string    { return path + ".good" }
func corruptPath(path string) string { return path + ".corrupt" }
func identPath(path string) string   { return path + ".epoch" }

// lockFile keeps other processes out. It is a file of its own, since the
// database itself is replaced.
func lockFile(path string, timeout time.Duration) (*os.File, error) {
	f, err := os.OpenFile(path+".lock", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("twin database %s: %w", path, err)
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
			return nil, fmt.Errorf("twin database %s: lock: %w", path, err)
		}
		select {
		case <-again.C:
		case <-deadline.C:
			f.Close()
			return nil, fmt.Errorf("twin database %s is %w: stop it first, or give this one another data directory", path, ErrLocked)
		}
	}
}
