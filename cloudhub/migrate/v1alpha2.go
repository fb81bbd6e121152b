package migrate

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
)

// v1alpha2 is read into the shape of v1beta1.

type modelV1alpha2 struct {
	object `json:",inline"`
	Spec   struct {
		Protocol   string `json:"protocol"`
		Properties []struct {
			Name        string `json:"name"`
			Description string `json:"description"`
			// By type: int, float, double, string, boolean, bytes.
			Type map[string]struct {
				AccessMode   string          `json:"accessMode"`
				DefaultValue json.RawMessage `json:"defaultValue"`
				Minimum      json.Number     `json:"minimum"`
				Maximum      json.Number     `json:"maximum"`
				Unit         string          `json:"unit"`
			} `json:"type"`
		} `json:"properties"`
	} `json:"spec"`
}

var typesV1alpha2 = map[string]string{"int": "INT", "float": "FLOAT", "double": "DOUBLE", "string": "STRING", "boolean": "BOOLEAN", "bytes": "BYTES"}

func (m *modelV1alpha2) upgrade(r *reporter) *modelV1beta1 {
	out := &modelV1beta1{object: m.object}
	out.Spec.Protocol = m.Spec.Protocol
	for i, p := range m.Spec.Properties {
		q := modelProperty{Name: p.Name, Description: p.Description}
		for n, kind := range slices.Sorted(maps.Keys(p.Type)) {
			at := fmt.Sprintf("spec.properties[%d].type.%s", i, kind)
			if n > 0 {
				r.lost(at, "a property has one type", "")
				continue
			}
			t := p.Type[kind]
			q.Type, q.AccessMode, q.Unit = typesV1alpha2[kind], t.AccessMode, t.Unit
			q.Minimum, q.Maximum = string(t.Minimum), string(t.Maximum)
			if q.Type == "" {
				q.Type = kind
			}
			if len(t.DefaultValue) > 0 {
				r.lost(at+".defaultValue", "a model has no values", "where it is wanted, put it into spec.desired of the Device")
			}
		}
		out.Spec.Properties = append(out.Spec.Properties, q)
	}
	return out
}

type deviceV1alpha2 struct {
	object `json:",inline"`
	Spec   struct {
		DeviceModelRef struct {
			Name string `json:"name"`
		} `json:"deviceModelRef"`
		// opcua, modbus, bluetooth, common, customizedProtocol
		Protocol         map[string]json.RawMessage `json:"protocol"`
		PropertyVisitors []propertyVisitor          `json:"propertyVisitors"`
		Data             struct {
			DataProperties []json.RawMessage `json:"dataProperties"`
			DataTopic      string            `json:"dataTopic"`
		} `json:"data"`
		NodeSelector struct {
			NodeSelectorTerms []struct {
				MatchExpressions []struct {
					Key      string   `json:"key"`
					Operator string   `json:"operator"`
					Values   []string `json:"values"`
				} `json:"matchExpressions"`
				MatchFields []json.RawMessage `json:"matchFields"`
			} `json:"nodeSelectorTerms"`
		} `json:"nodeSelector"`
	} `json:"spec"`
	Status struct {
		Twins []struct {
			PropertyName string       `json:"propertyName"`
			Desired      twinProperty `json:"desired"`
			Reported     twinProperty `json:"reported"`
		} `json:"twins"`
	} `json:"status"`
}

type propertyVisitor struct {
	PropertyName     string                     `json:"propertyName"`
	ReportCycle      int64                      `json:"reportCycle"`
	CollectCycle     int64                      `json:"collectCycle"`
	CustomizedValues map[string]json.RawMessage `json:"customizedValues"`

	OPCUA              map[string]json.RawMessage `json:"opcua"`
	Modbus             map[string]json.RawMessage `json:"modbus"`
	Bluetooth          map[string]json.RawMessage `json:"bluetooth"`
	CustomizedProtocol *protocol                  `json:"customizedProtocol"`
}

