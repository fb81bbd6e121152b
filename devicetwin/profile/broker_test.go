package profile

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/mqtt"
)

// A driver over the node's own broker, and devices that come over the network.
func TestOverTheEmbeddedBroker(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 3)
	broker, err := mqtt.NewEmbedded(mqtt.EmbeddedConfig{Listeners: []mqtt.ListenerConfig{{Address: "127.0.0.1:0"}}})
	if err != nil {
		t.Fatal(err)
	}
	told := newSink()
	d, err := New(Config{Node: "edge-1", Broker: broker, Sink: told})
	if err != nil {
		t.Fatal(err)
	}
	bound, _ := objects(t, `kind: DeviceModel
metadata: {name: shelly-plug}
spec:
  profile: shelly2
  properties:
  - {name: relay, type: bool, access: rw, read: [{path: "switch:0.output"}]}
---
kind: Device
metadata: {name: plug, namespace: home}
spec: {modelRef: {name: shelly-plug}, params: {id: shelly-1}}
---
kind: DeviceModel
metadata: {name: counter}
spec:
  profile: json
  properties:
  - {name: v, type: int64, access: r, read: [{topic: "counter/data", path: v}]}
---
kind: Device
metadata: {name: counter, namespace: home}
spec: {modelRef: {name: counter}}
`)
	d.Set(bound, nil)
	go func() { ended <- d.Run(ctx) }()
	<-d.Subscribed()
	go func() { ended <- broker.Run(ctx) }()
	until(t, "the broker listens", func() bool { return broker.State().Connected })
	plug, err := mqtt.NewExternal(mqtt.ExternalConfig{URL: "mqtt://" + broker.State().Address, Node: "plug", CleanSession: true})
	if err != nil {
		t.Fatal(err)
	}
	go func() { ended <- plug.Run(ctx) }()
	defer func() {
		cancel()
		for range 3 {
			if err := <-ended; err != nil {
				t.Errorf("Run: %v", err)
			}
		}
	}()

	// The plug answers calls as a Shelly does.
	calls := make(chan []byte, 16)
	if _, err := plug.Subscribe("shelly-1/rpc", 1, func(m mqtt.Message) error {
		calls <- append([]byte{}, m.Payload...)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			var call struct {
				ID     int64  `json:"id"`
				Src    string `json:"src"`
				Method string `json:"method"`
				Params struct {
					On bool `json:"on"`
				} `json:"params"`
			}
			select {
			case <-ctx.Done():
				return
			case b := <-calls:
				if err := json.Unmarshal(b, &call); err != nil {
					t.Errorf("%s: %v", b, err)
					continue
				}
			}
			answer := fmt.Sprintf(`{"id":%d,"src":"shelly-1","result":{"was_on":false}}`, call.ID)
			if call.Method == "Switch.Set" && !call.Params.On {
				answer = fmt.Sprintf(`{"id":%d,"src":"shelly-1","error":{"code":-1,"message":"stays on"}}`, call.ID)
			}
			if err := plug.Publish(ctx, mqtt.Message{Topic: call.Src + "/rpc", Payload: []byte(answer), QoS: 1}); err != nil && ctx.Err() == nil {
				t.Errorf("answer: %v", err)
			}
		}
	}()
	until(t, "the plug is connected", func() bool { return plug.State().Connected })
	key := devicetwin.Key{Namespace: "home", Name: "plug"}
	write := func(v bool) error {
		one, end := context.WithTimeout(ctx, 20*time.Second)
		defer end()
		return d.Write(one, devicetwin.WriteRequest{Device: key, Property: "relay", Value: v})
	}
	// Until its subscription stands, nobody answers.
	until(t, "the plug answers", func() bool { return write(true) == nil })
	if err := write(false); err == nil || !strings.Contains(err.Error(), "stays on") {
		t.Errorf("a refused write: %v", err)
	}

	const n = 500
	for i := range n {
		if err := plug.Publish(ctx, mqtt.Message{Topic: "counter/data", Payload: fmt.Appendf(nil, `{"v":%d}`, i), QoS: 1}); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	until(t, "all readings", func() bool {
		for _, line := range told.taken() {
			if v, ok := strings.CutPrefix(line, "report home/counter v int64 "); ok {
				got = append(got, v)
			}
		}
		return len(got) >= n
	})
	for i, v := range got {
		if v != fmt.Sprint(i) {
			t.Fatalf("reading %d is %s: out of order", i, v)
		}
	}
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 30 s", what)
		}
	}
}
