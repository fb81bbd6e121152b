package devicetwin

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/value"
)

const (
	defaultTimeout  = 10 * time.Second
	maxTimeout      = 300 * time.Second
	defaultQueueTTL = 10 * time.Minute
	maxQueueTTL     = 24 * time.Hour
	// maxWaiting and maxKept bound a device's commands: that have not ended,
	// and in all. One that has ended is known for keepFor, so that its ID does
	// not do it again.
	maxWaiting = 32
	maxKept    = 64
	keepFor    = 10 * time.Minute
	maxArgs    = 4 << 10
	maxTries   = 3 // of an idempotent one
)

// command is one on its way. Twins.mu guards it.
type command struct {
	CommandStatus
	args    map[string]json.RawMessage
	timeout time.Duration
	queue   bool
	again   bool      // idempotent: may be tried again
	expires time.Time // of a queued one
	wall    int64     // expires as a date, for the disk
	ended   time.Time
	done    chan struct{} // closed at its end
	reflect *reflectWait
	retryAt time.Time
}

type commandChange struct {
	key    Key
	status CommandStatus
}

// Command has the device do something and returns when it has ended, when ctx
// ends, or at once where it waits for a device that is away. The same ID again
// is the same command: it is not done twice.
//
// It is done at most once, also when the power goes: that it is about to be
// sent is on the disk before it is. Only of one that the model calls idempotent
// more is tried.
func (t *Twins) Command(ctx context.Context, dev Key, call CommandCall) CommandStatus {
	c, d, refused := t.admit(ctx, dev, &call)
	if c == nil {
		return refused
	}
	for {
		t.mu.Lock()
		status := c.CommandStatus
		parked := c.State == CommandQueued && c.queue && !d.reachable()
		wait := t.waitLocked()
		t.mu.Unlock()
		if status.Done() || parked {
			return status
		}
		select {
		case <-c.done:
		case <-wait:
		case <-ctx.Done():
			t.mu.Lock()
			defer t.mu.Unlock()
			return c.CommandStatus
		}
	}
}

// CommandStatus is how far a command has come; false: it is not known, or not
// any more.
func (t *Twins) CommandStatus(dev Key, id string) (CommandStatus, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if d := t.devices[dev]; d != nil {
		if c := d.commandOf(id); c != nil {
			return c.CommandStatus, true
		}
	}
	return CommandStatus{}, false
}

func (d *device) commandOf(id string) *command {
	if i := slices.IndexFunc(d.cmds, func(c *command) bool { return c.ID == id }); i >= 0 {
		return d.cmds[i]
	}
	return nil
}

