package machine

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// etcFromHost is what programs of the host's /usr need to find in /etc. No
// secret is among them: no shadow, no keys.
var etcFromHost = []string{
	"alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "nsswitch.conf", "passwd", "group",
	"protocols", "services", "ethertypes", "ssl/certs", "iproute2", "os-release", "debian_version",
}

// hostSysctls are kernel settings that the kubelet sets, that no namespace
// separates from the host's. It finds files with the values it wants in their
// place, and so leaves the host's alone.
var hostSysctls = map[string]string{
	"vm/overcommit_memory":      "1",
	"vm/panic_on_oom":           "0",
	"kernel/panic":              "10",
	"kernel/panic_on_oops":      "1",
	"kernel/keys/root_maxkeys":  "1000000",
	"kernel/keys/root_maxbytes": "25000000",
}

// makeRoot makes the machine's mounts and moves there.
func makeRoot(s setup) error {
	root := s.Disk
	if err := fillDisk(root, s); err != nil {
		return fmt.Errorf("fill the disk %s: %w", root, err)
	}
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"disk", func() error { return unix.Mount(root, root, "", unix.MS_BIND, "") }},
		{"/usr", func() error { return bindSystem(root) }},
		{"/dev", func() error { return mountDev(root) }},
		{"/sys", func() error { return mountSys(root) }},
		{"/run", func() error { return mountRun(root) }},
		{"/proc", func() error { return mountProc(root) }},
		{"binds", func() error { return mountBinds(root, s.Binds) }},
		{"new root", func() error { return enterRoot(root) }},
	} {
		if err := step.do(); err != nil {
			return fmt.Errorf("mount %s: %w", step.what, err)
		}
	}
	return nil
}

