package presence

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// writer writes into the fake cluster, and keeps what it wrote.
type writer struct {
	client *fake.Clientset
	mu     sync.Mutex
	wrote  []string // NAME=STATUS
	at     []time.Time
	fail   int // so many writes
}

func (w *writer) SetNodeCondition(ctx context.Context, name string, uid types.UID, c corev1.NodeCondition) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.fail > 0 {
		w.fail--
		return errors.New("the API server is away")
	}
	n, err := w.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	if n.UID != uid {
		return fmt.Errorf("UID %s, want %s", n.UID, uid)
	}
	n = n.DeepCopy()
	if cur := Of(n); cur != nil {
		*cur = c
	} else {
		n.Status.Conditions = append(n.Status.Conditions, c)
	}
	if _, err = w.client.CoreV1().Nodes().UpdateStatus(ctx, n, metav1.UpdateOptions{}); err != nil {
		return err
	}
	w.wrote = append(w.wrote, name+"="+string(c.Status))
	w.at = append(w.at, time.Now())
	return nil
}

func (w *writer) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.wrote)
}

// rig is a Presence in virtual time.
type rig struct {
	*Presence
	t      *testing.T
	client *fake.Clientset
	w      *writer
	stop   func()
}

// run has test run against hub after hub, all of one cluster, in one bubble.
func run(t *testing.T, nodes int, test func(r *rig, restart func() *rig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		client := fake.NewClientset()
		for i := range nodes {
			_, err := client.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name(i), UID: types.UID("uid-of-" + name(i))}}, metav1.CreateOptions{})
			must(t, err)
		}
		var r *rig
		start := func() *rig {
			if r != nil {
				r.stop()
			}
			r = start(t, client)
			return r
		}
		start()
		test(r, start)
		r.stop()
	})
}

func start(t *testing.T, client *fake.Clientset) *rig {
	t.Helper()
	factory := informers.NewSharedInformerFactory(client, 0)
	w := &writer{client: client}
	known := make(chan struct{})
	close(known)
	p, err := New(Config{
		Client: client, Writer: w, Nodes: factory.Core().V1().Nodes().Informer(), Known: known,
		Enrolled: func(node string) bool { return strings.HasPrefix(node, "edge-") },
	})
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	factory.Start(ctx.Done())
	go func() { done <- p.Run(ctx) }()
	r := &rig{Presence: p, t: t, client: client, w: w}
	r.stop = func() {
		cancel()
		must(t, <-done)
		factory.Shutdown()
	}
	r.pass(time.Second)
	return r
}

func name(i int) string { return fmt.Sprintf("edge-%d", i) }

func (r *rig) pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func (r *rig) condition(node string) *corev1.NodeCondition {
	r.t.Helper()
	n, err := r.client.CoreV1().Nodes().Get(r.t.Context(), node, metav1.GetOptions{})
	must(r.t, err)
	return Of(n)
}

// want checks the condition, and returns its message.
func (r *rig) want(node string, status corev1.ConditionStatus, reason string, since time.Time) string {
	r.t.Helper()
	c := r.condition(node)
	if c == nil {
		r.t.Fatalf("%s has no condition, want %s", node, status)
	}
	if c.Status != status || c.Reason != reason || !c.LastTransitionTime.Time.Equal(since.Truncate(time.Second)) && !c.LastTransitionTime.Time.Equal(since) {
		r.t.Errorf("%s: %s %s since %v, want %s %s since %v", node, c.Status, c.Reason, c.LastTransitionTime, status, reason, since)
	}
	return c.Message
}