// admit finds or makes the command.
func (t *Twins) admit(ctx context.Context, dev Key, call *CommandCall) (*command, *device, CommandStatus) {
	wall, _ := t.cfg.Now()
	refuse := func(code int, format string, args ...any) (*command, *device, CommandStatus) {
		return nil, nil, CommandStatus{
			ID: clip(call.ID, 64), Name: clip(call.Name, 64), State: CommandFailed, Code: code,
			Message: fmt.Sprintf(format, args...), By: clip(call.By, 128), Created: wall, Updated: wall,
		}
	}
	if call.ID == "" {
		var b [8]byte
		rand.Read(b[:])
		call.ID = hex.EncodeToString(b[:])
	}
	size := 0
	for name, raw := range call.Args {
		size += len(name) + len(raw)
	}
	switch {
	case len(call.ID) > 64 || strings.ContainsAny(call.ID, "/+#\x00"):
		return refuse(http.StatusBadRequest, "the id is longer than 64 bytes or has one of / + #")
	case len(call.By) > 128:
		return refuse(http.StatusBadRequest, "the name of who calls is longer than 128 bytes")
	case size > maxArgs:
		return refuse(http.StatusRequestEntityTooLarge, "the arguments are larger than %d bytes", maxArgs)
	case call.Timeout < 0 || call.Timeout > maxTimeout:
		return refuse(http.StatusUnprocessableEntity, "the timeout is not between 1s and %v", maxTimeout)
	}
	unlock, err := t.serial.lock(ctx, dev)
	if err != nil {
		return refuse(http.StatusServiceUnavailable, "%v", err)
	}
	defer unlock()

	t.mu.Lock()
	d := t.devices[dev]
	if d == nil {
		t.mu.Unlock()
		return refuse(http.StatusNotFound, "there is no device %s on this node", dev)
	}
	if c := d.commandOf(call.ID); c != nil {
		same := c.Name == call.Name && maps.EqualFunc(c.args, call.Args, func(a, b json.RawMessage) bool { return bytes.Equal(compactJSON(a), compactJSON(b)) })
		t.mu.Unlock()
		if !same {
			return refuse(http.StatusConflict, "the id is that of another command")
		}
		return c, d, CommandStatus{}
	}
	i := slices.IndexFunc(d.model.spec.Commands, func(c v1alpha1.Command) bool { return c.Name == call.Name })
	if i < 0 {
		t.mu.Unlock()
		return refuse(http.StatusNotFound, "the model %s has no command %.64q", d.model.name, call.Name)
	}
	spec := &d.model.spec.Commands[i]
	waiting := 0
	for _, c := range d.cmds {
		if !c.Done() {
			waiting++
		}
	}
	c := &command{
		CommandStatus: CommandStatus{ID: call.ID, Name: call.Name, State: CommandQueued, Code: http.StatusAccepted, By: call.By, Created: wall, Updated: wall},
		timeout:       timeoutOf(call.Timeout, spec), queue: spec.Delivery == "queue", again: spec.Idempotent,
		done: make(chan struct{}),
	}
	if len(call.Args) > 0 {
		c.args = make(map[string]json.RawMessage, len(call.Args))
		for name, raw := range call.Args {
			c.args[name] = compactJSON(raw)
		}
	}
	reachable, phase := d.reachable(), d.live.phase
	t.mu.Unlock()
	switch err := value.CheckArgs(spec, call.Args); {
	case err != nil:
		return refuse(http.StatusUnprocessableEntity, "%v", err)
	case waiting >= maxWaiting:
		return refuse(http.StatusTooManyRequests, "%d commands wait for this device already", waiting)
	case !c.queue && !reachable:
		return refuse(http.StatusServiceUnavailable, "the device is not there: %s", phase)
	}
	ttl := c.timeout
	if c.queue {
		if ttl = defaultQueueTTL; spec.TTL.Duration > 0 {
			ttl = min(spec.TTL.Duration, maxQueueTTL)
		}
	}
	c.expires, c.wall = time.Now().Add(ttl), wall.Add(ttl).UnixMilli()

	var fx effects
	t.mu.Lock()
	if d.gone {
		t.mu.Unlock()
		return refuse(http.StatusNotFound, "there is no device %s on this node", dev)
	}
	d.pruneCommands(time.Now())
	d.cmds = append(d.cmds, c)
	record := t.encodeCommandsLocked(d)
	t.mu.Unlock()
	if c.queue {
		// What is accepted to be done later is on the disk before that is said.
		if err := t.cfg.DB.Commit(ctx, Mut{bucketCommand, dev.String(), record}); err != nil {
			t.mu.Lock()
			d.cmds = slices.DeleteFunc(d.cmds, func(o *command) bool { return o == c })
			t.mu.Unlock()
			return refuse(http.StatusServiceUnavailable, "the node's disk takes nothing: %v", err)
		}
	}
	t.mu.Lock()
	t.wakeLocked(d, c.expires)
	t.kickCommandsLocked(d)
	fx.commands = append(fx.commands, commandChange{d.key, c.CommandStatus})
	t.mu.Unlock()
	t.flush(&fx)
	return c, d, CommandStatus{}
}

func timeoutOf(asked time.Duration, spec *v1alpha1.Command) time.Duration {
	d := asked
	if d == 0 {
		d = spec.Timeout.Duration
	}
	if d == 0 {
		d = defaultTimeout
	}
	return min(max(d, time.Second), maxTimeout)
}

// kickCommandsLocked has the device's next command sent, if it can be. There is
// one at a time, in order.
func (t *Twins) kickCommandsLocked(d *device) {
	if d.gone || d.commanding || !d.reachable() {
		return
	}
	now := time.Now()
	for _, c := range d.cmds {
		if c.State != CommandQueued {
			continue
		}
		if now.Before(c.retryAt) {
			t.wakeLocked(d, c.retryAt)
			return
		}
		d.commanding = true
		t.urgent = append(t.urgent, job{d: d, cmd: c})
		poke(t.kickJobs)
		return
	}
}

