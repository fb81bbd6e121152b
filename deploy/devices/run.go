package devices

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"time"

	mqtt "github.com/eclipse/paho.mqtt.golang"
)

// Config is how a simulated device is run. What kind it is, Device says.
type Config struct {
	Device   Device        // required; made by NewThermostat or NewPlug
	Broker   string        // tcp://host:port; required
	Username string        // empty: none is sent
	Password string        // with Username
	State    string        // file for what outlives a power cut; empty: nothing does
	Tick     time.Duration // between two looks of the device at its sensors; default 1s
	// Press has somebody at the device: a plug's button, a thermostat's wheel.
	Press <-chan struct{}
	Log   *slog.Logger // nil discards
}

// Device is a kind of simulated device. Its methods are called by one
// goroutine at a time.
type Device interface {
	clientID() string
	will() message
	filters() []string
	// connected is what it says on each new connection.
	connected(now time.Time) []message
	// handle takes a message of one of filters.
	handle(now time.Time, topic string, payload []byte) []message
	// press is somebody at the device.
	press(now time.Time) []message
	// tick lets time pass.
	tick(now time.Time) []message
	// farewell is what it says before it ends in good order; nil has it cut off,
	// so that its will is published.
	farewell() []message

	// save and restore are what it keeps over a power cut.
	save() []byte
	restore([]byte) error
}

type message struct {
	topic    string
	payload  string
	qos      byte
	retained bool
}

const (
	connectTimeout = 10 * time.Second
	leastBackoff   = 500 * time.Millisecond
	mostBackoff    = 30 * time.Second
	inboxSize      = 256
)

// Run lets the device live until ctx ends. It connects again whenever the
// broker is gone.
func Run(ctx context.Context, cfg Config) error {
	if cfg.Device == nil {
		return errors.New("simulated device: no device")
	}
	server, err := url.Parse(cfg.Broker)
	if err != nil || server.Scheme != "tcp" || server.Port() == "" {
		return fmt.Errorf("broker %q: want tcp://host:port", cfg.Broker)
	}
	if cfg.Tick <= 0 {
		cfg.Tick = time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	r := &runner{Config: cfg, server: server}
	if err := r.load(); err != nil {
		return err
	}
	tick := time.NewTicker(cfg.Tick)
	defer tick.Stop()
	r.ticks = tick.C
	backoff := leastBackoff
	for {
		connected, err := r.serve(ctx)
		if ctx.Err() != nil {
			return r.store()
		}
		if connected {
			backoff = leastBackoff
		}
		r.Log.Warn("no connection to the broker", "broker", cfg.Broker, "error", err, "retry", backoff)
		if err := r.offline(ctx, backoff); err != nil {
			return err
		}
		backoff = min(2*backoff, mostBackoff)
	}
}

// runner is owned by the goroutine of Run.
type runner struct {
	Config
	server *url.URL
	ticks  <-chan time.Time
	stored []byte
}

// offline lets time pass without a broker; what the device says is heard by
// nobody.
func (r *runner) offline(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
			return nil
		case now := <-r.ticks:
			r.Device.tick(now)
		case <-r.Press:
			r.Device.press(time.Now())
		}
		if err := r.store(); err != nil {
			return err
		}
	}
}

// serve is one connection. A new client is made for each: a device that has
// lost its broker has no queue to send later.
func (r *runner) serve(ctx context.Context) (connected bool, err error) {
	var wire net.Conn // set while Connect runs, before it returns
	lost := make(chan error, 1)
	inbox := make(chan mqtt.Message, inboxSize)
	will := r.Device.will()
	opts := mqtt.NewClientOptions().
		AddBroker(r.Broker).
		SetClientID(r.Device.clientID()).
		SetUsername(r.Username).SetPassword(r.Password).
		SetProtocolVersion(4).
		SetCleanSession(true).
		SetAutoReconnect(false).
		SetConnectTimeout(connectTimeout).
		SetKeepAlive(15*time.Second).
		SetWill(will.topic, will.payload, will.qos, will.retained).
		SetCustomOpenConnectionFn(func(u *url.URL, _ mqtt.ClientOptions) (net.Conn, error) {
			c, err := (&net.Dialer{Timeout: connectTimeout}).DialContext(ctx, "tcp", u.Host)
			wire = c
			return c, err
		}).
		SetConnectionLostHandler(func(_ mqtt.Client, err error) { lost <- err }).
		SetDefaultPublishHandler(func(_ mqtt.Client, m mqtt.Message) {
			select {
			case inbox <- m:
			default: // a real one drops what it has no memory for
				r.Log.Warn("too many messages at once, one is dropped", "topic", m.Topic())
			}
		})
	client := mqtt.NewClient(opts)
	defer func() {
		if client.IsConnectionOpen() {
			client.Disconnect(250)
		}
	}()
	if err := wait(ctx, client.Connect()); err != nil {
		return false, err
	}
	for _, f := range r.Device.filters() {
		if err := wait(ctx, client.Subscribe(f, 1, nil)); err != nil {
			return false, fmt.Errorf("subscribe %s: %w", f, err)
		}
	}
	r.Log.Info("connected", "broker", r.Broker)
	say := func(messages []message) error {
		for _, m := range messages {
			if err := wait(ctx, client.Publish(m.topic, m.qos, m.retained, m.payload)); err != nil {
				return fmt.Errorf("publish %s: %w", m.topic, err)
			}
		}
		return r.store()
	}
	if err := say(r.Device.connected(time.Now())); err != nil {
		return true, err
	}
	for {
		var out []message
		select {
		case <-ctx.Done():
			return true, r.end(client, wire)
		case err := <-lost:
			return true, err
		case m := <-inbox:
			out = r.Device.handle(time.Now(), m.Topic(), m.Payload())
		case <-r.Press:
			out = r.Device.press(time.Now())
		case now := <-r.ticks:
			out = r.Device.tick(now)
		}
		if err := say(out); err != nil {
			return true, err
		}
	}
}

// end says goodbye, or cuts the connection as a pulled plug does.
func (r *runner) end(client mqtt.Client, wire net.Conn) error {
	bye := r.Device.farewell()
	if bye == nil {
		return wire.Close()
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	for _, m := range bye {
		if err := wait(ctx, client.Publish(m.topic, m.qos, m.retained, m.payload)); err != nil {
			return err
		}
	}
	client.Disconnect(250)
	return nil
}

func wait(ctx context.Context, t mqtt.Token) error {
	timer := time.NewTimer(connectTimeout)
	defer timer.Stop()
	select {
	case <-t.Done():
		return t.Error()
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return fmt.Errorf("no answer from the broker within %s", connectTimeout)
	}
}

func (r *runner) load() error {
	if r.State == "" {
		return nil
	}
	data, err := os.ReadFile(r.State)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := r.Device.restore(data); err != nil {
		return fmt.Errorf("state %s: %w; remove it to start anew", r.State, err)
	}
	r.stored = data
	return nil
}

// store writes what has changed.
func (r *runner) store() error {
	if r.State == "" {
		return nil
	}
	data := r.Device.save()
	if bytes.Equal(data, r.stored) {
		return nil
	}
	tmp := r.State + ".new"
	if err := os.MkdirAll(filepath.Dir(r.State), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return err
	}
	if err := os.Rename(tmp, r.State); err != nil {
		return err
	}
	r.stored = data
	return nil
}
