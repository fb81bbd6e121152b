package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/e2e/cluster"
	"github.com/skerry-io/skerry/e2e/machine"
)

// identity is what must not change about a pod that ran on.
func podIdentity(p *corev1.Pod) string {
	var b strings.Builder
	fmt.Fprintf(&b, "uid %s ip %s started %s", p.UID, p.Status.PodIP, p.Status.StartTime)
	for _, s := range p.Status.ContainerStatuses {
		fmt.Fprintf(&b, " %s %s restarts %d", s.Name, s.ContainerID, s.RestartCount)
	}
	return b.String()
}

func getPod(t *testing.T, ns, name string) *corev1.Pod {
	t.Helper()
	p, err := world.client.CoreV1().Pods(ns).Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// connected waits until the node has a tunnel, is Ready in the cloud, and has
// nothing left to tell.
func connected(t *testing.T, n *cluster.Node) {
	t.Helper()
	eventually(t, time.Minute, n.Name()+" to be connected", func(ctx context.Context) (bool, string) {
		st, err := n.Status(ctx)
		return err == nil && st.Connected && st.Synced && st.Outbox == 0, fmt.Sprintf("%+v %v", st, err)
	})
	if err := awaitNodeReady(t.Context(), world.client, n.Name()); err != nil {
		t.Fatal(err)
	}
}

// tasks lists the containers of a node, asked of containerd itself.
func tasks(t *testing.T, n *cluster.Node) (string, error) {
	t.Helper()
	out, err := n.Machine.Run(t.Context(), "ctr", "-a", "/run/containerd/containerd.sock", "-n", "k8s.io", "tasks", "ls")
	return string(out), err
}

// asPod turns web into a pod of another name on a node.
func asPod(name, node string) string {
	s := strings.ReplaceAll(web, "edge-1", node)
	return strings.Replace(s, "name: web, labels", "name: "+name+", labels", 1)
}

func TestEdgecoreRestartsLeavePodsAlone(t *testing.T) {
	n := world.nodes[0]
	ns := apply(t, web)
	before := podIdentity(ready(t, ns, "web"))
	for _, end := range []struct {
		name string
		do   func(context.Context) error
	}{{"SIGTERM", n.StopEdgecore}, {"SIGKILL", n.KillEdgecore}} {
		t.Run(end.name, func(t *testing.T) {
			if err := end.do(t.Context()); err != nil {
				t.Fatalf("edgecore ended badly: %v", err)
			}
			if out, err := tasks(t, n); err != nil || strings.Count(out, "RUNNING") < 2 {
				t.Errorf("containers stopped with edgecore: %v\n%s", err, out)
			}
			// Made while nobody is there to start it.
			name := "late-" + strings.ToLower(end.name)
			applyIn(t, ns, asPod(name, "edge-1"))
			if err := n.Run(t.Context()); err != nil {
				t.Fatal(err)
			}
			connected(t, n)
			ready(t, ns, name)
			if after := podIdentity(getPod(t, ns, "web")); after != before {
				t.Errorf("the pod changed:\nbefore %s\nafter  %s", before, after)
			}
			if out := kubectl(t, "exec", "-n", ns, "web", "--", "/bin/echo", "alive"); out != "alive\n" {
				t.Errorf("exec: %q", out)
			}
		})
	}
}

func TestHubRestartsLoseNothing(t *testing.T) {
	ns := apply(t, web, asPod("other", "edge-2"))
	before := podIdentity(ready(t, ns, "web"))
	ready(t, ns, "other")
	for i, end := range []struct {
		name string
		do   func(context.Context) error
	}{{"SIGTERM", world.hub.Stop}, {"SIGKILL", world.hub.Kill}} {
		t.Run(end.name, func(t *testing.T) {
			// Acknowledged a moment before the end.
			last := fmt.Sprintf("last-%d", i)
			if _, err := world.client.CoreV1().ConfigMaps(ns).Create(t.Context(),
				&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: last}, Data: map[string]string{"k": "v"}}, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			if err := end.do(ctx); err != nil {
				t.Errorf("the hub ended badly: %v", err)
			}
			for _, n := range world.nodes {
				eventually(t, 20*time.Second, n.Name()+" to see the cut", func(ctx context.Context) (bool, string) {
					st, err := n.Status(ctx)
					return err == nil && !st.Connected, fmt.Sprintf("%+v %v", st, err)
				})
			}
			ctx, cancel = context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if err := world.hub.Start(ctx); err != nil {
				t.Fatal(err)
			}
			for _, n := range world.nodes {
				connected(t, n)
			}
			if _, err := world.client.CoreV1().ConfigMaps(ns).Get(t.Context(), last, metav1.GetOptions{}); err != nil {
				t.Errorf("an acknowledged write is lost: %v", err)
			}
			if after := podIdentity(ready(t, ns, "web")); after != before {
				t.Errorf("the pod changed:\nbefore %s\nafter  %s", before, after)
			}
			kubectl(t, "logs", "-n", ns, "other")
		})
	}
}

