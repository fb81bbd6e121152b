package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/e2e/cluster"
)

func cores() int { return runtime.NumCPU() }

// sizes of the built programs.
func (b *bench) sizes(context.Context) error {
	for _, p := range []string{b.programs.Cloudhub, b.programs.Edgecore, b.kubelet} {
		if p == "" {
			continue
		}
		st, err := os.Stat(p)
		if err != nil {
			return err
		}
		b.add("size of "+filepath.Base(p), fmt.Sprintf("%.1f MB", float64(st.Size())/1e6), "", "linux/"+runtime.GOARCH+", stripped")
	}
	return nil
}

// boot measures from exec to /readyz, on a fresh data directory and again on
// the one it left.
func (b *bench) boot(ctx context.Context) error {
	var fresh, again []time.Duration
	for i := range b.runs {
		h, err := cluster.NewHub(cluster.HubConfig{Dir: filepath.Join(b.dir, fmt.Sprintf("boot-%d", i)), Programs: b.programs})
		if err != nil {
			return err
		}
		w := &world{hub: h}
		for _, times := range []*[]time.Duration{&fresh, &again} {
			took, err := w.bootHub(ctx)
			w.close()
			if err != nil {
				return err
			}
			*times = append(*times, took)
		}
	}
	b.add("cloudhub standalone: exec to /readyz, fresh", seconds(fresh), "≤ 4 s", "PKI and etcd made")
	b.add("cloudhub standalone: exec to /readyz, restart", seconds(again), "", "")
	return nil
}

func (w *world) bootHub(ctx context.Context) (time.Duration, error) {
	start := time.Now()
	if err := w.hub.StartReadyz(ctx); err != nil {
		return 0, err
	}
	took := time.Since(start)
	return took, w.hub.Wait(ctx) // so that it is stopped from a state that it is used in
}

// demo measures what make demo does once the programs and images are built.
func (b *bench) demo(ctx context.Context) error {
	var times []time.Duration
	for i := range max(1, b.runs/2) {
		err := func() error {
			start := time.Now()
			w, err := b.world(ctx, fmt.Sprintf("demo-%d", i), "edge-1")
			if err != nil {
				return err
			}
			defer w.close()
			if _, err := w.start(ctx, pods("demo", "edge-1", 1), ready); err != nil {
				return err
			}
			times = append(times, time.Since(start))
			return nil
		}()
		if err != nil {
			return err
		}
	}
	b.add("hub, machine, containerd, join, node and a Ready pod", seconds(times), "", "from built programs and images; no download")
	return nil
}

// pods measures from the create request to the Running that a watch at the API
// server shows, on Skerry's node and on a plain kubelet's in turn.
func (b *bench) pods(ctx context.Context) error {
	w, err := b.world(ctx, "pods", "edge-1")
	if err != nil {
		return err
	}
	defer w.close()
	nodes := []string{"edge-1"}
	if b.kubelet != "" {
		plain, err := b.plainKubelet(ctx, w, "plain-1")
		if err != nil {
			return err
		}
		defer plain.close()
		nodes = append(nodes, "plain-1")
	}
	for _, n := range []int{1, 20} {
		runs := b.runs * 2
		if n > 1 {
			runs = max(3, b.runs*3/5)
		}
		times := map[string][]time.Duration{}
		for i := range runs {
			for j := range nodes {
				node := nodes[(i+j)%len(nodes)] // who goes first alternates
				name := fmt.Sprintf("p%d-%d-%s", n, i, node)
				took, err := w.start(ctx, pods(name, node, n), started)
				if err != nil {
					return err
				}
				times[node] = append(times[node], took)
				if err := w.deletePods(ctx); err != nil {
					return err
				}
			}
		}
		mine, _, _ := median(times["edge-1"])
		what := fmt.Sprintf("apply to Running, %d pods (the last of them)", n)
		if n == 1 {
			what = "apply to Running, 1 pod"
		}
		b.add(what, seconds(times["edge-1"]), "", "")
		if len(nodes) > 1 {
			theirs, _, _ := median(times["plain-1"])
			b.add(what+", plain kubelet", seconds(times["plain-1"]), "", "same API server, same run, in turn")
			b.add(what+", ratio", fmt.Sprintf("%.2f", mine.Seconds()/theirs.Seconds()), "≤ 1.15", "of the medians")
		}
	}
	return nil
}

