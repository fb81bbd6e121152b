package devicetwin

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/value"
)

// maxSkew is how far a device's own time may be from a clock that is right.
const maxSkew = 24 * time.Hour

// Report implements Sink.
func (t *Twins) Report(dev Key, readings []Reading) {
	readings = readings[:min(len(readings), maxReadings)]
	wall, sure := t.cfg.Now()
	t.stats.readings.Add(uint64(len(readings)))
	var fx effects
	t.mu.Lock()
	d := t.devices[dev]
	if d == nil {
		t.mu.Unlock()
		t.stats.unknown.Add(uint64(len(readings)))
		return
	}
	for i := range readings {
		if r := &readings[i]; !r.Retained && !r.Historical && r.Bad == nil {
			t.heardLocked(d, EvidenceMessage, wall, &fx)
			break
		}
	}
	before := t.seq
	for i := range readings {
		r := &readings[i]
		p, ok := d.model.index[r.Property]
		if !ok {
			t.stats.unknown.Add(1)
			continue
		}
		t.takeLocked(d, p, r, wall, sure, &fx)
	}
	if t.seq != before {
		t.ringLocked(ringEntry{seq: t.seq, d: d})
	}
	t.mu.Unlock()
	t.flush(&fx)
}

// takeLocked merges one reading.
func (t *Twins) takeLocked(d *device, i int, r *Reading, wall time.Time, sure bool, fx *effects) {
	p, m := &d.props[i], &d.model.props[i]
	err := r.Bad
	if err == nil {
		err = m.typ.Check(r.Value)
	}
	if err == nil && r.Intent {
		t.intentLocked(d, i, r.Value, fx)
		return
	}
	if err != nil {
		t.stats.bad.Add(1)
		t.badLocked(d, i, err, wall, fx)
		return
	}
	if !m.typ.Readable() {
		return
	}
	rep := reported{v: r.Value, q: v1alpha1.QualityGood, rx: wall.UnixMilli()}
	switch {
	case r.TS.IsZero():
		if r.Retained {
			rep.q = v1alpha1.QualityUncertain // when it was said is not known
		}
	case sure && r.TS.Sub(wall).Abs() > maxSkew:
		rep.q = v1alpha1.QualityUncertain
	default:
		rep.ts = r.TS.UnixMilli()
	}
	if !sure || r.Retained && d.live.phase != v1alpha1.PhaseOnline {
		rep.q = v1alpha1.QualityUncertain // the clock, or whether it is still so
	}
	if t.cfg.Observe != nil && !r.Retained {
		ts := wall
		if rep.ts != 0 {
			ts = r.TS
		}
		fx.observations = append(fx.observations, Observation{
			Device: d.key, Property: m.Name, Value: r.Value, TS: ts, Received: wall,
			Quality: rep.q, Historical: r.Historical,
		})
	}
	if r.Historical {
		return
	}
	same := p.rep.q != "" && value.Equal(p.rep.v, rep.v)
	if r.Retained && t.fresh(&p.rep) {
		// It may be older than what the device said to us; what it said later
		// while we did not listen would differ.
		if same || p.rep.ts != 0 && rep.ts != 0 && rep.ts < p.rep.ts {
			return
		}
	}
	if same && t.fresh(&p.rep) && p.rep.q == rep.q {
		p.rep.ts, p.rep.rx = rep.ts, rep.rx
		t.freshenLocked(d, i, r.Retained, fx)
		t.reflectLocked(d, i)
		return
	}
	if !same {
		rep.v = own(rep.v)
	} else {
		rep.v = p.rep.v
	}
	rep.epoch, rep.seq = t.epoch, t.nextLocked(d)
	p.rep = rep
	t.dirtyLocked(d, fx)
	// Smaller changes than the deadband are not worth telling upwards; the twin
	// has them all the same.
	if p.sent == nil || p.up || m.Report.Deadband <= 0 || rep.q != v1alpha1.QualityGood ||
		!value.Within(rep.v, p.sent, m.Report.Deadband) {
		d.upPropLocked(t, i)
	}
	t.freshenLocked(d, i, r.Retained, fx)
	t.reflectLocked(d, i)
}

// freshenLocked does what follows from the device's having said a property.
func (t *Twins) freshenLocked(d *device, i int, retained bool, fx *effects) {
	if w := d.props[i].want; w != nil {
		if !retained {
			w.resend = false
		}
		t.considerLocked(d, i, time.Now(), fx)
	}
}

// badLocked notes that what the device said could not be used. What it said
// before stays.
func (t *Twins) badLocked(d *device, i int, err error, wall time.Time, fx *effects) {
	p := &d.props[i]
	name := d.model.props[i].Name
	message := clip(err.Error(), 256)
	t.eventLocked(d, fx, true, ReasonBadReading, fmt.Sprintf("%s: %s", name, message))
	if p.rep.q == v1alpha1.QualityBad {
		return // a flood of them is no news
	}
	if p.rep.q != "" && !t.fresh(&p.rep) {
		// To stamp a restored value would put the past above what the hub
		// may have from before the power went.
		return
	}
	p.rep.q, p.rep.message = v1alpha1.QualityBad, message
	if p.rep.rx == 0 {
		p.rep.rx = wall.UnixMilli()
	}
	p.rep.epoch, p.rep.seq = t.epoch, t.nextLocked(d)
	t.dirtyLocked(d, fx)
	d.upPropLocked(t, i)
}

// staleLocked says anew, as stale, what a device that went away said to us.
func (t *Twins) staleLocked(d *device, fx *effects) {
	for i := range d.props {
		r := &d.props[i].rep
		if !t.fresh(r) || r.q == v1alpha1.QualityStale || r.q == v1alpha1.QualityBad {
			continue
		}
		r.q = v1alpha1.QualityStale
		r.epoch, r.seq = t.epoch, t.nextLocked(d)
		t.dirtyLocked(d, fx)
		d.upPropLocked(t, i)
	}
}

// own makes sure that nobody else changes v.
func own(v any) any {
	switch v := v.(type) {
	case []byte:
		return bytes.Clone(v)
	case json.RawMessage:
		return json.RawMessage(bytes.Clone(v))
	case string:
		return strings.Clone(v) // it may be a piece of a large payload
	}
	return v
}

// clip cuts s to n bytes and to what is text.
func clip(s string, n int) string {
	if len(s) > n {
		s = s[:n]
	}
	if !utf8.ValidString(s) {
		s = strings.ToValidUTF8(s, "\ufffd")
	}
	return s
}
