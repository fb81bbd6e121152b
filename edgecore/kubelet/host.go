package kubelet

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"k8s.io/kubernetes/pkg/kubelet/apis/config"
)

// host reads the kernel's files below a root, which is "/" outside of tests.
type host struct{ root string }

func hostAt(root string) host { return host{root: root} }

func (h host) path(p string) string { return filepath.Join(h.root, p) }

// fileLimit bounds what is read of one kernel file; the largest, the mount
// table of a full node, stays far below it.
const fileLimit = 4 << 20

func (h host) read(p string) (string, error) {
	f, err := os.Open(h.path(p))
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, fileLimit))
	return string(b), err
}

// released is before any build of this program. A clock before it is wrong.
var released = time.Date(2026, time.June, 1, 0, 0, 0, 0, time.UTC)

// checkHost judges everything but the runtime.
func checkHost(h host, cfg *Config, settings *config.KubeletConfiguration) []Finding {
	var findings []Finding
	add := func(f ...Finding) { findings = append(findings, f...) }
	if uid := os.Geteuid(); uid != 0 {
		add(Finding{Error, "user", fmt.Sprintf("running as user id %d; mounting volumes and making cgroups needs root", uid), "run edgecore as root"})
	}
	add(checkCgroups(h)...)
	add(checkKmsg(h)...)
	add(checkSwap(h, settings.FailSwapOn)...)
	add(checkTools(exec.LookPath, settings.MakeIPTablesUtilChains)...)
	for _, dir := range []string{cfg.RootDir, cfg.PodLogsDir, containerLogsDir} {
		add(checkWritable(h, dir)...)
	}
	add(checkClock(h, cfg.RootDir, time.Now())...)
	if links, err := listLinks(); err == nil {
		add(checkAddress(cfg.NodeIP, links)...)
	}
	return findings
}

// containerLogsDir is fixed in the kubelet.
const containerLogsDir = "/var/log/containers"

// needed are the controllers without which the container manager does not
// start; pids it can do without, but then a fork bomb takes the node down.
var (
	neededV1 = []string{"cpu", "cpuacct", "cpuset", "memory"}
	neededV2 = []string{"cpu", "cpuset", "memory", "pids"}
)

const enableMemory = "add cgroup_enable=memory cgroup_memory=1 to the kernel command line (on a Raspberry Pi: /boot/firmware/cmdline.txt) and reboot"

func checkCgroups(h host) []Finding {
	table, err := h.read("/proc/self/mounts")
	if err != nil {
		return []Finding{{Error, "/proc/self/mounts", err.Error(), "mount /proc"}}
	}
	unified, v1 := cgroupMounts(table)
	switch {
	case unified:
		return checkCgroupV2(h)
	case len(v1) == 0:
		return []Finding{{Error, "/sys/fs/cgroup", "no cgroup file system is mounted", "boot with systemd, or mount cgroup2 on /sys/fs/cgroup"}}
	}
	findings := []Finding{{Warning, "/sys/fs/cgroup", "the host uses cgroup v1, which Kubernetes is about to drop", "boot with systemd.unified_cgroup_hierarchy=1 when the distribution allows"}}
	for _, c := range neededV1 {
		if !slices.Contains(v1, c) {
			findings = append(findings, missingController("/sys/fs/cgroup/"+c, c, "mount the "+c+" controller on /sys/fs/cgroup/"+c))
		}
	}
	if !slices.Contains(v1, "pids") {
		findings = append(findings, Finding{Warning, "/sys/fs/cgroup/pids", "the pids controller is not mounted, so pods may use up all process ids", "use a kernel with CONFIG_CGROUP_PIDS"})
	}
	return findings
}

func checkCgroupV2(h host) []Finding {
	const file = "/sys/fs/cgroup/cgroup.controllers"
	text, err := h.read(file)
	if err != nil {
		return []Finding{{Error, file, err.Error(), "mount cgroup2 on /sys/fs/cgroup"}}
	}
	var findings []Finding
	for _, c := range neededV2 {
		if !slices.Contains(strings.Fields(text), c) {
			findings = append(findings, missingController(file, c, "use a kernel with the "+c+" controller, and give edgecore's cgroup all controllers (systemd: Delegate=yes)"))
		}
	}
	return findings
}

func missingController(subject, controller, remedy string) Finding {
	if controller == "memory" {
		remedy = enableMemory
	}
	return Finding{Error, subject, "the " + controller + " cgroup controller is missing", remedy}
}

// cgroupMounts reads a mount table: is the unified hierarchy the one in use,
// and which v1 controllers are mounted.
func cgroupMounts(table string) (unified bool, v1 []string) {
	for line := range strings.Lines(table) {
		f := strings.Fields(line)
		if len(f) < 4 {
			continue
		}
		switch {
		case f[2] == "cgroup2" && f[1] == "/sys/fs/cgroup":
			unified = true
		case f[2] == "cgroup":
			v1 = append(v1, strings.Split(f[3], ",")...)
		}
	}
	return unified, v1
}

