package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
)

func intOrString(n int) intstr.IntOrString { return intstr.FromInt32(int32(n)) }

// agreeWithin bounds the time from the last fault's end until all agree: a
// container that was killed thrice waits 40 s, a job works for 12 s, and a
// node that has just come back starts all its pods.
const agreeWithin = 3 * time.Minute

// atRest waits until churn and faults stand still, and then for the nodes, what
// runs on them and the cloud to agree.
func (s *soak) atRest(ctx context.Context, when string) error {
	s.gate.Lock()
	defer s.gate.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	for _, n := range s.nodes {
		s.checkEdgecore(n)
		if err := s.unbroken(ctx, n); err != nil {
			return err
		}
	}
	if !s.hub.Running() {
		s.t.violate("the hub has ended by itself; its log ends with:\n%s", tail(s.hub.LogPath(), 3000))
		if err := s.startHub(ctx); err != nil {
			return err
		}
	}
	s.t.saidf("at rest %s", when)
	began := time.Now()
	first := ""
	err := s.await(ctx, agreeWithin, func(ctx context.Context) string {
		if err := s.createMissingSolos(ctx); err != nil {
			return err.Error()
		}
		m := s.disagreement(ctx)
		if first == "" {
			first = m
		}
		return m
	})
	took := time.Since(began)
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		s.t.violate("%s: no agreement %v", when, err)
	} else {
		s.t.agreed(took)
		s.t.saidf("all agree after %.1f s", took.Seconds())
	}
	if err := s.checkMounts(ctx); err != nil {
		s.t.violate("%s: %v", when, err)
	}
	if err := s.checkStreams(ctx); err != nil {
		s.t.violate("%s: %v", when, err)
	}
	s.restFigures(ctx)
	return ctx.Err()
}

// disagreement tells the first thing that is not as it must be at rest.
func (s *soak) disagreement(ctx context.Context) string {
	for _, look := range []func(context.Context) (string, error){s.nodesDiffer, s.workloadsDiffer, s.jobsDiffer, s.podsDiffer, s.statusesDiffer} {
		m, err := look(ctx)
		if err != nil {
			return err.Error()
		}
		if m != "" {
			return m
		}
	}
	return ""
}

func (s *soak) nodesDiffer(ctx context.Context) (string, error) {
	for _, n := range s.nodes {
		st, err := n.StatusBySocket(ctx)
		if err != nil {
			return "", fmt.Errorf("%s: %w", n.Name(), err)
		}
		if !st.Connected || !st.Synced || st.Outbox != 0 {
			return fmt.Sprintf("%s: connected %t, synced %t, %d changes to send, last error %q", n.Name(), st.Connected, st.Synced, st.Outbox, st.LastError), nil
		}
		node, err := s.cloud.CoreV1().Nodes().Get(ctx, n.Name(), metav1.GetOptions{})
		if err != nil {
			return "", err
		}
		if !nodeReady(node) || len(node.Spec.Taints) > 0 {
			return fmt.Sprintf("%s: Ready %t, taints %v", n.Name(), nodeReady(node), node.Spec.Taints), nil
		}
	}
	cm, err := s.cloud.CoreV1().ConfigMaps(namespace).Get(ctx, "settings", metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	if err := s.book.checkConfig(cm.Data["key"]); err != nil {
		return err.Error(), nil
	}
	return "", nil
}

func (s *soak) workloadsDiffer(ctx context.Context) (string, error) {
	ds, err := s.cloud.AppsV1().Deployments(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return "", err
	}
	for _, d := range ds.Items {
		want, st := *d.Spec.Replicas, d.Status
		if st.ObservedGeneration != d.Generation || st.Replicas != want || st.UpdatedReplicas != want || st.AvailableReplicas != want {
			return fmt.Sprintf("Deployment %s wants %d: %+v", d.Name, want, st), nil
		}
	}
	sets, err := s.cloud.AppsV1().StatefulSets(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return "", err
	}
	for _, d := range sets.Items {
		if want := *d.Spec.Replicas; d.Status.ObservedGeneration != d.Generation || d.Status.Replicas != want || d.Status.ReadyReplicas != want {
			return fmt.Sprintf("StatefulSet %s wants %d: %+v", d.Name, want, d.Status), nil
		}
	}
	daemons, err := s.cloud.AppsV1().DaemonSets(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return "", err
	}
	for _, d := range daemons.Items {
		want := int32(len(s.nodes))
		if d.Status.ObservedGeneration != d.Generation || d.Status.NumberReady != want || d.Status.UpdatedNumberScheduled != want {
			return fmt.Sprintf("DaemonSet %s wants %d: %+v", d.Name, want, d.Status), nil
		}
	}
	return "", nil
}

// jobsDiffer also tells jobs that were acknowledged and are lost.
func (s *soak) jobsDiffer(ctx context.Context) (string, error) {
	jobs, err := s.cloud.BatchV1().Jobs(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return "", err
	}
	open := s.book.openJobs()
	for _, j := range jobs.Items {
		delete(open, j.Name)
		if j.DeletionTimestamp == nil && !complete(&j) {
			return fmt.Sprintf("Job %s is not complete: %+v", j.Name, j.Status), nil
		}
	}
	for name := range open {
		return fmt.Sprintf("Job %s was created, acknowledged, and is lost", name), nil
	}
	return "", nil
}

// podsDiffer compares the pods in the cloud with what runs on the nodes.
func (s *soak) podsDiffer(ctx context.Context) (string, error) {
	list, err := s.cloud.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return "", err
	}
	byNode := map[string][]corev1.Pod{}
	for _, p := range list.Items {
		if p.DeletionTimestamp != nil {
			return fmt.Sprintf("pod %s on %s is still being deleted", p.Name, p.Spec.NodeName), nil
		}
		byNode[p.Spec.NodeName] = append(byNode[p.Spec.NodeName], p)
	}
	for _, n := range s.nodes {
		m, err := s.nodeDiffers(ctx, n, byNode[n.Name()])
		if m != "" || err != nil {
			return m, err
		}
		delete(byNode, n.Name())
	}
	for node, pods := range byNode {
		return fmt.Sprintf("pod %s is on %q", pods[0].Name, node), nil
	}
	return "", nil
}

