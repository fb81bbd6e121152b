package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/e2e/cluster"
	"github.com/skerry-io/skerry/e2e/image"
	"github.com/skerry-io/skerry/e2e/machine"
)

const exampleDevices = "../deploy/examples/devices/"

// TestDevices has the examples' plug and thermostat, as simulated devices at the
// node's own broker, through what a user does with them: with the cloud, without
// it, over a restart without it, and after its return.
func TestDevices(t *testing.T) {
	n := world.nodes[0]
	tar, err := image.InCluster(t.Context(), filepath.Join(world.dir, "images"))
	if err != nil {
		t.Fatal(err)
	}
	if err := n.ImportImage(t.Context(), tar); err != nil {
		t.Fatal(err)
	}
	reconfigure(t, n, map[string]any{"localAPI": map[string]any{"pods": true}})
	connected(t, n)
	ns := apply(t, `
apiVersion: v1
kind: ServiceAccount
metadata: {name: operator}`,
		onEdge1("in", "  serviceAccountName: operator\n  containers: [{name: c, image: "+image.InClusterName+"}]"))
	applyDefault(t, `
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: devices-e2e}
rules:
- {apiGroups: [devices.skerry.dev], resources: [devices/twin], verbs: [get, list, watch]}
- {apiGroups: [devices.skerry.dev], resources: [devices/desired], verbs: [patch]}
- {apiGroups: [devices.skerry.dev], resources: [devices/commands], verbs: [create]}`, `
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: devices-e2e}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: devices-e2e}
subjects: [{kind: ServiceAccount, name: operator, namespace: `+ns+`}]`)
	for _, file := range []string{"tasmota-plug.yaml", "zigbee2mqtt-thermostat.yaml"} {
		text, err := os.ReadFile(exampleDevices + file)
		if err != nil {
			t.Fatal(err)
		}
		applyDefault(t, string(text))
	}
	applyDefault(t, plugDevice("plug-8"))
	ready(t, ns, "in")

	// The devices come once their node's broker is there, as devices do.
	stopDevices := simulateDevices(t, n, "thermostat:trv-kitchen", "plug:plug-1", "plug:plug-8")
	d := awaitTwin(t, n, "plug-1", "to be on as desired", func(d devicetwin.Doc) bool { return saysNow(d, "relay", "true") })
	if p := d.Properties["relay"]; d.Phase != v1alpha1.PhaseOnline || p.State != v1alpha1.DesiredApplied || p.By != devicetwin.ByCloud {
		t.Errorf("plug: %s, %+v", d.Phase, p)
	}
	awaitTwin(t, n, "trv-kitchen", "to be set as desired", func(d devicetwin.Doc) bool { return saysNow(d, "setpoint", "20.5") })
	eventually(t, 30*time.Second, "kubectl to show the devices", func(context.Context) (bool, string) {
		out := kubectl(t, "get", "devices", "-n", "default")
		return strings.Count(out, v1alpha1.PhaseOnline) == 3 && strings.Contains(out, "relay=true"), out
	})
	if out := twin(t, n, "list"); !strings.Contains(out, "plug-1") || !strings.Contains(out, "relay=true") {
		t.Errorf("edgecore twin list:\n%s", out)
	}
	if out, err := n.Edgecore(t.Context(), "status"); err != nil || !strings.Contains(out.Stdout, "devices   3: 3 online") {
		t.Errorf("edgecore status: %v\n%s", err, out.Stdout)
	}

	// A desired change of the cloud's.
	began := time.Now()
	desire(t, "plug-1", `{"relay":false}`)
	awaitTwin(t, n, "plug-1", "to be switched off by the cloud", func(d devicetwin.Doc) bool { return saysNow(d, "relay", "false") })
	t.Logf("kubectl patch to the device's answer in %v, kubectl's start included", time.Since(began).Round(time.Millisecond))

	// The same from a pod, with no cloud, by HTTP and by MQTT.
	restore := cut(t, n, machine.LinkDown)
	eventually(t, time.Minute, "the node to know that it is alone", func(ctx context.Context) (bool, string) {
		st, err := n.Status(ctx)
		return err == nil && !st.Connected, fmt.Sprint(st, err)
	})
	res := inPod(t.Context(), t, n, ns, "in", "request", "PATCH", "/v1/twins/default/plug-1", `{"desired":{"relay":true},"ttl":"10m"}`)
	if res.Code != 0 || !strings.Contains(res.Stdout, `"code":200`) {
		t.Fatalf("a pod's PATCH: exit %d %s%s", res.Code, res.Stdout, res.Stderr)
	}
	d = awaitTwin(t, n, "plug-1", "to be switched on by a pod", func(d devicetwin.Doc) bool { return saysNow(d, "relay", "true") })
	if o := d.Properties["relay"].Override; o == nil || o.By != "system:serviceaccount:"+ns+":operator" {
		t.Errorf("override: %+v", o)
	}
	token := strings.TrimSpace(inPod(t.Context(), t, n, ns, "in", "token").Stdout)
	if _, err := n.Machine.Run(t.Context(), "mosquitto_pub", "-h", "169.254.20.20", "-u", "pod", "-P", token, "-q", "1",
		"-t", "skerry/v1/twin/default/plug-1/desired/set", "-m", `{"id":"m1","props":{"relay":false},"ttl":"10m"}`); err != nil {
		t.Fatal(err)
	}
	awaitTwin(t, n, "plug-1", "to be switched off over MQTT", func(d devicetwin.Doc) bool { return saysNow(d, "relay", "false") })
	if out := twin(t, n, "set", "default/trv-kitchen", "setpoint=23", "--ttl", "1h"); !strings.Contains(out, "default/trv-kitchen") {
		t.Errorf("edgecore twin set:\n%s", out)
	}
	awaitTwin(t, n, "trv-kitchen", "to be set on the node", func(d devicetwin.Doc) bool { return saysNow(d, "setpoint", "23") })

	// Meanwhile in the cloud: another desire, a device that comes and one that
	// goes. Its live values are of a node that is away.
	desire(t, "trv-kitchen", `{"setpoint":18}`)
	applyDefault(t, plugDevice("plug-9"))
	kubectl(t, "delete", "device", "-n", "default", "plug-8")
	eventually(t, time.Minute, "the hub to say that the node is away", func(context.Context) (bool, string) {
		out := kubectl(t, "get", "--raw", liveTwin("plug-1"))
		return strings.Contains(out, `"nodeConnected":false`), out
	})

	// A restart without the cloud: nothing is known of a device until it speaks.
	stopDevices()
	if err := n.KillEdgecore(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := n.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	d = awaitTwin(t, n, "trv-kitchen", "to be back from the disk", func(d devicetwin.Doc) bool { return d.Properties["temp"].Reported != nil })
	if p := d.Properties["setpoint"]; d.Phase != v1alpha1.PhaseUnknown || d.Properties["temp"].Reported.Quality != v1alpha1.QualityStale || p.Override == nil {
		t.Errorf("after a restart: %s, %+v, temp %+v", d.Phase, p, d.Properties["temp"].Reported)
	}
	simulateDevices(t, n, "thermostat:trv-kitchen", "plug:plug-1", "plug:plug-9")
	awaitTwin(t, n, "trv-kitchen", "to be heard again", func(d devicetwin.Doc) bool {
		return d.Phase == v1alpha1.PhaseOnline && saysNow(d, "setpoint", "23")
	})

	// The cloud returns. Of what both have changed, the cloud's holds; what only
	// the node has set stays.
	restore()
	d = awaitTwin(t, n, "trv-kitchen", "to be as the cloud wants", func(d devicetwin.Doc) bool { return saysNow(d, "setpoint", "18") })
	if p := d.Properties["setpoint"]; p.Override != nil || p.By != devicetwin.ByCloud {
		t.Errorf("a conflict: %+v", p)
	}
	d = awaitTwin(t, n, "plug-1", "to be as the node has set it", func(d devicetwin.Doc) bool { return saysNow(d, "relay", "false") })
	if d.Properties["relay"].Override == nil {
		t.Errorf("an override without conflict is gone: %+v", d.Properties["relay"])
	}
	awaitTwin(t, n, "plug-9", "to be there, as it came while the node was away", func(d devicetwin.Doc) bool { return d.Phase == v1alpha1.PhaseOnline })
	kubectl(t, "delete", "device", "-n", "default", "plug-9")
	for _, name := range []string{"plug-8", "plug-9"} { // deleted while the node was away, and now
		eventually(t, 20*time.Second, "the deleted device to be gone", func(ctx context.Context) (bool, string) {
			res, err := n.Edgecore(ctx, "twin", "get", "default/"+name)
			return err == nil && res.Code == 1 && strings.Contains(res.Stderr, "there is no device default/"+name), res.Stdout + res.Stderr
		})
	}
	eventually(t, 90*time.Second, "kubectl to show how it is now", func(context.Context) (bool, string) {
		out := kubectl(t, "get", "device", "-n", "default", "trv-kitchen", "-o", "jsonpath={.status.properties[?(@.name=='setpoint')].value}")
		return strings.TrimSpace(out) == "18", out
	})

	// The hub starts anew: it learns what is live from the nodes, and what is
	// desired reaches the device as before.
	withoutHub(t)()
	connected(t, n)
	desire(t, "plug-1", `{"relay":true}`)
	awaitTwin(t, n, "plug-1", "to be switched on by the new hub", func(d devicetwin.Doc) bool { return saysNow(d, "relay", "true") })
	eventually(t, 30*time.Second, "the hub's live values", func(context.Context) (bool, string) {
		out := kubectl(t, "get", "--raw", liveTwin("plug-1"))
		var live struct {
			NodeConnected bool `json:"nodeConnected"`
			Properties    map[string]struct {
				Reported *struct {
					Value json.RawMessage `json:"value"`
				} `json:"reported"`
			} `json:"properties"`
		}
		if err := json.Unmarshal([]byte(out), &live); err != nil {
			return false, err.Error()
		}
		r := live.Properties["relay"].Reported
		return live.NodeConnected && r != nil && string(r.Value) == "true", out
	})
}

// liveTwin is where the hub shows a device of namespace default.
func liveTwin(name string) string { return "/skerry/v1/twins/default/" + name }

func plugDevice(name string) string {
	return `
apiVersion: devices.skerry.dev/v1alpha1
kind: Device
metadata: {name: ` + name + `}
spec: {modelRef: {name: tasmota-plug}, nodeName: edge-1, params: {topic: ` + name + `}}`
}

// applyDefault applies manifests in namespace default, until the test ends.
func applyDefault(t *testing.T, manifests ...string) {
	t.Helper()
	text := strings.Join(manifests, "\n---\n")
	res := kubectlAny(t, text, "apply", "-n", "default", "-f", "-")
	if res.Code != 0 {
		t.Fatalf("kubectl apply: %s", res.Stderr)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		res, err := world.hub.KubectlIn(ctx, strings.NewReader(text), "delete", "-n", "default", "--ignore-not-found", "-f", "-")
		if err != nil || res.Code != 0 {
			t.Errorf("kubectl delete: %v %s", err, res.Stderr)
		}
	})
}

