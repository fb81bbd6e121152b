package seglog

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/klauspost/compress/zstd"
)

func (l *Log) wakeSealer() {
	select {
	case l.toSeal <- struct{}{}:
	default:
	}
}

// sealer compresses segments that have ended, until Close.
func (l *Log) sealer() {
	defer l.wg.Done()
	for {
		select {
		case <-l.toSeal:
		case <-l.closing:
			return
		}
		for _, s := range l.ended() {
			select {
			case <-l.closing:
				return
			default:
			}
			if err := l.compress(s); err != nil {
				l.cfg.Log.Warn("a segment stays uncompressed", "segment", s.path, "error", err)
			}
		}
	}
}

func (l *Log) ended() []*segment {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []*segment
	for _, s := range l.segs[:len(l.segs)-1] {
		if s.closed && !s.zst {
			out = append(out, s)
		}
	}
	return out
}

// compress puts a compressed segment in an ended one's place.
func (l *Log) compress(s *segment) error {
	next := *s
	next.zst = true
	next.path = l.zstPath(s.segment, s.count, s.kept, s.level)
	return l.rewrite(s, &next, func(Record) bool { return true })
}

// thin takes records out of the oldest of the least thinned segments. It tells
// whether there was one.
func (l *Log) thin() bool {
	const maxLevel = 4
	l.mu.Lock()
	var s *segment
	for _, o := range l.segs {
		if o.zst && o.level < maxLevel && (s == nil || o.level < s.level) {
			s = o
		}
	}
	l.mu.Unlock()
	if s == nil {
		return false
	}
	seen := map[string]uint{}
	next := *s
	next.level++
	next.kept = 0
	keep := func(r Record) bool {
		if r.Kind != KindGap {
			key := l.cfg.Series(r)
			n := seen[key]
			if len(seen) < 1<<16 {
				seen[key] = n + 1
			}
			if n%2 == 1 {
				return false
			}
		}
		next.kept++
		return true
	}
	// The number of those kept is known once it is written.
	next.path = l.zstPath(s.segment, s.count, 0, next.level) + ".thin"
	err := l.rewriteAs(s, &next, keep, func() string { return l.zstPath(s.segment, s.count, next.kept, next.level) })
	if err != nil {
		l.cfg.Log.Warn("a segment could not be thinned", "segment", s.path, "error", err)
		return false
	}
	l.mu.Lock()
	l.stats.Dropped += uint64(s.kept - next.kept)
	l.mu.Unlock()
	return true
}

func (l *Log) rewrite(s, next *segment, keep func(Record) bool) error {
	return l.rewriteAs(s, next, keep, func() string { return next.path })
}

// rewriteAs writes the records of s that are to be kept to a file, named once it
// is whole, and puts next in the place of s.
func (l *Log) rewriteAs(s, next *segment, keep func(Record) bool, name func() string) error {
	tmp := next.path + ".tmp"
	size, err := writeCompressed(s, tmp, keep)
	if err != nil {
		return errors.Join(err, removeIfThere(tmp))
	}
	next.path, next.size = name(), size
	// Not under the lock, which those who append wait for. Until the old file is
	// gone there are both, which Open can bear.
	err = os.Rename(tmp, next.path)
	if err == nil {
		err = syncDir(l.cfg.Dir)
	}
	if err != nil {
		return errors.Join(err, removeIfThere(tmp), removeIfThere(next.path))
	}
	if l.swap(s, next) {
		return os.Remove(s.path)
	}
	return os.Remove(next.path) // it was dropped meanwhile
}

// swap puts next in the place of s, if that is still there.
func (l *Log) swap(s, next *segment) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stats.Bytes += uint64(next.size)
	for i, o := range l.segs {
		if o == s {
			l.segs[i] = next
			return true
		}
	}
	return false
}

