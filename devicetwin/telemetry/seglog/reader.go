package seglog

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"sync"
	"time"
)

const (
	// splitFrom is how far a reader may be behind before the rest becomes its
	// backfill.
	splitFrom = 64 << 10
	// maxSpans bounds how many separate pieces of backfill a reader has.
	maxSpans = 16
	// backfillPause is how many times as long as it took to send a batch of the
	// backfill none is sent while there is live data: a share of 20 %.
	backfillPause = 4
	liveLead      = time.Second      // that live data has for itself after a Split
	liveFor       = 10 * time.Second // after a live record there is live data
)

// cursor is how far a reader has come.
type cursor struct {
	Incarnation string `json:"inc"` // of the log
	Live        place  `json:"live"`
	Back        []span `json:"back,omitempty"`
}

// place is a position, and how many records before it in its segment were not
// there any more.
type place struct {
	Pos
	Missing uint64 `json:"m,omitempty"`
}

// span is a piece of backfill: from At on, before To.
type span struct {
	At place `json:"at"`
	To Pos   `json:"to"`
}

// Reader reads a log in batches, live data first: what it was behind with at a
// Split is its backfill, sent beside the live data in a fifth of the time, and
// whenever there is none. In each of the two, records come in order.
//
// Next, Ack and Split are called from one goroutine, Cursor from any.
type Reader struct {
	l     *Log
	live  lane
	back  []*lane
	pause time.Time // no backfill before that, while there is live data
	fed   time.Time // when there was live data last

	mu    sync.Mutex
	acked cursor
}

// lane is one way through the log.
type lane struct {
	at  place
	to  *Pos // nil: no end
	src *source
	of  uint64 // segment of src
}

// Batch is what to send next.
type Batch struct {
	Records  []Record
	Backfill bool
	began    time.Time
	after    cursor
}

// NewReader makes a reader that goes on at a cursor; with an empty one, or one
// of another incarnation of the log, from the oldest record on.
func (l *Log) NewReader(saved []byte) (*Reader, error) {
	var c cursor
	if len(saved) > 0 {
		if err := json.Unmarshal(saved, &c); err != nil {
			return nil, fmt.Errorf("log %s: cursor %.200q: %w", l.cfg.Dir, saved, err)
		}
	}
	r := &Reader{l: l}
	l.mu.Lock()
	end := l.endLocked()
	if c.Incarnation != l.incarnation || end.before(c.Live.Pos) || len(c.Back) > maxSpans {
		c = cursor{Incarnation: l.incarnation, Live: place{Pos: Pos{Segment: l.segs[0].segment}}}
	}
	l.mu.Unlock()
	r.live.at = c.Live
	for _, s := range c.Back {
		to := s.To
		r.back = append(r.back, &lane{at: s.At, to: &to})
	}
	r.acked = c
	return r, nil
}

// Cursor is that of a reader which has read what lies before pos.
func (l *Log) Cursor(pos Pos) []byte {
	b, err := json.Marshal(cursor{Incarnation: l.incarnation, Live: place{Pos: pos}})
	if err != nil {
		panic(err) // numbers and a string
	}
	return b
}

// Close lets go of files.
func (r *Reader) Close() {
	r.live.close()
	for _, l := range r.back {
		l.close()
	}
}

// Next waits for records and returns at most max of them, of some maxBytes
// together. The next call returns what follows.
func (r *Reader) Next(ctx context.Context, max, maxBytes int) (Batch, error) {
	for {
		r.l.mu.Lock()
		grown := r.l.grown
		r.l.mu.Unlock()
		b, wait, err := r.collect(max, maxBytes)
		if err != nil || len(b.Records) > 0 {
			return b, err
		}
		var timer <-chan time.Time
		if wait > 0 {
			timer = time.After(wait)
		}
		select {
		case <-grown:
		case <-timer:
		case <-ctx.Done():
			return Batch{}, ctx.Err()
		case <-r.l.closing:
			return Batch{}, ErrClosed
		}
	}
}

// collect fills a batch; an empty one when there is nothing yet, or nothing
// before wait has passed.
func (r *Reader) collect(max, maxBytes int) (b Batch, wait time.Duration, err error) {
	b.began = time.Now()
	if wait = r.pause.Sub(b.began); wait <= 0 { // the backfill's turn
		if err := r.late(&b, max, maxBytes); err != nil || len(b.Records) > 0 {
			return b, 0, err
		}
	}
	if b.Records, err = r.fill(&r.live, max, maxBytes); err != nil {
		return Batch{}, 0, err
	}
	switch {
	case len(b.Records) > 0:
		r.fed = b.began
	case len(r.back) > 0 && b.began.Sub(r.fed) < liveFor:
		return Batch{}, wait, nil
	default:
		if err := r.late(&b, max, maxBytes); err != nil {
			return Batch{}, 0, err
		}
	}
	b.after = r.cursor()
	return b, 0, nil
}

