package e2e

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

func TestResourceLimits(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	startPod(t, ns, "greedy", `
nodeName: edge-1
restartPolicy: Never
containers: [{name: c, args: [allocate, --mib, "256"], resources: {limits: {memory: 48Mi}}}]`)
	startPod(t, ns, "modest", `
nodeName: edge-1
restartPolicy: Never
containers: [{name: c, args: [allocate, --mib, "16"], resources: {requests: {cpu: 100m}, limits: {memory: 64Mi, cpu: 250m}}}]`)
	startPod(t, ns, "guaranteed", `
nodeName: edge-2
containers: [{name: c, resources: {limits: {memory: 64Mi, cpu: 250m}}}]`)

	p := ended(t, ns, "greedy", corev1.PodFailed)
	if s := container(t, p, "c").State.Terminated; s.Reason != "OOMKilled" || s.ExitCode != 137 {
		t.Errorf("greedy: %+v", s)
	}
	ready(t, ns, "modest")
	eventually(t, time.Minute, "the modest one to hold its memory", outputHas(t, ns, "modest", "holding 16 MiB"))

	// What the container sees is its own cgroup, of either hierarchy.
	cgroup := func(pod, v1, v2 string) string {
		t.Helper()
		for _, file := range []string{v1, v2} {
			if out, err := tryExec(t.Context(), ns, pod, "", "/bin/cat", "/sys/fs/cgroup/"+file); err == nil {
				return strings.TrimSpace(out)
			}
		}
		t.Fatalf("%s has neither %s nor %s", pod, v1, v2)
		return ""
	}
	if got := cgroup("modest", "cpu/cpu.cfs_quota_us", "cpu.max"); got != "25000" && got != "25000 100000" {
		t.Errorf("cpu limit of 250m: %q", got)
	}
	if got := cgroup("modest", "memory/memory.limit_in_bytes", "memory.max"); got != fmt.Sprint(64<<20) {
		t.Errorf("memory limit of 64Mi: %q", got)
	}
	// 100m are 102 shares; cgroup v2 has weights of another scale.
	if got := cgroup("modest", "cpu/cpu.shares", "cpu.weight"); got != "102" && got != "4" && got != "17" {
		t.Errorf("cpu request of 100m: %q", got)
	}
	if p := ready(t, ns, "guaranteed"); p.Status.QOSClass != corev1.PodQOSGuaranteed {
		t.Errorf("guaranteed: QoS class %s", p.Status.QOSClass)
	}
}

func TestSecurityContexts(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	kubectl(t, "create", "secret", "generic", "-n", ns, "private", "--from-literal=key=value")
	startPod(t, ns, "user", `
nodeName: edge-1
restartPolicy: Never
securityContext: {runAsUser: 1000, runAsGroup: 1001, fsGroup: 2000, supplementalGroups: [3000], runAsNonRoot: true}
volumes:
- {name: data, emptyDir: {}}
- {name: secret, secret: {secretName: private, defaultMode: 0400}}
initContainers:
- {name: id, args: [id]}
- {name: write, args: [write, /data/file], volumeMounts: [{name: data, mountPath: /data}, {name: secret, mountPath: /secret}]}
containers:
- {name: stat, args: [stat, /data, /data/file, /secret/key], volumeMounts: [{name: data, mountPath: /data}, {name: secret, mountPath: /secret}]}`)
	startPod(t, ns, "notroot", `
nodeName: edge-1
securityContext: {runAsNonRoot: true}
containers: [{name: c}]`)
	startPod(t, ns, "readonly", `
nodeName: edge-2
restartPolicy: Never
volumes: [{name: data, emptyDir: {}}]
initContainers: [{name: data, args: [write, /data/file], securityContext: {readOnlyRootFilesystem: true}, volumeMounts: [{name: data, mountPath: /data}]}]
containers: [{name: root, args: [write, /tmp/file], securityContext: {readOnlyRootFilesystem: true}}]`)
	startPod(t, ns, "capable", `
nodeName: edge-2
restartPolicy: Never
containers:
- {name: default, args: [id]}
- {name: few, args: [id], securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL], add: [NET_BIND_SERVICE]}, seccompProfile: {type: RuntimeDefault}}}
- {name: fewer, args: [id], securityContext: {capabilities: {drop: [CHOWN]}}}`)

	ended(t, ns, "user", corev1.PodSucceeded)
	if out := podLog(t, ns, "user", "id"); !strings.Contains(out, "uid=1000 gid=1001 ") || !strings.Contains(out, "2000") || !strings.Contains(out, "3000") {
		t.Errorf("id: %q", out)
	}
	out := podLog(t, ns, "user", "stat")
	for _, want := range []string{`d\S*g\S* 0:2000 \d+ /data\n`, `1000:2000 0 /data/file\n`, `-r--r----- 0:2000 5 /secret/key\n`} {
		if !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("no %s in\n%s", want, out)
		}
	}

	awaitPod(t, ns, "notroot", time.Minute, "to be refused", func(p *corev1.Pod) bool {
		w := container(t, p, "c").State.Waiting
		return w != nil && w.Reason == "CreateContainerConfigError" && strings.Contains(w.Message, "runAsNonRoot")
	})

	p := ended(t, ns, "readonly", corev1.PodFailed)
	if s := container(t, p, "data").State.Terminated; s == nil || s.ExitCode != 0 {
		t.Errorf("writing to a volume: %+v", s)
	}
	if out := podLog(t, ns, "readonly", "root"); !strings.Contains(out, "read-only file system") {
		t.Errorf("writing to the root file system: %q", out)
	}

	ended(t, ns, "capable", corev1.PodSucceeded)
	caps := func(c string) string {
		t.Helper()
		m := regexp.MustCompile(`CapEff:\s*([0-9a-f]+)`).FindStringSubmatch(podLog(t, ns, "capable", c))
		if m == nil {
			t.Fatalf("no capabilities in the log of %s", c)
		}
		return m[1]
	}
	if got := caps("few"); got != "0000000000000400" { // CAP_NET_BIND_SERVICE is bit 10
		t.Errorf("few: %s", got)
	}
	if caps("default")[15] != 'b' || caps("fewer")[15] != 'a' { // CAP_CHOWN is bit 0
		t.Errorf("default %s, without CHOWN %s", caps("default"), caps("fewer"))
	}
	if out := podLog(t, ns, "capable", "few"); !regexp.MustCompile(`NoNewPrivs:\s*1`).MatchString(out) || !regexp.MustCompile(`Seccomp:\s*2`).MatchString(out) {
		t.Errorf("few: %s", out)
	}
}
