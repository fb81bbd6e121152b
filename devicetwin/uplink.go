package devicetwin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/value"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

const (
	// frameBytes is about how large a frame gets.
	frameBytes = 48 << 10
	// window is how many frames may wait for their acknowledgement.
	window = 4
	// frameGap is between two frames, so that what changes together travels
	// together.
	frameGap = 20 * time.Millisecond
	// ackWithin is how long a hub may take for a frame before the conversation
	// is given up.
	ackWithin    = 2 * time.Minute
	welcomeIn    = time.Minute
	digestItems  = 500
	foundGap     = time.Second
	maxRequests  = 64  // of the hub's at once
	maxFound     = 500 // candidates of a discovery
	maxRestoring = 4096
)

// Conn carries a conversation: an edgeapi.Conn and the stream that it is over.
// Close makes Send and Receive return.
type Conn interface {
	Send(edgeapi.Message) error
	Receive() (edgeapi.Message, error)
	Close() error
}

// conversation is one with the hub. Twins.mu guards it.
type conversation struct {
	conn      Conn
	cancel    context.CancelCauseFunc
	welcomed  bool
	queue     []*device            // that have something to tell
	later     map[*device]struct{} // with a property whose minInterval is not over
	laterAt   time.Time
	foundNext time.Time
	sent      uint64 // the latest frame
	acked     uint64
	waiting   time.Time // since when the oldest frame waits
	kick      chan struct{}
	asked     uint64
	answers   map[uint64]chan edgeapi.TwinReply
}

// discovery is what a DeviceDiscovery sees.
type discovery struct {
	candidates []v1alpha1.Candidate
	dropped    int
	up         bool
}

// Connected tells whether the hub is being spoken to.
func (t *Twins) Connected() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.connectedLocked()
}

func (t *Twins) connectedLocked() bool { return t.conv != nil && t.conv.welcomed }

// Converse tells the hub what is known of the devices, until conn or ctx ends
// or a newer conversation takes over. It closes conn.
//
// While there is no conversation nothing is kept for the hub. The next one
// begins with what each side has, and only what differs travels.
func (t *Twins) Converse(ctx context.Context, conn Conn) error {
	ctx, cancel := context.WithCancelCause(ctx)
	c := &conversation{
		conn: conn, cancel: cancel, kick: make(chan struct{}, 1),
		later: make(map[*device]struct{}), answers: make(map[uint64]chan edgeapi.TwinReply),
	}
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	t.mu.Lock()
	if t.conv != nil {
		t.conv.cancel(errNewer)
	}
	t.conv = c
	for _, f := range t.discoveries {
		f.up = f.candidates != nil
	}
	t.mu.Unlock()

	// The reader is waited for, so that nothing of this conversation comes
	// after it.
	received := make(chan error, 1)
	go func() {
		err := t.listen(ctx, c)
		cancel(err)
		received <- err
	}()
	err := t.tell(ctx, c)
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	cancel(err)
	t.mu.Lock()
	if t.conv == c {
		t.conv = nil
	}
	t.mu.Unlock()
	conn.Close()
	<-received
	return err
}

var errNewer = errors.New("a newer conversation took over")

// tell sends the hello, the digests, and then what changes.
func (t *Twins) tell(ctx context.Context, c *conversation) error {
	if err := c.conn.Send(edgeapi.TwinHello{Version: edgeapi.TwinsVersion, Incarnation: t.inc, Epoch: t.epoch}); err != nil {
		return err
	}
	devices, _ := t.snapshot()
	for {
		n := min(len(devices), digestItems)
		digest, err := t.digest(c, devices[:n])
		if err != nil {
			return err
		}
		devices = devices[n:]
		digest.Last = len(devices) == 0
		if err := c.conn.Send(digest); err != nil {
			return err
		}
		if digest.Last {
			break
		}
	}
	timer := time.NewTimer(welcomeIn)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-c.kick:
		case <-timer.C:
		}
		next, sent, err := t.tellSome(c)
		if err != nil {
			return err
		}
		if sent && !pause(ctx, frameGap) {
			return ctx.Err()
		}
		timer.Reset(next)
	}
}

