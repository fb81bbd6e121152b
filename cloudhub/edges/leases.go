package edges

import (
	"context"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"time"

	"golang.org/x/sync/errgroup"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/cloudhub/presence"
)

const (
	leaseNamespace = corev1.NamespaceNodeLease

	// A kubelet renews its Lease every 10 s and gives it 40 s
	// (pkg/kubelet/apis/config/v1beta1/defaults.go). The hub does it for the
	// nodes it is connected to, so that no heartbeat crosses the link.
	leaseSeconds = 40
	renewEvery   = 10 * time.Second

	// wheel spreads the renewals of all nodes over the interval.
	wheel = 10

	// late is how much later than promised a node may be heard: its ping may
	// have to be sent again on a bad link.
	late = 10 * time.Second

	// renewAtOnce bounds the requests in flight: 1,000 nodes are 100 requests
	// a second in groups of this size.
	renewAtOnce = 16
)

// renewLeases renews until ctx ends. A node's share of the wheel follows from
// its name, so that one tick costs what it renews.
func (e *Edges) renewLeases(ctx context.Context) {
	tick := time.NewTicker(renewEvery / wheel)
	defer tick.Stop()
	for slot := 0; ; slot = (slot + 1) % wheel {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		var g errgroup.Group
		g.SetLimit(renewAtOnce)
		for _, n := range e.due(slot) {
			g.Go(func() error {
				ctx, cancel := context.WithTimeout(ctx, renewEvery/2)
				defer cancel()
				now := e.now()
				if err := e.renewLease(ctx, n.name, now, e.cfg.Presence.LastSync(n.name, n.heard(now))); err != nil && ctx.Err() == nil {
					e.log.Warn("lease not renewed", "node", n.name, "err", err)
				}
				return nil
			})
		}
		_ = g.Wait() // its functions return nil
	}
}

// due returns the connected nodes of a slot, and those that just connected: a
// node that is back must not stay NotReady for a turn of the wheel. A node that
// was not heard when it promised to be is left out, though its tunnel may stay
// for several times that, as it may be heard again. Of the idle link of a node
// that died this is all that there is to see.
func (e *Edges) due(slot int) []*edge {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := e.now()
	var out []*edge
	for _, n := range e.nodes {
		if slotOf(n.name) == slot || now.Sub(n.since) < 2*renewEvery/wheel {
			if e.heardInTimeLocked(n, now) {
				out = append(out, n)
			}
		}
	}
	return out
}

// heardInTimeLocked tells whether the node keeps its promise, and tells Presence
// when that changes.
func (e *Edges) heardInTimeLocked(n *edge, now time.Time) bool {
	heard, within := n.pulse()
	// Before its greeting a node has promised nothing, and is cut off soon.
	silent := within > 0 && now.Sub(heard) > within+late
	switch {
	case silent && !n.silent:
		e.log.Warn("node is silent", "node", n.name, "heard", heard, "promised", within)
		e.cfg.Presence.Away(n.name, presence.Absence{
			Heard: heard, Reason: presence.ReasonSilent,
			Message: fmt.Sprintf("it was to be heard again within %s; its tunnel is still up", within.Round(time.Second)),
		})
	case !silent && n.silent:
		e.log.Info("silent node is heard again", "node", n.name)
		e.cfg.Presence.Heard(n.name)
	}
	n.silent = silent
	return !silent
}

func (n *edge) heard(now time.Time) time.Time {
	if heard, _ := n.pulse(); !heard.IsZero() {
		return heard
	}
	return now
}

func slotOf(name string) int {
	h := fnv.New32a()
	h.Write([]byte(name))
	return int(h.Sum32() % wheel)
}

// renewLease also tells when the node was last in step, which costs no write of
// its own and outlives the hub.
func (e *Edges) renewLease(ctx context.Context, node string, at, synced time.Time) error {
	leases := e.cfg.Client.CoordinationV1().Leases(leaseNamespace)
	now := metav1.NewMicroTime(at)
	change := map[string]any{"spec": map[string]any{"renewTime": now, "holderIdentity": node}}
	if !synced.IsZero() {
		change["metadata"] = map[string]any{"annotations": map[string]string{presence.LastSync: synced.UTC().Format(time.RFC3339)}}
	}
	patch, err := json.Marshal(change)
	if err != nil {
		return err
	}
	_, err = leases.Patch(ctx, node, types.MergePatchType, patch, metav1.PatchOptions{})
	if !apierrors.IsNotFound(err) {
		return err
	}
	// The Lease goes when its Node goes, as the kubelet's does.
	owner, err := e.cfg.Client.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil // not registered yet
	}
	if err != nil {
		return fmt.Errorf("read the Node that owns the lease: %w", err)
	}
	seconds := int32(leaseSeconds)
	_, err = leases.Create(ctx, &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{
			Name: node, Namespace: leaseNamespace,
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: node, UID: owner.UID}},
		},
		Spec: coordinationv1.LeaseSpec{HolderIdentity: &node, LeaseDurationSeconds: &seconds, RenewTime: &now},
	}, metav1.CreateOptions{})
	return err
}