// logs measures kubectl logs of a 50 MiB log.
func (b *bench) logs(ctx context.Context) error {
	w, err := b.world(ctx, "logs", "edge-1")
	if err != nil {
		return err
	}
	defer w.close()
	p := pods("logs", "edge-1", 1)
	p[0].Spec.RestartPolicy = corev1.RestartPolicyNever
	p[0].Spec.Containers[0].Command = []string{"/bin/demo", "print", "--mib", "50"}
	if _, err := w.start(ctx, p, func(p *corev1.Pod) bool { return p.Status.Phase == corev1.PodSucceeded }); err != nil {
		return err
	}
	var best []time.Duration
	var bytes int64
	for range b.runs {
		cmd := w.hub.KubectlCommand(ctx, "logs", "-n", "default", "logs-0")
		out, err := cmd.StdoutPipe()
		if err != nil {
			return err
		}
		start := time.Now()
		if err := cmd.Start(); err != nil {
			return err
		}
		n, err := io.Copy(io.Discard, out)
		if err != nil {
			return err
		}
		if err := cmd.Wait(); err != nil {
			return err
		}
		best, bytes = append(best, time.Since(start)), n
	}
	mid, low, high := median(best)
	rate := func(d time.Duration) float64 { return float64(bytes) / 1e6 / d.Seconds() }
	b.add(fmt.Sprintf("kubectl logs of %.1f MB, whole command", float64(bytes)/1e6), fmt.Sprintf("%.0f MB/s (%.0f–%.0f, %d runs)", rate(mid), rate(high), rate(low), len(best)),
		"≥ 40 MB/s", "kubectl's own start included")
	return nil
}

// cost reads memory and processor of the programs at idle, with 1 and 30 pods.
func (b *bench) cost(ctx context.Context) error {
	w, err := b.world(ctx, "cost", "edge-1")
	if err != nil {
		return err
	}
	defer w.close()
	type subject struct {
		name string
		pid  int
		node string
	}
	pid, err := w.node.EdgecoreHostPID()
	if err != nil {
		return err
	}
	subjects := []subject{{"cloudhub", w.hub.PID(), ""}, {"edgecore", pid, "edge-1"}}
	if b.kubelet != "" {
		plain, err := b.plainKubelet(ctx, w, "plain-1")
		if err != nil {
			return err
		}
		defer plain.close()
		if pid, err = plain.pid(); err != nil {
			return err
		}
		subjects = append(subjects, subject{"plain kubelet", pid, "plain-1"})
	}
	goals := map[string]map[int]string{"edgecore": {1: "anon ≤ 32 MB", 30: "anon ≤ 50 MB"}}
	have := 0
	for _, n := range []int{1, 30} {
		for _, s := range subjects {
			if s.node == "" {
				continue
			}
			more := pods(fmt.Sprintf("cost%d-%s", n, s.node), s.node, n-have)
			if _, err := w.start(ctx, more, started); err != nil {
				return err
			}
		}
		have = n
		if err := sleep(ctx, 30*time.Second); err != nil { // starting is over, and its garbage collected
			return err
		}
		before := map[string]time.Duration{}
		for _, s := range subjects {
			if before[s.name], err = cpuTime(s.pid); err != nil {
				return err
			}
		}
		if err := sleep(ctx, b.settle); err != nil {
			return err
		}
		for _, s := range subjects {
			after, err := cpuTime(s.pid)
			if err != nil {
				return err
			}
			anon, file, err := memory(s.pid)
			if err != nil {
				return err
			}
			perMinute := (after - before[s.name]).Seconds() / b.settle.Seconds() * 60
			b.add(fmt.Sprintf("%s, %s each node: memory", s.name, count(n)), fmt.Sprintf("anon %.1f MB, file %.1f MB", anon, file), goals[s.name][n], "")
			b.add(fmt.Sprintf("%s, %s each node: processor at idle", s.name, count(n)), fmt.Sprintf("%.2f s/min", perMinute), "", fmt.Sprintf("over %s", b.settle))
		}
	}
	return nil
}

func count(n int) string {
	if n == 1 {
		return "1 pod"
	}
	return fmt.Sprintf("%d pods", n)
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// memory of a process in MB: what is its own, and the pages of files it maps.
func memory(pid int) (anon, file float64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		kb, _ := strconv.ParseFloat(f[1], 64)
		switch f[0] {
		case "RssAnon:":
			anon = kb * 1024 / 1e6
		case "RssFile:":
			file = kb * 1024 / 1e6
		}
	}
	return anon, file, nil
}

// cpuTime a process has used.
func cpuTime(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The name in parentheses may hold anything; fields count from behind it.
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	user, err := strconv.ParseInt(f[11], 10, 64)
	if err != nil {
		return 0, err
	}
	system, err := strconv.ParseInt(f[12], 10, 64)
	if err != nil {
		return 0, err
	}
	const tick = 10 * time.Millisecond // USER_HZ is 100 on every Linux
	return time.Duration(user+system) * tick, nil
}

// pods that run the demo program, bound to a node so that the scheduler's pace
// is not measured.
func pods(name, node string, n int) []*corev1.Pod {
	var out []*corev1.Pod
	grace := int64(1)
	for i := range n {
		out = append(out, &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("%s-%d", name, i), Namespace: "default"},
			Spec: corev1.PodSpec{NodeName: node, TerminationGracePeriodSeconds: &grace,
				Containers: []corev1.Container{{Name: "demo", Image: "localhost/skerry/demo:1"}}},
		})
	}
	return out
}

func started(p *corev1.Pod) bool { return p.Status.Phase == corev1.PodRunning }

func ready(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}
