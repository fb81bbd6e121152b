package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	statsv1alpha1 "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
	metricsv1beta1 "k8s.io/metrics/pkg/apis/metrics/v1beta1"

	"github.com/skerry-io/skerry/e2e/cluster"
)

// measured is a pod whose figures are worth comparing: it works when told to
// and holds memory of its own.
const measured = `
apiVersion: v1
kind: Pod
metadata: {name: measured}
spec:
  nodeName: edge-1
  terminationGracePeriodSeconds: 1
  containers:
  - name: web
    image: localhost/skerry/demo:1
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
  - name: hoard
    image: localhost/skerry/demo:1
    command: [/bin/sleep, "3600"]
    volumeMounts: [{name: memory, mountPath: /memory}]
  volumes: [{name: memory, emptyDir: {medium: Memory}}]
`

// unified tells of cgroup v2.
var unified = func() bool {
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	return err == nil
}()

func TestKubeletEndpoints(t *testing.T) {
	t.Parallel()
	ns := apply(t, measured)
	pod := ready(t, ns, "measured")
	const text = "text/plain; version=0.0.4"
	for path, want := range map[string]struct{ contentType, metric string }{
		"/metrics":               {text, "kubelet_running_pods"},
		"/metrics/cadvisor":      {text, "container_memory_working_set_bytes"},
		"/metrics/resource":      {text, "node_cpu_usage_seconds_total"},
		"/metrics/probes":        {text, "prober_probe_total"},
		"/stats/summary":         {"application/json", ""},
		"/configz":               {"application/json", ""},
		"/pods":                  {"application/json", ""},
		"/healthz":               {"text/plain; charset=utf-8", ""},
		"/healthz/syncloop":      {"text/plain; charset=utf-8", ""},
		"/debug/pprof/goroutine": {"application/octet-stream", ""},
	} {
		t.Run(strings.TrimPrefix(path, "/"), func(t *testing.T) {
			a := request(t, http.MethodGet, nodePath("edge-1", path))
			if got := a.header.Get("Content-Type"); a.code != http.StatusOK || !strings.HasPrefix(got, want.contentType) {
				t.Fatalf("%d, Content-Type %q; want %q: %.200s", a.code, got, want.contentType, a.body)
			}
			if want.metric != "" {
				parser := expfmt.NewTextParser(model.LegacyValidation)
				families, err := parser.TextToMetricFamilies(strings.NewReader(string(a.body)))
				if err != nil {
					t.Fatal(err)
				}
				if families[want.metric] == nil {
					t.Errorf("no %s among %d families", want.metric, len(families))
				}
			}
			if !strings.Contains(path, "pprof") {
				if raw := kubectl(t, "get", "--raw", nodePath("edge-1", path)); raw == "" {
					t.Error("kubectl get --raw shows nothing")
				}
			}
		})
	}
	t.Run("pods", func(t *testing.T) {
		var list corev1.PodList
		if err := json.Unmarshal(request(t, http.MethodGet, nodePath("edge-1", "/pods")).body, &list); err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(list.Items, func(p corev1.Pod) bool { return p.UID == pod.UID }) {
			t.Errorf("the pod is not among %d", len(list.Items))
		}
	})
	t.Run("configz", func(t *testing.T) {
		var config struct {
			Kubelet struct {
				EnableServer *bool  `json:"enableServer"`
				CgroupRoot   string `json:"cgroupRoot"`
			} `json:"kubeletconfig"`
		}
		if err := json.Unmarshal(request(t, http.MethodGet, nodePath("edge-1", "/configz")).body, &config); err != nil {
			t.Fatal(err)
		}
		if c := config.Kubelet; c.EnableServer == nil || *c.EnableServer || c.CgroupRoot != world.nodes[0].CgroupRoot() {
			t.Errorf("%+v", c)
		}
	})
	t.Run("containers", func(t *testing.T) {
		for path, metric := range map[string]string{"/metrics/cadvisor": "container_cpu_usage_seconds_total", "/metrics/resource": "container_start_time_seconds"} {
			eventually(t, 30*time.Second, metric+" of the container in "+path, func(context.Context) (bool, string) {
				body := string(request(t, http.MethodGet, nodePath("edge-1", path)).body)
				for line := range strings.Lines(body) {
					if strings.HasPrefix(line, metric+"{") && strings.Contains(line, `container="web"`) &&
						strings.Contains(line, `namespace="`+ns+`"`) && strings.Contains(line, `pod="measured"`) {
						return true, ""
					}
				}
				return false, fmt.Sprintf("%d bytes without it", len(body))
			})
		}
	})
	t.Run("a node that is not there", func(t *testing.T) {
		a := request(t, http.MethodGet, nodePath("edge-77", "/healthz"))
		if a.code != http.StatusNotFound || !strings.Contains(string(a.body), "edge-77") {
			t.Errorf("%d %s", a.code, a.body)
		}
	})
}

