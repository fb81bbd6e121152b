package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
)

// bbolt's file format, as far as a reader needs it (little endian on every
// platform Skerry runs on).
const (
	pageHeader   = 16
	pageElement  = 16
	metaSize     = 64
	boltMagic    = 0xED0CDAED
	boltVersion  = 2
	flagBranch   = 0x01
	flagLeaf     = 0x02
	flagMeta     = 0x04
	flagFreelist = 0x10
	flagBucket   = 0x01 // on a leaf element
	noFreelist   = ^uint64(0)
	maxDepth     = 64
)

// preflight walks every reachable page of a bbolt file with plain reads. bbolt
// itself maps the file and trusts it: a truncated file is a SIGBUS and a bad
// page a panic in a goroutine of its own check, and neither leaves room to tell
// the operator what to do. What passes here bbolt can read safely.
func preflight(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	w := &walker{f: f, size: info.Size(), seen: map[uint64]bool{}}
	root, freelist, whole, err := w.readMeta()
	if err != nil {
		return err
	}
	if !whole {
		// bbolt would go by the other one, and silently be a commit older.
		return errors.New("one of its two meta pages is damaged: the last commit may be missing")
	}
	if freelist != noFreelist {
		if _, err := w.page(freelist, flagFreelist); err != nil {
			return fmt.Errorf("freelist: %w", err)
		}
	}
	return w.walk(root, bounds{}, 0)
}

// bounds are the keys a subtree may hold: from min on, below max; nil is open.
type bounds struct{ min, max []byte }

type walker struct {
	f        io.ReaderAt
	size     int64
	pageSize int64
	high     uint64 // first page id not in use
	seen     map[uint64]bool
}

// readMeta picks the meta page bbolt would: the valid one of the later
// transaction. whole tells whether both are valid.
func (w *walker) readMeta() (root, freelist uint64, whole bool, err error) {
	var best uint64
	found, valid := false, 0
	try := func(id uint64, off int64) {
		buf := make([]byte, pageHeader+metaSize)
		if _, err := w.f.ReadAt(buf, off); err != nil {
			return
		}
		m := buf[pageHeader:]
		h := fnv.New64a()
		h.Write(m[:56])
		if binary.LittleEndian.Uint32(m) != boltMagic || binary.LittleEndian.Uint32(m[4:]) != boltVersion ||
			binary.LittleEndian.Uint64(m[56:]) != h.Sum64() ||
			binary.LittleEndian.Uint64(buf) != id || binary.LittleEndian.Uint16(buf[8:]) != flagMeta {
			return
		}
		valid++
		txid := binary.LittleEndian.Uint64(m[48:])
		if found && txid <= best {
			return
		}
		found, best = true, txid
		w.pageSize = int64(binary.LittleEndian.Uint32(m[8:]))
		root = binary.LittleEndian.Uint64(m[16:])
		freelist = binary.LittleEndian.Uint64(m[32:])
		w.high = binary.LittleEndian.Uint64(m[40:])
	}
	try(0, 0)
	second := w.pageSize
	if !found {
		second = int64(os.Getpagesize())
	}
	try(1, second)
	if !found {
		return 0, 0, false, fmt.Errorf("no valid meta page")
	}
	if w.pageSize < 1024 || w.pageSize > 1<<16 || w.pageSize&(w.pageSize-1) != 0 {
		return 0, 0, false, fmt.Errorf("page size %d", w.pageSize)
	}
	if w.high > uint64(w.size/w.pageSize) {
		return 0, 0, false, fmt.Errorf("file is truncated: %d bytes, %d pages of %d expected", w.size, w.high, w.pageSize)
	}
	return root, freelist, valid == 2, nil
}

