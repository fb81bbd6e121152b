package devicetwin

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/value"
)

const (
	// settle is how long a device that came (back) is given to tell what it
	// has before it is told again what it had been told.
	settle = 2 * time.Second
	// confirmIn is how long a device is given to report what it was told; it
	// doubles with each try, to confirmMost.
	confirmIn   = 10 * time.Second
	confirmMost = 5 * time.Minute
	// reachIn is the pause after it could not be reached; it doubles to
	// reachMost.
	reachIn   = time.Second
	reachMost = time.Minute
	// forgiven is after how long a device that was told something and did it
	// is told again without a pause, should it drift.
	forgiven = 10 * time.Minute
	// inFlight bounds what is on its way to devices at once.
	inFlight = 64
)

// job is something to tell a device: a property (Write), a command, or, with
// neither, that it tell its values (Refresh).
type job struct {
	d    *device
	prop string // by name: the model may change meanwhile
	cmd  *command
}

// considerLocked sees to one property: is it as wanted, and if not, what is
// next. It is called whenever any of that changed.
func (t *Twins) considerLocked(d *device, i int, now time.Time, fx *effects) {
	p, m := &d.props[i], &d.model.props[i]
	w := p.want
	if w == nil {
		return
	}
	v, ok := w.effective()
	if !ok {
		if w.err != nil {
			t.stateLocked(d, i, v1alpha1.DesiredInvalid, clip(w.err.Error(), 256), fx)
		} else {
			t.stateLocked(d, i, "", "", fx)
		}
		return
	}
	has := p.has(m, v)
	if has && !w.resend {
		t.stateLocked(d, i, v1alpha1.DesiredApplied, "", fx)
		return
	}
	switch {
	case w.inflight || w.queued:
		return // it is considered again after
	case w.state == v1alpha1.DesiredRejected:
		return // until something else is wanted, or it comes back
	case !d.reachable():
		if !has {
			t.stateLocked(d, i, v1alpha1.DesiredPending, "the device is not there: "+d.live.phase, fx)
		} else if w.state == "" {
			t.stateLocked(d, i, v1alpha1.DesiredApplied, "", fx)
		}
		return
	case now.Before(w.next):
		if w.state == "" {
			t.stateLocked(d, i, v1alpha1.DesiredPending, "", fx)
		}
		t.wakeLocked(d, w.next)
		return
	}
	if w.state == v1alpha1.DesiredSent {
		t.stateLocked(d, i, v1alpha1.DesiredTimeout, "the device does not report it; it is told again, with growing pauses", fx)
	} else if w.state != v1alpha1.DesiredTimeout {
		t.stateLocked(d, i, v1alpha1.DesiredPending, "", fx)
	}
	w.queued = true
	t.jobs = append(t.jobs, job{d: d, prop: m.Name})
	poke(t.kickJobs)
}

// stateLocked notes how far what is wanted has come.
func (t *Twins) stateLocked(d *device, i int, state, message string, fx *effects) {
	w := d.props[i].want
	if w.state == state && w.message == message {
		return
	}
	w.state, w.message = state, message
	t.changedLocked(d, fx)
	d.upStateLocked(t)
}

// onlineLocked has a device that came told all that it does not have, and what
// it should have had from before, unless it tells in time that it does.
func (t *Twins) onlineLocked(d *device, fx *effects) {
	now := time.Now()
	for i := range d.props {
		w := d.props[i].want
		if w == nil {
			continue
		}
		v, ok := w.effective()
		if !ok {
			continue
		}
		w.attempts, w.failures, w.next = 0, 0, now
		if w.state == v1alpha1.DesiredRejected || w.state == v1alpha1.DesiredTimeout {
			t.stateLocked(d, i, v1alpha1.DesiredPending, "", fx)
		}
		if d.props[i].has(&d.model.props[i], v) {
			w.resend, w.next = true, now.Add(settle)
		}
		t.considerLocked(d, i, now, fx)
	}
}

// awakeLocked has a device that woke up told what waited for it.
func (t *Twins) awakeLocked(d *device, fx *effects) {
	now := time.Now()
	for i := range d.props {
		if w := d.props[i].want; w != nil {
			w.next = now
			t.considerLocked(d, i, now, fx)
		}
	}
}

