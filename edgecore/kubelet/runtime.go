package kubelet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"k8s.io/apimachinery/pkg/util/version"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// oldestContainerd is the first release that speaks CRI v1.
const oldestContainerd = "1.6.0"

// probeTimeout bounds one look at the runtime: a board that is pulling or
// unpacking an image answers slowly.
const probeTimeout = 10 * time.Second

// runtimeInfo is what the runtime says about itself.
type runtimeInfo struct {
	Name           string
	Version        string
	SystemdCgroup  bool
	NetworkReady   bool
	NetworkMessage string
}

// runtimeError is a runtime that cannot be used now.
type runtimeError struct {
	Finding
	// Transient says that the runtime may still be starting.
	Transient bool
}

func (e *runtimeError) Error() string { return "kubelet: " + e.Finding.text() }

// waitForRuntime returns once the runtime answers. After a power cut edgecore
// and containerd start together and either may be first, so a socket that is
// missing or refuses is waited for; one that answers but cannot be used is an
// error at once.
func (k *Kubelet) waitForRuntime(ctx context.Context) (runtimeInfo, error) {
	const (
		firstPause = 250 * time.Millisecond
		lastPause  = 5 * time.Second
		logEvery   = time.Minute
	)
	log := k.cfg.Log.With("endpoint", k.cfg.RuntimeEndpoint)
	pause := firstPause
	started := time.Now()
	var lastLog time.Time
	for {
		info, err := probeRuntime(ctx, k.cfg.RuntimeEndpoint)
		if err == nil {
			log.Info("container runtime is ready", "runtime", info.Name, "version", info.Version, "waited", time.Since(started).Round(time.Millisecond))
			return info, nil
		}
		if ctx.Err() != nil {
			return runtimeInfo{}, fmt.Errorf("kubelet: wait for the container runtime: %w", context.Cause(ctx))
		}
		var re *runtimeError
		if errors.As(err, &re) && !re.Transient {
			return runtimeInfo{}, &CheckError{Findings: []Finding{re.Finding}}
		}
		if time.Since(lastLog) >= logEvery {
			log.Warn("waiting for the container runtime", "err", err, "waited", time.Since(started).Round(time.Second))
			lastLog = time.Now()
		}
		select {
		case <-ctx.Done():
			return runtimeInfo{}, fmt.Errorf("kubelet: wait for the container runtime: %w", context.Cause(ctx))
		case <-time.After(pause):
		}
		pause = min(2*pause, lastPause)
	}
}

// probeRuntime asks the runtime who it is and whether it can run pods. Its
// errors are *runtimeError.
func probeRuntime(ctx context.Context, endpoint string) (runtimeInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	path := socketPath(endpoint)
	if err := dialSocket(ctx, path); err != nil {
		return runtimeInfo{}, err
	}
	conn, err := grpc.NewClient("unix://"+path,
		// A unix socket that only root may open; there is no peer to verify.
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithAuthority("localhost"),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(4<<20)),
	)
	if err != nil {
		return runtimeInfo{}, unusable(path, err.Error(), "check runtime.endpoint")
	}
	defer conn.Close()

	cri := runtimeapi.NewRuntimeServiceClient(conn)
	v, err := cri.Version(ctx, &runtimeapi.VersionRequest{})
	if err != nil {
		return runtimeInfo{}, explainNoCRI(ctx, conn, path, err)
	}
	info := runtimeInfo{Name: v.RuntimeName, Version: v.RuntimeVersion, NetworkReady: true}
	if info.Name == "containerd" && olderThan(info.Version, oldestContainerd) {
		return runtimeInfo{}, tooOld(path, info.Version)
	}
	st, err := cri.Status(ctx, &runtimeapi.StatusRequest{Verbose: true})
	if err != nil {
		return runtimeInfo{}, &runtimeError{Transient: true, Finding: Finding{Error, path, "the runtime does not report its status: " + status.Convert(err).Message(), "look into the runtime's log (journalctl -u containerd)"}}
	}
	for _, c := range st.GetStatus().GetConditions() {
		if c.Type == runtimeapi.NetworkReady && !c.Status {
			info.NetworkReady, info.NetworkMessage = false, c.Message
		}
		if c.Type == runtimeapi.RuntimeReady && !c.Status {
			return runtimeInfo{}, &runtimeError{Transient: true, Finding: Finding{Error, path, "the runtime is not ready: " + c.Message, "look into the runtime's log (journalctl -u containerd)"}}
		}
	}
	info.SystemdCgroup = usesSystemdCgroup(ctx, cri, st.GetInfo())
	return info, nil
}

