package store

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"strings"
)

// The database file, format 1. Four buckets at the root:
//
//	meta     "state" -> frame(JSON metaRecord), "keycheck" -> sealed constant
//	objects  resource 0x00 namespace 0x00 name -> frame(object payload)
//	parked   likewise: namesakes that wait for the old pod to go
//	outbox   8 bytes big endian id -> frame(JSON outboxRecord)
//	private  kind 0x00 key -> frame(private payload)
//
// frame is: 1 byte version (1), 4 bytes big endian CRC-32C over the bucket's
// name, the key and the payload, then the payload. bbolt has no checksum on its
// data pages; this is what notices a flipped bit on worn flash.
//
// object payload:  uvarint rv, uvarint length + uid, uvarint length + rev,
// 1 byte (1: sealed), body or nonce + AES-256-GCM(body).
// private payload: uvarint length + owner, nonce + AES-256-GCM(value).
const recordVersion = 1

var (
	bucketMeta    = []byte("meta")
	bucketObjects = []byte("objects")
	bucketParked  = []byte("parked")
	bucketOutbox  = []byte("outbox")
	bucketPrivate = []byte("private")

	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

func allBuckets() [][]byte {
	return [][]byte{bucketMeta, bucketObjects, bucketParked, bucketOutbox, bucketPrivate}
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

func (s *sealer) encodeObject(bucket []byte, o *Object) ([]byte, error) {
	key := o.Key.encode()
	p := binary.AppendUvarint(nil, o.RV)
	p = appendString(p, o.UID)
	p = appendString(p, o.Rev)
	if !sealed(o.Resource) {
		p = append(p, 0)
		p = append(p, o.Body...)
		return frame(bucket, key, p), nil
	}
	ct, err := s.seal(string(bucket), key, o.Body)
	if err != nil {
		return nil, err
	}
	p = append(p, 1)
	return frame(bucket, key, append(p, ct...)), nil
}

// decodeObject copies what it keeps: rec lies in the database's mapping.
func (s *sealer) decodeObject(bucket, key, rec []byte) (*Object, error) {
	k, err := decodeKey(key)
	if err != nil {
		return nil, err
	}
	p, err := unframe(bucket, key, rec)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", k, err)
	}
	o := &Object{Key: k}
	rv, w := binary.Uvarint(p)
	if w <= 0 {
		return nil, fmt.Errorf("%s: resourceVersion is cut off", k)
	}
	o.RV, p = rv, p[w:]
	if o.UID, p, err = takeString(p); err != nil {
		return nil, fmt.Errorf("%s: uid: %w", k, err)
	}
	if o.Rev, p, err = takeString(p); err != nil {
		return nil, fmt.Errorf("%s: rev: %w", k, err)
	}
	if len(p) == 0 || p[0] > 1 {
		return nil, fmt.Errorf("%s: body's form is unknown", k)
	}
	if (p[0] == 1) != sealed(k.Resource) {
		return nil, fmt.Errorf("%s: encrypted is %t, expected the opposite", k, p[0] == 1)
	}
	if p[0] == 1 {
		if o.Body, err = s.open(string(bucket), key, p[1:]); err != nil {
			return nil, fmt.Errorf("%s: %w", k, err)
		}
	} else {
		o.Body = append([]byte(nil), p[1:]...)
	}
	if !json.Valid(o.Body) {
		return nil, fmt.Errorf("%s: body is not JSON", k)
	}
	return o, nil
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

func outboxDBKey(id uint64) []byte { return binary.BigEndian.AppendUint64(nil, id) }

func encodeOutbox(e *entry) ([]byte, error) {
	p, err := json.Marshal(outboxRecord{
		Op: e.op, Resource: e.key.Resource, Namespace: e.key.Namespace, Name: e.key.Name, UID: e.uid,
		Labels: e.labels, Annotations: e.annotations, Last: e.last,
	})
	if err != nil {
		return nil, err
	}
	return frame(bucketOutbox, outboxDBKey(e.id), p), nil
}

func decodeOutbox(key, rec []byte) (*entry, error) {
	if len(key) != 8 {
		return nil, fmt.Errorf("outbox key has %d bytes", len(key))
	}
	id := binary.BigEndian.Uint64(key)
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
	e := &entry{id: id, entryID: entryID{Key{r.Resource, r.Namespace, r.Name}, r.UID, r.Op}, labels: r.Labels, annotations: r.Annotations, last: r.Last}
	return e, e.key.check()
}

// metaRecord is written with every commit.
type metaRecord struct {
	Format  int    `json:"format"`
	StoreID string `json:"storeID"`
	RV      uint64 `json:"rv"`     // resourceVersions below are used up, in memory too
	Outbox  uint64 `json:"outbox"` // the highest outbox id used
	Epoch   string `json:"epoch,omitempty"`
	Counts  counts `json:"counts"`
}

// counts lets Open notice records that vanished.
type counts struct {
	Objects int `json:"objects"`
	Parked  int `json:"parked"`
	Outbox  int `json:"outbox"`
	Private int `json:"private"`
}
