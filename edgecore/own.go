package main

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/skerry-io/skerry/edgecore/autonomy"
	"github.com/skerry-io/skerry/edgecore/devices"
	"github.com/skerry-io/skerry/edgecore/identity"
	"github.com/skerry-io/skerry/edgecore/link"
	"github.com/skerry-io/skerry/edgecore/store"
	"github.com/skerry-io/skerry/edgecore/walltime"
	"github.com/skerry-io/skerry/metrics"
	"github.com/skerry-io/skerry/metrics/host"
)

// ownServer answers about edgecore itself: its status on a unix socket that
// only root can open; its metrics and the host's there, on a loopback port with
// a bearer token, and through the tunnel beside the kubelet's.
type ownServer struct {
	dataDir  string
	cfg      Config
	node     string
	hub      string
	link     *link.Link
	store    *store.Store
	ready    *readiness
	devices  *devices.Part // nil: off
	started  time.Time
	clock    *walltime.Clock
	identity *identity.Identity
	log      *slog.Logger

	socket   net.Listener
	loopback net.Listener // nil when off
	token    string
	registry *metrics.Registry
	host     *host.Sampler
}

// metricsPath is where edgecore's own metrics stand among the kubelet's:
// /api/v1/nodes/NODE/proxy/metrics/edgecore at the API server.
const metricsPath = "/metrics/edgecore"

// Status is what "edgecore status" tells.
type Status struct {
	Version string    `json:"version"`
	Node    string    `json:"node"`
	Hub     string    `json:"hub"`
	Started time.Time `json:"started"`

	Connected  bool      `json:"connected"`
	Since      time.Time `json:"since"` // connected or disconnected since
	HubVersion string    `json:"hubVersion,omitempty"`
	LastSync   time.Time `json:"lastSync,omitzero"`
	LastError  string    `json:"lastError,omitempty"`
	// NodeDeleted is when this node heard that its Node object was deleted in
	// the cloud; it needs a new join.
	NodeDeleted time.Time `json:"nodeDeleted,omitzero"`
	RTT         string    `json:"rtt,omitempty"`

	CertificateEnds time.Time `json:"certificateEnds"`
	// ClockOff is by how much this machine's clock is known to be ahead.
	ClockOff string `json:"clockOff,omitempty"`

	Synced        bool           `json:"synced"` // a complete set was stored once
	Objects       map[string]int `json:"objects"`
	Outbox        int            `json:"outbox"`
	EventsDropped uint64         `json:"eventsDropped"`
	StoreWritten  uint64         `json:"storeWrittenBytes"`
	TunnelSent    uint64         `json:"tunnelSentBytes"`
	TunnelRecv    uint64         `json:"tunnelReceivedBytes"`
	TunnelStreams int            `json:"tunnelStreams"` // open now

	StatesDropped uint64          `json:"statesDropped,omitempty"` // of pods that are gone, see store.Outbox
	StoreTrouble  *store.Trouble  `json:"storeTrouble,omitempty"`  // why the disk takes no writes
	StoreMended   *store.Mended   `json:"storeMended,omitempty"`   // what was done to a damaged store at the start
	Bytes         Bytes           `json:"bytes"`
	Autonomy      autonomy.Report `json:"autonomy"`
	Drill         *DrillStatus    `json:"drill,omitempty"`
	Devices       *devices.Status `json:"devices,omitempty"`
}

// listen opens the socket and the port, so that what is wrong with them is
// told before anything starts.
func (s *ownServer) listen() error {
	path := filepath.Join(s.dataDir, adminSocket)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("status socket: %w", err)
	}
	var err error
	if s.socket, err = net.Listen("unix", path); err != nil {
		return fmt.Errorf("status socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return fmt.Errorf("status socket: %w", err)
	}
	if s.registry, err = metrics.New(metrics.Config{Program: "edgecore", Version: version, Log: s.log}); err != nil {
		return err
	}
	if s.host, err = host.New(host.Config{Log: s.log}); err != nil {
		return err
	}
	for _, c := range []prometheus.Collector{edgeCollector{s.status}, s.host, s.ready} {
		if err := s.registry.Register(c); err != nil {
			return fmt.Errorf("register metrics: %w", err)
		}
	}
	if s.cfg.Metrics.Listen == "off" {
		return nil
	}
	host, _, err := net.SplitHostPort(s.cfg.Metrics.Listen)
	if ip := net.ParseIP(host); err != nil || ip == nil || !ip.IsLoopback() {
		return fmt.Errorf("metrics.listen %q is not a loopback address with a port; the hub reads the same metrics through the tunnel", s.cfg.Metrics.Listen)
	}
	if s.token, err = ensureToken(filepath.Join(s.dataDir, metricsToken)); err != nil {
		return err
	}
	if s.loopback, err = net.Listen("tcp", s.cfg.Metrics.Listen); err != nil {
		return fmt.Errorf("metrics: %w; choose another address with metrics.listen in %s, or \"off\"", err, filepath.Join(s.dataDir, configFile))
	}
	return nil
}