// dialSocket tells apart the ways a socket can be unusable; a gRPC error says
// only that the connection failed.
func dialSocket(ctx context.Context, path string) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err == nil {
		conn.Close()
		return nil
	}
	transient := func(problem, remedy string) error {
		return &runtimeError{Transient: true, Finding: Finding{Error, path, problem, remedy}}
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return transient("there is no such socket", "install and start containerd 1.6 or newer (systemctl enable --now containerd), or set runtime.endpoint")
	case errors.Is(err, fs.ErrPermission):
		return unusable(path, fmt.Sprintf("permission denied for user id %d", os.Geteuid()), "run as root")
	case errors.Is(err, syscall.ECONNREFUSED) && !isSocket(path):
		return unusable(path, "it is not a socket", "set runtime.endpoint to containerd's socket")
	case errors.Is(err, syscall.ECONNREFUSED):
		return transient("the socket exists but nobody listens on it", "start containerd (systemctl start containerd) and look into its log")
	case errors.Is(err, syscall.EPROTOTYPE):
		return unusable(path, "it is a socket of another type", "set runtime.endpoint to containerd's socket")
	}
	return transient(err.Error(), "look into the runtime's log (journalctl -u containerd)")
}

func isSocket(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().Type() == fs.ModeSocket
}

// explainNoCRI finds out why a listening runtime does not answer CRI v1.
func explainNoCRI(ctx context.Context, conn *grpc.ClientConn, path string, criErr error) error {
	if status.Code(criErr) != codes.Unimplemented {
		return &runtimeError{Transient: true, Finding: Finding{Error, path, "the runtime does not answer: " + status.Convert(criErr).Message(), "look into the runtime's log (journalctl -u containerd)"}}
	}
	v, err := versionapi.NewVersionClient(conn).Version(ctx, &emptypb.Empty{})
	switch {
	case err != nil:
		return unusable(path, "what listens there is not a container runtime with CRI v1", "set runtime.endpoint to the socket of containerd 1.6 or newer")
	case olderThan(v.Version, oldestContainerd):
		return tooOld(path, v.Version)
	}
	// containerd loads its plugins before it serves, so this does not pass.
	return unusable(path, "containerd "+v.Version+" runs with its CRI plugin disabled or failed",
		`remove "cri" from disabled_plugins in /etc/containerd/config.toml and restart containerd; if it is not there, look for "cri" in containerd's log`)
}

func unusable(path, problem, remedy string) error {
	return &runtimeError{Finding: Finding{Error, path, problem, remedy}}
}

func tooOld(path, found string) error {
	return unusable(path, "containerd "+found+" is too old", "install containerd "+oldestContainerd+" or newer")
}

// olderThan compares versions as distributions write them ("1.6.20~ds1",
// "v2.0.1"). One that cannot be read is taken to be new enough.
func olderThan(found, oldest string) bool {
	found, _, _ = strings.Cut(found, "~")
	v, err := version.ParseGeneric(strings.TrimPrefix(found, "v"))
	if err != nil {
		return false
	}
	return v.LessThan(version.MustParseGeneric(oldest))
}

// usesSystemdCgroup reads the runtime's cgroup driver: containerd 2 answers
// RuntimeConfig, older ones show their configuration in the verbose status. A
// kubelet with the other driver puts pods where the runtime does not look.
func usesSystemdCgroup(ctx context.Context, cri runtimeapi.RuntimeServiceClient, info map[string]string) bool {
	if rc, err := cri.RuntimeConfig(ctx, &runtimeapi.RuntimeConfigRequest{}); err == nil && rc.GetLinux() != nil {
		return rc.GetLinux().GetCgroupDriver() == runtimeapi.CgroupDriver_SYSTEMD
	}
	return systemdCgroupIn(info["config"])
}

// systemdCgroupIn reads containerd's CRI configuration as its status shows it.
func systemdCgroupIn(config string) bool {
	var c struct {
		Containerd struct {
			DefaultRuntimeName string `json:"defaultRuntimeName"`
			Runtimes           map[string]struct {
				Options map[string]any `json:"options"`
			} `json:"runtimes"`
		} `json:"containerd"`
		SystemdCgroup bool `json:"systemdCgroup"` // for the v1 shim, kept in old files
	}
	if err := json.Unmarshal([]byte(config), &c); err != nil {
		return false
	}
	name := c.Containerd.DefaultRuntimeName
	if name == "" {
		name = "runc"
	}
	systemd, _ := c.Containerd.Runtimes[name].Options["SystemdCgroup"].(bool)
	return systemd || c.SystemdCgroup
}

// cgroupDriver is the configured driver, else the runtime's.
func cgroupDriver(configured string, runtime runtimeInfo) string {
	if configured != "" {
		return configured
	}
	if runtime.SystemdCgroup {
		return "systemd"
	}
	return "cgroupfs"
}
