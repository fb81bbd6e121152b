package devices

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

const (
	// maxStatusValue is the longest value that a status carries.
	maxStatusValue = 256

	// maxSummary is how much of the values kubectl get shows.
	maxSummary = 60

	// seenFactor: that a device was seen again, and nothing else, is written
	// once in so many intervals.
	seenFactor = 10

	statusWriters = 8
	writeTimeout  = 30 * time.Second

	// awayAfter is how long a node must be away for its devices' statuses to
	// say so, and graceAfterStart how long it may take to come after the hub's
	// own start. See package presence.
	awayAfter       = 10 * time.Second
	graceAfterStart = 90 * time.Second
	lookEvery       = time.Second
)

// connectivity is what a status says of the node.
type connectivity int

const (
	notTold connectivity = iota
	connected
	away
)

// told is what the status of a device says.
type told struct {
	conditions []metav1.Condition
	nodeAway   connectivity
	sum        [sha256.Size]byte // of all but times and versions; zero: not known
	at         time.Time         // of the last write
	seen       int64             // Unix milliseconds
	moved      bool              // the Device was another node's since the hub started: its older status does not count
}

// take is what the API server had when the hub came to know the device.
func (t *told) take(s v1alpha1.DeviceStatus) {
	t.conditions, t.sum = s.Conditions, significant(s)
	if s.LastSeenTime != nil {
		t.seen = s.LastSeenTime.UnixMilli()
	}
	for _, c := range s.Conditions {
		if c.Type == v1alpha1.ConditionNodeConnected {
			t.nodeAway = away
			if c.Status == metav1.ConditionTrue {
				t.nodeAway = connected
			}
		}
	}
}

// writeStatuses writes statuses until ctx ends.
func (d *Devices) writeStatuses(ctx context.Context) {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(statusWriters)
	tick := time.NewTimer(0)
	defer tick.Stop()
	for {
		if d.limit.Wait(ctx) != nil {
			break
		}
		w, wait := d.nextStatus(time.Now())
		if w == nil {
			// A transition is due debounce after it was told, so looking this
			// often misses none.
			if wait <= 0 || wait > debounce/4 {
				wait = debounce / 4
			}
			tick.Reset(wait)
			select {
			case <-ctx.Done():
			case <-tick.C:
			}
			continue
		}
		g.Go(func() error {
			d.writeStatus(ctx, w)
			return nil
		})
	}
	_ = g.Wait()
}

// statusWrite is one status on its way.
type statusWrite struct {
	ref    edgeapi.DeviceRef
	uid    types.UID
	status v1alpha1.DeviceStatus
	told   told // once it is written
	urgent bool
}

// nextStatus returns the status that is to be written now, or how long to wait.
// Those that need no write it passes over.
func (d *Devices) nextStatus(now time.Time) (*statusWrite, time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for {
		ref, urgent, ok, wait := d.status.next(now)
		if !ok {
			return nil, wait
		}
		tw := d.twins[ref]
		if tw == nil {
			d.status.forget(ref)
			continue
		}
		if d.newerToldLocked(tw) {
			d.status.wrote(ref, now, urgent, false)
			continue
		}
		status, next := d.composeLocked(tw, now)
		onlySeen := next.sum == tw.told.sum
		if onlySeen && (next.seen == tw.told.seen || now.Sub(tw.told.at) < seenFactor*d.status.interval()) {
			d.unchanged.Add(1)
			d.status.wrote(ref, now, urgent, false)
			if next.seen != tw.told.seen {
				// Nothing may come any more that would have it looked at.
				d.status.changed(ref, now)
				d.status.delay(ref, tw.told.at.Add(seenFactor*d.status.interval()))
			}
			continue
		}
		return &statusWrite{ref: ref, uid: tw.device.UID, status: status, told: next, urgent: urgent}, 0
	}
}

// newerToldLocked tells whether another replica of the hub has written what the
// node said later: this one's tunnel is then a remnant, and is silent.
func (d *Devices) newerToldLocked(tw *twin) bool {
	there, err := v1alpha1.ParseVersion(tw.device.Status.ReportedVersion)
	if err != nil || tw.version.IsZero() || there.Incarnation != tw.version.Incarnation {
		return false
	}
	n := d.nodes[tw.device.Spec.NodeName]
	return there.Compare(tw.version) > 0 && (n == nil || n.session == nil || n.session.sameLife(there))
}

