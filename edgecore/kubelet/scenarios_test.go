package kubelet_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"

	"github.com/skerry-io/skerry/e2e/image"
	"github.com/skerry-io/skerry/e2e/machine"
)

// checkTerminal runs a command on a terminal and types at it, then attaches to
// the container's own output.
func checkTerminal(t *testing.T, e *edge) {
	ws, err := e.dial(t, "/exec/default/web/main?input=1&output=1&tty=1&command=/bin/demo&command=tty")
	if err != nil {
		t.Fatal(err)
	}
	defer ws.Close()
	if err := ws.WriteMessage(websocket.BinaryMessage, append([]byte{4}, `{"Width":132,"Height":43}`...)); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for !strings.Contains(out.String(), "43 132") {
		_, b, err := ws.ReadMessage()
		if err != nil {
			t.Fatalf("%v, after %q", err, out.String())
		}
		if len(b) > 1 && b[0] == 1 {
			out.Write(b[1:])
		}
	}
	if err := ws.WriteMessage(websocket.BinaryMessage, append([]byte{0}, "quit\n"...)); err != nil {
		t.Fatal(err)
	}
	for {
		_, b, err := ws.ReadMessage()
		if err != nil {
			t.Fatalf("no exit status: %v", err)
		}
		if len(b) > 1 && b[0] == 3 {
			if !strings.Contains(string(b), `"status":"Success"`) {
				t.Errorf("ended with %s", b)
			}
			break
		}
	}

	attached, err := e.dial(t, "/attach/default/web/main?output=1")
	if err != nil {
		t.Fatal(err)
	}
	defer attached.Close()
	for {
		_, b, err := attached.ReadMessage()
		if err != nil {
			t.Fatalf("attach: %v", err)
		}
		if strings.Contains(string(b), "demo is alive") {
			break
		}
	}
}

