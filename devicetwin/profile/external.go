package profile

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
)

// external: devices that do not speak MQTT, reached by a mapper: a program on
// this node that speaks HTTP with JSON over a unix socket, which only root
// opens. profileConfig.protocol is what the device speaks; a mapper says which
// protocols it knows. profileConfig.mapper names the one mapper that may have
// the device. All of params and profileConfig is handed to it as it is.
//
//	PUT  /v1/mappers/{mapper}               {"protocols":["modbus"]}; again after each start
//	GET  /v1/mappers/{mapper}/devices       {"devices":[{namespace,name,uid,params,config,properties,commands}]}
//	GET  /v1/mappers/{mapper}/tasks?wait=30s {"tasks":[{id,kind,namespace,name,…}]}; waits for the first
//	POST /v1/mappers/{mapper}/tasks/{id}    {"error":"…"} or {"result":…}
//	POST /v1/mappers/{mapper}/reports       {"reports":[{namespace,name,state,properties:{p:{value,ts,error}}}]}
//
// A task's kind is write (property, value), command (command, args, requestId),
// refresh, or devices: the list of devices is another, get it again. It is to be
// done within timeoutMs and is handed out once. ts is Unix milliseconds; state
// is online, offline or sleeping. A mapper that is not heard of for a minute is
// gone, and its devices with it; polling for tasks counts as being heard.
//
// Each mapper may report 1000 readings a second (5000 at once); beyond that it
// is answered 429 with Retry-After, and nothing of that request was taken.
// KubeEdge's mappers, which speak its DMI over gRPC, are not served.
var externalProfile = profile{
	ownReads: true, ownWrites: true,
	property: func(c *compiler, p *v1alpha1.Property) error {
		if p.Write == nil && writable(p) {
			p.Write = &v1alpha1.Write{}
		}
		return nil
	},
	attach: func(c *compiler) error {
		protocol, err := c.config("protocol", "")
		if err != nil {
			return err
		}
		mapper, err := c.config("mapper", "")
		if err != nil {
			return err
		}
		if protocol == "" && mapper == "" {
			return fmt.Errorf("model %s: set profileConfig.protocol, or profileConfig.mapper", c.model.Name)
		}
		x := &extDevice{compiler: c, protocol: protocol, mapper: mapper}
		c.device.ext = x
		c.device.ownWrite, c.device.ownCommand, c.device.ownRefresh = x.write, x.command, x.refreshNow
		return nil
	},
}

const (
	maxMappers    = 64
	maxTasks      = 1024 // of a mapper, not yet handed out
	maxBody       = 1 << 20
	mapperGone    = time.Minute
	maxPoll       = 5 * time.Minute
	reportsEvery  = 1000 // a second
	reportsAtOnce = 5000
)

// extDevice is a Device that a mapper reaches.
type extDevice struct {
	*compiler
	protocol, mapper string
}

// external serves mappers.
type external struct {
	driver *Driver
	socket string

	mu      sync.Mutex
	mappers map[string]*mapper
	nextID  uint64
}

type mapper struct {
	name      string
	protocols []string
	limit     *rate.Limiter
	seen      time.Time
	here      bool
	polls     int // under way
	queue     []*task
	out       map[string]*task // handed out
	woken     chan struct{}    // closed when there is something
}

// task as it is handed to a mapper.
type task struct {
	ID        string                     `json:"id"`
	Kind      string                     `json:"kind"`
	Namespace string                     `json:"namespace,omitempty"`
	Name      string                     `json:"name,omitempty"`
	Property  string                     `json:"property,omitempty"`
	Value     json.RawMessage            `json:"value,omitempty"`
	Command   string                     `json:"command,omitempty"`
	RequestID string                     `json:"requestId,omitempty"`
	Args      map[string]json.RawMessage `json:"args,omitempty"`
	TimeoutMS int64                      `json:"timeoutMs,omitempty"`

	done chan answer
}

func newExternal(d *Driver, socket string) *external {
	return &external{driver: d, socket: socket, mappers: map[string]*mapper{}}
}

