package profile

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/mqtt"
)

// sparkplugB: params group, edgeNode and, unless the Device is the edge node
// itself, device. read.metric and write.metric name metrics; default is the
// property's name. profileConfig: hostId (the primary host to be),
// reorderTimeout (5s) and rebirthMinInterval (60s).
//
// Births, aliases and the sequence belong to an edge node, however many of its
// devices are Devices: one spNode follows all of it. Data before a birth, an
// alias that is not known and a gap that lasts longer than reorderTimeout have
// the edge node asked for a rebirth, at most every rebirthMinInterval. A death
// counts only for the birth that it belongs to (bdSeq). Historical metrics do
// not move a twin.
//
// The broker's session is this node's own and not one per host: STATE has no
// last will, and is only told where hostId asks for it.
var sparkplugB = profile{
	ownReads: true, ownWrites: true,
	prepare: func(c *compiler) error {
		for _, name := range []string{"group", "edgeNode"} {
			v, err := c.need(name)
			if err != nil {
				return err
			}
			if strings.ContainsAny(v, "/+#") {
				return fmt.Errorf("param %s %q: has / + or # in it", name, v)
			}
		}
		if strings.ContainsAny(c.named, "/+#") {
			return fmt.Errorf("param device %q: has / + or # in it", c.named)
		}
		return nil
	},
	property: func(c *compiler, p *v1alpha1.Property) error {
		if len(p.Read) == 0 && p.Access != "w" {
			p.Read = []v1alpha1.Read{{Metric: p.Name}}
		}
		if writable(p) {
			if p.Write == nil {
				p.Write = &v1alpha1.Write{}
			}
			if p.Write.Metric == "" && p.Write.Topic == "" {
				p.Write.Metric = p.Name
				if len(p.Read) > 0 && p.Read[0].Metric != "" {
					p.Write.Metric = p.Read[0].Metric
				}
			}
		}
		return nil
	},
	command: func(c *compiler, cmd *v1alpha1.Command) error {
		if cmd.Write.Metric == "" && cmd.Write.Topic == "" {
			cmd.Write.Metric = cmd.Name
		}
		return nil
	},
	attach: attachSparkplug,
}

// spID names an edge node.
type spID struct{ group, edge string }

func (id spID) topic(kind, device string) string {
	t := "spBv1.0/" + id.group + "/" + kind + "/" + id.edge
	if device != "" {
		t += "/" + device
	}
	return t
}

// spDevice is a Device as Sparkplug has it.
type spDevice struct {
	*compiler
	id      spID
	name    string // "": the edge node itself
	config  spConfig
	metrics map[string][]*read
}

type spConfig struct {
	hostID         string
	reorderTimeout time.Duration
	rebirthMin     time.Duration
}

func attachSparkplug(c *compiler) error {
	s := &spDevice{compiler: c, metrics: map[string][]*read{},
		id: spID{c.device.params["group"], c.device.params["edgeNode"]}, name: c.named}
	var err error
	if s.config.hostID, err = c.config("hostId", ""); err != nil {
		return err
	}
	if s.config.reorderTimeout, err = c.configDuration("reorderTimeout", 5*time.Second); err != nil {
		return err
	}
	if s.config.rebirthMin, err = c.configDuration("rebirthMinInterval", time.Minute); err != nil {
		return err
	}
	for _, spec := range c.model.Spec.Properties {
		p := c.device.readings[spec.Name]
		if p == nil {
			continue
		}
		for i, r := range p.Read {
			if i < len(p.reads) && r.Topic == "" {
				metric := r.Metric
				if metric == "" {
					metric = p.Name
				}
				s.metrics[metric] = append(s.metrics[metric], p.reads[i])
			}
		}
	}
	dev := c.device
	dev.sp = s
	dev.ownWrite = s.write
	dev.ownCommand = s.command
	dev.ownRefresh = func(context.Context) error {
		c.driver.spRebirth(s.id)
		return nil
	}
	data, cmd := []string{"DBIRTH", "DDATA", "DDEATH"}, "DCMD"
	if s.name == "" {
		data, cmd = []string{"NBIRTH", "NDATA", "NDEATH"}, "NCMD"
	}
	for _, kind := range data {
		dev.morePublished = append(dev.morePublished, s.id.topic(kind, s.name))
	}
	dev.moreSubscribed = append(dev.moreSubscribed, s.id.topic(cmd, s.name))
	return nil
}

