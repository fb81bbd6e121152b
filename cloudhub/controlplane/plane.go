package controlplane

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/rest"
)

const (
	defaultListen      = ":6443"
	defaultServiceCIDR = "10.96.0.0/16"

	// defaultTolerationSeconds is Kubernetes' own.
	defaultTolerationSeconds = 300

	// renewEvery is how often a running plane looks at its certificates. They
	// are replaced 30 days before they end, so a day late does not matter.
	renewEvery = 24 * time.Hour

	// settleAfter is when the garbage of booting is returned to the system.
	settleAfter = 40 * time.Second

	// bootTimeout ends a boot that will not become ready, with the reason.
	bootTimeout = 2 * time.Minute
)

// Config says where a plane keeps its state and how it is reached.
type Config struct {
	// DataDir holds all state; made with mode 0700 when missing. Required.
	DataDir string
	// RuntimeDir holds etcd's socket; empty means DataDir/run. Set it when
	// DataDir is too long for a socket path.
	RuntimeDir string
	// Listen is the API server's address; empty means ":6443".
	Listen string
	// AdvertiseAddress is the IP pods and other machines reach the API server
	// at; empty means the listen address, or else the address of the default
	// route.
	AdvertiseAddress string
	// ExtraSANs are further DNS names and IPs for the serving certificate.
	ExtraSANs []string
	// ServiceCIDR is the range of service addresses; empty means 10.96.0.0/16.
	// It cannot be changed once services exist.
	ServiceCIDR string
	// DialNode opens the API server's connections to kubelets; addr is the
	// node's InternalIP and kubelet port, "100.64.0.7:10250". An error's text
	// is what the user of kubectl logs or exec reads. Required.
	DialNode func(ctx context.Context, network, addr string) (net.Conn, error)
	// DefaultTolerationSeconds is how long a pod that does not say otherwise is
	// left on a node that is not ready or not reachable; zero means 300.
	DefaultTolerationSeconds int64
	// Install adds API groups served by this process, before the API server
	// starts; nil adds none.
	Install func(Extension) error

	// APIServerArgs, ControllerManagerArgs and SchedulerArgs are further flags
	// of the three components ("--event-ttl=15m"); they win over the defaults.
	// Feature gates are shared by all three and belong in APIServerArgs.
	APIServerArgs         []string
	ControllerManagerArgs []string
	SchedulerArgs         []string

	// ExternalEtcd are the endpoints of an etcd to use instead of the embedded
	// one; its TLS files are given as APIServerArgs (--etcd-cafile, ...).
	ExternalEtcd []string

	Log *slog.Logger // nil discards
}

// Extension is what an Install function works with.
type Extension struct {
	// Context ends when the plane stops.
	Context context.Context
	// Server is the front of the API server's chain; groups installed on it
	// have its authentication and authorization.
	Server *genericapiserver.GenericAPIServer
	// Informers are those the API server runs for itself.
	Informers informers.SharedInformerFactory
}

// Plane is one control plane.
type Plane struct {
	cfg     Config
	log     *slog.Logger
	service netip.Prefix
	ready   chan struct{}

	mu   sync.Mutex
	ran  bool
	pki  *pki         // set once Run has opened the data directory
	addr *net.TCPAddr // set once Run listens
}

