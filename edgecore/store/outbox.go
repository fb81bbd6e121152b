package store

import (
	"bytes"
	"container/list"
	"context"
	"encoding/json"
	"maps"
	"slices"
	"time"
)

// Op is what the hub has to do for an outbox entry.
type Op string

const (
	OpCreate Op = "create"
	OpStatus Op = "status"
	OpUpdate Op = "update"
	OpDelete Op = "delete"
	OpEvent  Op = "event"
)

// Mark notes that the cloud has to hear of a change.
type Mark struct {
	Op          Op
	Key         Key
	UID         string
	Labels      []string // label keys changed or removed here
	Annotations []string // likewise
}

// Pending is one outbox entry, as Next hands it out.
type Pending struct {
	ID          uint64 // of this sending; a later one of the same entry has another
	Op          Op
	Key         Key
	UID         string
	Attempt     int      // 0 at the first try
	Body        []byte   // the object as it is now (or was last, when gone); nil for a delete
	Labels      []string // label keys to set from Body, or remove when absent there
	Annotations []string
}

const (
	maxHandout = 64
	minRetry   = time.Second
	maxRetry   = 5 * time.Minute
)

// Outbox is what the node has to tell the cloud: for each object and kind of
// change one entry, which carries the object's state as it is when sent. Entries
// come in the order they were first marked, those of one name strictly one
// after the other, Events last. Entries survive a restart; so do Events that
// were made more than FlushAfter before a power cut, or waited for the cloud when
// another write reached the disk.
//
// The store's mu guards it.
type Outbox struct {
	s       *Store
	order   *list.List // of *entry
	byID    map[entryID]*entry
	sent    map[uint64]*entry // by Pending.ID
	busy    map[Key]int       // entries of this key that are out
	lastID  uint64            // owned by the committer
	highest uint64            // id of an entry
	sending uint64
	events  int              // entries that are Events
	states  int              // entries with a record of their own
	last    int              // bytes of the last states of objects that are gone
	acked   []uint64         // records to take off the disk with the next commit
	cleared map[Key]struct{} // objects that are marked on disk as still to be told
	drops   drops
	wake    chan struct{}
}

// Bounds of what waits for the cloud. Events go first, see Config.MaxEvents,
// then the last statuses of pods that are gone, oldest first, then the news that
// such pods are gone, which the next sync finds out by itself. What is told of an
// object that is still here needs no room of its own.
const (
	maxEventBytes = 1 << 20
	maxStates     = 4096
	maxLastBytes  = 4 << 20
)

type entryID struct {
	key Key
	uid string
	op  Op
}

type entry struct {
	entryID
	id          uint64 // on disk
	labels      []string
	annotations []string
	last        json.RawMessage

	elem      *list.Element
	sendID    uint64 // not 0: out
	everSent  bool   // the cloud may have heard of it
	marked    time.Time
	gen       int // counts marks
	sentGen   int
	pins      int // commits under way that touch it
	attempt   int
	notBefore time.Time
}

// recorded tells whether an entry has a record of its own on disk. Events are
// filed apart; that the status of an object here has to be told is noted in the
// object's record, which is written with it anyway.
func (e *entry) recorded() bool {
	return e.op != OpEvent && (e.op != OpStatus || e.last != nil)
}

// staged is an entry as it will be after the commit; next nil removes it.
type staged struct {
	id   uint64
	base *entry
	next *entry
}

func (st *staged) recorded() bool {
	return st.base != nil && st.base.recorded() || st.next != nil && st.next.recorded()
}

func (o *Outbox) init(s *Store) {
	o.s = s
	o.order = list.New()
	o.byID = map[entryID]*entry{}
	o.sent = map[uint64]*entry{}
	o.busy = map[Key]int{}
	o.cleared = map[Key]struct{}{}
	o.wake = make(chan struct{})
}

// Lane is a part of the outbox that can be sent by itself: Events wait for
// nothing and nothing waits for them.
type Lane uint8

const (
	LaneState Lane = 1 << iota // all that is not an Event
	LaneEvents
	LaneAll = LaneState | LaneEvents
)

// Next waits until something of the lane is to be sent and hands it out, at
// most 64 entries at a time. Each must be answered with Done or Retry, or all
// with Release.
func (o *Outbox) Next(ctx context.Context, lane Lane) ([]Pending, error) {
	for {
		out, wake, wait := o.take(time.Now(), lane)
		if len(out) > 0 {
			return out, nil
		}
		err := func() error {
			var timer <-chan time.Time
			if wait > 0 {
				t := time.NewTimer(wait)
				defer t.Stop()
				timer = t.C
			}
			select {
			case <-wake:
			case <-timer:
			case <-o.s.closing:
				return ErrClosed
			case <-ctx.Done():
				return ctx.Err()
			}
			return nil
		}()
		if err != nil {
			return nil, err
		}
	}
}

