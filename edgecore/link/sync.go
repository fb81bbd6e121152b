package link

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/skerry-io/skerry/edgecore/store"
	"github.com/skerry-io/skerry/tunnel"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// statesInFlight and eventsInFlight bound the writes that wait for the API
// server's answer. An object in flight is not sent again before its answer.
// Events have a window of their own, so that a burst of them holds up no
// status.
const (
	statesInFlight = 16
	eventsInFlight = 8
)

// inFlight counts the writes of one conversation by the window they take up.
type inFlight struct {
	states, events chan struct{}
	stall          time.Duration

	// overdue is closed when writes are in flight and none was answered for
	// stallTimeout.
	overdue chan struct{}

	mu    sync.Mutex
	by    map[uint64]sent // by write ID
	clock *time.Timer     // of overdue
}

type sent struct {
	op     store.Op
	window chan struct{}
}

func newInFlight(stall time.Duration) *inFlight {
	f := &inFlight{
		states:  make(chan struct{}, statesInFlight),
		events:  make(chan struct{}, eventsInFlight),
		overdue: make(chan struct{}),
		stall:   stall,
		by:      map[uint64]sent{},
	}
	f.clock = time.AfterFunc(stall, sync.OnceFunc(func() { close(f.overdue) }))
	f.clock.Stop()
	return f
}

// watch ends the conversation when the hub answers nothing any more.
func (f *inFlight) watch(ctx context.Context) error {
	defer f.clock.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-f.overdue:
		return fmt.Errorf("%w (%v without the result of any write)", errHubStalls, f.stall)
	}
}

// take waits for room in the window.
func (f *inFlight) take(ctx context.Context, window chan struct{}, p store.Pending) error {
	select {
	case window <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.by) == 0 {
		f.clock.Reset(f.stall)
	}
	f.by[p.ID] = sent{p.Op, window}
	return nil
}

// give makes room and tells what the write was; false if none such is in
// flight.
func (f *inFlight) give(id uint64) (store.Op, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	w, ok := f.by[id]
	if ok {
		delete(f.by, id)
		<-w.window
		f.clock.Stop()
		if len(f.by) > 0 {
			f.clock.Reset(f.stall)
		}
	}
	return w.op, ok
}

// talk is one sync conversation. There is one at a time: while a tunnel is
// drained another runs beside it, and what the older conversation took from the
// outbox would have no answer.
type talk struct {
	conn   *edgeapi.Conn
	cancel context.CancelCauseFunc
	done   chan struct{}
}

var errSuperseded = errors.New("the sync goes on over a newer tunnel")

func (k *talk) countInto(s *State) {
	rawOut, wireOut, rawIn, wireIn := k.conn.Bytes()
	s.RawOut += rawOut
	s.WireOut += wireOut
	s.RawIn += rawIn
	s.WireIn += wireIn
}

// sync holds the sync conversation until the tunnel ends or a newer one takes
// it over.
func (l *Link) sync(ctx context.Context, s *tunnel.Session) error {
	st, err := s.Open(ctx, tunnel.OpenRequest{Kind: edgeapi.KindSync, Class: tunnel.ClassSync})
	if err != nil {
		return fmt.Errorf("open the sync stream: %w", err)
	}
	defer st.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	p := &patient{Stream: st, stall: l.cfg.stall}
	k := &talk{conn: edgeapi.NewConn(p), cancel: cancel, done: make(chan struct{})}
	defer l.end(k)
	l.begin(k)
	err = l.converse(ctx, p, k.conn)
	if errors.Is(context.Cause(ctx), errSuperseded) {
		return nil // the tunnel's other streams may finish
	}
	return err
}

// begin ends the conversation before k and waits for its end.
func (l *Link) begin(k *talk) {
	l.mu.Lock()
	older := l.talk
	l.talk = k
	l.mu.Unlock()
	if older != nil {
		older.cancel(errSuperseded)
		<-older.done
	}
}

func (l *Link) end(k *talk) {
	k.cancel(nil)
	close(k.done)
	l.mu.Lock()
	defer l.mu.Unlock()
	k.countInto(&l.state)
	if l.talk == k {
		l.talk = nil
	}
}

