package store

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// Reset removes a store: database, ledger, copies and key. The next Open makes a new,
// empty one; as it has not been synced, nobody is served pods from it before
// the cloud has delivered them all. keyFile may be empty as in Config. It fails
// with ErrLocked while an edgecore uses the store.
func Reset(path, keyFile string) error {
	cfg := Config{Path: path, KeyFile: keyFile}
	if err := cfg.setDefaults(); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Dir(path)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	lock, err := lockFile(path, cfg.LockTimeout)
	if err != nil {
		return err
	}
	defer lock.Close()
	// The ledger goes first: without it what is left is either whole or new.
	for _, p := range []string{ledgerPath(path), path, path + ".new", path + ".restore", goodPath(path), goodPath(path) + ".new", damagedPath(path), cfg.KeyFile} {
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("reset store: %w", err)
		}
	}
	return syncDir(filepath.Dir(path))
}

// Restore puts the copy at from in place of cfg's database, after checking it
// as Open would. The key file must be the one the copy was made with.
func Restore(cfg Config, from string) error {
	if err := cfg.setDefaults(); err != nil {
		return err
	}
	lock, err := lockFile(cfg.Path, cfg.LockTimeout)
	if err != nil {
		return err
	}
	defer lock.Close()
	sealer, err := openKey(cfg)
	if err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	staged := cfg
	staged.Path = cfg.Path + ".restore"
	if err := copyFile(staged.Path, from); err != nil {
		return fmt.Errorf("restore store from %s: %w", from, err)
	}
	s, err := load(staged, sealer)
	if err != nil {
		return errors.Join(fmt.Errorf("restore store from %s: %w", from, err), os.Remove(staged.Path))
	}
	if err := s.db.Close(); err != nil {
		return fmt.Errorf("restore store from %s: %w", from, err)
	}
	// The ledger goes first, so that it never says more than the store has.
	if err := removeIfThere(ledgerPath(cfg.Path)); err != nil {
		return fmt.Errorf("restore store: %w", err)
	}
	if err := replace(staged.Path, cfg.Path); err != nil {
		return fmt.Errorf("restore store: %w", err)
	}
	l := &ledger{path: ledgerPath(cfg.Path)}
	defer l.close()
	return l.write(s.meta, podsOf(s.tables["pods"]))
}

// Backup writes a consistent copy of the running store to a new file at to.
// Secrets in it stay encrypted with the store's key.
func (s *Store) Backup(to string) error {
	f, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("store %s: backup: %w", s.cfg.Path, err)
	}
	if err = f.Close(); err == nil {
		_, err = writeFresh(to, s.sealer, s.snapshot())
	}
	if err == nil {
		err = syncDir(filepath.Dir(to))
	}
	if err != nil {
		return fmt.Errorf("store %s: backup to %s: %w", s.cfg.Path, to, err)
	}
	return nil
}

// Check examines a store without changing, mending or starting it, for
// diagnosis. It needs the lock, so it fails with ErrLocked beside a running
// edgecore.
func Check(cfg Config) error {
	cfg.LockTimeout = max(cfg.LockTimeout, 100*time.Millisecond)
	if err := cfg.setDefaults(); err != nil {
		return err
	}
	lock, err := lockFile(cfg.Path, cfg.LockTimeout)
	if err != nil {
		return err
	}
	defer lock.Close()
	l, said, bad, err := openLedger(cfg.Path)
	if err != nil {
		return err
	}
	defer l.close()
	if bad != nil {
		return damaged(cfg.Path, bad)
	}
	if _, err := os.Stat(cfg.Path); errors.Is(err, fs.ErrNotExist) && said == nil {
		return nil // there never was one
	}
	sealer, err := openKey(cfg)
	if err != nil {
		return err
	}
	s, err := loadChecked(cfg, sealer, said)
	if err != nil {
		return err
	}
	return s.db.Close()
}

func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	if err == nil {
		err = out.Sync()
	}
	if cerr := out.Close(); err == nil {
		err = cerr
	}
	return err
}
