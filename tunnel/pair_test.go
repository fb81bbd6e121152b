package tunnel

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// noLeaks fails the test if goroutines of this package outlive it.
func noLeaks(t testing.TB) {
	t.Helper()
	t.Cleanup(func() {
		var left string
		for range 200 {
			if left = tunnelGoroutines(); left == "" {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Errorf("goroutines left:\n%s", left)
	})
}

func tunnelGoroutines() string {
	buf := make([]byte, 4<<20)
	var left []string
	for _, g := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if strings.Contains(g, "/tunnel.(*") && !strings.Contains(g, "tunnel.tunnelGoroutines") {
			left = append(left, g)
		}
	}
	return strings.Join(left, "\n\n")
}

// pipeListener hands the server ends of pipes to an http.Server.
type pipeListener struct {
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), done: make(chan struct{})}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error   { l.once.Do(func() { close(l.done) }); return nil }
func (l *pipeListener) Addr() net.Addr { return pipeAddr{} }

func (l *pipeListener) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	near, far := net.Pipe()
	select {
	case l.conns <- far:
		return near, nil
	case <-l.done:
		return nil, errors.New("listener closed")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

type pipeAddr struct{}

func (pipeAddr) Network() string { return "pipe" }
func (pipeAddr) String() string  { return "pipe" }

// wrapDial is a place to put something between the ends.
type wrapDial func(net.Conn) net.Conn

// newPair connects an edge and a hub over a pipe, without TLS: for tests where
// what is beneath the WebSocket does not matter, or time is virtual.
func newPair(t testing.TB, edgeCfg, hubCfg Config, wrap wrapDial) (edge, hub *Session) {
	t.Helper()
	ws, hub := newRawEdge(t, hubCfg, wrap)
	edge, err := Client(ws, edgeCfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = edge.Close() })
	return edge, hub
}

// newRawEdge connects a bare WebSocket to a hub's session.
func newRawEdge(t testing.TB, hubCfg Config, wrap wrapDial) (*websocket.Conn, *Session) {
	t.Helper()
	ln := newPipeListener()
	hubs := make(chan *Session, 1)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s, err := Upgrade(w, r, hubCfg)
		if err != nil {
			t.Error(err)
			close(hubs)
			return
		}
		hubs <- s
	})}
	var served sync.WaitGroup
	served.Go(func() { _ = srv.Serve(ln) })
	t.Cleanup(func() { _ = srv.Close(); served.Wait() })
	wd := websocket.Dialer{
		NetDialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := ln.dial(ctx, network, addr)
			if err == nil && wrap != nil {
				c = wrap(c)
			}
			return c, err
		},
		Subprotocols: []string{Subprotocol}, ReadBufferSize: wsReadBuffer, WriteBufferSize: wsBufferSize,
	}
	ws, _, err := wd.Dial("ws://hub/", nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ws.Close() })
	hub, ok := <-hubs
	if !ok {
		t.FailNow()
	}
	t.Cleanup(func() { _ = hub.Close() })
	return ws, hub
}

// testCerts is a CA with a hub's and an edge's certificate.
type testCerts struct {
	pool      *x509.CertPool
	hub, edge tls.Certificate
}

func newCerts(t testing.TB) *testCerts {
	t.Helper()
	now := time.Now()
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	if err != nil {
		t.Fatal(err)
	}
	if ca, err = x509.ParseCertificate(caDER); err != nil {
		t.Fatal(err)
	}
	leaf := func(serial int64, name string, usage x509.ExtKeyUsage) tls.Certificate {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
			SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name}, NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
			ExtKeyUsage: []x509.ExtKeyUsage{usage}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"hub"},
		}, ca, key.Public(), caKey)
		if err != nil {
			t.Fatal(err)
		}
		return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	}
	c := &testCerts{pool: x509.NewCertPool(), hub: leaf(2, "hub", x509.ExtKeyUsageServerAuth), edge: leaf(3, "system:node:edge", x509.ExtKeyUsageClientAuth)}
	c.pool.AddCert(ca)
	return c
}

func (c *testCerts) hubTLS() *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{c.hub}, ClientCAs: c.pool, ClientAuth: tls.RequireAndVerifyClientCert,
		MinVersion: tls.VersionTLS13, DynamicRecordSizingDisabled: true,
	}
}

func (c *testCerts) edgeTLS() *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{c.edge}, RootCAs: c.pool, MinVersion: tls.VersionTLS13}
}

// testHub is a real hub: TCP, mutual TLS, HTTP, Upgrade.
type testHub struct {
	url      string
	sessions chan *Session
}

func newHub(t testing.TB, certs *testCerts, cfg Config) *testHub {
	t.Helper()
	h := &testHub{sessions: make(chan *Session, 64)}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h.url = "https://" + tcp.Addr().String() + "/tunnel"
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s, err := Upgrade(w, r, cfg)
		if err != nil {
			t.Error(err)
			return
		}
		h.sessions <- s
	})}
	var served sync.WaitGroup
	served.Go(func() { _ = srv.Serve(tls.NewListener(tcp, certs.hubTLS())) })
	t.Cleanup(func() {
		_ = srv.Close()
		served.Wait()
		for {
			select {
			case s := <-h.sessions:
				_ = s.Close()
			default:
				return
			}
		}
	})
	return h
}

// newTLSPair connects an edge and a hub over loopback with mutual TLS.
func newTLSPair(t testing.TB, edgeCfg, hubCfg Config) (edge, hub *Session) {
	t.Helper()
	certs := newCerts(t)
	h := newHub(t, certs, hubCfg)
	d := &Dialer{URL: h.url, TLS: certs.edgeTLS(), Config: edgeCfg}
	edge, err := d.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	hub = <-h.sessions
	t.Cleanup(func() { _ = edge.Close(); _ = hub.Close() })
	return edge, hub
}

// serveEcho answers each stream the peer opens with its own bytes.
func serveEcho(t testing.TB, s *Session) {
	t.Helper()
	var tasks sync.WaitGroup
	tasks.Go(func() {
		for {
			st, err := s.Accept(context.Background())
			if err != nil {
				return
			}
			tasks.Go(func() {
				defer st.Close()
				_, _ = io.Copy(st, st)
			})
		}
	})
	t.Cleanup(func() { _ = s.Close(); tasks.Wait() })
}

func openStream(t testing.TB, s *Session, kind string) *Stream {
	t.Helper()
	st, err := s.Open(t.Context(), OpenRequest{Kind: kind})
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func acceptStream(t testing.TB, s *Session) *Stream {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	st, err := s.Accept(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// streamPair opens a stream at a and accepts it at b.
func streamPair(t testing.TB, a, b *Session, class Class) (*Stream, *Stream) {
	t.Helper()
	near, err := a.Open(t.Context(), OpenRequest{Kind: "test", Class: class})
	if err != nil {
		t.Fatal(err)
	}
	return near, acceptStream(t, b)
}
