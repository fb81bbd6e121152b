package edges

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/tunnel"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// DialKubelet opens a connection to the kubelet of the node with that virtual
// IP. The error's text is what the user of kubectl reads.
func (e *Edges) DialKubelet(ctx context.Context, ip string) (net.Conn, error) {
	addr, err := netip.ParseAddr(ip)
	if err != nil {
		return nil, fmt.Errorf("connect to kubelet at %q: %w", ip, err)
	}
	name, ok := e.cfg.Registry.NodeByIP(addr)
	if !ok {
		return nil, fmt.Errorf("no edge node has the address %s: it was forgotten, or its Node object is older than its enrolment", ip)
	}
	return e.Kubelet(ctx, name)
}

// Kubelet opens a connection to a node's kubelet: plain HTTP/1.1 inside the
// tunnel, whose two ends have authenticated each other.
func (e *Edges) Kubelet(ctx context.Context, name string) (net.Conn, error) {
	e.mu.Lock()
	n := e.nodes[name]
	e.mu.Unlock()
	if n == nil {
		return nil, e.notConnected(ctx, name)
	}
	st, err := n.session.Open(ctx, tunnel.OpenRequest{Kind: edgeapi.KindKubelet, Class: tunnel.ClassStream})
	if err != nil {
		if ctx.Err() == nil && n.session.Err() != nil {
			return nil, e.notConnected(ctx, name)
		}
		return nil, fmt.Errorf("open a stream to node %s: %w", name, err)
	}
	return st, nil
}

func (e *Edges) notConnected(ctx context.Context, name string) error {
	seen := e.seen(ctx, name)
	if seen.IsZero() {
		return fmt.Errorf("node %s is not connected (never seen)", name)
	}
	now := e.now()
	layout := "15:04:05"
	if now.Sub(seen) >= 20*time.Hour {
		layout = "2006-01-02 15:04:05"
	}
	return fmt.Errorf("node %s is not connected (last seen %s, %s ago)",
		name, seen.Local().Format(layout), now.Sub(seen).Round(time.Second))
}

// seen returns when the node was last heard. After a restart of the hub that is
// the time of its Lease's last renewal.
func (e *Edges) seen(ctx context.Context, name string) time.Time {
	e.mu.Lock()
	t, ok := e.lastSeen[name]
	e.mu.Unlock()
	if ok {
		return t
	}
	lease, err := e.cfg.Client.CoordinationV1().Leases(leaseNamespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil || lease.Spec.RenewTime == nil {
		return time.Time{}
	}
	return lease.Spec.RenewTime.Time
}
