// Package e2e tests Skerry as a whole, with real parts only: the built
// programs, the upstream control plane and kubelet inside them, containerd,
// runc, CNI and kubectl. One hub and two edge nodes serve all tests; a test
// leaves them as it found them. Tests that need a hub of their own make one.
package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/skerry-io/skerry/e2e/cluster"
	"github.com/skerry-io/skerry/e2e/image"
	"github.com/skerry-io/skerry/e2e/machine"
)

// world is what all tests share.
var world struct {
	dir      string
	programs cluster.Programs
	images   []string
	hub      *cluster.Hub
	nodes    []*cluster.Node
	client   kubernetes.Interface
}

var keep = flag.Bool("keep", false, "keep the folder with logs and disks")

func TestMain(m *testing.M) {
	machine.Main()
	flag.Parse()
	allowParallel()
	os.Exit(func() int {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		before, err := machine.Snapshot(ctx)
		if err != nil {
			fmt.Fprintln(os.Stderr, "e2e:", err)
			return 1
		}
		code := 1
		if err := setUp(ctx); err != nil {
			fmt.Fprintln(os.Stderr, "e2e: set up:", err)
			showLogs()
		} else {
			code = m.Run()
			if code != 0 {
				showLogs()
			}
		}
		if err := tearDown(); err != nil {
			fmt.Fprintln(os.Stderr, "e2e: tear down:", err)
			code = 1
		}
		left, err := machine.Leaks(context.Background(), before)
		if err != nil || len(left) > 0 {
			fmt.Fprintln(os.Stderr, "e2e: left behind:", len(left), "things, among them", left[:min(len(left), 20)], err)
			code = 1
		}
		return code
	}())
}

// allowParallel lets more tests that say t.Parallel run at once than there are
// cores: they wait for kubelets rather than compute. Whoever gives -parallel
// gets that.
func allowParallel() {
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "test.parallel" })
	if !given {
		if err := flag.Set("test.parallel", "6"); err != nil {
			panic(err) // the flag is the testing package's
		}
	}
}

func setUp(ctx context.Context) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("these tests make namespaces and containers: run them as root")
	}
	if world.programs, err = cluster.FindPrograms(); err != nil {
		return err
	}
	if world.dir, err = os.MkdirTemp("", "skerry-e2e-"); err != nil {
		return err
	}
	for _, build := range []func(context.Context, string) (string, error){image.Pause, image.Demo} {
		tar, err := build(ctx, filepath.Join(world.dir, "images"))
		if err != nil {
			return err
		}
		world.images = append(world.images, tar)
	}
	for _, name := range []string{"edge-1", "edge-2"} {
		n, err := cluster.NewNode(cluster.NodeConfig{
			Dir: filepath.Join(world.dir, name), Name: name, Programs: world.programs, Images: world.images,
		})
		if err != nil {
			return err
		}
		world.nodes = append(world.nodes, n)
	}
	if world.hub, err = startHub(ctx, filepath.Join(world.dir, "hub"), world.nodes); err != nil {
		return err
	}
	if world.client, err = world.hub.Client(); err != nil {
		return err
	}
	for _, n := range world.nodes {
		if err := n.Boot(ctx); err != nil {
			return err
		}
		if err := n.Join(ctx, world.hub); err != nil {
			return err
		}
		if err := n.Run(ctx); err != nil {
			return err
		}
	}
	for _, n := range world.nodes {
		if err := awaitNodeReady(ctx, world.client, n.Name()); err != nil {
			return err
		}
	}
	return nil
}

// startHub runs a hub that the nodes can reach.
func startHub(ctx context.Context, dir string, nodes []*cluster.Node) (*cluster.Hub, error) {
	var names []string
	for _, n := range nodes {
		names = append(names, n.HostIP())
	}
	names = append(names, hubName)
	// Who is evicted shall be so within the time of a test.
	h, err := cluster.NewHub(cluster.HubConfig{Dir: dir, Programs: world.programs, Names: names, Args: []string{"--default-toleration-seconds=10"}})
	if err != nil {
		return nil, err
	}
	return h, h.Start(ctx)
}

func tearDown() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var errs []error
	for _, n := range world.nodes {
		if *keep {
			errs = append(errs, n.PowerOff(ctx))
		}
		errs = append(errs, n.Destroy(ctx))
	}
	if world.hub != nil && world.hub.Running() {
		errs = append(errs, world.hub.Stop(ctx))
	}
	if world.dir != "" && !*keep {
		errs = append(errs, os.RemoveAll(world.dir))
	}
	return errors.Join(errs...)
}

// showLogs prints the ends of the logs, for whoever reads CI's output.
func showLogs() {
	show := func(path string) {
		b, err := os.ReadFile(path)
		if err != nil {
			return
		}
		if len(b) > 6000 {
			b = b[len(b)-6000:]
		}
		fmt.Fprintf(os.Stderr, "--- end of %s\n%s\n", path, b)
	}
	if world.hub != nil {
		show(world.hub.LogPath())
	}
	for _, n := range world.nodes {
		show(n.LogPath())
	}
}

