package upstream

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"github.com/skerry-io/skerry/cloudhub/controlplane"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// The API server is a real one: whether a node may do a thing is its answer.
var cluster struct {
	up    *Upstream
	admin kubernetes.Interface
}

type addresses map[string]string

func (a addresses) KubeletAddress(node string) (string, int32, bool) {
	ip, ok := a[node]
	return ip, 10250, ok
}

func TestMain(m *testing.M) {
	klog.SetSlogLogger(slog.New(slog.DiscardHandler))
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "upstream")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		plane, err := controlplane.New(controlplane.Config{
			DataDir: dir, Listen: "127.0.0.1:0",
			DialNode: func(context.Context, string, string) (net.Conn, error) { return nil, io.ErrClosedPipe },
		})
		if err != nil {
			panic(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- plane.Run(ctx) }()
		defer func() { cancel(); <-done }()
		select {
		case <-plane.Ready():
		case err := <-done:
			panic(err)
		}
		rc, err := clientcmd.BuildConfigFromFlags("", plane.AdminKubeconfigPath())
		if err != nil {
			panic(err)
		}
		cluster.admin = kubernetes.NewForConfigOrDie(rc)
		cluster.up, err = New(Config{REST: plane.HubClientConfig(), Addresses: addresses{"edge-1": "100.64.0.1", "edge-2": "100.64.0.2"}})
		if err != nil {
			panic(err)
		}
		return m.Run()
	}())
}

func write(t *testing.T, node, op, resource, ns, name, uid string, body any) edgeapi.WriteResult {
	t.Helper()
	b, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	return cluster.up.Write(t.Context(), node, edgeapi.Write{
		ID: 7, Op: op, Ref: edgeapi.Ref{Resource: resource, Namespace: ns, Name: name}, UID: uid, Body: b,
	})
}

func want(t *testing.T, r edgeapi.WriteResult, code int) {
	t.Helper()
	if r.Code != code || r.ID != 7 {
		t.Fatalf("got %d (id %d) %s, want %d", r.Code, r.ID, r.Message, code)
	}
}

// register makes the node as the edge does.
func register(t *testing.T, name string) {
	t.Helper()
	n := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, UID: "made-on-the-edge", ResourceVersion: "12",
			Labels: map[string]string{"kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}},
		Status: corev1.NodeStatus{
			Addresses:  []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.168.1.5"}},
			Conditions: []corev1.NodeCondition{{Type: edgeapi.ConditionConnected, Status: corev1.ConditionFalse}}, // of its own copy
		},
	}
	want(t, write(t, name, edgeapi.OpCreate, "nodes", "", name, "", n), 200)
}

