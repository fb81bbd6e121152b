package store

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"syscall"
)

// ledger is a small file beside the database that says which pods the database
// holds. A database that was deleted, emptied or is older than it should be
// would otherwise be taken at its word, and the kubelet would kill every
// container whose pod is missing. With the ledger it is refused, or mended from
// what is left; see mend.
//
// It is written only when the set changes, or how a pod stands: before the
// commit that removes a pod or notes its end, after the one that brings a pod
// and before that can be seen. So whatever moment the power goes, every pod of
// the ledger is in the database, and no pod has containers that is not in the
// ledger. Mirror pods are not in it: the manifests decide about them.
//
// The file is two slots that are written in turn, in place, each of
//
//	"SKL1", 4 bytes length, 4 bytes CRC-32C of the JSON (both big endian), JSON ledgerPage
type ledger struct {
	f         *os.File
	path      string
	slot      int64
	on        ledgerPage // what the file says
	lastWrite uint64     // bytes
}

const (
	ledgerMagic = "SKL1"
	ledgerHead  = 12
	ledgerBlock = 4096
	maxLedger   = 4 << 20
)

// ledgerPage is the JSON of a slot.
type ledgerPage struct {
	N       uint64 `json:"n"` // the higher slot counts
	StoreID string `json:"storeID"`
	Seq     uint64 `json:"seq"` // a commit that had been made by then
	RV      uint64 `json:"rv"`
	Epoch   string `json:"epoch,omitempty"`
	Pods    podSet `json:"pods"`
}

// podSet is pods by uid.
type podSet map[string]podNote

type podNote struct {
	Name    string `json:"n"`           // namespace/name
	Phase   string `json:"p,omitempty"` // a final one
	Deleted bool   `json:"d,omitempty"` // it is to end
}

// noteOf returns what the ledger says of a pod; false for a mirror pod.
func noteOf(o *Object) (podNote, bool) {
	var p struct {
		Metadata struct {
			Deletion    string            `json:"deletionTimestamp"`
			Annotations map[string]string `json:"annotations"`
		} `json:"metadata"`
		Status struct {
			Phase string `json:"phase"`
		} `json:"status"`
	}
	n := podNote{Name: o.Namespace + "/" + o.Name}
	// A body whose status no kubelet can read is a pod all the same.
	_ = json.Unmarshal(o.Body, &p)
	if _, mirror := p.Metadata.Annotations[mirrorAnnotation]; mirror {
		return n, false
	}
	n.Deleted = p.Metadata.Deletion != ""
	if p.Status.Phase == "Succeeded" || p.Status.Phase == "Failed" {
		n.Phase = p.Status.Phase
	}
	return n, true
}

// podsOf returns the set of a table's pods.
func podsOf(t *table) podSet {
	out := podSet{}
	for _, o := range t.objectsOrNil() {
		if n, ok := noteOf(o); ok {
			out[o.UID] = n
		}
	}
	return out
}

// podsAfter returns the set as it is once b is committed, nil if b leaves it as
// it is.
func (s *Store) podsAfter(b *layer) podSet {
	var next podSet
	change := func() podSet {
		if next == nil {
			next = maps.Clone(s.pods)
		}
		return next
	}
	for k, o := range b.objects {
		if k.Resource != "pods" {
			continue
		}
		if old := s.stored(k); old != nil && (o == nil || o.UID != old.UID) {
			if _, known := s.pods[old.UID]; known {
				delete(change(), old.UID)
			}
		}
		if o == nil {
			continue
		}
		n, ok := noteOf(o)
		if have, known := s.pods[o.UID]; ok && (!known || have != n) {
			change()[o.UID] = n
		}
	}
	return next
}

// without returns p less what is not in old: what can be said before the commit
// that takes old to p.
func (p podSet) without(old podSet) podSet {
	out := podSet{}
	for uid, n := range p {
		if _, had := old[uid]; had {
			out[uid] = n
		}
	}
	return out
}

// maxNames bounds the names in an error.
const maxNames = 8

func (p podSet) names() string {
	names := make([]string, 0, len(p))
	for _, n := range p {
		names = append(names, n.Name)
	}
	slices.Sort(names)
	if more := len(names) - maxNames; more > 0 {
		names = append(names[:maxNames], fmt.Sprintf("and %d more", more))
	}
	return strings.Join(names, ", ")
}

