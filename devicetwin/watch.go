package devicetwin

import (
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"slices"
	"time"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/value"
)

// ringEntry is that something of a device changed.
type ringEntry struct {
	seq     uint64
	d       *device
	deleted bool
}

func (t *Twins) ringLocked(e ringEntry) {
	if n := len(t.ring); n < ringSize {
		t.ring = append(t.ring, e)
	} else {
		t.forgotten = t.ring[t.ringNext].seq
		t.ring[t.ringNext] = e
	}
	t.ringNext = (t.ringNext + 1) % ringSize
	t.notifyLocked()
}

// notifyLocked wakes who waits for a change.
func (t *Twins) notifyLocked() {
	if t.waiting != nil {
		close(t.waiting)
		t.waiting = nil
	}
}

// waitLocked returns a channel that is closed at the next change.
func (t *Twins) waitLocked() <-chan struct{} {
	if t.waiting == nil {
		t.waiting = make(chan struct{})
	}
	return t.waiting
}

// Get returns one twin.
func (t *Twins) Get(dev Key) (*Doc, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	d := t.devices[dev]
	if d == nil {
		return nil, false
	}
	return t.docLocked(d), true
}

// Delta returns where a device is not as it should be.
func (t *Twins) Delta(dev Key) (*Delta, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	d := t.devices[dev]
	if d == nil {
		return nil, false
	}
	return t.deltaLocked(d), true
}

// List returns all twins, by namespace and name.
func (t *Twins) List() []*Doc {
	devices, _ := t.snapshot()
	docs := make([]*Doc, 0, len(devices))
	for _, d := range devices {
		if doc, ok := t.Get(d.key); ok {
			docs = append(docs, doc)
		}
	}
	return docs
}

// snapshot is all devices, in order, and the version they are at least of.
func (t *Twins) snapshot() ([]*device, v1alpha1.Version) {
	t.mu.Lock()
	defer t.mu.Unlock()
	devices := make([]*device, 0, len(t.devices))
	for _, d := range t.devices {
		devices = append(devices, d)
	}
	slices.SortFunc(devices, func(a, b *device) int { return compareKeys(a.key, b.key) })
	return devices, v1alpha1.Version{Incarnation: t.inc, Epoch: t.epoch, Seq: t.seq}
}

func compareKeys(a, b Key) int {
	if a.Namespace != b.Namespace {
		if a.Namespace < b.Namespace {
			return -1
		}
		return 1
	}
	switch {
	case a.Name < b.Name:
		return -1
	case a.Name > b.Name:
		return 1
	}
	return 0
}

// Watch tells changes after from, until ctx ends or the caller stops. Of a
// version that is not of this run, too long ago, or zero, it tells all twins
// first, each as a snapshot, and then that the snapshot is complete.
//
// It keeps nothing for a watcher: one that reads slowly gets the newest of what
// changed meanwhile, or, when too much did, a snapshot again; it does not slow
// anybody down.
func (t *Twins) Watch(ctx context.Context, from v1alpha1.Version) iter.Seq[Change] {
	return func(yield func(Change) bool) {
		at, resumed := from.Seq, from.Incarnation == t.inc && from.Epoch == t.epoch
		for ctx.Err() == nil {
			t.mu.Lock()
			now := t.seq
			var changed []ringEntry
			whole := !resumed || at > now || at < t.forgotten
			if !whole {
				changed = t.sinceLocked(at)
			}
			var wait <-chan struct{}
			if !whole && len(changed) == 0 {
				wait = t.waitLocked()
			}
			t.mu.Unlock()
			switch {
			case wait != nil:
				select {
				case <-wait:
				case <-ctx.Done():
				}
				continue
			case whole:
				devices, version := t.snapshot()
				for _, d := range devices {
					c, ok := t.change(d, 0)
					c.Type = ChangeSnapshot
					// To resume from here would miss what the snapshot has not
					// told yet.
					c.Version = v1alpha1.Version{}
					if ok && !(ctx.Err() == nil && yield(c)) {
						return
					}
				}
				if !yield(Change{Type: ChangeSynced, Version: version}) {
					return
				}
				at, resumed = version.Seq, true
			default:
				for i, e := range changed {
					c, ok := Change{Type: ChangeDelete, Key: e.d.key}, true
					if !e.deleted {
						c, ok = t.change(e.d, at)
					}
					c.Version = v1alpha1.Version{Incarnation: t.inc, Epoch: t.epoch, Seq: at}
					if i == len(changed)-1 {
						c.Version.Seq = now
					}
					if ok && !(ctx.Err() == nil && yield(c)) {
						return
					}
				}
				at = now
			}
		}
	}
}

