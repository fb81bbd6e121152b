package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"sigs.k8s.io/yaml"

	"github.com/skerry-io/skerry/edgecore/apifacade"
	"github.com/skerry-io/skerry/edgecore/identity"
	"github.com/skerry-io/skerry/edgecore/kubelet"
	"github.com/skerry-io/skerry/edgecore/link"
	"github.com/skerry-io/skerry/edgecore/netwatch"
	"github.com/skerry-io/skerry/edgecore/store"
	"github.com/skerry-io/skerry/edgecore/tokens"
	"github.com/skerry-io/skerry/edgecore/walltime"
	"github.com/skerry-io/skerry/tunnel"
)

const (
	// gcPercent halves Go's slack: with 30 pods 31 MB of anonymous memory
	// instead of 45, for no measurable CPU.
	gcPercent = 50

	// tunnelPath is where the hub takes tunnels.
	tunnelPath = "/v1/tunnel"
)

func newRunCommand() *cobra.Command {
	var dataDir string
	c := &cobra.Command{
		Use:   "run",
		Short: "Run the node",
		Long: `Run the node: its pods from its own store at once, the tunnel to the hub when
there is one. The configuration is DATA-DIR/config.yaml. Ending edgecore leaves
the pods running.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := loadConfig(dataDir)
			if err != nil {
				return err
			}
			log, err := newLog(cfg.Log)
			if err != nil {
				return err
			}
			err = run(c.Context(), dataDir, cfg, log)
			if errors.Is(err, errRestart) {
				return replaceSelf()
			}
			return ended(c.Context(), err)
		},
	}
	c.Flags().StringVar(&dataDir, "data-dir", defaultDataDir, "directory of the node's state")
	return c
}

// run is the daemon. Nothing on the way to the kubelet waits for a network, a
// name server or a clock: a node that has synced once boots alone.
func run(ctx context.Context, dataDir string, cfg Config, log *slog.Logger) error {
	started := time.Now()
	debug.SetGCPercent(gcPercent)

	id, err := identity.Load(dataDir)
	if err != nil {
		return err
	}
	hub := cfg.Hub
	if hub == "" {
		hub = id.HubURL().String()
	}
	node := id.NodeName()
	budget, err := cfg.Store.bytesPerDay()
	if err != nil {
		return err
	}
	db, err := store.Open(store.Config{
		Path:        filepath.Join(dataDir, storeFile),
		KeyFile:     filepath.Join(dataDir, storeKeyFile),
		BytesPerDay: budget,
		Log:         log,
	})
	if err != nil {
		return err
	}
	defer db.Close()

	clock, err := walltime.Open(walltime.Config{Path: filepath.Join(dataDir, clockFile), Least: id.IssuedAt(), Log: log})
	if err != nil {
		return err
	}
	id.UseClock(clock.Now)
	if again, err := link.Rejoin(ctx, db, node, id.JoinID(), cfg.Node.Taints); err != nil {
		return err
	} else if again {
		log.Info("this machine has joined again after its Node was deleted in the cloud; registering it anew", "node", node)
	}
	dialer := &tunnel.Dialer{
		URL: tunnelURL(hub), TLS: id.ClientTLS(),
		Config:  tunnel.Config{PingMax: cfg.Tunnel.PingMax.Duration, Log: log},
		Backoff: tunnel.Backoff{Max: cfg.Tunnel.MaxBackoff.Duration},
		Log:     log,
	}
	renewer, err := identity.NewRenewer(identity.RenewerConfig{Identity: id, HubURL: hub, Renewed: dialer.Redial, Log: log})
	if err != nil {
		return err
	}
	dialer.Retry = func(err error, _ time.Duration) error {
		// A hub that refuses the certificate may still renew it.
		var failed *tunnel.DialError
		if errors.As(err, &failed) && (failed.Reason == tunnel.DialTLS || failed.Reason == tunnel.DialRejected) {
			renewer.Kick()
		}
		return nil
	}
	var handler func(context.Context) (http.Handler, error) // for the hub's requests
	uplink, err := link.New(link.Config{
		Dialer: dialer, Store: db, NodeName: node, Agent: "edgecore/" + version, Log: log,
		JoinID: id.JoinID(), WhenDeleted: cfg.Node.WhenDeleted, HubTime: clock.Learn,
		Kubelet: func(ctx context.Context) (http.Handler, error) { return handler(ctx) },
	})
	if err != nil {
		return err
	}
	source, err := tokens.New(tokens.Config{
		Store: db, NodeName: node, KeyFile: filepath.Join(dataDir, issuerFile),
		Cloud: link.NewCloudTokens(uplink), Clock: clock.Now, Off: clock.Off, Log: log,
	})
	if err != nil {
		return err
	}
	things, err := newDevices(dataDir, cfg, node, db, source, clock, log)
	if err != nil {
		return err
	}
	if err := uplink.Hold(streamsOf(things)...); err != nil {
		return err
	}
	var kubeletAPI func(context.Context) (http.Handler, error) // for local clients
	local, err := newLocalAPI(dataDir, cfg, node, db, source, uplink,
		func(ctx context.Context) (http.Handler, error) { return kubeletAPI(ctx) }, things, log)
	if err != nil {
		return err
	}
	facade, err := apifacade.New(apifacade.Config{Store: db, NodeName: node, Tokens: source, View: local.KubeletView(), Log: log})
	if err != nil {
		return err
	}
	kcfg, err := kubeletConfig(cfg, node, log)
	if err != nil {
		return err
	}
	kcfg.Transport = facade.Transport()
	if kcfg.ImageEndpoint, err = imagesEndpoint(dataDir); err != nil {
		return err
	}
	k, err := kubelet.New(kcfg)
	if err != nil {
		return err
	}
	ready, err := newReadiness(readinessConfig{
		dataDir: dataDir, cfg: cfg, id: id, store: db, link: uplink, kubelet: k, endpoint: kcfg.ImageEndpoint, devices: things, log: log,
	})
	if err != nil {
		return err
	}

	own := &ownServer{dataDir: dataDir, cfg: cfg, node: node, hub: hub, link: uplink, store: db, ready: ready, devices: things, started: started, clock: clock, identity: id, log: log}
	if err := own.listen(); err != nil {
		return err
	}
	if err := ready.images.Listen(); err != nil {
		return err
	}
	if err := local.Listen(); err != nil {
		return err
	}
	handler, kubeletAPI = own.beside(k.Handler), k.Handler

	// The store outlives everything that uses it, and the kubelet's process
	// ends with its Run.
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return own.run(ctx) })
	g.Go(func() error { return ready.run(ctx) })
	g.Go(func() error { return local.Run(ctx) })
	if things != nil {
		g.Go(func() error { return things.Run(ctx) })
	}
	g.Go(func() error {
		return (&notices{store: db, node: node, inStep: uplink.InStep, log: log}).run(ctx)
	})
	g.Go(func() error {
		if !db.Synced() {
			log.Info("waiting for this node's first sync with the hub; pods start after it", "hub", hub)
		}
		select {
		case <-uplink.FirstSync():
		case <-ctx.Done():
			return nil
		}
		if err := ready.drill.BeforeKubelet(ctx); err != nil {
			return err
		}
		if err := k.Run(ctx); err != nil {
			return err
		}
		if ctx.Err() == nil {
			return errors.New("the kubelet ended by itself; the supervisor starts edgecore again")
		}
		return nil
	})
	g.Go(func() error { return uplink.Run(ctx) })
	g.Go(func() error { return renewer.Run(ctx) })
	g.Go(func() error { return clock.Run(ctx) })
	g.Go(func() error {
		if err := netwatch.Run(ctx, uplink.NetworkChanged); err != nil {
			log.Warn("changes of the network are not seen; the hub is dialled at the backoff's pace", "err", err)
		}
		return nil
	})
	return g.Wait()
}

// tunnelURL is where the hub takes tunnels.
func tunnelURL(hub string) string {
	u, err := url.Parse(hub)
	if err != nil {
		return hub // the dialer says what is wrong with it
	}
	u.Scheme = "wss"
	u.Path = tunnelPath
	return u.String()
}

func kubeletConfig(cfg Config, node string, log *slog.Logger) (kubelet.Config, error) {
	k := kubelet.Config{
		NodeName:        node,
		RootDir:         cfg.Kubelet.RootDir,
		RuntimeEndpoint: cfg.Runtime.Endpoint,
		CgroupRoot:      cfg.Kubelet.CgroupRoot,
		CgroupDriver:    cfg.Runtime.CgroupDriver,
		PodLogsDir:      cfg.Kubelet.PodLogsDir,
		StaticPodPath:   cfg.Kubelet.StaticPodPath,
		NodeLabels:      cfg.Node.Labels,
		Taints:          cfg.Node.Taints,
		MaxPods:         cfg.Kubelet.MaxPods,
		ClusterDNS:      cfg.Kubelet.ClusterDNS,
		ClusterDomain:   cfg.Kubelet.ClusterDomain,
		CSI:             cfg.Kubelet.CSI,
		Log:             log,
		// The kubelet's narration is for those who look for something.
		KubeletLogLevel: slog.LevelWarn,
	}
	if log.Enabled(context.Background(), slog.LevelDebug) {
		k.KubeletLogLevel = slog.LevelInfo
	}
	if cfg.Node.IP != "" {
		if k.NodeIP = net.ParseIP(cfg.Node.IP); k.NodeIP == nil {
			return k, fmt.Errorf("configuration: node.ip %q is not an IP address", cfg.Node.IP)
		}
	}
	if len(cfg.Kubelet.Config) > 0 {
		overlay := cfg.Kubelet.Config
		if overlay["apiVersion"] == nil {
			overlay["apiVersion"], overlay["kind"] = "kubelet.config.k8s.io/v1beta1", "KubeletConfiguration"
		}
		b, err := yaml.Marshal(overlay)
		if err != nil {
			return k, fmt.Errorf("configuration: kubelet.config: %w", err)
		}
		k.Overlay = b
	}
	return k, nil
}
