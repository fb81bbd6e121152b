package convergence

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	"k8s.io/client-go/kubernetes/scheme"
)

// kinds are the resources that the cloud serves.
var kinds = map[string]schema.GroupVersionKind{
	"nodes":                  {Version: "v1", Kind: "Node"},
	"pods":                   {Version: "v1", Kind: "Pod"},
	"configmaps":             {Version: "v1", Kind: "ConfigMap"},
	"secrets":                {Version: "v1", Kind: "Secret"},
	"services":               {Version: "v1", Kind: "Service"},
	"events":                 {Version: "v1", Kind: "Event"},
	"persistentvolumes":      {Version: "v1", Kind: "PersistentVolume"},
	"persistentvolumeclaims": {Version: "v1", Kind: "PersistentVolumeClaim"},
	"runtimeclasses":         {Group: "node.k8s.io", Version: "v1", Kind: "RuntimeClass"},
	"csidrivers":             {Group: "storage.k8s.io", Version: "v1", Kind: "CSIDriver"},
	"csinodes":               {Group: "storage.k8s.io", Version: "v1", Kind: "CSINode"},
	"leases":                 {Group: "coordination.k8s.io", Version: "v1", Kind: "Lease"},
	"serviceaccounts":        {Version: "v1", Kind: "ServiceAccount"},
	"roles":                  {Group: "rbac.authorization.k8s.io", Version: "v1", Kind: "Role"},
	"rolebindings":           {Group: "rbac.authorization.k8s.io", Version: "v1", Kind: "RoleBinding"},
	"clusterroles":           {Group: "rbac.authorization.k8s.io", Version: "v1", Kind: "ClusterRole"},
	"clusterrolebindings":    {Group: "rbac.authorization.k8s.io", Version: "v1", Kind: "ClusterRoleBinding"},
}

// object is what every typed object of the scheme is.
type object interface {
	runtime.Object
	metav1.Object
}

func newObject(resource string) object {
	o, err := scheme.Scheme.New(kinds[resource])
	if err != nil {
		panic(err) // kinds is fixed
	}
	return o.(object)
}

// key names an object of the cloud.
type key struct{ resource, namespace, name string }

// change is one line of the cloud's history, which watches read.
type change struct {
	typ      string
	resource string
	object   object
	rv       uint64
}

// cloud is a Kubernetes API server as far as an edge node can tell: uids,
// resourceVersions, watches, graceful deletion, finalizers, status as a part of
// its own, preconditions, and what NodeRestriction lets a node do to pods.
type cloud struct {
	mu      sync.Mutex
	rv      uint64
	uids    int
	objects map[key]object
	history []change
	news    chan struct{} // closed with each change
	rng     *rand.Rand    // for failures
	// failures is how many writes of a hundred fail: half of them after they
	// have taken effect.
	failures int

	// told hears of what a node does to pods, under mu.
	told func(verb string, before, after *corev1.Pod)
}

func newCloud(rng *rand.Rand) *cloud {
	return &cloud{objects: map[key]object{}, news: make(chan struct{}), rng: rng, rv: 100, told: func(string, *corev1.Pod, *corev1.Pod) {}}
}

func (c *cloud) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	k, sub, err := parsePath(r.URL.Path)
	if err != nil {
		answerError(w, err)
		return
	}
	if r.Method == http.MethodGet && r.URL.Query().Get("watch") != "" {
		c.watch(w, r, k)
		return
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, 4<<20))
	if err != nil {
		return
	}
	node := strings.TrimPrefix(r.Header.Get("Impersonate-User"), "system:node:")
	lose := false
	if r.Method != http.MethodGet && node != "" {
		c.mu.Lock()
		roll := c.rng.IntN(200)
		fail := roll < c.failures
		lose = !fail && roll < 2*c.failures
		var linger time.Duration
		if c.failures > 0 && c.rng.IntN(25) == 0 {
			linger = time.Duration(c.rng.IntN(200)) * time.Millisecond
		}
		c.mu.Unlock()
		// A request may outlive the connection it came over.
		time.Sleep(linger)
		if fail {
			answerError(w, apierrors.NewInternalError(fmt.Errorf("the model fails this write")))
			return
		}
	}
	out, err := c.do(r, k, sub, node, body)
	switch {
	case lose: // done, but nobody hears of it
		panic(http.ErrAbortHandler)
	case err != nil:
		answerError(w, err)
	default:
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(out)
	}
}

