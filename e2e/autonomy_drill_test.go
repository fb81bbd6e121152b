package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/e2e/cluster"
)

// drillReport is what "edgecore drill -o json" tells.
type drillReport struct {
	Passed         bool
	Problem        string
	Started, Ended time.Time
	Pods           []drilledPod
}

type drilledPod struct {
	Namespace, Name, UID, Skipped, Why string
	Back                               bool
	Running                            float64 `json:"runningAfterSeconds"`
	Ready                              float64 `json:"readyAfterSeconds"`
}

func (r drillReport) pod(name string) drilledPod {
	i := slices.IndexFunc(r.Pods, func(p drilledPod) bool { return p.Name == name })
	if i < 0 {
		return drilledPod{}
	}
	return r.Pods[i]
}

func runDrill(t *testing.T, n *cluster.Node, args ...string) (drillReport, cluster.Result) {
	t.Helper()
	res, err := n.Edgecore(t.Context(), append([]string{"drill", "-o", "json"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	var report drillReport
	if res.Stdout != "" {
		if err := json.Unmarshal([]byte(res.Stdout), &report); err != nil {
			t.Fatalf("%v in %s", err, res.Stdout)
		}
	}
	return report, res
}

// nodeCondition is a Node's condition in the cloud.
func nodeCondition(ctx context.Context, node, typ string) (corev1.NodeCondition, error) {
	n, err := world.client.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
	if err != nil {
		return corev1.NodeCondition{}, err
	}
	for _, c := range n.Status.Conditions {
		if string(c.Type) == typ {
			return c, nil
		}
	}
	return corev1.NodeCondition{}, fmt.Errorf("node %s has no condition %s", node, typ)
}

func awaitAutonomy(t *testing.T, n *cluster.Node, want corev1.ConditionStatus, text string) {
	t.Helper()
	eventually(t, 2*time.Minute, "AutonomyReady to be "+string(want)+" in the cloud", func(ctx context.Context) (bool, string) {
		c, err := nodeCondition(ctx, n.Name(), "AutonomyReady")
		return err == nil && c.Status == want && strings.Contains(c.Message, text), fmt.Sprint(c.Status, c.Reason, c.Message, err)
	})
}

func TestDrill(t *testing.T) {
	n := world.nodes[0]
	ns, before := fleet(t, 3)
	const lost = "localhost/skerry/lost:1"
	importDemoAs(t, n, lost)
	applyIn(t, ns, job, onEdge1("lost", "containers: [{name: c, image: "+lost+", imagePullPolicy: IfNotPresent}]"))
	before["lost"] = *ready(t, ns, "lost")
	work := awaitJobPod(t, ns, "work")
	eye := inspect(t, n)
	ran := mustRun(t, eye, ns)
	pid := n.EdgecorePID()
	awaitAutonomy(t, n, corev1.ConditionTrue, "every pod would start again")

	const offline = 20 * time.Second
	report, res := runDrill(t, n, "--offline", offline.String(), "--reboot", "-n", ns)
	if res.Code != 0 || !report.Passed || report.Problem != "" {
		t.Fatalf("exit %d: %s\n%s", res.Code, res.Stdout, res.Stderr)
	}
	if took := report.Ended.Sub(report.Started); took < offline {
		t.Errorf("offline for %s only", took)
	}
	back := mustRun(t, eye, ns)
	for name, p := range before {
		r, c := report.pod(name), back[name]
		if !r.Back || r.UID != string(p.UID) || r.Running <= 0 || r.Ready < r.Running {
			t.Errorf("%s: %+v", name, r)
		}
		t.Logf("%s: running after %.1f s, ready after %.1f s (load %s)", name, r.Running, r.Ready, load(t))
		if c.uid != p.UID || c.restarts != 1 || c.id == ran[name].id || c.sandbox == ran[name].sandbox {
			t.Errorf("%s runs as %+v, before %+v", name, c, ran[name])
		}
		if name != "lost" {
			provided(t, eye, c)
		}
	}
	if r := report.pod(work.Name); r.Skipped == "" || back[work.Name].id != ran[work.Name].id {
		t.Errorf("the job's pod: %+v, runs as %+v, before %+v", r, back[work.Name], ran[work.Name])
	}
	connected(t, n)
	select {
	case <-n.EdgecoreEnded():
		t.Error("edgecore's process ended: its supervisor had to start it")
	default:
	}
	if out, err := n.Machine.Run(t.Context(), "cat", fmt.Sprintf("/proc/%d/comm", pid)); err != nil || strings.TrimSpace(string(out)) != "edgecore" {
		t.Errorf("process %d is %q %v", pid, out, err)
	}
	for name := range before {
		if p := ready(t, ns, name); p.Status.ContainerStatuses[0].RestartCount != 1 {
			t.Errorf("%s in the cloud: %s", name, podIdentity(p))
		}
	}

	// An image that is gone is told before and, when forced, after.
	if _, err := n.Machine.Run(t.Context(), "ctr", "-n", "k8s.io", "images", "rm", "--sync", lost); err != nil {
		t.Fatal(err)
	}
	awaitGoneImage(t, n, lost)
	want := "pod " + ns + "/lost: image " + lost + " is not on this node"
	status, err := n.Edgecore(t.Context(), "status")
	if err != nil || !strings.Contains(status.Stdout, "NOT READY") || !strings.Contains(status.Stdout, want) {
		t.Errorf("edgecore status: %v\n%s", err, status.Stdout)
	}
	awaitAutonomy(t, n, corev1.ConditionFalse, want)
	if _, res := runDrill(t, n, "--offline", "5s", "--reboot"); res.Code == 0 || !strings.Contains(res.Stderr, want) {
		t.Errorf("not refused: exit %d\n%s%s", res.Code, res.Stdout, res.Stderr)
	}
	if now := mustRun(t, eye, ns); !sameContainers(now, back) {
		t.Errorf("a drill that was refused restarted pods:\n%v\n%v", back, now)
	}
	report, res = runDrill(t, n, "--offline", "15s", "--reboot", "-n", ns, "--force")
	if res.Code != 1 || report.Passed {
		t.Errorf("exit %d: %s\n%s", res.Code, res.Stdout, res.Stderr)
	}
	for name := range before {
		switch r := report.pod(name); {
		case name != "lost" && !r.Back:
			t.Errorf("%s: %+v", name, r)
		case name == "lost" && (r.Back || !strings.Contains(r.Why, lost+" is not on this node")):
			t.Errorf("%s: %+v", name, r)
		}
	}
	connected(t, n)
	importDemoAs(t, n, lost)
	// By now the kubelet waits minutes between two tries; a new one forgets.
	if err := n.StopEdgecore(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := n.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	ready(t, ns, "lost")
	awaitAutonomy(t, n, corev1.ConditionTrue, "every pod would start again")
}

// awaitGoneImage waits until CRI has seen that ctr removed an image.
func awaitGoneImage(t *testing.T, n *cluster.Node, name string) {
	t.Helper()
	eventually(t, time.Minute, name+" to be gone", func(ctx context.Context) (bool, string) {
		res, err := n.Edgecore(ctx, "status", "-o", "json")
		return err == nil && strings.Contains(res.Stdout, "ImageMissing"), fmt.Sprint(res.Stdout, err)
	})
}
