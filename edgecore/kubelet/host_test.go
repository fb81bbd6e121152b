package kubelet

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	mountsV2 = "proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n"
	mountsV1 = `tmpfs /sys/fs/cgroup tmpfs rw 0 0
cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,relatime,cpu,cpuacct 0 0
cgroup /sys/fs/cgroup/cpuset cgroup rw,relatime,cpuset 0 0
cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0
cgroup /sys/fs/cgroup/pids cgroup rw,relatime,pids 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0
`
)

// wants checks that there is exactly the finding, or none when subject is "".
func wants(t *testing.T, got []Finding, severity Severity, subject, problem, remedy string) {
	t.Helper()
	if subject == "" {
		if len(got) != 0 {
			t.Errorf("findings %v, want none", got)
		}
		return
	}
	if len(got) != 1 {
		t.Fatalf("findings %v, want one", got)
	}
	f := got[0]
	if f.Severity != severity || f.Subject != subject || !strings.Contains(f.Problem, problem) || !strings.Contains(f.Remedy, remedy) {
		t.Errorf("finding %+v\nwant %s of %q with %q and %q", f, severity, subject, problem, remedy)
	}
}

func TestCheckCgroups(t *testing.T) {
	for name, c := range map[string]struct {
		mounts, controllers      string
		severity                 Severity
		subject, problem, remedy string
	}{
		"v2 complete":       {mounts: mountsV2, controllers: "cpuset cpu io memory hugetlb pids\n"},
		"v2 without memory": {mountsV2, "cpuset cpu io pids\n", Error, "/sys/fs/cgroup/cgroup.controllers", "the memory cgroup controller is missing", "cgroup_enable=memory"},
		"v2 without cpuset": {mountsV2, "cpu memory pids\n", Error, "/sys/fs/cgroup/cgroup.controllers", "the cpuset cgroup controller is missing", "Delegate=yes"},
		"v1 complete":       {mountsV1, "", Warning, "/sys/fs/cgroup", "cgroup v1", "unified_cgroup_hierarchy"},
		"none":              {"proc /proc proc rw 0 0\n", "", Error, "/sys/fs/cgroup", "no cgroup file system is mounted", "mount cgroup2"},
	} {
		t.Run(name, func(t *testing.T) {
			files := map[string]string{"proc/self/mounts": c.mounts}
			if c.controllers != "" {
				files["sys/fs/cgroup/cgroup.controllers"] = c.controllers
			}
			wants(t, checkCgroups(hostAt(fixture(t, files))), c.severity, c.subject, c.problem, c.remedy)
		})
	}
	t.Run("v1 without memory", func(t *testing.T) {
		mounts := strings.ReplaceAll(mountsV1, "cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0\n", "")
		got := checkCgroups(hostAt(fixture(t, map[string]string{"proc/self/mounts": mounts})))
		if len(got) != 2 {
			t.Fatalf("findings %v", got)
		}
		wants(t, got[1:], Error, "/sys/fs/cgroup/memory", "the memory cgroup controller is missing", "/boot/firmware/cmdline.txt")
	})
}

func TestCheckSwap(t *testing.T) {
	const head = "Filename				Type		Size		Used		Priority\n"
	on := fixture(t, map[string]string{"proc/swaps": head + "/var/swap                               file\t\t102396\t\t0\t\t-2\n"})
	off := fixture(t, map[string]string{"proc/swaps": head})
	wants(t, checkSwap(hostAt(off), true), "", "", "", "")
	wants(t, checkSwap(hostAt(t.TempDir()), true), "", "", "", "")
	wants(t, checkSwap(hostAt(on), true), Error, "swap", "/var/swap", "swapoff -a")
	wants(t, checkSwap(hostAt(on), false), Warning, "swap", "/var/swap", "encrypt")
}

func TestCheckTools(t *testing.T) {
	have := func(tools ...string) func(string) (string, error) {
		return func(tool string) (string, error) {
			if slices.Contains(tools, tool) {
				return "/usr/bin/" + tool, nil
			}
			return "", exec.ErrNotFound
		}
	}
	wants(t, checkTools(have("mount", "umount", "iptables"), true), "", "", "", "")
	wants(t, checkTools(have("mount", "iptables"), true), Error, "umount", "no volume can be mounted", "util-linux")
	wants(t, checkTools(have("mount", "umount"), true), Warning, "iptables", "makeIPTablesUtilChains", "install iptables")
	wants(t, checkTools(have("mount", "umount"), false), "", "", "", "")
}

func TestCheckKmsg(t *testing.T) {
	wants(t, checkKmsg(hostAt(fixture(t, map[string]string{"dev/kmsg": ""}))), "", "", "", "")
	wants(t, checkKmsg(hostAt(t.TempDir())), Error, "/dev/kmsg", "no such file", "in a container, mount it")
}