func (s *soak) nodeDiffers(ctx context.Context, n *edge, pods []corev1.Pod) (string, error) {
	all, err := s.containers(ctx, n)
	if err != nil {
		return "", err
	}
	sandboxes, err := s.sandboxes(ctx, n)
	if err != nil {
		return "", err
	}
	running := map[types.UID]container{}
	for _, c := range all {
		if !c.running {
			continue
		}
		if o, ok := running[c.uid]; ok {
			return fmt.Sprintf("two containers run: %s, %s", o, c), nil
		}
		running[c.uid] = c
	}
	ready := map[types.UID]int{}
	for _, sb := range sandboxes {
		ready[types.UID(sb.Labels["io.kubernetes.pod.uid"])]++
	}
	static, wantStatic := s.book.wantStatic(n.Name())
	for _, p := range pods {
		uid := p.UID
		if mirror := p.Annotations[corev1.MirrorPodAnnotationKey]; mirror != "" {
			// What runs has the UID of the manifest.
			if uid = types.UID(p.Annotations["kubernetes.io/config.hash"]); !wantStatic || p.Spec.Containers[0].Args[2] != static {
				return fmt.Sprintf("%s mirrors %q; the manifest says %q", p.Name, p.Spec.Containers[0].Args[2], static), nil
			}
			wantStatic = false
		}
		c, runs := running[uid]
		if p.Status.Phase == corev1.PodSucceeded {
			if runs || ready[uid] > 0 {
				return fmt.Sprintf("pod %s has succeeded and runs on: %s", p.Name, c), nil
			}
			continue
		}
		if p.Status.Phase != corev1.PodRunning || !isReady(&p) {
			return fmt.Sprintf("pod %s on %s is %s, ready %t: %s", p.Name, n.Name(), p.Status.Phase, isReady(&p), states(&p)), nil
		}
		if !runs || ready[uid] != 1 {
			return fmt.Sprintf("pod %s (uid %s) is Ready in the cloud; on %s it has %d sandboxes, its container runs: %t", p.Name, uid, n.Name(), ready[uid], runs), nil
		}
		st := p.Status.ContainerStatuses[0]
		if _, id, _ := strings.Cut(st.ContainerID, "://"); id != c.id || int(st.RestartCount) != c.restarts {
			return fmt.Sprintf("pod %s in the cloud: container %.12s, restart %d; on %s: %s", p.Name, id, st.RestartCount, n.Name(), c), nil
		}
		delete(running, uid)
		delete(ready, uid)
	}
	if wantStatic {
		return fmt.Sprintf("%s has a static pod that is not in the cloud", n.Name()), nil
	}
	for _, c := range running {
		return fmt.Sprintf("%s runs what nobody wants: %s", n.Name(), c), nil
	}
	for uid := range ready {
		return fmt.Sprintf("%s has a sandbox of the pod with UID %s, which nobody wants", n.Name(), uid), nil
	}
	return "", nil
}

