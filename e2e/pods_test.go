package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/remotecommand"
	"sigs.k8s.io/yaml"

	"github.com/skerry-io/skerry/e2e/cluster"
	"github.com/skerry-io/skerry/e2e/image"
)

// node returns one of the shared nodes.
func node(t *testing.T, name string) *cluster.Node {
	t.Helper()
	for _, n := range world.nodes {
		if n.Name() == name {
			return n
		}
	}
	t.Fatalf("no node %s", name)
	return nil
}

// podSpec reads a pod's spec. What nearly all pods here share need not be
// written: the demo image, and a grace of 1 s.
func podSpec(t *testing.T, manifest string) corev1.PodSpec {
	t.Helper()
	var spec corev1.PodSpec
	if err := yaml.UnmarshalStrict([]byte(manifest), &spec); err != nil {
		t.Fatalf("%v in\n%s", err, manifest)
	}
	for _, list := range [][]corev1.Container{spec.InitContainers, spec.Containers} {
		for i := range list {
			if list[i].Image == "" {
				list[i].Image = image.DemoName
			}
		}
	}
	if spec.TerminationGracePeriodSeconds == nil {
		grace := int64(1)
		spec.TerminationGracePeriodSeconds = &grace
	}
	return spec
}

// startPod creates a pod; see podSpec.
func startPod(t *testing.T, ns, name, manifest string) *corev1.Pod {
	t.Helper()
	p, err := world.client.CoreV1().Pods(ns).Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"name": name}},
		Spec:       podSpec(t, manifest),
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// ended waits for the pod to have succeeded or failed, as phase says.
func ended(t *testing.T, ns, name string, phase corev1.PodPhase) *corev1.Pod {
	t.Helper()
	return awaitPod(t, ns, name, 90*time.Second, "to be "+string(phase), func(p *corev1.Pod) bool { return p.Status.Phase == phase })
}

func container(t *testing.T, p *corev1.Pod, name string) corev1.ContainerStatus {
	t.Helper()
	for _, list := range [][]corev1.ContainerStatus{p.Status.InitContainerStatuses, p.Status.ContainerStatuses, p.Status.EphemeralContainerStatuses} {
		for _, s := range list {
			if s.Name == name {
				return s
			}
		}
	}
	return corev1.ContainerStatus{}
}

// podLog returns what a container has printed so far; container may be empty.
func podLog(t *testing.T, ns, pod, container string) string {
	t.Helper()
	out, err := logOf(t.Context(), ns, pod, &corev1.PodLogOptions{Container: container})
	if err != nil {
		t.Fatalf("log of %s: %v", pod, err)
	}
	return out
}

func logOf(ctx context.Context, ns, pod string, opts *corev1.PodLogOptions) (string, error) {
	b, err := world.client.CoreV1().Pods(ns).GetLogs(pod, opts).DoRaw(ctx)
	return string(b), err
}

// followLog begins to read a container's log; the function it returns waits
// for the log's end and returns all of it, with the time before each line.
func followLog(t *testing.T, ns, pod string) func() string {
	t.Helper()
	stream, err := world.client.CoreV1().Pods(ns).GetLogs(pod, &corev1.PodLogOptions{Follow: true, Timestamps: true}).Stream(t.Context())
	if err != nil {
		t.Fatalf("follow the log of %s: %v", pod, err)
	}
	var out bytes.Buffer
	done := make(chan error, 1)
	go func() {
		defer stream.Close()
		_, err := io.Copy(&out, stream)
		done <- err
	}()
	return func() string {
		t.Helper()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("log of %s: %v", pod, err)
			}
		case <-time.After(2 * time.Minute):
			t.Fatalf("the log of %s does not end", pod)
		}
		return out.String()
	}
}

// lineTime returns when a line of a log of followLog was written.
func lineTime(t *testing.T, log, text string) time.Time {
	t.Helper()
	for line := range strings.Lines(log) {
		stamp, rest, _ := strings.Cut(line, " ")
		if strings.Contains(rest, text) {
			at, err := time.Parse(time.RFC3339Nano, stamp)
			if err != nil {
				t.Fatal(err)
			}
			return at
		}
	}
	t.Fatalf("no line %q in the log:\n%s", text, log)
	return time.Time{}
}

