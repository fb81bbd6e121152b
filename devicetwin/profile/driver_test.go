package profile

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/mqtt"
)

// running is a driver that runs, over a broker in memory.
type running struct {
	*Driver
	broker *memory
	told   *sink
	stop   func()
}

func run(t testing.TB) *running {
	t.Helper()
	r := &running{broker: newMemory(), told: newSink()}
	d, err := New(Config{Node: "edge-1", Broker: r.broker, Sink: r.told})
	if err != nil {
		t.Fatal(err)
	}
	r.Driver = d
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	r.stop = func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
	return r
}

func valve(name, topic string) string {
	return fmt.Sprintf(`kind: Device
metadata: {name: %s, namespace: home}
spec: {modelRef: {name: trv}, params: {topic: %s}}
`, name, topic)
}

const valveModel = `kind: DeviceModel
metadata: {name: trv}
spec:
  profile: zigbee2mqtt
  properties:
  - {name: temp, type: float64, access: r, read: [{path: t}]}
---
`

func TestSubscriptionsFollowTheDevices(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := run(t)
		defer r.stop()
		r.broker.say("zigbee2mqtt/bridge/state", `{"state":"online"}`, true)
		a, _ := objects(t, valveModel+valve("a", "zigbee2mqtt/a"))
		r.Set(a, nil)
		synctest.Wait()
		want := []string{"zigbee2mqtt/a", "zigbee2mqtt/a/availability", "zigbee2mqtt/bridge/state"}
		if got := r.broker.filters(); !slices.Equal(got, want) {
			t.Fatalf("subscribed to %q, want %q", got, want)
		}
		r.told.taken()

		// Another device on a topic that is subscribed to already: it is told
		// what the broker kept, and the filter is still subscribed to once.
		both, _ := objects(t, valveModel+valve("a", "zigbee2mqtt/a")+"---\n"+valve("b", "zigbee2mqtt/b"))
		before := r.devices[devicetwin.Key{Namespace: "home", Name: "a"}]
		r.Set(both, nil)
		synctest.Wait()
		if got := r.broker.filters(); len(got) != 5 {
			t.Errorf("subscribed to %q", got)
		}
		if r.devices[devicetwin.Key{Namespace: "home", Name: "a"}] != before {
			t.Error("a device that did not change was made anew")
		}
		if told := r.told.taken(); !slices.Contains(told, "sight home/b Parent Online retained") {
			t.Errorf("the new device was not told of its parent: %q", told)
		}

		// An edit moves it; a message on the old topic is nobody's.
		moved, _ := objects(t, valveModel+valve("a", "zigbee2mqtt/x"))
		r.Set(moved, nil)
		synctest.Wait()
		r.broker.say("zigbee2mqtt/a", `{"t":1}`, false)
		r.broker.say("zigbee2mqtt/b", `{"t":1}`, false)
		r.broker.say("zigbee2mqtt/x", `{"t":2}`, false)
		want = []string{"report home/a temp float64 2", "sight home/a Message Online"}
		if told := r.told.taken(); !slices.Equal(told[len(told)-2:], want) || len(told) > 3 {
			t.Errorf("told %q", told)
		}
		r.Set(nil, nil)
		synctest.Wait()
		if got := r.broker.filters(); len(got) != 0 {
			t.Errorf("still subscribed to %q", got)
		}
		if err := r.Write(t.Context(), devicetwin.WriteRequest{Device: devicetwin.Key{Namespace: "home", Name: "a"}, Property: "temp", Value: 1.0}); err == nil {
			t.Error("a device that is gone was written to")
		}
	})
}

