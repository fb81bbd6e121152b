package kubelet_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/gorilla/websocket"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	corev1defaults "k8s.io/kubernetes/pkg/apis/core/v1"
	"k8s.io/utils/ptr"

	"github.com/skerry-io/skerry/e2e/image"
	"github.com/skerry-io/skerry/e2e/machine"
	"github.com/skerry-io/skerry/edgecore/store"
)

const nodeName = "edge-1"

// TestKubelet runs pods on a machine with a real containerd. It is one test,
// as the machine takes longer to make than most of what is tried on it.
func TestKubelet(t *testing.T) {
	if testing.Short() {
		t.Skip("runs a machine with containerd")
	}
	e := newEdge(t)
	t.Run("check", func(t *testing.T) { checkFindings(t, e) })

	started := time.Now()
	e.start(t)
	e.apply(t, store.Delta{Synced: "epoch-1"})
	node := e.awaitNodeReady(t)
	t.Logf("process start to node ready: %v", time.Since(started).Round(10*time.Millisecond))
	t.Run("node", func(t *testing.T) { checkNode(t, e, node) })

	e.apply(t, store.Delta{Upserts: objects(t, greeting(), password())})
	asked := time.Now()
	e.apply(t, store.Delta{Upserts: objects(t, webPod("web"))})
	pod := e.awaitReady(t, "web")
	t.Logf("pod delivered to ready: %v", time.Since(asked).Round(10*time.Millisecond))
	e.logMemory(t, "1 pod")

	t.Run("pod", func(t *testing.T) { checkPod(t, pod) })
	t.Run("exec", func(t *testing.T) { checkExec(t, e) })
	t.Run("logs", func(t *testing.T) { checkLogs(t, e) })
	t.Run("port-forward", func(t *testing.T) { checkPortForward(t, e) })
	t.Run("endpoints", func(t *testing.T) { checkEndpoints(t, e) })
	t.Run("stats", func(t *testing.T) { checkStats(t, e, pod) })
	t.Run("no listener", func(t *testing.T) { checkNoListener(t, e) })
	t.Run("terminal", func(t *testing.T) { checkTerminal(t, e) })
	t.Run("static pod", func(t *testing.T) { checkStaticPod(t, e) })
	t.Run("containerd restarts", func(t *testing.T) { checkContainerdRestart(t, e) })

	t.Run("kill and restart", func(t *testing.T) {
		e.kill(t)
		again := time.Now()
		e.start(t)
		e.awaitServed(t, "web")
		t.Logf("restart to pod served: %v", time.Since(again).Round(10*time.Millisecond))
		checkSamePod(t, pod, e.pod(t, "web"))
		if out, _, code := e.exec(t, "web", "cat", "/work/made"); code != 0 || out != "" {
			t.Errorf("the emptyDir's file: %q, exit code %d", out, code)
		}
	})

	t.Run("many pods", func(t *testing.T) {
		began := time.Now()
		var more []*corev1.Pod
		for i := range 29 {
			more = append(more, smallPod(fmt.Sprintf("small-%02d", i)))
		}
		var delta store.Delta
		for _, p := range more {
			delta.Upserts = append(delta.Upserts, objects(t, p)...)
		}
		e.apply(t, delta)
		for _, p := range more {
			e.awaitReady(t, p.Name)
		}
		t.Logf("29 pods delivered to all ready: %v", time.Since(began).Round(10*time.Millisecond))
		e.logMemory(t, "30 pods")
		if d, err := time.ParseDuration(os.Getenv("SKERRY_TEST_IDLE")); err == nil {
			before := e.cpu(t)
			<-time.After(d)
			t.Logf("processor time with 30 pods, idle for %v: %.2f s/min", d, (e.cpu(t)-before).Seconds()/d.Minutes())
			e.logMemory(t, "30 pods, then idle")
		}
		var gone store.Delta
		for _, p := range more {
			gone.Upserts = append(gone.Upserts, deleted(t, e.pod(t, p.Name))...)
		}
		e.apply(t, gone)
		for _, p := range more {
			e.awaitGone(t, p.Name)
		}
	})

	t.Run("power cut, containerd late, no cloud", func(t *testing.T) { checkReboot(t, e) })
	t.Run("address", func(t *testing.T) { checkAddressChange(t, e) })

	t.Run("delete", func(t *testing.T) {
		e.apply(t, store.Delta{Upserts: deleted(t, e.pod(t, "web"))})
		e.awaitGone(t, "web")
	})
	e.stop(t)
}

// edge is a machine with an edge process.
type edge struct {
	m       *machine.Machine
	cfg     edgeConfig
	proc    *machine.Proc
	control *http.Client
	kubelet *http.Client
}