// execIn runs a command in a container (the first, if not named), over a
// WebSocket as kubectl does, and wants it to succeed.
func execIn(t *testing.T, ns, pod, container string, command ...string) string {
	t.Helper()
	out, err := tryExec(t.Context(), ns, pod, container, command...)
	if err != nil {
		t.Fatalf("exec %s in %s: %v", strings.Join(command, " "), pod, err)
	}
	return out
}

func tryExec(ctx context.Context, ns, pod, container string, command ...string) (string, error) {
	rc, err := world.hub.RESTConfig()
	if err != nil {
		return "", err
	}
	url := world.client.CoreV1().RESTClient().Post().Namespace(ns).Resource("pods").Name(pod).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{Container: container, Command: command, Stdout: true, Stderr: true}, scheme.ParameterCodec).URL()
	exec, err := remotecommand.NewWebSocketExecutor(rc, "GET", url.String())
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var stdout, stderr bytes.Buffer
	if err := exec.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: &stdout, Stderr: &stderr}); err != nil {
		return stdout.String(), fmt.Errorf("%w: %s", err, stderr.String())
	}
	return stdout.String(), nil
}

// awaitEvent waits for an Event about a pod with that reason and, in its
// message, that text.
func awaitEvent(t *testing.T, ns, pod, reason, text string) corev1.Event {
	t.Helper()
	var found corev1.Event
	eventually(t, time.Minute, fmt.Sprintf("an Event %s %q about %s", reason, text, pod), func(ctx context.Context) (bool, string) {
		list, err := world.client.CoreV1().Events(ns).List(ctx, metav1.ListOptions{
			FieldSelector: fields.OneTermEqualSelector("involvedObject.name", pod).String()})
		if err != nil {
			return false, err.Error()
		}
		var saw strings.Builder
		for _, e := range list.Items {
			if e.Reason == reason && strings.Contains(e.Message, text) {
				found = e
				return true, ""
			}
			fmt.Fprintf(&saw, "%s: %s; ", e.Reason, e.Message)
		}
		return false, saw.String()
	})
	return found
}

// hasTask tells whether containerd on the node still runs that container.
func hasTask(ctx context.Context, n *cluster.Node, status corev1.ContainerStatus) (bool, error) {
	_, id, _ := strings.Cut(status.ContainerID, "://")
	if id == "" {
		return false, fmt.Errorf("container %s has no id", status.Name)
	}
	out, err := n.Machine.Run(ctx, "ctr", "-n", "k8s.io", "tasks", "ls", "-q")
	return strings.Contains(string(out), id), err
}

func TestEventsAndStatusOfAPod(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	// No nodeName: the scheduler of the standalone control plane places it.
	startPod(t, ns, "placed", `
nodeSelector: {kubernetes.io/hostname: edge-2}
containers: [{name: c, resources: {requests: {cpu: 10m, memory: 16Mi}}}]`)
	p := ready(t, ns, "placed")
	if p.Spec.NodeName != "edge-2" {
		t.Errorf("placed on %q", p.Spec.NodeName)
	}
	if !strings.HasPrefix(p.Status.PodIP, "10.200.") || len(p.Status.PodIPs) != 1 || p.Status.HostIP == "" || p.Status.StartTime == nil {
		t.Errorf("addresses and start: %+v", p.Status)
	}
	if p.Status.QOSClass != corev1.PodQOSBurstable {
		t.Errorf("QoS class %s", p.Status.QOSClass)
	}
	status := container(t, p, "c")
	if !strings.HasPrefix(status.ContainerID, "containerd://") || status.Image != image.DemoName || !strings.Contains(status.ImageID, "sha256:") {
		t.Errorf("container status: %+v", status)
	}
	for _, c := range []corev1.PodConditionType{corev1.PodScheduled, corev1.PodInitialized, corev1.ContainersReady, corev1.PodReady} {
		found := false
		for _, have := range p.Status.Conditions {
			found = found || have.Type == c && have.Status == corev1.ConditionTrue && !have.LastTransitionTime.IsZero()
		}
		if !found {
			t.Errorf("condition %s is not True: %+v", c, p.Status.Conditions)
		}
	}
	if e := awaitEvent(t, ns, "placed", "Scheduled", "edge-2"); e.ReportingController != "default-scheduler" && e.Source.Component != "default-scheduler" {
		t.Errorf("Scheduled: %+v", e)
	}
	for _, reason := range []string{"Pulled", "Created", "Started"} {
		e := awaitEvent(t, ns, "placed", reason, "")
		if e.Source.Component != "kubelet" || e.Source.Host != "edge-2" || e.ReportingController != "kubelet" || e.ReportingInstance != "edge-2" {
			t.Errorf("%s: source %+v, reported by %s %s", reason, e.Source, e.ReportingController, e.ReportingInstance)
		}
		if e.InvolvedObject.UID != p.UID || e.InvolvedObject.Kind != "Pod" || e.Type != corev1.EventTypeNormal || e.FirstTimestamp.IsZero() {
			t.Errorf("%s: %+v", reason, e)
		}
	}
}

