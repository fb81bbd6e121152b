package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/skerry-io/skerry/cloudhub/devices"
	"github.com/skerry-io/skerry/cloudhub/edges"
	"github.com/skerry-io/skerry/cloudhub/enroll"
	"github.com/skerry-io/skerry/cloudhub/feed"
	"github.com/skerry-io/skerry/cloudhub/presence"
	"github.com/skerry-io/skerry/cloudhub/tolerations"
	"github.com/skerry-io/skerry/cloudhub/upstream"
	"github.com/skerry-io/skerry/tunnel"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

const (
	systemNamespace = "skerry-system"

	// hubSecret tells other commands how edge nodes reach the hub.
	hubSecret    = "hub"
	hubSecretURL = "url"

	// tunnelPath is where edge nodes open their tunnel.
	tunnelPath = "/v1/tunnel"

	// windowMemory bounds what all tunnels together may have in receive
	// windows beyond their first 64 KiB each.
	windowMemory = 256 << 20

	// kubeletPort is what Nodes publish; the hub is behind it, and dials a
	// stream, not a port.
	kubeletPort = 10250
)

// hubConfig is what the hub needs of the cluster it serves.
type hubConfig struct {
	REST        *rest.Config // the hub's own access
	Listener    net.Listener // for edge nodes
	PublicURL   string
	ServerNames []string
	VirtualCIDR string
	Toleration  int64 // seconds, as the cluster's admission gives by default

	CertLifetime, CertGrace time.Duration // see Config
	PingMax                 time.Duration

	Log   *slog.Logger
	Edges func(*edges.Edges)     // told once nodes can be reached
	Twins func(*devices.Devices) // likewise
}

// runHub serves edge nodes until ctx ends.
func runHub(ctx context.Context, cfg hubConfig) error {
	rc := rest.CopyConfig(cfg.REST)
	rc.QPS = -1 // the API server's priority and fairness is the limit
	client, err := kubernetes.NewForConfig(rc)
	if err != nil {
		return fmt.Errorf("cluster access: %w", err)
	}
	var cidr netip.Prefix
	if cfg.VirtualCIDR != "" {
		if cidr, err = netip.ParsePrefix(cfg.VirtualCIDR); err != nil {
			return fmt.Errorf("virtual CIDR: %w", err)
		}
	}
	var e *edges.Edges
	registry, err := enroll.New(ctx, enroll.Config{
		Client: client, Namespace: systemNamespace, ServerNames: cfg.ServerNames, VirtualCIDR: cidr,
		CertLifetime: cfg.CertLifetime, GraceAfterExpiry: cfg.CertGrace,
		OnRevoked: func(rec enroll.NodeRecord, why enroll.RevokeReason) {
			e.Cut(rec.Name, rec.Enrollment, "this node's enrolment was "+string(why))
		},
		Log: cfg.Log,
	})
	if err != nil {
		return err
	}
	dyn, err := dynamic.NewForConfig(rc)
	if err != nil {
		return fmt.Errorf("cluster access: %w", err)
	}
	if err := devices.Install(ctx, dyn, cfg.Log); err != nil {
		return err
	}
	objects, err := feed.New(feed.Config{
		Client: client, Devices: dyn, Issuer: feed.ClusterIssuer(client.Discovery().RESTClient(), nil), Agent: agent(), Log: cfg.Log,
	})
	if err != nil {
		return err
	}
	enrolled := func(node string) bool { _, ok := registry.Node(node); return ok }
	writer, err := upstream.New(upstream.Config{REST: rc, Addresses: kubeletAddresses{registry}, Log: cfg.Log})
	if err != nil {
		return err
	}
	told, err := presence.New(presence.Config{
		Client: client, Writer: writer, Nodes: objects.Nodes(), Enrolled: enrolled, Known: registry.Synced(), Log: cfg.Log,
	})
	if err != nil {
		return err
	}
	objects.Observe(told)
	twins, err := devices.New(devices.Config{
		Client: client, Dynamic: dyn,
		Devices: objects.Devices(), Models: objects.Models(), Discoveries: objects.Discoveries(), Routes: objects.Routes(), Log: cfg.Log,
	})
	if err != nil {
		return err
	}
	telemetry := devices.NewTelemetry(twins, objects.Secrets())
	e, err = edges.New(edges.Config{
		Registry: registry, Feed: objects, Upstream: writer, Presence: told, Client: client,
		Others: map[string]edges.Conversation{edgeapi.KindTwins: twins, edgeapi.KindTelemetry: telemetry},
		Tunnel: tunnel.Config{PingMax: cfg.PingMax, Log: cfg.Log, Memory: tunnel.NewMemory(windowMemory)}, Log: cfg.Log,
	})
	if err != nil {
		return err
	}
	keeper, err := tolerations.New(tolerations.Config{
		Client: client, Pods: objects.Pods(), Nodes: objects.Nodes(), NodeIndex: feed.ByNode,
		Enrolled: enrolled, Known: registry.Synced(),
		Seconds: cfg.Toleration, Log: cfg.Log,
	})
	if err != nil {
		return err
	}
	exposition, err := newExposition(client, hubCollector{e, objects, writer, keeper, told}, twins, telemetry, cfg.Log)
	if err != nil {
		return err
	}
	publicURL, err := publish(ctx, client, cfg)
	if err != nil {
		return err
	}

	mux := http.NewServeMux()
	mux.Handle("POST "+edgeapi.JoinPath, registry.JoinHandler())
	mux.Handle("POST "+edgeapi.RenewPath, registry.RenewHandler())
	mux.Handle("GET "+tunnelPath, e)
	mux.Handle("GET /metrics", exposition)
	mux.Handle(devices.Path, twins.Handler("", nil, true))
	mux.Handle(devices.Path+"/", twins.Handler("", nil, true))
	tlsConfig := registry.ServerTLS()
	// The tunnel's messages are records already; small ones only cost.
	tlsConfig.DynamicRecordSizingDisabled = true
	srv := &http.Server{
		Handler:           mux,
		TLSConfig:         tlsConfig,
		TLSNextProto:      map[string]func(*http.Server, *tls.Conn, http.Handler){}, // no HTTP/2: a WebSocket takes an HTTP/1.1 connection over
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(cfg.Log.Handler(), slog.LevelDebug),
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return registry.Run(ctx) })
	g.Go(func() error { return objects.Run(ctx) })
	g.Go(func() error { return keeper.Run(ctx) })
	g.Go(func() error { return told.Run(ctx) })
	g.Go(func() error { return twins.Run(ctx) })
	g.Go(func() error { return e.Run(ctx) })
	g.Go(func() error {
		for _, ready := range []<-chan struct{}{registry.Synced(), objects.Ready()} {
			select {
			case <-ready:
			case <-ctx.Done():
				return nil
			}
		}
		cfg.Edges(e)
		cfg.Twins(twins)
		cfg.Log.Info("serving edge nodes", "listen", cfg.Listener.Addr().String(), "url", publicURL)
		if err := srv.ServeTLS(cfg.Listener, "", ""); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve edge nodes: %w", err)
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		return srv.Close()
	})
	return g.Wait()
}

