package migrate

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
)

// device converts d, and its model as d has it.
func (c *converter) device(r *reporter, d *device, src *modelV1beta1, name string) *variant {
	out := &v1alpha1.Device{TypeMeta: typeMeta("Device"), ObjectMeta: c.metadata(r, &d.Metadata)}
	out.Namespace = namespaceOf(&d.Metadata)
	out.Spec.NodeName = d.Spec.NodeName
	if out.Spec.NodeName == "" {
		r.check("spec.nodeName", "it is on no node", "set spec.nodeName")
	}
	profile := c.opts.Profile
	switch {
	case isMQTT(d.Spec.Protocol.ProtocolName) && slices.ContainsFunc(d.Spec.Properties, func(p deviceProperty) bool { return len(p.Visitors.ConfigData) > 0 }):
		profile = v1alpha1.ProfileJSON
	case profile == "" && d.old:
		profile = v1alpha1.ProfileKubeEdge
	}
	// What is wrong with the model is told once, with the model.
	var findings []Finding
	v := &variant{model: c.model(&reporter{to: &findings}, src, name, profile), devices: []*v1alpha1.Device{out}, routes: map[string][]v1alpha1.RouteSink{}}
	if key := "told " + name; !c.routed[key] {
		c.routed[key] = true
		for _, f := range findings {
			f.Object = subject("DeviceModel", &src.Metadata)
			c.res.Findings = append(c.res.Findings, f)
		}
	}
	dc := &deviceConverter{converter: c, r: r, src: d, out: out, v: v}
	dc.protocol()
	visitors := map[string]map[string]json.RawMessage{}
	for i := range d.Spec.Properties {
		dc.property(i, visitors)
	}
	if len(visitors) > 0 {
		raw, err := json.Marshal(visitors)
		if err != nil {
			r.lost("spec.properties", err.Error(), "")
		} else {
			dc.config("visitors", raw)
		}
	}
	if v.model.Spec.Profile == v1alpha1.ProfileJSON {
		for i := range v.model.Spec.Properties {
			if p := &v.model.Spec.Properties[i]; len(p.Read) == 0 && p.Write == nil {
				p.Access = "r"
				r.check(fmt.Sprintf("spec.properties[%s]", p.Name), "the Device tells no topic for it: it will have no value", "")
				p.Read = []v1alpha1.Read{{Topic: "${" + dc.param(p.Name+"_topic", "unknown/"+out.Name+"/"+p.Name) + "}"}}
			}
		}
	}
	dc.methods()
	if s := d.Status; s.ReportCycle > 0 {
		if every := dc.cycle("status.reportCycle", s.ReportCycle); every > 0 {
			v.model.Spec.Liveness = &v1alpha1.Liveness{ExpectedInterval: metav1.Duration{Duration: every}}
		}
	}
	return v
}

func isMQTT(name string) bool { return strings.EqualFold(name, "mqtt") }

type deviceConverter struct {
	*converter
	r   *reporter
	src *device
	out *v1alpha1.Device
	v   *variant
}

// config sets a part of the model's profileConfig.
func (c *deviceConverter) config(name string, raw []byte) {
	if c.v.model.Spec.ProfileConfig == nil {
		c.v.model.Spec.ProfileConfig = map[string]v1alpha1.JSON{}
	}
	c.v.model.Spec.ProfileConfig[name] = v1alpha1.JSON{Raw: raw}
}

// ownNames are the node's, and no params.
var ownNames = []string{"node", "namespace", "device", "replyTo", "cmdSeq", "cmdId", "value"}

// param sets a param of the Device and returns its name.
func (c *deviceConverter) param(name, text string) string {
	name = strings.Map(func(r rune) rune {
		if r == '_' || r == '-' || r == '.' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' {
			return r
		}
		return '_'
	}, name)
	name = strings.Trim(name, ".-")
	if len(name) > 120 {
		name = strings.TrimRight(name[:120], ".-")
	}
	if name == "" || slices.Contains(ownNames, name) {
		name = "protocol_" + name
	}
	if c.out.Spec.Params == nil {
		c.out.Spec.Params = map[string]string{}
	}
	c.out.Spec.Params[name] = text
	return name
}

const maxParam = 1024

