package seglog

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Open opens the log in cfg.Dir, or makes one. What was appended after the last
// sync before a power cut is cut off; what is appended now goes into a segment
// of its own. The caller sees to it that a directory is opened once.
func Open(cfg Config) (*Log, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("log %s: %w", cfg.Dir, err)
	}
	l := &Log{
		cfg: cfg, limit: cfg.MaxBytes,
		kick: make(chan struct{}, 1), offered: make(chan struct{}, 1), toSeal: make(chan struct{}, 1), closing: make(chan struct{}),
		room: make(chan struct{}), grown: make(chan struct{}),
	}
	if err := l.load(); err != nil {
		return nil, fmt.Errorf("log %s: %w", cfg.Dir, err)
	}
	l.wg.Add(2)
	go l.write()
	go l.sealer()
	l.wakeSealer()
	return l, nil
}

func (l *Log) load() error {
	names, err := os.ReadDir(l.cfg.Dir)
	if err != nil {
		return err
	}
	l.loadDrops()
	last := uint64(0)
	for _, d := range l.drops {
		last = max(last, d.To)
	}
	for _, e := range names {
		path := filepath.Join(l.cfg.Dir, e.Name())
		if strings.HasSuffix(e.Name(), ".tmp") {
			if err := os.Remove(path); err != nil {
				return err
			}
			continue
		}
		s, ok := parseName(path)
		if !ok {
			continue
		}
		last = max(last, s.segment)
		if err := l.loadSegment(s); err != nil {
			l.cfg.Log.Warn("a segment of a telemetry log is unreadable", "segment", path, "error", err)
			if err := os.Rename(path, filepath.Join(l.cfg.Dir, "corrupt")); err != nil {
				return err
			}
			l.drops = l.drops.with(drop{s.segment, s.segment, uint64(s.count)})
			continue
		}
		l.segs = append(l.segs, s)
	}
	// Compressed ones before what they were made of, less thinned ones last.
	slices.SortStableFunc(l.segs, func(a, b *segment) int {
		return cmp.Or(cmp.Compare(a.segment, b.segment), cmp.Compare(b.level, a.level), boolOrder(a.zst, b.zst))
	})
	var twice []*segment
	segs := l.segs
	l.segs = nil
	for _, s := range segs {
		if n := len(l.segs); n > 0 && l.segs[n-1].segment == s.segment {
			twice = append(twice, s)
			continue
		}
		l.segs = append(l.segs, s)
	}
	l.incarnation = newIncarnation()
	if n := len(l.segs); n > 0 {
		l.incarnation = l.segs[n-1].incarnation
	}
	s, f, err := l.create(last + 1)
	if err != nil {
		return fmt.Errorf("a new segment: %w: %w", ErrDisk, err)
	}
	l.file = f
	l.segs = append(l.segs, s)
	// Only now may an empty one go: numbers never come twice.
	for _, s := range l.segs[:len(l.segs)-1] {
		if s.kept == 0 && s.count == 0 {
			twice = append(twice, s)
		}
	}
	for _, s := range twice {
		l.segs = slices.DeleteFunc(l.segs, func(o *segment) bool { return o == s })
		if err := os.Remove(s.path); err != nil {
			return err
		}
	}
	return nil
}

func boolOrder(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return -1
	}
	return 1
}

// parseName tells which segment the file at path is, by its name.
func parseName(path string) (*segment, bool) {
	s := &segment{path: path, closed: true, since: time.Now()}
	name := filepath.Base(path)
	var rest string
	if n, _ := fmt.Sscanf(name, "%016x.%s", &s.segment, &rest); n != 2 {
		return nil, false
	}
	if rest == "log" {
		return s, true
	}
	s.zst = true
	if n, _ := fmt.Sscanf(rest, "%d.%d.%d.zst", &s.count, &s.kept, &s.level); n != 3 || s.kept > s.count || s.level < 0 {
		return nil, false
	}
	return s, strings.HasSuffix(rest, ".zst")
}

// loadSegment reads the header of a segment, and of one that is not compressed
// how far it is whole.
func (l *Log) loadSegment(s *segment) error {
	if s.zst {
		info, err := os.Stat(s.path)
		if err != nil {
			return err
		}
		s.size = info.Size()
		src, err := openSource(s)
		if err != nil {
			return err
		}
		defer src.close()
		return s.take(src.header)
	}
	b, err := readUpTo(s.path, 2<<30)
	if err != nil {
		return err
	}
	h, err := decodeHeader(b)
	if err != nil {
		if len(b) < headerSize { // cut off while it was made; nothing was ever in it
			s.size, s.end = headerSize, headerSize
			return nil
		}
		return err
	}
	if err := s.take(h); err != nil {
		return err
	}
	at := headerSize
	for at < len(b) {
		_, n, err := decodeRecord(b[at:], s.segment, uint32(at))
		if err != nil {
			break
		}
		at += n
		s.count++
	}
	s.kept, s.size, s.end = s.count, int64(at), int64(at)
	if at < len(b) {
		l.cfg.Log.Info("a segment ended in what was not written whole; that is cut off", "segment", s.path, "bytes", len(b)-at, "records", s.count)
		if err := os.Truncate(s.path, s.size); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

func (s *segment) take(h header) error {
	if h.segment != s.segment {
		return fmt.Errorf("it says it is segment %d", h.segment)
	}
	s.header = h
	return nil
}
