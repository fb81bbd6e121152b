package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/e2e/image"
)

func TestTheNodeTellsWhatItIs(t *testing.T) {
	t.Parallel()
	for _, m := range world.nodes {
		n, err := world.client.CoreV1().Nodes().Get(t.Context(), m.Name(), metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		conditions := map[corev1.NodeConditionType]corev1.NodeCondition{}
		for _, c := range n.Status.Conditions {
			conditions[c.Type] = c
		}
		for typ, want := range map[corev1.NodeConditionType]corev1.ConditionStatus{
			corev1.NodeReady: corev1.ConditionTrue, corev1.NodeMemoryPressure: corev1.ConditionFalse,
			corev1.NodeDiskPressure: corev1.ConditionFalse, corev1.NodePIDPressure: corev1.ConditionFalse,
		} {
			c := conditions[typ]
			if c.Status != want || c.Reason == "" || c.LastHeartbeatTime.IsZero() || c.LastTransitionTime.IsZero() {
				t.Errorf("%s: condition %s: %+v", n.Name, typ, c)
			}
		}

		var info unix.Sysinfo_t
		if err := unix.Sysinfo(&info); err != nil {
			t.Fatal(err)
		}
		total := int64(info.Totalram) * int64(info.Unit)
		capacity, allocatable := n.Status.Capacity, n.Status.Allocatable
		if got := capacity.Cpu().Value(); got != int64(runtime.NumCPU()) {
			t.Errorf("%s: %d CPUs, the host has %d", n.Name, got, runtime.NumCPU())
		}
		if got := capacity.Memory().Value(); got < total*99/100 || got > total*101/100 {
			t.Errorf("%s: %d bytes of memory, the host has %d", n.Name, got, total)
		}
		if capacity.Pods().Cmp(resource.MustParse("110")) != 0 || capacity.StorageEphemeral().IsZero() {
			t.Errorf("%s: capacity %v", n.Name, capacity)
		}
		for name, c := range capacity {
			if a, ok := allocatable[name]; !ok || a.Cmp(c) > 0 {
				t.Errorf("%s: %s: allocatable %s of %s", n.Name, name, a.String(), c.String())
			}
		}
		if allocatable.Memory().Cmp(*capacity.Memory()) >= 0 {
			t.Errorf("%s: nothing of its memory is kept back for eviction", n.Name)
		}

		var uts unix.Utsname
		if err := unix.Uname(&uts); err != nil {
			t.Fatal(err)
		}
		i := n.Status.NodeInfo
		if !strings.HasPrefix(i.KubeletVersion, "v1.36.") || !strings.HasPrefix(i.ContainerRuntimeVersion, "containerd://") || i.KernelVersion != unix.ByteSliceToString(uts.Release[:]) {
			t.Errorf("%s: %+v", n.Name, i)
		}
		if i.OperatingSystem != "linux" || i.Architecture != runtime.GOARCH || i.OSImage == "" || i.MachineID == "" || i.BootID == "" {
			t.Errorf("%s: %+v", n.Name, i)
		}

		addresses := map[corev1.NodeAddressType]string{}
		for _, a := range n.Status.Addresses {
			addresses[a.Type] = a.Address
		}
		virtual, err := netip.ParseAddr(addresses[corev1.NodeInternalIP])
		if err != nil || !netip.MustParsePrefix("100.64.0.0/10").Contains(virtual) {
			t.Errorf("%s: the InternalIP does not lead to the hub: %v", n.Name, n.Status.Addresses)
		}
		if addresses[corev1.NodeExternalIP] != m.IP() || addresses[corev1.NodeHostName] != n.Name {
			t.Errorf("%s at %s: addresses %v", n.Name, m.IP(), n.Status.Addresses)
		}
		if n.Status.DaemonEndpoints.KubeletEndpoint.Port == 0 {
			t.Errorf("%s: no kubelet endpoint", n.Name)
		}
		for k, want := range map[string]string{"kubernetes.io/hostname": n.Name, "kubernetes.io/os": "linux", "kubernetes.io/arch": runtime.GOARCH} {
			if n.Labels[k] != want {
				t.Errorf("%s: label %s=%q", n.Name, k, n.Labels[k])
			}
		}
		if !slices.ContainsFunc(n.Status.Images, func(i corev1.ContainerImage) bool { return slices.Contains(i.Names, image.DemoName) && i.SizeBytes > 0 }) {
			t.Errorf("%s: the image of the pods is not among its %d", n.Name, len(n.Status.Images))
		}
		// The hub renews it for as long as it hears of the node.
		eventually(t, time.Minute, n.Name+"'s lease to be fresh", func(ctx context.Context) (bool, string) {
			lease, err := world.client.CoordinationV1().Leases("kube-node-lease").Get(ctx, n.Name, metav1.GetOptions{})
			if err != nil {
				return false, err.Error()
			}
			at := lease.Spec.RenewTime
			return at != nil && time.Since(at.Time) < 40*time.Second, fmt.Sprintf("renewed at %v", at)
		})
	}
}

// Labels of the user's reach the node's pods through the scheduler, and stay.
func TestNodeLabelsOfTheUserStay(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	key := "example.com/" + ns
	startPod(t, ns, "picky", fmt.Sprintf("{nodeSelector: {%q: \"yes\"}, containers: [{name: c}]}", key))
	awaitPod(t, ns, "picky", time.Minute, "to be unschedulable", unschedulable)
	kubectl(t, "label", "node", "edge-2", key+"=yes")
	t.Cleanup(func() {
		if _, err := world.hub.Kubectl(context.Background(), "label", "node", "edge-2", key+"-"); err != nil {
			t.Error(err)
		}
	})
	if p := ready(t, ns, "picky"); p.Spec.NodeName != "edge-2" {
		t.Errorf("scheduled to %s", p.Spec.NodeName)
	}
	n, err := world.client.CoreV1().Nodes().Get(t.Context(), "edge-2", metav1.GetOptions{})
	if err != nil || n.Labels[key] != "yes" {
		t.Errorf("labels: %v %v", n.Labels, err)
	}
}

func unschedulable(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodScheduled {
			return c.Status == corev1.ConditionFalse && c.Reason == corev1.PodReasonUnschedulable
		}
	}
	return false
}