func (o *Outbox) take(now time.Time, lane Lane) (out []Pending, wake <-chan struct{}, wait time.Duration) {
	o.s.mu.Lock()
	defer o.s.mu.Unlock()
	held := map[Key]bool{} // something earlier of this name must go first
	var next *list.Element
	for _, events := range []bool{false, true} {
		if events && lane&LaneEvents == 0 || !events && lane&LaneState == 0 {
			continue
		}
		for el := o.order.Front(); el != nil && len(out) < maxHandout; el = next {
			next = el.Next()
			e := el.Value.(*entry)
			if (e.op == OpEvent) != events || held[e.key] || o.busy[e.key] > 0 {
				continue
			}
			held[e.key] = true
			if e.pins > 0 {
				continue // its commit will wake us
			}
			if d := e.notBefore.Sub(now); d > 0 {
				if wait == 0 || d < wait {
					wait = d
				}
				continue
			}
			body, ok := o.bodyLocked(e)
			if !ok {
				if e.op == OpEvent {
					o.drops.event()
				}
				o.removeLocked(e)
				delete(held, e.key)
				continue
			}
			o.sending++
			e.sendID, e.sentGen, e.everSent = o.sending, e.gen, true
			o.sent[e.sendID] = e
			o.busy[e.key]++
			out = append(out, Pending{
				ID: e.sendID, Op: e.op, Key: e.key, UID: e.uid, Attempt: e.attempt, Body: body,
				Labels: slices.Clone(e.labels), Annotations: slices.Clone(e.annotations),
			})
		}
	}
	return out, o.wake, wait
}

// bodyLocked is what an entry carries now; false when there is nothing to tell
// any more.
func (o *Outbox) bodyLocked(e *entry) ([]byte, bool) {
	if e.op == OpDelete {
		return nil, true
	}
	if cur := o.s.stored(e.key); cur != nil && cur.UID == e.uid {
		return cur.Body, true
	}
	return e.last, e.last != nil
}

// Done takes entries out: the hub acknowledged them. One that changed since it
// was handed out stays.
func (o *Outbox) Done(ids ...uint64) {
	o.s.mu.Lock()
	defer o.s.mu.Unlock()
	for _, id := range ids {
		e := o.returnLocked(id)
		if e == nil {
			continue
		}
		e.attempt, e.notBefore = 0, time.Time{}
		if e.gen == e.sentGen && e.pins == 0 {
			o.removeLocked(e)
		} else {
			e.sentGen = -1
		}
	}
	o.wakeLocked()
}

// Retry puts entries back that could not be delivered; they wait a while that
// doubles with each attempt, from 1 s to 5 min, and so do later ones of the same
// name.
func (o *Outbox) Retry(ids ...uint64) {
	o.s.mu.Lock()
	defer o.s.mu.Unlock()
	for _, id := range ids {
		if e := o.returnLocked(id); e != nil {
			e.notBefore = time.Now().Add(min(minRetry<<min(e.attempt, 16), maxRetry))
			e.attempt++
		}
	}
	o.wakeLocked()
}

// Release puts everything back that was handed out, ready to be sent again at
// once: for a new session. Answers to the old sendings are ignored from now on.
func (o *Outbox) Release() {
	o.s.mu.Lock()
	defer o.s.mu.Unlock()
	for id := range o.sent {
		o.returnLocked(id)
	}
	for el := o.order.Front(); el != nil; el = el.Next() {
		el.Value.(*entry).notBefore = time.Time{}
	}
	o.wakeLocked()
}

// Depth is how many entries wait or are out.
func (o *Outbox) Depth() int {
	o.s.mu.RLock()
	defer o.s.mu.RUnlock()
	return o.order.Len()
}

func (o *Outbox) returnLocked(sendID uint64) *entry {
	e := o.sent[sendID]
	if e == nil {
		return nil
	}
	delete(o.sent, sendID)
	e.sendID = 0
	if o.busy[e.key]--; o.busy[e.key] <= 0 {
		delete(o.busy, e.key)
	}
	if o.byID[e.entryID] != e {
		return nil // removed while it was out
	}
	return e
}

func (o *Outbox) wakeLocked() {
	close(o.wake)
	o.wake = make(chan struct{})
}

func (o *Outbox) insertLocked(e *entry) {
	e.elem = o.order.PushBack(e)
	e.marked = time.Now()
	o.byID[e.entryID] = e
	o.highest = max(o.highest, e.id)
	o.countLocked(e, 1)
}

