package convergence

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/skerry-io/skerry/cloudhub/edges"
	"github.com/skerry-io/skerry/cloudhub/enroll"
	"github.com/skerry-io/skerry/cloudhub/feed"
	"github.com/skerry-io/skerry/cloudhub/presence"
	"github.com/skerry-io/skerry/cloudhub/upstream"
	"github.com/skerry-io/skerry/edgecore/apifacade"
	"github.com/skerry-io/skerry/edgecore/link"
	"github.com/skerry-io/skerry/edgecore/store"
	"github.com/skerry-io/skerry/tunnel"
)

const nodeName = "edge-1"

// hub is the cloud side: everything of cloudhub that an edge node meets.
type hub struct {
	url   string
	certs *tls.Config // for the edge
	edges *edges.Edges
}

// registry stands for enrolment: a node is who its certificate says.
type registry struct{}

func (registry) Identify(cert *x509.Certificate) (enroll.NodeRecord, error) {
	return enroll.NodeRecord{Name: cert.Subject.CommonName, Enrollment: "1"}, nil
}
func (registry) Current(enroll.NodeRecord) bool              { return true }
func (registry) NodeByIP(netip.Addr) (string, bool)          { return nodeName, true }
func (registry) KubeletAddress(string) (string, int32, bool) { return "100.64.0.1", 10250, true }

func startHub(t *testing.T, c *cloud) *hub {
	t.Helper()
	api := httptest.NewServer(c)
	t.Cleanup(api.Close)
	rc := &rest.Config{Host: api.URL, QPS: -1, ContentConfig: rest.ContentConfig{ContentType: "application/json", AcceptContentTypes: "application/json"}}
	client, err := kubernetes.NewForConfig(rc)
	must(t, err)
	f, err := feed.New(feed.Config{Client: client, Agent: "model"})
	must(t, err)
	up, err := upstream.New(upstream.Config{REST: rc, Groups: true, Addresses: registry{}, Timeout: 10 * time.Second})
	must(t, err)
	known := make(chan struct{})
	close(known)
	told, err := presence.New(presence.Config{
		Client: client, Writer: up, Nodes: f.Nodes(), Enrolled: func(string) bool { return true }, Known: known,
	})
	must(t, err)
	f.Observe(told)
	e, err := edges.New(edges.Config{Registry: registry{}, Feed: f, Upstream: up, Presence: told, Client: client, Tunnel: tunnel.Config{CloseGrace: 20 * time.Millisecond}})
	must(t, err)

	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	own := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	srv := httptest.NewUnstartedServer(e)
	srv.TLS = &tls.Config{
		Certificates: []tls.Certificate{own}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13,
		NextProtos: []string{"http/1.1"},
	}
	srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	srv.StartTLS()
	t.Cleanup(srv.Close)

	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = f.Run(ctx) })
	running.Go(func() { _ = e.Run(ctx) })
	running.Go(func() { _ = told.Run(ctx) })
	t.Cleanup(func() { cancel(); running.Wait(); api.CloseClientConnections() })
	return &hub{
		url:   srv.URL + "/v1/tunnel",
		certs: &tls.Config{Certificates: []tls.Certificate{own}, RootCAs: pool, MinVersion: tls.VersionTLS13},
		edges: e,
	}
}

// template is of the one certificate that both ends show each other.
var template = &x509.Certificate{
	SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: nodeName}, IsCA: true, BasicConstraintsValid: true,
	NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	KeyUsage:    x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
}

// wire is the network between the two: it breaks after so many bytes, and
// refuses connections while it is down.
type wire struct {
	left atomic.Int64 // bytes until the next break; negative: none planned
	down atomic.Bool

	mu    sync.Mutex
	conns []net.Conn
}

func (w *wire) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	if w.down.Load() {
		return nil, errors.New("the wire is cut")
	}
	c, err := (&net.Dialer{}).DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.conns = append(w.conns, c)
	return &wireConn{c, w}, nil
}

// breakNow breaks what is open.
func (w *wire) breakNow() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.conns {
		// No farewell: what is in the kernel's buffers may be lost.
		_ = c.(*net.TCPConn).SetLinger(0)
		_ = c.Close()
	}
	w.conns = nil
}

// spend counts bytes and tells how many of n may still pass.
func (w *wire) spend(n int) (pass int, broken bool) {
	if w.left.Load() < 0 {
		return n, false
	}
	left := w.left.Add(-int64(n))
	if left >= 0 {
		return n, false
	}
	w.left.Store(-1)
	return max(n+int(left), 0), true
}

type wireConn struct {
	net.Conn
	w *wire
}

func (c *wireConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if pass, broken := c.w.spend(n); broken {
		c.w.breakNow()
		return pass, err
	}
	return n, err
}

func (c *wireConn) Write(p []byte) (int, error) {
	pass, broken := c.w.spend(len(p))
	n, err := c.Conn.Write(p[:pass])
	if broken {
		_ = c.Conn.Close() // with a farewell: what was written arrives
		c.w.breakNow()
		return n, net.ErrClosed
	}
	return n, err
}

// edge is one run of edgecore without the kubelet: it ends and starts again
// over the same store.
type edge struct {
	store  *store.Store
	facade *apifacade.Facade
	link   *link.Link
	client kubernetes.Interface // as the kubelet's

	cancel context.CancelFunc
	done   chan error
}

func startEdge(t *testing.T, dir string, h *hub, w *wire) *edge {
	t.Helper()
	s, err := store.Open(store.Config{Path: filepath.Join(dir, "edge.db")})
	must(t, err)
	f, err := apifacade.New(apifacade.Config{Store: s, NodeName: nodeName})
	must(t, err)
	l, err := link.New(link.Config{
		Dialer: &tunnel.Dialer{
			URL: h.url, TLS: h.certs, NetDial: w.dial, Timeout: 5 * time.Second,
			Proxy:   func(*http.Request) (*url.URL, error) { return nil, nil },
			Config:  tunnel.Config{CloseGrace: 20 * time.Millisecond},
			Backoff: tunnel.Backoff{First: time.Millisecond, Base: time.Millisecond, Max: 20 * time.Millisecond},
		},
		Store: s, NodeName: nodeName, Agent: "model",
		Kubelet: func(context.Context) (http.Handler, error) { return http.NotFoundHandler(), nil },
	})
	must(t, err)
	client, err := kubernetes.NewForConfig(&rest.Config{
		Host: "http://edge.invalid", Transport: f.Transport(), QPS: -1,
		ContentConfig: rest.ContentConfig{ContentType: "application/json", AcceptContentTypes: "application/json"},
	})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	e := &edge{store: s, facade: f, link: l, client: client, cancel: cancel, done: make(chan error, 1)}
	go func() { e.done <- l.Run(ctx) }()
	return e
}

func (e *edge) stop(t *testing.T) {
	t.Helper()
	e.cancel()
	select {
	case err := <-e.done:
		must(t, err)
	case <-time.After(20 * time.Second):
		t.Fatal("the link does not stop")
	}
	must(t, e.store.Close())
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
