package kubelet_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/skerry-io/skerry/e2e/image"
	"github.com/skerry-io/skerry/e2e/machine"
	"github.com/skerry-io/skerry/edgecore/store"
)

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