// protocol is how the device itself is reached.
func (c *deviceConverter) protocol() {
	p := c.src.Spec.Protocol
	if c.v.model.Spec.Profile == v1alpha1.ProfileJSON {
		for _, k := range slices.Sorted(maps.Keys(p.ConfigData)) {
			at := "spec.protocol.configData." + k
			if secret(k) {
				c.r.lost(at, "credentials are not kept in a Device", "put those of the broker into edgecore's config (devices.mqtt), the device's own into a Secret that spec.credentialsSecret names")
			} else {
				c.r.lost(at, "a node has one broker, which its devices share", "set devices.mqtt.url in edgecore's config, or leave it out to have edgecore's own")
			}
		}
		return
	}
	if c.v.model.Spec.Profile == v1alpha1.ProfileExternal && p.ProtocolName != "" {
		raw, _ := json.Marshal(p.ProtocolName)
		c.config("protocol", raw)
	}
	if c.v.model.Spec.Profile == v1alpha1.ProfileKubeEdge && len(p.ConfigData) > 0 {
		c.r.check("spec.protocol", "a mapper that speaks $hw topics has its own configuration; this is carried as params for it to read", "")
	}
	for _, k := range slices.Sorted(maps.Keys(p.ConfigData)) {
		at := "spec.protocol.configData." + k
		text := scalar(p.ConfigData[k])
		if len(text) > maxParam || len(c.out.Spec.Params) >= 60 {
			c.r.lost(at, fmt.Sprintf("longer than the %d bytes of a param, or one too many", maxParam), "keep it with the mapper")
			continue
		}
		if secret(k) {
			c.r.check(at, "a secret in plain text, carried as it was", "keep it with the mapper, or in a Secret")
		}
		c.param(k, text)
	}
}

func secret(key string) bool {
	key = strings.ToLower(key)
	return strings.Contains(key, "password") || strings.Contains(key, "privatekey") || strings.Contains(key, "secret") || key == "token" || key == "username"
}

// scalar is a JSON value as text: strings without their quotes.
func scalar(raw json.RawMessage) string {
	var s string
	if json.Unmarshal(raw, &s) == nil {
		return s
	}
	return string(raw)
}

// property is how one is reached and reported.
func (c *deviceConverter) property(i int, visitors map[string]map[string]json.RawMessage) {
	src := &c.src.Spec.Properties[i]
	at := fmt.Sprintf("spec.properties[%d]", i)
	n := slices.IndexFunc(c.v.model.Spec.Properties, func(p v1alpha1.Property) bool { return p.Name == src.Name })
	if n < 0 {
		c.r.lost(at, fmt.Sprintf("the model has no property %q that is carried", src.Name), "")
		return
	}
	p := &c.v.model.Spec.Properties[n]
	if slices.ContainsFunc(c.src.Spec.Properties[:i], func(q deviceProperty) bool { return q.Name == src.Name }) {
		c.r.lost(at, src.Name+" is there twice; the first one counts", "")
		return
	}
	collect, report := c.cycle(at+".collectCycle", src.CollectCycle), c.cycle(at+".reportCycle", src.ReportCycle)
	if report > 0 {
		p.Report.MinInterval = metav1.Duration{Duration: report}
	}
	show := src.ReportToCloud
	p.Report.Status = &show
	switch c.v.model.Spec.Profile {
	case v1alpha1.ProfileJSON:
		c.topics(at+".visitors", src, p)
		if collect > 0 {
			c.r.check(at+".collectCycle", "who speaks MQTT is not asked in cycles: each message counts when it comes", "")
		}
	case v1alpha1.ProfileExternal:
		if len(src.Visitors.ConfigData) > 0 {
			visitors[src.Name] = src.Visitors.ConfigData
		}
		if other := src.Visitors.ProtocolName; other != "" && other != c.src.Spec.Protocol.ProtocolName {
			c.r.check(at+".visitors.protocolName", fmt.Sprintf("%q is another protocol than the device's, which is %q", other, c.src.Spec.Protocol.ProtocolName), "give the property to a Device of its own")
		}
		if collect > 0 {
			p.Refresh = &v1alpha1.Refresh{Interval: metav1.Duration{Duration: collect}}
		}
	case v1alpha1.ProfileKubeEdge:
		if len(src.Visitors.ConfigData) > 0 {
			c.r.check(at+".visitors", "a mapper that speaks $hw topics gets no visitors from here", "give them to the mapper, or convert with --profile external for one that registers")
		}
		if collect > 0 {
			c.r.lost(at+".collectCycle", "a mapper that speaks $hw topics reports when it likes", "set it in the mapper")
		}
	}
	c.desired(at, src, p)
	c.push(at+".pushMethod", src, p)
}

