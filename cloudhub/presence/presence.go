package presence

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

const (
	// tellAfter is how long a node must be away to be told of.
	tellAfter = 10 * time.Second

	// writeGap is the least time between two writes of one node's condition.
	writeGap = 15 * time.Second

	// writesPerSecond bounds the writes of all nodes, and the reads of Leases
	// after a restart.
	writesPerSecond = 20

	// grace is how long after the hub's start a node may take to come back
	// before it counts as away: three of the longest pauses between the
	// attempts of a node (tunnel.Backoff).
	grace = 90 * time.Second

	// leaseFresh is how old a Lease may be while somebody still renews it:
	// another replica of the hub, if not this one.
	leaseFresh = 40 * time.Second

	writers = 2

	minRetry = time.Second
	maxRetry = time.Minute
)

// Writer writes a condition of a Node. See upstream.Upstream.
type Writer interface {
	SetNodeCondition(ctx context.Context, node string, uid types.UID, c corev1.NodeCondition) error
}

// Config of a Presence. All but Clock and Log are required.
type Config struct {
	Client kubernetes.Interface // reads Leases
	Writer Writer

	// Nodes is the caller's informer, which the caller runs.
	Nodes cache.SharedIndexInformer

	// Enrolled tells whether a Node is an edge node of this hub. Known is
	// closed once it can tell.
	Enrolled func(node string) bool
	Known    <-chan struct{}

	Clock func() time.Time // nil means time.Now
	Log   *slog.Logger     // nil discards
}

// Presence is told what the nodes do, and tells it on their Nodes. Its methods
// are safe for concurrent use and never block; for one node they are to be
// called in the order in which things happen.
type Presence struct {
	cfg   Config
	log   *slog.Logger
	now   func() time.Time
	limit *rate.Limiter

	writes, failed atomic.Uint64

	mu      sync.Mutex
	started time.Time // of Run; zero before
	queue   workqueue.TypedRateLimitingInterface[string]
	nodes   map[string]*state // those that this hub has seen
}

// state is what this hub knows of a node.
type state struct {
	connected bool
	since     time.Time     // connected: when it greeted
	hello     edgeapi.Hello // its last
	written   int           // what it sent of its outbox since then
	inStep    bool
	synced    time.Time // not in step: when it last was, zero if not known
	absence   Absence   // not connected: how it went
	noticed   time.Time // not connected: when the hub knew
	told      time.Time // when the condition was written last
}

// New checks cfg; it starts nothing.
func New(cfg Config) (*Presence, error) {
	if cfg.Client == nil || cfg.Writer == nil || cfg.Nodes == nil || cfg.Enrolled == nil || cfg.Known == nil {
		return nil, errors.New("presence: Client, Writer, Nodes, Enrolled and Known are required")
	}
	if cfg.Clock == nil {
		cfg.Clock = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Presence{
		cfg: cfg, log: cfg.Log, now: cfg.Clock,
		limit: rate.NewLimiter(writesPerSecond, writesPerSecond),
		nodes: map[string]*state{},
	}, nil
}

// Run writes conditions until ctx ends. It may be called once.
func (p *Presence) Run(ctx context.Context) error {
	select {
	case <-p.cfg.Known:
	case <-ctx.Done():
		return nil
	}
	queue := workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](minRetry, maxRetry))
	p.mu.Lock()
	p.queue, p.started = queue, p.now()
	for name := range p.nodes {
		queue.Add(name)
	}
	p.mu.Unlock()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { <-ctx.Done(); queue.ShutDown(); return nil })
	g.Go(func() error {
		if !cache.WaitForCacheSync(ctx.Done(), p.cfg.Nodes.HasSynced) {
			return nil
		}
		reg, err := p.cfg.Nodes.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc:    func(obj any) { p.nodeChanged(nil, obj) },
			UpdateFunc: p.nodeChanged,
			DeleteFunc: p.nodeGone,
		})
		if err != nil {
			return fmt.Errorf("presence: watch nodes: %w", err)
		}
		defer func() { _ = p.cfg.Nodes.RemoveEventHandler(reg) }()
		<-ctx.Done()
		return nil
	})
	for range writers {
		g.Go(func() error { p.work(ctx, queue); return nil })
	}
	return g.Wait()
}

