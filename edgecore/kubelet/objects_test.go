package kubelet_test

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/google/uuid"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	corev1defaults "k8s.io/kubernetes/pkg/apis/core/v1"
	"k8s.io/utils/ptr"

	"github.com/skerry-io/skerry/e2e/image"
	"github.com/skerry-io/skerry/edgecore/store"
)

// webPod uses what most pods use: an init container, a ConfigMap as a volume, a
// Secret in the environment, an emptyDir, a token, and all three probes.
func webPod(name string) *corev1.Pod {
	pod := newPod(name)
	pod.Spec.InitContainers = []corev1.Container{{
		Name: "init", Image: image.DemoName, Command: []string{"/bin/demo", "write", "/work/made"},
		VolumeMounts: []corev1.VolumeMount{{Name: "work", MountPath: "/work"}},
	}}
	pod.Spec.Containers = []corev1.Container{{
		Name: "main", Image: image.DemoName, Command: []string{"/bin/demo", "serve", "--log-every", "1s"},
		Env: []corev1.EnvVar{
			{Name: "PASSWORD", ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: "password"}, Key: "value"}}},
			{Name: "NODE_IP", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "status.hostIP"}}},
		},
		VolumeMounts: []corev1.VolumeMount{
			{Name: "work", MountPath: "/work"}, {Name: "conf", MountPath: "/conf"}, {Name: "token", MountPath: "/token"},
		},
		StartupProbe:   &corev1.Probe{PeriodSeconds: 1, FailureThreshold: 30, ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(8080)}}},
		LivenessProbe:  &corev1.Probe{PeriodSeconds: 5, ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/healthz", Port: intstr.FromInt32(8080)}}},
		ReadinessProbe: &corev1.Probe{PeriodSeconds: 1, ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"/bin/demo", "get", "http://127.0.0.1:8080/readyz"}}}},
	}}
	pod.Spec.Volumes = []corev1.Volume{
		{Name: "work", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
		{Name: "conf", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "greeting"}}}},
		{Name: "token", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
			{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Path: "token"}},
		}}}},
	}
	return finished(pod)
}

func smallPod(name string) *corev1.Pod {
	pod := newPod(name)
	pod.Spec.Containers = []corev1.Container{{
		Name: "main", Image: image.DemoName, Command: []string{"/bin/demo", "serve", "--log-every", "0"},
		ReadinessProbe: &corev1.Probe{PeriodSeconds: 10, ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/healthz", Port: intstr.FromInt32(8080)}}},
	}}
	return finished(pod)
}

func newPod(name string) *corev1.Pod {
	return &corev1.Pod{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default", UID: types.UID(uuid.NewString()), CreationTimestamp: metav1.Now().Rfc3339Copy()},
		Spec: corev1.PodSpec{
			NodeName: nodeName, ServiceAccountName: "default", EnableServiceLinks: ptr.To(false),
			TerminationGracePeriodSeconds: ptr.To[int64](1),
		},
	}
}

// finished defaults the pod as an API server would have; the kubelet does not.
func finished(pod *corev1.Pod) *corev1.Pod {
	corev1defaults.SetObjectDefaults_Pod(pod)
	return pod
}

func greeting() *corev1.ConfigMap {
	return &corev1.ConfigMap{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "ConfigMap"},
		ObjectMeta: metav1.ObjectMeta{Name: "greeting", Namespace: "default", UID: types.UID(uuid.NewString())},
		Data:       map[string]string{"greeting": "hello from the cloud"},
	}
}

func password() *corev1.Secret {
	return &corev1.Secret{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"},
		ObjectMeta: metav1.ObjectMeta{Name: "password", Namespace: "default", UID: types.UID(uuid.NewString())},
		Data:       map[string][]byte{"value": []byte("open sesame")},
	}
}

// objects are upserts as the feed delivers them.
func objects(t *testing.T, all ...metav1.Object) []store.Upsert {
	t.Helper()
	var upserts []store.Upsert
	for _, o := range all {
		body, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		resource := map[string]string{"*v1.Pod": "pods", "*v1.ConfigMap": "configmaps", "*v1.Secret": "secrets"}[fmt.Sprintf("%T", o)]
		upserts = append(upserts, store.Upsert{
			Key: store.Key{Resource: resource, Namespace: o.GetNamespace(), Name: o.GetName()},
			UID: string(o.GetUID()), Rev: uuid.NewString(), Body: body,
		})
	}
	return upserts
}

// deleted is the pod as the API server shows it after a delete.
func deleted(t *testing.T, pod *corev1.Pod) []store.Upsert {
	t.Helper()
	pod = pod.DeepCopy()
	pod.DeletionTimestamp = ptr.To(metav1.NewTime(time.Now().Add(time.Second)).Rfc3339Copy())
	pod.DeletionGracePeriodSeconds = ptr.To[int64](1)
	return objects(t, pod)
}
