package machine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	cgroupMount  = "/sys/fs/cgroup"
	cgroupPrefix = "/skerry-"
)

// CgroupRoot returns the cgroup that the machine's containers belong below:
// what the kubelet takes as its cgroup root.
func (m *Machine) CgroupRoot() string { return cgroupPrefix + m.cfg.Name }

// cgroupV2 tells whether the host has the unified hierarchy alone.
func cgroupV2() (bool, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(cgroupMount, &st); err != nil {
		return false, fmt.Errorf("statfs %s: %w", cgroupMount, err)
	}
	return st.Type == unix.CGROUP2_SUPER_MAGIC, nil
}

// cgroupHierarchies returns the mount points of every cgroup hierarchy: one on
// a v2 host; each controller, systemd's named one and the unified one
// otherwise.
func cgroupHierarchies() ([]string, error) {
	v2, err := cgroupV2()
	if err != nil {
		return nil, err
	}
	if v2 {
		return []string{cgroupMount}, nil
	}
	mounts, err := readMounts("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var found []string
	for _, mt := range mounts {
		if (mt.fstype == "cgroup" || mt.fstype == "cgroup2") && strings.HasPrefix(mt.point, cgroupMount+"/") {
			found = append(found, mt.point)
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("no cgroup hierarchy is mounted below %s; containers need one", cgroupMount)
	}
	return found, nil
}

func (m *Machine) makeCgroups() error {
	hierarchies, err := cgroupHierarchies()
	if err != nil {
		return fmt.Errorf("machine %s: %w", m.cfg.Name, err)
	}
	for _, h := range hierarchies {
		if err := makeCgroup(h, m.CgroupRoot()); err != nil {
			return fmt.Errorf("machine %s: make cgroup %s: %w", m.cfg.Name, m.CgroupRoot(), err)
		}
	}
	return nil
}

func makeCgroup(hierarchy, path string) error {
	dir := filepath.Join(hierarchy, path)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if _, err := os.Stat(filepath.Join(dir, "cgroup.controllers")); err == nil && hierarchy == cgroupMount {
		return delegate(hierarchy)
	}
	// A v1 cpuset takes no process before it has been given cpus and mems.
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		have, err := os.ReadFile(filepath.Join(dir, file))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if len(bytes.TrimSpace(have)) > 0 {
			continue
		}
		inherit, err := os.ReadFile(filepath.Join(hierarchy, file))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, file), inherit, 0); err != nil {
			return err
		}
	}
	return nil
}

// delegate hands the controllers that pods need from the root of the unified
// hierarchy to its children. On most hosts systemd has done so.
func delegate(root string) error {
	available, err := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
	if err != nil {
		return err
	}
	enabled, err := os.ReadFile(filepath.Join(root, "cgroup.subtree_control"))
	if err != nil {
		return err
	}
	for _, c := range []string{"cpu", "cpuset", "memory", "pids", "io", "hugetlb"} {
		if !hasWord(available, c) || hasWord(enabled, c) {
			continue
		}
		err := os.WriteFile(filepath.Join(root, "cgroup.subtree_control"), []byte("+"+c), 0)
		if err != nil {
			return fmt.Errorf("enable controller %s: %w (in a container, processes must leave its root cgroup first)", c, err)
		}
	}
	return nil
}

func hasWord(text []byte, word string) bool {
	for _, f := range bytes.Fields(text) {
		if string(f) == word {
			return true
		}
	}
	return false
}

// removeCgroups removes the machine's cgroups, all of them empty by now or
// soon: the kernel lets a dead process go from its cgroup a little later.
func (m *Machine) removeCgroups(ctx context.Context) error {
	hierarchies, err := cgroupHierarchies()
	if err != nil {
		return fmt.Errorf("machine %s: %w", m.cfg.Name, err)
	}
	for _, h := range hierarchies {
		dir := filepath.Join(h, m.CgroupRoot())
		var last error
		err := poll(ctx, 20*time.Second, func() (bool, error) {
			last = removeCgroup(dir)
			if errors.Is(last, syscall.EBUSY) {
				return false, nil
			}
			return last == nil, last
		})
		if err != nil {
			return fmt.Errorf("machine %s: remove cgroup: %w", m.cfg.Name, errors.Join(err, last))
		}
	}
	return nil
}

func removeCgroup(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeCgroup(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return &fs.PathError{Op: "rmdir", Path: dir, Err: err}
	}
	return nil
}
