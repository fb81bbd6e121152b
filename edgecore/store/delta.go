package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"
)

// ApplyDelta commits one step of the feed. Who owns which field is decided
// here: see mergePod and mergeNode. It may be applied twice.
func (s *Store) ApplyDelta(ctx context.Context, d Delta) error {
	return s.Local(ctx, func(tx *Tx) error { return tx.applyDelta(d) })
}

func (tx *Tx) applyDelta(d Delta) error {
	successors := map[Key]string{}
	for _, u := range d.Upserts {
		if u.Key.Resource == "pods" {
			successors[u.Key] = u.UID
		}
	}
	for _, del := range d.Deletions {
		if err := tx.applyDeletion(del, successors[del.Key]); err != nil {
			return fmt.Errorf("delta: delete %s: %w", del.Key, err)
		}
	}
	for _, u := range d.Upserts {
		if err := tx.applyUpsert(u); err != nil {
			return fmt.Errorf("delta: upsert %s: %w", u.Key, err)
		}
	}
	if d.Synced != "" && d.Synced != tx.s.epoch {
		tx.l.epoch = &d.Synced
	}
	return nil
}

// applyDeletion removes an object. Pods are the exception: that the cloud has
// finished with a pod (it was force-deleted, say) does not mean that its
// containers are gone. Such a pod stays, marked deleted, until the kubelet has
// ended it in order, and a namesake waits for that, whether it comes in the
// same delta or later: the two must never run side by side.
func (tx *Tx) applyDeletion(d Deletion, successor string) error {
	if err := d.Key.check(); err != nil {
		return err
	}
	cur, waiting := tx.get(d.Key), tx.parkedAt(d.Key)
	if waiting != nil && (d.UID == "" || d.UID == waiting.UID) {
		tx.l.parked[d.Key] = nil
		waiting = nil
	}
	switch {
	case cur == nil:
		tx.dropEntries(d.Key, d.UID) // a delete of ours that the cloud has seen through
		return nil
	case d.UID == "" && cur.Local():
		return nil
	case d.UID != "" && d.UID != cur.UID:
		tx.dropEntries(d.Key, d.UID)
		return nil
	case waiting != nil:
		return nil
	case successor != "" && successor != cur.UID && !isMirror(cur.Body):
		return nil // the upsert parks it
	}
	tx.dropEntries(d.Key, cur.UID)
	if d.Key.Resource == "pods" {
		if running, err := mayRun(cur.Body); err != nil {
			return err
		} else if running {
			return tx.terminate(cur)
		}
	}
	return tx.remove(cur)
}

// mayRun tells whether a pod may have containers that the kubelet has to end.
// The kubelet reports a final phase only once they all have ended. A mirror pod
// has none of its own: its static pod's manifest decides about them.
func mayRun(body []byte) (bool, error) {
	var p struct {
		Status struct {
			Phase string `json:"phase"`
		} `json:"status"`
	}
	if err := json.Unmarshal(body, &p); err != nil {
		return false, fmt.Errorf("status.phase: %w", err)
	}
	return p.Status.Phase != "Succeeded" && p.Status.Phase != "Failed" && !isMirror(body), nil
}

func (tx *Tx) applyUpsert(u Upsert) error {
	if err := u.Key.check(); err != nil {
		return err
	}
	if u.UID == "" || u.Rev == "" {
		return errors.New("uid and rev are required")
	}
	d, err := parseDoc(u.Body)
	if err != nil {
		return err
	}
	if err := d.seal(u.Key, u.UID); err != nil {
		return err
	}
	if tx.s.gone.has(u.UID) || slices.Contains(tx.graves(), u.UID) || tx.lookup(entryID{u.Key, u.UID, OpDelete}) != nil {
		return nil // ended here; the cloud has yet to hear of it
	}
	cur := tx.get(u.Key)
	if cur == nil {
		_, err := tx.put(u.Key, u.UID, u.Rev, d)
		return err
	}
	switch u.Key.Resource {
	case "pods":
		return tx.upsertPod(cur, u, d)
	case "nodes":
		return tx.upsertNode(cur, u, d)
	case "csinodes":
		// The kubelet owns these; the cloud only confirms.
		if own, err := parseDoc(cur.Body); err != nil {
			return err
		} else {
			d.top["spec"] = own.top["spec"]
		}
		if cur.UID != u.UID {
			return tx.adopt(cur, u, d)
		}
	}
	return tx.replace(cur, u, d)
}

func (tx *Tx) graves() []string {
	var out []string
	for l := tx.l; l != nil; l = l.parent {
		out = append(out, l.graves...)
	}
	return out
}

// replace stores d under cur's name. An object that is the same apart from the
// cloud's revision is no event, and not worth a commit of its own: with an older
// revision in the inventory the hub would only send it once more. (The echo of
// each status the node reports is such an object.)
func (tx *Tx) replace(cur *Object, u Upsert, d doc) error {
	if cur.UID == u.UID && d.sameBody(cur) {
		if cur.Rev != u.Rev {
			same := *cur
			same.Rev = u.Rev
			if _, changed := tx.l.objects[u.Key]; !changed {
				tx.l.soon.objects[u.Key] = struct{}{}
			}
			tx.l.objects[u.Key] = &same
		}
		return nil
	}
	tx.l.content = true
	_, err := tx.put(u.Key, u.UID, u.Rev, d)
	return err
}

