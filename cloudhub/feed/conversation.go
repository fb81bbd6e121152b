package feed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sort"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

const (
	// maxInventory bounds what a node may claim to have: far above any real
	// node (110 pods) and about 20 MB of the hub's memory.
	maxInventory = 100_000

	// deltaWindow is how many deltas may be without an Ack. It bounds what a
	// node with slow flash has in its queue.
	deltaWindow = 8

	// writeQueue is how many writes wait for the API server before the reader
	// stops reading and the stream's credit stops the node.
	writeQueue = 64

	// greetTimeout is how long a node may take for its Hello and inventory: a
	// hundred thousand items over a slow link.
	greetTimeout = 2 * time.Minute

	// stateWriters is how many of a node's writes, Events aside, are done at
	// once. A node has never two of one object on their way.
	stateWriters = 4

	// nodeFirst is the lead that a change of the Node gets before new pods: the
	// kubelet learns of the two over different watches of its own.
	nodeFirst = 50 * time.Millisecond

	// readNode bounds the reading of a Node before its new pods are sent.
	readNode = 2 * time.Second

	// readOwnNode bounds the look at the API server that confirms a Node's
	// deletion, and partWith what the node may take to end a conversation
	// that it was told is over.
	readOwnNode = 10 * time.Second
	partWith    = 5 * time.Second

	// gather is how long changes are collected into one delta: a Deployment's
	// pods, or a pod and the ConfigMap made a moment later, go together.
	gather = 5 * time.Millisecond
)

// conversation is one sync stream of one node.
type conversation struct {
	f    *Feed
	node string
	conn *edgeapi.Conn

	mu    sync.Mutex
	dirty map[edgeapi.Ref]struct{}
	wake  chan struct{} // capacity 1

	acks chan uint64 // from the reader to the sender

	// Owned by the sender.
	sent    map[edgeapi.Ref]have
	names   map[edgeapi.Ref][]edgeapi.Ref // what an object of the set refers to
	needed  map[edgeapi.Ref]int           // how many objects refer to it
	seq     uint64
	unacked int
	// complete says that the delta was sent with which the node's set is
	// complete; inStep, that it and all since are acknowledged.
	complete, inStep bool
	fresh            *corev1.Node // read from the API server, if newer than the informer's
}

type have struct{ uid, rev string }

// Serve holds the sync conversation with one node until its stream or ctx
// ends, and closes the stream.
func (f *Feed) Serve(ctx context.Context, node string, stream net.Conn, w Writer) error {
	defer stream.Close()
	defer context.AfterFunc(ctx, func() { stream.Close() })()
	select {
	case <-f.ready:
	case <-ctx.Done():
		return ctx.Err()
	}
	c := &conversation{
		f: f, node: node, conn: edgeapi.NewConn(stream),
		dirty:  map[edgeapi.Ref]struct{}{},
		wake:   make(chan struct{}, 1),
		acks:   make(chan uint64, deltaWindow),
		sent:   map[edgeapi.Ref]have{},
		names:  map[edgeapi.Ref][]edgeapi.Ref{},
		needed: map[edgeapi.Ref]int{},
	}
	// A node that opens its stream and says nothing does not stay.
	if err := stream.SetReadDeadline(time.Now().Add(greetTimeout)); err != nil {
		return err
	}
	if err := c.greet(); err != nil {
		return err
	}
	if err := stream.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	f.join(c)
	defer f.leave(c)

	g, ctx := errgroup.WithContext(ctx)
	// Whichever part fails, the reader's wait for the node must end too.
	defer context.AfterFunc(ctx, func() { stream.Close() })()
	states, events := make(chan edgeapi.Write, writeQueue), make(chan edgeapi.Write, writeQueue)
	g.Go(func() error {
		defer close(states)
		defer close(events)
		return c.read(ctx, states, events)
	})
	for range stateWriters {
		g.Go(func() error { return c.write(ctx, w, states) })
	}
	g.Go(func() error { return c.write(ctx, w, events) })
	g.Go(func() error { return c.send(ctx) })
	if err := g.Wait(); !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

func (f *Feed) join(c *conversation) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.nodes[c.node] == nil {
		f.nodes[c.node] = map[*conversation]struct{}{}
	}
	f.nodes[c.node][c] = struct{}{}
}

func (f *Feed) leave(c *conversation) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.nodes[c.node], c)
	if len(f.nodes[c.node]) == 0 {
		delete(f.nodes, c.node)
	}
	for ref := range c.needed {
		f.dropUserLocked(ref, c)
	}
}

func (f *Feed) dropUserLocked(ref edgeapi.Ref, c *conversation) {
	delete(f.users[ref], c)
	if len(f.users[ref]) == 0 {
		delete(f.users, ref)
	}
}