// digest is of some devices. From here on their changes are noted for c.
func (t *Twins) digest(c *conversation, devices []*device) (edgeapi.TwinDigest, error) {
	var out edgeapi.TwinDigest
	for _, d := range devices {
		t.mu.Lock()
		if d.gone || t.conv != c {
			t.mu.Unlock()
			continue
		}
		var values []edgeapi.TwinValue
		var latest v1alpha1.Version
		for i := range d.props {
			p := &d.props[i]
			p.up, p.lastUp = false, 0
			if p.rep.q == "" {
				continue
			}
			values = append(values, t.valueLocked(d, i))
			if v := t.versionOf(&p.rep); latest.IsZero() || v.Incarnation == t.inc && v.Supersedes(latest) {
				latest = v
			}
		}
		d.upQueued = false
		d.upStateLocked(t) // states are small and always told
		item := edgeapi.TwinDigestItem{Device: refOf(d.key), UID: d.uid, Version: latest.String()}
		t.mu.Unlock()
		var err error
		if item.Hash, err = edgeapi.TwinHash(values); err != nil {
			return out, err
		}
		out.Items = append(out.Items, item)
	}
	return out, nil
}

func refOf(k Key) edgeapi.DeviceRef { return edgeapi.DeviceRef{Namespace: k.Namespace, Name: k.Name} }

// tellSome sends at most one frame and what discoveries found, and tells when
// it is to be called again at the latest.
func (t *Twins) tellSome(c *conversation) (next time.Duration, sent bool, err error) {
	now := time.Now()
	t.mu.Lock()
	if t.conv != c {
		t.mu.Unlock()
		return 0, false, errNewer
	}
	if !c.welcomed {
		t.mu.Unlock()
		return welcomeIn, false, nil
	}
	if !c.waiting.IsZero() && now.Sub(c.waiting) > ackWithin {
		t.mu.Unlock()
		return 0, false, fmt.Errorf("the hub has not acknowledged frame %d within %v", c.acked+1, ackWithin)
	}
	if len(c.later) > 0 && !now.Before(c.laterAt) {
		for d := range c.later {
			if !d.upQueued {
				d.enqueueLocked(c)
			}
		}
		clear(c.later)
	}
	var frame *edgeapi.TwinFrame
	if len(c.queue) > 0 && c.sent-c.acked < window {
		if frame = t.frameLocked(c, now); frame != nil {
			c.sent++
			frame.Seq = c.sent
			if c.waiting.IsZero() {
				c.waiting = now
			}
		}
	}
	var found []edgeapi.TwinFound
	next = welcomeIn
	if wait := c.foundNext.Sub(now); wait <= 0 {
		if found = t.foundLocked(); len(found) > 0 {
			c.foundNext = now.Add(foundGap)
			next = foundGap
		}
	} else {
		next = wait
	}
	switch {
	case len(c.queue) > 0 && c.sent-c.acked < window:
		next = frameGap
	case len(c.later) > 0:
		next = min(next, max(c.laterAt.Sub(now), frameGap))
	}
	t.mu.Unlock()
	if frame != nil {
		if err := c.conn.Send(*frame); err != nil {
			return 0, false, err
		}
	}
	for _, f := range found {
		if err := c.conn.Send(f); err != nil {
			return 0, false, err
		}
	}
	return next, frame != nil, nil
}