// Greeted says that the node's tunnel is up and what it said first.
func (p *Presence) Greeted(node string, h edgeapi.Hello) {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := p.nodes[node]
	if st == nil {
		st = &state{}
		p.nodes[node] = st
	}
	st.leaveStepLocked(p.now())
	st.connected, st.since, st.hello, st.written = true, p.now(), h, 0
	p.lookLocked(node, 0)
}

// InStep says whether the node has acknowledged all that concerns it.
func (p *Presence) InStep(node string, yes bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := p.nodes[node]
	switch {
	case st == nil || !st.connected:
	case yes:
		st.inStep = true
	default:
		st.leaveStepLocked(p.now())
	}
}

func (st *state) leaveStepLocked(at time.Time) {
	if st.inStep {
		st.inStep, st.synced = false, at
	}
}

// Wrote says that a write of the node came.
func (p *Presence) Wrote(node string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if st := p.nodes[node]; st != nil {
		st.written++
	}
}

// Away says that the node's tunnel ended, or that the node is not heard.
func (p *Presence) Away(node string, a Absence) {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := p.nodes[node]
	if st == nil || !st.connected {
		return // it never greeted, or it is known to be away: since then nothing was heard that counts
	}
	st.leaveStepLocked(a.Heard)
	st.connected, st.absence, st.noticed = false, a, p.now()
	p.lookLocked(node, tellAfter)
}

// Heard says that a node that was silent on a tunnel is heard there again.
func (p *Presence) Heard(node string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := p.nodes[node]
	if st == nil || st.connected {
		return
	}
	st.connected, st.since, st.hello.Outbox, st.written = true, p.now(), 0, 0
	p.lookLocked(node, 0)
}

// LastSync is when the node was last in step, given when it was last heard. It
// is zero if that is not known.
func (p *Presence) LastSync(node string, heard time.Time) time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch st := p.nodes[node]; {
	case st == nil:
		return time.Time{}
	case st.inStep:
		return heard
	default:
		return st.synced
	}
}

// Stats counts since the start.
type Stats struct {
	Writes uint64 // of conditions
	Failed uint64 // writes that failed, and were tried again
}

// Stats returns counters since the start.
func (p *Presence) Stats() Stats { return Stats{Writes: p.writes.Load(), Failed: p.failed.Load()} }

// lookLocked has the node looked at after d.
func (p *Presence) lookLocked(node string, d time.Duration) {
	if p.queue != nil {
		p.queue.AddAfter(node, d)
	}
}

func (p *Presence) nodeChanged(old, obj any) {
	n, ok := obj.(*corev1.Node)
	if !ok {
		return
	}
	if o, ok := old.(*corev1.Node); ok && status(Of(o)) == status(Of(n)) {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lookLocked(n.Name, 0)
}

func (p *Presence) nodeGone(obj any) {
	if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
		obj = gone.Obj
	}
	if n, ok := obj.(*corev1.Node); ok {
		p.mu.Lock()
		defer p.mu.Unlock()
		if st := p.nodes[n.Name]; st != nil {
			st.told = time.Time{} // a Node that is made anew is told at once
		}
		p.lookLocked(n.Name, 0)
	}
}

func (p *Presence) work(ctx context.Context, queue workqueue.TypedRateLimitingInterface[string]) {
	for {
		name, down := queue.Get()
		if down {
			return
		}
		again, err := p.sync(ctx, name)
		switch {
		case err != nil && ctx.Err() == nil:
			p.failed.Add(1)
			p.log.Warn("condition Connected not written; it is tried again", "node", name, "err", err)
			queue.AddRateLimited(name)
		case again > 0:
			queue.Forget(name)
			queue.AddAfter(name, again)
		default:
			queue.Forget(name)
		}
		queue.Done(name)
	}
}

