package drill

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/mount-utils"
)

// The runtime has this long to stop all pods; the drill goes on without.
const stopTimeout = time.Minute

// BeforeKubelet does to the pods what a power loss does, if a drill wants it.
// It has to return before the kubelet starts.
func (m *Manager) BeforeKubelet(ctx context.Context) error {
	m.mu.Lock()
	due := m.state != nil && m.state.Phase == PhaseReboot
	m.mu.Unlock()
	if !due {
		return nil
	}
	err := m.stopPods(ctx)
	if ctx.Err() != nil {
		return nil // the next process does it
	}
	_, now, clockErr := sinceBoot()
	if clockErr != nil {
		return clockErr
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state.Phase, m.state.Restarted, m.state.Until = PhaseWatch, now, now+m.state.Offline
	if err != nil {
		m.state.Problem = err.Error()
		m.log.Error("drill: not all pods were stopped", "err", err)
	}
	// Else a crash from here on would stop the pods once more.
	return save(m.cfg.Path, m.state)
}

// stopPods kills the pods' sandboxes, and with them their containers, and takes
// their mounts.
func (m *Manager) stopPods(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	conn, err := grpc.NewClient(m.cfg.Runtime,
		grpc.WithTransportCredentials(insecure.NewCredentials()), // a unix socket that only root may open
		grpc.WithAuthority("localhost"),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true), grpc.MaxCallRecvMsgSize(16<<20)),
	)
	if err != nil {
		return fmt.Errorf("drill: %w", err)
	}
	defer conn.Close()
	runtime := runtimeapi.NewRuntimeServiceClient(conn)
	list, err := runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{
		State: &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY}}})
	if err != nil {
		return fmt.Errorf("drill: list the pods' sandboxes: %w", err)
	}
	var g errgroup.Group
	g.SetLimit(8)
	for _, s := range list.Items {
		if !m.restarts(s.Metadata.GetNamespace(), s.Metadata.GetName()) {
			continue
		}
		g.Go(func() error {
			if _, err := runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: s.Id}); err != nil {
				return fmt.Errorf("drill: stop the sandbox of pod %s/%s: %w", s.Metadata.Namespace, s.Metadata.Name, err)
			}
			return unmountBelow(filepath.Join(m.cfg.KubeletDir, "pods", s.Metadata.Uid))
		})
	}
	return g.Wait()
}

// restarts tells whether a pod is one to be restarted. Names are looked at and
// not UIDs: a static pod's sandbox has the UID of its manifest.
func (m *Manager) restarts(namespace, name string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.ContainsFunc(m.state.Pods, func(p Pod) bool {
		return p.Namespace == namespace && p.Name == name && p.Skipped == ""
	})
}

// unmountBelow unmounts everything below dir, the innermost first.
func unmountBelow(dir string) error {
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return nil // a pod without volumes
	}
	mounts, err := mount.ParseMountInfo("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("drill: read the mounts: %w", err)
	}
	var points []string
	for _, mnt := range mounts {
		if strings.HasPrefix(mnt.MountPoint, dir+"/") {
			points = append(points, mnt.MountPoint)
		}
	}
	slices.SortFunc(points, func(a, b string) int { return len(b) - len(a) })
	var errs []error
	for _, p := range points {
		err := unix.Unmount(p, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			err = unix.Unmount(p, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		}
		if err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: gone with an outer one
			errs = append(errs, fmt.Errorf("drill: unmount %s: %w", p, err))
		}
	}
	return errors.Join(errs...)
}
