package telemetry

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/telemetry/seglog"
	"github.com/skerry-io/skerry/devicetwin/telemetry/sink"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

const (
	maxSinks = 8 // of one route

	batchRecords = 500
	batchBytes   = 256 << 10
	// linger is how far apart batches begin that are not full: records on their
	// way together cost a fraction of the bytes. Alarms do not wait.
	linger = 200 * time.Millisecond

	minBackoff = time.Second
	maxBackoff = time.Minute
	// outage is how long a batch takes to be sent for what came meanwhile to
	// lead.
	outage = 10 * time.Second
)

// SinkStatus is how one sink of a route does.
type SinkStatus struct {
	Kind    string    `json:"kind"`
	Sent    uint64    `json:"sent"`    // records, since the start
	Refused uint64    `json:"refused"` // records that the sink will not have; given up
	Behind  uint64    `json:"behind"`  // records that wait
	Error   string    `json:"error,omitempty"`
	Since   time.Time `json:"since,omitzero"` // of Error
}

// sender brings the records of a route to one of its sinks.
type sender struct {
	r     *Router
	rt    *route
	index int
	kind  string
	read  *seglog.Reader
	out   sink.Sink // nil: to be made

	mu   sync.Mutex // guards the following
	stat SinkStatus
}

func cursorKey(dir string, i int) string { return fmt.Sprintf("%s/%d", filepath.Base(dir), i) }

// newSender makes a sender that goes on where it was. With an error it begins
// at the oldest record.
func (r *Router) newSender(rt *route, i int) (*sender, error) {
	s := &sender{r: r, rt: rt, index: i, kind: kindOf(rt.spec.To[i])}
	var saved []byte
	err := r.cfg.Cursors.Load(cursorBucket, func(key string, value []byte) error {
		if key == s.cursorKey() {
			saved = slices.Clone(value)
		}
		return nil
	})
	if err == nil {
		s.read, err = rt.log.NewReader(saved)
	}
	if err != nil {
		s.read, _ = rt.log.NewReader(nil) // nothing to misread
	}
	return s, err
}

func (s *sender) cursorKey() string { return cursorKey(s.r.dirOf(s.rt.key, s.rt.uid), s.index) }

func kindOf(s v1alpha1.RouteSink) string {
	switch {
	case s.Hub != nil:
		return "hub"
	case s.MQTT != nil:
		return "mqtt"
	case s.Webhook != nil:
		return "webhook"
	case s.RemoteWrite != nil:
		return "remoteWrite"
	}
	return "none"
}

// run sends until ctx ends.
func (s *sender) run(ctx context.Context, all []*sender) {
	defer s.read.Close()
	defer s.disconnect()
	s.read.Split()
	for ctx.Err() == nil {
		began := time.Now()
		b, err := s.read.Next(ctx, batchRecords, batchBytes)
		if err != nil {
			if ctx.Err() == nil {
				s.note(err)
			}
			return
		}
		late, ok := s.deliver(ctx, b)
		if !ok {
			return
		}
		s.read.Ack(b)
		if late {
			s.read.Split()
		}
		s.r.cfg.Cursors.Dirty(cursorBucket, s.cursorKey(), s.read.Cursor)
		s.rt.log.Trim(oldest(all))
		if s.rt.spec.Lane != "alarm" && len(b.Records) < batchRecords {
			pause(ctx, linger-time.Since(began))
		}
	}
}

// oldest is what some sink still needs.
func oldest(all []*sender) seglog.Pos {
	p := all[0].read.Oldest()
	for _, s := range all[1:] {
		if q := s.read.Oldest(); q.Before(p) {
			p = q
		}
	}
	return p
}

// pause waits for d, or for ctx; false when that ended.
func pause(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// deliver sends a batch, again and again, until it was taken or refused. late
// tells that this took long; ok is false when ctx ended first.
func (s *sender) deliver(ctx context.Context, b seglog.Batch) (late, ok bool) {
	began := time.Now()
	for wait := minBackoff; ; wait = min(2*wait, maxBackoff) {
		records := s.records(b)
		err := s.send(ctx, records)
		var refused *sink.Refused
		var later *sink.Later
		switch {
		case err == nil:
			s.took(len(records), 0)
			return late || time.Since(began) > outage, true
		case errors.As(err, &refused):
			s.took(len(records)-min(refused.Count, len(records)), refused.Count)
			s.r.cfg.Log.Warn("a sink refuses telemetry for good", "route", s.rt.key, "sink", s.kind, "records", refused.Count, "why", refused.Why)
			return late, true
		case ctx.Err() != nil:
			return false, false
		}
		late = true
		s.note(err)
		s.disconnect() // and perhaps the secret is another one next time
		d := wait/2 + rand.N(wait/2)
		if errors.As(err, &later) {
			d = max(d, later.After)
		}
		if !pause(ctx, d) {
			return false, false
		}
	}
}

// records makes what sinks take. What cannot be read is passed over: it would be
// the same at each try.
func (s *sender) records(b seglog.Batch) []edgeapi.TelemetryRecord {
	out := make([]edgeapi.TelemetryRecord, 0, len(b.Records))
	for _, rec := range b.Records {
		t, err := s.r.clock.telemetry(rec, b.Backfill)
		if err != nil {
			s.r.cfg.Log.Error("a telemetry record is passed over", "route", s.rt.key, "error", err)
			continue
		}
		out = append(out, t)
	}
	return out
}

func (s *sender) send(ctx context.Context, records []edgeapi.TelemetryRecord) error {
	if len(records) == 0 {
		return nil
	}
	if s.out == nil {
		out, err := s.connect()
		if err != nil {
			return err
		}
		s.out = out
	}
	return s.out.Send(ctx, records)
}

func (s *sender) connect() (sink.Sink, error) {
	spec := s.rt.spec.To[s.index]
	route := edgeapi.DeviceRef{Namespace: s.rt.key.Namespace, Name: s.rt.key.Name}
	if spec.Hub != nil {
		return &hubSink{&s.r.hub, route, s.index}, nil
	}
	cfg := sink.Config{Spec: spec, Route: route, Node: s.r.cfg.Node}
	if name := sink.SecretName(spec); name != "" {
		if cfg.Secret = s.r.cfg.Secret(s.rt.key.Namespace, name); cfg.Secret == nil {
			return nil, fmt.Errorf("secret %s/%s is not on this node", s.rt.key.Namespace, name)
		}
	}
	return sink.New(cfg)
}

func (s *sender) disconnect() {
	if s.out != nil {
		s.out.Close()
		s.out = nil
	}
}

// took notes what became of a batch, and tells when a sink is well again.
func (s *sender) took(sent, refused int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stat.Sent += uint64(sent)
	s.stat.Refused += uint64(refused)
	if s.stat.Error != "" {
		s.r.cfg.Log.Info("a sink takes telemetry again", "route", s.rt.key, "sink", s.kind, "after", time.Since(s.stat.Since).Round(time.Second))
		s.stat.Error, s.stat.Since = "", time.Time{}
	}
}

// note keeps what is wrong with a sink, and tells when that begins.
func (s *sender) note(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stat.Error == "" {
		s.stat.Since = time.Now()
		s.r.cfg.Log.Warn("a sink takes no telemetry; it waits on disk", "route", s.rt.key, "sink", s.kind, "error", err)
	}
	s.stat.Error = err.Error()
}

func (s *sender) status() SinkStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.stat
	st.Kind, st.Behind = s.kind, s.read.Behind()
	if s.kind == "hub" && st.Error == "" {
		st.Error, st.Since = s.r.hub.gone()
	}
	return st
}
