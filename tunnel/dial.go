package tunnel

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/gorilla/websocket"
)

// Dialer brings up the edge's end of sessions. Its fields must not change after
// the first Dial.
type Dialer struct {
	// URL is the hub's tunnel endpoint, https:// or wss://; required.
	URL string

	// TLS authenticates both ends; required. Its GetClientCertificate may
	// rotate the edge's certificate.
	TLS *tls.Config

	// Header is sent with the request; may be nil.
	Header http.Header

	// Config is the sessions'.
	Config Config

	// Proxy chooses an HTTP proxy; nil means the environment's.
	Proxy func(*http.Request) (*url.URL, error)

	// NetDial makes TCP connections; nil means net.Dialer without keepalive,
	// which goes to the address that was reached last while names do not
	// resolve: TLS tells whether the hub is still there.
	NetDial func(ctx context.Context, network, addr string) (net.Conn, error)

	// Timeout is for one whole attempt; zero means 30 s.
	Timeout time.Duration

	// Backoff shapes Run's retries; the zero value is the default.
	Backoff Backoff

	// Retry, if set, is told of each failure in Run and how long Run will wait.
	// If it returns an error, Run ends with that error.
	Retry func(err error, wait time.Duration) error

	// Log gets connects, losses and the first of equal failures; nil discards.
	Log *slog.Logger

	learned pingInterval
	kicks   kicks
	known   knownAddress
}

// DialReason tells failures to reach the hub apart.
type DialReason string

const (
	DialConfig      DialReason = "config"      // the Dialer is wrong
	DialDNS         DialReason = "dns"         // the hub's name does not resolve
	DialRefused     DialReason = "refused"     // the hub's address refuses connections
	DialUnreachable DialReason = "unreachable" // no route, no network
	DialTimeout     DialReason = "timeout"
	DialCertificate DialReason = "certificate" // the hub's certificate is not to be trusted
	DialTLS         DialReason = "tls"         // other TLS failures; a hub that refuses the edge's certificate is here
	DialRejected    DialReason = "rejected"    // HTTP 401 or 403: the hub does not let this edge in
	DialGone        DialReason = "gone"        // HTTP 410: the hub has removed this edge
	DialPortal      DialReason = "portal"      // something that is no hub answers in its place
	DialHTTP        DialReason = "http"        // another HTTP status
	DialProtocol    DialReason = "protocol"    // not a tunnel endpoint
	DialLost        DialReason = "lost"        // the connection broke during the handshake
)

// DialError is what Dial returns.
type DialError struct {
	URL        string
	Reason     DialReason
	Status     int           // HTTP status, if the hub answered
	Body       string        // start of its answer
	RetryAfter time.Duration // what the hub asked for; 0: nothing
	Err        error
}

func (e *DialError) Error() string {
	msg := "tunnel: dial " + e.URL + ": "
	if e.Status != 0 {
		msg += fmt.Sprintf("the hub answered %d %s", e.Status, http.StatusText(e.Status))
		if e.Body != "" {
			msg += ": " + e.Body
		}
	} else if e.Err != nil {
		msg += e.Err.Error()
	}
	if hint := e.hint(); hint != "" {
		msg += "; " + hint
	}
	return msg
}

func (e *DialError) hint() string {
	switch e.Reason {
	case DialDNS:
		return "check the hub's name and this node's DNS"
	case DialRefused:
		return "check that the hub runs and the port is right"
	case DialUnreachable:
		return "check this node's network"
	case DialTimeout:
		return "check the network and firewalls between"
	case DialCertificate:
		return "a captive portal, a proxy or another hub may answer in the hub's place; check the network, the hub's name, its CA and this node's clock"
	case DialPortal:
		return "a captive portal or a proxy answers in the hub's place; sign in to this network, or check the hub's address and port"
	case DialTLS:
		return "check this node's certificate and clock"
	case DialRejected:
		return "check this node's certificate; it may have to join again"
	case DialGone:
		return "the hub has removed this node; join again"
	case DialProtocol:
		return "check that the URL is a hub's and that both versions fit"
	}
	return ""
}

