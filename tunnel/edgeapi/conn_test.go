package edgeapi

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"
)

type pipe struct {
	io.Reader
	io.Writer
}

func samples() []Message {
	pod := json.RawMessage(`{"kind":"Pod","apiVersion":"v1","metadata":{"name":"web","namespace":"default"},"spec":{"containers":[{"name":"web","image":"localhost/skerry/demo:1"}]}}`)
	return []Message{
		Hello{Version: Version, Agent: "edgecore/test", StoreID: "a", Synced: true, Outbox: 3, EventsDropped: 9},
		Inventory{Items: []Item{{Ref: Ref{Resource: "pods", Namespace: "default", Name: "web"}, UID: "u", Rev: "1"}}, Last: true},
		Ack{Seq: 7},
		Write{ID: 1, Op: OpStatus, Ref: Ref{Resource: "pods", Namespace: "default", Name: "web"}, UID: "u", Body: pod},
		Welcome{Version: 1, Agent: "cloudhub/test", NodeName: "edge-1"},
		Delta{Seq: 1, Upserts: []Upsert{{Ref: Ref{Resource: "pods", Namespace: "default", Name: "web"}, UID: "u", Rev: "2", Body: pod}}, Synced: true},
		WriteResult{ID: 1, Code: 200},
		Goodbye{Reason: ReasonRevoked, Message: "node edge-1 was forgotten"},
		TelemetryHello{Version: TelemetryVersion},
		TelemetryWelcome{Version: TelemetryVersion},
		TelemetryBatch{Seq: 1, Route: DeviceRef{"home", "energy"}, Sink: 1, Records: []TelemetryRecord{
			{ID: "9f3c01aa77e2b410-1-40", Device: &DeviceRef{"home", "plug-1"}, Property: "power", Value: json.RawMessage(`12.5`), TS: 1, Received: 2, Quality: "uncertain"},
			{ID: "9f3c01aa77e2b410-1-99", Topic: "a/b", Payload: []byte{0, 255}, TS: 3, Backfill: true},
			{ID: "9f3c01aa77e2b410-1-150", TS: 4, Gap: &TelemetryGap{From: "a", To: "b", Count: 7}},
		}},
		TelemetryAck{Seq: 1, Code: 503, Message: "no room", RetryAfter: 5000},
		Write{ID: 2, Op: OpEvent, Ref: Ref{Resource: "events", Name: "big"}, Body: json.RawMessage(`"` + strings.Repeat("x", 300<<10) + `"`)},
	}
}

func TestRoundTrip(t *testing.T) {
	var wire bytes.Buffer
	out := NewConn(&pipe{nil, &wire})
	for _, m := range samples() {
		if err := out.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	raw, sent, _, _ := out.Bytes()
	if sent >= raw/10 {
		t.Errorf("sent %d of %d bytes: not compressed", sent, raw)
	}
	if uint64(wire.Len()) != sent {
		t.Errorf("counted %d bytes, wrote %d", sent, wire.Len())
	}
	in := NewConn(&pipe{&wire, nil})
	for _, want := range samples() {
		got, err := in.Receive()
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
	if _, err := in.Receive(); err != io.EOF {
		t.Errorf("at the end: %v, want io.EOF", err)
	}
}

func TestSendRefusesTooLarge(t *testing.T) {
	c := NewConn(&pipe{nil, io.Discard})
	err := c.Send(Write{Body: json.RawMessage(`"` + strings.Repeat("x", MaxPayload) + `"`)})
	if err == nil || !strings.Contains(err.Error(), "limit") {
		t.Fatalf("got %v", err)
	}
}

func TestReceiveRefuses(t *testing.T) {
	bomb := func() []byte {
		var b bytes.Buffer
		if err := deflate(&b, make([]byte, MaxPayload+1)); err != nil {
			t.Fatal(err)
		}
		n := b.Len()
		head := []byte{typeHello, flagDeflate, byte(n) | 0x80, byte(n>>7) | 0x80, byte(n >> 14)}
		return append(head, b.Bytes()...)
	}()
	for name, tc := range map[string]struct {
		wire []byte
		want string
	}{
		"unknown type":   {[]byte{99, 0, 2, '{', '}'}, "unknown type 99"},
		"unknown flags":  {[]byte{typeAck, 2, 2, '{', '}'}, "unknown flags"},
		"long length":    {[]byte{typeAck, 0, 0xff, 0xff, 0xff, 0xff, 1}, "four bytes"},
		"over the limit": {[]byte{typeAck, 0, 0xff, 0xff, 0xff, 0x7f}, "limit"},
		"truncated":      {[]byte{typeAck, 0, 9, '{'}, "unexpected EOF"},
		"not JSON":       {[]byte{typeAck, 0, 1, '{'}, "decode"},
		"not DEFLATE":    {[]byte{typeAck, flagDeflate, 1, 0xff}, "decompress"},
		"bomb":           {bomb, "decompress: more than the limit"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := NewConn(&pipe{bytes.NewReader(tc.wire), nil}).Receive()
			if err == nil || errors.Is(err, io.EOF) || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want %q", err, tc.want)
			}
		})
	}
}

func FuzzReceive(f *testing.F) {
	for _, m := range samples()[:8] {
		var wire bytes.Buffer
		if err := NewConn(&pipe{nil, &wire}).Send(m); err != nil {
			f.Fatal(err)
		}
		f.Add(wire.Bytes())
	}
	f.Fuzz(func(t *testing.T, wire []byte) {
		c := NewConn(&pipe{bytes.NewReader(wire), nil})
		for {
			m, err := c.Receive()
			if err != nil {
				return
			}
			// What was understood can be said again.
			if err := NewConn(&pipe{nil, io.Discard}).Send(m); err != nil {
				t.Fatalf("%+v: %v", m, err)
			}
		}
	})
}

func BenchmarkSendPodStatus(b *testing.B) {
	m := samples()[3]
	c := NewConn(&pipe{nil, io.Discard})
	b.ReportAllocs()
	for b.Loop() {
		if err := c.Send(m); err != nil {
			b.Fatal(err)
		}
	}
	raw, wire, _, _ := c.Bytes()
	b.ReportMetric(float64(wire)/float64(b.N), "wire-B/op")
	b.ReportMetric(float64(raw)/float64(b.N), "raw-B/op")
}
