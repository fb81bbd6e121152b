package profile

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
)

// device is a Device compiled against its model.
type device struct {
	key      devicetwin.Key
	print    [sha256.Size]byte
	profile  string
	params   map[string]string
	names    []string // of all properties of the model
	readings map[string]*property
	commands map[string]*command
	refresh  []*refresh
	routes   []*route
	err      error            // nothing of the device works
	problems map[string]error // by property or command: it alone does not work
	replies  *replies

	// Of profiles with ways of their own; nil: the general one.
	ownWrite   func(ctx context.Context, p *property, v any, w devicetwin.WriteRequest) error
	ownCommand func(ctx context.Context, c *command, r devicetwin.CommandRequest) (json.RawMessage, error)
	ownRefresh func(ctx context.Context) error
	stop       func()        // undoes what the profile holds outside of the device
	hw         *hwDeviceTwin // of profile kubeedge
	sp         *spDevice     // of profile sparkplugB
	ext        *extDevice    // of profile external

	// Topics of the device's own doing that are no routes or writes here.
	morePublished, moreSubscribed []string

	mu    sync.Mutex // keeps its messages in order; guards what follows and the profile's state
	state string     // last told by its availability
	extra []*route   // found out at run time

	gone atomic.Bool // no longer a device of the driver's
}

// property is a compiled v1alpha1.Property.
type property struct {
	v1alpha1.Property
	codec *codec
	write *write
	reads []*read
}

// write is a compiled v1alpha1.Write.
type write struct {
	topic   string
	payload *template
	qos     byte
	retain  bool
	metric  string
	scale   *scaling
	reply   *reply
}

// reply is a compiled v1alpha1.Reply.
type reply struct {
	topic     string
	correlate path
	err       path
	timeout   time.Duration
}

// command is a compiled v1alpha1.Command.
type command struct {
	v1alpha1.Command
	write *write
}

// refresh is one way of asking a device for values; several properties may
// share it.
type refresh struct {
	write    *write
	online   bool
	start    bool
	interval time.Duration
	asked    atomic.Int64 // Unix nanoseconds
}

// handler makes readings of a packet, after those in out.
type handler func(p *packet, out []devicetwin.Reading) []devicetwin.Reading

// route is what one part of this package wants of one filter.
type route struct {
	filter  string
	device  *device // nil: of no device
	spoken  bool    // by the device itself, while it is there: hearing it is evidence
	told    bool    // by the device or, as its will, by the broker
	answers bool    // to what this node asked
	reads   []*read
	handle  handler // besides reads; may be nil
}

// fingerprint changes with whatever compile looks at.
func fingerprint(b devicetwin.Bound) [sha256.Size]byte {
	var model any
	if b.Model != nil {
		model = b.Model.Spec
	}
	raw, err := json.Marshal([]any{b.Device.Namespace, b.Device.Name, b.Device.UID, b.Device.Spec.Params, b.Device.Spec.ModelRef, model})
	if err != nil { // a RawMessage that is no JSON: compile will say so
		raw = fmt.Appendf(nil, "%v %v", b.Device.Spec, model)
	}
	return sha256.Sum256(raw)
}

// env is what compiling needs of the node.
type env struct {
	node        string
	expressions *expressions
	driver      *Driver // nil: only the topics are wanted
}

// commandProblem is before a command's name in device.problems; no property is
// called so.
const commandProblem = "command "

