package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A container as a node's containerd knows it.
type container struct {
	id, sandbox       string
	key               string // namespace/pod/container
	pod               string
	uid               types.UID
	restarts          int
	running           bool
	started, finished int64     // by containerd, nanoseconds; zero when it is not known
	exit              int32     // once finished
	seen              time.Time // in the latest list
}

func (c container) String() string {
	stamp := func(ns int64) string {
		if ns == 0 {
			return "?"
		}
		return time.Unix(0, ns).UTC().Format("15:04:05.000")
	}
	return fmt.Sprintf("%s uid %s container %.12s restart %d, %s to %s", c.key, c.uid, c.id, c.restarts, stamp(c.started), stamp(c.finished))
}

// runtime asks the containerd of a machine as it runs now.
func (n *edge) runtime(use func(cri.RuntimeServiceClient) error) error {
	if !n.Running() {
		return fmt.Errorf("machine %s is off", n.Name())
	}
	conn, err := grpc.NewClient("unix://"+n.ContainerdSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	return use(cri.NewRuntimeServiceClient(conn))
}

var ofNamespace = map[string]string{"io.kubernetes.pod.namespace": namespace}

func listContainers(ctx context.Context, rt cri.RuntimeServiceClient) ([]container, error) {
	resp, err := rt.ListContainers(ctx, &cri.ListContainersRequest{Filter: &cri.ContainerFilter{LabelSelector: ofNamespace}})
	if err != nil {
		return nil, err
	}
	var all []container
	for _, c := range resp.Containers {
		restarts, err := strconv.Atoi(c.Annotations["io.kubernetes.container.restartCount"])
		if err != nil {
			return nil, fmt.Errorf("container %s: %w", c.Id, err)
		}
		pod := c.Labels["io.kubernetes.pod.name"]
		all = append(all, container{
			id: c.Id, sandbox: c.PodSandboxId, pod: pod, key: namespace + "/" + pod + "/" + c.Labels["io.kubernetes.container.name"],
			uid: types.UID(c.Labels["io.kubernetes.pod.uid"]), restarts: restarts, running: c.State == cri.ContainerState_CONTAINER_RUNNING,
		})
	}
	return all, nil
}

func (s *soak) containers(ctx context.Context, n *edge) (all []container, err error) {
	err = n.runtime(func(rt cri.RuntimeServiceClient) error {
		all, err = listContainers(ctx, rt)
		return err
	})
	return all, err
}

func (s *soak) sandboxes(ctx context.Context, n *edge) (all []*cri.PodSandbox, err error) {
	err = n.runtime(func(rt cri.RuntimeServiceClient) error {
		resp, err := rt.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{
			State: &cri.PodSandboxStateValue{State: cri.PodSandboxState_SANDBOX_READY}, LabelSelector: ofNamespace}})
		all = resp.GetItems()
		return err
	})
	return all, err
}

// readFile reads a file in a container, through containerd.
func (s *soak) readFile(ctx context.Context, n *edge, c container, path string) (text string, err error) {
	err = n.runtime(func(rt cri.RuntimeServiceClient) error {
		resp, err := rt.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: c.id, Cmd: []string{"/bin/cat", path}, Timeout: 10})
		if err == nil && resp.ExitCode != 0 {
			err = fmt.Errorf("cat %s: exit %d: %s", path, resp.ExitCode, resp.Stderr)
		}
		text = string(resp.GetStdout())
		return err
	})
	return text, err
}

// watchNode follows every container of a node. What must hold of them at any
// time: no two of the same pod name and container name run at once, whatever
// their UIDs; restart counts of a pod do not go back; a job's container ends
// well once.
func (s *soak) watchNode(ctx context.Context, n *edge) error {
	known := map[string]*container{}
	for pause(ctx, 300*time.Millisecond) {
		err := n.runtime(func(rt cri.RuntimeServiceClient) error { return s.lookAt(ctx, n, rt, known) })
		if err == nil || ctx.Err() != nil {
			continue
		}
		s.t.count("looks at a node that failed, as it was off or its containerd restarting", 1)
	}
	return ctx.Err()
}

func (s *soak) lookAt(ctx context.Context, n *edge, rt cri.RuntimeServiceClient, known map[string]*container) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	now := time.Now()
	list, err := listContainers(ctx, rt)
	if err != nil {
		return err
	}
	for _, l := range list {
		c := known[l.id]
		if c == nil {
			c = &l
			known[l.id] = c
		}
		c.seen = now
		hadStarted, hadEnded := c.started != 0, c.finished != 0
		if !hadStarted || !l.running && !hadEnded {
			if err := timesOf(ctx, rt, c); err != nil {
				return err
			}
		}
		c.running = l.running && c.finished == 0
		if !hadStarted && c.started != 0 {
			s.t.count("containers started", 1)
			if err := s.checkAgainst(ctx, n, rt, c, known); err != nil {
				return err
			}
		}
		if !hadEnded && c.finished != 0 && c.exit == 0 && strings.HasPrefix(c.pod, "job-") {
			s.book.jobRan(n.Name(), *c, s.t)
		}
	}
	for id, c := range known {
		if now.Sub(c.seen) > 10*time.Minute {
			delete(known, id)
		}
	}
	return nil
}

