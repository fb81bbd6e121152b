package tolerations

import (
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"github.com/skerry-io/skerry/cloudhub/controlplane"
	"github.com/skerry-io/skerry/cloudhub/controlplane/planetest"
	"github.com/skerry-io/skerry/cloudhub/feed"
)

func TestMain(m *testing.M) { os.Exit(planetest.Main(m)) }

// limit is the plane's default, in seconds; its controller manager takes a node
// for silent after 4 s.
const limit = 3

type rig struct {
	t      *testing.T
	admin  kubernetes.Interface
	hub    kubernetes.Interface
	mu     sync.Mutex
	edges  map[string]bool // enrolled
	keeper *Keeper
}

// newRig starts a plane and Nodes of which those named alive renew their Lease.
func newRig(t *testing.T, alive ...string) *rig {
	t.Helper()
	p := planetest.Start(t, controlplane.Config{
		DefaultTolerationSeconds: limit,
		ControllerManagerArgs:    []string{"--node-monitor-grace-period=4s", "--node-monitor-period=500ms", "--node-startup-grace-period=4s"},
	}, nil)
	r := &rig{t: t, admin: p.Client, hub: kubernetes.NewForConfigOrDie(p.HubClientConfig()), edges: map[string]bool{}}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(500 * time.Millisecond)
		defer tick.Stop()
		for ctx.Err() == nil {
			for _, name := range alive {
				r.renew(ctx, name)
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return r
}

func (r *rig) renew(ctx context.Context, name string) {
	now := metav1.NowMicro()
	leases := r.admin.CoordinationV1().Leases(corev1.NamespaceNodeLease)
	l, err := leases.Get(ctx, name, metav1.GetOptions{})
	if err == nil {
		l.Spec.RenewTime = &now
		_, err = leases.Update(ctx, l, metav1.UpdateOptions{})
	} else {
		_, err = leases.Create(ctx, &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: coordinationv1.LeaseSpec{HolderIdentity: &name, RenewTime: &now}}, metav1.CreateOptions{})
	}
	if err != nil && ctx.Err() == nil {
		r.t.Errorf("lease of %s: %v", name, err)
	}
}

func (r *rig) enrol(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.edges[name] = true
}

// start runs the feed, whose informers are shared, and a keeper.
func (r *rig) start() {
	r.t.Helper()
	objects, err := feed.New(feed.Config{Client: r.hub, Agent: "test"})
	must(r.t, err)
	known := make(chan struct{})
	close(known)
	r.keeper, err = New(Config{
		Client: r.hub, Pods: objects.Pods(), Nodes: objects.Nodes(), NodeIndex: feed.ByNode, Known: known,
		Enrolled: func(node string) bool {
			r.mu.Lock()
			defer r.mu.Unlock()
			return r.edges[node]
		},
		Seconds: limit, Log: planetest.Log(),
	})
	must(r.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 2)
	go func() { done <- objects.Run(ctx) }()
	go func() { done <- r.keeper.Run(ctx) }()
	r.t.Cleanup(func() {
		cancel()
		for range 2 {
			must(r.t, <-done)
		}
	})
}

func (r *rig) node(name string) {
	r.t.Helper()
	_, err := r.admin.CoreV1().Nodes().Create(r.t.Context(), &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{{
			Type: corev1.NodeReady, Status: corev1.ConditionTrue, LastHeartbeatTime: metav1.Now(), LastTransitionTime: metav1.Now(),
		}}},
	}, metav1.CreateOptions{})
	must(r.t, err)
}

func (r *rig) namespace(name, evict string) {
	r.t.Helper()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
	if evict != "" {
		ns.Annotations = map[string]string{Evict: evict}
	}
	_, err := r.admin.CoreV1().Namespaces().Create(r.t.Context(), ns, metav1.CreateOptions{})
	must(r.t, err)
	planetest.Await(r.t, "the service account of "+name, func() error {
		_, err := r.admin.CoreV1().ServiceAccounts(name).Get(r.t.Context(), "default", metav1.GetOptions{})
		return err
	})
}

// pod makes a pod that is bound at once. evict is its annotation.
func (r *rig) pod(ns, name, node, evict string, tolerations ...corev1.Toleration) {
	r.t.Helper()
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       corev1.PodSpec{NodeName: node, Tolerations: tolerations, Containers: []corev1.Container{{Name: "c", Image: "none"}}},
	}
	if evict != "" {
		p.Annotations = map[string]string{Evict: evict}
	}
	_, err := r.admin.CoreV1().Pods(ns).Create(r.t.Context(), p, metav1.CreateOptions{})
	must(r.t, err)
}

func (r *rig) annotate(node, evict string) {
	r.t.Helper()
	value := "null"
	if evict != "" {
		value = fmt.Sprintf("%q", evict)
	}
	_, err := r.admin.CoreV1().Nodes().Patch(r.t.Context(), node, types.MergePatchType,
		[]byte(`{"metadata":{"annotations":{"`+Evict+`":`+value+`}}}`), metav1.PatchOptions{})
	must(r.t, err)
}

