package edges

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
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes/fake"

	"github.com/skerry-io/skerry/cloudhub/enroll"
	"github.com/skerry-io/skerry/cloudhub/feed"
	"github.com/skerry-io/skerry/cloudhub/presence"
	"github.com/skerry-io/skerry/tunnel"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

const soon = 20 * time.Second // for what must come at once

// noLeaks fails the test if goroutines of the project outlive it.
func noLeaks(t *testing.T) {
	t.Helper()
	t.Cleanup(func() {
		var left []string
		for range 300 {
			buf := make([]byte, 4<<20)
			left = nil
			for _, g := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
				if strings.Contains(g, "skerry/cloudhub/edges.(*") || strings.Contains(g, "skerry/tunnel.(*") {
					left = append(left, g)
				}
			}
			if len(left) == 0 {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Errorf("goroutines left:\n%s", strings.Join(left, "\n\n"))
	})
}

// registry is who is enrolled; a node is its certificate's common name.
type registry struct {
	mu      sync.Mutex
	refused map[string]error // by name
	revoked map[string]bool  // between the two looks
}

func (r *registry) Identify(cert *x509.Certificate) (enroll.NodeRecord, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	name := cert.Subject.CommonName
	if err := r.refused[name]; err != nil {
		return enroll.NodeRecord{}, err
	}
	return enroll.NodeRecord{Name: name, Enrollment: cert.Subject.SerialNumber}, nil
}

func (r *registry) Current(rec enroll.NodeRecord) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return !r.revoked[rec.Name]
}

func (r *registry) NodeByIP(ip netip.Addr) (string, bool) {
	switch ip.String() {
	case "100.64.0.1":
		return "edge-1", true
	case "100.64.0.2":
		return "edge-2", true
	}
	return "", false
}

// syncer holds each sync stream until ctx or the stream ends, or fail is sent.
type syncer struct {
	began chan string // names of nodes
	fail  chan error
	hold  func(ctx context.Context, node string) // nil: return at once when called off
}

func (s *syncer) Serve(ctx context.Context, node string, stream net.Conn, _ feed.Writer) error {
	defer stream.Close()
	defer context.AfterFunc(ctx, func() { stream.Close() })() // as the feed does
	s.began <- node
	gone := make(chan error, 1)
	go func() {
		_, err := stream.Read(make([]byte, 1))
		gone <- err
	}()
	select {
	case err := <-s.fail:
		return err
	case <-gone:
	case <-ctx.Done():
	}
	if s.hold != nil {
		s.hold(ctx, node)
	}
	return ctx.Err()
}

// relay serves HTTP on API streams, or holds them unserved.
type relay struct {
	feed.Writer
	handler http.Handler // nil: nobody accepts
}

func (r *relay) Relay(ctx context.Context, node string, conns net.Listener) error {
	if r.handler == nil {
		<-ctx.Done()
		return nil
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		w.Header().Set("Node", node)
		r.handler.ServeHTTP(w, req)
	})}
	defer context.AfterFunc(ctx, func() { srv.Close() })()
	_ = srv.Serve(conns)
	return nil
}

// presences keeps what it is told.
type presences struct {
	mu     sync.Mutex
	told   []string                    // "away NAME REASON" and "heard NAME"
	last   map[string]presence.Absence // by name
	synced time.Time
}

func (p *presences) Away(node string, a presence.Absence) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.told = append(p.told, "away "+node+" "+a.Reason)
	if p.last == nil {
		p.last = map[string]presence.Absence{}
	}
	p.last[node] = a
}

func (p *presences) Heard(node string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.told = append(p.told, "heard "+node)
}

func (p *presences) LastSync(string, time.Time) time.Time { return p.synced }

func (p *presences) all() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.told)
}

// rig is a hub with TLS 1.3 on loopback.
type rig struct {
	*Edges
	t        *testing.T
	url      string
	registry *registry
	sync     *syncer
	told     *presences
	client   *fake.Clientset
	pool     *x509.CertPool // of the hub
	own      tls.Certificate
	stop     func() // ends Run and waits
}

