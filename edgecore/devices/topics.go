package devices

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/mqtt"
)

// The API over MQTT:
//
//	skerry/v1/twin/NS/NAME                     ← the twin, retained
//	skerry/v1/twin/NS/NAME/reported            ← {"ver":…,"props":{p:{value,ts,…}}}, what changed
//	skerry/v1/twin/NS/NAME/delta               ← where it is not as wanted; empty props: all is
//	skerry/v1/twin/NS/NAME/desired/set         → {"id":"a1","props":{p:v},"ttl":"10m","base":"VER"}
//	skerry/v1/twin/NS/NAME/desired/result/ID   ← {"code":200,"state":"sent","ver":…}
//	skerry/v1/twin/NS/NAME/cmd/CMD/ID          → {"args":{…},"timeout":"5s"}, or nothing
//	skerry/v1/twin/NS/NAME/cmd/CMD/ID/status   ← how far it has come
//	skerry/v1/telemetry/NS/ROUTE               → a record; PUBACK is on disk
//
// What is asked in a retained message is refused: it would be asked again at
// every reconnect. With the embedded broker RBAC says who may what; with an
// external one that broker does, and what comes over it is said to be by "mqtt".
const (
	topicRoot       = "skerry/v1/"
	twinTopics      = topicRoot + "twin/"
	telemetryTopics = topicRoot + "telemetry/"

	byMQTT = "mqtt"

	// docEvery is how often one device's retained document is published at
	// most; what changed is told at once.
	docEvery = 250 * time.Millisecond

	askers        = 4  // lanes in which requests are carried out
	asksPerLane   = 64 // that may wait in one
	maxAsk        = 64 << 10
	publishWithin = 10 * time.Second
)

// topics is the API over MQTT.
type topics struct {
	broker mqtt.Broker
	twins  twins
	// who names the client of an embedded broker; nil: unknown.
	who func(clientID string) string
	log *slog.Logger

	cancel   []func()    // of the subscriptions
	statuses chan status // of commands, to be told
	asked    sync.Map    // commandIDs under way
	commands chan struct{}
	wait     sync.WaitGroup // for commands
	seed     maphash.Seed
	lanes    [askers]chan ask
	refusals chan refusal
}

// ask is a request that came by MQTT.
type ask struct {
	key     devicetwin.Key
	command string // empty: it sets
	id      string
	body    []byte
	by      string
}

// newTopics subscribes: nothing that is asked comes before that.
func newTopics(b mqtt.Broker, t twins, who func(string) string, log *slog.Logger) (*topics, error) {
	x := &topics{broker: b, twins: t, who: who, log: log, seed: maphash.MakeSeed(), statuses: make(chan status, statusesKept), commands: make(chan struct{}, commandsAtOnce), refusals: make(chan refusal, asksPerLane)}
	for i := range x.lanes {
		x.lanes[i] = make(chan ask, asksPerLane)
	}
	for _, filter := range []string{twinTopics + "+/+/desired/set", twinTopics + "+/+/cmd/+/+"} {
		cancel, err := b.Subscribe(filter, 1, x.take)
		if err != nil {
			return nil, fmt.Errorf("subscribe to %s: %w", filter, err)
		}
		x.cancel = append(x.cancel, cancel)
	}
	return x, nil
}

// run serves until ctx ends.
func (t *topics) run(ctx context.Context) error {
	defer func() {
		for _, cancel := range t.cancel {
			cancel()
		}
	}()
	defer t.wait.Wait()
	g, ctx := errgroup.WithContext(ctx)
	for _, lane := range t.lanes {
		g.Go(func() error { return t.answer(ctx, lane) })
	}
	g.Go(func() error { return t.tell(ctx) })
	g.Go(func() error { return t.tellStatuses(ctx) })
	g.Go(func() error { return t.tellRefusals(ctx) })
	return g.Wait()
}

// take sorts a request into a lane; of one device they stay in order.
func (t *topics) take(m mqtt.Message) error {
	a, err := parseAsk(m)
	if err != nil {
		t.log.Debug("a request over MQTT is none", "topic", m.Topic, "err", err)
		return nil
	}
	a.by = byMQTT
	if t.who != nil && m.From != "" {
		a.by = t.who(m.From)
	}
	if m.Retain {
		// Also of one that an external broker has kept: it goes.
		t.refuse(refusal{a, http.StatusBadRequest, "a retained message asks for nothing: it would be carried out again at every reconnect", m.Topic})
		return nil
	}
	select {
	case t.lanes[maphash.Comparable(t.seed, a.key)%askers] <- a:
	default:
		t.refuse(refusal{a, http.StatusTooManyRequests, "more is asked over MQTT than this node carries out", ""})
	}
	return nil
}

// refusal is an answer that asks nothing of a twin.
type refusal struct {
	ask     ask
	code    int
	message string
	kept    string // a topic whose retained message is to go
}

