package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/remotecommand"

	"github.com/skerry-io/skerry/e2e/cluster"
	"github.com/skerry-io/skerry/e2e/image"
)

const (
	deployments = 3
	maxReplicas = 3
	solos       = 6
	maxJobs     = 6
)

// makeWorkloads creates what the churn then changes.
func (s *soak) makeWorkloads(ctx context.Context) error {
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}
	if _, err := s.cloud.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil {
		return err
	}
	err := s.await(ctx, time.Minute, func(ctx context.Context) string {
		if _, err := s.cloud.CoreV1().ServiceAccounts(namespace).Get(ctx, "default", metav1.GetOptions{}); err != nil {
			return err.Error()
		}
		return ""
	})
	if err != nil {
		return err
	}
	if err := s.setConfig(ctx); err != nil {
		return err
	}
	if err := s.setSecret(ctx); err != nil {
		return err
	}
	for i := range deployments {
		one := int32(1)
		d := &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("deployment-%d", i)}, Spec: appsv1.DeploymentSpec{
			Replicas: &one, Selector: selector(fmt.Sprintf("deployment-%d", i)), Template: template(fmt.Sprintf("deployment-%d", i))}}
		if _, err := s.cloud.AppsV1().Deployments(namespace).Create(ctx, d, metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	two := int32(2)
	set := &appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Name: "stateful"}, Spec: appsv1.StatefulSetSpec{
		Replicas: &two, Selector: selector("stateful"), Template: template("stateful"), PodManagementPolicy: appsv1.ParallelPodManagement}}
	if _, err := s.cloud.AppsV1().StatefulSets(namespace).Create(ctx, set, metav1.CreateOptions{}); err != nil {
		return err
	}
	daemons := &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Name: "daemon"}, Spec: appsv1.DaemonSetSpec{
		Selector: selector("daemon"), Template: template("daemon")}}
	if _, err := s.cloud.AppsV1().DaemonSets(namespace).Create(ctx, daemons, metav1.CreateOptions{}); err != nil {
		return err
	}
	for i := range solos {
		if err := s.createSolo(ctx, i); err != nil {
			return err
		}
	}
	for _, n := range s.nodes {
		if err := s.writeStatic(n); err != nil {
			return err
		}
	}
	return nil
}

func selector(app string) *metav1.LabelSelector {
	return &metav1.LabelSelector{MatchLabels: map[string]string{"app": app}}
}

func template(app string) corev1.PodTemplateSpec {
	return corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": app}}, Spec: serving()}
}

// serving is a pod that needs a ConfigMap, a Secret and its token, and is
// probed.
func serving() corev1.PodSpec {
	grace := int64(3)
	return corev1.PodSpec{
		TerminationGracePeriodSeconds: &grace,
		Volumes: []corev1.Volume{{Name: "settings", VolumeSource: corev1.VolumeSource{
			ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "settings"}}}}},
		Containers: []corev1.Container{{
			Name: "c", Image: image.DemoName, Args: []string{"serve", "--log-every", "2s"},
			VolumeMounts: []corev1.VolumeMount{{Name: "settings", MountPath: "/settings"}},
			Env: []corev1.EnvVar{{Name: "PASSWORD", ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{
				LocalObjectReference: corev1.LocalObjectReference{Name: "credentials"}, Key: "password"}}}},
			ReadinessProbe: &corev1.Probe{PeriodSeconds: 2, ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{
				Path: "/healthz", Port: intOrString(8080)}}},
		}},
	}
}

// churn takes one step after another, until ctx ends. A step that fails, as
// the hub may be away, is counted.
func (s *soak) churn(ctx context.Context, r *rand.Rand) error {
	steps := []struct {
		name   string
		weight int
		do     func(context.Context, *rand.Rand) error
	}{
		{"scale a Deployment", 5, s.scaleDeployment},
		{"roll a Deployment", 1, s.rollDeployment},
		{"delete a pod, create it again", 5, s.renewSolo},
		{"force-delete a pod, create it again", 5, s.forceRenewSolo},
		{"change the ConfigMap", 2, func(ctx context.Context, _ *rand.Rand) error { return s.setConfig(ctx) }},
		{"change the Secret", 1, func(ctx context.Context, _ *rand.Rand) error { return s.setSecret(ctx) }},
		{"create a Job", 6, s.createJob},
		{"delete a finished Job", 4, s.deleteJob},
		{"scale the StatefulSet", 1, s.scaleStateful},
		{"roll the DaemonSet", 1, s.rollDaemons},
		{"change a static pod", 2, s.changeStatic},
		{"crash a container", 2, s.crash},
		{"exec", 3, s.exec},
		{"follow a log", 2, s.followLog},
	}
	total := 0
	for _, st := range steps {
		total += st.weight
	}
	for pause(ctx, between(r, 300*time.Millisecond, 2500*time.Millisecond)) {
		at := r.IntN(total)
		for _, st := range steps {
			if at -= st.weight; at >= 0 {
				continue
			}
			s.gate.RLock()
			limited, cancel := context.WithTimeout(ctx, 20*time.Second)
			err := st.do(limited, r)
			cancel()
			s.gate.RUnlock()
			if ctx.Err() == nil {
				s.t.step(st.name, err)
			}
			break
		}
	}
	return ctx.Err()
}