func newRig(t *testing.T, change ...func(*Config)) *rig {
	t.Helper()
	noLeaks(t)
	r := &rig{
		t: t, registry: &registry{refused: map[string]error{}, revoked: map[string]bool{}},
		sync:   &syncer{began: make(chan string, 64), fail: make(chan error, 1)},
		told:   &presences{},
		client: fake.NewClientset(),
	}
	cfg := Config{Registry: r.registry, Feed: r.sync, Upstream: &relay{}, Presence: r.told, Client: r.client}
	for _, c := range change {
		c(&cfg)
	}
	e, err := New(cfg)
	must(t, err)
	r.Edges = e
	r.own = r.certificate("hub", "")
	hub, err := x509.ParseCertificate(r.own.Certificate[0])
	must(t, err)
	r.pool = x509.NewCertPool()
	r.pool.AddCert(hub)
	srv := httptest.NewUnstartedServer(e)
	srv.TLS = &tls.Config{
		Certificates: []tls.Certificate{r.own}, MinVersion: tls.VersionTLS13, NextProtos: []string{"http/1.1"},
		ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: r.pool,
	}
	srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	r.url = srv.URL
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- e.Run(ctx) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			must(t, err)
		case <-time.After(soon):
			t.Error("Run does not return")
		}
	})
	t.Cleanup(r.stop)
	select {
	case <-e.started:
	case <-time.After(soon):
		t.Fatal("Run has not begun")
	}
	return r
}

// certificate makes one signed by the hub's, or the hub's own first.
func (r *rig) certificate(name, enrollment string) tls.Certificate {
	r.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(r.t, err)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name, SerialNumber: enrollment},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	parent, signer := tmpl, any(key)
	if r.own.Certificate == nil {
		tmpl.IsCA, tmpl.BasicConstraintsValid = true, true
	} else {
		parent, err = x509.ParseCertificate(r.own.Certificate[0])
		must(r.t, err)
		signer = r.own.PrivateKey
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), signer)
	must(r.t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// dialer is a node's.
func (r *rig) dialer(node, enrollment string) *tunnel.Dialer {
	r.t.Helper()
	return &tunnel.Dialer{
		URL:   r.url,
		TLS:   &tls.Config{Certificates: []tls.Certificate{r.certificate(node, enrollment)}, RootCAs: r.pool, MinVersion: tls.VersionTLS13},
		Proxy: func(*http.Request) (*url.URL, error) { return nil, nil },
	}
}

// connect brings a node's tunnel up, and waits until the hub has entered it.
func (r *rig) connect(node string) *tunnel.Session {
	r.t.Helper()
	s, err := r.dialer(node, "1").Dial(r.t.Context())
	must(r.t, err)
	r.t.Cleanup(func() { s.Close() })
	r.await("the hub knows "+node, func() bool {
		for _, n := range r.Connected() {
			if n.Name == node && n.Remote == s.LocalAddr().String() {
				return true
			}
		}
		return false
	})
	return s
}

func (r *rig) openSync(s *tunnel.Session) *tunnel.Stream {
	r.t.Helper()
	st, err := s.Open(r.t.Context(), tunnel.OpenRequest{Kind: edgeapi.KindSync, Class: tunnel.ClassSync})
	must(r.t, err)
	return st
}

func (r *rig) await(what string, cond func() bool) {
	r.t.Helper()
	for deadline := time.Now().Add(soon); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			r.t.Fatalf("not so: %s", what)
		}
	}
}

// closed waits for a session's end and returns how the hub closed it.
func closed(t *testing.T, s *tunnel.Session) *tunnel.CloseError {
	t.Helper()
	select {
	case <-s.Done():
	case <-time.After(soon):
		t.Fatal("the tunnel does not end")
	}
	var ce *tunnel.CloseError
	if !errors.As(s.Err(), &ce) || !ce.Remote {
		t.Fatalf("ended with %v, not by the hub", s.Err())
	}
	return ce
}

// resetCode waits for a stream's reset and returns its code.
func resetCode(t *testing.T, st *tunnel.Stream) uint32 {
	t.Helper()
	must(t, st.SetReadDeadline(time.Now().Add(soon)))
	_, err := st.Read(make([]byte, 1))
	var re *tunnel.ResetError
	if !errors.As(err, &re) || !re.Remote {
		t.Fatalf("got %v, want a reset by the hub", err)
	}
	return re.Code
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
