package tunnel

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"
)

// Backoff shapes reconnecting. Waits are drawn evenly from zero to a bound (full
// jitter), so that edges that lost their hub together do not return together.
type Backoff struct {
	First  time.Duration // bound after a session that lived; zero means 250 ms
	Base   time.Duration // first bound otherwise; zero means 500 ms; doubles
	Max    time.Duration // largest bound; zero means 30 s
	Lived  time.Duration // a session that lived this long counts as good; zero means 60 s
	Denied time.Duration // bound once the hub rejects this edge; zero means 5 min
}

func (b Backoff) withDefaults() Backoff {
	setDuration(&b.First, 250*time.Millisecond)
	setDuration(&b.Base, 500*time.Millisecond)
	setDuration(&b.Max, 30*time.Second)
	setDuration(&b.Lived, time.Minute)
	setDuration(&b.Denied, 5*time.Minute)
	return b
}

// wait returns how long to wait before the next attempt, after failures in a
// row (1 or more) the last of which was err.
func (b Backoff) wait(failures int, err error) time.Duration {
	bound := b.Base
	for range failures - 1 {
		if bound >= b.Max {
			break
		}
		bound *= 2
	}
	bound = min(bound, b.Max)
	var de *DialError
	if !errors.As(err, &de) {
		return jitter(bound)
	}
	if de.Reason == DialRejected || de.Reason == DialGone {
		bound = b.Denied
		return bound/2 + jitter(bound/2)
	}
	if de.RetryAfter > 0 {
		// The hub spreads its edges itself; a tenth more keeps those of one
		// second apart.
		return de.RetryAfter + jitter(de.RetryAfter/10+b.First)
	}
	return jitter(bound)
}

func jitter(bound time.Duration) time.Duration {
	return time.Duration(rand.Int64N(int64(bound) + 1))
}

// Later is what serve returns to have the next session dialled after about Wait
// (from half of it on), and not as the backoff would have it.
type Later struct {
	Wait time.Duration
	Err  error
}

func (e *Later) Error() string { return e.Err.Error() }
func (e *Later) Unwrap() error { return e.Err }

