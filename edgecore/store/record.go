package store

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"strings"

	bolt "go.etcd.io/bbolt"
)

// The database file, format 1. Six buckets at the root:
//
//	meta     "state" -> frame(JSON metaRecord), "keycheck" -> sealed constant
//	objects  resource 0x00 namespace 0x00 name -> frame(object payload)
//	parked   likewise: namesakes that wait for the old pod to go
//	outbox   8 bytes big endian id -> frame(JSON outboxRecord)
//	events   8 bytes big endian outbox id -> frame(JSON eventRecord)
//	private  kind 0x00 key -> frame(private payload)
//
// frame is: 1 byte version (1), 4 bytes big endian CRC-32C over the bucket's
// name, the key and the payload, then the payload. bbolt has no checksum on its
// data pages; this is what notices a flipped bit on worn flash.
//
// object payload:  uvarint rv, uvarint length + uid, uvarint length + rev,
// 1 byte of flags (1: sealed, 2: its status has to be told to the cloud), body
// or nonce + AES-256-GCM(body).
// private payload: uvarint length + owner, nonce + AES-256-GCM(value).
const recordVersion = 1

const (
	flagSealed = 1 << iota
	flagUntold
)

var (
	bucketMeta    = []byte("meta")
	bucketObjects = []byte("objects")
	bucketParked  = []byte("parked")
	bucketOutbox  = []byte("outbox")
	bucketEvents  = []byte("events")
	bucketPrivate = []byte("private")

	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

func allBuckets() [][]byte {
	return [][]byte{bucketMeta, bucketObjects, bucketParked, bucketOutbox, bucketEvents, bucketPrivate}
}

func sum(bucket, key, payload []byte) uint32 {
	c := crc32.Update(0, castagnoli, bucket)
	c = crc32.Update(c, castagnoli, key)
	return crc32.Update(c, castagnoli, payload)
}

func frame(bucket, key, payload []byte) []byte {
	out := make([]byte, 5, 5+len(payload))
	out[0] = recordVersion
	binary.BigEndian.PutUint32(out[1:], sum(bucket, key, payload))
	return append(out, payload...)
}

func unframe(bucket, key, rec []byte) ([]byte, error) {
	if len(rec) < 5 {
		return nil, fmt.Errorf("record of %d bytes is too short", len(rec))
	}
	if rec[0] != recordVersion {
		return nil, fmt.Errorf("record version %d is unknown", rec[0])
	}
	payload := rec[5:]
	if binary.BigEndian.Uint32(rec[1:]) != sum(bucket, key, payload) {
		return nil, errors.New("checksum does not match")
	}
	return payload, nil
}

func (k Key) encode() []byte {
	return []byte(k.Resource + "\x00" + k.Namespace + "\x00" + k.Name)
}

func decodeKey(b []byte) (Key, error) {
	parts := strings.Split(string(b), "\x00")
	if len(parts) != 3 {
		return Key{}, fmt.Errorf("key %q has %d parts", b, len(parts))
	}
	k := Key{parts[0], parts[1], parts[2]}
	return k, k.check()
}

func (k Key) check() error {
	if k.Resource == "" || k.Name == "" {
		return fmt.Errorf("key %q lacks resource or name", k)
	}
	for _, s := range []string{k.Resource, k.Namespace, k.Name} {
		if len(s) > 512 || strings.ContainsAny(s, "\x00/") {
			return fmt.Errorf("key %q is not an object's name", k)
		}
	}
	if kind, ok := KindOf(k.Resource); ok && kind.Namespaced != (k.Namespace != "") {
		return fmt.Errorf("key %q: namespaced is %t for this resource", k, kind.Namespaced)
	}
	return nil
}

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func takeString(b []byte) (string, []byte, error) {
	n, w := binary.Uvarint(b)
	if w <= 0 || n > uint64(len(b)-w) {
		return "", nil, errors.New("string runs past the record")
	}
	return string(b[w : w+int(n)]), b[w+int(n):], nil
}

func (s *sealer) encodeObject(bucket []byte, o *Object, untold bool) ([]byte, error) {
	key := o.Key.encode()
	p := binary.AppendUvarint(nil, o.RV)
	p = appendString(p, o.UID)
	p = appendString(p, o.Rev)
	flags, body := byte(0), o.Body
	if untold {
		flags |= flagUntold
	}
	if sealed(o.Resource) {
		flags |= flagSealed
		var err error
		if body, err = s.seal(string(bucket), key, o.Body); err != nil {
			return nil, err
		}
	}
	p = append(p, flags)
	return frame(bucket, key, append(p, body...)), nil
}

// decodeObject copies what it keeps: rec lies in the database's mapping.
func (s *sealer) decodeObject(bucket, key, rec []byte) (o *Object, untold bool, err error) {
	k, err := decodeKey(key)
	if err != nil {
		return nil, false, err
	}
	p, err := unframe(bucket, key, rec)
	if err != nil {
		return nil, false, fmt.Errorf("%s: %w", k, err)
	}
	o = &Object{Key: k}
	rv, w := binary.Uvarint(p)
	if w <= 0 {
		return nil, false, fmt.Errorf("%s: resourceVersion is cut off", k)
	}
	o.RV, p = rv, p[w:]
	if o.UID, p, err = takeString(p); err != nil {
		return nil, false, fmt.Errorf("%s: uid: %w", k, err)
	}
	if o.Rev, p, err = takeString(p); err != nil {
		return nil, false, fmt.Errorf("%s: rev: %w", k, err)
	}
	if len(p) == 0 || p[0] > flagSealed|flagUntold {
		return nil, false, fmt.Errorf("%s: body's form is unknown", k)
	}
	untold = p[0]&flagUntold != 0
	encrypted := p[0]&flagSealed != 0
	if encrypted != sealed(k.Resource) {
		return nil, false, fmt.Errorf("%s: encrypted is %t, expected the opposite", k, encrypted)
	}
	if encrypted {
		if o.Body, err = s.open(string(bucket), key, p[1:]); err != nil {
			return nil, false, fmt.Errorf("%s: %w", k, err)
		}
	} else {
		o.Body = append([]byte(nil), p[1:]...)
	}
	if !json.Valid(o.Body) {
		return nil, false, fmt.Errorf("%s: body is not JSON", k)
	}
	return o, untold, nil
}

func privateDBKey(k privateKey) []byte { return []byte(k.kind + "\x00" + k.key) }

func (s *sealer) encodePrivate(k privateKey, v *privateValue) ([]byte, error) {
	key := privateDBKey(k)
	ct, err := s.seal(string(bucketPrivate), key, v.value)
	if err != nil {
		return nil, err
	}
	return frame(bucketPrivate, key, append(appendString(nil, v.owner), ct...)), nil
}

func (s *sealer) decodePrivate(key, rec []byte) (privateKey, *privateValue, error) {
	kind, name, ok := strings.Cut(string(key), "\x00")
	if !ok || kind == "" {
		return privateKey{}, nil, fmt.Errorf("private key %q is malformed", key)
	}
	k := privateKey{kind, name}
	p, err := unframe(bucketPrivate, key, rec)
	if err != nil {
		return k, nil, fmt.Errorf("private %s: %w", kind, err)
	}
	v := &privateValue{}
	if v.owner, p, err = takeString(p); err != nil {
		return k, nil, fmt.Errorf("private %s: owner: %w", kind, err)
	}
	if v.value, err = s.open(string(bucketPrivate), key, p); err != nil {
		return k, nil, fmt.Errorf("private %s: %w", kind, err)
	}
	return k, v, nil
}

// outboxRecord is an outbox entry on disk.
type outboxRecord struct {
	Op          Op              `json:"op"`
	Resource    string          `json:"resource"`
	Namespace   string          `json:"namespace,omitempty"`
	Name        string          `json:"name"`
	UID         string          `json:"uid,omitempty"`
	Labels      []string        `json:"labels,omitempty"`
	Annotations []string        `json:"annotations,omitempty"`
	Last        json.RawMessage `json:"last,omitempty"` // the object's last state, when it is gone
}

// idKey is the key of what is kept by outbox id.
func idKey(id uint64) []byte { return binary.BigEndian.AppendUint64(nil, id) }

func decodeID(key []byte) (uint64, error) {
	if len(key) != 8 {
		return 0, fmt.Errorf("outbox key has %d bytes", len(key))
	}
	return binary.BigEndian.Uint64(key), nil
}

func encodeOutbox(e *entry) ([]byte, error) {
	p, err := json.Marshal(outboxRecord{
		Op: e.op, Resource: e.key.Resource, Namespace: e.key.Namespace, Name: e.key.Name, UID: e.uid,
		Labels: e.labels, Annotations: e.annotations, Last: e.last,
	})
	if err != nil {
		return nil, err
	}
	return frame(bucketOutbox, idKey(e.id), p), nil
}

func decodeOutbox(key, rec []byte) (*entry, error) {
	id, err := decodeID(key)
	if err != nil {
		return nil, err
	}
	p, err := unframe(bucketOutbox, key, rec)
	if err != nil {
		return nil, fmt.Errorf("outbox entry %d: %w", id, err)
	}
	var r outboxRecord
	if err := json.Unmarshal(p, &r); err != nil {
		return nil, fmt.Errorf("outbox entry %d: %w", id, err)
	}
	switch r.Op {
	case OpCreate, OpStatus, OpUpdate, OpDelete:
	default:
		return nil, fmt.Errorf("outbox entry %d: op %q is unknown", id, r.Op)
	}
	e := &entry{id: id, entryID: entryID{Key{r.Resource, r.Namespace, r.Name}, r.UID, r.Op}, labels: r.Labels, annotations: r.Annotations, last: r.Last, everSent: true}
	return e, e.key.check()
}

// metaRecord is written with every commit.
type metaRecord struct {
	Format  int    `json:"format"`
	StoreID string `json:"storeID"`
	Seq     uint64 `json:"seq"`     // commits so far
	Content uint64 `json:"content"` // Seq of the last that changed what is there, see copier
	RV      uint64 `json:"rv"`      // resourceVersions below are used up, in memory too
	Outbox  uint64 `json:"outbox"`  // the highest outbox id used
	Epoch   string `json:"epoch,omitempty"`
	Counts  counts `json:"counts"`
	Dropped drops  `json:"dropped,omitzero"`
}

// counts lets Open notice records that vanished.
type counts struct {
	Objects int `json:"objects"`
	Parked  int `json:"parked"`
	Outbox  int `json:"outbox"`
	Events  int `json:"events"`
	Private int `json:"private"`
}

func putMeta(b *bolt.Bucket, m metaRecord) error {
	p, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return b.Put(stateKey, frame(bucketMeta, stateKey, p))
}

func decodeMeta(rec []byte) (metaRecord, error) {
	var m metaRecord
	p, err := unframe(bucketMeta, stateKey, rec)
	if err == nil {
		err = json.Unmarshal(p, &m)
	}
	if err != nil {
		return m, fmt.Errorf("meta record: %w", err)
	}
	if m.Format != format {
		return m, fmt.Errorf("format %d is not this program's (%d)", m.Format, format)
	}
	return m, nil
}

var stateKey = []byte("state")
