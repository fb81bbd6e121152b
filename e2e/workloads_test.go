package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/skerry-io/skerry/e2e/image"
)

// podsOf lists the pods that carry the label name=NAME.
func podsOf(ctx context.Context, ns, name string) ([]corev1.Pod, error) {
	list, err := world.client.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{LabelSelector: "name=" + name})
	if err != nil {
		return nil, err
	}
	return list.Items, nil
}

// template is the pods' part of a workload's manifest.
func template(name, rest string) string {
	return fmt.Sprintf("template: {metadata: {labels: {name: %s}}, spec: {terminationGracePeriodSeconds: 1, %s}}",
		name, strings.ReplaceAll(rest, "IMAGE", image.DemoName))
}

func TestDeployment(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	deployment := func(message string) string {
		return `
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 3
  selector: {matchLabels: {name: web}}
  strategy: {rollingUpdate: {maxUnavailable: 0, maxSurge: 1}}
  ` + template("web", "containers: [{name: c, image: IMAGE, args: [serve, --message, "+message+"], readinessProbe: {httpGet: {path: /readyz, port: 8080}, periodSeconds: 1}}]")
	}
	applyIn(t, ns, deployment("first"))
	kubectl(t, "rollout", "status", "-n", ns, "deployment/web", "--timeout=90s")

	// At no time of the update there are fewer than three to serve.
	w, err := world.client.AppsV1().Deployments(ns).Watch(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	fewest := make(chan int32, 1)
	go func() {
		low := int32(3)
		for e := range w.ResultChan() {
			if d, ok := e.Object.(*appsv1.Deployment); ok && e.Type == watch.Modified {
				low = min(low, d.Status.AvailableReplicas)
			}
		}
		fewest <- low
	}()
	applyIn(t, ns, deployment("second"))
	kubectl(t, "rollout", "status", "-n", ns, "deployment/web", "--timeout=90s")
	w.Stop()
	if low := <-fewest; low != 3 {
		t.Errorf("%d available during the update, 3 wanted at all times", low)
	}
	eventually(t, time.Minute, "the old pods to go", func(ctx context.Context) (bool, string) {
		pods, err := podsOf(ctx, ns, "web")
		return err == nil && len(pods) == 3, fmt.Sprint(describe(pods), err)
	})
	pods, err := podsOf(t.Context(), ns, "web")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods {
		if out := execIn(t, ns, p.Name, "", "/bin/demo", "get", "http://127.0.0.1:8080/"); !strings.HasPrefix(out, "second\n") {
			t.Errorf("%s says %q", p.Name, out)
		}
	}
	kubectl(t, "rollout", "undo", "-n", ns, "deployment/web")
	kubectl(t, "rollout", "status", "-n", ns, "deployment/web", "--timeout=90s")
	kubectl(t, "scale", "-n", ns, "deployment/web", "--replicas=1")
	eventually(t, time.Minute, "one pod to be left", func(ctx context.Context) (bool, string) {
		pods, err := podsOf(ctx, ns, "web")
		return err == nil && len(pods) == 1 && pods[0].Spec.Containers[0].Args[2] == "first", fmt.Sprint(describe(pods), err)
	})
}

func TestDaemonSet(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	applyIn(t, ns, `
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: agent}
spec:
  selector: {matchLabels: {name: agent}}
  `+template("agent", "containers: [{name: c, image: IMAGE}]"))
	eventually(t, time.Minute, "an agent to run on each node", func(ctx context.Context) (bool, string) {
		pods, err := podsOf(ctx, ns, "agent")
		if err != nil {
			return false, err.Error()
		}
		on := map[string]int{}
		for _, p := range pods {
			if isReady(&p) {
				on[p.Spec.NodeName]++
			}
		}
		ds, err := world.client.AppsV1().DaemonSets(ns).Get(ctx, "agent", metav1.GetOptions{})
		if err != nil {
			return false, err.Error()
		}
		return on["edge-1"] == 1 && on["edge-2"] == 1 && ds.Status.NumberReady == ds.Status.DesiredNumberScheduled, fmt.Sprint(on, ds.Status)
	})
}

func TestStatefulSet(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	applyIn(t, ns, `
apiVersion: v1
kind: Service
metadata: {name: db}
spec: {clusterIP: None, selector: {name: db}, ports: [{port: 8080}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db}
spec:
  serviceName: db
  replicas: 2
  selector: {matchLabels: {name: db}}
  `+template("db", "containers: [{name: c, image: IMAGE, readinessProbe: {httpGet: {path: /readyz, port: 8080}, periodSeconds: 1}}]"))
	first, second := ready(t, ns, "db-0"), ready(t, ns, "db-1")
	for _, c := range first.Status.Conditions {
		if c.Type == corev1.PodReady && second.CreationTimestamp.Before(&c.LastTransitionTime) {
			t.Errorf("db-1 was made at %s, before db-0 was ready at %s", second.CreationTimestamp, c.LastTransitionTime)
		}
	}
	if first.Spec.Hostname != "db-0" || first.Labels["apps.kubernetes.io/pod-index"] != "0" {
		t.Errorf("db-0: hostname %q, labels %v", first.Spec.Hostname, first.Labels)
	}
	if out := execIn(t, ns, "db-0", "", "/bin/cat", "/proc/sys/kernel/hostname"); out != "db-0\n" {
		t.Errorf("it calls itself %q", out)
	}
	deletePod(t, ns, "db-0", nil)
	again := awaitPod(t, ns, "db-0", time.Minute, "to come again", func(p *corev1.Pod) bool { return p.UID != first.UID && isReady(p) })
	if len(again.OwnerReferences) != 1 || again.OwnerReferences[0].Kind != "StatefulSet" {
		t.Errorf("owners: %+v", again.OwnerReferences)
	}
	if p := ready(t, ns, "db-1"); p.UID != second.UID {
		t.Error("db-1 was replaced, too")
	}
}

func TestJobs(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	job := func(name, spec, pod string) string {
		return fmt.Sprintf("apiVersion: batch/v1\nkind: Job\nmetadata: {name: %s}\nspec: {%s, %s}", name, spec, template(name, pod))
	}
	applyIn(t, ns,
		job("all", "completions: 3, parallelism: 2, completionMode: Indexed", "restartPolicy: Never, containers: [{name: c, image: IMAGE, args: [env]}]"),
		job("hopeless", "backoffLimit: 1", "restartPolicy: Never, containers: [{name: c, image: IMAGE, args: [exit, \"9\"]}]"),
		job("short", "ttlSecondsAfterFinished: 2", "restartPolicy: OnFailure, containers: [{name: c, image: IMAGE, args: [echo, done]}]"),
		job("slow", "activeDeadlineSeconds: 3", "restartPolicy: Never, containers: [{name: c, image: IMAGE, args: [sleep, \"600\"]}]"))
	condition := func(name string, typ batchv1.JobConditionType) *batchv1.Job {
		t.Helper()
		var job *batchv1.Job
		eventually(t, 90*time.Second, "job "+name+" to be "+string(typ), func(ctx context.Context) (bool, string) {
			j, err := world.client.BatchV1().Jobs(ns).Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				return false, err.Error()
			}
			job = j
			for _, c := range j.Status.Conditions {
				if c.Type == typ && c.Status == corev1.ConditionTrue {
					return true, ""
				}
			}
			return false, fmt.Sprintf("%+v", j.Status)
		})
		return job
	}
	reason := func(j *batchv1.Job) string {
		for _, c := range j.Status.Conditions {
			if c.Type == batchv1.JobFailed {
				return c.Reason
			}
		}
		return ""
	}
	if j := condition("all", batchv1.JobComplete); j.Status.Succeeded != 3 || j.Status.CompletedIndexes != "0-2" {
		t.Errorf("all: %+v", j.Status)
	}
	pods, err := podsOf(t.Context(), ns, "all")
	if err != nil || len(pods) != 3 {
		t.Errorf("%d pods, %v", len(pods), err)
	}
	for _, p := range pods {
		index := p.Annotations[batchv1.JobCompletionIndexAnnotation]
		if out := podLog(t, ns, p.Name, ""); !strings.Contains(out, "JOB_COMPLETION_INDEX="+index+"\n") {
			t.Errorf("index %s: %s", index, out)
		}
	}
	if j := condition("hopeless", batchv1.JobFailed); reason(j) != "BackoffLimitExceeded" || j.Status.Failed != 2 {
		t.Errorf("hopeless: %+v", j.Status)
	}
	if j := condition("slow", batchv1.JobFailed); reason(j) != "DeadlineExceeded" {
		t.Errorf("slow: %+v", j.Status)
	}
	eventually(t, time.Minute, "the finished job to be collected", func(ctx context.Context) (bool, string) {
		j, err := world.client.BatchV1().Jobs(ns).Get(ctx, "short", metav1.GetOptions{})
		if err != nil {
			return apierrors.IsNotFound(err), err.Error()
		}
		return false, fmt.Sprintf("%+v", j.Status)
	})
}

func TestCronJob(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	applyIn(t, ns, `
apiVersion: batch/v1
kind: CronJob
metadata: {name: tick}
spec:
  schedule: "* * * * *"
  jobTemplate:
    spec:
      `+template("tick", "restartPolicy: Never, containers: [{name: c, image: IMAGE, args: [echo, tick]}]"))
	eventually(t, 2*time.Minute, "the next minute's job to succeed", func(ctx context.Context) (bool, string) {
		c, err := world.client.BatchV1().CronJobs(ns).Get(ctx, "tick", metav1.GetOptions{})
		if err != nil {
			return false, err.Error()
		}
		return c.Status.LastSuccessfulTime != nil, fmt.Sprintf("%+v", c.Status)
	})
}
