package devices

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

const (
	// greetTimeout is how long a node may take for its TwinHello and digests.
	greetTimeout = 2 * time.Minute

	// maxDevices is how many devices a node may tell of.
	maxDevices = 20_000

	// maxRefused is how many of the devices that a node told of wrongly are
	// remembered, to ask again once they are its own.
	maxRefused = 4096

	// batchRefs is how many devices one TwinWant names.
	batchRefs = 2000

	// maxPending is how many requests may wait for a node's answer.
	maxPending = 256

	// requestTimeout bounds what is asked of a node if nobody says otherwise,
	// and maxRequestTimeout whatever anybody says.
	requestTimeout    = 10 * time.Second
	maxRequestTimeout = 5 * time.Minute
)

// session is one conversation with one node.
type session struct {
	d     *Devices
	node  string
	conn  *edgeapi.Conn
	hello edgeapi.TwinHello
	kick  chan struct{} // capacity 1: there is something in ask
	over  chan struct{} // closed when it has ended
	close func()

	// Guarded by Devices.mu.
	uids    map[edgeapi.DeviceRef]string // of the devices that the node told of
	refused map[edgeapi.DeviceRef]struct{}
	ask     map[edgeapi.DeviceRef]struct{}
	pending map[uint64]chan edgeapi.TwinReply
	lastID  uint64
}

// sameLife tells whether v can be compared with what the node says now. It
// cannot if it is of a later start of the same store: the node's disk was set
// back, and what came after is void.
func (s *session) sameLife(v v1alpha1.Version) bool {
	return v.Incarnation != s.hello.Incarnation || v.Epoch <= s.hello.Epoch
}

// refuse remembers, with Devices.mu held, that the node told of a device that
// is not its own.
func (s *session) refuse(ref edgeapi.DeviceRef) {
	if len(s.refused) < maxRefused {
		s.refused[ref] = struct{}{}
	}
}

// askForLocked has the whole of the device asked for, if something of it was
// refused before.
func (s *session) askForLocked(ref edgeapi.DeviceRef) {
	if _, ok := s.refused[ref]; !ok {
		return
	}
	delete(s.refused, ref)
	s.ask[ref] = struct{}{}
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// Serve holds the twins conversation with a node until its stream or ctx ends,
// and closes the stream. A newer conversation of the same node ends it.
func (d *Devices) Serve(ctx context.Context, nodeName string, stream net.Conn) error {
	defer stream.Close()
	defer context.AfterFunc(ctx, func() { stream.Close() })()
	s := &session{
		d: d, node: nodeName, conn: edgeapi.NewConn(stream), close: func() { stream.Close() },
		kick: make(chan struct{}, 1), over: make(chan struct{}),
		uids: map[edgeapi.DeviceRef]string{}, refused: map[edgeapi.DeviceRef]struct{}{},
		ask: map[edgeapi.DeviceRef]struct{}{}, pending: map[uint64]chan edgeapi.TwinReply{},
	}
	defer close(s.over)
	if err := stream.SetReadDeadline(time.Now().Add(greetTimeout)); err != nil {
		return err
	}
	digests, err := s.greet()
	if err != nil {
		return err
	}
	if err := stream.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	d.begin(s)
	defer d.end(s)
	want, restore := d.compare(s, digests)
	if err := s.conn.Send(edgeapi.TwinWelcome{Version: edgeapi.TwinsVersion, Now: time.Now()}); err != nil {
		return err
	}
	if err := s.sendWants(want, true); err != nil {
		return err
	}
	if err := s.sendRestores(restore, true); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	defer context.AfterFunc(ctx, func() { stream.Close() })()
	g.Go(func() error { return s.read(ctx) })
	g.Go(func() error { return s.askAgain(ctx) })
	if err := g.Wait(); !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

// greet takes the node's hello and what it has.
func (s *session) greet() ([]edgeapi.TwinDigestItem, error) {
	m, err := s.conn.Receive()
	if err != nil {
		return nil, fmt.Errorf("receive hello: %w", err)
	}
	hello, ok := m.(edgeapi.TwinHello)
	if !ok {
		return nil, fmt.Errorf("first message is %T, not TwinHello", m)
	}
	if hello.Version != edgeapi.TwinsVersion {
		return nil, fmt.Errorf("node %s speaks twins version %d, this hub %d: upgrade the older of the two", s.node, hello.Version, edgeapi.TwinsVersion)
	}
	if _, err := v1alpha1.ParseVersion(v1alpha1.Version{Incarnation: hello.Incarnation, Epoch: hello.Epoch}.String()); err != nil {
		return nil, fmt.Errorf("hello: %w", err)
	}
	s.hello = hello
	var items []edgeapi.TwinDigestItem
	for {
		m, err := s.conn.Receive()
		if err != nil {
			return nil, fmt.Errorf("receive digests: %w", err)
		}
		digest, ok := m.(edgeapi.TwinDigest)
		if !ok {
			return nil, fmt.Errorf("expected TwinDigest, got %T", m)
		}
		items = append(items, digest.Items...)
		if len(items) > maxDevices {
			return nil, fmt.Errorf("node %s tells of more than %d devices", s.node, maxDevices)
		}
		if digest.Last {
			return items, nil
		}
	}
}

// begin makes s the node's conversation, and ends an older one.
func (d *Devices) begin(s *session) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.nodeLocked(s.node)
	if n.session != nil {
		n.session.close()
	}
	now := time.Now()
	n.session, n.since, n.away = s, now, false
	n.life = v1alpha1.Version{Incarnation: s.hello.Incarnation, Epoch: s.hello.Epoch}
	for _, tw := range n.twins {
		if tw.told.nodeAway != connected {
			d.status.transition(tw.ref, now)
		}
		d.changedLocked(tw)
	}
}

func (d *Devices) end(s *session) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.nodes[s.node]
	if n == nil || n.session != s {
		return
	}
	n.session, n.since = nil, time.Now() // watchNodes tells of it if it stays so
	for _, tw := range n.twins {
		d.changedLocked(tw)
	}
}

