package store

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
)

// Local runs fn as one write: what it puts, deletes and marks is committed
// together, visible together and on disk when Local returns nil (memory-only
// resources excepted). fn runs on the store's committer, once, and must not
// block. If fn returns an error nothing is changed and Local returns that error.
//
// When ctx ends first the outcome is unknown to the caller, as with any server.
func (s *Store) Local(ctx context.Context, fn func(tx *Tx) error) error {
	w := &write{ctx: ctx, fn: fn, done: make(chan struct{})}
	select {
	case <-s.closing:
		return ErrClosed
	default:
	}
	select {
	case s.writes <- w:
	case <-s.closing:
		return ErrClosed
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-w.done:
	case <-ctx.Done():
		return ctx.Err()
	case <-s.stopped:
		select {
		case <-w.done:
		default:
			return ErrClosed
		}
	}
	if w.panicked != nil {
		panic(w.panicked)
	}
	return w.err
}

// Soon says that what this write puts need not be on disk when Local returns. It
// is visible at once. Private values reach the disk FlushAfter later at most,
// objects when the store is closed or with their next change. A power cut may
// take them back to what they were, so it is for what would then be made anew,
// like a heartbeat's time. Of objects, removals do not wait.
func (tx *Tx) Soon() { tx.l.late = true }

// Tx is one write under way. It sees its own changes.
type Tx struct {
	s *Store
	l *layer
}

// layer is a set of changes over another layer, or over the store: one per
// write, merged into the batch's when the write succeeds.
type layer struct {
	parent  *layer
	rv      uint64
	objects map[Key]*Object // nil: deleted
	parked  map[Key]*Object
	private map[privateKey]*privateValue
	outbox  map[entryID]*staged
	events  []Event
	graves  []string
	soon    soon // of objects and private: may reach the disk later
	late    bool // all that is put may
	content bool // what is there changed, not only how it is doing
	epoch   *string
	flush   flush
}

func newLayer(parent *layer, rv uint64) *layer {
	return &layer{
		parent: parent, rv: rv,
		objects: map[Key]*Object{}, parked: map[Key]*Object{},
		private: map[privateKey]*privateValue{}, outbox: map[entryID]*staged{},
		soon: newSoon(),
	}
}

// merge moves l's changes into its parent.
func (l *layer) merge() {
	p := l.parent
	p.rv = l.rv
	for k, o := range l.objects {
		if _, late := l.soon.objects[k]; late || l.late && o != nil {
			if _, known := p.objects[k]; !known {
				p.soon.objects[k] = struct{}{}
			}
		} else {
			delete(p.soon.objects, k)
		}
		p.objects[k] = o
	}
	for k, v := range l.private {
		if !l.late {
			delete(p.soon.private, k)
		} else if _, known := p.private[k]; !known {
			p.soon.private[k] = struct{}{}
		}
		p.private[k] = v
	}
	maps.Copy(p.parked, l.parked)
	maps.Copy(p.outbox, l.outbox)
	p.events = append(p.events, l.events...)
	p.graves = append(p.graves, l.graves...)
	p.content = p.content || l.content
	if l.epoch != nil {
		p.epoch = l.epoch
	}
}

func (tx *Tx) get(k Key) *Object {
	for l := tx.l; l != nil; l = l.parent {
		if o, ok := l.objects[k]; ok {
			return o
		}
	}
	return tx.s.stored(k)
}

func (tx *Tx) parkedAt(k Key) *Object {
	for l := tx.l; l != nil; l = l.parent {
		if o, ok := l.parked[k]; ok {
			return o
		}
	}
	return tx.s.parked[k]
}

// Get returns an object as this write sees it.
func (tx *Tx) Get(k Key) (Object, bool) {
	if o := tx.get(k); o != nil {
		return *o, true
	}
	return Object{}, false
}

// Put stores body under k. The uid is kept in the body too; an object stored
// under another uid is deleted first. What the cloud's revision was stays.
func (tx *Tx) Put(k Key, uid string, body []byte) (Object, error) {
	d, err := parseDoc(body)
	if err != nil {
		return Object{}, fmt.Errorf("store %s: %w", k, err)
	}
	rev := ""
	if cur := tx.get(k); cur != nil && cur.UID == uid {
		rev = cur.Rev
	}
	o, err := tx.put(k, uid, rev, d)
	if err != nil {
		return Object{}, err
	}
	return *o, nil
}

