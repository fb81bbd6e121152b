package profile

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
)

// homeassistant: a device that announces itself as Home Assistant's discovery
// wants it. Param config is the topic of its config: that of a whole device
// (homeassistant/device/<id>/config) or of one entity. A property's read.path
// names the component of a device's config (default: the property's name);
// read.topic is another config's topic, for devices that have one for each
// entity.
//
// State and command topics, words and availability come from the config, each
// time it comes. Of templates, those are understood that only say where a value
// is: {{ value }} and {{ value_json.a.b }}, with |float, |int and |is_defined.
// Of any other the property says so, and wants its read and write written out
// in a model of profile json.
var homeassistant = profile{
	text: true, ownReads: true, ownWrites: true,
	prepare: func(c *compiler) error {
		_, err := c.need("config")
		return err
	},
	property: func(c *compiler, p *v1alpha1.Property) error {
		if len(p.Read) == 0 {
			p.Read = []v1alpha1.Read{{Path: p.Name}}
		}
		// The config tells both; nothing is read or written as the model has it.
		for i := range p.Read {
			p.Read[i].TS = nil
		}
		return nil
	},
	attach: attachHomeAssistant,
}

// haConfig is one entity of a discovery config, its abbreviations spelled out.
type haConfig struct {
	component     string // sensor, switch …
	state         string // topics
	command       string
	value         string // templates
	commandValue  string
	on, off       string // words; "": the component's
	availability  []haAvailability
	name, id      string
	device        map[string]any
	commandRetain bool
	qos           byte
	enum          []string
}

type haAvailability struct{ topic, value, online, offline string }

// haShort are the abbreviations that are used here.
var haShort = map[string]string{
	"stat_t": "state_topic", "cmd_t": "command_topic", "val_tpl": "value_template", "cmd_tpl": "command_template",
	"stat_val_tpl": "state_value_template",
	"avty":         "availability", "avty_t": "availability_topic", "avty_tpl": "availability_template",
	"pl_on": "payload_on", "pl_off": "payload_off", "pl_avail": "payload_available", "pl_not_avail": "payload_not_available",
	"stat_on": "state_on", "stat_off": "state_off", "uniq_id": "unique_id", "obj_id": "object_id", "dev": "device",
	"cmps": "components", "p": "platform", "o": "origin", "ids": "identifiers", "mf": "manufacturer", "mdl": "model",
	"sw": "sw_version", "hw": "hw_version", "sa": "suggested_area", "ret": "retain", "t": "topic", "ops": "options",
	"cns": "connections", "pl_prs": "payload_press", "pl_lock": "payload_lock", "pl_unlk": "payload_unlock",
}

// decodeHA reads a discovery config. The entities are keyed by their component
// keys; of one that is not a whole device's the key is "".
func decodeHA(topic string, payload []byte) (map[string]haConfig, map[string]any, error) {
	if len(payload) > MaxPayload {
		return nil, nil, errPayloadSize(len(payload))
	}
	doc, err := decodeJSON(payload)
	if err != nil {
		return nil, nil, err
	}
	o, ok := haSpell(doc).(map[string]any)
	if !ok {
		return nil, nil, errors.New("no JSON object")
	}
	device := object(o, "device")
	components := object(o, "components")
	if components == nil {
		e := haEntity(o, haComponent(topic))
		e.device = device
		return map[string]haConfig{"": e}, device, nil
	}
	if len(components) > 500 {
		return nil, nil, fmt.Errorf("%d components", len(components))
	}
	out := map[string]haConfig{}
	for key, v := range components {
		part, ok := v.(map[string]any)
		if !ok {
			continue
		}
		whole := map[string]any{}
		// What all components share stands beside them.
		for _, name := range []string{"~", "state_topic", "command_topic", "availability", "availability_topic", "availability_template",
			"payload_available", "payload_not_available", "qos", "retain"} {
			if shared, ok := o[name]; ok {
				whole[name] = shared
			}
		}
		maps.Copy(whole, part)
		e := haEntity(whole, text(part, "platform"))
		e.device = device
		out[key] = e
	}
	return out, device, nil
}

// haComponent is the second level of a config's topic.
func haComponent(topic string) string {
	levels := strings.Split(topic, "/")
	for i := len(levels) - 3; i >= 1; i-- {
		switch levels[i] {
		case "sensor", "binary_sensor", "switch", "light", "number", "select", "text", "lock", "button", "fan", "valve", "siren":
			return levels[i]
		}
	}
	return ""
}