// checkKmsg opens the kernel's log: the kubelet follows it to learn of
// processes the kernel killed for want of memory, and exits if it cannot.
func checkKmsg(h host) []Finding {
	f, err := os.OpenFile(h.path("/dev/kmsg"), os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err == nil {
		f.Close()
		return nil
	}
	finding := Finding{Error, "/dev/kmsg", "the kernel's log cannot be read: " + reason(err), "run edgecore as root on the host"}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		finding.Remedy = "give edgecore the host's /dev/kmsg; in a container, mount it"
	case errors.Is(err, fs.ErrPermission):
		finding.Remedy = "run edgecore as root, with CAP_SYSLOG where kernel.dmesg_restrict is 1"
	}
	return []Finding{finding}
}

// checkTools looks for the programs the kubelet runs.
func checkTools(look func(string) (string, error), iptables bool) []Finding {
	var findings []Finding
	for _, tool := range []string{"mount", "umount"} {
		if _, err := look(tool); err != nil {
			findings = append(findings, Finding{Error, tool, "the program is not in PATH, and no volume can be mounted without it", "install it (package mount or util-linux)"})
		}
	}
	if _, err := look("iptables"); iptables && err != nil {
		findings = append(findings, Finding{Warning, "iptables", "the program is not in PATH, and makeIPTablesUtilChains is set", "install iptables, or remove makeIPTablesUtilChains from kubelet.config"})
	}
	return findings
}

func checkSwap(h host, fail bool) []Finding {
	text, err := h.read("/proc/swaps")
	if err != nil {
		return nil // a kernel without swap has no such file
	}
	var devices []string
	lines := bufio.NewScanner(strings.NewReader(text))
	for first := true; lines.Scan(); first = false {
		if f := strings.Fields(lines.Text()); !first && len(f) > 0 {
			devices = append(devices, f[0])
		}
	}
	if len(devices) == 0 {
		return nil
	}
	subject := "swap"
	if fail {
		return []Finding{{Error, subject, "it is on (" + strings.Join(devices, ", ") + ") and kubelet.config sets failSwapOn", "turn it off (swapoff -a, and remove it from /etc/fstab), or remove failSwapOn"}}
	}
	return []Finding{{Warning, subject, "it is on (" + strings.Join(devices, ", ") + "): memory limits of pods are not exact, and secrets in memory may reach the disk", "turn it off, or encrypt it"}}
}

// checkWritable makes and removes a file in dir, or in the nearest directory
// above that exists.
func checkWritable(h host, dir string) []Finding {
	probe := h.path(dir)
	for {
		st, err := os.Stat(probe)
		if err == nil && !st.IsDir() {
			return []Finding{{Error, dir, probe + " is not a directory", "move it away, or choose another directory"}}
		}
		if err == nil {
			break
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return []Finding{{Error, dir, reason(err), "make it readable for root, or choose another directory"}}
		}
		probe = filepath.Dir(probe)
	}
	f, err := os.CreateTemp(probe, ".skerry-check-*")
	if err == nil {
		_, err = f.WriteString("x")
		err = errors.Join(err, f.Close(), os.Remove(f.Name()))
	}
	if err == nil {
		return nil
	}
	finding := Finding{Error, dir, "it cannot be written: " + reason(err), "make it writable for root, or choose another directory"}
	switch {
	case errors.Is(err, syscall.EROFS):
		finding.Remedy = "its file system is mounted read-only: remount it (a card with errors turns read-only; see dmesg), or choose another directory"
	case errors.Is(err, syscall.ENOSPC):
		finding.Remedy = "free some space on its file system"
	}
	return []Finding{finding}
}

// checkAddress tells when the node has no address to report now. It may get one
// later; pods start all the same.
func checkAddress(configured net.IP, links []link) []Finding {
	const subject = "node address"
	switch {
	case configured == nil && choose(links) == nil:
		return []Finding{{Warning, subject, "no interface has an address to report, so pods with hostNetwork have none", "bring an interface up, or add an address of your own to one (ip addr add)"}}
	case configured != nil && !present(configured, links):
		return []Finding{{Warning, subject, configured.String() + " is on no interface", "add it to one, or correct or remove node.ip"}}
	}
	return nil
}

// checkClock finds a clock that cannot be right: a board without a battery
// starts in 1970 or at the time of its last shutdown. Pods start all the same.
func checkClock(h host, rootDir string, now time.Time) []Finding {
	const remedy = "set the clock (timedatectl set-time) or let it be synchronised; until then certificates look not yet valid and the hub cannot be reached"
	if now.Before(released) {
		return []Finding{{Warning, "clock", "it says " + now.UTC().Format(time.RFC3339) + ", before this program existed", remedy}}
	}
	newest := newestFile(h.path(rootDir))
	if ahead := newest.Sub(now); ahead > time.Hour {
		return []Finding{{Warning, "clock", fmt.Sprintf("it says %s, but files in %s are %v newer", now.UTC().Format(time.RFC3339), rootDir, ahead.Round(time.Minute)), remedy}}
	}
	return nil
}

// newestFile looks at dir's direct entries only; the kubelet renews its state
// files there.
func newestFile(dir string) time.Time {
	var newest time.Time
	entries, err := os.ReadDir(dir)
	if err != nil {
		return newest
	}
	for _, e := range entries {
		if info, err := e.Info(); err == nil && info.ModTime().After(newest) {
			newest = info.ModTime()
		}
	}
	return newest
}

// reason strips the operation and path of a file error, which the finding's
// subject names already.
func reason(err error) string {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err.Error()
	}
	return err.Error()
}
