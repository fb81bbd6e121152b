package kubeletproxy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/httpstream"
	"k8s.io/client-go/rest"
	clientportforward "k8s.io/client-go/tools/portforward"
	clientremotecommand "k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	utilexec "k8s.io/client-go/util/exec"

	"github.com/skerry-io/skerry/cloudhub/controlplane"
	"github.com/skerry-io/skerry/cloudhub/controlplane/planetest"
)

func TestMain(m *testing.M) { os.Exit(planetest.Main(m)) }

// TestThroughPlane talks to a kubelet as kubectl does: through a real API
// server, this proxy and a real tunnel.
func TestThroughPlane(t *testing.T) {
	nodes := newFarNodes(t)
	peer := newKubelet()
	nodes.connect("100.64.0.1", peer)

	var proxy *Proxy
	proxyCtx, stopProxy := context.WithCancel(context.Background())
	proxyDone := make(chan error, 1)
	t.Cleanup(func() {
		stopProxy()
		<-proxyDone
	})
	p := planetest.Start(t, controlplane.Config{
		DialNode: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return proxy.DialNode(ctx, network, addr)
		},
	}, func(plane *controlplane.Plane) {
		var err error
		if proxy, err = New(Config{Nodes: nodes, Authority: plane, Log: planetest.Log()}); err != nil {
			t.Fatal(err)
		}
		go func() { proxyDone <- proxy.Run(proxyCtx) }()
	})
	addNode(t, p, "edge-1", "100.64.0.1")
	addNode(t, p, "edge-2", "100.64.0.2")
	ctx := t.Context()
	pods := p.Client.CoreV1().Pods("default")

	t.Run("logs", func(t *testing.T) {
		got, err := pods.GetLogs("pod-edge-1", &corev1.PodLogOptions{}).DoRaw(ctx)
		if err != nil || string(got) != "first line\n" {
			t.Errorf("%q, %v", got, err)
		}
	})
	t.Run("logs -f", func(t *testing.T) {
		follow, cancel := context.WithCancel(ctx)
		defer cancel()
		body, err := pods.GetLogs("pod-edge-1", &corev1.PodLogOptions{Follow: true}).Stream(follow)
		if err != nil {
			t.Fatal(err)
		}
		defer body.Close()
		lines := bufio.NewScanner(body)
		next := func(want string) {
			t.Helper()
			if !lines.Scan() || lines.Text() != want {
				t.Fatalf("got %q, %v; want %q", lines.Text(), lines.Err(), want)
			}
		}
		next("first line")
		<-peer.following
		for i := range 3 {
			line := fmt.Sprintf("line %d", i)
			peer.lines <- line
			next(line) // each arrives by itself, not when a buffer is full
		}
		cancel()
		select {
		case <-peer.left:
		case <-time.After(10 * time.Second):
			t.Error("the follower has gone and the node still follows for it")
		}
	})
	t.Run("missing pod's status", func(t *testing.T) {
		addPod(t, p, "missing", "edge-1")
		_, err := pods.GetLogs("missing", &corev1.PodLogOptions{}).DoRaw(ctx)
		if !apierrors.IsNotFound(err) {
			t.Errorf("got %v; want the node's 404", err)
		}
	})
	t.Run("not connected", func(t *testing.T) {
		for _, args := range [][]string{
			{"logs", "pod-edge-2"},
			{"exec", "pod-edge-2", "--", "cat"},
			{"attach", "pod-edge-2"},
			{"get", "--raw", "/api/v1/nodes/edge-2/proxy/stats/summary"},
		} {
			if _, failed := p.Kubectl(t, args...); !strings.Contains(failed, notConnected) {
				t.Errorf("kubectl %s: %q; want it to say %q", strings.Join(args, " "), failed, notConnected)
			}
		}
		for name, executor := range executors(t, p, "pod-edge-2", "cat") {
			err := executor.StreamWithContext(ctx, clientremotecommand.StreamOptions{Stdin: strings.NewReader(""), Stdout: io.Discard, Stderr: io.Discard})
			if err == nil || !strings.Contains(err.Error(), notConnected) {
				t.Errorf("exec by %s: %v; want it to say %q", name, err, notConnected)
			}
		}
	})
	t.Run("exec", func(t *testing.T) {
		input := make([]byte, 3<<20)
		rand.Read(input)
		for name, executor := range executors(t, p, "pod-edge-1", "cat") {
			var out bytes.Buffer
			err := executor.StreamWithContext(ctx, clientremotecommand.StreamOptions{Stdin: bytes.NewReader(input), Stdout: &out, Stderr: io.Discard})
			if err != nil || !bytes.Equal(out.Bytes(), input) {
				t.Errorf("%s: %d of %d bytes came back, %v", name, out.Len(), len(input), err)
			}
		}
		for name, executor := range executors(t, p, "pod-edge-1", "exit") {
			var errOut bytes.Buffer
			err := executor.StreamWithContext(ctx, clientremotecommand.StreamOptions{Stdin: strings.NewReader(""), Stdout: io.Discard, Stderr: &errOut})
			var exit utilexec.CodeExitError
			if !errors.As(err, &exit) || exit.Code != 7 || errOut.String() != "failing" {
				t.Errorf("%s: %v, %q; want exit code 7", name, err, errOut.String())
			}
		}
	})
	t.Run("port-forward", func(t *testing.T) { portForward(t, p) })
	t.Run("node proxy", func(t *testing.T) {
		client := p.Client.CoreV1().RESTClient()
		got, err := client.Get().AbsPath("/api/v1/nodes/edge-1/proxy/stats/summary").DoRaw(ctx)
		if err != nil || !strings.Contains(string(got), `"nodeName":"edge-1"`) {
			t.Errorf("stats/summary: %q, %v", got, err)
		}
		raw, err := rest.HTTPClientFor(p.Admin)
		if err != nil {
			t.Fatal(err)
		}
		for path, want := range map[string]int{"teapot": http.StatusTeapot, "nothing": http.StatusNotFound} {
			res, err := raw.Get(p.URL() + "/api/v1/nodes/edge-1/proxy/" + path)
			if err != nil {
				t.Fatal(err)
			}
			res.Body.Close()
			if res.StatusCode != want {
				t.Errorf("%s: %s", path, res.Status)
			}
		}
		// An answer cut short at the node is not taken for a whole one.
		body, err := client.Get().AbsPath("/api/v1/nodes/edge-1/proxy/cut").Stream(ctx)
		if err == nil {
			_, err = io.Copy(io.Discard, body)
			body.Close()
		}
		if err == nil {
			t.Error("a cut answer ended without an error")
		}
	})
	t.Run("proxy stopped", func(t *testing.T) {
		stopProxy()
		err := <-proxyDone
		proxyDone <- err
		if err != nil {
			t.Error(err)
		}
		if _, failed := p.Kubectl(t, "logs", "pod-edge-1"); !strings.Contains(failed, "the cloudhub is stopping") {
			t.Errorf("logs after the proxy's end: %q", failed)
		}
	})
}

