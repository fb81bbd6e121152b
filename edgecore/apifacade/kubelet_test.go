package apifacade

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/component-helpers/apimachinery/lease"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/kubelet/configmap"
	kubepod "k8s.io/kubernetes/pkg/kubelet/pod"
	"k8s.io/kubernetes/pkg/kubelet/secret"
	"k8s.io/kubernetes/pkg/kubelet/status"
	kubetoken "k8s.io/kubernetes/pkg/kubelet/token"
	kubeletutil "k8s.io/kubernetes/pkg/kubelet/util"
	"k8s.io/utils/clock"

	"github.com/skerry-io/skerry/edgecore/store"
	"github.com/skerry-io/skerry/edgecore/tokens"
)

// The kubelet's own managers, against the facade.

type noneRunning struct{}

func (noneRunning) PodCouldHaveRunningContainers(*corev1.Pod) bool { return false }

func TestKubeletStatusManager(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	r.deliver(t, upsert(t, "pods", pod("a", "u1"), "10"))
	p, err := r.client.CoreV1().Pods("default").Get(ctx, "a", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	pods := kubepod.NewBasicPodManager()
	pods.AddPod(p)
	m := status.NewManager(r.client, pods, noneRunning{}, kubeletutil.NewPodStartupLatencyTracker())
	m.Start(ctx)
	now := metav1.Now().Rfc3339Copy()
	m.SetPodStatus(klog.Background(), p, corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.1.1.1", StartTime: &now,
		Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}})
	await(t, "the status is in the store", func() bool {
		got, err := r.client.CoreV1().Pods("default").Get(ctx, "a", metav1.GetOptions{})
		return err == nil && got.Status.Phase == corev1.PodRunning && got.Status.PodIP == "10.1.1.1" && len(got.Status.Conditions) == 1
	})
	// A condition the cloud writes comes down and the manager keeps it.
	withGate := p.DeepCopy()
	withGate.Status.Conditions = []corev1.PodCondition{{Type: "gate.example/x", Status: corev1.ConditionTrue}}
	r.deliver(t, upsert(t, "pods", withGate, "11"))
	m.SetPodStatus(klog.Background(), p, corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.1.1.2", StartTime: &now,
		Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionFalse}}})
	await(t, "both conditions", func() bool {
		got, err := r.client.CoreV1().Pods("default").Get(ctx, "a", metav1.GetOptions{})
		return err == nil && got.Status.PodIP == "10.1.1.2" && len(got.Status.Conditions) == 2
	})
	// Deleted in the cloud: the manager reports the end and deletes the pod.
	deleted := p.DeepCopy()
	at, grace := metav1.Now(), int64(1)
	deleted.DeletionTimestamp, deleted.DeletionGracePeriodSeconds = &at, &grace
	r.deliver(t, upsert(t, "pods", deleted, "12"))
	got, err := r.client.CoreV1().Pods("default").Get(ctx, "a", metav1.GetOptions{})
	if err != nil || got.DeletionTimestamp == nil || got.Status.PodIP != "10.1.1.2" {
		t.Fatalf("deleted in the cloud: %v %+v", err, got)
	}
	pods.UpdatePod(got)
	m.TerminatePod(klog.Background(), got)
	await(t, "the kubelet's DELETE", func() bool {
		_, ok := r.store.Get(store.Key{Resource: "pods", Namespace: "default", Name: "a"})
		return !ok
	})
	var ops []store.Op
	for r.store.Outbox().Depth() > 0 {
		for _, p := range outbox(t, r.store) {
			ops = append(ops, p.Op)
			r.store.Outbox().Done(p.ID)
		}
	}
	if fmt.Sprint(ops) != "[status delete]" {
		t.Errorf("outbox: %v", ops)
	}
}

