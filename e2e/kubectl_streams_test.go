package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/remotecommand"

	"github.com/skerry-io/skerry/e2e/cluster"
)

// streamer logs five lines a second and has all the tools.
const streamer = `
apiVersion: v1
kind: Pod
metadata: {name: streamer}
spec:
  nodeName: edge-1
  terminationGracePeriodSeconds: 1
  containers:
  - name: streamer
    image: localhost/skerry/demo:1
    args: [serve, --log-every, 200ms]
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
`

func TestManyFollowersAndExecsAtOnce(t *testing.T) {
	const n = 30
	ns := apply(t, streamer)
	ready(t, ns, "streamer")
	rc, err := world.hub.RESTConfig()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()

	// Every follower is behind its n-th new line while every exec is answered.
	var followers, execs sync.WaitGroup
	following := make(chan struct{}, n)
	follow, stop := context.WithCancel(ctx)
	defer stop()
	lines := make([]chan struct{}, n)
	for i := range n {
		lines[i] = make(chan struct{}, 1000)
		followers.Go(func() {
			none := int64(0)
			body, err := world.client.CoreV1().Pods(ns).GetLogs("streamer", &corev1.PodLogOptions{Follow: true, TailLines: &none}).Stream(follow)
			if err != nil {
				t.Errorf("follower %d: %v", i, err)
				return
			}
			defer body.Close()
			scan := bufio.NewScanner(body)
			for first := true; scan.Scan(); first = false {
				var line tick
				if err := json.Unmarshal(scan.Bytes(), &line); err != nil {
					t.Errorf("follower %d: line %q: %v", i, scan.Text(), err)
				}
				if first {
					following <- struct{}{}
				}
				select {
				case lines[i] <- struct{}{}:
				default:
				}
			}
			if follow.Err() == nil {
				t.Errorf("follower %d ended early: %v", i, scan.Err())
			}
		})
	}
	for i := range n {
		select {
		case <-following:
		case <-ctx.Done():
			t.Fatalf("%d of %d followers got a line", i, n)
		}
	}
	for i := range n {
		execs.Go(func() {
			said := bytes.Repeat(fmt.Appendf(nil, "exec %d\n", i), 10_000)
			u := world.client.CoreV1().RESTClient().Get().Namespace(ns).Resource("pods").Name("streamer").SubResource("exec").
				VersionedParams(&corev1.PodExecOptions{Command: []string{"/bin/cat"}, Stdin: true, Stdout: true, Stderr: true}, scheme.ParameterCodec).URL()
			x, err := remotecommand.NewWebSocketExecutor(rc, http.MethodGet, u.String())
			if err != nil {
				t.Error(err)
				return
			}
			var out, errs bytes.Buffer
			if err := x.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: bytes.NewReader(said), Stdout: &out, Stderr: &errs}); err != nil {
				t.Errorf("exec %d: %v: %s", i, err, errs.String())
			}
			if !bytes.Equal(out.Bytes(), said) {
				t.Errorf("exec %d: %d bytes of %d came back", i, out.Len(), len(said))
			}
		})
	}
	execs.Wait()
	// After the execs each follower still gets lines.
	for i := range lines {
		for len(lines[i]) > 0 {
			<-lines[i]
		}
		select {
		case <-lines[i]:
		case <-ctx.Done():
			t.Fatalf("follower %d gets no more lines", i)
		}
	}
	stop()
	followers.Wait()
}

