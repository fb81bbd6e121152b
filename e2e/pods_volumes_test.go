package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// What every pod of the tests below refers to.
const settings = `
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {colour: green, size: large}
---
apiVersion: v1
kind: Secret
metadata: {name: credentials}
stringData: {user: ada, password: engine}
---
apiVersion: v1
kind: Service
metadata: {name: backend}
spec: {selector: {app: backend}, ports: [{name: http, port: 81, targetPort: 8080}]}
`

func TestEnvironment(t *testing.T) {
	t.Parallel()
	ns := apply(t, settings)
	svc, err := world.client.CoreV1().Services(ns).Get(t.Context(), "backend", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	startPod(t, ns, "env", `
nodeName: edge-2
serviceAccountName: default
containers:
- name: c
  resources: {requests: {memory: 16Mi}, limits: {cpu: 500m, memory: 64Mi}}
  envFrom: [{prefix: S_, secretRef: {name: credentials}}, {configMapRef: {name: settings}}]
  env:
  - {name: PLAIN, value: "x $(COLOUR) $$(COLOUR)"}
  - {name: COLOUR, valueFrom: {configMapKeyRef: {name: settings, key: colour}}}
  - {name: DEPENDENT, value: "is $(COLOUR)"}
  - {name: PASSWORD, valueFrom: {secretKeyRef: {name: credentials, key: password}}}
  - {name: OPTIONAL, valueFrom: {secretKeyRef: {name: none, key: none, optional: true}}}
  - {name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
  - {name: POD_UID, valueFrom: {fieldRef: {fieldPath: metadata.uid}}}
  - {name: LABEL, valueFrom: {fieldRef: {fieldPath: "metadata.labels['name']"}}}
  - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
  - {name: HOST_IP, valueFrom: {fieldRef: {fieldPath: status.hostIP}}}
  - {name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
  - {name: ACCOUNT, valueFrom: {fieldRef: {fieldPath: spec.serviceAccountName}}}
  - {name: CPU, valueFrom: {resourceFieldRef: {resource: limits.cpu, divisor: 1m}}}
  - {name: MEMORY, valueFrom: {resourceFieldRef: {resource: requests.memory, divisor: 1Mi}}}`)
	startPod(t, ns, "lacking", `
nodeName: edge-2
containers: [{name: c, env: [{name: X, valueFrom: {configMapKeyRef: {name: later, key: x}}}]}]`)
	p := ready(t, ns, "env")
	env := map[string]string{}
	for line := range strings.Lines(execIn(t, ns, "env", "", "/bin/env")) {
		k, v, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		env[k] = v
	}
	for k, want := range map[string]string{
		"PLAIN": "x $(COLOUR) $(COLOUR)", "COLOUR": "green", "DEPENDENT": "is green", "PASSWORD": "engine",
		"S_user": "ada", "size": "large", "POD": "env", "POD_UID": string(p.UID), "LABEL": "env",
		"POD_IP": p.Status.PodIP, "HOST_IP": p.Status.HostIP, "NODE": "edge-2", "ACCOUNT": "default", "CPU": "500", "MEMORY": "16",
		"BACKEND_SERVICE_HOST": svc.Spec.ClusterIP, "BACKEND_SERVICE_PORT": "81", "BACKEND_SERVICE_PORT_HTTP": "81",
		"BACKEND_PORT_81_TCP": "tcp://" + svc.Spec.ClusterIP + ":81", "KUBERNETES_SERVICE_PORT": "443",
	} {
		if env[k] != want {
			t.Errorf("%s=%q, want %q", k, env[k], want)
		}
	}
	if v, ok := env["OPTIONAL"]; ok {
		t.Errorf("OPTIONAL=%q", v)
	}

	// A pod whose ConfigMap comes later starts then.
	awaitPod(t, ns, "lacking", time.Minute, "to miss its ConfigMap", func(p *corev1.Pod) bool {
		w := container(t, p, "c").State.Waiting
		return w != nil && w.Reason == "CreateContainerConfigError" && strings.Contains(w.Message, `"later" not found`)
	})
	kubectl(t, "create", "configmap", "-n", ns, "later", "--from-literal=x=there")
	ready(t, ns, "lacking")
	if out := execIn(t, ns, "lacking", "", "/bin/env"); !strings.Contains(out, "X=there\n") {
		t.Errorf("env: %s", out)
	}
}

func TestVolumes(t *testing.T) {
	t.Parallel()
	ns := apply(t, settings)
	n := node(t, "edge-1")
	dir := hostDir(t, n, ns)
	dir.write(t, "from-host", "hello from the host")
	startPod(t, ns, "volumes", fmt.Sprintf(`
nodeName: edge-1
volumes:
- {name: config, configMap: {name: settings, items: [{key: colour, path: deep/colour, mode: 0440}]}}
- {name: secret, secret: {secretName: credentials, defaultMode: 0400}}
- {name: down, downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}, {path: memory, resourceFieldRef: {containerName: c, resource: limits.memory}}]}}
- {name: scratch, emptyDir: {}}
- {name: ram, emptyDir: {medium: Memory, sizeLimit: 8Mi}}
- {name: host, hostPath: {path: %s, type: Directory}}
- name: all
  projected:
    sources:
    - {configMap: {name: settings}}
    - {secret: {name: credentials}}
    - {downwardAPI: {items: [{path: name, fieldRef: {fieldPath: metadata.name}}]}}
    - {serviceAccountToken: {path: token, audience: skerry-test, expirationSeconds: 3600}}
containers:
- name: c
  resources: {limits: {memory: 64Mi}}
  volumeMounts:
  - {name: config, mountPath: /v/config}
  - {name: config, mountPath: /v/alone, subPath: deep/colour}
  - {name: secret, mountPath: /v/secret}
  - {name: down, mountPath: /v/down}
  - {name: scratch, mountPath: /v/scratch}
  - {name: ram, mountPath: /v/ram}
  - {name: host, mountPath: /v/host}
  - {name: host, mountPath: /v/host-ro, readOnly: true}
  - {name: all, mountPath: /v/all}
- {name: second, args: [serve, --listen, ":8081"], volumeMounts: [{name: scratch, mountPath: /v/scratch}]}`, dir.inside))
	startPod(t, ns, "nowhere", `
nodeName: edge-1
volumes: [{name: host, hostPath: {path: /var/lib/not-there, type: Directory}}]
containers: [{name: c, volumeMounts: [{name: host, mountPath: /v}]}]`)
	ready(t, ns, "volumes")
	for file, want := range map[string]string{
		"config/deep/colour": "green", "alone": "green", "secret/user": "ada", "secret/password": "engine",
		"down/labels": `name="volumes"`, "down/memory": fmt.Sprint(64 << 20), "host/from-host": "hello from the host",
		"all/size": "large", "all/password": "engine", "all/name": "volumes",
	} {
		if got := execIn(t, ns, "volumes", "c", "/bin/cat", "/v/"+file); got != want {
			t.Errorf("%s: %q, want %q", file, got, want)
		}
	}
	if out := execIn(t, ns, "volumes", "c", "/bin/demo", "stat", "/v/config/deep/colour", "/v/secret/user"); !strings.Contains(out, "-r--r----- 0:0 5 /v/config") || !strings.Contains(out, "-r-------- 0:0 3 /v/secret") {
		t.Errorf("modes: %s", out)
	}
	tmpfs := 0
	for line := range strings.Lines(execIn(t, ns, "volumes", "c", "/bin/cat", "/proc/mounts")) {
		f := strings.Fields(line)
		switch {
		case f[1] == "/v/ram" && f[2] == "tmpfs" && strings.Contains(f[3], "size=8192k"), f[1] == "/v/secret" && f[2] == "tmpfs":
			tmpfs++
		case f[1] == "/v/scratch" && f[2] == "tmpfs":
			t.Errorf("an emptyDir on disk: %s", line)
		}
	}
	if tmpfs != 2 {
		t.Error("the Memory emptyDir and the Secret are not in memory")
	}
	execIn(t, ns, "volumes", "c", "/bin/demo", "write", "/v/scratch/seen")
	if out := execIn(t, ns, "volumes", "second", "/bin/ls", "/v/scratch"); out != "seen\n" {
		t.Errorf("the second container sees %q", out)
	}
	execIn(t, ns, "volumes", "c", "/bin/demo", "write", "/v/host/from-pod")
	if !dir.has("from-pod") {
		t.Error("what the pod wrote is not on the host")
	}
	if _, err := tryExec(t.Context(), ns, "volumes", "c", "/bin/demo", "write", "/v/host-ro/x"); err == nil || !strings.Contains(err.Error(), "read-only") {
		t.Errorf("writing to a read-only mount: %v", err)
	}
	awaitEvent(t, ns, "nowhere", "FailedMount", "hostPath type check failed")
}

func TestServiceAccountTokens(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	startPod(t, ns, "tokens", `
nodeName: edge-1
volumes: [{name: own, projected: {sources: [{serviceAccountToken: {path: token, audience: skerry-test, expirationSeconds: 3600}}]}}]
containers: [{name: c, volumeMounts: [{name: own, mountPath: /own}]}]`)
	p := ready(t, ns, "tokens")
	const account = "/var/run/secrets/kubernetes.io/serviceaccount/"
	review := func(token string, audiences ...string) authenticationv1.TokenReviewStatus {
		t.Helper()
		r, err := world.client.AuthenticationV1().TokenReviews().Create(t.Context(), &authenticationv1.TokenReview{
			Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: audiences}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return r.Status
	}
	token := execIn(t, ns, "tokens", "", "/bin/cat", account+"token")
	s := review(token)
	if !s.Authenticated || s.User.Username != "system:serviceaccount:"+ns+":default" {
		t.Errorf("review of the pod's token: %+v", s)
	}
	if got := s.User.Extra["authentication.kubernetes.io/pod-uid"]; len(got) != 1 || got[0] != string(p.UID) {
		t.Errorf("the token is not the pod's: %v", s.User.Extra)
	}
	if got := s.User.Extra["authentication.kubernetes.io/node-name"]; len(got) != 1 || got[0] != "edge-1" {
		t.Errorf("the token is not the node's: %v", s.User.Extra)
	}
	own := execIn(t, ns, "tokens", "", "/bin/cat", "/own/token")
	if s := review(own, "skerry-test"); !s.Authenticated {
		t.Errorf("review of a token for another audience: %+v", s)
	}
	if s := review(own); s.Authenticated {
		t.Error("a token for another audience is good for the API server")
	}

	// It is good for what it is for: asking the API server, whose CA is there too.
	rc, err := world.hub.RESTConfig()
	if err != nil {
		t.Fatal(err)
	}
	ca := execIn(t, ns, "tokens", "", "/bin/cat", account+"ca.crt")
	rc.TLSClientConfig.CertData, rc.TLSClientConfig.CertFile, rc.TLSClientConfig.KeyData, rc.TLSClientConfig.KeyFile = nil, "", nil, ""
	rc.TLSClientConfig.CAData, rc.TLSClientConfig.CAFile, rc.BearerToken = []byte(ca), "", token
	client, err := kubernetes.NewForConfig(rc)
	if err != nil {
		t.Fatal(err)
	}
	me, err := client.AuthenticationV1().SelfSubjectReviews().Create(t.Context(), &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
	if err != nil || me.Status.UserInfo.Username != "system:serviceaccount:"+ns+":default" {
		t.Errorf("the API server on the token: %v %v", me, err)
	}
	deletePod(t, ns, "tokens", nil)
	awaitGone(t, ns, p)
	eventually(t, time.Minute, "the token to end with its pod", func(context.Context) (bool, string) {
		s := review(token)
		return !s.Authenticated, fmt.Sprintf("%+v", s)
	})
}

func TestUpdatesReachMountedFiles(t *testing.T) {
	t.Parallel()
	ns := apply(t, settings)
	startPod(t, ns, "watching", `
nodeName: edge-2
volumes:
- {name: config, configMap: {name: settings}}
- {name: secret, secret: {secretName: credentials}}
- {name: down, downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}]}}
containers: [{name: c, volumeMounts: [{name: config, mountPath: /config}, {name: secret, mountPath: /secret}, {name: down, mountPath: /down}]}]`)
	before := ready(t, ns, "watching")
	patch := func(resource, name, patch string) {
		t.Helper()
		kubectl(t, "patch", "-n", ns, resource, name, "--type=merge", "-p", patch)
	}
	patch("configmap", "settings", `{"data":{"colour":"blue","new":"key"}}`)
	patch("secret", "credentials", `{"stringData":{"password":"difference"}}`)
	patch("pod", "watching", `{"metadata":{"labels":{"tier":"edge"}}}`)
	// The kubelet looks at each pod's volumes about once a minute.
	for file, want := range map[string]string{
		"/config/colour": "blue", "/config/new": "key", "/secret/password": "difference", "/down/labels": "name=\"watching\"\ntier=\"edge\"",
	} {
		eventually(t, 3*time.Minute, file+" to change", func(ctx context.Context) (bool, string) {
			out, err := tryExec(ctx, ns, "watching", "", "/bin/cat", file)
			return out == want, fmt.Sprintf("%q %v", out, err)
		})
	}
	after := ready(t, ns, "watching")
	if a, b := container(t, before, "c"), container(t, after, "c"); a.ContainerID != b.ContainerID {
		t.Error("the container was restarted")
	}
}

func TestLocalPersistentVolume(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	n := node(t, "edge-2")
	dir := hostDir(t, n, ns)
	applyIn(t, ns, fmt.Sprintf(`
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: %[1]s}
provisioner: kubernetes.io/no-provisioner
volumeBindingMode: WaitForFirstConsumer
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: %[1]s}
spec:
  capacity: {storage: 1Gi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  storageClassName: %[1]s
  local: {path: %[2]s}
  nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [edge-2]}]}]}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: data}
spec: {storageClassName: %[1]s, accessModes: [ReadWriteOnce], resources: {requests: {storage: 500Mi}}}`, ns, dir.inside))
	t.Cleanup(func() {
		ctx := context.Background()
		if err := world.client.CoreV1().PersistentVolumes().Delete(ctx, ns, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
		if err := world.client.StorageV1().StorageClasses().Delete(ctx, ns, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	const spec = `
restartPolicy: %s
volumes: [{name: data, persistentVolumeClaim: {claimName: data}}]
containers: [{name: c, args: [%s], volumeMounts: [{name: data, mountPath: /data}]}]`
	// The scheduler finds the node by the volume's.
	startPod(t, ns, "writer", fmt.Sprintf(spec, "Never", "write, /data/kept"))
	p := ended(t, ns, "writer", corev1.PodSucceeded)
	if p.Spec.NodeName != "edge-2" || !dir.has("kept") {
		t.Errorf("written on %s; on the host: %v", p.Spec.NodeName, dir.has("kept"))
	}
	deletePod(t, ns, "writer", nil)
	awaitGone(t, ns, p)
	startPod(t, ns, "reader", fmt.Sprintf(spec, "Never", "ls, /data"))
	ended(t, ns, "reader", corev1.PodSucceeded)
	if out := podLog(t, ns, "reader", ""); out != "kept\n" {
		t.Errorf("the next pod sees %q", out)
	}
	pvc, err := world.client.CoreV1().PersistentVolumeClaims(ns).Get(t.Context(), "data", metav1.GetOptions{})
	if err != nil || pvc.Status.Phase != corev1.ClaimBound || pvc.Spec.VolumeName != ns {
		t.Errorf("claim: %+v %v", pvc.Status, err)
	}
}
