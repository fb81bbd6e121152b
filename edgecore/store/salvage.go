package store

import (
	"bytes"
	"encoding/binary"
	"io"
	"os"
)

// salvage collects the records that can still be read in damaged databases.
// Each record has a checksum over its bucket, its key and itself, so what is
// collected is what was once written; what it cannot tell by itself is whether
// a record was still in force. An object's resourceVersion tells that among
// versions of it, and the ledger among pods. Other objects that had left the
// node may come back until the next sync, which removes them again; an outbox
// entry that the cloud had acknowledged is sent again, which changes nothing.
type salvage struct {
	sealer  *sealer
	storeID string

	keyRight, keyWrong bool // a record made with the key was found, one made with another

	meta    *metaRecord // the latest
	objects map[Key]*found
	pods    map[string]*found // by uid
	outbox  map[uint64]*foundEntry
	events  map[uint64]filedEvent
	private map[privateKey]*foundPrivate
	records int
}

type found struct {
	o      *Object
	untold bool
}

type foundEntry struct {
	e    *entry
	live bool
	size int
}

type foundPrivate struct {
	v    *privateValue
	live bool
}

func newSalvage(s *sealer, storeID string) *salvage {
	return &salvage{
		sealer: s, storeID: storeID,
		objects: map[Key]*found{}, pods: map[string]*found{},
		outbox: map[uint64]*foundEntry{}, events: map[uint64]filedEvent{},
		private: map[privateKey]*foundPrivate{},
	}
}

// file adds what is in a file: first what its tree leads to, as far as that can
// be followed, then what any of its pages holds, those that are free included.
// It tells whether anything was there.
func (v *salvage) file(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || info.Size() == 0 {
		return false
	}
	before := v.records
	w := &walker{f: f, size: info.Size(), seen: map[uint64]bool{}}
	if root, _, _, err := w.readMeta(); err == nil {
		v.tree(w, root, nil, 0)
	} else if w.pageSize < 1024 || w.pageSize > 1<<16 {
		w.pageSize = int64(os.Getpagesize())
	}
	for at := int64(0); at < info.Size(); at += w.pageSize {
		if p := leafAt(f, at, w.pageSize, info.Size()); p != nil {
			v.leaf(p, nil, false)
		}
	}
	return v.records > before
}

// tree follows a subtree and leaves out what it cannot read.
func (v *salvage) tree(w *walker, id uint64, bucket []byte, depth int) {
	if depth > maxDepth {
		return
	}
	p, err := w.page(id, flagBranch, flagLeaf)
	if err != nil {
		return
	}
	if binary.LittleEndian.Uint16(p[8:]) == flagBranch {
		n := int(binary.LittleEndian.Uint16(p[10:]))
		for i := 0; i < n && pageHeader+(i+1)*pageElement <= len(p); i++ {
			v.tree(w, binary.LittleEndian.Uint64(p[pageHeader+i*pageElement+8:]), bucket, depth+1)
		}
		return
	}
	leafElements(p, func(flags uint32, key, val []byte) {
		switch {
		case flags&flagBucket == 0:
			v.record(bucket, key, val, true)
		case bucket == nil && len(val) >= 16:
			if root := binary.LittleEndian.Uint64(val); root != 0 {
				v.tree(w, root, key, depth+1)
			} else if inline := val[16:]; len(inline) >= pageHeader {
				v.leaf(inline, key, true)
			}
		}
	})
}

// leafAt returns the leaf page at an offset with its overflow, as far as the
// file goes; nil when none is there.
func leafAt(f io.ReaderAt, at, pageSize, size int64) []byte {
	head := make([]byte, pageHeader)
	if _, err := f.ReadAt(head, at); err != nil || binary.LittleEndian.Uint16(head[8:]) != flagLeaf {
		return nil
	}
	n := min((int64(binary.LittleEndian.Uint32(head[12:]))+1)*pageSize, size-at, 2*maxBody)
	p := make([]byte, n)
	got, _ := f.ReadAt(p, at) // a bad block ends it early; what came before counts
	if got < pageHeader {
		return nil
	}
	return p[:got]
}