func (o *Outbox) countLocked(e *entry, n int) {
	if e.op == OpEvent {
		o.events += n
	}
	if e.recorded() {
		o.states += n
		o.last += n * len(e.last)
	}
}

func (o *Outbox) removeLocked(e *entry) {
	if o.byID[e.entryID] != e {
		return
	}
	o.order.Remove(e.elem)
	delete(o.byID, e.entryID)
	o.countLocked(e, -1)
	switch {
	case e.recorded():
		o.acked = append(o.acked, e.id)
	case e.op == OpStatus:
		o.cleared[e.key] = struct{}{}
	}
}

// pin holds the entries a batch touches.
func (o *Outbox) pin(b *layer) {
	o.s.mu.Lock()
	defer o.s.mu.Unlock()
	for _, st := range b.outbox {
		if st.base != nil {
			st.base.pins++
		}
	}
}

// takeAcked takes over what is to come off the disk.
func (o *Outbox) takeAcked(b *layer) []uint64 {
	o.s.mu.Lock()
	defer o.s.mu.Unlock()
	removed := o.acked
	o.acked = nil
	// An entry that was acknowledged after it was staged comes back as new.
	for id, st := range b.outbox {
		if st.next != nil && st.base != nil && o.byID[id] != st.base {
			removed = slices.DeleteFunc(removed, func(d uint64) bool { return d == st.id })
		}
	}
	return removed
}

// untold tells which of the objects have a status to be told once b is published.
func (o *Outbox) untold(b *layer, objects map[Key]*Object) map[Key]bool {
	o.s.mu.RLock()
	defer o.s.mu.RUnlock()
	out := map[Key]bool{}
	for k, obj := range objects {
		if obj == nil {
			continue
		}
		id := entryID{k, obj.UID, OpStatus}
		if st, ok := b.outbox[id]; ok {
			out[k] = st.next != nil
		} else {
			out[k] = o.byID[id] != nil
		}
	}
	return out
}

func (o *Outbox) anyTold() bool {
	o.s.mu.RLock()
	defer o.s.mu.RUnlock()
	return len(o.cleared) > 0
}

// told takes over the objects whose statuses were told since they were written.
func (o *Outbox) told() []Key {
	o.s.mu.Lock()
	defer o.s.mu.Unlock()
	out := slices.Collect(maps.Keys(o.cleared))
	clear(o.cleared)
	return out
}

func (o *Outbox) giveBack(removed []uint64) {
	o.s.mu.Lock()
	defer o.s.mu.Unlock()
	o.acked = append(removed, o.acked...)
}

func (o *Outbox) unpinLocked(b *layer) {
	for _, st := range b.outbox {
		if st.base != nil {
			st.base.pins--
		}
	}
	o.wakeLocked()
}

func (o *Outbox) publishLocked(b *layer) {
	if len(b.outbox) == 0 {
		return
	}
	fresh := make([]*entry, 0, len(b.outbox))
	for id, st := range b.outbox {
		if st.base != nil {
			st.base.pins--
		}
		live := o.byID[id]
		switch {
		case st.next == nil:
			if live != nil {
				o.dropLocked(live)
			}
		case live != nil:
			o.countLocked(live, -1)
			live.labels, live.annotations, live.last = st.next.labels, st.next.annotations, st.next.last
			o.countLocked(live, 1)
			live.gen++
			live.marked = time.Now()
			live.attempt, live.notBefore = 0, time.Time{}
		default:
			fresh = append(fresh, st.next)
		}
	}
	slices.SortFunc(fresh, func(a, b *entry) int {
		if a.id < b.id {
			return -1
		}
		return 1
	})
	for _, e := range fresh {
		o.insertLocked(e)
	}
	o.boundLocked()
	o.wakeLocked()
}

// boundLocked drops what there is no room for, oldest first, but for what is on
// its way.
func (o *Outbox) boundLocked() {
	drop := func(enough func() bool, what func(*entry) bool, count func()) {
		for el := o.order.Front(); el != nil && !enough(); {
			next := el.Next()
			if e := el.Value.(*entry); what(e) && e.sendID == 0 && e.pins == 0 {
				o.removeLocked(e)
				count()
			}
			el = next
		}
	}
	drop(func() bool { return o.events <= o.s.cfg.MaxEvents },
		func(e *entry) bool { return e.op == OpEvent }, o.drops.event)
	fits := func() bool { return o.states <= maxStates && o.last <= maxLastBytes }
	drop(fits, func(e *entry) bool { return e.op == OpStatus && e.last != nil }, o.drops.state)
	drop(fits, func(e *entry) bool { return e.op == OpDelete || e.last != nil }, o.drops.state)
}