// sinceLocked is what changed after at, each device once, deletions in their
// place.
func (t *Twins) sinceLocked(at uint64) []ringEntry {
	var out []ringEntry
	seen := make(map[*device]bool)
	for n := range len(t.ring) {
		e := t.ring[(t.ringNext-1-n+2*ringSize)%ringSize]
		if e.seq <= at {
			break
		}
		if !seen[e.d] {
			seen[e.d] = true
			out = append(out, e)
		}
	}
	slices.Reverse(out)
	return out
}

// change is a device's Change since at.
func (t *Twins) change(d *device, at uint64) (Change, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if d.gone {
		return Change{}, false
	}
	c := Change{Type: ChangeUpdate, Key: d.key, Version: t.versionLocked(d), Doc: t.docLocked(d), Delta: t.deltaLocked(d)}
	for i := range d.props {
		p := &d.props[i]
		if p.rep.q != "" && (at == 0 || p.rep.seq > at && t.fresh(&p.rep)) {
			c.Reported = append(c.Reported, d.model.props[i].Name)
		}
		if w := p.want; w != nil && (at == 0 || w.ver.Seq > at && w.ver.Epoch == t.epoch) {
			c.Wanted = append(c.Wanted, d.model.props[i].Name)
		}
	}
	return c, true
}

func (t *Twins) docLocked(d *device) *Doc {
	doc := &Doc{
		Namespace: d.key.Namespace, Name: d.key.Name, UID: d.uid, Model: d.model.name,
		Version: t.versionLocked(d), Generation: d.gen, Labels: d.labels,
		Phase: d.live.phase, Reason: d.live.reason, Problem: d.model.problem,
		Properties: make(map[string]DocProperty, len(d.props)),
	}
	if !d.live.seen.IsZero() {
		seen := d.live.seen.UTC()
		doc.LastSeen = &seen
	}
	if d.orphan {
		doc.Problem = fmt.Sprintf("the DeviceModel %.64q is not here", d.model.name)
	}
	for i := range d.props {
		doc.Properties[d.model.props[i].Name] = t.docPropertyLocked(d, i)
	}
	return doc
}

func (t *Twins) docPropertyLocked(d *device, i int) DocProperty {
	p, m := &d.props[i], &d.model.props[i]
	out := DocProperty{Type: m.Type, Unit: m.Unit, Access: m.Access}
	if r := &p.rep; r.q != "" {
		rep := &DocReported{
			Value: json.RawMessage("null"), Received: millis(r.rx), Quality: t.quality(r),
			Version: t.versionOf(r), Message: r.message,
		}
		if rep.TS = millis(r.ts); r.ts == 0 {
			rep.TS = rep.Received
		}
		if r.v != nil {
			rep.Value = value.JSON(r.v)
		}
		out.Reported = rep
	}
	w := p.want
	if w == nil {
		return out
	}
	if w.raw != nil {
		out.Desired = &DocDesired{Value: w.raw, Generation: w.gen}
		if w.err != nil {
			out.Desired.Message = clip(w.err.Error(), 256)
		}
	}
	if o := w.over; o != nil {
		out.Override = &DocOverride{Value: value.JSON(o.v), By: o.by, BaseGeneration: o.base, Since: millis(o.since), Expires: millis(o.expires)}
	}
	if v, ok := w.effective(); ok {
		out.Want, out.By = value.JSON(v), w.by()
	}
	out.State, out.Message = w.state, w.message
	return out
}

// by is whose word holds.
func (w *want) by() string {
	if w.over != nil {
		return w.over.by
	}
	return ByCloud
}

func (t *Twins) deltaLocked(d *device) *Delta {
	delta := &Delta{Version: t.versionLocked(d), Props: make(map[string]DeltaValue)}
	for i := range d.props {
		p, m := &d.props[i], &d.model.props[i]
		if p.want == nil {
			continue
		}
		v, ok := p.want.effective()
		if !ok || p.has(m, v) {
			continue
		}
		dv := DeltaValue{Want: value.JSON(v), By: p.want.by(), State: p.want.state}
		if p.want.over == nil {
			dv.Generation = p.want.gen
		}
		if p.rep.v != nil {
			dv.Have = value.JSON(p.rep.v)
		}
		delta.Props[m.Name] = dv
	}
	return delta
}

func millis(ms int64) time.Time { return time.UnixMilli(ms).UTC() }
