package kubelet_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	corev1 "k8s.io/api/core/v1"
	statsv1alpha1 "k8s.io/kubelet/pkg/apis/stats/v1alpha1"

	"github.com/skerry-io/skerry/e2e/machine"
	"github.com/skerry-io/skerry/edgecore/kubelet"
)

// checkFindings: nothing keeps a kubelet from starting here, and a runtime that
// is not there is found.
func checkFindings(t *testing.T, e *edge) {
	find := func() (errs []kubelet.Finding) {
		cfg := e.cfg
		cfg.CheckOnly = true
		text, err := json.Marshal(cfg)
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		p, err := e.m.Exec(t.Context(), machine.Command{Args: []string{edgeBinary}, Env: []string{edgeVariable + "=" + string(text)}, Stdout: &out, Stderr: t.Output()})
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		var all []kubelet.Finding
		if err := json.Unmarshal(out.Bytes(), &all); err != nil {
			t.Fatalf("%v: %s", err, out.Bytes())
		}
		for _, f := range all {
			t.Log(f)
			if f.Severity == kubelet.Error {
				errs = append(errs, f)
			}
		}
		return errs
	}
	if errs := find(); len(errs) != 0 {
		t.Errorf("errors on a good machine: %v", errs)
	}
	runtime, err := e.m.Proc(t.Context(), "containerd")
	if err != nil {
		t.Fatal(err)
	}
	if err := runtime.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-runtime.Done()
	if errs := find(); len(errs) != 1 || errs[0].Subject != "/run/containerd/containerd.sock" || !strings.Contains(errs[0].Problem, "nobody listens") {
		t.Errorf("without containerd: %v", errs)
	}
	if err := e.m.PowerOff(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := e.m.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// checkNode: the machine has no default route and no name server, so upstream
// would report no address at all.
func checkNode(t *testing.T, e *edge, node *corev1.Node) {
	var addresses []string
	for _, a := range node.Status.Addresses {
		addresses = append(addresses, string(a.Type)+"="+a.Address)
	}
	if got, want := strings.Join(addresses, " "), "InternalIP="+e.m.IP()+" Hostname="+nodeName; got != want {
		t.Errorf("addresses %q, want %q", got, want)
	}
	if node.Labels["skerry.dev/test"] != "yes" || node.Labels[corev1.LabelHostname] != nodeName {
		t.Errorf("labels %v", node.Labels)
	}
	if node.Status.NodeInfo.ContainerRuntimeVersion == "" || node.Status.Capacity.Memory().IsZero() || node.Status.Capacity.StorageEphemeral().IsZero() {
		t.Errorf("status %+v", node.Status)
	}
}

func checkPod(t *testing.T, pod *corev1.Pod) {
	if len(pod.Status.InitContainerStatuses) != 1 || pod.Status.InitContainerStatuses[0].State.Terminated == nil || pod.Status.InitContainerStatuses[0].State.Terminated.ExitCode != 0 {
		t.Errorf("init containers %+v", pod.Status.InitContainerStatuses)
	}
	if pod.Status.PodIP == "" || pod.Status.HostIP == "" {
		t.Errorf("pod IP %q, host IP %q", pod.Status.PodIP, pod.Status.HostIP)
	}
	if s := pod.Status.ContainerStatuses; len(s) != 1 || s[0].RestartCount != 0 || s[0].Started == nil || !*s[0].Started {
		t.Errorf("containers %+v", s)
	}
}

func checkExec(t *testing.T, e *edge) {
	if out, _, code := e.exec(t, "web", "cat", "/conf/greeting"); code != 0 || out != "hello from the cloud" {
		t.Errorf("configmap: %q, exit code %d", out, code)
	}
	out, _, _ := e.exec(t, "web", "env")
	for _, want := range []string{"PASSWORD=open sesame", "NODE_IP=" + e.m.IP()} {
		if !strings.Contains(out, want+"\n") {
			t.Errorf("no %q in the environment:\n%s", want, out)
		}
	}
	if out, stderr, code := e.exec(t, "web", "cat", "/work/made"); code != 0 {
		t.Errorf("the init container's file: %q %q, exit code %d", out, stderr, code)
	}
	if out, stderr, code := e.exec(t, "web", "cat", "/token/token"); code != 0 || strings.Count(out, ".") != 2 {
		t.Errorf("the token: %d bytes, %q, exit code %d", len(out), stderr, code)
	}
	if _, _, code := e.exec(t, "web", "/bin/demo", "exit", "3"); code != 3 {
		t.Errorf("exit code %d, want 3", code)
	}
	if _, stderr, code := e.exec(t, "web", "cat", "/nowhere"); code == 0 || !strings.Contains(stderr, "/nowhere") {
		t.Errorf("stderr %q, exit code %d", stderr, code)
	}
}

func checkLogs(t *testing.T, e *edge) {
	b, err := call(t, e.kubelet, http.MethodGet, "/containerLogs/default/web/main?tailLines=100", nil)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(b), "demo serves") {
		t.Errorf("log %q", b)
	}

	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://edge/containerLogs/default/web/main?follow=true&tailLines=0", nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := e.kubelet.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	line, err := bufio.NewReader(res.Body).ReadString('\n')
	if err != nil || !strings.Contains(line, "demo is alive") {
		t.Errorf("followed %q, %v", line, err)
	}
}

// checkPortForward speaks the WebSocket form: a channel for data and one for
// errors, each opened by the port's number.
func checkPortForward(t *testing.T, e *edge) {
	ws, err := e.dial(t, "/portForward/default/web?port=8080")
	if err != nil {
		t.Fatal(err)
	}
	defer ws.Close()
	if err := ws.WriteMessage(websocket.BinaryMessage, append([]byte{0}, "GET /healthz HTTP/1.0\r\nHost: pod\r\n\r\n"...)); err != nil {
		t.Fatal(err)
	}
	var opened [2]bool
	var data strings.Builder
	for !strings.HasSuffix(data.String(), "ok\n") {
		_, b, err := ws.ReadMessage()
		if err != nil {
			t.Fatalf("%v, after %q", err, data.String())
		}
		if len(b) == 0 || b[0] > 1 {
			t.Fatalf("message %q", b)
		}
		channel, b := b[0], b[1:]
		switch {
		case !opened[channel]:
			opened[channel] = true
			if port := binary.LittleEndian.Uint16(b); port != 8080 {
				t.Errorf("channel %d is for port %d", channel, port)
			}
		case channel == 0:
			data.Write(b)
		case len(b) > 0:
			t.Fatalf("error channel: %s", b)
		}
	}
}

func checkEndpoints(t *testing.T, e *edge) {
	for path, want := range map[string]string{
		"/healthz":          "ok",
		"/configz":          `"imageMinimumGCAge":"5m0s"`, // from the overlay
		"/pods":             `"name":"web"`,
		"/runningpods/":     `"name":"web"`,
		"/metrics":          "kubelet_running_pods",
		"/metrics/probes":   `prober_probe_total{container="main"`,
		"/metrics/resource": "node_memory_working_set_bytes",
	} {
		b, err := call(t, e.kubelet, http.MethodGet, path, nil)
		if err != nil {
			t.Error(err)
			continue
		}
		if !strings.Contains(string(b), want) {
			t.Errorf("%s does not show %s", path, want)
		}
	}
	// cAdvisor sees a container at its next look for new ones.
	await(t, "/metrics/cadvisor has the pod's labels", func() error {
		b, err := call(t, e.kubelet, http.MethodGet, "/metrics/cadvisor", nil)
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(b)) {
			if strings.HasPrefix(line, "container_memory_working_set_bytes{") && strings.Contains(line, `container="main"`) && strings.Contains(line, `pod="web"`) {
				return nil
			}
		}
		return errors.New("no such series")
	})
}