func (v *propertyVisitor) protocol() protocol {
	var p protocol
	switch {
	case v.OPCUA != nil:
		p = protocol{"opcua", v.OPCUA}
	case v.Modbus != nil:
		p = protocol{"modbus", v.Modbus}
	case v.Bluetooth != nil:
		p = protocol{"bluetooth", v.Bluetooth}
	case v.CustomizedProtocol != nil:
		p = *v.CustomizedProtocol
	}
	p.ConfigData = maps.Clone(p.ConfigData)
	for k, val := range v.CustomizedValues {
		if p.ConfigData == nil {
			p.ConfigData = map[string]json.RawMessage{}
		}
		p.ConfigData[k] = val
	}
	return p
}

func (d *deviceV1alpha2) upgrade(r *reporter) *deviceV1beta1 {
	out := &deviceV1beta1{object: d.object}
	out.Spec.DeviceModelRef = d.Spec.DeviceModelRef
	out.Spec.Protocol = d.protocol(r)
	for _, v := range d.Spec.PropertyVisitors {
		out.Spec.Properties = append(out.Spec.Properties, deviceProperty{
			// There was no choice: all that was reported went to the cloud.
			Name: v.PropertyName, Visitors: v.protocol(), ReportCycle: v.ReportCycle, CollectCycle: v.CollectCycle, ReportToCloud: true})
	}
	for _, t := range d.Status.Twins {
		i := slices.IndexFunc(out.Spec.Properties, func(p deviceProperty) bool { return p.Name == t.PropertyName })
		if i < 0 {
			i = len(out.Spec.Properties)
			out.Spec.Properties = append(out.Spec.Properties, deviceProperty{Name: t.PropertyName, ReportToCloud: true})
		}
		out.Spec.Properties[i].Desired = t.Desired
	}
	if len(d.Spec.Data.DataProperties) > 0 || d.Spec.Data.DataTopic != "" {
		r.lost("spec.data", "readings beside the twin go by a TelemetryRoute", "write a TelemetryRoute whose from.topics has the data topic ($ke/events/device/+/data/update where none was set)")
	}
	for i, term := range d.Spec.NodeSelector.NodeSelectorTerms {
		for j, e := range term.MatchExpressions {
			at := fmt.Sprintf("spec.nodeSelector.nodeSelectorTerms[%d].matchExpressions[%d]", i, j)
			named := e.Key == "" || e.Key == "kubernetes.io/hostname" || e.Key == "metadata.name"
			if named && e.Operator == "In" && len(e.Values) == 1 && out.Spec.NodeName == "" {
				out.Spec.NodeName = e.Values[0]
				continue
			}
			r.lost(at, "a Device is on the node that spec.nodeName names", "set spec.nodeName")
		}
		if len(term.MatchFields) > 0 {
			r.lost(fmt.Sprintf("spec.nodeSelector.nodeSelectorTerms[%d].matchFields", i), "a Device is on the node that spec.nodeName names", "set spec.nodeName")
		}
	}
	return out
}

func (d *deviceV1alpha2) protocol(r *reporter) protocol {
	var p protocol
	put := func(k string, v json.RawMessage) {
		if p.ConfigData == nil {
			p.ConfigData = map[string]json.RawMessage{}
		}
		p.ConfigData[k] = v
	}
	for _, kind := range slices.Sorted(maps.Keys(d.Spec.Protocol)) {
		raw := d.Spec.Protocol[kind]
		switch kind {
		case "customizedProtocol":
			var c protocol
			if err := json.Unmarshal(raw, &c); err != nil {
				r.lost("spec.protocol.customizedProtocol", err.Error(), "")
				continue
			}
			p.ProtocolName = c.ProtocolName
			for k, v := range c.ConfigData {
				put(k, v)
			}
		case "common":
			put("common", raw)
		default:
			p.ProtocolName = kind
			var fields map[string]json.RawMessage
			if json.Unmarshal(raw, &fields) != nil {
				put(kind, raw)
			}
			for k, v := range fields {
				put(k, v)
			}
		}
	}
	return p
}
