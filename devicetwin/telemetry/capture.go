package telemetry

import (
	"context"
	"fmt"
	"iter"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/skerry-io/skerry/devicetwin/mqtt"
	"github.com/skerry-io/skerry/devicetwin/telemetry/seglog"
)

const (
	replayBytes = 64 << 20
	// settled is how long after its capture a message has reached the twins; the
	// flush that writes them writes a cursor as old.
	settled = 10 * time.Second
	// trimmed is how long a captured message is kept at least: flushes lie at
	// most a minute apart.
	trimmed = 150 * time.Second
	// atRest is settled for an orderly end, after which the twins are flushed.
	atRest = time.Second
)

// Capture takes each message that a device publishes. For sync routes it
// returns when the message is on the disk, with an error when it is not and
// must not be acknowledged. Many callers share one sync.
func (r *Router) Capture(m mqtt.Message) error {
	return r.CaptureAll([]mqtt.Message{m})
}

// CaptureAll is Capture for messages that came together: they keep their order,
// and wait for the disk once. An error is of all of them, though some may be on
// the disk: they are sent again.
func (r *Router) CaptureAll(ms []mqtt.Message) error {
	var order []*seglog.Log
	recs := map[*seglog.Log][]seglog.Record{}
	for _, m := range ms {
		rec, logs, err := r.place(m)
		if err != nil {
			return err
		}
		for _, l := range logs {
			if recs[l] == nil {
				order = append(order, l)
			}
			recs[l] = append(recs[l], rec)
		}
	}
	switch len(order) {
	case 0:
		return nil
	case 1:
		return order[0].Append(context.Background(), recs[order[0]]...)
	}
	var all errgroup.Group
	for _, l := range order {
		all.Go(func() error { return l.Append(context.Background(), recs[l]...) })
	}
	return all.Wait()
}

// place offers m to the routes that do not wait, and says which logs must have
// it before it is acknowledged.
func (r *Router) place(m mqtt.Message) (rec seglog.Record, logs []*seglog.Log, err error) {
	if m.Retain && m.From == "" {
		return rec, nil, nil // an external broker had kept it: said once, perhaps long ago, and told at each connect
	}
	t := r.table.Load()
	var routes []*route
	t.topics.match(m.Topic, func(rt *route) {
		if !slices.Contains(routes, rt) {
			routes = append(routes, rt)
		}
	})
	device, wanted := false, false
	if t.sync {
		t.captured.match(m.Topic, func(sync bool) { device, wanted = true, wanted || sync })
	}
	if len(routes) == 0 && !wanted {
		return rec, nil, nil
	}
	if m.Received.IsZero() {
		m.Received, _ = r.cfg.Now()
	}
	rec = encodeMessage(m)
	for _, rt := range routes {
		switch {
		case rt.sync() && rt.log == nil:
			return rec, nil, fmt.Errorf("telemetry route %s: %w", rt.key, rt.err)
		case rt.sync():
			logs = append(logs, rt.log)
			wanted = wanted || device
		case rt.log != nil:
			rt.log.Offer(rec)
		}
	}
	if wanted {
		logs = append(logs, r.replay.log)
	}
	return rec, logs, nil
}

// replay is the log of captured messages of devices.
type replay struct {
	log   *seglog.Log
	saved []byte     // cursor of the run before
	upTo  seglog.Pos // what that run left

	mu    sync.Mutex // guards the following
	marks []mark     // where the log ended, every second
	safe  seglog.Pos // what lies before it is in the twins
}

type mark struct {
	at  time.Time
	end seglog.Pos
}

func (r *Router) replayDir() string { return filepath.Join(r.cfg.Dir, "capture") }

const replayKey = "capture"

func (r *Router) openReplay() (*replay, error) {
	log, err := seglog.Open(seglog.Config{
		Dir: r.replayDir(), MaxBytes: replayBytes, MaxAge: 24 * time.Hour, Series: seriesOf,
		Now: r.cfg.Now, Free: r.cfg.free, Log: r.cfg.Log,
	})
	if err != nil {
		return nil, err
	}
	p := &replay{log: log, upTo: log.End()}
	err = r.cfg.Cursors.Load(cursorBucket, func(key string, value []byte) error {
		if key == replayKey {
			p.saved = slices.Clone(value)
		}
		return nil
	})
	if err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

func (p *replay) close() {
	_ = p.log.Close() // it has no error of its own
}

// tick notes where the log ends, and has the cursor follow.
func (p *replay) tick(c Cursors) {
	now, end := time.Now(), p.log.End()
	p.mu.Lock()
	p.marks = append(p.marks, mark{now, end})
	var trim seglog.Pos
	for len(p.marks) > 0 && now.Sub(p.marks[0].at) > trimmed {
		trim = p.marks[0].end
		p.marks = p.marks[1:]
	}
	p.mu.Unlock()
	p.settle(c, now.Add(-settled))
	p.log.Trim(trim)
}

// settle has the cursor follow: what was captured before then is in the twins.
func (p *replay) settle(c Cursors, then time.Time) {
	p.mu.Lock()
	before := p.safe
	for _, m := range p.marks {
		if !m.at.After(then) && p.safe.Before(m.end) {
			p.safe = m.end
		}
	}
	changed := before != p.safe
	p.mu.Unlock()
	if changed {
		c.Dirty(cursorBucket, replayKey, p.cursor)
	}
}

func (p *replay) cursor() []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.Cursor(p.safe)
}

// Captured gives back the messages captured before this start that the twins
// may not have on the disk, oldest first. Some of them they have.
func (r *Router) Captured() iter.Seq2[mqtt.Message, error] {
	return func(yield func(mqtt.Message, error) bool) {
		p := r.replay
		read, err := p.log.NewReader(p.saved)
		if err != nil {
			r.cfg.Log.Warn("captured messages are replayed from the oldest on", "error", err)
			if read, err = p.log.NewReader(nil); err != nil {
				yield(mqtt.Message{}, err)
				return
			}
		}
		defer read.Close()
		for {
			recs, err := read.Until(p.upTo, 256)
			if err != nil {
				yield(mqtt.Message{}, err)
				return
			}
			if len(recs) == 0 {
				return
			}
			for _, rec := range recs {
				if rec.Kind != kindMessage {
					continue
				}
				if m, err := decodeMessage(rec); !yield(m, err) {
					return
				}
			}
		}
	}
}
