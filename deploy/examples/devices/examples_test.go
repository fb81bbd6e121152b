// Package examples_test uses the manifests of this folder as they are written:
// with the simulated devices where there are some, else with what such devices
// say, by the real broker and the real mapping. That an API server takes them is
// tested in cloudhub/devices.
package examples_test

import (
	"bytes"
	"context"
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"sigs.k8s.io/yaml"

	"github.com/skerry-io/skerry/deploy/devices"
	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/mqtt"
	"github.com/skerry-io/skerry/devicetwin/profile"
	"github.com/skerry-io/skerry/devicetwin/value"
)

// Every example is read strictly, and a Device's values fit its model.
func TestManifests(t *testing.T) {
	files, err := filepath.Glob("*.yaml")
	if err != nil || len(files) < 7 {
		t.Fatal(files, err)
	}
	for _, f := range files {
		for _, b := range read(t, f) {
			if b.Device.Spec.ModelRef.Name != b.Model.Name {
				t.Errorf("%s: Device %s is of another model than its file's", f, b.Device.Name)
			}
			if bad := value.CheckDesired(b.Model, b.Device.Spec.Desired); bad != nil {
				t.Errorf("%s: %v", f, bad)
			}
		}
	}
}

func TestThermostat(t *testing.T) {
	n := start(t, "zigbee2mqtt-thermostat.yaml")
	n.await(t, "setpoint", "20") // asked for, as it is not retained
	n.sighted(t, devicetwin.EvidenceAvailability, v1alpha1.PhaseOnline)
	n.write(t, "setpoint", 20.5)
	n.await(t, "setpoint", "20.5")
	n.await(t, "temp", "19")
	n.await(t, "battery", "97")
}

func TestTasmotaPlug(t *testing.T) {
	n := start(t, "tasmota-plug.yaml")
	n.await(t, "relay", "false")
	n.await(t, "power", "0")
	n.sighted(t, devicetwin.EvidenceAvailability, v1alpha1.PhaseOnline)
	n.write(t, "relay", true)
	n.await(t, "relay", "true")
	if _, err := n.driver.Command(t.Context(), devicetwin.CommandRequest{Device: n.device, Name: "toggle", ID: "1", Timeout: 20 * time.Second}); err != nil {
		t.Fatal(err)
	}
	n.await(t, "relay", "false")
}

func TestShellyPlug(t *testing.T) {
	n := start(t, "shelly-plug.yaml")
	const id = "shellyplusplugs-d4d4da000000"
	// It answers calls as its firmware does.
	n.answer(t, id+"/rpc", func(payload []byte) (topic, answer string) {
		var call struct {
			ID     int64          `json:"id"`
			Src    string         `json:"src"`
			Method string         `json:"method"`
			Params map[string]any `json:"params"`
		}
		if err := json.Unmarshal(payload, &call); err != nil {
			t.Errorf("%s: %v", payload, err)
			return "", ""
		}
		result := `null`
		switch {
		case call.Method == "Switch.Set" && call.Params["on"] == true:
			result = `{"was_on":false}`
		case call.Method == "Switch.Set":
			t.Errorf("it is told %s", payload)
		}
		b, _ := json.Marshal(map[string]any{"id": call.ID, "src": id, "dst": call.Src, "result": json.RawMessage(result)})
		return call.Src + "/rpc", string(b)
	})
	n.say(t, id+"/online", "true", true)
	n.sighted(t, devicetwin.EvidenceAvailability, v1alpha1.PhaseOnline)
	n.say(t, id+"/status/switch:0", `{"id":0,"source":"init","output":false,"apower":0.0,"voltage":233.5,"current":0.000,"aenergy":{"total":1284.310},"temperature":{"tC":41.2,"tF":106.1}}`, false)
	n.await(t, "relay", "false")
	n.await(t, "temp", "41.2")
	n.write(t, "relay", true) // returns once the plug has answered
	n.say(t, id+"/events/rpc", `{"src":"`+id+`","dst":"`+id+`/events","method":"NotifyStatus","params":{"ts":1795245342.31,"switch:0":{"id":0,"output":true,"apower":42.5,"source":"MQTT"}}}`, false)
	n.await(t, "relay", "true")
	n.await(t, "power", "42.5")
	n.say(t, id+"/online", "false", true)
	n.sighted(t, devicetwin.EvidenceAvailability, v1alpha1.PhaseOffline)
}