// compile never fails as a whole: what is wrong with a property is said with
// that property, and the others work.
func compile(b devicetwin.Bound, e env) *device {
	d := &device{
		key:      devicetwin.Key{Namespace: b.Device.Namespace, Name: b.Device.Name},
		print:    fingerprint(b),
		readings: map[string]*property{},
		commands: map[string]*command{},
		problems: map[string]error{},
		replies:  newReplies(),
	}
	if b.Model == nil {
		d.err = fmt.Errorf("no DeviceModel %s on this node", b.Device.Spec.ModelRef.Name)
		return d
	}
	c := &compiler{env: e, device: d, model: ownModel(b.Model), byTopic: map[string]*route{}}
	d.profile = c.model.Spec.Profile
	spoken, ok := profiles[d.profile]
	if !ok {
		d.err = fmt.Errorf("profile %q is none of %s", d.profile, strings.Join(slices.Sorted(maps.Keys(profiles)), ", "))
		return d
	}
	c.profile = spoken
	for _, p := range c.model.Spec.Properties {
		d.names = append(d.names, p.Name)
	}
	if d.err = c.setParams(b.Device); d.err != nil {
		return d
	}
	if c.profile.prepare != nil {
		if d.err = c.profile.prepare(c); d.err != nil {
			return d
		}
	}
	for i := range c.model.Spec.Properties {
		p := &c.model.Spec.Properties[i]
		if err := c.property(p); err != nil {
			d.problems[p.Name] = fmt.Errorf("model %s, property %s: %w", c.model.Name, p.Name, err)
		}
	}
	for i := range c.model.Spec.Commands {
		if err := c.command(&c.model.Spec.Commands[i]); err != nil {
			name := c.model.Spec.Commands[i].Name
			d.problems[commandProblem+name] = fmt.Errorf("model %s, command %s: %w", c.model.Name, name, err)
		}
	}
	if err := c.liveness(); err != nil {
		d.problems[""] = fmt.Errorf("model %s, liveness: %w", c.model.Name, err)
	}
	if c.profile.attach != nil {
		if err := c.profile.attach(c); err != nil {
			d.err = err
		}
	}
	return d
}

// ownModel is a copy as deep as profiles write to it.
func ownModel(m *v1alpha1.DeviceModel) *v1alpha1.DeviceModel {
	own := *m
	own.Spec.Properties = slices.Clone(m.Spec.Properties)
	for i := range own.Spec.Properties {
		p := &own.Spec.Properties[i]
		p.Read = slices.Clone(p.Read)
		if p.Write != nil {
			w := *p.Write
			p.Write = &w
		}
		if p.Refresh != nil {
			r := *p.Refresh
			p.Refresh = &r
		}
	}
	own.Spec.Commands = slices.Clone(m.Spec.Commands)
	return &own
}

// compiler compiles one device.
type compiler struct {
	env
	device  *device
	model   *v1alpha1.DeviceModel
	profile profile
	byTopic map[string]*route // of reads
	asked   map[string]*refresh
	named   string // param device, where the Device or the model has one
}

// setParams gathers what ${} may name.
func (c *compiler) setParams(dev *v1alpha1.Device) error {
	key := c.device.key
	own := map[string]string{
		"node": c.node, "namespace": key.Namespace,
		"replyTo": replyTo(c.node, key),
	}
	params := maps.Clone(own)
	params["device"] = key.Name // unless the device's own param is called so
	for _, p := range c.model.Spec.Params {
		if _, ok := own[p.Name]; ok {
			return fmt.Errorf("model %s: param %s is the node's own", c.model.Name, p.Name)
		}
		v, given := dev.Spec.Params[p.Name]
		switch {
		case given:
			params[p.Name] = v
		case p.Required && p.Default == "":
			return fmt.Errorf("param %s is required by model %s; set spec.params.%s", p.Name, c.model.Name, p.Name)
		default:
			params[p.Name] = p.Default
		}
	}
	for name, v := range dev.Spec.Params {
		if _, ok := own[name]; ok {
			return fmt.Errorf("param %s is the node's own; name it otherwise", name)
		}
		if len(v) > 1024 {
			return fmt.Errorf("param %s: longer than 1024 bytes", name)
		}
		params[name] = v
	}
	c.device.params = params
	c.named = dev.Spec.Params["device"]
	for _, p := range c.model.Spec.Params {
		if p.Name == "device" {
			c.named = params["device"]
		}
	}
	return nil
}

// replyTo is a place for a device's answers to this node.
func replyTo(node string, key devicetwin.Key) string {
	sum := sha256.Sum256([]byte(key.String()))
	name := strings.Map(func(r rune) rune {
		if strings.ContainsRune("+#/\x00", r) {
			return '-'
		}
		return r
	}, node)
	return reserved + "reply/" + name + "/" + hex.EncodeToString(sum[:6])
}

