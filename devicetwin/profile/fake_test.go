package profile

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/mqtt"
	"sigs.k8s.io/yaml"
)

// memory is a broker in this process. It calls handlers on the publisher's
// goroutine, as the embedded one does.
type memory struct {
	mu        sync.Mutex
	subs      map[int]memorySub
	next      int
	retained  map[string]mqtt.Message
	published []mqtt.Message
	down      bool
	onPublish func(mqtt.Message)
}

type memorySub struct {
	filter string
	h      mqtt.Handler
}

func newMemory() *memory {
	return &memory{subs: map[int]memorySub{}, retained: map[string]mqtt.Message{}}
}

func (b *memory) Run(ctx context.Context) error { <-ctx.Done(); return nil }

func (b *memory) Subscribe(filter string, _ byte, h mqtt.Handler) (func(), error) {
	if err := mqtt.CheckFilter(filter); err != nil {
		return nil, err
	}
	b.mu.Lock()
	id := b.next
	b.next++
	b.subs[id] = memorySub{filter, h}
	var kept []mqtt.Message
	for topic, m := range b.retained {
		if mqtt.Match(filter, topic) {
			kept = append(kept, m)
		}
	}
	b.mu.Unlock()
	slices.SortFunc(kept, func(x, y mqtt.Message) int { return strings.Compare(x.Topic, y.Topic) })
	for _, m := range kept {
		_ = h(m)
	}
	return func() {
		b.mu.Lock()
		delete(b.subs, id)
		b.mu.Unlock()
	}, nil
}

func (b *memory) Publish(_ context.Context, m mqtt.Message) error {
	if err := mqtt.CheckTopic(m.Topic); err != nil {
		return err
	}
	b.mu.Lock()
	if b.down {
		b.mu.Unlock()
		return mqtt.ErrNotConnected
	}
	b.published = append(b.published, m)
	then := b.onPublish
	b.mu.Unlock()
	if then != nil {
		then(m)
	}
	return nil
}

func (b *memory) State() mqtt.State { return mqtt.State{Mode: "embedded", Connected: !b.down} }

// say is what a device publishes.
func (b *memory) say(topic, payload string, retain bool) {
	b.sayMessage(mqtt.Message{Topic: topic, Payload: []byte(payload), QoS: 1, Retain: retain})
}

func (b *memory) sayMessage(m mqtt.Message) {
	b.mu.Lock()
	if m.Retain {
		b.retained[m.Topic] = m
	}
	ids := make([]int, 0, len(b.subs))
	for id := range b.subs {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	var hs []mqtt.Handler
	for _, id := range ids {
		if mqtt.Match(b.subs[id].filter, m.Topic) {
			hs = append(hs, b.subs[id].h)
		}
	}
	b.mu.Unlock()
	buf := bytes.Clone(m.Payload)
	for _, h := range hs {
		n := m
		n.Payload = buf
		_ = h(n)
	}
	for i := range buf {
		buf[i] = 'x' // who keeps a payload without copying it shows
	}
}

func (b *memory) filters() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []string
	for _, s := range b.subs {
		out = append(out, s.filter)
	}
	slices.Sort(out)
	return out
}

func (b *memory) taken() []mqtt.Message {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := b.published
	b.published = nil
	return out
}

// sink writes down what it is told.
type sink struct {
	mu    sync.Mutex
	lines []string
	found map[devicetwin.Key][]v1alpha1.Candidate
	last  map[string]devicetwin.Reading // device property
}

func newSink() *sink {
	return &sink{found: map[devicetwin.Key][]v1alpha1.Candidate{}, last: map[string]devicetwin.Reading{}}
}

func (s *sink) Report(dev devicetwin.Key, readings []devicetwin.Reading) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range readings {
		s.last[dev.String()+" "+r.Property] = r
		s.lines = append(s.lines, "report "+dev.String()+" "+shownReading(r))
	}
}

func shownReading(r devicetwin.Reading) string {
	var b strings.Builder
	b.WriteString(r.Property)
	if r.Bad != nil {
		fmt.Fprintf(&b, " BAD %v", r.Bad)
	} else {
		raw, err := json.Marshal(r.Value)
		if err != nil {
			raw = []byte(err.Error())
		}
		var typ string
		switch r.Value.(type) {
		case json.RawMessage:
			typ = "object"
		case []byte:
			typ = "bytes"
		default:
			typ = fmt.Sprintf("%T", r.Value)
		}
		fmt.Fprintf(&b, " %s %s", typ, raw)
	}
	if !r.TS.IsZero() {
		b.WriteString(" at " + r.TS.UTC().Format(time.RFC3339Nano))
	}
	for _, f := range []struct {
		is   bool
		name string
	}{{r.Retained, "retained"}, {r.Historical, "historical"}, {r.Intent, "intent"}} {
		if f.is {
			b.WriteString(" " + f.name)
		}
	}
	return b.String()
}

func (s *sink) Sight(dev devicetwin.Key, x devicetwin.Sighting) {
	s.mu.Lock()
	defer s.mu.Unlock()
	line := fmt.Sprintf("sight %s %s %s", dev, x.Evidence, x.State)
	if x.Retained {
		line += " retained"
	}
	s.lines = append(s.lines, line)
}

func (s *sink) Found(discovery devicetwin.Key, candidates []v1alpha1.Candidate, dropped int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.found[discovery] = candidates
	s.lines = append(s.lines, fmt.Sprintf("found %s %d dropped %d", discovery, len(candidates), dropped))
	for _, c := range candidates {
		attributes, _ := json.Marshal(c.Attributes)
		params, _ := json.Marshal(c.Params)
		s.lines = append(s.lines, fmt.Sprintf("  %s %s %s", c.Name, attributes, params))
	}
}

func (s *sink) taken() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.lines
	s.lines = nil
	return out
}

// objects reads DeviceModels, Devices and DeviceDiscoveries from YAML.
func objects(t testing.TB, text string) ([]devicetwin.Bound, []*v1alpha1.DeviceDiscovery) {
	t.Helper()
	models := map[string]*v1alpha1.DeviceModel{}
	var devices []*v1alpha1.Device
	var discoveries []*v1alpha1.DeviceDiscovery
	for doc := range strings.SplitSeq(text, "\n---\n") {
		var kind struct {
			Kind string `json:"kind"`
		}
		if err := yaml.Unmarshal([]byte(doc), &kind); err != nil {
			t.Fatalf("%v in\n%s", err, doc)
		}
		var into any
		switch kind.Kind {
		case "DeviceModel":
			m := &v1alpha1.DeviceModel{}
			into = m
			if err := yaml.UnmarshalStrict([]byte(doc), into); err != nil {
				t.Fatalf("%v in\n%s", err, doc)
			}
			models[m.Name] = m
			continue
		case "Device":
			d := &v1alpha1.Device{}
			devices = append(devices, d)
			into = d
		case "DeviceDiscovery":
			d := &v1alpha1.DeviceDiscovery{}
			discoveries = append(discoveries, d)
			into = d
		default:
			t.Fatalf("kind %q in\n%s", kind.Kind, doc)
		}
		if err := yaml.UnmarshalStrict([]byte(doc), into); err != nil {
			t.Fatalf("%v in\n%s", err, doc)
		}
	}
	var bound []devicetwin.Bound
	for _, d := range devices {
		bound = append(bound, devicetwin.Bound{Device: d, Model: models[d.Spec.ModelRef.Name]})
	}
	return bound, discoveries
}