// What is asked of a device while there is no broker is asked once there is.
func TestRefreshWaitsForTheBroker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := run(t)
		defer r.stop()
		r.broker.down = true
		bound, _ := objects(t, `kind: DeviceModel
metadata: {name: m}
spec:
  profile: json
  properties:
  - name: v
    type: int64
    access: rw
    read: [{topic: "d/state", path: v}]
    write: {topic: d/set}
    refresh: {topic: d/get, payload: "?", interval: 30s}
---
kind: Device
metadata: {name: d, namespace: x}
spec: {modelRef: {name: m}}
`)
		r.Set(bound, nil)
		time.Sleep(5 * time.Second)
		err := r.Write(t.Context(), devicetwin.WriteRequest{Device: devicetwin.Key{Namespace: "x", Name: "d"}, Property: "v", Value: int64(1)})
		if !errors.Is(err, devicetwin.ErrNotConnected) || !errors.Is(err, mqtt.ErrNotConnected) {
			t.Errorf("write without a broker: %v", err)
		}
		r.broker.mu.Lock()
		r.broker.down = false
		r.broker.mu.Unlock()
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if got := r.broker.taken(); len(got) != 1 || got[0].Topic != "d/get" {
			t.Errorf("asked %v", got)
		}
		time.Sleep(65 * time.Second)
		synctest.Wait()
		if got := r.broker.taken(); len(got) != 2 {
			t.Errorf("asked %d times in 65 s, want 2", len(got))
		}
	})
}

// Who writes a Device must not hear or act beyond it.
func TestParamsStayWithinTheirTopics(t *testing.T) {
	const model = `kind: DeviceModel
metadata: {name: m}
spec:
  profile: json
  properties:
  - {name: v, type: string, access: rw, read: [{topic: "${base}/state", path: v}], write: {topic: "${base}/set"}}
---
`
	for base, bad := range map[string]bool{
		"a/b": false, "+": true, "#": true, "a/+/b": true, "skerry/v1/twin/home/plug-1/desired": true, "$SYS/broker": true,
		"$hw/events/device/x/y/twin": true, "": false /* "/state" */, "\x00": true, strings.Repeat("x", 1030): true,
	} {
		bound, _ := objects(t, model+"kind: Device\nmetadata: {name: d, namespace: ns}\nspec: {modelRef: {name: m}}\n")
		bound[0].Device.Spec.Params = map[string]string{"base": base}
		dev := compile(bound[0], env{node: "edge-1", expressions: newExpressions()})
		failed := dev.err != nil || dev.problems["v"] != nil
		if failed != bad {
			t.Errorf("base %.40q: %v %v", base, dev.err, dev.problems)
		}
		if bad && dev.err == nil && (len(dev.routes) > 0 || dev.readings["v"].write != nil) {
			t.Errorf("base %.40q: still has routes %v", base, dev.routes)
		}
	}
	for _, own := range []string{"node", "namespace", "replyTo"} {
		bound, _ := objects(t, model+"kind: Device\nmetadata: {name: d, namespace: ns}\nspec: {modelRef: {name: m}}\n")
		bound[0].Device.Spec.Params = map[string]string{"base": "a", own: "x"}
		if dev := compile(bound[0], env{node: "edge-1"}); dev.err == nil {
			t.Errorf("param %s could be set", own)
		}
	}
}