func TestInitAndSidecarContainers(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	startPod(t, ns, "ordered", `
nodeName: edge-1
restartPolicy: Never
volumes: [{name: shared, emptyDir: {}}]
initContainers:
- {name: first, args: [write, /shared/first], volumeMounts: [{name: shared, mountPath: /shared}]}
- name: sidecar
  restartPolicy: Always
  args: [serve, --listen, ":8081"]
  startupProbe: {httpGet: {path: /healthz, port: 8081}, periodSeconds: 1}
- {name: second, args: [get, "http://127.0.0.1:8081/healthz"]}
containers:
- {name: main, args: [ls, /shared], volumeMounts: [{name: shared, mountPath: /shared}]}`)
	startPod(t, ns, "stuck", `
nodeName: edge-1
restartPolicy: Never
initContainers: [{name: bad, args: [exit, "4"]}]
containers: [{name: main, args: [echo, never]}]`)
	startPod(t, ns, "retried", `
nodeName: edge-2
restartPolicy: Always
initContainers: [{name: bad, args: [exit, "5"]}]
containers: [{name: main}]`)
	startPod(t, ns, "restless", `
nodeName: edge-2
initContainers: [{name: sidecar, restartPolicy: Always, args: [exit, "0"]}]
containers: [{name: main}]`)

	p := ended(t, ns, "ordered", corev1.PodSucceeded)
	if out := podLog(t, ns, "ordered", "main"); out != "first\n" {
		t.Errorf("main sees %q", out)
	}
	if out := podLog(t, ns, "ordered", "second"); out != "ok\n" {
		t.Errorf("second got %q from the sidecar", out)
	}
	first, sidecar := container(t, p, "first").State.Terminated, container(t, p, "sidecar").State.Terminated
	second, main := container(t, p, "second").State.Terminated, container(t, p, "main").State.Terminated
	if first == nil || sidecar == nil || second == nil || main == nil {
		t.Fatalf("not all are terminated: %s", describe([]corev1.Pod{*p}))
	}
	if sidecar.StartedAt.Before(&first.FinishedAt) || second.StartedAt.Before(&sidecar.StartedAt) || main.StartedAt.Before(&second.FinishedAt) || sidecar.FinishedAt.Before(&main.FinishedAt) {
		t.Errorf("order: %s", describe([]corev1.Pod{*p}))
	}

	p = ended(t, ns, "stuck", corev1.PodFailed)
	if s := container(t, p, "bad"); s.State.Terminated == nil || s.State.Terminated.ExitCode != 4 || s.RestartCount != 0 {
		t.Errorf("bad: %+v", s)
	}
	if s := container(t, p, "main"); s.State.Waiting == nil || s.State.Waiting.Reason != "PodInitializing" || s.ContainerID != "" {
		t.Errorf("main: %+v", s)
	}
	p = awaitPod(t, ns, "retried", time.Minute, "to back off", func(p *corev1.Pod) bool {
		s := container(t, p, "bad")
		return s.RestartCount > 0 && s.State.Waiting != nil && s.State.Waiting.Reason == "CrashLoopBackOff"
	})
	if s := container(t, p, "main"); s.ContainerID != "" || p.Status.Phase != corev1.PodPending {
		t.Errorf("main started although init failed: %s", describe([]corev1.Pod{*p}))
	}
	p = awaitPod(t, ns, "restless", time.Minute, "to restart its sidecar", func(p *corev1.Pod) bool {
		return container(t, p, "sidecar").RestartCount > 0 && container(t, p, "main").State.Running != nil
	})
	if n := container(t, p, "main").RestartCount; n != 0 {
		t.Errorf("main restarted %d times", n)
	}
}

