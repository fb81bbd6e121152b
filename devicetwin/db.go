package devicetwin

import "context"

// DB is where twins outlive the power; twindb.DB is one.
type DB interface {
	// Incarnation and Epoch order what this node says, see v1alpha1.Version.
	Incarnation() string
	Epoch() uint64
	// Load calls fn with the records of a bucket in the order of their keys.
	Load(bucket string, fn func(key string, value []byte) error) error
	// Commit returns once muts, all or none, are on the disk.
	Commit(ctx context.Context, muts ...Mut) error
	// Dirty notes that a record has changed. encode is called when it is next
	// written, on another goroutine, perhaps while a Commit is waited for: the
	// caller of Commit must not hold what encode needs. nil removes the record.
	// Dirty does not block.
	Dirty(bucket, key string, encode func() []byte)
}

// Mut puts one record; a nil Value removes it.
type Mut struct {
	Bucket, Key string
	Value       []byte
}