func TestBadInput(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := run(t)
		defer r.stop()
		bound, _ := objects(t, `kind: DeviceModel
metadata: {name: m}
spec:
  profile: json
  properties:
  - {name: i, type: int64, access: r, read: [{topic: "d", path: i}]}
  - {name: f, type: float64, access: r, read: [{topic: "d", path: f}]}
  - {name: s, type: string, access: r, read: [{topic: "d", path: s}]}
  - {name: loop, type: bool, access: r, read: [{topic: "cel", value: "payload.all(a, payload.all(b, payload.all(c, a + b + c >= 0)))"}]}
---
kind: Device
metadata: {name: d, namespace: x}
spec: {modelRef: {name: m}}
`)
		r.Set(bound, nil)
		synctest.Wait()
		large := `{"i":1,"s":"` + strings.Repeat("x", 10<<20) + `"}`
		for _, c := range []struct{ topic, payload, property, want string }{
			{"d", large, "i", "a payload of"},
			{"d", strings.Repeat(`{"i":`, 1000) + "1" + strings.Repeat("}", 1000), "i", "nested deeper"},
			{"d", `{"i":9007199254740993}`, "i", ""},
			{"d", `{"i":1e400}`, "i", "beyond"},
			{"d", `{"i":1e999999999}`, "i", "beyond"},
			{"d", `{"f":1e400}`, "f", "beyond"},
			{"d", `{"f":NaN}`, "f", "not JSON"},
			{"d", `{"f":"NaN"}`, "f", "no number"},
			{"d", `{"f":"Infinity"}`, "f", "no number"},
			{"d", `{"s":"` + "a\xff" + `"}`, "s", "not UTF-8"},
			{"d", `{"s":"\ud800"}`, "s", ""}, // a lone surrogate, spelled in good UTF-8
			{"d", `{"s":{}}`, "s", "no text"},
			{"cel", "[" + strings.Repeat("1,", 500) + "1]", "loop", "cost"},
		} {
			r.told.taken()
			r.broker.say(c.topic, c.payload, false)
			got := r.told.last["x/d "+c.property]
			switch {
			case c.want == "" && got.Bad != nil:
				t.Errorf("%.60s: %v", c.payload, got.Bad)
			case c.want != "" && (got.Bad == nil || !strings.Contains(got.Bad.Error(), c.want)):
				t.Errorf("%.60s: %v %v, want %q", c.payload, got.Value, got.Bad, c.want)
			}
		}
		if got := r.told.last["x/d i"].Value; r.told.last["x/d i"].Bad == nil && got != int64(9007199254740993) {
			t.Errorf("i = %v", got)
		}
	})
}

func TestFilters(t *testing.T) {
	for _, c := range []struct{ profile, params, property, publishes, subscribes string }{
		{"zigbee2mqtt", "topic: zigbee2mqtt/a", "{name: v, type: bool, access: rw, read: [{path: state}]}",
			"zigbee2mqtt/a zigbee2mqtt/a/availability", "zigbee2mqtt/a/get zigbee2mqtt/a/set"},
		{"shelly2", "id: sh", `{name: v, type: bool, access: rw, read: [{path: "switch:0.output"}]}`,
			"sh/events/rpc sh/online sh/status/switch:0 REPLY/rpc", "sh/rpc"},
		{"homie5", "id: h", "{name: v, type: bool, access: rw, read: [{path: n/p}]}",
			"homie/5/h/# homie/5/h/$description homie/5/h/$state homie/5/h/n/p homie/5/h/n/p/$target", "homie/5/h/n/p/set"},
		{"sparkplugB", "group: G, edgeNode: E, device: D", "{name: v, type: bool, access: rw}",
			"spBv1.0/G/DBIRTH/E/D spBv1.0/G/DDATA/E/D spBv1.0/G/DDEATH/E/D", "spBv1.0/G/DCMD/E/D"},
		{"raw", "x: y", "{name: v, type: bool, access: rw, read: [{topic: a}], write: {topic: b}}", "a", "b"},
	} {
		bound, _ := objects(t, fmt.Sprintf("kind: DeviceModel\nmetadata: {name: m}\nspec:\n  profile: %s\n  properties:\n  - %s\n---\nkind: Device\nmetadata: {name: d, namespace: ns}\nspec: {modelRef: {name: m}, params: {%s}}\n",
			c.profile, c.property, c.params))
		publishes, subscribes := Filters("edge-1", bound[0])
		reply := replyTo("edge-1", devicetwin.Key{Namespace: "ns", Name: "d"})
		if got := strings.ReplaceAll(strings.Join(publishes, " "), reply, "REPLY"); got != c.publishes {
			t.Errorf("%s publishes %q, want %q", c.profile, got, c.publishes)
		}
		if got := strings.Join(subscribes, " "); got != c.subscribes {
			t.Errorf("%s subscribes to %q, want %q", c.profile, got, c.subscribes)
		}
	}
}