func (tx *Tx) upsertPod(cur *Object, u Upsert, d doc) error {
	if cur.UID == u.UID {
		if err := mergePod(d, cur); err != nil {
			return err
		}
		return tx.replace(cur, u, d)
	}
	if cur.Local() && isMirror(cur.Body) {
		if !isMirror(u.Body) { // the name was taken by a pod from elsewhere
			tx.dropEntries(u.Key, cur.UID)
			return tx.replace(cur, u, d)
		}
		if err := mergePod(d, cur); err != nil {
			return err
		}
		tx.moveEntries(u.Key, cur.UID, u.UID)
		return tx.replace(cur, u, d)
	}
	if waiting := tx.parkedAt(u.Key); waiting == nil || waiting.UID != u.UID || waiting.Rev != u.Rev {
		body, err := d.withRV(cur.RV) // it gets its own when it is let in
		if err != nil {
			return err
		}
		tx.l.parked[u.Key] = &Object{Key: u.Key, UID: u.UID, RV: cur.RV, Rev: u.Rev, Body: body}
	}
	return tx.terminate(cur)
}

// terminate marks a pod deleted, as the API server would with its own grace.
func (tx *Tx) terminate(cur *Object) error {
	d, err := parseDoc(cur.Body)
	if err != nil {
		return err
	}
	if _, already := d.meta["deletionTimestamp"]; already {
		return nil
	}
	if err := d.markDeleted(); err != nil {
		return err
	}
	tx.l.content = true
	_, err = tx.put(cur.Key, cur.UID, cur.Rev, d)
	return err
}

// markDeleted gives d a deletion timestamp, its own grace from now.
func (d doc) markDeleted() error {
	spec, err := d.object("spec")
	if err != nil {
		return err
	}
	grace := int64(30)
	if raw, ok := spec["terminationGracePeriodSeconds"]; ok {
		if err := json.Unmarshal(raw, &grace); err != nil {
			return fmt.Errorf("spec.terminationGracePeriodSeconds: %w", err)
		}
	}
	// A broken value must not keep the namesake waiting for ever.
	grace = min(max(grace, 0), int64((365*24*time.Hour)/time.Second))
	d.meta["deletionTimestamp"] = quoted(time.Now().Add(time.Duration(grace) * time.Second).UTC().Format(time.RFC3339))
	d.meta["deletionGracePeriodSeconds"], err = json.Marshal(grace)
	return err
}

func (tx *Tx) upsertNode(cur *Object, u Upsert, d doc) error {
	local := map[string]map[string]bool{"labels": {}, "annotations": {}}
	for _, op := range []Op{OpUpdate, OpStatus, OpCreate} {
		e := tx.lookup(entryID{u.Key, cur.UID, op})
		if e == nil {
			continue
		}
		for _, k := range e.labels {
			local["labels"][k] = true
		}
		for _, k := range e.annotations {
			local["annotations"][k] = true
		}
	}
	created := tx.lookup(entryID{u.Key, cur.UID, OpCreate}) != nil
	if created && cur.Local() {
		// The cloud has not seen any of this node's own labels: all are news.
		own, err := parseDoc(cur.Body)
		if err != nil {
			return err
		}
		for field, keys := range local {
			m, err := rawObject(own.meta, field)
			if err != nil {
				return err
			}
			for k := range m {
				keys[k] = true
			}
		}
	}
	if err := mergeNode(d, cur, local); err != nil {
		return err
	}
	if cur.UID == u.UID {
		return tx.replace(cur, u, d)
	}
	if created && cur.Local() {
		tx.MarkDirty(Mark{Op: OpUpdate, Key: u.Key, UID: cur.UID, Labels: keysOf(local["labels"]), Annotations: keysOf(local["annotations"])})
	}
	// Whatever this node was called before, the cloud's copy lacks its state.
	tx.MarkDirty(Mark{Op: OpStatus, Key: u.Key, UID: cur.UID})
	return tx.adopt(cur, u, d)
}

// adopt gives the object its cloud uid in place: for the clients here it is
// still the same one.
func (tx *Tx) adopt(cur *Object, u Upsert, d doc) error {
	tx.moveEntries(u.Key, cur.UID, u.UID)
	tx.l.content = true
	tx.l.rv++
	body, err := d.withRV(tx.l.rv)
	if err != nil {
		return err
	}
	o := &Object{Key: u.Key, UID: u.UID, RV: tx.l.rv, Rev: u.Rev, Body: body}
	tx.l.objects[u.Key] = o
	delete(tx.l.soon.objects, u.Key)
	tx.l.events = append(tx.l.events, Event{Type: Modified, Object: o, Old: cur})
	return nil
}

func keysOf(m map[string]bool) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}
