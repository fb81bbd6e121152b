package profile

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/mqtt"
)

func FuzzPath(f *testing.F) {
	for _, s := range []string{"a.b.c", `switch:0.x\.y`, "a[0][1].b", "", "[0]", `\\.a`} {
		f.Add(s, []byte(`{"a":[1,{"b":2}]}`))
	}
	f.Fuzz(func(t *testing.T, s string, payload []byte) {
		p, err := parsePath(s)
		if err != nil {
			return
		}
		if doc, err := decodeJSON(payload); err == nil {
			p.find(doc)
		}
		again, err := parsePath(p.String())
		if err != nil || !slices.Equal(again, p) {
			t.Fatalf("%q is %q is %q: %v", s, []string(p), []string(again), err)
		}
	})
}

// FuzzMapping has any model read any payload, and write back what it read.
func FuzzMapping(f *testing.F) {
	f.Add("float64", "t", "", "", `{"a":1}`, 0.1, 5.0, []byte(`{"t":213}`))
	f.Add("int64", "", "", "", `{}`, 1.0, 0.0, []byte(`9223372036854775807`))
	f.Add("bool", "s", "payload.ok", "", `{"ON":true,"OFF":false}`, 0.0, 0.0, []byte(`{"ok":true,"s":"ON"}`))
	f.Add("enum", "", "", "payload.x", `{"1":"a","2":"b"}`, 0.0, 0.0, []byte(`{"x":1}`))
	f.Add("object", "o", "", "", ``, 0.0, 0.0, []byte(`{"o":{"a":[1e309,"\ud800"]}}`))
	f.Add("string", "", "", "", ``, 0.0, 0.0, []byte("\xff\xfe"))
	f.Add("bytes", "b", "", "topic", ``, 0.0, 0.0, []byte(`{"b":"AP8="}`))
	f.Fuzz(func(t *testing.T, typ, at, when, value, words string, scale, offset float64, payload []byte) {
		m := map[string]v1alpha1.JSON{}
		if json.Unmarshal([]byte(words), &m) != nil {
			m = nil
		}
		for _, profile := range []string{v1alpha1.ProfileRaw, v1alpha1.ProfileJSON, v1alpha1.ProfileTasmota} {
			b := devicetwin.Bound{Device: &v1alpha1.Device{}, Model: &v1alpha1.DeviceModel{Spec: v1alpha1.DeviceModelSpec{
				Profile: profile, Properties: []v1alpha1.Property{{Name: "p", Type: typ, Access: "rw", Enum: []string{"a", "b"}, Map: m,
					Read:  []v1alpha1.Read{{Topic: "d/s", Path: at, When: when, Value: value, Scale: scale, Offset: offset}},
					Write: &v1alpha1.Write{Topic: "d/set", Payload: `{"v":${value},"s":"${value}"}`}}}}}}
			b.Device.Spec.Params = map[string]string{"topic": "d"}
			dev := compile(b, env{node: "n", expressions: newExpressions()})
			p := &packet{Message: mqtt.Message{Topic: "d/s", Payload: payload}}
			for _, r := range dev.routes {
				for _, reading := range applyAll(r.reads, p, nil) {
					if (reading.Bad == nil) == (reading.Value == nil) {
						t.Fatalf("neither a value nor a reason: %+v", reading)
					}
					prop := dev.readings["p"]
					if reading.Bad != nil || prop == nil || prop.write == nil {
						continue
					}
					w, err := prop.codec.encode(reading.Value, prop.write.scale)
					if err != nil {
						continue
					}
					out, err := prop.write.payload.expand(func(string) (word, bool) { return w, true })
					if err != nil || !json.Valid(out) {
						t.Fatalf("%+v is written as %q: %v", reading.Value, out, err)
					}
				}
			}
		}
	})
}

