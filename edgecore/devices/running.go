package devices

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	corev1 "k8s.io/api/core/v1"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/mqtt"
	"github.com/skerry-io/skerry/devicetwin/profile"
	"github.com/skerry-io/skerry/devicetwin/telemetry"
	"github.com/skerry-io/skerry/devicetwin/twindb"
)

// running is the part while it runs: one broker, one set of twins.
type running struct {
	*Part
	part *Part
	ctx  context.Context // of the run

	db      *twindb.DB
	twins   *devicetwin.Twins
	gate    *gate
	broker  mqtt.Broker
	choice  mqtt.Choice
	driver  *profile.Driver
	routes  *telemetry.Router
	topics  *topics
	events  *recorder
	bridges bridges

	connected atomic.Bool   // to an external broker
	routed    chan struct{} // takes one: the routes have changed
}

// assemble opens and wires the parts; it starts nothing.
func (p *Part) assemble(ctx context.Context) (*running, error) {
	if err := os.MkdirAll(p.cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("devices: %w", err)
	}
	r := &running{Part: p, part: p, routed: make(chan struct{}, 1), events: &recorder{store: p.cfg.Store, node: p.cfg.NodeName, log: p.log}}
	var err error
	if r.db, err = twindb.Open(twindb.Config{Path: filepath.Join(p.cfg.Dir, databaseFile), BytesPerDay: p.cfg.BytesPerDay, Log: p.log}); err != nil {
		return nil, err
	}
	if err := r.wire(ctx); err != nil {
		if r.routes != nil {
			r.routes.Close() // its logs are opened again at the next try
		}
		return nil, errors.Join(err, r.db.Close())
	}
	return r, nil
}

func (r *running) wire(ctx context.Context) error {
	cfg := r.part.cfg
	var err error
	r.routes, err = telemetry.New(telemetry.Config{
		Dir: filepath.Join(cfg.Dir, telemetryDir), Node: cfg.NodeName, Cursors: r.db, Now: cfg.Now, Log: r.log,
		Secret:       func(namespace, name string) map[string][]byte { data, _ := r.secret(namespace, name); return data },
		DeviceTopics: func(b devicetwin.Bound) []string { said, _ := profile.Filters(cfg.NodeName, b); return said },
	})
	if err != nil {
		return err
	}
	r.twins, err = devicetwin.New(devicetwin.Config{
		Node: cfg.NodeName, DB: r.db, Now: cfg.Now, Log: r.log, Events: r.tell, Observe: r.routes.Observe, OnCommand: r.commandChanged,
	})
	if err != nil {
		return err
	}
	if r.choice, err = mqtt.Choose(ctx, cfg.MQTT.Mode, cfg.MQTT.URL); err != nil {
		return err
	}
	r.gate = newGate(cfg.Access, *cfg.MQTT.AnonymousLoopback)
	r.gate.sight = r.twins.Sight
	var who func(string) string
	if r.choice.Mode == mqtt.ModeEmbedded {
		who = r.gate.who
		r.broker, err = r.embedded()
	} else {
		r.broker, err = r.external(r.choice.URL)
	}
	if err != nil {
		return err
	}
	r.driver, err = profile.New(profile.Config{
		Node: cfg.NodeName, Broker: r.broker, Sink: r.twins, Twins: views{r.twins}, ExternalSocket: cfg.MapperSocket, Log: r.log,
	})
	if err != nil {
		return err
	}
	r.twins.Use(r.driver)
	if r.topics, err = newTopics(r.broker, r.twins, who, r.log); err != nil {
		return err
	}
	return r.openBridges()
}

// start starts everything in g; it ends with ctx.
func (r *running) start(ctx context.Context, g *errgroup.Group) {
	r.ctx = ctx
	r.log.Info("devices are served", "mqtt", r.choice.Mode, "why", r.choice.Reason, "url", r.choice.URL)
	g.Go(func() error { return r.driver.Run(ctx) })
	g.Go(func() error {
		select {
		case <-r.driver.Subscribed(): // before a device speaks
			return r.broker.Run(ctx)
		case <-ctx.Done():
			return nil
		}
	})
	g.Go(func() error { return r.twins.Run(ctx) })
	g.Go(func() error { return r.routes.Run(ctx) })
	g.Go(func() error { return r.listen(ctx) })
	g.Go(func() error { return r.topics.run(ctx) })
	r.bridges.start(ctx, g)
}

// close is called once all has ended.
func (r *running) close() error { return errors.Join(r.bridges.close(), r.db.Close()) }

// apply tells everyone what there is.
func (r *running) apply(s set) {
	if err := r.gate.set(r.part.cfg.NodeName, s.devices, r.secret); err != nil {
		r.log.Warn("not all devices get their rights at the broker", "err", err)
	}
	r.routes.Set(s.routes, s.devices)
	r.twins.Set(s.devices, s.discoveries)
	select {
	case r.routed <- struct{}{}:
	default:
	}
}

