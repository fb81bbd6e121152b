package mqtt

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"
)

// take does with a message what its acknowledgement promises. from is its
// publisher's connection; nil: this node, or the will of who is gone.
func (b *Embedded) take(from *conn, m *stored) error {
	m.seq = b.seq.Add(1)
	var full error
	if m.Retain {
		if err := b.retained.keep(m); err != nil {
			b.stats.retainedRefused.Add(1)
			b.slow.Warn("a retained message is not kept; raise its limits or clear what devices left behind", "topic", m.Topic)
			full = fmt.Errorf("mqtt: retain %q: %w", m.Topic, err)
		}
	}
	inlines, targets := b.tree.match(m.Topic, m.From)
	for _, in := range inlines {
		if m.From == "" {
			select {
			case b.self <- selfMessage{in, m}:
			default:
				return fmt.Errorf("mqtt: publish to %q: %w", m.Topic, errSelfQueue)
			}
			continue
		}
		if err := in.call(m, false); err != nil {
			b.stats.handlerFailed.Add(1)
			return fmt.Errorf("handler of %s: %w", in.filter, err)
		}
	}
	for _, to := range targets {
		b.deliver(from, to, m)
	}
	return full
}

// deliver puts m into the queue of a session, and waits for room in it.
func (b *Embedded) deliver(from *conn, to *target, m *stored) {
	s := to.session
	if !b.acl.May(*s.owner.Load(), m.Topic, false) {
		return
	}
	o := &outgoing{m: m, qos: min(m.QoS, to.qos), retain: m.Retain && to.asKept, ids: to.ids}
	var stalled *time.Timer
	for {
		room := s.put(o, from)
		if room == nil {
			return
		}
		if stalled == nil {
			from.blocked.Store(true)
			defer from.blocked.Store(false)
		}
		stalled = time.NewTimer(b.limit.Stall)
		select {
		case <-room:
		case <-s.done:
		case <-from.closed: // it will not be told that this was taken
			stalled.Stop()
			return
		case <-stalled.C:
			b.endSlow(s)
		}
		stalled.Stop()
	}
}

// endSlow ends a session that cannot hold what it was promised.
func (b *Embedded) endSlow(s *session) {
	b.stats.slowEnded.Add(1)
	b.slow.Warn("an MQTT client takes too slowly what it subscribed to; its session is ended", "client", s.id)
	b.mu.Lock()
	c := b.endLocked(s)
	b.mu.Unlock()
	if c != nil {
		c.kickSlow()
	}
}

// errTopic is a topic that this broker does not carry.
var errTopic = errors.New("not a topic for this broker")

func (b *Embedded) checkTopic(topic string) error {
	if err := CheckTopic(topic); err != nil {
		return fmt.Errorf("mqtt: %w: %w", errTopic, err)
	}
	return b.checkSize(topic)
}

func (b *Embedded) checkSize(topic string) error {
	if len(topic) > b.limit.TopicBytes {
		return fmt.Errorf("mqtt: %w: %d bytes, %d are the most", errTopic, len(topic), b.limit.TopicBytes)
	}
	if n := strings.Count(topic, "/") + 1; n > b.limit.TopicLevels {
		return fmt.Errorf("mqtt: %w: %d levels, %d are the most", errTopic, n, b.limit.TopicLevels)
	}
	return nil
}

// unshared is filter without its $share/group/.
func unshared(filter string) string {
	if rest, ok := strings.CutPrefix(filter, "$share/"); ok {
		_, filter, _ = strings.Cut(rest, "/")
	}
	return filter
}

// sampled logs each kind of message at most once per interval, with how many
// there were: what a client can cause must not fill the disk.
type sampled struct {
	log   *slog.Logger
	every time.Duration
	mu    sync.Mutex
	kinds map[string]*sample // by message; these are constants of this package
}

type sample struct {
	last    time.Time
	skipped int
}

func newSampled(log *slog.Logger, every time.Duration) *sampled {
	return &sampled{log: log, every: every, kinds: map[string]*sample{}}
}

func (s *sampled) Warn(msg string, args ...any) {
	now := time.Now()
	s.mu.Lock()
	k := s.kinds[msg]
	if k == nil {
		k = &sample{}
		s.kinds[msg] = k
	}
	if !k.last.IsZero() && now.Sub(k.last) < s.every {
		k.skipped++
		s.mu.Unlock()
		return
	}
	skipped := k.skipped
	k.last, k.skipped = now, 0
	s.mu.Unlock()
	if skipped > 0 {
		args = append(args, "more", skipped)
	}
	s.log.Warn(msg, args...)
}
