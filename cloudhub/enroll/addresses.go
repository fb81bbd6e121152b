package enroll

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// ipPool proposes virtual IPs in rotation, so that an address given back is
// the last to be given out again: a stale Node object may still carry it, and
// the API server would reach another node's kubelet through it.
type ipPool struct {
	prefix netip.Prefix
	size   uint64 // usable addresses: all but the first and the last

	mu     sync.Mutex
	cursor uint64 // offset last proposed, 1..size
}

// maxPool bounds the rotation where the CIDR does not (IPv6).
const maxPool = 1 << 24

func newIPPool(prefix netip.Prefix) *ipPool {
	size := uint64(maxPool)
	if bits := prefix.Addr().BitLen() - prefix.Bits(); bits < 24 {
		size = 1<<bits - 2
	}
	return &ipPool{prefix: prefix, size: size}
}

// startAfter sets the rotation behind the highest address in use.
func (p *ipPool) startAfter(used []netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, ip := range used {
		if off, ok := p.offset(ip); ok && off > p.cursor {
			p.cursor = off
		}
	}
}

// next proposes an address that taken does not know, if there is one.
func (p *ipPool) next(taken func(netip.Addr) bool) (netip.Addr, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for range p.size {
		p.cursor = p.cursor%p.size + 1
		if ip := p.at(p.cursor); !taken(ip) {
			return ip, true
		}
	}
	return netip.Addr{}, false
}

func (p *ipPool) at(offset uint64) netip.Addr {
	b := p.prefix.Addr().AsSlice()
	for i := len(b) - 1; offset > 0; i-- {
		offset += uint64(b[i])
		b[i] = byte(offset)
		offset >>= 8
	}
	ip, _ := netip.AddrFromSlice(b)
	return ip
}

func (p *ipPool) offset(ip netip.Addr) (uint64, bool) {
	if !p.prefix.Contains(ip) {
		return 0, false
	}
	var off uint64
	a, b := ip.AsSlice(), p.prefix.Addr().AsSlice()
	for i := range a {
		off = off<<8 | uint64(a[i]^b[i]) // the prefix is masked: no borrow
	}
	return off, off >= 1 && off <= p.size
}

// claimAddress reserves a virtual IP for node across all replicas: the claim
// is an object named after the address, so that only one can be created.
func (e *Enroll) claimAddress(ctx context.Context, node string) (netip.Addr, error) {
	for {
		ip, ok := e.pool.next(e.index.addressTaken)
		if !ok {
			e.log.Error("no virtual IP is free; forget nodes that are gone or give a larger virtual CIDR", "cidr", e.cfg.VirtualCIDR.String())
			return ip, refuse(edgeapi.JoinUnavailable, "the hub has no virtual IP left in %s", e.cfg.VirtualCIDR)
		}
		_, err := e.secrets.Create(ctx, &corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{Name: claimName(ip), Labels: map[string]string{labelKind: kindIP}},
			Type:       typeIP,
			Data:       map[string][]byte{ipField: []byte(node)},
		}, metav1.CreateOptions{})
		switch {
		case err == nil:
			e.index.putClaim(ip, node)
			return ip, nil
		case apierrors.IsAlreadyExists(err):
			// Another replica was quicker; its claim is on its way here.
			e.index.putClaim(ip, "")
		default:
			return ip, &unavailable{"claim a virtual IP", err}
		}
	}
}

// releaseAddress gives back node's claim, which no record rests on any more.
func (e *Enroll) releaseAddress(ctx context.Context, ip netip.Addr, node string) error {
	claim, err := e.secrets.Get(ctx, claimName(ip), metav1.GetOptions{})
	if err == nil {
		if string(claim.Data[ipField]) != node {
			return nil
		}
		err = e.secrets.Delete(ctx, claim.Name, deleteExactly(claim))
	}
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("release virtual IP %s: %w", ip, err)
	}
	e.index.removeClaim(ip)
	return nil
}

// claimName is the name of an address's claim; IPv6 is spelt out with dashes,
// as object names have no colons.
func claimName(ip netip.Addr) string {
	return ipPrefix + strings.ReplaceAll(ip.StringExpanded(), ":", "-")
}

func claimedAddress(secretName string) (netip.Addr, bool) {
	ip, err := netip.ParseAddr(strings.ReplaceAll(strings.TrimPrefix(secretName, ipPrefix), "-", ":"))
	return ip, err == nil
}

// NodeByIP returns the node a virtual IP belongs to.
func (e *Enroll) NodeByIP(ip netip.Addr) (name string, ok bool) { return e.index.nodeByIP(ip) }

// IPOf returns a node's virtual IP.
func (e *Enroll) IPOf(name string) (netip.Addr, bool) {
	rec, ok := e.index.node(name)
	return rec.VirtualIP, ok
}