// greet takes Hello and the inventory, and answers.
func (c *conversation) greet() error {
	m, err := c.conn.Receive()
	if err != nil {
		return fmt.Errorf("receive hello: %w", err)
	}
	hello, ok := m.(edgeapi.Hello)
	if !ok {
		return fmt.Errorf("first message is %T, not Hello", m)
	}
	if hello.Version < edgeapi.MinVersion || hello.Version > edgeapi.Version {
		msg := fmt.Sprintf("node %s (%s) speaks sync version %d, this hub (%s) %d to %d: upgrade the older of the two",
			c.node, hello.Agent, hello.Version, c.f.agent, edgeapi.MinVersion, edgeapi.Version)
		_ = c.conn.Send(edgeapi.Goodbye{Reason: edgeapi.ReasonVersion, Message: msg})
		return errors.New(msg)
	}
	for {
		m, err := c.conn.Receive()
		if err != nil {
			return fmt.Errorf("receive inventory: %w", err)
		}
		inv, ok := m.(edgeapi.Inventory)
		if !ok {
			return fmt.Errorf("expected Inventory, got %T", m)
		}
		for _, it := range inv.Items {
			c.sent[it.Ref] = have{it.UID, it.Rev}
		}
		if len(c.sent) > maxInventory {
			return fmt.Errorf("inventory of more than %d objects", maxInventory)
		}
		if inv.Last {
			break
		}
	}
	err = c.conn.Send(edgeapi.Welcome{
		Version: hello.Version, Agent: c.f.agent, NodeName: c.node, Now: time.Now(),
	})
	if err == nil {
		c.f.watch.Greeted(c.node, hello)
	}
	return err
}

func (c *conversation) mark(ref edgeapi.Ref) {
	c.mu.Lock()
	c.dirty[ref] = struct{}{}
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *conversation) take() map[edgeapi.Ref]struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	d := c.dirty
	c.dirty = map[edgeapi.Ref]struct{}{}
	return d
}

// read sorts what the node sends. Events are done beside the rest: a burst of
// them must not hold up a status.
func (c *conversation) read(ctx context.Context, states, events chan<- edgeapi.Write) error {
	for {
		m, err := c.conn.Receive()
		if err != nil {
			return err
		}
		switch m := m.(type) {
		case edgeapi.Ack:
			select {
			case c.acks <- m.Seq:
			case <-ctx.Done():
				return ctx.Err()
			}
		case edgeapi.Write:
			c.f.watch.Wrote(c.node)
			queue := states
			if m.Op == edgeapi.OpEvent {
				queue = events
			}
			select {
			case queue <- m:
			case <-ctx.Done():
				return ctx.Err()
			}
		default:
			return fmt.Errorf("unexpected %T from node %s", m, c.node)
		}
	}
}

// write does the node's writes of a queue one after the other.
func (c *conversation) write(ctx context.Context, w Writer, writes <-chan edgeapi.Write) error {
	for m := range writes {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := c.conn.Send(w.Write(ctx, c.node, m)); err != nil {
			return err
		}
	}
	return nil
}

// send brings the node's set in step, and keeps it so.
func (c *conversation) send(ctx context.Context) error {
	refs, err := c.f.initial(c.node)
	if err != nil {
		return err
	}
	work := c.take() // changes since join
	for _, ref := range refs {
		work[ref] = struct{}{}
	}
	for ref := range c.sent { // what the node has and may have to drop
		work[ref] = struct{}{}
	}
	if err := c.deliver(ctx, work, true); err != nil {
		return err
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case seq := <-c.acks:
			if err := c.acked(seq); err != nil {
				return err
			}
			continue
		case <-c.wake:
		}
		timer.Reset(gather)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
		}
		if err := c.deliver(ctx, c.take(), false); err != nil {
			return err
		}
	}
}