// New checks cfg; it starts nothing and writes nothing.
func New(cfg Config) (*Plane, error) {
	if cfg.DataDir == "" {
		return nil, errors.New("control plane: no data directory given")
	}
	if cfg.DialNode == nil {
		return nil, errors.New("control plane: no way to dial nodes given")
	}
	if cfg.Listen == "" {
		cfg.Listen = defaultListen
	}
	if cfg.ServiceCIDR == "" {
		cfg.ServiceCIDR = defaultServiceCIDR
	}
	if cfg.DefaultTolerationSeconds == 0 {
		cfg.DefaultTolerationSeconds = defaultTolerationSeconds
	}
	if cfg.DefaultTolerationSeconds < 0 {
		return nil, fmt.Errorf("control plane: default toleration of %d seconds: it must not be negative", cfg.DefaultTolerationSeconds)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	dir, err := filepath.Abs(cfg.DataDir)
	if err != nil {
		return nil, fmt.Errorf("control plane: data directory %s: %w", cfg.DataDir, err)
	}
	cfg.DataDir = dir
	if cfg.RuntimeDir == "" {
		cfg.RuntimeDir = filepath.Join(dir, "run")
	} else if cfg.RuntimeDir, err = filepath.Abs(cfg.RuntimeDir); err != nil {
		return nil, fmt.Errorf("control plane: runtime directory %s: %w", cfg.RuntimeDir, err)
	}
	if len(cfg.ExternalEtcd) == 0 {
		if err := checkSocketPath(etcdSocket(cfg.RuntimeDir)); err != nil {
			return nil, err
		}
	}
	if _, _, err := net.SplitHostPort(cfg.Listen); err != nil {
		return nil, fmt.Errorf("control plane: API server listen address %q: %w; write it as host:port or :port", cfg.Listen, err)
	}
	service, err := netip.ParsePrefix(cfg.ServiceCIDR)
	if err != nil || service.Bits() > service.Addr().BitLen()-4 {
		return nil, fmt.Errorf("control plane: service CIDR %q is not a range of at least 16 addresses; write it like %s", cfg.ServiceCIDR, defaultServiceCIDR)
	}
	if cfg.AdvertiseAddress != "" {
		if a, err := netip.ParseAddr(cfg.AdvertiseAddress); err != nil || a.IsUnspecified() || a.IsLoopback() {
			return nil, fmt.Errorf("control plane: advertise address %q is not an IP address other machines can reach", cfg.AdvertiseAddress)
		}
	}
	if err := checkArgs(cfg); err != nil {
		return nil, err
	}
	return &Plane{cfg: cfg, log: cfg.Log, service: service.Masked(), ready: make(chan struct{})}, nil
}

// Run boots the plane and serves until ctx ends; it returns once all it
// started has stopped. A plane runs once.
func (p *Plane) Run(ctx context.Context) error {
	p.mu.Lock()
	if p.ran {
		p.mu.Unlock()
		return errors.New("control plane: run twice; make a new one")
	}
	p.ran = true
	p.mu.Unlock()

	if os.Getenv("GOGC") == "" {
		// Live heap is about half of what the default lets the process keep;
		// this costs a few percent of one core and saves 15 MB or more.
		defer debug.SetGCPercent(debug.SetGCPercent(50))
	}

	dir, err := openDataDir(p.cfg)
	if err != nil {
		return err
	}
	defer dir.Close()

	// Listening comes before anything slow, so that a port in use is told at
	// once and never half-starts a cluster.
	listener, err := listen(ctx, p.cfg.Listen)
	if err != nil {
		return err
	}
	defer listener.Close() // the API server closes it too; this is for failures before it runs
	names := p.names(listener.Addr().(*net.TCPAddr))
	certs, err := openPKI(dir.pki(), names.server(), p.log)
	if err != nil {
		return err
	}
	p.mu.Lock()
	p.pki, p.addr = certs, listener.Addr().(*net.TCPAddr)
	p.mu.Unlock()
	if err := p.writeKubeconfigs(); err != nil {
		return err
	}
	err = p.runLayers(ctx, dir, listener, names)
	if ctx.Err() != nil && (errors.Is(err, context.Canceled) || errors.Is(err, context.Cause(ctx))) {
		return nil // told to stop, whatever it was about to do
	}
	return err
}

// runLayers starts each layer on the one below it and, however it ends, stops
// them in the opposite order: nothing is left calling a server that has gone.
func (p *Plane) runLayers(ctx context.Context, dir *dataDir, listener net.Listener, names names) (err error) {
	started := time.Now()
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)

	endpoints := p.cfg.ExternalEtcd
	if len(endpoints) == 0 {
		store, err := startEtcd(ctx, dir, p.log)
		if err != nil {
			return err
		}
		defer store.Close()
		store.watch(fail)
		endpoints = []string{store.endpoint()}
		p.log.Debug("etcd is ready", "after", time.Since(started).Round(time.Millisecond))
	}

	api, err := newAPIServer(ctx, p.cfg, p.apiServerFlags(endpoints, names), listener)
	if err != nil {
		return err
	}
	apiLayer := startLayer(fail, api.run)
	defer func() { err = errors.Join(err, apiLayer.stop()) }()
	if err := api.awaitReady(ctx, bootTimeout); err != nil {
		return err
	}
	p.log.Info("API server is ready", "address", p.URL(), "after", time.Since(started).Round(time.Millisecond))

	controllers := startLayer(fail,
		func(ctx context.Context) error { return runControllerManager(ctx, p.controllerManagerFlags()) },
		func(ctx context.Context) error { return runScheduler(ctx, p.schedulerFlags()) },
		p.renewLoop,
		settle,
	)
	defer func() { err = errors.Join(err, controllers.stop()) }()

	if err := bootstrapIdentity(ctx, api.loopback, p.HubClientConfig()); err != nil {
		return err
	}
	close(p.ready)
	p.log.Info("control plane is ready", "after", time.Since(started).Round(time.Millisecond))

	<-ctx.Done()
	return context.Cause(ctx)
}