func newEdge(t *testing.T) *edge {
	t.Helper()
	before, err := machine.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	binary, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("kubelet-%d", os.Getpid())
	m, err := machine.New(machine.Config{
		Dir: filepath.Join(t.TempDir(), name), Name: name,
		Binds: []machine.Bind{{Host: binary, Inside: edgeBinary}},
		Log:   slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 2*time.Minute)
		defer cancel()
		if err := m.Destroy(ctx); err != nil {
			t.Error(err)
		}
		left, err := machine.Leaks(ctx, before)
		if err != nil {
			t.Error(err)
		}
		for _, l := range left {
			if strings.Contains(l, name) {
				t.Errorf("left behind: %s", l)
			}
		}
	})
	if err := m.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	importImages(t, m)
	e := &edge{m: m, cfg: edgeConfig{NodeName: nodeName, CgroupRoot: m.CgroupRoot(), StaticPodPath: "/etc/skerry/pods"}}
	e.control = overSocket(m, controlSocket)
	e.kubelet = overSocket(m, kubeletSocket)
	return e
}

func importImages(t *testing.T, m *machine.Machine) {
	t.Helper()
	dir := t.TempDir()
	for _, build := range []func(context.Context, string) (string, error){image.Pause, image.Demo} {
		tar, err := build(t.Context(), dir)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.ImportImage(t.Context(), tar); err != nil {
			t.Fatal(err)
		}
	}
}

// overSocket is a client of one of the edge process's sockets.
func overSocket(m *machine.Machine, path string) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true, // the process behind the socket changes
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", m.Path(path))
		},
	}}
}

// start runs the edge process and returns when its control socket answers.
func (e *edge) start(t *testing.T) {
	t.Helper()
	cfg, err := json.Marshal(e.cfg)
	if err != nil {
		t.Fatal(err)
	}
	e.proc, err = e.m.Exec(context.WithoutCancel(t.Context()), machine.Command{
		Name: "edge", Args: []string{edgeBinary}, Env: []string{edgeVariable + "=" + string(cfg)},
		Stdout: e.log(t), Stderr: e.log(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	await(t, "the edge process answers", func() error {
		select {
		case <-e.proc.Done():
			return fatal{fmt.Errorf("it ended: %w", e.proc.Wait(t.Context()))}
		default:
		}
		_, err := call(t, e.control, http.MethodGet, "/list/nodes", nil)
		return err
	})
}

// log is where the edge process writes; the test shows it when it fails.
func (e *edge) log(t *testing.T) *os.File {
	t.Helper()
	f, err := os.OpenFile(e.m.Disk("/var/log/edge.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f.Close()
		if t.Failed() || os.Getenv("SKERRY_TEST_SHOW_LOG") != "" {
			text, _ := os.ReadFile(e.m.Disk("/var/log/edge.log"))
			t.Logf("the edge process's log:\n%s", text)
		}
	})
	return f
}

func (e *edge) kill(t *testing.T) {
	t.Helper()
	if err := e.proc.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-e.proc.Done()
}

func (e *edge) stop(t *testing.T) {
	t.Helper()
	if err := e.proc.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := e.proc.Wait(ctx); err != nil {
		t.Errorf("the edge process ended badly: %v", err)
	}
}

func (e *edge) apply(t *testing.T, d store.Delta) {
	t.Helper()
	body, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := call(t, e.control, http.MethodPost, "/delta", body); err != nil {
		t.Fatal(err)
	}
}

func (e *edge) pod(t *testing.T, name string) *corev1.Pod {
	t.Helper()
	var pod corev1.Pod
	if err := get(t, e.control, "/object/pods/default/"+name, &pod); err != nil {
		t.Fatal(err)
	}
	return &pod
}

func (e *edge) awaitReady(t *testing.T, name string) *corev1.Pod {
	t.Helper()
	var pod corev1.Pod
	await(t, "pod "+name+" is ready", func() error {
		pod = corev1.Pod{}
		if err := get(t, e.control, "/object/pods/default/"+name, &pod); err != nil {
			return err
		}
		for _, c := range pod.Status.Conditions {
			if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue && pod.Status.Phase == corev1.PodRunning {
				return nil
			}
		}
		status, _ := json.Marshal(pod.Status)
		return fmt.Errorf("status %s", status)
	})
	return &pod
}

func (e *edge) awaitGone(t *testing.T, name string) {
	t.Helper()
	await(t, "pod "+name+" is gone", func() error {
		var pod corev1.Pod
		if err := get(t, e.control, "/object/pods/default/"+name, &pod); err == nil {
			return errors.New("still there, phase " + string(pod.Status.Phase))
		}
		return nil
	})
}

func (e *edge) awaitNodeReady(t *testing.T) *corev1.Node {
	t.Helper()
	var node corev1.Node
	await(t, "the node is ready", func() error {
		select {
		case <-e.proc.Done():
			return fatal{fmt.Errorf("the edge process ended: %w", e.proc.Wait(t.Context()))}
		default:
		}
		node = corev1.Node{}
		if err := get(t, e.control, "/object/nodes/"+nodeName, &node); err != nil {
			return err
		}
		for _, c := range node.Status.Conditions {
			if c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue {
				return nil
			}
		}
		return fmt.Errorf("conditions %+v", node.Status.Conditions)
	})
	return &node
}

// awaitServed waits until the kubelet itself has the pod with its containers.
func (e *edge) awaitServed(t *testing.T, name string) {
	t.Helper()
	await(t, "the kubelet serves pod "+name, func() error {
		_, _, code := e.tryExec(t, name, "cat", "/conf/greeting")
		if code != 0 {
			return fmt.Errorf("exec: exit code %d", code)
		}
		return nil
	})
}

// logMemory shows what the edge process holds after a forced collection.
func (e *edge) logMemory(t *testing.T, when string) {
	t.Helper()
	before := e.rss(t)
	if _, err := call(t, e.control, http.MethodPost, "/gc", nil); err != nil {
		t.Fatal(err)
	}
	t.Logf("memory with %s: %s; after a collection: %s", when, before, e.rss(t))
}

func (e *edge) rss(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(e.m.Path(fmt.Sprintf("/proc/%d/status", e.proc.PID())))
	if err != nil {
		t.Fatal(err)
	}
	var parts []string
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "RssAnon") || strings.HasPrefix(line, "RssFile") {
			parts = append(parts, strings.Join(strings.Fields(line), " "))
		}
	}
	return strings.Join(parts, ", ")
}

// exec runs a command in the pod's first container by way of the kubelet.
func (e *edge) exec(t *testing.T, pod string, command ...string) (stdout, stderr string, code int) {
	t.Helper()
	stdout, stderr, code = e.tryExec(t, pod, command...)
	if code < 0 {
		t.Fatalf("exec %v in %s: %s", command, pod, stderr)
	}
	return stdout, stderr, code
}

// dial opens a WebSocket to the kubelet. Channels: 0 stdin, 1 stdout, 2 stderr,
// 3 the end.
func (e *edge) dial(t *testing.T, path string) (*websocket.Conn, error) {
	t.Helper()
	d := websocket.Dialer{
		Subprotocols: []string{"v4.channel.k8s.io"},
		NetDialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", e.m.Path(kubeletSocket))
		},
	}
	ws, res, err := d.DialContext(t.Context(), "ws://kubelet"+path, nil)
	if err != nil {
		if res != nil {
			b, _ := io.ReadAll(io.LimitReader(res.Body, 1<<16))
			err = fmt.Errorf("%w: %s", err, b)
		}
		return nil, err
	}
	return ws, ws.SetReadDeadline(time.Now().Add(30 * time.Second))
}

