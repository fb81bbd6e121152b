package profile

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/mqtt"
)

// Caps of discovery. What announces itself is not asked whether it may.
const (
	maxCandidates     = 500 // of this node
	newPerSecond      = 20
	maxAttributes     = 16
	maxAttributeBytes = 256
	tellAfter         = time.Second // announcements come in bursts
	seenAgainAfter    = time.Minute // between two tellings of the same
)

// discovery watches for what announces itself.
type discovery struct {
	driver *Driver
	key    devicetwin.Key
	spec   v1alpha1.DeviceDiscoverySpec
	print  string
	routes []*route

	mu      sync.Mutex
	found   map[string]*sighted // by identity
	dropped int
	telling bool
	gone    bool
	devices map[string]*haDevice // of Home Assistant, by its identifier
	asked   map[string]string    // Shellys: topic prefix by the number of the question
}

// sighted is a candidate, and when it was last told of.
type sighted struct {
	candidate v1alpha1.Candidate
	told      time.Time
}

// announcement is what a source makes of a message.
type announcement struct {
	identity   string // the same at every sight
	attributes map[string]string
	params     map[string]string
}

// source is how devices of one profile announce themselves.
type source struct {
	filters func(base string) []string
	base    string // default of param base
	// read finds announcements in a message.
	read func(x *discovery, base string, p *packet) []announcement
}

var sources = map[string]source{
	v1alpha1.ProfileZigbee2MQTT: {base: "zigbee2mqtt",
		filters: func(base string) []string { return []string{base + "/bridge/devices"} },
		read:    announcedZigbee},
	v1alpha1.ProfileTasmota: {base: "tasmota/discovery",
		filters: func(base string) []string { return []string{base + "/+/config"} },
		read:    announcedTasmota},
	v1alpha1.ProfileHomie5: {base: "homie",
		filters: func(base string) []string { return []string{base + "/5/+/$description"} },
		read:    announcedHomie},
	v1alpha1.ProfileHomeAssistant: {base: "homeassistant",
		filters: func(base string) []string { return []string{base + "/#"} },
		read:    announcedHomeAssistant},
	v1alpha1.ProfileSparkplugB: {base: "spBv1.0",
		filters: func(base string) []string { return []string{base + "/+/NBIRTH/+", base + "/+/DBIRTH/+/+"} },
		read:    announcedSparkplug},
	v1alpha1.ProfileShelly2: {base: "+",
		filters: func(base string) []string { return []string{base + "/online"} },
		read:    announcedShelly},
	v1alpha1.ProfileKubeEdge: {base: "$hw/events/device",
		filters: func(base string) []string {
			return []string{base + "/+/twin/update", base + "/+/+/twin/update", base + "/+/state/update", base + "/+/+/state/update"}
		},
		read: announcedKubeEdge},
}

// setDiscoveriesLocked keeps what has been found by those that did not change.
func (d *Driver) setDiscoveriesLocked(want []*v1alpha1.DeviceDiscovery) {
	next := map[devicetwin.Key]*discovery{}
	for _, w := range want {
		key := devicetwin.Key{Namespace: w.Namespace, Name: w.Name}
		raw, err := json.Marshal([]any{w.UID, w.Spec.Source, w.Spec.Match, w.Spec.Block})
		if err != nil {
			continue
		}
		if old := d.discoveries[key]; old != nil && old.print == string(raw) {
			next[key] = old
			continue
		}
		x := &discovery{driver: d, key: key, spec: w.Spec, print: string(raw), found: map[string]*sighted{}, devices: map[string]*haDevice{}, asked: map[string]string{}}
		if err := x.listen(); err != nil {
			d.log.Warn("discovery", "discovery", key.String(), "err", err)
			continue
		}
		next[key] = x
	}
	for key, old := range d.discoveries {
		if next[key] != old {
			d.timers.after(0, func() {
				old.mu.Lock()
				defer old.mu.Unlock()
				old.gone = true
				d.candidates.give(len(old.found))
			})
		}
	}
	d.discoveries = next
}

