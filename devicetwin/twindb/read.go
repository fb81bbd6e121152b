package twindb

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
	elementIsSub = 0x01 // on a leaf element: its value is a bucket
	maxDepth     = 64
)

// contents is what a file holds.
type contents struct {
	state   state // zero: not found
	records records
	damage  error // the first of what is wrong; nil: it is whole
}

// readFile reads the file at path, as much of it as can be read. The error is
// of the disk; what is wrong with the file is in contents.
func readFile(path string) (*contents, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return readPages(f, info.Size()), nil
}

func readPages(f io.ReaderAt, size int64) *contents {
	r := &reader{f: f, size: size, seen: map[uint64]bool{}, found: &contents{records: records{}}}
	c := r.found
	root, err := r.meta()
	if err != nil {
		c.damage = err
	}
	if root == 0 {
		return c
	}
	r.walk(root, "", 0)
	stateAt := slot{stateBucket, stateKey}
	st, err := decodeState(c.records[stateAt])
	delete(c.records, stateAt)
	if err != nil {
		r.damaged(err)
		return c
	}
	c.state = st
	have := map[string]int{}
	for s := range c.records {
		have[s.bucket]++
	}
	for bucket := range have {
		if _, ok := st.Counts[bucket]; !ok {
			r.damaged(fmt.Errorf("bucket %s is unknown to the last commit", bucket))
		}
	}
	for bucket, n := range st.Counts {
		if have[bucket] != n {
			r.damaged(fmt.Errorf("bucket %s holds %d records, the last commit left %d", bucket, have[bucket], n))
		}
	}
	return c
}

// reader goes through the pages with plain reads. It goes on past what is
// damaged, to bring back the rest.
type reader struct {
	f        io.ReaderAt
	size     int64
	pageSize int64
	high     uint64 // first page not in use
	seen     map[uint64]bool
	found    *contents
}

func (r *reader) damaged(err error) {
	if r.found.damage == nil {
		r.found.damage = err
	}
}