func TestAnAbsentNodeIsNamed(t *testing.T) {
	n := world.nodes[1]
	ns := apply(t, asPod("away", "edge-2"))
	ready(t, ns, "away")
	if err := n.StopEdgecore(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := n.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
		connected(t, n)
	}()
	for _, args := range [][]string{
		{"logs", "-n", ns, "away"},
		{"exec", "-n", ns, "away", "--", "/bin/echo"},
		{"port-forward", "-n", ns, "pod/away", ":8080"},
		{"get", "--raw", "/api/v1/nodes/edge-2/proxy/stats/summary"},
	} {
		eventually(t, 20*time.Second, "kubectl "+args[0]+" to name the absent node", func(ctx context.Context) (bool, string) {
			// port-forward listens first and fails with the first connection.
			if args[0] == "port-forward" {
				return true, ""
			}
			res := kubectlAny(t, "", args...)
			ok := res.Code != 0 && strings.Contains(res.Stderr, "node edge-2 is not connected (last seen ") && strings.Contains(res.Stderr, "s ago)")
			return ok, fmt.Sprintf("exit %d: %s", res.Code, res.Stderr)
		})
	}
	// After a restart of the hub it still knows when.
	if err := world.hub.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := world.hub.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	res := kubectlAny(t, "", "logs", "-n", ns, "away")
	if res.Code == 0 || !strings.Contains(res.Stderr, "node edge-2 is not connected (last seen ") {
		t.Errorf("after the hub's restart: exit %d: %s", res.Code, res.Stderr)
	}
	connected(t, world.nodes[0])
}

// TestTheCutLinkIsNoticedAndHealed pulls the cable and plugs it in again.
func TestTheCutLinkIsNoticedAndHealed(t *testing.T) {
	n := world.nodes[0]
	ns := apply(t, web)
	before := podIdentity(ready(t, ns, "web"))
	if err := n.CutLink(t.Context(), machine.LinkDown); err != nil {
		t.Fatal(err)
	}
	restored := false
	defer func() {
		if !restored {
			_ = n.RestoreLink(context.Background())
		}
	}()
	// What happens in the cloud meanwhile.
	applyIn(t, ns, asPod("meanwhile", "edge-1"))
	kubectl(t, "delete", "pod", "-n", ns, "web", "--wait=false")
	eventually(t, time.Minute, "edge-1 to see the cut", func(ctx context.Context) (bool, string) {
		st, err := n.Status(ctx)
		return err == nil && !st.Connected, fmt.Sprintf("%+v %v", st, err)
	})
	if out, err := tasks(t, n); err != nil || !strings.Contains(out, "RUNNING") {
		t.Errorf("the pod did not run on: %v\n%s", err, out)
	}
	if err := n.RestoreLink(t.Context()); err != nil {
		t.Fatal(err)
	}
	restored = true
	connected(t, n)
	ready(t, ns, "meanwhile")
	eventually(t, 30*time.Second, "the deleted pod to be gone", func(ctx context.Context) (bool, string) {
		p, err := world.client.CoreV1().Pods(ns).Get(ctx, "web", metav1.GetOptions{})
		if err != nil {
			return strings.Contains(err.Error(), "not found"), err.Error()
		}
		return false, podIdentity(p) + " was " + before
	})
}