// intentLocked: the device tells what it has accepted. It need not be told
// again while it works on it.
func (t *Twins) intentLocked(d *device, i int, v any, fx *effects) {
	w := d.props[i].want
	if w == nil {
		return
	}
	want, ok := w.effective()
	if !ok || !d.model.props[i].typ.Same(v, want) || w.state == v1alpha1.DesiredApplied {
		return
	}
	w.next = time.Now().Add(confirmMost)
	t.stateLocked(d, i, v1alpha1.DesiredSent, "the device has accepted it", fx)
}

func (t *Twins) refreshLocked(d *device) {
	if d.refreshing || t.driver == nil {
		return
	}
	d.refreshing = true
	t.urgent = append(t.urgent, job{d: d})
	poke(t.kickJobs)
}

// Refresh asks the device for its values.
func (t *Twins) Refresh(ctx context.Context, dev Key) error {
	t.mu.Lock()
	d := t.devices[dev]
	t.mu.Unlock()
	if d == nil {
		return fmt.Errorf("there is no device %s on this node", dev)
	}
	return t.driver.Refresh(ctx, dev)
}

// dispatcher tells devices what is due: writes at a bounded rate, commands and
// refreshes (which the driver paces) before them and out of their way. The jobs
// that wait are at most one per property, per device and per command.
func (t *Twins) dispatcher(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	slots, urgentSlots := make(chan struct{}, inFlight), make(chan struct{}, inFlight)
	run := func(slots chan struct{}, j job) {
		wg.Go(func() {
			defer func() {
				<-slots
				poke(t.kickJobs)
			}()
			t.do(ctx, j)
		})
	}
	gap := time.Second / time.Duration(t.cfg.WriteRate)
	var ready time.Time // when what was begun so far was due at that rate
	timer := time.NewTimer(0)
	defer timer.Stop()
	for ctx.Err() == nil {
		now := time.Now()
		if earliest := now.Add(-gap * time.Duration(t.cfg.WriteBurst-1)); ready.Before(earliest) {
			ready = earliest
		}
		wait := ready.Sub(now)
		var urgent, write *job
		t.mu.Lock()
		if len(t.urgent) > 0 && len(urgentSlots) < inFlight {
			urgent, t.urgent = pop(t.urgent)
		} else if len(t.jobs) > 0 && len(slots) < inFlight && wait <= 0 {
			write, t.jobs = pop(t.jobs)
		}
		waiting := len(t.jobs) > 0
		t.mu.Unlock()
		switch {
		case urgent != nil:
			urgentSlots <- struct{}{}
			run(urgentSlots, *urgent)
			continue
		case write != nil:
			ready = ready.Add(gap)
			slots <- struct{}{}
			run(slots, *write)
			continue
		}
		if waiting && wait > 0 {
			timer.Reset(wait)
		}
		select {
		case <-ctx.Done():
		case <-t.kickJobs:
		case <-timer.C:
		}
	}
}

func pop(jobs []job) (*job, []job) {
	j := jobs[0]
	jobs[0] = job{}
	if jobs = jobs[1:]; len(jobs) == 0 {
		jobs = nil // the room of a burst is not kept
	}
	return &j, jobs
}

func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func (t *Twins) do(ctx context.Context, j job) {
	switch {
	case j.cmd != nil:
		t.deliver(ctx, j.d, j.cmd)
	case j.prop == "":
		ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
		defer cancel()
		err := t.driver.Refresh(ctx, j.d.key)
		t.mu.Lock()
		j.d.refreshing = false
		t.mu.Unlock()
		if err != nil {
			t.cfg.Log.Debug("the device was not asked for its values", "device", j.d.key, "error", err)
		}
	default:
		t.write(ctx, j)
	}
}

