package apifacade

import (
	"fmt"
	"io"
	"net/http"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// One pair of requests as the kubelet's status manager makes it.
func BenchmarkStatusPatch(b *testing.B) {
	r := newRig(b)
	r.deliver(b, upsert(b, "pods", pod("a", "u1"), "1"))
	pods := r.client.CoreV1().Pods("default")
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		i++
		if _, err := pods.Get(b.Context(), "a", metav1.GetOptions{}); err != nil {
			b.Fatal(err)
		}
		if _, err := pods.Patch(b.Context(), "a", types.StrategicMergePatchType, fmt.Appendf(nil, `{"metadata":{"uid":"u1"},"status":{"podIP":"10.0.0.%d"}}`, i), metav1.PatchOptions{}, "status"); err != nil {
			b.Fatal(err)
		}
	}
}

// A change of one secret while a hundred pods watch one each.
func BenchmarkWatchPerObject(b *testing.B) {
	r := newRig(b)
	r.deliver(b)
	var wg sync.WaitGroup
	var bodies []io.Closer
	for i := range 100 {
		req, err := http.NewRequestWithContext(b.Context(), http.MethodGet, fmt.Sprintf("http://edge.invalid/api/v1/namespaces/default/secrets?watch=1&fieldSelector=metadata.name%%3Ds%d", i), nil)
		if err != nil {
			b.Fatal(err)
		}
		res, err := r.Transport().RoundTrip(req)
		if err != nil {
			b.Fatal(err)
		}
		bodies = append(bodies, res.Body)
		wg.Go(func() { _, _ = io.Copy(io.Discard, res.Body) })
	}
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		i++
		r.deliver(b, upsert(b, "secrets", &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "s7", Namespace: "default", UID: "u"}, StringData: map[string]string{"i": fmt.Sprint(i)}}, fmt.Sprint(i)))
	}
	for _, c := range bodies {
		_ = c.Close()
	}
	wg.Wait()
}