func (s *soak) scaleDeployment(ctx context.Context, r *rand.Rand) error {
	return s.patchReplicas(ctx, "deployments", fmt.Sprintf("deployment-%d", r.IntN(deployments)), r.IntN(maxReplicas+1))
}

func (s *soak) scaleStateful(ctx context.Context, r *rand.Rand) error {
	return s.patchReplicas(ctx, "statefulsets", "stateful", 1+r.IntN(2))
}

func (s *soak) patchReplicas(ctx context.Context, resource, name string, n int) error {
	return s.cloud.AppsV1().RESTClient().Patch(types.MergePatchType).Namespace(namespace).Resource(resource).Name(name).
		Body(fmt.Appendf(nil, `{"spec":{"replicas":%d}}`, n)).Do(ctx).Error()
}

func (s *soak) rollDeployment(ctx context.Context, r *rand.Rand) error {
	return s.roll(ctx, "deployments", fmt.Sprintf("deployment-%d", r.IntN(deployments)))
}

func (s *soak) rollDaemons(ctx context.Context, _ *rand.Rand) error {
	return s.roll(ctx, "daemonsets", "daemon")
}

func (s *soak) roll(ctx context.Context, resource, name string) error {
	return s.cloud.AppsV1().RESTClient().Patch(types.MergePatchType).Namespace(namespace).Resource(resource).Name(name).
		Body(fmt.Appendf(nil, `{"spec":{"template":{"metadata":{"annotations":{"rolled":%q}}}}}`, time.Now())).Do(ctx).Error()
}

func (s *soak) createSolo(ctx context.Context, i int) error {
	spec := serving()
	spec.NodeName = s.nodes[i%len(s.nodes)].Name()
	if i%3 == 2 { // one that takes its time to end
		spec.Containers[0].Args, spec.Containers[0].ReadinessProbe = []string{"wait-sigterm", "--grace", "2s"}, nil
	}
	_, err := s.cloud.CoreV1().Pods(namespace).Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("solo-%d", i)}, Spec: spec}, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	return err
}

func (s *soak) renewSolo(ctx context.Context, r *rand.Rand) error {
	return s.renew(ctx, r.IntN(solos), metav1.DeleteOptions{})
}

func (s *soak) forceRenewSolo(ctx context.Context, r *rand.Rand) error {
	now := int64(0)
	return s.renew(ctx, r.IntN(solos), metav1.DeleteOptions{GracePeriodSeconds: &now})
}

// renew deletes a pod, and creates one of its name when it is gone already or
// was gone before; atRest creates those that are missing.
func (s *soak) renew(ctx context.Context, i int, how metav1.DeleteOptions) error {
	pods, name := s.cloud.CoreV1().Pods(namespace), fmt.Sprintf("solo-%d", i)
	p, err := pods.Get(ctx, name, metav1.GetOptions{})
	if err == nil {
		s.book.deleted(p.UID) // before it happens, and also when its answer is lost
		how.Preconditions = metav1.NewUIDPreconditions(string(p.UID))
		err = pods.Delete(ctx, name, how)
	}
	if err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	return s.createSolo(ctx, i)
}

func (s *soak) createMissingSolos(ctx context.Context) error {
	for i := range solos {
		if err := s.createSolo(ctx, i); err != nil {
			return err
		}
	}
	return nil
}

func (s *soak) setConfig(ctx context.Context) error {
	cm := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "settings"}, Data: map[string]string{"key": s.book.nextConfig()}}
	maps := s.cloud.CoreV1().ConfigMaps(namespace)
	_, err := maps.Update(ctx, cm, metav1.UpdateOptions{})
	if apierrors.IsNotFound(err) {
		_, err = maps.Create(ctx, cm, metav1.CreateOptions{})
	}
	if err == nil {
		s.book.ackConfig(cm.Data["key"])
	}
	return err
}

func (s *soak) setSecret(ctx context.Context) error {
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "credentials"}, StringData: map[string]string{"password": time.Now().String()}}
	secrets := s.cloud.CoreV1().Secrets(namespace)
	_, err := secrets.Update(ctx, secret, metav1.UpdateOptions{})
	if apierrors.IsNotFound(err) {
		_, err = secrets.Create(ctx, secret, metav1.CreateOptions{})
	}
	return err
}

