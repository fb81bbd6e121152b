package profile

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/mqtt"
	"github.com/skerry-io/skerry/devicetwin/value"
)

// forgetful is a DB that keeps nothing.
type forgetful struct{}

func (forgetful) Incarnation() string                             { return "0123456789abcdef" }
func (forgetful) Epoch() uint64                                   { return 1 }
func (forgetful) Load(string, func(string, []byte) error) error   { return nil }
func (forgetful) Commit(context.Context, ...devicetwin.Mut) error { return nil }
func (forgetful) Dirty(bucket, key string, encode func() []byte)  {}

// overrides is Twins as KubeEdge's topics want it.
type overrides struct{ twins *devicetwin.Twins }

func (o overrides) SetDesired(ctx context.Context, dev devicetwin.Key, props map[string]any, by string) error {
	p := devicetwin.Patch{By: by, Props: map[string]json.RawMessage{}}
	for name, v := range props {
		p.Props[name] = value.JSON(v)
	}
	if res := o.twins.SetDesired(ctx, dev, p); res.Code >= 300 {
		return errors.New(res.Message)
	}
	return nil
}

func (o overrides) View(dev devicetwin.Key) (map[string]PropertyView, bool) {
	_, ok := o.twins.Get(dev)
	return nil, ok
}

// The driver with the real twins: what is wanted reaches devices, and what they
// say reaches the twin, with neither waiting for the other.
func TestWithTwins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		twins, err := devicetwin.New(devicetwin.Config{Node: "edge-1", DB: forgetful{}, Now: func() (time.Time, bool) { return time.Now(), true }})
		if err != nil {
			t.Fatal(err)
		}
		broker := newMemory()
		d, err := New(Config{Node: "edge-1", Broker: broker, Sink: twins, Twins: overrides{twins}})
		if err != nil {
			t.Fatal(err)
		}
		twins.Use(d)
		bound, _ := objects(t, `kind: DeviceModel
metadata: {name: trv}
spec:
  profile: zigbee2mqtt
  properties:
  - {name: setpoint, type: float64, access: rw, min: 5, max: 30, read: [{path: occupied_heating_setpoint}]}
  - {name: broken, type: int64, access: r, read: [{topic: "${nope}"}]}
---
kind: Device
metadata: {name: trv, namespace: home, uid: u1, generation: 1}
spec: {modelRef: {name: trv}, params: {topic: zigbee2mqtt/trv}, desired: {setpoint: 20.5}}
---
kind: DeviceModel
metadata: {name: led}
spec:
  profile: kubeedge
  properties:
  - {name: brightness, type: int64, access: rw, localOverride: {when: always}}
---
kind: Device
metadata: {name: led, namespace: default, uid: u2, generation: 1}
spec: {modelRef: {name: led}}
`)
		// A device answers as soon as it is written to, on the writer's own
		// goroutine: that must not lock anybody out.
		broker.onPublish = func(m mqtt.Message) {
			if m.Topic == "zigbee2mqtt/trv/set" {
				broker.say("zigbee2mqtt/trv", string(m.Payload), false)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 2)
		go func() { ended <- twins.Run(ctx) }()
		go func() { ended <- d.Run(ctx) }()
		twins.Set(bound, nil)
		time.Sleep(time.Second)
		broker.say("zigbee2mqtt/trv", `{"occupied_heating_setpoint":18}`, false)
		time.Sleep(5 * time.Second)
		synctest.Wait()

		trv, ok := twins.Get(devicetwin.Key{Namespace: "home", Name: "trv"})
		if !ok {
			t.Fatal("no twin")
		}
		raw, err := json.Marshal(trv)
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{`"phase":"Online"`, "20.5", v1alpha1.DesiredApplied, "${nope}: no such param"} {
			if !strings.Contains(string(raw), want) {
				t.Errorf("the twin lacks %s: %s", want, raw)
			}
		}

		broker.say("$hw/events/device/led/state/update", `{"state":"online"}`, false)
		broker.say("$hw/events/device/led/twin/update", `{"event_id":"e","twin":{"brightness":{"expected":{"value":"70"}}}}`, false)
		time.Sleep(5 * time.Second)
		broker.say("$hw/events/device/led/twin/update", `{"event_id":"f","twin":{"brightness":{"actual":{"value":"70"}}}}`, false)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		seen := map[string]string{}
		for _, m := range broker.taken() {
			seen[m.Topic] = string(m.Payload)
		}
		if s := seen["$hw/events/device/led/twin/update/delta"]; !strings.Contains(s, `"delta":{"brightness":"70"}`) {
			t.Errorf("delta %s of %v", s, seen)
		}
		led, _ := twins.Get(devicetwin.Key{Namespace: "default", Name: "led"})
		if raw, err = json.Marshal(led); err != nil || !strings.Contains(string(raw), v1alpha1.DesiredApplied) || !strings.Contains(string(raw), "mqtt:$hw") {
			t.Errorf("%s, %v", raw, err)
		}
		cancel()
		for range 2 {
			if err := <-ended; err != nil && !errors.Is(err, context.Canceled) {
				t.Errorf("Run: %v", err)
			}
		}
	})
}
