package devices

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// A Device that a DeviceDiscovery made has this label, with the discovery's
// name, and this annotation, with its UID. It has no owner: a discovery that is
// deleted leaves its Devices. One without both is never deleted here.
const (
	LabelDiscovery      = v1alpha1.Group + "/discovery"
	AnnotationDiscovery = v1alpha1.Group + "/discovery-uid"
)

const (
	// maxCandidates of a node are held for a discovery, and of all nodes shown.
	maxCandidates = 500

	// What one candidate may carry.
	maxAttributes     = 32
	maxAttributeBytes = 256

	defaultMaxDevices = 200
	defaultAbsentFor  = 168 * time.Hour

	// tendEvery is how often discoveries and promotions are looked at;
	// discoveryEvery the least time between two statuses of a discovery;
	// seenStep how much later a candidate must be seen to be written again.
	tendEvery      = time.Second
	discoveryEvery = 10 * time.Second
	seenStep       = 10 * time.Minute

	// createBatch of Devices are made or deleted in a turn: 20 a second.
	createBatch = 20
)

// discovery is a DeviceDiscovery and what nodes found for it. Guarded by
// Devices.mu.
type discovery struct {
	object *v1alpha1.DeviceDiscovery
	nodes  map[string]*findings
	dirty  bool
	looked time.Time // at all of it
	told   time.Time // its status was written
	sum    string
}

type findings struct {
	candidates map[string]v1alpha1.Candidate // by name; absent ones stay until they have been for long enough
	dropped    int
	heard      bool // the node has told in this life of the hub
}

func (d *Devices) setDiscovery(o *v1alpha1.DeviceDiscovery) {
	ref := refOf(o.Namespace, o.Name)
	d.mu.Lock()
	defer d.mu.Unlock()
	found := d.found[ref]
	if found == nil || found.object.UID != o.UID {
		found = &discovery{nodes: map[string]*findings{}, dirty: true}
		for _, c := range o.Status.Candidates {
			found.of(c.Node).candidates[c.Name] = c
		}
		d.found[ref] = found
	} else if found.object.Generation != o.Generation {
		found.dirty = true
	}
	found.object = o
}

func (d *Devices) dropDiscovery(o *v1alpha1.DeviceDiscovery) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.found, refOf(o.Namespace, o.Name))
}

func (f *discovery) of(node string) *findings {
	n := f.nodes[node]
	if n == nil {
		n = &findings{candidates: map[string]v1alpha1.Candidate{}}
		f.nodes[node] = n
	}
	return n
}

// takeFound takes what a node sees now.
func (d *Devices) takeFound(s *session, m edgeapi.TwinFound) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.nodes[s.node]
	f := d.found[m.Discovery]
	if n == nil || n.session != s || f == nil {
		return
	}
	of := f.of(s.node)
	of.heard, of.dropped, f.dirty = true, m.Dropped, true
	for i := range m.Candidates {
		c := &m.Candidates[i]
		if problems := candidateProblem(c); problems != "" {
			of.dropped++
			continue
		}
		of.candidates[c.Name] = v1alpha1.Candidate{
			Name: c.Name, Node: s.node, Attributes: c.Attributes, Params: c.Params, LastSeen: metav1.NewTime(milli(c.LastSeen).Truncate(time.Second)),
		}
	}
	if over := len(of.candidates) - maxCandidates; over > 0 {
		oldest := slices.SortedFunc(maps.Values(of.candidates), func(a, b v1alpha1.Candidate) int {
			return cmp.Or(a.LastSeen.Compare(b.LastSeen.Time), strings.Compare(a.Name, b.Name))
		})
		for _, c := range oldest[:over] {
			delete(of.candidates, c.Name)
		}
		of.dropped += over
	}
}

// candidateProblem tells why a candidate cannot be taken.
func candidateProblem(c *edgeapi.TwinCandidate) string {
	if !nameOK(c.Name) {
		return "name"
	}
	for _, m := range []map[string]string{c.Attributes, c.Params} {
		if len(m) > maxAttributes {
			return "too many attributes"
		}
		for k, v := range m {
			if len(k) > maxAttributeBytes || len(v) > maxAttributeBytes {
				return "attribute " + k
			}
		}
	}
	return ""
}

// nameOK tells whether an object may have the name (RFC 1123).
func nameOK(name string) bool {
	return len(name) > 0 && len(name) <= 253 && strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-.") == "" &&
		strings.Trim(name[:1]+name[len(name)-1:], "-.") != "" && name[0] != '-' && name[0] != '.' && !strings.HasSuffix(name, "-") && !strings.HasSuffix(name, ".")
}

// tend looks after discoveries, and after overrides that are to become what the
// cloud wants, until ctx ends.
func (d *Devices) tend(ctx context.Context) {
	tick := time.NewTicker(tendEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for _, todo := range d.plan(time.Now()) {
			if d.limit.Wait(ctx) != nil {
				return
			}
			if err := todo.do(ctx); err != nil && ctx.Err() == nil {
				d.log.Warn("looking after devices failed; it is tried again", "what", todo.what, "err", err)
			}
		}
	}
}

