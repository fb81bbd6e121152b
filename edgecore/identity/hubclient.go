package identity

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

const (
	dialTimeout      = 10 * time.Second
	handshakeTimeout = 15 * time.Second
	answerTimeout    = 35 * time.Second // the hub gives a join 30
	maxRetryAfter    = 15 * time.Second
)

// hubClient speaks the join exchange with one hub and turns what goes wrong
// into *Error.
type hubClient struct {
	url  *url.URL
	node string
	op   string // "join" or "renew"
	log  *slog.Logger
}

// pinnedCA returns the CA that pin names, out of the chain the hub shows. The
// handshake trusts no root at all and so is bound to fail, after it has shown
// the chain; nothing is sent over it. Trust begins with the hash in the token:
// the caller dials again with the CA as its only root and verifies in full.
func (h *hubClient) pinnedCA(ctx context.Context, pin edgeapi.CAPin) (*x509.Certificate, error) {
	// TLS 1.2 is offered only here, so that a captive portal of that age can
	// show who it is.
	_, err := h.head(ctx, &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: x509.NewCertPool()})
	var unverified *tls.CertificateVerificationError
	if err == nil {
		return nil, h.fail(ReasonNotAHub, nil, "a connection without any trusted root succeeded", "report this")
	}
	if !errors.As(err, &unverified) {
		return nil, h.explain(ctx, err, nil)
	}
	for _, cert := range unverified.UnverifiedCertificates {
		if cert.IsCA && edgeapi.PinOf(cert) == pin {
			return cert, nil
		}
	}
	return nil, h.foreignChain(unverified.UnverifiedCertificates, pin)
}

// client returns an HTTP client for one connection under conf.
func (h *hubClient) client(conf *tls.Config) *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			Proxy:                  http.ProxyFromEnvironment,
			DialContext:            (&net.Dialer{Timeout: dialTimeout}).DialContext,
			TLSClientConfig:        conf,
			TLSHandshakeTimeout:    handshakeTimeout,
			ResponseHeaderTimeout:  answerTimeout,
			MaxResponseHeaderBytes: edgeapi.MaxJoinBody,
			DisableKeepAlives:      true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// head asks the hub for headers only.
func (h *hubClient) head(ctx context.Context, conf *tls.Config) (http.Header, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodHead, h.url.JoinPath(edgeapi.JoinPath).String(), nil)
	if err != nil {
		return nil, err
	}
	resp, err := h.client(conf).Do(req)
	if err != nil {
		return nil, err
	}
	resp.Body.Close()
	return resp.Header, nil
}

// post sends body and returns the hub's answer. It tries again, until ctx
// ends, when the hub asks for patience or the answer was lost on the way: the
// exchange may be repeated.
func (h *hubClient) post(ctx context.Context, conf *tls.Config, path string, body any) (*edgeapi.JoinResponse, error) {
	encoded, err := json.Marshal(body)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", h.op, err)
	}
	for wait := time.Second; ; wait = min(2*wait, maxRetryAfter) {
		resp, retryAfter, err := h.postOnce(ctx, conf, path, encoded)
		if err == nil || retryAfter < 0 {
			return resp, err
		}
		timer := time.NewTimer(max(wait, retryAfter))
		h.log.Info("trying again", "in", max(wait, retryAfter), "because", err.Error())
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, err
		}
	}
}

// postOnce tries once. retryAfter is negative if another try is of no use.
func (h *hubClient) postOnce(ctx context.Context, conf *tls.Config, path string, encoded []byte) (_ *edgeapi.JoinResponse, retryAfter time.Duration, _ error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, h.url.JoinPath(path).String(), bytes.NewReader(encoded))
	if err != nil {
		return nil, -1, fmt.Errorf("%s: %w", h.op, err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := h.client(conf).Do(req)
	if err != nil {
		if lostOnTheWay(err) && ctx.Err() == nil {
			return nil, 0, h.explain(ctx, err, conf)
		}
		return nil, -1, h.explain(ctx, err, conf)
	}
	defer resp.Body.Close()
	if resp.Header.Get(edgeapi.HubHeader) == "" {
		return nil, -1, h.fail(ReasonNotAHub, nil,
			fmt.Sprintf("something answered %q that is no Skerry hub (%s)", resp.Status, orNone(resp.Header.Get("Content-Type"))), notAHubHint)
	}
	answer, err := io.ReadAll(io.LimitReader(resp.Body, edgeapi.MaxJoinBody+1))
	if err != nil {
		return nil, 0, h.explain(ctx, err, conf)
	}
	if len(answer) > edgeapi.MaxJoinBody {
		return nil, -1, h.fail(ReasonBadAnswer, nil, "the hub's answer is too long", "update edgecore or cloudhub so that their versions fit")
	}
	if resp.StatusCode != http.StatusOK {
		refusal, err := decodeRefusal(answer)
		if err != nil {
			return nil, -1, h.fail(ReasonBadAnswer, err, "the hub answered "+resp.Status+" without saying why", "look into the hub's log")
		}
		return nil, patience(resp, refusal), h.refused(refusal)
	}
	var joined edgeapi.JoinResponse
	if err := json.Unmarshal(answer, &joined); err != nil {
		return nil, -1, h.fail(ReasonBadAnswer, err, "the hub's answer cannot be read: "+err.Error(), "update edgecore or cloudhub so that their versions fit")
	}
	return &joined, -1, nil
}

func decodeRefusal(answer []byte) (*edgeapi.JoinError, error) {
	var refusal edgeapi.JoinError
	if err := json.Unmarshal(answer, &refusal); err != nil {
		return nil, err
	}
	if refusal.Code == "" {
		return nil, errors.New("no code")
	}
	refusal.Message = printable(refusal.Message)
	return &refusal, nil
}

// patience returns how long to wait before the same request may be welcome.
func patience(resp *http.Response, refusal *edgeapi.JoinError) time.Duration {
	if refusal.Code != edgeapi.JoinTooMany && refusal.Code != edgeapi.JoinUnavailable {
		return -1
	}
	seconds, err := strconv.Atoi(resp.Header.Get("Retry-After"))
	if err != nil || seconds < 0 {
		return 0
	}
	return min(time.Duration(seconds)*time.Second, maxRetryAfter)
}

// lostOnTheWay reports whether the request may have arrived although no answer
// did. Failures to connect are not among them: those are the user's to see at
// once.
func lostOnTheWay(err error) bool {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Op == "read" || op.Op == "write"
	}
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}
