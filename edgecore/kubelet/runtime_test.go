package kubelet

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// fakeRuntime is the part of a container runtime that the checks ask.
type fakeRuntime struct {
	runtimeapi.UnimplementedRuntimeServiceServer

	noCRI, noContainerd bool
	name, version       string
	conditions          []*runtimeapi.RuntimeCondition
	config              string
	driver              *runtimeapi.CgroupDriver
}

func (f *fakeRuntime) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{RuntimeName: f.name, RuntimeVersion: f.version}, nil
}

func (f *fakeRuntime) Status(_ context.Context, req *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	res := &runtimeapi.StatusResponse{Status: &runtimeapi.RuntimeStatus{Conditions: f.conditions}}
	if req.Verbose {
		res.Info = map[string]string{"config": f.config}
	}
	return res, nil
}

func (f *fakeRuntime) RuntimeConfig(context.Context, *runtimeapi.RuntimeConfigRequest) (*runtimeapi.RuntimeConfigResponse, error) {
	if f.driver == nil {
		return nil, status.Error(codes.Unimplemented, "unknown method RuntimeConfig")
	}
	return &runtimeapi.RuntimeConfigResponse{Linux: &runtimeapi.LinuxRuntimeConfiguration{CgroupDriver: *f.driver}}, nil
}

// containerdVersion answers containerd's own version service.
type containerdVersion struct {
	versionapi.UnimplementedVersionServer
	version string
}

func (v containerdVersion) Version(context.Context, *emptypb.Empty) (*versionapi.VersionResponse, error) {
	return &versionapi.VersionResponse{Version: v.version}, nil
}

// serve answers on path until the test ends.
func (f *fakeRuntime) serve(t *testing.T, path string) {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	if !f.noCRI {
		runtimeapi.RegisterRuntimeServiceServer(s, f)
	}
	if !f.noContainerd {
		versionapi.RegisterVersionServer(s, containerdVersion{version: f.version})
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() { s.Stop(); <-done })
}

func socket(t *testing.T) string { return filepath.Join(t.TempDir(), "c.sock") }

func TestProbeRuntimeRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		prepare         func(t *testing.T, path string)
		problem, remedy string
		transient       bool
	}{
		"no socket": {func(*testing.T, string) {}, "there is no such socket", "install and start containerd 1.6", true},
		"not a socket": {func(t *testing.T, path string) {
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, "it is not a socket", "set runtime.endpoint", false},
		"left behind": {func(t *testing.T, path string) {
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
			if err != nil {
				t.Fatal(err)
			}
			l.SetUnlinkOnClose(false)
			l.Close()
		}, "nobody listens on it", "systemctl start containerd", true},
		"CRI disabled": {func(t *testing.T, path string) {
			(&fakeRuntime{noCRI: true, version: "1.7.22"}).serve(t, path)
		}, "containerd 1.7.22 runs with its CRI plugin disabled", `remove "cri" from disabled_plugins`, false},
		"older than CRI v1": {func(t *testing.T, path string) {
			(&fakeRuntime{noCRI: true, version: "v1.5.9"}).serve(t, path)
		}, "containerd v1.5.9 is too old", "install containerd 1.6.0 or newer", false},
		"too old by its CRI": {func(t *testing.T, path string) {
			(&fakeRuntime{name: "containerd", version: "1.5.9~ds1"}).serve(t, path)
		}, "containerd 1.5.9~ds1 is too old", "install containerd 1.6.0 or newer", false},
		"something else": {func(t *testing.T, path string) {
			(&fakeRuntime{noCRI: true, noContainerd: true}).serve(t, path)
		}, "not a container runtime with CRI v1", "set runtime.endpoint", false},
		"not ready": {func(t *testing.T, path string) {
			(&fakeRuntime{name: "containerd", version: "1.7.0", conditions: []*runtimeapi.RuntimeCondition{{Type: runtimeapi.RuntimeReady, Message: "snapshotter is starting"}}}).serve(t, path)
		}, "the runtime is not ready: snapshotter is starting", "journalctl -u containerd", true},
	} {
		t.Run(name, func(t *testing.T) {
			path := socket(t)
			c.prepare(t, path)
			_, err := probeRuntime(t.Context(), "unix://"+path)
			var re *runtimeError
			if !errors.As(err, &re) {
				t.Fatalf("error %v", err)
			}
			wants(t, []Finding{re.Finding}, Error, path, c.problem, c.remedy)
			if re.Transient != c.transient {
				t.Errorf("transient = %v", re.Transient)
			}
		})
	}
}

