package profile

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/mqtt"
)

// kubeedge answers on KubeEdge's topics as its edgecore does, so that MQTT
// clients written for it work unchanged:
//
//	$hw/events/device/<id>/twin/update     → …/result, …/document, …/delta
//	$hw/events/device/<id>/twin/get        → …/result
//	$hw/events/device/<id>/state/update    → …/result
//	$hw/events/node/<node>/membership/get  → …/result
//
// <id> is namespace/name; in the namespace default also the name alone. actual is a reading; expected is an override of
// what is wanted, under the rules of overrides; what is wanted reaches the
// device as …/twin/update/delta. All values are strings there and are made the
// model's types here. Unlike KubeEdge's, an update does not add properties: the
// model has them.
var kubeedge = profile{
	text: true, ownReads: true, ownWrites: true,
	property: func(c *compiler, p *v1alpha1.Property) error {
		if len(p.Read) == 0 && p.Access != "w" {
			p.Read = []v1alpha1.Read{{}}
		}
		if p.Write == nil && writable(p) {
			p.Write = &v1alpha1.Write{}
		}
		return nil
	},
	attach: attachKubeEdge,
}

const (
	hwDevice = "$hw/events/device/"
	hwNode   = "$hw/events/node/"
)

// What KubeEdge's messages look like, field by field.
type (
	hwBase struct {
		EventID   string `json:"event_id"`
		Timestamp int64  `json:"timestamp"` // Unix milliseconds
	}
	hwError struct {
		hwBase
		Code   int    `json:"code,omitempty"`
		Reason string `json:"reason,omitempty"`
	}
	hwValue struct {
		Value    *string `json:"value,omitempty"`
		Metadata *hwMeta `json:"metadata,omitempty"`
	}
	hwMeta struct {
		Timestamp int64 `json:"timestamp,omitempty"`
	}
	hwType struct {
		Type string `json:"type,omitempty"`
	}
	hwTwin struct {
		Expected *hwValue `json:"expected,omitempty"`
		Actual   *hwValue `json:"actual,omitempty"`
		Optional *bool    `json:"optional,omitempty"`
		Metadata *hwType  `json:"metadata,omitempty"`
	}
	hwTwins struct {
		hwBase
		Twin map[string]*hwTwin `json:"twin"`
	}
	hwDelta struct {
		hwBase
		Twin  map[string]*hwTwin `json:"twin"`
		Delta map[string]string  `json:"delta"`
	}
	hwDocument struct {
		hwBase
		Twin map[string]*hwChange `json:"twin"`
	}
	hwChange struct {
		Last    *hwTwin `json:"last"`
		Current *hwTwin `json:"current"`
	}
	hwThing struct {
		ID          string `json:"id,omitempty"`
		Name        string `json:"name,omitempty"`
		Description string `json:"description,omitempty"`
		State       string `json:"state,omitempty"`
		LastOnline  string `json:"last_online,omitempty"`
	}
	hwState struct {
		hwBase
		Device hwThing `json:"device"`
	}
	hwMembers struct {
		hwBase
		Devices []hwThing `json:"devices"`
	}
	hwMembersChanged struct {
		hwBase
		Added   []hwThing `json:"added_devices"`
		Removed []hwThing `json:"removed_devices"`
	}
)

func hwNow(eventID string) hwBase { return hwBase{eventID, time.Now().UnixMilli()} }

// hwDeviceTwin is a device as KubeEdge's clients see it.
type hwDeviceTwin struct {
	*compiler
	prefixes []string // $hw/events/device/<id>, each way it is called

	mu         sync.Mutex
	own        map[string]hwTwin // what was said last over these topics, which the twins may not show yet
	state      string
	lastOnline string
}