func FuzzTemplate(f *testing.F) {
	f.Add(`{"a":${v},"b":"x${v}"}`, `q"\`)
	f.Add("${v}", "")
	f.Fuzz(func(t *testing.T, s, v string) {
		tmpl, err := parseTemplate(s, func(name string) bool { return name == "v" })
		if err != nil {
			return
		}
		if _, err := tmpl.expand(func(string) (word, bool) { return word{text: v, json: isLiteral(v)}, true }); err != nil {
			t.Fatal(err)
		}
	})
}

func FuzzHomieDescription(f *testing.F) {
	f.Add([]byte(`{"homie":"5.0","root":"bridge-1","parent":"x","nodes":{}}`))
	f.Add([]byte(`{"root":"a/b"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		parent := homieParent(&packet{Message: mqtt.Message{Payload: b}})
		if strings.ContainsAny(parent, "/+#") {
			t.Fatalf("parent %q", parent)
		}
		x := &discovery{}
		announcedHomie(x, "homie", &packet{Message: mqtt.Message{Topic: "homie/5/x/$description", Payload: b}})
	})
}

func FuzzHomeAssistantConfig(f *testing.F) {
	f.Add("homeassistant/switch/x/config", []byte(`{"~":"a/b","stat_t":"~/s","cmd_t":"~/c","val_tpl":"{{ value_json.a['b'][0] | float }}","avty":[{"t":"~/l"}],"dev":{"ids":["1"]}}`))
	f.Add("homeassistant/device/x/config", []byte(`{"dev":{"ids":"1"},"cmps":{"a":{"p":"sensor","val_tpl":"{{value}}"},"b":{"p":"number","cmd_tpl":"{\"x\":{{ value }}}"}}}`))
	f.Fuzz(func(t *testing.T, topic string, b []byte) {
		entities, _, err := decodeHA(topic, b)
		if err != nil {
			return
		}
		for _, e := range entities {
			if p, _, err := haPath(e.value); err == nil && len(p) > maxPathSegments {
				t.Fatalf("path of %d segments", len(p))
			}
			if s, err := haPayload(e.commandValue); err == nil {
				if _, err := parseTemplate(s, func(name string) bool { return name == "value" }); err != nil {
					t.Fatalf("%q: %v", s, err)
				}
			}
		}
	})
}

func FuzzKubeEdge(f *testing.F) {
	f.Add([]byte(`{"event_id":"e","timestamp":1,"twin":{"a":{"actual":{"value":"1","metadata":{"timestamp":5}},"expected":{"value":"2"}},"b":null}}`))
	f.Add([]byte(`{"twin":{"a":{"actual":{}}}}`))
	bound, _ := objects(f, "kind: DeviceModel\nmetadata: {name: m}\nspec:\n  profile: kubeedge\n  properties:\n  - {name: a, type: int64, access: rw}\n---\nkind: Device\nmetadata: {name: d, namespace: default}\nspec: {modelRef: {name: m}}\n")
	d, err := New(Config{Node: "n", Broker: newMemory(), Sink: newSink()})
	if err != nil {
		f.Fatal(err)
	}
	d.Set(bound, nil)
	f.Fuzz(func(t *testing.T, b []byte) {
		h := d.devices[devicetwin.Key{Namespace: "default", Name: "d"}].hw
		p := &packet{Message: mqtt.Message{Topic: "x", Payload: b}}
		for _, r := range h.update(h.prefixes[0], p, nil) {
			if _, ok := r.Value.(int64); !ok {
				t.Fatalf("%+v", r)
			}
		}
		h.get(h.prefixes[0], p)
		h.setState(h.prefixes[0], p)
		for len(d.jobs) > 0 {
			(<-d.jobs)(t.Context())
		}
		for len(d.outbox) > 0 {
			if m := <-d.outbox; !json.Valid(m.Payload) {
				t.Fatalf("%s: %q", m.Topic, m.Payload)
			}
		}
	})
}

func FuzzDiscovery(f *testing.F) {
	f.Add([]byte(`[{"ieee_address":"0x1","friendly_name":"a","definition":{"model":"x","exposes":[{"features":[{"property":"p"}]}]}}]`))
	f.Add([]byte(`{"mac":"C8","t":"t","dn":"x"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		x := &discovery{}
		p := func() *packet { return &packet{Message: mqtt.Message{Topic: "a/b/c/config", Payload: b}} }
		for _, a := range append(announcedZigbee(x, "z", p()), announcedTasmota(x, "t", p())...) {
			if name := candidateName("p", a); len(name) > 63 || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
				t.Fatalf("candidate %q", name)
			}
		}
	})
}