// deliver sends one command and sees to how it ends.
func (t *Twins) deliver(ctx context.Context, d *device, c *command) {
	defer func() {
		t.mu.Lock()
		d.commanding = false
		t.kickCommandsLocked(d)
		t.mu.Unlock()
	}()
	if !t.noteSent(ctx, d, c) {
		return
	}
	deadline, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	var result json.RawMessage
	var err error
	for try := 1; ; try++ {
		var seen *reflectWait
		if seen, err = t.awaitReflection(d, c); err != nil {
			break
		}
		limit := c.timeout
		if c.again {
			limit = c.timeout / maxTries
		}
		one, end := context.WithTimeout(deadline, limit)
		result, err = t.driver.Command(one, CommandRequest{Device: d.key, Name: c.Name, ID: c.ID, Args: c.args, Timeout: limit})
		if err == nil && seen != nil {
			select {
			case <-seen.seen:
			case <-one.Done():
				err = one.Err()
			}
		}
		end()
		if err == nil || !c.again || try == maxTries || deadline.Err() != nil ||
			errors.Is(err, ErrRejected) || errors.Is(err, ErrNotConnected) {
			break
		}
	}
	if ctx.Err() != nil {
		return // the node is going; the disk says that it was sent
	}
	var fx effects
	t.mu.Lock()
	switch {
	case c.Done():
	case err == nil:
		t.endLocked(d, c, CommandSucceeded, http.StatusOK, "", result, &fx)
	case errors.Is(err, ErrRejected):
		t.endLocked(d, c, CommandFailed, http.StatusBadGateway, clip(err.Error(), 256), nil, &fx)
	case errors.Is(err, ErrNotConnected) && c.queue:
		c.State, c.retryAt = CommandQueued, time.Now().Add(5*reachIn)
		t.notifyLocked()
		fx.commands = append(fx.commands, commandChange{d.key, c.CommandStatus})
	case errors.Is(err, ErrNotConnected):
		t.endLocked(d, c, CommandFailed, http.StatusServiceUnavailable, "it was not sent: "+clip(err.Error(), 256), nil, &fx)
	case errors.Is(err, context.DeadlineExceeded):
		t.endLocked(d, c, CommandTimeout, http.StatusGatewayTimeout, "the device did not answer; whether it did it is not known", nil, &fx)
	default:
		t.endLocked(d, c, CommandFailed, http.StatusBadGateway, clip(err.Error(), 256), nil, &fx)
	}
	t.mu.Unlock()
	t.flush(&fx)
	k := d.key
	t.cfg.DB.Dirty(bucketCommand, k.String(), func() []byte {
		t.mu.Lock()
		defer t.mu.Unlock()
		if d := t.devices[k]; d != nil {
			return t.encodeCommandsLocked(d)
		}
		return nil
	})
}

// noteSent puts on the disk that c is about to be sent.
func (t *Twins) noteSent(ctx context.Context, d *device, c *command) bool {
	unlock, err := t.serial.lock(ctx, d.key)
	if err != nil {
		return false
	}
	defer unlock()
	wall, _ := t.cfg.Now()
	t.mu.Lock()
	if d.gone || c.State != CommandQueued {
		t.mu.Unlock()
		return false
	}
	c.State, c.Updated = CommandSent, wall
	record := t.encodeCommandsLocked(d)
	t.mu.Unlock()
	err = t.cfg.DB.Commit(ctx, Mut{bucketCommand, d.key.String(), record})
	var fx effects
	t.mu.Lock()
	switch {
	case c.Done(): // the device was deleted meanwhile
		err = errors.New("ended")
	case err == nil:
		fx.commands = append(fx.commands, commandChange{d.key, c.CommandStatus})
	case c.queue:
		c.State, c.retryAt = CommandQueued, time.Now().Add(5*reachIn)
	default:
		t.endLocked(d, c, CommandFailed, http.StatusServiceUnavailable, "it was not sent: the node's disk takes nothing: "+clip(err.Error(), 256), nil, &fx)
	}
	t.mu.Unlock()
	t.flush(&fx)
	return err == nil
}

// awaitReflection has the value watched that shows c to have been done; nil:
// the model names none.
func (t *Twins) awaitReflection(d *device, c *command) (*reflectWait, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	i := slices.IndexFunc(d.model.spec.Commands, func(s v1alpha1.Command) bool { return s.Name == c.Name })
	if i < 0 {
		return nil, fmt.Errorf("the model has no command %.64q any more", c.Name)
	}
	reflect := d.model.spec.Commands[i].Reflect
	if reflect == "" {
		return nil, nil
	}
	name, text, ok := strings.Cut(reflect, "==")
	name, text = strings.TrimSpace(name), strings.TrimSpace(text)
	j, known := d.model.index[name]
	if !ok || !known {
		return nil, fmt.Errorf("the model's reflect %.64q is not property==value", reflect)
	}
	v, err := d.model.props[j].typ.Parse([]byte(text))
	if err != nil {
		if v, err = d.model.props[j].typ.Parse(value.JSON(text)); err != nil {
			return nil, fmt.Errorf("the model's reflect %.64q: %w", reflect, err)
		}
	}
	c.reflect = &reflectWait{prop: j, v: v, seen: make(chan struct{})}
	return c.reflect, nil
}

