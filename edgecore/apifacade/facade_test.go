package apifacade

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/skerry-io/skerry/edgecore/store"
)

const node = "n1"

type rig struct {
	*Facade
	store  *store.Store
	client *kubernetes.Clientset
}

type tokenFunc func(namespace, sa string, req *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error)

func (f tokenFunc) CreateToken(_ context.Context, namespace, sa string, req *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
	return f(namespace, sa, req)
}

func newRig(t testing.TB, change ...func(*store.Config, *Config)) *rig {
	t.Helper()
	sc := store.Config{Path: filepath.Join(t.TempDir(), "edge.db")}
	fc := Config{NodeName: node}
	for _, c := range change {
		c(&sc, &fc)
	}
	s, err := store.Open(sc)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close store: %v", err)
		}
	})
	fc.Store = s
	f, err := New(fc)
	if err != nil {
		t.Fatal(err)
	}
	return &rig{f, s, clientFor(t, f)}
}

func clientFor(t testing.TB, f *Facade) *kubernetes.Clientset {
	t.Helper()
	c, err := kubernetes.NewForConfig(&rest.Config{
		Host: "http://edge.invalid", Transport: f.Transport(), QPS: -1,
		ContentConfig: rest.ContentConfig{ContentType: "application/json"},
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// deliver commits objects as the feed would, complete.
func (r *rig) deliver(t testing.TB, ups ...store.Upsert) {
	t.Helper()
	if err := r.store.ApplyDelta(t.Context(), store.Delta{Upserts: ups, Synced: "1"}); err != nil {
		t.Fatal(err)
	}
}

func upsert(t testing.TB, resource string, obj metav1.Object, rev string) store.Upsert {
	t.Helper()
	body, err := json.Marshal(obj)
	if err != nil {
		t.Fatal(err)
	}
	return store.Upsert{Key: store.Key{Resource: resource, Namespace: obj.GetNamespace(), Name: obj.GetName()}, UID: string(obj.GetUID()), Rev: rev, Body: body}
}

func pod(name, uid string) *corev1.Pod {
	grace := int64(30)
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default", UID: types.UID(uid), Labels: map[string]string{"app": name}},
		Spec: corev1.PodSpec{NodeName: node, TerminationGracePeriodSeconds: &grace, ServiceAccountName: "default",
			Containers: []corev1.Container{{Name: "c", Image: "i"}}},
		Status: corev1.PodStatus{Phase: corev1.PodPending},
	}
}

func TestVerbsAndOwnership(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	r.deliver(t, upsert(t, "pods", pod("a", "u1"), "10"),
		upsert(t, "configmaps", &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "cm", Namespace: "default", UID: "uc"}, Data: map[string]string{"k": "v"}}, "3"))

	got, err := r.client.CoreV1().Pods("default").Get(ctx, "a", metav1.GetOptions{})
	if err != nil || got.UID != "u1" || got.ResourceVersion == "" {
		t.Fatalf("get pod: %v %+v", err, got)
	}
	if _, err := r.client.CoreV1().Pods("default").Get(ctx, "b", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("get of an unknown pod: %v", err)
	}
	if _, err := r.client.CoreV1().ConfigMaps("default").Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "x"}}, metav1.CreateOptions{}); !apierrors.IsMethodNotSupported(err) {
		t.Errorf("create of a configmap: %v", err)
	}
	if _, err := r.client.CoreV1().Pods("default").Create(ctx, pod("z", ""), metav1.CreateOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("create of an ordinary pod: %v", err)
	}
	if err := r.client.ResourceV1().ResourceSlices().DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{FieldSelector: "spec.nodeName=" + node}); !apierrors.IsNotFound(err) {
		t.Errorf("resourceslices: %v", err)
	}
	list, err := r.client.CoreV1().Pods("").List(ctx, metav1.ListOptions{LabelSelector: "app in (a,b)", FieldSelector: "spec.nodeName=" + node})
	if err != nil || len(list.Items) != 1 || list.ResourceVersion == "" {
		t.Errorf("list: %v %+v", err, list)
	}
	list, err = r.client.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "status.phase!=Pending"})
	if err != nil || len(list.Items) != 0 {
		t.Errorf("list by phase: %v %+v", err, list)
	}
	if _, err := r.client.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.bogus=1"}); !apierrors.IsBadRequest(err) {
		t.Errorf("list by an unknown field: %v", err)
	}
}