// deliver sends the differences among refs, in batches.
func (c *conversation) deliver(ctx context.Context, refs map[edgeapi.Ref]struct{}, synced bool) error {
	if gone, err := c.nodeDeleted(ctx); err != nil {
		return err
	} else if gone {
		return c.part(ctx)
	}
	newPods := c.newPods(refs)
	if newPods {
		c.refreshNode(ctx, refs)
	}
	c.follow(refs)
	ordered := make([]edgeapi.Ref, 0, len(refs))
	for ref := range refs {
		ordered = append(ordered, ref)
	}
	rank := func(ref edgeapi.Ref) int {
		if s := c.f.byName[ref.Resource]; s != nil {
			return s.rank
		}
		return -1 // only ever a deletion
	}
	sort.Slice(ordered, func(i, j int) bool {
		a, b := ordered[i], ordered[j]
		if ra, rb := rank(a), rank(b); ra != rb {
			return ra < rb
		}
		if a.Namespace != b.Namespace {
			return a.Namespace < b.Namespace
		}
		return a.Name < b.Name
	})
	var delta edgeapi.Delta
	size := 0
	nodeChanged := false
	for _, ref := range ordered {
		if ref.Resource == "pods" && newPods && nodeChanged {
			if err := c.lead(ctx, delta); err != nil {
				return err
			}
			delta, size, nodeChanged = edgeapi.Delta{}, 0, false
		}
		before := len(delta.Upserts)
		n, err := c.difference(ref, &delta)
		if err != nil {
			return err
		}
		nodeChanged = nodeChanged || ref.Resource == "nodes" && len(delta.Upserts) > before
		if size += n; size >= edgeapi.BatchBytes {
			if err := c.sendDelta(ctx, delta); err != nil {
				return err
			}
			delta, size = edgeapi.Delta{}, 0
		}
	}
	delta.Synced = synced
	if !synced && len(delta.Upserts)+len(delta.Deletes) == 0 {
		return nil
	}
	return c.sendDelta(ctx, delta)
}

func (c *conversation) ownNode() edgeapi.Ref { return edgeapi.Ref{Resource: "nodes", Name: c.node} }

// nodeDeleted tells whether the cluster has lost the Node that this node knows
// as its own. Much hangs on the answer, and an informer may be behind that of
// the hub that delivered the Node: the API server itself is asked.
func (c *conversation) nodeDeleted(ctx context.Context) (bool, error) {
	if _, had := c.sent[c.ownNode()]; !had || c.f.lookup(c.ownNode(), c.node) != nil {
		return false, nil
	}
	ctx, cancel := context.WithTimeout(ctx, readOwnNode)
	defer cancel()
	_, err := c.f.client.CoreV1().Nodes().Get(ctx, c.node, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return true, nil
	case err != nil:
		return false, fmt.Errorf("look for the Node of %s, which seems to be deleted: %w", c.node, err)
	}
	return false, nil // the informer will tell
}

// part tells the node that its Node object was deleted, and lets it end the
// conversation, so that the message is not lost with the tunnel.
func (c *conversation) part(ctx context.Context) error {
	err := fmt.Errorf("the Node object of %s was deleted in the cloud", c.node)
	if sendErr := c.conn.Send(edgeapi.Goodbye{Reason: edgeapi.ReasonNodeDeleted, Message: err.Error()}); sendErr != nil {
		return sendErr
	}
	timer := time.NewTimer(partWith)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
	return err
}

// newPods tells whether a pod among refs is new to the node.
func (c *conversation) newPods(refs map[edgeapi.Ref]struct{}) bool {
	for ref := range refs {
		if ref.Resource != "pods" {
			continue
		}
		if obj := c.f.lookup(ref, c.node); obj != nil && string(obj.(metav1.Object).GetUID()) != c.sent[ref].uid {
			return true
		}
	}
	return false
}

// refreshNode reads the Node before new pods are sent. The scheduler may have
// bound them because a taint went, and the informer for Nodes may be behind the
// one for pods; a kubelet that still sees the taint fails the pod for good.
func (c *conversation) refreshNode(ctx context.Context, refs map[edgeapi.Ref]struct{}) {
	ctx, cancel := context.WithTimeout(ctx, readNode)
	defer cancel()
	n, err := c.f.client.CoreV1().Nodes().Get(ctx, c.node, metav1.GetOptions{})
	if err != nil {
		return // not registered yet, or the informer's has to do
	}
	n.ManagedFields = nil
	c.fresh = n
	refs[c.ownNode()] = struct{}{}
}

// lookup is the feed's, except for a Node that was read since.
func (c *conversation) lookup(ref edgeapi.Ref) runtime.Object {
	obj := c.f.lookup(ref, c.node)
	if ref.Resource != "nodes" || c.fresh == nil {
		return obj
	}
	if n, ok := obj.(*corev1.Node); ok && n.UID == c.fresh.UID && olderThan(n.ResourceVersion, c.fresh.ResourceVersion) {
		return c.fresh
	}
	c.fresh = nil // the informer has caught up
	return obj
}

// olderThan compares resourceVersions of one resource of one API server, which
// are numbers (KEP-5504).
func olderThan(a, b string) bool {
	x, errX := strconv.ParseUint(a, 10, 64)
	y, errY := strconv.ParseUint(b, 10, 64)
	return errX == nil && errY == nil && x < y
}