// need is a param that the profile cannot do without.
func (c *compiler) need(name string) (string, error) {
	if v := c.device.params[name]; v != "" {
		return v, nil
	}
	return "", fmt.Errorf("profile %s needs param %s; set spec.params.%s of the Device", c.device.profile, name, name)
}

// config is a text of profileConfig.
func (c *compiler) config(name, otherwise string) (string, error) {
	v, ok := c.model.Spec.ProfileConfig[name]
	if !ok {
		return otherwise, nil
	}
	var s string
	if err := json.Unmarshal(v.Raw, &s); err != nil {
		return "", fmt.Errorf("model %s, profileConfig.%s: want a text: %w", c.model.Name, name, err)
	}
	return plain(s, c.device.params)
}

// configDuration is a duration of profileConfig.
func (c *compiler) configDuration(name string, otherwise time.Duration) (time.Duration, error) {
	s, err := c.config(name, "")
	if err != nil || s == "" {
		return otherwise, err
	}
	v, err := time.ParseDuration(s)
	if err != nil || v <= 0 {
		return 0, fmt.Errorf("model %s, profileConfig.%s: %q is no duration above zero", c.model.Name, name, s)
	}
	return v, nil
}

// filter is a topic to listen to. Params cannot bring wildcards in: who writes
// a Device chooses the device, not what else of the broker is heard.
func (c *compiler) filter(s string) (string, error) {
	out, err := plain(s, c.device.params)
	if err != nil {
		return "", fmt.Errorf("topic %q: %w", s, err)
	}
	if strings.ContainsAny(out, "+#") && strings.Count(out, "+")+strings.Count(out, "#") != strings.Count(s, "+")+strings.Count(s, "#") {
		return "", fmt.Errorf("topic %q: a param of the device has + or # in it", s)
	}
	if err := checkFilter(out); err != nil {
		return "", err
	}
	if strings.HasPrefix(out, "$") {
		return "", fmt.Errorf("topic %q: is not a device's", out)
	}
	if isOurs(out) && !strings.HasPrefix(out, c.device.params["replyTo"]+"/") {
		return "", fmt.Errorf("topic %q: %s is the node's own", out, reserved)
	}
	return out, nil
}

// topic is one to publish to.
func (c *compiler) topic(s string) (string, error) {
	out, err := plain(s, c.device.params)
	if err != nil {
		return "", fmt.Errorf("topic %q: %w", s, err)
	}
	if err := checkTopic(out); err != nil {
		return "", err
	}
	if isOurs(out) || strings.HasPrefix(out, "$") {
		return "", fmt.Errorf("topic %q: is not a device's", out)
	}
	return out, nil
}

func (c *compiler) property(spec *v1alpha1.Property) error {
	if c.profile.property != nil {
		if err := c.profile.property(c, spec); err != nil {
			return err
		}
	}
	cod, err := newCodec(spec)
	if err != nil {
		return err
	}
	p := &property{Property: *spec, codec: cod}
	c.device.readings[spec.Name] = p
	var errs []error
	for i, r := range spec.Read {
		if err := c.read(p, r); err != nil {
			errs = append(errs, fmt.Errorf("read[%d]: %w", i, err))
		}
	}
	if spec.Write != nil && spec.Access != "r" {
		if p.write, err = c.write(*spec.Write, "${value}", func(name string) bool { return name == "value" }); err != nil {
			errs = append(errs, fmt.Errorf("write: %w", err))
		} else if len(spec.Read) > 0 {
			p.write.scale, _ = newScaling(spec.Read[0].Scale, spec.Read[0].Offset)
		}
	}
	if spec.Refresh != nil {
		if err := c.refresh(*spec.Refresh); err != nil {
			errs = append(errs, fmt.Errorf("refresh: %w", err))
		}
	}
	return errors.Join(errs...)
}

