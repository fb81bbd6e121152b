package devicetwin

import (
	"time"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
)

const (
	// awake is for how long a sleepy device listens after it spoke.
	awake = 5 * time.Second
	// lateWill is how soon after its birth a device's going may be an old
	// session's will, which brokers deliver after the new session's birth.
	lateWill = 10 * time.Second
	// seenEvery is how often the hub is told that a device was seen, when there
	// is nothing else to tell.
	seenEvery = time.Minute
)

// liveness is what is known of a device's being there. Times are monotonic but
// for seen.
type liveness struct {
	phase, reason string
	seen          time.Time // the date of the last evidence
	base          time.Time // of the last evidence, or since we listen
	since         time.Time // of the phase
	session       bool      // it is connected to the embedded broker
	available     bool      // its availability topic said so last
	parentGone    bool
}

// Sight implements Sink.
func (t *Twins) Sight(dev Key, s Sighting) {
	wall, _ := t.cfg.Now()
	var fx effects
	t.mu.Lock()
	if d := t.devices[dev]; d != nil {
		t.sightLocked(d, s, wall, &fx)
	} else {
		t.stats.unknown.Add(1)
	}
	t.mu.Unlock()
	t.flush(&fx)
}

func (t *Twins) sightLocked(d *device, s Sighting, wall time.Time, fx *effects) {
	l := &d.live
	if s.Retained {
		// When it was said is not known: it is a rumour, no evidence.
		if l.phase == v1alpha1.PhaseUnknown && s.Evidence == EvidenceAvailability {
			t.phaseLocked(d, v1alpha1.PhaseUnknown, "Retained"+s.State, fx)
		}
		return
	}
	switch s.State {
	case v1alpha1.PhaseOnline:
		switch s.Evidence {
		case EvidenceParent:
			if l.parentGone {
				l.parentGone = false
				t.phaseLocked(d, v1alpha1.PhaseUnknown, "ParentIsBack", fx)
				t.refreshLocked(d)
			}
			return
		case EvidenceSession:
			l.session = true
		case EvidenceAvailability, EvidenceBirth:
			l.available = true
		}
		born := s.Evidence == EvidenceBirth && l.phase == v1alpha1.PhaseOnline
		t.heardLocked(d, s.Evidence, wall, fx)
		if born {
			t.onlineLocked(d, fx) // it started anew without our seeing it go
		}
	case v1alpha1.PhaseOffline:
		switch s.Evidence {
		case EvidenceParent:
			l.parentGone = true
			t.phaseLocked(d, v1alpha1.PhaseOffline, s.Evidence, fx)
			return
		case EvidenceSession:
			l.session = false
		case EvidenceAvailability:
			l.available = false
			if l.session {
				return // the will of a session before this one
			}
		default:
			l.available = false
		}
		if d.model.sleepy && !l.parentGone {
			t.phaseLocked(d, v1alpha1.PhaseSleeping, s.Evidence, fx)
			t.scheduleLivenessLocked(d)
			return
		}
		// A device that answers is there, whatever its old session's will says.
		if l.phase == v1alpha1.PhaseOnline && time.Since(l.base) < lateWill {
			t.refreshLocked(d)
		}
		t.phaseLocked(d, v1alpha1.PhaseOffline, s.Evidence, fx)
	case v1alpha1.PhaseSleeping:
		l.base, l.seen = time.Now(), wall
		t.phaseLocked(d, v1alpha1.PhaseSleeping, s.Evidence, fx)
		t.scheduleLivenessLocked(d)
	case v1alpha1.PhaseUnknown:
		t.forgetLocked(d, s.Evidence, fx)
	}
}