// TestFiguresAreTrue compares what the kubelet's summary and kubectl top say
// with the kernel's own files.
func TestFiguresAreTrue(t *testing.T) {
	t.Parallel()
	const hoarded = 64 << 20
	ns := apply(t, measured)
	pod := ready(t, ns, "measured")
	node := world.nodes[0]
	// While it works, top sees it working.
	work, rest := context.WithCancel(t.Context())
	defer rest()
	worked := make(chan error, 1)
	go func() {
		for work.Err() == nil {
			res, err := world.hub.Kubectl(work, "exec", "-n", ns, "measured", "-c", "web", "--", "/bin/demo", "get", "http://127.0.0.1:8080/burn?for=8s")
			if work.Err() == nil && (err != nil || res.Code != 0) {
				worked <- fmt.Errorf("burn: %v, exit %d: %s", err, res.Code, res.Stderr)
				return
			}
		}
		worked <- nil
	}()
	r := kubectlStart(t, nil, strings.NewReader(strings.Repeat("x", hoarded)), "exec", "-i", "-n", ns, "measured", "-c", "hoard", "--", "/bin/demo", "write", "/memory/hoard")
	if code := r.wait(t, time.Minute); code != 0 {
		t.Fatalf("exit %d: %s", code, r.stderr.tail())
	}
	t.Run("top pods", func(t *testing.T) {
		// A burner gets a tenth of a CPU at least on any host this runs on.
		seen := func(web, hoard corev1.ResourceList) bool {
			return web.Cpu().MilliValue() >= 100 && hoard.Cpu().MilliValue() < 100 &&
				hoard.Memory().Value() >= hoarded && hoard.Memory().Value() < hoarded+32<<20
		}
		eventually(t, time.Minute, "the metrics API to see the work", func(context.Context) (bool, string) {
			var m metricsv1beta1.PodMetrics
			a := request(t, http.MethodGet, "/apis/metrics.k8s.io/v1beta1/namespaces/"+ns+"/pods/measured")
			if err := json.Unmarshal(a.body, &m); err != nil {
				t.Fatal(err)
			}
			usage := map[string]corev1.ResourceList{}
			for _, c := range m.Containers {
				usage[c.Name] = c.Usage
			}
			return seen(usage["web"], usage["hoard"]), string(a.body)
		})
		byContainer, said := top(t, "pods", "-n", ns, "--containers")
		if web, hoard := byContainer["measured/web"], byContainer["measured/hoard"]; !seen(web, hoard) {
			t.Errorf("%s", said)
		}
		rows, said := top(t, "pods", "-n", ns)
		if one := rows["measured"]; one.Memory().Value() < hoarded {
			t.Errorf("without --containers: %s", said)
		}
	})
	web, hoard := containerStatus(pod, "web"), containerStatus(pod, "hoard")
	eventually(t, time.Minute, "two seconds of work, to have something to compare", func(context.Context) (bool, string) {
		used := time.Duration(cpuUsage(t, containerCgroup(t, node, pod, web, "cpuacct")))
		return used >= 2*time.Second, used.String()
	})
	rest()
	if err := <-worked; err != nil {
		t.Error(err)
	}

	t.Run("top nodes", func(t *testing.T) {
		rows, said := top(t, "nodes")
		for _, n := range world.nodes {
			row := rows[n.Name()]
			if row == nil {
				t.Errorf("no %s: %s", n.Name(), said)
				continue
			}
			total := memoryTotal(t)
			if mem := uint64(row.Memory().Value()); mem == 0 || mem > total || row.Cpu().MilliValue() <= 0 {
				t.Errorf("%s of %d: %s", n.Name(), total, said)
			}
		}
	})

	// Wait for samples taken after the work, and read the kernel's files
	// before and after: what only grows must lie between the two readings, in
	// truth and not about. What goes up and down is read all the time
	// meanwhile, and must lie in the range seen.
	podProc := procOf(t, containerCgroup(t, node, pod, web, "cpuacct"))
	nodeProc := filepath.Dir(node.Path("/")) // /proc/PID/root
	readings := func() map[string]float64 {
		podReceived, podSent := counters(t, podProc)
		nodeReceived, nodeSent := counters(t, nodeProc)
		return map[string]float64{
			"node CPU":  cpuUsage(t, ""),
			"pod CPU":   cpuUsage(t, podCgroup(t, node, pod, "cpuacct")),
			"web CPU":   cpuUsage(t, containerCgroup(t, node, pod, web, "cpuacct")),
			"pod rx":    podReceived,
			"pod tx":    podSent,
			"node rx":   nodeReceived,
			"node tx":   nodeSent,
			"node mem":  workingSet(t, ""),
			"pod mem":   workingSet(t, podCgroup(t, node, pod, "memory")),
			"hoard mem": workingSet(t, containerCgroup(t, node, pod, hoard, "memory")),
			"node fs":   diskAvailable(t, node),
		}
	}
	low, start := readings(), time.Now()
	high := map[string]float64{}
	for k, v := range low {
		high[k] = v
	}
	var s *statsv1alpha1.Summary
	var p *statsv1alpha1.PodStats
	eventually(t, time.Minute, "samples of the summary after "+start.String(), func(context.Context) (bool, string) {
		s = summary(t, node.Name())
		for k, v := range readings() {
			low[k], high[k] = min(low[k], v), max(high[k], v)
		}
		if p = podStats(s, pod); p == nil || p.CPU == nil || p.Memory == nil || p.Network == nil || len(p.Containers) != 2 {
			return false, "no complete figures of the pod"
		}
		oldest := slices.MinFunc([]time.Time{s.Node.CPU.Time.Time, s.Node.Memory.Time.Time, s.Node.Network.Time.Time, s.Node.Fs.Time.Time,
			p.CPU.Time.Time, p.Memory.Time.Time, p.Network.Time.Time, p.Containers[0].CPU.Time.Time, p.Containers[1].CPU.Time.Time}, time.Time.Compare)
		// The stamps are cut to whole seconds: one that shows a later second
		// than start's is later than start.
		return oldest.After(start.Truncate(time.Second)), "the oldest is of " + oldest.String()
	})
	c := map[string]statsv1alpha1.ContainerStats{}
	for _, one := range p.Containers {
		c[one.Name] = one
	}
	for _, f := range []struct {
		name  string
		value *uint64
		slack float64 // beside what lies between the readings
	}{
		{"node CPU", s.Node.CPU.UsageCoreNanoSeconds, 0},
		{"pod CPU", p.CPU.UsageCoreNanoSeconds, 0},
		{"web CPU", c["web"].CPU.UsageCoreNanoSeconds, 0},
		{"pod rx", p.Network.RxBytes, 0},
		{"pod tx", p.Network.TxBytes, 0},
		{"node rx", s.Node.Network.RxBytes, 0},
		{"node tx", s.Node.Network.TxBytes, 0},
		// Others use the host's memory and disk between two of our readings.
		{"node mem", s.Node.Memory.WorkingSetBytes, 0.05 * high["node mem"]},
		{"node fs", s.Node.Fs.AvailableBytes, 0.01 * high["node fs"]},
		// The pod rests: a few pages of its Go runtimes and page tables.
		{"pod mem", p.Memory.WorkingSetBytes, 2 << 20},
		{"hoard mem", c["hoard"].Memory.WorkingSetBytes, 2 << 20},
	} {
		if f.value == nil {
			t.Errorf("%s: no figure", f.name)
			continue
		}
		v := float64(*f.value)
		t.Logf("%-9s %14.0f in [%.0f, %.0f], slack %.0f", f.name, v, low[f.name], high[f.name], f.slack)
		if v < low[f.name]-f.slack || v > high[f.name]+f.slack {
			t.Errorf("%s: %.0f; the kernel says %.0f to %.0f, give or take %.0f", f.name, v, low[f.name], high[f.name], f.slack)
		}
	}
	// The figures are worth comparing: they stand far above the slack.
	if low["web CPU"] < float64(2*time.Second) || low["hoard mem"] < hoarded {
		t.Errorf("the pod did not work: %v", low)
	}
	if got, want := *s.Node.Fs.CapacityBytes, diskCapacity(t, node); got != want {
		t.Errorf("node fs: capacity %d; statfs says %d", got, want)
	}
	if total := *s.Node.Memory.AvailableBytes + *s.Node.Memory.WorkingSetBytes; math.Abs(float64(total)-float64(memoryTotal(t))) > 1<<20 {
		t.Errorf("node memory: available and working set are %d together; the machine has %d", total, memoryTotal(t))
	}
	if p.StartTime.IsZero() || p.PodRef.UID != string(pod.UID) {
		t.Errorf("pod: %+v", p.PodRef)
	}
}