func TestStatusPatch(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	r.deliver(t, upsert(t, "pods", pod("a", "u1"), "10"))
	patch := []byte(`{"metadata":{"uid":"u1","labels":{"sneaky":"x"}},"spec":{"nodeName":"other"},"status":{"phase":"Running","conditions":[{"type":"Ready","status":"True"}]}}`)
	got, err := r.client.CoreV1().Pods("default").Patch(ctx, "a", types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	if err != nil {
		t.Fatal(err)
	}
	if got.Status.Phase != corev1.PodRunning || got.Spec.NodeName != node || got.Labels["sneaky"] != "" {
		t.Errorf("status patch touched more or less than the status: %+v", got)
	}
	// Conditions merge by type, as only a strategic patch does.
	got, err = r.client.CoreV1().Pods("default").Patch(ctx, "a", types.StrategicMergePatchType,
		[]byte(`{"status":{"conditions":[{"type":"Initialized","status":"True"}]}}`), metav1.PatchOptions{}, "status")
	if err != nil || len(got.Status.Conditions) != 2 {
		t.Errorf("conditions: %v %+v", err, got.Status.Conditions)
	}
	_, err = r.client.CoreV1().Pods("default").Patch(ctx, "a", types.StrategicMergePatchType,
		[]byte(`{"metadata":{"uid":"other"},"status":{"phase":"Failed"}}`), metav1.PatchOptions{}, "status")
	if !apierrors.IsConflict(err) {
		t.Errorf("patch with another uid: %v", err)
	}
	before := r.store.RV()
	if _, err := r.client.CoreV1().Pods("default").Patch(ctx, "a", types.MergePatchType, []byte(`{"status":{"phase":"Running"}}`), metav1.PatchOptions{}, "status"); err != nil || r.store.RV() != before {
		t.Errorf("a patch that changes nothing: %v, resourceVersion %d -> %d", err, before, r.store.RV())
	}
	if _, err := r.client.CoreV1().Pods("default").Patch(ctx, "a", types.JSONPatchType, []byte(`[{"op":"test","path":"/status/phase","value":"Failed"}]`), metav1.PatchOptions{}, "status"); !apierrors.IsConflict(err) {
		t.Errorf("failed test in a JSON patch: %v", err)
	}
	if _, err := r.client.CoreV1().Pods("default").Patch(ctx, "a", types.ApplyYAMLPatchType, []byte(`{}`), metav1.PatchOptions{Force: new(bool)}, "status"); !apierrors.IsUnsupportedMediaType(err) {
		t.Errorf("apply patch: %v", err)
	}
	pend := outbox(t, r.store)
	if len(pend) != 1 || pend[0].Op != store.OpStatus || pend[0].UID != "u1" {
		t.Errorf("outbox: %+v", pend)
	}
}

// outbox returns what is pending now.
func outbox(t testing.TB, s *store.Store) []store.Pending {
	t.Helper()
	if s.Outbox().Depth() == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	p, err := s.Outbox().Next(ctx, store.LaneAll)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestNode(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node, Labels: map[string]string{"kubernetes.io/os": "linux"}}}
	made, err := r.client.CoreV1().Nodes().Create(ctx, n, metav1.CreateOptions{})
	if err != nil || made.UID == "" || made.CreationTimestamp.IsZero() {
		t.Fatalf("create node: %v %+v", err, made)
	}
	if _, err := r.client.CoreV1().Nodes().Create(ctx, n, metav1.CreateOptions{}); !apierrors.IsAlreadyExists(err) {
		t.Errorf("second create: %v", err)
	}
	if _, err := r.client.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n2"}}, metav1.CreateOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("create of another node: %v", err)
	}
	got, err := r.client.CoreV1().Nodes().PatchStatus(ctx, node, []byte(`{"metadata":{"annotations":{"a":"1"},"labels":{"kubernetes.io/os":null}},"spec":{"unschedulable":true},"status":{"capacity":{"cpu":"4"}}}`))
	if err != nil {
		t.Fatal(err)
	}
	if got.Annotations["a"] != "1" || got.Labels["kubernetes.io/os"] != "" || got.Spec.Unschedulable || got.Status.Capacity.Cpu().Value() != 4 {
		t.Errorf("nodes/status patch: %+v", got)
	}
	if _, err := r.client.CoreV1().Nodes().Patch(ctx, node, types.StrategicMergePatchType, []byte(`{"spec":{"unschedulable":true}}`), metav1.PatchOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("patch of the spec: %v", err)
	}
	var ops []store.Op
	for r.store.Outbox().Depth() > 0 {
		for _, p := range outbox(t, r.store) {
			ops = append(ops, p.Op)
			if p.Op == store.OpUpdate && (fmt.Sprint(p.Labels) != "[kubernetes.io/os]" || fmt.Sprint(p.Annotations) != "[a]") {
				t.Errorf("changed keys: %v %v", p.Labels, p.Annotations)
			}
			r.store.Outbox().Done(p.ID)
		}
	}
	if fmt.Sprint(ops) != "[create status update]" {
		t.Errorf("outbox: %v", ops)
	}
}

