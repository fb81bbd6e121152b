package edges

import (
	"context"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/skerry-io/skerry/cloudhub/presence"
)

// leaseRig is an Edges whose Leases are renewed in virtual time; its nodes are
// entered without a tunnel, as ones that are heard all the time.
func leaseRig(t *testing.T) (*Edges, *fake.Clientset, *presences) {
	t.Helper()
	client, told := fake.NewClientset(), &presences{}
	e, err := New(Config{Registry: &registry{}, Feed: &syncer{}, Upstream: &relay{}, Presence: told, Client: client})
	must(t, err)
	return e, client, told
}

func (e *Edges) enter(names ...string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, name := range names {
		e.nodes[name] = &edge{name: name, since: e.now(), pulse: func() (time.Time, time.Duration) { return e.now(), time.Minute }}
	}
}

func addNode(t *testing.T, client *fake.Clientset, name string) {
	t.Helper()
	_, err := client.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, UID: "uid-of-node"}}, metav1.CreateOptions{})
	must(t, err)
}

func TestLeasesOfConnectedNodesAreRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, client, _ := leaseRig(t)
		nodes := []string{"edge-1", "edge-2", "edge-3", "edge-4", "edge-5", "edge-6", "edge-7", "edge-8"}
		for _, n := range nodes {
			addNode(t, client, n)
		}
		age := func(name string) time.Duration {
			t.Helper()
			l, err := client.CoordinationV1().Leases(leaseNamespace).Get(t.Context(), name, metav1.GetOptions{})
			must(t, err)
			return time.Since(l.Spec.RenewTime.Time)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { e.renewLeases(ctx); close(done) }()
		e.enter(nodes...)
		time.Sleep(2 * time.Second)
		synctest.Wait()
		for _, n := range nodes {
			if a := age(n); a > 2*time.Second {
				t.Errorf("%s just connected, its Lease is %v old", n, a)
			}
		}
		oldest := time.Duration(0)
		for range 100 { // half a minute, looked at every 300 ms
			time.Sleep(300 * time.Millisecond)
			synctest.Wait()
			for _, n := range nodes {
				oldest = max(oldest, age(n))
			}
		}
		if oldest > renewEvery+time.Second {
			t.Errorf("a connected node's Lease was %v old", oldest)
		}
		e.mu.Lock()
		delete(e.nodes, "edge-1")
		e.mu.Unlock()
		client.ClearActions()
		time.Sleep(time.Minute)
		synctest.Wait()
		if a := age("edge-1"); a < 50*time.Second {
			t.Errorf("the Lease of a node that is away was renewed %v ago", a)
		}
		if a := age("edge-2"); a > renewEvery+time.Second {
			t.Errorf("edge-2's Lease is %v old", a)
		}
		if n := len(client.Actions()); n > 7*8 {
			t.Errorf("%d requests a minute for seven nodes", n)
		}
		cancel()
		<-done
	})
}

func TestALeaseIsItsNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, client, _ := leaseRig(t)
		at := time.Now()
		must(t, e.renewLease(t.Context(), "edge-1", at, time.Time{}))
		leases := client.CoordinationV1().Leases(leaseNamespace)
		if _, err := leases.Get(t.Context(), "edge-1", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			t.Fatalf("a Lease without a Node: %v", err)
		}
		addNode(t, client, "edge-1")
		must(t, e.renewLease(t.Context(), "edge-1", at, time.Time{}))
		l, err := leases.Get(t.Context(), "edge-1", metav1.GetOptions{})
		must(t, err)
		if o := l.OwnerReferences; len(o) != 1 || o[0].Kind != "Node" || o[0].Name != "edge-1" || o[0].UID != "uid-of-node" {
			t.Errorf("owners %+v", o)
		}
		if s := l.Spec; *s.HolderIdentity != "edge-1" || *s.LeaseDurationSeconds != 40 || !s.RenewTime.Time.Equal(at) {
			t.Errorf("spec %+v", s)
		}
		must(t, e.renewLease(t.Context(), "edge-1", at.Add(10*time.Second), time.Time{}))
		if l, err = leases.Get(t.Context(), "edge-1", metav1.GetOptions{}); err != nil || !l.Spec.RenewTime.Time.Equal(at.Add(10*time.Second)) {
			t.Errorf("renewed: %+v, %v", l.Spec, err)
		}
		if len(l.OwnerReferences) != 1 || *l.Spec.LeaseDurationSeconds != 40 {
			t.Errorf("a renewal changed more than the time: %+v", l)
		}
	})
}

// TestASilentNodesLeaseIsLeftAlone has a node whose tunnel is up and which is
// not heard when it promised to be: it may be dead for all that the hub knows.
func TestASilentNodesLeaseIsLeftAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, client, told := leaseRig(t)
		addNode(t, client, "edge-1")
		const promised = 50 * time.Second
		var last atomic.Pointer[time.Time]
		hear := func() { now := time.Now(); last.Store(&now) }
		hear()
		began := time.Now()
		e.mu.Lock()
		e.nodes["edge-1"] = &edge{name: "edge-1", since: began, pulse: func() (time.Time, time.Duration) { return *last.Load(), promised }}
		e.mu.Unlock()
		renewed := func() time.Duration {
			t.Helper()
			l, err := client.CoordinationV1().Leases(leaseNamespace).Get(t.Context(), "edge-1", metav1.GetOptions{})
			must(t, err)
			return l.Spec.RenewTime.Sub(*last.Load())
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { e.renewLeases(ctx); close(done) }()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if r := renewed(); r < promised-renewEvery || r > promised+late {
			t.Errorf("the Lease was last renewed %v after the node was last heard", r)
		}
		if got := told.all(); !slices.Equal(got, []string{"away edge-1 TunnelSilent"}) {
			t.Errorf("told %q", got)
		}
		if a := told.last["edge-1"]; !a.Heard.Equal(began) {
			t.Errorf("last heard %v, was %v", a.Heard, began)
		}
		hear()
		time.Sleep(renewEvery + time.Second)
		synctest.Wait()
		if r := renewed(); r < 0 {
			t.Errorf("the Lease of a node that is heard again was last renewed %v before that", -r)
		}
		if got := told.all(); len(got) != 2 || got[1] != "heard edge-1" {
			t.Errorf("told %q", got)
		}
		cancel()
		<-done
	})
}

func TestALeaseTellsTheLastSync(t *testing.T) {
	e, client, _ := leaseRig(t)
	addNode(t, client, "edge-1")
	at := time.Date(2026, 11, 24, 13, 0, 5, 0, time.UTC)
	for _, synced := range []time.Time{at, at.Add(time.Minute), {}} { // the first makes the Lease
		must(t, e.renewLease(t.Context(), "edge-1", at, synced))
	}
	l, err := client.CoordinationV1().Leases(leaseNamespace).Get(t.Context(), "edge-1", metav1.GetOptions{})
	must(t, err)
	if got := l.Annotations[presence.LastSync]; got != "2026-11-24T13:01:05Z" {
		t.Errorf("last sync %q", got)
	}
}
