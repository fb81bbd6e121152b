package tunnel

import (
	"errors"
	"fmt"
	"log/slog"
	"time"
)

// Class says how the link is shared: what is in a lower class goes first.
type Class uint8

const (
	classControl Class = 0 // frames of the session itself

	// ClassSync is for the objects and acknowledgements that keep a node in
	// step. It goes before ClassStream, which keeps a tenth of the link.
	ClassSync Class = 1

	// ClassStream is for everything else: logs, exec, port-forward, API
	// requests. Among these, streams that send little go first.
	ClassStream Class = 2

	numClasses = 3
)

// Config is what both ends of a session may set. The zero value is ready to use.
type Config struct {
	// Log gets what changes: sessions that end, windows that hit their
	// budget. Nil discards.
	Log *slog.Logger

	// MaxStreams is how many streams the peer may have open; zero means 1024.
	MaxStreams int

	// AcceptBacklog is how many of them may wait for Accept; further ones are
	// refused. Zero means 128.
	AcceptBacklog int

	// MaxWindow is how far a stream's receive window may grow from
	// InitialWindow on a long fast link; zero means 8 MiB.
	MaxWindow int

	// WindowBudget is what the windows of this session may come to before they
	// stop growing (they never fall below InitialWindow each). Zero means
	// 16 MiB at the hub and 4 MiB at the edge.
	WindowBudget int64

	// Memory is shared by the sessions of a process: buffers and a budget over
	// all their windows. Nil means one of this session's own, without limit.
	Memory *Memory

	// PingInterval is how long the edge lets the link be silent at first: zero
	// means 50 s, below the minute after which common proxies cut a
	// connection, or PingMax if that is less. It climbs by PingStep (zero:
	// 25 s) after three good pings, to PingMax, and is halved when a ping found
	// the link dead. At the hub only PingMax is used, as the cap it tells
	// edges; zero there means none.
	//
	// PingMax is what a dead link's notice costs, and what silence costs: a
	// ping and its answer are 221 B on the wire, which every 50 s is 11.5 MB a
	// month, every 230 s (about as long as common NATs remember) 2.5 MB. Zero
	// means PingInterval: no climbing, so that a dead edge is noticed by the
	// hub within 75 s.
	PingInterval, PingStep, PingMax time.Duration

	// BusyPing is the interval for a minute after a ClassStream stream moved
	// data, as someone may be waiting; zero means 10 s.
	BusyPing time.Duration

	// PongTimeout is how long the edge waits for an answer to a ping before it
	// takes the link for dead; zero means 20 s.
	PongTimeout time.Duration

	// HelloTimeout is how long either end waits for the peer's first message;
	// zero means 20 s.
	HelloTimeout time.Duration

	// DeadGrace is the silence beyond the announced ping interval after which
	// the hub takes the session for dead. Zero means 25 s: an edge that lives
	// has by then given up on its own ping (PongTimeout), so that the hub never
	// ends a session that only has a bad link.
	DeadGrace time.Duration

	// CloseGrace is how long a closing session tries to tell the peer why;
	// zero means 250 ms.
	CloseGrace time.Duration

	// learned is the dialer's memory of the ping interval.
	learned *pingInterval
}

const (
	quantum       = 8 << 10 // bytes a stream may send before another gets its turn
	windowIdle    = 10 * time.Second
	busyFor       = time.Minute
	minPing       = 15 * time.Second
	minRTT        = 250 * time.Microsecond
	junkBurst     = 4096 // frames without use a peer may send at once
	junkPerSecond = 256
	controlMargin = 1024 // control frames that may wait beyond two for each stream
)

func (c Config) withDefaults(hub bool) (Config, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	setInt(&c.MaxStreams, 1024)
	setInt(&c.AcceptBacklog, 128)
	setInt(&c.MaxWindow, 8<<20)
	setDuration(&c.BusyPing, 10*time.Second)
	setDuration(&c.PongTimeout, 20*time.Second)
	setDuration(&c.HelloTimeout, 20*time.Second)
	setDuration(&c.CloseGrace, 250*time.Millisecond)
	if !hub {
		if c.PingInterval == 0 {
			c.PingInterval = 50 * time.Second
			if c.PingMax > 0 {
				c.PingInterval = min(c.PingInterval, c.PingMax)
			}
		}
		setDuration(&c.PingStep, 25*time.Second)
		setDuration(&c.PingMax, c.PingInterval)
		if c.PingMax < c.PingInterval {
			return c, fmt.Errorf("tunnel: PingMax %v is below PingInterval %v", c.PingMax, c.PingInterval)
		}
	}
	if c.WindowBudget == 0 {
		c.WindowBudget = 4 << 20
		if hub {
			c.WindowBudget = 16 << 20
		}
	}
	setDuration(&c.DeadGrace, 25*time.Second)
	if c.Memory == nil {
		c.Memory = NewMemory(0)
	}
	switch {
	case c.MaxStreams < 1 || c.AcceptBacklog < 1:
		return c, errors.New("tunnel: MaxStreams and AcceptBacklog must not be negative")
	case c.MaxWindow < InitialWindow:
		return c, fmt.Errorf("tunnel: MaxWindow %d is below the protocol's %d", c.MaxWindow, InitialWindow)
	case c.BusyPing < 0 || c.PingMax < 0 || c.PingInterval < 0 || c.PingStep < 0 ||
		c.PongTimeout < 0 || c.DeadGrace < 0 || c.HelloTimeout < 0 || c.CloseGrace < 0 || c.WindowBudget < 0:
		return c, errors.New("tunnel: durations and budgets must not be negative")
	}
	return c, nil
}

func setInt(p *int, def int) {
	if *p == 0 {
		*p = def
	}
}

func setDuration(p *time.Duration, def time.Duration) {
	if *p == 0 {
		*p = def
	}
}

// OpenRequest describes a stream to open.
type OpenRequest struct {
	Kind   string // what serves it at the peer; 1 to 64 bytes
	Target string // for that server; at most 1024 bytes
	Class  Class  // zero means ClassStream
}

func (r OpenRequest) check() error {
	switch {
	case r.Class != ClassSync && r.Class != ClassStream:
		return fmt.Errorf("unknown class %d", r.Class)
	case r.Kind == "" || len(r.Kind) > maxKind:
		return fmt.Errorf("kind of %d bytes; 1 to %d are allowed", len(r.Kind), maxKind)
	case len(r.Target) > maxTarget:
		return fmt.Errorf("target of %d bytes; at most %d are allowed", len(r.Target), maxTarget)
	}
	return nil
}
