package identity

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"time"
	"unicode"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// Reason tells failures apart for programs. Refusals by the hub carry the
// hub's own code (edgeapi.JoinErrorCode).
type Reason string

const (
	ReasonNoSuchHost    Reason = "no-such-host"
	ReasonDNS           Reason = "dns"
	ReasonRefused       Reason = "connection-refused"
	ReasonUnreachable   Reason = "unreachable"
	ReasonTimeout       Reason = "timeout"
	ReasonCutOff        Reason = "cut-off"
	ReasonProxy         Reason = "proxy"
	ReasonNotAHub       Reason = "not-a-hub"
	ReasonCAMismatch    Reason = "ca-mismatch"
	ReasonHubName       Reason = "hub-name"
	ReasonClockSkew     Reason = "clock-skew"
	ReasonHubCert       Reason = "hub-certificate"
	ReasonOwnCert       Reason = "own-certificate"
	ReasonBadAnswer     Reason = "bad-answer"
	ReasonInterrupted   Reason = "interrupted"
	ReasonOtherNetError Reason = "network"
)

// Error is a failed exchange with a hub.
type Error struct {
	Op     string // "join" or "renew"
	Hub    string
	Node   string
	Reason Reason
	What   string // what happened, a clause for a person
	Next   string // what to do about it
	Err    error  // the cause, if there is one
}

func (e *Error) Error() string {
	s := fmt.Sprintf("%s %s as node %s: %s", e.Op, e.Hub, e.Node, e.What)
	if e.Next != "" {
		s += "; " + e.Next
	}
	return s
}

func (e *Error) Unwrap() error { return e.Err }

func (h *hubClient) fail(reason Reason, cause error, what, next string) *Error {
	return &Error{Op: h.op, Hub: h.url.String(), Node: h.node, Reason: reason, What: what, Next: next, Err: cause}
}

const notAHubHint = "check the address and port; on a guest network a captive portal may be in the way: open it in a browser first"

// refused tells what the hub said and what to do about it.
func (h *hubClient) refused(r *edgeapi.JoinError) *Error {
	next := ""
	switch r.Code {
	case edgeapi.JoinTokenUnknown, edgeapi.JoinTokenExpired, edgeapi.JoinTokenUsed, edgeapi.JoinTokenRevoked:
		next = "make a new one at the hub with: cloudhub token create"
	case edgeapi.JoinTokenWrongNode:
		next = "join under that name with --node-name, or make a new token at the hub with: cloudhub token create"
	case edgeapi.JoinBadName:
		next = "give another name with --node-name"
	case edgeapi.JoinBadKey, edgeapi.JoinBadRequest:
		next = "update edgecore or cloudhub so that their versions fit"
	case edgeapi.JoinTooMany, edgeapi.JoinUnavailable:
		next = "try again later; the token is not used up"
		if h.op != "join" {
			next = "it is tried again"
		}
	case edgeapi.JoinCertificateExpired, edgeapi.JoinUnknownNode, edgeapi.JoinNodeReplaced, edgeapi.JoinNoCertificate:
		next = "join again with: edgecore join " + h.url.String() + " --token TOKEN --replace"
	case edgeapi.JoinNodeRevoked:
		if h.op != "join" { // the hub's text says how at a join
			next = "have the hub's operator forget it, then join again"
		}
	}
	return h.fail(Reason(r.Code), r, r.Message, next)
}

