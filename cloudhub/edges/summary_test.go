package edges

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/skerry-io/skerry/tunnel"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// serveKubelet serves h on the kubelet streams of a node's end.
func serveKubelet(t *testing.T, s *tunnel.Session, h http.HandlerFunc) {
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
			if st.Kind() != edgeapi.KindKubelet || !l.Offer(st) {
				st.Reset(tunnel.CodeRefused)
			}
		}
	}()
	t.Cleanup(func() { s.Close(); srv.Close(); <-done; <-done })
}

func TestSummary(t *testing.T) {
	r := newRig(t)
	answer := func(w http.ResponseWriter, req *http.Request) {}
	serveKubelet(t, r.connect("edge-1"), func(w http.ResponseWriter, req *http.Request) { answer(w, req) })
	elsewhere := false
	serveKubelet(t, r.connect("edge-2"), func(http.ResponseWriter, *http.Request) { elsewhere = true })

	answer = func(w http.ResponseWriter, req *http.Request) {
		if req.URL.Path != "/stats/summary" || req.URL.Query().Get("only_cpu_and_memory") != "true" {
			http.NotFound(w, req)
			return
		}
		io.WriteString(w, `{"node":{"nodeName":"edge-1","cpu":{"usageNanoCores":7}},"pods":[]}`)
	}
	s, err := r.Summary(t.Context(), "edge-1")
	if err != nil || s.Node.NodeName != "edge-1" || *s.Node.CPU.UsageNanoCores != 7 {
		t.Fatalf("%+v, %v", s, err)
	}

	for _, bad := range []struct {
		name, says string
		answer     http.HandlerFunc
	}{
		{"garbage", "invalid character", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "<html>") }},
		{"half", "unexpected E", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, `{"node":{`) }},
		{"too large", "limit", func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, `{"node":{"nodeName":"`)
			junk := strings.Repeat("x", 1<<20)
			for range 20 {
				if _, err := io.WriteString(w, junk); err != nil {
					return
				}
			}
			io.WriteString(w, `"}}`)
		}},
		{"refusal", "503", func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "the kubelet has not started "+strings.Repeat("!", 1<<20), http.StatusServiceUnavailable)
		}},
		{"header", "", func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X", strings.Repeat("x", 1<<20)) }},
		{"broken off", "EOF", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }},
		// A node cannot send the hub to another's kubelet.
		{"redirect", "307", func(w http.ResponseWriter, req *http.Request) {
			http.Redirect(w, req, "http://edge-2/stats/summary", http.StatusTemporaryRedirect)
		}},
	} {
		answer = bad.answer
		s, err := r.Summary(t.Context(), "edge-1")
		if err == nil || !strings.Contains(fmt.Sprint(err), bad.says) || !strings.Contains(fmt.Sprint(err), "edge-1") {
			t.Errorf("%s: %+v, %v", bad.name, s, err)
		}
		if err != nil && len(err.Error()) > 1024 {
			t.Errorf("%s: an error of %d bytes", bad.name, len(err.Error()))
		}
	}
	if elsewhere {
		t.Error("a node made the hub ask another node's kubelet")
	}
	if _, err := r.Summary(t.Context(), "edge-3"); err == nil || !strings.Contains(err.Error(), "not connected") {
		t.Errorf("of a node that is away: %v", err)
	}
}