// meta picks the meta page bbolt would: the valid one of the later transaction.
func (r *reader) meta() (root uint64, err error) {
	var best uint64
	valid := 0
	try := func(id uint64, off int64) {
		buf := make([]byte, pageHeader+metaSize)
		if _, err := r.f.ReadAt(buf, off); err != nil {
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
		if valid > 1 && txid <= best {
			return
		}
		best = txid
		r.pageSize = int64(binary.LittleEndian.Uint32(m[8:]))
		root = binary.LittleEndian.Uint64(m[16:])
		r.high = binary.LittleEndian.Uint64(m[40:])
	}
	try(0, 0)
	second := r.pageSize
	if second == 0 {
		second = int64(os.Getpagesize())
	}
	try(1, second)
	switch {
	case valid == 0:
		return 0, errors.New("no valid meta page")
	case r.pageSize < 1024 || r.pageSize > 1<<16 || r.pageSize&(r.pageSize-1) != 0:
		return 0, fmt.Errorf("page size %d", r.pageSize)
	case valid == 1:
		// bbolt would go by the other one, and silently be a commit older.
		return root, errors.New("one of the two meta pages is damaged: the last commit may be missing")
	case r.high > uint64(r.size/r.pageSize):
		return root, fmt.Errorf("the file is truncated: %d bytes, %d pages of %d expected", r.size, r.high, r.pageSize)
	}
	return root, nil
}

// page reads a page with its overflow and checks its header.
func (r *reader) page(id uint64) ([]byte, error) {
	if id < 2 || id >= r.high {
		return nil, fmt.Errorf("page %d is outside the file's %d", id, r.high)
	}
	head := make([]byte, pageHeader)
	if _, err := r.f.ReadAt(head, int64(id)*r.pageSize); err != nil {
		return nil, fmt.Errorf("page %d: %w", id, err)
	}
	if got := binary.LittleEndian.Uint64(head); got != id {
		return nil, fmt.Errorf("page %d says it is page %d", id, got)
	}
	n := uint64(binary.LittleEndian.Uint32(head[12:])) + 1
	if n > r.high-id || n > uint64(r.size/r.pageSize) {
		return nil, fmt.Errorf("page %d overflows the file", id)
	}
	for p := id; p < id+n; p++ {
		if r.seen[p] {
			return nil, fmt.Errorf("page %d is used twice", p)
		}
		r.seen[p] = true
	}
	if t := binary.LittleEndian.Uint16(head[8:]); t != flagBranch && t != flagLeaf {
		return nil, fmt.Errorf("page %d has unexpected type %#x", id, t)
	}
	buf := make([]byte, int64(n)*r.pageSize)
	if _, err := r.f.ReadAt(buf, int64(id)*r.pageSize); err != nil {
		return nil, fmt.Errorf("page %d: %w", id, err)
	}
	return buf, nil
}

func (r *reader) walk(id uint64, bucket string, depth int) {
	if depth > maxDepth {
		r.damaged(fmt.Errorf("page %d: the tree is deeper than %d", id, maxDepth))
		return
	}
	p, err := r.page(id)
	if err != nil {
		r.damaged(err)
		return
	}
	r.elements(p, bucket, depth)
}

// elements takes one page, or the page inlined in a bucket's value.
func (r *reader) elements(p []byte, bucket string, depth int) {
	branch := binary.LittleEndian.Uint16(p[8:]) == flagBranch
	n := int(binary.LittleEndian.Uint16(p[10:]))
	var last []byte
	for i := range n {
		at := pageHeader + i*pageElement
		if at+pageElement > len(p) {
			r.damaged(fmt.Errorf("bucket %q: %d elements do not fit a page", bucket, n))
			return
		}
		e := p[at:]
		if branch {
			r.walk(binary.LittleEndian.Uint64(e[8:]), bucket, depth+1)
			continue
		}
		flags, pos := binary.LittleEndian.Uint32(e), uint64(binary.LittleEndian.Uint32(e[4:]))
		ksize, vsize := uint64(binary.LittleEndian.Uint32(e[8:])), uint64(binary.LittleEndian.Uint32(e[12:]))
		if pos+ksize+vsize > uint64(len(e)) {
			r.damaged(fmt.Errorf("bucket %q: element %d lies outside its page", bucket, i))
			continue
		}
		key, val := e[pos:pos+ksize], e[pos+ksize:pos+ksize+vsize]
		if i > 0 && bytes.Compare(last, key) >= 0 {
			r.damaged(fmt.Errorf("bucket %q: element %d is out of order", bucket, i))
		}
		last = key
		switch {
		case flags&elementIsSub != 0 && bucket == "":
			r.bucket(string(key), val, depth)
		case flags != 0 || bucket == "":
			r.damaged(fmt.Errorf("bucket %q: key %.40q is of an unknown kind", bucket, key))
		default:
			r.record(slot{bucket, string(key)}, val)
		}
	}
}

func (r *reader) bucket(name string, val []byte, depth int) {
	switch {
	case len(val) < 16 || name == "":
		r.damaged(fmt.Errorf("bucket %q: its header is cut off", name))
	case binary.LittleEndian.Uint64(val) != 0:
		r.walk(binary.LittleEndian.Uint64(val), name, depth+1)
	case len(val) < 16+pageHeader || binary.LittleEndian.Uint16(val[16+8:]) != flagLeaf:
		r.damaged(fmt.Errorf("bucket %q: its inline page is malformed", name))
	default:
		r.elements(val[16:], name, depth)
	}
}

func (r *reader) record(s slot, val []byte) {
	v, err := unseal(s, val)
	if err != nil {
		r.damaged(err)
		return
	}
	if _, twice := r.found.records[s]; twice {
		r.damaged(fmt.Errorf("bucket %s, key %q is there twice", s.bucket, s.key))
		return
	}
	r.found.records[s] = bytes.Clone(v)
}
