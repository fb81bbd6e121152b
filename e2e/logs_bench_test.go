package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const benchLogMiB = 50

// BenchmarkLogs is kubectl logs of 50 MiB in lines of 64 bytes, the start of
// kubectl included. It gives the median of the runs (-benchtime 7x for seven)
// and the CPU time that hub and node spend on one.
func BenchmarkLogs(b *testing.B) {
	ns := benchPod(b)
	want := sha256.Sum256([]byte(printed(benchLogMiB)))
	hub := world.hub.PID()
	edge, err := world.nodes[0].EdgecoreHostPID()
	if err != nil {
		b.Fatal(err)
	}
	hubBefore, edgeBefore := cpuTime(b, hub), cpuTime(b, edge)
	var took []time.Duration
	b.SetBytes(benchLogMiB << 20)
	for b.Loop() {
		sum := &summing{Hash: sha256.New()}
		cmd := world.hub.KubectlCommand(b.Context(), "logs", "-n", ns, "novel")
		var stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = sum, &stderr
		start := time.Now()
		if err := cmd.Run(); err != nil {
			b.Fatalf("%v: %s", err, stderr.String())
		}
		took = append(took, time.Since(start))
		if !bytes.Equal(sum.Sum(nil), want[:]) {
			b.Fatalf("%d bytes of %d, or others", sum.n, benchLogMiB<<20)
		}
	}
	slices.Sort(took)
	n := float64(len(took))
	b.ReportMetric(benchLogMiB*1.048576/took[len(took)/2].Seconds(), "MB/s-median")
	b.ReportMetric((cpuTime(b, hub)-hubBefore).Seconds()/n, "hub-CPU-s/op")
	b.ReportMetric((cpuTime(b, edge)-edgeBefore).Seconds()/n, "edge-CPU-s/op")
}

// summing hashes and counts what is written to it.
type summing struct {
	hash.Hash
	n int64
}

func (s *summing) Write(p []byte) (int, error) {
	s.n += int64(len(p))
	return s.Hash.Write(p)
}

// benchPod writes the log to be read and returns the pod's namespace.
func benchPod(b *testing.B) string {
	b.Helper()
	ctx := context.Background()
	ns, err := world.client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "b-"}}, metav1.CreateOptions{})
	if err != nil {
		b.Fatal(err)
	}
	pods := world.client.CoreV1().Pods(ns.Name)
	b.Cleanup(func() {
		if err := world.client.CoreV1().Namespaces().Delete(ctx, ns.Name, metav1.DeleteOptions{}); err != nil {
			b.Error(err)
		}
		err := await(ctx, time.Minute, "the pod's end", func(ctx context.Context) (bool, string) {
			list, err := pods.List(ctx, metav1.ListOptions{})
			return err == nil && len(list.Items) == 0, fmt.Sprint(err)
		})
		if err != nil {
			b.Error(err)
		}
	})
	err = await(ctx, time.Minute, "the pod to have written its log", func(ctx context.Context) (bool, string) {
		p, err := pods.Get(ctx, "novel", metav1.GetOptions{})
		if err == nil {
			return succeeded(p), describe([]corev1.Pod{*p})
		}
		_, err = pods.Create(ctx, &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: "novel"},
			Spec: corev1.PodSpec{NodeName: "edge-1", RestartPolicy: corev1.RestartPolicyNever, Containers: []corev1.Container{{
				Name: "novel", Image: "localhost/skerry/demo:1", Args: []string{"print", "--mib", fmt.Sprint(benchLogMiB)},
			}}},
		}, metav1.CreateOptions{})
		return false, fmt.Sprint(err) // refused until the namespace has its service account
	})
	if err != nil {
		b.Fatal(err)
	}
	return ns.Name
}
