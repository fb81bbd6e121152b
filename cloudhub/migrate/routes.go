package migrate

import (
	"fmt"
	"maps"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
)

// push has a property's readings go where its mapper pushed them.
func (c *deviceConverter) push(at string, src *deviceProperty, p *v1alpha1.Property) {
	m := src.PushMethod
	if m == nil {
		return
	}
	var sinks []v1alpha1.RouteSink
	if h := m.HTTP; h != nil {
		host := h.HostName
		scheme, rest, ok := strings.Cut(host, "://")
		if ok {
			host = rest
		} else {
			scheme = "http"
		}
		host = strings.Trim(host, "/[]")
		if h.Port != 0 {
			host = net.JoinHostPort(host, strconv.FormatInt(h.Port, 10))
		}
		to := scheme + "://" + host + "/" + strings.TrimPrefix(h.RequestPath, "/")
		if u, err := url.Parse(to); err != nil || u.Hostname() == "" || scheme != "http" && scheme != "https" {
			c.r.lost(at+".http", fmt.Sprintf("%q is no URL", to), "")
		} else {
			sinks = append(sinks, v1alpha1.RouteSink{Webhook: &v1alpha1.WebhookSink{URL: to}})
			c.r.check(at+".http", "a webhook gets batches of JSON lines in Skerry's form, and each at least once", "have the receiver read them")
		}
		if h.Timeout != 0 {
			c.r.lost(at+".http.timeout", "a route tries until it is done", "")
		}
	}
	if q := m.MQTT; q != nil {
		scheme, rest, _ := strings.Cut(q.Address, "://")
		to := map[string]string{"tcp": "mqtt", "mqtt": "mqtt", "ssl": "mqtts", "tls": "mqtts", "mqtts": "mqtts"}[scheme]
		switch {
		case to == "" || rest == "":
			c.r.lost(at+".mqtt.address", fmt.Sprintf("%q is no address of a broker by TCP or TLS", q.Address), "")
		case q.Topic == "" || strings.ContainsAny(q.Topic, "+#"):
			c.r.lost(at+".mqtt.topic", fmt.Sprintf("%q is no topic to publish to", q.Topic), "")
		default:
			topic := q.Topic
			if levels := strings.Split(topic, "/"); slices.Contains(levels, c.out.Name) {
				for i, l := range levels {
					if l == c.out.Name {
						levels[i] = "${device}"
					}
				}
				topic = strings.Join(levels, "/")
			}
			qos := max(q.QoS, 0)
			if q.QoS == 0 {
				qos = 1 // a route is done with a record when the broker has it
			}
			sinks = append(sinks, v1alpha1.RouteSink{MQTT: &v1alpha1.MQTTSink{URL: to + "://" + rest, Topic: topic, QoS: &qos}})
			c.r.check(at+".mqtt", "a route publishes Skerry's records, each at least once", "have the receiver read them")
		}
		if q.Retained {
			c.r.lost(at+".mqtt.retained", "what a route publishes is not retained", "the present value is in the twin")
		}
	}
	if o := m.OTEL; o != nil {
		c.r.lost(at+".otel", "routes do not speak OTLP", "send to a collector with a TelemetryRoute: to.remoteWrite for its prometheusremotewrite receiver, or to.webhook")
	}
	for _, db := range slices.Sorted(maps.Keys(m.DBMethod)) {
		c.r.lost(at+".dbMethod."+db, "routes do not write into this database", "send by a TelemetryRoute with to.remoteWrite or to.webhook to what does, such as Telegraf")
	}
	if len(sinks) > 0 {
		p.Telemetry = p.Name
		c.v.routes[p.Name] = sinks
	}
}
