package kubeletproxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"
)

const (
	defaultHandshakeTimeout = 10 * time.Second
	defaultMaxConnections   = 16384
)

var errStopping = errors.New("connect to the kubelet: the cloudhub is stopping")

// Nodes opens a raw HTTP/1.1 connection to the kubelet handler of the node
// with that virtual InternalIP. ctx bounds the opening, not the connection.
// The error's text reaches the user of kubectl as it is.
type Nodes interface {
	DialKubelet(ctx context.Context, virtualIP string) (net.Conn, error)
}

// Authority is the control plane's side of the TLS.
type Authority interface {
	// KubeletServingCertificate issues a serving certificate for that IP.
	KubeletServingCertificate(ip netip.Addr) (*tls.Certificate, error)
	// KubeletClient is the authority and the common name of the API server's
	// kubelet client certificate.
	KubeletClient() (*x509.CertPool, string)
}

// Config for a Proxy.
type Config struct {
	Nodes     Nodes     // required
	Authority Authority // required
	// HandshakeTimeout ends a connection whose client does not finish TLS;
	// zero means 10 s.
	HandshakeTimeout time.Duration
	// MaxConnections is how many connections may be open at a time, over all
	// nodes; more are refused. Zero means 16384.
	MaxConnections int
	Log            *slog.Logger // nil discards
}

// Proxy stands in for the kubelets' TLS.
type Proxy struct {
	cfg   Config
	certs *certCache

	mu     sync.Mutex
	closed bool
	conns  map[*connection]struct{}
	wg     sync.WaitGroup // one per connection; Add only under mu while !closed
}

// New checks cfg; it starts nothing.
func New(cfg Config) (*Proxy, error) {
	if cfg.Nodes == nil || cfg.Authority == nil {
		return nil, errors.New("kubelet proxy: nodes and authority are required")
	}
	if cfg.HandshakeTimeout == 0 {
		cfg.HandshakeTimeout = defaultHandshakeTimeout
	}
	if cfg.MaxConnections == 0 {
		cfg.MaxConnections = defaultMaxConnections
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Proxy{
		cfg:   cfg,
		certs: newCertCache(cfg.Authority.KubeletServingCertificate),
		conns: make(map[*connection]struct{}),
	}, nil
}

// Run waits until ctx ends, then ends every connection and returns when all
// are gone. DialNode fails from then on.
func (p *Proxy) Run(ctx context.Context) error {
	<-ctx.Done()
	p.mu.Lock()
	p.closed = true
	for c := range p.conns {
		c.abort(errStopping)
	}
	p.mu.Unlock()
	p.wg.Wait()
	return nil
}

// DialNode is the API server's dialer for kubelets. addr is a node's virtual
// InternalIP with a port, which is ignored: a node has one kubelet handler.
// The connection returned is where the API server speaks TLS.
func (p *Proxy) DialNode(ctx context.Context, network, addr string) (net.Conn, error) {
	ip, err := kubeletIP(network, addr)
	if err != nil {
		return nil, err
	}
	cert, err := p.certs.get(ip)
	if err != nil {
		return nil, err
	}
	if err := p.room(); err != nil {
		return nil, err
	}
	// The node first: when it is not connected, its error is the answer, and
	// nothing of a TLS handshake stands before it.
	upstream, err := p.cfg.Nodes.DialKubelet(ctx, ip.String())
	if err != nil {
		return nil, err
	}
	client, raw, err := socketPair()
	if err != nil {
		upstream.Close()
		return nil, fmt.Errorf("connect to the kubelet at %s: %w", ip, err)
	}
	c := &connection{ip: ip, raw: raw, tls: tls.Server(raw, p.tlsConfig(cert)), upstream: upstream}
	if err := p.start(c); err != nil {
		c.abort(err)
		client.Close()
		return nil, err
	}
	return &clientEnd{Conn: client, served: c}, nil
}

func kubeletIP(network, addr string) (netip.Addr, error) {
	if network != "tcp" && network != "tcp4" && network != "tcp6" {
		return netip.Addr{}, fmt.Errorf("connect to the kubelet at %s: network %q is not TCP", addr, network)
	}
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("connect to the kubelet at %s: %w", addr, err)
	}
	ip, err := netip.ParseAddr(host)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("connect to the kubelet at %s: not an IP address; edge nodes are reached by the InternalIP in their status", addr)
	}
	return ip.Unmap(), nil
}

// tlsConfig admits the API server and nobody else. Without HTTP/2 every
// request or upgrade has a stream of its own in the tunnel, where it is
// scheduled and flow-controlled by itself.
func (p *Proxy) tlsConfig(cert *tls.Certificate) *tls.Config {
	pool, name := p.cfg.Authority.KubeletClient()
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		NextProtos:   []string{"http/1.1"},
		Certificates: []tls.Certificate{*cert},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    pool,
		// The authority signs other clients too; only the API server's own
		// identity may speak to kubelets.
		VerifyConnection: func(s tls.ConnectionState) error {
			if got := s.PeerCertificates[0].Subject.CommonName; got != name {
				return fmt.Errorf("client certificate is for %q, kubelets answer only %q", got, name)
			}
			return nil
		},
		SessionTicketsDisabled: true, // connections are in-process and pooled by their client
	}
}

func (p *Proxy) room() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return errStopping
	}
	if len(p.conns) >= p.cfg.MaxConnections {
		return fmt.Errorf("connect to the kubelet: %d kubelet connections are open already; try again later", len(p.conns))
	}
	return nil
}

// start makes c one of the proxy's and serves it.
func (p *Proxy) start(c *connection) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return errStopping
	}
	p.conns[c] = struct{}{}
	p.wg.Add(1)
	go func() {
		defer p.wg.Done()
		defer func() {
			p.mu.Lock()
			delete(p.conns, c)
			p.mu.Unlock()
		}()
		if err := c.serve(p.cfg.HandshakeTimeout); err != nil {
			p.cfg.Log.Debug("kubelet connection ended", "address", c.ip, "err", err)
		}
	}()
	return nil
}