func (d *Devices) writeStatus(ctx context.Context, w *statusWrite) {
	err := d.patchStatus(ctx, w)
	now := time.Now()
	d.mu.Lock()
	defer d.mu.Unlock()
	tw := d.twins[w.ref]
	switch {
	case ctx.Err() != nil:
	case err == nil:
		d.writes.Add(1)
		if w.urgent {
			d.urgentWrites.Add(1)
		}
		d.status.wrote(w.ref, now, w.urgent, true)
		if tw != nil && tw.device.UID == w.uid {
			moved := tw.told.moved
			tw.told = w.told
			tw.told.at, tw.told.moved = now, moved
		}
	case apierrors.IsNotFound(err), apierrors.IsConflict(err):
		// It is no more, or another of that name: the informer tells.
		d.status.wrote(w.ref, now, w.urgent, true)
	default:
		d.failedWrites.Add(1)
		d.status.failedWrite(w.ref, now)
		d.log.Warn("the status of a device could not be written; it is tried again", "device", w.ref.Namespace+"/"+w.ref.Name, "err", err)
	}
}

// patchStatus replaces the whole status of the very Device that it is of.
func (d *Devices) patchStatus(ctx context.Context, w *statusWrite) error {
	b, err := json.Marshal(w.status)
	if err != nil {
		return fmt.Errorf("encode: %w", err)
	}
	fields := map[string]any{}
	if err := json.Unmarshal(b, &fields); err != nil {
		return fmt.Errorf("encode: %w", err)
	}
	// What is not there any more has to be named to go.
	for _, name := range statusFields {
		if _, ok := fields[name]; !ok {
			fields[name] = nil
		}
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"uid": w.uid}, "status": fields})
	if err != nil {
		return fmt.Errorf("encode: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	_, err = d.cfg.Dynamic.Resource(v1alpha1.Resource(v1alpha1.Devices)).Namespace(w.ref.Namespace).
		Patch(ctx, w.ref.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: manager}, "status")
	return err
}

var statusFields = []string{
	"observedGeneration", "reportedVersion", "phase", "phaseReason", "summary", "lastSeenTime", "conditions", "properties", "overrides",
}

// composeLocked makes a device's status of what is known.
func (d *Devices) composeLocked(tw *twin, now time.Time) (v1alpha1.DeviceStatus, told) {
	var st v1alpha1.DeviceStatus
	if !tw.told.moved {
		st = *tw.device.Status.DeepCopy() // what was known before the hub started
	}
	m := d.models[tw.device.Spec.ModelRef.Name]
	n := d.nodes[tw.device.Spec.NodeName]
	next := told{nodeAway: connected, seen: tw.told.seen, conditions: tw.told.conditions}
	if tw.told.moved && tw.state == nil {
		next.seen = 0
	}
	if n == nil || n.session == nil {
		next.nodeAway = away
		if tw.told.nodeAway == connected && (n == nil || !n.away) && tw.device.Spec.NodeName != "" {
			next.nodeAway = connected // not for long enough to tell
		}
	}
	if s := tw.state; s != nil {
		st.ObservedGeneration = s.ObservedGeneration
		st.Phase, st.PhaseReason = s.Phase, s.Reason
		if s.LastSeen != 0 {
			next.seen = s.LastSeen
		}
		st.Overrides = overrides(s.Overrides)
		st.ReportedVersion = tw.version.String()
	}
	if next.nodeAway == away {
		st.Phase, st.PhaseReason = v1alpha1.PhaseUnknown, "NodeNotConnected"
		if tw.device.Spec.NodeName == "" {
			st.PhaseReason = "NoNode"
		}
	} else if tw.state == nil && st.Phase == "" {
		st.Phase, st.PhaseReason = v1alpha1.PhaseUnknown, "NotReported"
	}
	st.LastSeenTime = microTime(next.seen)
	if tw.state != nil || len(tw.values) > 0 {
		st.Properties = d.properties(tw, m)
		st.Summary = summary(m, tw)
	}
	d.conditionsLocked(tw, m, &next, now)
	st.Conditions = next.conditions
	next.sum = significant(st)
	return st, next
}

