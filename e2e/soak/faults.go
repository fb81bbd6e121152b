package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/e2e/machine"
	"github.com/skerry-io/skerry/e2e/netem"
)

// A fault breaks something, waits and mends it.
type fault struct {
	name   string
	weight int
	do     func(ctx context.Context, hold time.Duration) error
}

// syncWithin is how long a node may take to be in step again after its fault
// has ended; the backoff's longest step is 30 s.
const syncWithin = 90 * time.Second

// nodeFaultLoop lets one node meet one fault after another.
func (s *soak) nodeFaultLoop(ctx context.Context, n *edge, r *rand.Rand) error {
	faults := s.nodeFaults(n, r)
	for {
		if !pause(ctx, between(r, 3*time.Second, 25*time.Second)) {
			return ctx.Err()
		}
		if err := s.nodeFault(ctx, n, pick(r, faults), holdTime(r)); err != nil {
			return err
		}
	}
}

// nodeFault is done once it has begun: what it broke is mended even when ctx
// ends.
func (s *soak) nodeFault(ctx context.Context, n *edge, f fault, hold time.Duration) error {
	s.gate.RLock()
	defer s.gate.RUnlock()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	whole := context.WithoutCancel(ctx)
	s.t.saidf("%s: %s for %s", n.Name(), f.name, hold.Round(100*time.Millisecond))
	s.checkEdgecore(n)
	if err := f.do(whole, hold); err != nil {
		return fmt.Errorf("%s: %s: %w", n.Name(), f.name, err)
	}
	if err := s.unbroken(whole, n); err != nil {
		return fmt.Errorf("%s: after %s: %w", n.Name(), f.name, err)
	}
	mended, hubFaults := time.Now(), s.hubFaults.Load()
	probed := false
	err := s.await(whole, syncWithin, func(ctx context.Context) string {
		// A change for the node tells a link that carries from one that is only
		// believed to.
		if !probed {
			if err := s.changeNode(ctx, n); err != nil {
				return err.Error()
			}
			probed = true
		}
		st, err := n.StatusBySocket(ctx)
		switch {
		case err != nil:
			return err.Error()
		case !st.Connected || !st.Synced || st.LastSync.Before(mended):
			return fmt.Sprintf("connected %t, synced %t, last sync %s, last error %q", st.Connected, st.Synced, st.LastSync.Format(time.TimeOnly), st.LastError)
		}
		return ""
	})
	took := time.Since(mended)
	switch {
	case hubFaults%2 == 1 || s.hubFaults.Load() != hubFaults:
		took = 0 // the hub was away meanwhile: the time tells nothing
	case err != nil:
		s.t.violate("%s is not in step after %s has ended: %v", n.Name(), f.name, err)
		took = 0
	}
	s.t.fault(f.name, took)
	return nil
}

// changeNode gives the cloud something to tell the node.
func (s *soak) changeNode(ctx context.Context, n *edge) error {
	limited, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	_, err := s.cloud.CoreV1().Nodes().Patch(limited, n.Name(), types.MergePatchType,
		fmt.Appendf(nil, `{"metadata":{"annotations":{"soak":%q}}}`, time.Now()), metav1.PatchOptions{})
	return err
}

// unbroken brings the node to where it is at rest, whatever a fault has left.
func (s *soak) unbroken(ctx context.Context, n *edge) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.Running() {
		if err := n.Machine.Start(ctx); err != nil {
			return err
		}
		n.down()
	}
	if err := n.RestoreLink(ctx); err != nil {
		return err
	}
	if !n.up {
		return n.runEdgecore(ctx)
	}
	return nil
}

// checkEdgecore notices that edgecore has ended by itself, and starts it.
func (s *soak) checkEdgecore(n *edge) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.up {
		return
	}
	select {
	case <-n.EdgecoreEnded():
		s.t.violate("%s: edgecore has ended by itself; its log ends with:\n%s", n.Name(), tail(n.LogPath(), 3000))
		n.down()
	default:
	}
}

