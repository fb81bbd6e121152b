package metricsapi

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	statsv1alpha1 "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
	metricsclient "k8s.io/metrics/pkg/client/clientset/versioned"

	"github.com/skerry-io/skerry/cloudhub/controlplane"
	"github.com/skerry-io/skerry/cloudhub/controlplane/planetest"
)

func TestMain(m *testing.M) { os.Exit(planetest.Main(m)) }

// nodes is a Source of set answers.
type nodes struct {
	mu        sync.Mutex
	summaries map[string]*statsv1alpha1.Summary
	asked     map[string]int
	ask       func(ctx context.Context, node string) // before an answer; may be nil
}

func newNodes() *nodes {
	return &nodes{summaries: make(map[string]*statsv1alpha1.Summary), asked: make(map[string]int)}
}

func (n *nodes) Nodes() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []string
	for name := range n.summaries {
		out = append(out, name)
	}
	return out
}

func (n *nodes) Summary(ctx context.Context, node string) (*statsv1alpha1.Summary, error) {
	n.mu.Lock()
	n.asked[node]++
	s, ask := n.summaries[node], n.ask
	n.mu.Unlock()
	if ask != nil {
		ask(ctx, node)
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if s == nil {
		return nil, errors.New("no answer")
	}
	return s, nil
}

func cpu(nano uint64) *statsv1alpha1.CPUStats {
	return &statsv1alpha1.CPUStats{Time: metav1.Now(), UsageNanoCores: &nano}
}

func memory(bytes uint64) *statsv1alpha1.MemoryStats {
	return &statsv1alpha1.MemoryStats{Time: metav1.Now(), WorkingSetBytes: &bytes}
}

// TestKubectlTop asks as users do, through a real API server.
func TestKubectlTop(t *testing.T) {
	source := newNodes()
	api, err := New(Config{Source: source, CacheFor: time.Millisecond, Log: planetest.Log()})
	if err != nil {
		t.Fatal(err)
	}
	p := planetest.Start(t, controlplane.Config{Install: func(e controlplane.Extension) error {
		return api.Install(e.Context, e.Server, e.Informers)
	}}, nil)
	for i, name := range []string{"edge-1", "edge-2", "edge-3"} {
		addNode(t, p, name, map[string]string{"site": fmt.Sprintf("site-%d", i+1)})
	}
	web := addPod(t, p, "web", "edge-1", "app", "sidecar")
	stale := addPod(t, p, "stale", "edge-1", "app")
	partial := addPod(t, p, "partial", "edge-1", "app", "sidecar")
	addPod(t, p, "offline", "edge-2", "app")

	container := func(name string, nano, bytes uint64) statsv1alpha1.ContainerStats {
		return statsv1alpha1.ContainerStats{Name: name, CPU: cpu(nano), Memory: memory(bytes)}
	}
	ref := func(pod *corev1.Pod) statsv1alpha1.PodReference {
		return statsv1alpha1.PodReference{Namespace: pod.Namespace, Name: pod.Name, UID: string(pod.UID)}
	}
	staleRef := ref(stale)
	staleRef.UID = "an-earlier-namesake"
	source.mu.Lock()
	source.summaries["edge-1"] = &statsv1alpha1.Summary{
		Node: statsv1alpha1.NodeStats{NodeName: "edge-1", CPU: cpu(250_000_000), Memory: memory(512 << 20)},
		Pods: []statsv1alpha1.PodStats{
			{PodRef: ref(web), Containers: []statsv1alpha1.ContainerStats{container("app", 100_000_000, 64<<20), container("sidecar", 20_000_000, 16<<20)}},
			{PodRef: staleRef, Containers: []statsv1alpha1.ContainerStats{container("app", 1, 1)}},
			{PodRef: ref(partial), Containers: []statsv1alpha1.ContainerStats{container("app", 1, 1), {Name: "sidecar"}}},
		},
	}
	// edge-2 is not connected; edge-3 is and has no figures yet.
	source.summaries["edge-3"] = &statsv1alpha1.Summary{Node: statsv1alpha1.NodeStats{NodeName: "edge-3"}}
	source.mu.Unlock()

	planetest.Await(t, "the group in discovery", func() error {
		if out, failed := p.Kubectl(t, "get", "apiservices", "v1beta1.metrics.k8s.io"); failed != "" || !strings.Contains(out, "Local") {
			return fmt.Errorf("%s %s", out, failed)
		}
		_, failed := p.Kubectl(t, "top", "nodes")
		if failed != "" {
			return errors.New(failed)
		}
		return nil
	})
	for _, tc := range []struct {
		args   string
		want   []string
		absent []string
		failed string
	}{
		{args: "top nodes", want: []string{"edge-1", "250m", "6%", "512Mi", "12%", "edge-2 <unknown>", "edge-3 <unknown>"}},
		{args: "top nodes -l site=site-1", want: []string{"edge-1"}, absent: []string{"edge-2", "edge-3"}},
		{args: "top node edge-1", want: []string{"250m"}},
		{args: "top node edge-2", failed: "node edge-2 is not connected"},
		{args: "top pods", want: []string{"web", "120m", "80Mi"}, absent: []string{"stale", "partial", "offline"}},
		{args: "top pods -A", want: []string{"default", "web"}},
		{args: "top pods --containers", want: []string{"app", "100m", "64Mi", "sidecar", "20m", "16Mi"}},
		{args: "top pods -l pod=web", want: []string{"web"}},
		{args: "top pod web", want: []string{"120m"}},
		{args: "top pod offline", failed: "node edge-2 is not connected"},
		{args: "get pods.v1beta1.metrics.k8s.io", want: []string{"NAME", "CPU", "MEMORY", "WINDOW", "web", "120m", "80Mi", "10s"}},
		{args: "get nodes.v1beta1.metrics.k8s.io", want: []string{"edge-1", "250m", "512Mi"}, absent: []string{"edge-2", "edge-3"}},
		{args: "get pods.v1beta1.metrics.k8s.io --field-selector metadata.name=web", want: []string{"web"}},
		{args: "get --raw /apis/metrics.k8s.io/v1beta1/nodes/edge-1", want: []string{`"cpu":"250m"`, `"memory":"512Mi"`, `"site":"site-1"`}},
	} {
		out, failed := p.Kubectl(t, strings.Fields(tc.args)...)
		out = strings.Join(strings.Fields(out), " ")
		if tc.failed != "" && strings.Contains(failed, tc.failed) {
			continue
		}
		if failed != tc.failed {
			t.Errorf("kubectl %s: %q; want %q", tc.args, failed, tc.failed)
		}
		for _, want := range tc.want {
			if !strings.Contains(out, want) {
				t.Errorf("kubectl %s: no %q in %q", tc.args, want, out)
			}
		}
		for _, absent := range tc.absent {
			if strings.Contains(out, absent) {
				t.Errorf("kubectl %s: %q in %q", tc.args, absent, out)
			}
		}
	}

	t.Run("rights", func(t *testing.T) {
		cfg := rest.CopyConfig(p.Admin)
		cfg.Impersonate = rest.ImpersonationConfig{UserName: "bob"}
		bob, err := metricsclient.NewForConfig(cfg)
		if err != nil {
			t.Fatal(err)
		}
		list := func() error {
			_, err := bob.MetricsV1beta1().PodMetricses("default").List(t.Context(), metav1.ListOptions{})
			return err
		}
		if err := list(); !apierrors.IsForbidden(err) {
			t.Errorf("bob, who may nothing: %v", err)
		}
		_, err = p.Client.RbacV1().RoleBindings("default").Create(t.Context(), &rbacv1.RoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: "bob"},
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "view"},
			Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: "bob"}},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		planetest.Await(t, "bob to read with the view role", list)
		if _, err := bob.MetricsV1beta1().NodeMetricses().List(t.Context(), metav1.ListOptions{}); !apierrors.IsForbidden(err) {
			t.Errorf("bob, who may view one namespace, reads nodes: %v", err)
		}
	})
}

