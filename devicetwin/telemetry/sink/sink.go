// Package sink brings telemetry to where it is kept for good: an MQTT broker, a
// webhook, a receiver of Prometheus remote write. Nodes use it, and the hub for
// routes that end there.
//
// It owns what a peer's answer means: taken, refused for good, or to be tried
// again. It keeps nothing: who calls Send has the records until it returned nil.
// It does not log, and no secret is in its errors.
package sink

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"time"
	"unicode/utf8"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// Sink is one end of a route. Send and Close are called from one goroutine.
type Sink interface {
	// Send returns nil once the records are taken, in order. A *Refused tells
	// that some were refused for good and the others taken; after any other
	// error all of them are to be sent again, after a wait that a *Later may
	// name. Records may be taken twice; they are told apart by their IDs.
	Send(ctx context.Context, records []edgeapi.TelemetryRecord) error
	Close()
}

// Refused tells that no retry will have these records taken.
type Refused struct {
	Count int
	Why   string
}

func (r *Refused) Error() string { return fmt.Sprintf("%d records refused: %s", r.Count, r.Why) }

// Later tells that the peer wants to be left alone.
type Later struct {
	After time.Duration
	Err   error
}

func (l *Later) Error() string { return l.Err.Error() }
func (l *Later) Unwrap() error { return l.Err }

// Config of a Sink.
type Config struct {
	Spec    v1alpha1.RouteSink // MQTT, Webhook or RemoteWrite
	Route   edgeapi.DeviceRef
	Node    string            // whose records they are
	Secret  map[string][]byte // that the Spec names; nil: it names none
	Timeout time.Duration     // for one answer of the peer; zero means 30s
}

// New checks cfg; it dials nothing.
func New(cfg Config) (Sink, error) {
	cfg.Timeout = cmp.Or(cfg.Timeout, 30*time.Second)
	switch {
	case cfg.Spec.MQTT != nil:
		return newMQTT(cfg)
	case cfg.Spec.Webhook != nil:
		return newWebhook(cfg)
	case cfg.Spec.RemoteWrite != nil:
		return newRemoteWrite(cfg)
	}
	return nil, errors.New("a sink is one of mqtt, webhook and remoteWrite; none is set")
}

// SecretName is the Secret that a sink needs; "" for none.
func SecretName(s v1alpha1.RouteSink) string {
	var ref *v1alpha1.SecretRef
	switch {
	case s.Hub != nil:
		return SecretName(v1alpha1.RouteSink{MQTT: s.Hub.MQTT, Webhook: s.Hub.Webhook, RemoteWrite: s.Hub.RemoteWrite})
	case s.MQTT != nil:
		ref = s.MQTT.SecretRef
	case s.Webhook != nil:
		ref = s.Webhook.SecretRef
	case s.RemoteWrite != nil:
		ref = s.RemoteWrite.SecretRef
	}
	if ref == nil {
		return ""
	}
	return ref.Name
}

// tlsConfig verifies the peer, by ca.crt if the secret has one, and shows
// tls.crt.
func tlsConfig(secret map[string][]byte) (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	if ca := secret["ca.crt"]; len(ca) > 0 {
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(ca) {
			return nil, errors.New("ca.crt of the secret holds no certificate")
		}
	}
	cert, key := secret["tls.crt"], secret["tls.key"]
	if len(cert) == 0 && len(key) == 0 {
		return c, nil
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, errors.New("tls.crt and tls.key of the secret are no certificate and its key")
	}
	c.Certificates = []tls.Certificate{pair}
	return c, nil
}

// line is a record as webhooks and MQTT subscribers see it.
type line struct {
	ID        string          `json:"id"`
	Node      string          `json:"node"`
	Route     string          `json:"route"` // namespace/name
	Namespace string          `json:"namespace,omitempty"`
	Device    string          `json:"device,omitempty"`
	Property  string          `json:"property,omitempty"`
	Value     json.RawMessage `json:"value,omitempty"`
	Topic     string          `json:"topic,omitempty"`
	// A payload is one of these: JSON, text, anything.
	Payload  json.RawMessage `json:"payload,omitempty"`
	Text     *string         `json:"text,omitempty"`
	Base64   []byte          `json:"base64,omitempty"`
	TS       int64           `json:"ts"` // Unix milliseconds
	Received int64           `json:"received,omitempty"`
	Quality  string          `json:"quality,omitempty"`
	Backfill bool            `json:"backfill,omitempty"`

	Gap *edgeapi.TelemetryGap `json:"gap,omitempty"`
}

func (c Config) line(r edgeapi.TelemetryRecord) ([]byte, error) {
	l := line{
		ID: r.ID, Node: c.Node, Route: c.Route.Namespace + "/" + c.Route.Name,
		Property: r.Property, Value: r.Value, Topic: r.Topic,
		TS: r.TS, Received: r.Received, Quality: cmp.Or(r.Quality, v1alpha1.QualityGood), Backfill: r.Backfill, Gap: r.Gap,
	}
	if r.Device != nil {
		l.Namespace, l.Device = r.Device.Namespace, r.Device.Name
	}
	if r.Topic != "" {
		switch {
		case json.Valid(r.Payload):
			l.Payload = r.Payload
		case utf8.Valid(r.Payload):
			s := string(r.Payload)
			l.Text = &s
		default:
			l.Base64 = r.Payload
		}
	}
	if r.Gap != nil {
		l.Quality = ""
	}
	b, err := json.Marshal(l)
	if err != nil {
		return nil, fmt.Errorf("record %s: %w", r.ID, err)
	}
	return b, nil
}
