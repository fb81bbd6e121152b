// Package feed keeps each connected edge node's copy of its cluster objects in
// step with the API server.
//
// One set of informers serves all nodes. A node's set is: its pods; the
// ConfigMaps, Secrets and PersistentVolumeClaims these name, and the claims'
// volumes; the pods' service accounts, the role bindings that concern these and
// the roles bound; its Node; of all namespaces the Services, and the
// RuntimeClasses and CSIDrivers; its devices and what belongs to them; and who
// signs the cluster's tokens. A node resumes by telling what it has
// (edgeapi.Inventory), so that the hub keeps nothing about it while it is away,
// and gets differences.
//
// A pod's and a Node's status belong to the node. They go down once, with the
// object's first delivery; later deltas carry only the conditions that others
// own, such as readiness gates, and a change of status alone is no delta.
//
// A node whose Node object is deleted is told just that (edgeapi.Goodbye) and
// gets no differences: deleting a Node says nothing about the machine, and the
// deletion of its pods, which the cluster's garbage collection then does by
// itself, is no order to stop them. The node decides, and has to join again.
//
// The package never writes to the API server: what a node writes goes to the
// Writer that the caller passes. It never dials: the caller brings the stream.
package feed

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// Config of a Feed.
type Config struct {
	Client kubernetes.Interface // required; reads only
	// Devices reads devices, their models, discoveries and routes, whose
	// definitions are there; nil: nodes get none.
	Devices dynamic.Interface
	// Issuer tells who signs the cluster's service account tokens; nil: the
	// nodes are not told, and accept only tokens of their own.
	Issuer func(context.Context) (edgeapi.TokenIssuer, error)
	Agent  string       // the hub's version, told to nodes
	Log    *slog.Logger // nil discards
}

// Observer is told how conversations go. It must not block. See
// presence.Presence.
type Observer interface {
	// Greeted gives the first words of a node. Nothing is told of the node
	// before, and of one node nothing by two conversations at once.
	Greeted(node string, h edgeapi.Hello)
	// InStep tells whether the node has acknowledged its whole set.
	InStep(node string, yes bool)
	// Wrote tells that a write of the node came.
	Wrote(node string)
}

type nobody struct{}

func (nobody) Greeted(string, edgeapi.Hello) {}
func (nobody) InStep(string, bool)           {}
func (nobody) Wrote(string)                  {}

// Writer does at the API server what a node wrote.
type Writer interface {
	Write(ctx context.Context, node string, w edgeapi.Write) edgeapi.WriteResult
}

// Feed is safe for concurrent use.
type Feed struct {
	client kubernetes.Interface
	agent  string
	watch  Observer
	log    *slog.Logger

	// Immutable after New.
	askIssuer func(context.Context) (edgeapi.TokenIssuer, error)
	sources   []*source // in the order in which a delta carries them
	byName    map[string]*source
	factories []informers.SharedInformerFactory
	loose     []cache.SharedIndexInformer // of no factory

	ready  chan struct{}                  // closed once all informers hold a complete list
	issuer atomic.Pointer[edgeapi.Upsert] // nil until known; stored with mu held

	mu    sync.Mutex
	nodes map[string]map[*conversation]struct{} // by node name
	users map[edgeapi.Ref]map[*conversation]struct{}

	deltas, objects, wireBytes atomic.Uint64
}

// scope tells which nodes an object of a resource goes to.
type scope int

const (
	everyNode     scope = iota // Services and the like
	ownNode                    // the Node with the node's own name
	boundNode                  // pods and devices bound to the node
	selectedNodes              // discoveries, by the labels of nodes
	onDemand                   // what those name
)

// source is one resource and the informer that watches it.
type source struct {
	resource string
	kind     string
	version  string
	scope    scope
	rank     int // position in sources
	indexer  cache.Indexer
	informer cache.SharedIndexInformer
	nodeOf   func(obj any) string // boundNode: which
}

// ByNode is the index of the pods' and the devices' informers by the Node they
// are bound to.
const ByNode = "node"