func addNode(t *testing.T, p *planetest.Plane, name string, labels map[string]string) {
	t.Helper()
	_, err := p.Client.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	status := `{"status":{"allocatable":{"cpu":"4","memory":"4Gi"},"capacity":{"cpu":"4","memory":"4Gi"}}}`
	if _, err := p.Client.CoreV1().Nodes().PatchStatus(t.Context(), name, []byte(status)); err != nil {
		t.Fatal(err)
	}
}

func addPod(t *testing.T, p *planetest.Plane, name, node string, containers ...string) *corev1.Pod {
	t.Helper()
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"pod": name}}, Spec: corev1.PodSpec{NodeName: node}}
	var statuses []string
	for _, c := range containers {
		pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{Name: c, Image: "example.invalid/c:1"})
		statuses = append(statuses, fmt.Sprintf(`{"name":%q,"image":"c","imageID":"c","ready":true,"restartCount":0,"state":{"running":{}}}`, c))
	}
	pod, err := p.Client.CoreV1().Pods("default").Create(t.Context(), pod, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	status := fmt.Sprintf(`{"status":{"phase":"Running","containerStatuses":[%s]}}`, strings.Join(statuses, ","))
	if _, err := p.Client.CoreV1().Pods("default").Patch(t.Context(), name, types.MergePatchType, []byte(status), metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
	return pod
}
