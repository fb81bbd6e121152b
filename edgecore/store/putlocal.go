package store

import "fmt"

// PutLocal stores body under k as an object that the cloud does not know (any
// more), whatever it knew before: it leaves the inventory, and what the cloud
// then delivers under its name takes its place.
func (tx *Tx) PutLocal(k Key, uid string, body []byte) (Object, error) {
	d, err := parseDoc(body)
	if err != nil {
		return Object{}, fmt.Errorf("store %s: %w", k, err)
	}
	o, err := tx.put(k, uid, "", d)
	if err != nil {
		return Object{}, err
	}
	return *o, nil
}