func TestJSONSensor(t *testing.T) {
	n := start(t, "json-sensor.yaml")
	n.sayUntilHeard(t, said{"sensors/cellar/data", `{"ok":false,"t":999,"h":40,"ts":1795245299}`})
	n.await(t, "humidity", "40")
	n.say(t, "sensors/cellar/data", `{"ok":true,"t":213,"h":41,"ts":1795245300}`, false)
	r := n.await(t, "temp", "21.3")
	if !r.TS.Equal(time.Unix(1795245300, 0)) {
		t.Errorf("its time is %s", r.TS)
	}
	n.await(t, "humidity", "41")
	n.sighted(t, devicetwin.EvidenceMessage, v1alpha1.PhaseOnline)
}

func TestSparkplugPress(t *testing.T) {
	n := start(t, "sparkplug-press.yaml")
	told := make(chan []byte, 1)
	n.answer(t, "spBv1.0/plant-a/DCMD/cell-2/press-4", func(payload []byte) (string, string) {
		told <- bytes.Clone(payload)
		return "", ""
	})
	n.sayUntilHeard(t,
		said{"spBv1.0/plant-a/NBIRTH/cell-2", sparkplug(0, metric{name: "bdSeq", kind: 4, integer: 7})},
		said{"spBv1.0/plant-a/DBIRTH/cell-2/press-4", sparkplug(1,
			metric{name: "Process/Tonnage", alias: 1, kind: 10, float: 811.5}, metric{name: "Set/Speed", alias: 2, kind: 4, integer: 30})})
	n.await(t, "tonnage", "811.5")
	n.await(t, "speed", "30")
	n.sighted(t, devicetwin.EvidenceBirth, v1alpha1.PhaseOnline)
	n.write(t, "speed", int64(40))
	if got := <-told; !bytes.Contains(got, []byte("Set/Speed")) && !bytes.Contains(got, protowire.AppendVarint(protowire.AppendTag(nil, 2, protowire.VarintType), 2)) {
		t.Errorf("the command names no speed: %x", got)
	}
	n.say(t, "spBv1.0/plant-a/DDATA/cell-2/press-4", sparkplug(2, metric{alias: 2, kind: 4, integer: 40}), false)
	n.await(t, "speed", "40")
	n.say(t, "spBv1.0/plant-a/NDEATH/cell-2", sparkplug(-1, metric{name: "bdSeq", kind: 4, integer: 7}), false)
	n.sighted(t, devicetwin.EvidenceBirth, v1alpha1.PhaseOffline)
}

type metric struct {
	name    string
	alias   uint64
	kind    uint64
	integer uint64
	float   float64
}

// sparkplug is a payload as org.eclipse.tahu.protobuf has it; seq below zero is
// left out.
func sparkplug(seq int, metrics ...metric) string {
	now := uint64(time.Now().UnixMilli())
	field := func(b []byte, n protowire.Number, v uint64) []byte {
		return protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), v)
	}
	b := field(nil, 1, now)
	for _, m := range metrics {
		var e []byte
		if m.name != "" {
			e = protowire.AppendString(protowire.AppendTag(e, 1, protowire.BytesType), m.name)
		}
		if m.alias != 0 {
			e = field(e, 2, m.alias)
		}
		e = field(field(e, 3, now), 4, m.kind)
		if m.kind == 10 {
			e = protowire.AppendFixed64(protowire.AppendTag(e, 13, protowire.Fixed64Type), math.Float64bits(m.float))
		} else {
			e = field(e, 11, m.integer)
		}
		b = protowire.AppendBytes(protowire.AppendTag(b, 2, protowire.BytesType), e)
	}
	if seq >= 0 {
		b = field(b, 3, uint64(seq))
	}
	return string(b)
}