func TestProbeRuntimeReadsTheRuntime(t *testing.T) {
	systemd := runtimeapi.CgroupDriver_SYSTEMD
	cgroupfs := runtimeapi.CgroupDriver_CGROUPFS
	const systemdConfig = `{"containerd":{"defaultRuntimeName":"runc","runtimes":{"runc":{"options":{"SystemdCgroup":true}},"other":{"options":null}}}}`
	for name, c := range map[string]struct {
		runtime fakeRuntime
		want    string
	}{
		"containerd 2":               {fakeRuntime{version: "2.1.0", driver: &systemd}, "systemd"},
		"containerd 2 with cgroupfs": {fakeRuntime{version: "2.1.0", driver: &cgroupfs, config: systemdConfig}, "cgroupfs"},
		"containerd 1.6":             {fakeRuntime{version: "1.6.20~ds1", config: systemdConfig}, "systemd"},
		"containerd 1.6 by default":  {fakeRuntime{version: "1.6.20~ds1", config: `{"containerd":{"defaultRuntimeName":"runc","runtimes":{"runc":{"options":{"SystemdCgroup":false}}}}}`}, "cgroupfs"},
		"unreadable":                 {fakeRuntime{version: "1.6.20", config: `{`}, "cgroupfs"},
	} {
		t.Run(name, func(t *testing.T) {
			path := socket(t)
			c.runtime.name = "containerd"
			c.runtime.conditions = []*runtimeapi.RuntimeCondition{{Type: runtimeapi.RuntimeReady, Status: true}, {Type: runtimeapi.NetworkReady, Message: "cni plugin not initialized"}}
			c.runtime.serve(t, path)
			info, err := probeRuntime(t.Context(), "unix://"+path)
			if err != nil {
				t.Fatal(err)
			}
			if got := cgroupDriver("", info); got != c.want {
				t.Errorf("driver %s, want %s", got, c.want)
			}
			cfg := Config{RuntimeEndpoint: "unix://" + path}
			wants(t, checkRuntime(&cfg, info), Warning, path, "cni plugin not initialized", "/etc/cni/net.d")
			cfg.CgroupDriver = map[string]string{"systemd": "cgroupfs", "cgroupfs": "systemd"}[c.want]
			wants(t, checkRuntime(&cfg, info)[1:], Error, "cgroup driver", "the runtime uses "+c.want, "remove runtime.cgroupDriver")
		})
	}
}

func TestWaitForRuntimeWaitsForAStart(t *testing.T) {
	path := socket(t)
	k, err := New(Config{NodeName: "edge-1", Transport: http.DefaultTransport, RuntimeEndpoint: path})
	if err != nil {
		t.Fatal(err)
	}
	type result struct {
		info runtimeInfo
		err  error
	}
	done := make(chan result, 1)
	go func() {
		info, err := k.waitForRuntime(t.Context())
		done <- result{info, err}
	}()
	select {
	case r := <-done:
		t.Fatalf("did not wait: %+v", r)
	case <-time.After(50 * time.Millisecond):
	}
	(&fakeRuntime{name: "containerd", version: "1.7.0"}).serve(t, path)
	select {
	case r := <-done:
		if r.err != nil || r.info.Version != "1.7.0" {
			t.Errorf("%+v", r)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("never saw the runtime start")
	}
}

func TestWaitForRuntimeGivesUpAtOnceOnOneItCannotUse(t *testing.T) {
	path := socket(t)
	(&fakeRuntime{noCRI: true, version: "1.7.0"}).serve(t, path)
	k, err := New(Config{NodeName: "edge-1", Transport: http.DefaultTransport, RuntimeEndpoint: path})
	if err != nil {
		t.Fatal(err)
	}
	_, err = k.waitForRuntime(t.Context())
	var ce *CheckError
	if !errors.As(err, &ce) || len(ce.Findings) != 1 || !strings.Contains(err.Error(), "disabled_plugins") {
		t.Errorf("error %v", err)
	}
}

func TestWaitForRuntimeEndsWithItsContext(t *testing.T) {
	k, err := New(Config{NodeName: "edge-1", Transport: http.DefaultTransport, RuntimeEndpoint: socket(t)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("terminated"))
	if _, err := k.waitForRuntime(ctx); err == nil || !strings.Contains(err.Error(), "terminated") {
		t.Errorf("error %v", err)
	}
}

func TestOlderThan(t *testing.T) {
	for v, want := range map[string]bool{
		"1.6.20~ds1": false, "v1.6.0": false, "1.5.18": true, "v2.0.1": false, "2.1.0-rc.1": false,
		"1.6.0-beta": false, "1.4.13~ds1-1": true, "unknown": false, "": false,
	} {
		if got := olderThan(v, oldestContainerd); got != want {
			t.Errorf("%q: %v", v, got)
		}
	}
}

func FuzzRuntimeConfig(f *testing.F) {
	f.Add(`{"containerd":{"defaultRuntimeName":"runc","runtimes":{"runc":{"options":{"SystemdCgroup":true}}}}}`)
	f.Add(`{"containerd":{"runtimes":{"runc":null}}}`)
	f.Fuzz(func(t *testing.T, config string) { systemdCgroupIn(config) })
}