// Run keeps a session up until ctx ends or Retry says so. For each session it
// calls serve, whose context ends with the session; serve should return then,
// and if it returns earlier the session is closed and another one dialled.
//
// When the hub drains a session, Run dials the next one first: for that time
// serve runs twice, and the older call should let its streams finish.
func (d *Dialer) Run(ctx context.Context, serve func(ctx context.Context, s *Session) error) error {
	r := runner{d: d, serve: serve, backoff: d.Backoff.withDefaults(), log: d.Log}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer r.served.Wait()
	defer cancel()
	for {
		s, err := r.connect(ctx)
		if err != nil {
			return err
		}
		h := r.start(ctx, s)
		select {
		case <-h.done:
		case <-s.Draining():
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := r.plan(h); err != nil {
			return err
		}
	}
}

type runner struct {
	d       *Dialer
	serve   func(ctx context.Context, s *Session) error
	backoff Backoff
	log     *slog.Logger
	served  sync.WaitGroup

	old      *held         // being drained beside the current one
	failures int           // in a row
	failed   DialReason    // of the last failure, so that equal ones are logged once
	pause    time.Duration // before the next attempt
	fixed    pauseKind     // what may cut the pause short
	next     string        // URL a drained hub named for the next attempt
	kicked   time.Time     // when a pause was last cut short
}

// held is a session with its serve call.
type held struct {
	s     *Session
	since time.Time
	done  chan struct{} // closed when serve has returned and the session is closed
	err   error         // what serve returned; valid once done is closed
}

// start serves a session until it, serve or ctx ends.
func (r *runner) start(ctx context.Context, s *Session) *held {
	h := &held{s: s, since: time.Now(), done: make(chan struct{})}
	r.served.Go(func() {
		defer close(h.done)
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		stop := context.AfterFunc(ctx, func() { s.end(&CloseError{Code: CloseNormal}, true) })
		defer stop()
		r.served.Go(func() {
			<-s.Done()
			cancel()
		})
		h.err = r.serve(ctx, s)
		_ = s.Close()
	})
	return h
}

// plan decides when and where to dial after h ended or began to drain.
func (r *runner) plan(h *held) error {
	if g, ok := h.s.GoAway(); ok && g.Deadline > 0 {
		r.drain(h, g)
		return nil
	}
	lived := time.Since(h.since)
	err := h.s.Err()
	r.log.Warn("tunnel: session ended", "err", err, "serve", h.err, "lived", lived.Round(time.Second))
	var closed *CloseError
	remote := errors.As(err, &closed) && closed.Remote
	var later *Later
	r.fixed = pauseBackoff
	switch {
	case errors.As(h.err, &later):
		r.fixed = pauseAsked
		r.failures++
		r.pause = later.Wait/2 + jitter(later.Wait/2)
	case remote && closed.Code == CloseRevoked:
		r.failures++
		r.fixed = pauseAsked
		r.pause = r.backoff.Denied/2 + jitter(r.backoff.Denied/2)
	case remote && closed.Code == CloseReplaced:
		// Somebody else uses this edge's identity; coming back at once would
		// only throw them out in turn.
		r.failures++
		r.fixed = pauseAsked
		r.pause = r.backoff.Max/2 + jitter(r.backoff.Max/2)
	case lived >= r.backoff.Lived:
		r.failures = 0
		r.pause = jitter(r.backoff.First)
	default:
		r.failures++
		r.pause = r.backoff.wait(r.failures, err)
	}
	if r.d.Retry != nil {
		return r.d.Retry(err, r.pause)
	}
	return nil
}

// drain lets h finish while the next session is dialled. Two at once are
// enough: one that was still finishing before is closed.
func (r *runner) drain(h *held, g GoAway) {
	if r.old != nil {
		r.old.s.end(&CloseError{Code: CloseDrain}, true)
	}
	r.old = h
	r.failures, r.pause, r.next = 0, g.Slot+jitter(r.backoff.First), ""
	r.fixed = pauseSlot
	if time.Since(h.since) < r.backoff.Lived {
		// A hub that drains whatever comes must not be hammered.
		r.failures++
		r.pause = g.Slot + r.backoff.wait(r.failures, nil)
	}
	if _, err := hubURL(g.Alternate); err == nil {
		r.next = g.Alternate
	}
	r.log.Info("tunnel: session is being drained", "reason", g.Reason, "deadline", g.Deadline, "wait", r.pause, "next", r.next)
}

// connect attempts until there is a session.
func (r *runner) connect(ctx context.Context) (*Session, error) {
	for {
		if err := r.rest(ctx); err != nil {
			return nil, err
		}
		url := r.d.URL
		if r.next != "" {
			url, r.next = r.next, "" // once; if it fails, back to the known hub
		}
		s, err := r.d.dial(ctx, url)
		if err == nil {
			r.failed = ""
			r.log.Info("tunnel: connected", "url", url, "attempt", r.failures+1)
			return s, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err := r.fail(err); err != nil {
			return nil, err
		}
	}
}

// fail plans the next attempt.
func (r *runner) fail(err error) error {
	r.failures++
	r.pause = r.backoff.wait(r.failures, err)
	reason := DialLost
	r.fixed = pauseBackoff
	var de *DialError
	if errors.As(err, &de) {
		reason = de.Reason
		if reason == DialRejected || reason == DialGone || de.RetryAfter > 0 {
			r.fixed = pauseAsked
		}
	}
	if reason != r.failed {
		r.log.Warn("tunnel: not connected, will retry", "err", err, "wait", r.pause)
		r.failed = reason
	} else {
		r.log.Debug("tunnel: not connected, will retry", "err", err, "wait", r.pause)
	}
	if r.d.Retry != nil {
		return r.d.Retry(err, r.pause)
	}
	return nil
}