// checkStats compares the summary with the cgroup files of the pod.
func checkStats(t *testing.T, e *edge, pod *corev1.Pod) {
	began := time.Now()
	var web *statsv1alpha1.PodStats
	await(t, "the summary has the pod's figures", func() error {
		var s statsv1alpha1.Summary
		if err := get(t, e.kubelet, "/stats/summary", &s); err != nil {
			return err
		}
		if n := s.Node; n.NodeName != nodeName || n.CPU == nil || n.CPU.UsageNanoCores == nil || n.Memory == nil || n.Memory.WorkingSetBytes == nil || n.Fs == nil || n.Fs.CapacityBytes == nil || n.Runtime == nil || n.Runtime.ImageFs == nil {
			return fmt.Errorf("node %+v", n)
		}
		for i, p := range s.Pods {
			if p.PodRef.Name != "web" {
				continue
			}
			if p.CPU == nil || p.CPU.UsageNanoCores == nil || p.Memory == nil || len(p.Containers) != 1 || p.Containers[0].Memory == nil || p.Containers[0].Memory.UsageBytes == nil || p.Network == nil {
				return fmt.Errorf("pod %+v", p)
			}
			web = &s.Pods[i]
			return nil
		}
		return errors.New("no pod web")
	})
	t.Logf("pod figures after %v", time.Since(began).Round(10*time.Millisecond))
	if web.PodRef.UID != string(pod.UID) {
		t.Errorf("pod uid %s, want %s", web.PodRef.UID, pod.UID)
	}

	id := strings.TrimPrefix(pod.Status.ContainerStatuses[0].ContainerID, "containerd://")
	inFile, err := memoryOf(e.m.CgroupRoot(), id)
	if err != nil {
		t.Fatal(err)
	}
	const slack = 8 << 20
	if got := *web.Containers[0].Memory.UsageBytes; got+slack < inFile || got > inFile+slack {
		t.Errorf("memory usage %d, the kernel says %d", got, inFile)
	}

	measured, usedBefore := time.Now(), e.cpu(t)
	awaitEvery(t, 5*time.Second, "the summary has the pod's volumes", func() error {
		var s statsv1alpha1.Summary
		if err := get(t, e.kubelet, "/stats/summary", &s); err != nil {
			return err
		}
		names := make(map[string]bool)
		for _, p := range s.Pods {
			if p.PodRef.Name == "web" {
				for _, v := range p.VolumeStats {
					names[v.Name] = true
				}
			}
		}
		if !names["work"] || !names["conf"] {
			return fmt.Errorf("volumes %v", names)
		}
		return nil
	})
	t.Logf("volume figures after %v", time.Since(began).Round(time.Second))
	t.Logf("processor time with 1 pod, a summary every 5 s: %.2f s/min", (e.cpu(t)-usedBefore).Seconds()/time.Since(measured).Minutes())
}