func writeCompressed(s *segment, path string, keep func(Record) bool) (size int64, err error) {
	src, err := openSource(s)
	if err != nil {
		return 0, err
	}
	defer src.close()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	// One goroutine and a small window: a node has little memory, and time.
	enc, err := zstd.NewWriter(f, zstd.WithEncoderConcurrency(1), zstd.WithLowerEncoderMem(true),
		zstd.WithWindowSize(256<<10), zstd.WithEncoderLevel(zstd.SpeedDefault))
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, enc.Close()) }()
	if _, err := enc.Write(s.encode()); err != nil {
		return 0, err
	}
	var frame []byte
	at := Pos{Segment: s.segment, Offset: headerSize}
	for {
		rec, err := src.next(&at, s.end)
		if err == io.EOF {
			break
		}
		if err != nil {
			return 0, err
		}
		if !keep(rec) {
			continue
		}
		frame = binary.LittleEndian.AppendUint32(frame[:0], rec.at.Offset)
		frame = binary.LittleEndian.AppendUint32(frame, rec.at.Index)
		frame = appendRecord(frame, s.segment, rec.at.Offset, rec)
		if _, err := enc.Write(frame); err != nil {
			return 0, err
		}
	}
	if err := enc.Close(); err != nil {
		return 0, err
	}
	if err := f.Sync(); err != nil {
		return 0, err
	}
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// source reads the records of one segment in order. It stays open while the
// file is replaced or removed.
type source struct {
	header header
	zst    bool
	f      *os.File
	dec    *zstd.Decoder
	in     *bufio.Reader // of the decoder
	buf    []byte        // of a .log: bytes from bufAt on, all of them on disk
	bufAt  int64
}

func openSource(s *segment) (*source, error) {
	f, err := os.Open(s.path)
	if err != nil {
		return nil, err
	}
	src := &source{zst: s.zst, f: f}
	head := make([]byte, headerSize)
	if s.zst {
		src.dec, err = zstd.NewReader(f, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(1<<20))
		if err == nil {
			src.in = bufio.NewReaderSize(src.dec, 16<<10)
			_, err = io.ReadFull(src.in, head)
		}
	} else {
		_, err = f.ReadAt(head, 0)
	}
	if err == nil {
		src.header, err = decodeHeader(head)
	}
	if err != nil {
		src.close()
		return nil, fmt.Errorf("segment %s: %w", s.path, err)
	}
	return src, nil
}

func (s *source) close() {
	if s.dec != nil {
		s.dec.Close()
	}
	s.f.Close()
}

// next returns the record at at, or the next one there is, and moves at behind
// it. io.EOF: there is none before size.
func (s *source) next(at *Pos, size int64) (Record, error) {
	if s.zst {
		return s.nextFrame(at)
	}
	off := int64(at.Offset)
	if off >= size {
		return Record{}, io.EOF
	}
	b, err := s.bytes(off, 4, size)
	if err != nil {
		return Record{}, err
	}
	n, err := recordSize(b)
	if err != nil {
		return Record{}, err
	}
	if b, err = s.bytes(off, int64(n), size); err != nil {
		return Record{}, err
	}
	rec, n, err := decodeRecord(b, at.Segment, at.Offset)
	if err != nil {
		return Record{}, err
	}
	rec.Payload = append([]byte(nil), rec.Payload...)
	rec.at = *at
	at.Offset += uint32(n)
	at.Index++
	return rec, nil
}

// bytes returns n bytes or more from off on; none beyond size, which may not be
// on disk yet.
func (s *source) bytes(off, n, size int64) ([]byte, error) {
	if off+n > size {
		return nil, errShort
	}
	if off < s.bufAt || off+n > s.bufAt+int64(len(s.buf)) {
		want := min(max(n, 64<<10), size-off)
		if int64(cap(s.buf)) < want {
			s.buf = make([]byte, want)
		}
		s.buf, s.bufAt = s.buf[:want], off
		if _, err := s.f.ReadAt(s.buf, off); err != nil {
			s.buf = s.buf[:0]
			return nil, err
		}
	}
	return s.buf[off-s.bufAt:], nil
}

func (s *source) nextFrame(at *Pos) (Record, error) {
	for {
		var head [frameHead + recordHead]byte
		if _, err := io.ReadFull(s.in, head[:]); err != nil {
			return Record{}, err // io.EOF between two frames
		}
		size, err := recordSize(head[frameHead:])
		if err != nil {
			return Record{}, err
		}
		b := make([]byte, size)
		copy(b, head[frameHead:])
		if _, err := io.ReadFull(s.in, b[recordHead:]); err != nil {
			return Record{}, errShort
		}
		pos := Pos{at.Segment, binary.LittleEndian.Uint32(head[:]), binary.LittleEndian.Uint32(head[4:])}
		rec, n, err := decodeRecord(b, pos.Segment, pos.Offset)
		if err != nil {
			return Record{}, err
		}
		if pos.Offset < at.Offset {
			continue
		}
		rec.at = pos
		*at = Pos{at.Segment, pos.Offset + uint32(n), pos.Index + 1}
		return rec, nil
	}
}
