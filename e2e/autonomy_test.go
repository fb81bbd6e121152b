package e2e

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"sigs.k8s.io/yaml"

	"github.com/skerry-io/skerry/cloudhub/presence"
	"github.com/skerry-io/skerry/cloudhub/tolerations"
	"github.com/skerry-io/skerry/e2e/machine"
)

var coldPods = flag.Int("cold-pods", 10, "how many pods the cold starts bring back")

func TestColdStartWithoutACloud(t *testing.T) {
	n := world.nodes[0]
	ns, before := fleet(t, *coldPods)

	restoreHub := withoutHub(t)
	powerCycle(t, n)
	eye := inspect(t, n)
	started := time.Now()
	if err := n.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	back := eye.awaitRunning(t, ns, len(before))
	first, last := startTimes(t, eye, back)
	t.Logf("%d pods without a cloud: first container started %.1f s after edgecore, last %.1f s (load %s)",
		len(back), first.Sub(started).Seconds(), last.Sub(started).Seconds(), load(t))
	for name, c := range back {
		if c.uid != before[name].UID {
			t.Errorf("%s has UID %s, before %s", name, c.uid, before[name].UID)
		}
		if c.restarts != 1 {
			t.Errorf("%s: container says restart %d, want 1", name, c.restarts)
		}
		provided(t, eye, c)
	}
	if st, err := n.Status(t.Context()); err != nil || st.Connected {
		t.Fatalf("not without a cloud: %+v %v", st, err)
	}

	cloudBack := restoreHub()
	for name, c := range back {
		p := ready(t, ns, name)
		s := p.Status.ContainerStatuses[0]
		if p.UID != c.uid || !strings.HasSuffix(s.ContainerID, c.id) || s.RestartCount != 1 {
			t.Errorf("%s in the cloud is %s; on the node UID %s, container %s", name, podIdentity(p), c.uid, c.id)
		}
		if at := eye.status(t, c.id).StartedAt; s.State.Running == nil || s.State.Running.StartedAt.Unix() != at/int64(time.Second) {
			t.Errorf("%s: started %s by containerd, state %+v in the cloud", name, time.Unix(0, at), s.State)
		}
		if s.LastTerminationState.Terminated == nil || s.LastTerminationState.Terminated.ContainerID != before[name].Status.ContainerStatuses[0].ContainerID {
			t.Errorf("%s: last state %+v, before it ran %s", name, s.LastTerminationState, before[name].Status.ContainerStatuses[0].ContainerID)
		}
		for _, cond := range p.Status.Conditions {
			if cond.Type == corev1.PodReady && (cond.LastTransitionTime.Time.Before(started.Truncate(time.Second)) || cond.LastTransitionTime.Time.After(cloudBack)) {
				t.Errorf("%s became Ready at %s by its status; it was between %s and %s", name, cond.LastTransitionTime, started, cloudBack)
			}
		}
		awaitEventBetween(t, ns, name, "SandboxChanged", started, cloudBack)
	}
	if now := eye.awaitRunning(t, ns, len(before)); !sameContainers(now, back) {
		t.Errorf("containers changed with the cloud's return:\n%v\n%v", back, now)
	}
}