// Models and devices change while messages come in from several connections.
func TestSetUnderTraffic(t *testing.T) {
	r := run(t)
	defer r.stop()
	var docs strings.Builder
	docs.WriteString(valveModel)
	for i := range 50 {
		if i > 0 {
			docs.WriteString("---\n")
		}
		docs.WriteString(valve(fmt.Sprintf("d%d", i), fmt.Sprintf("zigbee2mqtt/d%d", i)))
	}
	all, _ := objects(t, docs.String())
	stop := make(chan struct{})
	var talkers sync.WaitGroup
	for range 4 {
		talkers.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
					r.broker.say(fmt.Sprintf("zigbee2mqtt/d%d", i%50), `{"t":1.5}`, false)
				}
			}
		})
	}
	for i := range 100 {
		r.Set(all[:1+i%50], nil)
	}
	r.Set(all, nil)
	close(stop)
	talkers.Wait()
	for deadline := time.Now().Add(20 * time.Second); len(r.broker.filters()) != 101; {
		if time.Now().After(deadline) {
			t.Fatalf("%d filters, want 101", len(r.broker.filters()))
		}
		time.Sleep(time.Millisecond)
	}
	r.told.taken()
	for i := range 50 {
		r.broker.say(fmt.Sprintf("zigbee2mqtt/d%d", i), `{"t":2.5}`, false)
	}
	if got := len(r.told.taken()); got != 100 {
		t.Errorf("%d lines for 50 messages, want a report and a sighting each", got)
	}
}

// A flood of devices that announce themselves stays within the caps.
func TestDiscoveryIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := run(t)
		defer r.stop()
		one := &v1alpha1.DeviceDiscovery{}
		one.Name, one.Namespace = "t", "home"
		one.Spec.Source.Profile = v1alpha1.ProfileTasmota
		r.Set(nil, []*v1alpha1.DeviceDiscovery{one})
		synctest.Wait()
		for i := range 2000 {
			r.broker.say(fmt.Sprintf("tasmota/discovery/%012d/config", i),
				fmt.Sprintf(`{"mac":"%012d","t":"t%d","dn":%q}`, i, i, strings.Repeat("n", 5000)), true)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		found := r.told.found[devicetwin.Key{Namespace: "home", Name: "t"}]
		if len(found) != maxCandidates {
			t.Errorf("%d candidates", len(found))
		}
		for _, c := range found {
			if len(c.Attributes["name"]) > maxAttributeBytes || len(c.Name) > 63 {
				t.Fatalf("candidate %s: %d bytes of name", c.Name, len(c.Attributes["name"]))
			}
		}
		if lines := r.told.taken(); !slices.Contains(lines, "found home/t 500 dropped 1500") {
			t.Errorf("told %.200q", lines[:1])
		}
		// The discovery goes: its places are free again.
		r.Set(nil, nil)
		synctest.Wait()
		if r.candidates.held != 0 {
			t.Errorf("%d places are still held", r.candidates.held)
		}
	})
}

func TestGlobs(t *testing.T) {
	for _, c := range []struct {
		glob, s string
		want    bool
	}{
		{"TS0601*", "TS0601_thermostat", true}, {"TS0601*", "xTS0601", false}, {"*", "", true}, {"a*b*c", "aXbYc", true},
		{"a*b*c", "acb", false}, {"abc", "abc", true}, {"abc", "abcd", false}, {"a*a", "a", false}, {"", "", true}, {"", "x", false},
	} {
		if got := globbed(c.glob, c.s); got != c.want {
			t.Errorf("%q matches %q: %v", c.glob, c.s, got)
		}
	}
}

