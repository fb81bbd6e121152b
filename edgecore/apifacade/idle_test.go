package apifacade

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apiresource "k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/edgecore/store"
	"github.com/skerry-io/skerry/edgecore/tokens"
)

// The rates of a kubelet with nothing to do (v1.36 defaults).
const (
	leaseEvery  = 10 * time.Second
	statusEvery = 5 * time.Minute
	tokenTTL    = 3607
	idlePods    = 10
	dayBudget   = 5_000_000
)

// A day of an idle node with ten pods, at the kubelet's own rates and through
// the facade, in virtual time: what it costs the flash.
func TestAnIdleDay(t *testing.T) {
	for _, connected := range []bool{true, false} {
		t.Run(fmt.Sprintf("connected=%t", connected), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { idleDay(t, connected) })
		})
	}
}

func idleDay(t *testing.T, connected bool) {
	ctx := t.Context()
	r := newRig(t, func(sc *store.Config, fc *Config) { sc.BytesPerDay = dayBudget })
	cloud := tokenFunc(func(_, _ string, req *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
		out := req.DeepCopy()
		out.Status = authenticationv1.TokenRequestStatus{Token: strings.Repeat("t", 1100), ExpirationTimestamp: metav1.NewTime(time.Now().Add(tokenTTL * time.Second))}
		return out, nil
	})
	cfg := tokens.Config{Store: r.store, NodeName: node, KeyFile: filepath.Join(t.TempDir(), "issuer.key"), Cloud: cloudAt{&connected, cloud}}
	src, err := tokens.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	f, err := New(Config{Store: r.store, NodeName: node, Tokens: src})
	if err != nil {
		t.Fatal(err)
	}
	client := clientFor(t, f)
	nodeObj := idleNode()
	if _, err := client.CoreV1().Nodes().Create(ctx, nodeObj, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	var ups []store.Upsert
	for i := range idlePods {
		ups = append(ups, upsert(t, "pods", idlePod(i), "1"))
	}
	r.deliver(t, ups...)
	renew := make([]time.Time, idlePods)
	lease, err := client.CoordinationV1().Leases("kube-node-lease").Create(ctx, &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: node}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	hour := func(n int) {
		t.Helper()
		for tick := range int(time.Hour / leaseEvery) {
			now := metav1.NowMicro()
			lease.Spec.RenewTime = &now
			if lease, err = client.CoordinationV1().Leases("kube-node-lease").Update(ctx, lease, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
			if tick%int(statusEvery/leaseEvery) == 0 {
				heartbeat(t, ctx, client.CoreV1().Nodes())
			}
			for i := range renew {
				if time.Now().Before(renew[i]) {
					continue
				}
				renew[i] = time.Now().Add(askToken(t, ctx, f, i))
			}
			if connected {
				told(t, r.store)
			}
			time.Sleep(leaseEvery)
		}
	}
	hour(0) // pods start, the first copy is made: not idle
	before, process := r.store.Wear(), written(t)
	for h := range 24 {
		hour(h + 1)
	}
	w := r.store.Wear()
	day := w.Total - before.Total
	for c, n := range w.Classes {
		if n -= before.Classes[c]; n > 0 {
			t.Logf("%8d bytes for %s", n, c)
		}
	}
	t.Logf("%8d bytes in %d commits; the kernel counts %d for the process", day, w.Commits-before.Commits, written(t)-process)
	if day > dayBudget {
		t.Errorf("an idle day with %d pods costs %d bytes of flash, the goal is %d", idlePods, day, dayBudget)
	}
}

// cloudAt is a cloud that answers while connected.
type cloudAt struct {
	connected *bool
	tokenFunc
}

func (c cloudAt) CreateToken(ctx context.Context, namespace, sa string, req *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
	if !*c.connected {
		return nil, context.DeadlineExceeded
	}
	return c.tokenFunc.CreateToken(ctx, namespace, sa, req)
}

// told empties the outbox as the cloud's answers do, and echoes statuses as the
// feed does, with a new revision.
func told(t *testing.T, s *store.Store) {
	t.Helper()
	var echo []store.Upsert
	for _, p := range outbox(t, s) {
		s.Outbox().Done(p.ID)
		if p.Op == store.OpStatus || p.Op == store.OpCreate {
			echo = append(echo, store.Upsert{Key: p.Key, UID: p.UID, Rev: fmt.Sprint(p.ID), Body: p.Body})
		}
	}
	if len(echo) > 0 {
		if err := s.ApplyDelta(t.Context(), store.Delta{Upserts: echo}); err != nil {
			t.Fatal(err)
		}
	}
}

type nodePatcher interface {
	Patch(ctx context.Context, name string, pt types.PatchType, data []byte, opts metav1.PatchOptions, subresources ...string) (*corev1.Node, error)
}

func heartbeat(t *testing.T, ctx context.Context, nodes nodePatcher) {
	t.Helper()
	var conditions []corev1.NodeCondition
	for _, c := range idleNode().Status.Conditions {
		c.LastHeartbeatTime = metav1.Now()
		conditions = append(conditions, c)
	}
	patch, err := json.Marshal(map[string]any{"status": map[string]any{"conditions": conditions}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := nodes.Patch(ctx, node, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
}

// askToken asks as the kubelet does, and tells when it will again.
func askToken(t *testing.T, ctx context.Context, f *Facade, i int) time.Duration {
	t.Helper()
	ttl := int64(tokenTTL)
	got, err := clientFor(t, f).CoreV1().ServiceAccounts("default").CreateToken(ctx, "default", &authenticationv1.TokenRequest{
		Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &ttl, BoundObjectRef: &authenticationv1.BoundObjectReference{
			Kind: "Pod", APIVersion: "v1", Name: fmt.Sprintf("p%d", i), UID: types.UID(fmt.Sprintf("u%d", i))}}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	life := time.Until(got.Status.ExpirationTimestamp.Time)
	return life*8/10 + time.Duration(i)*37*time.Second%(3*time.Minute) // pods did not start together
}

// written is what the kernel counts for this process: whole folios of the page
// cache, which on some file systems are several pages for one that is written.
func written(t *testing.T) uint64 {
	t.Helper()
	raw, err := os.ReadFile("/proc/self/io")
	if err != nil {
		t.Fatal(err)
	}
	for line := range bytes.Lines(raw) {
		if v, ok := strings.CutPrefix(string(line), "write_bytes:"); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(v), 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatal("the kernel counts no bytes")
	return 0
}

// idleNode and idlePod are as large as real ones.
func idleNode() *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node, Labels: map[string]string{"kubernetes.io/hostname": node}}}
	for _, typ := range []corev1.NodeConditionType{"MemoryPressure", "DiskPressure", "PIDPressure", "Ready"} {
		n.Status.Conditions = append(n.Status.Conditions, corev1.NodeCondition{Type: typ, Status: "False", Reason: "KubeletHasSufficientMemory", Message: "kubelet has sufficient memory available"})
	}
	for i := range 20 {
		n.Status.Images = append(n.Status.Images, corev1.ContainerImage{SizeBytes: 1 << 27,
			Names: []string{fmt.Sprintf("registry.example.com/team/app-%d@sha256:%064d", i, i), fmt.Sprintf("registry.example.com/team/app-%d:v1", i)}})
	}
	n.Status.Capacity = corev1.ResourceList{"cpu": apiresource.MustParse("4"), "memory": apiresource.MustParse("4Gi")}
	return n
}

func idlePod(i int) *corev1.Pod {
	p := pod(fmt.Sprintf("p%d", i), fmt.Sprintf("u%d", i))
	c := &p.Spec.Containers[0]
	for e := range 30 {
		c.Env = append(c.Env, corev1.EnvVar{Name: fmt.Sprintf("SETTING_%d", e), Value: strings.Repeat("v", 60)})
	}
	started := metav1.NewTime(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC))
	p.Status = corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.0.0.1", StartTime: &started}
	for _, typ := range []corev1.PodConditionType{"Ready", "Initialized", "ContainersReady", "PodScheduled", "PodReadyToStartContainers"} {
		p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: typ, Status: "True", LastTransitionTime: started})
	}
	return p
}