// read takes a file's Devices with their models.
func read(t *testing.T, file string) []devicetwin.Bound {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	models := map[string]*v1alpha1.DeviceModel{}
	var found []*v1alpha1.Device
	for doc := range bytes.SplitSeq(data, []byte("\n---\n")) {
		var kind struct {
			APIVersion string `json:"apiVersion"`
			Kind       string `json:"kind"`
		}
		if err := yaml.Unmarshal(doc, &kind); err != nil || kind.APIVersion != v1alpha1.GroupAndVer {
			t.Fatalf("%s: apiVersion %q, %v", file, kind.APIVersion, err)
		}
		var into any
		switch kind.Kind {
		case "DeviceModel":
			into = &v1alpha1.DeviceModel{}
		case "Device":
			into = &v1alpha1.Device{}
		case "DeviceDiscovery":
			into = &v1alpha1.DeviceDiscovery{}
		case "TelemetryRoute":
			into = &v1alpha1.TelemetryRoute{}
		}
		if err := yaml.UnmarshalStrict(doc, into); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		switch o := into.(type) {
		case *v1alpha1.DeviceModel:
			models[o.Name] = o
		case *v1alpha1.Device:
			found = append(found, o)
		}
	}
	var out []devicetwin.Bound
	for _, d := range found {
		m := models[d.Spec.ModelRef.Name]
		if m == nil {
			t.Fatalf("%s: no model %s", file, d.Spec.ModelRef.Name)
		}
		out = append(out, devicetwin.Bound{Device: d, Model: m})
	}
	return out
}

// node is a broker and a driver with the one Device of a file, and its
// simulation if there is one.
type node struct {
	broker *mqtt.Embedded
	driver *profile.Driver
	device devicetwin.Key

	mu      sync.Mutex
	changed chan struct{} // closed and made anew with each word
	words   []devicetwin.Reading
	sights  []devicetwin.Sighting
}

func start(t *testing.T, file string) *node {
	t.Helper()
	bound := read(t, file)
	if len(bound) != 1 {
		t.Fatalf("%s: %d Devices", file, len(bound))
	}
	d := bound[0].Device
	n := &node{device: devicetwin.Key{Namespace: d.Namespace, Name: d.Name}, changed: make(chan struct{})}
	var err error
	if n.broker, err = mqtt.NewEmbedded(mqtt.EmbeddedConfig{Listeners: []mqtt.ListenerConfig{{Address: "127.0.0.1:0"}}}); err != nil {
		t.Fatal(err)
	}
	run(t, n.broker.Run)
	n.until(t, "the broker to listen", func() bool { return len(n.broker.Addrs()) == 1 })
	url := "tcp://" + n.broker.Addrs()[0].String()
	switch bound[0].Model.Spec.Profile {
	case v1alpha1.ProfileZigbee2MQTT:
		base, name, _ := strings.Cut(d.Spec.Params["topic"], "/")
		sim := devices.NewThermostat(devices.ThermostatConfig{Base: base, Name: name})
		run(t, func(ctx context.Context) error { return devices.Run(ctx, devices.Config{Device: sim, Broker: url}) })
	case v1alpha1.ProfileTasmota:
		sim := devices.NewPlug(devices.PlugConfig{Topic: d.Spec.Params["topic"]})
		run(t, func(ctx context.Context) error { return devices.Run(ctx, devices.Config{Device: sim, Broker: url}) })
	}
	if n.driver, err = profile.New(profile.Config{Node: d.Spec.NodeName, Broker: n.broker, Sink: n}); err != nil {
		t.Fatal(err)
	}
	run(t, n.driver.Run)
	n.driver.Set(bound, nil)
	if problems := n.driver.Problems(n.device); len(problems) > 0 {
		t.Fatalf("%s: %v", file, problems)
	}
	return n
}

func run(t *testing.T, do func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- do(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func (n *node) Report(dev devicetwin.Key, readings []devicetwin.Reading) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.words = append(n.words, readings...)
	n.tellLocked()
}

func (n *node) Sight(dev devicetwin.Key, s devicetwin.Sighting) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.sights = append(n.sights, s)
	n.tellLocked()
}

func (n *node) Found(devicetwin.Key, []v1alpha1.Candidate, int) {}