func (e *DialError) Unwrap() error { return e.Err }

// Timeout makes a DialError a net.Error of sorts.
func (e *DialError) Timeout() bool { return e.Reason == DialTimeout }

// Dial makes one attempt. Its errors are *DialError, but for those of ctx.
func (d *Dialer) Dial(ctx context.Context) (*Session, error) { return d.dial(ctx, d.URL) }

func (d *Dialer) dial(ctx context.Context, rawURL string) (*Session, error) {
	u, err := hubURL(rawURL)
	if err == nil && d.TLS == nil {
		err = errors.New("no TLS configuration")
	}
	cfg := d.Config
	if err == nil {
		cfg.learned = &d.learned
		cfg, err = cfg.withDefaults(false)
	}
	if err != nil {
		return nil, &DialError{URL: rawURL, Reason: DialConfig, Err: err}
	}
	timeout := d.Timeout
	if timeout == 0 {
		timeout = 30 * time.Second
	}
	attempt, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()

	var conns closer // gorilla heeds the context only while it connects
	defer context.AfterFunc(attempt, conns.close)()
	attempt, stage := traceStage(attempt)
	tlsConfig := d.TLS.Clone()
	tlsConfig.NextProtos = []string{"http/1.1"}
	tlsConfig.DynamicRecordSizingDisabled = true
	wd := websocket.Dialer{
		NetDialContext:   conns.wrap(d.netDial()),
		TLSClientConfig:  tlsConfig,
		Proxy:            d.Proxy,
		HandshakeTimeout: timeout,
		Subprotocols:     []string{Subprotocol},
		ReadBufferSize:   wsReadBuffer,
		WriteBufferSize:  wsBufferSize,
		WriteBufferPool:  &cfg.Memory.write,
	}
	if wd.Proxy == nil {
		wd.Proxy = http.ProxyFromEnvironment
	}
	ws, resp, err := wd.DialContext(attempt, u.String(), d.Header.Clone())
	if err != nil {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("tunnel: dial %s: %w", rawURL, ctx.Err())
		}
		e := dialError(rawURL, resp, err, attempt.Err())
		if e.Reason == DialTimeout {
			e.Err = fmt.Errorf("timed out waiting %s: %w", stage(), err)
		}
		return nil, e
	}
	if ws.Subprotocol() != Subprotocol {
		_ = ws.Close()
		return nil, &DialError{URL: rawURL, Reason: DialProtocol, Err: fmt.Errorf("the peer does not speak %s", Subprotocol)}
	}
	s, err := Client(ws, cfg)
	if err != nil {
		_ = ws.Close()
		return nil, &DialError{URL: rawURL, Reason: DialConfig, Err: err}
	}
	return s, nil
}

func (d *Dialer) netDial() func(ctx context.Context, network, addr string) (net.Conn, error) {
	if d.NetDial != nil {
		return d.NetDial
	}
	return d.known.dial
}

func hubURL(raw string) (*url.URL, error) {
	u, err := url.Parse(raw)
	if err != nil {
		return nil, err
	}
	switch u.Scheme {
	case "https", "wss":
		u.Scheme = "wss"
	default:
		return nil, fmt.Errorf("scheme %q; https or wss is needed", u.Scheme)
	}
	if u.Host == "" || u.User != nil {
		return nil, errors.New("the URL must name a host and no user")
	}
	return u, nil
}

// closer closes the connections of an attempt that is given up.
type closer struct {
	mu    sync.Mutex
	conns []net.Conn
	over  bool
}

func (c *closer) wrap(dial func(context.Context, string, string) (net.Conn, error)) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.over {
			_ = conn.Close()
			return nil, context.Canceled
		}
		c.conns = append(c.conns, conn)
		return conn, nil
	}
}

func (c *closer) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.over = true
	for _, conn := range c.conns {
		_ = conn.Close()
	}
}