func desire(t *testing.T, device, desired string) {
	t.Helper()
	kubectl(t, "patch", "device", "-n", "default", device, "--type=merge", "-p", `{"spec":{"desired":`+desired+`}}`)
}

// twin runs "edgecore twin" on the node and wants it to succeed.
func twin(t *testing.T, n *cluster.Node, args ...string) string {
	t.Helper()
	res, err := n.Edgecore(t.Context(), append([]string{"twin"}, args...)...)
	if err != nil || res.Code != 0 {
		t.Fatalf("edgecore twin %v: exit %d, %v\n%s%s", args, res.Code, err, res.Stdout, res.Stderr)
	}
	return res.Stdout
}

// awaitTwin waits for a device of namespace default to be as wanted on its node.
func awaitTwin(t *testing.T, n *cluster.Node, name, what string, is func(d devicetwin.Doc) bool) (d devicetwin.Doc) {
	t.Helper()
	eventually(t, 30*time.Second, name+" "+what, func(ctx context.Context) (bool, string) {
		res, err := n.Edgecore(ctx, "twin", "get", "default/"+name, "-o", "json")
		if err != nil || res.Code != 0 {
			return false, fmt.Sprint(err, res.Stderr)
		}
		d = devicetwin.Doc{}
		if err := json.Unmarshal([]byte(res.Stdout), &d); err != nil {
			return false, err.Error()
		}
		return is(d), res.Stdout
	})
	return d
}