// write tells the device one property: what is wanted now, whatever was when
// the job was made.
func (t *Twins) write(ctx context.Context, j job) {
	var fx effects
	t.mu.Lock()
	d := j.d
	i, w := d.laneOf(j.prop)
	if w == nil {
		t.mu.Unlock()
		return
	}
	w.queued = false
	p, m := &d.props[i], &d.model.props[i]
	v, ok := w.effective()
	if !ok || !d.reachable() || p.has(m, v) && !w.resend {
		t.considerLocked(d, i, time.Now(), &fx)
		t.mu.Unlock()
		t.flush(&fx)
		return
	}
	w.inflight = true
	token := w.token
	req := WriteRequest{Device: d.key, Property: m.Name, Value: v}
	if w.over != nil {
		req.Expires = time.Until(w.over.until)
	}
	limit := 15 * time.Second
	if m.Write != nil && m.Write.Reply != nil {
		limit = max(limit, m.Write.Reply.Timeout.Duration+5*time.Second)
	}
	t.mu.Unlock()
	t.stats.writes.Add(1)

	wctx, cancel := context.WithTimeout(ctx, limit)
	err := t.driver.Write(wctx, req)
	cancel()

	now := time.Now()
	t.mu.Lock()
	w.inflight = false
	if i, there := d.laneOf(j.prop); there == w && ctx.Err() == nil {
		if w.token == token {
			t.toldLocked(d, i, err, now, &fx)
		}
		t.considerLocked(d, i, now, &fx)
	}
	t.mu.Unlock()
	t.flush(&fx)
}

// laneOf is the property's place and what is wanted of it; nil when there is no
// such thing any more.
func (d *device) laneOf(name string) (int, *want) {
	i, ok := d.model.index[name]
	if d.gone || !ok {
		return 0, nil
	}
	return i, d.props[i].want
}

// has tells whether the device is as far as is known at v. Of what cannot be
// read only its having been told is known.
func (p *prop) has(m *property, v any) bool {
	if !m.typ.Readable() {
		return p.want.told
	}
	return p.rep.v != nil && m.typ.Same(p.rep.v, v)
}

// toldLocked takes the outcome of a Write of what still holds.
func (t *Twins) toldLocked(d *device, i int, err error, now time.Time, fx *effects) {
	w := d.props[i].want
	name := d.model.props[i].Name
	switch {
	case err == nil:
		w.told, w.resend, w.failures = true, false, 0
		if now.Sub(w.lastTold) > forgiven {
			w.attempts = 0
		}
		w.lastTold = now
		w.attempts++
		w.next = now.Add(jitter(backoff(confirmIn, confirmMost, w.attempts)))
		if v, _ := w.effective(); d.props[i].has(&d.model.props[i], v) {
			return // considerLocked calls it applied
		}
		if w.state != v1alpha1.DesiredTimeout && w.state != v1alpha1.DesiredSent {
			t.stateLocked(d, i, v1alpha1.DesiredSent, "", fx)
		}
	case errors.Is(err, ErrRejected):
		w.resend, w.failures = false, 0
		message := clip(err.Error(), 256)
		t.stateLocked(d, i, v1alpha1.DesiredRejected, message, fx)
		t.eventLocked(d, fx, true, ReasonDesiredRejected, fmt.Sprintf("%s: %s", name, message))
	default:
		w.failures++
		w.next = now.Add(jitter(backoff(reachIn, reachMost, w.failures)))
		state := v1alpha1.DesiredPending
		if !errors.Is(err, ErrNotConnected) {
			// It may have been told.
			if errors.Is(err, context.DeadlineExceeded) {
				state = v1alpha1.DesiredTimeout
			}
			w.attempts++
			w.next = now.Add(jitter(backoff(confirmIn, confirmMost, w.attempts)))
		}
		t.stateLocked(d, i, state, clip(err.Error(), 256), fx)
	}
}

func backoff(first, most time.Duration, n int) time.Duration {
	d := first
	for range n - 1 {
		if d *= 2; d >= most {
			return most
		}
	}
	return d
}

// jitter spreads d over 90 to 110 percent.
func jitter(d time.Duration) time.Duration {
	return d - d/10 + rand.N(d/5+1)
}

// reflectWait is a command that waits to be seen in a property.
type reflectWait struct {
	prop int
	v    any
	seen chan struct{}
}

// reflectLocked tells commands that wait for the value of a property.
func (t *Twins) reflectLocked(d *device, i int) {
	for _, c := range d.cmds {
		if r := c.reflect; r != nil && r.prop == i && value.Equal(d.props[i].rep.v, r.v) {
			close(r.seen)
			c.reflect = nil
		}
	}
}
