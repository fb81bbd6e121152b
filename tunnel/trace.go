package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http/httptrace"
	"sync"
	"sync/atomic"
	"time"
)

// traceStage follows an attempt to dial, and tells what it waits for.
func traceStage(ctx context.Context) (context.Context, func() string) {
	var stage atomic.Value
	stage.Store("for a connection")
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		DNSStart:          func(httptrace.DNSStartInfo) { stage.Store("for the name servers") },
		DNSDone:           func(httptrace.DNSDoneInfo) { stage.Store("for a connection") },
		TLSHandshakeStart: func() { stage.Store("for the TLS handshake, over a connection that was taken") },
		TLSHandshakeDone: func(_ tls.ConnectionState, err error) {
			if err == nil {
				stage.Store("for the hub's answer, after the TLS handshake")
			}
		},
	}), func() string { return stage.Load().(string) }
}

// knownAddress is where the hub was reached last.
type knownAddress struct {
	mu    sync.Mutex
	asked string // host and port
	addr  string // IP and port
}

// lookupTimeout is what name servers are given while an address is known.
const lookupTimeout = 8 * time.Second

func (k *knownAddress) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	dialer := &net.Dialer{KeepAlive: -1}
	known := k.of(addr)
	if known != "" {
		host, _, err := net.SplitHostPort(addr)
		if err != nil {
			return nil, err
		}
		lookup, cancel := context.WithTimeout(ctx, lookupTimeout)
		_, err = net.DefaultResolver.LookupHost(lookup, host)
		cancel()
		if ctx.Err() == nil && errors.As(err, new(*net.DNSError)) {
			conn, dialErr := dialer.DialContext(ctx, network, known)
			if dialErr != nil {
				return nil, err // what is to be mended is the name
			}
			return conn, nil
		}
	}
	conn, err := dialer.DialContext(ctx, network, addr)
	if err == nil {
		k.mu.Lock()
		k.asked, k.addr = addr, conn.RemoteAddr().String()
		k.mu.Unlock()
	}
	return conn, err
}

func (k *knownAddress) of(addr string) string {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.asked != addr {
		return ""
	}
	return k.addr
}
