package kubeletproxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"

	"github.com/skerry-io/skerry/tunnel"
)

// farNodes connects every known address through a real tunnel to a kubelet-like
// server at its edge end.
type farNodes struct {
	t      testing.TB
	server *httptest.Server
	accept chan *tunnel.Session

	mu       sync.Mutex
	sessions map[string]*tunnel.Session // hub ends, by virtual IP
}

func newFarNodes(t testing.TB) *farNodes {
	f := &farNodes{t: t, accept: make(chan *tunnel.Session, 1), sessions: make(map[string]*tunnel.Session)}
	f.server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s, err := tunnel.Upgrade(w, r, tunnel.Config{})
		if err != nil {
			t.Error(err)
			return
		}
		f.accept <- s
	}))
	t.Cleanup(f.server.Close)
	return f
}

func (f *farNodes) connect(ip string, kubelet http.Handler) {
	f.t.Helper()
	pool := x509.NewCertPool()
	pool.AddCert(f.server.Certificate())
	dialer := tunnel.Dialer{URL: f.server.URL, TLS: &tls.Config{RootCAs: pool, ServerName: "example.com"}}
	edge, err := dialer.Dial(f.t.Context())
	if err != nil {
		f.t.Fatal(err)
	}
	hub := <-f.accept
	f.mu.Lock()
	f.sessions[ip] = hub
	f.mu.Unlock()

	listener := tunnel.NewListener(16)
	server := &http.Server{Handler: kubelet, ReadHeaderTimeout: 10 * time.Second}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { server.Serve(listener) })
	wg.Go(func() {
		for {
			st, err := edge.Accept(ctx)
			if err != nil {
				return
			}
			if !listener.Offer(st) {
				st.Close()
			}
		}
	})
	f.t.Cleanup(func() {
		cancel()
		server.Close()
		listener.Close()
		edge.Close()
		hub.Close()
		wg.Wait()
	})
}

const notConnected = "node edge-2 is not connected (last seen 07:41:03, 4m12s ago)"

func (f *farNodes) DialKubelet(ctx context.Context, ip string) (net.Conn, error) {
	f.mu.Lock()
	s := f.sessions[ip]
	f.mu.Unlock()
	if s == nil {
		return nil, errors.New(notConnected)
	}
	return s.Open(ctx, tunnel.OpenRequest{Kind: "kubelet", Class: tunnel.ClassStream})
}

// kubelet serves what the API server asks of a kubelet, with the streaming
// code that container runtimes use.
type kubelet struct {
	lines     chan string   // what "logs -f" still prints
	following chan struct{} // closed when a follower has begun
	left      chan struct{} // closed when the follower's request has ended
}

func newKubelet() *kubelet {
	return &kubelet{lines: make(chan string), following: make(chan struct{}), left: make(chan struct{})}
}

func (k *kubelet) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /containerLogs/default/{pod}/c", k.logs)
	mux.HandleFunc("/exec/default/{pod}/c", func(w http.ResponseWriter, r *http.Request) {
		opts, err := remotecommand.NewOptions(r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		remotecommand.ServeExec(w, r, k, r.PathValue("pod"), "", "c", r.URL.Query()["command"], opts, time.Minute, 10*time.Second, remotecommand.SupportedStreamingProtocols)
	})
	mux.HandleFunc("/portForward/default/{pod}", func(w http.ResponseWriter, r *http.Request) {
		portforward.ServePortForward(w, r, k, r.PathValue("pod"), "", nil, time.Minute, 10*time.Second, portforward.SupportedProtocols)
	})
	mux.HandleFunc("GET /stats/summary", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, `{"node":{"nodeName":"edge-1"}}`)
	})
	mux.HandleFunc("GET /teapot", func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "short and stout", http.StatusTeapot)
	})
	mux.HandleFunc("GET /cut", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "1000000")
		w.Write(make([]byte, 1000))
		http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	})
	mux.ServeHTTP(w, r)
}

func (k *kubelet) logs(w http.ResponseWriter, r *http.Request) {
	if r.PathValue("pod") == "missing" {
		http.Error(w, `pod "missing" not found`, http.StatusNotFound)
		return
	}
	fmt.Fprintln(w, "first line")
	if r.URL.Query().Get("follow") != "true" {
		return
	}
	http.NewResponseController(w).Flush()
	close(k.following)
	defer close(k.left)
	for {
		select {
		case line := <-k.lines:
			fmt.Fprintln(w, line)
			http.NewResponseController(w).Flush()
		case <-r.Context().Done():
			return
		}
	}
}

// ExecInContainer implements remotecommand.Executor: "cat" copies its input,
// "exit" fails with 7.
func (k *kubelet) ExecInContainer(_ context.Context, _, _, _ string, cmd []string, in io.Reader, out, errOut io.WriteCloser, _ bool, _ <-chan remotecommand.TerminalSize, _ time.Duration) error {
	switch cmd[0] {
	case "cat":
		_, err := io.Copy(out, in)
		return err
	case "exit":
		fmt.Fprint(errOut, "failing")
		return utilexec.CodeExitError{Err: errors.New("exit"), Code: 7}
	}
	return fmt.Errorf("no command %q", cmd[0])
}

// PortForward implements portforward.PortForwarder: the port echoes.
func (k *kubelet) PortForward(_ context.Context, _, _ string, port int32, stream io.ReadWriteCloser) error {
	defer stream.Close()
	fmt.Fprintf(stream, "port %d: ", port)
	_, err := io.Copy(stream, stream)
	return err
}
