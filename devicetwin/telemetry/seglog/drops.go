package seglog

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// drop is segments that were given up.
type drop struct {
	From  uint64 `json:"from"`
	To    uint64 `json:"to"`
	Count uint64 `json:"count"` // records
}

// drops are the latest ones, in order.
type drops []drop

const maxDrops = 256

// with adds one, and joins the two oldest when there are too many.
func (d drops) with(n drop) drops {
	out := append(drops{}, d...)
	if last := len(out) - 1; last >= 0 && n.Count == 0 && out[last].Count == 0 {
		out[last].To = n.To // read by all: nothing to tell
		return out
	}
	out = append(out, n)
	if len(out) > maxDrops {
		out[1] = drop{out[0].From, out[1].To, out[0].Count + out[1].Count}
		out = out[1:]
	}
	return out
}

// between tells how many records of segments from a on, and before b, went.
func (d drops) between(a, b uint64) (n uint64) {
	for _, g := range d {
		if g.To >= a && g.From < b {
			n += g.Count
		}
	}
	return n
}

func (l *Log) dropsPath() string { return filepath.Join(l.cfg.Dir, "gaps.json") }

func (l *Log) saveDrops(d drops) error {
	b, err := json.Marshal(d)
	if err != nil {
		return err
	}
	return writeWhole(l.dropsPath(), b)
}

// loadDrops reads what was noted. Counts are for people: without them, gaps are
// told all the same.
func (l *Log) loadDrops() {
	b, err := readUpTo(l.dropsPath(), 1<<20)
	if err == nil {
		err = json.Unmarshal(b, &l.drops)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		l.drops = nil
		l.cfg.Log.Warn("how many records were dropped is not known any more", "log", l.cfg.Dir, "error", err)
	}
}

// writeWhole replaces the file at path, for good.
func writeWhole(path string, b []byte) error {
	tmp := path + ".tmp"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}
