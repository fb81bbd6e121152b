package metrics

import (
	"bytes"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

func serve(t *testing.T, h http.Handler, method, accept string) *http.Response {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	req, err := http.NewRequestWithContext(t.Context(), method, srv.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", accept)
	res, err := srv.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { res.Body.Close() })
	return res
}

func body(t *testing.T, res *http.Response) string {
	t.Helper()
	var b bytes.Buffer
	if _, err := b.ReadFrom(res.Body); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func allow(*http.Request) error { return nil }

func TestHandlerExposesProcessAndBuild(t *testing.T) {
	r, err := New(Config{Program: "edgecore", Version: "v1.2.3"})
	if err != nil {
		t.Fatal(err)
	}
	sent := prometheus.NewCounter(prometheus.CounterOpts{Namespace: Namespace, Name: "tunnel_sent_bytes_total", Help: "Bytes sent."})
	r.MustRegister(sent)
	sent.Add(42)
	res := serve(t, r.Handler(allow), http.MethodGet, "text/plain")
	if res.StatusCode != http.StatusOK {
		t.Fatalf("status %s", res.Status)
	}
	text := body(t, res)
	for _, want := range []string{
		`skerry_build_info{goversion="`,
		`program="edgecore",version="v1.2.3"} 1`,
		"skerry_tunnel_sent_bytes_total 42",
		"process_resident_memory_bytes ",
		"go_goroutines ",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in the exposition", want)
		}
	}
}

func TestHandlerSpeaksOpenMetrics(t *testing.T) {
	r, err := New(Config{Program: "cloudhub"})
	if err != nil {
		t.Fatal(err)
	}
	res := serve(t, r.Handler(allow), http.MethodGet, "application/openmetrics-text; version=1.0.0")
	if ct := res.Header.Get("Content-Type"); !strings.HasPrefix(ct, "application/openmetrics-text") {
		t.Errorf("content type %q", ct)
	}
	if text := body(t, res); !strings.HasSuffix(text, "# EOF\n") {
		t.Errorf("no end marker")
	}
}

func TestHandlerRefusesWhomItsCallerRefuses(t *testing.T) {
	var log bytes.Buffer
	r, err := New(Config{Program: "cloudhub", Log: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	refuse := func(*http.Request) error { return errors.New("the token of node-7 is revoked") }
	res := serve(t, r.Handler(refuse), http.MethodGet, "text/plain")
	if res.StatusCode != http.StatusForbidden {
		t.Errorf("status %s", res.Status)
	}
	if text := body(t, res); strings.Contains(text, "node-7") || strings.Contains(text, "go_goroutines") {
		t.Errorf("a refused caller was told: %s", text)
	}
	if !strings.Contains(log.String(), "node-7") {
		t.Errorf("the log does not say why: %s", log.String())
	}
}

func TestHandlerTakesReadsOnly(t *testing.T) {
	r, err := New(Config{Program: "cloudhub"})
	if err != nil {
		t.Fatal(err)
	}
	if res := serve(t, r.Handler(allow), http.MethodPost, "text/plain"); res.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("status %s", res.Status)
	}
}

func TestNewNeedsAProgram(t *testing.T) {
	if _, err := New(Config{}); err == nil {
		t.Error("a registry without a program was made")
	}
}

func TestHandlerNeedsAuthorize(t *testing.T) {
	r, err := New(Config{Program: "edgecore"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if recover() == nil {
			t.Error("an open exposition was made")
		}
	}()
	r.Handler(nil)
}
