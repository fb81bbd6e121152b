package devicetwin

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"time"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/value"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

const (
	defaultTTL = 12 * time.Hour
	maxTTL     = 720 * time.Hour
	// askFor is how long the hub is given to tell whether the cloud has changed
	// what is about to be overridden.
	askFor = 5 * time.Second
	// answerFor is how long an answer to a Patch waits to tell how the device
	// took it.
	answerFor  = 300 * time.Millisecond
	maxResults = 32
)

// want is what is wanted of one property, and how far that has come. The first
// group is the cloud's.
type want struct {
	raw json.RawMessage // nil: nothing
	v   any             // nil: nothing, or not allowed
	err error           // why not
	gen int64           // that last changed it
	at  int64           // when that was, Unix milliseconds in the hub's time; 0: not known

	over *override

	ver v1alpha1.Version // of the last change of what holds of the two

	// The way to the device; see writer.go.
	state, message string
	token          uint64 // of what holds
	queued         bool
	inflight       bool
	told           bool // the device was told what holds
	resend         bool // tell it even if it had that before it went
	attempts       int  // since it holds
	failures       int  // in a row to reach it
	lastTold       time.Time
	next           time.Time // not before
}

// override is a desired value set on the node.
type override struct {
	v              any
	by             string
	base           int64 // generation that it was set on top of
	since, expires int64 // Unix milliseconds in the hub's time
	until          time.Time
	epoch, seq     uint64
}

func (d *device) wantOf(i int) *want {
	if d.props[i].want == nil {
		d.props[i].want = &want{}
	}
	return d.props[i].want
}

// effective is what holds.
func (w *want) effective() (v any, ok bool) {
	if w.over != nil {
		return w.over.v, true
	}
	return w.v, w.v != nil
}

// overridden tells whether the node wants something else than the cloud.
func (w *want) overridden() bool {
	return w.over != nil && w.raw != nil && (w.v == nil || !value.Equal(w.v, w.over.v))
}

func parseDesired(p *property, raw json.RawMessage) (any, error) {
	if raw == nil {
		return nil, nil
	}
	return p.typ.ParseDesired(raw)
}

// setDesiredLocked takes what the Device's spec wants.
func (t *Twins) setDesiredLocked(d *device, dev *v1alpha1.Device, remodelled bool, fx *effects) {
	wentBack := dev.Generation < d.gen
	if dev.Generation == d.gen && !remodelled && d.specSeen {
		return
	}
	d.specSeen = true
	times := desiredTimes(dev)
	wall, _ := t.cfg.Now()
	now := time.Now()
	overridesChanged := false
	for i := range d.props {
		p := &d.model.props[i]
		raw := json.RawMessage(nil)
		if j, ok := dev.Spec.Desired[p.Name]; ok && !bytes.Equal(bytes.TrimSpace(j.Raw), []byte("null")) {
			raw = compactJSON(j.Raw)
		}
		w := d.props[i].want
		if w == nil && raw == nil {
			continue
		}
		w = d.wantOf(i)
		before, had := w.effective()
		changed := !bytes.Equal(w.raw, raw)
		if changed || wentBack {
			w.raw, w.gen = raw, dev.Generation
			if w.at = times[p.Name].UnixMilli(); times[p.Name].IsZero() {
				w.at = wall.UnixMilli()
			}
		}
		w.v, w.err = parseDesired(p, raw)
		if w.err != nil && changed {
			t.eventLocked(d, fx, true, ReasonDesiredInvalid, fmt.Sprintf("%s: %s", p.Name, clip(w.err.Error(), 256)))
		}
		if w.over != nil && (wentBack || changed && w.gen > w.over.base && t.cloudWins(p, w)) {
			t.eventLocked(d, fx, true, ReasonDesiredConflict, fmt.Sprintf(
				"%s: the cloud's %s (generation %d) replaces %s, set here by %s on top of generation %d",
				p.Name, clip(string(w.raw), 128), w.gen, clip(string(value.JSON(w.over.v)), 128), w.over.by, w.over.base))
			w.over = nil
			overridesChanged = true
		} else if w.over != nil && changed && w.gen > w.over.base && w.overridden() {
			t.eventLocked(d, fx, false, ReasonDesiredConflict, fmt.Sprintf(
				"%s: %s, set here by %s, holds against the cloud's %s (generation %d)",
				p.Name, clip(string(value.JSON(w.over.v)), 128), w.over.by, clip(string(w.raw), 128), w.gen))
		}
		if after, has := w.effective(); changed || remodelled || has != had || !value.Equal(before, after) {
			t.wantChangedLocked(d, i, has != had || !value.Equal(before, after) || remodelled)
		}
		t.considerLocked(d, i, now, fx)
	}
	d.gen = dev.Generation
	switch {
	case overridesChanged:
		t.unstored[d.key] = d.uid // they are written anew
	case d.gen != d.stored:
		t.unstored[d.key] = t.unstored[d.key]
	default:
		return // as the disk has it
	}
	if wentBack {
		d.stored = 0
		t.eventLocked(d, fx, true, ReasonGenerationWentBack, fmt.Sprintf(
			"the Device's generation went back to %d, as after a restore of the cluster; what the cloud wants is taken whole", dev.Generation))
		for i := range d.props {
			d.upPropLocked(t, i)
		}
	}
	t.changedLocked(d, fx)
	d.upStateLocked(t)
}

