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
	descCertEnds  = desc("certificate_end_timestamp_seconds", "When the node's certificate ends; it is renewed when a third of its life is left.")
	descLastSync  = desc("last_sync_timestamp_seconds", "When the store was last known to be in step with the cloud.")
	descOutbox    = desc("outbox_entries", "Changes made here that the cloud has not confirmed.")
	descDropped   = desc("outbox_dropped_events_total", "Events dropped because the outbox was full.")
	descWritten   = desc("store_written_bytes_total", "Bytes the store wrote to disk.")
	descSent      = desc("tunnel_sent_bytes_total", "Bytes sent on the present tunnel.")
	descReceived  = desc("tunnel_received_bytes_total", "Bytes received on the present tunnel.")
	descStreams   = desc("tunnel_streams", "Streams open on the present tunnel: its sync, and the hub's connections to the kubelet.")
	descStates    = desc("outbox_dropped_states_total", "Last statuses and deletions of pods that are gone, dropped because the outbox was full.")
	descTrouble   = desc("store_unwritable", "1 while the disk takes no writes.")
	descMended    = desc("store_mended", "1 if the store was damaged and mended at the start of this process.")
	descBudget    = desc("store_budget_bytes_per_day", "Bytes that the store should write in 24 hours; 0 is no limit.")
	descDay       = desc("store_written_last_day_bytes", "Bytes the store wrote in the last 24 hours of this process.")
	descProcess   = desc("process_written_bytes_total", "Bytes the process wrote to disk, the store and the kubelet's files.")
	descByClass   = prometheus.NewDesc(prometheus.BuildFQName(metrics.Namespace, "edge", "store_class_written_bytes_total"),
		"Bytes the store wrote to disk, by what for.", []string{"class"}, nil)
	descTraffic = prometheus.NewDesc(prometheus.BuildFQName(metrics.Namespace, "edge", "tunnel_bytes_total"),
		"Bytes over all tunnels since the start, by class and direction.", []string{"class", "direction"}, nil)
	descObjects = prometheus.NewDesc(prometheus.BuildFQName(metrics.Namespace, "edge", "store_objects"),
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
	gauge(descCertEnds, float64(st.CertificateEnds.Unix()))
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
	counter(descStates, st.StatesDropped)
	flag := func(d *prometheus.Desc, on bool) {
		v := 0.0
		if on {
			v = 1
		}
		gauge(d, v)
	}
	flag(descTrouble, st.StoreTrouble != nil)
	flag(descMended, st.StoreMended != nil)
	b := st.Bytes
	gauge(descBudget, float64(b.Disk.Budget))
	gauge(descDay, float64(b.Disk.LastDay))
	counter(descProcess, b.Process)
	for class, n := range b.Disk.Classes {
		ch <- prometheus.MustNewConstMetric(descByClass, prometheus.CounterValue, float64(n), class)
	}
	for direction, classes := range map[string]map[string]uint64{"sent": b.Sent, "received": b.Received} {
		for class, n := range classes {
			ch <- prometheus.MustNewConstMetric(descTraffic, prometheus.CounterValue, float64(n), class, direction)
		}
	}
	gauge(descSent, float64(st.TunnelSent))
	gauge(descReceived, float64(st.TunnelRecv))
	gauge(descStreams, float64(st.TunnelStreams))
	for resource, n := range st.Objects {
		gauge(descObjects, float64(n), resource)
	}
}