func (r *rig) wrote(what string, n int) {
	r.t.Helper()
	if got := r.w.count(); got != n {
		r.t.Errorf("%s: %d writes, want %d: %v", what, got, n, r.w.wrote)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestComingAndGoing(t *testing.T) {
	run(t, 1, func(r *rig, _ func() *rig) {
		first := time.Now()
		r.Greeted("edge-0", edgeapi.Hello{Outbox: 5})
		r.InStep("edge-0", true)
		r.pass(time.Second)
		if m := r.want("edge-0", corev1.ConditionTrue, ReasonUp, first); !strings.Contains(m, "; 5 changes were waiting") || strings.Contains(m, "away") {
			t.Error(m)
		}
		r.Wrote("edge-0")
		r.Wrote("edge-0")
		r.pass(time.Hour)
		r.wrote("an hour without news", 1)

		left := time.Now()
		r.Away("edge-0", Absence{Heard: left.Add(-58 * time.Second), Reason: ReasonSilent, Message: "nothing heard\nfor 58s"})
		r.pass(tellAfter - time.Second)
		r.wrote("before it is told", 1)
		r.pass(2 * time.Second)
		m := r.want("edge-0", corev1.ConditionFalse, ReasonSilent, left.Add(-58*time.Second))
		at := left.Add(-58 * time.Second).UTC().Format(time.RFC3339)
		if want := "last heard " + at + " (nothing heard for 58s); last in step " + at + "; 3 changes were still to be sent"; m != want {
			t.Errorf("%q, want %q", m, want)
		}
		r.pass(time.Hour)
		r.wrote("an hour of absence", 2)

		back := time.Now()
		r.Greeted("edge-0", edgeapi.Hello{Outbox: 37, EventsDropped: 1})
		r.pass(time.Second)
		m = r.want("edge-0", corev1.ConditionTrue, ReasonUp, back)
		if !strings.Contains(m, "; was away 1h1m9s; 37 changes were waiting on the node; the node dropped 1 Event") {
			t.Error(m)
		}
		if s := r.Stats(); s.Writes != 3 || s.Failed != 0 {
			t.Errorf("%+v", s)
		}
	})
}

// TestOutOfStep has a node that goes with a delta unacknowledged: the last sync
// is when it was sent.
func TestOutOfStep(t *testing.T) {
	run(t, 1, func(r *rig, _ func() *rig) {
		r.Greeted("edge-0", edgeapi.Hello{})
		r.pass(time.Minute)
		if s := r.LastSync("edge-0", time.Now()); !s.IsZero() {
			t.Errorf("last sync before the first: %v", s)
		}
		r.InStep("edge-0", true)
		r.pass(time.Minute)
		heard := time.Now().Add(-10 * time.Second)
		if s := r.LastSync("edge-0", heard); !s.Equal(heard) {
			t.Errorf("last sync of a node in step: %v, heard %v", s, heard)
		}
		sent := time.Now()
		r.InStep("edge-0", false)
		r.pass(time.Minute)
		r.Away("edge-0", Absence{Heard: sent.Add(5 * time.Second), Reason: ReasonBroken})
		r.pass(time.Minute)
		if m := r.want("edge-0", corev1.ConditionFalse, ReasonBroken, sent.Add(5*time.Second)); !strings.HasSuffix(m, "; last in step "+stamp(sent)) {
			t.Error(m)
		}
		if s := r.LastSync("edge-0", heard); !s.Equal(sent) {
			t.Errorf("last sync %v, want %v", s, sent)
		}
	})
}

func TestFlappingIsBounded(t *testing.T) {
	for _, tc := range []struct {
		up, down time.Duration
		most     int // writes in ten minutes
	}{
		{3 * time.Second, 4 * time.Second, 1}, // the first
		{time.Second, 9 * time.Second, 1},
		{time.Second, 11 * time.Second, 41},
		{11 * time.Second, 11 * time.Second, 41},
		{time.Minute, time.Minute, 11},
	} {
		t.Run(fmt.Sprint(tc.up, " up, ", tc.down, " down"), func(t *testing.T) {
			run(t, 1, func(r *rig, _ func() *rig) {
				for end := time.Now().Add(10 * time.Minute); time.Now().Before(end); {
					r.Greeted("edge-0", edgeapi.Hello{})
					r.pass(tc.up)
					r.Away("edge-0", Absence{Heard: time.Now(), Reason: ReasonBroken})
					r.pass(tc.down)
				}
				if n := r.w.count(); n > tc.most || n < 1 {
					t.Errorf("%d writes in ten minutes, at most %d are allowed", n, tc.most)
				}
				for i := 1; i < len(r.w.at); i++ {
					if gap := r.w.at[i].Sub(r.w.at[i-1]); gap < writeGap {
						t.Errorf("two writes within %v", gap)
					}
				}
				// Whatever was left out: in the end the truth stands.
				last := time.Now()
				r.Greeted("edge-0", edgeapi.Hello{})
				r.Away("edge-0", Absence{Heard: last, Reason: ReasonBroken})
				r.pass(time.Minute)
				r.want("edge-0", corev1.ConditionFalse, ReasonBroken, last)
			})
		})
	}
}

func TestManyAtOnce(t *testing.T) {
	const many = 10 * writesPerSecond // the fake cluster is slow
	run(t, many, func(r *rig, restart func() *rig) {
		for i := range many {
			r.Greeted(name(i), edgeapi.Hello{})
		}
		r.pass(time.Second)
		if n := r.w.count(); n > 2*writesPerSecond+1 {
			t.Errorf("%d writes in a second", n)
		}
		r.pass(many / writesPerSecond * time.Second)
		r.wrote("all connected", many)
		lost := time.Now()
		for i := range many {
			r.Away(name(i), Absence{Heard: lost, Reason: ReasonBroken})
		}
		r.pass(tellAfter + time.Second)
		if n := r.w.count() - many; n > 2*writesPerSecond+1 || n == 0 {
			t.Errorf("%d writes in the first second", n)
		}
		r.pass(many / writesPerSecond * time.Second)
		r.wrote("all lost", 2*many)
		for i := range many {
			r.want(name(i), corev1.ConditionFalse, ReasonBroken, lost)
			r.Greeted(name(i), edgeapi.Hello{})
		}
		r.pass(2 * time.Minute)

		r = restart()
		for i := range many {
			r.Greeted(name(i), edgeapi.Hello{})
		}
		r.pass(10 * time.Minute)
		r.wrote("a restart of the hub, and all come back", 0)
	})
}

func TestRestartOfTheHub(t *testing.T) {
	run(t, 4, func(r *rig, restart func() *rig) {
		since := time.Now()
		for i := range 3 {
			r.Greeted(name(i), edgeapi.Hello{})
		}
		r.pass(time.Minute)
		gone := time.Now()
		r.Away("edge-2", Absence{Heard: gone, Reason: ReasonClosed})
		r.pass(time.Minute)
		renewed, synced := metav1.NewMicroTime(time.Now()), time.Now().Add(-7*time.Second)
		_, err := r.client.CoordinationV1().Leases(corev1.NamespaceNodeLease).Create(t.Context(), &coordinationv1.Lease{
			ObjectMeta: metav1.ObjectMeta{Name: "edge-1", Namespace: corev1.NamespaceNodeLease, Annotations: map[string]string{LastSync: stamp(synced)}},
			Spec:       coordinationv1.LeaseSpec{RenewTime: &renewed},
		}, metav1.CreateOptions{})
		must(t, err)

		r = restart()
		began := time.Now().Add(-time.Second)
		r.pass(time.Minute)
		r.Greeted("edge-0", edgeapi.Hello{}) // in time
		r.pass(grace - time.Minute - 5*time.Second)
		r.wrote("within the grace", 0)
		r.pass(10 * time.Second)
		r.want("edge-0", corev1.ConditionTrue, ReasonUp, since)
		if m := r.want("edge-1", corev1.ConditionFalse, ReasonRestart, renewed.Time); !strings.HasSuffix(m, "(not back since the hub's start "+stamp(began)+"); last in step "+stamp(synced)) {
			t.Error(m)
		}
		r.want("edge-2", corev1.ConditionFalse, ReasonClosed, gone) // as it was
		if c := r.condition("edge-3"); c == nil || c.Status != corev1.ConditionFalse || c.Reason != ReasonRestart {
			t.Errorf("a node that no hub has seen: %+v", c)
		}
		r.wrote("after the grace", 1) // edge-3's was the first hub's
	})
}

// TestSomebodyElsesNode has a Lease that another replica of the hub renews.
func TestSomebodyElsesNode(t *testing.T) {
	run(t, 1, func(r *rig, restart func() *rig) {
		r.Greeted("edge-0", edgeapi.Hello{})
		r.pass(time.Minute)
		now := metav1.NewMicroTime(time.Now())
		leases := r.client.CoordinationV1().Leases(corev1.NamespaceNodeLease)
		l, err := leases.Create(t.Context(), &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: "edge-0"}, Spec: coordinationv1.LeaseSpec{RenewTime: &now}}, metav1.CreateOptions{})
		must(t, err)
		r = restart()
		for range 60 {
			r.pass(10 * time.Second)
			now = metav1.NewMicroTime(time.Now())
			l.Spec.RenewTime = &now
			l, err = leases.Update(t.Context(), l, metav1.UpdateOptions{})
			must(t, err)
		}
		r.wrote("while its Lease is renewed", 0)
		r.pass(2 * time.Minute)
		r.want("edge-0", corev1.ConditionFalse, ReasonRestart, now.Time)
	})
}