// cloudWins settles an override against what the cloud wants since.
func (t *Twins) cloudWins(p *property, w *want) bool {
	switch p.authority {
	case v1alpha1.AuthorityEdge:
		return false
	case v1alpha1.AuthorityLWW:
		return w.at >= w.over.since
	}
	return true
}

// wantChangedLocked notes that something else holds, or would.
func (t *Twins) wantChangedLocked(d *device, i int, effective bool) {
	w := d.props[i].want
	w.ver = v1alpha1.Version{Incarnation: t.inc, Epoch: t.epoch, Seq: t.nextLocked(d)}
	if effective {
		w.token++
		w.told, w.resend = false, false
		w.attempts, w.failures, w.next = 0, 0, time.Time{}
		w.state, w.message = "", ""
	}
	d.upStateLocked(t)
}

// desiredTimes is when each property of the spec was last set, where the hub
// tells.
func desiredTimes(dev *v1alpha1.Device) map[string]time.Time {
	if raw := dev.Annotations[v1alpha1.AnnotationDesiredTimes]; raw != "" {
		var times map[string]time.Time
		if json.Unmarshal([]byte(raw), &times) == nil {
			return times
		}
	}
	return v1alpha1.DesiredTimes(dev.ManagedFields)
}

func compactJSON(raw []byte) json.RawMessage {
	var b bytes.Buffer
	if json.Compact(&b, raw) != nil {
		return bytes.Clone(raw)
	}
	return b.Bytes()
}

// SetDesired sets what is wanted of a device here, on the node. It returns once
// that is on the disk; how the device takes it is seen in the twin.
func (t *Twins) SetDesired(ctx context.Context, dev Key, p Patch) Result {
	if r, ok := checkPatch(&p); !ok {
		return r
	}
	d, plan, r := t.setDesired(ctx, dev, &p)
	if d == nil {
		return r
	}
	r = t.answer(ctx, d, plan, p.ID)
	if p.ID != "" {
		t.mu.Lock()
		d.results = append(d.results, r)
		if len(d.results) > maxResults {
			d.results = slices.Delete(d.results, 0, 1)
		}
		t.mu.Unlock()
	}
	return r
}

