package e2e

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"k8s.io/apimachinery/pkg/types"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/e2e/cluster"
)

// inspector sees a node's containers as its containerd does, whatever edgecore
// and the cloud say.
type inspector struct{ cri cri.RuntimeServiceClient }

// instance is a container; the pods here have one each.
type instance struct {
	pod      string
	uid      types.UID
	id       string
	sandbox  string
	restarts int
}

// inspect looks into a machine until it is powered off.
func inspect(t *testing.T, n *cluster.Node) *inspector {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+n.ContainerdSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &inspector{cri.NewRuntimeServiceClient(conn)}
}

// list returns the namespace's containers in that state, the oldest first.
func (i *inspector) list(ctx context.Context, ns string, state cri.ContainerState) ([]instance, error) {
	resp, err := i.cri.ListContainers(ctx, &cri.ListContainersRequest{Filter: &cri.ContainerFilter{
		State: &cri.ContainerStateValue{State: state}, LabelSelector: map[string]string{"io.kubernetes.pod.namespace": ns}}})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(resp.Containers, func(a, b *cri.Container) int { return int(a.CreatedAt - b.CreatedAt) })
	var all []instance
	for _, c := range resp.Containers {
		restarts, err := strconv.Atoi(c.Annotations["io.kubernetes.container.restartCount"])
		if err != nil {
			return nil, err
		}
		all = append(all, instance{c.Labels["io.kubernetes.pod.name"], types.UID(c.Labels["io.kubernetes.pod.uid"]), c.Id, c.PodSandboxId, restarts})
	}
	return all, nil
}

// running returns the running containers by their pods' names. A pod with two
// is an error.
func (i *inspector) running(ctx context.Context, ns string) (map[string]instance, error) {
	all, err := i.list(ctx, ns, cri.ContainerState_CONTAINER_RUNNING)
	byPod := map[string]instance{}
	for _, c := range all {
		if twin, ok := byPod[c.pod]; ok {
			return nil, fmt.Errorf("pod %s runs twice: %+v and %+v", c.pod, twin, c)
		}
		byPod[c.pod] = c
	}
	return byPod, err
}

func (i *inspector) sandboxes(ctx context.Context, ns string) ([]*cri.PodSandbox, error) {
	resp, err := i.cri.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{
		State: &cri.PodSandboxStateValue{State: cri.PodSandboxState_SANDBOX_READY}, LabelSelector: map[string]string{"io.kubernetes.pod.namespace": ns}}})
	return resp.GetItems(), err
}

func (i *inspector) status(t *testing.T, id string) *cri.ContainerStatus {
	t.Helper()
	resp, err := i.cri.ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		t.Fatal(err)
	}
	return resp.Status
}

func (i *inspector) awaitRunning(t *testing.T, ns string, count int) map[string]instance {
	t.Helper()
	var now map[string]instance
	eventually(t, 2*time.Minute, fmt.Sprintf("%d pods to run on the node", count), func(ctx context.Context) (bool, string) {
		var err error
		now, err = i.running(ctx, ns)
		return err == nil && len(now) == count, fmt.Sprint(len(now), err)
	})
	return now
}

// awaitExit waits for a container's end and returns when that was.
func (i *inspector) awaitExit(t *testing.T, c instance) (at time.Time) {
	t.Helper()
	eventually(t, 30*time.Second, "the container of "+c.pod+" to end", func(ctx context.Context) (bool, string) {
		resp, err := i.cri.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: c.id})
		if err != nil {
			return false, err.Error()
		}
		at = time.Unix(0, resp.Status.FinishedAt)
		return resp.Status.State == cri.ContainerState_CONTAINER_EXITED, resp.Status.State.String()
	})
	return at
}

// sample watches a pod's name on the node until the function it returns, which
// tells the UIDs that ran, in order, and whether two ever ran at once.
func (i *inspector) sample(t *testing.T, ns, pod string) (stop func() (order []types.UID, twice error)) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	var order []types.UID
	var twice error
	go func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for ctx.Err() == nil {
			all, err := i.list(ctx, ns, cri.ContainerState_CONTAINER_RUNNING)
			if err != nil && ctx.Err() == nil {
				done <- err
				return
			}
			all = slices.DeleteFunc(all, func(c instance) bool { return c.pod != pod })
			if len(all) > 1 && twice == nil {
				twice = fmt.Errorf("pod %s runs twice: %+v", pod, all)
			}
			for _, c := range all {
				if !slices.Contains(order, c.uid) {
					order = append(order, c.uid)
				}
			}
			select {
			case <-ctx.Done():
			case <-tick.C:
			}
		}
		done <- nil
	}()
	return func() ([]types.UID, error) {
		t.Helper()
		cancel()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		return order, twice
	}
}

// file reads a file in a container, through containerd: it needs no network.
func (i *inspector) file(ctx context.Context, c instance, path string) (string, error) {
	resp, err := i.cri.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: c.id, Cmd: []string{"/bin/cat", path}, Timeout: 10})
	if err != nil {
		return "", err
	}
	if resp.ExitCode != 0 {
		return "", fmt.Errorf("cat %s: exit %d: %s", path, resp.ExitCode, resp.Stderr)
	}
	return string(resp.Stdout), nil
}

func mustRun(t *testing.T, eye *inspector, ns string) map[string]instance {
	t.Helper()
	now, err := eye.running(t.Context(), ns)
	if err != nil {
		t.Fatal(err)
	}
	return now
}

func startTimes(t *testing.T, eye *inspector, all map[string]instance) (first, last time.Time) {
	t.Helper()
	for _, c := range all {
		at := time.Unix(0, eye.status(t, c.id).StartedAt)
		if first.IsZero() || at.Before(first) {
			first = at
		}
		if at.After(last) {
			last = at
		}
	}
	return first, last
}

func sameContainers(a, b map[string]instance) bool {
	if len(a) != len(b) {
		return false
	}
	for name, c := range a {
		if b[name].id != c.id {
			return false
		}
	}
	return true
}
