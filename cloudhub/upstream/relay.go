package upstream

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"path"
	"strings"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// maxRequestBody bounds a relayed request; the API server's own limit is 3 MiB.
const maxRequestBody = 3 << 20

// Relay serves HTTP/1.1 on conns that the node opened (edgeapi.KindAPI), and
// sends each request to the API server as the node. It returns when conns is
// closed or ctx ends, once all requests have ended.
//
// Watches are refused: the sync stream is the node's watch, and a relayed one
// would be a second copy of it on the link.
func (u *Upstream) Relay(ctx context.Context, node string, conns net.Listener) error {
	srv := &http.Server{
		Handler:           u.relayHandler(node),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		BaseContext:       func(net.Listener) context.Context { return withNode(ctx, node) },
		ErrorLog:          slog.NewLogLogger(u.log.Handler(), slog.LevelDebug),
	}
	var wg sync.WaitGroup
	wg.Add(1)
	stop := context.AfterFunc(ctx, func() { defer wg.Done(); srv.Close() })
	err := srv.Serve(conns)
	if stop() {
		srv.Close()
		wg.Done()
	}
	wg.Wait()
	if errors.Is(err, http.ErrServerClosed) || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func (u *Upstream) relayHandler(node string) http.Handler {
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(u.base)
			r.Out.Host = u.base.Host
			// The node's word on who it is does not count.
			for h := range r.Out.Header {
				if strings.HasPrefix(h, "Impersonate-") || strings.HasPrefix(h, "X-Remote-") || h == "Authorization" || h == "Cookie" {
					r.Out.Header.Del(h)
				}
			}
		},
		Transport: patient{u.direct},
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			refuse(w, http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable,
				"the hub could not reach the API server: "+err.Error())
		},
		ErrorLog: slog.NewLogLogger(u.log.Handler(), slog.LevelDebug),
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case path.Clean(r.URL.Path) != r.URL.Path:
			refuse(w, http.StatusBadRequest, metav1.StatusReasonBadRequest, "path is not clean: "+r.URL.Path)
		case !strings.HasPrefix(r.URL.Path, "/api/") && !strings.HasPrefix(r.URL.Path, "/apis/"):
			refuse(w, http.StatusNotFound, metav1.StatusReasonNotFound, "only /api/ and /apis/ are relayed, not "+r.URL.Path)
		case r.URL.Query().Has("watch") || strings.Contains(r.URL.Path, "/watch/"):
			refuse(w, http.StatusMethodNotAllowed, metav1.StatusReasonMethodNotAllowed, "watches are not relayed: the sync stream carries changes")
		case r.Header.Get("Upgrade") != "":
			refuse(w, http.StatusMethodNotAllowed, metav1.StatusReasonMethodNotAllowed, "upgraded connections are not relayed")
		default:
			r.Body = http.MaxBytesReader(w, r.Body, maxRequestBody)
			ctx, cancel := context.WithTimeout(r.Context(), u.timeout)
			defer cancel()
			proxy.ServeHTTP(w, r.WithContext(ctx))
		}
	})
}

// patient asks again when the Node authorizer does not know yet what the feed
// has told the node already: its graph follows the API server's own watch, and
// a pod that has just been bound is another's to it for some milliseconds. A
// kubelet that is refused a token waits much longer before it asks again.
type patient struct{ next http.RoundTripper }

const (
	graphLag   = time.Second // how long an answer is worth asking for again
	graphRetry = 40 * time.Millisecond
	// maxReplay bounds the request bodies that are kept for it, and the
	// answers that are looked at.
	maxReplay = 16 << 10
)

func (p patient) RoundTrip(req *http.Request) (*http.Response, error) {
	var body []byte
	if req.Body != nil && req.Body != http.NoBody {
		if req.ContentLength < 0 || req.ContentLength > maxReplay {
			return p.next.RoundTrip(req)
		}
		var err error
		body, err = io.ReadAll(req.Body)
		req.Body.Close()
		if err != nil {
			return nil, err
		}
	}
	for until := time.Now().Add(graphLag); ; {
		if body != nil {
			req.Body = io.NopCloser(bytes.NewReader(body))
		}
		res, err := p.next.RoundTrip(req)
		if err != nil || res.StatusCode != http.StatusForbidden {
			return res, err
		}
		answer, err := io.ReadAll(io.LimitReader(res.Body, maxReplay))
		if err != nil {
			res.Body.Close()
			return nil, err
		}
		if !bytes.Contains(answer, []byte("no relationship found between node")) || time.Now().After(until) {
			res.Body = struct {
				io.Reader
				io.Closer
			}{io.MultiReader(bytes.NewReader(answer), res.Body), res.Body}
			return res, nil
		}
		res.Body.Close()
		select {
		case <-time.After(graphRetry):
		case <-req.Context().Done():
			return nil, req.Context().Err()
		}
	}
}

func refuse(w http.ResponseWriter, code int, reason metav1.StatusReason, msg string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(metav1.Status{
		TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"},
		Status:   metav1.StatusFailure, Code: int32(code), Reason: reason, Message: msg,
	})
}
