package profile

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/mqtt"
)

// RefusedError is a device's own no.
type RefusedError struct{ Reason string }

func (e *RefusedError) Error() string { return "the device refused: " + e.Reason }

// Unwrap is devicetwin.ErrRejected.
func (e *RefusedError) Unwrap() error { return devicetwin.ErrRejected }

// ErrNoReply says that the device did not answer in time. It may have acted.
var ErrNoReply error = noReply{}

type noReply struct{}

func (noReply) Error() string { return "the device did not answer" }
func (noReply) Unwrap() error { return context.DeadlineExceeded }

// Write implements devicetwin.Driver.
func (d *Driver) Write(ctx context.Context, w devicetwin.WriteRequest) error {
	dev, err := d.device(w.Device)
	if err != nil {
		return err
	}
	p := dev.readings[w.Property]
	if err := dev.problems[w.Property]; err != nil {
		return err
	}
	if p == nil {
		return fmt.Errorf("device %s: property %s: the model has none of that name", w.Device, w.Property)
	}
	if dev.ownWrite != nil {
		return dev.ownWrite(ctx, p, w.Value, w)
	}
	if p.write == nil {
		return fmt.Errorf("device %s: property %s: the model has no way to write it", w.Device, w.Property)
	}
	value, err := p.codec.encode(w.Value, p.write.scale)
	if err != nil {
		return fmt.Errorf("device %s: property %s: %w", w.Device, w.Property, err)
	}
	_, err = d.send(ctx, dev, p.write, w.Expires, 0, func(name string) (word, bool) {
		return value, name == "value"
	})
	if err != nil {
		return fmt.Errorf("device %s: property %s: %w", w.Device, w.Property, err)
	}
	return nil
}

// Command implements devicetwin.Driver. Where the device does not answer there
// is nothing to return.
func (d *Driver) Command(ctx context.Context, r devicetwin.CommandRequest) (json.RawMessage, error) {
	dev, err := d.device(r.Device)
	if err != nil {
		return nil, err
	}
	c := dev.commands[r.Name]
	if err := dev.problems[commandProblem+r.Name]; err != nil {
		return nil, fmt.Errorf("device %s: %w", r.Device, err)
	}
	if c == nil {
		return nil, fmt.Errorf("device %s: command %s: the model has none of that name", r.Device, r.Name)
	}
	if dev.ownCommand != nil {
		return dev.ownCommand(ctx, c, r)
	}
	args, err := c.args(r.Args)
	if err != nil {
		return nil, fmt.Errorf("device %s: command %s: %w", r.Device, r.Name, err)
	}
	args["cmdId"] = word{text: r.ID}
	out, err := d.send(ctx, dev, c.write, r.Timeout, r.Timeout, func(name string) (word, bool) {
		w, ok := args[name]
		return w, ok
	})
	if err != nil {
		return nil, fmt.Errorf("device %s: command %s: %w", r.Device, r.Name, err)
	}
	return out, nil
}

// args checks that what the payload needs is there and may stand in it.
func (c *command) args(given map[string]json.RawMessage) (map[string]word, error) {
	words := make(map[string]word, len(given)+1)
	for _, p := range c.Params {
		raw, ok := given[p.Name]
		if !ok {
			if p.Required {
				return nil, fmt.Errorf("argument %s is missing", p.Name)
			}
			words[p.Name] = word{text: "null", json: true}
			continue
		}
		w, err := argument(raw)
		if err != nil {
			return nil, fmt.Errorf("argument %s: %w", p.Name, err)
		}
		if len(p.Enum) > 0 && !slices.Contains(p.Enum, w.text) {
			return nil, fmt.Errorf("argument %s: %.40q is none of %s", p.Name, w.text, strings.Join(p.Enum, ", "))
		}
		for _, bound := range []struct {
			at   json.Number
			sign int
		}{{p.Min, -1}, {p.Max, 1}} {
			if bound.at == "" {
				continue
			}
			limit, err := exactly(bound.at.String())
			if err != nil {
				return nil, fmt.Errorf("argument %s: its bound: %w", p.Name, err)
			}
			v, err := exactly(w.text)
			if err != nil {
				return nil, fmt.Errorf("argument %s: %w", p.Name, err)
			}
			if v.Cmp(limit) == bound.sign {
				return nil, fmt.Errorf("argument %s: %s is beyond %s", p.Name, w.text, bound.at)
			}
		}
		words[p.Name] = w
	}
	for name := range given {
		if _, ok := words[name]; !ok {
			return nil, fmt.Errorf("argument %.40s: the command has none of that name", name)
		}
	}
	return words, nil
}

func argument(raw json.RawMessage) (word, error) {
	v, err := decodeJSON(raw)
	if err != nil {
		return word{}, err
	}
	if s, ok := v.(string); ok {
		return word{text: s}, nil
	}
	if s, ok := wordOf(v); ok {
		return word{text: s, json: true}, nil
	}
	return word{text: string(raw), json: true}, nil
}

