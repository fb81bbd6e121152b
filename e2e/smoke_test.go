package e2e

import (
	"strings"
	"testing"
)

const web = `
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  nodeName: edge-1
  terminationGracePeriodSeconds: 2
  containers:
  - name: web
    image: localhost/skerry/demo:1
    ports: [{containerPort: 8080}]
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
`

func TestAPodRunsAndKubectlReachesIt(t *testing.T) {
	ns := apply(t, web)
	p := ready(t, ns, "web")
	if p.Status.PodIP == "" || p.Spec.NodeName != "edge-1" {
		t.Errorf("pod: %+v", p.Status)
	}
	if out := kubectl(t, "logs", "-n", ns, "web"); !strings.Contains(out, "listen") {
		t.Errorf("logs: %q", out)
	}
	if out := kubectl(t, "exec", "-n", ns, "web", "--", "/bin/echo", "hello"); out != "hello\n" {
		t.Errorf("exec: %q", out)
	}
}