// refuse has it told. Who floods a node is not told of each message.
func (t *topics) refuse(r refusal) {
	select {
	case t.refusals <- r:
	default:
		t.log.Debug("a refusal over MQTT is not told: there are too many", "device", r.ask.key)
	}
}

func (t *topics) tellRefusals(ctx context.Context) error {
	for {
		select {
		case r := <-t.refusals:
			if r.kept != "" {
				t.publish(ctx, mqtt.Message{Topic: r.kept, Retain: true, QoS: 1})
			}
			t.reply(ctx, r.ask, r.code, r.message)
		case <-ctx.Done():
			return nil
		}
	}
}

// parseAsk reads what a topic asks for.
func parseAsk(m mqtt.Message) (ask, error) {
	rest, ok := strings.CutPrefix(m.Topic, twinTopics)
	parts := strings.Split(rest, "/")
	switch {
	case !ok || len(parts) < 4 || parts[0] == "" || parts[1] == "":
		return ask{}, errors.New("the topic is none of the API's")
	case len(m.Payload) > maxAsk:
		return ask{}, fmt.Errorf("%d bytes are too many", len(m.Payload))
	}
	a := ask{key: devicetwin.Key{Namespace: parts[0], Name: parts[1]}, body: bytes.Clone(m.Payload)}
	switch {
	case len(parts) == 4 && parts[2] == "desired" && parts[3] == "set":
		return a, nil
	case len(parts) == 5 && parts[2] == "cmd" && parts[3] != "" && parts[4] != "" && len(parts[4]) <= maxID:
		a.command, a.id = parts[3], parts[4]
		return a, nil
	}
	return ask{}, errors.New("the topic is none of the API's")
}

// maxID is how long the id of a request may be.
const maxID = 64

// answer carries a lane's requests out.
func (t *topics) answer(ctx context.Context, lane <-chan ask) error {
	for {
		var a ask
		select {
		case a = <-lane:
		case <-ctx.Done():
			return nil
		}
		if a.command != "" {
			t.doCommand(ctx, a)
		} else {
			t.set(ctx, a)
		}
	}
}

func (t *topics) set(ctx context.Context, a ask) {
	var body struct {
		ID    string                     `json:"id"`
		Props map[string]json.RawMessage `json:"props"`
		TTL   string                     `json:"ttl"`
		Base  string                     `json:"base"`
	}
	if err := json.Unmarshal(a.body, &body); err != nil {
		t.reply(ctx, a, http.StatusBadRequest, "the payload is not what is expected: "+err.Error())
		return
	}
	if a.id = body.ID; len(a.id) > maxID || mqtt.CheckTopic("x/"+a.id) != nil || strings.Contains(a.id, "/") {
		a.id = ""
		t.reply(ctx, a, http.StatusBadRequest, fmt.Sprintf("the id must be of at most %d bytes that may stand in a topic", maxID))
		return
	}
	p, err := patchBody{ID: body.ID, Desired: body.Props, TTL: body.TTL}.patch(a.by)
	if err == nil && body.Base != "" {
		var v v1alpha1.Version
		if v, err = v1alpha1.ParseVersion(body.Base); err == nil {
			p.Base = &v
		}
	}
	if err != nil {
		t.reply(ctx, a, http.StatusUnprocessableEntity, err.Error())
		return
	}
	t.send(ctx, a, t.twins.SetDesired(ctx, a.key, p))
}

func (t *topics) doCommand(ctx context.Context, a ask) {
	var body struct {
		Args    map[string]json.RawMessage `json:"args"`
		Timeout string                     `json:"timeout"`
	}
	call := devicetwin.CommandCall{ID: a.id, Name: a.command, By: a.by}
	if len(bytes.TrimSpace(a.body)) > 0 {
		err := json.Unmarshal(a.body, &body)
		if err == nil && body.Timeout != "" {
			call.Timeout, err = time.ParseDuration(body.Timeout)
		}
		if err != nil || call.Timeout < 0 || call.Timeout > maxCommandTimeout {
			t.reply(ctx, a, http.StatusBadRequest, fmt.Sprintf("the payload is not {\"args\":{…},\"timeout\":\"5s\"}: %v", err))
			return
		}
		call.Args = body.Args
	}
	select {
	case t.commands <- struct{}{}:
	default:
		t.reply(ctx, a, http.StatusTooManyRequests, "more commands are under way than this node carries out at once")
		return
	}
	// A device may take its time; others do not wait for it.
	t.asked.Store(commandID{a.key, a.id}, true)
	t.wait.Go(func() {
		s := t.twins.Command(ctx, a.key, call)
		t.asked.Delete(commandID{a.key, a.id})
		<-t.commands
		t.send(ctx, a, s)
	})
}

// commandID names a command that was asked for here.
type commandID struct {
	key devicetwin.Key
	id  string
}

// commandsAtOnce is how many may wait for their devices.
const commandsAtOnce = 64