// TestKilledInTheMiddleOfAColdStart also has no network at all: the cable is
// out when edgecore starts.
func TestKilledInTheMiddleOfAColdStart(t *testing.T) {
	n := world.nodes[0]
	ns, before := fleet(t, *coldPods)
	powerCycle(t, n)
	restoreLink := cut(t, n, machine.LinkDown)
	eye := inspect(t, n)
	ran := map[string]instance{} // whenever edgecore was killed
	kills := 0
	for _, moment := range []struct {
		name string
		is   func(sandboxes int, containers int) bool
	}{
		{"the first sandbox", func(s, c int) bool { return s > 0 }},
		{"the first container", func(s, c int) bool { return c > 0 }},
		{"half of the containers", func(s, c int) bool { return c >= len(before)/2 }},
		{"all but one", func(s, c int) bool { return c >= len(before)-1 }},
	} {
		if err := n.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
		eventually(t, time.Minute, moment.name, func(ctx context.Context) (bool, string) {
			s, err := eye.sandboxes(ctx, ns)
			if err != nil {
				return false, err.Error()
			}
			c, err := eye.running(ctx, ns)
			return err == nil && moment.is(len(s), len(c)), fmt.Sprintf("%d sandboxes, %d containers, %v", len(s), len(c), err)
		})
		if err := n.KillEdgecore(t.Context()); err != nil {
			t.Fatal(err)
		}
		kills++
		for name, c := range mustRun(t, eye, ns) {
			if was, ok := ran[name]; ok && was.id != c.id {
				t.Errorf("%s ran as %+v when edgecore was killed, and then as %+v", name, was, c)
			}
			ran[name] = c
		}
	}
	if err := n.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	back := eye.awaitRunning(t, ns, len(before))
	for name, c := range back {
		if c.uid != before[name].UID {
			t.Errorf("%s has UID %s, before %s", name, c.uid, before[name].UID)
		}
		if was, ok := ran[name]; ok && was.id != c.id {
			t.Errorf("%s ran as %+v when edgecore was killed, and now runs as %+v", name, was, c)
		}
		provided(t, eye, c)
	}
	restoreLink()
	for name, c := range back {
		p := ready(t, ns, name)
		s := p.Status.ContainerStatuses[0]
		// What was made but not yet started when edgecore was killed counts.
		if p.UID != c.uid || !strings.HasSuffix(s.ContainerID, c.id) || int(s.RestartCount) != c.restarts || c.restarts < 1 || c.restarts > 1+kills {
			t.Errorf("%s in the cloud is %s; on the node UID %s, container %s, restarts %d", name, podIdentity(p), c.uid, c.id, c.restarts)
		}
	}
	if now := eye.awaitRunning(t, ns, len(before)); !sameContainers(now, back) {
		t.Errorf("containers changed with the cloud's return:\n%v\n%v", back, now)
	}
}

// TestThePowerFailsWhileMuchChanges has a node that comes up with a store of
// yesterday and hears of today while its kubelet starts the pods.
func TestThePowerFailsWhileMuchChanges(t *testing.T) {
	n := world.nodes[0]
	again := onEdge1("again", "containers: [{name: c, image: IMAGE, args: [wait-sigterm, --grace, 2s]}]")
	ns := apply(t, again, job,
		onEdge1("stays", "containers: [{name: c, image: IMAGE}]"),
		onEdge1("deleted", "containers: [{name: c, image: IMAGE}]"),
		onEdge1("once", "restartPolicy: Never\n  containers: [{name: c, image: IMAGE}]"))
	old, stays := ready(t, ns, "again"), ready(t, ns, "stays")
	ready(t, ns, "deleted")
	ready(t, ns, "once")
	work := awaitJobPod(t, ns, "work")
	ran := mustRun(t, inspect(t, n), ns)

	cut(t, n, machine.LinkDown)
	kill(t, n, work, "SIGTERM") // its work is done, and nobody hears of it
	finished := inspect(t, n).awaitExit(t, ran[work.Name])
	powerCycle(t, n) // restores the link as well
	kubectl(t, "delete", "pod", "-n", ns, "deleted", "--wait=false")
	kubectl(t, "delete", "pod", "-n", ns, "again", "--force", "--grace-period=0")
	applyIn(t, ns, again, onEdge1("new", "containers: [{name: c, image: IMAGE}]"))
	renewed := getPod(t, ns, "again")

	eye := inspect(t, n)
	order := eye.sample(t, ns, "again")
	if err := n.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	connected(t, n)
	ready(t, ns, "new")
	if p := awaitPod(t, ns, "again", time.Minute, "to run again", isReady); p.UID != renewed.UID || p.Status.ContainerStatuses[0].RestartCount != 0 {
		t.Errorf("again: %s", podIdentity(p))
	}
	if uids, twice := order(); twice != nil || uids[len(uids)-1] != renewed.UID || len(uids) > 2 {
		t.Errorf("pods of the name again on the node, in order: %v; old %s, new %s; %v", uids, old.UID, renewed.UID, twice)
	}
	awaitPod(t, ns, "stays", time.Minute, "to be Ready once more", func(p *corev1.Pod) bool {
		return isReady(p) && p.UID == stays.UID && p.Status.ContainerStatuses[0].RestartCount == 1
	})
	awaitPod(t, ns, "once", time.Minute, "to have failed", func(p *corev1.Pod) bool { return p.Status.Phase == corev1.PodFailed })
	awaitNoPod(t, ns, "deleted")
	jobIsDone(t, ns, work, finished)
	eventually(t, time.Minute, "the node to run what is wanted, and no more", func(ctx context.Context) (bool, string) {
		now, err := eye.running(ctx, ns)
		return err == nil && len(now) == 3 && now["again"].uid == renewed.UID && now["stays"].uid == stays.UID && now["new"].uid != "", fmt.Sprint(now, err)
	})
	all, err := eye.list(t.Context(), ns, cri.ContainerState_CONTAINER_EXITED)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range all {
		if (c.pod == work.Name || c.pod == "once") && (c.restarts != 0 || c.id != ran[c.pod].id) {
			t.Errorf("%s ran a second time: %+v, first %+v", c.pod, c, ran[c.pod])
		}
	}
}