func ledgerPath(path string) string { return path + ".pods" }

// openLedger returns the ledger at path, and what it says: nil when there is
// none, or none that can be read (then bad is the reason).
func openLedger(path string) (l *ledger, said *ledgerPage, bad, err error) {
	l = &ledger{path: ledgerPath(path)}
	f, err := os.OpenFile(l.path, os.O_RDWR, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		return l, nil, nil, nil
	}
	if err != nil {
		return nil, nil, nil, fmt.Errorf("store %s: its ledger of pods: %w", path, err)
	}
	raw, err := io.ReadAll(io.LimitReader(f, maxLedger))
	if err != nil {
		f.Close()
		return nil, nil, nil, fmt.Errorf("store %s: its ledger of pods: %w", path, err)
	}
	l.f, l.slot = f, int64(len(raw)/2)
	for i := range int64(2) {
		page, err := decodeLedger(raw[i*l.slot : (i+1)*l.slot])
		if err != nil {
			bad = err
			continue
		}
		if said == nil || page.N > said.N {
			said = &page
		}
	}
	if said != nil {
		l.on, bad = *said, nil
	}
	return l, said, bad, nil
}

func decodeLedger(slot []byte) (ledgerPage, error) {
	var p ledgerPage
	if len(slot) < ledgerHead || string(slot[:4]) != ledgerMagic {
		return p, errors.New("no ledger is in this slot")
	}
	n := binary.BigEndian.Uint32(slot[4:])
	body := slot[ledgerHead:]
	if uint64(n) > uint64(len(body)) {
		return p, fmt.Errorf("ledger of %d bytes runs past its slot", n)
	}
	body = body[:n]
	if crc32.Checksum(body, castagnoli) != binary.BigEndian.Uint32(slot[8:]) {
		return p, errors.New("checksum of the ledger does not match")
	}
	if err := json.Unmarshal(body, &p); err != nil {
		return p, fmt.Errorf("ledger: %w", err)
	}
	return p, nil
}

func encodeLedger(p ledgerPage) ([]byte, error) {
	body, err := json.Marshal(p)
	if err != nil {
		return nil, err
	}
	out := make([]byte, ledgerHead, ledgerHead+len(body))
	copy(out, ledgerMagic)
	binary.BigEndian.PutUint32(out[4:], uint32(len(body)))
	binary.BigEndian.PutUint32(out[8:], crc32.Checksum(body, castagnoli))
	return append(out, body...), nil
}

// says tells whether the file says pods are what there is.
func (l *ledger) says(m metaRecord, pods podSet) bool {
	return l.f != nil && l.on.StoreID == m.StoreID && l.on.Epoch == m.Epoch && maps.Equal(l.on.Pods, pods)
}

// write brings a new page to disk.
func (l *ledger) write(m metaRecord, pods podSet) error {
	page := ledgerPage{N: l.on.N + 1, StoreID: m.StoreID, Seq: m.Seq, RV: m.RV, Epoch: m.Epoch, Pods: pods}
	raw, err := encodeLedger(page)
	if err != nil {
		return err
	}
	l.lastWrite = uint64(roundUp(int64(len(raw))))
	if l.f == nil || int64(len(raw)) > l.slot {
		err = l.make(raw)
	} else {
		at := int64(page.N%2) * l.slot
		if _, err = l.f.WriteAt(raw, at); err == nil {
			err = syscall.Fdatasync(int(l.f.Fd()))
		}
	}
	if err != nil {
		return fmt.Errorf("ledger of pods %s: %w", l.path, err)
	}
	l.on = page
	return nil
}

// make replaces the file by one whose slots have room for raw twice over.
func (l *ledger) make(raw []byte) error {
	slot := roundUp(2 * int64(len(raw)))
	all := make([]byte, 2*slot)
	copy(all[int64((l.on.N+1)%2)*slot:], raw)
	if err := writeFileSync(l.path, all); err != nil {
		return err
	}
	f, err := os.OpenFile(l.path, os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	l.lastWrite = uint64(len(all))
	l.close()
	l.f, l.slot = f, slot
	return nil
}

func (l *ledger) close() {
	if l.f != nil {
		l.f.Close()
		l.f = nil
	}
}

func roundUp(n int64) int64 { return (n + ledgerBlock - 1) / ledgerBlock * ledgerBlock }
