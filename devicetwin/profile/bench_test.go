package profile

import (
	"fmt"
	"testing"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/mqtt"
)

type nowhere struct{ devicetwin.Sink }

func (nowhere) Report(devicetwin.Key, []devicetwin.Reading) {}
func (nowhere) Sight(devicetwin.Key, devicetwin.Sighting)   {}

// BenchmarkMessage is one message on its way to readings.
func BenchmarkMessage(b *testing.B) {
	for _, c := range []struct{ name, model, topic, payload string }{
		{"zigbee2mqtt-5-of-12", `kind: DeviceModel
metadata: {name: m}
spec:
  profile: zigbee2mqtt
  properties:
  - {name: temp, type: float64, access: r, read: [{path: local_temperature}]}
  - {name: setpoint, type: float64, access: rw, read: [{path: occupied_heating_setpoint}]}
  - {name: mode, type: enum, enum: ["off", heat, auto], access: rw, read: [{path: system_mode}]}
  - {name: child_lock, type: bool, access: rw, map: {LOCK: true, UNLOCK: false}}
  - {name: battery, type: int64, access: r}
`, "zigbee2mqtt/d", `{"battery":87,"child_lock":"UNLOCK","last_seen":1795245342123,"linkquality":102,"local_temperature":20.6,"occupied_heating_setpoint":20,"system_mode":"auto","a":1,"b":2,"c":"x","d":true,"e":null}`},
		{"json-1-scaled", `kind: DeviceModel
metadata: {name: m}
spec:
  profile: json
  properties:
  - {name: temp, type: float64, access: r, read: [{topic: d, path: t, scale: 0.1, ts: {path: ts}}]}
`, "d", `{"t":213,"ts":1795245342123}`},
		{"json-1-when", `kind: DeviceModel
metadata: {name: m}
spec:
  profile: json
  properties:
  - {name: temp, type: float64, access: r, read: [{topic: d, path: t, when: "payload.ok == true"}]}
`, "d", `{"t":213,"ok":true}`},
		{"raw-1", `kind: DeviceModel
metadata: {name: m}
spec:
  profile: raw
  properties:
  - {name: temp, type: float64, access: r, read: [{topic: d}]}
`, "d", `21.5`},
	} {
		b.Run(c.name, func(b *testing.B) {
			bound, _ := objects(b, c.model+"---\nkind: Device\nmetadata: {name: d, namespace: x}\nspec: {modelRef: {name: m}, params: {topic: zigbee2mqtt/d}}\n")
			d, err := New(Config{Node: "edge-1", Broker: newMemory(), Sink: nowhere{}})
			if err != nil {
				b.Fatal(err)
			}
			d.Set(bound, nil)
			d.reconcile()
			s := d.subs[c.topic]
			m := mqtt.Message{Topic: c.topic, Payload: []byte(c.payload)}
			b.ReportAllocs()
			for b.Loop() {
				if err := s.handle(d, m); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkSet is being told the whole set, of which one device changed.
func BenchmarkSet(b *testing.B) {
	var docs string
	for i := range 1000 {
		if i > 0 {
			docs += "---\n"
		}
		docs += valve(fmt.Sprintf("d%d", i), fmt.Sprintf("zigbee2mqtt/d%d", i))
	}
	bound, _ := objects(b, valveModel+docs)
	d, err := New(Config{Node: "edge-1", Broker: newMemory(), Sink: nowhere{}})
	if err != nil {
		b.Fatal(err)
	}
	d.Set(bound, nil)
	d.reconcile()
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		bound[0].Device.Spec.Params["topic"] = fmt.Sprintf("zigbee2mqtt/x%d", i)
		d.Set(bound, nil)
		d.reconcile()
	}
}