func TestNodesThatAreNoEdgeNodes(t *testing.T) {
	run(t, 0, func(r *rig, _ func() *rig) {
		_, err := r.client.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "plain"}}, metav1.CreateOptions{})
		must(t, err)
		r.pass(time.Hour)
		if c := r.condition("plain"); c != nil {
			t.Errorf("%+v", c)
		}
	})
}

// TestANodeIsRegisteredAfterItsGreeting, is deleted, and made anew.
func TestANodeIsRegisteredAfterItsGreeting(t *testing.T) {
	run(t, 0, func(r *rig, _ func() *rig) {
		since := time.Now()
		r.Greeted("edge-0", edgeapi.Hello{})
		r.pass(time.Minute)
		for _, uid := range []types.UID{"1", "2"} {
			_, err := r.client.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "edge-0", UID: uid}}, metav1.CreateOptions{})
			must(t, err)
			r.pass(time.Second)
			r.want("edge-0", corev1.ConditionTrue, ReasonUp, since)
			must(t, r.client.CoreV1().Nodes().Delete(t.Context(), "edge-0", metav1.DeleteOptions{}))
			r.pass(time.Second)
		}
		r.Away("edge-0", Absence{Heard: time.Now(), Reason: ReasonClosed})
		r.pass(time.Hour)
		r.mu.Lock()
		defer r.mu.Unlock()
		if len(r.nodes) != 0 {
			t.Error("a node that is gone is kept in mind")
		}
	})
}