func executors(t *testing.T, p *planetest.Plane, pod, command string) map[string]clientremotecommand.Executor {
	t.Helper()
	u := p.Client.CoreV1().RESTClient().Get().Namespace("default").Resource("pods").Name(pod).SubResource("exec").
		Param("container", "c").Param("command", command).Param("stdin", "true").Param("stdout", "true").Param("stderr", "true").URL()
	ws, err := clientremotecommand.NewWebSocketExecutor(p.Admin, http.MethodGet, u.String())
	if err != nil {
		t.Fatal(err)
	}
	spdy, err := clientremotecommand.NewSPDYExecutor(p.Admin, http.MethodPost, u)
	if err != nil {
		t.Fatal(err)
	}
	return map[string]clientremotecommand.Executor{"WebSocket": ws, "SPDY": spdy}
}

func portForward(t *testing.T, p *planetest.Plane) {
	u, err := url.Parse(p.URL() + "/api/v1/namespaces/default/pods/pod-edge-1/portforward")
	if err != nil {
		t.Fatal(err)
	}
	ws, err := clientportforward.NewSPDYOverWebsocketDialer(u, rest.CopyConfig(p.Admin))
	if err != nil {
		t.Fatal(err)
	}
	transport, upgrader, err := spdy.RoundTripperFor(p.Admin)
	if err != nil {
		t.Fatal(err)
	}
	for name, dial := range map[string]httpstream.Dialer{
		"WebSocket": ws,
		"SPDY":      spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, u),
	} {
		stop, ready := make(chan struct{}), make(chan struct{})
		f, err := clientportforward.NewOnAddresses(dial, []string{"127.0.0.1"}, []string{"0:8080"}, stop, ready, io.Discard, io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- f.ForwardPorts() }()
		select {
		case <-ready:
		case err := <-done:
			t.Fatalf("%s: %v", name, err)
		}
		ports, err := f.GetPorts()
		if err != nil {
			t.Fatal(err)
		}
		c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", ports[0].Local))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(c, "hello")
		c.(*net.TCPConn).CloseWrite()
		got, err := io.ReadAll(c)
		if err != nil || string(got) != "port 8080: hello" {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		c.Close()
		close(stop)
		<-done
	}
}

func addNode(t *testing.T, p *planetest.Plane, name, ip string) {
	t.Helper()
	ctx := t.Context()
	if _, err := p.Client.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	status := fmt.Sprintf(`{"status":{"addresses":[{"type":"InternalIP","address":%q},{"type":"Hostname","address":%q}],"daemonEndpoints":{"kubeletEndpoint":{"Port":10250}}}}`, ip, name)
	if _, err := p.Client.CoreV1().Nodes().PatchStatus(ctx, name, []byte(status)); err != nil {
		t.Fatal(err)
	}
	addPod(t, p, "pod-"+name, name)
}

func addPod(t *testing.T, p *planetest.Plane, name, node string) {
	t.Helper()
	_, err := p.Client.CoreV1().Pods("default").Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "c", Image: "example.invalid/c:1"}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	running := []byte(`{"status":{"phase":"Running","containerStatuses":[{"name":"c","image":"c","imageID":"c","ready":true,"started":true,"restartCount":0,"state":{"running":{}}}]}}`)
	if _, err := p.Client.CoreV1().Pods("default").Patch(t.Context(), name, types.MergePatchType, running, metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
}
