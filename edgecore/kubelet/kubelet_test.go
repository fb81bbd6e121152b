package kubelet_test

import (
	"fmt"
	"os"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/skerry-io/skerry/edgecore/store"
)

const nodeName = "edge-1"

// TestKubelet runs pods on a machine with a real containerd. It is one test,
// as the machine takes longer to make than most of what is tried on it.
func TestKubelet(t *testing.T) {
	if testing.Short() {
		t.Skip("runs a machine with containerd")
	}
	e := newEdge(t)
	t.Run("check", func(t *testing.T) { checkFindings(t, e) })

	started := time.Now()
	e.start(t)
	e.apply(t, store.Delta{Synced: "epoch-1"})
	node := e.awaitNodeReady(t)
	t.Logf("process start to node ready: %v", time.Since(started).Round(10*time.Millisecond))
	t.Run("node", func(t *testing.T) { checkNode(t, e, node) })

	e.apply(t, store.Delta{Upserts: objects(t, greeting(), password())})
	asked := time.Now()
	e.apply(t, store.Delta{Upserts: objects(t, webPod("web"))})
	pod := e.awaitReady(t, "web")
	t.Logf("pod delivered to ready: %v", time.Since(asked).Round(10*time.Millisecond))
	e.logMemory(t, "1 pod")

	t.Run("pod", func(t *testing.T) { checkPod(t, pod) })
	t.Run("exec", func(t *testing.T) { checkExec(t, e) })
	t.Run("logs", func(t *testing.T) { checkLogs(t, e) })
	t.Run("port-forward", func(t *testing.T) { checkPortForward(t, e) })
	t.Run("endpoints", func(t *testing.T) { checkEndpoints(t, e) })
	t.Run("stats", func(t *testing.T) { checkStats(t, e, pod) })
	t.Run("no listener", func(t *testing.T) { checkNoListener(t, e) })
	t.Run("terminal", func(t *testing.T) { checkTerminal(t, e) })
	t.Run("static pod", func(t *testing.T) { checkStaticPod(t, e) })
	t.Run("containerd restarts", func(t *testing.T) { checkContainerdRestart(t, e) })

	t.Run("kill and restart", func(t *testing.T) {
		e.kill(t)
		again := time.Now()
		e.start(t)
		e.awaitServed(t, "web")
		t.Logf("restart to pod served: %v", time.Since(again).Round(10*time.Millisecond))
		checkSamePod(t, pod, e.pod(t, "web"))
		if out, _, code := e.exec(t, "web", "cat", "/work/made"); code != 0 || out != "" {
			t.Errorf("the emptyDir's file: %q, exit code %d", out, code)
		}
	})

	t.Run("many pods", func(t *testing.T) {
		began := time.Now()
		var more []*corev1.Pod
		for i := range 29 {
			more = append(more, smallPod(fmt.Sprintf("small-%02d", i)))
		}
		var delta store.Delta
		for _, p := range more {
			delta.Upserts = append(delta.Upserts, objects(t, p)...)
		}
		e.apply(t, delta)
		for _, p := range more {
			e.awaitReady(t, p.Name)
		}
		t.Logf("29 pods delivered to all ready: %v", time.Since(began).Round(10*time.Millisecond))
		e.logMemory(t, "30 pods")
		if d, err := time.ParseDuration(os.Getenv("SKERRY_TEST_IDLE")); err == nil {
			before := e.cpu(t)
			<-time.After(d)
			t.Logf("processor time with 30 pods, idle for %v: %.2f s/min", d, (e.cpu(t)-before).Seconds()/d.Minutes())
			e.logMemory(t, "30 pods, then idle")
		}
		var gone store.Delta
		for _, p := range more {
			gone.Upserts = append(gone.Upserts, deleted(t, e.pod(t, p.Name))...)
		}
		e.apply(t, gone)
		for _, p := range more {
			e.awaitGone(t, p.Name)
		}
	})

	t.Run("power cut, containerd late, no cloud", func(t *testing.T) { checkReboot(t, e) })
	t.Run("address", func(t *testing.T) { checkAddressChange(t, e) })

	t.Run("delete", func(t *testing.T) {
		e.apply(t, store.Delta{Upserts: deleted(t, e.pod(t, "web"))})
		e.awaitGone(t, "web")
	})
	e.stop(t)
}