// frameLocked takes from the queue what fits into one frame: the present values
// of what changed.
func (t *Twins) frameLocked(c *conversation, now time.Time) *edgeapi.TwinFrame {
	f := &edgeapi.TwinFrame{}
	size := 0
	n := 0
	for _, d := range c.queue[:len(c.queue):len(c.queue)] {
		if size >= frameBytes {
			break
		}
		n++
		d.upQueued = false
		if d.gone {
			continue
		}
		if d.upState {
			d.upState = false
			s := t.stateOfLocked(d)
			d.sentSeen = d.live.seen
			size += 200 + 48*len(s.Desired)
			for _, o := range s.Overrides {
				size += 120 + len(o.Value)
			}
			f.States = append(f.States, s)
		}
		for i := range d.props {
			p := &d.props[i]
			if !p.up {
				continue
			}
			if size >= frameBytes {
				d.enqueueLocked(c) // the rest goes with the next
				break
			}
			if least := d.model.props[i].Report.MinInterval.Duration; least > 0 && p.lastUp != 0 {
				if at := t.start.Add(time.Duration(p.lastUp) * time.Millisecond).Add(least); at.After(now) {
					if len(c.later) == 0 || at.Before(c.laterAt) {
						c.laterAt = at
					}
					c.later[d] = struct{}{}
					continue
				}
			}
			p.up, p.lastUp, p.sent = false, max(now.Sub(t.start).Milliseconds(), 1), p.rep.v
			if p.rep.q == "" {
				continue
			}
			v := t.valueLocked(d, i)
			size += 160 + len(v.Value) + len(v.Message)
			f.Values = append(f.Values, v)
		}
	}
	c.queue = c.queue[n:]
	if len(c.queue) == 0 {
		c.queue = nil
	}
	if len(f.States) == 0 && len(f.Values) == 0 {
		return nil
	}
	return f
}

// upPropLocked notes that the hub is to be told of a property, upStateLocked of
// the device besides its properties. Nothing is noted while nobody listens.
func (d *device) upPropLocked(t *Twins, i int) {
	if t.conv == nil {
		return
	}
	d.props[i].up = true
	d.noteLocked(t.conv)
}

func (d *device) upStateLocked(t *Twins) {
	if t.conv == nil {
		return
	}
	d.upState = true
	d.noteLocked(t.conv)
}

func (d *device) noteLocked(c *conversation) {
	if !d.upQueued {
		d.enqueueLocked(c)
		poke(c.kick)
	}
}

func (d *device) enqueueLocked(c *conversation) {
	d.upQueued = true
	c.queue = append(c.queue, d)
}

// valueLocked is a reported value on its way up. It is the same whenever it is
// of the same version.
func (t *Twins) valueLocked(d *device, i int) edgeapi.TwinValue {
	r := &d.props[i].rep
	v := edgeapi.TwinValue{
		Device: refOf(d.key), Property: d.model.props[i].Name, TS: r.ts, Received: r.rx,
		Quality: r.q, Version: t.versionOf(r).String(), Message: r.message,
	}
	if r.v != nil {
		v.Value = value.JSON(r.v)
	}
	return v
}

func (t *Twins) stateOfLocked(d *device) edgeapi.TwinState {
	s := edgeapi.TwinState{
		Device: refOf(d.key), UID: d.uid, ObservedGeneration: d.stored, Version: t.versionLocked(d).String(),
		Phase: d.live.phase, Reason: d.live.reason,
	}
	if !d.live.seen.IsZero() {
		s.LastSeen = d.live.seen.UnixMilli()
	}
	room := 1 << 20
	for i := range d.props {
		w, name := d.props[i].want, d.model.props[i].Name
		if w == nil {
			continue
		}
		if w.raw != nil {
			if s.Desired == nil {
				s.Desired = make(map[string]edgeapi.TwinDesired)
			}
			td := edgeapi.TwinDesired{Generation: w.gen, State: w.state, Message: w.message}
			switch {
			case w.err != nil:
				td.State, td.Message = v1alpha1.DesiredInvalid, clip(w.err.Error(), 256)
			case w.overridden():
				td.State, td.Message = v1alpha1.DesiredOverridden, "by "+w.over.by
			case td.State == "":
				td.State = v1alpha1.DesiredPending
			}
			s.Desired[name] = td
		}
		if o := w.over; o != nil {
			if room -= len(value.JSON(o.v)); room < 0 {
				continue // a message has its limit; the device's console has them all
			}
			s.Overrides = append(s.Overrides, edgeapi.TwinOverride{
				Property: name, Value: value.JSON(o.v), By: o.by, BaseGen: o.base, Since: o.since, Expires: o.expires,
			})
		}
	}
	return s
}