// A kubectl that does not read holds up nobody but itself, and nothing is lost
// once it reads again.
func TestASlowReaderStopsNobodyElse(t *testing.T) {
	const mib = 48
	ns := apply(t, streamer, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: novel}
spec:
  nodeName: edge-1
  restartPolicy: Never
  containers:
  - name: novel
    image: localhost/skerry/demo:1
    args: [print, --mib, "%d"]
`, mib))
	awaitPod(t, ns, "novel", time.Minute, "to be written", succeeded)
	ready(t, ns, "streamer")
	whole := sha256.Sum256([]byte(printed(mib)))

	before := tunnelFigures(t, world.nodes[0])
	var slow []*running
	for range 2 {
		r := kubectlStart(t, nil, nil, "logs", "-n", ns, "novel", "-f")
		r.saw(t, 20*time.Second, "the beginning", func(out string) bool { return len(out) > 0 })
		if err := r.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		slow = append(slow, r)
	}
	stopped := time.Now()

	// A stream of lines, an exec that moves more than all buffers on the way
	// hold, and short requests go on beside them.
	beside := kubectlStart(t, nil, nil, "logs", "-n", ns, "streamer", "-f", "--tail=0")
	beside.saw(t, 20*time.Second, "new lines", func(out string) bool { return lineCount(out) >= 5 })
	r := kubectlStart(t, nil, nil, "exec", "-n", ns, "streamer", "--", "/bin/demo", "print", "--mib", "24")
	if code := r.wait(t, 40*time.Second); code != 0 || r.stdout.len() != 24<<20 {
		t.Errorf("exec: exit %d, %d bytes: %s", code, r.stdout.len(), r.stderr.tail())
	}
	if a := request(t, http.MethodGet, nodePath("edge-1", "/healthz")); string(a.body) != "ok" {
		t.Errorf("healthz: %d %q", a.code, a.body)
	}
	text, _ := beside.stdout.read()
	have := lineCount(text)
	beside.saw(t, 10*time.Second, "more lines", func(out string) bool { return lineCount(out) >= have+5 })

	// They were really held up: most of their logs has not left the node.
	sent := tunnelFigures(t, world.nodes[0]).TunnelSent - before.TunnelSent
	if sent > (24+2*mib/2)<<20 {
		t.Errorf("the node sent %d MiB although both readers of %d MiB stand still", sent>>20, mib)
	}
	if took := time.Since(stopped); took > 50*time.Second {
		t.Fatalf("%s since the readers stopped, and the tunnel may give up on a reader after 60 s: what went on beside them took too long", took)
	}
	for _, r := range slow {
		if err := r.cmd.Process.Signal(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range slow {
		if code := r.wait(t, time.Minute); code != 0 {
			t.Errorf("exit %d: %s", code, r.stderr.tail())
		}
		if out, _ := r.stdout.read(); sha256.Sum256([]byte(out)) != whole {
			t.Errorf("%d bytes of %d arrived, or others", len(out), mib<<20)
		}
	}
}

// Ctrl-C of kubectl ends what it asked for at the node, and the streams and
// connections on the way.
func TestInterruptedStreamsAreFreed(t *testing.T) {
	const n = 5
	ns := apply(t, streamer)
	pod := ready(t, ns, "streamer")
	node := world.nodes[0]
	// What serves each kind at the node, by a function that is on the stack of
	// its goroutine.
	serving := func() map[string]int {
		t.Helper()
		return goroutinesIn(t, node.Name(), map[string]string{
			"logs": "kubelet/server.(*Server).getContainerLogs", "exec": "kubelet/server.(*Server).getExec",
			"port-forward": "kubelet/server.(*Server).getPortForward",
		})
	}
	awaitServing := func(logs, exec, forward int) {
		t.Helper()
		eventually(t, 20*time.Second, fmt.Sprintf("%d logs, %d exec and %d port-forward at the node", logs, exec, forward), func(context.Context) (bool, string) {
			got := serving()
			return got["logs"] == logs && got["exec"] == exec && got["port-forward"] == forward, fmt.Sprint(got)
		})
	}
	awaitServing(0, 0, 0)
	streams, sockets := tunnelFigures(t, node).TunnelStreams, hubSockets(t)

	var all []*running
	for range n {
		all = append(all, kubectlStart(t, nil, nil, "logs", "-n", ns, "streamer", "-f"))
		in, feed, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer feed.Close()
		fmt.Fprintln(feed, "hello")
		r := kubectlStart(t, nil, in, "exec", "-n", ns, "-i", "streamer", "--", "/bin/cat")
		in.Close()
		r.sawText(t, 20*time.Second, "hello")
		all = append(all, r)
	}
	for range 2 {
		r := kubectlStart(t, nil, nil, "port-forward", "-n", ns, "--address=127.0.0.1", "streamer", ":8080")
		var addr string
		r.saw(t, 20*time.Second, "address", func(out string) bool {
			m := forwarding.FindStringSubmatch(out)
			if m != nil {
				addr = m[1]
			}
			return m != nil
		})
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		fmt.Fprint(c, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
		if _, err := bufio.NewReader(c).ReadString('\n'); err != nil {
			t.Fatal(err)
		}
		all = append(all, r)
	}
	awaitServing(n, n, 2)
	if got := tunnelFigures(t, node).TunnelStreams; got < streams+2*n {
		t.Errorf("%d streams with %d kubectl, %d before", got, len(all), streams)
	}
	for _, r := range all {
		r.interrupt(t)
	}
	for _, r := range all {
		r.wait(t, 10*time.Second)
	}
	awaitServing(0, 0, 0)
	eventually(t, 20*time.Second, "the exec'ed programs' end", func(context.Context) (bool, string) {
		names := programsOf(t, node, pod)
		return len(names) == 2, fmt.Sprint(names) // pause and demo
	})
	// The API server keeps a few idle connections to the kubelet for later
	// requests, which the node closes after 30 s.
	eventually(t, 50*time.Second, "the streams of the tunnel to be closed", func(context.Context) (bool, string) {
		got := tunnelFigures(t, node).TunnelStreams
		return got <= streams, fmt.Sprintf("%d, %d before", got, streams)
	})
	eventually(t, 20*time.Second, "the hub's sockets to be closed", func(context.Context) (bool, string) {
		got := hubSockets(t)
		return got <= sockets, fmt.Sprintf("%d, %d before", got, sockets)
	})
}

// figures are those of "edgecore status" that tell of the tunnel.
type figures struct {
	TunnelSent    uint64 `json:"tunnelSentBytes"`
	TunnelStreams int    `json:"tunnelStreams"`
}

func tunnelFigures(t *testing.T, n *cluster.Node) figures {
	t.Helper()
	res, err := n.Edgecore(t.Context(), "status", "-o", "json")
	if err != nil || res.Code != 0 {
		t.Fatalf("edgecore status: %v, exit %d: %s", err, res.Code, res.Stderr)
	}
	var f figures
	if err := json.Unmarshal([]byte(res.Stdout), &f); err != nil {
		t.Fatal(err)
	}
	return f
}

var profileEntry = regexp.MustCompile(`^(\d+) @`)

// goroutinesIn counts edgecore's goroutines by a function on their stacks.
func goroutinesIn(t *testing.T, node string, functions map[string]string) map[string]int {
	t.Helper()
	a := request(t, http.MethodGet, nodePath(node, "/debug/pprof/goroutine?debug=1"))
	if a.code != http.StatusOK {
		t.Fatalf("goroutine profile: %d %s", a.code, a.body)
	}
	found := map[string]int{}
	for entry := range strings.SplitSeq(string(a.body), "\n\n") {
		m := profileEntry.FindStringSubmatch(strings.TrimSpace(entry))
		if m == nil {
			continue
		}
		count, err := strconv.Atoi(m[1])
		if err != nil {
			t.Fatal(err)
		}
		for name, function := range functions {
			if strings.Contains(entry, function) {
				found[name] += count
			}
		}
	}
	return found
}

// hubSockets counts the hub's open sockets.
func hubSockets(t *testing.T) int {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", world.hub.PID())
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, e := range entries {
		if to, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil && strings.HasPrefix(to, "socket:") {
			n++
		}
	}
	return n
}

// programsOf returns the names of a pod's processes.
func programsOf(t *testing.T, n *cluster.Node, p *corev1.Pod) []string {
	t.Helper()
	var names []string
	controller := "pids"
	if unified {
		controller = ""
	}
	err := filepath.WalkDir(podCgroup(t, n, p, controller), func(path string, d os.DirEntry, err error) error {
		if err != nil || d.Name() != "cgroup.procs" {
			return ignoreGone(err)
		}
		b, err := os.ReadFile(path)
		for pid := range strings.FieldsSeq(string(b)) {
			name, err := os.ReadFile("/proc/" + pid + "/comm")
			if err == nil {
				names = append(names, strings.TrimSpace(string(name)))
			}
		}
		return ignoreGone(err)
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// The kubelet is reached through the tunnel alone.
func TestNoPortIsOpenOnTheEdge(t *testing.T) {
	t.Parallel()
	ns := apply(t, streamer)
	ready(t, ns, "streamer")
	kubectl(t, "exec", "-n", ns, "streamer", "--", "/bin/echo", "reached")
	for _, n := range world.nodes {
		listening := 0
		for _, file := range []string{"tcp", "tcp6", "udp", "udp6"} {
			res, err := n.Command(t.Context(), nil, "/bin/cat", "/proc/net/"+file)
			if err != nil || res.Code != 0 {
				t.Fatalf("%s: %v %s", n.Name(), err, res.Stderr)
			}
			for _, s := range sockets(t, res.Stdout) {
				// 0A is LISTEN; a UDP socket without a peer is 07.
				if s.state != "0A" && s.state != "07" {
					continue
				}
				listening++
				if !s.ip.IsLoopback() {
					t.Errorf("%s listens on %s %s:%d", n.Name(), file, s.ip, s.port)
				}
			}
		}
		if listening == 0 {
			t.Errorf("%s: not even a loopback listener found, where edgecore's metrics are: the files were not read well", n.Name())
		}
		for _, port := range []string{"10250", "10255", "10248"} {
			if c, err := net.DialTimeout("tcp", net.JoinHostPort(n.IP(), port), 2*time.Second); err == nil {
				c.Close()
				t.Errorf("%s: port %s is open", n.Name(), port)
			}
		}
		// A CNI plugin may have rules of its own.
		for _, program := range []string{"iptables-save", "ip6tables-save"} {
			res, err := n.Command(t.Context(), nil, "/usr/sbin/"+program)
			if err != nil || res.Code != 0 {
				t.Fatalf("%s: %s: %v %s", n.Name(), program, err, res.Stderr)
			}
			for rule := range strings.Lines(res.Stdout) {
				if !strings.HasPrefix(rule, "-A ") || strings.Contains(rule, "CNI-") {
					continue
				}
				t.Errorf("%s: rule %q", n.Name(), strings.TrimSpace(rule))
			}
		}
	}
}

type socket struct {
	ip    net.IP
	port  uint64
	state string
}

// sockets reads a /proc/net/tcp or the like, whose addresses are 32-bit words
// in the machine's byte order.
func sockets(t *testing.T, text string) []socket {
	t.Helper()
	var all []socket
	lines := strings.Split(strings.TrimSpace(text), "\n")
	for _, line := range lines[1:] {
		f := strings.Fields(line)
		addr, port, ok := strings.Cut(f[1], ":")
		raw, err := hex.DecodeString(addr)
		if !ok || err != nil || len(raw)%4 != 0 {
			t.Fatalf("line %q", line)
		}
		ip := make(net.IP, len(raw))
		for i := range raw { // little endian, as every machine we run on
			ip[i] = raw[i/4*4+3-i%4]
		}
		n, err := strconv.ParseUint(port, 16, 16)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, socket{ip, n, f[3]})
	}
	return all
}