func (x *discovery) listen() error {
	s, ok := sources[x.spec.Source.Profile]
	if !ok {
		return fmt.Errorf("devices of profile %q do not announce themselves; those of %s do",
			x.spec.Source.Profile, strings.Join(slices.Sorted(maps.Keys(sources)), ", "))
	}
	base := s.base
	if given := x.spec.Source.Params["base"]; given != "" {
		base = given
		if strings.ContainsAny(base, "+#$") {
			return fmt.Errorf("source.params.base %q: has + # or $ in it", base)
		}
	}
	for _, filter := range s.filters(base) {
		if err := checkFilter(filter); err != nil {
			return err
		}
		x.routes = append(x.routes, &route{filter: filter, handle: func(p *packet, out []devicetwin.Reading) []devicetwin.Reading {
			x.mu.Lock()
			defer x.mu.Unlock()
			if len(p.Payload) <= 4<<20 && !x.gone {
				for _, a := range s.read(x, base, p) {
					x.seeLocked(a)
				}
			}
			return out
		}})
	}
	if x.spec.Source.Profile == v1alpha1.ProfileShelly2 {
		x.routes = append(x.routes, &route{filter: x.replyTo() + "/rpc", handle: func(p *packet, out []devicetwin.Reading) []devicetwin.Reading {
			x.mu.Lock()
			defer x.mu.Unlock()
			if a, ok := answeredShelly(x, p); ok && !x.gone {
				x.seeLocked(a)
			}
			return out
		}})
	}
	return nil
}

func (x *discovery) replyTo() string {
	return replyTo(x.driver.cfg.Node, devicetwin.Key{Namespace: "discovery " + x.key.Namespace, Name: x.key.Name})
}

// seeLocked takes an announcement under the caps.
func (x *discovery) seeLocked(a announcement) {
	if a.identity == "" || len(a.identity) > 512 {
		return
	}
	bounded := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(a.attributes)) {
		if v := clip(a.attributes[name], maxAttributeBytes); v != "" && len(bounded) < maxAttributes {
			bounded[name] = v
		}
	}
	a.attributes = bounded
	for _, v := range a.params {
		if len(v) > 512 {
			return // a param that was cut would be another
		}
	}
	if !matches(x.spec.Match, x.spec.Block, a.attributes) {
		return
	}
	now := time.Now()
	known := x.found[a.identity]
	if known == nil {
		if !x.driver.candidates.take(now) {
			x.dropped++
			x.tellSoonLocked()
			return
		}
		known = &sighted{candidate: v1alpha1.Candidate{Node: x.driver.cfg.Node, Name: candidateName(x.spec.Source.Profile, a)}}
		x.found[a.identity] = known
	}
	c := &known.candidate
	changed := !maps.Equal(c.Attributes, a.attributes) || !maps.Equal(c.Params, a.params)
	c.Attributes, c.Params, c.LastSeen = a.attributes, a.params, metav1.NewTime(now)
	if changed || now.Sub(known.told) >= seenAgainAfter {
		known.told = now
		x.tellSoonLocked()
	}
}

// tellSoonLocked has the sink told once for a burst.
func (x *discovery) tellSoonLocked() {
	if x.telling {
		return
	}
	x.telling = true
	x.driver.timers.after(tellAfter, func() {
		x.mu.Lock()
		x.telling = false
		gone := x.gone
		out := make([]v1alpha1.Candidate, 0, len(x.found))
		for _, s := range x.found {
			c := s.candidate
			c.Attributes, c.Params = maps.Clone(c.Attributes), maps.Clone(c.Params)
			out = append(out, c)
		}
		dropped := x.dropped
		x.mu.Unlock()
		if gone {
			return
		}
		slices.SortFunc(out, func(a, b v1alpha1.Candidate) int { return cmp.Compare(a.Name, b.Name) })
		x.driver.cfg.Sink.Found(x.key, out, dropped)
	})
}

// candidateName is profile-slug-hash6: the same at every sight, on every node,
// and a name that Kubernetes takes.
func candidateName(profile string, a announcement) string {
	readable := a.attributes["friendlyName"]
	for _, name := range []string{"name", "id", "device", "edgeNode"} {
		if readable == "" {
			readable = a.attributes[name]
		}
	}
	var slug strings.Builder
	for _, r := range strings.ToLower(readable) {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9':
			slug.WriteRune(r)
		case slug.Len() > 0 && !strings.HasSuffix(slug.String(), "-"):
			slug.WriteByte('-')
		}
		if slug.Len() >= 30 {
			break
		}
	}
	sum := sha256.Sum256([]byte(a.identity))
	name := strings.ToLower(profile)
	if s := strings.Trim(slug.String(), "-"); s != "" {
		name += "-" + s
	}
	return name + "-" + hex.EncodeToString(sum[:3])
}

