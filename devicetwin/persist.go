package devicetwin

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/value"
)

// Buckets of the DB; keys are namespace/name of a Device.
const (
	bucketModel    = "model"    // desiredRecord: what the spec wants, on the disk before the hub hears of it
	bucketTwin     = "twin"     // twinRecord: what the device said, written lazily
	bucketOverride = "override" // overrideRecord: on the disk before it is answered
	bucketCommand  = "cmd"      // commandRecord: on the disk before the device is told
)

type desiredRecord struct {
	UID   string                   `json:"uid"`
	Gen   int64                    `json:"gen"`
	Props map[string]desiredStored `json:"p,omitempty"`
}

type desiredStored struct {
	V   json.RawMessage `json:"v"`
	Gen int64           `json:"gen"`
	At  int64           `json:"at,omitempty"`

	Epoch uint64 `json:"e,omitempty"`
	Seq   uint64 `json:"s,omitempty"`
}

type twinRecord struct {
	UID   string                    `json:"uid"`
	Props map[string]reportedStored `json:"p"`
}

type reportedStored struct {
	V       json.RawMessage `json:"v,omitempty"`
	Q       string          `json:"q"`
	TS      int64           `json:"ts,omitempty"`
	RX      int64           `json:"rx"`
	Epoch   uint64          `json:"e"`
	Seq     uint64          `json:"s"`
	Inc     string          `json:"i,omitempty"` // "": the file's own
	Message string          `json:"msg,omitempty"`
}

type overrideRecord struct {
	UID   string           `json:"uid"`
	Props []overrideStored `json:"p"`
}

type overrideStored struct {
	Property string          `json:"p"`
	V        json.RawMessage `json:"v"`
	By       string          `json:"by"`
	BaseGen  int64           `json:"base"`
	Since    int64           `json:"since"`
	Expires  int64           `json:"exp"`
	Epoch    uint64          `json:"e"`
	Seq      uint64          `json:"s"`
}

type commandRecord struct {
	UID      string          `json:"uid"`
	Commands []commandStored `json:"c"`
}

type commandStored struct {
	CommandStatus
	Args    map[string]json.RawMessage `json:"args,omitempty"`
	Timeout time.Duration              `json:"timeout,omitempty"`
	Expires int64                      `json:"exp,omitempty"` // of a queued one
}

// restored is what the disk has of a device whose Device has not been seen yet.
type restored struct {
	desired  *desiredRecord
	twin     *twinRecord
	override *overrideRecord
	command  *commandRecord
}

func (r *restored) uid() string {
	switch {
	case r.desired != nil:
		return r.desired.UID
	case r.twin != nil:
		return r.twin.UID
	case r.override != nil:
		return r.override.UID
	case r.command != nil:
		return r.command.UID
	}
	return ""
}