func TestWhatHappensWhileTheNodeIsAway(t *testing.T) {
	n := world.nodes[0]
	ns := namespace(t)
	hooks := "/var/lib/e2e/" + ns
	if err := os.MkdirAll(n.Disk(hooks), 0o755); err != nil {
		t.Fatal(err)
	}
	again := onEdge1("again", "containers: [{name: c, image: IMAGE, args: [wait-sigterm, --grace, 2s]}]")
	deployment := func(name string, replicas int) string {
		return fmt.Sprintf(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: %[1]s}
spec:
  replicas: %[2]d
  selector: {matchLabels: {app: %[1]s}}
  template:
    metadata: {labels: {app: %[1]s}}
    spec: {nodeSelector: {kubernetes.io/hostname: edge-1}, terminationGracePeriodSeconds: 1, containers: [{name: c, image: localhost/skerry/demo:1}]}`, name, replicas)
	}
	applyIn(t, ns, again, deployment("grown", 1), deployment("shrunk", 3),
		onEdge1("killed", "containers: [{name: c, image: IMAGE}]"),
		onEdge1("deleted", `
  volumes: [{name: hooks, hostPath: {path: `+hooks+`}}]
  containers:
  - name: c
    image: IMAGE
    volumeMounts: [{name: hooks, mountPath: /hooks}]
    lifecycle: {preStop: {exec: {command: [/bin/demo, write, /hooks/stopped]}}}`))
	killed, deleted, old := ready(t, ns, "killed"), ready(t, ns, "deleted"), ready(t, ns, "again")
	available(t, ns, "grown", 1)
	available(t, ns, "shrunk", 3)
	eye := inspect(t, n)

	restoreLink := cut(t, n, machine.LinkDown)
	away := time.Now()
	// On the node.
	kill(t, n, killed, "SIGKILL")
	eventually(t, 30*time.Second, "the killed container to be started again", func(ctx context.Context) (bool, string) {
		now, err := eye.running(ctx, ns)
		return err == nil && now["killed"].restarts == 1, fmt.Sprint(now, err)
	})
	// In the cloud.
	kubectl(t, "delete", "pod", "-n", ns, "deleted", "--wait=false")
	kubectl(t, "delete", "pod", "-n", ns, "again", "--force", "--grace-period=0")
	applyIn(t, ns, again)
	kubectl(t, "scale", "-n", ns, "deployment/grown", "--replicas=3")
	kubectl(t, "scale", "-n", ns, "deployment/shrunk", "--replicas=1")
	renewed := getPod(t, ns, "again")
	if renewed.UID == old.UID {
		t.Fatal("the pod was not re-created")
	}
	if _, ok := mustRun(t, eye, ns)["deleted"]; !ok {
		t.Error("a pod ended on the node by a delete that it cannot know of")
	}

	ran := eye.sample(t, ns, "again")
	back := time.Now()
	restoreLink()
	ready(t, ns, "again")
	order, twice := ran()
	if twice != nil {
		t.Error(twice)
	}
	if !slices.Equal(order, []types.UID{old.UID, renewed.UID}) {
		t.Errorf("pods of the name again on the node, in order: %v; want %s, then %s", order, old.UID, renewed.UID)
	}
	if p := getPod(t, ns, "again"); p.UID != renewed.UID || p.Status.ContainerStatuses[0].RestartCount != 0 {
		t.Errorf("again: %s", podIdentity(p))
	}
	awaitNoPod(t, ns, "deleted")
	if _, err := os.Stat(filepath.Join(n.Disk(hooks), "stopped")); err != nil {
		t.Errorf("the deleted pod did not end gracefully, its preStop hook was left out: %v", err)
	}
	if c, ok := mustRun(t, eye, ns)["deleted"]; ok && c.uid == deleted.UID {
		t.Error("the deleted pod is gone from the cloud and runs on the node")
	}
	available(t, ns, "grown", 3)
	available(t, ns, "shrunk", 1)
	eventually(t, 30*time.Second, "the node to run what the Deployments want", func(ctx context.Context) (bool, string) {
		now, err := eye.running(ctx, ns)
		count := map[string]int{}
		for name := range now {
			deployment, _, _ := strings.Cut(name, "-")
			count[deployment]++
		}
		return err == nil && count["grown"] == 3 && count["shrunk"] == 1, fmt.Sprint(count, err)
	})
	p := ready(t, ns, "killed")
	s := p.Status.ContainerStatuses[0]
	if p.UID != killed.UID || s.RestartCount != 1 || s.LastTerminationState.Terminated == nil || s.LastTerminationState.Terminated.ExitCode != 137 ||
		!between(s.LastTerminationState.Terminated.FinishedAt.Time, away, back) {
		t.Errorf("the killed pod: %s, %+v", podIdentity(p), s.LastTerminationState)
	}
	if e := awaitEventBetween(t, ns, "killed", "Started", away, back); e.Count != 2 {
		t.Errorf("Started happened %d times by the Event, want 2", e.Count)
	}
}

// TestNothingIsEvictedFromASilentNode needs the second node: Kubernetes evicts
// nothing when all nodes are silent. The hub's default toleration is ten
// seconds, so that what is not kept would be gone. As a kubelet looks at mounted ConfigMaps
// about once a minute, it is also the time to see one that changed while
// edge-2 was away.
func TestNothingIsEvictedFromASilentNode(t *testing.T) {
	n, other := world.nodes[0], world.nodes[1]
	ns := apply(t, configMap("first"), strings.Replace(onEdge1("reads", `
  volumes: [{name: settings, configMap: {name: settings}}]
  containers: [{name: c, image: IMAGE, volumeMounts: [{name: settings, mountPath: /settings}]}]`), "edge-1", other.Name(), 1),
		onEdge1("kept", "containers: [{name: c, image: IMAGE}]"),
		onEdge1("brief", `
  tolerations: [{key: node.kubernetes.io/unreachable, operator: Exists, effect: NoExecute, tolerationSeconds: 5}]
  containers: [{name: c, image: IMAGE}]`), `
apiVersion: apps/v1
kind: Deployment
metadata: {name: held}
spec:
  replicas: 2
  selector: {matchLabels: {app: held}}
  template:
    metadata: {labels: {app: held}}
    spec: {terminationGracePeriodSeconds: 1, nodeSelector: {kubernetes.io/hostname: edge-1}, containers: [{name: c, image: localhost/skerry/demo:1}]}
`, ratherOnEdge1("Deployment", "moves", `{`+tolerations.Evict+`: "true"}`), ratherOnEdge1("StatefulSet", "identity", "{}"),
		`
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: everywhere}
spec:
  selector: {matchLabels: {app: everywhere}}
  template:
    metadata: {labels: {app: everywhere}}
    spec: {terminationGracePeriodSeconds: 1, containers: [{name: c, image: localhost/skerry/demo:1}]}`, job)
	ready(t, ns, "reads")
	restoreOther := cut(t, other, machine.LinkDown)
	applyIn(t, ns, configMap("second"))
	ready(t, ns, "kept")
	brief := ready(t, ns, "brief")
	available(t, ns, "held", 2)
	available(t, ns, "moves", 1)
	ready(t, ns, "identity-0")
	work := awaitJobPod(t, ns, "work")
	restoreOther()
	otherBack := time.Now()
	var before map[string]corev1.Pod
	eventually(t, 30*time.Second, "the DaemonSet's pods", func(context.Context) (bool, string) {
		before = podsByName(t, ns)
		ready := 0
		for _, p := range before {
			if p.Labels["app"] == "everywhere" && isReady(&p) {
				ready++
			}
		}
		return ready == len(world.nodes), fmt.Sprint(ready)
	})
	moves := podOf(t, before, "moves")
	for name, where := range map[string]string{moves.Name: moves.Spec.NodeName, "identity-0": before["identity-0"].Spec.NodeName} {
		if where != n.Name() {
			t.Fatalf("%s is on %s, and was to be on %s", name, where, n.Name())
		}
	}
	tolerates := func(pod, what string, seconds int64) {
		t.Helper()
		eventually(t, 10*time.Second, what, func(context.Context) (bool, string) {
			p := getPod(t, ns, pod)
			a, b := tolerationSeconds(*p, corev1.TaintNodeNotReady), tolerationSeconds(*p, corev1.TaintNodeUnreachable)
			return a == seconds && b == seconds, fmt.Sprintf("not-ready %d s, unreachable %d s", a, b)
		})
	}
	const forever, byDefault = 1<<63 - 1, 10
	tolerates("kept", "a pod to stay for ever", forever)
	tolerates("identity-0", "a StatefulSet's pod to stay for ever", forever)
	tolerates(moves.Name, "a pod that opted out not to", byDefault)
	kubectl(t, "annotate", "node", other.Name(), tolerations.Evict+"=true")
	tolerates("reads", "the pods of a node that opted out not to", byDefault)
	kubectl(t, "annotate", "node", other.Name(), tolerations.Evict+"-")
	tolerates("reads", "the pods of a node that opted in again to stay for ever", forever)
	if c := connectedCondition(t, n.Name()); c.Status != corev1.ConditionTrue || c.Reason != presence.ReasonUp {
		t.Errorf("%s is connected, and its Node says %+v", n.Name(), c)
	}
	if s := tolerationSeconds(*brief, corev1.TaintNodeUnreachable); s != 5 {
		t.Errorf("the user's toleration of 5 s has become %d s", s)
	}
	eye := inspect(t, n)
	ran := mustRun(t, eye, ns)

	restoreLink := cut(t, n, machine.LinkBlackhole)
	away := time.Now()
	kill(t, n, work, "SIGTERM") // its work is done
	finished := eye.awaitExit(t, ran[work.Name])
	eventually(t, 2*time.Minute, "edge-1 to be Unknown and tainted", func(ctx context.Context) (bool, string) {
		node, err := world.client.CoreV1().Nodes().Get(ctx, "edge-1", metav1.GetOptions{})
		if err != nil {
			return false, err.Error()
		}
		effects := map[corev1.TaintEffect]bool{}
		for _, taint := range node.Spec.Taints {
			effects[taint.Effect] = effects[taint.Effect] || taint.Key == corev1.TaintNodeUnreachable
		}
		return nodeReady(node) == corev1.ConditionUnknown && effects[corev1.TaintEffectNoExecute] && effects[corev1.TaintEffectNoSchedule], fmt.Sprint(node.Spec.Taints)
	})
	t.Logf("edge-1 was Unknown and tainted %.1f s after the cut", time.Since(away).Seconds())
	eventually(t, 30*time.Second, "the Node to say that it is not connected", func(context.Context) (bool, string) {
		c := connectedCondition(t, n.Name())
		return c.Status == corev1.ConditionFalse, fmt.Sprintf("%+v", c)
	})
	c := connectedCondition(t, n.Name())
	if c.Reason != presence.ReasonSilent && c.Reason != presence.ReasonBroken || !strings.Contains(c.Message, "; last in step 20") ||
		!between(c.LastTransitionTime.Time, away.Add(-time.Minute), away.Add(2*time.Second)) {
		t.Errorf("cut off at %s, and the Node says %+v", away, c)
	}
	if out := kubectl(t, "describe", "node", n.Name()); !strings.Contains(out, c.Message) {
		t.Errorf("kubectl describe node tells nothing of %q:\n%s", c.Message, out)
	}
	var listed []struct {
		Name            string
		Connected       bool
		Since, LastSync time.Time
	}
	list, err := world.hub.Cloudhub(t.Context(), "node", "list", "-o", "json")
	if err == nil {
		err = json.Unmarshal([]byte(list.Stdout), &listed)
	}
	if err != nil || len(listed) != 2 || listed[0].Connected || !listed[0].Since.Equal(c.LastTransitionTime.Time) || listed[0].LastSync.IsZero() || !listed[1].Connected {
		t.Errorf("cloudhub node list: %+v, %v\n%s", listed, err, list.Stderr)
	}

	awaitPod(t, ns, "brief", 30*time.Second, "to be evicted, as its user wishes", func(p *corev1.Pod) bool { return p.DeletionTimestamp != nil })
	awaitPod(t, ns, moves.Name, time.Minute, "to be evicted, as it opted out", func(p *corev1.Pod) bool { return p.DeletionTimestamp != nil })
	var replaced corev1.Pod
	eventually(t, time.Minute, "another pod in its place elsewhere", func(context.Context) (bool, string) {
		now := podsByName(t, ns)
		delete(now, moves.Name)
		replaced = podOf(t, now, "moves")
		return replaced.Spec.NodeName == other.Name() && isReady(&replaced), podIdentity(&replaced)
	})
	for name, p := range podsByName(t, ns) {
		if was, ok := before[name]; name != replaced.Name && (!ok || was.UID != p.UID) {
			t.Errorf("%s was made while the node was silent", name)
		}
		if p.DeletionTimestamp != nil && name != "brief" && name != moves.Name {
			t.Errorf("%s was evicted", name)
		}
	}
	if len(podsByName(t, ns)) != len(before)+1 {
		t.Errorf("of %d pods %d are left, with one that was to be made", len(before), len(podsByName(t, ns)))
	}
	eventually(t, time.Minute, "the cut to have lasted for more than a minute", func(context.Context) (bool, string) {
		return time.Since(away) > time.Minute, time.Since(away).String()
	})
	still := mustRun(t, eye, ns)
	delete(ran, work.Name)
	if !sameContainers(ran, still) {
		t.Errorf("containers changed on the silent node:\n%v\n%v", ran, still)
	}

	restoreLink()
	eventually(t, time.Minute, "edge-1 to have no taints", func(ctx context.Context) (bool, string) {
		node, err := world.client.CoreV1().Nodes().Get(ctx, "edge-1", metav1.GetOptions{})
		if err != nil {
			return false, err.Error()
		}
		return len(node.Spec.Taints) == 0, fmt.Sprint(node.Spec.Taints)
	})
	eventually(t, time.Minute, "the Node to say that it is connected again", func(context.Context) (bool, string) {
		c := connectedCondition(t, n.Name())
		return c.Status == corev1.ConditionTrue && strings.Contains(c.Message, "; was away ") && c.LastTransitionTime.After(away), fmt.Sprintf("%+v", c)
	})
	awaitNoPod(t, ns, "brief")
	awaitNoPod(t, ns, moves.Name)
	delete(ran, "brief")
	delete(ran, moves.Name)
	if p := ready(t, ns, replaced.Name); p.UID != replaced.UID || p.Spec.NodeName != other.Name() {
		t.Errorf("in the place of the evicted pod: %s, before %s", podIdentity(p), podIdentity(&replaced))
	}
	for name, c := range ran {
		p := ready(t, ns, name)
		if s := p.Status.ContainerStatuses[0]; p.UID != c.uid || !strings.HasSuffix(s.ContainerID, c.id) || s.RestartCount != 0 {
			t.Errorf("%s: %s, ran as %s", name, podIdentity(p), c.id)
		}
	}
	if now := mustRun(t, eye, ns); !sameContainers(ran, now) {
		t.Errorf("containers changed with the cloud's return:\n%v\n%v", ran, now)
	}
	jobIsDone(t, ns, work, finished)

	look := inspect(t, other)
	reads := mustRun(t, look, ns)["reads"]
	eventually(t, 2*time.Minute, "the changed ConfigMap to be mounted", func(ctx context.Context) (bool, string) {
		text, err := look.file(ctx, reads, "/settings/key")
		return text == "second", fmt.Sprint(text, err)
	})
	t.Logf("the changed ConfigMap was mounted %.1f s after the link was back, or earlier", time.Since(otherBack).Seconds())
	if reads.restarts != 0 {
		t.Error("the pod was restarted for its ConfigMap")
	}
}

const job = `
apiVersion: batch/v1
kind: Job
metadata: {name: work}
spec:
  backoffLimit: 0
  template:
    metadata: {labels: {app: work}}
    spec: {nodeName: edge-1, restartPolicy: Never, containers: [{name: c, image: localhost/skerry/demo:1, args: [wait-sigterm, --grace, 0s]}]}`

// fleet runs pods on edge-1 that each need all that a pod is given: a Secret, a
// ConfigMap and a token.
func fleet(t *testing.T, count int) (ns string, pods map[string]corev1.Pod) {
	t.Helper()
	manifests := []string{configMap("first"), `
apiVersion: v1
kind: Secret
metadata: {name: credentials}
stringData: {password: open sesame}`}
	for i := range count {
		manifests = append(manifests, onEdge1(fmt.Sprintf("pod-%d", i), `
  volumes: [{name: settings, configMap: {name: settings}}]
  containers:
  - name: c
    image: IMAGE
    env: [{name: PASSWORD, valueFrom: {secretKeyRef: {name: credentials, key: password}}}]
    volumeMounts: [{name: settings, mountPath: /settings}]
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}`))
	}
	ns = apply(t, manifests...)
	eventually(t, 3*time.Minute, "all pods to be Ready", func(ctx context.Context) (bool, string) {
		list, err := world.client.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{})
		if err != nil {
			return false, err.Error()
		}
		for _, p := range list.Items {
			if !isReady(&p) {
				return false, describe(list.Items)
			}
		}
		return len(list.Items) == count, ""
	})
	return ns, podsByName(t, ns)
}

func configMap(value string) string {
	return "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: settings}\ndata: {key: " + value + "}"
}

// onEdge1 is a pod; IMAGE in its spec is the demo's.
func onEdge1(name, spec string) string {
	return "apiVersion: v1\nkind: Pod\nmetadata: {name: " + name + "}\nspec:\n  nodeName: edge-1\n  terminationGracePeriodSeconds: 10\n  " +
		strings.ReplaceAll(strings.TrimSpace(spec), "IMAGE", "localhost/skerry/demo:1")
}

// provided checks that a container of the fleet got all it needs.
func provided(t *testing.T, eye *inspector, c instance) {
	t.Helper()
	if env, err := eye.file(t.Context(), c, "/proc/1/environ"); !strings.Contains(env, "PASSWORD=open sesame\x00") {
		t.Errorf("%s has no Secret in its environment: %q %v", c.pod, env, err)
	}
	if text, err := eye.file(t.Context(), c, "/settings/key"); text != "first" {
		t.Errorf("%s has no ConfigMap mounted: %q %v", c.pod, text, err)
	}
	token, err := eye.file(t.Context(), c, "/var/run/secrets/kubernetes.io/serviceaccount/token")
	if err != nil {
		t.Errorf("%s: %v", c.pod, err)
		return
	}
	var claims struct {
		Issuer     string `json:"iss"`
		Expires    int64  `json:"exp"`
		Kubernetes struct {
			Pod struct {
				UID types.UID `json:"uid"`
			} `json:"pod"`
		} `json:"kubernetes.io"`
	}
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		t.Errorf("%s: the token is no JWT of three parts: %d bytes", c.pod, len(token))
		return
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err == nil {
		err = json.Unmarshal(payload, &claims)
	}
	if err != nil || claims.Issuer == "" || time.Until(time.Unix(claims.Expires, 0)) < time.Minute || claims.Kubernetes.Pod.UID != c.uid {
		t.Errorf("%s (UID %s): token's claims %s: %v", c.pod, c.uid, payload, err)
	}
}

func available(t *testing.T, ns, deployment string, want int32) {
	t.Helper()
	eventually(t, time.Minute, fmt.Sprintf("%s to have %d available", deployment, want), func(ctx context.Context) (bool, string) {
		d, err := world.client.AppsV1().Deployments(ns).Get(ctx, deployment, metav1.GetOptions{})
		if err != nil {
			return false, err.Error()
		}
		return d.Status.ObservedGeneration == d.Generation && d.Status.Replicas == want && d.Status.AvailableReplicas == want, fmt.Sprintf("%+v", d.Status)
	})
}

func awaitJobPod(t *testing.T, ns, job string) *corev1.Pod {
	t.Helper()
	var pod *corev1.Pod
	eventually(t, time.Minute, "a Ready pod of the job "+job, func(ctx context.Context) (bool, string) {
		list, err := world.client.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{LabelSelector: "app=" + job})
		if err != nil || len(list.Items) != 1 {
			return false, fmt.Sprint(list, err)
		}
		pod = &list.Items[0]
		return isReady(pod), describe(list.Items)
	})
	return pod
}

// jobIsDone checks that the cloud knows of a job that was finished then.
func jobIsDone(t *testing.T, ns string, pod *corev1.Pod, finished time.Time) {
	t.Helper()
	kubectl(t, "wait", "-n", ns, "job/work", "--for=condition=Complete", "--timeout=60s")
	p := getPod(t, ns, pod.Name)
	if s := p.Status.ContainerStatuses[0].State.Terminated; p.UID != pod.UID || p.Status.Phase != corev1.PodSucceeded || s == nil || s.ExitCode != 0 || s.FinishedAt.Unix() != finished.Unix() {
		t.Errorf("the job's container ended at %s; its pod is %s: %+v", finished, p.Status.Phase, s)
	}
	j, err := world.client.BatchV1().Jobs(ns).Get(t.Context(), "work", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if j.Status.Succeeded != 1 || j.Status.Failed != 0 {
		t.Errorf("the job: %+v", j.Status)
	}
}

func awaitNoPod(t *testing.T, ns, name string) {
	t.Helper()
	eventually(t, time.Minute, "pod "+name+" to be gone", func(ctx context.Context) (bool, string) {
		p, err := world.client.CoreV1().Pods(ns).Get(ctx, name, metav1.GetOptions{})
		return apierrors.IsNotFound(err), fmt.Sprint(p, err)
	})
}

// ratherOnEdge1 is a controller of one pod that may run anywhere, and goes to
// edge-1 while that is there.
func ratherOnEdge1(kind, name, annotations string) string {
	return fmt.Sprintf(`