// statusesDiffer compares what the cloud says of pods with what their nodes say,
// word by word.
func (s *soak) statusesDiffer(ctx context.Context) (string, error) {
	list, err := s.cloud.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return "", err
	}
	for _, n := range s.nodes {
		res, err := n.Kubectl(ctx, "get", "pods", "-n", namespace, "-o", "json")
		if err != nil {
			return "", err
		}
		if res.Code != 0 {
			return "", fmt.Errorf("edgecore kubectl get pods on %s: exit %d: %s", n.Name(), res.Code, res.Stderr)
		}
		var local corev1.PodList
		if err := json.Unmarshal([]byte(res.Stdout), &local); err != nil {
			return "", fmt.Errorf("edgecore kubectl get pods on %s: %w", n.Name(), err)
		}
		there := map[string]*corev1.Pod{}
		for i := range local.Items {
			there[local.Items[i].Name] = &local.Items[i]
		}
		for _, p := range list.Items {
			if p.Spec.NodeName != n.Name() {
				continue
			}
			l := there[p.Name]
			if l == nil || l.UID != p.UID {
				return fmt.Sprintf("pod %s (uid %s) is not in the store of %s", p.Name, p.UID, n.Name()), nil
			}
			if !equality.Semantic.DeepEqual(p.Status, l.Status) {
				return fmt.Sprintf("pod %s: status in the cloud and on %s: %s", p.Name, n.Name(), differing(p.Status, l.Status)), nil
			}
			delete(there, p.Name)
		}
		for name := range there {
			return fmt.Sprintf("the store of %s has a pod %s that the cloud has not", n.Name(), name), nil
		}
	}
	return "", nil
}

// differing shows both from where they differ.
func differing(cloud, node corev1.PodStatus) string {
	a, aerr := json.Marshal(cloud)
	b, berr := json.Marshal(node)
	if aerr != nil || berr != nil {
		return fmt.Sprint(aerr, berr)
	}
	at := 0
	for at < min(len(a), len(b)) && a[at] == b[at] {
		at++
	}
	at = max(0, at-60)
	return fmt.Sprintf("…%.300s | …%.300s", a[at:], b[at:])
}

func isReady(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

func states(p *corev1.Pod) string {
	var out []string
	for _, c := range p.Status.ContainerStatuses {
		switch {
		case c.State.Waiting != nil:
			out = append(out, c.Name+" waits: "+c.State.Waiting.Reason+" "+c.State.Waiting.Message)
		case c.State.Terminated != nil:
			out = append(out, fmt.Sprintf("%s ended with %d %s", c.Name, c.State.Terminated.ExitCode, c.State.Terminated.Reason))
		default:
			out = append(out, c.Name+" runs")
		}
	}
	return strings.Join(out, ", ")
}

// checkMounts waits for what pods have mounted to be what the cloud has; a
// kubelet looks about once a minute.
func (s *soak) checkMounts(ctx context.Context) error {
	began := time.Now()
	cm, err := s.cloud.CoreV1().ConfigMaps(namespace).Get(ctx, "settings", metav1.GetOptions{})
	if err != nil {
		return err
	}
	err = s.await(ctx, 150*time.Second, func(ctx context.Context) string {
		for _, n := range s.nodes {
			all, err := s.containers(ctx, n)
			if err != nil {
				return err.Error()
			}
			for _, c := range all {
				if !c.running || !strings.HasPrefix(c.pod, "solo-") {
					continue
				}
				text, err := s.readFile(ctx, n, c, "/settings/key")
				if err != nil {
					return fmt.Sprintf("%s on %s: %v", c.pod, n.Name(), err)
				}
				if text != cm.Data["key"] {
					return fmt.Sprintf("%s on %s has mounted version %s of the ConfigMap; the cloud has %s", c.pod, n.Name(), text, cm.Data["key"])
				}
			}
		}
		return ""
	})
	if err == nil {
		s.t.mounted(time.Since(began))
	}
	return err
}

// checkStreams wants exec to work with every pod that runs.
func (s *soak) checkStreams(ctx context.Context) error {
	list, err := s.cloud.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for _, p := range list.Items {
		if p.Status.Phase != corev1.PodRunning || strings.HasPrefix(p.Name, "job-") {
			continue
		}
		limited, cancel := context.WithTimeout(ctx, 20*time.Second)
		err := s.execIn(limited, &p)
		cancel()
		if err != nil {
			return fmt.Errorf("exec in %s on %s at rest: %w", p.Name, p.Spec.NodeName, err)
		}
	}
	return nil
}