func TestCheckWritable(t *testing.T) {
	root := fixture(t, map[string]string{"a/file": "x"})
	wants(t, checkWritable(hostAt(root), "/a"), "", "", "", "")
	wants(t, checkWritable(hostAt(root), "/a/not/yet/made"), "", "", "", "")
	wants(t, checkWritable(hostAt(root), "/a/file"), Error, "/a/file", "not a directory", "choose another")
	entries, err := os.ReadDir(filepath.Join(root, "a"))
	if err != nil || len(entries) != 1 {
		t.Errorf("the probe left something behind: %v, %v", entries, err)
	}
}

func TestCheckWritableReadOnlyAndFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("mounting needs root: run as root")
	}
	root := t.TempDir()
	mount := func(name, options string, flags uintptr) string {
		dir := filepath.Join(root, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Mount("tmpfs", dir, "tmpfs", flags, options); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := syscall.Unmount(dir, 0); err != nil {
				t.Error(err)
			}
		})
		return dir
	}
	mount("ro", "", syscall.MS_RDONLY)
	wants(t, checkWritable(hostAt(root), "/ro/kubelet"), Error, "/ro/kubelet", "read-only file system", "remount it")

	full := mount("full", "size=64k", 0)
	if err := os.WriteFile(filepath.Join(full, "fill"), make([]byte, 1<<20), 0o600); err == nil {
		t.Fatal("64 KiB took a mebibyte")
	}
	wants(t, checkWritable(hostAt(root), "/full"), Error, "/full", "no space left", "free some space")
}

func TestCheckClock(t *testing.T) {
	root := fixture(t, map[string]string{"var/lib/kubelet/state": "x"})
	h := hostAt(root)
	now := time.Now()
	wants(t, checkClock(h, "/var/lib/kubelet", now), "", "", "", "")
	wants(t, checkClock(h, "/nowhere", now), "", "", "", "")
	wants(t, checkClock(h, "/var/lib/kubelet", time.Unix(100, 0)), Warning, "clock", "1970-01-01T00:01:40Z", "timedatectl")
	ahead := now.Add(48 * time.Hour)
	if err := os.Chtimes(filepath.Join(root, "var/lib/kubelet/state"), ahead, ahead); err != nil {
		t.Fatal(err)
	}
	wants(t, checkClock(h, "/var/lib/kubelet", now), Warning, "clock", "48h0m0s newer", "timedatectl")
}

func TestResolvConf(t *testing.T) {
	t.Run("the host's", func(t *testing.T) {
		h := hostAt(fixture(t, map[string]string{"etc/resolv.conf": "nameserver 192.0.2.53\n"}))
		if got := hostResolvConf(h); got != etcResolvConf {
			t.Errorf("%q", got)
		}
	})
	t.Run("behind systemd-resolved", func(t *testing.T) {
		h := hostAt(fixture(t, map[string]string{"etc/resolv.conf": "nameserver 127.0.0.53\n", "run/systemd/resolve/resolv.conf": "nameserver 192.0.2.53\n"}))
		if got := hostResolvConf(h); got != systemdResolvConf {
			t.Errorf("%q", got)
		}
	})
	t.Run("missing, then there", func(t *testing.T) {
		root := fixture(t, map[string]string{"etc/hostname": "edge\n"})
		k := mustSettings(t, Config{RootDir: t.TempDir()})
		c, err := k.prepareResolvConf(hostAt(root))
		if err != nil {
			t.Fatal(err)
		}
		if c == nil || k.settings.ResolverConfig != c.path {
			t.Fatalf("the kubelet would read %q", k.settings.ResolverConfig)
		}
		read := func() string {
			b, err := os.ReadFile(c.path)
			if err != nil {
				t.Fatal(err)
			}
			return string(b)
		}
		if strings.Contains(read(), "nameserver") {
			t.Errorf("name servers from nowhere: %s", read())
		}
		const text = "nameserver 192.0.2.53\n"
		if err := os.WriteFile(filepath.Join(root, "etc/resolv.conf"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := c.update(); err != nil {
			t.Fatal(err)
		}
		if read() != text {
			t.Errorf("copied %q", read())
		}
	})
	t.Run("the overlay's", func(t *testing.T) {
		k := mustSettings(t, Config{Overlay: []byte("resolvConf: /etc/other.conf\n")})
		if c, err := k.prepareResolvConf(hostAt(t.TempDir())); err != nil || c != nil || k.settings.ResolverConfig != "/etc/other.conf" {
			t.Errorf("%v, %v, %q", c, err, k.settings.ResolverConfig)
		}
	})
}

func FuzzKernelTables(f *testing.F) {
	f.Add(mountsV1)
	f.Add(mountsV2)
	f.Add("eth0\t00000000\t010200C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n")
	f.Fuzz(func(t *testing.T, table string) {
		h := hostAt(fixture(t, map[string]string{"proc/self/mounts": table, "proc/net/route": table, "proc/net/ipv6_route": table, "proc/swaps": table}))
		checkCgroups(h)
		checkSwap(h, true)
		for name := range defaultRoutes(h) {
			if name == "" || name == "lo" {
				t.Errorf("a default route by way of %q", name)
			}
		}
	})
}