func TestRestartPoliciesAndBackOff(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	run := func(name, policy, code string) {
		startPod(t, ns, name, fmt.Sprintf("{nodeName: edge-1, restartPolicy: %s, containers: [{name: c, args: [exit, %q]}]}", policy, code))
	}
	run("always-0", "Always", "0")
	run("always-1", "Always", "1")
	run("onfailure-0", "OnFailure", "0")
	run("onfailure-3", "OnFailure", "3")
	run("never-0", "Never", "0")
	run("never-3", "Never", "3")

	for name, phase := range map[string]corev1.PodPhase{
		"onfailure-0": corev1.PodSucceeded, "never-0": corev1.PodSucceeded, "never-3": corev1.PodFailed,
	} {
		p := ended(t, ns, name, phase)
		s := container(t, p, "c")
		want := int32(0)
		if name == "never-3" {
			want = 3
		}
		if s.RestartCount != 0 || s.State.Terminated == nil || s.State.Terminated.ExitCode != want {
			t.Errorf("%s: %+v", name, s)
		}
	}
	for name, code := range map[string]int32{"always-0": 0, "always-1": 1, "onfailure-3": 3} {
		// The kubelet looks at the pod again when the back-off is over, unless
		// something else makes it (pod_workers.go, completeWork): until then
		// the state may still be the last end, and not yet CrashLoopBackOff.
		// That it backs off is the Event's word.
		p := awaitPod(t, ns, name, time.Minute, "to end again after a restart", func(p *corev1.Pod) bool {
			s := container(t, p, "c")
			backsOff := s.State.Waiting != nil && s.State.Waiting.Reason == "CrashLoopBackOff"
			return s.RestartCount > 0 && (backsOff || s.State.Terminated != nil)
		})
		last := container(t, p, "c").LastTerminationState.Terminated
		if last == nil || last.ExitCode != code {
			t.Errorf("%s: last state %+v", name, last)
		}
		awaitEvent(t, ns, name, "BackOff", "Back-off restarting failed container")
	}
}

func TestProbes(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	n := node(t, "edge-1")
	dir := hostDir(t, n, ns)
	startPod(t, ns, "killed", `
nodeName: edge-1
containers:
- {name: http, args: [serve, --listen, ":8081"], livenessProbe: {httpGet: {path: "/files?path=/missing", port: 8081}, periodSeconds: 1, failureThreshold: 1}}
- {name: exec, args: [serve, --listen, ":8082"], livenessProbe: {exec: {command: [/bin/cat, /missing]}, periodSeconds: 1, failureThreshold: 1}}
- {name: tcp, args: [serve, --listen, ":8083"], livenessProbe: {tcpSocket: {port: 9}, periodSeconds: 1, failureThreshold: 1}}
- name: well
  args: [serve, --listen, ":8084"]
  livenessProbe: {httpGet: {path: /healthz, port: 8084}, periodSeconds: 1, failureThreshold: 1}
  readinessProbe: {tcpSocket: {port: 8084}, periodSeconds: 1}
  startupProbe: {exec: {command: [/bin/echo, ok]}, periodSeconds: 1}`)
	startPod(t, ns, "slow", fmt.Sprintf(`
nodeName: edge-1
volumes: [{name: host, hostPath: {path: %s}}]
containers:
- name: c
  volumeMounts: [{name: host, mountPath: /host}]
  startupProbe: {httpGet: {path: "/files?path=/host/started", port: 8080}, periodSeconds: 1, failureThreshold: 600}
  livenessProbe: {exec: {command: [/bin/cat, /host/started]}, periodSeconds: 1, failureThreshold: 1}
  readinessProbe: {httpGet: {path: "/files?path=/host/ready", port: 8080}, periodSeconds: 1, failureThreshold: 1}`, dir.inside))

	// Without the startup probe, liveness would kill it at once.
	awaitEvent(t, ns, "slow", "Unhealthy", "Startup probe failed")
	p := awaitPod(t, ns, "slow", time.Minute, "to run", func(p *corev1.Pod) bool { return container(t, p, "c").State.Running != nil })
	if s := container(t, p, "c"); *s.Started || s.Ready || s.RestartCount != 0 {
		t.Errorf("before it started: %+v", s)
	}
	dir.write(t, "started", "")
	awaitPod(t, ns, "slow", time.Minute, "to have started", func(p *corev1.Pod) bool { return *container(t, p, "c").Started })
	awaitEvent(t, ns, "slow", "Unhealthy", "Readiness probe failed")
	dir.write(t, "ready", "")
	ready(t, ns, "slow")
	dir.remove(t, "ready")
	p = awaitPod(t, ns, "slow", time.Minute, "to be no longer Ready", func(p *corev1.Pod) bool { return !isReady(p) })
	if s := container(t, p, "c"); s.RestartCount != 0 || s.State.Running == nil {
		t.Errorf("readiness restarted it: %+v", s)
	}
	dir.remove(t, "started")
	awaitPod(t, ns, "slow", time.Minute, "to be restarted by its liveness probe", func(p *corev1.Pod) bool { return container(t, p, "c").RestartCount > 0 })

	p = awaitPod(t, ns, "killed", time.Minute, "to be restarted", func(p *corev1.Pod) bool {
		return container(t, p, "http").RestartCount > 0 && container(t, p, "exec").RestartCount > 0 && container(t, p, "tcp").RestartCount > 0
	})
	if s := container(t, p, "well"); s.RestartCount != 0 || !s.Ready {
		t.Errorf("well: %+v", s)
	}
	awaitEvent(t, ns, "killed", "Unhealthy", "Liveness probe failed: HTTP probe failed with statuscode: 404")
	awaitEvent(t, ns, "killed", "Unhealthy", "connection refused")
	awaitEvent(t, ns, "killed", "Killing", "Container exec failed liveness probe, will be restarted")
}

