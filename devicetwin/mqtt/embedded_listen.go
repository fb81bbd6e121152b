package mqtt

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
)

// ListenerConfig is one place where clients connect.
type ListenerConfig struct {
	Network string // tcp or unix; empty means tcp
	Address string // host:port, or the path of a socket, which is made with mode 0600
	TLS     *TLSConfig
	// Plaintext allows an address beyond loopback without TLS: passwords and
	// tokens can then be read on the wire.
	Plaintext bool
}

// TLSConfig is a listener's TLS: 1.2 or later. The files are read again when
// they have changed; what cannot be read leaves the old in use.
type TLSConfig struct {
	CertFile, KeyFile string
	// ClientCAFile: certificates that clients show must be of it. Empty: they
	// show none.
	ClientCAFile string
	// RequireClientCert refuses clients without a certificate.
	RequireClientCert bool
}

func (l ListenerConfig) check() error {
	switch cmp.Or(l.Network, "tcp") {
	case "unix":
		if l.TLS != nil {
			return fmt.Errorf("mqtt: listen on %s: a unix socket has no TLS", l.Address)
		}
		return nil
	case "tcp":
	default:
		return fmt.Errorf("mqtt: listen on %s: network %q: want tcp or unix", l.Address, l.Network)
	}
	host, _, err := net.SplitHostPort(l.Address)
	if err != nil {
		return fmt.Errorf("mqtt: listen on %q: %w", l.Address, err)
	}
	ip, err := netip.ParseAddr(host)
	loopback := host == "localhost" || err == nil && ip.IsLoopback()
	if l.TLS == nil && !loopback && !l.Plaintext {
		return fmt.Errorf("mqtt: listen on %s: it is beyond loopback and has no TLS; set a certificate, or allow plaintext", l.Address)
	}
	if l.TLS != nil {
		if l.TLS.RequireClientCert && l.TLS.ClientCAFile == "" {
			return fmt.Errorf("mqtt: listen on %s: client certificates are required but there is no client CA", l.Address)
		}
		if _, err := l.TLS.load(); err != nil {
			return fmt.Errorf("mqtt: listen on %s: %w", l.Address, err)
		}
	}
	return nil
}

// load reads the files.
func (t *TLSConfig) load() (*tls.Config, error) {
	cert, err := tls.LoadX509KeyPair(t.CertFile, t.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("tls: %w", err)
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{cert}}
	if t.ClientCAFile != "" {
		pem, err := os.ReadFile(t.ClientCAFile)
		if err != nil {
			return nil, fmt.Errorf("tls: %w", err)
		}
		cfg.ClientCAs = x509.NewCertPool()
		if !cfg.ClientCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("tls: %s has no certificate", t.ClientCAFile)
		}
		cfg.ClientAuth = tls.VerifyClientCertIfGiven
		if t.RequireClientCert {
			cfg.ClientAuth = tls.RequireAndVerifyClientCert
		}
	}
	return cfg, nil
}

// listener is an open ListenerConfig.
type listener struct {
	net.Listener
	cfg ListenerConfig
	tls *tlsFiles // nil: none
}

// tlsFiles are read again for the first connection after they have changed.
type tlsFiles struct {
	b   *Embedded
	cfg *TLSConfig

	mu      sync.Mutex
	loaded  *tls.Config
	stamps  [3]time.Time
	checked time.Time
}

func (t *tlsFiles) config(*tls.ClientHelloInfo) (*tls.Config, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if t.loaded != nil && now.Sub(t.checked) < time.Second {
		return t.loaded, nil
	}
	t.checked = now
	var stamps [3]time.Time
	for i, path := range []string{t.cfg.CertFile, t.cfg.KeyFile, t.cfg.ClientCAFile} {
		if info, err := os.Stat(path); err == nil {
			stamps[i] = info.ModTime()
		}
	}
	if t.loaded != nil && stamps == t.stamps {
		return t.loaded, nil
	}
	cfg, err := t.cfg.load()
	if err != nil {
		if t.loaded == nil {
			return nil, err
		}
		t.b.slow.Warn("the MQTT listener's certificate has changed and cannot be read; the old one stays in use", "error", err)
		return t.loaded, nil
	}
	t.loaded, t.stamps = cfg, stamps
	return cfg, nil
}

// listen opens all listeners, or none.
func (b *Embedded) listen() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed || !b.since.IsZero() {
		return errors.New("mqtt: an embedded broker can be run once")
	}
	var open []*listener
	for _, cfg := range b.cfg.Listeners {
		l, err := b.listenOn(cfg)
		if err != nil {
			for _, each := range open {
				each.Close()
			}
			return fmt.Errorf("mqtt: %w", err)
		}
		open = append(open, l)
	}
	b.listeners, b.since, b.failure = open, time.Now(), nil
	return nil
}

