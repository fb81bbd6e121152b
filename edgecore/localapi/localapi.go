package localapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/skerry-io/skerry/edgecore/apifacade"
	"github.com/skerry-io/skerry/edgecore/connlimit"
	"github.com/skerry-io/skerry/edgecore/store"
	"github.com/skerry-io/skerry/edgecore/tokens"
)

// Verifier tells whom a token issued on this node speaks for.
type Verifier interface {
	Verify(token, audience string) (tokens.Identity, error)
}

// Config is what the local API needs.
type Config struct {
	Store    *store.Store // required
	NodeName string       // required
	Tokens   Verifier     // required
	// Dir keeps the node's local authority, the administrator's token and the
	// kubeconfig made of them; required.
	Dir string
	// Listen is the administrator's loopback address; required.
	Listen string
	// PodListen is where pods find the API; empty: they do not. A link-local
	// IPv4 address that no interface has is added to the loopback interface.
	PodListen string
	// ClusterDomain is part of one of the API's names; zero means cluster.local.
	ClusterDomain string
	// Kubelet returns the handler of the kubelet's API, for logs, exec, attach
	// and port-forward. Required.
	Kubelet func(ctx context.Context) (http.Handler, error)
	// Devices answers what is below /v1/. It finds the caller with
	// request.UserFrom, judges rights and keeps bounds of its own. Nil: nothing
	// is there.
	Devices http.Handler
	// Notice ends the warning that comes with lists, as "in step with the
	// cloud". Nil: nothing is added.
	Notice func() string
	Clock  func() time.Time // nil means time.Now
	Log    *slog.Logger     // nil discards
}

// Files below Config.Dir.
const (
	authorityFile = "local-ca.pem"      // certificate and key of the node's own authority
	adminFile     = "local-admin.token" // the administrator's bearer token
	Kubeconfig    = "local.kubeconfig"  // for any kubectl on the device
	podInterface  = "lo:skerry"         // label of an address added for pods
)

// Files lists what New leaves in its Dir.
func Files() []string { return []string{authorityFile, adminFile, Kubeconfig} }

// Server is the local API. A nil one is off: it serves nothing.
type Server struct {
	cfg   Config
	log   *slog.Logger
	auth  *authenticator
	may   *authorizer
	ca    *authority
	api   *apifacade.Facade
	short chan struct{} // requests under way
	long  chan struct{} // watches and streams under way

	podAddr      netip.AddrPort // zero when pods are not served
	admin, inPod net.Listener
}