// write sends the value as a command; the device shows the effect in its data.
func (s *spDevice) write(ctx context.Context, p *property, v any, w devicetwin.WriteRequest) error {
	if p.write == nil {
		return fmt.Errorf("device %s: property %s: the model has no way to write it", s.device.key, p.Name)
	}
	if p.write.topic != "" {
		value, err := p.codec.encode(v, p.write.scale)
		if err == nil {
			_, err = s.driver.send(ctx, s.device, p.write, w.Expires, 0, func(name string) (word, bool) { return value, name == "value" })
		}
		if err != nil {
			return fmt.Errorf("device %s: property %s: %w", s.device.key, p.Name, err)
		}
		return nil
	}
	m := s.driver.spMetric(s.id, s.name, p.write.metric)
	if err := m.set(p, v); err != nil {
		return fmt.Errorf("device %s: property %s: %w", s.device.key, p.Name, err)
	}
	if err := s.send(ctx, m, w.Expires); err != nil {
		return fmt.Errorf("device %s: property %s: %w", s.device.key, p.Name, err)
	}
	return nil
}

// command writes a metric: the command's argument value, or true.
func (s *spDevice) command(ctx context.Context, c *command, r devicetwin.CommandRequest) (json.RawMessage, error) {
	args, err := c.args(r.Args)
	if err != nil {
		return nil, fmt.Errorf("device %s: command %s: %w", r.Device, r.Name, err)
	}
	m := s.driver.spMetric(s.id, s.name, c.write.metric)
	m.value = true
	for _, w := range args {
		if m.value, err = spArgument(w, &m); err != nil {
			return nil, fmt.Errorf("device %s: command %s: %w", r.Device, r.Name, err)
		}
	}
	if m.datatype == 0 {
		m.datatype = spTypeOf(m.value)
	}
	if err := s.send(ctx, m, r.Timeout); err != nil {
		return nil, fmt.Errorf("device %s: command %s: %w", r.Device, r.Name, err)
	}
	return nil, nil
}

func spArgument(w word, m *spMetric) (any, error) {
	if !w.json {
		return w.text, nil
	}
	switch w.text {
	case "true", "false":
		return w.text == "true", nil
	case "null":
		m.null = true
		return nil, nil
	}
	if r, err := exactly(w.text); err == nil && r.IsInt() && r.Num().IsInt64() && m.datatype != spFloat && m.datatype != spDouble {
		return r.Num().Int64(), nil
	}
	return toFloat(json.Number(w.text), nil)
}

func (s *spDevice) send(ctx context.Context, m spMetric, expires time.Duration) error {
	kind := "DCMD"
	if s.name == "" {
		kind = "NCMD"
	}
	now := uint64(time.Now().UnixMilli())
	m.timestamp = now
	return s.driver.publish(ctx, mqtt.Message{
		Topic:   s.id.topic(kind, s.name),
		Payload: encodeSparkplug(spPayload{timestamp: now, metrics: []spMetric{m}}),
		Expiry:  expires,
		QoS:     0, // [tck-id-payloads-dcmd-qos]: commands are not sent twice
	})
}

