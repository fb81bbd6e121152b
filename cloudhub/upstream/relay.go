package upstream

import (
	"context"
	"encoding/json"
	"errors"
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
		Transport: u.direct,
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

func refuse(w http.ResponseWriter, code int, reason metav1.StatusReason, msg string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(metav1.Status{
		TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"},
		Status:   metav1.StatusFailure, Code: int32(code), Reason: reason, Message: msg,
	})
}
