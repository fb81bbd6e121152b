package sink

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// mqttWindow is how many messages are unacknowledged at most; more than
// mosquitto keeps in flight would only wait there.
const mqttWindow = 20

// mqttSink publishes each record. The library's own store and reconnecting are
// not used: they complete tokens of messages that were never delivered. Each
// connection is a client of its own, and what was not acknowledged on it is sent
// again on the next one.
type mqttSink struct {
	cfg  Config
	url  *url.URL
	opts *paho.ClientOptions
	qos  byte
	link *mqttLink // nil: not connected
}

type mqttLink struct {
	client paho.Client
	lost   chan struct{} // closed when the connection was
}

func newMQTT(cfg Config) (*mqttSink, error) {
	spec := cfg.Spec.MQTT
	u, err := url.Parse(spec.URL)
	if err != nil || u.Hostname() == "" || u.Scheme != "mqtt" && u.Scheme != "mqtts" {
		return nil, errors.New("mqtt: url: want mqtt:// or mqtts:// and a host")
	}
	s := &mqttSink{cfg: cfg, url: u, qos: 1}
	if q := spec.QoS; q != nil {
		if *q < 0 || *q > 2 {
			return nil, fmt.Errorf("mqtt: qos %d; want 0, 1 or 2", *q)
		}
		s.qos = byte(*q)
	}
	if t := s.topic(edgeapi.TelemetryRecord{}); t == "" || strings.ContainsAny(t, "+#\x00") {
		return nil, fmt.Errorf("mqtt: topic %.100q cannot be published to", spec.Topic)
	}
	scheme, port := "tcp", "1883"
	s.opts = paho.NewClientOptions()
	if u.Scheme == "mqtts" {
		scheme, port = "ssl", "8883"
		tc, err := tlsConfig(cfg.Secret)
		if err != nil {
			return nil, fmt.Errorf("mqtt: %w", err)
		}
		s.opts.SetTLSConfig(tc)
	}
	if u.Port() != "" {
		port = u.Port()
	}
	s.opts.AddBroker(scheme + "://" + joinHost(u.Hostname(), port))
	// The same at each connect, so that the broker ends a half-dead one.
	id := sha256.Sum256([]byte(cfg.Node + "\x00" + cfg.Route.Namespace + "\x00" + cfg.Route.Name + "\x00" + spec.URL + "\x00" + spec.Topic))
	s.opts.SetClientID("skerry-" + hex.EncodeToString(id[:8])) // 23 characters, which 3.1.1 lets everyone use
	s.opts.SetUsername(string(cfg.Secret["username"]))
	s.opts.SetPassword(string(cfg.Secret["password"]))
	s.opts.SetCleanSession(true)
	s.opts.SetAutoReconnect(false)
	s.opts.SetConnectRetry(false)
	s.opts.SetConnectTimeout(10 * time.Second)
	// Also how long the library waits, now and then, to hand a message to a
	// connection that has just ended.
	s.opts.SetWriteTimeout(min(cfg.Timeout, 10*time.Second))
	s.opts.SetKeepAlive(30 * time.Second)
	return s, nil
}

func joinHost(host, port string) string {
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	return host + ":" + port
}

func (s *mqttSink) Close() {
	if s.link != nil {
		s.link.client.Disconnect(0)
		s.link = nil
	}
}

func (s *mqttSink) connect(ctx context.Context) (*mqttLink, error) {
	if s.link != nil && s.link.up() {
		return s.link, nil
	}
	s.Close()
	l := &mqttLink{lost: make(chan struct{})}
	opts := *s.opts
	var once sync.Once
	opts.SetConnectionLostHandler(func(paho.Client, error) { once.Do(func() { close(l.lost) }) })
	l.client = paho.NewClient(&opts)
	if err := s.wait(ctx, l, l.client.Connect()); err != nil {
		l.client.Disconnect(0)
		return nil, fmt.Errorf("connect to %s://%s: %w", s.url.Scheme, s.url.Host, err)
	}
	s.link = l
	return l, nil
}

// Send publishes the records, at most mqttWindow of them unacknowledged.
func (s *mqttSink) Send(ctx context.Context, records []edgeapi.TelemetryRecord) error {
	l, err := s.connect(ctx)
	if err != nil {
		return err
	}
	if err := s.publish(ctx, l, records); err != nil {
		s.Close()
		return fmt.Errorf("publish to %s://%s: %w", s.url.Scheme, s.url.Host, err)
	}
	return nil
}

func (s *mqttSink) publish(ctx context.Context, l *mqttLink, records []edgeapi.TelemetryRecord) error {
	var flying []paho.Token
	for _, r := range records {
		payload, err := s.cfg.line(r)
		if err != nil {
			return err
		}
		if len(flying) == mqttWindow {
			if err := s.wait(ctx, l, flying[0]); err != nil {
				return err
			}
			flying = flying[1:]
		}
		flying = append(flying, l.client.Publish(s.topic(r), s.qos, false, payload))
	}
	for _, t := range flying {
		if err := s.wait(ctx, l, t); err != nil {
			return err
		}
	}
	// A token may be completed by the end of its connection.
	if !l.up() {
		return errEnded
	}
	return nil
}

var errEnded = errors.New("the connection ended")

func (l *mqttLink) up() bool {
	select {
	case <-l.lost:
		return false
	default:
		return l.client.IsConnectionOpen()
	}
}

func (s *mqttSink) wait(ctx context.Context, l *mqttLink, t paho.Token) error {
	limit := time.NewTimer(s.cfg.Timeout)
	defer limit.Stop()
	select {
	case <-t.Done():
		return t.Error()
	case <-l.lost: // not every token is completed then
		return errEnded
	case <-ctx.Done():
		return ctx.Err()
	case <-limit.C:
		return fmt.Errorf("no answer within %v", s.cfg.Timeout)
	}
}

// topic fills in the route's topic. What is filled in has no levels of its own,
// but for ${topic}.
func (s *mqttSink) topic(r edgeapi.TelemetryRecord) string {
	level := strings.NewReplacer("/", "_", "+", "_", "#", "_", "\x00", "_").Replace
	ns, dev := s.cfg.Route.Namespace, ""
	if r.Device != nil {
		ns, dev = r.Device.Namespace, r.Device.Name
	}
	return strings.NewReplacer(
		"${node}", level(s.cfg.Node), "${namespace}", level(ns), "${device}", level(dev),
		"${property}", level(r.Property), "${route}", level(s.cfg.Route.Name), "${topic}", r.Topic,
	).Replace(s.cfg.Spec.MQTT.Topic)
}