// late fills a batch from the backfill.
func (r *Reader) late(b *Batch, max, maxBytes int) (err error) {
	for len(b.Records) == 0 && len(r.back) > 0 {
		first := r.back[0]
		if b.Records, err = r.fill(first, max, maxBytes); err != nil {
			return err
		}
		b.Backfill = len(b.Records) > 0
		if !first.at.before(*first.to) || !b.Backfill {
			first.close()
			r.back = r.back[1:]
		}
	}
	b.after = r.cursor()
	return nil
}

func (r *Reader) fill(ln *lane, max, maxBytes int) ([]Record, error) {
	var out []Record
	for size := 0; len(out) < max && size < maxBytes; {
		rec, ok, err := ln.next(r.l)
		if err != nil {
			return nil, err
		}
		if !ok {
			break
		}
		out = append(out, rec)
		size += len(rec.Payload)
	}
	return out, nil
}

func (r *Reader) cursor() cursor {
	c := cursor{Incarnation: r.l.incarnation, Live: r.live.at}
	for _, l := range r.back {
		c.Back = append(c.Back, span{l.at, *l.to})
	}
	return c
}

// Until returns at most max of the next live records before end, and none when
// there are none; it does not wait.
func (r *Reader) Until(end Pos, max int) ([]Record, error) {
	r.live.to = &end
	defer func() { r.live.to = nil }()
	return r.fill(&r.live, max, 1<<20)
}

// Ack tells that a batch, the one last returned, need not be sent again.
func (r *Reader) Ack(b Batch) {
	if b.Backfill {
		now := time.Now()
		r.pause = now.Add(backfillPause * now.Sub(b.began))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.acked = b.after
}

// Split makes backfill of what the reader is behind with, if that is much. It
// is called after an outage, between Ack and Next.
func (r *Reader) Split() {
	end := r.l.End()
	if len(r.back) >= maxSpans || r.l.distance(r.live.at.Pos, end) < splitFrom {
		return
	}
	behind := r.live
	behind.to = &end
	r.back = append(r.back, &behind)
	r.live = lane{at: place{Pos: end}}
	r.pause = time.Now().Add(liveLead)
	r.fed = time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.acked = r.cursor()
}

// Cursor is where to go on after a restart.
func (r *Reader) Cursor() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	b, err := json.Marshal(r.acked)
	if err != nil {
		panic(err) // numbers and a string
	}
	return b
}

// Oldest is the oldest position that the reader still needs.
func (r *Reader) Oldest() Pos {
	r.mu.Lock()
	defer r.mu.Unlock()
	oldest := r.acked.Live.Pos
	for _, s := range r.acked.Back {
		if s.At.before(oldest) {
			oldest = s.At.Pos
		}
	}
	return oldest
}

// Behind is how many records were not acknowledged.
func (r *Reader) Behind() uint64 {
	r.mu.Lock()
	c := r.acked
	r.mu.Unlock()
	r.l.mu.Lock()
	defer r.l.mu.Unlock()
	n := r.l.recordsLocked(c.Live.Pos, r.l.endLocked())
	for _, s := range c.Back {
		n += r.l.recordsLocked(s.At.Pos, s.To)
	}
	return n
}

// recordsLocked counts the records between two positions.
func (l *Log) recordsLocked(from, to Pos) (n uint64) {
	for _, s := range l.segs {
		a, b := uint32(0), s.count
		if s.segment < from.Segment || s.segment > to.Segment {
			continue
		}
		if s.segment == from.Segment {
			a = from.Index
		}
		if s.segment == to.Segment {
			b = to.Index
		}
		if b > a {
			n += uint64(b - a)
		}
	}
	return n
}