// load reads all of the DB. A record that cannot be read is left out, told, and
// does not take the others with it.
func (t *Twins) load() error {
	for _, bucket := range []string{bucketModel, bucketTwin, bucketOverride, bucketCommand} {
		err := t.cfg.DB.Load(bucket, func(key string, raw []byte) error {
			if err := t.restore(bucket, key, raw); err != nil {
				t.cfg.Log.Warn("a record of a twin cannot be read; going on without it", "bucket", bucket, "key", clip(key, 128), "error", err)
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("bucket %s: %w", bucket, err)
		}
	}
	return nil
}

func (t *Twins) restore(bucket, key string, raw []byte) error {
	ns, name, ok := strings.Cut(key, "/")
	if !ok {
		return fmt.Errorf("key %.128q is not namespace/name", key)
	}
	k := Key{ns, name}
	r := t.restored[k]
	if r == nil {
		r = &restored{}
	}
	var err error
	switch bucket {
	case bucketModel:
		r.desired, err = decodeRecord[desiredRecord](raw)
	case bucketTwin:
		r.twin, err = decodeRecord[twinRecord](raw)
	case bucketOverride:
		r.override, err = decodeRecord[overrideRecord](raw)
	case bucketCommand:
		r.command, err = decodeRecord[commandRecord](raw)
	}
	if err == nil {
		t.restored[k] = r
	}
	return err
}

func decodeRecord[R any](raw []byte) (*R, error) {
	r := new(R)
	if err := json.Unmarshal(raw, r); err != nil {
		return nil, err
	}
	return r, nil
}

// adoptRestoredLocked gives a twin back what the disk had of the same Device.
func (t *Twins) adoptRestoredLocked(d *device) {
	r := d.pending
	d.pending = nil
	if r == nil {
		return
	}
	if r.desired != nil && r.desired.UID == d.uid {
		d.gen, d.stored = r.desired.Gen, r.desired.Gen
		for name, s := range r.desired.Props {
			if i, ok := d.model.index[name]; ok {
				w := d.wantOf(i)
				w.raw, w.gen, w.at = s.V, s.Gen, s.At
				w.v, w.err = parseDesired(&d.model.props[i], s.V)
				w.ver = v1alpha1.Version{Incarnation: t.inc, Epoch: s.Epoch, Seq: s.Seq}
			}
		}
	}
	if r.twin != nil && r.twin.UID == d.uid {
		for name, s := range r.twin.Props {
			if i, ok := d.model.index[name]; ok {
				if rep, ok := s.reported(&d.model.props[i], t.inc); ok {
					d.props[i].rep = rep
				}
			}
		}
	}
	if r.override != nil && r.override.UID == d.uid {
		wall, _ := t.cfg.Now()
		for _, s := range r.override.Props {
			i, ok := d.model.index[s.Property]
			if !ok {
				continue
			}
			v, err := d.model.props[i].typ.ParseDesired(s.V)
			if err != nil {
				continue
			}
			// While there was no power, only the date tells how much of its
			// time is left; never more than it had.
			left := min(time.Duration(s.Expires-wall.UnixMilli())*time.Millisecond, time.Duration(s.Expires-s.Since)*time.Millisecond)
			w := d.wantOf(i)
			w.over = &override{
				v: v, by: s.By, base: s.BaseGen, since: s.Since, expires: s.Expires,
				until: time.Now().Add(left), epoch: s.Epoch, seq: s.Seq,
			}
			w.ver = v1alpha1.Version{Incarnation: t.inc, Epoch: s.Epoch, Seq: s.Seq}
			t.wakeLocked(d, time.Now().Add(left))
		}
	}
	if r.command != nil && r.command.UID == d.uid {
		t.adoptCommandsLocked(d, r.command)
	}
}

func (s *reportedStored) reported(p *property, inc string) (reported, bool) {
	rep := reported{q: s.Q, ts: s.TS, rx: s.RX, epoch: s.Epoch, seq: s.Seq, message: s.Message}
	if s.Inc != inc {
		rep.inc = s.Inc
	}
	switch s.Q {
	case v1alpha1.QualityGood, v1alpha1.QualityUncertain, v1alpha1.QualityStale:
	case v1alpha1.QualityBad:
		if len(s.V) == 0 {
			return rep, true
		}
	default:
		return rep, false
	}
	v, err := p.typ.Parse(s.V)
	rep.v = v
	return rep, err == nil
}

// encodeTwin is what the disk is to have of the twin now; nil: nothing.
func (t *Twins) encodeTwin(k Key) []byte {
	t.mu.Lock()
	d := t.devices[k]
	if d == nil {
		t.mu.Unlock()
		return nil
	}
	d.dirty = false
	if d.pending != nil && d.pending.twin != nil {
		rec := d.pending.twin
		t.mu.Unlock()
		return mustJSON(rec)
	}
	rec := twinRecord{UID: d.uid, Props: make(map[string]reportedStored, len(d.props))}
	for i := range d.props {
		r := &d.props[i].rep
		if r.q == "" {
			continue
		}
		s := reportedStored{Q: r.q, TS: r.ts, RX: r.rx, Epoch: r.epoch, Seq: r.seq, Inc: r.inc, Message: r.message}
		if r.v != nil {
			s.V = value.JSON(r.v)
		}
		rec.Props[d.model.props[i].Name] = s
	}
	t.mu.Unlock()
	return mustJSON(rec)
}

func mustJSON(v any) []byte {
	raw, err := json.Marshal(v)
	if err != nil {
		panic(err) // records are made of what was parsed
	}
	return raw
}

func (t *Twins) desiredRecordLocked(d *device) desiredRecord {
	rec := desiredRecord{UID: d.uid, Gen: d.gen, Props: make(map[string]desiredStored)}
	for i := range d.props {
		if w := d.props[i].want; w != nil && w.raw != nil {
			rec.Props[d.model.props[i].Name] = desiredStored{V: w.raw, Gen: w.gen, At: w.at, Epoch: w.ver.Epoch, Seq: w.ver.Seq}
		}
	}
	return rec
}

// storer puts on the disk what Devices' specs want, and takes off it what went.
// Only then the hub is told that the generation was seen. A disk that takes
// nothing is tried again; what is wanted holds all the same.
func (t *Twins) storer(ctx context.Context) {
	const most = 64
	var again <-chan time.Time
	pause := time.Second
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.kickStore:
		case <-again:
		}
		again = nil
		for {
			n, err := t.storeSome(ctx, most)
			if err != nil {
				if ctx.Err() == nil {
					t.cfg.Log.Error("what is desired of devices is not on the disk; trying again", "error", err, "pause", pause)
					again = time.After(pause)
					pause = min(2*pause, 30*time.Second)
				}
				break
			}
			pause = time.Second
			if n < most {
				break
			}
		}
	}
}

