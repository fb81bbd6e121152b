package containers

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/google/cadvisor/cache/memory"
	"github.com/google/cadvisor/container"
	"github.com/google/cadvisor/container/containerd"
	cadvisorapi "github.com/google/cadvisor/info/v1"
	cadvisorapiv2 "github.com/google/cadvisor/info/v2"
	"github.com/google/cadvisor/manager"
	"github.com/google/cadvisor/utils/sysfs"

	// The handlers and file systems the kubelet's cAdvisor knows; without the
	// containerd handler a container's cgroup has no pod and container labels.
	_ "github.com/google/cadvisor/container/containerd/install"
	_ "github.com/google/cadvisor/container/systemd/install"
	_ "github.com/google/cadvisor/fs/btrfs/install"
	_ "github.com/google/cadvisor/fs/devicemapper/install"
	_ "github.com/google/cadvisor/fs/nfs/install"
	_ "github.com/google/cadvisor/fs/overlay/install"
	_ "github.com/google/cadvisor/fs/tmpfs/install"
	_ "github.com/google/cadvisor/fs/vfs/install"
	_ "github.com/google/cadvisor/fs/zfs/install"
)

// Config says what is measured and how often.
type Config struct {
	// RootDir is the kubelet's root directory; its file system is the node's
	// root file system. Made if missing. Required.
	RootDir string
	// CgroupRoots are the cgroups whose descendants are measured, besides the
	// root cgroup itself: the node allocatable cgroup ("/kubepods") and the
	// ones of the kubelet and the runtime where these are known. Required: an
	// empty list would measure every cgroup of the host.
	CgroupRoots []string
	// ContainerdEndpoint is the socket of containerd, with or without the
	// "unix://" scheme; empty means /run/containerd/containerd.sock.
	ContainerdEndpoint string
	// Interval is the shortest time between two looks at one container;
	// zero means 10 s, as in the kubelet. It is the main lever on the CPU an
	// idle node spends.
	Interval time.Duration
	// MaxInterval bounds the time between two looks at a container whose
	// usage does not change; zero means 15 s or Interval, whichever is longer.
	MaxInterval time.Duration
	// Keep is how long samples stay in memory; zero means 2 minutes.
	Keep time.Duration
	// Disk measures the disk usage of containers' writable layers too. The
	// kubelet needs it for local storage capacity isolation.
	Disk bool
}

// Containers is cAdvisor's manager with the queries the kubelet asks. It
// satisfies k8s.io/kubernetes/pkg/kubelet/cadvisor.Interface.
type Containers struct {
	manager.Manager
	rootDir string
}

// New configures cAdvisor and reads the machine's capacity; it measures nothing
// until Start.
func New(cfg Config) (*Containers, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	cfg.applyProcessFlags()

	if err := os.MkdirAll(cfg.RootDir, 0o750); err != nil {
		return nil, fmt.Errorf("metrics: make the kubelet's root directory: %w; choose a writable one", err)
	}
	dynamic := true
	m, err := manager.New(
		memory.New(cfg.Keep, nil),
		sysfs.NewRealSysFs(),
		manager.HousekeepingConfig{Interval: &cfg.MaxInterval, AllowDynamic: &dynamic},
		Included(cfg.Disk),
		http.DefaultClient, // asked only by containers that carry a cAdvisor collector label
		cfg.CgroupRoots,
		nil, // no environment variable of a container becomes a label
		"",  // no perf events
		0,   // no resctrl
	)
	if err != nil {
		return nil, fmt.Errorf("metrics: read the machine's capacity: %w; check that /proc, /sys and the cgroup file systems are mounted", err)
	}
	return &Containers{Manager: m, rootDir: cfg.RootDir}, nil
}