// schedule makes a pod and binds it, as users and the scheduler do.
func schedule(t *testing.T, name, node string) *corev1.Pod {
	t.Helper()
	ctx := t.Context()
	err := wait.PollUntilContextTimeout(ctx, 50*time.Millisecond, 20*time.Second, true, func(ctx context.Context) (bool, error) {
		_, err := cluster.admin.CoreV1().ServiceAccounts("default").Get(ctx, "default", metav1.GetOptions{})
		return err == nil, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	p, err := cluster.admin.CoreV1().Pods("default").Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "c", Image: "localhost/skerry/demo:1"}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestNodeStatusIsMergedAndPointsAtTheHub(t *testing.T) {
	register(t, "edge-1")
	ctx := t.Context()
	n, err := cluster.admin.CoreV1().Nodes().Get(ctx, "edge-1", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	// Others' marks on the Node.
	n.Labels["shop"] = "berlin"
	if n, err = cluster.admin.CoreV1().Nodes().Update(ctx, n, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	n.Status.Conditions = append(n.Status.Conditions, corev1.NodeCondition{Type: "example.com/Disk", Status: corev1.ConditionTrue})
	if n, err = cluster.admin.CoreV1().Nodes().UpdateStatus(ctx, n, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}

	mine := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "edge-1", Labels: map[string]string{
		"kubernetes.io/arch": "arm64", "shop": "of an earlier sync", "gone": "in the cloud"}}}
	mine.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "KubeletReady"}}
	mine.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.168.1.5"}, {Type: corev1.NodeHostName, Address: "edge-1"}}
	r := write(t, "edge-1", edgeapi.OpStatus, "nodes", "", "edge-1", "made-on-the-edge", mine)
	want(t, r, 200)
	if r.UID != string(n.UID) {
		t.Errorf("answered UID %q, want the cloud's %q", r.UID, n.UID)
	}
	got, err := cluster.admin.CoreV1().Nodes().Get(ctx, "edge-1", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if got.Labels["shop"] != "berlin" || got.Labels["kubernetes.io/arch"] != "arm64" || got.Labels["gone"] != "" {
		t.Errorf("labels: %v", got.Labels)
	}
	if len(got.Status.Conditions) != 2 {
		t.Errorf("conditions: %+v", got.Status.Conditions)
	}
	if a := got.Status.Addresses; len(a) != 3 || a[0].Address != "100.64.0.1" || a[0].Type != corev1.NodeInternalIP || a[1].Type != corev1.NodeExternalIP {
		t.Errorf("addresses: %+v", a)
	}
	if p := got.Status.DaemonEndpoints.KubeletEndpoint.Port; p != 10250 {
		t.Errorf("kubelet port %d", p)
	}
	// The same again is no request's worth.
	skipped := cluster.up.Stats().Skipped
	want(t, write(t, "edge-1", edgeapi.OpStatus, "nodes", "", "edge-1", "", mine), 200)
	if cluster.up.Stats().Skipped != skipped+1 {
		t.Error("an unchanged status was patched")
	}

	// Whether the node is connected is the hub's to say.
	at := metav1.NewTime(time.Date(2026, 11, 24, 13, 0, 5, 0, time.UTC))
	connected := corev1.NodeCondition{Type: edgeapi.ConditionConnected, Status: corev1.ConditionTrue, Reason: "TunnelUp", LastTransitionTime: at}
	if err := cluster.up.SetNodeCondition(ctx, "edge-1", n.UID, connected); err != nil {
		t.Fatal(err)
	}
	if err := cluster.up.SetNodeCondition(ctx, "edge-1", "of a Node that was", connected); !apierrors.IsInvalid(err) {
		t.Errorf("condition of another Node of that name: %v", err)
	}
	mine.Status.Conditions = append(mine.Status.Conditions,
		corev1.NodeCondition{Type: edgeapi.ConditionConnected, Status: corev1.ConditionFalse, Reason: "local view"},
		corev1.NodeCondition{Type: edgeapi.ConditionAutonomyReady, Status: corev1.ConditionTrue})
	want(t, write(t, "edge-1", edgeapi.OpStatus, "nodes", "", "edge-1", "", mine), 200)
	if got, err = cluster.admin.CoreV1().Nodes().Get(ctx, "edge-1", metav1.GetOptions{}); err != nil {
		t.Fatal(err)
	}
	have := map[corev1.NodeConditionType]corev1.NodeCondition{}
	for _, c := range got.Status.Conditions {
		have[c.Type] = c
	}
	if c := have[edgeapi.ConditionConnected]; c.Status != corev1.ConditionTrue || c.Reason != "TunnelUp" || !c.LastTransitionTime.Equal(&at) {
		t.Errorf("the node's word on whether it is connected went up: %+v", c)
	}
	if have[edgeapi.ConditionAutonomyReady].Status != corev1.ConditionTrue || len(have) != 4 {
		t.Errorf("conditions: %+v", got.Status.Conditions)
	}

	w := edgeapi.Write{ID: 7, Op: edgeapi.OpUpdate, Ref: edgeapi.Ref{Resource: "nodes", Name: "edge-1"},
		Body: json.RawMessage(`{"metadata":{"annotations":{"a":"1"}}}`), Annotations: []string{"a", "b"}}
	want(t, cluster.up.Write(ctx, "edge-1", w), 200)
	if got, err = cluster.admin.CoreV1().Nodes().Get(ctx, "edge-1", metav1.GetOptions{}); err != nil || got.Annotations["a"] != "1" {
		t.Errorf("annotations: %v %v", got.Annotations, err)
	}
}

func TestPodStatus(t *testing.T) {
	register(t, "edge-1")
	register(t, "edge-2")
	p := schedule(t, "status", "edge-1")
	ctx := t.Context()
	p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: "example.com/gate", Status: corev1.ConditionTrue})
	if _, err := cluster.admin.CoreV1().Pods("default").UpdateStatus(ctx, p, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	mine := p.DeepCopy()
	mine.Status = corev1.PodStatus{Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}}
	want(t, write(t, "edge-1", edgeapi.OpStatus, "pods", "default", "status", string(p.UID), mine), 200)
	got, err := cluster.admin.CoreV1().Pods("default").Get(ctx, "status", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if got.Status.Phase != corev1.PodRunning || !hasCondition(got.Status.Conditions, "example.com/gate") || !hasCondition(got.Status.Conditions, corev1.PodReady) {
		t.Errorf("status: %+v", got.Status)
	}

	// Not this pod, not this node's, not there.
	want(t, write(t, "edge-1", edgeapi.OpStatus, "pods", "default", "status", "another-uid", mine), 409)
	want(t, write(t, "edge-2", edgeapi.OpStatus, "pods", "default", "status", string(p.UID), mine), 403)
	want(t, write(t, "edge-1", edgeapi.OpStatus, "pods", "default", "nobody", "", mine), 404)

	// The end of a pod is confirmed by its own node, by UID.
	want(t, write(t, "edge-1", edgeapi.OpDelete, "pods", "default", "status", "another-uid", nil), 409)
	want(t, write(t, "edge-2", edgeapi.OpDelete, "pods", "default", "status", string(p.UID), nil), 403)
	want(t, write(t, "edge-1", edgeapi.OpDelete, "pods", "default", "status", "", nil), 400)
	want(t, write(t, "edge-1", edgeapi.OpDelete, "pods", "default", "status", string(p.UID), nil), 200)
	if _, err := cluster.admin.CoreV1().Pods("default").Get(ctx, "status", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("after the delete: %v", err)
	}
}