// converse holds a conversation, see edgeapi.
func (l *Link) converse(ctx context.Context, st *patient, conn *edgeapi.Conn) error {
	defer context.AfterFunc(ctx, func() { st.Reset(tunnel.CodeCancelled) })()
	if err := st.expect("its welcome", min(greetTimeout, l.cfg.stall)); err != nil {
		return err
	}
	if err := l.greet(ctx, conn); err != nil {
		return err
	}
	if err := st.expect("its differences", l.cfg.stall); err != nil {
		return err
	}
	// What was in flight on the last tunnel goes again.
	l.cfg.Store.Outbox().Release()
	g, ctx := errgroup.WithContext(ctx)
	// Whichever part fails, the other's wait for the hub must end too.
	defer context.AfterFunc(ctx, func() { st.Reset(tunnel.CodeCancelled) })()
	flight := newInFlight(l.cfg.stall)
	synced := make(chan struct{})
	g.Go(func() error { return flight.watch(ctx) })
	deltas := make(chan edgeapi.Delta, deltaBacklog)
	g.Go(func() error { return l.receive(ctx, conn, flight, deltas) })
	g.Go(func() error { return l.applyDeltas(ctx, st, conn, deltas, synced) })
	g.Go(func() error {
		select {
		case <-synced:
			return st.expect("", 0) // from here on the hub may have nothing to say
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	send := func(lane store.Lane, window chan struct{}) func() error {
		return func() error {
			// Writes wait for the hub's differences: a pod that was deleted
			// while the node was away need not be reported first.
			select {
			case <-synced:
			case <-ctx.Done():
				return ctx.Err()
			}
			return l.send(ctx, conn, lane, flight, window)
		}
	}
	g.Go(send(store.LaneState, flight.states))
	g.Go(send(store.LaneEvents, flight.events))
	return g.Wait()
}

func (l *Link) greet(ctx context.Context, conn *edgeapi.Conn) error {
	outbox := l.cfg.Store.Outbox()
	err := conn.Send(edgeapi.Hello{
		Version: edgeapi.Version, Agent: l.cfg.Agent,
		StoreID: l.cfg.Store.SyncEpoch(), Synced: l.cfg.Store.Synced(),
		Outbox: outbox.Depth(), EventsDropped: outbox.Dropped(),
	})
	if err != nil {
		return fmt.Errorf("send hello: %w", err)
	}
	var batch edgeapi.Inventory
	size := 0
	for _, it := range l.cfg.Store.Inventory() {
		batch.Items = append(batch.Items, edgeapi.Item{Ref: refOf(it.Key), UID: it.UID, Rev: it.Rev})
		if size += 80 + len(it.Key.Name) + len(it.UID) + len(it.Rev); size >= edgeapi.BatchBytes {
			if err := conn.Send(batch); err != nil {
				return fmt.Errorf("send inventory: %w", err)
			}
			batch, size = edgeapi.Inventory{}, 0
		}
	}
	batch.Last = true
	if err := conn.Send(batch); err != nil {
		return fmt.Errorf("send inventory: %w", err)
	}
	m, err := conn.Receive()
	if err != nil {
		return fmt.Errorf("receive welcome: %w", err)
	}
	switch m := m.(type) {
	case edgeapi.Welcome:
		if m.NodeName != l.cfg.NodeName {
			return fmt.Errorf("the hub knows this certificate as node %s, the configuration says %s: join again", m.NodeName, l.cfg.NodeName)
		}
		l.mu.Lock()
		l.state.Hub = m.Agent
		l.mu.Unlock()
		if l.cfg.HubTime != nil {
			l.cfg.HubTime(m.Now)
		}
		return nil
	case edgeapi.Goodbye:
		return l.goodbye(ctx, m)
	default:
		return fmt.Errorf("expected Welcome, got %T", m)
	}
}

type goodbyeError struct{ m edgeapi.Goodbye }

func (e *goodbyeError) Error() string { return "the hub refuses this node: " + e.m.Message }

func (l *Link) goodbye(ctx context.Context, m edgeapi.Goodbye) error {
	err := &goodbyeError{m}
	if m.Reason == edgeapi.ReasonNodeDeleted {
		return l.deleted(ctx, err)
	}
	return err
}

// receive takes what the hub sends until the stream ends.
func (l *Link) receive(ctx context.Context, conn *edgeapi.Conn, flight *inFlight, deltas chan<- edgeapi.Delta) error {
	for {
		m, err := conn.Receive()
		if err != nil {
			return fmt.Errorf("sync stream: %w", err)
		}
		switch m := m.(type) {
		case edgeapi.Delta:
			select {
			case deltas <- m:
			case <-ctx.Done():
				return ctx.Err()
			}
		case edgeapi.WriteResult:
			op, ok := flight.give(m.ID)
			if !ok {
				return fmt.Errorf("result of write %d that was not sent", m.ID)
			}
			l.result(op, m)
		case edgeapi.Goodbye:
			return l.goodbye(ctx, m)
		default:
			return fmt.Errorf("unexpected %T from the hub", m)
		}
	}
}

// deltaBacklog is how many deltas may wait for the disk; the hub sends no more
// than that without an Ack.
const deltaBacklog = 8

// applyDeltas commits deltas and acknowledges them.
func (l *Link) applyDeltas(ctx context.Context, st *patient, conn *edgeapi.Conn, deltas <-chan edgeapi.Delta, synced chan<- struct{}) error {
	for {
		var m edgeapi.Delta
		select {
		case m = <-deltas:
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := l.commit(ctx, st, m, synced == nil); err != nil {
			return fmt.Errorf("store delta %d: %w", m.Seq, err)
		}
		if err := conn.Send(edgeapi.Ack{Seq: m.Seq}); err != nil {
			return fmt.Errorf("acknowledge delta %d: %w", m.Seq, err)
		}
		if m.Synced || synced == nil {
			l.inStep()
		}
		if m.Synced && synced != nil {
			l.returned(ctx)
			l.syncOnce.Do(func() { close(l.firstSync) })
			l.assertStatuses(ctx)
			close(synced)
			synced = nil
		}
	}
}

const (
	minDiskWait = time.Second
	maxDiskWait = 30 * time.Second
)

// commit commits a delta. While the disk takes nothing it waits: the tunnel is
// worth most to those who come to make room.
func (l *Link) commit(ctx context.Context, st *patient, m edgeapi.Delta, synced bool) error {
	wait := minDiskWait
	waited := false
	for {
		err := l.cfg.Store.ApplyDelta(ctx, l.delta(m))
		switch {
		case err == nil && waited && !m.Synced && !synced:
			return st.expect("its differences", l.cfg.stall)
		case !errors.Is(err, store.ErrDisk):
			return err
		}
		l.setError(err)
		if err := st.expect("", 0); err != nil { // it is not the hub that keeps us waiting
			return err
		}
		waited = true
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		}
		wait = min(2*wait, maxDiskWait)
	}
}

func (l *Link) inStep() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.state.LastSync, l.state.LastError = time.Now(), ""
}

// delta translates what came over the wire. No delta ends this node's own Node:
// of that the hub tells with a Goodbye.
func (l *Link) delta(m edgeapi.Delta) store.Delta {
	var d store.Delta
	for _, it := range m.Deletes {
		if it.Resource == "nodes" {
			continue
		}
		d.Deletions = append(d.Deletions, store.Deletion{Key: keyOf(it.Ref), UID: it.UID})
	}
	for _, up := range m.Upserts {
		d.Upserts = append(d.Upserts, store.Upsert{Key: keyOf(up.Ref), UID: up.UID, Rev: up.Rev, Body: up.Body})
	}
	if m.Synced {
		d.Synced = l.cfg.Store.SyncEpoch()
		if d.Synced == "" {
			d.Synced = time.Now().UTC().Format(time.RFC3339Nano)
		}
	}
	return d
}

// assertStatuses sends the statuses of the Node and its pods again after an
// outage: the cloud's controllers wrote over them meanwhile (Ready=Unknown),
// and the kubelet, which saw no outage, has no reason to.
func (l *Link) assertStatuses(ctx context.Context) {
	err := l.cfg.Store.Local(ctx, func(tx *store.Tx) error {
		for _, resource := range []string{"nodes", "pods"} {
			objs, _ := l.cfg.Store.List(resource, "")
			for _, o := range objs {
				if o.Local() {
					continue // its create is in the outbox and carries all
				}
				tx.MarkDirty(store.Mark{Op: store.OpStatus, Key: o.Key, UID: o.UID})
			}
		}
		return nil
	})
	if err != nil {
		l.log.Error("statuses not queued", "err", err)
	}
}

// send sends a lane of the outbox, in its order.
func (l *Link) send(ctx context.Context, conn *edgeapi.Conn, lane store.Lane, flight *inFlight, window chan struct{}) error {
	for {
		batch, err := l.cfg.Store.Outbox().Next(ctx, lane)
		if err != nil {
			return err
		}
		for _, p := range batch {
			if err := flight.take(ctx, window, p); err != nil {
				return err
			}
			uid := p.UID
			if o, ok := l.cfg.Store.Get(p.Key); ok && o.UID == uid && o.Local() {
				uid = "" // made here: the cloud has given another one, or will
			}
			err := conn.Send(edgeapi.Write{
				ID: p.ID, Op: string(p.Op), Ref: refOf(p.Key), UID: uid, Body: p.Body,
				Labels: p.Labels, Annotations: p.Annotations,
			})
			if err != nil {
				return fmt.Errorf("send write %d: %w", p.ID, err)
			}
		}
	}
}

// result takes the API server's answer to a write.
func (l *Link) result(op store.Op, m edgeapi.WriteResult) {
	box := l.cfg.Store.Outbox()
	switch {
	case m.Code >= 200 && m.Code < 300:
		box.Done(m.ID)
	case op == store.OpCreate && m.Code != 400 && m.Code != 422:
		// What stands in the way of a create goes: an older mirror pod that is
		// being deleted, a namespace that is not made yet. The kubelet has its
		// object and does not try again.
		l.log.Info("create failed, will be tried again", "id", m.ID, "code", m.Code, "reason", m.Message)
		box.Retry(m.ID)
	case m.Code == 404 || m.Code == 409 || m.Code == 410:
		// The object moved on; the feed tells how.
		l.log.Debug("write is void", "id", m.ID, "code", m.Code, "reason", m.Message)
		box.Done(m.ID)
	case m.Code == 400 || m.Code == 403 || m.Code == 422:
		l.log.Warn("the API server refuses a write of this node", "id", m.ID, "code", m.Code, "reason", m.Message)
		box.Done(m.ID)
	default:
		l.log.Info("write failed, will be tried again", "id", m.ID, "code", m.Code, "reason", m.Message)
		box.Retry(m.ID)
	}
}

func refOf(k store.Key) edgeapi.Ref {
	return edgeapi.Ref{Resource: k.Resource, Namespace: k.Namespace, Name: k.Name}
}

func keyOf(r edgeapi.Ref) store.Key {
	return store.Key{Resource: r.Resource, Namespace: r.Namespace, Name: r.Name}
}