// top parses kubectl top, by the row's name or "pod/container".
func top(t *testing.T, args ...string) (map[string]corev1.ResourceList, string) {
	t.Helper()
	res := kubectlAny(t, "", append([]string{"top"}, args...)...)
	rows := map[string]corev1.ResourceList{}
	for i, line := range strings.Split(strings.TrimSpace(res.Stdout), "\n") {
		f := strings.Fields(line)
		if i == 0 || len(f) < 3 {
			continue
		}
		name := f[0]
		f = f[1:]
		if strings.Contains(res.Stdout, "CPU(%)") { // nodes have a share beside each figure
			if len(f) < 4 {
				continue
			}
			f = []string{f[0], f[2]}
		} else if slices.Contains(args, "--containers") {
			name += "/" + f[0]
			f = f[1:]
		}
		cpu, err := resource.ParseQuantity(f[0])
		if err != nil {
			continue // <unknown>
		}
		memory, err := resource.ParseQuantity(f[1])
		if err != nil {
			continue
		}
		rows[name] = corev1.ResourceList{corev1.ResourceCPU: cpu, corev1.ResourceMemory: memory}
	}
	return rows, res.Stdout + res.Stderr
}

func summary(t *testing.T, node string) *statsv1alpha1.Summary {
	t.Helper()
	var s statsv1alpha1.Summary
	if err := json.Unmarshal(request(t, http.MethodGet, nodePath(node, "/stats/summary")).body, &s); err != nil {
		t.Fatal(err)
	}
	return &s
}

