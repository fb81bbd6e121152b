package profile

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/big"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/cel-go/cel"
	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/mqtt"
)

// packet is one message on its way through the mappings. What it is decoded to
// is made once, for all that look at it.
type packet struct {
	mqtt.Message
	doc        any
	docErr     error
	decoded    bool
	overlaid   bool // doc is not what the payload says
	celDoc     any
	celDecoded bool
}

// json is the payload decoded.
func (p *packet) json() (any, error) {
	if !p.decoded {
		p.decoded = true
		p.doc, p.docErr = decodeJSON(p.Payload)
		if p.docErr != nil {
			p.docErr = fmt.Errorf("the payload is not JSON: %w", p.docErr)
		}
	}
	return p.doc, p.docErr
}

// cel is the payload for an expression; one that is no JSON is text.
func (p *packet) cel() any {
	if !p.celDecoded {
		p.celDecoded = true
		if doc, err := p.json(); err == nil {
			p.celDoc = celInput(doc)
		} else {
			p.celDoc = strings.ToValidUTF8(string(p.Payload), "\uFFFD")
		}
	}
	return p.celDoc
}

// with is p with another document in place of its payload.
func (p *packet) with(doc any) *packet {
	return &packet{Message: p.Message, doc: doc, decoded: true, overlaid: true}
}

// read is one compiled v1alpha1.Read.
type read struct {
	property string
	codec    *codec
	path     path
	ts       path
	tsUnit   string
	when     cel.Program
	value    cel.Program
	scale    *scaling
	text     bool // without a path the payload is text, not JSON
}

// errPayloadSize is the reason for every property of a message too large.
func errPayloadSize(n int) error {
	return fmt.Errorf("a payload of %d bytes; at most %d are read", n, MaxPayload)
}

// apply reads one property from p. errNothing: the message is not for it.
func (r *read) apply(p *packet) (devicetwin.Reading, error) {
	out := devicetwin.Reading{Property: r.property, Retained: p.Retain}
	if len(p.Payload) > MaxPayload {
		return out, errPayloadSize(len(p.Payload))
	}
	if len(p.Payload) == 0 && !(r.text && r.path == nil) && !p.overlaid {
		return out, errNothing // a retained message was cleared
	}
	if r.when != nil {
		v, err := eval(r.when, p.cel(), p.Topic)
		switch {
		case errors.Is(err, errNoKey):
			return out, errNothing
		case err != nil:
			return out, fmt.Errorf("when: %w", err)
		}
		matches, ok := v.Value().(bool)
		if !ok {
			return out, fmt.Errorf("when: made a %s, not a bool", v.Type().TypeName())
		}
		if !matches {
			return out, errNothing
		}
	}
	raw, err := r.raw(p)
	if err != nil {
		return out, err
	}
	out.Value, err = r.codec.decode(raw, r.scale)
	if err != nil {
		return out, err
	}
	if err := r.checkUTF8(p, out.Value); err != nil {
		return out, err
	}
	if r.ts != nil {
		if doc, err := p.json(); err == nil {
			if at, ok := r.ts.find(doc); ok {
				out.TS = parseTime(at, r.tsUnit)
			}
		}
	}
	return out, nil
}

func (r *read) raw(p *packet) (any, error) {
	switch {
	case r.value != nil:
		v, err := eval(r.value, p.cel(), p.Topic)
		if errors.Is(err, errNoKey) {
			return nil, errNothing
		}
		if err != nil {
			return nil, fmt.Errorf("value: %w", err)
		}
		return celOutput(v)
	case r.text && r.path == nil && !p.overlaid:
		if r.codec.typ == v1alpha1.TypeObject {
			return p.json()
		}
		return p.Payload, nil
	}
	doc, err := p.json()
	if err != nil {
		return nil, err
	}
	raw, ok := r.path.find(doc)
	if !ok {
		return nil, errNothing
	}
	return raw, nil
}

// checkUTF8 finds text that was broken on its way: the JSON decoder puts U+FFFD
// in silently.
func (r *read) checkUTF8(p *packet, v any) error {
	switch r.codec.typ {
	case v1alpha1.TypeString, v1alpha1.TypeEnum:
		if s, ok := v.(string); ok && (!utf8.ValidString(s) || strings.ContainsRune(s, utf8.RuneError) && !utf8.Valid(p.Payload)) {
			return errors.New("the text is not UTF-8")
		}
	case v1alpha1.TypeObject:
		if b, ok := v.(json.RawMessage); ok && bytes.Contains(b, []byte("\uFFFD")) && !utf8.Valid(p.Payload) {
			return errors.New("the text is not UTF-8")
		}
	}
	return nil
}

// applyAll has every read look at p. A property is told once: the first value, or
// else why there is none.
func applyAll(reads []*read, p *packet, out []devicetwin.Reading) []devicetwin.Reading {
	start := len(out)
next:
	for _, r := range reads {
		reading, err := r.apply(p)
		if errors.Is(err, errNothing) {
			continue
		}
		if reading.Bad = err; err != nil {
			reading.Value = nil
		}
		for i := start; i < len(out); i++ {
			if out[i].Property == r.property {
				if out[i].Bad != nil && err == nil {
					out[i] = reading
				}
				continue next
			}
		}
		out = append(out, reading)
	}
	return out
}

// unitAuto takes milliseconds or RFC 3339, as Zigbee2MQTT's last_seen is either.
const unitAuto = "auto"

// parseTime reads a device's time; zero: it is none.
func parseTime(v any, unit string) time.Time {
	text, ok := wordOf(v)
	if !ok {
		return time.Time{}
	}
	if unit == "rfc3339" || unit == unitAuto && !isNumber(text) {
		t, err := time.Parse(time.RFC3339Nano, text)
		if err != nil {
			return time.Time{}
		}
		return t
	}
	var scale int64
	switch unit {
	case "s":
		scale = int64(time.Second)
	case "", "ms", unitAuto:
		scale = int64(time.Millisecond)
	case "us":
		scale = int64(time.Microsecond)
	case "ns":
		scale = 1
	}
	if n, err := strconv.ParseInt(text, 10, 64); err == nil {
		if n > math.MaxInt64/scale || n < math.MinInt64/scale {
			return time.Time{}
		}
		return time.Unix(0, n*scale).UTC()
	}
	r, err := exactly(text)
	if err != nil {
		return time.Time{}
	}
	r.Mul(r, new(big.Rat).SetInt64(scale))
	ns := new(big.Int).Quo(r.Num(), r.Denom())
	if !ns.IsInt64() {
		return time.Time{}
	}
	return time.Unix(0, ns.Int64()).UTC()
}

// presence is a compiled v1alpha1.Availability.
type presence struct {
	path            path
	online, offline string
	evidence        string
}

// state is what p says of being there; "": nothing.
func (a *presence) state(p *packet) string {
	if len(p.Payload) == 0 || len(p.Payload) > 4096 {
		return ""
	}
	said := strings.TrimSpace(string(p.Payload))
	if a.path != nil {
		// What is no JSON object is the bare word, as Zigbee2MQTT 1.x had it.
		if doc, err := p.json(); err == nil {
			if at, ok := a.path.find(doc); ok {
				said, _ = wordOf(at)
			} else if text, ok := doc.(string); ok {
				said = text
			}
		}
	}
	switch said {
	case a.online:
		return v1alpha1.PhaseOnline
	case a.offline:
		return v1alpha1.PhaseOffline
	}
	return ""
}
