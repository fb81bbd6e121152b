package telemetry

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/mqtt"
	"github.com/skerry-io/skerry/devicetwin/telemetry/seglog"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// Kinds of record in a log.
const (
	kindReading = 1 // payload: a reading as JSON
	kindMessage = 2 // payload: flags[1] len(topic)[uvarint] topic payload
)

const flagRetain = 1

// sourceSpan is how far from a clock that is right a device's own time may be,
// and still be believed.
const sourceSpan = 24 * time.Hour

// reading is what is kept of an Observation. The record's own time is when it
// was so, as well as is known then.
type reading struct {
	Device     string          `json:"d"` // namespace/name
	Property   string          `json:"p"`
	Value      json.RawMessage `json:"v"`
	Received   int64           `json:"r,omitempty"` // when another than the record's time
	Quality    string          `json:"q,omitempty"` // when not good
	Historical bool            `json:"h,omitempty"`
	// Boot and Since tell the time of what came before the clock was right:
	// milliseconds since the start of the process Boot, resolved when it is sent.
	Boot  string `json:"b,omitempty"`
	Since int64  `json:"m,omitempty"`
}

// clock is the wall clock, and what is known of its being right.
type clock struct {
	now   func() (time.Time, bool)
	boot  string
	start time.Time // for its monotonic reading
}

func (c *clock) record(o devicetwin.Observation) (seglog.Record, error) {
	v, err := encodeValue(o.Value)
	if err != nil {
		return seglog.Record{}, fmt.Errorf("%s: property %s: %w", o.Device, o.Property, err)
	}
	now, sure := c.now()
	received := o.Received
	if received.IsZero() {
		received = now
	}
	r := reading{Device: o.Device.String(), Property: o.Property, Value: v, Historical: o.Historical}
	if o.Quality != v1alpha1.QualityGood {
		r.Quality = o.Quality
	}
	at := received
	switch {
	case !sure && o.TS.IsZero():
		r.Boot, r.Since = c.boot, time.Since(c.start).Milliseconds()
	case !sure:
		at, r.Quality = o.TS, v1alpha1.QualityUncertain
	case !o.TS.IsZero() && received.Sub(o.TS).Abs() <= sourceSpan:
		at = o.TS
	case o.Historical && !o.TS.IsZero() && o.TS.Before(now):
		at = o.TS // late by more than a day is what it is for
	}
	if !at.Equal(received) {
		r.Received = received.UnixMilli()
	}
	b, err := json.Marshal(r)
	if err != nil {
		return seglog.Record{}, fmt.Errorf("%s: property %s: %w", o.Device, o.Property, err)
	}
	return seglog.Record{Kind: kindReading, TS: at.UnixMilli(), Payload: b}, nil
}

func encodeValue(v any) (json.RawMessage, error) {
	switch v := v.(type) {
	case json.RawMessage:
		return v, nil
	case []byte:
		return json.Marshal(base64.StdEncoding.EncodeToString(v))
	}
	return json.Marshal(v)
}

func encodeMessage(m mqtt.Message) seglog.Record {
	b := make([]byte, 0, 4+len(m.Topic)+len(m.Payload))
	flags := byte(0)
	if m.Retain {
		flags |= flagRetain
	}
	b = append(b, flags)
	b = binary.AppendUvarint(b, uint64(len(m.Topic)))
	b = append(b, m.Topic...)
	b = append(b, m.Payload...)
	ts := m.Received
	if ts.IsZero() {
		ts = time.Now()
	}
	return seglog.Record{Kind: kindMessage, TS: ts.UnixMilli(), Payload: b}
}

var errRecord = errors.New("record is malformed")

// decodeMessage reads what encodeMessage wrote. The payload is r's.
func decodeMessage(r seglog.Record) (mqtt.Message, error) {
	b := r.Payload
	if len(b) < 2 {
		return mqtt.Message{}, errRecord
	}
	n, size := binary.Uvarint(b[1:])
	if size <= 0 || n > uint64(len(b)-1-size) {
		return mqtt.Message{}, errRecord
	}
	rest := b[1+size:]
	return mqtt.Message{
		Topic: string(rest[:n]), Payload: rest[n:], QoS: 1, Retain: b[0]&flagRetain != 0, Received: time.UnixMilli(r.TS),
	}, nil
}

// telemetry makes of a record of a log what sinks take.
func (c *clock) telemetry(r seglog.Record, backfill bool) (edgeapi.TelemetryRecord, error) {
	out := edgeapi.TelemetryRecord{ID: r.ID, TS: r.TS, Backfill: backfill}
	switch r.Kind {
	case seglog.KindGap:
		g, err := seglog.ParseGap(r)
		if err != nil {
			return out, err
		}
		out.Gap = &edgeapi.TelemetryGap{From: g.From, To: g.To, Count: g.Count}
	case kindMessage:
		m, err := decodeMessage(r)
		if err != nil {
			return out, fmt.Errorf("record %s: %w", r.ID, err)
		}
		out.Topic, out.Payload = m.Topic, m.Payload
	case kindReading:
		var v reading
		if err := json.Unmarshal(r.Payload, &v); err != nil {
			return out, fmt.Errorf("record %s: %w", r.ID, err)
		}
		ns, name, _ := strings.Cut(v.Device, "/")
		out.Device = &edgeapi.DeviceRef{Namespace: ns, Name: name}
		out.Property, out.Value, out.Received, out.Quality = v.Property, v.Value, v.Received, v.Quality
		out.Backfill = backfill || v.Historical
		if v.Boot != "" {
			c.resolve(&out, v)
		}
	default:
		return out, fmt.Errorf("record %s: kind %d: %w", r.ID, r.Kind, errRecord)
	}
	return out, nil
}

// resolve finds the time of what came before the clock was right.
func (c *clock) resolve(out *edgeapi.TelemetryRecord, v reading) {
	now, sure := c.now()
	if !sure || v.Boot != c.boot {
		out.Quality = v1alpha1.QualityUncertain
		return
	}
	out.TS = now.Add(-time.Since(c.start) + time.Duration(v.Since)*time.Millisecond).UnixMilli()
}

// seriesOf tells what a record is one of many of.
func seriesOf(r seglog.Record) string {
	switch r.Kind {
	case kindMessage:
		if m, err := decodeMessage(r); err == nil {
			return m.Topic
		}
	case kindReading:
		var v reading
		if json.Unmarshal(r.Payload, &v) == nil {
			return v.Device + "/" + v.Property
		}
	}
	return ""
}