// dropLocked removes an entry whose record the commit has already removed.
func (o *Outbox) dropLocked(e *entry) {
	acked := o.acked
	o.removeLocked(e)
	o.acked = acked
	delete(o.cleared, e.key)
}

// lookup returns an entry as tx sees it, nil when there is none.
func (tx *Tx) lookup(id entryID) *entry {
	for l := tx.l; l != nil; l = l.parent {
		if st, ok := l.outbox[id]; ok {
			return st.next
		}
	}
	tx.s.mu.RLock()
	defer tx.s.mu.RUnlock()
	return tx.s.outbox.byID[id]
}

// everSent tells whether the cloud may have heard of an entry.
func (tx *Tx) everSent(e *entry) bool {
	tx.s.mu.RLock()
	defer tx.s.mu.RUnlock()
	live := tx.s.outbox.byID[e.entryID]
	return live != nil && live.everSent
}

// stage sets what an entry will be; next nil removes it.
func (tx *Tx) stage(id entryID, next *entry) {
	var base *entry
	var diskID uint64
	found := false
	for l := tx.l; l != nil && !found; l = l.parent {
		if st, ok := l.outbox[id]; ok {
			base, diskID, found = st.base, st.id, true
		}
	}
	if !found {
		tx.s.mu.RLock()
		base = tx.s.outbox.byID[id]
		tx.s.mu.RUnlock()
		if base != nil {
			diskID = base.id
		} else {
			tx.s.outbox.lastID++
			diskID = tx.s.outbox.lastID
		}
	}
	if next != nil {
		next.entryID, next.id = id, diskID
	}
	tx.l.outbox[id] = &staged{diskID, base, next}
}

// MarkDirty notes in the outbox that the cloud has to hear of a change. A
// delete makes a create or update of the same object needless; its last status
// still goes first, as others wait for it. A mirror pod that came and went while
// the cloud was away leaves nothing to tell.
//
// That a status has to be told is kept on disk with the object: without a Put in
// the same write it is known only until a restart.
func (tx *Tx) MarkDirty(m Mark) {
	id := entryID{m.Key, m.UID, m.Op}
	e := &entry{}
	if old := tx.lookup(id); old != nil {
		e.labels, e.annotations, e.last = old.labels, old.annotations, old.last
	}
	e.labels = union(e.labels, m.Labels)
	e.annotations = union(e.annotations, m.Annotations)
	if m.Op != OpDelete {
		tx.stage(id, e)
		return
	}
	create := tx.lookup(entryID{m.Key, m.UID, OpCreate})
	tx.unstage(entryID{m.Key, m.UID, OpUpdate})
	if create == nil {
		tx.stage(id, e)
		return
	}
	heard := tx.everSent(create)
	tx.unstage(create.entryID)
	tx.unstage(entryID{m.Key, m.UID, OpStatus})
	if heard {
		tx.stage(id, e)
	}
}

// unstage removes an entry, if there is one.
func (tx *Tx) unstage(id entryID) bool {
	if tx.lookup(id) == nil {
		return false
	}
	tx.stage(id, nil)
	return true
}

// freeze keeps an object's last state in the entries that were to carry it.
func (tx *Tx) freeze(o *Object) {
	if volatile(o.Resource) || sealed(o.Resource) {
		return
	}
	for _, op := range []Op{OpCreate, OpStatus, OpUpdate} {
		id := entryID{o.Key, o.UID, op}
		if old := tx.lookup(id); old != nil {
			tx.stage(id, &entry{labels: old.labels, annotations: old.annotations, last: o.Body})
		}
	}
}

// dropEntries forgets everything about one object: the cloud no longer has it.
func (tx *Tx) dropEntries(k Key, uid string) {
	for _, op := range []Op{OpCreate, OpStatus, OpUpdate, OpDelete} {
		tx.unstage(entryID{k, uid, op})
	}
}

// moveEntries gives an adopted object's entries its new uid. The cloud has the
// object, so a create is needless.
func (tx *Tx) moveEntries(k Key, from, to string) {
	tx.unstage(entryID{k, from, OpCreate})
	for _, op := range []Op{OpStatus, OpUpdate} {
		old := tx.lookup(entryID{k, from, op})
		if old == nil {
			continue
		}
		tx.unstage(entryID{k, from, op})
		tx.stage(entryID{k, to, op}, &entry{labels: old.labels, annotations: old.annotations, last: old.last})
	}
}

func (e *entry) sameRecord(other *entry) bool {
	return slices.Equal(e.labels, other.labels) && slices.Equal(e.annotations, other.annotations) && bytes.Equal(e.last, other.last)
}

func union(a, b []string) []string {
	if len(b) == 0 {
		return a
	}
	out := append(slices.Clone(a), b...)
	slices.Sort(out)
	return slices.Compact(out)
}
