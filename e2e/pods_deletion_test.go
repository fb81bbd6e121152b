package e2e

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"github.com/skerry-io/skerry/e2e/cluster"
)

// sharedDir is a folder of a node's disk that pods mount by hostPath and the
// test reaches as well.
type sharedDir struct{ inside, outside string }

func hostDir(t *testing.T, n *cluster.Node, ns string) sharedDir {
	t.Helper()
	inside := "/var/lib/e2e/" + ns
	d := sharedDir{inside, n.Disk(inside)}
	if err := os.MkdirAll(d.outside, 0o755); err != nil {
		t.Fatal(err)
	}
	return d
}

func (d sharedDir) write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(d.outside, name), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (d sharedDir) remove(t *testing.T, name string) {
	t.Helper()
	if err := os.Remove(filepath.Join(d.outside, name)); err != nil {
		t.Fatal(err)
	}
}

func (d sharedDir) has(name string) bool {
	_, err := os.Stat(filepath.Join(d.outside, name))
	return err == nil
}

// outputHas is a condition: the pod has printed that text.
func outputHas(t *testing.T, ns, pod, text string) func(ctx context.Context) (bool, string) {
	return func(ctx context.Context) (bool, string) {
		out, err := logOf(ctx, ns, pod, &corev1.PodLogOptions{})
		if err != nil {
			return false, err.Error()
		}
		return strings.Contains(out, text), out
	}
}

func deletePod(t *testing.T, ns, name string, grace *int64) time.Time {
	t.Helper()
	at := time.Now()
	if err := world.client.CoreV1().Pods(ns).Delete(t.Context(), name, metav1.DeleteOptions{GracePeriodSeconds: grace}); err != nil {
		t.Fatal(err)
	}
	return at
}

// awaitGone waits until the API server has no such pod, and returns when.
func awaitGone(t *testing.T, ns string, p *corev1.Pod) time.Time {
	t.Helper()
	eventually(t, 90*time.Second, "pod "+p.Name+" to be gone", func(ctx context.Context) (bool, string) {
		got, err := world.client.CoreV1().Pods(ns).Get(ctx, p.Name, metav1.GetOptions{})
		if err == nil && got.UID == p.UID {
			return false, describe([]corev1.Pod{*got})
		}
		return err == nil || apierrors.IsNotFound(err), fmt.Sprint(err)
	})
	return time.Now()
}

func TestLifecycleHooks(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	n := node(t, "edge-1")
	dir := hostDir(t, n, ns)

	// Where the httpGet hooks go, a server outside the cluster.
	l, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	called := make(chan string, 8)
	srv := &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		called <- r.URL.Path
	})}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	t.Cleanup(func() { srv.Close(); <-served })
	port := l.Addr().(*net.TCPAddr).Port

	startPod(t, ns, "hooked", fmt.Sprintf(`
nodeName: edge-1
terminationGracePeriodSeconds: 30
volumes: [{name: host, hostPath: {path: %s}}]
containers:
- name: exec
  args: [wait-sigterm, --grace, 0s]
  volumeMounts: [{name: host, mountPath: /host}]
  lifecycle:
    postStart: {exec: {command: [/bin/demo, write, /host/started]}}
    preStop: {exec: {command: [/bin/sleep, "3"]}}`, dir.inside))
	startPod(t, ns, "http", fmt.Sprintf(`
nodeName: edge-1
containers:
- name: c
  lifecycle:
    postStart: {httpGet: {host: %[1]s, port: %[2]d, path: /started}}
    preStop: {httpGet: {host: %[1]s, port: %[2]d, path: /stopping}}`, n.HostIP(), port))
	startPod(t, ns, "failing", `
nodeName: edge-1
containers: [{name: c, lifecycle: {postStart: {exec: {command: [/bin/demo, exit, "7"]}}}}]`)

	hooked := ready(t, ns, "hooked")
	if !dir.has("started") {
		t.Error("Ready before the postStart hook has run")
	}
	eventually(t, time.Minute, "it to wait for SIGTERM", outputHas(t, ns, "hooked", "waiting for SIGTERM"))
	log := followLog(t, ns, "hooked")
	asked := deletePod(t, ns, "hooked", nil)
	awaitGone(t, ns, hooked)
	if took := lineTime(t, log(), "got SIGTERM").Sub(asked); took < 2900*time.Millisecond {
		t.Errorf("SIGTERM came %s after the delete, before the preStop hook of 3 s had ended", took)
	}

	p := ready(t, ns, "http")
	if got := <-called; got != "/started" {
		t.Errorf("first hook: %q", got)
	}
	deletePod(t, ns, "http", nil)
	awaitGone(t, ns, p)
	select {
	case got := <-called:
		if got != "/stopping" {
			t.Errorf("second hook: %q", got)
		}
	default:
		t.Error("the pod is gone, but its preStop hook was not called")
	}
	awaitEvent(t, ns, "failing", "FailedPostStartHook", "")
	awaitPod(t, ns, "failing", time.Minute, "to be restarted", func(p *corev1.Pod) bool { return container(t, p, "c").RestartCount > 0 })
}

