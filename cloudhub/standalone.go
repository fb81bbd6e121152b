package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/endpoints/request"
	statsv1alpha1 "k8s.io/kubelet/pkg/apis/stats/v1alpha1"

	"github.com/skerry-io/skerry/cloudhub/controlplane"
	"github.com/skerry-io/skerry/cloudhub/devices"
	"github.com/skerry-io/skerry/cloudhub/edges"
	"github.com/skerry-io/skerry/cloudhub/kubeletproxy"
	"github.com/skerry-io/skerry/cloudhub/metricsapi"
)

func newStandaloneCommand() *cobra.Command {
	var file string
	flags := defaultConfig()
	c := &cobra.Command{
		Use:   "standalone",
		Short: "Run the hub and a whole Kubernetes control plane in one process",
		Long: `Run the hub and a whole Kubernetes control plane in one process: etcd,
kube-apiserver, scheduler and controller-manager. All state is below --data-dir;
DATA-DIR/admin.kubeconfig is the administrator's access to it.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := loadConfig(file, c.Flags())
			if err != nil {
				return err
			}
			log, err := newLog(cfg.Log)
			if err != nil {
				return err
			}
			controlplane.RedirectKlog(c.Context(), log)
			return ended(c.Context(), runStandalone(c.Context(), cfg, log))
		},
	}
	c.Flags().StringVar(&file, "config", "", "configuration file (YAML)")
	flags.bind(c.Flags())
	return c
}

func runStandalone(ctx context.Context, cfg Config, log *slog.Logger) error {
	started := time.Now()
	// The port first: whoever holds it is told within milliseconds, not after
	// a control plane has started.
	listener, err := listen(cfg.Listen)
	if err != nil {
		return err
	}
	defer listener.Close()

	var nodes lateNodes
	var twins lateTwins
	api, err := metricsapi.New(metricsapi.Config{Source: &nodes, Log: log})
	if err != nil {
		return err
	}
	var proxy *kubeletproxy.Proxy
	plane, err := controlplane.New(controlplane.Config{
		DataDir:          cfg.DataDir,
		RuntimeDir:       cfg.RuntimeDir,
		Listen:           cfg.APIServerListen,
		AdvertiseAddress: cfg.AdvertiseAddress,
		ExtraSANs:        cfg.ServerNames,
		ServiceCIDR:      cfg.ServiceCIDR,
		ExternalEtcd:     cfg.Etcd,

		DefaultTolerationSeconds: cfg.DefaultTolerationSeconds,

		DialNode: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return proxy.DialNode(ctx, network, addr)
		},
		Install: func(e controlplane.Extension) error {
			e.Server.Handler.NonGoRestfulMux.Handle(apiServerPrefix+devices.Path, &twins)
			e.Server.Handler.NonGoRestfulMux.HandlePrefix(apiServerPrefix+devices.Path+"/", &twins)
			return api.Install(e.Context, e.Server, e.Informers)
		},
		APIServerArgs:         cfg.APIServerArgs,
		ControllerManagerArgs: cfg.ControllerManagerArgs,
		SchedulerArgs:         cfg.SchedulerArgs,
		Log:                   log,
	})
	if err != nil {
		return err
	}
	proxy, err = kubeletproxy.New(kubeletproxy.Config{Nodes: &nodes, Authority: plane, Log: log})
	if err != nil {
		return err
	}

	// The hub stops before the control plane that it works with.
	planeCtx, stopPlane := context.WithCancel(context.WithoutCancel(ctx))
	defer stopPlane()
	g, planeCtx := errgroup.WithContext(planeCtx)
	g.Go(func() error { return plane.Run(planeCtx) })
	g.Go(func() error { return proxy.Run(planeCtx) })
	g.Go(func() error {
		defer stopPlane()
		hubCtx, cancel := context.WithCancel(planeCtx)
		defer cancel()
		defer context.AfterFunc(ctx, cancel)()
		select {
		case <-plane.Ready():
		case <-hubCtx.Done():
			return nil
		}
		log.Info("control plane ready", "url", plane.URL(), "took", time.Since(started).Round(time.Millisecond),
			"kubeconfig", plane.AdminKubeconfigPath())
		return runHub(hubCtx, hubConfig{
			REST:        plane.HubClientConfig(),
			Listener:    listener,
			PublicURL:   cfg.PublicURL,
			ServerNames: cfg.ServerNames,
			VirtualCIDR: cfg.VirtualCIDR,
			Toleration:  cfg.DefaultTolerationSeconds,

			CertLifetime: cfg.CertLifetime.Duration,
			CertGrace:    cfg.CertGrace.Duration,
			PingMax:      cfg.PingMax.Duration,

			Log:   log,
			Edges: func(e *edges.Edges) { nodes.edges.Store(e) },
			Twins: twins.set,
		})
	})
	return g.Wait()
}

// lateNodes stands for the connected nodes before there are any: the API server
// starts first.
type lateNodes struct{ edges atomic.Pointer[edges.Edges] }

var errStarting = errors.New("the hub is starting; try again in a moment")

func (l *lateNodes) DialKubelet(ctx context.Context, virtualIP string) (net.Conn, error) {
	e := l.edges.Load()
	if e == nil {
		return nil, errStarting
	}
	return e.DialKubelet(ctx, virtualIP)
}

func (l *lateNodes) Summary(ctx context.Context, node string) (*statsv1alpha1.Summary, error) {
	e := l.edges.Load()
	if e == nil {
		return nil, errStarting
	}
	return e.Summary(ctx, node)
}

func (l *lateNodes) Nodes() []string {
	e := l.edges.Load()
	if e == nil {
		return nil
	}
	return e.Nodes()
}

// apiServerPrefix is where the API server of this process serves twins too, for
// whom it has authenticated: kubectl get --raw /skerry/v1/twins/home/plug-1.
const apiServerPrefix = "/skerry"

// lateTwins serves them once there are any.
type lateTwins struct{ handler atomic.Pointer[http.Handler] }

func (l *lateTwins) set(d *devices.Devices) {
	h := d.Handler(apiServerPrefix, func(r *http.Request) (user.Info, error) {
		u, ok := request.UserFrom(r.Context())
		if !ok {
			return nil, errors.New("the API server did not say who asks")
		}
		return u, nil
	}, false)
	l.handler.Store(&h)
}

func (l *lateTwins) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := l.handler.Load()
	if h == nil {
		w.Header().Set("Retry-After", "1")
		http.Error(w, errStarting.Error(), http.StatusServiceUnavailable)
		return
	}
	(*h).ServeHTTP(w, r)
}

func listen(addr string) (net.Listener, error) {
	// Keepalive is the tunnel's own matter: the kernel's would cost each idle link 49 kB an hour.
	lc := net.ListenConfig{KeepAlive: -1}
	l, err := lc.Listen(context.Background(), "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listen for edge nodes: %w; another cloudhub may be running, or choose another port with --listen", err)
	}
	return l, nil
}
