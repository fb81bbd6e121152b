package profile

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/mqtt"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestGolden plays what devices really say to the driver and compares, step by
// step, what it makes of it. Each directory of testdata/golden has the objects
// (objects.yaml) and a transcript (transcript.txt). Lines of the transcript are
//
//	# where the payloads come from
//	> topic payload            what comes; >r retained; a payload that starts
//	                           with hex: is that
//	>sp topic JSON             a Sparkplug payload, encoded by another encoder
//	write property JSON        what is wanted of the (first) device
//	command name JSON
//	refresh
//	sleep duration
//	off, on                    the broker
//
// and, indented, what the driver did: report, sight, found, publish, error.
func TestGolden(t *testing.T) {
	dirs, err := filepath.Glob("testdata/golden/*")
	if err != nil || len(dirs) == 0 {
		t.Fatalf("no golden directories: %v", err)
	}
	for _, dir := range dirs {
		t.Run(filepath.Base(dir), func(t *testing.T) {
			spec, err := os.ReadFile(filepath.Join(dir, "objects.yaml"))
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(dir, "transcript.txt")
			script, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var got string
			synctest.Test(t, func(t *testing.T) { got = play(t, string(spec), string(script)) })
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			} else if got != string(script) {
				t.Errorf("%s differs (go test -run TestGolden -update writes it anew):\n%s", file, diff(string(script), got))
			}
		})
	}
}

