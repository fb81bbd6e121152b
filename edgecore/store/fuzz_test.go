package store

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"hash/crc32"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"testing"
)

func FuzzDecodeObject(f *testing.F) {
	s, err := newSealer(make([]byte, 32))
	if err != nil {
		f.Fatal(err)
	}
	for _, o := range []*Object{
		{Key: podKey("a"), UID: "u", RV: 7, Rev: "9", Body: []byte(`{"a":1}`)},
		{Key: Key{"secrets", "d", "s"}, UID: "u", RV: 1 << 40, Body: []byte(`{}`)},
	} {
		rec, err := s.encodeObject(bucketObjects, o, false)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(o.Key.encode(), rec[5:])
	}
	f.Fuzz(func(t *testing.T, key, payload []byte) {
		// With a checksum that fits, or the decoder would never be reached.
		o, untold, err := s.decodeObject(bucketObjects, key, frame(bucketObjects, key, payload))
		if err != nil {
			return
		}
		rec, err := s.encodeObject(bucketObjects, o, untold)
		if err != nil {
			t.Fatal(err)
		}
		again, still, err := s.decodeObject(bucketObjects, key, rec)
		if err != nil || still != untold || !reflect.DeepEqual(o, again) {
			t.Fatalf("round trip: %+v, %+v, %v", o, again, err)
		}
		if !bytes.Equal(o.Key.encode(), key) {
			t.Fatalf("key %q became %q", key, o.Key.encode())
		}
	})
}

func FuzzDecodeOutbox(f *testing.F) {
	rec, err := encodeOutbox(&entry{entryID: entryID{podKey("a"), "u", OpStatus}, id: 3, labels: []string{"l"}, last: []byte(`{}`)})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(binary.BigEndian.AppendUint64(nil, 3), rec[5:])
	f.Fuzz(func(t *testing.T, key, payload []byte) {
		e, err := decodeOutbox(key, frame(bucketOutbox, key, payload))
		if err != nil {
			return
		}
		if _, err := encodeOutbox(e); err != nil {
			t.Fatal(err)
		}
	})
}

func FuzzDecodeEvent(f *testing.F) {
	rec, err := encodeEvent(filedEvent{id: 3, key: Key{"events", "d", "e"}, uid: "u", rv: 4, body: []byte(`{}`)})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(idKey(3), rec[5:])
	f.Fuzz(func(t *testing.T, key, payload []byte) {
		e, err := decodeEvent(key, frame(bucketEvents, key, payload))
		if err != nil {
			return
		}
		if _, err := encodeEvent(e); err != nil {
			t.Fatal(err)
		}
	})
}

func FuzzDecodeLedger(f *testing.F) {
	raw, err := encodeLedger(ledgerPage{N: 1, StoreID: "s", Pods: podSet{"u": {Name: "d/a", Phase: "Failed"}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw[ledgerHead:])
	f.Fuzz(func(t *testing.T, body []byte) {
		slot := append([]byte(ledgerMagic), binary.BigEndian.AppendUint32(nil, uint32(len(body)))...)
		slot = binary.BigEndian.AppendUint32(slot, crc32.Checksum(body, castagnoli))
		p, err := decodeLedger(append(slot, body...))
		if err != nil {
			return
		}
		again, err := encodeLedger(p)
		if err != nil {
			t.Fatal(err)
		}
		if q, err := decodeLedger(again); err != nil || !maps.Equal(p.Pods, q.Pods) || p.Seq != q.Seq {
			t.Fatalf("round trip: %+v %+v %v", p, q, err)
		}
	})
}

// Whatever is in a damaged file, what is salvaged from it was once written.
func FuzzSalvage(f *testing.F) {
	cfg := filled(f)
	whole, err := os.ReadFile(cfg.Path)
	if err != nil {
		f.Fatal(err)
	}
	cfg.KeyFile = cfg.Path + ".key"
	sealer, err := openKey(cfg)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(uint32(8192), []byte{1, 2, 3})
	f.Add(uint32(4096+16), []byte{0xff})
	f.Fuzz(func(t *testing.T, at uint32, with []byte) {
		bad := append([]byte(nil), whole...)
		copy(bad[int(at)%len(bad):], with)
		p := filepath.Join(t.TempDir(), "x")
		if err := os.WriteFile(p, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		v := newSalvage(sealer, "")
		v.file(p)
		for uid, f := range v.pods {
			if uid != "u"+f.o.Name {
				t.Fatalf("a pod that never was: %+v", f.o)
			}
		}
	})
}

func FuzzPreflight(f *testing.F) {
	cfg := filled(f)
	whole, err := os.ReadFile(cfg.Path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(uint32(8192), []byte{1, 2, 3})
	f.Add(uint32(4096+16), []byte{0xff})
	f.Fuzz(func(t *testing.T, at uint32, with []byte) {
		bad := append([]byte(nil), whole...)
		copy(bad[int(at)%len(bad):], with)
		p := filepath.Join(t.TempDir(), "x")
		if err := os.WriteFile(p, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		_ = preflight(p) // any answer, but an answer
	})
}

func FuzzUpsertBody(f *testing.F) {
	f.Add([]byte(`{"metadata":{"name":"a","labels":{"x":"y"}},"status":{"conditions":[{"type":"Ready"}]}}`))
	f.Add([]byte(`{"metadata":null,"status":[]}`))
	f.Add([]byte(`{"metadata":{"deletionTimestamp":1},"spec":{"terminationGracePeriodSeconds":"x"}}`))
	cfg := testConfig(f)
	s := mustOpen(f, cfg)
	f.Fuzz(func(t *testing.T, body []byte) {
		for _, u := range []Upsert{
			{podKey("a"), "u1", "1", body}, {podKey("a"), "u1", "2", body}, {podKey("a"), "u2", "1", body},
			{Key{"nodes", "", "a"}, "u1", "1", body}, {Key{"nodes", "", "a"}, "u2", "1", body},
		} {
			err := s.Local(t.Context(), func(tx *Tx) error {
				if err := tx.applyUpsert(u); err != nil {
					return err
				}
				return nil
			})
			if err != nil {
				return
			}
			if o, ok := s.Get(u.Key); !ok || !json.Valid(o.Body) {
				t.Fatalf("stored: %s", o.Body)
			}
		}
	})
}