// It changes what the other tests' pods need, so it runs alone.
func TestTaintsAndTolerations(t *testing.T) {
	ns := namespace(t)
	startPod(t, ns, "mover", `{nodeName: edge-2, containers: [{name: c}]}`)
	startPod(t, ns, "stayer", `
nodeName: edge-2
tolerations: [{key: example.com/closed, operator: Exists, effect: NoExecute}]
containers: [{name: c}]`)
	mover, stayer := ready(t, ns, "mover"), ready(t, ns, "stayer")

	kubectl(t, "taint", "node", "edge-2", "example.com/closed=test:NoExecute")
	tainted := true
	untaint := func() {
		if !tainted {
			return
		}
		tainted = false
		res, err := world.hub.Kubectl(context.Background(), "taint", "node", "edge-2", "example.com/closed-")
		if err != nil || res.Code != 0 {
			t.Errorf("untaint: %v %s", err, res.Stderr)
		}
	}
	t.Cleanup(untaint)

	eventually(t, time.Minute, "the pod without a toleration to be evicted", func(ctx context.Context) (bool, string) {
		p, err := world.client.CoreV1().Pods(ns).Get(ctx, "mover", metav1.GetOptions{})
		if err != nil {
			return apierrors.IsNotFound(err), err.Error()
		}
		return false, describe([]corev1.Pod{*p})
	})
	if on, err := hasTask(t.Context(), node(t, "edge-2"), container(t, mover, "c")); err != nil || on {
		t.Errorf("the evicted pod's container runs: %v %v", on, err)
	}
	awaitEvent(t, ns, "mover", "TaintManagerEviction", "")

	startPod(t, ns, "waiting", `{nodeSelector: {kubernetes.io/hostname: edge-2}, containers: [{name: c}]}`)
	p := awaitPod(t, ns, "waiting", time.Minute, "to be unschedulable", unschedulable)
	if p.Spec.NodeName != "" {
		t.Errorf("on %s", p.Spec.NodeName)
	}
	startPod(t, ns, "tolerant", `
nodeSelector: {kubernetes.io/hostname: edge-2}
tolerations: [{key: example.com/closed, operator: Exists}]
containers: [{name: c}]`)
	ready(t, ns, "tolerant")
	untaint()
	ready(t, ns, "waiting")

	after := ready(t, ns, "stayer")
	if a, b := container(t, stayer, "c"), container(t, after, "c"); stayer.UID != after.UID || a.ContainerID != b.ContainerID {
		t.Errorf("the tolerating pod was touched: %+v, then %+v", a, b)
	}
}
