package tunnel

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Drain announces the session's end: the peer opens no more streams here, waits
// g.Slot, dials g.Alternate or the same hub again, and streams may finish until
// g.Deadline. Drain returns when the session has ended: as soon as no stream is
// left, at the deadline, or when ctx ends, which ends the session too.
func (s *Session) Drain(ctx context.Context, g GoAway) error {
	switch {
	case g.Deadline < time.Millisecond || g.Slot < 0:
		return fmt.Errorf("tunnel: drain: deadline %v and slot %v must be positive", g.Deadline, g.Slot)
	case len(g.Alternate) > maxAlternate || len(g.Reason) > maxReason:
		return errors.New("tunnel: drain: alternate URL or reason is too long")
	}
	if g.Code == CloseNormal {
		g.Code = CloseDrain
	}
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		return nil
	}
	if s.drained == nil {
		s.drained = make(chan struct{})
	}
	drained := s.drained
	s.pushControlLocked(control{typ: frameGoAway, data: appendGoAway(nil, g)})
	s.awayLocked(g)
	s.kickLocked(false)
	s.mu.Unlock()

	deadline := time.NewTimer(g.Deadline)
	defer deadline.Stop()
	select {
	case <-drained:
	case <-deadline.C:
	case <-ctx.Done():
	case <-s.done:
	}
	return s.CloseWith(g.Code, g.Reason)
}

// Draining is closed when either end has announced the session's end; GoAway
// then tells what was announced.
func (s *Session) Draining() <-chan struct{} { return s.drain }

// GoAway returns what was announced before the session's end.
func (s *Session) GoAway() (GoAway, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.away, s.drainingLocked()
}

func (s *Session) drainingLocked() bool {
	select {
	case <-s.drain:
		return true
	default:
		return false
	}
}

func (s *Session) awayLocked(g GoAway) {
	if !s.drainingLocked() {
		s.away = g
		close(s.drain)
	}
	s.drainedLocked()
}

// drainedLocked lets Drain go on when no stream is left.
func (s *Session) drainedLocked() {
	if s.drained != nil && len(s.streams) == 0 {
		select {
		case <-s.drained:
		default:
			close(s.drained)
		}
	}
}

func (s *Session) handleGoAway(p []byte) error {
	g, err := parseGoAway(p)
	if err != nil {
		return err
	}
	if g.Deadline == 0 {
		s.end(&CloseError{Code: g.Code, Reason: g.Reason, Remote: true}, false)
		return errSessionOver
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil && !s.drainingLocked() {
		// The peer ends the session at the deadline; this is for when it fails to.
		s.awayTimer = time.AfterFunc(g.Deadline+s.cfg.PongTimeout, func() {
			s.end(&CloseError{Code: CloseDrain, Reason: "deadline passed"}, true)
		})
	}
	s.awayLocked(g)
	return s.countJunk("GOAWAY")
}