// fillDisk makes what a disk needs to have; what the machine has written there
// in earlier runs stays.
func fillDisk(root string, s setup) error {
	for _, dir := range []string{
		"usr", "etc", "dev", "proc", "sys", "run", "root", "home", "opt", "mnt", "srv",
		"var/lib", "var/log", "var/cache", "etc/cni/net.d", "etc/containerd",
	} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return err
		}
	}
	for _, dir := range []string{"tmp", "var/tmp"} {
		path := filepath.Join(root, dir)
		if err := os.MkdirAll(path, 0o777); err != nil {
			return err
		}
		if err := os.Chmod(path, 0o777|fs.ModeSticky); err != nil {
			return err
		}
	}
	if err := symlink("/run", filepath.Join(root, "var/run")); err != nil {
		return err
	}
	for _, name := range etcFromHost {
		if err := copyTree(filepath.Join("/etc", name), filepath.Join(root, "etc", name)); err != nil {
			return err
		}
	}
	files := map[string]string{
		"hostname":    s.Name + "\n",
		"hosts":       fmt.Sprintf("127.0.0.1 localhost\n%s %s\n%s hub\n", s.IP, s.Name, s.HostIP),
		"resolv.conf": "# This machine has no name server.\n",
	}
	if _, err := os.Stat(filepath.Join(root, "etc/machine-id")); err != nil {
		id := make([]byte, 16)
		rand.Read(id)
		files["machine-id"] = hex.EncodeToString(id) + "\n"
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(root, "etc", name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// bindSystem shows the host's programs and libraries, read-only: /usr, and
// those top folders that merged-/usr hosts have as links into it.
func bindSystem(root string) error {
	for _, dir := range []string{"/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"} {
		st, err := os.Lstat(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		target := filepath.Join(root, dir)
		if st.Mode()&fs.ModeSymlink != 0 {
			to, err := os.Readlink(dir)
			if err != nil {
				return err
			}
			if err := symlink(to, target); err != nil {
				return err
			}
			continue
		}
		if err := bind(dir, target, false); err != nil {
			return err
		}
	}
	return nil
}

// mountDev shares the host's devices, with terminals and shared memory of the
// machine's own.
func mountDev(root string) error {
	dev := filepath.Join(root, "dev")
	if err := unix.Mount("/dev", dev, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	if err := unix.Mount("devpts", filepath.Join(dev, "pts"), "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, "newinstance,gid=5,mode=620,ptmxmode=666"); err != nil {
		return fmt.Errorf("pts: %w", err)
	}
	if err := unix.Mount("shm", filepath.Join(dev, "shm"), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777"); err != nil {
		return fmt.Errorf("shm: %w", err)
	}
	return nil
}

// mountSys mounts a sysfs that shows the machine's own network, and in it the
// host's cgroups as they are mounted there, v1, v2 or both.
func mountSys(root string) error {
	sys := filepath.Join(root, "sys")
	if err := unix.Mount("sysfs", sys, "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return err
	}
	if err := unix.Mount(cgroupMount, filepath.Join(root, cgroupMount), "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("%s: %w", cgroupMount, err)
	}
	return nil
}

func mountRun(root string) error {
	run := filepath.Join(root, "run")
	if err := unix.Mount("run", run, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755,size=256m"); err != nil {
		return err
	}
	for _, dir := range []string{"lock", "netns", "containerd", "runc"} {
		if err := os.Mkdir(filepath.Join(run, dir), 0o755); err != nil {
			return err
		}
	}
	return nil
}

// mountProc mounts the machine's own /proc, and over some of its files what
// this run of the machine is to see there.
func mountProc(root string) error {
	proc := filepath.Join(root, "proc")
	if err := unix.Mount("proc", proc, "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return err
	}
	over := map[string]string{"kernel/random/boot_id": bootID()}
	for name, value := range hostSysctls {
		over[name] = value
	}
	for name, value := range over {
		target := filepath.Join(proc, "sys", name)
		if _, err := os.Stat(target); errors.Is(err, fs.ErrNotExist) {
			continue // a kernel without it
		}
		file := filepath.Join(root, "run", "sysctl."+strings.ReplaceAll(name, "/", "."))
		if err := os.WriteFile(file, []byte(value+"\n"), 0o644); err != nil {
			return err
		}
		if err := unix.Mount(file, target, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// bootID makes each run a boot of its own, as the kernel's id tells of the
// host's boot only.
func bootID() string {
	b := make([]byte, 16)
	rand.Read(b)
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func mountBinds(root string, binds []Bind) error {
	for _, b := range binds {
		st, err := os.Stat(b.Host)
		if err != nil {
			return err
		}
		target := filepath.Join(root, b.Inside)
		if st.IsDir() {
			err = os.MkdirAll(target, 0o755)
		} else if err = os.MkdirAll(filepath.Dir(target), 0o755); err == nil {
			var f *os.File
			if f, err = os.OpenFile(target, os.O_CREATE, 0o644); err == nil {
				f.Close()
			}
		}
		if err != nil {
			return err
		}
		if err := bind(b.Host, target, b.Writable); err != nil {
			return err
		}
	}
	return nil
}

// enterRoot makes root "/" and lets go of the host's mounts.
func enterRoot(root string) error {
	if err := unix.Chdir(root); err != nil {
		return err
	}
	// Both names the same: the old root ends up mounted over the new one and
	// is taken off there, see pivot_root(2).
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount the host's root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	// As systemd does: mounts of the kubelet reach into running containers.
	return unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "")
}

func bind(from, to string, writable bool) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	if err := unix.Mount(from, to, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind %s: %w", from, err)
	}
	if writable {
		return nil
	}
	if err := unix.Mount("", to, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("make %s read-only: %w", from, err)
	}
	return nil
}

func symlink(to, at string) error {
	if have, err := os.Readlink(at); err == nil && have == to {
		return nil
	}
	return os.Symlink(to, at)
}

// copyTree copies files, folders and links; a missing one is no error, as
// hosts differ.
func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		target := filepath.Join(to, strings.TrimPrefix(path, from))
		switch {
		case d.IsDir():
			return os.MkdirAll(target, 0o755)
		case d.Type()&fs.ModeSymlink != 0:
			link, err := os.Readlink(path)
			if err != nil {
				return err
			}
			if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
				return err
			}
			os.Remove(target)
			return os.Symlink(link, target)
		case d.Type().IsRegular():
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
				return err
			}
			return os.WriteFile(target, data, 0o644)
		}
		return nil
	})
}

// removeTree removes dir, refusing while anything is mounted below it: RemoveAll
// would go on into what is mounted.
func removeTree(dir string) error {
	real, err := filepath.EvalSymlinks(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	mounts, err := readMounts("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if m.point == real || strings.HasPrefix(m.point, real+"/") {
			return fmt.Errorf("%s is mounted below %s; unmount it first", m.point, dir)
		}
	}
	return os.RemoveAll(dir)
}