func (c *Config) complete() error {
	if c.RootDir == "" {
		return errors.New("metrics: containers: RootDir is required; set the kubelet's root directory")
	}
	if len(c.CgroupRoots) == 0 {
		return errors.New("metrics: containers: CgroupRoots is required; name the cgroup the pods live under")
	}
	if c.ContainerdEndpoint == "" {
		c.ContainerdEndpoint = "/run/containerd/containerd.sock"
	}
	if c.Interval == 0 {
		c.Interval = 10 * time.Second
	}
	if c.MaxInterval == 0 {
		c.MaxInterval = max(15*time.Second, c.Interval)
	}
	if c.Keep == 0 {
		c.Keep = 2 * time.Minute
	}
	if c.Interval < time.Second || c.MaxInterval < c.Interval || c.Keep < c.MaxInterval {
		return fmt.Errorf("metrics: containers: intervals must satisfy 1s <= Interval (%v) <= MaxInterval (%v) <= Keep (%v)", c.Interval, c.MaxInterval, c.Keep)
	}
	return nil
}

// ImagesFsInfo is answered by the runtime, not by cAdvisor, for every runtime
// but CRI-O; the kubelet falls back on the CRI when it gets this error.
func (c *Containers) ImagesFsInfo(context.Context) (cadvisorapiv2.FsInfo, error) {
	return cadvisorapiv2.FsInfo{}, errors.New("metrics: the image file system is known to the container runtime only; ask the CRI")
}

// ContainerFsInfo is answered by the runtime, like ImagesFsInfo.
func (c *Containers) ContainerFsInfo(context.Context) (cadvisorapiv2.FsInfo, error) {
	return cadvisorapiv2.FsInfo{}, errors.New("metrics: the container file system is known to the container runtime only; ask the CRI")
}

// RootFsInfo is the fill level of the file system the kubelet's root lies on.
func (c *Containers) RootFsInfo() (cadvisorapiv2.FsInfo, error) {
	return c.GetDirFsInfo(c.rootDir)
}

// ContainerInfoV2 is the manager's query under the name the kubelet calls.
func (c *Containers) ContainerInfoV2(name string, options cadvisorapiv2.RequestOptions) (map[string]cadvisorapiv2.ContainerInfo, error) {
	return c.GetContainerInfoV2(name, options)
}

// VersionInfo is the manager's query under the name the kubelet calls.
func (c *Containers) VersionInfo() (*cadvisorapi.VersionInfo, error) {
	return c.GetVersionInfo()
}

// MachineInfo is the manager's query under the name the kubelet calls.
func (c *Containers) MachineInfo() (*cadvisorapi.MachineInfo, error) {
	return c.GetMachineInfo()
}

// Included are the metrics the kubelet asks of cAdvisor. More would cost CPU on
// every container; fewer would leave holes in the stats summary.
func Included(disk bool) container.MetricSet {
	set := container.MetricSet{
		container.CpuUsageMetrics:     struct{}{},
		container.MemoryUsageMetrics:  struct{}{},
		container.DiskIOMetrics:       struct{}{},
		container.NetworkUsageMetrics: struct{}{},
		container.AppMetrics:          struct{}{},
		container.ProcessMetrics:      struct{}{},
		container.OOMMetrics:          struct{}{},
	}
	if pressureAvailable("/sys/fs/cgroup/cpu.pressure") {
		set[container.PressureMetrics] = struct{}{}
	}
	if disk {
		set[container.DiskUsageMetrics] = struct{}{}
	}
	return set
}

// pressureAvailable reports whether the kernel keeps pressure stall figures per
// cgroup: the file exists with CONFIG_PSI, and opening it fails with psi=0.
func pressureAvailable(file string) bool {
	f, err := os.Open(file)
	if err != nil {
		return false
	}
	f.Close()
	return true
}

// socketPath strips the scheme the kubelet's endpoint carries and cAdvisor's
// must not.
func socketPath(endpoint string) string {
	return strings.TrimPrefix(endpoint, "unix://")
}

// applyProcessFlags sets what cAdvisor reads from flags of the process. They
// are set here, by value, and never parsed from a command line.
func (c *Config) applyProcessFlags() {
	*containerd.ArgContainerdEndpoint = socketPath(c.ContainerdEndpoint)
	*manager.HousekeepingInterval = c.Interval
	setFlag("event_storage_event_limit", "default=0")
	setFlag("event_storage_age_limit", "default=0")
}