func parsePath(path string) (k key, sub string, err error) {
	parts := strings.Split(strings.Trim(path, "/"), "/")
	if len(parts) > 2 && parts[0] == "api" {
		parts = parts[2:]
	} else if len(parts) > 3 && parts[0] == "apis" {
		parts = parts[3:]
	}
	if len(parts) > 2 && parts[0] == "namespaces" {
		k.namespace, parts = parts[1], parts[2:]
	}
	k.resource = parts[0]
	if len(parts) > 1 {
		k.name = parts[1]
	}
	if len(parts) > 2 {
		sub = parts[2]
	}
	if _, ok := kinds[k.resource]; !ok {
		err = apierrors.NewNotFound(schema.GroupResource{Resource: k.resource}, path)
	}
	return k, sub, err
}

func answerError(w http.ResponseWriter, err error) {
	status := apierrors.NewInternalError(err).Status()
	if s, ok := err.(apierrors.APIStatus); ok {
		status = s.Status()
	}
	status.Kind, status.APIVersion = "Status", "v1"
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(int(status.Code))
	_ = json.NewEncoder(w).Encode(status)
}

// do answers one request; node is who asks, or empty.
func (c *cloud) do(r *http.Request, k key, sub, node string, body []byte) (any, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	gr := schema.GroupResource{Resource: k.resource}
	cur := c.objects[k]
	if r.Method == http.MethodPost {
		o := newObject(k.resource)
		if err := json.Unmarshal(body, o); err != nil {
			return nil, apierrors.NewBadRequest(err.Error())
		}
		return c.createLocked(k.resource, k.namespace, o)
	}
	if r.Method == http.MethodGet && k.name == "" {
		return c.listLocked(r, k), nil
	}
	if cur == nil {
		return nil, apierrors.NewNotFound(gr, k.name)
	}
	if pod, ok := cur.(*corev1.Pod); ok && node != "" && pod.Spec.NodeName != node {
		return nil, apierrors.NewForbidden(gr, k.name, fmt.Errorf("the pod is not of node %s", node))
	}
	switch r.Method {
	case http.MethodGet:
		return cur, nil
	case http.MethodPatch:
		return c.patchLocked(k, sub, node, types.PatchType(r.Header.Get("Content-Type")), body)
	case http.MethodPut:
		next := newObject(k.resource)
		if err := json.Unmarshal(body, next); err != nil {
			return nil, apierrors.NewBadRequest(err.Error())
		}
		return c.replaceLocked(k, sub, node, next)
	case http.MethodDelete:
		var opts metav1.DeleteOptions
		if len(body) > 0 {
			if err := json.Unmarshal(body, &opts); err != nil {
				return nil, apierrors.NewBadRequest(err.Error())
			}
		}
		return cur, c.deleteLocked(k, node, opts)
	}
	return nil, apierrors.NewMethodNotSupported(gr, r.Method)
}

func (c *cloud) createLocked(resource, namespace string, o object) (object, error) {
	k := key{resource, namespace, o.GetName()}
	if c.objects[k] != nil {
		return nil, apierrors.NewAlreadyExists(schema.GroupResource{Resource: resource}, k.name)
	}
	c.uids++
	o.SetNamespace(namespace)
	o.SetUID(types.UID(fmt.Sprintf("cloud-%d", c.uids)))
	o.SetCreationTimestamp(metav1.NewTime(time.Unix(1_800_000_000, 0)))
	if pod, ok := o.(*corev1.Pod); ok {
		pod.Status = corev1.PodStatus{Phase: corev1.PodPending}
	}
	c.putLocked(k, o, "ADDED")
	return o, nil
}

