package store

import (
	"context"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	bolt "go.etcd.io/bbolt"
)

// Config says where the store lives.
type Config struct {
	Path        string        // the bbolt file; required
	KeyFile     string        // AES-256 key for secrets and tokens; zero means Path + ".key"
	History     int           // events kept per resource for watches; zero means 256
	MaxEvents   int           // Event objects kept in memory, and waiting for the cloud; zero means 512
	FlushAfter  time.Duration // how long what may wait does, see Tx.Soon; zero means 10m
	BytesPerDay uint64        // bytes to the disk in 24 h beyond which what may wait does so 6 times longer; zero means no limit
	LockTimeout time.Duration // wait for another process to let go; zero means 2s
	Log         *slog.Logger  // nil discards
}

// Store is the node's copy of its objects.
//
// One goroutine, the committer, makes every change: it reads the maps without
// mu and holds mu to change them, so what a write reads cannot move under it.
type Store struct {
	cfg     Config
	sealer  *sealer
	db      *bolt.DB
	lock    *os.File
	startRV uint64

	writes    chan *write
	closing   chan struct{}
	stopped   chan struct{}
	closeOnce sync.Once
	closeErr  error

	wear wear

	healer *time.Timer // runs while broken
	mended *Mended

	// owned by the committer
	ledger    *ledger
	pods      podSet // of the last commit
	soon      soon
	filed     filed
	file      os.FileInfo // of db
	broken    error       // why nothing may be built on the file as it is
	healAt    time.Time
	healWait  time.Duration
	reserveAt time.Time

	mu          sync.RWMutex // guards the rest; outbox has no lock of its own
	meta        metaRecord   // of the last commit
	trouble     *Trouble
	rv          uint64
	tables      map[string]*table
	parked      map[Key]*Object
	private     map[privateKey]*privateValue
	epoch       string
	syncChanged chan struct{} // closed when epoch changes
	gone        graveyard
	outbox      Outbox
}

// table is one resource.
type table struct {
	objects map[Key]*Object
	ring    []Event // oldest first, RVs ascending
	floor   uint64  // every event after this RV is in ring
	limit   int     // events ring may hold, see record
	changed chan struct{}
}

type privateKey struct{ kind, key string }

type privateValue struct {
	owner string
	value []byte
}

func newStore(cfg Config, sealer *sealer) *Store {
	s := &Store{
		cfg: cfg, sealer: sealer,
		writes:  make(chan *write, maxBatch),
		closing: make(chan struct{}), stopped: make(chan struct{}),
		tables: map[string]*table{}, parked: map[Key]*Object{}, private: map[privateKey]*privateValue{},
		syncChanged: make(chan struct{}),
		healer:      time.NewTimer(time.Hour),
		pods:        podSet{},
		soon:        newSoon(),
		filed:       filed{},
		wear:        wear{start: time.Now()},
		gone:        graveyard{uids: map[string]struct{}{}},
	}
	s.healer.Stop()
	s.outbox.init(s)
	return s
}

func (s *Store) start() {
	var g sync.WaitGroup
	g.Go(s.commitLoop)
	g.Go(s.copyLoop)
	go func() {
		g.Wait()
		close(s.stopped)
	}()
}

// table is called with mu held for writing, or before start.
func (s *Store) table(resource string) *table {
	t := s.tables[resource]
	if t == nil {
		t = &table{objects: map[Key]*Object{}, floor: s.startRV, changed: make(chan struct{})}
		s.tables[resource] = t
	}
	return t
}

func (s *Store) stored(k Key) *Object {
	if t := s.tables[k.Resource]; t != nil {
		return t.objects[k]
	}
	return nil
}

// Get returns one object.
func (s *Store) Get(k Key) (Object, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if o := s.stored(k); o != nil {
		return *o, true
	}
	return Object{}, false
}

// List returns the objects of a resource, of one namespace or (namespace "") of
// all, in the order of their names, and the resourceVersion they are as of.
func (s *Store) List(resource, namespace string) ([]Object, uint64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	t := s.tables[resource]
	if t == nil {
		return nil, s.rv
	}
	out := make([]Object, 0, len(t.objects))
	for k, o := range t.objects {
		if namespace == "" || k.Namespace == namespace {
			out = append(out, *o)
		}
	}
	slices.SortFunc(out, func(a, b Object) int {
		if c := strings.Compare(a.Namespace, b.Namespace); c != 0 {
			return c
		}
		return strings.Compare(a.Name, b.Name)
	})
	return out, s.rv
}

// RV is the store-wide resourceVersion.
func (s *Store) RV() uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.rv
}

// Synced tells whether a complete first sync was ever committed.
func (s *Store) Synced() bool { return s.SyncEpoch() != "" }

// SyncEpoch is what the last complete sync was called.
func (s *Store) SyncEpoch() string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.epoch
}

// SetSynced notes durably that the store is complete.
func (s *Store) SetSynced(ctx context.Context, epoch string) error {
	return s.ApplyDelta(ctx, Delta{Synced: epoch})
}

// Inventory lists what the cloud delivered. Where a namesake waits for an old
// pod to go, it is listed in the old one's place: the cloud no longer knows that.
func (s *Store) Inventory() []InventoryItem {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var out []InventoryItem
	for _, t := range s.tables {
		for k, o := range t.objects {
			if s.parked[k] == nil && o.Rev != "" {
				out = append(out, InventoryItem{k, o.UID, o.Rev})
			}
		}
	}
	for k, o := range s.parked {
		out = append(out, InventoryItem{k, o.UID, o.Rev})
	}
	slices.SortFunc(out, func(a, b InventoryItem) int { return strings.Compare(a.Key.String(), b.Key.String()) })
	return out
}

// Private returns a value kept with Tx.PutPrivate.
func (s *Store) Private(kind, key string) ([]byte, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	v := s.private[privateKey{kind, key}]
	if v == nil {
		return nil, false
	}
	return slices.Clone(v.value), true
}

// PrivateKeys lists the keys kept under kind.
func (s *Store) PrivateKeys(kind string) []string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var out []string
	for k := range maps.Keys(s.private) {
		if k.kind == kind {
			out = append(out, k.key)
		}
	}
	slices.Sort(out)
	return out
}

// Outbox is what the node still has to tell the cloud.
func (s *Store) Outbox() *Outbox { return &s.outbox }

// graveyard remembers the uids of pods the kubelet finished, so that an update
// the cloud sent before it heard of the end does not bring one back.
type graveyard struct {
	uids  map[string]struct{}
	order []string
}

const maxGraves = 1024

func (g *graveyard) add(uid string) {
	if _, ok := g.uids[uid]; ok || uid == "" {
		return
	}
	if len(g.order) == maxGraves {
		delete(g.uids, g.order[0])
		g.order = g.order[1:]
	}
	g.uids[uid] = struct{}{}
	g.order = append(g.order, uid)
}

func (g *graveyard) has(uid string) bool { _, ok := g.uids[uid]; return ok }