func play(t *testing.T, spec, script string) string {
	bound, discoveries := objects(t, spec)
	broker, told := newMemory(), newSink()
	twins := &fakeTwins{views: map[devicetwin.Key]map[string]PropertyView{}, sink: told}
	d, err := New(Config{Node: "edge-1", Broker: broker, Sink: told, Twins: twins})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	d.Set(bound, discoveries)

	var out strings.Builder
	settle := func() {
		// Long enough for the paced questions, short of any timeout.
		time.Sleep(100 * time.Millisecond)
		synctest.Wait()
		for _, line := range told.taken() {
			out.WriteString("    " + line + "\n")
		}
		for _, m := range broker.taken() {
			out.WriteString("    publish " + shownMessage(m) + "\n")
		}
	}
	started := false
	var waiting []chan string
	for line := range strings.SplitSeq(strings.TrimSuffix(script, "\n"), "\n") {
		if strings.HasPrefix(line, "    ") {
			continue
		}
		if !started && !strings.HasPrefix(line, "#") {
			started = true
			settle()
		}
		out.WriteString(line + "\n")
		verb, rest, _ := strings.Cut(line, " ")
		switch {
		case line == "" || strings.HasPrefix(line, "#"):
			continue
		case verb == ">" || verb == ">r":
			topic, payload, _ := strings.Cut(rest, " ")
			if coded, ok := strings.CutPrefix(payload, "hex:"); ok {
				raw, err := hex.DecodeString(coded)
				if err != nil {
					t.Fatalf("%q: %v", line, err)
				}
				payload = string(raw)
			}
			broker.say(topic, payload, verb == ">r")
		case verb == ">sp":
			topic, payload, _ := strings.Cut(rest, " ")
			broker.say(topic, string(tahuPayload(t, payload)), false)
		case verb == "write" || verb == "command" || verb == "refresh":
			failed := make(chan string, 1)
			go func() { failed <- act(ctx, d, bound[0], verb, rest) }()
			settle()
			select {
			case said := <-failed:
				if said != "" {
					out.WriteString("    " + said + "\n")
				}
				continue
			default:
			}
			// It waits for an answer: what comes next may be that.
			waiting = append(waiting, failed)
			out.WriteString("    waits\n")
			continue
		case verb == "sleep":
			wait, err := time.ParseDuration(rest)
			if err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			time.Sleep(wait)
		case verb == "off" || verb == "on":
			broker.mu.Lock()
			broker.down = verb == "off"
			broker.mu.Unlock()
		default:
			t.Fatalf("%q: no such verb", line)
		}
		settle()
		waiting = slices.DeleteFunc(waiting, func(c chan string) bool {
			select {
			case said := <-c:
				out.WriteString("    answered " + said + "\n")
				return true
			default:
				return false
			}
		})
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
	if left := broker.filters(); len(left) > 0 {
		t.Errorf("left subscribed: %q", left)
	}
	return chance.ReplaceAllString(out.String(), "$1*$2")
}

// chance is what differs from run to run or from place to place.
var chance = regexp.MustCompile(`("event_id":"|"last_online":")(?:[0-9a-f-]{36}|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(")`)

func act(ctx context.Context, d *Driver, b devicetwin.Bound, verb, rest string) string {
	key := devicetwin.Key{Namespace: b.Device.Namespace, Name: b.Device.Name}
	name, arg, _ := strings.Cut(rest, " ")
	switch verb {
	case "refresh":
		if err := d.Refresh(ctx, key); err != nil {
			return "error " + err.Error()
		}
	case "write":
		for _, p := range b.Model.Spec.Properties {
			if p.Name != name {
				continue
			}
			v, err := typedFromJSON(&p, arg)
			if err != nil {
				return "error " + err.Error()
			}
			if err := d.Write(ctx, devicetwin.WriteRequest{Device: key, Property: name, Value: v}); err != nil {
				return "error " + err.Error()
			}
			return "ok"
		}
		return "error no such property"
	case "command":
		var args map[string]json.RawMessage
		if arg != "" {
			if err := json.Unmarshal([]byte(arg), &args); err != nil {
				return "error " + err.Error()
			}
		}
		body, err := d.Command(ctx, devicetwin.CommandRequest{Device: key, Name: name, ID: "id-1", Args: args, Timeout: 5 * time.Second})
		if err != nil {
			return "error " + err.Error()
		}
		return "ok " + string(body)
	}
	return ""
}

// typedFromJSON is a value as the twin hands it over.
func typedFromJSON(p *v1alpha1.Property, text string) (any, error) {
	raw, err := decodeJSON([]byte(text))
	if err != nil {
		return nil, err
	}
	bare := *p
	bare.Map = nil
	c, err := newCodec(&bare)
	if err != nil {
		return nil, err
	}
	return c.decode(raw, nil)
}

func shownMessage(m mqtt.Message) string {
	out := fmt.Sprintf("%s q%d", m.Topic, m.QoS)
	if m.Retain {
		out += " retain"
	}
	payload := string(m.Payload)
	if strings.HasPrefix(m.Topic, "spBv1.0/") && !strings.HasPrefix(m.Topic, "spBv1.0/STATE/") {
		return out + " " + shownSparkplug(m.Payload)
	}
	for _, c := range m.Payload {
		if c < ' ' || c > '~' {
			payload = "hex:" + hex.EncodeToString(m.Payload)
			break
		}
	}
	return out + " " + payload
}

// diff shows where two texts part.
func diff(want, got string) string {
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	for i := range max(len(w), len(g)) {
		var a, b string
		if i < len(w) {
			a = w[i]
		}
		if i < len(g) {
			b = g[i]
		}
		if a != b {
			return fmt.Sprintf("line %d\n  want %s\n  got  %s", i+1, a, b)
		}
	}
	return ""
}

// fakeTwins keeps what it is told.
type fakeTwins struct {
	views map[devicetwin.Key]map[string]PropertyView
	sink  *sink
}

func (f *fakeTwins) SetDesired(_ context.Context, dev devicetwin.Key, props map[string]any, by string) error {
	f.sink.mu.Lock()
	defer f.sink.mu.Unlock()
	view := f.views[dev]
	if view == nil {
		view = map[string]PropertyView{}
		f.views[dev] = view
	}
	for name, v := range props {
		p := view[name]
		p.Desired = v
		view[name] = p
		f.sink.lines = append(f.sink.lines, fmt.Sprintf("desired %s %s %T %v by %s", dev, name, v, v, by))
	}
	return nil
}

func (f *fakeTwins) View(dev devicetwin.Key) (map[string]PropertyView, bool) {
	f.sink.mu.Lock()
	defer f.sink.mu.Unlock()
	out := map[string]PropertyView{}
	for name, v := range f.views[dev] {
		out[name] = v
	}
	for at, r := range f.sink.last {
		if name, ok := strings.CutPrefix(at, dev.String()+" "); ok && r.Bad == nil {
			p := out[name]
			p.Reported, p.ReportedAt = r.Value, r.TS
			out[name] = p
		}
	}
	return out, true
}