func TestReadinessGate(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	startPod(t, ns, "gated", `
nodeName: edge-2
readinessGates: [{conditionType: example.com/approved}]
containers: [{name: c}]`)
	condition := func(p *corev1.Pod, typ corev1.PodConditionType) corev1.ConditionStatus {
		for _, c := range p.Status.Conditions {
			if c.Type == typ {
				return c.Status
			}
		}
		return ""
	}
	p := awaitPod(t, ns, "gated", time.Minute, "to have ready containers", func(p *corev1.Pod) bool {
		return condition(p, corev1.ContainersReady) == corev1.ConditionTrue
	})
	if isReady(p) {
		t.Fatal("Ready although nobody set the gate's condition")
	}
	set := func(status string) {
		t.Helper()
		patch := fmt.Sprintf(`{"status":{"conditions":[{"type":"example.com/approved","status":%q}]}}`, status)
		kubectl(t, "patch", "-n", ns, "pod", "gated", "--subresource=status", "--type=strategic", "-p", patch)
	}
	set("True")
	p = ready(t, ns, "gated")
	if condition(p, "example.com/approved") != corev1.ConditionTrue {
		t.Errorf("the node took the gate's condition away: %+v", p.Status.Conditions)
	}
	set("False")
	awaitPod(t, ns, "gated", time.Minute, "to be no longer Ready", func(p *corev1.Pod) bool {
		return !isReady(p) && condition(p, corev1.ContainersReady) == corev1.ConditionTrue
	})
}

func TestEphemeralContainer(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	startPod(t, ns, "debugged", `{nodeName: edge-1, containers: [{name: c, args: [serve, --message, "find me"]}]}`)
	p := ready(t, ns, "debugged")
	p.Spec.EphemeralContainers = []corev1.EphemeralContainer{{
		EphemeralContainerCommon: corev1.EphemeralContainerCommon{
			Name: "debugger", Image: image.DemoName, Args: []string{"cat", "/proc/1/cmdline"},
			ImagePullPolicy: corev1.PullIfNotPresent, TerminationMessagePolicy: corev1.TerminationMessageReadFile,
		},
		TargetContainerName: "c",
	}}
	if _, err := world.client.CoreV1().Pods(ns).UpdateEphemeralContainers(t.Context(), "debugged", p, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	after := awaitPod(t, ns, "debugged", time.Minute, "to have run the ephemeral container", func(p *corev1.Pod) bool {
		return container(t, p, "debugger").State.Terminated != nil
	})
	// It shares the target's process namespace.
	if out := podLog(t, ns, "debugged", "debugger"); !strings.Contains(out, "find me") {
		t.Errorf("process 1 of the target is %q", out)
	}
	if a, b := container(t, p, "c"), container(t, after, "c"); a.ContainerID != b.ContainerID {
		t.Error("the target was restarted")
	}
}