// run serves the socket until ctx ends.
func (x *external) run(ctx context.Context) error {
	l, err := listenPrivately(x.socket)
	if err != nil {
		return fmt.Errorf("mappers' socket %s: %w", x.socket, err)
	}
	server := &http.Server{Handler: x.handler(), ReadTimeout: 30 * time.Second, MaxHeaderBytes: 16 << 10,
		BaseContext: func(net.Listener) context.Context { return ctx }}
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	clock := time.NewTicker(mapperGone / 12)
	defer clock.Stop()
	for {
		select {
		case <-ctx.Done():
			_ = server.Close()
			<-served
			_ = os.Remove(x.socket)
			return ctx.Err()
		case err := <-served:
			return fmt.Errorf("mappers' socket %s: %w", x.socket, err)
		case <-clock.C:
			x.missing(time.Now())
		}
	}
}

// listenPrivately has the socket appear with its mode already set.
func listenPrivately(at string) (net.Listener, error) {
	made := at + ".new"
	_ = os.Remove(made)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: made, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(made, 0o600); err != nil {
		_ = l.Close()
		return nil, err
	}
	if err := os.Rename(made, at); err != nil {
		_ = l.Close()
		return nil, err
	}
	return l, nil
}

func (x *external) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("PUT /v1/mappers/{mapper}", x.register)
	mux.HandleFunc("GET /v1/mappers/{mapper}/devices", x.listDevices)
	mux.HandleFunc("GET /v1/mappers/{mapper}/tasks", x.poll)
	mux.HandleFunc("POST /v1/mappers/{mapper}/tasks/{id}", x.finish)
	mux.HandleFunc("POST /v1/mappers/{mapper}/reports", x.report)
	return http.MaxBytesHandler(mux, maxBody)
}

func (x *external) register(w http.ResponseWriter, r *http.Request) {
	var in struct {
		Protocols []string `json:"protocols"`
	}
	if !decodeBody(w, r, &in) {
		return
	}
	name := r.PathValue("mapper")
	if len(name) > 128 || len(in.Protocols) > 32 {
		fail(w, http.StatusBadRequest, "a name of at most 128 bytes and at most 32 protocols")
		return
	}
	x.mu.Lock()
	m := x.mappers[name]
	if m == nil {
		if len(x.mappers) >= maxMappers {
			x.mu.Unlock()
			fail(w, http.StatusTooManyRequests, fmt.Sprintf("%d mappers are registered already", maxMappers))
			return
		}
		m = &mapper{name: name, limit: rate.NewLimiter(reportsEvery, reportsAtOnce), out: map[string]*task{}, woken: make(chan struct{})}
		x.mappers[name] = m
	}
	m.protocols = in.Protocols
	back := x.seenLocked(m)
	x.mu.Unlock()
	if back {
		x.tellParent(m.name, v1alpha1.PhaseOnline)
	}
	respond(w, map[string]any{"mapper": name})
}

// mapperOf finds a registered mapper and notes that it was heard.
func (x *external) mapperOf(w http.ResponseWriter, r *http.Request) *mapper {
	x.mu.Lock()
	m := x.mappers[r.PathValue("mapper")]
	back := false
	if m != nil {
		back = x.seenLocked(m)
	}
	x.mu.Unlock()
	if m == nil {
		fail(w, http.StatusNotFound, "this mapper is not registered; PUT /v1/mappers/"+r.PathValue("mapper")+" first")
		return nil
	}
	if back {
		x.tellParent(m.name, v1alpha1.PhaseOnline)
	}
	return m
}

func (x *external) seenLocked(m *mapper) (back bool) {
	m.seen = time.Now()
	back = !m.here
	m.here = true
	return back
}

// missing finds mappers that have not been heard of.
func (x *external) missing(now time.Time) {
	var gone []string
	x.mu.Lock()
	for name, m := range x.mappers {
		if m.here && m.polls == 0 && now.Sub(m.seen) > mapperGone {
			m.here = false
			for _, t := range m.queue {
				t.done <- answer{err: fmt.Errorf("mapper %s is gone: %w", name, devicetwin.ErrNotConnected)}
			}
			m.queue = nil
			gone = append(gone, name)
		}
	}
	x.mu.Unlock()
	for _, name := range gone {
		x.tellParent(name, v1alpha1.PhaseOffline)
	}
}

// tellParent tells the devices of a mapper that it came or went.
func (x *external) tellParent(name, state string) {
	for _, d := range x.devicesOf(name) {
		x.driver.cfg.Sink.Sight(d.device.key, devicetwin.Sighting{Evidence: devicetwin.EvidenceParent, State: state})
	}
}

