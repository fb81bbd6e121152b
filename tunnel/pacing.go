package tunnel

import "time"

// pacer bounds what streams that send much have on the way, so that the queue
// at the link's narrowest place stays short: a queue there delays exec and logs
// behind bulk however well they are scheduled here. Session.mu guards it.
//
// The bound is the link's rate times its least round trip, both as TCP measures
// them, and some more so that growth is seen. Below paceRTT there is no bound:
// a queue there is of no consequence.
type pacer struct {
	asked  int64 // when the socket was asked last
	minRTT time.Duration
	rate   float64    // bytes a second: the most delivered of late
	recent [2]float64 // the most in this and in the last turn
	turn   int64      // when this turn began

	full       bool // the rate has stopped growing: the start is over
	best       float64
	stagnant   int
	round      int64 // when this round began
	probeRound int   // rounds since the last probe for more
}

const (
	paceRTT      = 2 * time.Millisecond
	paceAsk      = 5 * time.Millisecond
	paceStart    = 2.5  // of rate times round trip, while the rate grows
	paceCruise   = 1.25 // afterwards
	paceProbe    = 2    // for one round in paceProbeEvery
	paceMessage  = 4 * time.Millisecond
	leastMessage = 2 << 10

	paceProbeEvery = 16
	paceTurnRounds = 8
)

// update takes in what TCP measured.
func (p *pacer) update(now int64, minRTT time.Duration, rate float64) {
	p.asked, p.minRTT = now, minRTT
	if minRTT < paceRTT {
		return
	}
	if now-p.turn > paceTurnRounds*int64(minRTT) {
		p.recent[1], p.recent[0] = p.recent[0], 0
		p.turn = now
	}
	p.recent[0] = max(p.recent[0], rate)
	p.rate = max(p.recent[0], p.recent[1])
	if now-p.round < int64(minRTT) {
		return
	}
	p.round = now
	p.probeRound++
	if p.full {
		return
	}
	if p.rate > 1.25*p.best {
		p.best, p.stagnant = p.rate, 0
	} else if p.stagnant++; p.stagnant >= 3 {
		p.full = true
	}
}

// bound is how much may be outstanding, and how large a message may be; zero
// means no bound.
func (p *pacer) bound() (outstanding, message int) {
	if p.minRTT < paceRTT || p.rate <= 0 {
		return 0, 0
	}
	gain := paceCruise
	switch {
	case !p.full:
		gain = paceStart
	case p.probeRound%paceProbeEvery == 0:
		gain = paceProbe
	}
	message = min(max(int(p.rate*paceMessage.Seconds()), leastMessage), MaxMessage)
	return max(int(gain*p.rate*p.minRTT.Seconds()), 2*message), message
}

// bulkLocked asks how much of the next message may be of streams that send
// much. Zero means none, and a timer will look again.
func (s *Session) bulkLocked() int {
	o := &s.out
	if o.paced {
		return 0
	}
	if s.probe == nil || o.rest.len() == 0 {
		return MaxMessage
	}
	now := s.now()
	if now-o.pace.asked > int64(paceAsk) {
		if minRTT, rate, ok := s.probe.path(); ok {
			o.pace.update(now, minRTT, rate)
		} else {
			o.pace = pacer{asked: now}
		}
	}
	bound, message := o.pace.bound()
	if bound == 0 {
		return MaxMessage
	}
	over := s.probe.outstanding() - bound
	if over < 0 {
		return message
	}
	o.paced = true
	wait := time.Duration(float64(over+message) / o.pace.rate * float64(time.Second))
	wait = min(max(wait, time.Millisecond/2), 50*time.Millisecond)
	if o.paceTimer == nil {
		o.paceTimer = time.AfterFunc(wait, s.unpace)
	} else {
		o.paceTimer.Reset(wait)
	}
	return 0
}

// unpace is the timer's.
func (s *Session) unpace() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.out.paced = false
	s.kickLocked(false)
}