// memoryOf reads a container's memory usage where the kernel keeps it.
func memoryOf(root, id string) (uint64, error) {
	var found string
	for _, base := range []string{"/sys/fs/cgroup/memory", "/sys/fs/cgroup"} {
		filepath.WalkDir(filepath.Join(base, root), func(path string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() && strings.Contains(d.Name(), id) {
				found = path
				return filepath.SkipAll
			}
			return nil
		})
		if found != "" {
			break
		}
	}
	if found == "" {
		return 0, fmt.Errorf("no cgroup of container %s below %s", id, root)
	}
	for _, name := range []string{"memory.current", "memory.usage_in_bytes"} {
		if b, err := os.ReadFile(filepath.Join(found, name)); err == nil {
			return strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
		}
	}
	return 0, fmt.Errorf("%s says no memory usage", found)
}

// checkNoListener looks for TCP sockets in the listening state among the open
// files of the edge process.
func checkNoListener(t *testing.T, e *edge) {
	proc := fmt.Sprintf("/proc/%d", e.proc.PID())
	listening := make(map[string]string) // inode -> address
	for _, table := range []string{"tcp", "tcp6"} {
		f, err := os.Open(e.m.Path(filepath.Join(proc, "net", table)))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) > 9 && f[3] == "0A" {
				listening["socket:["+f[9]+"]"] = f[1]
			}
		}
	}
	dir := e.m.Path(filepath.Join(proc, "fd"))
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		target, err := os.Readlink(filepath.Join(dir, entry.Name()))
		if err != nil {
			continue // closed meanwhile
		}
		if address, ok := listening[target]; ok {
			t.Errorf("the edge process listens on %s", address)
		}
	}
}

// checkSamePod: nothing about the pod changed while the edge process was away.
func checkSamePod(t *testing.T, before, after *corev1.Pod) {
	if before.UID != after.UID || before.Status.PodIP != after.Status.PodIP {
		t.Errorf("uid %s -> %s, IP %s -> %s", before.UID, after.UID, before.Status.PodIP, after.Status.PodIP)
	}
	b, a := before.Status.ContainerStatuses[0], after.Status.ContainerStatuses[0]
	if b.ContainerID != a.ContainerID || b.RestartCount != a.RestartCount || !b.State.Running.StartedAt.Equal(&a.State.Running.StartedAt) || !a.Ready {
		t.Errorf("container\n%+v\nbecame\n%+v", b, a)
	}
}
