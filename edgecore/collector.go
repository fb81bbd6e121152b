package main

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/skerry-io/skerry/metrics"
)

// edgeCollector reads edgecore's own figures when they are asked for.
type edgeCollector struct{ status func() Status }

var (
	descConnected = desc("connected", "1 while the tunnel to the hub is up.")
	descDeleted   = desc("node_deleted", "1 while this machine runs on although its Node object was deleted in the cloud.")
	descLastSync  = desc("last_sync_timestamp_seconds", "When the store was last known to be in step with the cloud.")
	descOutbox    = desc("outbox_entries", "Changes made here that the cloud has not confirmed.")
	descDropped   = desc("outbox_dropped_events_total", "Events dropped because the outbox was full.")
	descWritten   = desc("store_written_bytes_total", "Bytes the store wrote to disk.")
	descSent      = desc("tunnel_sent_bytes_total", "Bytes sent on the present tunnel.")
	descReceived  = desc("tunnel_received_bytes_total", "Bytes received on the present tunnel.")
	descStreams   = desc("tunnel_streams", "Streams open on the present tunnel: its sync, and the hub's connections to the kubelet.")
	descObjects   = prometheus.NewDesc(prometheus.BuildFQName(metrics.Namespace, "edge", "store_objects"),
		"Objects from the cloud in the store.", []string{"resource"}, nil)
)

func desc(name, help string) *prometheus.Desc {
	return prometheus.NewDesc(prometheus.BuildFQName(metrics.Namespace, "edge", name), help, nil, nil)
}

func (c edgeCollector) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(c, ch) }

func (c edgeCollector) Collect(ch chan<- prometheus.Metric) {
	st := c.status()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v uint64) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v))
	}
	up := 0.0
	if st.Connected {
		up = 1
	}
	gauge(descConnected, up)
	deleted := 0.0
	if !st.NodeDeleted.IsZero() {
		deleted = 1
	}
	gauge(descDeleted, deleted)
	if !st.LastSync.IsZero() {
		gauge(descLastSync, float64(st.LastSync.UnixMilli())/1e3)
	}
	gauge(descOutbox, float64(st.Outbox))
	counter(descDropped, st.EventsDropped)
	counter(descWritten, st.StoreWritten)
	gauge(descSent, float64(st.TunnelSent))
	gauge(descReceived, float64(st.TunnelRecv))
	gauge(descStreams, float64(st.TunnelStreams))
	for resource, n := range st.Objects {
		gauge(descObjects, float64(n), resource)
	}
}
