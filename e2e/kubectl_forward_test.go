package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const webDeployment = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 1
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      nodeSelector: {kubernetes.io/hostname: edge-2}
      terminationGracePeriodSeconds: 1
      containers:
      - name: web
        image: localhost/skerry/demo:1
        args: [serve, --listen, ":8080", --message, hello from behind]
        ports: [{name: http, containerPort: 8080}]
        readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{port: 80, targetPort: http}]
`

var forwarding = regexp.MustCompile(`Forwarding from (127\.0\.0\.1:\d+) -> (\d+)`)

func TestPortForward(t *testing.T) {
	t.Parallel()
	ns := apply(t, webDeployment)
	var pod string
	eventually(t, time.Minute, "the deployment's pod to be Ready", func(ctx context.Context) (bool, string) {
		pods, err := world.client.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{LabelSelector: "app=web"})
		if err != nil {
			return false, err.Error()
		}
		if len(pods.Items) != 1 || !isReady(&pods.Items[0]) {
			return false, describe(pods.Items)
		}
		pod = pods.Items[0].Name
		return true, ""
	})
	// forward begins one and returns the local address.
	forward := func(t *testing.T, env []string, what, ports string) (*running, string) {
		t.Helper()
		r := kubectlStart(t, env, nil, "port-forward", "-n", ns, "--address=127.0.0.1", what, ports)
		var m []string
		r.saw(t, 20*time.Second, "address", func(out string) bool {
			m = forwarding.FindStringSubmatch(out)
			return m != nil
		})
		if m[2] != "8080" {
			t.Errorf("%s %s leads to port %s", what, ports, m[2])
		}
		return r, m[1]
	}
	for name, env := range protocols {
		t.Run(name, func(t *testing.T) {
			for what, ports := range map[string]string{"pod/" + pod: ":8080", "service/web": ":80", "deployment/web": ":8080"} {
				t.Run(strings.Split(what, "/")[0], func(t *testing.T) {
					r, addr := forward(t, env, what, ports)
					body, err := fetch(t, "http://"+addr+"/")
					if err != nil || !strings.HasPrefix(body, "hello from behind\nhost "+pod) {
						t.Errorf("%q, %v", body, err)
					}
					r.interrupt(t)
					r.wait(t, 5*time.Second)
				})
			}
			t.Run("many connections", func(t *testing.T) {
				_, addr := forward(t, env, "pod/"+pod, ":8080")
				// A quiet connection stays while others come and go.
				quiet, err := net.Dial("tcp", addr)
				if err != nil {
					t.Fatal(err)
				}
				defer quiet.Close()
				// The program itself is a file with bytes of every kind.
				want, err := fetch(t, "http://"+addr+"/files?path=/bin/demo")
				if err != nil || len(want) < 1<<20 {
					t.Fatalf("%d bytes, %v", len(want), err)
				}
				var wg sync.WaitGroup
				for i := range 12 {
					wg.Go(func() {
						got, err := fetch(t, "http://"+addr+"/files?path=/bin/demo")
						if err != nil || got != want {
							t.Errorf("connection %d: %d bytes of %d: %v", i, len(got), len(want), err)
						}
					})
				}
				wg.Wait()
				quiet.SetDeadline(time.Now().Add(10 * time.Second))
				fmt.Fprint(quiet, "GET /healthz HTTP/1.0\r\n\r\n")
				b, err := io.ReadAll(quiet)
				if err != nil || !strings.HasSuffix(string(b), "\r\n\r\nok\n") {
					t.Errorf("the quiet one: %q, %v", b, err)
				}
			})
			t.Run("nothing there", func(t *testing.T) {
				r := kubectlStart(t, env, nil, "port-forward", "-n", ns, "--address=127.0.0.1", "pod/"+pod, ":9")
				var addr string
				r.saw(t, 20*time.Second, "address", func(out string) bool {
					m := forwarding.FindStringSubmatch(out)
					if m != nil {
						addr = m[1]
					}
					return m != nil
				})
				if body, err := fetch(t, "http://"+addr+"/"); err == nil {
					t.Errorf("an answer from a closed port: %q", body)
				}
				eventually(t, 10*time.Second, "the reason in kubectl's output", func(context.Context) (bool, string) {
					out := r.stderr.tail()
					return strings.Contains(out, "connection refused"), out
				})
			})
		})
	}
	if n := restarts(t, ns, pod); n != 0 {
		t.Errorf("the pod restarted %d times", n)
	}
}

func restarts(t *testing.T, ns, pod string) int32 {
	t.Helper()
	p, err := world.client.CoreV1().Pods(ns).Get(t.Context(), pod, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var n int32
	for _, s := range p.Status.ContainerStatuses {
		n += s.RestartCount
	}
	return n
}

// fetch gets a URL over a connection of its own.
func fetch(t *testing.T, url string) (string, error) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	req.Close = true
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %s", res.Status)
	}
	return string(b), err
}