// set puts v into m, in the data type that the birth told, or one of v's own.
func (m *spMetric) set(p *property, v any) error {
	w, err := p.codec.encode(v, p.write.scale)
	if err != nil {
		return err
	}
	if w.text != canonicalText(v) { // the device's own word
		switch {
		case !w.json:
			v = w.text
		case w.text == "true" || w.text == "false":
			v = w.text == "true"
		default:
			if v, err = toFloat(json.Number(w.text), nil); err != nil {
				return err
			}
			if n, err := toInt(json.Number(w.text), nil); err == nil {
				v = n
			}
		}
	}
	if raw, ok := v.(json.RawMessage); ok {
		v = string(raw)
	}
	switch m.datatype {
	case 0:
		m.datatype = spTypeOf(v)
	case spFloat, spDouble:
		if n, ok := v.(int64); ok {
			v = float64(n)
		}
	case spInt8, spInt16, spInt32, spInt64, spUInt8, spUInt16, spUInt32, spUInt64, spDateTime:
		if f, ok := v.(float64); ok {
			r := nearest(new(big.Rat).SetFloat64(f))
			if !r.Num().IsInt64() {
				return fmt.Errorf("%v is beyond 64 bits", f)
			}
			v = r.Num().Int64()
		}
		if n, ok := v.(int64); ok && !spFits(n, m.datatype) {
			return fmt.Errorf("%d is beyond the metric's data type", n)
		}
	}
	m.value = v
	return nil
}

func canonicalText(v any) string {
	if w, err := (&codec{}).encode(v, nil); err == nil {
		return w.text
	}
	return ""
}

func spFits(n int64, datatype uint64) bool {
	bits := map[uint64]uint{spInt8: 8, spInt16: 16, spInt32: 32, spUInt8: 8, spUInt16: 16, spUInt32: 32}[datatype]
	switch datatype {
	case spInt8, spInt16, spInt32:
		return n >= -1<<(bits-1) && n < 1<<(bits-1)
	case spUInt8, spUInt16, spUInt32:
		return n >= 0 && n < 1<<bits
	case spUInt64, spDateTime:
		return n >= 0
	}
	return true
}

func spTypeOf(v any) uint64 {
	switch v.(type) {
	case bool:
		return spBoolean
	case int64, uint64:
		return spInt64
	case float64:
		return spDouble
	case []byte:
		return spBytes
	}
	return spString
}

// spNode follows one edge node.
type spNode struct {
	driver  *Driver
	id      spID
	config  spConfig
	routes  []*route
	members atomic.Pointer[map[string][]*spDevice] // by name of the device

	mu       sync.Mutex
	born     bool
	bdSeq    uint64
	hasBdSeq bool
	next     uint64            // the sequence number that is expected
	waiting  map[uint64]*spMsg // came too early
	gap      int               // of the gap that is waited for; counts up
	alive    map[string]bool   // devices with a birth
	aliases  map[uint64]spDef
	defs     map[spName]spDef
	bornAt   time.Time
	asked    time.Time // for a rebirth
	askAgain bool      // once the interval is over
}

type spMsg struct {
	kind, device string
	payload      spPayload
}

type spName struct{ device, metric string }

type spDef struct {
	spName
	datatype uint64
	alias    uint64
	hasAlias bool
}

const (
	maxWaiting = 64
	maxDefs    = 50_000 // of an edge node
)

// setNodesLocked has an spNode for each edge node with Devices. It takes no
// node's lock: whoever calls Set may hold what the sink waits for.
func (d *Driver) setNodesLocked() {
	members := map[spID]map[string][]*spDevice{}
	configs := map[spID]spConfig{}
	byName := slices.SortedFunc(maps.Keys(d.devices), func(a, b devicetwin.Key) int { return strings.Compare(a.String(), b.String()) })
	for _, key := range byName {
		dev := d.devices[key]
		if dev.sp == nil || dev.err != nil {
			continue
		}
		s := dev.sp
		if members[s.id] == nil {
			members[s.id] = map[string][]*spDevice{}
		}
		members[s.id][s.name] = append(members[s.id][s.name], s)
		if _, ok := configs[s.id]; !ok {
			configs[s.id] = s.config // of the first, where models differ
		}
	}
	for id := range d.nodes {
		if members[id] == nil {
			delete(d.nodes, id)
		}
	}
	for id, now := range members {
		n := d.nodes[id]
		if n == nil || n.config != configs[id] {
			n = &spNode{driver: d, id: id, config: configs[id]}
			n.clear()
			n.routes = []*route{{filter: "spBv1.0/" + id.group + "/+/" + id.edge + "/#", handle: n.handle}}
			d.nodes[id] = n
		}
		old := n.members.Swap(&now)
		if old == nil || spAdded(*old, now) {
			// Who is new has missed its birth.
			d.timers.after(0, n.rebirth)
		}
		if id := n.config.hostID; id != "" && checkTopic("spBv1.0/STATE/"+id) == nil && !d.hosts[id] {
			d.hosts[id] = true
			d.later(spState(id, true))
		}
	}
}

