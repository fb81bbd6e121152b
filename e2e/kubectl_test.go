package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"
)

// Both protocols that kubectl speaks to the API server for exec, attach, cp
// and port-forward: WebSocket, and SPDY of kubectl before 1.31.
var protocols = map[string][]string{
	"WebSocket": {"KUBECTL_REMOTE_COMMAND_WEBSOCKETS=true", "KUBECTL_PORT_FORWARD_WEBSOCKETS=true"},
	"SPDY":      {"KUBECTL_REMOTE_COMMAND_WEBSOCKETS=false", "KUBECTL_PORT_FORWARD_WEBSOCKETS=false"},
}

// running is a kubectl that runs beside the test.
type running struct {
	cmd            *exec.Cmd
	stdout, stderr *output
	done           chan struct{}
	err            error // once done is closed
}

// kubectlStart runs kubectl in the background. It is killed when the test
// ends.
func kubectlStart(t *testing.T, env []string, stdin io.Reader, args ...string) *running {
	t.Helper()
	cmd := world.hub.KubectlCommand(context.Background(), args...)
	cmd.Env = append(cmd.Env, env...)
	r := &running{cmd: cmd, stdout: newOutput(), stderr: newOutput(), done: make(chan struct{})}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, r.stdout, r.stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	// Once it has ended, a reader of the test's own that gives no more input is
	// not waited for.
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		r.err = cmd.Wait()
		close(r.done)
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-r.done
	})
	return r
}

// wait returns the exit code.
func (r *running) wait(t *testing.T, within time.Duration) int {
	t.Helper()
	select {
	case <-r.done:
		return r.cmd.ProcessState.ExitCode()
	case <-time.After(within):
		t.Fatalf("%s did not end within %s; stdout %q, stderr %q", strings.Join(r.cmd.Args, " "), within, r.stdout.tail(), r.stderr.tail())
		return -1
	}
}

// interrupt is Ctrl-C.
func (r *running) interrupt(t *testing.T) {
	t.Helper()
	if err := r.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
}

// saw waits until the output satisfies cond.
func (r *running) saw(t *testing.T, within time.Duration, what string, cond func(stdout string) bool) {
	t.Helper()
	deadline := time.After(within)
	for {
		text, more := r.stdout.read()
		if cond(text) {
			return
		}
		select {
		case <-more:
		case <-r.done:
			if text, _ := r.stdout.read(); cond(text) {
				return
			}
			t.Fatalf("%s: it ended (%v) without %s; stdout %q, stderr %q", strings.Join(r.cmd.Args, " "), r.err, what, r.stdout.tail(), r.stderr.tail())
		case <-deadline:
			t.Fatalf("%s: no %s within %s; stdout %q, stderr %q", strings.Join(r.cmd.Args, " "), what, within, r.stdout.tail(), r.stderr.tail())
		}
	}
}

func (r *running) sawText(t *testing.T, within time.Duration, text string) {
	t.Helper()
	r.saw(t, within, fmt.Sprintf("%q", text), func(stdout string) bool { return strings.Contains(stdout, text) })
}

// output is a buffer that tells when there is more in it.
type output struct {
	mu   sync.Mutex
	b    bytes.Buffer
	more chan struct{} // closed and replaced at each write
}

func newOutput() *output { return &output{more: make(chan struct{})} }

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	close(o.more)
	o.more = make(chan struct{})
	return o.b.Write(p)
}

func (o *output) read() (text string, more <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String(), o.more
}

func (o *output) len() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Len()
}

func (o *output) tail() string {
	text, _ := o.read()
	if len(text) > 2000 {
		text = "..." + text[len(text)-2000:]
	}
	return text
}

// answer is the API server's answer to a request of the administrator's.
type answer struct {
	code   int
	header http.Header
	body   []byte
}

// request asks the API server as kubectl get --raw does, and keeps status and
// headers.
func request(t *testing.T, method, path string) answer {
	t.Helper()
	rc, err := world.hub.RESTConfig()
	if err != nil {
		t.Fatal(err)
	}
	client, err := rest.HTTPClientFor(rc)
	if err != nil {
		t.Fatal(err)
	}
	defer client.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, rc.Host+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatalf("%s %s: %v after %d bytes", method, path, err, len(body))
	}
	return answer{res.StatusCode, res.Header, body}
}

// nodePath is a path of a node's kubelet behind the API server.
func nodePath(node, path string) string { return "/api/v1/nodes/" + node + "/proxy" + path }

// toolsPod is a pod of one container that only waits, for exec and cp.
func toolsPod(name, node string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  nodeName: %s
  terminationGracePeriodSeconds: 0
  containers:
  - name: tools
    image: localhost/skerry/demo:1
    command: [/bin/sleep, "3600"]
    volumeMounts: [{name: data, mountPath: /data}]
  volumes: [{name: data, emptyDir: {}}]
`, name, node)
}

// containerStatus returns the named container's status.
func containerStatus(p *corev1.Pod, name string) corev1.ContainerStatus {
	for _, s := range append(p.Status.InitContainerStatuses, p.Status.ContainerStatuses...) {
		if s.Name == name {
			return s
		}
	}
	return corev1.ContainerStatus{}
}

func containerEnded(name string) func(p *corev1.Pod) bool {
	return func(p *corev1.Pod) bool { return containerStatus(p, name).State.Terminated != nil }
}
