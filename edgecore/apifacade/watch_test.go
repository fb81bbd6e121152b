package apifacade

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"

	"github.com/skerry-io/skerry/edgecore/store"
)

func bodyOf(b []byte) io.Reader {
	if b == nil {
		return nil
	}
	return bytes.NewReader(b)
}

func next(t testing.TB, w watch.Interface) watch.Event {
	t.Helper()
	select {
	case e, ok := <-w.ResultChan():
		if !ok {
			t.Fatal("the watch ended")
		}
		return e
	case <-time.After(10 * time.Second):
		t.Fatal("no event within 10 s")
	}
	panic("unreachable")
}

func await(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}

func initialEvents() metav1.ListOptions {
	yes := true
	return metav1.ListOptions{SendInitialEvents: &yes, ResourceVersionMatch: metav1.ResourceVersionMatchNotOlderThan, AllowWatchBookmarks: true}
}

func TestWatchList(t *testing.T) {
	r := newRig(t, func(_ *store.Config, c *Config) { c.BookmarkEvery = 50 * time.Millisecond })
	r.deliver(t, upsert(t, "pods", pod("a", "u1"), "10"), upsert(t, "pods", pod("b", "u2"), "11"))
	o := initialEvents()
	o.FieldSelector = "spec.nodeName=" + node + ",status.phase!=Failed"
	w, err := r.client.CoreV1().Pods("").Watch(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	for _, want := range []string{"a", "b"} {
		if e := next(t, w); e.Type != watch.Added || e.Object.(*corev1.Pod).Name != want {
			t.Fatalf("initial event: %+v", e)
		}
	}
	e := next(t, w)
	if e.Type != watch.Bookmark || e.Object.(*corev1.Pod).Annotations[metav1.InitialEventsAnnotationKey] != "true" {
		t.Fatalf("end of the initial events: %+v", e)
	}
	// It stops matching: DELETED, with the last state that matched.
	if _, err := r.client.CoreV1().Pods("default").Patch(t.Context(), "a", types.MergePatchType, []byte(`{"status":{"phase":"Failed"}}`), metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
	e = next(t, w)
	for e.Type == watch.Bookmark {
		e = next(t, w)
	}
	if p := e.Object.(*corev1.Pod); e.Type != watch.Deleted || p.Name != "a" || p.Status.Phase != corev1.PodPending || p.ResourceVersion != fmt.Sprint(r.store.RV()) {
		t.Fatalf("an object that stopped matching: %+v", e)
	}
	// Others' writes move the bookmark of a quiet watch.
	writeLease(t, r)
	await(t, "a bookmark with the store's resourceVersion", func() bool {
		e := next(t, w)
		return e.Type == watch.Bookmark && e.Object.(*corev1.Pod).ResourceVersion == fmt.Sprint(r.store.RV())
	})
}

func writeLease(t testing.TB, r *rig) {
	t.Helper()
	if err := r.store.Local(t.Context(), func(tx *store.Tx) error {
		_, err := tx.Put(store.Key{Resource: "leases", Namespace: "kube-node-lease", Name: node}, "ul", []byte(`{}`))
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

func TestWatchResumesAndExpires(t *testing.T) {
	r := newRig(t, func(c *store.Config, _ *Config) { c.History = 8 })
	r.deliver(t, upsert(t, "pods", pod("a", "u1"), "10"))
	from := fmt.Sprint(r.store.RV())
	r.deliver(t, upsert(t, "pods", pod("b", "u2"), "11"))
	w, err := r.client.CoreV1().Pods("").Watch(t.Context(), metav1.ListOptions{ResourceVersion: from})
	if err != nil {
		t.Fatal(err)
	}
	if e := next(t, w); e.Type != watch.Added || e.Object.(*corev1.Pod).Name != "b" {
		t.Errorf("resumed with %+v", e)
	}
	w.Stop()
	for i := range 40 {
		r.deliver(t, upsert(t, "configmaps", &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "x", Namespace: "default", UID: "ux"}, Data: map[string]string{"i": fmt.Sprint(i)}}, fmt.Sprint(i)))
	}
	// Another resource's churn does not age this one's history.
	w, err = r.client.CoreV1().Pods("").Watch(t.Context(), metav1.ListOptions{ResourceVersion: from})
	if err != nil {
		t.Fatalf("watch after another resource's churn: %v", err)
	}
	w.Stop()
	if _, err := r.client.CoreV1().ConfigMaps("").Watch(t.Context(), metav1.ListOptions{ResourceVersion: from}); !apierrors.IsResourceExpired(err) && !apierrors.IsGone(err) {
		t.Errorf("watch from too long ago: %v", err)
	}
}

func TestUnsyncedPodsAreHeldBack(t *testing.T) {
	r := newRig(t)
	w, err := r.client.CoreV1().Pods("").Watch(t.Context(), initialEvents())
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	n, err := r.client.CoreV1().Nodes().Watch(t.Context(), initialEvents())
	if err != nil {
		t.Fatal(err)
	}
	defer n.Stop()
	if e := next(t, n); e.Type != watch.Bookmark {
		t.Fatalf("nodes are served at once: %+v", e)
	}
	if err := r.store.ApplyDelta(t.Context(), store.Delta{Upserts: []store.Upsert{upsert(t, "pods", pod("a", "u1"), "1")}}); err != nil {
		t.Fatal(err)
	}
	select {
	case e := <-w.ResultChan():
		t.Fatalf("served from a partial store: %+v", e)
	case <-time.After(100 * time.Millisecond):
	}
	r.deliver(t, upsert(t, "pods", pod("b", "u2"), "2"))
	if a, b, end := next(t, w), next(t, w), next(t, w); a.Type != watch.Added || b.Type != watch.Added || end.Type != watch.Bookmark {
		t.Errorf("after the sync: %+v %+v %+v", a, b, end)
	}
}

func TestInformersFollow(t *testing.T) {
	r := newRig(t)
	r.deliver(t, upsert(t, "pods", pod("a", "u1"), "10"),
		upsert(t, "services", &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "head", Namespace: "default", UID: "s1"}, Spec: corev1.ServiceSpec{ClusterIP: "None"}}, "1"),
		upsert(t, "services", &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "svc", Namespace: "default", UID: "s2"}, Spec: corev1.ServiceSpec{ClusterIP: "10.0.0.1"}}, "1"))
	ctx, cancel := context.WithCancel(t.Context())
	before := runtime.NumGoroutine()
	factory := informers.NewSharedInformerFactoryWithOptions(r.client, 0)
	pods, nodes := factory.Core().V1().Pods(), factory.Core().V1().Nodes()
	classes, drivers := factory.Node().V1().RuntimeClasses(), factory.Storage().V1().CSIDrivers()
	for _, i := range []cache.SharedIndexInformer{pods.Informer(), nodes.Informer(), classes.Informer(), drivers.Informer()} {
		_ = i.HasSynced()
	}
	svcs := informers.NewSharedInformerFactoryWithOptions(r.client, 0, informers.WithTweakListOptions(func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermNotEqualSelector("spec.clusterIP", corev1.ClusterIPNone).String()
	}))
	services := svcs.Core().V1().Services()
	_ = services.Informer()
	factory.Start(ctx.Done())
	svcs.Start(ctx.Done())
	for typ, ok := range factory.WaitForCacheSync(ctx.Done()) {
		if !ok {
			t.Fatalf("%v did not sync", typ)
		}
	}
	svcs.WaitForCacheSync(ctx.Done())
	if got := services.Informer().GetStore().ListKeys(); len(got) != 1 || got[0] != "default/svc" {
		t.Errorf("services: %v", got)
	}
	for i := range 50 {
		r.deliver(t, upsert(t, "pods", pod(fmt.Sprintf("p%d", i), fmt.Sprintf("up%d", i)), "1"))
	}
	if err := r.store.Local(ctx, func(tx *store.Tx) error {
		_, err := tx.Delete(store.Key{Resource: "pods", Namespace: "default", Name: "a"})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	await(t, "the informer has what the store has", func() bool {
		_, gone, _ := pods.Informer().GetStore().GetByKey("default/a")
		return !gone && len(pods.Informer().GetStore().ListKeys()) == 50
	})
	cancel()
	factory.Shutdown()
	svcs.Shutdown()
	await(t, "goroutines ended", func() bool { return runtime.NumGoroutine() <= before+2 })
}

func TestClosingTheBodyEndsTheHandler(t *testing.T) {
	r := newRig(t)
	before := runtime.NumGoroutine()
	var bodies []io.Closer
	for range 100 {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://edge.invalid/api/v1/secrets?watch=1", nil)
		if err != nil {
			t.Fatal(err)
		}
		res, err := r.Transport().RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		bodies = append(bodies, res.Body)
	}
	if runtime.NumGoroutine() < before+100 {
		t.Fatal("no handlers are running")
	}
	for _, b := range bodies {
		b.Close()
	}
	await(t, "handlers ended", func() bool { return runtime.NumGoroutine() <= before+2 })

	ctx, cancel := context.WithCancel(t.Context())
	req, _ := http.NewRequestWithContext(ctx, http.MethodGet, "http://edge.invalid/api/v1/secrets?watch=1", nil)
	res, err := r.Transport().RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := res.Body.Read(make([]byte, 1)); err == nil {
		t.Error("read went on after the context ended")
	}
	await(t, "handler ended", func() bool { return runtime.NumGoroutine() <= before+2 })
}

// A watcher that does not read is told to start over and never holds anything up.
func TestSlowWatcherExpires(t *testing.T) {
	r := newRig(t, func(c *store.Config, _ *Config) { c.History = 8 })
	req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://edge.invalid/api/v1/configmaps?watch=1&resourceVersion="+fmt.Sprint(r.store.RV()), nil)
	res, err := r.Transport().RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	for i := range 200 {
		r.deliver(t, upsert(t, "configmaps", &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "x", Namespace: "default", UID: "ux"}, Data: map[string]string{"i": fmt.Sprint(i)}}, fmt.Sprint(i)))
	}
	all, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(all)), "\n")
	if last := lines[len(lines)-1]; len(lines) > 100 || !strings.Contains(last, `"ERROR"`) || !strings.Contains(last, "410") {
		t.Errorf("%d events, the last is %s", len(lines), last)
	}
}

func TestOverARealListener(t *testing.T) {
	r := newRig(t)
	srv := httptest.NewServer(r.Facade)
	defer srv.Close()
	r.deliver(t, upsert(t, "pods", pod("a", "u1"), "10"))
	res, err := srv.Client().Get(srv.URL + "/api/v1/pods?watch=1&timeoutSeconds=1")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	all, err := io.ReadAll(res.Body)
	if err != nil || !strings.HasPrefix(string(all), `{"type":"ADDED","object":`) {
		t.Errorf("watch over TCP: %v %s", err, all)
	}
}
