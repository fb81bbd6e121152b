package devices

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// Twin is one device as the hub's /v1/twins shows it: as the node's own does,
// and where it is.
type Twin struct {
	Namespace string            `json:"namespace"`
	Name      string            `json:"name"`
	UID       string            `json:"uid"`
	Node      string            `json:"node,omitempty"`
	Model     string            `json:"model"`
	Version   string            `json:"version"` // of what the node said last
	Labels    map[string]string `json:"labels,omitempty"`
	// Generation is of what is desired; ObservedGeneration of what of it the
	// node has on its disk.
	Generation         int64 `json:"generation"`
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// NodeConnected tells whether this is live, or what was known last.
	NodeConnected bool       `json:"nodeConnected"`
	Phase         string     `json:"phase"`
	Reason        string     `json:"reason,omitempty"`
	LastSeen      *time.Time `json:"lastSeen,omitempty"`

	Properties map[string]*TwinProperty `json:"properties"`
}

// TwinProperty is one property of a Twin.
type TwinProperty struct {
	Type     string          `json:"type,omitempty"`
	Unit     string          `json:"unit,omitempty"`
	Access   string          `json:"access,omitempty"`
	Reported *TwinReported   `json:"reported,omitempty"`
	Desired  json.RawMessage `json:"desired,omitempty"` // of the Device's spec
	Override *TwinOverride   `json:"override,omitempty"`
	State    string          `json:"state,omitempty"` // how far what is desired has come
	Message  string          `json:"message,omitempty"`
}

// TwinReported is a value of the device.
type TwinReported struct {
	Value    json.RawMessage `json:"value"`
	TS       time.Time       `json:"ts"`       // the device's, or Received where it gave none
	Received time.Time       `json:"received"` // by the node, in the hub's time
	Quality  string          `json:"q"`
	Version  string          `json:"version,omitempty"` // empty: from the Device's status, before the hub started
	Message  string          `json:"message,omitempty"`
}

// TwinOverride is a desired value that was set on the node.
type TwinOverride struct {
	Value          json.RawMessage `json:"value"`
	By             string          `json:"by"`
	BaseGeneration int64           `json:"baseGeneration"`
	Since          time.Time       `json:"since"`
	Expires        time.Time       `json:"expires"`
}

// twinLocked makes the document.
func (d *Devices) twinLocked(tw *twin) *Twin {
	dev := tw.device
	out := &Twin{
		Namespace: dev.Namespace, Name: dev.Name, UID: string(dev.UID), Node: dev.Spec.NodeName, Model: dev.Spec.ModelRef.Name,
		Version: tw.version.String(), Labels: dev.Labels, Generation: dev.Generation,
		Properties: map[string]*TwinProperty{},
	}
	if n := d.nodes[dev.Spec.NodeName]; n != nil {
		out.NodeConnected = n.session != nil
	}
	of := func(name string) *TwinProperty {
		p := out.Properties[name]
		if p == nil {
			p = &TwinProperty{}
			out.Properties[name] = p
		}
		return p
	}
	if m := d.models[dev.Spec.ModelRef.Name]; m != nil {
		for name, p := range m.properties {
			out.Properties[name] = &TwinProperty{Type: p.Type, Unit: p.Unit, Access: p.Access}
		}
	}
	d.lastKnownLocked(tw, out, of)
	for name, r := range tw.values {
		rep := &TwinReported{Value: r.value, TS: milli(r.ts), Received: milli(r.rx), Quality: d.nodes[dev.Spec.NodeName].quality(r), Version: r.version.String(), Message: r.message}
		if r.ts == 0 {
			rep.TS = rep.Received
		}
		if len(rep.Value) == 0 {
			rep.Value = json.RawMessage("null")
		}
		of(name).Reported = rep
	}
	for name, v := range dev.Spec.Desired {
		of(name).Desired = v.Raw
	}
	if st := tw.state; st != nil {
		out.Phase, out.Reason, out.ObservedGeneration = st.Phase, st.Reason, st.ObservedGeneration
		if st.LastSeen != 0 {
			t := milli(st.LastSeen)
			out.LastSeen = &t
		}
		for name, s := range st.Desired {
			p := of(name)
			p.State, p.Message = s.State, s.Message
		}
		for _, o := range st.Overrides {
			of(o.Property).Override = &TwinOverride{Value: o.Value, By: o.By, BaseGeneration: o.BaseGen, Since: milli(o.Since), Expires: milli(o.Expires)}
		}
	}
	if !out.NodeConnected {
		out.Phase, out.Reason = v1alpha1.PhaseUnknown, "NodeNotConnected"
	}
	for name, err := range tw.bad {
		p := of(name)
		p.State, p.Message = v1alpha1.DesiredInvalid, err.Error()
	}
	return out
}

// lastKnownLocked fills in what the status knew before the hub started, of a
// device whose node has not been heard since.
func (d *Devices) lastKnownLocked(tw *twin, out *Twin, of func(string) *TwinProperty) {
	st := &tw.device.Status
	out.Phase = v1alpha1.PhaseUnknown
	if tw.told.moved {
		return
	}
	if tw.state == nil {
		out.ObservedGeneration = st.ObservedGeneration
		if out.Version == "" {
			out.Version = st.ReportedVersion
		}
		if st.LastSeenTime != nil {
			t := st.LastSeenTime.UTC()
			out.LastSeen = &t
		}
	}
	if len(tw.values) > 0 {
		return
	}
	for _, p := range st.Properties {
		if p.Value == nil || p.Truncated {
			continue
		}
		r := &TwinReported{Value: p.Value.Raw, Quality: v1alpha1.QualityStale}
		if p.TS != nil {
			r.TS = p.TS.UTC()
			r.Received = r.TS
		}
		of(p.Name).Reported = r
	}
}

// etag tells two states of a twin apart. Its first part is of what is desired:
// a PATCH with If-Match asks for that part only, as values that the device
// reports meanwhile are no conflict.
func (t *Twin) etag() string {
	return `"` + t.UID + "." + strconv.FormatInt(t.Generation, 10) + "." + t.Version + `"`
}

// desiredOf reads the desired part of an If-Match header.
func desiredOf(etag string) (uid string, generation int64, err error) {
	bad := fmt.Errorf("If-Match %.100q is no ETag of a twin", etag)
	parts := strings.SplitN(strings.Trim(strings.TrimPrefix(etag, "W/"), `"`), ".", 3)
	if len(parts) < 2 {
		return "", 0, bad
	}
	if generation, err = strconv.ParseInt(parts[1], 10, 64); err != nil {
		return "", 0, bad
	}
	return parts[0], generation, nil
}

// key orders twins in a list.
func key(ref edgeapi.DeviceRef) string { return ref.Namespace + "/" + ref.Name }
