package devices

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/telemetry/sink"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

const (
	// maxLanes is how many ends of routes a node may send to at a time.
	maxLanes = 64

	// laneIdle closes the connection to an end that gets nothing.
	laneIdle = 5 * time.Minute

	// sinkTimeout bounds one batch. The node waits two minutes for its ack.
	sinkTimeout = 90 * time.Second
)

// Telemetry passes what nodes collected for routes with a hub sink to where
// these end. A batch is acknowledged once its end has taken it, so that the hub
// keeps nothing: until then the records are in the node's log, and a hub that
// stops loses none.
type Telemetry struct {
	devices *Devices
	secrets cache.SharedIndexInformer
	log     *slog.Logger

	batches, records, refused, failed atomic.Uint64
}

// NewTelemetry passes telemetry on by the routes that d knows; secrets is the
// informer of *corev1.Secret.
func NewTelemetry(d *Devices, secrets cache.SharedIndexInformer) *Telemetry {
	return &Telemetry{devices: d, secrets: secrets, log: d.log}
}

// lane is one end of one route, for one node.
type lane struct {
	route   edgeapi.DeviceRef
	sink    int
	batches chan edgeapi.TelemetryBatch
}

// Serve takes one node's telemetry until its stream or ctx ends, and closes the
// stream.
func (t *Telemetry) Serve(ctx context.Context, node string, stream net.Conn) error {
	defer stream.Close()
	defer context.AfterFunc(ctx, func() { stream.Close() })()
	conn := edgeapi.NewConn(stream)
	if err := stream.SetReadDeadline(time.Now().Add(greetTimeout)); err != nil {
		return err
	}
	m, err := conn.Receive()
	if err != nil {
		return fmt.Errorf("receive hello: %w", err)
	}
	hello, ok := m.(edgeapi.TelemetryHello)
	if !ok || hello.Version != edgeapi.TelemetryVersion {
		return fmt.Errorf("first message is %T, want TelemetryHello of version %d", m, edgeapi.TelemetryVersion)
	}
	if err := stream.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	if err := conn.Send(edgeapi.TelemetryWelcome{Version: edgeapi.TelemetryVersion, Now: time.Now()}); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	defer context.AfterFunc(ctx, func() { stream.Close() })()
	g.Go(func() error { return t.read(ctx, g, node, conn) })
	if err := g.Wait(); !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

func (t *Telemetry) read(ctx context.Context, g *errgroup.Group, node string, conn *edgeapi.Conn) error {
	type end struct {
		route edgeapi.DeviceRef
		sink  int
	}
	lanes := map[end]*lane{}
	for {
		m, err := conn.Receive()
		if err != nil {
			return err
		}
		b, ok := m.(edgeapi.TelemetryBatch)
		if !ok {
			return fmt.Errorf("unexpected %T from node %s", m, node)
		}
		if len(b.Records) > edgeapi.TelemetryMaxRecords {
			return fmt.Errorf("a batch of %d records from node %s, at most %d", len(b.Records), node, edgeapi.TelemetryMaxRecords)
		}
		t.batches.Add(1)
		l := lanes[end{b.Route, b.Sink}]
		if l == nil {
			if len(lanes) >= maxLanes {
				if err := conn.Send(edgeapi.TelemetryAck{Seq: b.Seq, Code: http.StatusTooManyRequests, Message: fmt.Sprintf("%d ends are in use", maxLanes), RetryAfter: 10_000}); err != nil {
					return err
				}
				continue
			}
			// The window is the conversation's, so no lane holds more.
			l = &lane{route: b.Route, sink: b.Sink, batches: make(chan edgeapi.TelemetryBatch, edgeapi.TelemetryWindow)}
			lanes[end{b.Route, b.Sink}] = l
			g.Go(func() error { return t.carry(ctx, node, l, conn) })
		}
		select {
		case l.batches <- b:
		default:
			return fmt.Errorf("node %s sent more than %d batches without an acknowledgement", node, edgeapi.TelemetryWindow)
		}
	}
}

// carry sends the batches of a lane on, one after the other.
func (t *Telemetry) carry(ctx context.Context, node string, l *lane, conn *edgeapi.Conn) error {
	var out sink.Sink
	var made string // what out was made of
	drop := func() {
		if out != nil {
			out.Close()
			out, made = nil, ""
		}
	}
	defer drop()
	idle := time.NewTimer(laneIdle)
	defer idle.Stop()
	for {
		idle.Reset(laneIdle)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-idle.C:
			drop()
		case b := <-l.batches:
			cfg, is, refusal := t.endOf(node, l)
			if refusal != nil {
				refusal.Seq = b.Seq
				if err := conn.Send(*refusal); err != nil {
					return err
				}
				continue
			}
			if out != nil && made != is { // the route or its Secret was changed
				drop()
			}
			ack := edgeapi.TelemetryAck{Seq: b.Seq, Code: http.StatusOK}
			if bad := foreign(b); bad != "" {
				ack.Code, ack.Message = http.StatusForbidden, bad
			} else {
				var err error
				if out == nil {
					out, err = sink.New(cfg)
					made = is
				}
				if err == nil {
					sending, cancel := context.WithTimeout(ctx, sinkTimeout)
					err = out.Send(sending, b.Records)
					cancel()
				}
				if ctx.Err() != nil {
					return ctx.Err()
				}
				t.judge(&ack, len(b.Records), err)
			}
			if err := conn.Send(ack); err != nil {
				return err
			}
		}
	}
}