// serves tells whether m is one that may reach d.
func (m *mapper) serves(d *extDevice) bool {
	if d.mapper != "" {
		return d.mapper == m.name
	}
	return slices.Contains(m.protocols, d.protocol)
}

// devicesOf are the devices that a mapper may reach, in order.
func (x *external) devicesOf(name string) []*extDevice {
	x.driver.mu.Lock()
	var all []*extDevice
	for _, dev := range x.driver.devices {
		if dev.ext != nil && dev.err == nil {
			all = append(all, dev.ext)
		}
	}
	x.driver.mu.Unlock()
	x.mu.Lock()
	m := x.mappers[name]
	all = slices.DeleteFunc(all, func(d *extDevice) bool { return m == nil || !m.serves(d) })
	x.mu.Unlock()
	slices.SortFunc(all, func(a, b *extDevice) int { return strings.Compare(a.device.key.String(), b.device.key.String()) })
	return all
}

// changed tells mappers that there are other devices. It does not block.
func (x *external) changed() {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, m := range x.mappers {
		if !slices.ContainsFunc(m.queue, func(t *task) bool { return t.Kind == "devices" }) {
			x.pushLocked(m, &task{Kind: "devices"})
		}
	}
}

func (x *external) pushLocked(m *mapper, t *task) {
	x.nextID++
	t.ID = strconv.FormatUint(x.nextID, 10)
	if t.done == nil {
		t.done = make(chan answer, 1)
	}
	m.queue = append(m.queue, t)
	close(m.woken)
	m.woken = make(chan struct{})
}

// extProperty and the rest are what a mapper is told of a device.
type extProperty struct {
	Name    string            `json:"name"`
	Type    string            `json:"type"`
	Access  string            `json:"access"`
	Unit    string            `json:"unit,omitempty"`
	Read    []v1alpha1.Read   `json:"read,omitempty"`
	Write   *v1alpha1.Write   `json:"write,omitempty"`
	Refresh *v1alpha1.Refresh `json:"refresh,omitempty"`
	Report  v1alpha1.Report   `json:"report"`
}

func (x *external) listDevices(w http.ResponseWriter, r *http.Request) {
	m := x.mapperOf(w, r)
	if m == nil {
		return
	}
	list := []any{}
	for _, d := range x.devicesOf(m.name) {
		var properties []extProperty
		for _, p := range d.model.Spec.Properties {
			properties = append(properties, extProperty{p.Name, p.Type, p.Access, p.Unit, p.Read, p.Write, p.Refresh, p.Report})
		}
		params := maps.Clone(d.device.params)
		delete(params, "replyTo")
		list = append(list, map[string]any{
			"namespace": d.device.key.Namespace, "name": d.device.key.Name, "model": d.model.Name,
			"protocol": d.protocol, "params": params, "config": d.model.Spec.ProfileConfig,
			"properties": properties, "commands": d.model.Spec.Commands,
		})
	}
	respond(w, map[string]any{"devices": list})
}

// poll hands out what there is to do, or waits for it.
func (x *external) poll(w http.ResponseWriter, r *http.Request) {
	m := x.mapperOf(w, r)
	if m == nil {
		return
	}
	wait := 30 * time.Second
	if s := r.URL.Query().Get("wait"); s != "" {
		var err error
		if wait, err = time.ParseDuration(s); err != nil || wait < 0 || wait > maxPoll {
			fail(w, http.StatusBadRequest, fmt.Sprintf("wait: want a duration from 0 to %v", maxPoll))
			return
		}
	}
	x.mu.Lock()
	m.polls++
	x.mu.Unlock()
	defer func() {
		x.mu.Lock()
		m.polls--
		m.seen = time.Now()
		x.mu.Unlock()
	}()
	timeout := time.NewTimer(wait)
	defer timeout.Stop()
	for {
		x.mu.Lock()
		tasks := m.queue[:min(len(m.queue), 100)]
		m.queue = m.queue[len(tasks):]
		for _, t := range tasks {
			if t.Kind != "devices" {
				m.out[t.ID] = t
			}
		}
		woken := m.woken
		x.mu.Unlock()
		if len(tasks) > 0 {
			respond(w, map[string]any{"tasks": tasks})
			return
		}
		select {
		case <-woken:
		case <-timeout.C:
			respond(w, map[string]any{"tasks": []any{}})
			return
		case <-r.Context().Done():
			return
		}
	}
}

