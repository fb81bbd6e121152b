package e2e

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/e2e/cluster"
	"github.com/skerry-io/skerry/e2e/image"
	"github.com/skerry-io/skerry/e2e/machine"
)

// demoAs builds the demo's image under another name, with an ID of its own.
func demoAs(t *testing.T, name string) (archive string) {
	t.Helper()
	archive, err := image.Build(t.Context(), image.Spec{
		Name: name, Entrypoint: []string{"/bin/demo"}, Env: []string{"BUILT_AS=" + name},
		Files: []image.File{{Path: "/bin/demo", Host: filepath.Join(world.dir, "images", "demo")}},
		Out:   filepath.Join(t.TempDir(), "image.tar"),
	})
	if err != nil {
		t.Fatal(err)
	}
	return archive
}

func importDemoAs(t *testing.T, n *cluster.Node, name string) {
	t.Helper()
	if err := n.ImportImage(t.Context(), demoAs(t, name)); err != nil {
		t.Fatal(err)
	}
}

func images(ctx context.Context, n *cluster.Node) (string, error) {
	out, err := n.Machine.Run(ctx, "ctr", "-n", "k8s.io", "images", "ls", "-q")
	return string(out), err
}

// reconfigure restarts edgecore with cfg laid over its configuration, until the
// function it returns restarts it as it was.
func reconfigure(t *testing.T, n *cluster.Node, cfg map[string]any) (restore func()) {
	t.Helper()
	with := func(cfg map[string]any) error {
		ctx := context.Background()
		if err := n.StopEdgecore(ctx); err != nil {
			return err
		}
		if err := n.WriteConfig(cfg); err != nil {
			return err
		}
		return n.Run(ctx)
	}
	if err := with(cfg); err != nil {
		t.Fatal(err)
	}
	restored := false
	restore = func() {
		if restored {
			return
		}
		restored = true
		if err := with(nil); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(restore)
	return restore
}

// TestImagesOfPodsSurviveDiskPressure has a kubelet under pressure throw away
// all images that it may.
func TestImagesOfPodsSurviveDiskPressure(t *testing.T) {
	n := world.nodes[0]
	const kept, unused = "localhost/skerry/kept:1", "localhost/skerry/unused:1"
	importDemoAs(t, n, kept)
	importDemoAs(t, n, unused)
	ns := namespace(t)
	// Its second image has no container yet. A critical pod is not evicted.
	startPod(t, ns, "waits", `{nodeName: edge-1, priorityClassName: system-node-critical,
  initContainers: [{name: first, args: [wait-sigterm, --grace, 0s]}],
  containers: [{name: c, image: `+kept+`}]}`)
	p := awaitPod(t, ns, "waits", time.Minute, "to be in its first container", func(p *corev1.Pod) bool {
		return len(p.Status.InitContainerStatuses) > 0 && p.Status.InitContainerStatuses[0].State.Running != nil
	})
	restore := reconfigure(t, n, map[string]any{"kubelet": map[string]any{"config": map[string]any{
		"evictionHard": map[string]any{"nodefs.available": "99%"}, "evictionPressureTransitionPeriod": "1s", "imageMinimumGCAge": "1s",
	}}})
	eventually(t, 2*time.Minute, "the kubelet to throw the unused image away", func(ctx context.Context) (bool, string) {
		list, err := images(ctx, n)
		return err == nil && !strings.Contains(list, unused), fmt.Sprint(list, err)
	})
	list, err := images(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{kept, machine.PauseImage, image.DemoName} {
		if !strings.Contains(list, name) {
			t.Errorf("%s is gone; there are\n%s", name, list)
		}
	}
	restore()
	connected(t, n)
	_, id, _ := strings.Cut(p.Status.InitContainerStatuses[0].ContainerID, "://")
	if _, err := n.Machine.Run(t.Context(), "ctr", "-n", "k8s.io", "tasks", "kill", "-s", "SIGTERM", id); err != nil {
		t.Fatal(err)
	}
	if p := ready(t, ns, "waits"); container(t, p, "c").RestartCount != 0 {
		t.Errorf("%+v", container(t, p, "c"))
	}
}

// TestPullPolicyAlwaysWithoutARegistry reboots a node alone whose pod wants its
// image pulled each time.
func TestPullPolicyAlwaysWithoutARegistry(t *testing.T) {
	n := world.nodes[0]
	const user, password, local = "ada", "difference engine", "127.0.0.1:5000"
	stopRegistry := startRegistry(t, n, user, password)
	awaitRegistry(t, n)
	pushImage(t, demoAs(t, "localhost/skerry/always:1"), "http://"+n.IP()+":5000", user, password, "always/demo", "1")
	ns := namespace(t)
	auth, err := json.Marshal(map[string]any{"auths": map[string]any{local: map[string]string{
		"auth": base64.StdEncoding.EncodeToString([]byte(user + ":" + password))}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := world.client.CoreV1().Secrets(ns).Create(t.Context(), &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: "good"}, Type: corev1.SecretTypeDockerConfigJson,
		Data: map[string][]byte{corev1.DockerConfigJsonKey: auth},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	startPod(t, ns, "always", "{nodeName: edge-1, imagePullSecrets: [{name: good}], containers: [{name: c, image: "+local+"/always/demo:1, imagePullPolicy: Always}]}")
	before := ready(t, ns, "always")
	stopRegistry()

	// What is not here is told with its way out; what was pulled with a
	// password is for those who have it, registry or not.
	startPod(t, ns, "missing", "{nodeName: edge-1, containers: [{name: c, image: "+local+"/missing:1, imagePullPolicy: IfNotPresent}]}")
	startPod(t, ns, "sneaking", "{nodeName: edge-1, containers: [{name: c, image: "+local+"/always/demo:1, imagePullPolicy: Always}]}")
	for name, want := range map[string]string{"missing": "is not on this node", "sneaking": "credentials that this pod does not have"} {
		awaitPod(t, ns, name, time.Minute, "to say why it has no image", func(p *corev1.Pod) bool {
			w := container(t, p, "c").State.Waiting
			return w != nil && strings.Contains(w.Message, want) && strings.Contains(w.Reason+w.Message, "RegistryUnavailable")
		})
		awaitEvent(t, ns, name, "Failed", want)
	}

	restoreHub := withoutHub(t)
	powerCycle(t, n)
	eye := inspect(t, n)
	if err := n.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	back := eye.awaitRunning(t, ns, 1)
	if c := back["always"]; c.uid != before.UID || c.restarts != 1 {
		t.Errorf("back is %+v, before it was %s", c, podIdentity(before))
	}
	restoreHub()
	if p := ready(t, ns, "always"); p.UID != before.UID {
		t.Errorf("in the cloud it is %s", podIdentity(p))
	}
}