// seconds tells how long each pod bears each of the two taints, as in "3 ∞", and
// marks with ! a pod that is being evicted.
func (r *rig) seconds() map[string]string {
	r.t.Helper()
	list, err := r.admin.CoreV1().Pods("").List(r.t.Context(), metav1.ListOptions{})
	must(r.t, err)
	out := map[string]string{}
	for _, p := range list.Items {
		var each []string
		for _, s := range silence {
			switch t := counts(p.Spec.Tolerations, s.key); {
			case t == nil:
				each = append(each, "none")
			case t.TolerationSeconds == nil:
				each = append(each, "∞")
			default:
				each = append(each, fmt.Sprint(*t.TolerationSeconds))
			}
		}
		if p.DeletionTimestamp != nil {
			each = append(each, "!")
		}
		out[p.Name] = strings.Join(each, " ")
	}
	return out
}

func (r *rig) await(what string, want map[string]string) {
	r.t.Helper()
	planetest.Await(r.t, what, func() error {
		got := r.seconds()
		for _, name := range slices.Sorted(maps.Keys(want)) {
			if got[name] != want[name] {
				return fmt.Errorf("%s is %q, want %q; all are %v", name, got[name], want[name], got)
			}
		}
		return nil
	})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestPodsOfASilentNode has a real node-lifecycle controller and a real
// taint-eviction controller against it, and pods that were bound before the
// keeper came.
func TestPodsOfASilentNode(t *testing.T) {
	r := newRig(t, "edge-2")
	for _, n := range []string{"edge-1", "edge-2", "plain"} {
		r.node(n)
	}
	r.enrol("edge-1")
	r.enrol("edge-2")
	r.namespace("leaves", "true")
	r.pod("default", "kept", "edge-1", "")
	r.pod("default", "opted-out", "edge-1", "true")
	r.pod("default", "brief", "edge-1", "", given(corev1.TaintNodeUnreachable, 1))
	r.pod("default", "patient", "edge-1", "", given(corev1.TaintNodeUnreachable, 3600))
	r.pod("leaves", "with-its-namespace", "edge-1", "")
	r.pod("leaves", "against-its-namespace", "edge-1", "false")
	r.pod("default", "elsewhere", "plain", "")
	r.start()

	r.await("the limits to be cleared, and the silent nodes' pods to be evicted where wished", map[string]string{
		"kept": "∞ ∞", "patient": "∞ 3600", "against-its-namespace": "∞ ∞",
		"opted-out": "3 3 !", "brief": "∞ 1 !", "with-its-namespace": "3 3 !", "elsewhere": "3 3 !",
	})
	// The Node is silent and says so.
	node, err := r.admin.CoreV1().Nodes().Get(t.Context(), "edge-1", metav1.GetOptions{})
	must(t, err)
	if !slices.ContainsFunc(node.Spec.Taints, func(t corev1.Taint) bool {
		return t.Key == corev1.TaintNodeUnreachable && t.Effect == corev1.TaintEffectNoExecute
	}) {
		t.Errorf("taints of the silent node: %v", node.Spec.Taints)
	}
	// Given up while it is silent: what stays by its own word stays.
	r.annotate("edge-1", "true")
	r.await("the pods to leave the node that was given up", map[string]string{
		"kept": "3 3 !", "patient": "3 3600", "against-its-namespace": "∞ ∞",
	})
	if s := r.keeper.Stats(); s.Kept != 4 || s.Released != 2 || s.Failed != 0 {
		t.Errorf("%+v, want 4 kept, 2 released", s)
	}
}

func TestWhoJoinsAndWhoChangesHisMind(t *testing.T) {
	r := newRig(t, "edge-1", "new")
	r.node("edge-1")
	r.node("new")
	r.enrol("edge-1")
	r.start()
	r.namespace("team", "")
	r.pod("team", "a", "edge-1", "")
	r.pod("team", "b", "new", "")
	r.await("the pod of an edge node to be kept", map[string]string{"a": "∞ ∞", "b": "3 3"})
	r.enrol("new")
	r.annotate("new", "false") // any change of a Node will do
	r.await("the pod of a node that joined later to be kept", map[string]string{"b": "∞ ∞"})

	r.annotate("edge-1", "true")
	r.await("a Node to opt out", map[string]string{"a": "3 3", "b": "∞ ∞"})
	r.annotate("edge-1", "")
	r.await("a Node to opt in", map[string]string{"a": "∞ ∞"})
	for _, turn := range [][2]string{{"true", "3 3"}, {"false", "∞ ∞"}} {
		evict, want := turn[0], turn[1]
		_, err := r.admin.CoreV1().Namespaces().Patch(t.Context(), "team", types.MergePatchType,
			[]byte(`{"metadata":{"annotations":{"`+Evict+`":"`+evict+`"}}}`), metav1.PatchOptions{})
		must(t, err)
		r.await("a namespace that says "+evict, map[string]string{"a": want, "b": want})
	}
	_, err := r.admin.CoreV1().Pods("team").Patch(t.Context(), "a", types.MergePatchType,
		[]byte(`{"metadata":{"annotations":{"`+Evict+`":"true"}}}`), metav1.PatchOptions{})
	must(t, err)
	r.await("a pod to opt out", map[string]string{"a": "3 3"})
	pod, err := r.admin.CoreV1().Pods("team").Get(t.Context(), "a", metav1.GetOptions{})
	must(t, err)
	if v, ok := pod.Annotations[Kept]; ok {
		t.Errorf("a pod that is not kept says %s: %q", Kept, v)
	}
}
