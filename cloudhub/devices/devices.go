package devices

import (
	"container/list"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// Config of Devices. All but Log are required. The informers are the feed's,
// which runs them; their objects are the Go types of the API.
type Config struct {
	Client  kubernetes.Interface // asks who a caller is and what that one may do; patches as that one
	Dynamic dynamic.Interface    // writes statuses, and the Devices of discoveries

	Devices, Models, Discoveries, Routes cache.SharedIndexInformer

	Log *slog.Logger // nil discards
}

// Devices is safe for concurrent use.
type Devices struct {
	cfg    Config
	log    *slog.Logger
	access *access
	limit  *rate.Limiter // of all writes that nobody asked for

	counters

	mu       sync.Mutex
	twins    map[edgeapi.DeviceRef]*twin
	nodes    map[string]*node
	models   map[string]*model // by name, as the informer has them
	status   *scheduler
	found    map[edgeapi.DeviceRef]*discovery
	promote  map[edgeapi.DeviceRef]struct{} // whose overrides may become what the cloud wants
	run      string                         // of this life of the hub; part of what a watch resumes from
	change   uint64                         // number of the latest change
	order    *list.List                     // of *twin, in the order of their latest changes
	gone     []*twin                        // deleted ones still in order, the oldest first
	horizon  uint64                         // deletions up to here are forgotten
	news     chan struct{}
	watchers int
}

type counters struct {
	frames, values, older, refused, restored, commands, patches, slow atomic.Uint64
	writes, urgentWrites, unchanged, failedWrites                     atomic.Uint64
	created, deleted, promoted                                        atomic.Uint64
}

// node is what is known of one node's conversations.
type node struct {
	session *session // nil: it is not there
	since   time.Time
	twins   map[edgeapi.DeviceRef]*twin
	bytes   int  // of live values
	away    bool // for long enough to be told

	// life is what the node's present start says of itself, without a Seq.
	life v1alpha1.Version
}

// quality is what a live value is worth: what an earlier start of the node said
// may have changed while it was down.
func (n *node) quality(r *reading) string {
	if n != nil && r.quality != v1alpha1.QualityBad && r.version.Incarnation == n.life.Incarnation && r.version.Epoch < n.life.Epoch {
		return v1alpha1.QualityStale
	}
	return r.quality
}

// New checks cfg; it starts nothing.
func New(cfg Config) (*Devices, error) {
	if cfg.Client == nil || cfg.Dynamic == nil || cfg.Devices == nil || cfg.Models == nil || cfg.Discoveries == nil || cfg.Routes == nil {
		return nil, errors.New("devices: Client, Dynamic and the informers are required")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	var run [8]byte
	rand.Read(run[:]) //nolint:errcheck // does not fail
	return &Devices{
		cfg: cfg, log: cfg.Log, access: newAccess(cfg.Client), limit: rate.NewLimiter(writesPerSecond, 1),
		twins: map[edgeapi.DeviceRef]*twin{}, nodes: map[string]*node{}, models: map[string]*model{},
		found: map[edgeapi.DeviceRef]*discovery{}, promote: map[edgeapi.DeviceRef]struct{}{},
		status: newScheduler(), run: hex.EncodeToString(run[:]),
		order: list.New(), news: make(chan struct{}),
	}, nil
}

// Run follows the cluster's devices and writes statuses until ctx ends.
func (d *Devices) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, f := range []struct {
		informer cache.SharedIndexInformer
		set, del func(any)
	}{
		{d.cfg.Models, func(obj any) { d.setModel(obj.(*v1alpha1.DeviceModel)) }, func(obj any) { d.dropModel(obj.(*v1alpha1.DeviceModel)) }},
		{d.cfg.Devices, func(obj any) { d.setDevice(obj.(*v1alpha1.Device)) }, func(obj any) { d.dropDevice(obj.(*v1alpha1.Device)) }},
		{d.cfg.Discoveries, func(obj any) { d.setDiscovery(obj.(*v1alpha1.DeviceDiscovery)) }, func(obj any) { d.dropDiscovery(obj.(*v1alpha1.DeviceDiscovery)) }},
	} {
		registration, err := f.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc:    f.set,
			UpdateFunc: func(_, obj any) { f.set(obj) },
			DeleteFunc: func(obj any) {
				if missed, ok := obj.(cache.DeletedFinalStateUnknown); ok {
					obj = missed.Obj
				}
				f.del(obj)
			},
		})
		if err != nil {
			return fmt.Errorf("devices: %w", err)
		}
		g.Go(func() error {
			<-ctx.Done()
			return f.informer.RemoveEventHandler(registration)
		})
	}
	g.Go(func() error { d.writeStatuses(ctx); return nil })
	g.Go(func() error { d.watchNodes(ctx); return nil })
	g.Go(func() error { d.tend(ctx); return nil })
	return g.Wait()
}

func refOf(namespace, name string) edgeapi.DeviceRef {
	return edgeapi.DeviceRef{Namespace: namespace, Name: name}
}

func (d *Devices) nodeLocked(name string) *node {
	n := d.nodes[name]
	if n == nil {
		n = &node{twins: map[edgeapi.DeviceRef]*twin{}, since: time.Now()}
		d.nodes[name] = n
	}
	return n
}

// Stats since the start.
type Stats struct {
	Devices, Nodes, Watchers                             int
	LiveBytes                                            int
	Frames, Values, Older, Refused, Restored             uint64
	Commands, Patches, SlowWatchers                      uint64
	StatusWrites, UrgentWrites, Unchanged, FailedWrites  uint64
	StatusQueue                                          int
	DevicesCreated, DevicesDeleted, OverridesMadeDesired uint64
}

// Stats returns counters since the start.
func (d *Devices) Stats() Stats {
	s := Stats{
		Frames: d.frames.Load(), Values: d.values.Load(), Older: d.older.Load(), Refused: d.refused.Load(), Restored: d.restored.Load(),
		Commands: d.commands.Load(), Patches: d.patches.Load(), SlowWatchers: d.slow.Load(),
		StatusWrites: d.writes.Load(), UrgentWrites: d.urgentWrites.Load(), Unchanged: d.unchanged.Load(), FailedWrites: d.failedWrites.Load(),
		DevicesCreated: d.created.Load(), DevicesDeleted: d.deleted.Load(), OverridesMadeDesired: d.promoted.Load(),
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	s.Devices, s.Watchers, s.StatusQueue = len(d.twins), d.watchers, d.status.waiting()
	for _, n := range d.nodes {
		if n.session != nil {
			s.Nodes++
		}
		s.LiveBytes += n.bytes
	}
	return s
}
