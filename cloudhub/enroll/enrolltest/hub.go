package enrolltest

import (
	"context"
	"crypto/tls"
	"log"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/skerry-io/skerry/cloudhub/enroll"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// Hub is a hub on a loopback port. Besides joining and renewing it serves
// WhoAmI, which answers the caller's node name.
type Hub struct {
	*enroll.Enroll
	URL string
}

// WhoAmI is where a node is told its name, as any other endpoint of a hub
// would find it out.
const WhoAmI = "/whoami"

// Start runs a hub until the test ends. A cfg without a Client gets an empty
// cluster, one without ServerNames is 127.0.0.1 and localhost.
func Start(t testing.TB, cfg enroll.Config) *Hub {
	t.Helper()
	if cfg.Client == nil {
		cfg.Client = Client()
	}
	if cfg.ServerNames == nil {
		cfg.ServerNames = []string{"127.0.0.1", "localhost"}
	}
	ctx, cancel := context.WithCancel(context.Background())
	e, err := enroll.New(ctx, cfg)
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	server := &http.Server{
		Handler:           dated(Handler(e), cfg.Clock),
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          log.New(testWriter{t}, "", 0),
	}
	done := make(chan error, 2)
	go func() { done <- e.Run(ctx) }()
	go func() { done <- server.Serve(tls.NewListener(listener, e.ServerTLS())) }()
	t.Cleanup(func() {
		server.Close()
		cancel()
		for range 2 {
			if err := <-done; err != nil && err != http.ErrServerClosed {
				t.Errorf("hub: %v", err)
			}
		}
	})
	select {
	case <-e.Synced():
	case <-time.After(30 * time.Second):
		t.Fatal("the hub has not read its nodes within 30 s")
	}
	return &Hub{Enroll: e, URL: "https://" + listener.Addr().String()}
}

// dated answers with the hub's clock where a real hub's is the machine's.
func dated(h http.Handler, clock func() time.Time) http.Handler {
	if clock == nil {
		return h
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Date", clock().UTC().Format(http.TimeFormat))
		h.ServeHTTP(w, r)
	})
}

// Handler serves e the way cloudhub does.
func Handler(e *enroll.Enroll) http.Handler {
	mux := http.NewServeMux()
	mux.Handle(edgeapi.JoinPath, e.JoinHandler())
	mux.Handle(edgeapi.RenewPath, e.RenewHandler())
	mux.HandleFunc(WhoAmI, func(w http.ResponseWriter, r *http.Request) {
		if len(r.TLS.PeerCertificates) == 0 {
			http.Error(w, "no certificate", http.StatusUnauthorized)
			return
		}
		rec, err := e.Identify(r.TLS.PeerCertificates[0])
		if err != nil {
			enroll.WriteRefusal(w, err, time.Now())
			return
		}
		_, _ = w.Write([]byte(rec.Name))
	})
	return mux
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	if w.t.Context().Err() == nil { // connections may end after the test
		w.t.Logf("hub: %s", p)
	}
	return len(p), nil
}