func TestMirrorPod(t *testing.T) {
	register(t, "edge-1")
	n, err := cluster.admin.CoreV1().Nodes().Get(t.Context(), "edge-1", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	yes := true
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "static-edge-1", Namespace: "default", UID: "local",
			Annotations: map[string]string{corev1.MirrorPodAnnotationKey: "hash", "kubernetes.io/config.hash": "hash", "kubernetes.io/config.source": "file"},
			// Made before the Node was registered.
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: "edge-1", UID: "local", Controller: &yes}}},
		Spec:   corev1.PodSpec{NodeName: "edge-1", Containers: []corev1.Container{{Name: "c", Image: "i"}}},
		Status: corev1.PodStatus{Phase: corev1.PodRunning},
	}
	r := write(t, "edge-1", edgeapi.OpCreate, "pods", "default", p.Name, "local", p)
	want(t, r, 200)
	got, err := cluster.admin.CoreV1().Pods("default").Get(t.Context(), p.Name, metav1.GetOptions{})
	if err != nil || string(got.UID) != r.UID || got.Status.Phase != corev1.PodRunning {
		t.Errorf("mirror: %v, UID %s answered %s, phase %s", err, got.UID, r.UID, got.Status.Phase)
	}
	if owner := got.OwnerReferences; len(owner) != 1 || owner[0].UID != n.UID {
		t.Errorf("mirror's owner: %+v, the Node's UID is %s", owner, n.UID)
	}
	// Sent twice it is the same pod.
	if again := write(t, "edge-1", edgeapi.OpCreate, "pods", "default", p.Name, "local", p); again.UID != r.UID || again.Code != 200 {
		t.Errorf("again: %+v", again)
	}
	delete(p.Annotations, corev1.MirrorPodAnnotationKey)
	want(t, write(t, "edge-1", edgeapi.OpCreate, "pods", "default", "plain", "", p), 400)
}

func TestEventCounts(t *testing.T) {
	register(t, "edge-1")
	e := &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Name: "web.1", Namespace: "default"},
		InvolvedObject: corev1.ObjectReference{Kind: "Pod", Namespace: "default", Name: "web"},
		Reason:         "Pulled", Message: "m", Type: "Normal", Count: 1, Source: corev1.EventSource{Component: "kubelet", Host: "edge-1"},
		FirstTimestamp: metav1.Now(), LastTimestamp: metav1.Now(),
	}
	want(t, write(t, "edge-1", edgeapi.OpEvent, "events", "default", e.Name, "", e), 200)
	e.Count = 5
	want(t, write(t, "edge-1", edgeapi.OpEvent, "events", "default", e.Name, "", e), 200)
	got, err := cluster.admin.CoreV1().Events("default").Get(t.Context(), e.Name, metav1.GetOptions{})
	if err != nil || got.Count != 5 {
		t.Errorf("%v: count %d", err, got.Count)
	}
}