// New makes a Feed; Run starts it.
func New(cfg Config) (*Feed, error) {
	if cfg.Client == nil {
		return nil, errors.New("feed: Client is required")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	f := &Feed{
		client:    cfg.Client,
		askIssuer: cfg.Issuer,
		agent:     cfg.Agent,
		watch:     nobody{},
		log:       cfg.Log,
		ready:     make(chan struct{}),
		byName:    map[string]*source{},
		nodes:     map[string]map[*conversation]struct{}{},
		users:     map[edgeapi.Ref]map[*conversation]struct{}{},
	}
	slim := informers.WithTransform(func(obj any) (any, error) {
		// Nobody downstream reads them, and they are a third of an object.
		if m, err := meta.Accessor(obj); err == nil {
			m.SetManagedFields(nil)
		}
		if o, ok := obj.(runtime.Object); ok {
			slimAccess(o)
		}
		return obj, nil
	})
	all := informers.NewSharedInformerFactoryWithOptions(cfg.Client, 0, slim)
	bound := informers.NewSharedInformerFactoryWithOptions(cfg.Client, 0, slim,
		informers.WithTweakListOptions(func(o *metav1.ListOptions) {
			o.FieldSelector = fields.OneTermNotEqualSelector("spec.nodeName", "").String()
		}))
	f.factories = []informers.SharedInformerFactory{all, bound}

	// What is referred to stands before what refers to it.
	f.add("nodes", "Node", "v1", ownNode, all.Core().V1().Nodes().Informer())
	f.add("runtimeclasses", "RuntimeClass", nodev1.SchemeGroupVersion.String(), everyNode, all.Node().V1().RuntimeClasses().Informer())
	f.add("csidrivers", "CSIDriver", storagev1.SchemeGroupVersion.String(), everyNode, all.Storage().V1().CSIDrivers().Informer())
	f.add("services", "Service", "v1", everyNode, all.Core().V1().Services().Informer())
	f.add("configmaps", "ConfigMap", "v1", onDemand, all.Core().V1().ConfigMaps().Informer())
	f.add("secrets", "Secret", "v1", onDemand, all.Core().V1().Secrets().Informer())
	f.add("persistentvolumes", "PersistentVolume", "v1", onDemand, all.Core().V1().PersistentVolumes().Informer())
	f.add("persistentvolumeclaims", "PersistentVolumeClaim", "v1", onDemand, all.Core().V1().PersistentVolumeClaims().Informer())
	f.add("clusterroles", "ClusterRole", rbacv1.SchemeGroupVersion.String(), onDemand, all.Rbac().V1().ClusterRoles().Informer())
	f.add("roles", "Role", rbacv1.SchemeGroupVersion.String(), onDemand, all.Rbac().V1().Roles().Informer())
	for _, b := range []*source{
		f.add("clusterrolebindings", "ClusterRoleBinding", rbacv1.SchemeGroupVersion.String(), onDemand, all.Rbac().V1().ClusterRoleBindings().Informer()),
		f.add("rolebindings", "RoleBinding", rbacv1.SchemeGroupVersion.String(), onDemand, all.Rbac().V1().RoleBindings().Informer()),
	} {
		if err := b.informer.AddIndexers(cache.Indexers{bySubject: func(obj any) ([]string, error) { return subjectsOf(obj), nil }}); err != nil {
			return nil, fmt.Errorf("feed: index %s by subject: %w", b.resource, err)
		}
	}
	f.add("serviceaccounts", "ServiceAccount", "v1", onDemand, all.Core().V1().ServiceAccounts().Informer())
	if cfg.Devices != nil {
		if err := f.addDevices(cfg.Devices); err != nil {
			return nil, err
		}
	}
	pods := f.add("pods", "Pod", "v1", boundNode, bound.Core().V1().Pods().Informer())
	pods.nodeOf = func(obj any) string { return obj.(*corev1.Pod).Spec.NodeName }
	if err := pods.informer.AddIndexers(cache.Indexers{ByNode: func(obj any) ([]string, error) {
		return []string{pods.nodeOf(obj)}, nil
	}}); err != nil {
		return nil, fmt.Errorf("feed: index pods by node: %w", err)
	}
	return f, nil
}

func (f *Feed) add(resource, kind, version string, sc scope, informer cache.SharedIndexInformer) *source {
	s := &source{
		resource: resource, kind: kind, version: version, scope: sc,
		rank: len(f.sources), informer: informer, indexer: informer.GetIndexer(),
	}
	f.sources = append(f.sources, s)
	f.byName[resource] = s
	return s
}

// Observe has o told of all conversations. It is to be called before Run: who
// observes may need the feed's informers first.
func (f *Feed) Observe(o Observer) { f.watch = o }

// Run watches the cluster until ctx ends.
func (f *Feed) Run(ctx context.Context) error {
	for _, s := range f.sources {
		// The handlers only mark; they never block the informer.
		if _, err := s.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc:    func(obj any) { f.changed(s, nil, obj) },
			UpdateFunc: func(old, obj any) { f.changed(s, old, obj) },
			DeleteFunc: func(obj any) { f.changed(s, nil, obj) },
		}); err != nil {
			return fmt.Errorf("feed: watch %s: %w", s.resource, err)
		}
	}
	for _, factory := range f.factories {
		factory.StartWithContext(ctx)
	}
	var loose sync.WaitGroup
	for _, informer := range f.loose {
		loose.Go(func() { informer.RunWithContext(ctx) })
	}
	started := time.Now()
	for _, s := range f.sources {
		if !cache.WaitForCacheSync(ctx.Done(), s.informer.HasSynced) {
			break
		}
	}
	if ctx.Err() == nil {
		followed := make(chan struct{})
		go func() {
			defer close(followed)
			f.followIssuer(ctx)
		}()
		defer func() { <-followed }()
		f.log.Info("cluster objects listed", "took", time.Since(started).Round(time.Millisecond))
		close(f.ready)
	}
	<-ctx.Done()
	for _, factory := range f.factories {
		factory.Shutdown()
	}
	loose.Wait()
	return nil
}

