package devices

import (
	"container/list"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/value"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// Bounds of what nodes can make the hub hold.
const (
	maxProperties = 256      // of a device
	maxValueBytes = 64 << 10 // of one value
	maxNodeBytes  = 64 << 20 // of all live values of a node
	maxNameBytes  = 128      // of a property
	maxMessage    = 512      // why a value is bad

	readingBytes = 160 // about what a reading takes besides its value

	// maxGone is how many deletions a watch can resume over.
	maxGone = 4096
)

// twin is one Device and what its node last said of it. Fields are guarded by
// Devices.mu; device, state and readings are replaced and never changed.
type twin struct {
	ref    edgeapi.DeviceRef
	device *v1alpha1.Device
	bad    map[string]error // desired values that the model does not allow
	noted  int64            // generation that bad is of

	values  map[string]*reading
	state   *edgeapi.TwinState // nil: nothing heard since the hub started
	version v1alpha1.Version   // the latest of state and values
	changed map[string]int64   // by property, the generation that changed what is desired of it, since first
	first   int64              // generation that the hub knew first

	number  uint64 // of its latest change
	at      *list.Element
	deleted bool

	told told // what its status says
}

// reading is one live value.
type reading struct {
	value   json.RawMessage
	ts, rx  int64 // Unix milliseconds
	quality string
	version v1alpha1.Version
	message string
}

func (r *reading) size() int { return readingBytes + len(r.value) + len(r.message) }

func (r *reading) wire(ref edgeapi.DeviceRef, property string) edgeapi.TwinValue {
	return edgeapi.TwinValue{
		Device: ref, Property: property, Value: r.value, TS: r.ts, Received: r.rx,
		Quality: r.quality, Version: r.version.String(), Message: r.message,
	}
}

// model is a DeviceModel made ready for questions.
type model struct {
	object     *v1alpha1.DeviceModel
	properties map[string]*v1alpha1.Property
}

func (d *Devices) setModel(m *v1alpha1.DeviceModel) {
	ready := &model{object: m, properties: make(map[string]*v1alpha1.Property, len(m.Spec.Properties))}
	for i := range m.Spec.Properties {
		ready.properties[m.Spec.Properties[i].Name] = &m.Spec.Properties[i]
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.models[m.Name] = ready
	d.modelChangedLocked(m.Name)
}

func (d *Devices) dropModel(m *v1alpha1.DeviceModel) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.models, m.Name)
	d.modelChangedLocked(m.Name)
}

func (d *Devices) modelChangedLocked(name string) {
	for _, tw := range d.twins {
		if tw.device.Spec.ModelRef.Name == name {
			d.judgeLocked(tw)
			d.changedLocked(tw)
			d.status.transition(tw.ref, time.Now())
		}
	}
}

// judgeLocked finds what the model does not allow of what is desired.
func (d *Devices) judgeLocked(tw *twin) {
	tw.bad, tw.noted = nil, tw.device.Generation
	if m := d.models[tw.device.Spec.ModelRef.Name]; m != nil {
		tw.bad = value.CheckDesired(m.object, tw.device.Spec.Desired)
	}
}

// setDevice takes a Device as the API server has it.
func (d *Devices) setDevice(dev *v1alpha1.Device) {
	now := time.Now()
	ref := refOf(dev.Namespace, dev.Name)
	d.mu.Lock()
	defer d.mu.Unlock()
	tw := d.twins[ref]
	if tw != nil && tw.device.UID != dev.UID {
		d.removeLocked(tw) // of a Device made anew nothing is known
		tw = nil
	}
	fresh := tw == nil
	if fresh {
		tw = &twin{ref: ref, device: dev, values: map[string]*reading{}, changed: map[string]int64{}, first: dev.Generation}
		tw.told.take(dev.Status)
		d.twins[ref] = tw
		d.nodeLocked(dev.Spec.NodeName).twins[ref] = tw
	}
	was := tw.device
	tw.device = dev
	if was.Spec.NodeName != dev.Spec.NodeName {
		d.forgetLocked(d.nodeLocked(was.Spec.NodeName), tw)
		d.nodeLocked(dev.Spec.NodeName).twins[ref] = tw
		tw.told.moved = true
	}
	switch {
	case fresh, was.Generation != dev.Generation, was.Spec.NodeName != dev.Spec.NodeName:
		for _, p := range changedDesired(was.Spec.Desired, dev.Spec.Desired) {
			tw.changed[p] = dev.Generation
		}
		d.judgeLocked(tw)
		d.changedLocked(tw)
		d.status.transition(ref, now)
	case !maps.Equal(was.Labels, dev.Labels):
		d.changedLocked(tw)
	}
	if s := d.nodeLocked(dev.Spec.NodeName).session; s != nil {
		s.askForLocked(ref)
	}
}