func TestUnknownWritesAreRefused(t *testing.T) {
	for _, w := range []edgeapi.Write{
		{ID: 7, Op: edgeapi.OpDelete, Ref: edgeapi.Ref{Resource: "nodes", Name: "edge-1"}},
		{ID: 7, Op: edgeapi.OpStatus, Ref: edgeapi.Ref{Resource: "secrets", Name: "x"}},
		{ID: 7, Op: "drop", Ref: edgeapi.Ref{Resource: "pods", Name: "x"}},
		{ID: 7, Op: edgeapi.OpStatus, Ref: edgeapi.Ref{Resource: "pods", Name: "x"}, Body: json.RawMessage(`[`)},
	} {
		want(t, cluster.up.Write(t.Context(), "edge-1", w), 400)
	}
}

// relay asks over a connection as a node does.
func relay(t *testing.T, node, method, path string, header http.Header, body string) (*http.Response, string) {
	t.Helper()
	l, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- cluster.up.Relay(ctx, node, l) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	c, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	req, err := http.NewRequest(method, "http://hub"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range header {
		req.Header[k] = v
	}
	if err := req.Write(c); err != nil {
		t.Fatal(err)
	}
	res, err := http.ReadResponse(bufio.NewReader(c), req)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, string(bytes.TrimSpace(b))
}

func TestRelayIsTheNodeAndNobodyElse(t *testing.T) {
	register(t, "edge-1")
	register(t, "edge-2")
	p := schedule(t, "token", "edge-1")
	seconds := int64(3600)
	body, err := json.Marshal(&authenticationv1.TokenRequest{
		TypeMeta: metav1.TypeMeta{Kind: "TokenRequest", APIVersion: "authentication.k8s.io/v1"},
		Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &seconds,
			BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: p.Name, UID: p.UID}},
	})
	if err != nil {
		t.Fatal(err)
	}
	json := http.Header{"Content-Type": {"application/json"}}
	path := "/api/v1/namespaces/default/serviceaccounts/default/token"
	res, text := relay(t, "edge-1", "POST", path, json, string(body))
	if res.StatusCode != 201 || !strings.Contains(text, `"token":"ey`) {
		t.Errorf("own pod's token: %s %s", res.Status, text)
	}
	if res, text = relay(t, "edge-2", "POST", path, json, string(body)); res.StatusCode != 403 {
		t.Errorf("another node's pod's token: %s %s", res.Status, text)
	}
	spoofed := http.Header{
		"Impersonate-User": {"admin"}, "Impersonate-Group": {"system:masters"},
		"Authorization": {"Bearer x"}, "X-Remote-User": {"admin"}, "X-Remote-Group": {"system:masters"},
	}
	if res, text = relay(t, "edge-2", "GET", "/api/v1/namespaces/default/pods/token", spoofed, ""); res.StatusCode != 403 {
		t.Errorf("spoofed identity: %s %s", res.Status, text)
	}
	for path, code := range map[string]int{
		"/api/v1/namespaces/default/pods/token":                     200,
		"/api/v1/nodes/edge-1":                                      200,
		"/api/v1/nodes/edge-1?watch=true":                           405,
		"/api/v1/watch/nodes/edge-1":                                405,
		"/metrics":                                                  404,
		"/api/v1/namespaces/kube-system/secrets":                    403,
		"/api/v1/namespaces/default/pods/nobody-there":              403, // the Node authorizer's word for it
		"/api/v1/../../metrics":                                     400,
		"/apis/apps/v1/namespaces/default/deployments":              403,
		"/api/v1/namespaces/default/pods/token/log?container=c":     403,
		"/apis/coordination.k8s.io/v1/namespaces/default/leases/xy": 403,
	} {
		if res, text := relay(t, "edge-1", "GET", path, nil, ""); res.StatusCode != code {
			t.Errorf("GET %s: %s, want %d: %.200s", path, res.Status, code, text)
		}
	}
	big := `{"kind":"TokenRequest","x":"` + strings.Repeat("x", maxRequestBody) + `"}`
	if res, _ := relay(t, "edge-1", "POST", "/api/v1/namespaces/default/serviceaccounts/default/token", json, big); res.StatusCode < 400 {
		t.Errorf("a body of %d bytes: %s", len(big), res.Status)
	}
}