// dialError sorts a failure. timeout is the attempt's own.
func dialError(rawURL string, resp *http.Response, err, timeout error) *DialError {
	e := &DialError{URL: rawURL, Err: err}
	var (
		dns     *net.DNSError
		verify  *tls.CertificateVerificationError
		unknown x509.UnknownAuthorityError
		host    x509.HostnameError
		invalid x509.CertificateInvalidError
		alert   tls.AlertError
		record  tls.RecordHeaderError
		network net.Error
		op      *net.OpError
	)
	switch {
	case resp != nil:
		e.Status, e.RetryAfter = resp.StatusCode, retryAfter(resp.Header, time.Now())
		e.Body = firstLine(resp.Body)
		e.Reason = reasonOfStatus(resp.StatusCode)
		if isPage(resp) {
			e.Reason, e.Body, e.RetryAfter = DialPortal, "", 0
			if to, err := resp.Location(); err == nil {
				e.Body = "go to " + printable(to.Host)
			}
		}
	case errors.As(err, &dns):
		e.Reason = DialDNS
	case errors.Is(err, syscall.ECONNREFUSED):
		e.Reason = DialRefused
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETDOWN):
		e.Reason = DialUnreachable
	case errors.As(err, &verify), errors.As(err, &unknown), errors.As(err, &host), errors.As(err, &invalid):
		e.Reason = DialCertificate
		if verify != nil && len(verify.UnverifiedCertificates) > 0 {
			shown := verify.UnverifiedCertificates[0]
			e.Err = fmt.Errorf("the certificate shown, for %q by %q, is not to be trusted: %w",
				printable(shown.Subject.String()), printable(shown.Issuer.String()), err)
		}
	case errors.As(err, &record):
		e.Reason = DialPortal
		e.Err = fmt.Errorf("what answers does not speak TLS: %w", err)
		if string(record.RecordHeader[:]) == "HTTP/" {
			e.Err = fmt.Errorf("what answers speaks plain HTTP, not TLS: %w", err)
		}
	case errors.As(err, &alert), errors.As(err, &op) && op.Op == "remote error":
		e.Reason = DialTLS // TLS 1.3 shows a refused client certificate as an alert on the first read
	case timeout != nil, errors.As(err, &network) && network.Timeout():
		e.Reason = DialTimeout
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		e.Reason = DialLost
	default:
		e.Reason = DialProtocol
	}
	return e
}

func reasonOfStatus(status int) DialReason {
	switch status {
	case http.StatusUnauthorized, http.StatusForbidden:
		return DialRejected
	case http.StatusGone:
		return DialGone
	case http.StatusSwitchingProtocols, http.StatusOK, http.StatusNotFound, http.StatusBadRequest, http.StatusUpgradeRequired:
		return DialProtocol
	}
	return DialHTTP
}

// isPage tells an answer that is meant for a person with a browser: no hub
// sends people elsewhere, or asks them to sign in.
func isPage(resp *http.Response) bool {
	kind, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	return resp.StatusCode/100 == 3 || resp.StatusCode == http.StatusNetworkAuthenticationRequired ||
		resp.StatusCode == http.StatusOK && kind == "text/html"
}

func firstLine(r io.Reader) string {
	b, _ := io.ReadAll(io.LimitReader(r, 256))
	line, _, _ := strings.Cut(strings.TrimSpace(string(b)), "\n")
	return printable(line)
}

// printable keeps text of the network from moving a terminal's cursor.
func printable(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s)
	return s[:min(len(s), 256)]
}

// retryAfter reads the header in both its forms, at most an hour.
func retryAfter(h http.Header, now time.Time) time.Duration {
	v := h.Get("Retry-After")
	if v == "" {
		return 0
	}
	var d time.Duration
	if n, err := strconv.ParseUint(v, 10, 16); err == nil {
		d = time.Duration(n) * time.Second
	} else if t, err := http.ParseTime(v); err == nil {
		d = t.Sub(now)
	}
	return min(max(d, 0), time.Hour)
}