func spAdded(old, now map[string][]*spDevice) bool {
	for name, devices := range now {
		for _, s := range devices {
			known := false
			for _, o := range old[name] {
				known = known || o == s
			}
			if !known {
				return true
			}
		}
	}
	return false
}

func spState(host string, online bool) mqtt.Message {
	return mqtt.Message{Topic: "spBv1.0/STATE/" + host, QoS: 1, Retain: true,
		Payload: fmt.Appendf(nil, `{"online":%t,"timestamp":%d}`, online, time.Now().UnixMilli())}
}

// hostsOffline is the end of Run: what a last will would say otherwise.
func (d *Driver) hostsOffline() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	d.mu.Lock()
	hosts := slices.Sorted(maps.Keys(d.hosts))
	clear(d.hosts)
	d.mu.Unlock()
	for _, id := range hosts {
		if err := d.publish(ctx, spState(id, false)); err != nil {
			d.log.Debug("host state", "host", id, "err", err)
		}
	}
}

func (n *spNode) clear() {
	n.waiting = map[uint64]*spMsg{}
	n.alive = map[string]bool{}
	n.aliases = map[uint64]spDef{}
	n.defs = map[spName]spDef{}
	n.gap++
}

func (n *spNode) handle(p *packet, out []devicetwin.Reading) []devicetwin.Reading {
	// spBv1.0/group/KIND/edge[/device]
	levels := strings.Split(p.Topic, "/")
	if p.Retain || len(levels) < 4 || len(levels) > 5 {
		return out
	}
	m := &spMsg{kind: levels[2]}
	if len(levels) == 5 {
		m.device = levels[4]
	}
	switch m.kind {
	case "NBIRTH", "NDATA", "NDEATH", "DBIRTH", "DDATA", "DDEATH":
	default:
		return out
	}
	if (m.kind[0] == 'N') != (m.device == "") {
		return out
	}
	var err error
	m.payload, err = decodeSparkplug(p.Payload)
	n.mu.Lock()
	defer n.mu.Unlock()
	if err != nil {
		n.bad(m.device, err)
		return out
	}
	switch m.kind {
	case "NDEATH":
		n.death(m)
		return out
	case "NBIRTH":
		n.birth(m)
		n.drain()
		return out
	}
	if !n.born {
		n.rebirthLocked("data before a birth")
		return out
	}
	if !m.payload.hasSeq {
		n.bad(m.device, fmt.Errorf("%s without seq", m.kind))
		return out
	}
	if m.payload.seq != n.next {
		n.early(m)
		return out
	}
	n.take(m)
	n.drain()
	return out
}

func (n *spNode) birth(m *spMsg) {
	alive := n.alive
	n.clear()
	n.born, n.hasBdSeq, n.askAgain = true, false, false
	n.bornAt = time.Now()
	n.next = (m.payload.seq + 1) % 256
	for _, x := range m.payload.metrics {
		if x.name == "bdSeq" {
			if v, err := toInt(x.value, nil); err == nil {
				n.bdSeq, n.hasBdSeq = uint64(v.(int64)), true
			}
		}
	}
	// Its devices are not there until they are born as well.
	for _, name := range slices.Sorted(maps.Keys(alive)) {
		if name != "" {
			n.sight(name, v1alpha1.PhaseOffline)
		}
	}
	n.define(m)
	n.sight("", v1alpha1.PhaseOnline)
	n.report(m)
}

