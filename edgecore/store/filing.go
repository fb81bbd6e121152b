package store

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"
)

// rideAfter is how long an Event waits for the cloud before it goes to disk
// with a commit that happens anyway. While the node is connected none does.
const rideAfter = 30 * time.Second

// filed are the Events on disk, by outbox id, as of which mark.
type filed map[uint64]int

// filing is what a commit changes about the Events on disk.
type filing struct {
	put    []filedEvent
	remove []uint64
}

type filedEvent struct {
	id   uint64
	gen  int
	key  Key
	uid  string
	rv   uint64
	body json.RawMessage
}

// settle notes that a filing is on disk.
func (f filed) settle(done filing) {
	for _, id := range done.remove {
		delete(f, id)
	}
	for _, e := range done.put {
		f[e.id] = e.gen
	}
}

// waits tells whether an Event has waited for age and is not on disk as it is
// now, or (age zero) anything is on disk that the cloud has.
func (o *Outbox) waits(on filed, age time.Duration) bool {
	o.s.mu.RLock()
	defer o.s.mu.RUnlock()
	known := 0
	for el := o.order.Front(); el != nil; el = el.Next() {
		e := el.Value.(*entry)
		if e.op != OpEvent {
			continue
		}
		gen, ok := on[e.id]
		if ok {
			known++
		}
		if (!ok || gen != e.gen) && time.Since(e.marked) >= age {
			return true
		}
	}
	return age == 0 && (known < len(on) || len(o.acked) > 0)
}

// file collects what a commit has to change for the disk to hold the Events
// that wait now.
func (o *Outbox) file(on filed) filing {
	o.s.mu.RLock()
	defer o.s.mu.RUnlock()
	var out filing
	pending := map[uint64]bool{}
	for el := o.order.Front(); el != nil; el = el.Next() {
		e := el.Value.(*entry)
		if e.op != OpEvent {
			continue
		}
		obj := o.s.stored(e.key)
		if obj == nil || obj.UID != e.uid {
			continue
		}
		pending[e.id] = true
		if gen, ok := on[e.id]; !ok || gen != e.gen {
			out.put = append(out.put, filedEvent{e.id, e.gen, e.key, e.uid, obj.RV, obj.Body})
		}
	}
	for id := range on {
		if !pending[id] {
			out.remove = append(out.remove, id)
		}
	}
	slices.Sort(out.remove)
	return out
}

// eventRecord is an Event on disk.
type eventRecord struct {
	Namespace string          `json:"ns"`
	Name      string          `json:"n"`
	UID       string          `json:"uid"`
	RV        uint64          `json:"rv"`
	Body      json.RawMessage `json:"body"`
}

func encodeEvent(e filedEvent) ([]byte, error) {
	p, err := json.Marshal(eventRecord{e.key.Namespace, e.key.Name, e.uid, e.rv, e.body})
	if err != nil {
		return nil, fmt.Errorf("event %s: %w", e.key, err)
	}
	return frame(bucketEvents, idKey(e.id), p), nil
}

func decodeEvent(key, rec []byte) (filedEvent, error) {
	id, err := decodeID(key)
	if err != nil {
		return filedEvent{}, fmt.Errorf("event: %w", err)
	}
	p, err := unframe(bucketEvents, key, rec)
	if err != nil {
		return filedEvent{}, fmt.Errorf("event %d: %w", id, err)
	}
	var r eventRecord
	if err := json.Unmarshal(p, &r); err != nil {
		return filedEvent{}, fmt.Errorf("event %d: %w", id, err)
	}
	e := filedEvent{id: id, key: Key{"events", r.Namespace, r.Name}, uid: r.UID, rv: r.RV, body: r.Body}
	if len(e.body) == 0 {
		return e, fmt.Errorf("event %d: it has no body", id)
	}
	return e, e.key.check()
}

// drops counts what there was no room for.
type drops struct {
	Events uint64    `json:"events,omitempty"`
	States uint64    `json:"states,omitempty"`
	Since  time.Time `json:"since,omitzero"` // the first of those that nobody was told of
	// Told is how many of them were reported to the cloud.
	ToldEvents uint64 `json:"toldEvents,omitempty"`
	ToldStates uint64 `json:"toldStates,omitempty"`
}

func (d *drops) event() { d.Events++; d.first() }
func (d *drops) state() { d.States++; d.first() }

func (d *drops) first() {
	if d.Since.IsZero() {
		d.Since = time.Now().Round(0)
	}
}

// Dropped counts Events that were pushed out unsent, over the store's life.
func (o *Outbox) Dropped() uint64 {
	o.s.mu.RLock()
	defer o.s.mu.RUnlock()
	return o.drops.Events
}

// DroppedStates counts last statuses and deletions of pods that are gone which
// were pushed out unsent, over the store's life.
func (o *Outbox) DroppedStates() uint64 {
	o.s.mu.RLock()
	defer o.s.mu.RUnlock()
	return o.drops.States
}

// Drops is what was dropped since it was last reported.
type Drops struct {
	Events, States uint64
	Since          time.Time
}

// Unreported returns what was dropped and not reported with Reported.
func (o *Outbox) Unreported() Drops {
	o.s.mu.RLock()
	defer o.s.mu.RUnlock()
	d := o.drops
	return Drops{d.Events - d.ToldEvents, d.States - d.ToldStates, d.Since}
}

// Reported notes that d is in an Event which is in the outbox.
func (o *Outbox) Reported(d Drops) {
	o.s.mu.Lock()
	defer o.s.mu.Unlock()
	o.drops.ToldEvents += d.Events
	o.drops.ToldStates += d.States
	o.drops.Since = time.Time{}
	if o.drops.Events > o.drops.ToldEvents || o.drops.States > o.drops.ToldStates {
		o.drops.first()
	}
}

func (o *Outbox) dropsNow() drops {
	o.s.mu.RLock()
	defer o.s.mu.RUnlock()
	return o.drops
}
