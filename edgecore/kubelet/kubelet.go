package kubelet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/cmd/kubelet/app"
	"k8s.io/kubernetes/cmd/kubelet/app/options"
	upstream "k8s.io/kubernetes/pkg/kubelet"
	"k8s.io/kubernetes/pkg/kubelet/apis/config"
	"k8s.io/kubernetes/pkg/kubelet/cadvisor"
	"k8s.io/kubernetes/pkg/kubelet/cm"

	"github.com/skerry-io/skerry/metrics/containers"
)

// Kubelet is one upstream kubelet, before and while it runs.
type Kubelet struct {
	// Immutable after New.
	cfg      Config
	settings *config.KubeletConfiguration

	addressPeriod, addressSettle time.Duration // shorter in tests

	ran   atomic.Bool
	built chan struct{} // closed once the fields below are set
	live  chan struct{} // closed once they may be asked, later

	// Set by Run before built is closed, then immutable.
	instance *upstream.Kubelet
	deps     *upstream.Dependencies

	handlerOnce sync.Once
	handler     http.Handler // built by the first Handler call
}

var _ cadvisor.Interface = (*containers.Containers)(nil)

// New checks cfg and merges the kubelet's configuration; it starts nothing and
// does not look at the host. For that, see Check.
func New(cfg Config) (*Kubelet, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	if cfg.Transport == nil {
		return nil, errors.New("kubelet: no transport to the local API; set Config.Transport")
	}
	settings, err := cfg.settings()
	if err != nil {
		return nil, err
	}
	k := &Kubelet{
		cfg: cfg, settings: settings, built: make(chan struct{}), live: make(chan struct{}),
		addressPeriod: addressPeriod, addressSettle: addressSettle,
	}
	if err := options.ValidateKubeletFlags(&k.server(nil).KubeletFlags); err != nil {
		return nil, fmt.Errorf("kubelet: %w", err)
	}
	return k, nil
}

// Settings are the kubelet's, as merged; nobody may change them.
func (k *Kubelet) Settings() *config.KubeletConfiguration { return k.settings }

// RootDir is where the kubelet keeps volumes and records.
func (k *Kubelet) RootDir() string { return k.cfg.RootDir }

// RuntimeEndpoint is the runtime's CRI socket, with its scheme.
func (k *Kubelet) RuntimeEndpoint() string { return k.cfg.RuntimeEndpoint }

// Run waits for the container runtime, checks the host, and runs the kubelet
// until ctx ends or the node's address changes (ErrAddressChanged). It may be
// called once per process. The process must exit when it returns: upstream
// leaves goroutines behind. Containers keep running.
func (k *Kubelet) Run(ctx context.Context) error {
	if !k.ran.CompareAndSwap(false, true) {
		return errors.New("kubelet: run: it ran already in this process; restart the process")
	}
	routeKlog(k.cfg.Log, k.cfg.KubeletLogLevel)

	runtime, err := k.waitForRuntime(ctx)
	if ctx.Err() != nil {
		return nil // nothing was started yet
	}
	if err != nil {
		return err
	}
	if err := k.refuseOnErrors(runtime); err != nil {
		return err
	}
	k.settings.CgroupDriver = cgroupDriver(k.cfg.CgroupDriver, runtime)
	address := k.chooseAddress()
	if err := k.prepareHost(); err != nil {
		return err
	}
	resolv, err := k.prepareResolvConf(hostAt("/"))
	if err != nil {
		return err
	}
	server := k.server(address)
	if err := k.buildDependencies(server); err != nil {
		return err
	}

	ctx, cancel := context.WithCancelCause(ctx)
	var watchers sync.WaitGroup
	defer watchers.Wait()
	defer cancel(nil)
	watchers.Go(func() { k.watchAddress(ctx, address, cancel) })
	watchers.Go(func() { k.followResolvConf(ctx, resolv) })
	k.podSources(ctx)

	utilfeature.DefaultMutableFeatureGate.AddMetrics()
	if err := app.Run(ctx, server, k.deps, utilfeature.DefaultFeatureGate); err != nil {
		return fmt.Errorf("kubelet: run: %w", err)
	}
	// app.Run returns nil whatever ended its context.
	if cause := context.Cause(ctx); errors.Is(cause, ErrAddressChanged) {
		return cause
	}
	return nil
}

// server is the upstream form of the configuration.
func (k *Kubelet) server(address net.IP) *options.KubeletServer {
	flags := options.NewKubeletFlags()
	flags.HostnameOverride = k.cfg.NodeName
	flags.RootDirectory = k.cfg.RootDir
	flags.CertDirectory = k.cfg.RootDir + "/pki"
	flags.NodeLabels = k.cfg.NodeLabels
	if address != nil {
		flags.NodeIP = address.String()
	}
	// Any text but the empty one keeps upstream from its mode without an API;
	// the file is not opened, as all clients are given.
	flags.KubeConfig = "in-process"
	return &options.KubeletServer{KubeletFlags: *flags, KubeletConfiguration: *k.settings}
}

// measuredCgroups are the pods' and, for the summary's system containers, those
// of this process and of what the settings name.
func measuredCgroups(server *options.KubeletServer) []string {
	roots := []string{cm.NodeAllocatableRoot(server.CgroupRoot, server.CgroupsPerQOS, server.CgroupDriver)}
	// Not in a cgroup of its own on hosts without systemd: then it has no figures.
	own, _ := cm.GetKubeletContainer(klog.Background(), server.KubeletCgroups)
	for _, name := range []string{own, server.RuntimeCgroups, server.SystemCgroups} {
		if name != "" {
			roots = append(roots, name)
		}
	}
	return roots
}

// buildDependencies makes k.deps and has the running kubelet handed out.
func (k *Kubelet) buildDependencies(server *options.KubeletServer) error {
	measured := k.cfg.Containers
	if measured == nil {
		var err error
		measured, err = containers.New(containers.Config{
			RootDir:            k.cfg.RootDir,
			CgroupRoots:        measuredCgroups(server),
			ContainerdEndpoint: k.cfg.RuntimeEndpoint,
			Interval:           k.cfg.HousekeepingInterval,
			Disk:               server.LocalStorageCapacityIsolation,
		})
		if err != nil {
			return err
		}
	}
	// The kubelet starts its cAdvisor once, when it is built and the runtime is
	// up; it can be asked from then on.
	deps, err := dependencies(k.cfg.Transport, k.settings, k.cfg.CSI, startSignal{measured, func() { close(k.live) }})
	if err != nil {
		return err
	}
	// Called while the kubelet is being built, with every dependency filled in.
	deps.Options = append(deps.Options, func(instance *upstream.Kubelet) {
		k.instance = instance
		close(k.built)
	})
	k.deps = deps
	return nil
}

// startSignal tells when cAdvisor has started.
type startSignal struct {
	cadvisor.Interface
	started func()
}

func (s startSignal) Start() error {
	if err := s.Interface.Start(); err != nil {
		return err
	}
	s.started()
	return nil
}