// page reads a page with its overflow and checks its header.
func (w *walker) page(id uint64, flags ...uint16) ([]byte, error) {
	if id < 2 || id >= w.high {
		return nil, fmt.Errorf("page %d is outside the file's %d", id, w.high)
	}
	head := make([]byte, pageHeader)
	if _, err := w.f.ReadAt(head, int64(id)*w.pageSize); err != nil {
		return nil, fmt.Errorf("page %d: %w", id, err)
	}
	if got := binary.LittleEndian.Uint64(head); got != id {
		return nil, fmt.Errorf("page %d says it is page %d", id, got)
	}
	overflow := uint64(binary.LittleEndian.Uint32(head[12:]))
	if overflow >= w.high-id {
		return nil, fmt.Errorf("page %d overflows the file", id)
	}
	for p := id; p <= id+overflow; p++ {
		if w.seen[p] {
			return nil, fmt.Errorf("page %d is used twice", p)
		}
		w.seen[p] = true
	}
	got := binary.LittleEndian.Uint16(head[8:])
	for _, want := range flags {
		if got == want {
			buf := make([]byte, int64(overflow+1)*w.pageSize)
			if _, err := w.f.ReadAt(buf, int64(id)*w.pageSize); err != nil {
				return nil, fmt.Errorf("page %d: %w", id, err)
			}
			return buf, nil
		}
	}
	return nil, fmt.Errorf("page %d has unexpected type %#x", id, got)
}

func (w *walker) walk(id uint64, in bounds, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("page %d: tree is deeper than %d", id, maxDepth)
	}
	p, err := w.page(id, flagBranch, flagLeaf)
	if err != nil {
		return err
	}
	if err := w.elements(p, in, depth); err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	return nil
}

// elements checks one page, or the page inlined in a bucket's value.
func (w *walker) elements(p []byte, in bounds, depth int) error {
	branch := binary.LittleEndian.Uint16(p[8:]) == flagBranch
	n := int(binary.LittleEndian.Uint16(p[10:]))
	if pageHeader+n*pageElement > len(p) {
		return fmt.Errorf("%d elements do not fit", n)
	}
	if branch && n == 0 {
		return fmt.Errorf("branch without children")
	}
	var last []byte
	var children []child
	for i := range n {
		at := pageHeader + i*pageElement
		e := p[at:]
		var pos, ksize, vsize uint64
		if branch {
			pos, ksize = uint64(binary.LittleEndian.Uint32(e)), uint64(binary.LittleEndian.Uint32(e[4:]))
		} else {
			pos, ksize, vsize = uint64(binary.LittleEndian.Uint32(e[4:])), uint64(binary.LittleEndian.Uint32(e[8:])), uint64(binary.LittleEndian.Uint32(e[12:]))
		}
		if pos+ksize+vsize > uint64(len(e)) {
			return fmt.Errorf("element %d lies outside the page", i)
		}
		key, val := e[pos:pos+ksize], e[pos+ksize:pos+ksize+vsize]
		if i > 0 && bytes.Compare(last, key) >= 0 {
			return fmt.Errorf("element %d is out of order", i)
		}
		if in.min != nil && bytes.Compare(key, in.min) < 0 || in.max != nil && bytes.Compare(key, in.max) >= 0 {
			return fmt.Errorf("element %d belongs to another page", i)
		}
		last = key
		switch {
		case branch:
			children = append(children, child{key, binary.LittleEndian.Uint64(e[8:])})
		case binary.LittleEndian.Uint32(e)&flagBucket != 0:
			if err := w.bucket(val, depth); err != nil {
				return fmt.Errorf("bucket %q: %w", key, err)
			}
		}
	}
	for i, c := range children {
		sub := bounds{c.key, in.max}
		if i+1 < len(children) {
			sub.max = children[i+1].key
		}
		if err := w.walk(c.id, sub, depth+1); err != nil {
			return err
		}
	}
	return nil
}

type child struct {
	key []byte
	id  uint64
}

func (w *walker) bucket(val []byte, depth int) error {
	if len(val) < 16 {
		return fmt.Errorf("header is cut off")
	}
	if root := binary.LittleEndian.Uint64(val); root != 0 {
		return w.walk(root, bounds{}, depth+1)
	}
	inline := val[16:]
	if len(inline) < pageHeader || binary.LittleEndian.Uint16(inline[8:]) != flagLeaf {
		return fmt.Errorf("inline page is malformed")
	}
	return w.elements(inline, bounds{}, depth+1)
}