// heardLocked takes a fresh word of the device's as evidence; it is above a
// will and above its parent's having gone.
func (t *Twins) heardLocked(d *device, evidence string, wall time.Time, fx *effects) {
	l := &d.live
	l.base, l.seen, l.parentGone = time.Now(), wall, false
	if l.phase != v1alpha1.PhaseOnline {
		was := l.phase
		t.phaseLocked(d, v1alpha1.PhaseOnline, evidence, fx)
		if was != v1alpha1.PhaseSleeping {
			t.refreshLocked(d)
		}
	} else if t.conv != nil && wall.Sub(d.sentSeen).Abs() >= seenEvery {
		d.upStateLocked(t)
	}
	t.scheduleLivenessLocked(d)
}

// Forget takes all devices for unknown, as when the broker was lost: what was
// known of their being there is not known any more.
func (t *Twins) Forget(reason string) {
	var fx effects
	t.mu.Lock()
	for _, d := range t.devices {
		t.forgetLocked(d, reason, &fx)
	}
	t.mu.Unlock()
	t.flush(&fx)
}

func (t *Twins) forgetLocked(d *device, reason string, fx *effects) {
	l := &d.live
	l.session, l.available, l.parentGone = false, false, false
	if l.phase != v1alpha1.PhaseUnknown {
		l.base = time.Now()
		t.phaseLocked(d, v1alpha1.PhaseUnknown, reason, fx)
		t.scheduleLivenessLocked(d)
	}
}

// phaseLocked is the only one to change the phase.
func (t *Twins) phaseLocked(d *device, phase, reason string, fx *effects) {
	l := &d.live
	if l.phase == phase {
		// The reason of the beginning stands, but for what became known of a
		// phase that is not.
		if phase != v1alpha1.PhaseUnknown || l.reason == reason {
			return
		}
	}
	was := l.phase
	l.phase, l.reason, l.since = phase, reason, time.Now()
	t.changedLocked(d, fx)
	d.upStateLocked(t)
	switch phase {
	case v1alpha1.PhaseOnline:
		if was == v1alpha1.PhaseSleeping {
			t.awakeLocked(d, fx)
		} else {
			t.onlineLocked(d, fx)
		}
	case v1alpha1.PhaseOffline, v1alpha1.PhaseStale, v1alpha1.PhaseUnknown:
		if was != phase {
			t.staleLocked(d, fx)
		}
		for i := range d.props {
			t.considerLocked(d, i, time.Now(), fx)
		}
	}
	t.kickCommandsLocked(d)
}

// reachable tells whether it makes sense to tell the device something.
func (d *device) reachable() bool {
	return d.live.phase == v1alpha1.PhaseOnline || d.live.phase == v1alpha1.PhaseUnknown
}

// staleAt is when the device's silence becomes too long; zero: never.
func (d *device) staleAt() time.Time {
	if d.model.interval <= 0 {
		return time.Time{}
	}
	return d.live.base.Add(d.model.interval * 5 / 2)
}

func (t *Twins) scheduleLivenessLocked(d *device) {
	if at := d.staleAt(); !at.IsZero() && d.live.phase != v1alpha1.PhaseOffline && d.live.phase != v1alpha1.PhaseStale {
		t.wakeLocked(d, at)
	}
	if d.model.sleepy && d.live.phase == v1alpha1.PhaseOnline && !d.live.session {
		t.wakeLocked(d, d.live.base.Add(awake))
	}
}

func (t *Twins) livenessTimeLocked(d *device, now time.Time, fx *effects) {
	l := &d.live
	if l.phase == v1alpha1.PhaseOffline || l.phase == v1alpha1.PhaseStale {
		return
	}
	if at := d.staleAt(); !at.IsZero() && !at.After(now) {
		t.phaseLocked(d, v1alpha1.PhaseStale, "Silent", fx)
		return
	}
	if d.model.sleepy && l.phase == v1alpha1.PhaseOnline && !l.session && !l.base.Add(awake).After(now) {
		t.phaseLocked(d, v1alpha1.PhaseSleeping, "Quiet", fx)
	}
	t.scheduleLivenessLocked(d)
}