func (tx *Tx) put(k Key, uid, rev string, d doc) (*Object, error) {
	if err := k.check(); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	if err := d.seal(k, uid); err != nil {
		return nil, fmt.Errorf("store %s: %w", k, err)
	}
	cur := tx.get(k)
	if cur != nil && cur.UID != uid {
		if err := tx.remove(cur); err != nil {
			return nil, err
		}
		cur = nil
	}
	tx.l.rv++
	body, err := d.withRV(tx.l.rv)
	if err != nil {
		return nil, fmt.Errorf("store %s: %w", k, err)
	}
	o := &Object{Key: k, UID: uid, RV: tx.l.rv, Rev: rev, Body: body}
	tx.l.objects[k] = o
	delete(tx.l.soon.objects, k)
	if cur == nil {
		tx.l.content = tx.l.content || !volatile(k.Resource)
		tx.l.events = append(tx.l.events, Event{Type: Added, Object: o})
	} else {
		tx.l.events = append(tx.l.events, Event{Type: Modified, Object: o, Old: cur})
	}
	return o, nil
}

// Delete removes an object and returns its last state. A namesake that waited
// for it takes its place. Outbox entries that were to carry its state keep the
// last one.
func (tx *Tx) Delete(k Key) (Object, error) {
	cur := tx.get(k)
	if cur == nil {
		return Object{}, fmt.Errorf("store: delete %s: not found", k)
	}
	tx.freeze(cur)
	if err := tx.remove(cur); err != nil {
		return Object{}, err
	}
	if k.Resource == "pods" {
		tx.l.graves = append(tx.l.graves, cur.UID)
	}
	return *cur, tx.unpark(k)
}

func (tx *Tx) remove(cur *Object) error {
	d, err := parseDoc(cur.Body)
	if err != nil {
		return fmt.Errorf("store %s: %w", cur.Key, err)
	}
	tx.l.rv++
	last := *cur
	last.RV = tx.l.rv
	if last.Body, err = d.withRV(last.RV); err != nil {
		return fmt.Errorf("store %s: %w", cur.Key, err)
	}
	tx.l.objects[cur.Key] = nil
	tx.l.content = tx.l.content || !volatile(cur.Resource)
	delete(tx.l.soon.objects, cur.Key)
	tx.l.events = append(tx.l.events, Event{Type: Deleted, Object: &last})
	if cur.UID != "" {
		tx.dropOwned(cur.UID)
	}
	return nil
}

// unpark lets the namesake that waited at k in.
func (tx *Tx) unpark(k Key) error {
	p := tx.parkedAt(k)
	if p == nil {
		return nil
	}
	tx.l.parked[k] = nil
	d, err := parseDoc(p.Body)
	if err != nil {
		return fmt.Errorf("store %s: %w", k, err)
	}
	_, err = tx.put(k, p.UID, p.Rev, d)
	return err
}

// PutPrivate keeps a value that is no object, encrypted. When owner is not
// empty it leaves the store together with the object of that uid.
func (tx *Tx) PutPrivate(kind, key, owner string, value []byte) error {
	if kind == "" || len(kind) > 64 || slices.Contains([]byte(kind), 0) || len(key) > 4096 {
		return errors.New("store: private value needs a kind, and a key of at most 4096 bytes")
	}
	tx.l.private[privateKey{kind, key}] = &privateValue{owner, slices.Clone(value)}
	return nil
}

// DeletePrivate forgets a private value.
func (tx *Tx) DeletePrivate(kind, key string) { tx.l.private[privateKey{kind, key}] = nil }

func (tx *Tx) dropOwned(uid string) {
	drop := func(m map[privateKey]*privateValue) {
		for k, v := range m {
			if v != nil && v.owner == uid {
				tx.l.private[k] = nil
			}
		}
	}
	drop(tx.s.private)
	for l := tx.l.parent; l != nil; l = l.parent {
		drop(l.private)
	}
	for k, v := range tx.l.private {
		if v != nil && v.owner == uid {
			tx.l.private[k] = nil
		}
	}
}
