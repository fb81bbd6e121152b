package tunnel

import (
	"testing"
	"time"
)

// run feeds a pacer with what TCP would report for a link, for some rounds.
func (p *pacer) run(now *int64, rounds int, rtt time.Duration, rate float64) {
	for range rounds {
		*now += int64(rtt)
		p.update(*now, rtt, rate)
	}
}

func TestPacerBound(t *testing.T) {
	const rtt, rate = 50 * time.Millisecond, 1_250_000.0
	bdp := int(rate * rtt.Seconds())
	var p pacer
	now := int64(0)
	if out, _ := p.bound(); out != 0 {
		t.Errorf("bound %d before anything was measured", out)
	}
	p.run(&now, 1, rtt, rate/10)
	p.run(&now, 1, rtt, rate)
	if out, _ := p.bound(); out < 2*bdp || out > 3*bdp {
		t.Errorf("bound %d while the rate grows; the link holds %d", out, bdp)
	}
	p.run(&now, 8, rtt, rate)
	for p.probeRound%paceProbeEvery == 0 {
		p.run(&now, 1, rtt, rate)
	}
	out, message := p.bound()
	if out < bdp*11/10 || out > bdp*14/10 {
		t.Errorf("bound %d at a steady rate; the link holds %d", out, bdp)
	}
	if want := int(rate * paceMessage.Seconds()); message != want {
		t.Errorf("message %d; want %d", message, want)
	}
	// A slower link is noticed, a round of low samples is not.
	p.run(&now, 2, rtt, rate/4)
	if p.rate != rate {
		t.Errorf("rate %v after two slow rounds", p.rate)
	}
	p.run(&now, 3*paceTurnRounds, rtt, rate/4)
	if p.rate != rate/4 {
		t.Errorf("rate %v after many slow rounds", p.rate)
	}
}

func TestPacerLeavesShortPathsAlone(t *testing.T) {
	var p pacer
	now := int64(0)
	p.run(&now, 20, time.Millisecond, 1e9)
	if out, _ := p.bound(); out != 0 {
		t.Errorf("bound %d at a round trip of 1 ms", out)
	}
}

func TestPacerKeepsTwoMessages(t *testing.T) {
	var p pacer
	now := int64(0)
	p.run(&now, 20, 10*time.Millisecond, 10_000)
	if out, message := p.bound(); message != leastMessage || out != 2*leastMessage {
		t.Errorf("bound %d, message %d", out, message)
	}
}

// While bulk is held back, other streams are not.
func TestPacedBulkDoesNotHoldOthers(t *testing.T) {
	s := newIdleSession()
	s.testStream(ClassStream, plenty)
	schedule(s, plenty/2)
	s.out.paced = true
	if s.out.waits() {
		t.Error("held-back bulk keeps the writer running")
	}
	exec := s.testStream(ClassStream, 64)
	if !s.out.waits() {
		t.Error("a keystroke does not start the writer")
	}
	if n := s.bulkLocked(); n != 0 {
		t.Errorf("bulk may send %d", n)
	}
	if st, _ := s.pickLocked(0); st != exec {
		t.Error("the keystroke waits")
	}
	exec.pend = nil
	if st, _ := s.pickLocked(0); st != nil {
		t.Errorf("stream %d sends", st.id)
	}
}