func TestMirrorPod(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	p := pod("static-n1", "file-uid")
	p.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "hash"}
	made, err := r.client.CoreV1().Pods("default").Create(ctx, p, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if made.UID == "" || made.UID == "file-uid" || made.Status.Phase != corev1.PodPending || made.Status.QOSClass != corev1.PodQOSBestEffort {
		t.Errorf("mirror pod: %+v", made)
	}
	if _, err := r.client.CoreV1().Pods("default").Create(ctx, p, metav1.CreateOptions{}); !apierrors.IsAlreadyExists(err) {
		t.Errorf("second create: %v", err)
	}
	zero := int64(0)
	other := types.UID("other")
	if err := r.client.CoreV1().Pods("default").Delete(ctx, p.Name, metav1.DeleteOptions{GracePeriodSeconds: &zero, Preconditions: &metav1.Preconditions{UID: &other}}); !apierrors.IsConflict(err) {
		t.Errorf("delete with another uid: %v", err)
	}
	if err := r.client.CoreV1().Pods("default").Delete(ctx, p.Name, metav1.DeleteOptions{GracePeriodSeconds: &zero, Preconditions: &metav1.Preconditions{UID: &made.UID}}); err != nil {
		t.Errorf("delete: %v", err)
	}
	if n := r.store.Outbox().Depth(); n != 0 {
		t.Errorf("%d writes for a mirror pod that the cloud never heard of", n)
	}
}