// finish takes a mapper's answer to a task.
func (x *external) finish(w http.ResponseWriter, r *http.Request) {
	m := x.mapperOf(w, r)
	if m == nil {
		return
	}
	var in struct {
		Error  string          `json:"error"`
		Result json.RawMessage `json:"result"`
	}
	if !decodeBody(w, r, &in) {
		return
	}
	x.mu.Lock()
	t := m.out[r.PathValue("id")]
	delete(m.out, r.PathValue("id"))
	x.mu.Unlock()
	if t == nil {
		fail(w, http.StatusNotFound, "no such task; its time may be over")
		return
	}
	if in.Error != "" {
		t.done <- answer{err: &RefusedError{Reason: clip(in.Error, 512)}}
	} else {
		t.done <- answer{body: in.Result}
	}
	respond(w, map[string]any{})
}

// extReport is what a mapper says of one device.
type extReport struct {
	Namespace  string              `json:"namespace"`
	Name       string              `json:"name"`
	State      string              `json:"state,omitempty"`
	Properties map[string]extValue `json:"properties,omitempty"`
}

type extValue struct {
	Value json.RawMessage `json:"value,omitempty"`
	TS    int64           `json:"ts,omitempty"` // Unix milliseconds
	Error string          `json:"error,omitempty"`
}

func (x *external) report(w http.ResponseWriter, r *http.Request) {
	m := x.mapperOf(w, r)
	if m == nil {
		return
	}
	var in struct {
		Reports []extReport `json:"reports"`
	}
	if !decodeBody(w, r, &in) {
		return
	}
	n := 0
	for _, one := range in.Reports {
		n += max(1, len(one.Properties))
	}
	if !m.limit.AllowN(time.Now(), n) {
		w.Header().Set("Retry-After", "1")
		fail(w, http.StatusTooManyRequests, fmt.Sprintf("more than %d readings a second; nothing of this was taken", reportsEvery))
		return
	}
	refused := []string{}
	for _, one := range in.Reports {
		if err := x.take(m, one); err != nil && len(refused) < 100 {
			refused = append(refused, err.Error())
		}
	}
	respond(w, map[string]any{"refused": refused})
}

func (x *external) take(m *mapper, one extReport) error {
	dev, err := x.driver.device(devicetwin.Key{Namespace: one.Namespace, Name: one.Name})
	if err != nil {
		return err
	}
	x.mu.Lock()
	mine := dev.ext != nil && m.serves(dev.ext)
	x.mu.Unlock()
	if !mine {
		return fmt.Errorf("device %s: is not this mapper's", dev.key)
	}
	state, known := map[string]string{"": "", "online": v1alpha1.PhaseOnline, "offline": v1alpha1.PhaseOffline,
		"sleeping": v1alpha1.PhaseSleeping}[strings.ToLower(one.State)]
	if !known {
		return fmt.Errorf("device %s: state %.40q is none of online, offline, sleeping", dev.key, one.State)
	}
	var readings []devicetwin.Reading
	for _, name := range slices.Sorted(maps.Keys(one.Properties)) {
		v, p := one.Properties[name], dev.readings[name]
		if p == nil {
			err = errors.Join(err, fmt.Errorf("device %s: property %s: the model has none of that name", dev.key, name))
			continue
		}
		readings = append(readings, p.external(v))
	}
	dev.mu.Lock()
	defer dev.mu.Unlock()
	if dev.gone.Load() {
		return err
	}
	if len(readings) > 0 {
		x.driver.cfg.Sink.Report(dev.key, readings)
	}
	switch {
	case state != "":
		x.driver.sight(dev, devicetwin.Sighting{Evidence: devicetwin.EvidenceAvailability, State: state})
	case slices.ContainsFunc(readings, func(r devicetwin.Reading) bool { return r.Bad == nil }):
		x.driver.cfg.Sink.Sight(dev.key, devicetwin.Sighting{Evidence: devicetwin.EvidenceMessage, State: v1alpha1.PhaseOnline})
	}
	return err
}