func changedDesired(was, now map[string]v1alpha1.JSON) []string {
	var out []string
	for p, v := range now {
		if old, ok := was[p]; !ok || !slices.Equal(old.Raw, v.Raw) {
			out = append(out, p)
		}
	}
	for p := range was {
		if _, ok := now[p]; !ok {
			out = append(out, p)
		}
	}
	return out
}

func (d *Devices) dropDevice(dev *v1alpha1.Device) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if tw := d.twins[refOf(dev.Namespace, dev.Name)]; tw != nil && tw.device.UID == dev.UID {
		d.removeLocked(tw)
	}
}

// removeLocked takes a Device that is no more out, and leaves its deletion for
// those who watch.
func (d *Devices) removeLocked(tw *twin) {
	d.forgetLocked(d.nodeLocked(tw.device.Spec.NodeName), tw)
	delete(d.twins, tw.ref)
	d.status.forget(tw.ref)
	tw.deleted = true
	d.changedLocked(tw)
	d.gone = append(d.gone, tw)
	if len(d.gone) > maxGone {
		oldest := d.gone[0]
		d.gone = slices.Delete(d.gone, 0, 1)
		d.horizon = max(d.horizon, oldest.number)
		d.order.Remove(oldest.at)
	}
}

// forgetLocked drops what a node said of the device.
func (d *Devices) forgetLocked(n *node, tw *twin) {
	for _, r := range tw.values {
		n.bytes -= r.size()
	}
	delete(n.twins, tw.ref)
	tw.values, tw.state, tw.version = map[string]*reading{}, nil, v1alpha1.Version{}
	if n.session != nil {
		delete(n.session.uids, tw.ref)
	} else if len(n.twins) == 0 {
		for name, other := range d.nodes {
			if other == n {
				delete(d.nodes, name)
			}
		}
	}
}

// changedLocked puts the twin last in the order of changes and wakes whoever
// watches.
func (d *Devices) changedLocked(tw *twin) {
	d.change++
	tw.number = d.change
	if tw.at == nil {
		tw.at = d.order.PushBack(tw)
	} else {
		d.order.MoveToBack(tw.at)
	}
	if d.watchers > 0 {
		close(d.news)
		d.news = make(chan struct{})
	}
}

// errReplaced ends a conversation whose node has a newer one.
var errReplaced = errors.New("a newer tunnel of this node took over")

// takeFrame takes what a node says is so. It returns the values of which the
// hub knows a newer one.
func (d *Devices) takeFrame(s *session, f edgeapi.TwinFrame) ([]edgeapi.TwinValue, error) {
	now := time.Now()
	d.frames.Add(1)
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.nodes[s.node]
	if n == nil || n.session != s {
		return nil, errReplaced
	}
	for i := range f.States {
		if err := d.takeStateLocked(n, &f.States[i], now); err != nil {
			return nil, err
		}
	}
	var newer []edgeapi.TwinValue
	for i := range f.Values {
		known, err := d.takeValueLocked(n, &f.Values[i], now)
		if err != nil {
			return nil, err
		}
		if known != nil {
			newer = append(newer, *known)
		}
	}
	return newer, nil
}

// ownLocked returns the twin if it is the node's to tell of.
func (d *Devices) ownLocked(n *node, ref edgeapi.DeviceRef) *twin {
	tw := n.twins[ref]
	if tw == nil || tw.deleted {
		d.refused.Add(1)
		n.session.refuse(ref)
		return nil
	}
	return tw
}

func (d *Devices) takeStateLocked(n *node, st *edgeapi.TwinState, now time.Time) error {
	tw := d.ownLocked(n, st.Device)
	if tw == nil {
		return nil
	}
	if st.UID != string(tw.device.UID) {
		d.refused.Add(1)
		n.session.refuse(st.Device)
		delete(n.session.uids, st.Device)
		return nil
	}
	n.session.uids[tw.ref] = st.UID
	version, err := v1alpha1.ParseVersion(st.Version)
	if err != nil {
		return fmt.Errorf("state of %s/%s: %w", st.Device.Namespace, st.Device.Name, err)
	}
	if len(st.Desired) > maxProperties || len(st.Overrides) > maxProperties {
		return fmt.Errorf("state of %s/%s tells of more than %d properties", st.Device.Namespace, st.Device.Name, maxProperties)
	}
	old := tw.state
	if old != nil && n.session.sameLife(tw.version) {
		if was, err := v1alpha1.ParseVersion(old.Version); err == nil && was.Incarnation == version.Incarnation && version.Compare(was) < 0 {
			d.older.Add(1)
			return nil
		}
	}
	kept := *st
	tw.state = &kept
	tw.seenLocked(n, version)
	if old == nil || old.Phase != st.Phase || old.Reason != st.Reason || old.ObservedGeneration != st.ObservedGeneration ||
		!reflect.DeepEqual(old.Desired, st.Desired) || !reflect.DeepEqual(old.Overrides, st.Overrides) {
		d.status.transition(tw.ref, now)
		d.changedLocked(tw)
		d.promoteLocked(tw)
		return nil
	}
	d.status.changed(tw.ref, now)
	return nil
}