// putLocked takes o, which nobody may change afterwards.
func (c *cloud) putLocked(k key, o object, typ string) {
	c.rv++
	o.SetResourceVersion(strconv.FormatUint(c.rv, 10))
	o.GetObjectKind().SetGroupVersionKind(kinds[k.resource])
	if typ == "DELETED" {
		delete(c.objects, k)
	} else {
		c.objects[k] = o
	}
	c.history = append(c.history, change{typ, k.resource, o, c.rv})
	close(c.news)
	c.news = make(chan struct{})
}

func (c *cloud) patchLocked(k key, sub, node string, typ types.PatchType, patch []byte) (object, error) {
	old, err := json.Marshal(c.objects[k])
	if err != nil {
		return nil, err
	}
	var merged []byte
	if typ == types.StrategicMergePatchType {
		merged, err = strategicpatch.StrategicMergePatch(old, patch, newObject(k.resource))
	} else {
		merged, err = mergePatch(old, patch)
	}
	if err != nil {
		return nil, apierrors.NewBadRequest(err.Error())
	}
	next := newObject(k.resource)
	if err := json.Unmarshal(merged, next); err != nil {
		return nil, apierrors.NewBadRequest(err.Error())
	}
	return c.replaceLocked(k, sub, node, next)
}

// mergePatch applies an RFC 7386 patch.
func mergePatch(old, patch []byte) ([]byte, error) {
	var doc, p map[string]any
	if err := json.Unmarshal(old, &doc); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(patch, &p); err != nil {
		return nil, err
	}
	var merge func(into, from map[string]any)
	merge = func(into, from map[string]any) {
		for k, v := range from {
			sub, ok := v.(map[string]any)
			switch {
			case v == nil:
				delete(into, k)
			case ok:
				below, _ := into[k].(map[string]any)
				if below == nil {
					below = map[string]any{}
				}
				merge(below, sub)
				into[k] = below
			default:
				into[k] = v
			}
		}
	}
	merge(doc, p)
	return json.Marshal(doc)
}

func (c *cloud) replaceLocked(k key, sub, node string, next object) (object, error) {
	cur := c.objects[k]
	conflict := func(what string) error {
		return apierrors.NewConflict(schema.GroupResource{Resource: k.resource}, k.name, fmt.Errorf("Precondition failed: %s", what))
	}
	if next.GetUID() != cur.GetUID() {
		return nil, conflict("UID")
	}
	if next.GetResourceVersion() != "" && next.GetResourceVersion() != cur.GetResourceVersion() {
		return nil, conflict("resourceVersion")
	}
	switch cur := cur.(type) {
	case *corev1.Pod:
		next := next.(*corev1.Pod)
		if sub == "status" {
			status := next.Status
			*next = *cur.DeepCopy()
			next.Status = status
		} else {
			next.Status = *cur.Status.DeepCopy()
		}
		if node != "" {
			c.told("status", cur, next)
		}
	case *corev1.Node:
		next := next.(*corev1.Node)
		if sub == "status" {
			next.Spec = *cur.Spec.DeepCopy()
		} else {
			next.Status = *cur.Status.DeepCopy()
		}
	}
	next.SetResourceVersion(cur.GetResourceVersion())
	if equality.Semantic.DeepEqual(cur, next) {
		return cur, nil
	}
	grace := next.GetDeletionGracePeriodSeconds()
	if next.GetDeletionTimestamp() != nil && len(next.GetFinalizers()) == 0 && grace != nil && *grace == 0 {
		c.putLocked(k, next, "DELETED")
	} else {
		c.putLocked(k, next, "MODIFIED")
	}
	return next, nil
}