func podStats(s *statsv1alpha1.Summary, pod *corev1.Pod) *statsv1alpha1.PodStats {
	i := slices.IndexFunc(s.Pods, func(p statsv1alpha1.PodStats) bool { return p.PodRef.UID == string(pod.UID) })
	if i < 0 {
		return nil
	}
	return &s.Pods[i]
}

// podCgroup returns the pod's cgroup below a v1 controller, or below the
// unified hierarchy. Both cgroup drivers' names have the uid in them.
func podCgroup(t *testing.T, n *cluster.Node, pod *corev1.Pod, controller string) string {
	t.Helper()
	return findCgroup(t, filepath.Join(hierarchy(controller), n.CgroupRoot()), string(pod.UID))
}

func containerCgroup(t *testing.T, n *cluster.Node, pod *corev1.Pod, c corev1.ContainerStatus, controller string) string {
	t.Helper()
	_, id, _ := strings.Cut(c.ContainerID, "://")
	return findCgroup(t, podCgroup(t, n, pod, controller), id)
}

func hierarchy(controller string) string {
	if unified {
		controller = ""
	}
	return filepath.Join("/sys/fs/cgroup", controller)
}

func findCgroup(t *testing.T, below, id string) string {
	t.Helper()
	var found string
	err := filepath.WalkDir(below, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return ignoreGone(err)
		}
		if strings.Contains(strings.ReplaceAll(d.Name(), "_", "-"), id) {
			found = path
			return filepath.SkipAll
		}
		return nil
	})
	if err != nil || found == "" {
		t.Fatalf("cgroup of %s below %s: %v", id, below, err)
	}
	return found
}