// sync brings one Node's condition to what is so. again is when to look anew,
// zero for not before something happens.
func (p *Presence) sync(ctx context.Context, name string) (again time.Duration, err error) {
	if _, want, again := p.due(name); want == nil {
		return again, nil
	}
	if err := p.limit.Wait(ctx); err != nil {
		return 0, err
	}
	n, want, again := p.due(name) // the turn may have come late
	if want == nil {
		return again, nil
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if want.Reason == ReasonRestart {
		if want, again, err = p.lost(ctx, n); want == nil {
			return again, err
		}
	}
	err = p.cfg.Writer.SetNodeCondition(ctx, name, n.UID, *want)
	if apierrors.IsNotFound(err) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	p.writes.Add(1)
	p.log.Debug("condition Connected written", "node", name, "status", want.Status, "reason", want.Reason)
	p.mu.Lock()
	defer p.mu.Unlock()
	if st := p.nodes[name]; st != nil {
		st.told = p.now()
		return writeGap, nil // the informer has it by then
	}
	return 0, nil
}

// due returns the condition that the Node shall get now, nil if none; then again
// is when to ask anew, zero for not before something happens. For a node that
// this hub has not seen the condition carries no more than ReasonRestart.
func (p *Presence) due(name string) (n *corev1.Node, want *corev1.NodeCondition, again time.Duration) {
	obj, found, err := p.cfg.Nodes.GetIndexer().GetByKey(name)
	p.mu.Lock()
	defer p.mu.Unlock()
	st := p.nodes[name]
	if err != nil || !found {
		if st != nil && !st.connected {
			delete(p.nodes, name)
		}
		return nil, nil, 0
	}
	n, now := obj.(*corev1.Node), p.now()
	cur := Of(n)
	var c corev1.NodeCondition
	switch {
	case st == nil:
		if status(cur) == corev1.ConditionFalse || cur == nil && !p.cfg.Enrolled(name) {
			return nil, nil, 0
		}
		if left := p.started.Add(grace).Sub(now); left > 0 {
			return nil, nil, left
		}
		return n, &corev1.NodeCondition{Reason: ReasonRestart}, 0
	case st.connected:
		if status(cur) == corev1.ConditionTrue {
			return nil, nil, 0
		}
		away := time.Duration(0)
		if cur != nil {
			away = st.since.Sub(cur.LastTransitionTime.Time)
		}
		c = up(st.since, away, st.hello)
	default:
		if left := st.noticed.Add(tellAfter).Sub(now); left > 0 {
			return nil, nil, left
		}
		c = down(st.absence, st.synced, max(0, st.hello.Outbox-st.written))
		if status(cur) == corev1.ConditionFalse && cur.LastTransitionTime.Unix() == c.LastTransitionTime.Unix() {
			return nil, nil, 0
		}
	}
	if left := st.told.Add(writeGap).Sub(now); left > 0 {
		return nil, nil, left
	}
	return n, &c, 0
}

// lost returns the condition of a node that did not come back after the hub's
// restart, or when to look again if somebody still renews its Lease.
func (p *Presence) lost(ctx context.Context, n *corev1.Node) (want *corev1.NodeCondition, again time.Duration, err error) {
	lease, err := p.cfg.Client.CoordinationV1().Leases(corev1.NamespaceNodeLease).Get(ctx, n.Name, metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return nil, 0, fmt.Errorf("read the lease of node %s: %w", n.Name, err)
	}
	a := Absence{Heard: reported(n), Reason: ReasonRestart, Message: "not back since the hub's start " + stamp(p.started)}
	var synced time.Time
	if err == nil {
		if lease.Spec.RenewTime != nil {
			a.Heard = lease.Spec.RenewTime.Time
		}
		synced = SyncedBy(lease)
	}
	if left := a.Heard.Add(leaseFresh).Sub(p.now()); left > 0 {
		return nil, left, nil
	}
	c := down(a, synced, 0)
	return &c, 0, nil
}

// reported is when the node itself last wrote that it lives.
func reported(n *corev1.Node) time.Time {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady && !c.LastHeartbeatTime.IsZero() {
			return c.LastHeartbeatTime.Time
		}
	}
	return n.CreationTimestamp.Time
}

// SyncedBy reads the annotation LastSync of a Lease, zero if it has none that
// counts.
func SyncedBy(l *coordinationv1.Lease) time.Time {
	t, err := time.Parse(time.RFC3339, l.Annotations[LastSync])
	if err != nil {
		return time.Time{}
	}
	return t
}

func status(c *corev1.NodeCondition) corev1.ConditionStatus {
	if c == nil {
		return ""
	}
	return c.Status
}