// send publishes one payload and waits for the answer, if the model has one.
func (d *Driver) send(ctx context.Context, dev *device, w *write, expires, timeout time.Duration, get func(string) (word, bool)) (json.RawMessage, error) {
	seq := d.nextSeq()
	payload, err := w.payload.expand(func(name string) (word, bool) {
		if v, ok := get(name); ok {
			return v, true
		}
		if name == "cmdSeq" {
			return word{text: strconv.FormatInt(seq, 10), json: true}, true
		}
		v, ok := dev.params[name]
		return word{text: v, json: isLiteral(v)}, ok
	})
	if err != nil {
		return nil, err
	}
	if w.payload.json && !json.Valid(payload) {
		return nil, fmt.Errorf("the payload %.200q is no JSON; see write.payload", payload)
	}
	m := mqtt.Message{Topic: w.topic, Payload: payload, QoS: w.qos, Retain: w.retain, Expiry: expires}
	if w.reply == nil {
		return nil, d.publish(ctx, m)
	}
	m.Response = w.reply.topic
	m.Correlation = strconv.AppendInt(nil, seq, 10)
	if timeout <= 0 {
		timeout = w.reply.timeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	wait, err := dev.replies.expect(seq, w.reply)
	if err != nil {
		return nil, err
	}
	defer dev.replies.forget(seq)
	if err := d.publish(ctx, m); err != nil {
		return nil, err
	}
	select {
	case a := <-wait:
		return a.body, a.err
	case <-ctx.Done():
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return nil, fmt.Errorf("on %s within %v: %w", w.reply.topic, timeout, ErrNoReply)
		}
		return nil, ctx.Err()
	}
}

func (d *Driver) publish(ctx context.Context, m mqtt.Message) error {
	if err := d.cfg.Broker.Publish(ctx, m); err != nil {
		if errors.Is(err, mqtt.ErrNotConnected) {
			err = notConnected{err}
		}
		return fmt.Errorf("publish to %s: %w", m.Topic, err)
	}
	return nil
}

// notConnected is the broker's word for devicetwin's.
type notConnected struct{ error }

func (e notConnected) Unwrap() []error { return []error{e.error, devicetwin.ErrNotConnected} }

// maxPending answers waited for, of one device.
const maxPending = 64

// replies are the answers waited for from one device.
type replies struct {
	mu      sync.Mutex
	pending []*pendingReply // in the order they were asked
}

type pendingReply struct {
	seq   int64
	reply *reply
	done  chan answer
}

type answer struct {
	body json.RawMessage
	err  error
}

func newReplies() *replies { return &replies{} }

func (r *replies) expect(seq int64, spec *reply) (<-chan answer, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.pending) >= maxPending {
		return nil, fmt.Errorf("%d answers are waited for already", maxPending)
	}
	p := &pendingReply{seq: seq, reply: spec, done: make(chan answer, 1)}
	r.pending = append(r.pending, p)
	return p.done, nil
}

func (r *replies) forget(seq int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pending = slices.DeleteFunc(r.pending, func(p *pendingReply) bool { return p.seq == seq })
}

// answer finds who waits for p: by the correlation of MQTT 5, by the field that
// the model names, or, where there is neither, who asked first.
func (r *replies) answer(p *packet) {
	if p.Retain || len(p.Payload) > MaxPayload {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, q := range r.pending {
		if q.reply.topic != p.Topic || !q.meant(p) {
			continue
		}
		r.pending = slices.Delete(r.pending, i, i+1)
		q.done <- q.read(p)
		return
	}
}

func (q *pendingReply) meant(p *packet) bool {
	seq := strconv.FormatInt(q.seq, 10)
	if len(p.Correlation) > 0 {
		return string(p.Correlation) == seq
	}
	if q.reply.correlate == nil {
		return true
	}
	doc, err := p.json()
	if err != nil {
		return false
	}
	at, ok := q.reply.correlate.find(doc)
	said, _ := wordOf(at)
	return ok && said == seq
}

func (q *pendingReply) read(p *packet) answer {
	doc, err := p.json()
	if q.reply.err != nil && err == nil {
		if at, ok := q.reply.err.find(doc); ok && at != nil {
			reason, scalar := wordOf(at)
			if !scalar {
				raw, _ := json.Marshal(at)
				reason = string(raw)
			}
			return answer{err: &RefusedError{Reason: fmt.Sprintf("%.512s", reason)}}
		}
	}
	if err == nil {
		return answer{body: json.RawMessage(slices.Clone(p.Payload))}
	}
	text, err := json.Marshal(strings.ToValidUTF8(string(p.Payload), "\uFFFD"))
	return answer{body: text, err: err}
}
