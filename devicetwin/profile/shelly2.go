package profile

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
)

// shelly2: param id is the device's MQTT prefix. A path starts with the
// component: switch:0.apower.
//
// A component's status comes whole on <id>/status/<component>, where that is
// switched on, and in parts as NotifyStatus on <id>/events/rpc: a part is laid
// over what is known, null deletes, and only what a part touches is read again.
// Calls go to <id>/rpc and are answered at ${replyTo}/rpc.
var shelly2 = profile{
	text: true,
	prepare: func(c *compiler) error {
		_, err := c.need("id")
		return err
	},
	property: func(c *compiler, p *v1alpha1.Property) error {
		if len(p.Read) == 0 && p.Access != "w" {
			return fmt.Errorf("set read.path to component.field, such as switch:0.output")
		}
		at, err := firstPath(p)
		if err != nil {
			return err
		}
		own := false
		for i := range p.Read {
			r := &p.Read[i]
			if r.Topic != "" {
				continue
			}
			full, err := parsePath(r.Path)
			if err != nil {
				return err
			}
			if len(full) < 2 {
				return fmt.Errorf("path %q: want component.field, such as switch:0.output", r.Path)
			}
			own = true
			r.Topic = "${id}/status/" + full[0]
			r.Path = full[1:].String()
		}
		if writable(p) {
			if p.Write == nil {
				p.Write = &v1alpha1.Write{}
			}
			if p.Write.Topic == "" {
				p.Write.Topic = "${id}/rpc"
			}
			if p.Write.Payload == "" {
				method, params, err := shellySetter(at)
				if err != nil {
					return err
				}
				p.Write.Payload = shellyCall(method, params)
				p.Write.Reply = &shellyReply
			}
		}
		if p.Refresh == nil && own {
			p.Refresh = &v1alpha1.Refresh{}
		}
		if p.Refresh != nil {
			if p.Refresh.Topic == "" {
				p.Refresh.Topic = "${id}/rpc"
			}
			if p.Refresh.Payload == "" {
				p.Refresh.Payload = shellyCall("Shelly.GetStatus", "")
			}
		}
		return nil
	},
	command: func(c *compiler, cmd *v1alpha1.Command) error {
		if cmd.Write.Topic == "" {
			cmd.Write.Topic = "${id}/rpc"
		}
		if cmd.Write.Payload == "" {
			var params []string
			for _, p := range cmd.Params {
				params = append(params, fmt.Sprintf("%q:${%s}", p.Name, p.Name))
			}
			cmd.Write.Payload = shellyCall(cmd.Name, strings.Join(params, ","))
			cmd.Write.Reply = &shellyReply
		}
		return nil
	},
	availability: func(c *compiler) *v1alpha1.Availability {
		return &v1alpha1.Availability{Topic: "${id}/online", Online: "true", Offline: "false"}
	},
	attach: attachShelly,
}

var shellyReply = v1alpha1.Reply{Topic: "${replyTo}/rpc", Correlate: "id", Error: "error.message"}

func shellyCall(method, params string) string {
	if params != "" {
		params = `,"params":{` + params + `}`
	}
	return `{"id":${cmdSeq},"src":"${replyTo}","method":"` + method + `"` + params + `}`
}

// shellySetter is the call that sets what is read at a path.
func shellySetter(at path) (method, params string, err error) {
	if len(at) == 2 {
		kind, id, _ := strings.Cut(at[0], ":")
		for _, known := range []struct{ kind, field, method, param string }{
			{"switch", "output", "Switch.Set", "on"},
			{"light", "output", "Light.Set", "on"},
			{"light", "brightness", "Light.Set", "brightness"},
			{"cover", "current_pos", "Cover.GoToPosition", "pos"},
			{"thermostat", "target_C", "Thermostat.SetConfig", ""},
			{"boolean", "value", "Boolean.Set", "value"},
			{"number", "value", "Number.Set", "value"},
			{"text", "value", "Text.Set", "value"},
			{"enum", "value", "Enum.Set", "value"},
		} {
			if kind != known.kind || at[1] != known.field || !isNumber(id) {
				continue
			}
			if known.param == "" {
				return known.method, `"id":` + id + `,"config":{"` + at[1] + `":${value}}`, nil
			}
			return known.method, `"id":` + id + `,"` + known.param + `":${value}`, nil
		}
	}
	return "", "", fmt.Errorf("no call is known to set %s; set write.payload", at)
}