// topics are those of KubeEdge's MQTT mapper, and of others that are much alike.
func (c *deviceConverter) topics(at string, src *deviceProperty, p *v1alpha1.Property) {
	data := maps.Clone(src.Visitors.ConfigData)
	take := func(names ...string) (text, name string) {
		for _, k := range slices.Sorted(maps.Keys(data)) {
			for _, n := range names {
				if strings.EqualFold(k, n) && text == "" {
					text, name = scalar(data[k]), k
					delete(data, k)
				}
			}
		}
		return text, name
	}
	topic, _ := take("topic", "subTopic", "subscribeTopic", "readTopic", "stateTopic")
	write, _ := take("pubTopic", "publishTopic", "writeTopic", "setTopic", "commandTopic")
	where, pathAt := take("jsonPath", "path", "field", "key")
	qos, _ := take("qos")
	retain, _ := take("retain", "retained")
	if topic != "" {
		read := v1alpha1.Read{Topic: c.topic(p.Name+"_topic", topic)}
		if where == "" {
			where = p.Name
			c.r.check(at, fmt.Sprintf("no path: the property is taken to be %s of a JSON object", p.Name), "")
		} else {
			where = strings.TrimPrefix(strings.TrimPrefix(where, "$"), ".")
			if strings.ContainsAny(where, "*?()'\"@") || strings.Contains(where, "..") {
				c.r.check(at+".configData."+pathAt, "paths have names and indices alone", "mend properties["+p.Name+"].read.path of the model, or use read.value")
			}
		}
		read.Path = where
		p.Read = []v1alpha1.Read{read}
	}
	switch {
	case write != "":
		w := &v1alpha1.Write{Topic: c.topic(p.Name+"_set_topic", write), Retain: retain == "true"}
		if n, err := strconv.ParseInt(qos, 10, 32); err == nil && n >= 0 && n <= 2 {
			q := int32(n)
			w.QoS = &q
		}
		p.Write = w
		if topic == "" && p.Access == "rw" {
			p.Access = "w"
		}
	case p.Access == "rw":
		p.Access = "r"
		c.r.check(at, "no topic to write to: the property can only be read", "set access and write of properties["+p.Name+"] of the model")
	}
	for _, k := range slices.Sorted(maps.Keys(data)) {
		field := at + ".configData." + k
		switch strings.ToLower(k) {
		case "clientid", "cleansession", "keepalive":
			// The node's own connection has these.
		case "datatype", "serializedformat", "filetype", "format":
			if f := strings.ToLower(scalar(data[k])); f == "yaml" || f == "xml" || f == "1" || f == "2" {
				c.r.lost(field, "payloads are JSON or bare values", "have the device say JSON")
			}
		default:
			if secret(k) {
				c.r.lost(field, "credentials are not kept in a Device", "put those of the broker into edgecore's config (devices.mqtt)")
			} else {
				c.r.lost(field, "not known of an MQTT visitor", "")
			}
		}
	}
}

// topic keeps what is the device's out of the model: ${device} where the topic
// has its name, else a param.
func (c *deviceConverter) topic(param, topic string) string {
	levels := strings.Split(topic, "/")
	found := false
	for i, l := range levels {
		if l == c.out.Name {
			levels[i], found = "${device}", true
		}
	}
	if found && !strings.Contains(topic, "${") {
		return strings.Join(levels, "/")
	}
	return "${" + c.param(param, topic) + "}"
}

// cycle is one of KubeEdge's, whose unit is often mistaken.
func (c *deviceConverter) cycle(at string, n int64) time.Duration {
	if n == 0 {
		return 0
	}
	unit := c.opts.CycleUnit
	d := time.Duration(n) * unit
	if n < 0 || d/unit != time.Duration(n) || d > 720*time.Hour {
		do := "set it in the model"
		if ns := time.Duration(n); unit == time.Millisecond && ns >= 10*time.Millisecond && ns <= 24*time.Hour {
			do = fmt.Sprintf("if nanoseconds were meant (%s), convert with --cycle-unit ns", ns)
		}
		c.r.lost(at, fmt.Sprintf("%d × %s is no time between two looks", n, unit), do)
		return 0
	}
	if d > time.Hour {
		do := ""
		if unit == time.Millisecond {
			do = fmt.Sprintf("if nanoseconds were meant (%s), convert with --cycle-unit ns", time.Duration(n))
		}
		c.r.check(at, fmt.Sprintf("%s between two looks", d), do)
	}
	return d
}