// leaf reads a leaf page. Without a bucket's name the checksums tell it.
func (v *salvage) leaf(p, bucket []byte, live bool) {
	if len(p) < pageHeader || binary.LittleEndian.Uint16(p[8:]) != flagLeaf {
		return
	}
	leafElements(p, func(flags uint32, key, val []byte) {
		if flags&flagBucket != 0 {
			if len(val) > 16+pageHeader && binary.LittleEndian.Uint64(val) == 0 {
				v.leaf(val[16:], key, live)
			}
			return
		}
		if bucket != nil {
			v.record(bucket, key, val, live)
			return
		}
		for _, b := range allBuckets() {
			if v.record(b, key, val, live) {
				return
			}
		}
	})
}

// leafElements calls fn for each element that lies within the page.
func leafElements(p []byte, fn func(flags uint32, key, val []byte)) {
	n := int(binary.LittleEndian.Uint16(p[10:]))
	for i := 0; i < n; i++ {
		at := pageHeader + i*pageElement
		if at+pageElement > len(p) {
			return
		}
		e := p[at:]
		pos, ksize, vsize := uint64(binary.LittleEndian.Uint32(e[4:])), uint64(binary.LittleEndian.Uint32(e[8:])), uint64(binary.LittleEndian.Uint32(e[12:]))
		if pos+ksize+vsize > uint64(len(e)) {
			continue
		}
		fn(binary.LittleEndian.Uint32(e), e[pos:pos+ksize], e[pos+ksize:pos+ksize+vsize])
	}
}

// record takes a record in, if it is one of the bucket.
func (v *salvage) record(bucket, key, val []byte, live bool) bool {
	if bytes.Equal(key, keyCheck) && bytes.Equal(bucket, bucketMeta) {
		plain, err := v.sealer.open("keycheck", nil, val)
		right := err == nil && bytes.Equal(plain, keyCheck)
		v.keyRight, v.keyWrong = v.keyRight || right, v.keyWrong || !right
		return true
	}
	if _, err := unframe(bucket, key, val); err != nil {
		return false
	}
	v.records++
	switch string(bucket) {
	case string(bucketMeta):
		m, err := decodeMeta(val)
		if err == nil && m.StoreID == v.storeID && (v.meta == nil || m.Seq > v.meta.Seq) {
			v.meta = &m
		}
	case string(bucketObjects):
		o, untold, err := v.sealer.decodeObject(bucket, key, val)
		if err == nil {
			v.object(&found{o, untold})
		}
		if k, kerr := decodeKey(key); kerr == nil && sealed(k.Resource) {
			v.keyRight, v.keyWrong = v.keyRight || err == nil, v.keyWrong || err != nil
		}
	case string(bucketOutbox):
		e, err := decodeOutbox(key, val)
		if err != nil {
			return true
		}
		// Of two versions of an entry the longer is the later: labels are added
		// to it, then the object's last state.
		have := v.outbox[e.id]
		if have == nil || live && !have.live || live == have.live && len(val) > have.size {
			v.outbox[e.id] = &foundEntry{e, live, len(val)}
		}
	case string(bucketEvents):
		if e, err := decodeEvent(key, val); err == nil && e.rv >= v.events[e.id].rv {
			v.events[e.id] = e
		}
	case string(bucketPrivate):
		k, pv, err := v.sealer.decodePrivate(key, val)
		if err == nil && (v.private[k] == nil || live && !v.private[k].live) {
			v.private[k] = &foundPrivate{pv, live}
		}
	}
	return true
}

func (v *salvage) object(f *found) {
	if f.o.Resource == "pods" {
		if have := v.pods[f.o.UID]; have == nil || f.o.RV > have.o.RV {
			v.pods[f.o.UID] = f
		}
		return
	}
	if have := v.objects[f.o.Key]; have == nil || f.o.RV > have.o.RV {
		v.objects[f.o.Key] = f
	}
}