func TestGracefulDeletion(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	const spec = "{nodeName: edge-2, terminationGracePeriodSeconds: %d, containers: [{name: c, args: [wait-sigterm, --grace, %s]}]}"
	startPod(t, ns, "willing", fmt.Sprintf(spec, 60, "2s"))
	startPod(t, ns, "stubborn", fmt.Sprintf(spec, 3, "90s"))
	startPod(t, ns, "hurried", fmt.Sprintf(spec, 90, "90s"))
	startPod(t, ns, "forced", fmt.Sprintf(spec, 2, "90s"))
	pods := map[string]*corev1.Pod{}
	logs := map[string]func() string{}
	for _, name := range []string{"willing", "stubborn", "hurried", "forced"} {
		pods[name] = ready(t, ns, name)
		eventually(t, time.Minute, name+" to wait for SIGTERM", outputHas(t, ns, name, "waiting for SIGTERM"))
		logs[name] = followLog(t, ns, name)
	}
	asked := map[string]time.Time{}
	for name, grace := range map[string]*int64{"willing": nil, "stubborn": nil, "hurried": ptr.To[int64](2)} {
		asked[name] = deletePod(t, ns, name, grace)
	}
	// A pod being deleted stays visible until its containers have ended.
	p := awaitPod(t, ns, "willing", time.Minute, "to be terminating", func(p *corev1.Pod) bool { return p.DeletionTimestamp != nil })
	if p.UID != pods["willing"].UID {
		t.Error("another pod")
	}

	if took := awaitGone(t, ns, pods["willing"]).Sub(asked["willing"]); took < 2*time.Second || took > 45*time.Second {
		t.Errorf("willing took %s to go, wanted 2 s and not its grace of 60 s", took)
	}
	if log := logs["willing"](); !strings.Contains(log, "ending after 2s") {
		t.Errorf("willing was not let end: %s", log)
	}
	for name, grace := range map[string]time.Duration{"stubborn": 3 * time.Second, "hurried": 2 * time.Second} {
		if took := awaitGone(t, ns, pods[name]).Sub(asked[name]); took < grace || took > 45*time.Second {
			t.Errorf("%s took %s to go, wanted its grace of %s", name, took, grace)
		}
		if log := logs[name](); !strings.Contains(log, "got SIGTERM") || strings.Contains(log, "ending after") {
			t.Errorf("%s: %s", name, log)
		}
	}

	// Forced: the object goes at once, the containers soon after.
	deletePod(t, ns, "forced", ptr.To[int64](0))
	if _, err := world.client.CoreV1().Pods(ns).Get(t.Context(), "forced", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("after a forced delete: %v", err)
	}
	eventually(t, time.Minute, "the forced pod's container to end", func(ctx context.Context) (bool, string) {
		on, err := hasTask(ctx, node(t, "edge-2"), container(t, pods["forced"], "c"))
		return err == nil && !on, fmt.Sprint(on, err)
	})
}

// A force-deleted pod that is made again under its name, as a StatefulSet does
// it, must not run beside its successor.
func TestANamesakeWaitsForItsPredecessor(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	// It ends within the 2 s that a kubelet leaves to every container. The API
	// server deletes by force in two steps: it writes a grace of 0 into the pod,
	// then removes it. A node that sees the first kills after these 2 s, as any
	// kubelet does; one that only sees the pod gone leaves it its own grace.
	const spec = "{nodeName: edge-2, terminationGracePeriodSeconds: 30, containers: [{name: c, args: [wait-sigterm, --grace, 1s]}]}"
	startPod(t, ns, "one", spec)
	old := ready(t, ns, "one")
	eventually(t, time.Minute, "it to wait for SIGTERM", outputHas(t, ns, "one", "waiting for SIGTERM"))
	oldLog := followLog(t, ns, "one")

	deletePod(t, ns, "one", ptr.To[int64](0))
	startPod(t, ns, "one", spec)
	successor := ready(t, ns, "one")
	if successor.UID == old.UID {
		t.Fatal("the same UID")
	}
	if on, err := hasTask(t.Context(), node(t, "edge-2"), container(t, old, "c")); err != nil || on {
		t.Errorf("the predecessor's container is there: %v %v", on, err)
	}
	log, err := logOf(t.Context(), ns, "one", &corev1.PodLogOptions{Timestamps: true})
	if err != nil {
		t.Fatal(err)
	}
	end, start := lineTime(t, oldLog(), "ending after 1s"), lineTime(t, log, "waiting for SIGTERM")
	if !start.After(end) {
		t.Errorf("the successor started %s before its predecessor ended", end.Sub(start))
	}
}