// task is one write.
type task struct {
	what string
	do   func(context.Context) error
}

func (d *Devices) plan(now time.Time) []task {
	d.mu.Lock()
	defer d.mu.Unlock()
	todo := d.promotionsLocked()
	for ref, f := range d.found {
		if now.Sub(f.looked) < discoveryEvery && !f.dirty {
			continue
		}
		f.looked = now
		todo = append(todo, d.planLocked(ref, f, now)...)
	}
	return todo
}

// planLocked is what is to be done for a discovery now.
func (d *Devices) planLocked(ref edgeapi.DeviceRef, f *discovery, now time.Time) []task {
	spec := &f.object.Spec
	absent := cmp.Or(spec.Limits.AbsentFor.Duration, defaultAbsentFor)
	limit := cmp.Or(spec.Limits.MaxDevices, defaultMaxDevices)
	mine := d.madeByLocked(f.object)
	var list []v1alpha1.Candidate
	var todo []task
	total, dropped := 0, 0
	seen := map[string]time.Time{}
	for node, of := range f.nodes {
		dropped += of.dropped
		for name, c := range of.candidates {
			if now.Sub(c.LastSeen.Time) > absent {
				delete(of.candidates, name)
				continue
			}
			if !f.wants(&c) {
				continue
			}
			total++
			if made := d.twins[refOf(ref.Namespace, name)]; made != nil && made.device.Spec.NodeName == node {
				c.Device = name
			}
			seen[name] = later(seen[name], c.LastSeen.Time)
			list = append(list, c)
		}
	}
	slices.SortFunc(list, func(a, b v1alpha1.Candidate) int {
		return cmp.Or(strings.Compare(a.Name, b.Name), strings.Compare(a.Node, b.Node))
	})
	if spec.Mode == v1alpha1.DiscoveryCreate {
		room := limit - len(mine)
		for i := range list {
			if c := list[i]; c.Device == "" && room > 0 && len(todo) < createBatch && d.twins[refOf(ref.Namespace, c.Name)] == nil {
				room--
				todo = append(todo, task{"create Device " + ref.Namespace + "/" + c.Name, func(ctx context.Context) error { return d.create(ctx, f.object, c) }})
			}
		}
	}
	for _, tw := range mine {
		// Only a node that is there and has told what it sees can say that
		// something is not there any more.
		of, n := f.nodes[tw.device.Spec.NodeName], d.nodes[tw.device.Spec.NodeName]
		if of == nil || !of.heard || n == nil || n.session == nil || len(todo) >= createBatch {
			continue
		}
		last := later(seen[tw.ref.Name], tw.device.CreationTimestamp.Time, milli(tw.told.seen))
		if tw.state != nil {
			last = later(last, milli(tw.state.LastSeen))
		}
		if now.Sub(last) > absent {
			todo = append(todo, task{"delete Device " + key(tw.ref), func(ctx context.Context) error { return d.remove(ctx, tw) }})
		}
	}
	shown := list[:min(len(list), maxCandidates)]
	if sum := sumOf(shown, total, dropped, len(mine), f.object.Generation); sum != f.sum && now.Sub(f.told) >= discoveryEvery {
		f.told = now
		st := v1alpha1.DeviceDiscoveryStatus{Candidates: slices.Clone(shown), Found: total, Created: len(mine), Conditions: complete(f.object, dropped, total-len(shown), limit-len(mine) <= 0 && spec.Mode == v1alpha1.DiscoveryCreate, now)}
		todo = append(todo, task{"status of DeviceDiscovery " + key(ref), func(ctx context.Context) error {
			err := d.patchDiscovery(ctx, ref, f.object.UID, st)
			if err == nil || apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
				d.mu.Lock()
				f.sum = sum
				d.mu.Unlock()
				return nil
			}
			return err
		}})
	} else if sum == f.sum {
		f.dirty = false
	}
	return todo
}

// wants tells whether a candidate passes Match, then Block.
func (f *discovery) wants(c *v1alpha1.Candidate) bool {
	any := func(patterns []string, text string) bool {
		return slices.ContainsFunc(patterns, func(p string) bool { return glob(p, text) })
	}
	for attribute, patterns := range f.object.Spec.Match {
		if !any(patterns, c.Attributes[attribute]) {
			return false
		}
	}
	for attribute, patterns := range f.object.Spec.Block {
		if text, ok := c.Attributes[attribute]; ok && any(patterns, text) {
			return false
		}
	}
	return true
}

// glob matches a pattern in which * stands for any text.
func glob(pattern, text string) bool {
	parts := strings.Split(pattern, "*")
	if len(parts) == 1 {
		return pattern == text
	}
	rest, ok := strings.CutPrefix(text, parts[0])
	if !ok {
		return false
	}
	for _, part := range parts[1 : len(parts)-1] {
		i := strings.Index(rest, part)
		if i < 0 {
			return false
		}
		rest = rest[i+len(part):]
	}
	return strings.HasSuffix(rest, parts[len(parts)-1])
}

