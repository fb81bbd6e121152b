package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/e2e/cluster"
	"github.com/skerry-io/skerry/e2e/image"
)

// writeStaticPod puts a manifest into the node's folder of static pods, all at
// once, as an operator's tool would.
func writeStaticPod(t *testing.T, n *cluster.Node, file, manifest string) string {
	t.Helper()
	dir := n.Disk(filepath.Join(cluster.EdgeDataDir, "manifests"))
	part, path := filepath.Join(dir, "."+file), filepath.Join(dir, file)
	if err := os.WriteFile(part, []byte(manifest), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(part, path); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestStaticPods(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	n := node(t, "edge-2")
	manifest := func(message string) string {
		return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: static, namespace: %s, labels: {app: static}}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: c, image: %s, args: [serve, --message, %s, --log-every, 1s]}]`, ns, image.DemoName, message)
	}
	path := writeStaticPod(t, n, ns+".yaml", manifest("first"))
	t.Cleanup(func() { os.Remove(path) })

	const name = "static-edge-2"
	running := func(what, message string) *corev1.Pod {
		t.Helper()
		return awaitPod(t, ns, name, time.Minute, what, func(p *corev1.Pod) bool {
			return isReady(p) && p.DeletionTimestamp == nil && p.Spec.Containers[0].Args[2] == message
		})
	}
	mirror := running("to mirror the static pod", "first")
	hash := mirror.Annotations[corev1.MirrorPodAnnotationKey]
	if hash == "" || string(mirror.UID) == hash {
		t.Errorf("UID %s, hash of the manifest %q: the mirror wants a UID of its own", mirror.UID, hash)
	}
	if mirror.Annotations["kubernetes.io/config.source"] != "file" || mirror.Spec.NodeName != "edge-2" || mirror.Labels["app"] != "static" {
		t.Errorf("mirror: %+v", mirror.ObjectMeta)
	}
	if len(mirror.OwnerReferences) != 1 || mirror.OwnerReferences[0].Kind != "Node" {
		t.Errorf("owners: %+v", mirror.OwnerReferences)
	}
	eventually(t, time.Minute, "logs through the mirror", outputHas(t, ns, name, "demo is alive"))
	if out := execIn(t, ns, name, "", "/bin/demo", "get", "http://127.0.0.1:8080/"); !strings.HasPrefix(out, "first\n") {
		t.Errorf("exec through the mirror: %q", out)
	}

	// Deleting the mirror does not touch the pod: its mirror comes again.
	// (Force-deleted, it would come with the kubelet's next look at the pod.)
	deletePod(t, ns, name, nil)
	again := awaitPod(t, ns, name, time.Minute, "to be mirrored again", func(p *corev1.Pod) bool {
		return p.UID != mirror.UID && isReady(p)
	})
	if a, b := container(t, mirror, "c"), container(t, again, "c"); a.ContainerID != b.ContainerID || b.RestartCount != 0 {
		t.Errorf("deleting the mirror restarted the pod: %+v, then %+v", a, b)
	}

	// An edit replaces the pod.
	writeStaticPod(t, n, ns+".yaml", manifest("second"))
	edited := running("to be replaced", "second")
	if edited.Annotations[corev1.MirrorPodAnnotationKey] == hash || edited.UID == again.UID {
		t.Errorf("after the edit: %+v", edited.ObjectMeta)
	}
	if out := execIn(t, ns, name, "", "/bin/demo", "get", "http://127.0.0.1:8080/"); !strings.HasPrefix(out, "second\n") {
		t.Errorf("after the edit: %q", out)
	}
	eventually(t, time.Minute, "the first container to end", func(ctx context.Context) (bool, string) {
		on, err := hasTask(ctx, n, container(t, again, "c"))
		return err == nil && !on, fmt.Sprint(on, err)
	})

	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, "the mirror to go with the file", func(ctx context.Context) (bool, string) {
		p, err := world.client.CoreV1().Pods(ns).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return apierrors.IsNotFound(err), err.Error()
		}
		return false, describe([]corev1.Pod{*p})
	})
	eventually(t, time.Minute, "the container to end", func(ctx context.Context) (bool, string) {
		on, err := hasTask(ctx, n, container(t, edited, "c"))
		return err == nil && !on, fmt.Sprint(on, err)
	})
}
