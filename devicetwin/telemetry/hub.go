package telemetry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/skerry-io/skerry/devicetwin/telemetry/sink"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// ackTimeout is how long the hub may take to make a batch durable.
const ackTimeout = 2 * time.Minute

var errHubGone = errors.New("the stream to the hub ended")

// hubLink is the stream to the hub, when there is one.
type hubLink struct {
	mu    sync.Mutex // guards the following
	now   *hubStream // nil: there is none
	since time.Time  // of there being none
	up    chan struct{}
}

// gone tells that there is no stream, and since when.
func (h *hubLink) gone() (why string, since time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.now != nil {
		return "", time.Time{}
	}
	return "not connected to the hub", h.since
}

// hubStream is one conversation.
type hubStream struct {
	conn   *edgeapi.Conn
	window chan struct{} // one per batch on its way
	done   chan struct{}

	mu   sync.Mutex // guards the following
	seq  uint64
	acks map[uint64]chan edgeapi.TelemetryAck // each has room for one
}

// Converse sends to the hub over conn until that ends. The caller closes the
// stream when ctx ends. A later conversation takes the place of an earlier one.
func (r *Router) Converse(ctx context.Context, conn *edgeapi.Conn) error {
	if err := conn.Send(edgeapi.TelemetryHello{Version: edgeapi.TelemetryVersion}); err != nil {
		return fmt.Errorf("telemetry: hello: %w", err)
	}
	m, err := conn.Receive()
	if err != nil {
		return fmt.Errorf("telemetry: welcome: %w", err)
	}
	if w, ok := m.(edgeapi.TelemetryWelcome); !ok || w.Version != edgeapi.TelemetryVersion {
		return fmt.Errorf("telemetry: the hub answers %T; want a welcome of version %d", m, edgeapi.TelemetryVersion)
	}
	s := &hubStream{
		conn: conn, window: make(chan struct{}, edgeapi.TelemetryWindow), done: make(chan struct{}),
		acks: map[uint64]chan edgeapi.TelemetryAck{},
	}
	r.hub.set(s)
	defer r.hub.unset(s)
	for {
		m, err := conn.Receive()
		if err != nil {
			return fmt.Errorf("telemetry: %w", err)
		}
		ack, ok := m.(edgeapi.TelemetryAck)
		if !ok {
			return fmt.Errorf("telemetry: unexpected %T from the hub", m)
		}
		s.mu.Lock()
		ch := s.acks[ack.Seq]
		delete(s.acks, ack.Seq)
		s.mu.Unlock()
		if ch != nil { // else nobody waits any more
			ch <- ack
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

func (h *hubLink) set(s *hubStream) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.now == nil {
		close(h.up)
	}
	h.now = s
}

func (h *hubLink) unset(s *hubStream) {
	close(s.done)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.now == s {
		h.now, h.since = nil, time.Now()
		h.up = make(chan struct{})
	}
}

// wait returns the stream, once there is one.
func (h *hubLink) wait(ctx context.Context) (*hubStream, error) {
	for {
		h.mu.Lock()
		s, up := h.now, h.up
		h.mu.Unlock()
		if s != nil {
			return s, nil
		}
		select {
		case <-up:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// hubSink sends to the hub, and waits while there is no way to it.
type hubSink struct {
	link  *hubLink
	route edgeapi.DeviceRef
	index int
}

func (h *hubSink) Close() {}

func (h *hubSink) Send(ctx context.Context, records []edgeapi.TelemetryRecord) error {
	s, err := h.link.wait(ctx)
	if err != nil {
		return err
	}
	limit := time.NewTimer(ackTimeout)
	defer limit.Stop()
	select {
	case s.window <- struct{}{}:
		defer func() { <-s.window }()
	case <-s.done:
		return errHubGone
	case <-ctx.Done():
		return ctx.Err()
	case <-limit.C:
		return fmt.Errorf("the hub acknowledged nothing for %v", ackTimeout)
	}
	ch := make(chan edgeapi.TelemetryAck, 1)
	s.mu.Lock()
	s.seq++
	seq := s.seq
	s.acks[seq] = ch
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.acks, seq)
		s.mu.Unlock()
	}()
	if err := s.conn.Send(edgeapi.TelemetryBatch{Seq: seq, Route: h.route, Sink: h.index, Records: records}); err != nil {
		return fmt.Errorf("to the hub: %w", err)
	}
	select {
	case ack := <-ch:
		return answer(ack, len(records))
	case <-s.done:
		return errHubGone
	case <-ctx.Done():
		return ctx.Err()
	case <-limit.C:
		return fmt.Errorf("the hub acknowledged nothing for %v", ackTimeout)
	}
}

// answer makes of an ack what a sink would say.
func answer(ack edgeapi.TelemetryAck, records int) error {
	if ack.Code == http.StatusOK {
		return nil
	}
	err := fmt.Errorf("the hub answers %d: %s", ack.Code, ack.Message)
	switch {
	case ack.Code == http.StatusUnauthorized, ack.Code == http.StatusForbidden,
		ack.Code == http.StatusNotFound, ack.Code == http.StatusConflict, // it may not have seen the route as it is now
		ack.Code == http.StatusTooManyRequests, ack.Code < 400, ack.Code >= 500:
		if ack.RetryAfter > 0 {
			return &sink.Later{After: min(time.Duration(ack.RetryAfter)*time.Millisecond, time.Hour), Err: err}
		}
		return err
	}
	return &sink.Refused{Count: records, Why: err.Error()}
}
