package main

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/skerry-io/skerry/e2e/image"
	"github.com/skerry-io/skerry/e2e/machine"
)

//go:embed hello.yaml
var manifest []byte

// edgeConfig keeps the pods in the machine's part of the host's cgroups.
const edgeConfig = `apiVersion: edgecore.skerry.dev/v1alpha1
kind: Config
kubelet:
  cgroupRoot: %s
`

// up brings everything up that is not up, and shows it.
func (d *demo) up(ctx context.Context) error {
	for _, program := range []string{"cloudhub", "edgecore"} {
		if _, err := os.Stat(filepath.Join(d.bin, program)); err != nil {
			return fmt.Errorf("%w; build it with: make build", err)
		}
	}
	if err := os.MkdirAll(d.dir, 0o700); err != nil {
		return err
	}
	m, err := d.newMachine()
	if err != nil {
		return err
	}
	// The hub listens on the machine's network, so that comes first.
	if err := m.Prepare(ctx); err != nil {
		return err
	}
	steps := []struct {
		what string
		do   func(context.Context) (string, error)
	}{
		{"cloud: cloudhub standalone", func(ctx context.Context) (string, error) { return d.startHub(ctx, m.HostIP()) }},
		{"edge: a machine of its own with containerd", func(ctx context.Context) (string, error) { return d.startMachine(ctx, m) }},
		{"edge: images of two Go programs, without a registry", func(ctx context.Context) (string, error) { return d.loadImages(ctx, m) }},
		{"edge: join the cloud with a token", func(ctx context.Context) (string, error) { return d.join(ctx, m) }},
		{"edge: edgecore until its node is Ready", func(ctx context.Context) (string, error) { return d.startEdge(ctx, m) }},
		{"cloud: a Deployment until its pods are Ready", d.deploy},
	}
	for _, s := range steps {
		if err := d.out.step(ctx, s.what, s.do); err != nil {
			return err
		}
	}
	if err := d.show(ctx); err != nil {
		return err
	}
	d.out.printf(`
All in %.0f s. Go on with:

  export KUBECONFIG=%s
  alias kubectl='%s kubectl'     # or a kubectl of your own
  kubectl get pods -o wide
  kubectl exec -it deploy/hello -- /bin/demo tty

The edge's log is %s, the cloud's %s.
Take it all down with: make demo-down
`, time.Since(d.out.began).Seconds(), d.kubeconfig(), filepath.Join(d.bin, "cloudhub"), m.Disk(insideLog), d.path("hub.log"))
	return nil
}

func (d *demo) startMachine(ctx context.Context, m *machine.Machine) (string, error) {
	at := fmt.Sprintf("%s at %s", m.Name(), m.IP())
	if m.Running() {
		return at + ", already up", nil
	}
	return at, m.Start(ctx)
}

// loadImages builds and imports the images; containerd keeps what it has when
// it is the same.
func (d *demo) loadImages(ctx context.Context, m *machine.Machine) (string, error) {
	dir := d.path("images")
	for _, build := range []func(context.Context, string) (string, error){image.Pause, image.Demo} {
		tar, err := build(ctx, dir)
		if err != nil {
			return "", err
		}
		if err := m.ImportImage(ctx, tar); err != nil {
			return "", err
		}
	}
	return image.PauseName + ", " + image.DemoName, nil
}

// join enrols the machine, once.
func (d *demo) join(ctx context.Context, m *machine.Machine) (string, error) {
	if _, err := os.Stat(m.Disk(insideData + "/identity")); err == nil {
		return "has joined before", nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	if err := os.MkdirAll(m.Disk(insideData), 0o700); err != nil {
		return "", err
	}
	config := fmt.Sprintf(edgeConfig, m.CgroupRoot())
	if err := os.WriteFile(m.Disk(insideData+"/config.yaml"), []byte(config), 0o600); err != nil {
		return "", err
	}
	hub, err := d.loadHub()
	if err != nil {
		return "", err
	}
	// The hub's own part starts after the API server, hence more than one try.
	var token []byte
	err = d.await(ctx, time.Minute, func() (err error) {
		token, err = d.run(ctx, filepath.Join(d.bin, "cloudhub"), "token", "create", "--ttl", "10m", "--allow-replace")
		return err
	})
	if err != nil {
		return "", err
	}
	var out bytes.Buffer
	p, err := m.Exec(ctx, machine.Command{
		Args:   []string{insideBin + "/edgecore", "join", "https://" + hub.Listen, "--replace"},
		Env:    []string{"SKERRY_TOKEN=" + strings.TrimSpace(string(token))},
		Stdout: &out, Stderr: &out,
	})
	if err != nil {
		return "", err
	}
	if err := p.Wait(ctx); err != nil {
		return "", fmt.Errorf("edgecore join: %w: %s", err, bytes.TrimSpace(out.Bytes()))
	}
	first, _, _ := strings.Cut(out.String(), "\n")
	return first, nil
}

func (d *demo) startEdge(ctx context.Context, m *machine.Machine) (string, error) {
	p, err := m.Proc(ctx, "edgecore")
	already := err == nil
	if err != nil {
		log, err := os.OpenFile(m.Disk(insideLog), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			return "", err
		}
		defer log.Close()
		p, err = m.Exec(ctx, machine.Command{
			Name: "edgecore", Args: []string{insideBin + "/edgecore", "run"}, Stdout: log, Stderr: log, Detach: true,
		})
		if err != nil {
			return "", err
		}
	}
	err = d.await(ctx, 3*time.Minute, func() error {
		select {
		case <-p.Done():
			return fatal{fmt.Errorf("edgecore has ended: %w; the end of its log:\n%s", p.Wait(ctx), tail(m.Disk(insideLog)))}
		default:
		}
		out, err := d.run(ctx, append(d.kubectl, "get", "node", nodeName, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}`)...)
		if err == nil && string(out) != "True" {
			err = fmt.Errorf("node %s is not Ready; see %s", nodeName, m.Disk(insideLog))
		}
		return err
	})
	if already {
		return "it was running", err
	}
	return "", err
}

func (d *demo) deploy(ctx context.Context) (string, error) {
	if _, err := d.runWith(ctx, manifest, append(d.kubectl, "apply", "-f", "-")...); err != nil {
		return "", err
	}
	_, err := d.run(ctx, append(d.kubectl, "rollout", "status", "deployment/hello", "--timeout=180s")...)
	if err != nil {
		pods, _ := d.run(ctx, append(d.kubectl, "get", "pods,events")...)
		err = fmt.Errorf("%w\n%s", err, pods)
	}
	return "", err
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
		var out []byte
		// Figures of new pods take the first samples; the rest is there at once.
		err := d.await(ctx, 45*time.Second, func() (err error) {
			out, err = d.run(ctx, append(d.kubectl, args...)...)
			if err != nil && args[0] != "top" {
				err = fatal{err}
			}
			return err
		})
		d.out.printf("\n$ %s kubectl %s\n%s", filepath.Join(d.shownBin, "cloudhub"), strings.Join(args, " "), out)
		if err != nil {
			return err
		}
	}
	return nil
}