// listen takes what the hub says, until the stream ends.
func (t *Twins) listen(ctx context.Context, c *conversation) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	// Commands of this conversation are not waited for beyond it; they go on.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	slots, refusals := make(chan struct{}, maxRequests), make(chan struct{}, maxRequests)
	for {
		m, err := c.conn.Receive()
		if err != nil {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		switch m := m.(type) {
		case edgeapi.TwinWelcome:
			if m.Version != edgeapi.TwinsVersion {
				return fmt.Errorf("the hub speaks version %d of the twins' conversation, this node %d", m.Version, edgeapi.TwinsVersion)
			}
			t.mu.Lock()
			c.welcomed = true
			t.mu.Unlock()
			poke(c.kick)
		case edgeapi.TwinWant:
			t.wanted(c, m)
		case edgeapi.TwinRestore:
			t.restoreFromHub(m)
		case edgeapi.TwinAck:
			if err := t.acked(c, m.Seq); err != nil {
				return err
			}
		case edgeapi.TwinReply:
			t.mu.Lock()
			answer := c.answers[m.ID]
			delete(c.answers, m.ID)
			t.mu.Unlock()
			if answer != nil {
				answer <- m
			}
		case edgeapi.TwinRequest:
			select {
			case slots <- struct{}{}:
				wg.Go(func() {
					defer func() { <-slots }()
					reply := t.serve(ctx, m)
					reply.ID = m.ID
					if err := c.conn.Send(reply); err != nil {
						c.cancel(err)
					}
				})
			default:
				// Not from here: who reads must not wait for who does not. A
				// hub that asks even more gets no answer.
				select {
				case refusals <- struct{}{}:
					wg.Go(func() {
						defer func() { <-refusals }()
						if err := c.conn.Send(edgeapi.TwinReply{ID: m.ID, Code: http.StatusTooManyRequests, Message: "the node serves too many requests already"}); err != nil {
							c.cancel(err)
						}
					})
				default:
				}
			}
		default:
			return fmt.Errorf("the hub sent a %T in the twins' conversation", m)
		}
	}
}

func (t *Twins) acked(c *conversation, seq uint64) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if seq > c.sent {
		return fmt.Errorf("the hub acknowledged frame %d of %d", seq, c.sent)
	}
	c.acked = max(c.acked, seq)
	if c.waiting = time.Now(); c.acked == c.sent {
		c.waiting = time.Time{}
	}
	if len(c.queue) > 0 {
		poke(c.kick)
	}
	return nil
}

// wanted has these twins sent whole.
func (t *Twins) wanted(c *conversation, m edgeapi.TwinWant) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.conv != c {
		return
	}
	for _, ref := range m.Devices {
		if d := t.devices[Key{ref.Namespace, ref.Name}]; d != nil {
			for i := range d.props {
				if d.props[i].rep.q != "" {
					d.upPropLocked(t, i)
				}
			}
		}
	}
}

// restoreFromHub takes back what the power took: only what is older here, or
// not there at all, and as stale.
func (t *Twins) restoreFromHub(m edgeapi.TwinRestore) {
	var fx effects
	t.mu.Lock()
	for _, v := range m.Values[:min(len(m.Values), maxRestoring)] {
		d := t.devices[Key{v.Device.Namespace, v.Device.Name}]
		if d == nil {
			continue
		}
		i, ok := d.model.index[v.Property]
		if !ok {
			continue
		}
		ver, err := v1alpha1.ParseVersion(v.Version)
		p := &d.props[i]
		if err != nil || ver.IsZero() || t.fresh(&p.rep) {
			continue
		}
		if was := t.versionOf(&p.rep); !was.IsZero() && (ver.Incarnation != was.Incarnation || ver.Compare(was) <= 0) {
			continue
		}
		if ver.Incarnation == t.inc && ver.Epoch >= t.epoch {
			continue // nobody has said that
		}
		stored := reportedStored{V: v.Value, Q: v.Quality, TS: v.TS, RX: v.Received, Epoch: ver.Epoch, Seq: ver.Seq, Inc: ver.Incarnation, Message: clip(v.Message, 256)}
		rep, ok := stored.reported(&d.model.props[i], t.inc)
		if !ok {
			continue
		}
		p.rep = rep
		t.dirtyLocked(d, &fx)
		t.changedLocked(d, &fx)
		t.considerLocked(d, i, time.Now(), &fx)
	}
	t.mu.Unlock()
	t.flush(&fx)
}

