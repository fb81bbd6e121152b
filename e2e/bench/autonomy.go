package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/e2e/cluster"
	"github.com/skerry-io/skerry/e2e/machine"
)

// cold measures a start without a cloud: power off, power on, no hub. Times
// count from the start of edgecore's process; every pod mounts its service
// account's token.
func (b *bench) cold(ctx context.Context) error {
	goals := map[int][3]string{1: {"≤ 1.6 s", "", ""}, 10: {"", "≤ 2.5 s", ""}, 30: {"", "", "≤ 8 s"}}
	for _, n := range []int{1, 10, 30} {
		if err := b.coldStart(ctx, n, goals[n]); err != nil {
			return fmt.Errorf("%s: %w", count(n), err)
		}
	}
	return nil
}

func (b *bench) coldStart(ctx context.Context, n int, goals [3]string) error {
	w, err := b.world(ctx, fmt.Sprintf("cold-%d", n), "edge-1")
	if err != nil {
		return err
	}
	defer w.close()
	if _, err := w.start(ctx, pods("cold", "edge-1", n), ready); err != nil {
		return err
	}
	var first, last, all []time.Duration
	var peaks []float64
	for range max(3, b.runs*3/5) {
		if err := w.hub.Stop(ctx); err != nil {
			return err
		}
		if err := w.node.PowerOff(ctx); err != nil {
			return err
		}
		if err := w.node.Machine.Start(ctx); err != nil {
			return err
		}
		began := time.Now()
		if err := w.node.Run(ctx); err != nil {
			return err
		}
		peak := watchMemory(ctx, w)
		starts, err := w.awaitContainers(ctx, n)
		if err != nil {
			return err
		}
		if err := sleep(ctx, 5*time.Second); err != nil { // the last statuses are stored
			return err
		}
		if err := w.hub.Start(ctx); err != nil {
			return err
		}
		readyAt, err := w.readyTimes(ctx, began)
		if err != nil {
			return err
		}
		first, last = append(first, slices.MinFunc(starts, time.Time.Compare).Sub(began)), append(last, slices.MaxFunc(starts, time.Time.Compare).Sub(began))
		all = append(all, slices.MaxFunc(readyAt, time.Time.Compare).Sub(began))
		peaks = append(peaks, peak())
	}
	var aloneFirst, aloneLast []time.Duration
	for range max(3, b.runs*3/5) {
		f, l, err := w.runtimeAlone(ctx)
		if err != nil {
			return err
		}
		aloneFirst, aloneLast = append(aloneFirst, f), append(aloneLast, l)
	}
	what := "offline cold start, " + count(n) + " with tokens: "
	note := "from edgecore's exec; power was off, no hub"
	b.add(what+"first Running", seconds(first), goals[0], note)
	if n > 1 {
		b.add(what+"last Running", seconds(last), goals[1], note)
	}
	b.add(what+"the runtime alone, first", seconds(aloneFirst), "", "the same sandboxes and containers, asked of containerd at once, without volumes and without edgecore")
	if n > 1 {
		b.add(what+"the runtime alone, last", seconds(aloneLast), "", "")
	}
	b.add(what+"all Ready", seconds(all), goals[2], "the Ready conditions' times, which are whole seconds: the end of that second")
	b.add(what+"memory until the cloud is back", fmt.Sprintf("anon %.1f MB at most", slices.Max(peaks)), "", "")
	return nil
}

// awaitContainers returns when containerd started each of n containers.
func (w *world) awaitContainers(ctx context.Context, n int) ([]time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	client, done, err := w.runtime()
	if err != nil {
		return nil, err
	}
	defer done()
	running := &cri.ContainerFilter{State: &cri.ContainerStateValue{State: cri.ContainerState_CONTAINER_RUNNING}}
	for {
		list, err := client.ListContainers(ctx, &cri.ListContainersRequest{Filter: running})
		if err != nil {
			return nil, err
		}
		if len(list.Containers) >= n {
			var at []time.Time
			for _, c := range list.Containers {
				st, err := client.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: c.Id})
				if err != nil {
					return nil, err
				}
				at = append(at, time.Unix(0, st.Status.StartedAt))
			}
			return at, nil
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return nil, fmt.Errorf("%d of %d containers run: %w", len(list.Containers), n, err)
		}
	}
}