// tryExec returns code -1 and the reason in stderr when nothing could be run.
func (e *edge) tryExec(t *testing.T, pod string, command ...string) (stdout, stderr string, code int) {
	t.Helper()
	query := url.Values{"output": {"1"}, "error": {"1"}, "command": command}
	ws, err := e.dial(t, "/exec/default/"+pod+"/main?"+query.Encode())
	if err != nil {
		return "", err.Error(), -1
	}
	defer ws.Close()
	var streams [4]bytes.Buffer
	for {
		_, b, err := ws.ReadMessage()
		if err != nil {
			break
		}
		if len(b) > 0 && int(b[0]) < len(streams) {
			streams[b[0]].Write(b[1:])
		}
	}
	var status metav1.Status
	if err := json.Unmarshal(streams[3].Bytes(), &status); err != nil {
		return "", "no exit status: " + streams[3].String(), -1
	}
	if status.Status != metav1.StatusSuccess {
		code = -1
		if status.Details != nil {
			for _, c := range status.Details.Causes {
				if c.Type == "ExitCode" {
					fmt.Sscan(c.Message, &code)
				}
			}
		}
	}
	return streams[1].String(), streams[2].String() + status.Message, code
}

// webPod uses what most pods use: an init container, a ConfigMap as a volume, a
// Secret in the environment, an emptyDir, a token, and all three probes.
func webPod(name string) *corev1.Pod {
	pod := newPod(name)
	pod.Spec.InitContainers = []corev1.Container{{
		Name: "init", Image: image.DemoName, Command: []string{"/bin/demo", "write", "/work/made"},
		VolumeMounts: []corev1.VolumeMount{{Name: "work", MountPath: "/work"}},
	}}
	pod.Spec.Containers = []corev1.Container{{
		Name: "main", Image: image.DemoName, Command: []string{"/bin/demo", "serve", "--log-every", "1s"},
		Env: []corev1.EnvVar{
			{Name: "PASSWORD", ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: "password"}, Key: "value"}}},
			{Name: "NODE_IP", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "status.hostIP"}}},
		},
		VolumeMounts: []corev1.VolumeMount{
			{Name: "work", MountPath: "/work"}, {Name: "conf", MountPath: "/conf"}, {Name: "token", MountPath: "/token"},
		},
		StartupProbe:   &corev1.Probe{PeriodSeconds: 1, FailureThreshold: 30, ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(8080)}}},
		LivenessProbe:  &corev1.Probe{PeriodSeconds: 5, ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/healthz", Port: intstr.FromInt32(8080)}}},
		ReadinessProbe: &corev1.Probe{PeriodSeconds: 1, ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"/bin/demo", "get", "http://127.0.0.1:8080/readyz"}}}},
	}}
	pod.Spec.Volumes = []corev1.Volume{
		{Name: "work", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
		{Name: "conf", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "greeting"}}}},
		{Name: "token", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
			{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Path: "token"}},
		}}}},
	}
	return finished(pod)
}