apiVersion: apps/v1
kind: %[1]s
metadata: {name: %[2]s}
spec:
  replicas: 1
  selector: {matchLabels: {app: %[2]s}}
  template:
    metadata: {labels: {app: %[2]s}, annotations: %[3]s}
    spec:
      terminationGracePeriodSeconds: 1
      affinity: {nodeAffinity: {preferredDuringSchedulingIgnoredDuringExecution: [
        {weight: 100, preference: {matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [edge-1]}]}}]}}
      containers: [{name: c, image: localhost/skerry/demo:1}]`, kind, name, annotations)
}

// podOf returns the only pod of an app; the zero Pod if there is none.
func podOf(t *testing.T, pods map[string]corev1.Pod, app string) (found corev1.Pod) {
	t.Helper()
	for _, p := range pods {
		if p.Labels["app"] == app {
			if found.Name != "" {
				t.Fatalf("%s has several pods: %s and %s", app, found.Name, p.Name)
			}
			found = p
		}
	}
	return found
}

// connectedCondition is what the Node says of its link, as kubectl shows it.
func connectedCondition(t *testing.T, node string) (c corev1.NodeCondition) {
	t.Helper()
	var n corev1.Node
	if err := yaml.Unmarshal([]byte(kubectl(t, "get", "node", node, "-o", "yaml")), &n); err != nil {
		t.Fatal(err)
	}
	if found := presence.Of(&n); found != nil {
		c = *found
	}
	return c
}

func podsByName(t *testing.T, ns string) map[string]corev1.Pod {
	t.Helper()
	list, err := world.client.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	pods := map[string]corev1.Pod{}
	for _, p := range list.Items {
		pods[p.Name] = p
	}
	return pods
}

// tolerationSeconds is for how long a pod stays on a node with that taint.
func tolerationSeconds(p corev1.Pod, taint string) int64 {
	for _, tol := range p.Spec.Tolerations {
		if tol.Key == taint && tol.Effect == corev1.TaintEffectNoExecute {
			if tol.TolerationSeconds == nil {
				return 1<<63 - 1
			}
			return *tol.TolerationSeconds
		}
	}
	return 0
}

func nodeReady(n *corev1.Node) corev1.ConditionStatus {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status
		}
	}
	return ""
}

// awaitEventBetween waits for an Event about a pod of which the last occurrence
// is between from and to.
func awaitEventBetween(t *testing.T, ns, pod, reason string, from, to time.Time) corev1.Event {
	t.Helper()
	var found corev1.Event
	eventually(t, 30*time.Second, fmt.Sprintf("an Event %s about %s between %s and %s", reason, pod, from, to), func(ctx context.Context) (bool, string) {
		list, err := world.client.CoreV1().Events(ns).List(ctx, metav1.ListOptions{
			FieldSelector: fields.OneTermEqualSelector("involvedObject.name", pod).String()})
		if err != nil {
			return false, err.Error()
		}
		var saw strings.Builder
		for _, e := range list.Items {
			if found = e; e.Reason == reason && between(e.LastTimestamp.Time, from, to) {
				return true, ""
			}
			fmt.Fprintf(&saw, "%s %s; ", e.Reason, e.LastTimestamp)
		}
		return false, saw.String()
	})
	return found
}

// between compares a time of the API, which has whole seconds.
func between(at, from, to time.Time) bool {
	return !at.Before(from.Truncate(time.Second)) && !at.After(to)
}

func load(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(string(b))[0]
}
