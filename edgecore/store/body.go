package store

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
)

// maxBody bounds one object. The API server's own limit for a request is 3 MiB.
const maxBody = 4 << 20

// doc is a body opened two levels deep: enough to edit metadata and to exchange
// whole fields without decoding the rest.
type doc struct {
	top  map[string]json.RawMessage
	meta map[string]json.RawMessage
}

func parseDoc(body []byte) (doc, error) {
	if len(body) > maxBody {
		return doc{}, fmt.Errorf("body of %d bytes exceeds %d", len(body), maxBody)
	}
	var d doc
	if err := json.Unmarshal(body, &d.top); err != nil {
		return doc{}, fmt.Errorf("body is not a JSON object: %w", err)
	}
	if d.top == nil {
		return doc{}, fmt.Errorf("body is not a JSON object: null")
	}
	if raw, ok := d.top["metadata"]; ok {
		if err := json.Unmarshal(raw, &d.meta); err != nil {
			return doc{}, fmt.Errorf("metadata is not a JSON object: %w", err)
		}
	}
	if d.meta == nil {
		d.meta = map[string]json.RawMessage{}
	}
	return d, nil
}

func (d doc) encode() ([]byte, error) {
	meta, err := json.Marshal(d.meta)
	if err != nil {
		return nil, err
	}
	d.top["metadata"] = meta
	return json.Marshal(d.top)
}

// object returns the JSON object at a top-level field, or nil when there is
// none or it is empty.
func (d doc) object(field string) (map[string]json.RawMessage, error) {
	return rawObject(d.top, field)
}

func rawObject(m map[string]json.RawMessage, field string) (map[string]json.RawMessage, error) {
	raw, ok := m[field]
	if !ok {
		return nil, nil
	}
	var out map[string]json.RawMessage
	if err := json.Unmarshal(raw, &out); err != nil {
		return nil, fmt.Errorf("%s is not a JSON object: %w", field, err)
	}
	if len(out) == 0 {
		return nil, nil
	}
	return out, nil
}

func metaString(d doc, field string) (string, error) {
	raw, ok := d.meta[field]
	if !ok {
		return "", nil
	}
	var s string
	if err := json.Unmarshal(raw, &s); err != nil {
		return "", fmt.Errorf("metadata.%s is not a string: %w", field, err)
	}
	return s, nil
}

func quoted(s string) json.RawMessage {
	raw, _ := json.Marshal(s) // a string always encodes
	return raw
}

// seal makes d the body of k: names must agree, type and uid are set, and what
// only an API server needs is left out.
func (d doc) seal(k Key, uid string) error {
	for field, want := range map[string]string{"name": k.Name, "namespace": k.Namespace} {
		got, err := metaString(d, field)
		if err != nil {
			return err
		}
		if got != "" && got != want {
			return fmt.Errorf("metadata.%s is %q, the key says %q", field, got, want)
		}
	}
	d.meta["name"] = quoted(k.Name)
	if k.Namespace != "" {
		d.meta["namespace"] = quoted(k.Namespace)
	}
	got, err := metaString(d, "uid")
	if err != nil {
		return err
	}
	if got != "" && got != uid {
		return fmt.Errorf("metadata.uid is %q, expected %q", got, uid)
	}
	if uid != "" {
		d.meta["uid"] = quoted(uid)
	}
	delete(d.meta, "managedFields")
	delete(d.meta, "selfLink")
	if kind, known := KindOf(k.Resource); known {
		d.top["apiVersion"] = quoted(kind.APIVersion)
		d.top["kind"] = quoted(kind.Kind)
		return nil
	}
	for _, field := range []string{"apiVersion", "kind"} {
		var s string
		if err := json.Unmarshal(d.top[field], &s); err != nil || s == "" {
			return fmt.Errorf("%s is missing in a body of the unknown resource %q", field, k.Resource)
		}
	}
	return nil
}

func (d doc) withRV(rv uint64) ([]byte, error) {
	d.meta["resourceVersion"] = quoted(strconv.FormatUint(rv, 10))
	return d.encode()
}

// sameBody tells whether d, given cur's resourceVersion, is what cur holds.
func (d doc) sameBody(cur *Object) bool {
	b, err := d.withRV(cur.RV)
	return err == nil && bytes.Equal(b, cur.Body)
}