// saysNow tells whether the device says the value, and has said it since the
// node's start. A node that has started alone cannot vouch for the time.
func saysNow(d devicetwin.Doc, property, value string) bool {
	r := d.Properties[property].Reported
	return r != nil && string(r.Value) == value && (r.Quality == v1alpha1.QualityGood || r.Quality == v1alpha1.QualityUncertain)
}

// simulateDevices runs simulated devices on the node's machine, which reach its
// broker by loopback, until the function it returns is called.
func simulateDevices(t *testing.T, n *cluster.Node, devices ...string) (stop func()) {
	t.Helper()
	sim := filepath.Join(world.dir, "sim")
	if _, err := os.Stat(sim); err != nil {
		cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", sim, "github.com/skerry-io/skerry/deploy/devices/sim")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build the simulated devices: %v\n%s", err, out)
		}
	}
	program, err := os.ReadFile(sim)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(n.Disk("/var/lib/sim"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(n.Disk("/opt/sim"), program, 0o755); err != nil && !strings.Contains(err.Error(), "text file busy") {
		t.Fatal(err)
	}
	var out bytes.Buffer
	p, err := n.Exec(context.Background(), machine.Command{ // ends with stop
		Args:   append([]string{"/opt/sim", "--state", "/var/lib/sim", "--interval", "5s"}, devices...),
		Stdout: &out, Stderr: &out,
	})
	if err != nil {
		t.Fatal(err)
	}
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		if err := p.Signal(syscall.SIGTERM); err != nil {
			t.Errorf("stop the simulated devices: %v", err)
		}
		if err := p.Wait(context.Background()); err != nil {
			t.Logf("the simulated devices: %v\n%s", err, out.String())
		}
	}
	t.Cleanup(stop)
	return stop
}
