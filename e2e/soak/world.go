package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/skerry-io/skerry/e2e/cluster"
	"github.com/skerry-io/skerry/e2e/image"
)

// namespace holds all that churns.
const namespace = "soak"

// soak is one run.
type soak struct {
	cfg   config
	dir   string
	hub   *cluster.Hub
	nodes []*edge
	rest  *rest.Config
	cloud kubernetes.Interface
	t     *tally
	book  *book
	began time.Time

	// gate is held, shared, by each fault and each step of the churn, and alone
	// by what looks at a system at rest.
	gate sync.RWMutex
	// hubFaults counts beginnings and ends: it is odd while a fault of the hub
	// lasts.
	hubFaults atomic.Int64
	hubPID    atomic.Int64 // zero while it is not meant to run

	gaugesMu sync.Mutex
	gauges   map[string]*gauge // by program or node
}

// edge is an edge node. Its actions are one fault's at a time.
type edge struct {
	*cluster.Node
	admin *http.Client

	mu  sync.Mutex
	up  bool         // edgecore is meant to run
	pid atomic.Int64 // edgecore's on the host; zero while it is not up
}

func newSoak(ctx context.Context, cfg config) (_ *soak, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("this makes namespaces and containers: run it as root")
	}
	programs, err := cluster.FindPrograms()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "skerry-soak-")
	if err != nil {
		return nil, err
	}
	s := &soak{cfg: cfg, dir: dir, t: newTally(cfg.verbose), book: newBook(), began: time.Now(), gauges: map[string]*gauge{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.takeDown())
		}
	}()
	var images []string
	for _, build := range []func(context.Context, string) (string, error){image.Pause, image.Demo} {
		tar, err := build(ctx, filepath.Join(dir, "images"))
		if err != nil {
			return nil, err
		}
		images = append(images, tar)
	}
	var names []string
	for _, name := range []string{"edge-1", "edge-2"} {
		n, err := cluster.NewNode(cluster.NodeConfig{Dir: filepath.Join(dir, name), Name: name, Programs: programs, Images: images})
		if err != nil {
			return nil, err
		}
		s.nodes = append(s.nodes, &edge{Node: n, admin: n.AdminClient()})
		names = append(names, n.HostIP())
	}
	if s.hub, err = cluster.NewHub(cluster.HubConfig{Dir: filepath.Join(dir, "hub"), Programs: programs, Names: names}); err != nil {
		return nil, err
	}
	if err := s.startHub(ctx); err != nil {
		return nil, err
	}
	if s.rest, err = s.hub.RESTConfig(); err != nil {
		return nil, err
	}
	s.rest.Timeout = 15 * time.Second
	if s.cloud, err = kubernetes.NewForConfig(s.rest); err != nil {
		return nil, err
	}
	for _, n := range s.nodes {
		if err := n.Boot(ctx); err != nil {
			return nil, err
		}
		if err := n.Join(ctx, s.hub); err != nil {
			return nil, err
		}
		if err := n.runEdgecore(ctx); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// run goes on until the time is over, and leaves the cluster empty.
func (s *soak) run(ctx context.Context) error {
	if err := s.makeWorkloads(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watchers, watching := errgroup.WithContext(ctx)
	for _, n := range s.nodes {
		watchers.Go(func() error { return s.watchNode(watching, n) })
	}
	watchers.Go(func() error { return s.watchPods(watching) })
	watchers.Go(func() error { return s.measure(watching) })
	// What ends a watcher ends the run, too.
	err := s.rounds(watching)
	if err == nil {
		err = s.emptyOut(watching)
	}
	cancel()
	if werr := watchers.Wait(); !errors.Is(werr, context.Canceled) {
		err = errors.Join(werr, err)
	}
	return err
}

// rounds lets churn and faults run, with a look at the system at rest every
// few minutes and at the end.
func (s *soak) rounds(ctx context.Context) error {
	if err := s.atRest(ctx, "at the start"); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	random := func(n uint64) *rand.Rand { return rand.New(rand.NewPCG(s.cfg.seed, n)) }
	loops, running := errgroup.WithContext(ctx)
	loops.Go(func() error { return s.churn(running, random(1)) })
	loops.Go(func() error { return s.hubFaultLoop(running, random(2)) })
	for i, n := range s.nodes {
		loops.Go(func() error { return s.nodeFaultLoop(running, n, random(uint64(10+i))) })
	}
	end := time.Now().Add(s.cfg.time)
	round := min(s.cfg.time/3, 3*time.Minute)
	for n := 1; ; n++ {
		if !pause(running, min(round, time.Until(end))) {
			break
		}
		if err := s.atRest(running, fmt.Sprintf("after round %d", n)); err != nil {
			break
		}
		if !time.Now().Before(end) {
			break
		}
	}
	cancel()
	if err := loops.Wait(); !errors.Is(err, context.Canceled) && err != nil {
		return err
	}
	return nil
}

// takeDown ends all that newSoak has started. When a promise was broken it
// keeps the logs.
func (s *soak) takeDown() error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var errs []error
	if len(s.t.violations) > 0 {
		errs = append(errs, s.keepLogs())
	}
	for _, n := range s.nodes {
		errs = append(errs, n.Destroy(ctx))
	}
	if s.hub != nil && s.hub.Running() {
		errs = append(errs, s.hub.Stop(ctx))
	}
	return errors.Join(append(errs, os.RemoveAll(s.dir))...)
}

func (s *soak) keepLogs() error {
	dir := filepath.Join("bin", fmt.Sprintf("soak-%d", s.cfg.seed))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	logs := map[string]string{}
	if s.hub != nil {
		logs["cloudhub.log"] = s.hub.LogPath()
	}
	for _, n := range s.nodes {
		logs[n.Name()+".log"] = n.LogPath()
		logs[n.Name()+"-containerd.log"] = n.Disk("/var/log/containerd.log")
	}
	for name, from := range logs {
		if err := copyFile(from, filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	fmt.Fprintln(os.Stderr, "soak: logs kept in", dir)
	return nil
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// runEdgecore starts edgecore. The caller holds mu, or is alone.
func (n *edge) runEdgecore(ctx context.Context) error {
	if err := n.Run(ctx); err != nil {
		return err
	}
	pid, err := n.EdgecoreHostPID()
	if err != nil {
		return err
	}
	n.up = true
	n.pid.Store(int64(pid))
	return nil
}

// down notes that edgecore is not meant to run. The caller holds mu.
func (n *edge) down() {
	n.up = false
	n.pid.Store(0)
}

func nodeReady(n *corev1.Node) bool {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// pause returns false when ctx ends first.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// between returns a random duration.
func between(r *rand.Rand, from, to time.Duration) time.Duration {
	return from + time.Duration(r.Int64N(int64(to-from)+1))
}

// emptyOut deletes all workloads and waits until nothing of them is left, on
// the nodes neither.
func (s *soak) emptyOut(ctx context.Context) error {
	s.gate.Lock()
	defer s.gate.Unlock()
	for _, n := range s.nodes {
		if err := os.RemoveAll(s.staticFile(n)); err != nil {
			return err
		}
	}
	s.book.allDeleted()
	if err := s.cloud.CoreV1().Namespaces().Delete(ctx, namespace, metav1.DeleteOptions{}); err != nil {
		return err
	}
	began := time.Now()
	err := s.await(ctx, 3*time.Minute, func(ctx context.Context) string {
		list, err := s.cloud.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err.Error()
		}
		if len(list.Items) > 0 {
			return fmt.Sprintf("%d pods in the cloud, among them %s", len(list.Items), list.Items[0].Name)
		}
		for _, n := range s.nodes {
			sandboxes, err := s.sandboxes(ctx, n)
			if err != nil {
				return err.Error()
			}
			if len(sandboxes) > 0 {
				return fmt.Sprintf("%d sandboxes on %s", len(sandboxes), n.Name())
			}
			st, err := n.StatusBySocket(ctx)
			if err != nil {
				return err.Error()
			}
			if st.Outbox > 0 {
				return fmt.Sprintf("%s has %d changes to send", n.Name(), st.Outbox)
			}
		}
		return ""
	})
	if err != nil {
		s.t.violate("the end: all workloads were deleted, and %v", err)
	}
	s.t.note("all workloads deleted and ended in %s", time.Since(began).Round(100*time.Millisecond))
	return nil
}

// await asks what is missing until nothing is.
func (s *soak) await(ctx context.Context, within time.Duration, missing func(context.Context) string) error {
	limited, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	last := "nothing asked"
	for {
		m := missing(limited)
		if m == "" {
			return nil
		}
		if limited.Err() == nil {
			last = m
		}
		if !pause(limited, 250*time.Millisecond) {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return fmt.Errorf("after %s: %s", within, last)
		}
	}
}