// Ready is closed once the API server answers and the hub's identity has its
// rights.
func (p *Plane) Ready() <-chan struct{} { return p.ready }

// URL is where this machine reaches the API server; empty until Run listens.
func (p *Plane) URL() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.addr == nil {
		return ""
	}
	return "https://" + localAddress(p.addr)
}

// AdminKubeconfigPath is the administrator's kubeconfig; it exists once Run
// has opened the data directory.
func (p *Plane) AdminKubeconfigPath() string { return AdminKubeconfigPath(p.cfg.DataDir) }

// AdminKubeconfigPath is where a plane with that data directory keeps the
// administrator's kubeconfig.
func AdminKubeconfigPath(dataDir string) string { return filepath.Join(dataDir, "admin.kubeconfig") }

// HubClientConfig is a client configuration for the user skerry:cloudhub. Its
// certificate is read from files, so a renewed one is taken up by itself. It
// is complete once Ready is closed.
func (p *Plane) HubClientConfig() *rest.Config {
	return &rest.Config{
		Host:      p.URL(),
		UserAgent: "skerry-cloudhub",
		TLSClientConfig: rest.TLSClientConfig{
			CAFile:   p.pkiFile("ca.crt"),
			CertFile: p.pkiFile("cloudhub.crt"),
			KeyFile:  p.pkiFile("cloudhub.key"),
		},
		// The hub acts for every node; the API server's priority and fairness
		// is what holds it back, not a client-side limit.
		QPS: -1,
	}
}

// CABundle is the PEM certificate of the authority that signs the API
// server's serving certificate; nil until Run has opened the data directory.
func (p *Plane) CABundle() []byte {
	if c := p.certificates(); c != nil {
		return c.cluster.pem
	}
	return nil
}

// KubeletServingCertificate issues a serving certificate for a node's virtual
// InternalIP, signed by the authority the API server holds kubelets to. It is
// kept in memory only and ends after a week.
func (p *Plane) KubeletServingCertificate(ip netip.Addr) (*tls.Certificate, error) {
	c := p.certificates()
	if c == nil {
		return nil, fmt.Errorf("issue kubelet serving certificate for %s: the control plane has not started", ip)
	}
	return c.kubeletServing(ip)
}

// KubeletClient is the authority and the name of the API server's client
// certificate towards kubelets.
func (p *Plane) KubeletClient() (*x509.CertPool, string) {
	if c := p.certificates(); c != nil {
		return c.cluster.pool(), kubeletClientName
	}
	return nil, kubeletClientName
}

func (p *Plane) certificates() *pki {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pki
}

func (p *Plane) pkiFile(name string) string { return filepath.Join(p.cfg.DataDir, "pki", name) }

// renewLoop replaces leaves that are near their end. Every user of them reads
// its files again by itself; only the administrator's kubeconfig carries its
// certificate within.
func (p *Plane) renewLoop(ctx context.Context) error {
	tick := time.NewTicker(renewEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := p.certificates().renew(); err != nil {
			p.log.Error("renewing certificates failed; they are tried again in a day", "err", err)
			continue
		}
		if err := p.writeKubeconfigs(); err != nil {
			p.log.Error("writing the kubeconfigs after renewal failed", "err", err)
		}
	}
}

// settle gives back what booting used: informers and discovery leave some
// 30 MB of garbage that an idle process would keep.
func settle(ctx context.Context) error {
	t := time.NewTimer(settleAfter)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
		debug.FreeOSMemory()
	}
	<-ctx.Done()
	return nil
}

// layer is a set of loops that start and stop together.
type layer struct {
	cancel context.CancelFunc
	group  *errgroup.Group
}

// startLayer runs each loop until the layer is stopped. A loop that returns
// before that calls fail: no part of a control plane is optional.
func startLayer(fail context.CancelCauseFunc, loops ...func(context.Context) error) *layer {
	ctx, cancel := context.WithCancel(context.Background())
	l := &layer{cancel: cancel, group: new(errgroup.Group)}
	for _, loop := range loops {
		l.group.Go(func() error {
			err := loop(ctx)
			if ctx.Err() != nil {
				return nil // asked to stop
			}
			if err == nil {
				err = errors.New("control plane: a component ended by itself")
			}
			fail(err)
			return nil
		})
	}
	return l
}

func (l *layer) stop() error {
	l.cancel()
	return l.group.Wait()
}