func TestPaths(t *testing.T) {
	doc, err := decodeJSON([]byte(`{"a":{"b":[10,{"c":11}]},"x.y":12,"switch:0":{"output":true},"0":13,"":14,"l":[[1,2],[3]]}`))
	if err != nil {
		t.Fatal(err)
	}
	for in, want := range map[string]string{
		"a.b.0": "10", "a.b[0]": "10", "a.b[1].c": "11", "a.b.1.c": "11", `x\.y`: "12", "switch:0.output": "true", "0": "13",
		"l[1][0]": "3", "l.0.1": "2", "a.b[2]": "none", "a.b.x": "none", "a.b.-1": "none", "nope": "none",
	} {
		p, err := parsePath(in)
		if err != nil {
			t.Errorf("%s: %v", in, err)
			continue
		}
		got := "none"
		if v, ok := p.find(doc); ok {
			got, _ = wordOf(v)
		}
		if got != want {
			t.Errorf("%s = %s, want %s", in, got, want)
		}
		if again, err := parsePath(p.String()); err != nil || !slices.Equal(again, p) {
			t.Errorf("%s became %s: %v", in, p, err)
		}
	}
	for _, in := range []string{".", "a.", ".a", "a..b", "a[", "a[x]", "a[0]b", `a\`, strings.Repeat("a.", 40) + "a", strings.Repeat("a", 600)} {
		if p, err := parsePath(in); err == nil {
			t.Errorf("%.20q was taken as %q", in, p)
		}
	}
}

func TestScaling(t *testing.T) {
	for _, c := range []struct {
		typ           string
		scale, offset float64
		raw           string
		want          any
	}{
		{"float64", 0.1, 0, "213", 21.3},
		{"float64", 0.1, 0, "214", 21.4},
		{"float64", 0.01, -40, "6150", 21.5},
		{"float64", 1.8, 32, "21.5", 70.7},
		{"int64", 1, 0, "9223372036854775807", int64(9223372036854775807)},
		{"int64", 1, 1, "9223372036854775806", int64(9223372036854775807)},
		{"int64", 1, 1, "9223372036854775807", nil},
		{"int64", 10, 0, "9007199254740993", int64(90071992547409930)},
		{"int64", 0.1, 0, "25", int64(3)},
		{"int64", 0.1, 0, "-25", int64(-3)},
		{"int64", 2, 0, "1.5", int64(3)},
		{"int64", 2, 0, "1.2", nil},
	} {
		s, err := newScaling(c.scale, c.offset)
		if err != nil {
			t.Fatal(err)
		}
		cod, err := newCodec(&v1alpha1.Property{Name: "p", Type: c.typ})
		if err != nil {
			t.Fatal(err)
		}
		got, err := cod.decode(json.Number(c.raw), s)
		if c.want == nil {
			if err == nil {
				t.Errorf("%s*%v+%v = %v, want an error", c.raw, c.scale, c.offset, got)
			}
			continue
		}
		if err != nil || got != c.want {
			t.Errorf("%s*%v+%v = %v, %v; want %v", c.raw, c.scale, c.offset, got, err, c.want)
			continue
		}
		if c.typ == "float64" {
			if w, err := cod.encode(got, s); err != nil || w.text != c.raw {
				t.Errorf("back, %v is %q, %v; want %s", got, w.text, err, c.raw)
			}
		}
	}
}

func TestSubstitution(t *testing.T) {
	words := map[string]word{
		"n": {text: "21.5", json: true}, "s": {text: `say "hi"` + "\n"}, "t": {text: "true", json: true}, "lit": {text: "5", json: true},
		"o": {text: `{"a":1}`, json: true},
	}
	get := func(name string) (word, bool) { w, ok := words[name]; return w, ok }
	known := func(name string) bool { _, ok := words[name]; return ok }
	for in, want := range map[string]string{
		"${n}": "21.5", "${s}": "say \"hi\"\n", "x ${s}": "x say \"hi\"\n",
		`{"v":${n}}`: `{"v":21.5}`, `{"v":${s}}`: `{"v":"say \"hi\"\n"}`, `{"v":"${s}"}`: `{"v":"say \"hi\"\n"}`,
		`{"v":"${n}"}`: `{"v":"21.5"}`, `{"v":${o}}`: `{"v":{"a":1}}`, `[${t},"a\"${lit}"]`: `[true,"a\"5"]`, "$ {n} $n }": "$ {n} $n }",
	} {
		tmpl, err := parseTemplate(in, known)
		if err != nil {
			t.Errorf("%s: %v", in, err)
			continue
		}
		got, err := tmpl.expand(get)
		if err != nil || string(got) != want {
			t.Errorf("%s is %q, %v; want %q", in, got, err, want)
		}
	}
	for _, in := range []string{"${n", "${x}", "${}"} {
		if _, err := parseTemplate(in, known); err == nil {
			t.Errorf("%s was taken", in)
		}
	}
}
