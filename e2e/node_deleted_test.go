package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/e2e/cluster"
	"github.com/skerry-io/skerry/e2e/machine"
)

func onEdge2(name, spec string) string {
	return strings.Replace(onEdge1(name, spec), "nodeName: edge-1", "nodeName: edge-2", 1)
}

// knowsItIsDeleted waits until the node has heard of its Node's end.
func knowsItIsDeleted(t *testing.T, n *cluster.Node) time.Time {
	t.Helper()
	var at time.Time
	eventually(t, time.Minute, n.Name()+" to know that it was deleted", func(ctx context.Context) (bool, string) {
		st, err := n.Status(ctx)
		at = st.NodeDeleted
		return err == nil && !at.IsZero() && !st.Connected, fmt.Sprintf("%+v %v", st, err)
	})
	return at
}

// joinAgain does what the status tells the operator to do.
func joinAgain(t *testing.T, n *cluster.Node) {
	t.Helper()
	res, err := n.Edgecore(t.Context(), "status")
	if err != nil || !strings.Contains(res.Stdout, "DELETED") || !strings.Contains(res.Stdout, "cloudhub token create --allow-replace --node-name "+n.Name()) {
		t.Errorf("status: %v %s%s", err, res.Stdout, res.Stderr)
	}
	res = join(t, n, n.HubURL(world.hub), "--token", token(t, "--allow-replace", "--node-name", n.Name()), "--node-name", n.Name(), "--replace")
	if res.Code != 0 || !strings.Contains(res.Stderr, "systemctl restart edgecore") {
		t.Fatalf("join: exit %d: %s", res.Code, res.Stderr)
	}
	if err := n.StopEdgecore(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := n.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	connected(t, n)
}

func noNode(t *testing.T, name string) {
	t.Helper()
	if _, err := world.client.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("the Node %s was registered without a join: %v", name, err)
	}
}

// TestANodeDeletedWhileConnected keeps its pods over a restart, until it has
// joined again; then it has those that the cloud has, untouched.
func TestANodeDeletedWhileConnected(t *testing.T) {
	n := world.nodes[1]
	ns := apply(t, onEdge2("kept", "containers: [{name: c, image: IMAGE}]"), onEdge2("gone", "containers: [{name: c, image: IMAGE}]"))
	before := podIdentity(ready(t, ns, "kept"))
	ready(t, ns, "gone")
	eye := inspect(t, n)
	ran := eye.awaitRunning(t, ns, 2)
	old, err := world.client.CoreV1().Nodes().Get(t.Context(), n.Name(), metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}

	kubectl(t, "delete", "node", n.Name())
	at := knowsItIsDeleted(t, n)
	kubectl(t, "delete", "pod", "-n", ns, "gone", "--force", "--grace-period=0")
	if err := n.KillEdgecore(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := n.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if again := knowsItIsDeleted(t, n); !again.Equal(at) {
		t.Errorf("deleted since %v, before the restart since %v", again, at)
	}
	noNode(t, n.Name())
	if now := eye.awaitRunning(t, ns, 2); !sameContainers(now, ran) {
		t.Errorf("containers changed with the Node's deletion:\n%v\n%v", ran, now)
	}

	joinAgain(t, n)
	now, err := world.client.CoreV1().Nodes().Get(t.Context(), n.Name(), metav1.GetOptions{})
	if err != nil || now.UID == old.UID {
		t.Errorf("registered as %v, %v; before %v", now.UID, err, old.UID)
	}
	if after := podIdentity(getPod(t, ns, "kept")); after != before {
		t.Errorf("the pod changed:\nbefore %s\nafter  %s", before, after)
	}
	eventually(t, time.Minute, "the pod that the cloud no longer has to end", func(ctx context.Context) (bool, string) {
		now, err := eye.running(ctx, ns)
		return err == nil && len(now) == 1 && now["kept"].id == ran["kept"].id, fmt.Sprint(now, err)
	})
	if out := kubectl(t, "exec", "-n", ns, "kept", "--", "/bin/echo", "alive"); out != "alive\n" {
		t.Errorf("exec: %q", out)
	}
}

// TestANodeDeletedWhileAway hears of it when it is back, after the cluster has
// collected its pods. Its operator then has it stop them.
func TestANodeDeletedWhileAway(t *testing.T) {
	n := world.nodes[1]
	ns := apply(t, onEdge2("kept", "containers: [{name: c, image: IMAGE}]"))
	uid := ready(t, ns, "kept").UID
	eye := inspect(t, n)
	ran := eye.awaitRunning(t, ns, 1)

	if err := n.CutLink(t.Context(), machine.LinkDown); err != nil {
		t.Fatal(err)
	}
	restored := false
	t.Cleanup(func() {
		if !restored {
			_ = n.RestoreLink(context.Background())
		}
	})
	eventually(t, time.Minute, n.Name()+" to see the cut", func(ctx context.Context) (bool, string) {
		st, err := n.Status(ctx)
		return err == nil && !st.Connected, fmt.Sprintf("%+v %v", st, err)
	})
	kubectl(t, "delete", "node", n.Name())
	eventually(t, 3*time.Minute, "the cluster to collect the deleted Node's pods", func(ctx context.Context) (bool, string) {
		p, err := world.client.CoreV1().Pods(ns).Get(ctx, "kept", metav1.GetOptions{})
		return apierrors.IsNotFound(err), fmt.Sprint(p.Status.Phase, err)
	})
	if err := n.RestoreLink(t.Context()); err != nil {
		t.Fatal(err)
	}
	restored = true
	knowsItIsDeleted(t, n)
	if now := eye.awaitRunning(t, ns, 1); !sameContainers(now, ran) {
		t.Errorf("containers changed with the Node's deletion:\n%v\n%v", ran, now)
	}

	// A power cut: it starts them again by itself.
	powerCycle(t, n)
	if err := n.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	eye = inspect(t, n)
	if now := eye.awaitRunning(t, ns, 1); now["kept"].uid != uid {
		t.Errorf("runs %v; want the pod %s", now, uid)
	}
	noNode(t, n.Name())

	if err := n.StopEdgecore(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := n.WriteConfig(map[string]any{"node": map[string]any{"whenDeleted": "stop"}}); err != nil {
		t.Fatal(err)
	}
	if err := n.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, "the pods to be stopped", func(ctx context.Context) (bool, string) {
		now, err := eye.running(ctx, ns)
		return err == nil && len(now) == 0, fmt.Sprint(now, err)
	})
	if err := n.WriteConfig(nil); err != nil {
		t.Fatal(err)
	}
	joinAgain(t, n)
	applyIn(t, ns, onEdge2("new", "containers: [{name: c, image: IMAGE}]"))
	ready(t, ns, "new")
	eventually(t, time.Minute, "nothing but the new pod", func(ctx context.Context) (bool, string) {
		now, err := eye.running(ctx, ns)
		pods, listErr := world.client.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{})
		if listErr != nil {
			pods = &corev1.PodList{}
		}
		return err == nil && len(now) == 1 && now["new"].id != "" && len(pods.Items) == 1, fmt.Sprint(now, describe(pods.Items), err, listErr)
	})
}