func attachKubeEdge(c *compiler) error {
	dev := c.device
	h := &hwDeviceTwin{compiler: c, own: map[string]hwTwin{}, state: "unknown"}
	ids := []string{dev.key.Namespace + "/" + dev.key.Name}
	if dev.key.Namespace == "default" {
		ids = append(ids, dev.key.Name)
	}
	for _, id := range ids {
		prefix := hwDevice + id
		if err := checkTopic(prefix); err != nil {
			return err
		}
		h.prefixes = append(h.prefixes, prefix)
		c.listen(prefix+"/twin/update", true, func(p *packet, out []devicetwin.Reading) []devicetwin.Reading {
			return h.update(prefix, p, out)
		})
		c.listen(prefix+"/twin/get", true, func(p *packet, out []devicetwin.Reading) []devicetwin.Reading {
			h.get(prefix, p)
			return out
		})
		dev.routes = append(dev.routes, &route{filter: prefix + "/state/update", device: dev, told: true,
			handle: func(p *packet, out []devicetwin.Reading) []devicetwin.Reading {
				h.setState(prefix, p)
				return out
			}})
		for _, answer := range []string{"/twin/update/result", "/twin/update/document", "/twin/update/delta", "/twin/get/result", "/state/update/result"} {
			dev.moreSubscribed = append(dev.moreSubscribed, prefix+answer)
		}
	}
	members := hwNode + c.node + "/membership/get"
	if checkTopic(members) == nil {
		dev.morePublished = append(dev.morePublished, members)
		dev.moreSubscribed = append(dev.moreSubscribed, members+"/result", hwNode+c.node+"/membership/updated")
	}
	dev.hw = h
	dev.ownWrite = h.write
	return nil
}

// update takes a twin/update: all of it, or, if any of it cannot be, none.
func (h *hwDeviceTwin) update(prefix string, p *packet, out []devicetwin.Reading) []devicetwin.Reading {
	if p.Retain {
		return out // it would be wanted anew at every start
	}
	msg, err := decodeHW(p.Payload)
	if err != nil {
		h.refuse(prefix+"/twin/update/result", msg.EventID, 400, err)
		return out
	}
	desired := map[string]any{}
	var readings []devicetwin.Reading
	said := map[string]hwTwin{}
	now := time.Now().UnixMilli()
	for _, key := range slices.Sorted(maps.Keys(msg.Twin)) {
		part := msg.Twin[key]
		prop := h.device.readings[key]
		if prop == nil || part == nil {
			h.refuse(prefix+"/twin/update/result", msg.EventID, 400, fmt.Errorf("twin %q: the device's model decides which there are", key))
			return out
		}
		var one hwTwin
		for _, half := range []struct {
			from *hwValue
			to   **hwValue
			use  func(v any)
		}{
			{part.Actual, &one.Actual, func(v any) {
				r := devicetwin.Reading{Property: key, Value: v}
				if part.Actual.Metadata != nil && part.Actual.Metadata.Timestamp > 0 {
					r.TS = time.UnixMilli(part.Actual.Metadata.Timestamp).UTC()
				}
				readings = append(readings, r)
			}},
			{part.Expected, &one.Expected, func(v any) { desired[key] = v }},
		} {
			if half.from == nil || half.from.Value == nil {
				continue
			}
			var scale *scaling
			if len(prop.reads) > 0 {
				scale = prop.reads[0].scale
			}
			v, err := prop.codec.decode(*half.from.Value, scale)
			if err != nil {
				h.refuse(prefix+"/twin/update/result", msg.EventID, 400, fmt.Errorf("twin %q: %w", key, err))
				return out
			}
			half.use(v)
			text := *half.from.Value
			*half.to = &hwValue{Value: &text, Metadata: &hwMeta{now}}
		}
		said[key] = one
	}
	before := h.view()
	h.driver.job(h.device, func(ctx context.Context) { h.finish(ctx, prefix, msg.EventID, before, said, desired) })
	return append(out, readings...)
}

func decodeHW(payload []byte) (hwTwins, error) {
	var msg hwTwins
	if len(payload) > MaxPayload {
		return msg, errPayloadSize(len(payload))
	}
	if checkDepth(payload) != nil || json.Unmarshal(payload, &msg) != nil {
		return msg, errors.New("Unmarshal update request body failed, please check the request")
	}
	if msg.Twin == nil {
		return msg, errors.New("Update twin error, key:twin does not exist")
	}
	return msg, nil
}

// finish sets what is wanted and tells how it went. It may wait for the twins.
func (h *hwDeviceTwin) finish(ctx context.Context, prefix, eventID string, before map[string]*hwTwin, said map[string]hwTwin, desired map[string]any) {
	if len(desired) > 0 {
		err := errors.New("this node takes no expected values")
		if h.driver.cfg.Twins != nil {
			err = h.driver.cfg.Twins.SetDesired(ctx, h.device.key, desired, "mqtt:$hw")
		}
		if err != nil {
			h.refuse(prefix+"/twin/update/result", eventID, 409, err)
			return
		}
	}
	h.mu.Lock()
	for key, one := range said {
		own := h.own[key]
		if one.Actual != nil {
			own.Actual = one.Actual
		}
		if one.Expected != nil {
			own.Expected = one.Expected
		}
		h.own[key] = own
	}
	h.mu.Unlock()
	after := h.view()
	result := hwTwins{hwNow(eventID), map[string]*hwTwin{}}
	document := hwDocument{hwNow(eventID), map[string]*hwChange{}}
	for key, one := range said {
		one.Optional, one.Metadata = after[key].Optional, after[key].Metadata
		result.Twin[key] = &one
		document.Twin[key] = &hwChange{before[key], after[key]}
	}
	h.say(prefix+"/twin/update/result", result)
	h.say(prefix+"/twin/update/document", document)
	if delta := hwDeltaOf(after); len(delta.Delta) > 0 {
		h.say(prefix+"/twin/update/delta", delta)
	}
}