// matches lets through what every rule of match allows and no rule of block
// has, as EdgeX's provision watchers do.
func matches(match, block map[string][]string, attributes map[string]string) bool {
	hit := func(name string, globs []string) bool {
		return slices.ContainsFunc(globs, func(glob string) bool { return globbed(glob, attributes[name]) })
	}
	for name, globs := range match {
		if !hit(name, globs) {
			return false
		}
	}
	for name, globs := range block {
		if hit(name, globs) {
			return false
		}
	}
	return true
}

// globbed tells whether s is glob, in which * stands for any text.
func globbed(glob, s string) bool {
	parts := strings.Split(glob, "*")
	if len(parts) == 1 {
		return glob == s
	}
	rest, ok := strings.CutPrefix(s, parts[0])
	if !ok {
		return false
	}
	for _, part := range parts[1 : len(parts)-1] {
		_, after, ok := strings.Cut(rest, part)
		if !ok {
			return false
		}
		rest = after
	}
	return strings.HasSuffix(rest, parts[len(parts)-1])
}

func clip(s string, n int) string {
	if len(s) > n {
		s = s[:n]
	}
	return strings.ToValidUTF8(s, "")
}

// budget is how many candidates there may be, and come, on this node.
type budget struct {
	mu     sync.Mutex
	held   int
	tokens float64
	at     time.Time
}

func (b *budget) take(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.at.IsZero() {
		b.tokens = maxCandidates // what is retained comes at once, at the start
	} else {
		b.tokens = min(b.tokens+now.Sub(b.at).Seconds()*newPerSecond, maxCandidates)
	}
	b.at = now
	if b.held >= maxCandidates || b.tokens < 1 {
		return false
	}
	b.tokens--
	b.held++
	return true
}

func (b *budget) give(n int) {
	b.mu.Lock()
	b.held -= n
	b.mu.Unlock()
}

// text is a scalar of a JSON object, as text.
func text(o map[string]any, names ...string) string {
	for _, name := range names {
		if s, ok := wordOf(o[name]); ok && o[name] != nil {
			return s
		}
	}
	return ""
}

func object(o map[string]any, names ...string) map[string]any {
	for _, name := range names {
		if m, ok := o[name].(map[string]any); ok {
			return m
		}
	}
	return nil
}

func level(topic string, i int) string {
	levels := strings.Split(topic, "/")
	if i < 0 {
		i += len(levels)
	}
	if i < 0 || i >= len(levels) {
		return ""
	}
	return levels[i]
}

func announcedZigbee(x *discovery, base string, p *packet) []announcement {
	// The whole network in one message: it may be large.
	doc, err := p.json()
	list, ok := doc.([]any)
	if err != nil || !ok {
		return nil
	}
	var out []announcement
	for _, e := range list {
		o, ok := e.(map[string]any)
		if !ok || o["type"] == "Coordinator" {
			continue
		}
		ieee, name := text(o, "ieee_address"), text(o, "friendly_name")
		if ieee == "" || name == "" {
			continue
		}
		def := object(o, "definition")
		out = append(out, announcement{identity: ieee, params: map[string]string{"topic": base + "/" + name},
			attributes: map[string]string{
				"friendlyName": name, "ieeeAddress": ieee, "type": text(o, "type"), "powerSource": text(o, "power_source"),
				"modelId": text(o, "model_id"), "manufacturer": text(o, "manufacturer"),
				"model": text(def, "model"), "vendor": text(def, "vendor"), "description": text(def, "description"),
				"exposes": strings.Join(exposed(def["exposes"], 0), ","),
			}})
	}
	return out
}

// exposed are the properties that a Zigbee2MQTT definition tells.
func exposed(v any, depth int) []string {
	list, _ := v.([]any)
	var out []string
	for _, e := range list {
		o, ok := e.(map[string]any)
		if !ok {
			continue
		}
		if name := text(o, "property"); name != "" {
			out = append(out, name)
		} else if depth < 4 {
			out = append(out, exposed(o["features"], depth+1)...)
		}
	}
	return out
}