func (p *property) external(v extValue) devicetwin.Reading {
	out := devicetwin.Reading{Property: p.Name}
	if v.TS > 0 {
		out.TS = time.UnixMilli(v.TS).UTC()
	}
	if v.Error != "" {
		out.Bad = errors.New(clip(v.Error, 512))
		return out
	}
	raw, err := decodeJSON(v.Value)
	if err == nil {
		var s *scaling
		if len(p.reads) > 0 {
			s = p.reads[0].scale
		}
		out.Value, err = p.codec.decode(raw, s)
	}
	out.Bad = err
	return out
}

// do hands a task to the device's mapper and waits for the answer.
func (d *extDevice) do(ctx context.Context, t *task, timeout time.Duration) (json.RawMessage, error) {
	x := d.driver.ext
	if x == nil {
		return nil, fmt.Errorf("this node has no socket for mappers: %w", devicetwin.ErrNotConnected)
	}
	if timeout <= 0 {
		timeout = defaultTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	t.Namespace, t.Name, t.TimeoutMS = d.device.key.Namespace, d.device.key.Name, timeout.Milliseconds()
	t.done = make(chan answer, 1)
	x.mu.Lock()
	var m *mapper
	for _, name := range slices.Sorted(maps.Keys(x.mappers)) {
		if one := x.mappers[name]; one.here && one.serves(d) {
			m = one
			break
		}
	}
	if m == nil {
		x.mu.Unlock()
		return nil, fmt.Errorf("no mapper for it is registered on this node: %w", devicetwin.ErrNotConnected)
	}
	if len(m.queue)+len(m.out) >= maxTasks {
		x.mu.Unlock()
		return nil, fmt.Errorf("mapper %s has %d tasks to do already: %w", m.name, maxTasks, devicetwin.ErrNotConnected)
	}
	x.pushLocked(m, t)
	x.mu.Unlock()
	select {
	case a := <-t.done:
		return a.body, a.err
	case <-ctx.Done():
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if i := slices.Index(m.queue, t); i >= 0 {
		m.queue = slices.Delete(m.queue, i, i+1)
		return nil, fmt.Errorf("mapper %s did not fetch it within %v: %w", m.name, timeout, devicetwin.ErrNotConnected)
	}
	delete(m.out, t.ID)
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return nil, fmt.Errorf("mapper %s within %v: %w", m.name, timeout, ErrNoReply)
	}
	return nil, ctx.Err()
}

func (d *extDevice) write(ctx context.Context, p *property, v any, w devicetwin.WriteRequest) error {
	var s *scaling
	if p.write != nil {
		s = p.write.scale
	}
	said, err := p.codec.encode(v, s)
	var raw json.RawMessage
	if err == nil {
		raw = json.RawMessage(said.text)
		if !said.json {
			raw, err = json.Marshal(said.text)
		}
	}
	if err == nil {
		_, err = d.do(ctx, &task{Kind: "write", Property: p.Name, Value: raw}, w.Expires)
	}
	if err != nil {
		return fmt.Errorf("device %s: property %s: %w", d.device.key, p.Name, err)
	}
	return nil
}

func (d *extDevice) command(ctx context.Context, c *command, r devicetwin.CommandRequest) (json.RawMessage, error) {
	_, err := c.args(r.Args)
	var out json.RawMessage
	if err == nil {
		out, err = d.do(ctx, &task{Kind: "command", Command: c.Name, RequestID: r.ID, Args: r.Args}, r.Timeout)
	}
	if err != nil {
		return nil, fmt.Errorf("device %s: command %s: %w", d.device.key, c.Name, err)
	}
	return out, nil
}

func (d *extDevice) refreshNow(ctx context.Context) error {
	if _, err := d.do(ctx, &task{Kind: "refresh"}, 0); err != nil {
		return fmt.Errorf("device %s: refresh: %w", d.device.key, err)
	}
	return nil
}

func decodeBody(w http.ResponseWriter, r *http.Request, into any) bool {
	body, err := io.ReadAll(r.Body)
	if err == nil {
		err = checkDepth(body)
	}
	if err == nil {
		err = json.Unmarshal(body, into)
	}
	if err != nil {
		var large *http.MaxBytesError
		code := http.StatusBadRequest
		if errors.As(err, &large) {
			code = http.StatusRequestEntityTooLarge
		}
		fail(w, code, err.Error())
		return false
	}
	return true
}

func respond(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // who asked is gone: nothing to do
}

func fail(w http.ResponseWriter, code int, why string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(map[string]string{"error": why})
}
