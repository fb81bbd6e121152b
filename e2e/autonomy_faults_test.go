package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/skerry-io/skerry/e2e/cluster"
	"github.com/skerry-io/skerry/e2e/machine"
)

// withoutHub stops the hub until the function it returns starts it again and
// tells when.
func withoutHub(t *testing.T) (restore func() time.Time) {
	t.Helper()
	if err := world.hub.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if !world.hub.Running() {
			if err := world.hub.Start(context.Background()); err != nil {
				t.Error(err)
			}
		}
	})
	return func() time.Time {
		t.Helper()
		at := time.Now()
		if err := world.hub.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, n := range world.nodes {
			if n.Running() {
				connected(t, n)
			}
		}
		t.Logf("all nodes connected, Ready and all told %.1f s after the hub's start", time.Since(at).Seconds())
		return at
	}
}

// powerCycle takes the node's power and gives it back; edgecore is left off
// until the test starts it.
func powerCycle(t *testing.T, n *cluster.Node) {
	t.Helper()
	if err := n.PowerOff(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		select {
		case <-n.EdgecoreEnded():
			if err := n.Run(context.Background()); err != nil {
				t.Error(err)
			}
		default:
		}
	})
	if err := n.Machine.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// cut takes the node's link. The function it returns gives it back, once
// edgecore has seen the cut (else the same connection would go on), and waits
// for the node to be connected again.
func cut(t *testing.T, n *cluster.Node, how machine.LinkCut) (restore func()) {
	t.Helper()
	if err := n.CutLink(t.Context(), how); err != nil {
		t.Fatal(err)
	}
	isCut := true
	t.Cleanup(func() {
		if isCut {
			if err := n.RestoreLink(context.Background()); err != nil {
				t.Error(err)
			}
		}
	})
	return func() {
		t.Helper()
		eventually(t, time.Minute, n.Name()+" to see the cut", func(ctx context.Context) (bool, string) {
			st, err := n.Status(ctx)
			return err == nil && !st.Connected, fmt.Sprintf("%+v %v", st, err)
		})
		if err := n.RestoreLink(t.Context()); err != nil {
			t.Fatal(err)
		}
		isCut = false
		since := time.Now()
		connected(t, n)
		t.Logf("connected, Ready and all told %.1f s after the link was back", time.Since(since).Seconds())
	}
}

// kill signals a pod's only container, behind the kubelet's back.
func kill(t *testing.T, n *cluster.Node, p *corev1.Pod, signal string) {
	t.Helper()
	_, id, _ := strings.Cut(p.Status.ContainerStatuses[0].ContainerID, "://")
	if _, err := n.Machine.Run(t.Context(), "ctr", "-n", "k8s.io", "tasks", "kill", "-s", signal, id); err != nil {
		t.Fatal(err)
	}
}