// createJob makes work of some seconds that must be done once, however often
// it is interrupted.
func (s *soak) createJob(ctx context.Context, r *rand.Rand) error {
	if s.book.jobsOpen() >= maxJobs {
		return nil
	}
	forever := int32(1000)
	name := s.book.nextJob()
	spec := corev1.PodSpec{RestartPolicy: corev1.RestartPolicyOnFailure,
		Containers: []corev1.Container{{Name: "c", Image: image.DemoName, Args: []string{"sleep", fmt.Sprint(1 + r.IntN(12))}}}}
	_, err := s.cloud.BatchV1().Jobs(namespace).Create(ctx, &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: batchv1.JobSpec{BackoffLimit: &forever, Template: corev1.PodTemplateSpec{Spec: spec}}}, metav1.CreateOptions{})
	if err == nil {
		s.book.ackJob(name)
	}
	return err
}

// deleteJob removes one that is done, and notes that it was.
func (s *soak) deleteJob(ctx context.Context, _ *rand.Rand) error {
	list, err := s.cloud.BatchV1().Jobs(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for _, j := range list.Items {
		if j.DeletionTimestamp != nil || !complete(&j) {
			continue
		}
		s.book.jobDone(j.Name)
		background := metav1.DeletePropagationBackground
		return s.cloud.BatchV1().Jobs(namespace).Delete(ctx, j.Name, metav1.DeleteOptions{PropagationPolicy: &background})
	}
	return nil
}

func complete(j *batchv1.Job) bool {
	for _, c := range j.Status.Conditions {
		if c.Type == batchv1.JobComplete && c.Status == corev1.ConditionTrue {
			return j.Status.Succeeded == 1
		}
	}
	return false
}

func (s *soak) staticFile(n *edge) string {
	return n.Disk(filepath.Join(cluster.EdgeDataDir, "manifests", "static.yaml"))
}

// writeStatic puts another version of the node's static pod in place.
func (s *soak) writeStatic(n *edge) error {
	text := fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: static, namespace: %s}
spec:
  terminationGracePeriodSeconds: 3
  containers: [{name: c, image: %s, args: [serve, --message, %q]}]
`, namespace, image.DemoName, s.book.nextStatic(n.Name()))
	path := s.staticFile(n)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	part := filepath.Join(filepath.Dir(path), ".static")
	if err := os.WriteFile(part, []byte(text), 0o600); err != nil {
		return err
	}
	return os.Rename(part, path)
}

func (s *soak) changeStatic(_ context.Context, r *rand.Rand) error {
	n := s.nodes[r.IntN(len(s.nodes))]
	if r.IntN(3) == 0 {
		s.book.noStatic(n.Name())
		if err := os.Remove(s.staticFile(n)); !os.IsNotExist(err) {
			return err
		}
		return nil
	}
	return s.writeStatic(n)
}

// crash kills a container that has not been killed often, behind the kubelet's
// back: its back-off grows with each.
func (s *soak) crash(ctx context.Context, r *rand.Rand) error {
	n := s.nodes[r.IntN(len(s.nodes))]
	all, err := s.containers(ctx, n)
	if err != nil || len(all) == 0 {
		return err
	}
	c := all[r.IntN(len(all))]
	if !c.running || !s.book.mayCrash(c.uid) {
		return nil
	}
	_, err = n.Machine.Run(ctx, "ctr", "-n", "k8s.io", "tasks", "kill", "-s", "SIGKILL", c.id)
	return err
}

// aPod is one that serves.
func (s *soak) aPod(ctx context.Context, r *rand.Rand) (*corev1.Pod, error) {
	list, err := s.cloud.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	for _, i := range r.Perm(len(list.Items)) {
		if p := &list.Items[i]; p.Status.Phase == corev1.PodRunning && p.DeletionTimestamp == nil && !strings.HasPrefix(p.Name, "job-") {
			return p, nil
		}
	}
	return nil, nil
}

func (s *soak) exec(ctx context.Context, r *rand.Rand) error {
	p, err := s.aPod(ctx, r)
	if err != nil || p == nil {
		return err
	}
	return s.execIn(ctx, p)
}

func (s *soak) execIn(ctx context.Context, p *corev1.Pod) error {
	req := s.cloud.CoreV1().RESTClient().Post().Resource("pods").Namespace(namespace).Name(p.Name).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{Command: []string{"/bin/echo", string(p.UID)}, Stdout: true}, scheme.ParameterCodec)
	e, err := remotecommand.NewWebSocketExecutor(s.rest, "GET", req.URL().String())
	if err != nil {
		return err
	}
	var out bytes.Buffer
	if err := e.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: &out}); err != nil {
		return err
	}
	if out.String() != string(p.UID)+"\n" {
		return fmt.Errorf("exec in %s: %q", p.Name, out.String())
	}
	return nil
}

// followLog reads a log for some seconds.
func (s *soak) followLog(ctx context.Context, r *rand.Rand) error {
	p, err := s.aPod(ctx, r)
	if err != nil || p == nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, between(r, time.Second, 5*time.Second))
	defer cancel()
	in, err := s.cloud.CoreV1().Pods(namespace).GetLogs(p.Name, &corev1.PodLogOptions{Follow: true}).Stream(ctx)
	if err != nil {
		return err
	}
	defer in.Close()
	if _, err := io.Copy(io.Discard, in); err != nil && ctx.Err() == nil {
		return err
	}
	return nil
}
