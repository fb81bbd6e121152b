package tolerations

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	coreinformers "k8s.io/client-go/informers/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
)

const (
	// DefaultSeconds is what the API server's admission gives a pod that names
	// neither taint, unless told otherwise.
	DefaultSeconds = 300

	// patchers bounds the patches in flight.
	patchers = 4

	// A patch that failed is tried again after a time between these two, so
	// that one pod gets several tries within the shortest sensible limit.
	minRetry = 50 * time.Millisecond
	maxRetry = 5 * time.Second
)

// Config of a Keeper. All but Seconds and Log are required.
type Config struct {
	Client kubernetes.Interface // patches pods, watches namespaces

	// Pods and Nodes are the caller's informers, which the caller runs. The
	// keeper adds handlers; pods are indexed by the name of their Node under
	// NodeIndex.
	Pods, Nodes cache.SharedIndexInformer
	NodeIndex   string

	// Enrolled tells whether a Node is an edge node of this hub. Known is
	// closed once it can tell.
	Enrolled func(node string) bool
	Known    <-chan struct{}

	Seconds int64        // what admission gives; zero means DefaultSeconds
	Log     *slog.Logger // nil discards
}

// Keeper clears the time limits. See the package.
type Keeper struct {
	cfg        Config
	log        *slog.Logger
	namespaces cache.SharedIndexInformer
	queue      workqueue.TypedRateLimitingInterface[string] // keys of pods; each at most once

	kept, released, failed atomic.Uint64
}

// New checks cfg; it starts nothing.
func New(cfg Config) (*Keeper, error) {
	if cfg.Client == nil || cfg.Pods == nil || cfg.Nodes == nil || cfg.NodeIndex == "" || cfg.Enrolled == nil || cfg.Known == nil {
		return nil, errors.New("tolerations: Client, Pods, Nodes, NodeIndex, Enrolled and Known are required")
	}
	if cfg.Seconds == 0 {
		cfg.Seconds = DefaultSeconds
	}
	if cfg.Seconds < 0 {
		return nil, fmt.Errorf("tolerations: a default of %d seconds: it must not be negative", cfg.Seconds)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	k := &Keeper{
		cfg: cfg, log: cfg.Log,
		namespaces: coreinformers.NewNamespaceInformer(cfg.Client, 0, cache.Indexers{}),
	}
	if err := k.namespaces.SetTransform(annotationOnly); err != nil {
		return nil, fmt.Errorf("tolerations: watch namespaces: %w", err)
	}
	return k, nil
}

// annotationOnly leaves of a namespace what the keeper reads.
func annotationOnly(obj any) (any, error) {
	ns, ok := obj.(*corev1.Namespace)
	if !ok {
		return obj, nil
	}
	slim := &corev1.Namespace{}
	slim.Name, slim.UID, slim.ResourceVersion = ns.Name, ns.UID, ns.ResourceVersion
	if v, ok := ns.Annotations[Evict]; ok {
		slim.Annotations = map[string]string{Evict: v}
	}
	return slim, nil
}

// Run keeps pods until ctx ends. It may be called once.
func (k *Keeper) Run(ctx context.Context) error {
	k.queue = workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](minRetry, maxRetry))
	// Who is enrolled, and which namespaces opt out, is known before the first
	// pod is looked at.
	select {
	case <-k.cfg.Known:
	case <-ctx.Done():
		k.queue.ShutDown()
		return nil
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { k.namespaces.RunWithContext(ctx); return nil })
	g.Go(func() error { <-ctx.Done(); k.queue.ShutDown(); return nil })
	for range patchers {
		g.Go(func() error { k.work(ctx); return nil })
	}
	g.Go(func() error {
		if !cache.WaitForCacheSync(ctx.Done(), k.namespaces.HasSynced, k.cfg.Nodes.HasSynced) {
			return nil
		}
		stop, err := k.watch()
		if err != nil {
			return err
		}
		defer stop()
		<-ctx.Done()
		return nil
	})
	return g.Wait()
}

// watch adds the handlers. They only mark; they never block an informer.
func (k *Keeper) watch() (stop func(), err error) {
	var added []func()
	stop = func() {
		for _, remove := range added {
			remove()
		}
	}
	for _, w := range []struct {
		informer cache.SharedIndexInformer
		changed  func(old, obj any)
	}{
		{k.cfg.Pods, func(_, obj any) { k.podChanged(obj) }},
		{k.cfg.Nodes, func(_, obj any) { k.nodeChanged(obj) }},
		{k.namespaces, k.namespaceChanged},
	} {
		reg, err := w.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc:    func(obj any) { w.changed(nil, obj) },
			UpdateFunc: w.changed,
		})
		if err != nil {
			stop()
			return nil, fmt.Errorf("tolerations: watch: %w", err)
		}
		added = append(added, func() { _ = w.informer.RemoveEventHandler(reg) })
	}
	return stop, nil
}