// replay has the twins take what was captured before this start and may not
// have reached the disk with them.
func (r *running) replay() {
	n := 0
	r.driver.Replay(func(yield func(mqtt.Message) bool) {
		for m, err := range r.routes.Captured() {
			if err != nil {
				r.log.Warn("a captured message cannot be read", "err", err)
				continue
			}
			if n++; !yield(m) {
				return
			}
		}
	})
	if n > 0 {
		r.log.Info("captured messages were taken again", "messages", n)
	}
}

// listen keeps an external broker subscribed to what routes capture by topic;
// the embedded one asks anyway.
func (r *running) listen(ctx context.Context) error {
	held := map[string]func(){}
	defer func() {
		for _, cancel := range held {
			cancel()
		}
	}()
	for r.choice.Mode == mqtt.ModeExternal {
		want := map[string]bool{telemetryTopics + "+/+": true}
		for _, filter := range r.routes.Topics() {
			want[filter] = true
		}
		for filter, cancel := range held {
			if !want[filter] {
				cancel()
				delete(held, filter)
			}
		}
		for filter := range want {
			if held[filter] != nil {
				continue
			}
			cancel, err := r.broker.Subscribe(filter, 1, func(mqtt.Message) error { return nil })
			if err != nil {
				r.log.Warn("a route's topics are not heard", "filter", filter, "err", err)
				continue
			}
			held[filter] = cancel
		}
		select {
		case <-r.routed:
		case <-ctx.Done():
			return nil
		}
	}
	<-ctx.Done()
	return nil
}

// commandChanged tells by MQTT how far a command has come, whoever gave it.
func (r *running) commandChanged(k devicetwin.Key, s devicetwin.CommandStatus) {
	if r.topics != nil {
		r.topics.commandChanged(k, s)
	}
}

func (r *running) secret(namespace, name string) (map[string][]byte, bool) {
	return secret(r.part.cfg.Store, namespace, name)
}

// errRetained refuses what would be asked again at every reconnect.
var errRetained = errors.New("what is asked of the node's API is not to be kept: publish it without retain")

// capture is called with what clients publish, before it is acknowledged.
func (r *running) capture(m mqtt.Message) error {
	if m.Retain && r.choice.Mode == mqtt.ModeEmbedded && strings.HasPrefix(m.Topic, topicRoot) {
		return errRetained
	}
	if route, ok := routeOf(m.Topic); ok {
		return r.collect(route, m)
	}
	return r.routes.Capture(m)
}

// errSingly has the broker ask for each of several messages.
var errSingly = errors.New("some of these messages are captured one by one")

// captureAll is capture for what came together.
func (r *running) captureAll(ms []mqtt.Message) error {
	for _, m := range ms {
		if strings.HasPrefix(m.Topic, topicRoot) {
			return errSingly
		}
	}
	return r.routes.CaptureAll(ms)
}

// routeOf is the route that a topic of the API names.
func routeOf(topic string) (devicetwin.Key, bool) {
	rest, ok := strings.CutPrefix(topic, telemetryTopics)
	ns, name, ok2 := strings.Cut(rest, "/")
	return devicetwin.Key{Namespace: ns, Name: name}, ok && ok2 && ns != "" && name != "" && !strings.Contains(name, "/")
}

// collect puts a pod's record on the disk. One that no route wants is refused
// where the sender hears of it; an external broker would bring it for ever.
func (r *running) collect(route devicetwin.Key, m mqtt.Message) error {
	if m.Retain {
		return nil // an external broker has kept it: it came when it was said
	}
	err := r.routes.Append(context.Background(), route, m.Topic, m.Payload)
	if errors.Is(err, telemetry.ErrNoRoute) && r.choice.Mode == mqtt.ModeExternal {
		r.log.Warn("a record is dropped", "err", err)
		return nil
	}
	return err
}

// tell makes an Event of what a twin has to say.
func (r *running) tell(e devicetwin.Event) {
	typ := corev1.EventTypeNormal
	if e.Warning {
		typ = corev1.EventTypeWarning
	}
	r.log.Info("a device", "device", e.Device.String(), "reason", e.Reason, "message", e.Message)
	r.events.tell("Device", e.Device, e.UID, typ, e.Reason, e.Message)
}

func (r *running) status(st *Status) {
	st.Telemetry = r.routes.Status()
	b := r.broker.State()
	st.MQTT, st.MQTTReason = &b, r.choice.Reason
	st.Bridges = r.bridges.status()
	st.Written = r.db.Stats().Bytes
	if t := r.db.Trouble(); t != nil {
		st.DiskTrouble = t.Error
	}
	if m := r.db.Mended(); m != nil {
		st.Mended = m.Cause
	}
	for _, d := range r.twins.List() {
		if st.Phases == nil {
			st.Phases = map[string]int{}
		}
		st.Phases[d.Phase]++
	}
}
