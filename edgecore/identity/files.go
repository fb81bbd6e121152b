package identity

import (
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// Directories beside DataDir/identity that exist only while it changes.
const (
	newDir     = "identity.new"     // complete once it exists without .tmp
	oldDir     = "identity.old"     // the one just replaced
	pendingDir = "identity.pending" // the key of a join under way
	lockName   = "identity.lock"
)

// install makes m the identity on disk: a reader, or the next start after a
// power cut, finds the old one or the new one, never a mixture.
func install(dataDir string, m *material) error {
	files, err := m.files()
	if err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	if err := installFiles(dataDir, files); err != nil {
		return fmt.Errorf("identity: write %s: %w", filepath.Join(dataDir, dirName), explainWrite(err))
	}
	return nil
}

type file struct {
	name string
	mode fs.FileMode
	body []byte
}

func (m *material) files() ([]file, error) {
	metaJSON, err := json.MarshalIndent(m.meta, "", "  ")
	if err != nil {
		return nil, err
	}
	var cas []byte
	for _, ca := range m.cas {
		cas = append(cas, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw})...)
	}
	return []file{
		{keyFile, 0o600, m.keyPEM},
		{certFile, 0o644, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: m.cert.Leaf.Raw})},
		{caFile, 0o644, cas},
		{metaFile, 0o644, append(metaJSON, '\n')},
	}, nil
}

func installFiles(dataDir string, files []file) error {
	current, fresh := filepath.Join(dataDir, dirName), filepath.Join(dataDir, newDir)
	temp := fresh + ".tmp"
	for _, left := range []string{temp, fresh} {
		if err := os.RemoveAll(left); err != nil {
			return err
		}
	}
	if err := writeDir(temp, files); err != nil {
		return errors.Join(err, os.RemoveAll(temp))
	}
	if err := os.Rename(temp, fresh); err != nil {
		return err
	}
	if err := syncDir(dataDir); err != nil {
		return err
	}
	if err := swap(dataDir, current, fresh); err != nil {
		return err
	}
	if err := syncDir(dataDir); err != nil {
		return err
	}
	// What was replaced is only in the way from here on.
	return errors.Join(os.RemoveAll(fresh), os.RemoveAll(filepath.Join(dataDir, oldDir)))
}

// swap puts fresh where current is, in one step where the file system can.
func swap(dataDir, current, fresh string) error {
	if _, err := os.Lstat(current); errors.Is(err, fs.ErrNotExist) {
		return os.Rename(fresh, current)
	}
	err := unix.Renameat2(unix.AT_FDCWD, fresh, unix.AT_FDCWD, current, unix.RENAME_EXCHANGE)
	if err == nil {
		return nil
	}
	if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.ENOTSUP) {
		return &fs.PathError{Op: "exchange", Path: current, Err: err}
	}
	// Two steps then; finishInstall makes up for a power cut between them.
	old := filepath.Join(dataDir, oldDir)
	if err := os.RemoveAll(old); err != nil {
		return err
	}
	if err := os.Rename(current, old); err != nil {
		return err
	}
	return os.Rename(fresh, current)
}

// finishInstall completes a swap that a power cut left between its two steps.
func finishInstall(dataDir string) error {
	current, fresh := filepath.Join(dataDir, dirName), filepath.Join(dataDir, newDir)
	if _, err := os.Lstat(current); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if _, err := os.Lstat(filepath.Join(dataDir, oldDir)); err != nil {
		return nil // never installed: identity.new may stem from a join nobody saw succeed
	}
	err := os.Rename(fresh, current)
	if errors.Is(err, fs.ErrNotExist) {
		err = os.Rename(filepath.Join(dataDir, oldDir), current)
	}
	if err != nil {
		return fmt.Errorf("identity: finish the change of %s: %w", current, err)
	}
	return syncDir(dataDir)
}

// writeDir writes files into a new private directory and makes them durable.
func writeDir(dir string, files []file) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	for _, f := range files {
		if err := writeFile(filepath.Join(dir, f.name), f.mode, f.body); err != nil {
			return err
		}
	}
	return syncDir(dir)
}

// writeFile creates a file that must not exist and makes it durable.
func writeFile(path string, mode fs.FileMode, body []byte) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.Write(body); err != nil {
		return err
	}
	return f.Sync()
}

// replaceFile writes a file so that its old or its new content is there.
func replaceFile(path string, mode fs.FileMode, body []byte) error {
	temp := path + ".tmp"
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := writeFile(temp, mode, body); err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) (err error) {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	return d.Sync()
}

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	body, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(body) > maxFile {
		err = &fs.PathError{Op: "read", Path: path, Err: errors.New("larger than any file of an identity")}
	}
	return body, err
}

// lock keeps two processes from changing the identity at once. The kernel
// releases it when the process ends.
func lock(dataDir string) (release func(), err error) {
	path := filepath.Join(dataDir, lockName)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s is locked: another edgecore is joining or renewing; wait for it to end", path)
		}
		return nil, &fs.PathError{Op: "lock", Path: path, Err: err}
	}
	return func() { f.Close() }, nil
}

// explainWrite adds the way out to an error of writing below the data
// directory.
func explainWrite(err error) error {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w; run as root, or choose another directory with --data-dir", err)
	case errors.Is(err, syscall.EROFS):
		return fmt.Errorf("%w; remount it writable, or choose another directory with --data-dir", err)
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("%w; free some space, or choose another directory with --data-dir", err)
	}
	return fmt.Errorf("%w; choose another directory with --data-dir", err)
}