func (c *compiler) compileRead(p *property, spec v1alpha1.Read) (*read, error) {
	r := &read{property: p.Name, codec: p.codec, text: c.profile.text}
	var err error
	if spec.Path, err = plain(spec.Path, c.device.params); err != nil {
		return nil, err
	}
	if r.path, err = parsePath(spec.Path); err != nil {
		return nil, err
	}
	if spec.TS != nil {
		if r.ts, err = parsePath(spec.TS.Path); err != nil {
			return nil, fmt.Errorf("ts: %w", err)
		}
		switch r.tsUnit = spec.TS.Unit; r.tsUnit {
		case "", "s", "ms", "us", "ns", "rfc3339", unitAuto:
		default:
			return nil, fmt.Errorf("ts: unit %q is none of s, ms, us, ns, rfc3339", spec.TS.Unit)
		}
	}
	if r.scale, err = newScaling(spec.Scale, spec.Offset); err != nil {
		return nil, err
	}
	if c.expressions == nil {
		return r, nil
	}
	if spec.When != "" {
		if r.when, err = c.expressions.compile(spec.When); err != nil {
			return nil, fmt.Errorf("when: %w", err)
		}
	}
	if spec.Value != "" {
		if r.value, err = c.expressions.compile(spec.Value); err != nil {
			return nil, fmt.Errorf("value: %w", err)
		}
	}
	return r, nil
}

func (c *compiler) read(p *property, spec v1alpha1.Read) error {
	r, err := c.compileRead(p, spec)
	if err != nil {
		return err
	}
	p.reads = append(p.reads, r)
	if spec.Topic == "" {
		if c.profile.ownReads {
			return nil
		}
		return errors.New("no topic, and the profile has none of its own")
	}
	filter, err := c.filter(spec.Topic)
	if err != nil {
		return err
	}
	c.route(filter, r)
	return nil
}

// route has r look at what comes on filter.
func (c *compiler) route(filter string, r *read) {
	known := c.byTopic[filter]
	if known == nil {
		known = &route{filter: filter, device: c.device, spoken: true}
		c.byTopic[filter] = known
		c.device.routes = append(c.device.routes, known)
	}
	known.reads = append(known.reads, r)
}

// listen has fn hear what comes on filter.
func (c *compiler) listen(filter string, spoken bool, fn handler) {
	c.device.routes = append(c.device.routes, &route{filter: filter, device: c.device, spoken: spoken, handle: fn})
}

// write compiles one way to the device; known are the names that its payload
// has besides the params.
func (c *compiler) write(spec v1alpha1.Write, payload string, known func(string) bool) (*write, error) {
	w := &write{qos: 1, retain: spec.Retain, metric: spec.Metric}
	var err error
	switch {
	case spec.Topic != "":
		if w.topic, err = c.topic(spec.Topic); err != nil {
			return nil, err
		}
	case !c.profile.ownWrites:
		return nil, errors.New("no topic, and the profile has none of its own")
	}
	if spec.Payload != "" {
		payload = spec.Payload
	}
	if w.payload, err = parseTemplate(payload, func(name string) bool {
		_, param := c.device.params[name]
		return param || name == "cmdSeq" || known(name)
	}); err != nil {
		return nil, fmt.Errorf("payload: %w", err)
	}
	if spec.QoS != nil {
		if *spec.QoS < 0 || *spec.QoS > 2 {
			return nil, fmt.Errorf("qos %d is none of 0, 1, 2", *spec.QoS)
		}
		w.qos = byte(*spec.QoS)
	}
	if spec.Reply != nil {
		if w.reply, err = c.reply(*spec.Reply); err != nil {
			return nil, fmt.Errorf("reply: %w", err)
		}
	}
	return w, nil
}

// Bounds and default of how long an answer is waited for.
const (
	defaultTimeout = 10 * time.Second
	minTimeout     = time.Second
	maxTimeout     = 300 * time.Second
)

func (c *compiler) reply(spec v1alpha1.Reply) (*reply, error) {
	r := &reply{timeout: cmpOr(spec.Timeout.Duration, defaultTimeout)}
	r.timeout = min(max(r.timeout, minTimeout), maxTimeout)
	var err error
	if r.topic, err = c.filter(spec.Topic); err != nil {
		return nil, err
	}
	if err := checkTopic(r.topic); err != nil {
		return nil, err
	}
	if r.correlate, err = parsePath(spec.Correlate); err != nil {
		return nil, fmt.Errorf("correlate: %w", err)
	}
	if r.err, err = parsePath(spec.Error); err != nil {
		return nil, fmt.Errorf("error: %w", err)
	}
	for _, known := range c.device.routes {
		if known.filter == r.topic && known.answers {
			return r, nil
		}
	}
	c.device.routes = append(c.device.routes, &route{filter: r.topic, device: c.device, spoken: true, answers: true,
		handle: func(p *packet, out []devicetwin.Reading) []devicetwin.Reading {
			c.device.replies.answer(p)
			return out
		}})
	return r, nil
}