func (s *ownServer) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	serve := func(l net.Listener, h http.Handler) {
		srv := &http.Server{
			Handler: h, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
			ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		}
		g.Go(func() error {
			if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("serve %s: %w", l.Addr(), err)
			}
			return nil
		})
		g.Go(func() error { <-ctx.Done(); return srv.Close() })
	}
	g.Go(func() error { return s.host.Run(ctx) })
	// The socket's mode is its authentication.
	local := http.NewServeMux()
	local.HandleFunc("GET /v1/status", s.serveStatus)
	s.registerDrill(local)
	if s.devices != nil {
		local.Handle("/v1/twins", s.devices.Admin())
		local.Handle("/v1/twins/", s.devices.Admin())
		local.Handle("/v1/telemetry/", s.devices.Admin())
	}
	local.Handle("GET /metrics", s.registry.Handler(authenticated))
	serve(s.socket, local)
	if s.loopback != nil {
		mux := http.NewServeMux()
		mux.Handle("GET /metrics", s.registry.Handler(s.checkToken))
		serve(s.loopback, mux)
	}
	return g.Wait()
}

// beside returns the handler that the hub's requests go to: the kubelet's, with
// edgecore's own metrics among its.
func (s *ownServer) beside(kubelet func(context.Context) (http.Handler, error)) func(context.Context) (http.Handler, error) {
	own := s.registry.Handler(authenticated)
	return func(ctx context.Context) (http.Handler, error) {
		theirs, err := kubelet(ctx)
		if err != nil {
			return nil, err
		}
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == metricsPath {
				own.ServeHTTP(w, r)
				return
			}
			theirs.ServeHTTP(w, r)
		}), nil
	}
}

// authenticated is for peers that the connection itself has authenticated: the
// hub, and whoever may open the socket.
func authenticated(*http.Request) error { return nil }

func (s *ownServer) checkToken(r *http.Request) error {
	got := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	if subtle.ConstantTimeCompare([]byte(got), []byte(s.token)) != 1 {
		return errors.New("wrong or no bearer token")
	}
	return nil
}

func (s *ownServer) status() Status {
	l := s.link.State()
	st := Status{
		Version: version, Node: s.node, Hub: s.hub, Started: s.started,
		Connected: l.Connected, Since: l.Since, HubVersion: l.Hub, LastSync: l.LastSync, LastError: l.LastError, NodeDeleted: l.Deleted,
		Synced: s.store.Synced(), Objects: map[string]int{},
		Outbox: s.store.Outbox().Depth(), EventsDropped: s.store.Outbox().Dropped(),
		StoreWritten: s.store.BytesWritten(),
		TunnelSent:   sum(l.Tunnel.BytesOut[:]), TunnelRecv: sum(l.Tunnel.BytesIn[:]), TunnelStreams: l.Tunnel.Streams,
	}
	st.StatesDropped = s.store.Outbox().DroppedStates()
	st.StoreTrouble, st.StoreMended = s.store.Trouble(), s.store.Mended()
	st.Bytes = bytesNow(s.started, s.store, s.link)
	if s.devices != nil {
		d := s.devices.Status()
		st.Devices = &d
	}
	st.CertificateEnds = s.identity.Certificate().NotAfter
	if off := s.clock.Off(); off != 0 {
		st.ClockOff = off.Round(time.Second).String()
	}
	if l.Connected && l.Tunnel.RTT > 0 {
		st.RTT = l.Tunnel.RTT.String()
	}
	for _, it := range s.store.Inventory() {
		st.Objects[it.Key.Resource]++
	}
	return st
}

func sum(classes []uint64) uint64 {
	var n uint64
	for _, v := range classes {
		n += v
	}
	return n
}

func (s *ownServer) serveStatus(w http.ResponseWriter, r *http.Request) {
	st := s.status()
	st.Autonomy, st.Drill = s.ready.monitor.Now(r.Context()), s.ready.drillStatus()
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(st); err != nil {
		s.log.Debug("status not sent", "err", err)
	}
}

// ensureToken returns the secret in path, made when missing.
func ensureToken(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err == nil && len(b) >= 32 {
		return strings.TrimSpace(string(b)), nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("metrics token: %w", err)
	}
	raw := make([]byte, 24)
	rand.Read(raw)
	token := hex.EncodeToString(raw)
	if err := os.WriteFile(path, []byte(token+"\n"), 0o600); err != nil {
		return "", fmt.Errorf("metrics token: %w", err)
	}
	return token, nil
}