// checkStaticPod runs a manifest from the disk, which needs no cloud at all,
// and looks for its mirror in the node's store.
func checkStaticPod(t *testing.T, e *edge) {
	pod := corev1.Pod{Spec: corev1.PodSpec{HostNetwork: true, Containers: []corev1.Container{{
		Name: "main", Image: image.DemoName, Command: []string{"/bin/demo", "sleep", "1000"},
	}}}}
	pod.APIVersion, pod.Kind, pod.Name, pod.Namespace = "v1", "Pod", "local", "default"
	manifest, err := json.Marshal(pod)
	if err != nil {
		t.Fatal(err)
	}
	file := e.m.Disk(e.cfg.StaticPodPath + "/local.json")
	if err := os.WriteFile(file, manifest, 0o644); err != nil {
		t.Fatal(err)
	}
	mirror := e.awaitReady(t, "local-"+nodeName)
	if mirror.Annotations[corev1.MirrorPodAnnotationKey] == "" || mirror.Status.PodIP != e.m.IP() {
		t.Errorf("annotations %v, IP %q", mirror.Annotations, mirror.Status.PodIP)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	e.awaitGone(t, "local-"+nodeName)
}

// checkContainerdRestart: pods do not notice that containerd went, and the
// kubelet finds it again.
func checkContainerdRestart(t *testing.T, e *edge) {
	before := e.pod(t, "web")
	if err := e.m.RestartContainerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	e.awaitServed(t, "web")
	checkSamePod(t, before, e.awaitReady(t, "web"))
}

// checkReboot pulls the plug and starts the edge process before containerd, as
// after a power cut. Nothing but the node's own store says what to run.
func checkReboot(t *testing.T, e *edge) {
	before := e.pod(t, "web")
	if err := e.m.PowerOff(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := e.m.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	containerd, err := e.m.Proc(t.Context(), "containerd")
	if err != nil {
		t.Fatal(err)
	}
	if err := containerd.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-containerd.Done()

	e.cfg.CSI = true
	began := time.Now()
	e.start(t)
	await(t, "the edge process waits for containerd", func() error {
		text, err := os.ReadFile(e.m.Disk("/var/log/edge.log"))
		if err != nil {
			return err
		}
		if !strings.Contains(string(text), "waiting for the container runtime") {
			return errors.New("no such line in its log")
		}
		return nil
	})
	if _, err := e.m.Exec(context.WithoutCancel(t.Context()), machine.Command{
		Name: "containerd-again", Args: []string{"containerd", "--config", "/etc/containerd/config.toml"},
	}); err != nil {
		t.Fatal(err)
	}
	t.Logf("containerd started %v after the edge process", time.Since(began).Round(time.Millisecond))
	began = time.Now()
	var after *corev1.Pod
	await(t, "the pod runs again", func() error {
		after = e.pod(t, "web")
		s := after.Status.ContainerStatuses
		if len(s) != 1 || s[0].State.Running == nil || s[0].ContainerID == before.Status.ContainerStatuses[0].ContainerID || !s[0].Ready {
			return fmt.Errorf("containers %+v", s)
		}
		return nil
	})
	t.Logf("containerd started to pod ready: %v", time.Since(began).Round(10*time.Millisecond))
	if after.UID != before.UID || after.Status.ContainerStatuses[0].RestartCount != before.Status.ContainerStatuses[0].RestartCount+1 {
		t.Errorf("uid %s -> %s, restarts %d -> %d", before.UID, after.UID, before.Status.ContainerStatuses[0].RestartCount, after.Status.ContainerStatuses[0].RestartCount)
	}
	e.awaitServed(t, "web")
	if out, _, code := e.exec(t, "web", "cat", "/conf/greeting"); code != 0 || out != "hello from the cloud" {
		t.Errorf("configmap after the power cut: %q, exit code %d", out, code)
	}
	await(t, "the node tells of its CSI drivers", func() error {
		var csi storagev1.CSINode
		return get(t, e.control, "/object/csinodes/"+nodeName, &csi)
	})
}

// checkAddressChange starts without any address: pods run all the same. Once
// there is one, the process ends by itself and reports it after its restart.
func checkAddressChange(t *testing.T, e *edge) {
	e.kill(t)
	run := func(args ...string) {
		t.Helper()
		if out, err := e.m.Run(t.Context(), args...); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	run("ip", "addr", "flush", "dev", "eth0")
	e.cfg.HurryAddress = true
	e.start(t)
	e.awaitServed(t, "web")

	other := "10.199." + strconv.Itoa(e.m.Index()) + ".3" // the network's other end is the host's
	run("ip", "addr", "add", other+"/24", "dev", "eth0")
	select {
	case <-e.proc.Done():
	case <-time.After(30 * time.Second):
		t.Fatal("the edge process did not notice its new address")
	}
	var exit *machine.ExitStatus
	if err := e.proc.Wait(t.Context()); !errors.As(err, &exit) || exit.Code != addressChanged {
		t.Fatalf("ended with %v", err)
	}
	e.start(t)
	await(t, "the node reports its new address", func() error {
		var node corev1.Node
		if err := get(t, e.control, "/object/nodes/"+nodeName, &node); err != nil {
			return err
		}
		for _, a := range node.Status.Addresses {
			if a.Type == corev1.NodeInternalIP && a.Address == other {
				return nil
			}
		}
		return fmt.Errorf("addresses %v", node.Status.Addresses)
	})
	e.awaitReady(t, "web")
}

// cpu is the processor time the edge process has used.
func (e *edge) cpu(t *testing.T) time.Duration {
	t.Helper()
	b, err := os.ReadFile(e.m.Path(fmt.Sprintf("/proc/%d/stat", e.proc.PID())))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), ") ") // the name may hold spaces
	f := strings.Fields(rest)
	user, err1 := strconv.Atoi(f[11])
	system, err2 := strconv.Atoi(f[12])
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	return time.Duration(user+system) * 10 * time.Millisecond // USER_HZ is 100
}