// haSpell spells abbreviated keys out.
func haSpell(v any) any {
	switch v := v.(type) {
	case map[string]any:
		out := make(map[string]any, len(v))
		for _, k := range slices.Sorted(maps.Keys(v)) {
			long := k
			if l, ok := haShort[k]; ok {
				long = l
			}
			if _, taken := out[long]; taken && long != k {
				continue
			}
			if long == "components" { // its keys are names, not words of HA
				if parts, ok := v[k].(map[string]any); ok {
					spelled := make(map[string]any, len(parts))
					for name, part := range parts {
						spelled[name] = haSpell(part)
					}
					out[long] = spelled
					continue
				}
			}
			out[long] = haSpell(v[k])
		}
		return out
	case []any:
		out := make([]any, len(v))
		for i, e := range v {
			out[i] = haSpell(e)
		}
		return out
	}
	return v
}

func haEntity(o map[string]any, component string) haConfig {
	base := text(o, "~")
	topic := func(names ...string) string {
		t := text(o, names...)
		if base != "" {
			if strings.HasPrefix(t, "~") {
				t = base + t[1:]
			} else if strings.HasSuffix(t, "~") {
				t = t[:len(t)-1] + base
			}
		}
		return t
	}
	e := haConfig{
		component: component,
		state:     topic("state_topic"), command: topic("command_topic"),
		value: text(o, "value_template", "state_value_template"), commandValue: text(o, "command_template"),
		on: text(o, "payload_on"), off: text(o, "payload_off"),
		name: text(o, "name"), id: text(o, "unique_id", "object_id"),
		commandRetain: o["retain"] == true,
	}
	if q, err := strconv.Atoi(text(o, "qos")); err == nil && q >= 0 && q <= 2 {
		e.qos = byte(q)
	}
	if component == "lock" {
		e.on, e.off = text(o, "payload_lock"), text(o, "payload_unlock")
	}
	for _, v := range listOf(o["options"]) {
		if s, ok := wordOf(v); ok {
			e.enum = append(e.enum, s)
		}
	}
	add := func(a map[string]any, t, value string) {
		if base != "" {
			if strings.HasPrefix(t, "~") {
				t = base + t[1:]
			} else if strings.HasSuffix(t, "~") {
				t = t[:len(t)-1] + base
			}
		}
		one := haAvailability{topic: t, value: value, online: text(a, "payload_available"), offline: text(a, "payload_not_available")}
		if one.online == "" {
			one.online = "online"
		}
		if one.offline == "" {
			one.offline = "offline"
		}
		if t != "" && len(e.availability) < 8 {
			e.availability = append(e.availability, one)
		}
	}
	add(o, text(o, "availability_topic"), text(o, "availability_template"))
	for _, v := range listOf(o["availability"]) {
		if a, ok := v.(map[string]any); ok {
			add(a, text(a, "topic"), text(a, "value_template"))
		}
	}
	return e
}

func listOf(v any) []any {
	if m, ok := v.(map[string]any); ok {
		return []any{m}
	}
	l, _ := v.([]any)
	return l
}

var (
	jinjaWhole = regexp.MustCompile(`^\{\{-?\s*(value_json|value)((?:\.\w+|\[\s*'[^'\]]*'\s*\]|\[\s*"[^"\]]*"\s*\]|\[\s*\d+\s*\])*)\s*((?:\|\s*\w+(?:\(\s*\d*\s*\))?\s*)*)-?\}\}$`)
	jinjaStep  = regexp.MustCompile(`\.(\w+)|\[\s*'([^']*)'\s*\]|\[\s*"([^"]*)"\s*\]|\[\s*(\d+)\s*\]`)
	jinjaValue = regexp.MustCompile(`\{\{-?\s*value\s*-?\}\}`)
)

// haPath is where a value template finds its value; json tells whether the
// payload is JSON.
func haPath(template string) (p path, isJSON bool, err error) {
	template = strings.TrimSpace(template)
	if template == "" {
		return nil, false, nil
	}
	m := jinjaWhole.FindStringSubmatch(template)
	if m == nil || m[1] == "value" && m[2] != "" {
		return nil, false, fmt.Errorf("template %.80q is more than {{ value_json.path }}; write this property's read in a model of profile json", template)
	}
	for _, filter := range strings.Split(m[3], "|")[min(1, strings.Count(m[3], "|")):] {
		switch strings.TrimSpace(filter) {
		case "", "float", "int", "is_defined", "float()", "int()", "float(0)", "int(0)":
		default:
			return nil, false, fmt.Errorf("template %.80q: filter %s is not understood; write this property's read in a model of profile json", template, strings.TrimSpace(filter))
		}
	}
	for _, step := range jinjaStep.FindAllStringSubmatch(m[2], maxPathSegments) {
		for _, s := range step[1:] {
			if s != "" {
				p = append(p, s)
				break
			}
		}
	}
	return p, m[1] == "value_json", nil
}