// explain finds out what a failed connection means. conf is the connection's
// configuration, nil before the hub's CA is known.
func (h *hubClient) explain(ctx context.Context, err error, conf *tls.Config) error {
	host, addr := h.url.Hostname(), h.url.Host
	var (
		dns        *net.DNSError
		op         *net.OpError
		unverified *tls.CertificateVerificationError
		record     tls.RecordHeaderError
		alert      tls.AlertError
		netErr     net.Error
	)
	switch {
	case errors.As(err, &unverified):
		return h.explainChain(ctx, unverified, conf)
	case errors.As(err, &op) && op.Op == "proxyconnect":
		return h.fail(ReasonProxy, err, "the proxy of this machine's environment does not connect: "+cause(err), "check HTTPS_PROXY and NO_PROXY")
	case errors.As(err, &dns) && dns.IsNotFound:
		return h.fail(ReasonNoSuchHost, err, fmt.Sprintf("no such host: the DNS does not know %q", host), "check the name, and the name servers in /etc/resolv.conf")
	case errors.As(err, &dns):
		return h.fail(ReasonDNS, err, fmt.Sprintf("the DNS gives no answer about %q (%s)", host, cause(dns)), "check the network and the name servers in /etc/resolv.conf, or give the hub's IP address")
	case errors.Is(err, syscall.ECONNREFUSED):
		return h.fail(ReasonRefused, err, "connection refused: nothing listens at "+addr, "check that cloudhub runs there, and its port ("+DefaultHubPort+" unless set otherwise)")
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH):
		return h.fail(ReasonUnreachable, err, "no route to "+addr+" ("+cause(err)+")", "check this machine's network and default route")
	case errors.Is(err, http.ErrSchemeMismatch):
		return h.fail(ReasonNotAHub, err, addr+" answers plain HTTP where a hub speaks TLS", notAHubHint)
	case errors.As(err, &record):
		return h.fail(ReasonNotAHub, err, addr+" does not speak TLS", notAHubHint)
	case errors.As(err, &alert) && conf != nil && len(conf.Certificates)+boolInt(conf.GetClientCertificate != nil) > 0:
		return h.fail(ReasonOwnCert, err, "the hub does not accept this node's certificate ("+alert.Error()+")", "join again with: edgecore join "+h.url.String()+" --token TOKEN --replace")
	case errors.As(err, &alert), strings.Contains(err.Error(), "tls: "):
		return h.fail(ReasonNotAHub, err, addr+" refuses TLS as a hub speaks it ("+cause(err)+")", notAHubHint)
	case errors.Is(context.Cause(ctx), context.Canceled):
		return h.fail(ReasonInterrupted, err, "interrupted", "run the same command again")
	case errors.As(err, &netErr) && netErr.Timeout(), errors.Is(err, context.DeadlineExceeded), ctx.Err() != nil:
		return h.fail(ReasonTimeout, err, "no answer from "+addr+" in time", "check the address, and that no firewall drops the way to that port")
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return h.fail(ReasonCutOff, err, addr+" cut the connection off", "check that it is a hub's address and port, and that no firewall or proxy in between forbids TLS 1.3")
	}
	return h.fail(ReasonOtherNetError, err, "the connection failed: "+cause(err), "check the network and try again")
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// explainChain tells why a chain that should end in the hub's CA does not
// pass.
func (h *hubClient) explainChain(ctx context.Context, e *tls.CertificateVerificationError, conf *tls.Config) error {
	chain := e.UnverifiedCertificates
	var (
		invalid x509.CertificateInvalidError
		name    x509.HostnameError
	)
	switch {
	case errors.As(e.Err, &invalid) && invalid.Reason == x509.Expired && len(chain) > 0:
		return h.explainClock(ctx, e, conf)
	case errors.As(e.Err, &name) && len(chain) > 0:
		return h.fail(ReasonHubName, e, fmt.Sprintf("the hub's certificate is for %s, not for %s", certNames(chain[0]), h.url.Hostname()),
			fmt.Sprintf("join by one of those, or start cloudhub with --server-names %s added", h.url.Hostname()))
	case errors.As(e.Err, new(x509.UnknownAuthorityError)):
		return h.fail(ReasonHubCert, e, "the certificate shown by "+h.url.Host+" does not come from the CA this node trusts ("+describe(chain)+")",
			"another hub answers there, or somebody listens in between; check the address, or join anew with a new token and --replace")
	}
	return h.fail(ReasonHubCert, e, "the hub's certificate cannot be verified: "+cause(e.Err), "restart cloudhub; it then issues another")
}