// compare finds what to ask of the node, and what to give back to it.
func (d *Devices) compare(s *session, digests []edgeapi.TwinDigestItem) (want []edgeapi.DeviceRef, restore []edgeapi.TwinValue) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.nodes[s.node]
	if n == nil || n.session != s {
		return nil, nil
	}
	for _, item := range digests {
		tw := n.twins[item.Device]
		if tw == nil || string(tw.device.UID) != item.UID {
			s.refuse(item.Device) // the feed puts that right
			continue
		}
		s.uids[tw.ref] = item.UID
		has, err := v1alpha1.ParseVersion(item.Version)
		if err != nil {
			want = append(want, tw.ref)
			continue
		}
		values := make([]edgeapi.TwinValue, 0, len(tw.values))
		var lost []edgeapi.TwinValue // perhaps
		var latest v1alpha1.Version  // of values: the node tells its states anyway
		for p, r := range tw.values {
			values = append(values, r.wire(tw.ref, p))
			if latest.IsZero() || r.version.Incarnation == s.hello.Incarnation && r.version.Supersedes(latest) {
				latest = r.version
			}
			// What this start of the node did not say itself, it may have lost
			// with its power, whatever else it has said since; it takes only
			// what it does not have.
			if (r.version.Incarnation != s.hello.Incarnation || r.version.Epoch != s.hello.Epoch) && s.sameLife(r.version) {
				lost = append(lost, values[len(values)-1])
			}
		}
		hash, err := edgeapi.TwinHash(values)
		if err != nil || tw.state == nil || hash != item.Hash || latest != has {
			want = append(want, tw.ref)
			restore = append(restore, lost...)
		}
	}
	return want, restore
}

func (s *session) sendWants(refs []edgeapi.DeviceRef, always bool) error {
	for first := true; len(refs) > 0 || first && always; first = false {
		batch := refs[:min(len(refs), batchRefs)]
		refs = refs[len(batch):]
		if err := s.conn.Send(edgeapi.TwinWant{Devices: batch}); err != nil {
			return err
		}
	}
	return nil
}

func (s *session) sendRestores(values []edgeapi.TwinValue, always bool) error {
	for first := true; len(values) > 0 || first && always; first = false {
		size, count := 0, 0
		for count < len(values) && size < edgeapi.BatchBytes {
			size += readingBytes + len(values[count].Value)
			count++
		}
		if err := s.conn.Send(edgeapi.TwinRestore{Values: values[:count]}); err != nil {
			return err
		}
		s.d.restored.Add(uint64(count))
		values = values[count:]
	}
	return nil
}

// askAgain asks for devices that the node told of before the hub knew them as
// its own.
func (s *session) askAgain(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.kick:
		}
		s.d.mu.Lock()
		refs := make([]edgeapi.DeviceRef, 0, len(s.ask))
		for ref := range s.ask {
			refs = append(refs, ref)
		}
		clear(s.ask)
		s.d.mu.Unlock()
		if err := s.sendWants(refs, false); err != nil {
			return err
		}
	}
}

