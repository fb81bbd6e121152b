package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/skerry-io/skerry/e2e/cluster"
	"github.com/skerry-io/skerry/e2e/image"
	"github.com/skerry-io/skerry/e2e/machine"
)

// The devices of deploy/examples, simulated at the node's own broker.
const (
	thermostat = "trv-kitchen"
	plug       = "plug-1"
	sim        = "/var/lib/sim/sim" // in the machine
)

// startDevices applies the examples and starts the simulated devices.
func (d *demo) startDevices(ctx context.Context) (string, error) {
	root, err := cluster.ModuleRoot()
	if err != nil {
		return "", err
	}
	for _, file := range []string{"zigbee2mqtt-thermostat.yaml", "tasmota-plug.yaml"} {
		text, err := os.ReadFile(filepath.Join(root, "deploy/examples/devices", file))
		if err != nil {
			return "", err
		}
		here := strings.ReplaceAll(string(text), "nodeName: edge-1", "nodeName: "+nodeName)
		if _, err := d.kubectl(ctx, strings.NewReader(here), "apply", "-f", "-"); err != nil {
			return "", err
		}
	}
	if _, err := d.node.Proc(ctx, "sim"); err != nil {
		if err := d.startSim(ctx); err != nil {
			return "", err
		}
	}
	// What an earlier run has set on the node is given up.
	err = await(ctx, time.Minute, func() error {
		t, err := d.twin(ctx, thermostat)
		if err == nil && t.Properties["setpoint"].Override != nil {
			_, err = d.edgecore(ctx, "twin", "set", thermostat, "setpoint-")
		}
		return err
	})
	if err != nil {
		return "", err
	}
	if err := d.awaitTwin(ctx, thermostat, "setpoint", "20.5"); err != nil {
		return "", err
	}
	if err := d.awaitTwin(ctx, plug, "relay", "true"); err != nil {
		return "", err
	}
	return "", await(ctx, time.Minute, func() error {
		out, err := d.kubectl(ctx, nil, "get", "devices", "-o", "jsonpath={.items[*].status.phase}")
		if err == nil && out != "Online Online" {
			err = fmt.Errorf("the devices' phases are %q", out)
		}
		return err
	})
}

func (d *demo) startSim(ctx context.Context) error {
	if _, err := image.GoBuild(ctx, "github.com/skerry-io/skerry/deploy/devices/sim", d.node.Disk(sim)); err != nil {
		return err
	}
	log, err := os.OpenFile(d.path("machine/sim.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	_, err = d.node.Exec(context.WithoutCancel(ctx), machine.Command{
		Name: "sim", Detach: true, Stdout: log, Stderr: log,
		Args: []string{sim, "--state", "/var/lib/sim", "thermostat:" + thermostat, "plug:" + plug},
	})
	return err
}

