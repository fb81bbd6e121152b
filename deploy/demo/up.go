package main

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/skerry-io/skerry/e2e/cluster"
	"github.com/skerry-io/skerry/e2e/image"
)

//go:embed hello.yaml
var manifest []byte

// up brings everything up that is not up, and shows it.
func up(ctx context.Context, dir, bin string) error {
	for _, program := range []string{"cloudhub", "edgecore"} {
		if _, err := os.Stat(filepath.Join(bin, program)); err != nil {
			return fmt.Errorf("%w; build it with: make build", err)
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	d, err := open(dir, bin)
	if err != nil {
		return err
	}
	if err := d.saveState(); err != nil {
		return err
	}
	for _, s := range []struct {
		what string
		do   func(context.Context) (string, error)
	}{
		{"cloud: cloudhub standalone", d.startHub},
		{"edge: images of two Go programs, without a registry", d.buildImages},
		{"edge: a machine of its own with containerd", d.startMachine},
		{"edge: join the cloud with a token", d.join},
		{"edge: edgecore until its node is Ready", d.startEdge},
		{"cloud: a Deployment until its pods are Ready", d.deploy},
		{"cloud: figures of CPU and memory, which take two samples", d.awaitFigures},
	} {
		if err := d.out.step(ctx, s.what, s.do); err != nil {
			return err
		}
	}
	if err := d.show(ctx); err != nil {
		return err
	}
	d.out.printf("\n")
	if err := d.out.step(ctx, "edge: a simulated thermostat and plug until the cloud knows them", d.startDevices); err != nil {
		return err
	}
	if err := d.showDevices(ctx); err != nil {
		return err
	}
	d.out.printf(`
All in %.0f s. Go on with:

  export KUBECONFIG=%s
  alias kubectl='%s kubectl'     # or a kubectl of your own
  kubectl get pods -o wide
  kubectl exec -it deploy/hello -- /bin/demo tty
  kubectl edit device plug-1     # turn spec.desired.relay on again

The edge's log is %s,
the cloud's %s.
Take it all down with: make demo-down
`, time.Since(d.out.began).Seconds(), d.hub.Kubeconfig(), d.cloudhub(), d.node.LogPath(), d.hub.LogPath())
	return nil
}

func (d *demo) buildImages(ctx context.Context) (string, error) {
	dir := d.path("images")
	_, pause := image.Pause(ctx, dir)
	_, demo := image.Demo(ctx, dir)
	return image.PauseName + ", " + image.DemoName, errors.Join(pause, demo)
}

func (d *demo) startMachine(ctx context.Context) (string, error) {
	at := fmt.Sprintf("%s at %s", d.node.Name(), d.node.IP())
	if d.node.Running() {
		at += ", already up"
	}
	return at, d.node.Boot(ctx)
}

// join enrols the node, once.
func (d *demo) join(ctx context.Context) (string, error) {
	if _, err := os.Stat(d.node.Disk(cluster.EdgeDataDir + "/identity")); err == nil {
		return "has joined before", nil
	}
	return d.node.HubURL(d.hub), d.node.Join(ctx, d.hub, "--ttl", "10m", "--node-name", nodeName)
}

func (d *demo) startEdge(ctx context.Context) (string, error) {
	result := ""
	p, err := d.node.Proc(ctx, "edgecore")
	if err == nil {
		result = "it was running"
	} else {
		if err := d.node.Run(ctx); err != nil {
			return "", err
		}
		if p, err = d.node.Proc(ctx, "edgecore"); err != nil {
			return "", fmt.Errorf("it ended at once: %w; the end of its log:\n%s", err, tail(d.node.LogPath()))
		}
	}
	return result, await(ctx, 3*time.Minute, func() error {
		select {
		case <-p.Done():
			return fatal{fmt.Errorf("edgecore has ended: %w; the end of its log:\n%s", p.Wait(ctx), tail(d.node.LogPath()))}
		default:
		}
		out, err := d.kubectl(ctx, nil, "get", "node", nodeName, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}`)
		if err == nil && out != "True" {
			err = fmt.Errorf("node %s is not Ready; see %s", nodeName, d.node.LogPath())
		}
		return err
	})
}

func (d *demo) deploy(ctx context.Context) (string, error) {
	if _, err := d.kubectl(ctx, bytes.NewReader(manifest), "apply", "-f", "-"); err != nil {
		return "", err
	}
	if _, err := d.kubectl(ctx, nil, "rollout", "status", "deployment/hello", "--timeout=180s"); err != nil {
		state, _ := d.kubectl(ctx, nil, "get", "pods,events")
		return "", fmt.Errorf("%w\n%s", err, state)
	}
	return "", nil
}

func (d *demo) awaitFigures(ctx context.Context) (string, error) {
	return "", await(ctx, 90*time.Second, func() error {
		for _, what := range []string{"nodes", "pods"} {
			out, err := d.kubectl(ctx, nil, "top", what, "--no-headers")
			if err == nil && strings.Contains(out, " 0m ") && what == "nodes" {
				err = errors.New("no second sample yet")
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// show runs the commands a user would, and what they print.
func (d *demo) show(ctx context.Context) error {
	for _, args := range [][]string{
		{"get", "nodes", "-o", "wide"},
		{"get", "pods", "-o", "wide"},
		{"logs", "deploy/hello", "--tail=3"},
		{"exec", "deploy/hello", "--", "/bin/demo", "get", "http://localhost:8080/"},
		{"top", "nodes"},
		{"top", "pods"},
	} {
		out, err := d.kubectl(ctx, nil, args...)
		d.out.printf("\n$ %s kubectl %s\n%s", filepath.Join(d.bin, "cloudhub"), strings.Join(args, " "), out)
		if err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) kubectl(ctx context.Context, stdin io.Reader, args ...string) (string, error) {
	res, err := d.hub.KubectlIn(ctx, stdin, args...)
	if err == nil && res.Code != 0 {
		err = fmt.Errorf("kubectl %s: exit status %d: %s", strings.Join(args, " "), res.Code, strings.TrimSpace(res.Stderr))
	}
	return res.Stdout, err
}

func (d *demo) cloudhub() string {
	path, err := filepath.Abs(filepath.Join(d.bin, "cloudhub"))
	if err != nil {
		return filepath.Join(d.bin, "cloudhub")
	}
	return path
}

func tail(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	return strings.Join(lines[max(0, len(lines)-12):], "\n")
}