// setDesired returns the device and what was set, or a nil device and why
// nothing was.
func (t *Twins) setDesired(ctx context.Context, dev Key, p *Patch) (*device, map[int]*override, Result) {
	refuse := func(r Result) (*device, map[int]*override, Result) { return nil, nil, r }
	unlock, err := t.serial.lock(ctx, dev)
	if err != nil {
		return refuse(Result{ID: p.ID, Code: http.StatusServiceUnavailable, Message: err.Error()})
	}
	defer unlock()
	wall, _ := t.cfg.Now()

	t.mu.Lock()
	d := t.devices[dev]
	if d == nil {
		t.mu.Unlock()
		return refuse(notHere(p.ID, dev))
	}
	if i := slices.IndexFunc(d.results, func(r Result) bool { return r.ID == p.ID }); p.ID != "" && i >= 0 {
		r := d.results[i]
		t.mu.Unlock()
		return refuse(r)
	}
	m := d.model // the plan is by its properties
	plan, ask, r := t.planLocked(d, p, wall, t.connectedLocked())
	base := edgeapi.TwinBase{UID: d.uid, Properties: ask, Generation: d.gen}
	t.mu.Unlock()
	if r.Code != 0 {
		return refuse(r)
	}
	if len(ask) > 0 && !t.baseHolds(ctx, dev, base) {
		return refuse(Result{ID: p.ID, Code: http.StatusConflict, Message: "the cloud has changed it meanwhile; look again"})
	}

	t.mu.Lock()
	record := t.encodeOverridesLocked(d, plan)
	t.mu.Unlock()
	if err := t.cfg.DB.Commit(ctx, Mut{bucketOverride, dev.String(), record}); err != nil {
		return refuse(Result{ID: p.ID, Code: http.StatusServiceUnavailable, Message: "the node's disk takes nothing: " + err.Error()})
	}

	var fx effects
	t.mu.Lock()
	if t.devices[dev] != d || d.model != m {
		t.unstored[dev] = d.uid
		poke(t.kickStore)
		t.mu.Unlock()
		return refuse(notHere(p.ID, dev))
	}
	for _, i := range slices.Sorted(maps.Keys(plan)) {
		// The spec may have come while the disk was written.
		w := d.wantOf(i)
		if o := plan[i]; o != nil && w.gen > o.base && w.raw != nil && t.cloudWins(&d.model.props[i], &want{at: w.at, over: o}) {
			t.unstored[dev] = d.uid
			poke(t.kickStore)
			t.mu.Unlock()
			t.flush(&fx)
			return refuse(Result{ID: p.ID, Code: http.StatusConflict, Message: "the cloud has changed it meanwhile; look again"})
		}
	}
	for i, o := range plan {
		w := d.wantOf(i)
		before, had := w.effective()
		w.over = o
		after, has := w.effective()
		t.wantChangedLocked(d, i, has != had || !value.Equal(before, after))
		if o != nil {
			t.wakeLocked(d, o.until)
		}
		t.considerLocked(d, i, time.Now(), &fx)
	}
	t.changedLocked(d, &fx)
	t.mu.Unlock()
	t.flush(&fx)
	return d, plan, Result{}
}

func notHere(id string, dev Key) Result {
	return Result{ID: id, Code: http.StatusNotFound, Message: fmt.Sprintf("there is no device %s on this node", dev)}
}

func checkPatch(p *Patch) (Result, bool) {
	bad := func(code int, format string, args ...any) (Result, bool) {
		return Result{ID: clip(p.ID, 64), Code: code, Message: fmt.Sprintf(format, args...)}, false
	}
	switch {
	case len(p.ID) > 64:
		return bad(http.StatusBadRequest, "the id is longer than 64 bytes")
	case len(p.By) > 128:
		return bad(http.StatusBadRequest, "the name of who sets it is longer than 128 bytes")
	case len(p.Props) == 0:
		return bad(http.StatusBadRequest, "no property is set")
	case len(p.Props) > 256:
		return bad(http.StatusBadRequest, "more than 256 properties are set")
	case p.TTL < 0 || p.TTL > maxTTL:
		return bad(http.StatusUnprocessableEntity, "the ttl is not between 0 and %v", maxTTL)
	}
	return Result{}, true
}