func overrides(all []edgeapi.TwinOverride) []v1alpha1.OverrideStatus {
	var out []v1alpha1.OverrideStatus
	for _, o := range all {
		out = append(out, v1alpha1.OverrideStatus{
			Name: o.Property, Value: v1alpha1.JSON{Raw: short(o.Value)}, By: o.By, BaseGen: o.BaseGen,
			Since: metav1.MicroTime{Time: milli(o.Since)}, Expires: metav1.MicroTime{Time: milli(o.Expires)},
		})
	}
	slices.SortFunc(out, func(a, b v1alpha1.OverrideStatus) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// short is a desired value as a status carries it: whole, or the beginning of
// its text.
func short(v json.RawMessage) json.RawMessage {
	if len(v) > 0 && len(v) <= maxStatusValue {
		return v
	}
	b, err := json.Marshal(strings.ToValidUTF8(string(v[:min(len(v), maxStatusValue)]), "") + "…")
	if err != nil {
		return json.RawMessage(`""`)
	}
	return b
}

// properties are those that the model has in the status, in the model's order.
func (d *Devices) properties(tw *twin, m *model) []v1alpha1.PropertyStatus {
	names := slices.Sorted(maps.Keys(tw.values))
	if m != nil {
		names = names[:0]
		for i := range m.object.Spec.Properties {
			p := &m.object.Spec.Properties[i]
			if p.Report.Status == nil || *p.Report.Status {
				names = append(names, p.Name)
			}
		}
	}
	var out []v1alpha1.PropertyStatus
	for _, name := range names {
		r := tw.values[name]
		p := v1alpha1.PropertyStatus{Name: name}
		if r != nil {
			p.Quality, p.Message = d.nodes[tw.device.Spec.NodeName].quality(r), r.message
			ts := r.ts
			if ts == 0 {
				ts = r.rx
			}
			p.TS = microTime(ts)
			if len(r.value) > maxStatusValue {
				p.Truncated = true
				p.Value = truncated(r.value)
			} else if len(r.value) > 0 {
				p.Value = &v1alpha1.JSON{Raw: r.value}
			}
		}
		if tw.state != nil {
			if want, ok := tw.state.Desired[name]; ok {
				p.DesiredState = want.State
				if want.Message != "" {
					p.Message = want.Message
				}
			}
		}
		if err := tw.bad[name]; err != nil {
			p.DesiredState, p.Message = v1alpha1.DesiredInvalid, err.Error()
		}
		if r != nil || p.DesiredState != "" {
			out = append(out, p)
		}
	}
	return out
}

// truncated is the beginning of a string; of another value nothing is left.
func truncated(v json.RawMessage) *v1alpha1.JSON {
	var s string
	if json.Unmarshal(v, &s) != nil {
		return nil
	}
	b, err := json.Marshal(strings.ToValidUTF8(s[:min(len(s), maxStatusValue)], ""))
	if err != nil {
		return nil
	}
	return &v1alpha1.JSON{Raw: b}
}

// summary is what kubectl get shows of the values: the first ones of the model.
func summary(m *model, tw *twin) string {
	if m == nil {
		return ""
	}
	var b strings.Builder
	for i := range m.object.Spec.Properties {
		p := &m.object.Spec.Properties[i]
		r := tw.values[p.Name]
		if r == nil || p.Report.Status != nil && !*p.Report.Status || p.Type == v1alpha1.TypeObject || p.Type == v1alpha1.TypeBytes {
			continue
		}
		text := string(r.value)
		var s string
		if json.Unmarshal(r.value, &s) == nil {
			text = s
		}
		if p.Type == v1alpha1.TypeFloat64 {
			if f, err := strconv.ParseFloat(text, 64); err == nil {
				text = strconv.FormatFloat(f, 'g', 5, 64)
			}
		}
		item := p.Name + "=" + text
		if p.Unit != "" && p.Unit != "1" {
			item += p.Unit
		}
		if b.Len() > 0 {
			item = " " + item
		}
		if b.Len()+len(item) > maxSummary {
			break
		}
		b.WriteString(item)
	}
	return b.String()
}

// conditionsLocked brings next.conditions up to date. Those of others stay.
func (d *Devices) conditionsLocked(tw *twin, m *model, next *told, now time.Time) {
	next.conditions = slices.Clone(next.conditions)
	set := func(kind string, status bool, reason, message string) {
		c := metav1.Condition{
			Type: kind, Status: metav1.ConditionFalse, Reason: reason, Message: message,
			ObservedGeneration: tw.device.Generation, LastTransitionTime: metav1.NewTime(now.Truncate(time.Second)),
		}
		if status {
			c.Status = metav1.ConditionTrue
		}
		i := slices.IndexFunc(next.conditions, func(o metav1.Condition) bool { return o.Type == kind })
		if i < 0 {
			next.conditions = append(next.conditions, c)
			return
		}
		if next.conditions[i].Status == c.Status {
			c.LastTransitionTime = next.conditions[i].LastTransitionTime
		}
		next.conditions[i] = c
	}
	node := tw.device.Spec.NodeName
	switch {
	case node == "":
		set(v1alpha1.ConditionNodeConnected, false, "NoNode", "spec.nodeName is empty: no node serves this device")
	case next.nodeAway == connected:
		set(v1alpha1.ConditionNodeConnected, true, "Connected", "")
	default:
		set(v1alpha1.ConditionNodeConnected, false, "NodeNotConnected", "node "+node+" is not connected; values are the last that it told")
	}
	switch {
	case m == nil:
		set(v1alpha1.ConditionDesiredValid, false, "NoModel", "there is no DeviceModel "+tw.device.Spec.ModelRef.Name)
	case len(tw.bad) > 0:
		var all []string
		for _, p := range slices.Sorted(maps.Keys(tw.bad)) {
			all = append(all, p+": "+tw.bad[p].Error())
		}
		text := strings.Join(all, "; ")
		set(v1alpha1.ConditionDesiredValid, false, "Invalid", text[:min(len(text), 1024)])
	default:
		set(v1alpha1.ConditionDesiredValid, true, "Valid", "")
	}
	status, reason, message := synced(tw, next.nodeAway == connected)
	set(v1alpha1.ConditionDesiredSynced, status, reason, message)
}

// synced tells whether the device has all that is desired of it and can be.
func synced(tw *twin, nodeConnected bool) (bool, string, string) {
	if len(tw.device.Spec.Desired) == 0 {
		return true, "NothingDesired", ""
	}
	// Not "before": a cluster that was restored is at an older generation.
	if tw.state == nil || tw.state.ObservedGeneration != tw.device.Generation {
		if !nodeConnected {
			return false, "NodeNotConnected", "the node does not know yet what is desired"
		}
		return false, "Pending", "the node has not confirmed this generation yet"
	}
	// The state that is worst says most.
	worst, at := "", -1
	order := []string{
		v1alpha1.DesiredPending, v1alpha1.DesiredSent, v1alpha1.DesiredOverridden, v1alpha1.DesiredTimeout, v1alpha1.DesiredRejected, v1alpha1.DesiredInvalid,
	}
	var names []string
	for _, p := range slices.Sorted(maps.Keys(tw.device.Spec.Desired)) {
		state := v1alpha1.DesiredPending
		if s, ok := tw.state.Desired[p]; ok {
			state = s.State
		}
		if tw.bad[p] != nil {
			state = v1alpha1.DesiredInvalid
		}
		if state == v1alpha1.DesiredApplied {
			continue
		}
		i := slices.Index(order, state)
		switch {
		case i > at:
			worst, at, names = state, i, []string{p}
		case i == at:
			names = append(names, p)
		}
	}
	if worst == "" {
		return true, "Applied", ""
	}
	message := strings.Join(names, ", ")
	if s, ok := tw.state.Desired[names[0]]; ok && s.Message != "" {
		message += ": " + s.Message
	}
	return false, strings.ToUpper(worst[:1]) + worst[1:], message[:min(len(message), 1024)]
}

// significant is a digest of what a status says, without times and versions: a
// device that says the same again is no reason to write.
func significant(st v1alpha1.DeviceStatus) [sha256.Size]byte {
	st = *st.DeepCopy()
	st.LastSeenTime, st.ReportedVersion = nil, ""
	for i := range st.Properties {
		st.Properties[i].TS = nil
	}
	b, err := json.Marshal(st)
	if err != nil {
		return sha256.Sum256([]byte(err.Error()))
	}
	return sha256.Sum256(b)
}

// watchNodes tells of nodes that stay away on the statuses of their devices.
func (d *Devices) watchNodes(ctx context.Context) {
	started := time.Now()
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			d.lookAtNodes(started, now)
		}
	}
}

func (d *Devices) lookAtNodes(started, now time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, n := range d.nodes {
		if n.session != nil || n.away || now.Sub(n.since) < awayAfter || now.Sub(started) < graceAfterStart {
			continue
		}
		n.away = true
		for _, tw := range n.twins {
			d.status.transition(tw.ref, now)
			d.changedLocked(tw)
		}
	}
}
