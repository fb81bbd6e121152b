package sink

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// maxRetryAfter bounds how long a peer can have us wait.
const maxRetryAfter = time.Hour

// httpClient posts to one URL.
type httpClient struct {
	cfg     Config
	url     string
	shown   string // url without what may be secret in it
	client  *http.Client
	headers http.Header
}

func newHTTP(cfg Config, rawURL string) (*httpClient, error) {
	u, err := url.Parse(rawURL)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, errors.New("url: want http:// or https:// and a host")
	}
	tc, err := tlsConfig(cfg.Secret)
	if err != nil {
		return nil, err
	}
	h := &httpClient{cfg: cfg, url: rawURL, shown: u.Scheme + "://" + u.Host + u.Path, headers: http.Header{}}
	h.headers.Set("User-Agent", "skerry")
	switch {
	case len(cfg.Secret["token"]) > 0:
		h.headers.Set("Authorization", "Bearer "+strings.TrimSpace(string(cfg.Secret["token"])))
	case len(cfg.Secret["username"]) > 0:
		var r http.Request
		r.Header = h.headers
		r.SetBasicAuth(string(cfg.Secret["username"]), string(cfg.Secret["password"]))
	}
	h.client = &http.Client{
		Transport: &http.Transport{
			Proxy: http.ProxyFromEnvironment, TLSClientConfig: tc, TLSHandshakeTimeout: 10 * time.Second,
			MaxIdleConns: 1, MaxConnsPerHost: 2, IdleConnTimeout: 90 * time.Second, ForceAttemptHTTP2: true,
			MaxResponseHeaderBytes: 64 << 10,
		},
		// Credentials go where the route says, nowhere else.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return h, nil
}

func (h *httpClient) Close() { h.client.CloseIdleConnections() }

// status is an answer that is not 2xx.
type status struct {
	code  int
	words string
	after time.Duration
}

func (s *status) Error() string {
	return strings.TrimSpace(fmt.Sprintf("status %d %s", s.code, s.words))
}

// final tells whether the answer is about the records. What is about who asks,
// or where, is for people to mend, and the records wait for it.
func (s *status) final() bool {
	switch s.code {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound, http.StatusProxyAuthRequired,
		http.StatusRequestTimeout, http.StatusTooEarly, http.StatusTooManyRequests:
		return false
	}
	return s.code >= 400 && s.code < 500
}

// post sends one body. The error is a *status, or that there was no answer.
func (h *httpClient) post(ctx context.Context, body []byte, header http.Header) error {
	ctx, cancel := context.WithTimeout(ctx, h.cfg.Timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, h.url, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("post to %s: malformed request", h.shown)
	}
	for _, hs := range []http.Header{h.headers, header} {
		for k, v := range hs {
			req.Header[k] = v
		}
	}
	resp, err := h.client.Do(req)
	if err != nil {
		var ue *url.Error // it shows the URL, whose query may hold a secret
		if errors.As(err, &ue) {
			err = ue.Err
		}
		return fmt.Errorf("post to %s: %w", h.shown, err)
	}
	defer resp.Body.Close()
	words, _ := io.ReadAll(io.LimitReader(resp.Body, 300))
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)) // so that the connection can be used again
	if resp.StatusCode/100 == 2 {
		return nil
	}
	return &status{resp.StatusCode, strings.ToValidUTF8(string(words), "?"), retryAfter(resp.Header.Get("Retry-After"), time.Now())}
}

// retry makes of an error of post one of Send, that is not final.
func (h *httpClient) retry(err error) error {
	var st *status
	if !errors.As(err, &st) {
		return err
	}
	err = fmt.Errorf("post to %s: %w", h.shown, err)
	if st.after > 0 {
		return &Later{st.after, err}
	}
	return err
}

// retryAfter reads the header of that name: seconds, or a date.
func retryAfter(v string, now time.Time) time.Duration {
	if v == "" {
		return 0
	}
	if n, err := strconv.ParseUint(v, 10, 32); err == nil {
		return min(time.Duration(n)*time.Second, maxRetryAfter)
	}
	if t, err := http.ParseTime(v); err == nil {
		return min(max(t.Sub(now), 0), maxRetryAfter)
	}
	return 0
}

// webhook posts batches as JSON lines.
type webhook struct{ *httpClient }

func newWebhook(cfg Config) (*webhook, error) {
	h, err := newHTTP(cfg, cfg.Spec.Webhook.URL)
	if err != nil {
		return nil, fmt.Errorf("webhook: %w", err)
	}
	h.headers.Set("Content-Type", "application/x-ndjson")
	return &webhook{h}, nil
}

// maxParts bounds the requests made to find what of a batch is refused.
const maxParts = 32

func (w *webhook) Send(ctx context.Context, records []edgeapi.TelemetryRecord) error {
	parts := [][]edgeapi.TelemetryRecord{records}
	var refused Refused
	for asked := 1; len(parts) > 0; asked++ {
		part := parts[0]
		parts = parts[1:]
		err := w.part(ctx, part)
		var st *status
		switch {
		case err == nil:
		case !errors.As(err, &st) || !st.final():
			return w.retry(err)
		case len(part) > 1 && asked+len(parts)+2 <= maxParts:
			// One bad record shall not take the others with it.
			half := len(part) / 2
			parts = append([][]edgeapi.TelemetryRecord{part[:half], part[half:]}, parts...)
		default:
			refused.Count += len(part)
			refused.Why = st.Error()
		}
	}
	if refused.Count > 0 {
		return &refused
	}
	return nil
}

func (w *webhook) part(ctx context.Context, records []edgeapi.TelemetryRecord) error {
	var body bytes.Buffer
	ids := sha256.New()
	for _, r := range records {
		l, err := w.cfg.line(r)
		if err != nil {
			return &status{code: http.StatusBadRequest, words: err.Error()}
		}
		body.Write(l)
		body.WriteByte('\n')
		_, _ = io.WriteString(ids, r.ID+"\n")
	}
	return w.post(ctx, body.Bytes(), http.Header{"Idempotency-Key": {hex.EncodeToString(ids.Sum(nil)[:16])}})
}
