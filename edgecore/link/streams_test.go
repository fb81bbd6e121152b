package link

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/skerry-io/skerry/tunnel"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// kubeletClient is the hub's way to the node's kubelet.
func kubeletClient(t *testing.T, s *tunnel.Session) *http.Client {
	t.Helper()
	c := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return s.Open(ctx, tunnel.OpenRequest{Kind: edgeapi.KindKubelet})
	}}}
	t.Cleanup(c.CloseIdleConnections)
	return c
}

func TestKubeletStreams(t *testing.T) {
	began, ended := make(chan struct{}, 1), make(chan struct{})
	var starting error = errors.New("the kubelet has not started")
	r := newRig(t, openStore(t), func(c *Config) {
		c.Kubelet = func(context.Context) (http.Handler, error) {
			if starting != nil {
				return nil, starting
			}
			return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
				switch req.URL.Path {
				case "/follow":
					w.WriteHeader(http.StatusOK)
					w.(http.Flusher).Flush()
					began <- struct{}{}
					<-req.Context().Done()
					close(ended)
				case "/exec":
					conn, _, err := w.(http.Hijacker).Hijack()
					if err != nil {
						t.Error(err)
						return
					}
					defer conn.Close()
					io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: raw\r\n\r\n")
					io.Copy(conn, conn)
				default:
					fmt.Fprintf(w, "%s %s", req.Method, req.URL.Path)
				}
			}), nil
		}
	})
	c := r.synced()
	kubelet := kubeletClient(t, c.session)
	get := func(path string) (int, string) {
		t.Helper()
		res, err := kubelet.Get("http://edge-1" + path)
		must(t, err)
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		must(t, err)
		return res.StatusCode, string(b)
	}
	if code, text := get("/pods"); code != http.StatusServiceUnavailable || !strings.Contains(text, "edge-1") || !strings.Contains(text, "has not started") {
		t.Errorf("before the kubelet's start: %d %q", code, text)
	}
	starting = nil
	if code, text := get("/pods"); code != 200 || text != "GET /pods" {
		t.Errorf("%d %q", code, text)
	}

	// exec takes its connection over: bytes both ways.
	st, err := c.session.Open(t.Context(), tunnel.OpenRequest{Kind: edgeapi.KindKubelet})
	must(t, err)
	must(t, st.SetDeadline(time.Now().Add(soon)))
	io.WriteString(st, "POST /exec HTTP/1.1\r\nHost: edge-1\r\nConnection: Upgrade\r\nUpgrade: raw\r\n\r\n")
	buf := make([]byte, 1024)
	n, err := st.Read(buf)
	must(t, err)
	if !strings.HasPrefix(string(buf[:n]), "HTTP/1.1 101 ") {
		t.Fatalf("%q", buf[:n])
	}
	for i := range 3 {
		word := fmt.Sprintf("word %d", i)
		io.WriteString(st, word)
		if _, err := io.ReadFull(st, buf[:len(word)]); err != nil || string(buf[:len(word)]) != word {
			t.Fatalf("%q, %v", buf[:len(word)], err)
		}
	}

	// What is not the kubelet's is not served.
	other, err := c.session.Open(t.Context(), tunnel.OpenRequest{Kind: edgeapi.KindAPI})
	must(t, err)
	must(t, other.SetReadDeadline(time.Now().Add(soon)))
	var reset *tunnel.ResetError
	if _, err := other.Read(buf); !errors.As(err, &reset) || reset.Code != tunnel.CodeNoKind {
		t.Errorf("a stream of kind api from the hub: %v", err)
	}

	// All of it ends with the tunnel.
	res, err := kubelet.Get("http://edge-1/follow")
	must(t, err)
	defer res.Body.Close()
	<-began
	c.session.Close()
	select {
	case <-ended:
	case <-time.After(soon):
		t.Fatal("logs -f outlives its tunnel")
	}
	if _, err := st.Read(buf); err == nil {
		t.Error("exec outlives its tunnel")
	}
}