// eventually waits for cond, which tells what it still sees.
func eventually(t *testing.T, within time.Duration, what string, cond func(ctx context.Context) (ok bool, saw string)) {
	t.Helper()
	if err := await(t.Context(), within, what, cond); err != nil {
		t.Fatal(err)
	}
}

func await(ctx context.Context, within time.Duration, what string, cond func(ctx context.Context) (bool, string)) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	last := "nothing"
	for {
		ok, saw := cond(ctx)
		if ok {
			return nil
		}
		if ctx.Err() == nil { // else it saw no more than the end of the time
			last = saw
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waited %s for %s; saw: %s", within, what, last)
		case <-tick.C:
		}
	}
}

func awaitNodeReady(ctx context.Context, client kubernetes.Interface, name string) error {
	return await(ctx, time.Minute, "node "+name+" to be Ready", func(ctx context.Context) (bool, string) {
		n, err := client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return false, err.Error()
		}
		for _, c := range n.Status.Conditions {
			if c.Type == corev1.NodeReady {
				return c.Status == corev1.ConditionTrue, c.Reason + ": " + c.Message
			}
		}
		return false, "no Ready condition"
	})
}

// kubectl runs kubectl and wants it to succeed.
func kubectl(t *testing.T, args ...string) string {
	t.Helper()
	res := kubectlAny(t, "", args...)
	if res.Code != 0 {
		t.Fatalf("kubectl %s: exit %d\n%s%s", strings.Join(args, " "), res.Code, res.Stdout, res.Stderr)
	}
	return res.Stdout
}

// kubectlAny runs kubectl with stdin and takes any exit.
func kubectlAny(t *testing.T, stdin string, args ...string) cluster.Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	res, err := world.hub.KubectlIn(ctx, strings.NewReader(stdin), args...)
	if err != nil {
		t.Fatalf("kubectl %s: %v\n%s", strings.Join(args, " "), err, res.Stderr)
	}
	return res
}

// apply applies manifests in a namespace of the test's own, and returns its
// name. The namespace goes with the test.
func apply(t *testing.T, manifests ...string) string {
	t.Helper()
	ns := namespace(t)
	applyIn(t, ns, manifests...)
	return ns
}

func applyIn(t *testing.T, ns string, manifests ...string) {
	t.Helper()
	res := kubectlAny(t, strings.Join(manifests, "\n---\n"), "apply", "-n", ns, "-f", "-")
	if res.Code != 0 {
		t.Fatalf("kubectl apply: %s", res.Stderr)
	}
}

func namespace(t *testing.T) string {
	t.Helper()
	ns, err := world.client.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "t-"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.Background()
		if err := world.client.CoreV1().Namespaces().Delete(ctx, ns.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
		err := await(ctx, time.Minute, "the namespace's end", func(ctx context.Context) (bool, string) {
			pods, err := world.client.CoreV1().Pods(ns.Name).List(ctx, metav1.ListOptions{})
			if err != nil {
				return false, err.Error()
			}
			return len(pods.Items) == 0, describe(pods.Items)
		})
		if err != nil {
			t.Error(err)
		}
	})
	// Pods are refused until the namespace's service account is there.
	eventually(t, 20*time.Second, "the default service account", func(ctx context.Context) (bool, string) {
		_, err := world.client.CoreV1().ServiceAccounts(ns.Name).Get(ctx, "default", metav1.GetOptions{})
		return err == nil, fmt.Sprint(err)
	})
	return ns.Name
}

func describe(pods []corev1.Pod) string {
	var b strings.Builder
	for _, p := range pods {
		fmt.Fprintf(&b, "%s on %s: %s", p.Name, p.Spec.NodeName, p.Status.Phase)
		for _, s := range append(p.Status.InitContainerStatuses, p.Status.ContainerStatuses...) {
			state, _ := json.Marshal(s.State)
			fmt.Fprintf(&b, " %s=%s", s.Name, state)
		}
		b.WriteString("; ")
	}
	return b.String()
}

// awaitPod waits for a pod to be as cond wants it, and returns it.
func awaitPod(t *testing.T, ns, name string, within time.Duration, what string, cond func(p *corev1.Pod) bool) *corev1.Pod {
	t.Helper()
	var pod *corev1.Pod
	eventually(t, within, "pod "+name+" "+what, func(ctx context.Context) (bool, string) {
		p, err := world.client.CoreV1().Pods(ns).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return false, err.Error()
		}
		pod = p
		return cond(p), describe([]corev1.Pod{*p})
	})
	return pod
}

func isReady(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

func succeeded(p *corev1.Pod) bool { return p.Status.Phase == corev1.PodSucceeded }

// ready waits for the pod to be Ready.
func ready(t *testing.T, ns, name string) *corev1.Pod {
	t.Helper()
	return awaitPod(t, ns, name, time.Minute, "to be Ready", isReady)
}
