package enroll

import (
	"context"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	coreinformers "k8s.io/client-go/informers/core/v1"
	"k8s.io/client-go/tools/cache"
)

// index is what this replica knows of the nodes without asking. The virtual
// CIDR bounds it: a node without an address is not on record.
type index struct {
	mu     sync.RWMutex
	nodes  map[string]indexed
	byIP   map[netip.Addr]string
	claims map[netip.Addr]string // address -> node it was claimed for
}

type indexed struct {
	rec     NodeRecord
	version uint64
}

// loss is an identity that lost its standing.
type loss struct {
	rec NodeRecord
	why RevokeReason
}

func newIndex() *index {
	return &index{nodes: map[string]indexed{}, byIP: map[netip.Addr]string{}, claims: map[netip.Addr]string{}}
}

func (x *index) node(name string) (NodeRecord, bool) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	n, ok := x.nodes[name]
	return n.rec, ok
}

func (x *index) nodeByIP(ip netip.Addr) (string, bool) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	name, ok := x.byIP[ip]
	return name, ok
}

func (x *index) addressTaken(ip netip.Addr) bool {
	x.mu.RLock()
	defer x.mu.RUnlock()
	_, node := x.byIP[ip]
	_, claim := x.claims[ip]
	return node || claim
}

// put takes a record in unless a younger one is known.
func (x *index) put(rec NodeRecord, resourceVersion string) *loss {
	version := parseVersion(resourceVersion)
	x.mu.Lock()
	defer x.mu.Unlock()
	old, known := x.nodes[rec.Name]
	if known && version != 0 && version < old.version {
		return nil
	}
	x.nodes[rec.Name] = indexed{rec, version}
	if known && old.rec.VirtualIP != rec.VirtualIP {
		x.forgetAddressLocked(old.rec)
	}
	x.byIP[rec.VirtualIP] = rec.Name
	switch {
	case known && old.rec.Enrollment != rec.Enrollment:
		return &loss{old.rec, Replaced}
	case known && !old.rec.Revoked() && rec.Revoked():
		return &loss{rec, Revoked}
	}
	return nil
}

func (x *index) remove(name string) *loss {
	x.mu.Lock()
	defer x.mu.Unlock()
	old, known := x.nodes[name]
	if !known {
		return nil
	}
	delete(x.nodes, name)
	x.forgetAddressLocked(old.rec)
	return &loss{old.rec, Forgotten}
}

func (x *index) forgetAddressLocked(rec NodeRecord) {
	if x.byIP[rec.VirtualIP] == rec.Name {
		delete(x.byIP, rec.VirtualIP)
	}
}

func (x *index) putClaim(ip netip.Addr, node string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.claims[ip] = node
}

func (x *index) removeClaim(ip netip.Addr) {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.claims, ip)
}

// addresses returns every claimed or used address.
func (x *index) addresses() []netip.Addr {
	x.mu.RLock()
	defer x.mu.RUnlock()
	all := make([]netip.Addr, 0, len(x.claims))
	for ip := range x.claims {
		all = append(all, ip)
	}
	for ip := range x.byIP {
		if _, ok := x.claims[ip]; !ok {
			all = append(all, ip)
		}
	}
	return all
}

// parseVersion reads a resourceVersion, 0 if it is none. Versions of one
// resource may be compared since Kubernetes 1.35.
func parseVersion(s string) uint64 {
	v, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0
	}
	return v
}

// watch fills the index and keeps it current until ctx ends.
func (e *Enroll) watch(ctx context.Context) error {
	informer := coreinformers.NewFilteredSecretInformer(e.cfg.Client, e.cfg.Namespace, 0, cache.Indexers{},
		func(o *metav1.ListOptions) { o.LabelSelector = labelKind + " in (" + kindNode + "," + kindIP + ")" })
	if err := informer.SetTransform(stripManagedFields); err != nil {
		return fmt.Errorf("enroll: watch nodes: %w", err)
	}
	handler, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { e.sawSecret(obj) },
		UpdateFunc: func(_, obj any) { e.sawSecret(obj) },
		DeleteFunc: func(obj any) { e.sawDeletion(obj) },
	})
	if err != nil {
		return fmt.Errorf("enroll: watch nodes: %w", err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		informer.RunWithContext(ctx)
	}()
	if cache.WaitForCacheSync(ctx.Done(), handler.HasSynced) {
		e.pool.startAfter(e.index.addresses())
		e.syncOnce.Do(func() { close(e.synced) })
	}
	<-done
	return nil
}

// stripManagedFields keeps the informer's copies small.
func stripManagedFields(obj any) (any, error) {
	if m, err := meta.Accessor(obj); err == nil {
		m.SetManagedFields(nil)
	}
	return obj, nil
}

func (e *Enroll) sawSecret(obj any) {
	secret, ok := obj.(*corev1.Secret)
	if !ok {
		return
	}
	switch secret.Type {
	case typeNode:
		rec, err := decodeNode(secret)
		if err != nil {
			e.log.Error("a node's record cannot be read; the node is kept out until it is repaired or forgotten", "error", err)
			return
		}
		e.learn(rec, secret.ResourceVersion)
	case typeIP:
		if ip, ok := claimedAddress(secret.Name); ok {
			e.index.putClaim(ip, string(secret.Data[ipField]))
		}
	}
}

func (e *Enroll) sawDeletion(obj any) {
	if unknown, ok := obj.(cache.DeletedFinalStateUnknown); ok {
		obj = unknown.Obj
	}
	secret, ok := obj.(*corev1.Secret)
	if !ok {
		return
	}
	switch secret.Type {
	case typeNode:
		e.unlearn(strings.TrimPrefix(secret.Name, nodePrefix))
	case typeIP:
		if ip, ok := claimedAddress(secret.Name); ok {
			e.index.removeClaim(ip)
		}
	}
}

// learn and unlearn bring the index up to date and tell who lost standing.
func (e *Enroll) learn(rec NodeRecord, resourceVersion string) {
	e.announce(e.index.put(rec, resourceVersion))
}

func (e *Enroll) unlearn(name string) { e.announce(e.index.remove(name)) }

func (e *Enroll) announce(l *loss) {
	if l == nil {
		return
	}
	e.log.Info("node lost its standing", "node", l.rec.Name, "why", string(l.why), "enrollment", l.rec.Enrollment)
	if e.cfg.OnRevoked != nil {
		e.cfg.OnRevoked(l.rec, l.why)
	}
}