// readyTimes waits for the cloud to hear that each pod became Ready after
// began, and returns the ends of those seconds.
func (w *world) readyTimes(ctx context.Context, began time.Time) ([]time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for {
		list, err := w.client.CoreV1().Pods("default").List(ctx, metav1.ListOptions{})
		if err == nil {
			var at []time.Time
			for _, p := range list.Items {
				for _, c := range p.Status.Conditions {
					if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue && !c.LastTransitionTime.Time.Before(began.Truncate(time.Second)) {
						at = append(at, c.LastTransitionTime.Time.Add(time.Second))
					}
				}
			}
			if len(at) == len(list.Items) && len(at) > 0 {
				return at, nil
			}
			err = fmt.Errorf("%d of %d pods are Ready since then", len(at), len(list.Items))
		}
		if serr := sleep(ctx, 100*time.Millisecond); serr != nil {
			return nil, errors.Join(err, serr)
		}
	}
}

// resync measures coming back to 1,000 changed objects: ConfigMaps of 1 KiB,
// all mounted by pods of the node, each of which the cloud has changed.
func (b *bench) resync(ctx context.Context) error {
	const nPods, perPod, size = 10, 100, 1024
	w, err := b.world(ctx, "resync", "edge-1")
	if err != nil {
		return err
	}
	defer w.close()
	configs := w.client.CoreV1().ConfigMaps("default")
	rnd := rand.New(rand.NewPCG(1, 1))
	value := func(version int) map[string]string {
		text := make([]byte, size*3/4) // that no compression makes smaller
		for i := range text {
			text[i] = byte(rnd.Uint32())
		}
		return map[string]string{"text": fmt.Sprint(version, base64.StdEncoding.EncodeToString(text))}
	}
	all := pods("resync", "edge-1", nPods)
	var names []string
	for i, p := range all {
		var sources []corev1.VolumeProjection
		for j := range perPod {
			name := fmt.Sprintf("settings-%d-%d", i, j)
			names = append(names, name)
			sources = append(sources, corev1.VolumeProjection{ConfigMap: &corev1.ConfigMapProjection{
				LocalObjectReference: corev1.LocalObjectReference{Name: name},
				Items:                []corev1.KeyToPath{{Key: "text", Path: name}}}})
			if _, err := configs.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: value(0)}, metav1.CreateOptions{}); err != nil {
				return err
			}
		}
		p.Spec.Volumes = []corev1.Volume{{Name: "settings", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: sources}}}}
		p.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "settings", MountPath: "/settings"}}
	}
	if _, err := w.start(ctx, all, ready); err != nil {
		return err
	}
	var took []time.Duration
	var down, up []uint64
	var peaks []float64
	for version := 1; version <= b.runs; version++ {
		if err := w.node.CutLink(ctx, machine.LinkDown); err != nil {
			return err
		}
		if _, err := w.awaitStatus(ctx, "disconnected", func(st cluster.Status) bool { return !st.Connected }); err != nil {
			return err
		}
		for _, name := range names {
			if _, err := configs.Update(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: value(version)}, metav1.UpdateOptions{}); err != nil {
				return err
			}
		}
		peak := watchMemory(ctx, w)
		if err := w.node.RestoreLink(ctx); err != nil {
			return err
		}
		st, err := w.awaitStatus(ctx, "in step", func(st cluster.Status) bool { return st.Connected && st.LastSync.After(st.Since) })
		if err != nil {
			return err
		}
		took = append(took, st.LastSync.Sub(st.Since))
		down, up = append(down, st.TunnelRecv), append(up, st.TunnelSent)
		peaks = append(peaks, peak())
	}
	what := fmt.Sprintf("back to %d changed objects: ", len(names))
	b.add(what+"in step", seconds(took), "", "ConfigMaps of 1 KiB, all different, that 10 pods mount; from the tunnel's start, without the wait before it")
	b.add(what+"received", fmt.Sprintf("%.0f KB", float64(slices.Max(down))/1e3), "", "on the tunnel, TLS apart; the most of the runs")
	b.add(what+"sent", fmt.Sprintf("%.0f KB", float64(slices.Max(up))/1e3), "", "the node's inventory, and what else it had to say")
	b.add(what+"memory", fmt.Sprintf("anon %.1f MB at most", slices.Max(peaks)), "", "of edgecore, meanwhile")
	return nil
}