func (t *Twins) endLocked(d *device, c *command, state string, code int, message string, result json.RawMessage, fx *effects) {
	wall, _ := t.cfg.Now()
	c.State, c.Code, c.Message, c.Updated, c.ended, c.reflect = state, code, message, wall, time.Now(), nil
	if len(result) <= maxArgs {
		c.Result = result
	} else {
		c.Message = fmt.Sprintf("the answer of %d bytes is not kept", len(result))
	}
	close(c.done)
	t.notifyLocked()
	fx.commands = append(fx.commands, commandChange{d.key, c.CommandStatus})
	t.wakeLocked(d, c.ended.Add(keepFor))
}

// commandsTimeLocked ends what waited too long and forgets what ended long ago.
func (t *Twins) commandsTimeLocked(d *device, now time.Time, fx *effects) {
	for _, c := range d.cmds {
		if c.State == CommandQueued {
			if c.expires.After(now) {
				t.wakeLocked(d, c.expires)
			} else if c.queue {
				t.endLocked(d, c, CommandExpired, http.StatusGatewayTimeout, "the device did not come in time; it was not told", nil, fx)
			} else {
				t.endLocked(d, c, CommandFailed, http.StatusServiceUnavailable, "it was not sent in time", nil, fx)
			}
		}
	}
	d.pruneCommands(now)
	if len(d.cmds) > 0 {
		t.wakeLocked(d, now.Add(keepFor))
	}
	t.kickCommandsLocked(d)
}

func (d *device) pruneCommands(now time.Time) {
	d.cmds = slices.DeleteFunc(d.cmds, func(c *command) bool { return c.Done() && now.Sub(c.ended) >= keepFor })
	for len(d.cmds) >= maxKept {
		i := slices.IndexFunc(d.cmds, (*command).isDone)
		if i < 0 {
			return
		}
		d.cmds = slices.Delete(d.cmds, i, i+1)
	}
}

func (c *command) isDone() bool { return c.Done() }

func (t *Twins) encodeCommandsLocked(d *device) []byte {
	if len(d.cmds) == 0 {
		return nil
	}
	rec := commandRecord{UID: d.uid}
	for _, c := range d.cmds {
		rec.Commands = append(rec.Commands, commandStored{CommandStatus: c.CommandStatus, Args: c.args, Timeout: c.timeout, Expires: c.wall})
	}
	return mustJSON(rec)
}

// adoptCommandsLocked takes up what was under way when the power went.
func (t *Twins) adoptCommandsLocked(d *device, rec *commandRecord) {
	wall, _ := t.cfg.Now()
	now := time.Now()
	for _, s := range rec.Commands[:min(len(rec.Commands), maxKept)] {
		c := &command{CommandStatus: s.CommandStatus, args: s.Args, timeout: s.Timeout, wall: s.Expires, done: make(chan struct{})}
		i := slices.IndexFunc(d.model.spec.Commands, func(m v1alpha1.Command) bool { return m.Name == c.Name })
		if i >= 0 {
			c.queue = d.model.spec.Commands[i].Delivery == "queue"
			c.again = d.model.spec.Commands[i].Idempotent
		}
		c.timeout = min(max(c.timeout, time.Second), maxTimeout)
		c.expires = now.Add(min(time.Duration(s.Expires-wall.UnixMilli())*time.Millisecond, maxQueueTTL))
		end := func(state string, code int, message string) {
			c.State, c.Code, c.Message, c.Updated = state, code, message, wall
		}
		switch {
		case c.Done():
		case c.State == CommandSent && !c.again:
			end(CommandTimeout, http.StatusGatewayTimeout, "the node was restarted after it had been sent; whether the device did it is not known")
		case !c.queue && c.State == CommandQueued:
			end(CommandFailed, http.StatusServiceUnavailable, "the node was restarted before it was sent")
		case !c.expires.After(now):
			end(CommandExpired, http.StatusGatewayTimeout, "the device did not come in time")
		default:
			c.State = CommandQueued // again, if it had been sent
		}
		if c.Done() {
			c.ended = now
			close(c.done)
		}
		d.cmds = append(d.cmds, c)
	}
	if len(d.cmds) > 0 {
		t.wakeLocked(d, now.Add(time.Second))
	}
}