func (s *soak) nodeFaults(n *edge, r *rand.Rand) []fault {
	link := func(change func(ctx context.Context) error) func(context.Context, time.Duration) error {
		return func(ctx context.Context, hold time.Duration) error {
			n.mu.Lock()
			defer n.mu.Unlock()
			if err := change(ctx); err != nil {
				return err
			}
			pause(ctx, hold)
			return nil
		}
	}
	shape := func(up, down netem.Shape) func(context.Context, time.Duration) error {
		return link(func(ctx context.Context) error { return n.ShapeLink(ctx, up, down, r.Uint64()) })
	}
	lossy := netem.Shape{Loss: 0.3}
	late := netem.Shape{Delay: time.Second}
	thin := netem.Shape{Rate: 8 << 10}
	dead := netem.Shape{Loss: 1}
	return []fault{
		{"link down", 3, link(func(ctx context.Context) error { return n.CutLink(ctx, machine.LinkDown) })},
		{"black hole", 3, link(func(ctx context.Context) error { return n.CutLink(ctx, machine.LinkBlackhole) })},
		{"30 % loss", 2, shape(lossy, lossy)},
		{"2 s latency", 2, shape(late, late)},
		{"8 KiB/s", 1, shape(thin, thin)},
		{"half open, hub hears nothing", 1, shape(dead, netem.Shape{})},
		{"half open, node hears nothing", 1, shape(netem.Shape{}, dead)},
		{"flapping link", 2, func(ctx context.Context, hold time.Duration) error { return s.flap(ctx, n, hold, r) }},
		{"kill -9 edgecore", 4, func(ctx context.Context, hold time.Duration) error {
			return s.restartEdgecore(ctx, n, n.KillEdgecore, hold/4)
		}},
		{"kill -9 edgecore, thrice in a row", 1, func(ctx context.Context, hold time.Duration) error {
			for range 3 {
				if err := s.restartEdgecore(ctx, n, n.KillEdgecore, 0); err != nil {
					return err
				}
				pause(ctx, between(r, 50*time.Millisecond, 4*time.Second))
			}
			return nil
		}},
		{"stop edgecore", 2, func(ctx context.Context, hold time.Duration) error {
			return s.restartEdgecore(ctx, n, n.StopEdgecore, hold/4)
		}},
		{"power cycle", 2, func(ctx context.Context, hold time.Duration) error { return s.powerCycle(ctx, n, hold, false) }},
		{"power cycle, back without a link", 2, func(ctx context.Context, hold time.Duration) error {
			return s.powerCycle(ctx, n, hold, true)
		}},
		{"containerd restart", 2, func(ctx context.Context, hold time.Duration) error {
			n.mu.Lock()
			defer n.mu.Unlock()
			return n.RestartContainerd(ctx)
		}},
		{"link down and kill -9 edgecore", 2, func(ctx context.Context, hold time.Duration) error {
			if err := link(func(ctx context.Context) error { return n.CutLink(ctx, machine.LinkDown) })(ctx, hold/2); err != nil {
				return err
			}
			if err := s.restartEdgecore(ctx, n, n.KillEdgecore, 0); err != nil {
				return err
			}
			pause(ctx, hold/2)
			return nil
		}},
	}
}

func (s *soak) flap(ctx context.Context, n *edge, hold time.Duration, r *rand.Rand) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	for end := time.Now().Add(hold); time.Now().Before(end); {
		if err := n.CutLink(ctx, machine.LinkDown); err != nil {
			return err
		}
		pause(ctx, between(r, 200*time.Millisecond, 5*time.Second))
		if err := n.RestoreLink(ctx); err != nil {
			return err
		}
		pause(ctx, between(r, 200*time.Millisecond, 5*time.Second))
	}
	return nil
}