// haPayload makes a command template one of ours.
func haPayload(command string) (string, error) {
	if command == "" {
		return "${value}", nil
	}
	command = strings.ReplaceAll(command, "${", "$ {") // ours, and no device's
	out := jinjaValue.ReplaceAllString(command, "$${value}")
	if strings.Contains(out, "{{") || strings.Contains(out, "{%") {
		return "", fmt.Errorf("template %.80q is more than {{ value }}; write this property's write in a model of profile json", command)
	}
	return out, nil
}

// haWords are the words of an entity for true and false.
func (e *haConfig) words() (yes, no string) {
	yes, no = e.on, e.off
	if yes == "" {
		yes = "ON"
		if e.component == "lock" {
			yes = "LOCK"
		}
	}
	if no == "" {
		no = "OFF"
		if e.component == "lock" {
			no = "UNLOCK"
		}
	}
	return yes, no
}

// ha is what a device's configs have told.
type ha struct {
	*compiler
	want   map[string]map[string]*property // config topic → component key → property
	routes map[string][]*route             // by config topic
	writes map[string]*haWrite             // by property
	errs   map[string]error                // by property: why not
}

type haWrite struct {
	codec *codec
	write *write
}

func attachHomeAssistant(c *compiler) error {
	h := &ha{compiler: c, want: map[string]map[string]*property{}, routes: map[string][]*route{},
		writes: map[string]*haWrite{}, errs: map[string]error{}}
	for _, name := range c.device.names {
		p := c.device.readings[name]
		if p == nil || len(p.Read) == 0 {
			continue
		}
		topic, err := c.filter(cmpText(p.Read[0].Topic, "${config}"))
		if err != nil {
			c.device.problems[name] = err
			continue
		}
		if h.want[topic] == nil {
			h.want[topic] = map[string]*property{}
		}
		key := p.Read[0].Path
		if p.Read[0].Topic != "" {
			key = ""
		}
		h.want[topic][key] = p
	}
	// A read of another config's topic was taken for one of values.
	c.device.routes = slices.DeleteFunc(c.device.routes, func(r *route) bool { return len(r.reads) > 0 })
	for topic := range h.want {
		c.device.routes = append(c.device.routes, &route{filter: topic, device: c.device, spoken: true,
			handle: func(p *packet, out []devicetwin.Reading) []devicetwin.Reading { return h.configured(topic, p, out) }})
	}
	c.device.ownWrite = h.write
	return nil
}

func cmpText(s, otherwise string) string {
	if s != "" {
		return s
	}
	return otherwise
}

// configured takes a config: the device's topics are those of the last one.
func (h *ha) configured(topic string, p *packet, out []devicetwin.Reading) []devicetwin.Reading {
	entities := map[string]haConfig{}
	if len(p.Payload) > 0 {
		var err error
		if entities, _, err = decodeHA(topic, p.Payload); err != nil {
			for _, key := range slices.Sorted(maps.Keys(h.want[topic])) {
				out = append(out, devicetwin.Reading{Property: h.want[topic][key].Name, Bad: fmt.Errorf("discovery config: %w", err)})
			}
			return out
		}
	}
	byFilter := map[string]*route{}
	var routes []*route
	seen := map[haAvailability]bool{}
	for _, key := range slices.Sorted(maps.Keys(h.want[topic])) {
		prop := h.want[topic][key]
		e, ok := entities[key]
		if !ok && len(entities) == 1 {
			e, ok = entities[""]
		}
		delete(h.writes, prop.Name)
		delete(h.errs, prop.Name)
		if !ok {
			h.errs[prop.Name] = fmt.Errorf("the device's config has no component %q", key)
			continue
		}
		r, err := h.entity(prop, e)
		if err != nil {
			h.errs[prop.Name] = err
			out = append(out, devicetwin.Reading{Property: prop.Name, Bad: err})
			continue
		}
		if r != nil {
			known := byFilter[e.state]
			if known == nil {
				known = &route{filter: e.state, device: h.device, spoken: true}
				byFilter[e.state] = known
				routes = append(routes, known)
			}
			known.reads = append(known.reads, r)
		}
		for _, a := range e.availability {
			if seen[a] {
				continue
			}
			seen[a] = true
			at, isJSON, err := haPath(a.value)
			if err != nil || h.foreign(a.topic) {
				continue
			}
			if !isJSON {
				at = nil
			}
			routes = append(routes, h.presenceRoute(a, at))
		}
	}
	h.routes[topic] = routes
	h.device.extra = nil
	for _, t := range slices.Sorted(maps.Keys(h.routes)) {
		h.device.extra = append(h.device.extra, h.routes[t]...)
	}
	h.driver.resubscribe()
	return out
}