// shelly is what is known of a device's components.
type shelly struct {
	known map[string]any     // status by component; of those that are read
	reads map[string][]*read // by component
}

func attachShelly(c *compiler) error {
	id := c.device.params["id"]
	s := &shelly{known: map[string]any{}, reads: map[string][]*read{}}
	for _, r := range c.device.routes {
		component, ok := strings.CutPrefix(r.filter, id+"/status/")
		if !ok || len(r.reads) == 0 || strings.ContainsAny(component, "+#/") {
			continue
		}
		s.reads[component] = r.reads
		r.handle = func(p *packet, out []devicetwin.Reading) []devicetwin.Reading {
			if doc, err := p.json(); err == nil && len(p.Payload) <= MaxPayload {
				s.known[component] = doc
			}
			return out
		}
	}
	if len(s.reads) == 0 {
		return nil
	}
	events, err := c.filter("${id}/events/rpc")
	if err != nil {
		return err
	}
	answers, err := c.filter("${replyTo}/rpc")
	if err != nil {
		return err
	}
	c.listen(events, true, s.notified)
	c.listen(answers, false, s.answered)
	c.device.morePublished = append(c.device.morePublished, answers)
	return nil
}

// notified takes NotifyStatus and NotifyFullStatus.
func (s *shelly) notified(p *packet, out []devicetwin.Reading) []devicetwin.Reading {
	frame, ok := objectOf(p)
	if !ok {
		return out
	}
	params, ok := frame["params"].(map[string]any)
	if !ok {
		return out
	}
	switch frame["method"] {
	case "NotifyStatus":
		return s.lay(p, params, params["ts"], true, out)
	case "NotifyFullStatus":
		return s.lay(p, params, params["ts"], false, out)
	}
	return out
}

// answered takes the answer to Shelly.GetStatus.
func (s *shelly) answered(p *packet, out []devicetwin.Reading) []devicetwin.Reading {
	frame, ok := objectOf(p)
	if !ok {
		return out
	}
	if result, ok := frame["result"].(map[string]any); ok {
		return s.lay(p, result, nil, false, out)
	}
	return out
}

func (s *shelly) lay(p *packet, components map[string]any, ts any, partial bool, out []devicetwin.Reading) []devicetwin.Reading {
	at := parseTime(ts, "s")
	for _, component := range slices.Sorted(maps.Keys(s.reads)) {
		reads := s.reads[component]
		said, ok := components[component]
		if !ok {
			continue
		}
		whole := said
		if partial {
			whole = overlay(s.known[component], said)
		}
		s.known[component] = whole
		var touched []*read
		for _, r := range reads {
			if _, ok := r.path.find(said); ok || r.value != nil {
				touched = append(touched, r)
			}
		}
		from := len(out)
		out = applyAll(touched, p.with(whole), out)
		for i := from; i < len(out); i++ {
			if out[i].TS.IsZero() {
				out[i].TS = at
			}
		}
	}
	return out
}

// overlay lays a part over what is known; null deletes.
func overlay(known, part any) any {
	p, ok := part.(map[string]any)
	if !ok {
		return part
	}
	out := map[string]any{}
	if k, ok := known.(map[string]any); ok {
		for name, v := range k {
			out[name] = v
		}
	}
	for name, v := range p {
		if v == nil {
			delete(out, name)
			continue
		}
		out[name] = overlay(out[name], v)
	}
	return out
}

// objectOf is the payload, if it is a JSON object of a size that is read.
func objectOf(p *packet) (map[string]any, bool) {
	if len(p.Payload) > MaxPayload || len(p.Payload) == 0 {
		return nil, false
	}
	doc, err := p.json()
	if err != nil {
		return nil, false
	}
	o, ok := doc.(map[string]any)
	return o, ok
}