// status is one of a command of a device.
type status struct {
	key devicetwin.Key
	devicetwin.CommandStatus
}

// statusesKept is how many may wait to be told; what comes beyond is not: who
// wants to be sure asks again with the same id.
const statusesKept = 256

// commandChanged tells of commands that came otherwise, and of the steps of
// those that came here; who asked tells the end.
func (t *topics) commandChanged(k devicetwin.Key, s devicetwin.CommandStatus) {
	if _, here := t.asked.Load(commandID{k, s.ID}); here && s.Done() {
		return
	}
	select {
	case t.statuses <- status{k, s}:
	default:
	}
}

func (t *topics) tellStatuses(ctx context.Context) error {
	for {
		select {
		case s := <-t.statuses:
			if mqtt.CheckTopic("x/"+s.ID) == nil {
				t.send(ctx, ask{key: s.key, command: s.Name, id: s.ID}, s.CommandStatus)
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// reply tells a failure that is not the twin's.
func (t *topics) reply(ctx context.Context, a ask, code int, message string) {
	t.send(ctx, a, problem{code, message})
}

// send publishes an answer. It is never kept: who asks listens.
func (t *topics) send(ctx context.Context, a ask, v any) {
	body, err := json.Marshal(v)
	if err != nil {
		t.log.Error("an answer over MQTT is lost", "err", err)
		return
	}
	switch topic := deviceTopic(a.key); {
	case a.command != "":
		t.publish(ctx, mqtt.Message{Topic: topic + "/cmd/" + a.command + "/" + a.id + "/status", Payload: body, QoS: 1})
	case a.id != "":
		t.publish(ctx, mqtt.Message{Topic: topic + "/desired/result/" + a.id, Payload: body, QoS: 1})
	}
}

func (t *topics) publish(ctx context.Context, m mqtt.Message) {
	ctx, cancel := context.WithTimeout(ctx, publishWithin)
	defer cancel()
	if err := t.broker.Publish(ctx, m); err != nil {
		t.log.Debug("not published", "topic", m.Topic, "err", err)
	}
}

// tell publishes what changes. It takes as many changes at once as there are:
// the watch holds the latest of each device only.
func (t *topics) tell(ctx context.Context) error {
	due := map[devicetwin.Key]*devicetwin.Doc{} // documents to publish; nil takes one away
	timer := time.NewTimer(0)
	defer timer.Stop()
	armed := true
	all := changes(ctx, t.twins, v1alpha1.Version{})
	for {
		select {
		case <-ctx.Done():
			return nil
		case c, ok := <-all:
			if !ok {
				return ctx.Err()
			}
			if c.Type == devicetwin.ChangeSynced {
				continue
			}
			t.tellChange(ctx, c)
			due[c.Key] = c.Doc
			if !armed {
				timer.Reset(docEvery)
				armed = true
			}
		case <-timer.C:
			armed = false
			for _, key := range slices.SortedFunc(maps.Keys(due), func(a, b devicetwin.Key) int { return strings.Compare(a.String(), b.String()) }) {
				t.tellDoc(ctx, key, due[key])
			}
			clear(due)
		}
	}
}

func deviceTopic(k devicetwin.Key) string { return twinTopics + k.Namespace + "/" + k.Name }

func (t *topics) tellDoc(ctx context.Context, key devicetwin.Key, d *devicetwin.Doc) {
	m := mqtt.Message{Topic: deviceTopic(key), Retain: true, QoS: 1}
	if d != nil {
		body, err := json.Marshal(d)
		if err != nil {
			t.log.Error("a twin is not published", "device", key.String(), "err", err)
			return
		}
		m.Payload = body
	}
	t.publish(ctx, m)
}

// reportedChange is what the reported topic tells.
type reportedChange struct {
	Version v1alpha1.Version                  `json:"ver"`
	Phase   string                            `json:"phase"`
	Props   map[string]devicetwin.DocReported `json:"props"`
}

func (t *topics) tellChange(ctx context.Context, c devicetwin.Change) {
	if c.Doc == nil || c.Type != devicetwin.ChangeUpdate {
		return
	}
	if len(c.Reported) > 0 {
		r := reportedChange{Version: c.Version, Phase: c.Doc.Phase, Props: map[string]devicetwin.DocReported{}}
		for _, p := range c.Reported {
			if v := c.Doc.Properties[p].Reported; v != nil {
				r.Props[p] = *v
			}
		}
		if body, err := json.Marshal(r); err == nil {
			t.publish(ctx, mqtt.Message{Topic: deviceTopic(c.Key) + "/reported", Payload: body, QoS: 1})
		}
	}
	if c.Delta != nil {
		if body, err := json.Marshal(c.Delta); err == nil {
			t.publish(ctx, mqtt.Message{Topic: deviceTopic(c.Key) + "/delta", Payload: body, QoS: 1})
		}
	}
}