func cmpOr(d, otherwise time.Duration) time.Duration {
	if d <= 0 {
		return otherwise
	}
	return d
}

func (c *compiler) command(spec *v1alpha1.Command) error {
	if c.profile.command != nil {
		if err := c.profile.command(c, spec); err != nil {
			return err
		}
	}
	args := map[string]bool{}
	for _, p := range spec.Params {
		switch p.Name {
		case "node", "namespace", "device", "replyTo", "cmdSeq", "cmdId":
			return fmt.Errorf("param %s is the node's own; name it otherwise", p.Name)
		}
		args[p.Name] = true
	}
	w, err := c.write(spec.Write, "", func(name string) bool { return args[name] || name == "cmdId" })
	if err != nil {
		return err
	}
	c.device.commands[spec.Name] = &command{Command: *spec, write: w}
	return nil
}

// refresh gathers the ways of asking; the same question is asked once for all
// properties.
func (c *compiler) refresh(spec v1alpha1.Refresh) error {
	w, err := c.write(v1alpha1.Write{Topic: spec.Topic}, spec.Payload, func(string) bool { return false })
	if err != nil {
		return err
	}
	r := &refresh{write: w, interval: spec.Interval.Duration}
	if r.interval > 0 {
		r.interval = max(r.interval, time.Second)
	}
	for _, on := range spec.On {
		switch on {
		case "online":
			r.online = true
		case "edgeStart":
			r.start = true
		default:
			return fmt.Errorf("on: %q is neither online nor edgeStart", on)
		}
	}
	if len(spec.On) == 0 {
		r.online, r.start = true, true
	}
	question := w.topic + "\x00" + spec.Payload
	if known := c.asked[question]; known != nil {
		known.online = known.online || r.online
		known.start = known.start || r.start
		if known.interval == 0 || r.interval > 0 && r.interval < known.interval {
			known.interval = r.interval
		}
		return nil
	}
	if c.asked == nil {
		c.asked = map[string]*refresh{}
	}
	c.asked[question] = r
	c.device.refresh = append(c.device.refresh, r)
	return nil
}

func (c *compiler) liveness() error {
	var own, parent *v1alpha1.Availability
	if l := c.model.Spec.Liveness; l != nil {
		own, parent = l.Availability, l.Parent
	}
	if own == nil && c.profile.availability != nil {
		own = c.profile.availability(c)
	}
	if parent == nil && c.profile.parent != nil {
		parent = c.profile.parent(c)
	}
	var errs []error
	if own != nil {
		errs = append(errs, c.presence(*own, devicetwin.EvidenceAvailability))
	}
	if parent != nil {
		errs = append(errs, c.presence(*parent, devicetwin.EvidenceParent))
	}
	return errors.Join(errs...)
}

func (c *compiler) presence(spec v1alpha1.Availability, evidence string) error {
	a := &presence{online: "online", offline: "offline"}
	var err error
	if a.path, err = parsePath(spec.Path); err != nil {
		return err
	}
	if spec.Online != "" {
		a.online = spec.Online
	}
	if spec.Offline != "" {
		a.offline = spec.Offline
	}
	filter, err := c.filter(spec.Topic)
	if err != nil {
		return err
	}
	dev := c.device
	e := c.env
	c.device.routes = append(c.device.routes, &route{filter: filter, device: dev, told: evidence == devicetwin.EvidenceAvailability,
		handle: func(p *packet, out []devicetwin.Reading) []devicetwin.Reading {
			if state := a.state(p); state != "" {
				e.driver.sight(dev, devicetwin.Sighting{Evidence: evidence, State: state, Retained: p.Retain})
			}
			return out
		}})
	return nil
}
