package e2e

import (
	"context"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/skerry-io/skerry/e2e/cluster"
	"github.com/skerry-io/skerry/e2e/image"
	"github.com/skerry-io/skerry/e2e/machine"
)

// TestLocalClients: with no cloud, and after a reboot without one, kubectl on
// the device and client-go in a pod read what the node has, as far as RBAC
// gives it.
func TestLocalClients(t *testing.T) {
	n := world.nodes[0]
	tar, err := image.InCluster(t.Context(), filepath.Join(world.dir, "images"))
	if err != nil {
		t.Fatal(err)
	}
	if err := n.ImportImage(t.Context(), tar); err != nil {
		t.Fatal(err)
	}
	reconfigure(t, n, map[string]any{"localAPI": map[string]any{"pods": true}})
	connected(t, n)
	ns := apply(t, `
apiVersion: v1
kind: ServiceAccount
metadata: {name: reader}`, `
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: pods}
rules: [{apiGroups: [""], resources: [pods], verbs: [get, list, watch]}]`, `
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: pods}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: pods}
subjects: [{kind: ServiceAccount, name: reader}]`,
		onEdge1("in", "  serviceAccountName: reader\n  containers: [{name: c, image: "+image.InClusterName+"}]"),
		onEdge1("beside", "  serviceAccountName: default\n  containers: [{name: c, image: "+image.InClusterName+"}]"),
		onEdge1("web", "  containers: [{name: c, image: IMAGE}]"))
	for _, name := range []string{"in", "beside", "web"} {
		ready(t, ns, name)
	}

	if st, err := n.Status(t.Context()); err == nil {
		t.Logf("objects on the node: %v", st.Objects)
	}
	t.Run("with the cloud", func(t *testing.T) { localClients(t, n, ns) })
	restoreHub := withoutHub(t)
	t.Run("without it", func(t *testing.T) { localClients(t, n, ns) })
	powerCycle(t, n)
	if err := n.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	inspect(t, n).awaitRunning(t, ns, 3)
	t.Run("after a reboot without it", func(t *testing.T) {
		localClients(t, n, ns)
		if out := local(t, n, "get", "pod", "-n", ns, "web"); !regexp.MustCompile(`web +1/1 +Running +1 `).MatchString(out) {
			t.Errorf("a pod that has restarted:\n%s", out)
		}
		watched(t, n, ns)
	})
	restoreHub()

	// A right that is taken away in the cloud ends on the node.
	kubectl(t, "delete", "rolebinding", "-n", ns, "pods")
	eventually(t, 20*time.Second, "the role to be gone", func(ctx context.Context) (bool, string) {
		res := inPod(ctx, t, n, ns, "in", "list", "pods", ns)
		return res.Code == 1 && strings.Contains(res.Stderr, "cannot list resource"), res.Stdout + res.Stderr
	})
}