// A heartbeat is visible and goes up, and costs no flash; a condition that
// changes does.
func TestHeartbeatsStayOffTheDisk(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	nodes := r.client.CoreV1().Nodes()
	if _, err := nodes.Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	report := func(second int, ready string) {
		t.Helper()
		at := time.Date(2026, 1, 1, 0, 0, second, 0, time.UTC).Format(time.RFC3339)
		patch := fmt.Appendf(nil, `{"status":{"conditions":[{"type":"Ready","status":%q,"lastHeartbeatTime":%q},{"type":"DiskPressure","status":"False","lastHeartbeatTime":%q}]}}`, ready, at, at)
		got, err := nodes.Patch(ctx, node, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
		if err != nil || got.Status.Conditions[0].LastHeartbeatTime.Second() != second {
			t.Fatalf("patch: %v %+v", err, got.Status.Conditions)
		}
	}
	report(1, "True")
	written := r.store.BytesWritten()
	for _, p := range outbox(t, r.store) {
		r.store.Outbox().Done(p.ID)
	}
	for second := range 50 {
		report(second+2, "True")
		got := outbox(t, r.store)
		if len(got) != 1 || got[0].Op != store.OpStatus {
			t.Fatalf("outbox: %+v", got)
		}
		r.store.Outbox().Done(got[0].ID)
	}
	if n := r.store.BytesWritten() - written; n != 0 {
		t.Errorf("50 heartbeats wrote %d bytes", n)
	}
	report(59, "False")
	if r.store.BytesWritten() == written {
		t.Error("a node that is not ready any more is not on the disk")
	}
}

func TestGracefulDeletion(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	r.deliver(t, upsert(t, "pods", pod("a", "u1"), "10"))
	pods := r.client.CoreV1().Pods("default")
	if err := pods.Delete(ctx, "a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	first, err := pods.Get(ctx, "a", metav1.GetOptions{})
	if err != nil || first.DeletionTimestamp == nil || *first.DeletionGracePeriodSeconds != 30 {
		t.Fatalf("after a delete: %v %+v", err, first)
	}
	longer, shorter := int64(60), int64(5)
	if err := pods.Delete(ctx, "a", metav1.DeleteOptions{GracePeriodSeconds: &longer}); err != nil {
		t.Fatal(err)
	}
	if got, _ := pods.Get(ctx, "a", metav1.GetOptions{}); *got.DeletionGracePeriodSeconds != 30 {
		t.Errorf("grace was prolonged to %d", *got.DeletionGracePeriodSeconds)
	}
	if err := pods.Delete(ctx, "a", metav1.DeleteOptions{GracePeriodSeconds: &shorter, DryRun: []string{"All"}}); err != nil {
		t.Fatal(err)
	}
	if got, _ := pods.Get(ctx, "a", metav1.GetOptions{}); *got.DeletionGracePeriodSeconds != 30 {
		t.Errorf("a dry run changed the grace to %d", *got.DeletionGracePeriodSeconds)
	}
	if err := pods.Delete(ctx, "a", metav1.DeleteOptions{GracePeriodSeconds: &shorter}); err != nil {
		t.Fatal(err)
	}
	got, _ := pods.Get(ctx, "a", metav1.GetOptions{})
	if *got.DeletionGracePeriodSeconds != 5 || !got.DeletionTimestamp.Time.Equal(first.DeletionTimestamp.Add(-25*time.Second)) {
		t.Errorf("shortened: %v after %v, grace %d", got.DeletionTimestamp, first.DeletionTimestamp, *got.DeletionGracePeriodSeconds)
	}
	// The kubelet's end.
	zero := int64(0)
	if err := pods.Delete(ctx, "a", metav1.DeleteOptions{GracePeriodSeconds: &zero}); err != nil {
		t.Fatal(err)
	}
	if _, err := pods.Get(ctx, "a", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("after the kubelet's delete: %v", err)
	}
}

func TestTokenRequest(t *testing.T) {
	var fail error
	r := newRig(t, func(_ *store.Config, c *Config) {
		c.Tokens = tokenFunc(func(ns, sa string, req *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
			out := req.DeepCopy()
			out.Status.Token = ns + "/" + sa
			return out, fail
		})
	})
	got, err := r.client.CoreV1().ServiceAccounts("default").CreateToken(t.Context(), "sa", &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil || got.Status.Token != "default/sa" {
		t.Errorf("token: %v %+v", err, got)
	}
	fail = apierrors.NewForbidden(groupResource("", "pods"), "x", errors.New("no"))
	if _, err := r.client.CoreV1().ServiceAccounts("default").CreateToken(t.Context(), "sa", &authenticationv1.TokenRequest{}, metav1.CreateOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("refused token: %v", err)
	}
	if _, err := newRig(t).client.CoreV1().ServiceAccounts("default").CreateToken(t.Context(), "sa", &authenticationv1.TokenRequest{}, metav1.CreateOptions{}); !apierrors.IsServiceUnavailable(err) {
		t.Errorf("without a source: %v", err)
	}
}

func TestDiscovery(t *testing.T) {
	r := newRig(t)
	_, lists, err := r.client.Discovery().ServerGroupsAndResources()
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, l := range lists {
		for _, res := range l.APIResources {
			found[l.GroupVersion+" "+res.Name] = true
		}
	}
	for _, want := range []string{"v1 pods", "v1 pods/status", "v1 serviceaccounts/token", "coordination.k8s.io/v1 leases", "storage.k8s.io/v1 csinodes"} {
		if !found[want] {
			t.Errorf("%s is not discovered: %v", want, found)
		}
	}
	if _, err := r.client.Discovery().ServerVersion(); err != nil {
		t.Error(err)
	}
}

func TestRefusals(t *testing.T) {
	r := newRig(t)
	big := make([]byte, maxRequestBody+1)
	for name, tc := range map[string]struct {
		method, path, accept, contentType string
		body                              []byte
		want                              int
	}{
		"unknown path":          {"GET", "/api/v1/widgets", "", "", nil, 404},
		"root":                  {"GET", "/", "", "", nil, 404},
		"wrong version":         {"GET", "/api/v2/pods", "", "", nil, 404},
		"cluster scope in ns":   {"GET", "/api/v1/namespaces/default/nodes", "", "", nil, 404},
		"namespaced without ns": {"GET", "/api/v1/configmaps/x", "", "", nil, 404},
		"namespaces":            {"GET", "/api/v1/namespaces", "", "", nil, 404},
		"unknown subresource":   {"GET", "/api/v1/namespaces/default/pods/a/log", "", "", nil, 404},
		"protobuf only":         {"GET", "/api/v1/nodes", "application/vnd.kubernetes.protobuf", "", nil, 406},
		"yaml body":             {"POST", "/api/v1/nodes", "", "application/yaml", []byte("a: b"), 415},
		"huge body":             {"POST", "/api/v1/nodes", "", "", big, 413},
		"not json":              {"POST", "/api/v1/nodes", "", "", []byte("{"), 400},
		"wrong kind":            {"POST", "/api/v1/nodes", "", "", []byte(`{"kind":"Pod"}`), 400},
		"continue":              {"GET", "/api/v1/nodes?continue=x", "", "", nil, 400},
		"bad version":           {"GET", "/api/v1/nodes?resourceVersion=x", "", "", nil, 400},
		"bad timeout":           {"GET", "/api/v1/nodes?watch=1&timeoutSeconds=x", "", "", nil, 400},
		"future list":           {"GET", "/api/v1/nodes?resourceVersion=99999999999", "", "", nil, 504},
		"future watch":          {"GET", "/api/v1/nodes?watch=1&resourceVersion=99999999999", "", "", nil, 410},
		"initial without match": {"GET", "/api/v1/nodes?watch=1&sendInitialEvents=true&allowWatchBookmarks=true", "", "", nil, 422},
		"bad selector":          {"GET", "/api/v1/nodes?labelSelector=a%20b", "", "", nil, 400},
		"delete node":           {"DELETE", "/api/v1/nodes/n1", "", "", nil, 405},
		"post to a name":        {"POST", "/api/v1/nodes/n1", "", "", []byte("{}"), 405},
		"unsynced pods":         {"GET", "/api/v1/pods", "", "", nil, 503},
		"unsynced pod":          {"GET", "/api/v1/namespaces/default/pods/a", "", "", nil, 503},
		"table first":           {"GET", "/api/v1/nodes", "application/json;as=Table;v=v1;g=meta.k8s.io,application/json", "", nil, 200},
	} {
		t.Run(name, func(t *testing.T) {
			req, err := http.NewRequestWithContext(t.Context(), tc.method, "http://edge.invalid"+tc.path, bodyOf(tc.body))
			if err != nil {
				t.Fatal(err)
			}
			if tc.accept != "" {
				req.Header.Set("Accept", tc.accept)
			}
			if tc.contentType != "" {
				req.Header.Set("Content-Type", tc.contentType)
			}
			res, err := r.Transport().RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			var st metav1.Status
			if err := json.NewDecoder(res.Body).Decode(&st); err != nil {
				t.Fatal(err)
			}
			if res.StatusCode != tc.want || tc.want != 200 && (int(st.Code) != tc.want || st.Kind != "Status" || st.Message == "") {
				t.Errorf("answered %d %+v, want %d", res.StatusCode, st, tc.want)
			}
		})
	}
}

// A disk that takes nothing is an API error that says so, and no reason not to
// read.
func TestADiskThatTakesNothing(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=2m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
	r := newRig(t, func(sc *store.Config, _ *Config) { sc.Path = filepath.Join(dir, "edge.db") })
	r.deliver(t, upsert(t, "pods", pod("a", "u1"), "1"))
	f, err := os.Create(filepath.Join(dir, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	for err = nil; err == nil; {
		_, err = f.Write(make([]byte, 4096))
	}
	_ = f.Close()
	pods := r.client.CoreV1().Pods("default")
	patch := func(message string) error {
		_, err := pods.Patch(t.Context(), "a", types.StrategicMergePatchType, fmt.Appendf(nil, `{"status":{"message":%q}}`, message), metav1.PatchOptions{}, "status")
		return err
	}
	if err := patch(strings.Repeat("x", 1<<20)); !apierrors.IsServiceUnavailable(err) || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("a status there is no room for: %v", err)
	}
	if got, err := pods.Get(t.Context(), "a", metav1.GetOptions{}); err != nil || got.Status.Message != "" {
		t.Errorf("read: %v", err)
	}
	if err := patch("small"); err != nil {
		t.Errorf("one for which room was set aside: %v", err)
	}
}