// death of the edge node is that of all its devices. A will of an older birth,
// which brokers may deliver after the new birth, is none.
func (n *spNode) death(m *spMsg) {
	for _, x := range m.payload.metrics {
		if x.name != "bdSeq" {
			continue
		}
		v, err := toInt(x.value, nil)
		if err == nil && n.born && n.hasBdSeq && uint64(v.(int64)) != n.bdSeq {
			return
		}
	}
	n.born = false
	n.clear()
	for _, name := range slices.Sorted(maps.Keys(*n.members.Load())) {
		n.sight(name, v1alpha1.PhaseOffline)
	}
}

// early keeps what came out of order for as long as the gap may close.
func (n *spNode) early(m *spMsg) {
	if len(n.waiting) >= maxWaiting {
		n.rebirthLocked("too much came out of order")
		n.born = false
		n.clear()
		return
	}
	first := len(n.waiting) == 0
	n.waiting[m.payload.seq] = m
	if !first {
		return
	}
	gap := n.gap
	n.driver.timers.after(n.config.reorderTimeout, func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.gap == gap && len(n.waiting) > 0 {
			n.rebirthLocked(fmt.Sprintf("seq %d did not come", n.next))
			n.born = false
			n.clear()
		}
	})
}

// drain takes what had come too early, if it is its turn now.
func (n *spNode) drain() {
	for m := n.waiting[n.next]; m != nil; m = n.waiting[n.next] {
		delete(n.waiting, n.next)
		n.take(m)
		if len(n.waiting) == 0 {
			n.gap++
		}
	}
}

func (n *spNode) take(m *spMsg) {
	n.next = (m.payload.seq + 1) % 256
	switch m.kind {
	case "DBIRTH":
		n.define(m)
		n.sight(m.device, v1alpha1.PhaseOnline)
		n.report(m)
	case "DDEATH":
		delete(n.alive, m.device)
		n.sight(m.device, v1alpha1.PhaseOffline)
	case "DDATA":
		if !n.alive[m.device] {
			if len((*n.members.Load())[m.device]) > 0 {
				n.rebirthLocked("data before the birth of device " + m.device)
			}
			return
		}
		n.report(m)
		n.seen(m.device)
	case "NDATA":
		n.report(m)
		n.seen("")
	}
}

// define learns what a birth tells of its metrics. Of devices that are no
// Devices nothing is kept.
func (n *spNode) define(m *spMsg) {
	n.alive[m.device] = true
	if len((*n.members.Load())[m.device]) == 0 {
		return
	}
	for _, x := range m.payload.metrics {
		if x.name == "" || len(n.defs) >= maxDefs {
			continue
		}
		def := spDef{spName{m.device, x.name}, x.datatype, x.alias, x.hasAlias}
		n.defs[def.spName] = def
		if x.hasAlias {
			n.aliases[x.alias] = def
		}
	}
}

