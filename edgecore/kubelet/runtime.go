package kubelet

import "context"

type runtimeInfo struct {
	Name, Version string
	SystemdCgroup bool
}

func (k *Kubelet) waitForRuntime(ctx context.Context) (runtimeInfo, error) { return runtimeInfo{}, nil }

func cgroupDriver(configured string, runtime runtimeInfo) string {
	if configured != "" {
		return configured
	}
	if runtime.SystemdCgroup {
		return "systemd"
	}
	return "cgroupfs"
}