// planLocked judges a Patch: what becomes of which property's override (nil: it
// ends), and which properties the hub is to be asked about.
func (t *Twins) planLocked(d *device, p *Patch, wall time.Time, connected bool) (plan map[int]*override, ask []string, r Result) {
	plan = make(map[int]*override)
	wrong := make(map[string]string)
	code := 0
	refuse := func(name string, c int, format string, args ...any) {
		wrong[name] = fmt.Sprintf(format, args...)
		// What cannot be at all comes before what cannot be now.
		rank := map[int]int{0: 0, http.StatusConflict: 1, http.StatusForbidden: 2, http.StatusUnprocessableEntity: 3}
		if rank[c] > rank[code] {
			code = c
		}
	}
	for name, raw := range p.Props {
		i, ok := d.model.index[name]
		if !ok {
			refuse(name, http.StatusUnprocessableEntity, "the model %s has no such property", d.model.name)
			continue
		}
		m := &d.model.props[i]
		w := d.props[i].want
		if w == nil {
			w = &want{}
		}
		base := d.gen
		if p.BaseGen != nil {
			base = *p.BaseGen
		}
		if p.BaseGen != nil && w.gen > base {
			refuse(name, http.StatusConflict, "the cloud changed it with generation %d", w.gen)
			continue
		}
		if p.Base != nil && !w.ver.IsZero() && (p.Base.Incarnation != w.ver.Incarnation || w.ver.Compare(*p.Base) > 0) {
			refuse(name, http.StatusConflict, "it was changed at %s", w.ver)
			continue
		}
		if trimmed := bytes.TrimSpace(raw); len(trimmed) == 0 || bytes.Equal(trimmed, []byte("null")) {
			plan[i] = nil
			continue
		}
		v, err := m.typ.ParseDesired(raw)
		if err != nil {
			refuse(name, http.StatusUnprocessableEntity, "%v", err)
			continue
		}
		switch overrideWhen(m) {
		case "never":
			refuse(name, http.StatusForbidden, "the model has it set by the cloud only (localOverride.when: never)")
			continue
		case "offline":
			if connected {
				refuse(name, http.StatusForbidden, "the cloud is connected: set it in the Device's spec, or have localOverride.when: always in the model")
				continue
			}
		}
		if m.authority == v1alpha1.AuthorityLWW && w.raw != nil && w.at >= wall.UnixMilli() {
			refuse(name, http.StatusConflict, "the cloud's is later, of %s", time.UnixMilli(w.at).UTC().Format(time.RFC3339))
			continue
		}
		if connected && m.authority == v1alpha1.AuthorityCloud {
			ask = append(ask, name)
		}
		ttl := p.TTL
		if ttl == 0 {
			ttl = defaultTTL
			if lo := m.LocalOverride; lo != nil && lo.TTL.Duration > 0 {
				ttl = min(lo.TTL.Duration, maxTTL)
			}
		}
		plan[i] = &override{
			v: v, by: p.By, base: base, since: wall.UnixMilli(), expires: wall.Add(ttl).UnixMilli(),
			until: time.Now().Add(ttl), epoch: t.epoch, seq: t.seq + 1,
		}
	}
	if code != 0 {
		return nil, nil, Result{ID: p.ID, Code: code, Message: "nothing was set", Props: wrong}
	}
	slices.Sort(ask)
	return plan, ask, Result{}
}

func overrideWhen(m *property) string {
	if lo := m.LocalOverride; lo != nil && lo.When != "" {
		return lo.When
	}
	if m.authority == v1alpha1.AuthorityCloud {
		return "offline"
	}
	return "always"
}

// answer waits a moment for the device.
func (t *Twins) answer(ctx context.Context, d *device, plan map[int]*override, id string) Result {
	deadline := time.NewTimer(answerFor)
	defer deadline.Stop()
	r := Result{ID: id, Code: http.StatusOK}
	for {
		t.mu.Lock()
		r.Version, r.State = t.versionLocked(d), ""
		for i := range plan {
			if i >= len(d.props) || d.props[i].want == nil {
				continue
			}
			if s := d.props[i].want.state; s != "" && (r.State == "" || rankOf(s) < rankOf(r.State)) {
				r.State = s
			}
		}
		wait := t.waitLocked()
		settled := r.State != v1alpha1.DesiredPending || !d.reachable() || d.gone
		t.mu.Unlock()
		if settled {
			return r
		}
		select {
		case <-wait:
		case <-deadline.C:
			return r
		case <-ctx.Done():
			return r
		}
	}
}

func rankOf(state string) int {
	return slices.Index([]string{
		v1alpha1.DesiredRejected, v1alpha1.DesiredTimeout, v1alpha1.DesiredPending,
		v1alpha1.DesiredSent, v1alpha1.DesiredApplied,
	}, state)
}

// overridesTimeLocked ends the overrides whose time is over.
func (t *Twins) overridesTimeLocked(d *device, now time.Time, fx *effects) {
	ended := false
	for i := range d.props {
		w := d.props[i].want
		if w == nil || w.over == nil {
			continue
		}
		if w.over.until.After(now) {
			t.wakeLocked(d, w.over.until)
			continue
		}
		before, _ := w.effective()
		w.over = nil
		after, has := w.effective()
		t.wantChangedLocked(d, i, !has || !value.Equal(before, after))
		ended = true
	}
	if ended {
		t.changedLocked(d, fx)
		t.unstored[d.key] = d.uid
		poke(t.kickStore)
	}
}