func (n *node) tellLocked() {
	close(n.changed)
	n.changed = make(chan struct{})
}

// until waits for something to be so, looking again at each word.
func (n *node) until(t *testing.T, what string, so func() bool) {
	t.Helper()
	limit := time.NewTimer(40 * time.Second)
	defer limit.Stop()
	for {
		n.mu.Lock()
		is, changed := so(), n.changed
		n.mu.Unlock()
		if is {
			return
		}
		select {
		case <-changed:
		case <-time.After(20 * time.Millisecond):
		case <-limit.C:
			n.mu.Lock()
			defer n.mu.Unlock()
			t.Fatalf("waiting for %s; what was said: %+v %+v", what, n.words, n.sights)
		}
	}
}

// await takes words until a good one of the property says want, in JSON.
func (n *node) await(t *testing.T, property, want string) (found devicetwin.Reading) {
	t.Helper()
	n.until(t, property+" to be "+want, func() bool {
		for i, w := range n.words {
			if w.Property != property {
				continue
			}
			if w.Bad != nil {
				t.Errorf("%s: %v", property, w.Bad)
			} else if string(value.JSON(w.Value)) == want {
				found = w
				n.words = append(slices.DeleteFunc(slices.Clone(n.words[:i]), func(o devicetwin.Reading) bool { return o.Property == property }), n.words[i+1:]...)
				return true
			}
		}
		return false
	})
	return found
}

func (n *node) sighted(t *testing.T, evidence, state string) {
	t.Helper()
	n.until(t, "the sight of "+evidence+" "+state, func() bool {
		return slices.ContainsFunc(n.sights, func(s devicetwin.Sighting) bool { return s.Evidence == evidence && s.State == state })
	})
}

func (n *node) say(t *testing.T, topic, payload string, retain bool) {
	t.Helper()
	if err := n.broker.Publish(t.Context(), mqtt.Message{Topic: topic, Payload: []byte(payload), QoS: 1, Retain: retain}); err != nil {
		t.Fatal(err)
	}
}

type said struct{ topic, payload string }

// sayUntilHeard says all of it again and again, as devices do, until the driver
// listens.
func (n *node) sayUntilHeard(t *testing.T, all ...said) {
	t.Helper()
	last := time.Time{}
	n.until(t, "the driver to hear anything", func() bool {
		if time.Since(last) > time.Second/4 {
			last = time.Now()
			n.mu.Unlock() // a handler that is called meanwhile needs it
			for _, s := range all {
				n.say(t, s.topic, s.payload, false)
			}
			n.mu.Lock()
		}
		return len(n.words) > 0
	})
}

// answer has a device answer what is said to it.
func (n *node) answer(t *testing.T, topic string, with func(payload []byte) (topic, answer string)) {
	t.Helper()
	heard := make(chan []byte, 16)
	cancel, err := n.broker.Subscribe(topic, 1, func(m mqtt.Message) error {
		heard <- bytes.Clone(m.Payload)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cancel)
	run(t, func(ctx context.Context) error {
		for {
			select {
			case <-ctx.Done():
				return nil
			case payload := <-heard:
				if to, answer := with(payload); to != "" {
					if err := n.broker.Publish(ctx, mqtt.Message{Topic: to, Payload: []byte(answer), QoS: 1}); err != nil && ctx.Err() == nil {
						return err
					}
				}
			}
		}
	})
}

func (n *node) write(t *testing.T, property string, v any) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := n.driver.Write(ctx, devicetwin.WriteRequest{Device: n.device, Property: property, Value: v}); err != nil {
		t.Fatal(err)
	}
}

// What the README shows is what the tests here use.
func TestTheREADMEShowsTheExamples(t *testing.T) {
	readme, err := os.ReadFile("../../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"zigbee2mqtt-thermostat.yaml", "tasmota-plug.yaml", "shelly-plug.yaml", "sparkplug-press.yaml", "json-sensor.yaml"} {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Contains(readme, slices.Concat([]byte("```yaml\n"), b, []byte("```\n"))) {
			t.Errorf("README.md does not show %s as it is", f)
		}
	}
}