// ignoreGone is for walks over cgroups, which may end meanwhile.
func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV) {
		return nil
	}
	return err
}

// cpuUsage returns nanoseconds of a cgroup; empty means the root.
func cpuUsage(t *testing.T, cgroup string) float64 {
	t.Helper()
	if unified {
		return 1000 * keyed(t, filepath.Join(or(cgroup, hierarchy("")), "cpu.stat"), "usage_usec")
	}
	return number(t, filepath.Join(or(cgroup, hierarchy("cpuacct")), "cpuacct.usage"))
}

// workingSet returns bytes: what is used but for file pages that have not been
// touched for long.
func workingSet(t *testing.T, cgroup string) float64 {
	t.Helper()
	if !unified {
		dir := or(cgroup, hierarchy("memory"))
		return number(t, filepath.Join(dir, "memory.usage_in_bytes")) - keyed(t, filepath.Join(dir, "memory.stat"), "total_inactive_file")
	}
	dir := or(cgroup, hierarchy(""))
	stat := filepath.Join(dir, "memory.stat")
	if cgroup == "" { // the root has no memory.current
		return keyed(t, stat, "anon") + keyed(t, stat, "file") - keyed(t, stat, "inactive_file")
	}
	return number(t, filepath.Join(dir, "memory.current")) - keyed(t, stat, "inactive_file")
}

func or(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

func number(t *testing.T, path string) float64 {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return parse(t, string(b))
}

func parse(t *testing.T, text string) float64 {
	t.Helper()
	n, err := strconv.ParseUint(strings.TrimSpace(text), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return float64(n)
}

// keyed reads a number from a file of keys and values.
func keyed(t *testing.T, path, key string) float64 {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, " "); ok && strings.TrimSuffix(k, ":") == key {
			return parse(t, strings.TrimSuffix(strings.TrimSpace(v), " kB"))
		}
	}
	t.Fatalf("no %s in %s", key, path)
	return 0
}

func memoryTotal(t *testing.T) uint64 {
	t.Helper()
	return uint64(keyed(t, "/proc/meminfo", "MemTotal")) << 10
}

// counters returns what the kernel counted on eth0 of a process's network.
func counters(t *testing.T, proc string) (received, sent float64) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(proc, "net/dev"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), "eth0:"); ok {
			f := strings.Fields(rest)
			return parse(t, f[0]), parse(t, f[8])
		}
	}
	t.Fatalf("no eth0 in %s", b)
	return 0, 0
}

// procOf returns /proc/PID of the container's first process.
func procOf(t *testing.T, cgroup string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(cgroup, "cgroup.procs"))
	if err != nil {
		t.Fatal(err)
	}
	// The first process is the one that lasts; another may be a probe's or an
	// exec's, and the file is in no order.
	first := math.MaxInt
	for _, f := range strings.Fields(string(b)) {
		if pid, err := strconv.Atoi(f); err == nil {
			first = min(first, pid)
		}
	}
	return "/proc/" + strconv.Itoa(first)
}

func statfs(t *testing.T, n *cluster.Node) syscall.Statfs_t {
	t.Helper()
	var st syscall.Statfs_t
	if err := syscall.Statfs(n.Disk("/var/lib/kubelet"), &st); err != nil {
		t.Fatal(err)
	}
	return st
}

func diskAvailable(t *testing.T, n *cluster.Node) float64 {
	st := statfs(t, n)
	return float64(st.Bavail) * float64(st.Bsize)
}

func diskCapacity(t *testing.T, n *cluster.Node) uint64 {
	st := statfs(t, n)
	return st.Blocks * uint64(st.Bsize)
}