func (s *session) read(ctx context.Context) error {
	for {
		m, err := s.conn.Receive()
		if err != nil {
			return err
		}
		switch m := m.(type) {
		case edgeapi.TwinFrame:
			newer, err := s.d.takeFrame(s, m)
			if err != nil {
				return err
			}
			if err := s.sendRestores(newer, false); err != nil {
				return err
			}
			err = s.conn.Send(edgeapi.TwinAck{Seq: m.Seq})
			if err != nil {
				return err
			}
		case edgeapi.TwinFound:
			s.d.takeFound(s, m)
		case edgeapi.TwinReply:
			s.answered(m)
		case edgeapi.TwinRequest:
			if err := s.conn.Send(s.d.answer(s, m)); err != nil {
				return err
			}
		default:
			return fmt.Errorf("unexpected %T from node %s", m, s.node)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// answer answers what a node asks.
func (d *Devices) answer(s *session, r edgeapi.TwinRequest) edgeapi.TwinReply {
	reply := edgeapi.TwinReply{ID: r.ID}
	if r.Op != edgeapi.TwinOpBase {
		reply.Code, reply.Message = http.StatusNotImplemented, fmt.Sprintf("this hub does not know %.40q", r.Op)
		return reply
	}
	var base edgeapi.TwinBase
	if err := json.Unmarshal(r.Body, &base); err != nil {
		reply.Code, reply.Message = http.StatusBadRequest, "body: "+err.Error()
		return reply
	}
	reply.Code, reply.Message = d.baseStands(s, r.Device, base)
	return reply
}

// baseStands tells whether what a node wants to override is still what the
// cloud wants. What changed before this hub started is not known by property:
// then a Device that is newer as a whole counts as changed, and the node, which
// is getting it, may ask again.
func (d *Devices) baseStands(s *session, ref edgeapi.DeviceRef, base edgeapi.TwinBase) (code int, message string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.nodes[s.node]
	if n == nil || n.session != s {
		return http.StatusConflict, errReplaced.Error()
	}
	tw := n.twins[ref]
	if tw == nil || string(tw.device.UID) != base.UID {
		return http.StatusNotFound, fmt.Sprintf("Device %s/%s is not one of node %s", ref.Namespace, ref.Name, s.node)
	}
	if tw.device.Generation < base.Generation {
		return http.StatusConflict, fmt.Sprintf("the Device is at generation %d, before the node's %d: the cluster was restored", tw.device.Generation, base.Generation)
	}
	if tw.device.Generation == base.Generation {
		return http.StatusOK, ""
	}
	for _, p := range base.Properties {
		if at, known := tw.changed[p]; known && at > base.Generation {
			return http.StatusConflict, fmt.Sprintf("what is desired of %s was changed in generation %d of the Device; the node had %d", p, at, base.Generation)
		}
	}
	if base.Generation < tw.first {
		return http.StatusConflict, fmt.Sprintf("the Device is at generation %d, the node had %d", tw.device.Generation, base.Generation)
	}
	return http.StatusOK, ""
}

// errAway says that a device's node cannot be asked now.
var errAway = errors.New("its node is not connected")

// request asks the node of a device, and waits for its answer.
func (d *Devices) request(ctx context.Context, ref edgeapi.DeviceRef, r edgeapi.TwinRequest) (edgeapi.TwinReply, error) {
	timeout := time.Duration(r.Timeout) * time.Millisecond
	if timeout <= 0 {
		timeout = requestTimeout
	}
	timeout = min(timeout, maxRequestTimeout)
	r.Timeout, r.Device = timeout.Milliseconds(), ref
	answer := make(chan edgeapi.TwinReply, 1)
	d.mu.Lock()
	tw := d.twins[ref]
	var s *session
	if tw != nil {
		if n := d.nodes[tw.device.Spec.NodeName]; n != nil {
			s = n.session
		}
	}
	if s == nil {
		d.mu.Unlock()
		return edgeapi.TwinReply{}, errAway
	}
	if len(s.pending) >= maxPending {
		d.mu.Unlock()
		return edgeapi.TwinReply{Code: http.StatusTooManyRequests, Message: fmt.Sprintf("%d requests wait for node %s", maxPending, s.node)}, nil
	}
	s.lastID++
	r.ID = s.lastID
	s.pending[r.ID] = answer
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		delete(s.pending, r.ID)
		d.mu.Unlock()
	}()
	if err := s.conn.Send(r); err != nil {
		return edgeapi.TwinReply{}, fmt.Errorf("ask node %s: %w", s.node, err)
	}
	// The node answers within the time it was given; the way there and back is
	// on top.
	timer := time.NewTimer(timeout + 5*time.Second)
	defer timer.Stop()
	select {
	case reply := <-answer:
		return reply, nil
	case <-ctx.Done():
		return edgeapi.TwinReply{}, ctx.Err()
	case <-s.over:
		return edgeapi.TwinReply{Code: http.StatusGatewayTimeout, Message: "the node went away before it answered: whether the device got it is not known"}, nil
	case <-timer.C:
		return edgeapi.TwinReply{Code: http.StatusGatewayTimeout, Message: fmt.Sprintf("node %s did not answer within %s", s.node, timeout)}, nil
	}
}

func (s *session) answered(r edgeapi.TwinReply) {
	s.d.mu.Lock()
	answer := s.pending[r.ID]
	delete(s.pending, r.ID)
	s.d.mu.Unlock()
	if answer != nil {
		answer <- r
	}
}