// serve answers the hub.
func (t *Twins) serve(ctx context.Context, r edgeapi.TwinRequest) edgeapi.TwinReply {
	limit := time.Duration(min(max(r.Timeout, 0), maxTimeout.Milliseconds())) * time.Millisecond
	if limit == 0 {
		limit = defaultTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	dev := Key{r.Device.Namespace, r.Device.Name}
	switch r.Op {
	case edgeapi.TwinOpCommand:
		var call edgeapi.TwinCommand
		if err := json.Unmarshal(r.Body, &call); err != nil {
			return edgeapi.TwinReply{Code: http.StatusBadRequest, Message: "the command cannot be read: " + clip(err.Error(), 256)}
		}
		status := t.Command(ctx, dev, CommandCall{ID: call.ID, Name: call.Name, Args: call.Args, By: clip(r.By, 128), Timeout: limit})
		body, err := json.Marshal(status)
		if err != nil {
			return edgeapi.TwinReply{Code: http.StatusInternalServerError, Message: err.Error()}
		}
		return edgeapi.TwinReply{Code: status.Code, Message: status.Message, Body: body}
	case edgeapi.TwinOpRefresh:
		if err := t.Refresh(ctx, dev); err != nil {
			return edgeapi.TwinReply{Code: http.StatusServiceUnavailable, Message: clip(err.Error(), 256)}
		}
		return edgeapi.TwinReply{Code: http.StatusOK}
	}
	return edgeapi.TwinReply{Code: http.StatusNotImplemented, Message: fmt.Sprintf("the node does not know %.32q", r.Op)}
}

// baseHolds asks the hub whether what is about to be overridden is still what
// the cloud wants. A hub that does not answer is one that is away.
func (t *Twins) baseHolds(ctx context.Context, dev Key, base edgeapi.TwinBase) bool {
	ctx, cancel := context.WithTimeout(ctx, askFor)
	defer cancel()
	t.mu.Lock()
	c := t.conv
	if c == nil || !c.welcomed {
		t.mu.Unlock()
		return true
	}
	c.asked++
	id := c.asked
	answer := make(chan edgeapi.TwinReply, 1)
	c.answers[id] = answer
	t.mu.Unlock()
	defer func() {
		t.mu.Lock()
		delete(c.answers, id)
		t.mu.Unlock()
	}()
	if c.conn.Send(edgeapi.TwinRequest{ID: id, Op: edgeapi.TwinOpBase, Device: refOf(dev), Timeout: askFor.Milliseconds(), Body: mustJSON(base)}) != nil {
		return true
	}
	select {
	case r := <-answer:
		return r.Code != http.StatusConflict
	case <-ctx.Done():
		return true
	}
}

// Found implements Sink.
func (t *Twins) Found(dev Key, candidates []v1alpha1.Candidate, dropped int) {
	if n := len(candidates) - maxFound; n > 0 {
		candidates, dropped = candidates[:maxFound], dropped+n
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	f := t.discoveries[dev]
	if f == nil {
		return
	}
	f.candidates, f.dropped, f.up = slices.Clone(candidates), dropped, true
	if t.conv != nil {
		poke(t.conv.kick)
	}
}

// foundLocked is what is to be told of discoveries.
func (t *Twins) foundLocked() []edgeapi.TwinFound {
	var out []edgeapi.TwinFound
	for k, f := range t.discoveries {
		if !f.up {
			continue
		}
		f.up = false
		m := edgeapi.TwinFound{Discovery: refOf(k), Dropped: f.dropped, Candidates: make([]edgeapi.TwinCandidate, 0, len(f.candidates))}
		room := 1 << 20
		for _, c := range f.candidates {
			for _, texts := range []map[string]string{c.Attributes, c.Params} {
				for name, text := range texts {
					room -= len(name) + len(text) + 8
				}
			}
			if room -= len(c.Name) + 64; room < 0 {
				m.Dropped++
				continue
			}
			m.Candidates = append(m.Candidates, edgeapi.TwinCandidate{Name: c.Name, Attributes: c.Attributes, Params: c.Params, LastSeen: c.LastSeen.UnixMilli()})
		}
		out = append(out, m)
	}
	return out
}