// disk measures what an idle node writes.
func (b *bench) disk(ctx context.Context) error {
	const n = 10
	w, err := b.world(ctx, "disk", "edge-1")
	if err != nil {
		return err
	}
	defer w.close()
	if _, err := w.start(ctx, pods("disk", "edge-1", n), ready); err != nil {
		return err
	}
	// Starting is over, and the store's good copy of it made.
	if err := sleep(ctx, 3*time.Minute); err != nil {
		return err
	}
	pid, err := w.node.EdgecoreHostPID()
	if err != nil {
		return err
	}
	read := func() (st cluster.Status, process uint64, err error) {
		if st, err = w.node.StatusBySocket(ctx); err == nil {
			process, err = writtenBytes(pid)
		}
		return st, process, err
	}
	before, processBefore, err := read()
	if err != nil {
		return err
	}
	peak := watchMemory(ctx, w)
	if err := sleep(ctx, b.idle); err != nil {
		return err
	}
	memory := peak()
	after, process, err := read()
	if err != nil {
		return err
	}
	rate := func(n uint64) string {
		hour := float64(n) / 1e6 / b.idle.Hours()
		return fmt.Sprintf("%.3f MB/h, %.1f MB/day", hour, 24*hour)
	}
	var classes []string
	for _, class := range slices.Sorted(maps.Keys(after.Bytes.Disk.Classes)) {
		if n := after.Bytes.Disk.Classes[class] - before.Bytes.Disk.Classes[class]; n > 0 {
			classes = append(classes, fmt.Sprintf("%s %.0f KB", class, float64(n)/1e3))
		}
	}
	over := fmt.Sprintf("measured over %s", b.idle)
	b.add("bytes to disk while idle, 10 pods: the store", rate(after.StoreWritten-before.StoreWritten), "≤ 5 MB/day", over+": "+strings.Join(classes, ", "))
	b.add("bytes to disk while idle, 10 pods: the whole process", rate(process-processBefore), "", over+"; write_bytes of its /proc/PID/io, its log included, each change a page of 4 KiB")
	b.add("memory of edgecore meanwhile", fmt.Sprintf("anon %.1f MB at most", memory), "", "")
	return nil
}

// awaitStatus asks edgecore until it tells what is wanted.
func (w *world) awaitStatus(ctx context.Context, what string, is func(cluster.Status) bool) (cluster.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for {
		st, err := w.node.StatusBySocket(ctx)
		if err == nil && is(st) {
			return st, nil
		}
		if serr := sleep(ctx, 20*time.Millisecond); serr != nil {
			return st, fmt.Errorf("edgecore is not %s: %+v: %w", what, st, errors.Join(err, serr))
		}
	}
}

// watchMemory follows edgecore's anonymous memory until the function it returns
// is called, which tells the most it was, in MB.
func watchMemory(ctx context.Context, w *world) (peak func() float64) {
	ctx, cancel := context.WithCancel(ctx)
	var most float64
	var watching sync.WaitGroup
	watching.Go(func() {
		for {
			if pid, err := w.node.EdgecoreHostPID(); err == nil {
				if anon, _, err := memory(pid); err == nil {
					most = max(most, anon)
				}
			}
			if sleep(ctx, 200*time.Millisecond) != nil {
				return
			}
		}
	})
	return func() float64 {
		cancel()
		watching.Wait()
		return most
	}
}

// writtenBytes is what a process has caused to be written to disk.
func writtenBytes(pid int) (uint64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(line, "write_bytes: "); ok {
			return strconv.ParseUint(strings.TrimSpace(v), 10, 64)
		}
	}
	return 0, fmt.Errorf("/proc/%d/io has no write_bytes", pid)
}
