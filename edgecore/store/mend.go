package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// A store that is damaged is mended only if that is safe. Safe means, by the
// ledger: every pod the last commit held is there again under its uid, or the
// kubelet would kill its containers; no pod is there that had ended, or its
// containers would run a second time; and a pod that had finished, or was to
// end, has or is again. Everything else may be a little old or missing until
// the next sync, which brings it up to date.
//
// What is put together comes from whatever can be read in the damaged file and
// from the last good copy. If a pod is in neither, the store is refused.

// Mended is what was done to a damaged store at Open.
type Mended struct {
	At      time.Time `json:"at"`
	Cause   string    `json:"cause"`
	Pods    int       `json:"pods"`
	Objects int       `json:"objects"`         // pods included
	Missing int       `json:"missing"`         // objects that the last commit held and that were not found, if known
	Aside   string    `json:"aside,omitempty"` // where the damaged file is kept
}

// Mended tells what was done to a damaged store at Open; nil when it was whole.
func (s *Store) Mended() *Mended { return s.mended }

// damagedPath is where a damaged file is kept for whoever wants to know why,
// until the next one.
func damagedPath(path string) string { return path + ".damaged" }

// mend puts a damaged store together again.
func mend(cfg Config, sealer *sealer, said *ledgerPage, cause error) (*Mended, error) {
	if said == nil {
		return nil, errors.New("nothing tells which pods it held")
	}
	v := newSalvage(sealer, said.StoreID)
	inFile := v.file(cfg.Path)
	copied := v.file(goodPath(cfg.Path))
	if v.keyWrong && !v.keyRight {
		return nil, fmt.Errorf("key file %s is not the one this store was made with", cfg.KeyFile)
	}
	c, err := v.contents(said)
	if err != nil && copied {
		err = fmt.Errorf("%w (the copy is %s; were it put back, these pods' containers would be stopped)", err, goodPath(cfg.Path))
	}
	if err != nil {
		return nil, err
	}
	m := &Mended{At: time.Now(), Cause: cause.Error(), Pods: len(said.Pods), Objects: len(c.objects)}
	if v.meta != nil {
		m.Missing = max(0, v.meta.Counts.Objects-len(c.objects))
	}
	if _, err := writeFresh(cfg.Path+".new", sealer, c); err != nil {
		return nil, err
	}
	if inFile {
		m.Aside = damagedPath(cfg.Path)
		// A second name, so that the first is never without a file.
		if err := errors.Join(removeIfThere(m.Aside), os.Link(cfg.Path, m.Aside)); err != nil {
			cfg.Log.Warn("the damaged store is not kept for diagnosis", "error", err)
			m.Aside = ""
		}
	}
	if err := replace(cfg.Path+".new", cfg.Path); err != nil {
		return nil, err
	}
	return m, syncDir(filepath.Dir(cfg.Path))
}

// contents chooses among what was found by what the ledger said.
func (v *salvage) contents(said *ledgerPage) (contents, error) {
	c := contents{untold: map[Key]bool{}, private: map[privateKey]*privateValue{}}
	c.meta = metaRecord{Format: format, StoreID: said.StoreID, Seq: said.Seq, RV: said.RV, Epoch: said.Epoch}
	if v.meta != nil {
		c.meta = *v.meta
	}
	c.meta.Seq = max(c.meta.Seq, said.Seq) + 2
	c.meta.Content = c.meta.Seq
	if c.meta.Epoch == "" {
		c.meta.Epoch = said.Epoch
	}
	// What was used up without a commit lies within a block of the last one.
	high := max(c.meta.RV, said.RV)
	missing := podSet{}
	for uid, note := range said.Pods {
		f := v.pods[uid]
		if f == nil {
			missing[uid] = note
			continue
		}
		o, err := asNoted(f.o, note)
		if err != nil {
			return c, err
		}
		c.objects = append(c.objects, o)
		c.untold[o.Key] = true // what became of it since is told again
		high = max(high, o.RV)
	}
	if len(missing) > 0 {
		return c, fmt.Errorf("%d of its %d pods are neither in it nor in a last good copy: %s", len(missing), len(said.Pods), missing.names())
	}
	for _, f := range v.objects {
		c.objects = append(c.objects, f.o)
		c.untold[f.o.Key] = f.untold
		high = max(high, f.o.RV)
	}
	for id, f := range v.outbox {
		c.outbox = append(c.outbox, f.e)
		c.meta.Outbox = max(c.meta.Outbox, id)
	}
	for id, e := range v.events {
		c.events = append(c.events, e)
		c.meta.Outbox = max(c.meta.Outbox, id)
		high = max(high, e.rv)
	}
	for k, f := range v.private {
		if _, here := said.Pods[f.v.owner]; here || f.v.owner == "" {
			c.private[k] = f.v
		}
	}
	c.meta.RV = high + rvBlock
	return c, nil
}

// asNoted returns a pod, perhaps of an older day, as the ledger says it was.
func asNoted(o *Object, note podNote) (*Object, error) {
	if n, _ := noteOf(o); n == note {
		return o, nil
	}
	d, err := parseDoc(o.Body)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", o.Key, err)
	}
	if note.Phase != "" {
		status, err := d.object("status")
		if err != nil {
			return nil, fmt.Errorf("%s: %w", o.Key, err)
		}
		if status == nil {
			status = map[string]json.RawMessage{}
		}
		status["phase"] = quoted(note.Phase)
		if d.top["status"], err = json.Marshal(status); err != nil {
			return nil, fmt.Errorf("%s: %w", o.Key, err)
		}
	}
	if _, already := d.meta["deletionTimestamp"]; note.Deleted && !already {
		if err := d.markDeleted(); err != nil {
			return nil, fmt.Errorf("%s: %w", o.Key, err)
		}
	}
	noted := *o
	if noted.Body, err = d.withRV(o.RV); err != nil {
		return nil, fmt.Errorf("%s: %w", o.Key, err)
	}
	return &noted, nil
}