func announcedTasmota(x *discovery, base string, p *packet) []announcement {
	o, ok := objectOf(p)
	if !ok {
		return nil
	}
	mac, topic := text(o, "mac"), text(o, "t")
	if mac == "" || topic == "" {
		return nil
	}
	return []announcement{{identity: mac, params: map[string]string{"topic": topic},
		attributes: map[string]string{
			"name": text(o, "dn"), "mac": mac, "ip": text(o, "ip"), "hostname": text(o, "hn"), "model": text(o, "md"),
			"version": text(o, "sw"), "fullTopic": text(o, "ft"), "topic": topic,
		}}}
}

func announcedHomie(x *discovery, base string, p *packet) []announcement {
	o, ok := objectOf(p)
	id := level(p.Topic, -2)
	if !ok || id == "" {
		return nil
	}
	return []announcement{{identity: base + "/" + id, params: map[string]string{"id": id},
		attributes: map[string]string{
			"id": id, "name": text(o, "name"), "homie": text(o, "homie"), "type": text(o, "type"),
			"root": text(o, "root"), "parent": text(o, "parent"),
			"nodes": strings.Join(slices.Sorted(maps.Keys(object(o, "nodes"))), ","),
		}}}
}

func announcedSparkplug(x *discovery, base string, p *packet) []announcement {
	levels := strings.Split(p.Topic, "/")
	payload, err := decodeSparkplug(p.Payload)
	if err != nil || len(levels) < 4 || p.Retain {
		return nil
	}
	var metrics []string
	for _, m := range payload.metrics {
		if m.name != "" && m.name != "bdSeq" && !strings.HasPrefix(m.name, "Node Control/") && len(metrics) < 100 {
			metrics = append(metrics, m.name)
		}
	}
	a := announcement{identity: strings.Join(levels[1:], "/"),
		params:     map[string]string{"group": levels[1], "edgeNode": levels[3]},
		attributes: map[string]string{"group": levels[1], "edgeNode": levels[3], "metrics": strings.Join(metrics, ",")}}
	if len(levels) == 5 {
		a.params["device"], a.attributes["device"] = levels[4], levels[4]
	}
	return []announcement{a}
}

// announcedShelly asks who is there: the topic tells only an id.
func announcedShelly(x *discovery, base string, p *packet) []announcement {
	id := strings.TrimSuffix(p.Topic, "/online")
	if string(p.Payload) != "true" || id == "" || strings.HasPrefix(id, "$") || len(id) > 128 {
		return nil
	}
	if len(x.asked) >= 2*maxCandidates {
		clear(x.asked)
	}
	seq := strconv.FormatInt(x.driver.nextSeq(), 10)
	x.asked[seq] = id
	x.driver.later(mqtt.Message{Topic: id + "/rpc", QoS: 1, Payload: fmt.Appendf(nil,
		`{"id":%s,"src":%q,"method":"Shelly.GetDeviceInfo"}`, seq, x.replyTo())})
	return nil
}

func answeredShelly(x *discovery, p *packet) (announcement, bool) {
	o, ok := objectOf(p)
	if !ok || p.Retain {
		return announcement{}, false
	}
	prefix, ok := x.asked[text(o, "id")]
	info := object(o, "result")
	id := text(info, "id")
	if !ok || id == "" {
		return announcement{}, false // nobody asked
	}
	delete(x.asked, text(o, "id"))
	return announcement{identity: id, params: map[string]string{"id": prefix},
		attributes: map[string]string{
			"id": id, "name": text(info, "name"), "mac": text(info, "mac"), "model": text(info, "model"),
			"app": text(info, "app"), "gen": text(info, "gen"), "version": text(info, "ver"), "profile": text(info, "profile"),
		}}, true
}

func announcedKubeEdge(x *discovery, base string, p *packet) []announcement {
	rest := strings.TrimPrefix(p.Topic, base+"/")
	rest = strings.TrimSuffix(strings.TrimSuffix(rest, "/twin/update"), "/state/update")
	namespace, name, two := strings.Cut(rest, "/")
	if !two {
		namespace, name = "default", rest
	}
	key := devicetwin.Key{Namespace: namespace, Name: name}
	if x.driver.knows(key) {
		return nil
	}
	var keys []string
	if msg, err := decodeHW(p.Payload); err == nil {
		keys = slices.Sorted(maps.Keys(msg.Twin))
	}
	return []announcement{{identity: key.String(), params: map[string]string{},
		attributes: map[string]string{"id": rest, "namespace": namespace, "name": name, "properties": strings.Join(keys, ",")}}}
}

// knows tells whether there is such a Device.
func (d *Driver) knows(key devicetwin.Key) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.devices[key] != nil
}