// Ready is closed once every informer holds a complete list. No node is served
// before: a partial set would delete what is missing from it.
func (f *Feed) Ready() <-chan struct{} { return f.ready }

// Pods is the informer of all pods that are bound to a node, for others to share:
// a second one would hold every pod twice.
func (f *Feed) Pods() cache.SharedIndexInformer { return f.byName["pods"].informer }

// Nodes is the informer of all Nodes, likewise.
func (f *Feed) Nodes() cache.SharedIndexInformer { return f.byName["nodes"].informer }

// Stats of a Feed since its start.
type Stats struct {
	Conversations int
	Deltas        uint64 // sent
	Objects       uint64 // upserts and deletions in them
	WireBytes     uint64 // sync bytes sent, after compression
}

// Stats returns counters since the start.
func (f *Feed) Stats() Stats {
	f.mu.Lock()
	n := 0
	for _, cs := range f.nodes {
		n += len(cs)
	}
	f.mu.Unlock()
	return Stats{Conversations: n, Deltas: f.deltas.Load(), Objects: f.objects.Load(), WireBytes: f.wireBytes.Load()}
}

// changed marks the object for the nodes that it concerns. Its cost is the
// number of those nodes. old is the state before an update.
func (f *Feed) changed(s *source, old, obj any) {
	if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
		obj = gone.Obj
	}
	m, err := meta.Accessor(obj)
	if err != nil {
		f.log.Error("informer delivered no object", "resource", s.resource, "err", err)
		return
	}
	ref := edgeapi.Ref{Resource: s.resource, Namespace: m.GetNamespace(), Name: m.GetName()}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, subject := range slices.Concat(subjectsOf(old), subjectsOf(obj)) {
		mark(f.users[subjectRef(subject)], subjectRef(subject))
	}
	if s.resource == v1alpha1.Routes {
		mark(f.users[routesRef(ref.Namespace)], routesRef(ref.Namespace))
	}
	switch s.scope {
	case everyNode, selectedNodes: // whom it selected before has it to drop
		for _, cs := range f.nodes {
			mark(cs, ref)
		}
	case ownNode:
		mark(f.nodes[ref.Name], ref)
		f.selectionChangedLocked(ref.Name, old, obj)
	case boundNode:
		mark(f.nodes[s.nodeOf(obj)], ref)
		if old != nil { // unlike a pod, a device may move
			mark(f.nodes[s.nodeOf(old)], ref)
		}
	case onDemand:
		mark(f.users[ref], ref)
	}
}

func mark(cs map[*conversation]struct{}, ref edgeapi.Ref) {
	for c := range cs {
		c.mark(ref)
	}
}

// lookup returns the object if it belongs to the node's set. For onDemand
// resources the caller knows whether the node needs it.
func (f *Feed) lookup(ref edgeapi.Ref, node string) runtime.Object {
	s := f.byName[ref.Resource]
	if s == nil {
		return nil
	}
	key := ref.Name
	if ref.Namespace != "" {
		key = ref.Namespace + "/" + ref.Name
	}
	obj, ok, err := s.indexer.GetByKey(key)
	if err != nil || !ok {
		return nil
	}
	switch s.scope {
	case ownNode:
		if ref.Name != node {
			return nil
		}
	case boundNode:
		if s.nodeOf(obj) != node {
			return nil
		}
	case selectedNodes:
		if !f.selects(obj, node) {
			return nil
		}
	}
	return obj.(runtime.Object)
}

// initial returns the refs that every conversation with the node starts from;
// what pods refer to is found from them.
func (f *Feed) initial(node string) ([]edgeapi.Ref, error) {
	refs := []edgeapi.Ref{{Resource: "nodes", Name: node}, edgeapi.IssuerRef()}
	for _, s := range f.sources {
		switch s.scope {
		case everyNode:
			for _, obj := range s.indexer.List() {
				refs = append(refs, refTo(s.resource, obj))
			}
		case selectedNodes:
			for _, obj := range s.indexer.List() {
				if f.selects(obj, node) {
					refs = append(refs, refTo(s.resource, obj))
				}
			}
		case boundNode:
			objs, err := s.indexer.ByIndex(ByNode, node)
			if err != nil {
				return nil, fmt.Errorf("list %s of node %s: %w", s.resource, node, err)
			}
			for _, obj := range objs {
				refs = append(refs, refTo(s.resource, obj))
			}
		}
	}
	return refs, nil
}

func refTo(resource string, obj any) edgeapi.Ref {
	m := obj.(metav1.Object)
	return edgeapi.Ref{Resource: resource, Namespace: m.GetNamespace(), Name: m.GetName()}
}
