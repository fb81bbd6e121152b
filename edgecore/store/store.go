package store

import (
	"context"
	"errors"
	"log/slog"
	"time"
)

// Config says where the store lives.
type Config struct {
	Path        string        // the bbolt file; required
	KeyFile     string        // AES-256 key for secrets and tokens; zero means Path + ".key"
	History     int           // events kept per resource for watches; zero means 256
	MaxEvents   int           // Event objects kept in memory; zero means 512
	LockTimeout time.Duration // wait for another process to let go; zero means 2s
	Log         *slog.Logger  // nil discards
}

var errUnbuilt = errors.New("store: not in this build yet")

type Store struct{}

func Open(cfg Config) (*Store, error)                               { return nil, errUnbuilt }
func (s *Store) Close() error                                       { return errUnbuilt }
func (s *Store) Synced() bool                                       { return false }
func (s *Store) SyncEpoch() string                                  { return "" }
func (s *Store) SetSynced(ctx context.Context, epoch string) error  { return errUnbuilt }
func (s *Store) Get(k Key) (Object, bool)                           { return Object{}, false }
func (s *Store) List(resource, namespace string) ([]Object, uint64) { return nil, 0 }
func (s *Store) RV() uint64                                         { return 0 }
func (s *Store) Watch(ctx context.Context, resource string, fromRV uint64) (*Watch, error) {
	return nil, errUnbuilt
}
func (s *Store) Local(ctx context.Context, fn func(tx *Tx) error) error { return errUnbuilt }
func (s *Store) ApplyDelta(ctx context.Context, d Delta) error          { return errUnbuilt }
func (s *Store) Inventory() []InventoryItem                             { return nil }
func (s *Store) Outbox() *Outbox                                        { return nil }
func (s *Store) BytesWritten() uint64                                   { return 0 }

// Watch is a position in one resource's history; it holds no buffer.
type Watch struct{}

// Next returns what happened since the last call and the store-wide
// resourceVersion up to which the watch is now complete. It waits for at most
// idle (zero: without limit) and then returns no events.
func (w *Watch) Next(ctx context.Context, idle time.Duration) ([]Event, uint64, error) {
	return nil, 0, errUnbuilt
}

// Tx is one local write.
type Tx struct{}

func (tx *Tx) Get(k Key) (Object, bool)                           { return Object{}, false }
func (tx *Tx) Put(k Key, uid string, body []byte) (Object, error) { return Object{}, errUnbuilt }
func (tx *Tx) Delete(k Key) (Object, error)                       { return Object{}, errUnbuilt }
func (tx *Tx) MarkDirty(m Mark)                                   {}

// Op is what the hub has to do for an outbox entry.
type Op string

const (
	OpCreate Op = "create"
	OpStatus Op = "status"
	OpUpdate Op = "update"
	OpDelete Op = "delete"
	OpEvent  Op = "event"
)

// Mark notes that the cloud has to hear of a change.
type Mark struct {
	Op          Op
	Key         Key
	UID         string
	Labels      []string // OpUpdate: label keys changed or removed here
	Annotations []string // OpUpdate: likewise
}

// Pending is one outbox entry, as Next hands it out.
type Pending struct {
	ID          uint64
	Op          Op
	Key         Key
	UID         string
	Attempt     int      // 0 at the first try
	Body        []byte   // the object as it is now (or was last, when gone); nil for a delete
	Labels      []string // OpUpdate: label keys to set from Body, or remove when absent there
	Annotations []string
}

// Outbox is what the node has to tell the cloud, in order.
type Outbox struct{}

func (o *Outbox) Next(ctx context.Context) ([]Pending, error) { return nil, errUnbuilt }
func (o *Outbox) Done(ids ...uint64)                          {}
func (o *Outbox) Retry(ids ...uint64)                         {}
func (o *Outbox) Release()                                    {}
func (o *Outbox) Depth() int                                  { return 0 }
func (o *Outbox) Dropped() uint64                             { return 0 }

// Reset removes a store: the database, its marker and its key.
func Reset(path, keyFile string) error { return errUnbuilt }