// distance is how many bytes of file lie between two positions.
func (l *Log) distance(from, to Pos) (n int64) {
	if from.Segment == to.Segment {
		return max(int64(to.Offset)-int64(from.Offset), 0)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.segs {
		switch {
		case s.segment < from.Segment || s.segment > to.Segment:
		case s.segment == from.Segment && !s.zst:
			n += s.end - int64(from.Offset)
		case s.segment == to.Segment:
			n += int64(to.Offset) - headerSize
		default:
			n += s.size
		}
	}
	return n
}

func (ln *lane) close() {
	if ln.src != nil {
		ln.src.close()
		ln.src = nil
	}
}

// next returns the next record of a lane; ok is false where there is none yet.
func (ln *lane) next(l *Log) (rec Record, ok bool, err error) {
	for {
		if ln.to != nil && !ln.at.before(*ln.to) {
			return Record{}, false, nil
		}
		s, size, gone := ln.locate(l)
		if gone != nil {
			if gone.Count > 0 {
				return gone.at(time.Now()), true, nil
			}
			continue
		}
		if s == nil {
			return Record{}, false, nil
		}
		was := ln.at
		rec, err := ln.src.next(&ln.at.Pos, size)
		switch {
		case err == nil && ln.to != nil && !rec.at.before(*ln.to):
			ln.at = was // thinned beyond the end
			ln.at.Pos = *ln.to
			return Record{}, false, nil
		case err == nil:
			rec.ID = rec.at.id(ln.src.header.incarnation)
			ln.at.Missing += uint64(rec.at.Index - was.Index)
			return rec, true, nil
		case err == io.EOF && !s.closed:
			return Record{}, false, nil
		}
		if err != io.EOF {
			l.cfg.Log.Error("part of a segment is lost", "segment", s.path, "offset", ln.at.Offset, "error", err)
		}
		if gap := ln.leave(l, s); gap.Count > 0 {
			return gap.at(time.Now()), true, nil
		}
	}
}

func (g Gap) at(now time.Time) Record {
	r := g.record(now.UnixMilli())
	r.ID = g.From + "-gap"
	return r
}

// locate opens the segment a lane is in. It returns a copy of what is known of
// it and how far it can be read, nil when nothing is there yet; or, when the
// lane's segment is not there any more, what is missing before the next one.
func (ln *lane) locate(l *Log) (s *segment, size int64, gone *Gap) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var found *segment
	for _, o := range l.segs {
		if o.segment >= ln.at.Segment {
			found = o
			break
		}
	}
	if found == nil {
		return nil, 0, nil
	}
	if found.segment > ln.at.Segment {
		gap := ln.skipLocked(l, found)
		return nil, 0, &gap
	}
	ln.at.Offset = max(ln.at.Offset, headerSize)
	if ln.src == nil || ln.of != found.segment {
		ln.close()
		src, err := openSource(found)
		if err != nil {
			l.cfg.Log.Error("a segment is lost", "segment", found.path, "error", err)
			if found == l.segs[len(l.segs)-1] {
				return nil, 0, nil // being appended to; what follows goes into another one
			}
			gap := ln.leaveLocked(l, found)
			return nil, 0, &gap
		}
		ln.src, ln.of = src, found.segment
	}
	c := *found
	c.closed = found.closed && found != l.segs[len(l.segs)-1]
	return &c, found.end, nil
}

// skipLocked moves a lane from a segment that is gone to the one that is there.
func (ln *lane) skipLocked(l *Log, to *segment) Gap {
	ln.close()
	from := ln.at
	next := Pos{Segment: to.segment, Offset: headerSize}
	if ln.to != nil && ln.to.before(next) {
		next = *ln.to
	}
	n := l.drops.between(from.Segment, next.Segment)
	if next.Segment != to.segment {
		n += uint64(next.Index)
	}
	ln.at = place{Pos: next}
	if n += from.Missing; n <= uint64(from.Index) {
		return Gap{}
	}
	return Gap{From: from.id(l.incarnation), To: next.id(l.incarnation), Count: n - uint64(from.Index)}
}

func (ln *lane) leave(l *Log, s *segment) Gap {
	l.mu.Lock()
	defer l.mu.Unlock()
	return ln.leaveLocked(l, s)
}

// leaveLocked moves a lane behind a segment, and tells what of it was missing.
func (ln *lane) leaveLocked(l *Log, s *segment) Gap {
	ln.close()
	from := ln.at
	next := Pos{Segment: s.segment + 1, Offset: headerSize}
	count := uint64(s.count)
	if ln.to != nil && ln.to.before(next) {
		next, count = *ln.to, uint64(ln.to.Index)
	}
	ln.at = place{Pos: next}
	n := from.Missing
	if count > uint64(from.Index) {
		n += count - uint64(from.Index)
	}
	if n == 0 {
		return Gap{}
	}
	start := Pos{Segment: s.segment, Offset: headerSize}
	return Gap{From: start.id(s.incarnation), To: next.id(l.incarnation), Count: n}
}