func (s *soak) restartEdgecore(ctx context.Context, n *edge, end func(context.Context) error, hold time.Duration) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.up {
		limited, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		n.down()
		if err := end(limited); err != nil {
			var exit *machine.ExitStatus
			if !errors.As(err, &exit) {
				return err
			}
			s.t.violate("%s: edgecore ended badly when asked to: %v; its log ends with:\n%s", n.Name(), err, tail(n.LogPath(), 3000))
		}
	}
	pause(ctx, hold)
	return n.runEdgecore(ctx)
}

func (s *soak) powerCycle(ctx context.Context, n *edge, hold time.Duration, cut bool) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.down()
	if err := n.PowerOff(ctx); err != nil {
		return err
	}
	pause(ctx, hold/4)
	if err := n.Machine.Start(ctx); err != nil {
		return err
	}
	if !cut {
		return n.runEdgecore(ctx)
	}
	if err := n.CutLink(ctx, machine.LinkDown); err != nil {
		return err
	}
	if err := n.runEdgecore(ctx); err != nil {
		return err
	}
	pause(ctx, hold)
	return nil
}

// hubFaultLoop does to the hub what is done to nodes, less often.
func (s *soak) hubFaultLoop(ctx context.Context, r *rand.Rand) error {
	faults := []fault{
		{"stop hub", 2, func(ctx context.Context, hold time.Duration) error {
			limited, cancel := context.WithTimeout(ctx, 30*time.Second)
			defer cancel()
			s.hubPID.Store(0)
			if err := s.hub.Stop(limited); err != nil {
				s.t.violate("the hub ended badly when asked to: %v; its log ends with:\n%s", err, tail(s.hub.LogPath(), 3000))
			}
			pause(ctx, hold/3)
			return s.startHub(ctx)
		}},
		{"kill -9 hub", 3, func(ctx context.Context, hold time.Duration) error {
			s.hubPID.Store(0)
			if err := s.hub.Kill(ctx); err != nil {
				return err
			}
			pause(ctx, hold/3)
			return s.startHub(ctx)
		}},
		{"hub stalls", 2, func(ctx context.Context, hold time.Duration) error {
			if err := s.hub.Pause(); err != nil {
				return err
			}
			pause(ctx, hold)
			return s.hub.Resume()
		}},
	}
	for {
		if !pause(ctx, between(r, 30*time.Second, 120*time.Second)) {
			return ctx.Err()
		}
		if err := s.hubOneFault(ctx, pick(r, faults), holdTime(r)); err != nil {
			return err
		}
	}
}

func (s *soak) hubOneFault(ctx context.Context, f fault, hold time.Duration) error {
	s.gate.RLock()
	defer s.gate.RUnlock()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	whole := context.WithoutCancel(ctx)
	s.hubFaults.Add(1)
	defer s.hubFaults.Add(1)
	s.t.saidf("hub: %s for %s", f.name, hold.Round(100*time.Millisecond))
	if !s.hub.Running() {
		s.t.violate("the hub has ended by itself; its log ends with:\n%s", tail(s.hub.LogPath(), 3000))
		if err := s.startHub(whole); err != nil {
			return err
		}
	}
	if err := f.do(whole, hold); err != nil {
		return fmt.Errorf("hub: %s: %w", f.name, err)
	}
	s.t.fault(f.name, 0)
	return nil
}

func (s *soak) startHub(ctx context.Context) error {
	limited, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	err := s.hub.Start(limited)
	if s.hub.Running() {
		s.hubPID.Store(int64(s.hub.PID()))
	}
	return err
}

// holdTime is mostly short; one in eight is long enough for the node to be
// Unknown in the cloud.
func holdTime(r *rand.Rand) time.Duration {
	if r.IntN(8) == 0 {
		return between(r, 55*time.Second, 80*time.Second)
	}
	return between(r, time.Second, 30*time.Second)
}

func pick(r *rand.Rand, faults []fault) fault {
	total := 0
	for _, f := range faults {
		total += f.weight
	}
	at := r.IntN(total)
	for _, f := range faults {
		if at -= f.weight; at < 0 {
			return f
		}
	}
	panic("weights do not add up")
}

// tail is the end of a log.
func tail(path string, n int) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-n):])
}
