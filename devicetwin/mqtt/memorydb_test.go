package mqtt

import (
	"maps"
	"slices"
	"sync"
)

// memoryDB is a RetainedDB that writes at once.
type memoryDB struct {
	mu      sync.Mutex
	records map[string][]byte
}

func newMemoryDB() *memoryDB { return &memoryDB{records: map[string][]byte{}} }

func (d *memoryDB) Load(bucket string, fn func(key string, value []byte) error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, key := range slices.Sorted(maps.Keys(d.records)) {
		name, ok := cutBucket(key, bucket)
		if !ok {
			continue
		}
		if err := fn(name, d.records[key]); err != nil {
			return err
		}
	}
	return nil
}

func cutBucket(key, bucket string) (string, bool) {
	if len(key) > len(bucket) && key[:len(bucket)+1] == bucket+"\x00" {
		return key[len(bucket)+1:], true
	}
	return "", false
}

func (d *memoryDB) Dirty(bucket, key string, encode func() []byte) {
	value := encode()
	d.mu.Lock()
	defer d.mu.Unlock()
	if value == nil {
		delete(d.records, bucket+"\x00"+key)
		return
	}
	d.records[bucket+"\x00"+key] = value
}
