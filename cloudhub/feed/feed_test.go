package feed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// acceptAll answers every write with success, and keeps them.
type acceptAll struct{ got chan edgeapi.Write }

func (a acceptAll) Write(_ context.Context, _ string, w edgeapi.Write) edgeapi.WriteResult {
	a.got <- w
	return edgeapi.WriteResult{ID: w.ID, Code: http.StatusOK}
}

// edge is a node at the other end of a conversation.
type edge struct {
	t      *testing.T
	conn   *edgeapi.Conn
	raw    net.Conn
	served chan error
	have   map[edgeapi.Ref]edgeapi.Upsert
	writer acceptAll
}

func start(t *testing.T, objs ...any) (*fake.Clientset, *Feed) {
	t.Helper()
	return startWith(t, Config{}, objs...)
}

func startWith(t *testing.T, cfg Config, objs ...any) (*fake.Clientset, *Feed) {
	t.Helper()
	return startObserved(t, cfg, nil, objs...)
}

func startObserved(t *testing.T, cfg Config, o Observer, objs ...any) (*fake.Clientset, *Feed) {
	t.Helper()
	client := fake.NewClientset()
	for _, o := range objs {
		create(t, client, o)
	}
	cfg.Client, cfg.Agent = client, "test"
	f, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if o != nil {
		f.Observe(o)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return client, f
}

func create(t *testing.T, c *fake.Clientset, o any) {
	t.Helper()
	ctx := t.Context()
	var err error
	switch o := o.(type) {
	case *corev1.Pod:
		_, err = c.CoreV1().Pods(o.Namespace).Create(ctx, o, metav1.CreateOptions{})
	case *corev1.Node:
		_, err = c.CoreV1().Nodes().Create(ctx, o, metav1.CreateOptions{})
	case *corev1.ConfigMap:
		_, err = c.CoreV1().ConfigMaps(o.Namespace).Create(ctx, o, metav1.CreateOptions{})
	case *corev1.Secret:
		_, err = c.CoreV1().Secrets(o.Namespace).Create(ctx, o, metav1.CreateOptions{})
	case *corev1.Service:
		_, err = c.CoreV1().Services(o.Namespace).Create(ctx, o, metav1.CreateOptions{})
	case *corev1.PersistentVolumeClaim:
		_, err = c.CoreV1().PersistentVolumeClaims(o.Namespace).Create(ctx, o, metav1.CreateOptions{})
	case *corev1.PersistentVolume:
		_, err = c.CoreV1().PersistentVolumes().Create(ctx, o, metav1.CreateOptions{})
	case *corev1.ServiceAccount:
		_, err = c.CoreV1().ServiceAccounts(o.Namespace).Create(ctx, o, metav1.CreateOptions{})
	case *rbacv1.Role:
		_, err = c.RbacV1().Roles(o.Namespace).Create(ctx, o, metav1.CreateOptions{})
	case *rbacv1.RoleBinding:
		_, err = c.RbacV1().RoleBindings(o.Namespace).Create(ctx, o, metav1.CreateOptions{})
	case *rbacv1.ClusterRole:
		_, err = c.RbacV1().ClusterRoles().Create(ctx, o, metav1.CreateOptions{})
	case *rbacv1.ClusterRoleBinding:
		_, err = c.RbacV1().ClusterRoleBindings().Create(ctx, o, metav1.CreateOptions{})
	default:
		t.Fatalf("create %T", o)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// connect starts a conversation with what the node has.
func connect(t *testing.T, f *Feed, node string, have map[edgeapi.Ref]edgeapi.Upsert) *edge {
	t.Helper()
	hub, mine := net.Pipe()
	ctx, cancel := context.WithCancel(context.Background())
	e := &edge{t: t, conn: edgeapi.NewConn(mine), raw: mine, served: make(chan error, 1), have: have,
		writer: acceptAll{make(chan edgeapi.Write, 100)}}
	if e.have == nil {
		e.have = map[edgeapi.Ref]edgeapi.Upsert{}
	}
	go func() {
		e.served <- f.Serve(ctx, node, hub, e.writer)
	}()
	t.Cleanup(func() { cancel(); mine.Close() })
	deadline := time.Now().Add(20 * time.Second)
	if err := mine.SetDeadline(deadline); err != nil {
		t.Fatal(err)
	}
	e.send(edgeapi.Hello{Version: edgeapi.Version, Agent: "test", Outbox: 3})
	inv := edgeapi.Inventory{Last: true}
	for ref, u := range e.have {
		inv.Items = append(inv.Items, edgeapi.Item{Ref: ref, UID: u.UID, Rev: u.Rev})
	}
	e.send(inv)
	if w, ok := e.receive().(edgeapi.Welcome); !ok || w.NodeName != node {
		t.Fatalf("got %+v, want Welcome to %s", w, node)
	}
	return e
}

func (e *edge) send(m edgeapi.Message) {
	e.t.Helper()
	if err := e.conn.Send(m); err != nil {
		e.t.Fatal(err)
	}
}

func (e *edge) receive() edgeapi.Message {
	e.t.Helper()
	m, err := e.conn.Receive()
	if err != nil {
		e.t.Fatalf("receive: %v (served: %v)", err, e.ended())
	}
	return m
}

func (e *edge) ended() error {
	select {
	case err := <-e.served:
		return err
	default:
		return errors.New("still serving")
	}
}

// delta takes the next delta, applies it and acknowledges it.
func (e *edge) delta() edgeapi.Delta {
	e.t.Helper()
	d, ok := e.receive().(edgeapi.Delta)
	if !ok {
		e.t.Fatalf("no delta")
	}
	for _, it := range d.Deletes {
		delete(e.have, it.Ref)
	}
	for _, u := range d.Upserts {
		e.have[u.Ref] = u
	}
	e.send(edgeapi.Ack{Seq: d.Seq})
	return d
}

// sync takes deltas until the one that is marked.
func (e *edge) sync() (upserts, deletes int) {
	e.t.Helper()
	for {
		d := e.delta()
		upserts += len(d.Upserts)
		deletes += len(d.Deletes)
		if d.Synced {
			return upserts, deletes
		}
	}
}

// until takes deltas until cond holds.
func (e *edge) until(what string, cond func() bool) {
	e.t.Helper()
	for !cond() {
		e.delta()
		if e.t.Failed() {
			e.t.Fatalf("waiting for %s", what)
		}
	}
}

func (e *edge) has(resource, ns, name string) bool {
	_, ok := e.have[edgeapi.Ref{Resource: resource, Namespace: ns, Name: name}]
	return ok
}

func objectMeta(ns, name, uid string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: ns, Name: name, UID: types.UID(uid), ResourceVersion: "1"}
}

// pod names one of everything that a pod can name.
func pod(name, node, uid string) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: objectMeta("shop", name, uid), Spec: corev1.PodSpec{
		NodeName:         node,
		ImagePullSecrets: []corev1.LocalObjectReference{{Name: "pull"}},
		Containers: []corev1.Container{{Name: "c", Image: "i",
			Env:     []corev1.EnvVar{{Name: "A", ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: "env-secret"}, Key: "a"}}}},
			EnvFrom: []corev1.EnvFromSource{{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "env-from"}}}},
		}},
		Volumes: []corev1.Volume{
			{Name: "cfg", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "files"}}}},
			{Name: "data", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "data"}}},
		},
	}}
}

