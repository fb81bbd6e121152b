package machine

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// ContainerdEndpoint is the CRI endpoint as the machine's programs see it.
	ContainerdEndpoint = "unix://" + containerdSocket

	// PauseImage is what containerd takes for sandboxes. It pulls nothing, so
	// the image has to be imported before the first pod.
	PauseImage = "localhost/skerry/pause:1"

	containerdSocket = "/run/containerd/containerd.sock"
	containerdConfig = "/etc/containerd/config.toml"
	containerdName   = "containerd" // as a process of the machine
)

// ContainerdSocket returns the host's path to containerd's socket.
func (m *Machine) ContainerdSocket() string { return m.Path(containerdSocket) }

// ImportImage loads an OCI or docker image archive of the host into
// containerd's k8s.io namespace, where pods find it.
func (m *Machine) ImportImage(ctx context.Context, tar string) error {
	f, err := os.Open(tar)
	if err != nil {
		return fmt.Errorf("machine %s: import image: %w", m.cfg.Name, err)
	}
	defer f.Close()
	var out lockedBuffer
	p, err := m.Exec(ctx, Command{Args: []string{"ctr", "-n", "k8s.io", "images", "import", "-"}, Stdin: f, Stdout: &out, Stderr: &out})
	if err != nil {
		return err
	}
	if err := p.Wait(ctx); err != nil {
		return fmt.Errorf("machine %s: import image %s: %w: %s", m.cfg.Name, tar, err, lastLines(out.Bytes(), 2000))
	}
	return nil
}

// RestartContainerd kills containerd and starts it again; containers and
// their shims run on.
func (m *Machine) RestartContainerd(ctx context.Context) error {
	m.mu.Lock()
	b := m.boot
	m.mu.Unlock()
	if b == nil {
		return fmt.Errorf("machine %s is off", m.cfg.Name)
	}
	p, err := m.Proc(ctx, containerdName)
	if err != nil {
		return err
	}
	if err := p.Signal(unix.SIGKILL); err != nil {
		return err
	}
	select {
	case <-p.Done():
	case <-ctx.Done():
		return ctx.Err()
	}
	return m.startContainerd(ctx, b)
}

// startContainerd writes containerd's configuration, starts it and returns
// when it can run pods.
func (m *Machine) startContainerd(ctx context.Context, b *boot) error {
	fail := func(err error) error { return fmt.Errorf("machine %s: containerd: %w", m.cfg.Name, err) }
	if err := m.writeContainerdConfig(); err != nil {
		return fail(err)
	}
	logPath := m.Disk("/var/log/containerd.log")
	logFile, err := os.OpenFile(logPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return fail(err)
	}
	defer logFile.Close()
	conn, err := m.dialBoot()
	if err != nil {
		return fail(err)
	}
	p, err := m.execOn(ctx, conn, Command{
		Name: containerdName, Args: []string{"containerd", "--config", containerdConfig},
		Stdout: logFile, Stderr: logFile, Detach: true,
	})
	if err != nil {
		return fail(err)
	}
	grpcConn, err := grpc.NewClient("unix://"+b.path(containerdSocket), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.3, MaxDelay: time.Second}}))
	if err != nil {
		return fail(err)
	}
	defer grpcConn.Close()
	client := cri.NewRuntimeServiceClient(grpcConn)
	var last error
	err = poll(ctx, time.Minute, func() (bool, error) {
		select {
		case <-p.Done():
			return false, fmt.Errorf("ended at once: %w", p.Wait(ctx))
		default:
		}
		last = podsCanRun(ctx, client)
		return last == nil, nil
	})
	if err != nil {
		text, _ := os.ReadFile(logPath)
		return fail(fmt.Errorf("wait until it serves: %w: %w; the end of its log: %s", err, last, lastLines(text, 1500)))
	}
	return nil
}

// podsCanRun asks containerd's CRI plugin, which serves some time after the
// socket is there.
func podsCanRun(ctx context.Context, client cri.RuntimeServiceClient) error {
	resp, err := client.Status(ctx, &cri.StatusRequest{})
	if err != nil {
		return err
	}
	for _, c := range resp.GetStatus().GetConditions() {
		if !c.Status {
			return fmt.Errorf("%s is not: %s", c.Type, c.Message)
		}
	}
	return nil
}

func (m *Machine) writeContainerdConfig() error {
	snapshotter := "overlayfs"
	if err := probeOverlay(m.cfg.Dir); err != nil {
		snapshotter = "native"
		m.log.Info("overlay cannot be mounted here, so containerd copies files instead", "reason", err)
	}
	cni := fmt.Sprintf(cniTemplate, m.PodSubnet())
	if err := os.WriteFile(m.Disk("/etc/cni/net.d/10-skerry.conflist"), []byte(cni), 0o644); err != nil {
		return err
	}
	binDir, err := cniBinDir()
	if err != nil {
		return err
	}
	capable, err := hasCapability(unix.CAP_SYS_RESOURCE)
	if err != nil {
		return err
	}
	text := strings.NewReplacer(
		"$PAUSE", PauseImage, "$SNAPSHOTTER", snapshotter, "$CNIBIN", binDir,
		"$RESTRICT", fmt.Sprint(!capable),
	).Replace(containerdTemplate)
	return os.WriteFile(m.Disk(containerdConfig), []byte(text), 0o644)
}

// Without CAP_SYS_RESOURCE nobody may lower an oom_score_adj: containerd then
// has to leave it at what it is (restrict_oom_score_adj).
const containerdTemplate = `version = 2
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
  address = "/run/containerd/containerd.sock"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "$PAUSE"
  restrict_oom_score_adj = $RESTRICT
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "$CNIBIN"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "$SNAPSHOTTER"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
`

const cniTemplate = `{
  "cniVersion": "1.0.0",
  "name": "skerry",
  "plugins": [
    {
      "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
      "ipam": {"type": "host-local", "ranges": [[{"subnet": "%s"}]], "routes": [{"dst": "0.0.0.0/0"}]}
    },
    {"type": "portmap", "snat": false, "capabilities": {"portMappings": true}}
  ]
}
`

// cniBinDir finds the plugins where Debian and others put them.
func cniBinDir() (string, error) {
	dirs := []string{"/usr/lib/cni", "/usr/libexec/cni"}
	for _, dir := range dirs {
		if _, err := os.Stat(filepath.Join(dir, "bridge")); err == nil {
			return dir, nil
		}
	}
	return "", fmt.Errorf("no CNI plugins in %s; run `make deps`", strings.Join(dirs, " or "))
}

// probeOverlay tells whether the kernel mounts an overlay whose layers are in
// dir: it does not where dir is on an overlay itself.
func probeOverlay(dir string) error {
	base, err := os.MkdirTemp(dir, "overlay-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(base)
	for _, d := range []string{"lower", "upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(base, d), 0o755); err != nil {
			return err
		}
	}
	merged := filepath.Join(base, "merged")
	options := fmt.Sprintf("lowerdir=%s/lower,upperdir=%s/upper,workdir=%s/work", base, base, base)
	if err := unix.Mount("overlay", merged, "overlay", 0, options); err != nil {
		return err
	}
	return unix.Unmount(merged, 0)
}

// hasCapability tells whether this process, and so the machine, has a
// capability of the first 32.
func hasCapability(c uint) (bool, error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false, fmt.Errorf("read capabilities: %w", err)
	}
	return data[0].Effective&(1<<c) != 0, nil
}