// localClients is what holds with and without a cloud.
func localClients(t *testing.T, n *cluster.Node, ns string) {
	ctx := t.Context()
	if out := inPod(ctx, t, n, ns, "in", "host").Stdout; strings.TrimSpace(out) != "https://169.254.20.20:10271" {
		t.Errorf("in-cluster configuration leads to %q", out)
	}
	res := inPod(ctx, t, n, ns, "in", "informer", ns)
	for _, want := range []string{"in\n", "beside\n", "web\n"} {
		if res.Code != 0 || !strings.Contains(res.Stdout, want) {
			t.Fatalf("informer in a pod: exit %d\n%s%s", res.Code, res.Stdout, res.Stderr)
		}
	}
	me := `User "system:serviceaccount:` + ns
	for _, refusal := range []struct {
		pod  string
		args []string
		want string
	}{
		{"in", []string{"list", "secrets", ns}, me + `:reader" cannot list resource "secrets" in API group "" in the namespace "` + ns + `"`},
		{"in", []string{"list", "pods", "kube-system"}, me + `:reader" cannot list resource "pods" in API group "" in the namespace "kube-system"`},
		{"in", []string{"create", ns}, "cannot create configmaps here: edge node edge-1 is read-only for local clients"},
		{"beside", []string{"list", "pods", ns}, me + `:default" cannot list resource "pods"`},
	} {
		if res := inPod(ctx, t, n, ns, refusal.pod, refusal.args...); res.Code != 1 || !strings.Contains(res.Stderr, refusal.want) {
			t.Errorf("%s %v: exit %d %s, want %s", refusal.pod, refusal.args, res.Code, res.Stderr, refusal.want)
		}
	}

	out := local(t, n, "get", "pods", "-A", "-o", "wide")
	for _, want := range []string{`(?m)^NAMESPACE +NAME +READY +STATUS +RESTARTS +AGE +IP +NODE `, `(?m)^` + ns + ` +web +1/1 +Running +\d.* 10\.\S+ +edge-1 `} {
		if !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("get pods has no %q:\n%s", want, out)
		}
	}
	if out := local(t, n, "get", "nodes"); !regexp.MustCompile(`(?m)^edge-1 +Ready `).MatchString(out) {
		t.Errorf("get nodes:\n%s", out)
	}
	if out := local(t, n, "logs", "-n", ns, "web"); !strings.Contains(out, "demo serves") {
		t.Errorf("logs:\n%s", out)
	}
	if out := local(t, n, "describe", "pod", "-n", ns, "web"); !regexp.MustCompile(`Node: +edge-1/`).MatchString(out) || !strings.Contains(out, "Started") {
		t.Errorf("describe:\n%s", out)
	}
	if out := local(t, n, "exec", "-n", ns, "web", "--", "/bin/demo", "echo", "hello", "there"); out != "hello there\n" {
		t.Errorf("exec: %q", out)
	}
	if out := local(t, n, "auth", "can-i", "list", "pods"); strings.TrimSpace(out) != "yes" {
		t.Errorf("can-i: %q", out)
	}
	res, err := n.Kubectl(ctx, "get", "pods", "-n", ns)
	if err != nil || !strings.Contains(res.Stderr, "Warning: node edge-1 answers from its own store") {
		t.Errorf("no warning that the list is the node's: %q %v", res.Stderr, err)
	}
}

// watched follows a pod on the device while its container is killed.
func watched(t *testing.T, n *cluster.Node, ns string) {
	var out lockedBuffer
	p, err := n.Exec(t.Context(), machine.Command{Args: cluster.KubectlCommand("get", "pods", "-n", ns, "web", "-w"), Stdout: &out, Stderr: &out})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "the first row", func(context.Context) (bool, string) {
		return strings.Contains(out.String(), "Running"), out.String()
	})
	id := inspect(t, n).awaitRunning(t, ns, 3)["web"].id
	if _, err := n.Machine.Run(t.Context(), "ctr", "-n", "k8s.io", "tasks", "kill", "-s", "KILL", id); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, "the watch to tell of the restart", func(context.Context) (bool, string) {
		return regexp.MustCompile(`web +1/1 +Running +2 `).MatchString(out.String()), out.String()
	})
	if err := p.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = p.Wait(t.Context()) // it ends by the signal
}

// local runs kubectl on the device and wants it to succeed.
func local(t *testing.T, n *cluster.Node, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	res, err := n.Kubectl(ctx, args...)
	if err != nil || res.Code != 0 {
		t.Fatalf("kubectl %v on the device: exit %d, %v\n%s%s", args, res.Code, err, res.Stdout, res.Stderr)
	}
	return res.Stdout
}

// inPod runs the in-cluster client in a pod, by the device's own exec.
func inPod(ctx context.Context, t *testing.T, n *cluster.Node, ns, pod string, args ...string) cluster.Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	res, err := n.Kubectl(ctx, append([]string{"exec", "-n", ns, pod, "--", "/bin/incluster"}, args...)...)
	if err != nil {
		t.Fatalf("incluster %v in pod %s: %v %s", args, pod, err, res.Stderr)
	}
	return res
}

type lockedBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