func smallPod(name string) *corev1.Pod {
	pod := newPod(name)
	pod.Spec.Containers = []corev1.Container{{
		Name: "main", Image: image.DemoName, Command: []string{"/bin/demo", "serve", "--log-every", "0"},
		ReadinessProbe: &corev1.Probe{PeriodSeconds: 10, ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/healthz", Port: intstr.FromInt32(8080)}}},
	}}
	return finished(pod)
}

func newPod(name string) *corev1.Pod {
	return &corev1.Pod{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default", UID: types.UID(uuid.NewString()), CreationTimestamp: metav1.Now().Rfc3339Copy()},
		Spec: corev1.PodSpec{
			NodeName: nodeName, ServiceAccountName: "default", EnableServiceLinks: ptr.To(false),
			TerminationGracePeriodSeconds: ptr.To[int64](1),
		},
	}
}

// finished defaults the pod as an API server would have; the kubelet does not.
func finished(pod *corev1.Pod) *corev1.Pod {
	corev1defaults.SetObjectDefaults_Pod(pod)
	return pod
}

func greeting() *corev1.ConfigMap {
	return &corev1.ConfigMap{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "ConfigMap"},
		ObjectMeta: metav1.ObjectMeta{Name: "greeting", Namespace: "default", UID: types.UID(uuid.NewString())},
		Data:       map[string]string{"greeting": "hello from the cloud"},
	}
}

func password() *corev1.Secret {
	return &corev1.Secret{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"},
		ObjectMeta: metav1.ObjectMeta{Name: "password", Namespace: "default", UID: types.UID(uuid.NewString())},
		Data:       map[string][]byte{"value": []byte("open sesame")},
	}
}

// objects are upserts as the feed delivers them.
func objects(t *testing.T, all ...metav1.Object) []store.Upsert {
	t.Helper()
	var upserts []store.Upsert
	for _, o := range all {
		body, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		resource := map[string]string{"*v1.Pod": "pods", "*v1.ConfigMap": "configmaps", "*v1.Secret": "secrets"}[fmt.Sprintf("%T", o)]
		upserts = append(upserts, store.Upsert{
			Key: store.Key{Resource: resource, Namespace: o.GetNamespace(), Name: o.GetName()},
			UID: string(o.GetUID()), Rev: uuid.NewString(), Body: body,
		})
	}
	return upserts
}

// deleted is the pod as the API server shows it after a delete.
func deleted(t *testing.T, pod *corev1.Pod) []store.Upsert {
	t.Helper()
	pod = pod.DeepCopy()
	pod.DeletionTimestamp = ptr.To(metav1.NewTime(time.Now().Add(time.Second)).Rfc3339Copy())
	pod.DeletionGracePeriodSeconds = ptr.To[int64](1)
	return objects(t, pod)
}

// call makes one request and returns the body of a good answer.
func call(t *testing.T, c *http.Client, method, path string, body []byte) ([]byte, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://edge"+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	res, err := c.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, 64<<20))
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s %s: %s: %s", method, path, res.Status, bytes.TrimSpace(b))
	}
	return b, nil
}

func get(t *testing.T, c *http.Client, path string, into any) error {
	t.Helper()
	b, err := call(t, c, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, into)
}

// fatal ends an await at once.
type fatal struct{ error }

// await polls until check returns nil.
func await(t *testing.T, what string, check func() error) {
	t.Helper()
	awaitEvery(t, 50*time.Millisecond, what, check)
}

func awaitEvery(t *testing.T, period time.Duration, what string, check func() error) {
	t.Helper()
	deadline := time.After(2 * time.Minute)
	tick := time.NewTicker(period)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		var f fatal
		if errors.As(err, &f) {
			t.Fatalf("%s: %v", what, err)
		}
		select {
		case <-deadline:
			t.Fatalf("not in time: %s: %v", what, err)
		case <-tick.C:
		}
	}
}