func TestKubeletObjectManagers(t *testing.T) {
	r := newRig(t)
	cm := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "cm", Namespace: "default", UID: "c1"}, Data: map[string]string{"k": "1"}}
	sec := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "s", Namespace: "default", UID: "s1"}, Data: map[string][]byte{"k": []byte("1")}}
	r.deliver(t, upsert(t, "configmaps", cm, "1"), upsert(t, "secrets", sec, "1"))
	p := pod("a", "u1")
	p.Spec.Containers[0].EnvFrom = []corev1.EnvFromSource{
		{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "cm"}}},
		{SecretRef: &corev1.SecretEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "s"}}}}
	cms := configmap.NewWatchingConfigMapManager(r.client, time.Hour)
	secs := secret.NewWatchingSecretManager(r.client, time.Hour)
	cms.RegisterPod(p)
	secs.RegisterPod(p)
	if got, err := cms.GetConfigMap("default", "cm"); err != nil || got.Data["k"] != "1" {
		t.Fatalf("configmap: %v %+v", err, got)
	}
	if got, err := secs.GetSecret("default", "s"); err != nil || string(got.Data["k"]) != "1" {
		t.Fatalf("secret: %v %+v", err, got)
	}
	cm.Data["k"], sec.Data["k"] = "2", []byte("2")
	r.deliver(t, upsert(t, "configmaps", cm, "2"), upsert(t, "secrets", sec, "2"))
	await(t, "the new values", func() bool {
		c, err1 := cms.GetConfigMap("default", "cm")
		s, err2 := secs.GetSecret("default", "s")
		return err1 == nil && err2 == nil && c.Data["k"] == "2" && string(s.Data["k"]) == "2"
	})
	cms.UnregisterPod(p)
	secs.UnregisterPod(p)
}

func TestKubeletTokenManager(t *testing.T) {
	dir := t.TempDir()
	r := newRig(t)
	src, err := tokens.New(tokens.Config{Store: r.store, NodeName: node, KeyFile: filepath.Join(dir, "issuer.key")})
	if err != nil {
		t.Fatal(err)
	}
	f, err := New(Config{Store: r.store, NodeName: node, Tokens: src})
	if err != nil {
		t.Fatal(err)
	}
	r.deliver(t, upsert(t, "pods", pod("a", "u1"), "10"))
	ttl := int64(3600)
	got, err := kubetoken.NewManager(clientFor(t, f)).GetServiceAccountToken("default", "default", &authenticationv1.TokenRequest{
		Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &ttl,
			BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: "a", UID: types.UID("u1")}}})
	if err != nil {
		t.Fatal(err)
	}
	if id, err := src.Verify(got.Status.Token, ""); err != nil || id.PodName != "a" {
		t.Errorf("verify: %v %+v", err, id)
	}
}

func TestNodeLease(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	made, err := r.client.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	written := r.store.BytesWritten()
	c := lease.NewController(clock.RealClock{}, r.client, node, 40, func() {}, 50*time.Millisecond, node, corev1.NamespaceNodeLease,
		kubeletutil.SetNodeOwnerFunc(ctx, r.client, node))
	go c.Run(ctx)
	leases := r.client.CoordinationV1().Leases(corev1.NamespaceNodeLease)
	first := ""
	await(t, "the lease is renewed", func() bool {
		l, err := leases.Get(ctx, node, metav1.GetOptions{})
		if err != nil {
			return false
		}
		if first == "" {
			first = l.ResourceVersion
			if len(l.OwnerReferences) != 1 || l.OwnerReferences[0].UID != made.UID {
				t.Errorf("owner: %+v", l.OwnerReferences)
			}
		}
		return l.ResourceVersion != first
	})
	if n := r.store.BytesWritten() - written; n != 0 {
		t.Errorf("leases cost %d bytes of flash", n)
	}
}

func TestEventsFromTheRecorder(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	events := r.client.CoreV1().Events("default")
	e, err := events.CreateWithEventNamespaceWithContext(ctx, &corev1.Event{ObjectMeta: metav1.ObjectMeta{Name: "e", Namespace: "default"}, Count: 1,
		InvolvedObject: corev1.ObjectReference{Kind: "Pod", Name: "a"}})
	if err != nil {
		t.Fatal(err)
	}
	if e, err = events.PatchWithEventNamespaceWithContext(ctx, e, []byte(`{"count":2}`)); err != nil || e.Count != 2 {
		t.Errorf("patch: %v %+v", err, e)
	}
	list, err := events.List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.name=a,involvedObject.kind=Pod"})
	if err != nil || len(list.Items) != 1 {
		t.Errorf("list: %v %+v", err, list)
	}
	if p := outbox(t, r.store); len(p) != 1 || p[0].Op != store.OpEvent {
		t.Errorf("outbox: %+v", p)
	}
}
