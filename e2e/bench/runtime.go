package main

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// replica is one pod as the kubelet had the runtime make it.
type replica struct {
	old       string // the sandbox that the power took
	sandbox   *cri.PodSandboxConfig
	container *cri.ContainerConfig
}

// runtimeAlone cuts the power once more and starts the same pods without any
// edgecore, straight at the runtime and all at once: no kubelet can be quicker.
// Of each pod it does what a start after a power cut does: stop the old
// sandbox, make a new one, make and start the container. Volumes are left out.
// It returns how long the first and the last container took, and leaves the
// machine on.
func (w *world) runtimeAlone(ctx context.Context) (first, last time.Duration, err error) {
	replicas, err := w.replicas(ctx)
	if err != nil {
		return 0, 0, fmt.Errorf("the runtime alone: %w", err)
	}
	if err := w.node.PowerOff(ctx); err != nil {
		return 0, 0, err
	}
	if err := w.node.Machine.Start(ctx); err != nil {
		return 0, 0, err
	}
	client, done, err := w.runtime()
	if err != nil {
		return 0, 0, err
	}
	defer done()
	started := make([]time.Duration, len(replicas))
	began := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	for i, r := range replicas {
		g.Go(func() (err error) {
			started[i], err = r.start(ctx, client, began)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return 0, 0, fmt.Errorf("the runtime alone: %w", err)
	}
	first, last = started[0], started[0]
	for _, d := range started {
		first, last = min(first, d), max(last, d)
	}
	return first, last, nil
}

func (r replica) start(ctx context.Context, client cri.RuntimeServiceClient, began time.Time) (time.Duration, error) {
	if _, err := client.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: r.old}); err != nil {
		return 0, err
	}
	r.sandbox.Metadata.Attempt++
	sandbox, err := client.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: r.sandbox})
	if err != nil {
		return 0, err
	}
	r.container.Metadata.Attempt++
	container, err := client.CreateContainer(ctx, &cri.CreateContainerRequest{
		PodSandboxId: sandbox.PodSandboxId, Config: r.container, SandboxConfig: r.sandbox,
	})
	if err != nil {
		return 0, err
	}
	if _, err := client.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: container.ContainerId}); err != nil {
		return 0, err
	}
	status, err := client.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: container.ContainerId})
	if err != nil {
		return 0, err
	}
	return time.Unix(0, status.Status.StartedAt).Sub(began), nil
}

// replicas reads how the pods that run now were made.
func (w *world) replicas(ctx context.Context) ([]replica, error) {
	client, done, err := w.runtime()
	if err != nil {
		return nil, err
	}
	defer done()
	running := &cri.ContainerFilter{State: &cri.ContainerStateValue{State: cri.ContainerState_CONTAINER_RUNNING}}
	list, err := client.ListContainers(ctx, &cri.ListContainersRequest{Filter: running})
	if err != nil {
		return nil, err
	}
	var all []replica
	for _, c := range list.Containers {
		r := replica{old: c.PodSandboxId, sandbox: &cri.PodSandboxConfig{}, container: &cri.ContainerConfig{}}
		sandbox, err := client.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: c.PodSandboxId, Verbose: true})
		if err != nil {
			return nil, err
		}
		if err := configOf(sandbox.Info, r.sandbox); err != nil {
			return nil, err
		}
		container, err := client.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: c.Id, Verbose: true})
		if err != nil {
			return nil, err
		}
		if err := configOf(container.Info, r.container); err != nil {
			return nil, err
		}
		r.container.Mounts = nil // the kubelet's volumes go with the power
		all = append(all, r)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("no container runs")
	}
	return all, nil
}

// configOf takes the configuration out of what containerd tells when asked for
// all.
func configOf(info map[string]string, config any) error {
	told := struct {
		Config any `json:"config"`
	}{config}
	if err := json.Unmarshal([]byte(info["info"]), &told); err != nil {
		return fmt.Errorf("read the runtime's verbose status: %w", err)
	}
	return nil
}

func (w *world) runtime() (cri.RuntimeServiceClient, func() error, error) {
	conn, err := grpc.NewClient("unix://"+w.node.ContainerdSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, err
	}
	return cri.NewRuntimeServiceClient(conn), conn.Close, nil
}