// showDevices does what a user would: change a value in the cloud, and on the
// node while it is cut off.
func (d *demo) showDevices(ctx context.Context) (err error) {
	kubectl := func(args ...string) error {
		out, err := d.kubectl(ctx, nil, args...)
		d.out.printf("\n$ %s kubectl %s\n%s", filepath.Join(d.bin, "cloudhub"), quoted(args), out)
		return err
	}
	edgecore := func(args ...string) error {
		out, err := d.edgecore(ctx, args...)
		d.out.printf("\n%s$ edgecore %s\n%s", nodeName, quoted(args), out)
		return err
	}
	if err := kubectl("get", "devices"); err != nil {
		return err
	}
	began := time.Now()
	if err := kubectl("patch", "device", thermostat, "--type=merge", "-p", `{"spec":{"desired":{"setpoint":22.5}}}`); err != nil {
		return err
	}
	answered := time.Now()
	if err := d.awaitTwin(ctx, thermostat, "setpoint", "22.5"); err != nil {
		return err
	}
	d.out.printf("# the thermostat has said that it is so %.2f s after kubectl began, %.2f s after it ended\n",
		time.Since(began).Seconds(), time.Since(answered).Seconds())

	if err := d.node.CutLink(ctx, machine.LinkDown); err != nil {
		return err
	}
	defer func() { // whatever happens, the node is not left alone
		if err != nil {
			err = errors.Join(err, d.node.RestoreLink(context.WithoutCancel(ctx)))
		}
	}()
	d.out.printf("\n# The node's network is cut. In the cloud somebody turns the plug off; at the node somebody is cold.\n")
	if err := d.awaitConnected(ctx, false); err != nil {
		return err
	}
	if err := kubectl("patch", "device", plug, "--type=merge", "-p", `{"spec":{"desired":{"relay":false}}}`); err != nil {
		return err
	}
	if err := edgecore("twin", "set", thermostat, "setpoint=24", "--ttl=1h"); err != nil {
		return err
	}
	if err := d.awaitTwin(ctx, thermostat, "setpoint", "24"); err != nil {
		return err
	}
	if err := edgecore("twin", "list"); err != nil {
		return err
	}
	if err := edgecore("twin", "get", thermostat); err != nil {
		return err
	}
	if err := d.node.RestoreLink(ctx); err != nil {
		return err
	}
	began = time.Now()
	d.out.printf("\n# The network is back.\n")
	if err := d.awaitTwin(ctx, plug, "relay", "false"); err != nil {
		return err
	}
	d.out.printf("# %.1f s later the plug is off", time.Since(began).Seconds())
	err = await(ctx, time.Minute, func() error {
		out, err := d.kubectl(ctx, nil, "get", "device", thermostat, "-o", `jsonpath={.status.overrides[0].value} {.status.properties[?(@.name=="setpoint")].value}`)
		if err == nil && out != "24 24" {
			err = fmt.Errorf("the cloud knows of override and setpoint: %q", out)
		}
		return err
	})
	if err != nil {
		return err
	}
	d.out.printf(", and %.1f s after the network the cloud knows what was set on the node, and until when.\n", time.Since(began).Seconds())
	if err := kubectl("get", "devices"); err != nil {
		return err
	}
	return kubectl("get", "device", thermostat, "-o", "jsonpath={.status.overrides}{\"\\n\"}")
}

// quoted is how a shell takes the arguments.
func quoted(args []string) string {
	var b strings.Builder
	for i, a := range args {
		if i > 0 {
			b.WriteByte(' ')
		}
		if strings.ContainsAny(a, `{}"\ `) {
			a = "'" + a + "'"
		}
		b.WriteString(a)
	}
	return b.String()
}

func (d *demo) edgecore(ctx context.Context, args ...string) (string, error) {
	res, err := d.node.Edgecore(ctx, args...)
	if err == nil && res.Code != 0 {
		err = fmt.Errorf("edgecore %s: exit status %d: %s", strings.Join(args, " "), res.Code, strings.TrimSpace(res.Stderr))
	}
	return res.Stdout, err
}

// twin is what is looked at of a twin.
type twin struct {
	Properties map[string]struct {
		Reported struct {
			Value json.RawMessage `json:"value"`
		} `json:"reported"`
		Override json.RawMessage `json:"override"`
	} `json:"properties"`
}

// twin asks edgecore without starting a program, which would take longer than
// what is measured.
func (d *demo) twin(ctx context.Context, name string) (*twin, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://edgecore/v1/twins/default/"+name, nil)
	if err != nil {
		return nil, err
	}
	res, err := d.node.AdminClient().Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("twin %s: %s: %s", name, res.Status, body)
	}
	t := &twin{}
	return t, json.Unmarshal(body, t)
}

func (d *demo) awaitTwin(ctx context.Context, name, property, want string) error {
	return awaitEvery(ctx, 10*time.Millisecond, time.Minute, func() error {
		t, err := d.twin(ctx, name)
		if err != nil {
			return err
		}
		if got := string(t.Properties[property].Reported.Value); got != want {
			return fmt.Errorf("%s says that its %s is %s; waiting for %s; see %s", name, property, got, want, d.path("machine/sim.log"))
		}
		return nil
	})
}

func (d *demo) awaitConnected(ctx context.Context, want bool) error {
	return await(ctx, 2*time.Minute, func() error {
		st, err := d.node.StatusBySocket(ctx)
		if err == nil && st.Connected != want {
			err = fmt.Errorf("edgecore takes itself for connected: %t", st.Connected)
		}
		return err
	})
}