func timesOf(ctx context.Context, rt cri.RuntimeServiceClient, c *container) error {
	resp, err := rt.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: c.id})
	if err != nil {
		return err
	}
	st := resp.Status
	c.started = st.StartedAt
	if st.State == cri.ContainerState_CONTAINER_EXITED {
		c.finished, c.exit = st.FinishedAt, st.ExitCode
	}
	return nil
}

// checkAgainst compares a container that was just seen to have started with all
// others of its pod's name.
func (s *soak) checkAgainst(ctx context.Context, n *edge, rt cri.RuntimeServiceClient, c *container, known map[string]*container) error {
	for _, o := range known {
		if o.id == c.id || o.key != c.key || o.started == 0 {
			continue
		}
		end := o.finished
		if end == 0 {
			now := *o
			err := timesOf(ctx, rt, &now)
			switch {
			case err == nil && now.finished == 0:
				end = time.Now().UnixNano() // it runs still
			case err == nil:
				end = now.finished
			default:
				end = o.seen.UnixNano() // it is gone: it had ended by then or later
			}
		}
		if overlap(o.started, end, c.started, c.finished) {
			s.t.violate("%s: a pod runs twice at once: %s, and %s", n.Name(), o, c)
		}
		if o.uid == c.uid && o.started < c.started && o.restarts >= c.restarts {
			s.t.violate("%s: the restart count does not grow: %s, then %s", n.Name(), o, c)
		}
	}
	return nil
}

// overlap tells whether two containers ran at the same time. An end of zero is
// still to come.
func overlap(start1, end1, start2, end2 int64) bool {
	return (end1 == 0 || end1 > start2) && (end2 == 0 || end2 > start1)
}

// watchPods follows the pods in the cloud. None may be evicted, nor deleted
// unless the churn has, none may go back to running once it has succeeded, and
// restart counts do not go back.
func (s *soak) watchPods(ctx context.Context) error {
	f := informers.NewSharedInformerFactoryWithOptions(s.cloud, 0, informers.WithNamespace(namespace))
	inf := f.Core().V1().Pods().Informer()
	look := func(p *corev1.Pod, gone bool) {
		for _, c := range p.Status.Conditions {
			if c.Type == corev1.DisruptionTarget && c.Status == corev1.ConditionTrue {
				s.t.violateOnce("evicted "+string(p.UID), "pod %s (uid %s) on %s is evicted: %s: %s", p.Name, p.UID, p.Spec.NodeName, c.Reason, c.Message)
			}
		}
		if p.Status.Reason == "Evicted" {
			s.t.violateOnce("evicted "+string(p.UID), "pod %s (uid %s) on %s is evicted: %s", p.Name, p.UID, p.Spec.NodeName, p.Status.Message)
		}
		if (gone || p.DeletionTimestamp != nil) && strings.HasPrefix(p.Name, "solo-") && !s.book.isDeleted(p.UID) {
			s.t.violateOnce("deleted "+string(p.UID), "pod %s (uid %s) on %s was deleted by nobody here", p.Name, p.UID, p.Spec.NodeName)
		}
	}
	_, err := inf.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(o any) { look(o.(*corev1.Pod), false) },
		UpdateFunc: func(before, after any) {
			a, b := before.(*corev1.Pod), after.(*corev1.Pod)
			look(b, false)
			s.t.count("pod updates seen in the cloud", 1)
			if a.UID != b.UID {
				look(a, true)
				return
			}
			if a.Status.Phase == corev1.PodSucceeded && b.Status.Phase != corev1.PodSucceeded {
				s.t.violate("pod %s (uid %s) was Succeeded and is %s", b.Name, b.UID, b.Status.Phase)
			}
			// A mirror pod may show the static pod that comes after its own for a
			// moment, as the kubelet finds it by name; what a static pod's
			// containers count is checked on its node.
			if b.Annotations[corev1.MirrorPodAnnotationKey] != "" {
				return
			}
			for _, x := range a.Status.ContainerStatuses {
				for _, y := range b.Status.ContainerStatuses {
					if x.Name == y.Name && y.RestartCount < x.RestartCount {
						s.t.violate("pod %s (uid %s): the restart count in the cloud went from %d to %d", b.Name, b.UID, x.RestartCount, y.RestartCount)
					}
				}
			}
		},
		DeleteFunc: func(o any) {
			if gone, ok := o.(cache.DeletedFinalStateUnknown); ok {
				o = gone.Obj
			}
			if p, ok := o.(*corev1.Pod); ok {
				look(p, true)
			}
		},
	})
	if err != nil {
		return err
	}
	f.Start(ctx.Done())
	<-ctx.Done()
	f.Shutdown()
	return ctx.Err()
}
