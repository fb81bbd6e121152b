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
				if err := e.renewLease(ctx, n.name, e.now()); err != nil && ctx.Err() == nil {
					e.log.Warn("lease not renewed", "node", n.name, "err", err)
				}
				return nil
			})
		}
		_ = g.Wait() // its functions return nil
	}
}

// due returns the connected nodes of a slot, and those that just connected: a
// node that is back must not stay NotReady for a turn of the wheel.
func (e *Edges) due(slot int) []*edge {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []*edge
	for _, n := range e.nodes {
		if slotOf(n.name) == slot || e.now().Sub(n.since) < 2*renewEvery/wheel {
			out = append(out, n)
		}
	}
	return out
}

func slotOf(name string) int {
	h := fnv.New32a()
	h.Write([]byte(name))
	return int(h.Sum32() % wheel)
}

func (e *Edges) renewLease(ctx context.Context, node string, at time.Time) error {
	leases := e.cfg.Client.CoordinationV1().Leases(leaseNamespace)
	now := metav1.NewMicroTime(at)
	patch, err := json.Marshal(map[string]any{"spec": map[string]any{"renewTime": now, "holderIdentity": node}})
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