func (k *Keeper) podChanged(obj any) {
	pod, ok := obj.(*corev1.Pod)
	if !ok || k.plan(pod) == nil {
		return
	}
	if key, err := cache.MetaNamespaceKeyFunc(pod); err == nil {
		k.queue.Add(key)
	}
}

// nodeChanged looks at all pods of the Node, whose annotation may have changed,
// or which may have been enrolled after its pods were bound. Looking costs
// little, and a Node changes about once in five minutes.
func (k *Keeper) nodeChanged(obj any) {
	node, ok := obj.(*corev1.Node)
	if !ok || !k.cfg.Enrolled(node.Name) {
		return
	}
	pods, err := k.cfg.Pods.GetIndexer().ByIndex(k.cfg.NodeIndex, node.Name)
	if err != nil {
		k.log.Error("pods of a node cannot be looked up", "node", node.Name, "err", err)
		return
	}
	for _, pod := range pods {
		k.podChanged(pod)
	}
}

func (k *Keeper) namespaceChanged(old, obj any) {
	ns, ok := obj.(*corev1.Namespace)
	if !ok {
		return
	}
	was := ""
	if o, ok := old.(*corev1.Namespace); ok {
		was = o.Annotations[Evict]
	}
	if ns.Annotations[Evict] == was {
		return
	}
	pods, err := k.cfg.Pods.GetIndexer().ByIndex(cache.NamespaceIndex, ns.Name)
	if err != nil {
		k.log.Error("pods of a namespace cannot be looked up", "namespace", ns.Name, "err", err)
		return
	}
	for _, pod := range pods {
		k.podChanged(pod)
	}
}

// plan returns what is to be changed of the pod, nil for nothing.
func (k *Keeper) plan(pod *corev1.Pod) *change {
	switch {
	case pod.Spec.NodeName == "" || !k.cfg.Enrolled(pod.Spec.NodeName):
		return nil
	case pod.DeletionTimestamp != nil, pod.Status.Phase == corev1.PodSucceeded, pod.Status.Phase == corev1.PodFailed:
		return nil // it ends, or has ended
	}
	return plan(pod, k.optedOut(pod), k.cfg.Seconds)
}

// optedOut tells whether the pod shall be evicted from a silent node.
func (k *Keeper) optedOut(pod *corev1.Pod) bool {
	if evict, ok := wish(pod); ok {
		return evict
	}
	if evict, ok := wishOf(k.namespaces, pod.Namespace); ok {
		return evict
	}
	evict, _ := wishOf(k.cfg.Nodes, pod.Spec.NodeName)
	return evict
}

func wishOf(informer cache.SharedIndexInformer, key string) (evict, ok bool) {
	obj, found, err := informer.GetIndexer().GetByKey(key)
	if err != nil || !found {
		return false, false
	}
	m, err := meta.Accessor(obj)
	if err != nil {
		return false, false
	}
	return wish(m)
}

func (k *Keeper) work(ctx context.Context) {
	for {
		key, down := k.queue.Get()
		if down {
			return
		}
		if err := k.sync(ctx, key); err != nil && ctx.Err() == nil {
			if !apierrors.IsConflict(err) { // of a status that came in between
				k.failed.Add(1)
				k.log.Warn("a pod's tolerations are not set; it is tried again", "pod", key, "err", err)
			}
			k.queue.AddRateLimited(key)
		} else {
			k.queue.Forget(key)
		}
		k.queue.Done(key)
	}
}

// sync brings one pod's tolerations to what they shall be.
func (k *Keeper) sync(ctx context.Context, key string) error {
	obj, found, err := k.cfg.Pods.GetIndexer().GetByKey(key)
	if err != nil || !found {
		return err
	}
	pod := obj.(*corev1.Pod)
	c := k.plan(pod)
	if c == nil {
		return nil
	}
	patch, err := c.patch(pod)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	_, err = k.cfg.Client.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil
	case err != nil:
		return err
	}
	if c.kept == "" {
		k.released.Add(1)
	} else {
		k.kept.Add(1)
	}
	k.log.Debug("tolerations set", "pod", key, "node", pod.Spec.NodeName, "kept", c.kept)
	return nil
}

// patch is a merge patch. It holds for the version that the change was computed
// from: it carries the whole list.
func (c *change) patch(pod *corev1.Pod) ([]byte, error) {
	var kept any // null removes it
	if c.kept != "" {
		kept = c.kept
	}
	return json.Marshal(map[string]any{
		"metadata": map[string]any{
			"uid": pod.UID, "resourceVersion": pod.ResourceVersion,
			"annotations": map[string]any{Kept: kept},
		},
		"spec": map[string]any{"tolerations": c.tolerations},
	})
}

// Stats counts since the start.
type Stats struct {
	Kept     uint64 // pods whose limits were cleared
	Released uint64 // pods whose limits were put back, as they opted out
	Failed   uint64 // patches that failed, and were tried again
}

// Stats returns counters since the start.
func (k *Keeper) Stats() Stats {
	return Stats{Kept: k.kept.Load(), Released: k.released.Load(), Failed: k.failed.Load()}
}