// desired is a text there, and here of the property's type.
func (c *deviceConverter) desired(at string, src *deviceProperty, p *v1alpha1.Property) {
	text := src.Desired.Value
	if text == "" { // nobody wants anything
		return
	}
	at += ".desired.value"
	if p.Access == "r" {
		c.r.lost(at, p.Name+" can only be read", "")
		return
	}
	var v any
	ok := true
	switch p.Type {
	case v1alpha1.TypeBool:
		switch strings.ToLower(text) {
		case "true", "1":
			v = true
		case "false", "0":
			v = false
		default:
			ok = false
		}
	case v1alpha1.TypeInt64, v1alpha1.TypeFloat64:
		ok = jsonNumber(text)
		v = json.Number(text)
	case v1alpha1.TypeBytes:
		v = base64.StdEncoding.EncodeToString([]byte(text))
	default:
		v = text
	}
	if !ok {
		c.r.lost(at, fmt.Sprintf("%q is no %s", text, p.Type), "set spec.desired."+p.Name)
		return
	}
	raw, err := json.Marshal(v)
	if err != nil {
		c.r.lost(at, err.Error(), "")
		return
	}
	if c.out.Spec.Desired == nil {
		c.out.Spec.Desired = map[string]v1alpha1.JSON{}
	}
	c.out.Spec.Desired[p.Name] = v1alpha1.JSON{Raw: raw}
}

// methods set properties; here that is a command with an argument for each.
func (c *deviceConverter) methods() {
	for i, m := range c.src.Spec.Methods {
		at := fmt.Sprintf("spec.methods[%d]", i)
		if len(m.Name) > 100 || !nameForm.MatchString(m.Name) {
			c.r.lost(at+".name", fmt.Sprintf("%q: names are of letters, digits, and _ . - within", m.Name), "")
			continue
		}
		if m.Description != "" {
			c.r.lost(at+".description", "commands have none", "")
		}
		var set []v1alpha1.Property
		for j, name := range m.PropertyNames {
			n := slices.IndexFunc(c.v.model.Spec.Properties, func(p v1alpha1.Property) bool { return p.Name == name })
			if n < 0 || c.v.model.Spec.Properties[n].Access == "r" {
				c.r.lost(fmt.Sprintf("%s.propertyNames[%d]", at, j), fmt.Sprintf("%q is no property that can be written", name), "")
				continue
			}
			set = append(set, c.v.model.Spec.Properties[n])
		}
		if len(set) == 0 {
			continue
		}
		c.r.check(at, "a command acts once; to have a property keep a value, set it in spec.desired", "")
		var add []v1alpha1.Command
		if c.v.model.Spec.Profile == v1alpha1.ProfileJSON {
			// Each property has a topic of its own.
			for _, p := range set {
				name := m.Name
				if len(set) > 1 {
					name += "." + p.Name
				}
				write := *p.Write
				write.Payload = "${" + p.Name + "}"
				add = append(add, v1alpha1.Command{Name: name, Write: write, Params: []v1alpha1.CommandParam{argument(p)}})
			}
		} else {
			cmd := v1alpha1.Command{Name: m.Name}
			for _, p := range set {
				cmd.Params = append(cmd.Params, argument(p))
			}
			add = append(add, cmd)
		}
		for _, cmd := range add {
			if slices.ContainsFunc(c.v.model.Spec.Commands, func(o v1alpha1.Command) bool { return o.Name == cmd.Name }) {
				c.r.lost(at, cmd.Name+" is there twice; the first one counts", "")
				continue
			}
			c.v.model.Spec.Commands = append(c.v.model.Spec.Commands, cmd)
		}
	}
}

func argument(p v1alpha1.Property) v1alpha1.CommandParam {
	return v1alpha1.CommandParam{Name: p.Name, Type: p.Type, Required: true, Min: p.Min, Max: p.Max, Enum: p.Enum}
}
