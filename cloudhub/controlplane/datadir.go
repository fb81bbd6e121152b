package controlplane

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// maxSocketPath is sun_path's size less its terminating zero (unix(7)).
const maxSocketPath = 107

// dataDir is an opened, locked data directory.
type dataDir struct {
	path    string
	runtime string
	lock    *os.File
}

func (d *dataDir) pki() string    { return filepath.Join(d.path, "pki") }
func (d *dataDir) etcd() string   { return filepath.Join(d.path, "etcd") }
func (d *dataDir) socket() string { return etcdSocket(d.runtime) }

func etcdSocket(runtimeDir string) string { return filepath.Join(runtimeDir, "etcd.sock") }

func checkSocketPath(path string) error {
	if len(path) <= maxSocketPath {
		return nil
	}
	return fmt.Errorf("control plane: etcd's socket path %s is %d bytes long, %d is the limit of unix sockets; choose a shorter data directory, or a short runtime directory such as /run/skerry",
		path, len(path), maxSocketPath)
}

// openDataDir makes the directories and takes the lock that keeps a second
// hub out: two etcds on one directory would destroy it.
func openDataDir(cfg Config) (*dataDir, error) {
	d := &dataDir{path: cfg.DataDir, runtime: cfg.RuntimeDir}
	for _, dir := range []string{d.path, d.pki(), d.etcd(), d.runtime} {
		if err := privateDir(dir); err != nil {
			return nil, err
		}
	}
	path := filepath.Join(d.path, "lock")
	lock, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, notWritable(d.path, err)
	}
	// The kernel lets go of the lock when the process ends, however it ends.
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		defer lock.Close()
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("control plane: lock %s: %w", path, err)
		}
		holder := "another cloudhub"
		if pid, _ := io.ReadAll(io.LimitReader(lock, 20)); len(pid) > 0 {
			holder += " (process " + strings.TrimSpace(string(pid)) + ")"
		}
		return nil, fmt.Errorf("control plane: data directory %s is in use by %s; stop it, or choose another data directory", d.path, holder)
	}
	d.lock = lock
	err = lock.Truncate(0)
	if err == nil {
		_, err = fmt.Fprintln(lock, os.Getpid())
	}
	if err != nil {
		lock.Close()
		return nil, notWritable(d.path, err)
	}
	return d, nil
}

// Close lets another plane have the directory.
func (d *dataDir) Close() error { return d.lock.Close() }

// privateDir makes a directory that only its owner can enter, and closes one
// that others could.
func privateDir(path string) error {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return notWritable(path, err)
	}
	if err := os.Chmod(path, 0o700); err != nil {
		return notWritable(path, err)
	}
	return nil
}

func notWritable(path string, err error) error {
	return fmt.Errorf("control plane: data directory %s cannot be written: %w; run as its owner or root, or choose another data directory", path, err)
}

// listen opens the API server's port.
func listen(ctx context.Context, addr string) (net.Listener, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", addr)
	if err == nil {
		return l, nil
	}
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("control plane: API server address %s is in use by another program; stop it, or choose another API server address", addr)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return nil, fmt.Errorf("control plane: API server address %s is not an address of this machine; choose one of its own, or :port for all", addr)
	case errors.Is(err, syscall.EACCES):
		return nil, fmt.Errorf("control plane: API server address %s needs more rights: %w; run as root or choose a port above 1023", addr, err)
	}
	return nil, fmt.Errorf("control plane: listen for the API server on %s: %w", addr, err)
}

// writeFile replaces path as a whole: after a power cut there is the old
// content or the new one. Unchanged content is not written.
func writeFile(path string, data []byte, mode os.FileMode) error {
	if old, err := os.ReadFile(path); err == nil && string(old) == string(data) {
		return os.Chmod(path, mode)
	}
	dir := filepath.Dir(path)
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(path)+"-")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name()) // fails once renamed
	_, err = tmp.Write(data)
	if err == nil {
		err = tmp.Chmod(mode)
	}
	if err == nil {
		err = tmp.Sync()
	}
	if e := tmp.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return err
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
