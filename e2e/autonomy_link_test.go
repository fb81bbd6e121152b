package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/skerry-io/skerry/e2e/cluster"
	"github.com/skerry-io/skerry/e2e/machine"
	"github.com/skerry-io/skerry/e2e/netem"
)

// shape makes a node's link bad. The function it returns makes it good again,
// and tells when.
func shape(t *testing.T, n *cluster.Node, up, down netem.Shape) (restore func() time.Time) {
	t.Helper()
	if err := n.ShapeLink(t.Context(), up, down, 1); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.RestoreLink(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return func() time.Time {
		t.Helper()
		carried, lost := n.LinkStats()
		t.Logf("%s: %d packets carried, %d lost", n.Name(), carried, lost)
		if err := n.RestoreLink(t.Context()); err != nil {
			t.Fatal(err)
		}
		return time.Now()
	}
}

// eachNode runs a scenario on both nodes at once, as most of it is waiting.
func eachNode(t *testing.T, name func(i int) string, scenario func(t *testing.T, i int, n *cluster.Node)) {
	for i, n := range world.nodes {
		t.Run(name(i), func(t *testing.T) {
			t.Parallel()
			scenario(t, i, n)
		})
	}
}

// untouched runs a pod, and returns a function that checks that it runs on as
// it did.
func untouched(t *testing.T, n *cluster.Node, ns, name string) (check func()) {
	t.Helper()
	applyIn(t, ns, asPod(name, n.Name()))
	before := podIdentity(ready(t, ns, name))
	ran := mustRun(t, inspect(t, n), ns)[name]
	return func() {
		t.Helper()
		if now := mustRun(t, inspect(t, n), ns)[name]; now != ran {
			t.Errorf("the pod on %s ran as %+v and runs as %+v", n.Name(), ran, now)
		}
		if after := podIdentity(ready(t, ns, name)); after != before {
			t.Errorf("the pod changed in the cloud:\nbefore %s\nafter  %s", before, after)
		}
	}
}

// TestABadLink has links that carry, though badly: changes get through both
// ways, also for an edgecore that starts on such a link.
func TestABadLink(t *testing.T) {
	bad := []struct {
		name  string
		shape netem.Shape
	}{
		{"30 % of the packets lost", netem.Shape{Loss: 0.3}},
		{"2 s each way", netem.Shape{Delay: 2 * time.Second}},
	}
	eachNode(t, func(i int) string { return bad[i].name }, func(t *testing.T, i int, n *cluster.Node) {
		ns := namespace(t)
		check := untouched(t, n, ns, "untouched")
		restore := shape(t, n, bad[i].shape, bad[i].shape)
		stop := observe(t, n)
		applyIn(t, ns, asPod("made", n.Name()))
		began := time.Now()
		awaitPod(t, ns, "made", 2*time.Minute, "to be Ready by way of a bad link", isReady)
		t.Logf("a pod made on the bad link was Ready in the cloud after %.1f s", time.Since(began).Seconds())
		stop()

		if err := n.KillEdgecore(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := n.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
		began = time.Now()
		eventually(t, 2*time.Minute, "edgecore to connect by way of a bad link", func(ctx context.Context) (bool, string) {
			st, err := n.StatusBySocket(ctx)
			return err == nil && st.Connected && st.LastSync.After(began), fmt.Sprintf("%+v %v", st, err)
		})
		t.Logf("an edgecore that started on the bad link was in step after %.1f s", time.Since(began).Seconds())
		backInSync(t, n, restore())
		check()
	})
}

// TestAFlappingLink takes and gives the carrier every few seconds.
func TestAFlappingLink(t *testing.T) {
	eachNode(t, func(i int) string { return []string{"seconds", "quick"}[i] }, func(t *testing.T, i int, n *cluster.Node) {
		longest := []time.Duration{6 * time.Second, 1500 * time.Millisecond}[i]
		ns := namespace(t)
		check := untouched(t, n, ns, "untouched")
		t.Cleanup(func() {
			if err := n.RestoreLink(context.Background()); err != nil {
				t.Error(err)
			}
		})
		stop := observe(t, n)
		r := rand.New(rand.NewPCG(1, uint64(i)))
		wait := func() {
			timer := time.NewTimer(longest/4 + time.Duration(r.Int64N(int64(longest*3/4))))
			defer timer.Stop()
			<-timer.C
		}
		applyIn(t, ns, asPod("made", n.Name()))
		flaps := 0
		for end := time.Now().Add(25 * time.Second); time.Now().Before(end); flaps++ {
			if err := n.CutLink(t.Context(), machine.LinkDown); err != nil {
				t.Fatal(err)
			}
			wait()
			if err := n.RestoreLink(t.Context()); err != nil {
				t.Fatal(err)
			}
			wait()
		}
		stop()
		t.Logf("%s: the link was down %d times", n.Name(), flaps)
		backInSync(t, n, time.Now())
		ready(t, ns, "made")
		check()
	})
}

// TestAHalfOpenLink carries packets one way only. The node has to notice, by
// what it has to tell and nobody confirms, and to come back.
func TestAHalfOpenLink(t *testing.T) {
	dead := netem.Shape{Loss: 1}
	eachNode(t, func(i int) string { return []string{"the hub hears nothing", "the node hears nothing"}[i] }, func(t *testing.T, i int, n *cluster.Node) {
		ns := namespace(t)
		check := untouched(t, n, ns, "untouched")
		applyIn(t, ns, asPod("crashes", n.Name()))
		crashes := ready(t, ns, "crashes")
		restore := shape(t, n, []netem.Shape{dead, {}}[i], []netem.Shape{{}, dead}[i])
		stop := observe(t, n)
		began := time.Now()
		kill(t, n, crashes, "SIGKILL")
		eventually(t, time.Minute, n.Name()+" to notice", func(ctx context.Context) (bool, string) {
			st, err := n.StatusBySocket(ctx)
			return err == nil && !st.Connected, fmt.Sprintf("%+v %v", st, err)
		})
		t.Logf("%s noticed after %.1f s", n.Name(), time.Since(began).Seconds())
		stop()
		backInSync(t, n, restore())
		check()
		if p := ready(t, ns, "crashes"); p.Status.ContainerStatuses[0].RestartCount != 1 {
			t.Errorf("crashes: %s", podIdentity(p))
		}
	})
}