// storeSome stores up to most devices.
func (t *Twins) storeSome(ctx context.Context, most int) (int, error) {
	t.mu.Lock()
	work := make(map[Key]string, most)
	for k, uid := range t.unstored {
		if len(work) == most {
			break
		}
		work[k] = uid
	}
	for k := range work {
		delete(t.unstored, k)
	}
	t.mu.Unlock()
	var muts []Mut
	gens := make(map[Key]desiredRecord)
	for k, went := range work {
		m, rec, err := t.storeOne(ctx, k, went != "")
		if err != nil {
			t.putBack(work)
			return 0, err
		}
		muts = append(muts, m...)
		if rec != nil {
			gens[k] = *rec
		}
	}
	if len(muts) > 0 {
		if err := t.cfg.DB.Commit(ctx, muts...); err != nil {
			t.putBack(work)
			return 0, err
		}
	}
	var fx effects
	t.mu.Lock()
	for k, rec := range gens {
		if d := t.devices[k]; d != nil && d.uid == rec.UID && d.stored != rec.Gen && rec.Gen <= d.gen {
			d.stored = rec.Gen
			t.changedLocked(d, &fx)
			d.upStateLocked(t)
		}
	}
	t.mu.Unlock()
	t.flush(&fx)
	return len(work), nil
}

func (t *Twins) putBack(work map[Key]string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for k, uid := range work {
		if uid != "" || t.unstored[k] == "" {
			t.unstored[k] = uid
		}
	}
}

// storeOne is how the disk follows one device. Where an earlier Device of that
// name went, its overrides and commands are replaced under the lock that orders
// them.
func (t *Twins) storeOne(ctx context.Context, k Key, went bool) ([]Mut, *desiredRecord, error) {
	key := k.String()
	if went {
		unlock, err := t.serial.lock(ctx, k)
		if err != nil {
			return nil, nil, err
		}
		t.mu.Lock()
		var over, cmds []byte
		if d := t.devices[k]; d != nil {
			over, cmds = t.encodeOverridesLocked(d, nil), t.encodeCommandsLocked(d)
		}
		t.mu.Unlock()
		err = t.cfg.DB.Commit(ctx, Mut{bucketOverride, key, over}, Mut{bucketCommand, key, cmds})
		unlock()
		if err != nil {
			return nil, nil, err
		}
		t.cfg.DB.Dirty(bucketTwin, key, func() []byte { return t.encodeTwin(k) })
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	d := t.devices[k]
	if d == nil {
		return []Mut{{bucketModel, key, nil}}, nil, nil
	}
	if d.pending != nil {
		return nil, nil, nil // the disk has what cannot be read yet
	}
	rec := t.desiredRecordLocked(d)
	return []Mut{{bucketModel, key, mustJSON(rec)}}, &rec, nil
}

// encodeOverridesLocked is the record of d's overrides with what planned says
// of some; nil: none.
func (t *Twins) encodeOverridesLocked(d *device, planned map[int]*override) []byte {
	all := make(map[int]*override)
	for i := range d.props {
		if w := d.props[i].want; w != nil && w.over != nil {
			all[i] = w.over
		}
	}
	maps.Copy(all, planned)
	rec := overrideRecord{UID: d.uid}
	for i := range d.props {
		if o := all[i]; o != nil {
			rec.Props = append(rec.Props, overrideStored{
				Property: d.model.props[i].Name, V: value.JSON(o.v), By: o.by, BaseGen: o.base,
				Since: o.since, Expires: o.expires, Epoch: o.epoch, Seq: o.seq,
			})
		}
	}
	if len(rec.Props) == 0 {
		return nil
	}
	return mustJSON(rec)
}