// view is the twin in KubeEdge's words.
func (h *hwDeviceTwin) view() map[string]*hwTwin {
	out := make(map[string]*hwTwin, len(h.device.readings))
	var views map[string]PropertyView
	if h.driver.cfg.Twins != nil {
		views, _ = h.driver.cfg.Twins.View(h.device.key)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for name, p := range h.device.readings {
		yes := true
		t := &hwTwin{Optional: &yes, Metadata: &hwType{hwTypeOf(p.Type)}}
		v, own := views[name], h.own[name]
		t.Actual = newerHW(hwValueOf(p, v.Reported, v.ReportedAt), own.Actual)
		t.Expected = newerHW(hwValueOf(p, v.Desired, v.DesiredAt), own.Expected)
		out[name] = t
	}
	return out
}

func hwValueOf(p *property, v any, at time.Time) *hwValue {
	if v == nil {
		return nil
	}
	w, err := p.codec.encode(v, nil)
	if err != nil {
		return nil
	}
	out := &hwValue{Value: &w.text, Metadata: &hwMeta{}}
	if !at.IsZero() {
		out.Metadata.Timestamp = at.UnixMilli()
	}
	return out
}

func newerHW(twin, own *hwValue) *hwValue {
	if twin == nil || own != nil && own.Metadata.Timestamp >= twin.Metadata.Timestamp {
		return own
	}
	return twin
}

// hwTypeOf is the name that KubeEdge has for a type.
func hwTypeOf(typ string) string {
	switch typ {
	case v1alpha1.TypeInt64:
		return "int"
	case v1alpha1.TypeFloat64:
		return "float"
	case v1alpha1.TypeBool:
		return "boolean"
	}
	return "string"
}

func hwDeltaOf(twins map[string]*hwTwin) hwDelta {
	d := hwDelta{hwNow(uuid.NewString()), map[string]*hwTwin{}, map[string]string{}}
	for name, t := range twins {
		if t.Expected == nil || *t.Expected.Value == "" {
			continue
		}
		d.Twin[name] = t
		if t.Actual == nil || *t.Actual.Value != *t.Expected.Value {
			d.Delta[name] = *t.Expected.Value
		}
	}
	return d
}

// write tells the device what is wanted of it.
func (h *hwDeviceTwin) write(ctx context.Context, p *property, v any, w devicetwin.WriteRequest) error {
	var scale *scaling
	if len(p.reads) > 0 {
		scale = p.reads[0].scale
	}
	value, err := p.codec.encode(v, scale)
	if err != nil {
		return fmt.Errorf("device %s: property %s: %w", h.device.key, p.Name, err)
	}
	h.mu.Lock()
	own := h.own[p.Name]
	own.Expected = &hwValue{Value: &value.text, Metadata: &hwMeta{time.Now().UnixMilli()}}
	h.own[p.Name] = own
	h.mu.Unlock()
	delta := hwDeltaOf(h.view())
	delta.Delta[p.Name] = value.text
	payload, err := json.Marshal(delta)
	if err != nil {
		return err
	}
	for _, prefix := range h.prefixes {
		m := mqtt.Message{Topic: prefix + "/twin/update/delta", Payload: payload, QoS: 1, Expiry: w.Expires}
		if err := h.driver.publish(ctx, m); err != nil {
			return fmt.Errorf("device %s: property %s: %w", h.device.key, p.Name, err)
		}
	}
	return nil
}

func (h *hwDeviceTwin) get(prefix string, p *packet) {
	if p.Retain {
		return
	}
	var msg hwBase
	if len(p.Payload) > MaxPayload || checkDepth(p.Payload) != nil || json.Unmarshal(p.Payload, &msg) != nil {
		h.refuse(prefix+"/twin/get/result", "", 400, errors.New("Unmarshal twin info failed, please check the request"))
		return
	}
	h.driver.job(h.device, func(context.Context) {
		h.say(prefix+"/twin/get/result", hwTwins{hwNow(msg.EventID), h.view()})
	})
}

func (h *hwDeviceTwin) setState(prefix string, p *packet) {
	var msg struct {
		State string `json:"state"`
	}
	if p.Retain || len(p.Payload) > MaxPayload || checkDepth(p.Payload) != nil || json.Unmarshal(p.Payload, &msg) != nil {
		return
	}
	phase, ok := map[string]string{
		"online": v1alpha1.PhaseOnline, "offline": v1alpha1.PhaseOffline, "unknown": v1alpha1.PhaseUnknown,
	}[strings.ToLower(msg.State)]
	if !ok {
		return // nor does KubeEdge answer
	}
	h.mu.Lock()
	h.state = strings.ToLower(msg.State)
	h.lastOnline = time.Now().Format(time.DateTime)
	thing := h.thingLocked()
	h.mu.Unlock()
	h.driver.sight(h.device, devicetwin.Sighting{Evidence: devicetwin.EvidenceAvailability, State: phase})
	thing.ID = ""
	h.say(prefix+"/state/update/result", hwState{hwNow(uuid.NewString()), thing})
}

func (h *hwDeviceTwin) thing() hwThing {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.thingLocked()
}

func (h *hwDeviceTwin) thingLocked() hwThing {
	return hwThing{ID: h.device.key.String(), Name: h.device.key.Name, State: h.state, LastOnline: h.lastOnline}
}

func (h *hwDeviceTwin) refuse(topic, eventID string, code int, why error) {
	h.say(topic, hwError{hwNow(eventID), code, fmt.Sprintf("%.512v", why)})
}

func (h *hwDeviceTwin) say(topic string, v any) { h.driver.say(topic, v) }

func (d *Driver) say(topic string, v any) {
	payload, err := json.Marshal(v)
	if err != nil {
		d.log.Warn("an answer that is no JSON", "topic", topic, "err", err)
		return
	}
	d.later(mqtt.Message{Topic: topic, Payload: payload, QoS: 1})
}

// hwMembership serves the node's own topics, while there are devices of the
// profile.
type hwMembership struct {
	driver *Driver
	routes []*route
	things map[devicetwin.Key]*hwDeviceTwin
}

// setMembersLocked tells clients which devices came and went.
func (d *Driver) setMembersLocked() {
	m := d.members
	now := map[devicetwin.Key]*hwDeviceTwin{}
	for key, dev := range d.devices {
		if dev.hw != nil && dev.err == nil {
			now[key] = dev.hw
		}
	}
	var changed hwMembersChanged
	for key, h := range now {
		if m.things[key] == nil {
			changed.Added = append(changed.Added, h.thing())
		}
	}
	for key, h := range m.things {
		if now[key] == nil {
			changed.Removed = append(changed.Removed, h.thing())
		}
	}
	m.things = now
	if len(now) == 0 {
		m.routes = nil
	} else if m.routes == nil {
		m.routes = []*route{{filter: hwNode + d.cfg.Node + "/membership/get", handle: m.get}}
	}
	if len(changed.Added)+len(changed.Removed) > 0 {
		byID := func(a, b hwThing) int { return strings.Compare(a.ID, b.ID) }
		slices.SortFunc(changed.Added, byID)
		slices.SortFunc(changed.Removed, byID)
		changed.hwBase = hwNow(uuid.NewString())
		d.say(hwNode+d.cfg.Node+"/membership/updated", changed)
	}
}

func (m *hwMembership) get(p *packet, out []devicetwin.Reading) []devicetwin.Reading {
	topic := p.Topic + "/result"
	var msg hwBase
	if len(p.Payload) > MaxPayload || checkDepth(p.Payload) != nil || json.Unmarshal(p.Payload, &msg) != nil {
		m.driver.say(topic, hwError{hwNow(""), 400, "Unmarshal membership request failed, please check the request"})
		return out
	}
	m.driver.mu.Lock()
	things := slices.Collect(maps.Values(m.things))
	m.driver.mu.Unlock()
	answer := hwMembers{hwNow(msg.EventID), []hwThing{}}
	for _, h := range things {
		answer.Devices = append(answer.Devices, h.thing())
	}
	slices.SortFunc(answer.Devices, func(a, b hwThing) int { return strings.Compare(a.ID, b.ID) })
	m.driver.say(topic, answer)
	return out
}