func agent() string { return "cloudhub/" + version }

// kubeletAddresses publishes each node under its virtual IP.
type kubeletAddresses struct{ registry *enroll.Enroll }

func (a kubeletAddresses) KubeletAddress(node string) (string, int32, bool) {
	ip, ok := a.registry.IPOf(node)
	return ip.String(), kubeletPort, ok
}

// publish writes how nodes reach this hub to where "cloudhub token create"
// finds it.
func publish(ctx context.Context, client kubernetes.Interface, cfg hubConfig) (string, error) {
	u := cfg.PublicURL
	if u == "" {
		u = (&url.URL{Scheme: "https", Host: publicHost(cfg.ServerNames, cfg.Listener.Addr())}).String()
	}
	secrets := client.CoreV1().Secrets(systemNamespace)
	want := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: hubSecret, Namespace: systemNamespace},
		Type:       "skerry.dev/hub",
		StringData: map[string]string{hubSecretURL: u},
	}
	_, err := secrets.Create(ctx, want, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		_, err = secrets.Update(ctx, want, metav1.UpdateOptions{})
	}
	if err != nil {
		return "", fmt.Errorf("publish the hub's URL: %w", err)
	}
	return u, nil
}

// publicHost guesses the host and port by which nodes may reach this hub: the
// first name the operator gave, else the address it listens on, else the
// host's first address that is not loopback.
func publicHost(names []string, listen net.Addr) string {
	host, port, err := net.SplitHostPort(listen.String())
	if err != nil {
		return listen.String()
	}
	if len(names) > 0 {
		return net.JoinHostPort(names[0], port)
	}
	if ip := net.ParseIP(host); ip != nil && !ip.IsUnspecified() {
		return net.JoinHostPort(host, port)
	}
	if addrs, err := net.InterfaceAddrs(); err == nil {
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() && p.Addr().IsGlobalUnicast() {
				return net.JoinHostPort(p.Addr().String(), port)
			}
		}
	}
	if h, err := os.Hostname(); err == nil {
		return net.JoinHostPort(h, port)
	}
	return net.JoinHostPort("localhost", port)
}
