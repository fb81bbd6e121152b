package profile

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/skerry-io/skerry/devicetwin"
)

const externalObjects = `kind: DeviceModel
metadata: {name: pump}
spec:
  profile: external
  profileConfig: {protocol: modbus, visitors: {flow: {register: 3}}}
  properties:
  - {name: flow, type: float64, access: r, read: [{scale: 0.1}]}
  - {name: speed, type: int64, access: rw}
  - {name: mode, type: enum, enum: [auto, hand], access: rw, map: {"0": auto, "1": hand}}
  commands:
  - {name: flush, params: [{name: seconds, type: int64, required: true}], write: {}}
---
kind: Device
metadata: {name: pump-1, namespace: plant}
spec: {modelRef: {name: pump}, params: {slave: "7"}}
---
kind: DeviceModel
metadata: {name: other}
spec:
  profile: external
  profileConfig: {protocol: bacnet}
  properties:
  - {name: x, type: int64, access: r}
---
kind: Device
metadata: {name: other, namespace: plant}
spec: {modelRef: {name: other}}
`

// mapperClient is a mapper.
type mapperClient struct {
	t      *testing.T
	client *http.Client
}

func (m *mapperClient) call(method, path, body string) (int, string) {
	m.t.Helper()
	req, err := http.NewRequestWithContext(m.t.Context(), method, "http://x"+path, strings.NewReader(body))
	if err != nil {
		m.t.Fatal(err)
	}
	res, err := m.client.Do(req)
	if err != nil {
		m.t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	raw, err := io.ReadAll(res.Body)
	if err != nil {
		m.t.Fatal(err)
	}
	return res.StatusCode, strings.TrimSpace(string(raw))
}

func (m *mapperClient) want(code int, method, path, body string) string {
	m.t.Helper()
	got, said := m.call(method, path, body)
	if got != code {
		m.t.Fatalf("%s %s: %d %s, want %d", method, path, got, said, code)
	}
	return said
}

// task polls for the next that is not about the list of devices.
func (m *mapperClient) task() task {
	m.t.Helper()
	for {
		var in struct{ Tasks []task }
		if err := json.Unmarshal([]byte(m.want(200, "GET", "/v1/mappers/m/tasks?wait=10s", "")), &in); err != nil {
			m.t.Fatal(err)
		}
		for _, t := range in.Tasks {
			if t.Kind != "devices" {
				return t
			}
		}
		if len(in.Tasks) == 0 {
			m.t.Fatal("no task came")
		}
	}
}

func TestExternalMapper(t *testing.T) {
	bound, _ := objects(t, externalObjects)
	told := newSink()
	socket := filepath.Join(t.TempDir(), "mappers.sock")
	d, err := New(Config{Node: "edge-1", Broker: newMemory(), Sink: told, ExternalSocket: socket})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	d.Set(bound, nil)
	m := &mapperClient{t, &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var dialer net.Dialer
		for {
			c, err := dialer.DialContext(ctx, "unix", socket)
			if err == nil || !errors.Is(err, os.ErrNotExist) {
				return c, err
			}
			select {
			case <-ctx.Done():
				return nil, ctx.Err()
			case <-time.After(5 * time.Millisecond):
			}
		}
	}}}}
	pump := devicetwin.Key{Namespace: "plant", Name: "pump-1"}

	m.want(404, "GET", "/v1/mappers/m/devices", "")
	if err := d.Write(ctx, devicetwin.WriteRequest{Device: pump, Property: "speed", Value: int64(3)}); !errors.Is(err, devicetwin.ErrNotConnected) {
		t.Errorf("write without a mapper: %v", err)
	}
	info, err := os.Stat(socket)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket: %v, %v", info.Mode(), err)
	}
	m.want(200, "PUT", "/v1/mappers/m", `{"protocols":["modbus"]}`)
	list := m.want(200, "GET", "/v1/mappers/m/devices", "")
	for _, want := range []string{`"name":"pump-1"`, `"slave":"7"`, `"register":3`, `"name":"flush"`} {
		if !strings.Contains(list, want) {
			t.Errorf("devices lack %s: %s", want, list)
		}
	}
	if strings.Contains(list, "other") {
		t.Errorf("another protocol's device is told: %s", list)
	}

	said := m.want(200, "POST", "/v1/mappers/m/reports", `{"reports":[
		{"namespace":"plant","name":"pump-1","state":"online","properties":{"flow":{"value":213,"ts":1795245342123},"speed":{"value":9007199254740993},"mode":{"value":1},"x":{"value":1}}},
		{"namespace":"plant","name":"pump-1","properties":{"speed":{"value":"fast"},"flow":{"error":"register does not answer"}}},
		{"namespace":"plant","name":"other","properties":{"x":{"value":1}}}]}`)
	if strings.Count(said, "plant/") != 2 {
		t.Errorf("refused: %s", said)
	}
	got := told.taken()
	want := []string{
		"sight plant/pump-1 Parent Online",
		"report plant/pump-1 flow float64 21.3 at 2026-11-21T07:15:42.123Z",
		"report plant/pump-1 mode string \"hand\"",
		"report plant/pump-1 speed int64 9007199254740993",
		"sight plant/pump-1 Availability Online",
		"report plant/pump-1 flow BAD register does not answer",
		"report plant/pump-1 speed BAD \"fast\" is no number",
	}
	if !slices.Equal(got, want) {
		t.Errorf("told:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}

	// What is to be done, and how it went.
	result := make(chan error, 1)
	go func() {
		result <- d.Write(ctx, devicetwin.WriteRequest{Device: pump, Property: "mode", Value: "hand"})
	}()
	one := m.task()
	if one.Kind != "write" || one.Property != "mode" || string(one.Value) != "1" {
		t.Errorf("task %+v", one)
	}
	m.want(200, "POST", "/v1/mappers/m/tasks/"+one.ID, `{"error":"locked"}`)
	if err := <-result; !errors.Is(err, devicetwin.ErrRejected) || !strings.Contains(err.Error(), "locked") {
		t.Errorf("a refused write: %v", err)
	}
	m.want(404, "POST", "/v1/mappers/m/tasks/"+one.ID, `{}`)
	answered := make(chan string, 1)
	go func() {
		out, err := d.Command(ctx, devicetwin.CommandRequest{Device: pump, Name: "flush", ID: "c1", Timeout: 10 * time.Second,
			Args: map[string]json.RawMessage{"seconds": json.RawMessage("5")}})
		answered <- fmt.Sprintf("%s %v", out, err)
	}()
	one = m.task()
	if one.Kind != "command" || one.Command != "flush" || one.RequestID != "c1" || string(one.Args["seconds"]) != "5" {
		t.Errorf("task %+v", one)
	}
	m.want(200, "POST", "/v1/mappers/m/tasks/"+one.ID, `{"result":{"ok":true}}`)
	if s := <-answered; s != `{"ok":true} <nil>` {
		t.Errorf("command: %s", s)
	}

	// Bounds: depth, size, quota.
	m.want(400, "POST", "/v1/mappers/m/reports", strings.Repeat("[", 1000))
	m.want(413, "POST", "/v1/mappers/m/reports", `{"reports":"`+strings.Repeat("x", maxBody)+`"}`)
	var many bytes.Buffer
	many.WriteString(`{"reports":[`)
	for i := range 6000 {
		if i > 0 {
			many.WriteByte(',')
		}
		many.WriteString(`{"namespace":"plant","name":"none"}`)
	}
	many.WriteString(`]}`)
	m.want(429, "POST", "/v1/mappers/m/reports", many.String())

	// A mapper that is not heard of takes its devices with it.
	told.taken()
	d.ext.missing(time.Now().Add(2 * mapperGone))
	if got := told.taken(); !slices.Equal(got, []string{"sight plant/pump-1 Parent Offline"}) {
		t.Errorf("told of a gone mapper: %q", got)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
	if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}