// apiServer answers requests on the API streams that the node opens.
func apiServer(t *testing.T, s *tunnel.Session, h http.HandlerFunc) {
	t.Helper()
	l := tunnel.NewListener(16)
	srv := &http.Server{Handler: h}
	done := make(chan struct{}, 2)
	go func() { _ = srv.Serve(l); done <- struct{}{} }()
	go func() {
		defer func() { l.Close(); done <- struct{}{} }()
		for {
			st, err := s.Accept(context.Background())
			if err != nil {
				return
			}
			if st.Kind() != edgeapi.KindAPI || !l.Offer(st) {
				st.Reset(tunnel.CodeRefused)
			}
		}
	}()
	t.Cleanup(func() { s.Close(); srv.Close(); <-done; <-done })
}

func TestCloudTokens(t *testing.T) {
	r := newRig(t, openStore(t))
	cloud := NewCloudTokens(r.Link)
	ask := func() (*authenticationv1.TokenRequest, error) {
		ctx, cancel := context.WithTimeout(t.Context(), soon)
		defer cancel()
		return cloud.CreateToken(ctx, "default", "robot", &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: []string{"there"}}})
	}
	c := r.synced()
	r.await("connected", func() bool { return r.State().Connected })
	var answer http.HandlerFunc
	apiServer(t, c.session, func(w http.ResponseWriter, req *http.Request) { answer(w, req) })

	answer = func(w http.ResponseWriter, req *http.Request) {
		body, _ := io.ReadAll(req.Body)
		if req.Method != http.MethodPost || req.URL.Path != "/api/v1/namespaces/default/serviceaccounts/robot/token" ||
			!strings.Contains(string(body), `"there"`) || !strings.Contains(string(body), `"TokenRequest"`) {
			t.Errorf("%s %s %s", req.Method, req.URL.Path, body)
		}
		w.WriteHeader(http.StatusCreated)
		io.WriteString(w, `{"kind":"TokenRequest","apiVersion":"authentication.k8s.io/v1","status":{"token":"t0"}}`)
	}
	if got, err := ask(); err != nil || got.Status.Token != "t0" {
		t.Errorf("%+v, %v", got, err)
	}

	for _, tc := range []struct {
		name, says string
		refusal    bool // an answer of the API server: no other token may take its place
		answer     http.HandlerFunc
	}{
		{"refused", "no such account", true, func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusNotFound)
			io.WriteString(w, `{"kind":"Status","code":404,"reason":"NotFound","message":"no such account"}`)
		}},
		{"not asked", "does not answer", false, func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusServiceUnavailable)
			io.WriteString(w, `{"kind":"Status","code":503,"reason":"ServiceUnavailable","message":"no API server"}`)
		}},
		{"no status", "418", false, func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "<html>", http.StatusTeapot) }},
		{"garbage", "invalid character", false, func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "<html>") }},
		{"empty", "no token", false, func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "{}") }},
		{"oversized", "limit", false, func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, `{"status":{"token":"`+strings.Repeat("x", 2*maxAnswer)+`"}}`)
		}},
		{"broken off", "EOF", false, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }},
	} {
		answer = tc.answer
		got, err := ask()
		var status apierrors.APIStatus
		if err == nil || !strings.Contains(err.Error(), tc.says) || errors.As(err, &status) != tc.refusal {
			t.Errorf("%s: %+v, %v", tc.name, got, err)
		}
	}

	// A tunnel that ends takes the question with it.
	answer = func(http.ResponseWriter, *http.Request) { c.session.Close() }
	if _, err := ask(); err == nil {
		t.Error("answered by nobody")
	}
	cloud.client.CloseIdleConnections()
	r.stop()
	if _, err := ask(); !errors.Is(err, ErrOffline) {
		t.Errorf("offline: %v", err)
	}
}
