package twindb

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"time"
)

// Mended is what was done to a damaged file at Open.
type Mended struct {
	At      time.Time `json:"at"`
	Cause   string    `json:"cause"`
	Kept    int       `json:"kept"`            // records read from the damaged file
	Copied  int       `json:"copied"`          // records taken from the good copy
	Missing int       `json:"missing"`         // records known to be lost
	Anew    bool      `json:"anew,omitempty"`  // nothing could be kept: the incarnation is new
	Aside   string    `json:"aside,omitempty"` // where the damaged file is kept
}

// Open reads the file at cfg.Path, or makes one where there never was one. It
// holds a lock until Close. Damage is mended, never refused: what is lost with
// a twin the devices say again and the cloud sends again. An error is of the
// disk, or that another process has the file.
func Open(cfg Config) (*DB, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(cfg.Path), 0o700); err != nil {
		return nil, fmt.Errorf("twin database %s: %w", cfg.Path, err)
	}
	lock, err := lockFile(cfg.Path, cfg.LockTimeout)
	if err != nil {
		return nil, err
	}
	d, err := open(cfg)
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("twin database %s: %w", cfg.Path, err)
	}
	d.lock = lock
	if m := d.mended; m != nil {
		cfg.Log.Error("THE TWIN DATABASE WAS DAMAGED and has been mended", "database", cfg.Path, "cause", m.Cause,
			"kept", m.Kept, "copied", m.Copied, "missing", m.Missing, "anew", m.Anew, "aside", m.Aside)
	}
	go d.write()
	return d, nil
}

func open(cfg Config) (*DB, error) {
	said, err := readIdent(cfg.Path)
	if err != nil {
		return nil, err
	}
	found, err := readFile(cfg.Path)
	missing := errors.Is(err, fs.ErrNotExist)
	if err != nil && !missing {
		return nil, err
	}
	err = nil
	d := &DB{
		cfg: cfg, ops: make(chan *op), closing: make(chan struct{}), stopped: make(chan struct{}),
		dirty: map[slot]dirty{}, interval: minInterval, lastFlush: time.Now(), copyAt: time.Now().Add(copyEvery),
	}
	switch {
	case missing && said == nil:
		found = &contents{state: state{Format: format, Incarnation: newIncarnation()}, records: records{}}
	case missing:
		found = &contents{damage: errors.New("the file is missing")}
		d.mended, err = mend(cfg, found)
	case found.damage != nil:
		d.mended, err = mend(cfg, found)
	}
	if err != nil {
		return nil, err
	}
	d.kept, d.state = found.records, found.state
	for _, v := range d.kept {
		d.bytes += len(v)
	}
	d.number(said)
	if err := d.install(d.mended == nil && !missing); err != nil {
		return nil, err
	}
	d.stats.Interval = d.interval
	return d, nil
}

// number gives the new epoch. It lies above all that were ever used, or the
// incarnation is another one.
func (d *DB) number(said *ident) {
	switch {
	case d.state.Incarnation == "":
		d.state = state{Format: format, Incarnation: newIncarnation()}
	case said == nil:
		if d.mended != nil && d.mended.Copied > 0 {
			d.state.Incarnation, d.state.Epoch = newIncarnation(), 0 // how far it had come is not known
		}
	case said.Incarnation != d.state.Incarnation:
		// Another one's file, or an older one put back.
		d.state.Incarnation, d.state.Epoch = newIncarnation(), 0
	default:
		d.state.Epoch = max(d.state.Epoch, said.Epoch)
	}
	d.state.Epoch++
	d.state.Seq++
	d.ident = ident{d.state.Incarnation, d.state.Epoch}
}

// install writes the new file. The old one, if it was whole, is the good copy.
func (d *DB) install(whole bool) error {
	path := d.cfg.Path
	n, err := writeFresh(path+".new", d.state, d.kept)
	if err != nil {
		return err
	}
	d.count(n, false)
	d.unpaid = 0
	d.state.Counts = map[string]int{}
	for s := range d.kept {
		d.state.Counts[s.bucket]++
	}
	if whole {
		// A second name, so that the first is never without a file.
		good := goodPath(path)
		err := removeIfThere(good + ".new")
		if err == nil {
			err = os.Link(path, good+".new")
		}
		if err == nil {
			err = os.Rename(good+".new", good)
		}
		if err != nil {
			d.cfg.Log.Warn("the twin database's good copy could not be made; the older one stays", "copy", good, "error", err)
		}
	}
	// The epoch first: used up but unused is harmless, used twice is not.
	if err := writeIdent(path, d.ident); err != nil {
		return errors.Join(err, removeIfThere(path+".new"))
	}
	if err := replace(path+".new", path); err != nil {
		return err
	}
	return d.openBolt()
}

// mend puts together what can be read of the damaged file and, for the buckets
// that are not whole, of the good copy.
func mend(cfg Config, found *contents) (*Mended, error) {
	m := &Mended{At: time.Now(), Cause: found.damage.Error(), Kept: len(found.records)}
	if found.records == nil {
		found.records = records{}
	}
	lost := found.missing()
	good, err := readFile(goodPath(cfg.Path))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		cfg.Log.Warn("the twin database's good copy cannot be read", "error", err)
	}
	if good != nil && good.state.Incarnation != "" &&
		(found.state.Incarnation == "" || found.state.Incarnation == good.state.Incarnation) {
		for s, v := range good.records {
			if _, here := found.records[s]; !here && (found.state.Incarnation == "" || lost[s.bucket] > 0) {
				found.records[s] = v
				m.Copied++
			}
		}
		if found.state.Incarnation == "" {
			found.state = good.state
		}
	}
	for _, n := range found.missing() {
		m.Missing += max(n, 0)
	}
	m.Anew = found.state.Incarnation == ""
	if m.Anew {
		// Values of nobody knows when, under numbers that start anew.
		clear(found.records)
		m.Kept = 0
	}
	aside := corruptPath(cfg.Path)
	err = removeIfThere(aside)
	if err == nil {
		err = os.Link(cfg.Path, aside)
	}
	switch {
	case err == nil:
		m.Aside = aside
	case !errors.Is(err, fs.ErrNotExist):
		cfg.Log.Warn("the damaged twin database is not kept for diagnosis", "error", err)
	}
	return m, nil
}

// missing tells by bucket how many records there should be besides those found.
func (c *contents) missing() map[string]int {
	n := maps.Clone(c.state.Counts)
	for s := range c.records {
		if _, ok := n[s.bucket]; ok {
			n[s.bucket]--
		}
	}
	return n
}

func newIncarnation() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}
