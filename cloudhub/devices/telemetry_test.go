package devices

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// TestTelemetry: a batch is acknowledged when its end has taken it; what the end
// refuses, what it cannot take now and what is not the node's to send are told
// apart.
func TestTelemetry(t *testing.T) {
	var mu sync.Mutex
	code, lines, authorization := http.StatusOK, 0, ""
	end := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		mu.Lock()
		defer mu.Unlock()
		if err == nil && code == http.StatusOK {
			lines += bytes.Count(b, []byte("\n"))
		}
		authorization = r.Header.Get("Authorization")
		w.WriteHeader(code)
	}))
	defer end.Close()
	answer := func(c int) { mu.Lock(); code = c; mu.Unlock() }

	h := newHub(t)
	h.setDevice(device("a", "pi", 1, ""))
	hook := &v1alpha1.WebhookSink{URL: end.URL, SecretRef: &v1alpha1.SecretRef{Name: "hook"}}
	for _, r := range []*v1alpha1.TelemetryRoute{
		{ObjectMeta: metav1.ObjectMeta{Namespace: "home", Name: "energy"}, Spec: v1alpha1.TelemetryRouteSpec{To: []v1alpha1.RouteSink{{Webhook: hook}, {Hub: &v1alpha1.HubSink{Webhook: hook}}}}},
		{ObjectMeta: metav1.ObjectMeta{Namespace: "plant", Name: "energy"}, Spec: v1alpha1.TelemetryRouteSpec{To: []v1alpha1.RouteSink{{Hub: &v1alpha1.HubSink{Webhook: hook}}}}},
	} {
		if err := h.cfg.Routes.GetIndexer().Add(r); err != nil {
			t.Fatal(err)
		}
	}
	secrets := cache.NewSharedIndexInformer(&cache.ListWatch{}, nil, 0, cache.Indexers{})
	telemetry := NewTelemetry(h.Devices, secrets)
	mine, theirs := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- telemetry.Serve(context.Background(), "pi", theirs) }()
	p := &peer{t: t, conn: edgeapi.NewConn(mine), raw: mine}
	p.send(edgeapi.TelemetryHello{Version: edgeapi.TelemetryVersion})
	if _, ok := p.receive().(edgeapi.TelemetryWelcome); !ok {
		t.Fatal("no welcome")
	}
	try := func(what, namespace string, sink int, device edgeapi.DeviceRef, want int) {
		t.Helper()
		p.seq++
		p.send(edgeapi.TelemetryBatch{Seq: p.seq, Route: refOf(namespace, "energy"), Sink: sink, Records: []edgeapi.TelemetryRecord{
			{ID: life + "-1-1", Device: &device, Property: "temp", Value: json.RawMessage("1"), TS: 1},
			{ID: life + "-1-2", Device: &device, Property: "temp", Value: json.RawMessage("2"), TS: 2},
		}})
		if ack, ok := p.receive().(edgeapi.TelemetryAck); !ok || ack.Seq != p.seq || ack.Code != want {
			t.Errorf("%s: %+v, want %d", what, ack, want)
		}
	}
	a := refOf("home", "a")
	try("without its Secret", "home", 1, a, 503)
	if err := secrets.GetIndexer().Add(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "home", Name: "hook"}, Data: map[string][]byte{"token": []byte("s3cret")}}); err != nil {
		t.Fatal(err)
	}
	try("taken", "home", 1, a, 200)
	mu.Lock()
	if lines != 2 || authorization != "Bearer s3cret" {
		t.Errorf("%d lines with %q, want 2 with the token", lines, authorization)
	}
	mu.Unlock()
	try("a sink that is the node's", "home", 0, a, 409)
	try("no such sink", "home", 7, a, 409)
	try("another namespace's route", "plant", 0, refOf("plant", "x"), 503)
	try("another namespace's device", "home", 1, refOf("plant", "x"), 403)
	answer(http.StatusServiceUnavailable)
	try("an end that is down", "home", 1, a, 503)
	answer(http.StatusUnprocessableEntity)
	try("an end that refuses", "home", 1, a, 422)
	answer(http.StatusOK)
	try("again", "home", 1, a, 200)
	if s := telemetry.Stats(); s.Records != 4 || s.Refused != 2 || s.Batches != 9 {
		t.Errorf("%+v", s)
	}
	reg := prometheus.NewPedanticRegistry()
	if err := reg.Register(telemetry); err != nil {
		t.Fatal(err)
	}
	if n, err := testutil.GatherAndCount(reg); err != nil || n != 4 {
		t.Errorf("%d metrics, %v", n, err)
	}
	mine.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