func TestFailedWritesAreTriedAgain(t *testing.T) {
	run(t, 1, func(r *rig, _ func() *rig) {
		r.w.fail = 5
		since := time.Now()
		r.Greeted("edge-0", edgeapi.Hello{})
		r.pass(time.Minute)
		r.want("edge-0", corev1.ConditionTrue, ReasonUp, since)
		if s := r.Stats(); s.Failed != 5 || s.Writes != 1 {
			t.Errorf("%+v", s)
		}
	})
}

func TestAwayWithoutAGreetingIsNoNews(t *testing.T) {
	run(t, 1, func(r *rig, _ func() *rig) {
		r.Greeted("edge-0", edgeapi.Hello{})
		r.pass(time.Minute)
		left := time.Now()
		r.Away("edge-0", Absence{Heard: left, Reason: ReasonBroken})
		for range 100 { // tunnels that come up and never speak
			r.pass(10 * time.Second)
			r.Away("edge-0", Absence{Heard: time.Now(), Reason: ReasonBroken})
		}
		r.want("edge-0", corev1.ConditionFalse, ReasonBroken, left)
		r.wrote("without a greeting", 2)
		r.Heard("edge-0") // of a node that was silent on its tunnel
		heard := time.Now()
		r.pass(time.Second)
		r.want("edge-0", corev1.ConditionTrue, ReasonUp, heard)
	})
}