func (tw *twin) seenLocked(n *node, v v1alpha1.Version) {
	if v.Supersedes(tw.version) || !n.session.sameLife(tw.version) {
		tw.version = v
	}
}

func (d *Devices) takeValueLocked(n *node, v *edgeapi.TwinValue, now time.Time) (*edgeapi.TwinValue, error) {
	tw := d.ownLocked(n, v.Device)
	if tw == nil {
		return nil, nil
	}
	if n.session.uids[tw.ref] != string(tw.device.UID) {
		d.refused.Add(1) // said of a namesake, as far as is known
		n.session.refuse(tw.ref)
		return nil, nil
	}
	version, err := v1alpha1.ParseVersion(v.Version)
	if err != nil {
		return nil, fmt.Errorf("value of %s/%s: %w", v.Device.Namespace, v.Device.Name, err)
	}
	m := d.models[tw.device.Spec.ModelRef.Name]
	var property *v1alpha1.Property
	if m != nil {
		property = m.properties[v.Property]
	}
	was := tw.values[v.Property]
	name := v.Property
	switch {
	case m != nil && property == nil, len(v.Property) > maxNameBytes, len(v.Value) > maxValueBytes,
		was == nil && len(tw.values) >= maxProperties:
		d.refused.Add(1)
		return nil, nil
	case property != nil:
		name = property.Name // one string for all devices of the model
	}
	if was != nil && was.version.Incarnation == version.Incarnation && n.session.sameLife(was.version) {
		if c := version.Compare(was.version); c <= 0 {
			d.older.Add(1)
			if c == 0 {
				return nil, nil
			}
			known := was.wire(tw.ref, name)
			return &known, nil
		}
	}
	if len(v.Message) > maxMessage {
		v.Message = v.Message[:maxMessage]
	}
	r := &reading{value: v.Value, ts: v.TS, rx: v.Received, quality: quality(v.Quality), version: version, message: v.Message}
	if r.version.Incarnation == n.session.hello.Incarnation {
		r.version.Incarnation = n.session.hello.Incarnation
	}
	grown := r.size()
	if was != nil {
		grown -= was.size()
	}
	if grown > 0 && n.bytes+grown > maxNodeBytes {
		d.refused.Add(1)
		return nil, nil
	}
	n.bytes += grown
	tw.values[name] = r
	tw.seenLocked(n, version)
	d.values.Add(1)
	d.changedLocked(tw)
	if d.alarming(tw, property, was, r) {
		d.status.transition(tw.ref, now)
	} else {
		d.status.changed(tw.ref, now)
	}
	return nil, nil
}

// quality returns one of the constants, so that a million values share four
// strings.
func quality(q string) string {
	for _, known := range []string{v1alpha1.QualityGood, v1alpha1.QualityUncertain, v1alpha1.QualityStale, v1alpha1.QualityBad} {
		if q == known {
			return known
		}
	}
	return v1alpha1.QualityUncertain
}

// alarming tells whether a value is worth a status soon: it turned bad or good
// again, or its route is for alarms.
func (d *Devices) alarming(tw *twin, p *v1alpha1.Property, was, now *reading) bool {
	if was == nil || (was.quality == v1alpha1.QualityBad) != (now.quality == v1alpha1.QualityBad) {
		return true
	}
	if p == nil || p.Telemetry == "" || slices.Equal(was.value, now.value) {
		return false
	}
	obj, ok, err := d.cfg.Routes.GetIndexer().GetByKey(tw.ref.Namespace + "/" + p.Telemetry)
	if err != nil || !ok {
		return false
	}
	r, ok := obj.(*v1alpha1.TelemetryRoute)
	return ok && r.Spec.Lane == "alarm"
}

// milli is a time of the wire; zero for none.
func milli(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms).UTC()
}

func microTime(ms int64) *metav1.MicroTime {
	if ms == 0 {
		return nil
	}
	return &metav1.MicroTime{Time: milli(ms)}
}
