package kubeletproxy

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/skerry-io/skerry/cloudhub/controlplane/planetest"
)

const clientName = "kube-apiserver-kubelet-client"

// testAuthority is a small authority of its own.
type testAuthority struct {
	t    testing.TB
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newTestAuthority(t testing.TB) *testAuthority {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := &testAuthority{t: t, key: key}
	a.cert = &x509.Certificate{Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	a.cert = a.sign(a.cert).Leaf
	return a
}

func (a *testAuthority) sign(template *x509.Certificate) tls.Certificate {
	template.SerialNumber = big.NewInt(1)
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, a.key.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: a.key, Leaf: leaf}
}

func (a *testAuthority) KubeletServingCertificate(ip netip.Addr) (*tls.Certificate, error) {
	cert := a.sign(&x509.Certificate{IPAddresses: []net.IP{ip.AsSlice()}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	return &cert, nil
}

func (a *testAuthority) KubeletClient() (*x509.CertPool, string) {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool, clientName
}

func (a *testAuthority) client(name string, protocols ...string) *tls.Config {
	pool, _ := a.KubeletClient()
	return &tls.Config{
		RootCAs:      pool,
		ServerName:   "100.64.0.1",
		NextProtos:   protocols,
		Certificates: []tls.Certificate{a.sign(&x509.Certificate{Subject: pkix.Name{CommonName: name}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})},
	}
}

// nodesFunc is a Nodes of one function.
type nodesFunc func(ctx context.Context, ip string) (net.Conn, error)

func (f nodesFunc) DialKubelet(ctx context.Context, ip string) (net.Conn, error) { return f(ctx, ip) }

// startProxy returns a proxy whose nodes' ends of connections come out of the
// channel.
func startProxy(t testing.TB, cfg Config) (*Proxy, *testAuthority, <-chan *net.UnixConn) {
	t.Helper()
	far := make(chan *net.UnixConn, 16)
	authority := newTestAuthority(t)
	cfg.Authority = authority
	cfg.Log = planetest.Log()
	cfg.Nodes = nodesFunc(func(context.Context, string) (net.Conn, error) {
		near, end, err := socketPair()
		if err == nil {
			far <- end
		}
		return near, err
	})
	p, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { p.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
	return p, authority, far
}

func dial(t testing.TB, p *Proxy, config *tls.Config) *tls.Conn {
	t.Helper()
	raw, err := p.DialNode(t.Context(), "tcp", "100.64.0.1:10250")
	if err != nil {
		t.Fatal(err)
	}
	c := tls.Client(raw, config)
	t.Cleanup(func() { c.Close() })
	return c
}

func TestOnlyTheAPIServer(t *testing.T) {
	p, authority, _ := startProxy(t, Config{})
	stranger := newTestAuthority(t).client(clientName)
	stranger.RootCAs = authority.client(clientName).RootCAs
	bare := authority.client(clientName)
	bare.Certificates = nil
	for name, config := range map[string]*tls.Config{
		"another client of the authority": authority.client("system:kube-scheduler"),
		"a stranger with the right name":  stranger,
		"nobody":                          bare,
	} {
		c := dial(t, p, config)
		c.SetDeadline(time.Now().Add(10 * time.Second))
		// In TLS 1.3 a client learns of its refusal when it reads.
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("%s: %v; want a refusal", name, err)
		}
	}
	other := authority.client(clientName)
	other.ServerName = "100.64.0.2"
	if err := dial(t, p, other).Handshake(); err == nil {
		t.Error("the certificate is good for another address")
	}
}

func TestOnlyHTTP1(t *testing.T) {
	p, authority, _ := startProxy(t, Config{})
	c := dial(t, p, authority.client(clientName, "h2", "http/1.1"))
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	if got := c.ConnectionState().NegotiatedProtocol; got != "http/1.1" {
		t.Errorf("negotiated %q", got)
	}
}

func TestHalfClose(t *testing.T) {
	p, authority, far := startProxy(t, Config{})
	c := dial(t, p, authority.client(clientName))
	node := <-far
	fmt.Fprint(c, "question")
	c.CloseWrite()
	got, err := io.ReadAll(node)
	if err != nil || string(got) != "question" {
		t.Fatalf("the node got %q, %v", got, err)
	}
	// The other direction is still open.
	fmt.Fprint(node, "answer")
	node.Close()
	got, err = io.ReadAll(c)
	if err != nil || string(got) != "answer" {
		t.Errorf("the client got %q, %v", got, err)
	}
}

func TestClientGone(t *testing.T) {
	p, authority, far := startProxy(t, Config{})
	c := dial(t, p, authority.client(clientName))
	node := <-far
	fmt.Fprint(c, "follow")
	if _, err := io.ReadFull(node, make([]byte, len("follow"))); err != nil {
		t.Fatal(err)
	}
	c.Close()
	// The node sends nothing and still hears of it; its whole connection is
	// gone, not one direction.
	if _, err := node.Read(make([]byte, 1)); err == nil {
		t.Error("the node read something")
	}
	node.SetWriteDeadline(time.Now().Add(10 * time.Second))
	var err error
	for err == nil {
		_, err = node.Write([]byte("line"))
	}
	if errors.Is(err, context.DeadlineExceeded) {
		t.Error("the node can go on writing to nobody")
	}
}

// resetConn fails its reads as a stream does that was reset.
type resetConn struct{ net.Conn }

func (resetConn) Read([]byte) (int, error) { return 0, errors.New("stream was reset") }

func TestNodeReset(t *testing.T) {
	authority := newTestAuthority(t)
	p, err := New(Config{Authority: authority, Nodes: nodesFunc(func(context.Context, string) (net.Conn, error) {
		near, _ := net.Pipe()
		return resetConn{near}, nil
	})})
	if err != nil {
		t.Fatal(err)
	}
	c := dial(t, p, authority.client(clientName))
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "stream was reset") {
		t.Errorf("a reset reached the client as %v", err)
	}
}

func TestDialRefused(t *testing.T) {
	p, authority, far := startProxy(t, Config{MaxConnections: 1})
	for _, tc := range []struct{ network, addr, want string }{
		{"udp", "100.64.0.1:10250", "not TCP"},
		{"tcp", "100.64.0.1", "missing port"},
		{"tcp", "edge-1:10250", "reached by the InternalIP"},
	} {
		if _, err := p.DialNode(t.Context(), tc.network, tc.addr); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s %s: %v; want it to say %q", tc.network, tc.addr, err, tc.want)
		}
	}
	c := dial(t, p, authority.client(clientName))
	if _, err := p.DialNode(t.Context(), "tcp", "100.64.0.1:10250"); err == nil || !strings.Contains(err.Error(), "1 kubelet connections are open already") {
		t.Errorf("beyond the limit: %v", err)
	}
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	c.Close()
	(<-far).Close()
	planetest.Await(t, "the connection's place", func() error {
		again, err := p.DialNode(t.Context(), "tcp", "100.64.0.1:10250")
		if err == nil {
			again.Close()
		}
		return err
	})
}

func TestSilentClient(t *testing.T) {
	p, _, far := startProxy(t, Config{HandshakeTimeout: 50 * time.Millisecond})
	raw, err := p.DialNode(t.Context(), "tcp", "100.64.0.1:10250")
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	node := <-far
	node.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := node.Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the node's end after a client that says nothing: %v", err)
	}
}

func TestCertCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		authority := newTestAuthority(t)
		issued := 0
		cache := newCertCache(func(ip netip.Addr) (*tls.Certificate, error) {
			issued++
			return authority.KubeletServingCertificate(ip)
		})
		ip := netip.MustParseAddr("100.64.0.1")
		get := func(want int) {
			t.Helper()
			if _, err := cache.get(ip); err != nil || issued != want {
				t.Fatalf("%d certificates issued, want %d; %v", issued, want, err)
			}
		}
		get(1)
		get(1)
		time.Sleep(11 * time.Hour)
		get(1)
		time.Sleep(2 * time.Hour) // half of its life is over
		get(2)
		if len(cache.byIP) != 1 || cache.order.Len() != 1 {
			t.Errorf("%d entries", cache.order.Len())
		}
		next := ip
		for range maxCerts {
			next = next.Next()
			if _, err := cache.get(next); err != nil {
				t.Fatal(err)
			}
		}
		if len(cache.byIP) != maxCerts || cache.order.Len() != maxCerts {
			t.Errorf("%d entries, want %d", len(cache.byIP), maxCerts)
		}
		get(2 + maxCerts + 1) // the least used made room
	})
}