// report gives the metrics of m to the Devices that have them.
func (n *spNode) report(m *spMsg) {
	devices := (*n.members.Load())[m.device]
	if len(devices) == 0 {
		return
	}
	readings := make([][]devicetwin.Reading, len(devices))
	for _, x := range m.payload.metrics {
		def := n.defs[spName{m.device, x.name}]
		if x.name == "" {
			var ok bool
			if def, ok = n.aliases[x.alias]; !ok || def.device != m.device {
				n.rebirthLocked(fmt.Sprintf("alias %d is not known", x.alias))
				continue
			}
		}
		if x.datatype == 0 {
			x.datatype = def.datatype
			if raw, ok := x.value.(uint64); ok {
				x.value = signed(raw, def.datatype)
			}
		}
		if x.null {
			continue
		}
		at := x.timestamp
		if at == 0 {
			at = m.payload.timestamp
		}
		for i, s := range devices {
			for _, r := range s.metrics[def.metric] {
				reading := devicetwin.Reading{Property: r.property}
				if x.value == nil {
					reading.Bad = fmt.Errorf("metric %s: data type %d is not read", def.metric, x.datatype)
				} else {
					var err error
					if reading, err = r.apply(&packet{doc: x.value, decoded: true, overlaid: true}); errors.Is(err, errNothing) {
						continue
					}
					reading.Bad = err
				}
				if at > 0 && at < 1<<53 {
					reading.TS = time.UnixMilli(int64(at)).UTC()
				}
				reading.Historical = x.historical
				readings[i] = append(readings[i], reading)
			}
		}
	}
	for i, s := range devices {
		if len(readings[i]) > 0 && !s.device.gone.Load() {
			n.driver.cfg.Sink.Report(s.device.key, readings[i])
		}
	}
}

func (n *spNode) sight(device, state string) {
	if state == v1alpha1.PhaseOnline {
		n.alive[device] = true
	}
	n.tell(device, devicetwin.Sighting{Evidence: devicetwin.EvidenceBirth, State: state})
}

func (n *spNode) seen(device string) {
	n.tell(device, devicetwin.Sighting{Evidence: devicetwin.EvidenceMessage, State: v1alpha1.PhaseOnline})
}

func (n *spNode) tell(device string, s devicetwin.Sighting) {
	for _, x := range (*n.members.Load())[device] {
		if !x.device.gone.Load() {
			n.driver.cfg.Sink.Sight(x.device.key, s)
		}
	}
}

// bad has every property of the device say that a message could not be read.
func (n *spNode) bad(device string, err error) {
	for _, s := range (*n.members.Load())[device] {
		var readings []devicetwin.Reading
		for _, name := range s.device.names {
			readings = append(readings, devicetwin.Reading{Property: name, Bad: err})
		}
		if !s.device.gone.Load() {
			n.driver.cfg.Sink.Report(s.device.key, readings)
		}
	}
}

func (n *spNode) rebirth() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.rebirthLocked("its births are not known")
}

// rebirthLocked asks the edge node to tell everything again.
func (n *spNode) rebirthLocked(why string) {
	if wait := n.config.rebirthMin - time.Since(n.asked); !n.asked.IsZero() && wait > 0 {
		if !n.askAgain {
			n.askAgain = true
			n.driver.timers.after(wait, func() {
				n.mu.Lock()
				defer n.mu.Unlock()
				if n.askAgain {
					n.rebirthLocked(why)
				}
			})
		}
		return
	}
	n.askAgain = false
	n.asked = time.Now()
	n.driver.log.Info("rebirth asked for", "group", n.id.group, "edgeNode", n.id.edge, "why", why)
	now := uint64(n.asked.UnixMilli())
	n.driver.later(mqtt.Message{Topic: n.id.topic("NCMD", ""), Payload: encodeSparkplug(spPayload{timestamp: now,
		metrics: []spMetric{{name: "Node Control/Rebirth", timestamp: now, datatype: spBoolean, value: true}}})})
}

func (d *Driver) spRebirth(id spID) {
	d.mu.Lock()
	n := d.nodes[id]
	d.mu.Unlock()
	if n == nil {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	// A birth tells all there is: who asks because of it has been answered.
	if !n.born || time.Since(n.bornAt) >= n.config.rebirthMin {
		n.rebirthLocked("its values are asked for")
	}
}

// spMetric is a metric to be written, with what its birth told of it.
func (d *Driver) spMetric(id spID, device, metric string) spMetric {
	d.mu.Lock()
	n := d.nodes[id]
	d.mu.Unlock()
	m := spMetric{name: metric}
	if n == nil {
		return m
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	def := n.defs[spName{device, metric}]
	m.datatype = def.datatype
	return m
}