func world() []any {
	return []any{
		&corev1.Node{ObjectMeta: objectMeta("", "edge-1", "n1")},
		&corev1.Node{ObjectMeta: objectMeta("", "edge-2", "n2")},
		&corev1.Service{ObjectMeta: objectMeta("shop", "web", "s1")},
		&corev1.ConfigMap{ObjectMeta: objectMeta("shop", "files", "c1"), Data: map[string]string{"k": "v"}},
		&corev1.ConfigMap{ObjectMeta: objectMeta("shop", "env-from", "c2")},
		&corev1.ConfigMap{ObjectMeta: objectMeta("shop", "nobodys", "c3")},
		&corev1.Secret{ObjectMeta: objectMeta("shop", "env-secret", "x1")},
		&corev1.Secret{ObjectMeta: objectMeta("shop", "pull", "x2")},
		&corev1.Secret{ObjectMeta: objectMeta("shop", "nobodys", "x3")},
		&corev1.PersistentVolumeClaim{ObjectMeta: objectMeta("shop", "data", "v1"), Spec: corev1.PersistentVolumeClaimSpec{VolumeName: "disk"}},
		&corev1.PersistentVolume{ObjectMeta: objectMeta("", "disk", "v2")},
		pod("a", "edge-1", "p1"),
		pod("b", "edge-2", "p2"),
	}
}