// endOf finds where a lane ends. A node reaches the routes of the namespaces in
// which it has devices, as the feed has it, and of these what is behind the hub.
func (t *Telemetry) endOf(node string, l *lane) (cfg sink.Config, made string, refusal *edgeapi.TelemetryAck) {
	no := func(code int, format string, args ...any) (sink.Config, string, *edgeapi.TelemetryAck) {
		t.failed.Add(1)
		return sink.Config{}, "", &edgeapi.TelemetryAck{Code: code, Message: fmt.Sprintf(format, args...), RetryAfter: 10_000}
	}
	name := key(l.route)
	if !t.devices.hasDevicesIn(node, l.route.Namespace) {
		// It may be a moment early, or late: its records wait.
		return no(http.StatusServiceUnavailable, "node %s has no device in namespace %s", node, l.route.Namespace)
	}
	obj, ok, err := t.devices.cfg.Routes.GetIndexer().GetByKey(name)
	if err != nil || !ok {
		return no(http.StatusNotFound, "there is no TelemetryRoute %s", name)
	}
	route := obj.(*v1alpha1.TelemetryRoute)
	if l.sink < 0 || l.sink >= len(route.Spec.To) || route.Spec.To[l.sink].Hub == nil {
		return no(http.StatusConflict, "TelemetryRoute %s has no hub sink at %d", name, l.sink)
	}
	h := route.Spec.To[l.sink].Hub
	cfg = sink.Config{Spec: v1alpha1.RouteSink{MQTT: h.MQTT, Webhook: h.Webhook, RemoteWrite: h.RemoteWrite}, Route: l.route, Node: node}
	made = string(route.UID) + "/" + fmt.Sprint(route.Generation)
	if secret := sink.SecretName(cfg.Spec); secret != "" {
		obj, ok, err := t.secrets.GetIndexer().GetByKey(l.route.Namespace + "/" + secret)
		if err != nil || !ok {
			return no(http.StatusServiceUnavailable, "there is no Secret %s/%s, which TelemetryRoute %s names", l.route.Namespace, secret, name)
		}
		s := obj.(*corev1.Secret)
		cfg.Secret = s.Data
		made += "/" + string(s.UID) + "/" + s.ResourceVersion
	}
	return cfg, made, nil
}

// foreign tells whether a record is of a device that cannot be its route's.
func foreign(b edgeapi.TelemetryBatch) string {
	for i := range b.Records {
		if d := b.Records[i].Device; d != nil && d.Namespace != b.Route.Namespace {
			return fmt.Sprintf("record %.80s is of namespace %.80s, the route of %s", b.Records[i].ID, d.Namespace, b.Route.Namespace)
		}
	}
	return ""
}

// judge makes an acknowledgement of what a sink said.
func (t *Telemetry) judge(ack *edgeapi.TelemetryAck, records int, err error) {
	var refused *sink.Refused
	var later *sink.Later
	switch {
	case err == nil:
		t.records.Add(uint64(records))
	case errors.As(err, &refused):
		t.refused.Add(uint64(refused.Count))
		t.records.Add(uint64(max(records-refused.Count, 0)))
		ack.Message = refused.Error()
		if refused.Count >= records {
			ack.Code = http.StatusUnprocessableEntity
		}
	case errors.As(err, &later):
		t.failed.Add(1)
		ack.Code, ack.Message, ack.RetryAfter = http.StatusServiceUnavailable, later.Error(), cmp.Or(later.After, time.Second).Milliseconds()
	default:
		t.failed.Add(1)
		ack.Code, ack.Message, ack.RetryAfter = http.StatusServiceUnavailable, err.Error(), 5000
	}
}

func (d *Devices) hasDevicesIn(nodeName, namespace string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.nodes[nodeName]
	if n == nil {
		return false
	}
	for ref := range n.twins {
		if ref.Namespace == namespace {
			return true
		}
	}
	return false
}

// TelemetryStats since the start.
type TelemetryStats struct{ Batches, Records, Refused, Failed uint64 }

// Stats returns counters since the start.
func (t *Telemetry) Stats() TelemetryStats {
	return TelemetryStats{t.batches.Load(), t.records.Load(), t.refused.Load(), t.failed.Load()}
}