func (c *cloud) deleteLocked(k key, node string, opts metav1.DeleteOptions) error {
	cur := c.objects[k]
	if p := opts.Preconditions; p != nil && p.UID != nil && *p.UID != cur.GetUID() {
		return apierrors.NewConflict(schema.GroupResource{Resource: k.resource}, k.name, fmt.Errorf("Precondition failed: UID"))
	}
	next := cur.DeepCopyObject().(object)
	grace := int64(0)
	if pod, ok := cur.(*corev1.Pod); ok {
		if node != "" {
			c.told("delete", pod, nil)
		}
		grace = 30
		if opts.GracePeriodSeconds != nil {
			grace = *opts.GracePeriodSeconds
		}
		if pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
			grace = 0
		}
	}
	if grace == 0 && len(next.GetFinalizers()) == 0 {
		c.putLocked(k, next, "DELETED")
		return nil
	}
	if was := cur.GetDeletionGracePeriodSeconds(); was != nil && *was <= grace {
		return nil
	}
	at := metav1.NewTime(time.Unix(1_900_000_000, 0).Add(time.Duration(grace) * time.Second))
	next.SetDeletionTimestamp(&at)
	next.SetDeletionGracePeriodSeconds(&grace)
	c.putLocked(k, next, "MODIFIED")
	return nil
}

func selected(r *http.Request, o object) bool {
	if r.URL.Query().Get("fieldSelector") != "spec.nodeName!=" {
		return true
	}
	pod, ok := o.(*corev1.Pod)
	return !ok || pod.Spec.NodeName != ""
}

func (c *cloud) listLocked(r *http.Request, k key) any {
	items := []object{}
	for at, o := range c.objects {
		if at.resource == k.resource && (k.namespace == "" || at.namespace == k.namespace) && selected(r, o) {
			items = append(items, o)
		}
	}
	gvk := kinds[k.resource]
	return map[string]any{
		"kind": gvk.Kind + "List", "apiVersion": gvk.GroupVersion().String(),
		"metadata": map[string]any{"resourceVersion": strconv.FormatUint(c.rv, 10)}, "items": items,
	}
}

func (c *cloud) watch(w http.ResponseWriter, r *http.Request, k key) {
	if r.URL.Query().Has("sendInitialEvents") {
		answerError(w, apierrors.NewInvalid(schema.GroupKind{Kind: "ListOptions"}, "", nil)) // the client lists instead
		return
	}
	from, err := strconv.ParseUint(r.URL.Query().Get("resourceVersion"), 10, 64)
	if err != nil {
		answerError(w, apierrors.NewBadRequest("resourceVersion: "+err.Error()))
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	enc := json.NewEncoder(w)
	read := 0
	for {
		c.mu.Lock()
		fresh, news := c.history[read:], c.news
		read = len(c.history)
		c.mu.Unlock()
		for _, ch := range fresh {
			if ch.rv > from && ch.resource == k.resource && selected(r, ch.object) {
				if err := enc.Encode(map[string]any{"type": ch.typ, "object": ch.object}); err != nil {
					return
				}
			}
		}
		w.(http.Flusher).Flush()
		select {
		case <-news:
		case <-r.Context().Done():
			return
		}
	}
}

// What users, controllers and the scheduler do. They do it without a network.

func (c *cloud) create(resource, namespace string, o object) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, err := c.createLocked(resource, namespace, o)
	return err
}

// edit changes an object other than its status, if it is there.
func (c *cloud) edit(k key, change func(object)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if cur := c.objects[k]; cur != nil {
		next := cur.DeepCopyObject().(object)
		change(next)
		if _, err := c.replaceLocked(k, "", "", next); err != nil {
			panic(err)
		}
	}
}

// disturb writes a status as the node lifecycle controller does to a node that
// is away.
func (c *cloud) disturb(k key, change func(object)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if cur := c.objects[k]; cur != nil {
		next := cur.DeepCopyObject().(object)
		change(next)
		if _, err := c.replaceLocked(k, "status", "", next); err != nil {
			panic(err)
		}
	}
}

// remove deletes an object; grace only matters to pods.
func (c *cloud) remove(k key, grace int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.objects[k] != nil {
		if err := c.deleteLocked(k, "", metav1.DeleteOptions{GracePeriodSeconds: &grace}); err != nil {
			panic(err)
		}
	}
}

func (c *cloud) get(k key) object {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.objects[k]
}

// all returns the objects of a resource by key.
func (c *cloud) all(resource string) map[key]object {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := map[key]object{}
	for k, o := range c.objects {
		if k.resource == resource {
			out[k] = o
		}
	}
	return out
}