// explainClock is called when this machine's clock stands outside the life of
// the hub's certificate. It asks the hub for the time, over a connection that
// is verified against the CA as of a moment within the certificate's life.
func (h *hubClient) explainClock(ctx context.Context, e *tls.CertificateVerificationError, conf *tls.Config) error {
	leaf, here := e.UnverifiedCertificates[0], time.Now()
	if conf != nil && conf.Time != nil {
		here = conf.Time()
	}
	there, ok := h.hubTime(ctx, leaf, conf)
	switch {
	case !ok && here.Before(leaf.NotBefore):
		return h.fail(ReasonClockSkew, e, fmt.Sprintf("this machine's clock says %s, but the hub's certificate is valid from %s on: the clock is at least %s behind",
			stamp(here), stamp(leaf.NotBefore), roughly(leaf.NotBefore.Sub(here))), setClock)
	case !ok:
		return h.fail(ReasonClockSkew, e, fmt.Sprintf("this machine's clock says %s, but the hub's certificate ended at %s: the clock is at least %s ahead, or the hub has not renewed its certificate",
			stamp(here), stamp(leaf.NotAfter), roughly(here.Sub(leaf.NotAfter))), setClock)
	case there.Before(leaf.NotBefore), there.After(leaf.NotAfter):
		return h.fail(ReasonClockSkew, e, fmt.Sprintf("the hub's clock says %s, which its own certificate (valid %s to %s) contradicts; this machine's clock says %s",
			stamp(there), stamp(leaf.NotBefore), stamp(leaf.NotAfter), stamp(here)), "set the hub's clock and restart cloudhub")
	case here.Before(there):
		return h.fail(ReasonClockSkew, e, fmt.Sprintf("this machine's clock is %s behind the hub's: it says %s, the hub's says %s", roughly(there.Sub(here)), stamp(here), stamp(there)), setClock)
	}
	return h.fail(ReasonClockSkew, e, fmt.Sprintf("this machine's clock is %s ahead of the hub's: it says %s, the hub's says %s", roughly(here.Sub(there)), stamp(here), stamp(there)), setClock)
}

const setClock = "set this machine's clock (timedatectl set-ntp true, or date -s) and try again"

// hubTime reads the hub's clock off its Date header.
func (h *hubClient) hubTime(ctx context.Context, leaf *x509.Certificate, conf *tls.Config) (time.Time, bool) {
	if conf == nil {
		return time.Time{}, false
	}
	conf = conf.Clone()
	conf.Time = func() time.Time { return leaf.NotAfter.Add(-time.Minute) }
	header, err := h.head(ctx, conf)
	if err != nil {
		return time.Time{}, false
	}
	t, err := http.ParseTime(header.Get("Date"))
	return t, err == nil
}

// foreignChain tells why a chain without the CA the token names is refused.
func (h *hubClient) foreignChain(chain []*x509.Certificate, pin edgeapi.CAPin) error {
	for _, cert := range chain {
		if cert.IsCA && len(cert.Subject.Organization) == 1 && cert.Subject.Organization[0] == edgeapi.HubOrganization {
			return h.fail(ReasonCAMismatch, nil, fmt.Sprintf("the hub at %s is not the one that made this token: its CA is %s, the token names %s", h.url.Host, edgeapi.PinOf(cert), pin),
				"make a new token at this hub with: cloudhub token create; if the token is this hub's, somebody listens in between")
		}
	}
	return h.fail(ReasonNotAHub, nil, fmt.Sprintf("%s is no Skerry hub: it shows %s", h.url.Host, describe(chain)), notAHubHint)
}

// describe says whom a chain names, for a person to recognise.
func describe(chain []*x509.Certificate) string {
	if len(chain) == 0 {
		return "no certificate"
	}
	return fmt.Sprintf("a certificate for %s issued by %q", certNames(chain[0]), printable(chain[0].Issuer.String()))
}

func certNames(cert *x509.Certificate) string {
	names := append([]string(nil), cert.DNSNames...)
	for _, ip := range cert.IPAddresses {
		names = append(names, ip.String())
	}
	if len(names) == 0 {
		return fmt.Sprintf("%q", printable(cert.Subject.CommonName))
	}
	more := ""
	if len(names) > 8 {
		names, more = names[:8], ", …"
	}
	return printable(strings.Join(names, ", ")) + more
}

// cause is the innermost text of err, without the URL and addresses around it.
func cause(err error) string {
	for {
		next := errors.Unwrap(err)
		if next == nil {
			return printable(err.Error())
		}
		err = next
	}
}

// printable drops what could move a terminal's cursor, and bounds the rest:
// the text came over the network.
func printable(s string) string {
	s = strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, s)
	if len(s) > 600 {
		s = strings.ToValidUTF8(s[:600], "") + "…"
	}
	return s
}

func orNone(contentType string) string {
	if contentType == "" {
		return "no content type"
	}
	return printable(contentType)
}

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }

// roughly writes a duration the way people say it.
func roughly(d time.Duration) string {
	switch d = d.Abs(); {
	case d < 2*time.Minute:
		return fmt.Sprintf("%d seconds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%d minutes", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d hours", int(d.Hours()))
	case d < 2*365*24*time.Hour:
		return fmt.Sprintf("%d days", int(d.Hours()/24))
	}
	return fmt.Sprintf("%d years", int(d.Hours()/24/365))
}