func (b *Embedded) listenOn(cfg ListenerConfig) (*listener, error) {
	network := cmp.Or(cfg.Network, "tcp")
	if network == "unix" {
		if err := removeSocket(cfg.Address); err != nil {
			return nil, err
		}
	}
	l, err := net.Listen(network, cfg.Address)
	if err != nil {
		return nil, err
	}
	if network == "unix" {
		if err := os.Chmod(cfg.Address, 0o600); err != nil {
			l.Close()
			return nil, err
		}
	}
	out := &listener{Listener: l, cfg: cfg}
	if cfg.TLS != nil {
		out.tls = &tlsFiles{b: b, cfg: cfg.TLS}
	}
	return out, nil
}

// removeSocket takes away a socket that an earlier process left.
func removeSocket(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode()&os.ModeSocket == 0 {
		return fmt.Errorf("listen on %s: it is there and not a socket", path)
	}
	return os.Remove(path)
}

// accept serves l until it is closed.
func (b *Embedded) accept(ctx context.Context, l *listener) error {
	for {
		nc, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			// Out of descriptors: it passes.
			b.slow.Warn("an MQTT connection could not be accepted", "error", err)
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		c := b.newConn(nc, l)
		if c == nil {
			b.stats.refused.Add(1)
			nc.Close()
			continue
		}
		go b.serve(ctx, c)
	}
}

// newConn takes a connection on; nil: the broker is closed, or too many have
// not said who they are. One address has a quarter of the room, so that it
// cannot shut the others out.
func (b *Embedded) newConn(nc net.Conn, l *listener) *conn {
	b.mu.Lock()
	defer b.mu.Unlock()
	loopback := isLoopback(nc)
	from := ""
	if a, ok := nc.RemoteAddr().(*net.TCPAddr); ok && !loopback {
		from = a.IP.String()
	}
	if b.closed || b.pendingAll >= b.limit.Pending || from != "" && b.pending[from] >= max(1, b.limit.Pending/4) {
		return nil
	}
	b.pendingAll++
	b.pending[from]++
	b.connNo++
	if l.tls != nil {
		nc = tls.Server(nc, &tls.Config{GetConfigForClient: l.tls.config, MinVersion: tls.VersionTLS12})
	}
	c := &conn{Conn: nc, b: b, listener: l, no: b.connNo, wake: make(chan struct{}, 1), closed: make(chan struct{}),
		written: make(chan struct{}), finished: make(chan struct{}), loopback: loopback, from: from, deciding: true}
	b.open[c] = struct{}{}
	b.conns.Add(1)
	return c
}

// decidedLocked gives back the room that c had while it was not known.
func (b *Embedded) decidedLocked(c *conn) {
	if !c.deciding {
		return
	}
	c.deciding = false
	b.pendingAll--
	if b.pending[c.from]--; b.pending[c.from] == 0 {
		delete(b.pending, c.from)
	}
}

func isLoopback(nc net.Conn) bool {
	for _, a := range []net.Addr{nc.LocalAddr(), nc.RemoteAddr()} {
		switch a := a.(type) {
		case *net.TCPAddr:
			if !a.IP.IsLoopback() {
				return false
			}
		case *net.UnixAddr:
		default:
			return false
		}
	}
	return true
}

// serve is a connection's life. It is the last to touch it.
func (b *Embedded) serve(ctx context.Context, c *conn) {
	defer b.conns.Done()
	defer c.finish()
	defer func() {
		// mochi's decoders index what they have not measured: a SUBSCRIBE that
		// is cut short is one of those that would end the process.
		if p := recover(); p != nil {
			b.stats.panics.Add(1)
			b.slow.Warn("an MQTT packet could not be handled; its connection is closed", "client", c.id, "panic", p, "stack", string(debug.Stack()))
		}
	}()
	deadline := time.Now().Add(b.limit.ConnectTimeout)
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	c.ctx = ctx
	c.Conn.SetDeadline(deadline)
	if tc, ok := c.Conn.(*tls.Conn); ok {
		if err := tc.HandshakeContext(ctx); err != nil {
			b.stats.authFailed.Add(1)
			b.slow.Warn("an MQTT client's TLS handshake failed", "remote", c.RemoteAddr().String(), "error", err)
			return
		}
		if peers := tc.ConnectionState().PeerCertificates; len(peers) > 0 {
			c.certificate = peers[0]
		}
	}
	err := b.mochi.EstablishConnection("", c)
	var code packets.Code
	if errors.As(err, &code) && code.Code >= packets.ErrUnspecifiedError.Code {
		b.log.Debug("an MQTT connection was closed", "client", c.id, "remote", c.RemoteAddr().String(), "error", err)
	}
}