// lead sends what stands before new pods, and gives the kubelet time to see it.
func (c *conversation) lead(ctx context.Context, d edgeapi.Delta) error {
	if err := c.sendDelta(ctx, d); err != nil {
		return err
	}
	timer := time.NewTimer(nodeFirst)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// follow brings what the objects refer to up to date and adds to refs what is
// newly needed or no longer so, until nothing new turns up.
func (c *conversation) follow(refs map[edgeapi.Ref]struct{}) {
	queue := make([]edgeapi.Ref, 0, len(refs))
	for ref := range refs {
		queue = append(queue, ref)
	}
	for len(queue) > 0 {
		ref := queue[len(queue)-1]
		queue = queue[:len(queue)-1]
		now := c.refsFrom(ref)
		before := c.names[ref]
		if len(now) == 0 {
			delete(c.names, ref)
		} else {
			c.names[ref] = now
		}
		c.f.mu.Lock()
		for _, r := range now {
			if c.needed[r]++; c.needed[r] == 1 {
				if c.f.users[r] == nil {
					c.f.users[r] = map[*conversation]struct{}{}
				}
				c.f.users[r][c] = struct{}{}
				refs[r] = struct{}{}
				queue = append(queue, r)
			}
		}
		for _, r := range before {
			if c.needed[r]--; c.needed[r] == 0 {
				delete(c.needed, r)
				c.f.dropUserLocked(r, c)
				refs[r] = struct{}{}
				queue = append(queue, r)
			}
		}
		c.f.mu.Unlock()
	}
}

// refsFrom lists what is needed because ref is.
func (c *conversation) refsFrom(ref edgeapi.Ref) []edgeapi.Ref {
	if ref.Resource == subjects {
		if c.needed[ref] == 0 {
			return nil
		}
		return c.f.bindingsOf(ref.Name)
	}
	if ref.Resource == routesIn {
		if c.needed[ref] == 0 {
			return nil
		}
		return c.f.routesOf(ref.Name)
	}
	if c.wants(ref) {
		if obj := c.f.lookup(ref, c.node); obj != nil {
			return refsOf(obj)
		}
	}
	return nil
}

func (c *conversation) wants(ref edgeapi.Ref) bool {
	s := c.f.byName[ref.Resource]
	if s == nil {
		return false
	}
	return s.scope != onDemand || c.needed[ref] > 0
}

// difference adds to delta what makes the node's copy of ref right, and
// returns about how many bytes that is.
func (c *conversation) difference(ref edgeapi.Ref, delta *edgeapi.Delta) (int, error) {
	if ref == edgeapi.IssuerRef() {
		return c.issuerDifference(delta), nil
	}
	had, has := c.sent[ref]
	if c.wants(ref) {
		if obj := c.lookup(ref); obj != nil {
			uid := string(obj.(metav1.Object).GetUID())
			rev, err := revision(obj)
			if err != nil {
				return 0, fmt.Errorf("revision of %s %s/%s: %w", ref.Resource, ref.Namespace, ref.Name, err)
			}
			if has && had.uid == uid && had.rev == rev {
				return 0, nil
			}
			body, err := c.f.byName[ref.Resource].body(obj, has && had.uid == uid)
			if err != nil {
				return 0, fmt.Errorf("encode %s %s/%s: %w", ref.Resource, ref.Namespace, ref.Name, err)
			}
			delta.Upserts = append(delta.Upserts, edgeapi.Upsert{Ref: ref, UID: uid, Rev: rev, Body: body})
			c.sent[ref] = have{uid, rev}
			return len(body), nil
		}
	}
	if !has || ref == c.ownNode() {
		return 0, nil // of its own Node's end a node hears otherwise, see nodeDeleted
	}
	delete(c.sent, ref)
	delta.Deletes = append(delta.Deletes, edgeapi.Item{Ref: ref, UID: had.uid})
	return 64, nil
}

// sendDelta waits for room in the window, then sends.
func (c *conversation) sendDelta(ctx context.Context, d edgeapi.Delta) error {
	for c.unacked >= deltaWindow {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case seq := <-c.acks:
			if err := c.acked(seq); err != nil {
				return err
			}
		}
	}
	if c.inStep {
		c.inStep = false
		c.f.watch.InStep(c.node, false)
	}
	c.complete = c.complete || d.Synced
	c.seq++
	c.unacked++
	d.Seq = c.seq
	_, before, _, _ := c.conn.Bytes()
	if err := c.conn.Send(d); err != nil {
		return err
	}
	_, after, _, _ := c.conn.Bytes()
	c.f.deltas.Add(1)
	c.f.objects.Add(uint64(len(d.Upserts) + len(d.Deletes)))
	c.f.wireBytes.Add(after - before)
	return nil
}

func (c *conversation) acked(seq uint64) error {
	if seq > c.seq || seq+uint64(c.unacked) < c.seq {
		return fmt.Errorf("node %s acknowledged delta %d of %d", c.node, seq, c.seq)
	}
	c.unacked = int(c.seq - seq)
	if c.unacked == 0 && c.complete && !c.inStep {
		c.inStep = true
		c.f.watch.InStep(c.node, true)
	}
	return nil
}