// madeByLocked are the Devices that the discovery made.
func (d *Devices) madeByLocked(o *v1alpha1.DeviceDiscovery) []*twin {
	var out []*twin
	for ref, tw := range d.twins {
		if ref.Namespace == o.Namespace && tw.device.Labels[LabelDiscovery] == o.Name && tw.device.Annotations[AnnotationDiscovery] == string(o.UID) {
			out = append(out, tw)
		}
	}
	slices.SortFunc(out, func(a, b *twin) int { return strings.Compare(a.ref.Name, b.ref.Name) })
	return out
}

// sumOf tells two statuses of a discovery apart. That a candidate was seen
// again counts only after a while.
func sumOf(list []v1alpha1.Candidate, total, dropped, made int, generation int64) string {
	var b strings.Builder
	fmt.Fprint(&b, total, dropped, made, generation)
	for i := range list {
		c := list[i]
		c.LastSeen = metav1.NewTime(c.LastSeen.Truncate(seenStep))
		line, err := json.Marshal(c)
		if err != nil {
			line = []byte(err.Error())
		}
		b.Write(line)
	}
	return b.String()
}

// complete is the condition that tells whether all that was found is shown.
func complete(o *v1alpha1.DeviceDiscovery, dropped, hidden int, full bool, now time.Time) []metav1.Condition {
	c := metav1.Condition{Type: "Complete", Status: metav1.ConditionTrue, Reason: "Complete", ObservedGeneration: o.Generation, LastTransitionTime: metav1.NewTime(now.Truncate(time.Second))}
	switch {
	case full:
		c.Status, c.Reason, c.Message = metav1.ConditionFalse, "MaxDevices", "limits.maxDevices Devices are there: no more are made"
	case dropped+hidden > 0:
		c.Status, c.Reason, c.Message = metav1.ConditionFalse, "TooMany", fmt.Sprintf("%d candidates are not shown; narrow match", dropped+hidden)
	}
	for _, was := range o.Status.Conditions {
		if was.Type == c.Type && was.Status == c.Status {
			c.LastTransitionTime = was.LastTransitionTime
		}
	}
	return []metav1.Condition{c}
}

func (d *Devices) create(ctx context.Context, o *v1alpha1.DeviceDiscovery, c v1alpha1.Candidate) error {
	dev := &v1alpha1.Device{
		TypeMeta:   metav1.TypeMeta{APIVersion: v1alpha1.GroupAndVer, Kind: "Device"},
		ObjectMeta: metav1.ObjectMeta{Namespace: o.Namespace, Name: c.Name, Labels: maps.Clone(o.Spec.Template.Labels), Annotations: map[string]string{AnnotationDiscovery: string(o.UID)}},
		Spec:       v1alpha1.DeviceSpec{ModelRef: o.Spec.Template.ModelRef, NodeName: c.Node, Params: c.Params},
	}
	if dev.Labels == nil {
		dev.Labels = map[string]string{}
	}
	dev.Labels[LabelDiscovery] = o.Name
	u, err := toUnstructured(dev)
	if err != nil {
		return err
	}
	_, err = d.cfg.Dynamic.Resource(v1alpha1.Resource(v1alpha1.Devices)).Namespace(o.Namespace).Create(ctx, u, metav1.CreateOptions{FieldManager: manager})
	switch {
	case apierrors.IsAlreadyExists(err):
		return nil
	case err == nil:
		d.created.Add(1)
		d.log.Info("device made of what was discovered", "device", o.Namespace+"/"+c.Name, "node", c.Node, "discovery", o.Name)
	}
	return err
}

func (d *Devices) remove(ctx context.Context, tw *twin) error {
	uid, rv := tw.device.UID, tw.device.ResourceVersion
	err := d.cfg.Dynamic.Resource(v1alpha1.Resource(v1alpha1.Devices)).Namespace(tw.ref.Namespace).Delete(ctx, tw.ref.Name,
		metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid, ResourceVersion: &rv}})
	if err == nil {
		d.deleted.Add(1)
		d.log.Info("discovered device deleted: it has been absent for long", "device", key(tw.ref))
	}
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil // changed meanwhile: looked at again
	}
	return err
}

func toUnstructured(o any) (*unstructured.Unstructured, error) {
	b, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	u := &unstructured.Unstructured{}
	return u, u.UnmarshalJSON(b)
}

func (d *Devices) patchDiscovery(ctx context.Context, ref edgeapi.DeviceRef, uid types.UID, st v1alpha1.DeviceDiscoveryStatus) error {
	fields, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&st)
	if err != nil {
		return err
	}
	for _, name := range []string{"candidates", "found", "created", "conditions"} {
		if _, ok := fields[name]; !ok {
			fields[name] = nil
		}
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"uid": uid}, "status": fields})
	if err != nil {
		return err
	}
	_, err = d.cfg.Dynamic.Resource(v1alpha1.Resource(v1alpha1.Discoveries)).Namespace(ref.Namespace).
		Patch(ctx, ref.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: manager}, "status")
	return err
}