func (h *ha) presenceRoute(a haAvailability, at path) *route {
	pr := &presence{path: at, online: a.online, offline: a.offline}
	return &route{filter: a.topic, device: h.device, told: true, handle: func(p *packet, out []devicetwin.Reading) []devicetwin.Reading {
		if state := pr.state(p); state != "" {
			h.driver.sight(h.device, devicetwin.Sighting{Evidence: devicetwin.EvidenceAvailability, State: state, Retained: p.Retain})
		}
		return out
	}}
}

// foreign tells whether a topic that a config names is none of a device's.
func (h *ha) foreign(topic string) bool {
	return checkTopic(topic) != nil || isOurs(topic) || strings.HasPrefix(topic, "$")
}

// entity makes a read and a write of what a config tells.
func (h *ha) entity(prop *property, e haConfig) (*read, error) {
	spec := prop.Property
	if spec.Type == v1alpha1.TypeBool && len(spec.Map) == 0 {
		yes, no := e.words()
		words(&spec, yes, no)
	}
	cod, err := newCodec(&spec)
	if err != nil {
		return nil, err
	}
	if e.command != "" && writable(&spec) {
		payload, err := haPayload(e.commandValue)
		if err != nil {
			return nil, err
		}
		if h.foreign(e.command) {
			return nil, fmt.Errorf("command topic %.80q is none of a device's", e.command)
		}
		t, err := parseTemplate(payload, func(name string) bool { return name == "value" })
		if err != nil {
			return nil, err
		}
		h.writes[spec.Name] = &haWrite{cod, &write{topic: e.command, payload: t, qos: max(e.qos, 1), retain: e.commandRetain}}
	}
	if e.state == "" {
		return nil, nil
	}
	if h.foreign(e.state) {
		return nil, fmt.Errorf("state topic %.80q is none of a device's", e.state)
	}
	at, isJSON, err := haPath(e.value)
	if err != nil {
		return nil, err
	}
	return &read{property: spec.Name, codec: cod, path: at, text: !isJSON}, nil
}

func (h *ha) write(ctx context.Context, p *property, v any, w devicetwin.WriteRequest) error {
	h.device.mu.Lock()
	to, why := h.writes[p.Name], h.errs[p.Name]
	h.device.mu.Unlock()
	if to == nil {
		if why == nil {
			why = errors.New("its discovery config has not come, or names no command topic")
		}
		return fmt.Errorf("device %s: property %s: %w", h.device.key, p.Name, why)
	}
	value, err := to.codec.encode(v, nil)
	if err == nil {
		_, err = h.driver.send(ctx, h.device, to.write, w.Expires, 0, func(name string) (word, bool) { return value, name == "value" })
	}
	if err != nil {
		return fmt.Errorf("device %s: property %s: %w", h.device.key, p.Name, err)
	}
	return nil
}

// haDevice gathers the configs of one device, which may come one by one.
type haDevice struct {
	entities map[string]bool // component and id
	configs  map[string]bool // topics
	manual   bool
}

func announcedHomeAssistant(x *discovery, base string, p *packet) []announcement {
	if !strings.HasSuffix(p.Topic, "/config") || len(p.Payload) == 0 {
		return nil
	}
	entities, device, err := decodeHA(p.Topic, p.Payload)
	if err != nil {
		return nil
	}
	id := text(device, "identifiers")
	if l := listOf(device["identifiers"]); len(l) > 0 {
		id, _ = wordOf(l[0])
	}
	if id == "" {
		if l := listOf(device["connections"]); len(l) > 0 {
			raw, _ := json.Marshal(l[0])
			id = string(raw)
		}
	}
	if id == "" {
		id = p.Topic
	}
	g := x.devices[id]
	if g == nil {
		if len(x.devices) >= 2*maxCandidates {
			x.dropped++
			return nil
		}
		g = &haDevice{entities: map[string]bool{}, configs: map[string]bool{}}
		x.devices[id] = g
	}
	for key, e := range entities {
		if len(g.entities) < 200 {
			g.entities[e.component+":"+cmpText(key, cmpText(e.id, e.name))] = true
		}
		if _, _, err := haPath(e.value); err != nil {
			g.manual = true
		}
		if _, err := haPayload(e.commandValue); err != nil {
			g.manual = true
		}
	}
	if len(g.configs) < 200 {
		g.configs[p.Topic] = true
	}
	configs := slices.Sorted(maps.Keys(g.configs))
	attributes := map[string]string{
		"id": id, "name": text(device, "name"), "manufacturer": text(device, "manufacturer"), "model": text(device, "model"),
		"version": text(device, "sw_version"), "viaDevice": text(device, "via_device"),
		"entities": strings.Join(slices.Sorted(maps.Keys(g.entities)), ","), "configs": strings.Join(configs, ","),
	}
	if g.manual {
		attributes["manual"] = "true" // a template is more than a path
	}
	return []announcement{{identity: id, attributes: attributes, params: map[string]string{"config": configs[0]}}}
}