// New checks cfg and makes what is missing in Dir; it starts nothing.
func New(cfg Config) (*Server, error) {
	if cfg.Store == nil || cfg.NodeName == "" || cfg.Tokens == nil || cfg.Dir == "" || cfg.Kubelet == nil {
		return nil, errors.New("localapi: Store, NodeName, Tokens, Dir and Kubelet are required")
	}
	if cfg.Clock == nil {
		cfg.Clock = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.ClusterDomain == "" {
		cfg.ClusterDomain = "cluster.local"
	}
	listen, err := netip.ParseAddrPort(cfg.Listen)
	if err != nil || !listen.Addr().IsLoopback() {
		return nil, fmt.Errorf("localAPI.listen %q is not a loopback address with a port", cfg.Listen)
	}
	s := &Server{
		cfg: cfg, log: cfg.Log, may: newAuthorizer(cfg.Store, cfg.NodeName),
		short: make(chan struct{}, maxShort), long: make(chan struct{}, maxLong),
	}
	if cfg.PodListen != "" {
		s.podAddr, err = netip.ParseAddrPort(cfg.PodListen)
		if a := s.podAddr.Addr(); err != nil || a.IsLoopback() || a.IsUnspecified() || a.IsMulticast() {
			return nil, fmt.Errorf("localAPI.podListen %q is not an address with a port that pods can reach", cfg.PodListen)
		}
	}
	names := []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc." + cfg.ClusterDomain}
	addrs := []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::1"), listen.Addr()}
	if s.podAddr.IsValid() {
		addrs = append(addrs, s.podAddr.Addr())
	}
	if s.ca, err = openAuthority(filepath.Join(cfg.Dir, authorityFile), cfg.NodeName, names, addrs, cfg.Clock); err != nil {
		return nil, err
	}
	token, err := openToken(filepath.Join(cfg.Dir, adminFile))
	if err != nil {
		return nil, err
	}
	s.auth = &authenticator{store: cfg.Store, node: cfg.NodeName, local: cfg.Tokens, admin: token, clock: cfg.Clock}
	if err := s.writeKubeconfig(token); err != nil {
		return nil, err
	}
	s.api, err = apifacade.New(apifacade.Config{
		Store: cfg.Store, NodeName: cfg.NodeName, Log: cfg.Log, Authorize: s.authorize, Notice: s.notice,
	})
	return s, err
}

// Listen opens the ports, so that what is wrong with them is told before
// anything starts.
func (s *Server) Listen() error {
	if s == nil {
		return nil
	}
	var err error
	if s.admin, err = net.Listen("tcp", s.cfg.Listen); err != nil {
		return fmt.Errorf("local API: %w; choose another address with localAPI.listen, or \"off\"", err)
	}
	if !s.podAddr.IsValid() {
		return DropPodAddress()
	}
	if err := ensurePodAddress(s.podAddr.Addr()); err != nil {
		return errors.Join(err, s.admin.Close())
	}
	if s.inPod, err = net.Listen("tcp", s.podAddr.String()); err != nil {
		return errors.Join(fmt.Errorf("local API for pods: %w; choose another address with localAPI.podListen", err), s.admin.Close())
	}
	return nil
}

// Run serves until ctx ends and returns once all it started has stopped.
func (s *Server) Run(ctx context.Context) error {
	if s == nil {
		return nil
	}
	g, ctx := errgroup.WithContext(ctx)
	serve := func(l net.Listener, admin bool) {
		srv := &http.Server{
			Handler:           s.handler(admin),
			TLSConfig:         s.ca.serverTLS(),
			ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10,
			BaseContext: func(net.Listener) context.Context { return ctx },
			ErrorLog:    slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		}
		g.Go(func() error {
			if err := srv.ServeTLS(connlimit.New(l, maxConns), "", ""); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("serve the local API at %s: %w", l.Addr(), err)
			}
			return nil
		})
		g.Go(func() error { <-ctx.Done(); return srv.Close() })
	}
	serve(s.admin, true)
	if s.inPod != nil {
		serve(s.inPod, false)
	}
	return g.Wait()
}

// notice is the warning that comes with lists.
func (s *Server) notice() string {
	text := "node " + s.cfg.NodeName + " answers from its own store: a list holds what this node has, not all of the cluster"
	if s.cfg.Notice != nil {
		if more := s.cfg.Notice(); more != "" {
			text += "; " + more
		}
	}
	return text
}

// writeKubeconfig makes the file that kubectl on the device uses.
func (s *Server) writeKubeconfig(token string) error {
	config := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters:
- name: edge
  cluster: {server: "https://%s", certificate-authority-data: %s}
users:
- name: admin
  user: {token: %s}
contexts:
- name: edge
  context: {cluster: edge, user: admin}
current-context: edge
`, s.cfg.Listen, s.ca.base64(), token)
	path := filepath.Join(s.cfg.Dir, Kubeconfig)
	if old, err := os.ReadFile(path); err == nil && string(old) == config {
		return os.Chmod(path, 0o600)
	}
	return writeSecret(path, []byte(config))
}

// writeSecret replaces a file of mode 0600 as a whole.
func writeSecret(path string, content []byte) error {
	tmp := path + ".tmp"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("local API: %w", err)
	}
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("local API: %w", err)
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("local API: write %s: %w", path, err), os.Remove(tmp))
	}
	return nil
}

// readSecret reads a file of mode 0600.
func readSecret(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("local API: %s is readable by others (mode %o); chmod 600 it", path, info.Mode().Perm())
	}
	if info.Size() > 64<<10 {
		return nil, fmt.Errorf("local API: %s is too large", path)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("local API: %w", err)
	}
	return b, nil
}