func TestFirstSyncIsTheNodesSetAndNothingElse(t *testing.T) {
	_, f := start(t, world()...)
	e := connect(t, f, "edge-1", nil)
	var order []string
	for {
		d := e.delta()
		for _, u := range d.Upserts {
			order = append(order, u.Resource+"/"+u.Name)
		}
		if d.Synced {
			break
		}
	}
	want := []string{
		"nodes/edge-1", "services/web", "configmaps/env-from", "configmaps/files", "secrets/env-secret",
		"secrets/pull", "persistentvolumes/disk", "persistentvolumeclaims/data", "pods/a",
	}
	if !slices.Equal(order, want) {
		t.Errorf("got  %v\nwant %v", order, want)
	}
	var p corev1.Pod
	if err := json.Unmarshal(e.have[edgeapi.Ref{Resource: "pods", Namespace: "shop", Name: "a"}].Body, &p); err != nil {
		t.Fatal(err)
	}
	if p.Kind != "Pod" || p.APIVersion != "v1" || p.UID != "p1" {
		t.Errorf("pod came as %s %s %s", p.APIVersion, p.Kind, p.UID)
	}
}

func TestResumeSendsDifferencesOnly(t *testing.T) {
	client, f := start(t, world()...)
	e := connect(t, f, "edge-1", nil)
	e.sync()
	e.raw.Close()

	again := connect(t, f, "edge-1", e.have)
	if up, del := again.sync(); up+del != 0 {
		t.Errorf("unchanged: %d upserts, %d deletes", up, del)
	}
	again.raw.Close()

	// While the node is away.
	ctx := t.Context()
	cm, err := client.CoreV1().ConfigMaps("shop").Get(ctx, "files", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	cm.Data, cm.ResourceVersion = map[string]string{"k": "new"}, "2"
	if _, err := client.CoreV1().ConfigMaps("shop").Update(ctx, cm, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := client.CoreV1().Services("shop").Delete(ctx, "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	third := connect(t, f, "edge-1", again.have)
	third.sync()
	third.until("the new ConfigMap and no Service", func() bool {
		u := third.have[edgeapi.Ref{Resource: "configmaps", Namespace: "shop", Name: "files"}]
		return u.Rev == "2" && !third.has("services", "shop", "web")
	})
}

func TestStatusAloneIsNoDelta(t *testing.T) {
	client, f := start(t, world()...)
	e := connect(t, f, "edge-1", nil)
	e.sync()
	ctx := t.Context()
	p, err := client.CoreV1().Pods("shop").Get(ctx, "a", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	p = p.DeepCopy()
	p.Status.Phase = corev1.PodRunning
	p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	p.ResourceVersion = "2"
	if p, err = client.CoreV1().Pods("shop").UpdateStatus(ctx, p, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	// A readiness gate is another's condition, and a marker to wait for.
	p = p.DeepCopy()
	p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: "example.com/gate", Status: corev1.ConditionTrue})
	p.ResourceVersion = "3"
	if _, err = client.CoreV1().Pods("shop").UpdateStatus(ctx, p, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	d := e.delta()
	if len(d.Upserts) != 1 {
		t.Fatalf("got %d upserts, want one: the gate", len(d.Upserts))
	}
	var got corev1.Pod
	if err := json.Unmarshal(d.Upserts[0].Body, &got); err != nil {
		t.Fatal(err)
	}
	if got.Status.Phase != "" || len(got.Status.Conditions) != 1 || got.Status.Conditions[0].Type != "example.com/gate" {
		t.Errorf("status came down: %+v", got.Status)
	}
}

func TestWhatNoPodNamesLeavesTheNode(t *testing.T) {
	client, f := start(t, world()...)
	e := connect(t, f, "edge-1", nil)
	e.sync()
	ctx := t.Context()

	create(t, client, pod("a2", "edge-1", "p3")) // names the same things
	e.until("the second pod", func() bool { return e.has("pods", "shop", "a2") })
	if err := client.CoreV1().Pods("shop").Delete(ctx, "a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	e.until("the first pod's end", func() bool { return !e.has("pods", "shop", "a") })
	if !e.has("secrets", "shop", "pull") {
		t.Error("the Secret went although a pod still names it")
	}
	if err := client.CoreV1().Pods("shop").Delete(ctx, "a2", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	e.until("the Secrets' end", func() bool {
		return !e.has("pods", "shop", "a2") && !e.has("secrets", "shop", "pull") && !e.has("secrets", "shop", "env-secret") &&
			!e.has("configmaps", "shop", "files") && !e.has("persistentvolumeclaims", "shop", "data") && !e.has("persistentvolumes", "", "disk")
	})
}

func TestNewNamesakeComesWithItsUID(t *testing.T) {
	client, f := start(t, world()...)
	e := connect(t, f, "edge-1", nil)
	e.sync()
	if err := client.CoreV1().Pods("shop").Delete(t.Context(), "a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	create(t, client, pod("a", "edge-1", "p9"))
	ref := edgeapi.Ref{Resource: "pods", Namespace: "shop", Name: "a"}
	e.until("the namesake", func() bool { return e.have[ref].UID == "p9" })
	var p corev1.Pod
	if err := json.Unmarshal(e.have[ref].Body, &p); err != nil || p.UID != "p9" {
		t.Errorf("%v %v", p.UID, err)
	}
}

func TestWritesAreAnsweredInOrder(t *testing.T) {
	_, f := start(t, world()...)
	e := connect(t, f, "edge-1", nil)
	e.sync()
	for i := range 5 {
		e.send(edgeapi.Write{ID: uint64(i + 1), Op: edgeapi.OpEvent, Ref: edgeapi.Ref{Resource: "events", Namespace: "shop", Name: "e"}})
		if r, ok := e.receive().(edgeapi.WriteResult); !ok || r.ID != uint64(i+1) || r.Code != 200 {
			t.Fatalf("got %+v", r)
		}
	}
}

// observer writes down what it is told.
type observer chan string

func (o observer) Greeted(node string, h edgeapi.Hello) {
	o <- fmt.Sprintf("greeted %s, %d waiting", node, h.Outbox)
}
func (o observer) InStep(node string, yes bool) { o <- fmt.Sprintf("in step %s %t", node, yes) }
func (o observer) Wrote(node string)            { o <- "wrote " + node }

func TestTheObserverIsTold(t *testing.T) {
	told := make(observer, 100)
	client, f := startObserved(t, Config{}, told, world()...)
	e := connect(t, f, "edge-1", nil)
	next := func(want string) {
		t.Helper()
		select {
		case got := <-told:
			if got != want {
				t.Errorf("told %q, want %q", got, want)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("not told %q", want)
		}
	}
	quiet := func(when string) {
		t.Helper()
		select {
		case got := <-told:
			t.Errorf("%s: told %q", when, got)
		case <-time.After(50 * time.Millisecond):
		}
	}
	next("greeted edge-1, 3 waiting")
	var d edgeapi.Delta
	for !d.Synced {
		d = e.receive().(edgeapi.Delta)
	}
	quiet("before the acknowledgement")
	e.send(edgeapi.Ack{Seq: d.Seq})
	next("in step edge-1 true")

	create(t, client, pod("x", "edge-1", "p7"))
	d = e.receive().(edgeapi.Delta)
	next("in step edge-1 false")
	create(t, client, pod("y", "edge-1", "p8"))
	d2 := e.receive().(edgeapi.Delta)
	e.send(edgeapi.Ack{Seq: d.Seq})
	quiet("with one of two deltas acknowledged")
	e.send(edgeapi.Ack{Seq: d2.Seq})
	next("in step edge-1 true")

	e.send(edgeapi.Write{ID: 1, Op: edgeapi.OpEvent, Ref: edgeapi.Ref{Resource: "events", Namespace: "shop", Name: "e"}})
	next("wrote edge-1")
}

func TestUnacknowledgedDeltasAreBounded(t *testing.T) {
	client, f := start(t, world()...)
	e := connect(t, f, "edge-1", nil)
	e.sync()
	// A node that takes deltas and acknowledges none gets a window of them.
	ctx := t.Context()
	got := 0
	for i := 0; got < deltaWindow; i++ {
		svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "s" + time.Duration(i).String(), UID: "u"}}
		if _, err := client.CoreV1().Services("shop").Create(ctx, svc, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, ok := e.receive().(edgeapi.Delta); !ok {
			t.Fatal("no delta")
		}
		got++
	}
	if _, err := client.CoreV1().Services("shop").Create(ctx, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "last", UID: "u"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := e.raw.SetReadDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if m, err := e.conn.Receive(); err == nil {
		t.Errorf("a delta beyond the window: %+v", m)
	}
}

func TestBadPeersAreSentAway(t *testing.T) {
	_, f := start(t, world()...)
	for name, tc := range map[string]struct {
		first edgeapi.Message
		then  edgeapi.Message
	}{
		"no hello":        {first: edgeapi.Ack{Seq: 1}},
		"unknown version": {first: edgeapi.Hello{Version: 99}},
		"no inventory":    {first: edgeapi.Hello{Version: 1}, then: edgeapi.Ack{Seq: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			hub, mine := net.Pipe()
			defer mine.Close()
			served := make(chan error, 1)
			go func() {
				served <- f.Serve(t.Context(), "edge-1", hub, acceptAll{})
			}()
			conn := edgeapi.NewConn(mine)
			if err := conn.Send(tc.first); err != nil {
				t.Fatal(err)
			}
			if tc.then != nil {
				if err := conn.Send(tc.then); err != nil {
					t.Fatal(err)
				}
			} else if name == "unknown version" {
				if m, _ := conn.Receive(); m.(edgeapi.Goodbye).Reason != edgeapi.ReasonVersion {
					t.Errorf("got %+v", m)
				}
			}
			if err := <-served; err == nil || errors.Is(err, io.EOF) {
				t.Errorf("served: %v", err)
			}
		})
	}
	t.Run("acknowledges what was not sent", func(t *testing.T) {
		e := connect(t, f, "edge-1", nil)
		e.sync()
		e.send(edgeapi.Ack{Seq: 1000})
		if err := <-e.served; err == nil {
			t.Error("no error")
		}
	})
}

func BenchmarkFirstSync100Pods(b *testing.B) {
	client := fake.NewClientset()
	for i := range 100 {
		p := pod("p"+time.Duration(i).String(), "edge-1", "u"+time.Duration(i).String())
		if _, err := client.CoreV1().Pods("shop").Create(b.Context(), p, metav1.CreateOptions{}); err != nil {
			b.Fatal(err)
		}
	}
	f, err := New(Config{Client: client})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go f.Run(ctx)
	<-f.Ready()
	for b.Loop() {
		hub, mine := net.Pipe()
		go f.Serve(ctx, "edge-1", hub, acceptAll{})
		conn := edgeapi.NewConn(mine)
		_ = conn.Send(edgeapi.Hello{Version: 1})
		_ = conn.Send(edgeapi.Inventory{Last: true})
		for {
			m, err := conn.Receive()
			if err != nil {
				b.Fatal(err)
			}
			if d, ok := m.(edgeapi.Delta); ok {
				_ = conn.Send(edgeapi.Ack{Seq: d.Seq})
				if d.Synced {
					break
				}
			}
		}
		_, _, _, wire := conn.Bytes()
		b.ReportMetric(float64(wire)/100, "wire-B/pod")
		mine.Close()
	}
}

func TestAChangedNodeLeadsItsNewPods(t *testing.T) {
	client, f := start(t, world()...)
	e := connect(t, f, "edge-1", nil)
	e.sync()
	ctx := t.Context()
	n, err := client.CoreV1().Nodes().Get(ctx, "edge-1", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	n.Labels, n.ResourceVersion = map[string]string{"untainted": "yes"}, "2"
	if _, err := client.CoreV1().Nodes().Update(ctx, n, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	create(t, client, pod("drawn", "edge-1", "p7"))
	led := false
	for !e.has("pods", "shop", "drawn") {
		d := e.delta()
		for _, u := range d.Upserts {
			switch {
			case u.Resource == "nodes":
				led = true
			case u.Name == "drawn" && !led:
				t.Error("the pod came before its Node's change")
			case u.Name == "drawn" && len(d.Upserts) > 1 && d.Upserts[0].Resource == "nodes":
				t.Error("the pod came with its Node's change: the kubelet may see it first")
			}
		}
	}
}

// dismissed wants the hub to say that the Node is gone, and nothing else.
func (e *edge) dismissed() {
	e.t.Helper()
	m, ok := e.receive().(edgeapi.Goodbye)
	if !ok || m.Reason != edgeapi.ReasonNodeDeleted {
		e.t.Fatalf("got %#v, want a Goodbye", m)
	}
	e.raw.Close()
	<-e.served
}

func node1() *corev1.Node { return &corev1.Node{ObjectMeta: objectMeta("", "edge-1", "n1")} }

// A node whose Node is deleted hears that, and not that its pods are gone.
func TestADeletedNodeIsToldSo(t *testing.T) {
	client, f := start(t, node1(), pod("p", "edge-1", "p1"))
	e := connect(t, f, "edge-1", nil)
	e.sync()
	if !e.has("nodes", "", "edge-1") || !e.has("pods", "shop", "p") {
		t.Fatalf("has %v", e.have)
	}
	ctx := t.Context()
	if err := client.CoreV1().Nodes().Delete(ctx, "edge-1", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	e.dismissed()

	// Its pods are collected; it comes again with what it had.
	if err := client.CoreV1().Pods("shop").Delete(ctx, "p", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	connect(t, f, "edge-1", e.have).dismissed()

	// Joined again, it has no Node and is told what its pods are.
	delete(e.have, edgeapi.Ref{Resource: "nodes", Name: "edge-1"})
	e = connect(t, f, "edge-1", e.have)
	if e.sync(); e.has("pods", "shop", "p") {
		t.Error("the pod that is gone was not deleted")
	}
}

// An informer that is behind is no witness of a deletion.
func TestANodeThatAnInformerLacksIsNotDeleted(t *testing.T) {
	client, f := start(t)
	looks := 0
	client.PrependReactor("get", "nodes", func(clienttesting.Action) (bool, runtime.Object, error) {
		looks++
		return true, node1(), nil
	})
	ref := edgeapi.Ref{Resource: "nodes", Name: "edge-1"}
	e := connect(t, f, "edge-1", map[edgeapi.Ref]edgeapi.Upsert{ref: {Ref: ref, UID: "n1", Rev: "r"}})
	if e.sync(); !e.has("nodes", "", "edge-1") || looks == 0 {
		t.Errorf("has %v after %d looks at the API server", e.have, looks)
	}
}

// Nor is an API server that does not answer.
func TestANodeIsNotDeletedUnseen(t *testing.T) {
	client, f := start(t)
	client.PrependReactor("get", "nodes", func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, errors.New("away")
	})
	ref := edgeapi.Ref{Resource: "nodes", Name: "edge-1"}
	e := connect(t, f, "edge-1", map[edgeapi.Ref]edgeapi.Upsert{ref: {Ref: ref, UID: "n1", Rev: "r"}})
	if m, err := e.conn.Receive(); err == nil {
		t.Errorf("got %#v", m)
	}
}

func TestOlderThan(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want bool
	}{{"9", "10", true}, {"10", "9", false}, {"10", "10", false}, {"", "1", false}, {"x", "1", false}} {
		if got := olderThan(c.a, c.b); got != c.want {
			t.Errorf("olderThan(%q, %q) = %v", c.a, c.b, got)
		}
	}
}
