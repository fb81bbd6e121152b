package devices

import (
	"cmp"
	"slices"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/metrics"
)

// maxSeries bounds the gauges of properties: beyond it a series database is the
// place, by a TelemetryRoute.
const maxSeries = 20_000

var (
	descProperty = prometheus.NewDesc(prometheus.BuildFQName(metrics.Namespace, "device", "property"),
		"A live numeric or boolean value of a device, of properties whose model has metric set. Absent while it is not live.",
		[]string{"namespace", "device", "property", "unit"}, nil)
	descHidden = desc("property_series_hidden", "Values that were left out of skerry_device_property, which has a limit.")

	descDevices  = desc("devices", "Devices.")
	descTwins    = desc("twin_nodes", "Nodes with a conversation about their devices.")
	descWatchers = desc("twin_watches", "Open watches of twins.")
	descLive     = desc("twin_live_bytes", "About what live values take in memory.")
	descQueue    = desc("device_status_queue", "Devices whose status waits for its turn to be looked at.")
	descFrames   = desc("twin_frames_total", "Frames of values taken from nodes.")
	descValues   = desc("twin_values_total", "Values taken from nodes.")
	descOlder    = desc("twin_older_values_total", "Values that were no newer than what the hub knew.")
	descRefused  = desc("twin_refused_values_total", "Values and states of devices that are not the node's, or beyond a limit.")
	descRestored = desc("twin_restored_values_total", "Values given back to nodes that had lost them.")
	descCommands = desc("twin_commands_total", "Commands passed to nodes.")
	descPatches  = desc("twin_patches_total", "Changes of desired values asked for at /v1/twins.")
	descSlow     = desc("twin_dropped_watches_total", "Watches that ended by an error, such as a reader that was too slow.")
	descWrites   = desc("device_status_writes_total", "Writes of Devices' statuses.")
	descUrgent   = desc("device_status_urgent_writes_total", "Those of them that were for a transition.")
	descSame     = desc("device_status_unchanged_total", "Statuses that needed no write.")
	descFailed   = desc("device_status_failed_writes_total", "Writes of statuses that did not succeed.")
	descCreated  = desc("discovered_devices_created_total", "Devices made by discoveries.")
	descDeleted  = desc("discovered_devices_deleted_total", "Devices deleted because they were absent.")
	descPromoted = desc("promoted_overrides_total", "Overrides that were made what the cloud wants.")
)

func desc(name, help string) *prometheus.Desc {
	return prometheus.NewDesc(prometheus.BuildFQName(metrics.Namespace, "hub", name), help, nil, nil)
}

// Describe tells of no metric: which there are depends on the devices.
func (d *Devices) Describe(chan<- *prometheus.Desc) {}

// Collect gives the gauges of properties, and the package's counters.
func (d *Devices) Collect(ch chan<- prometheus.Metric) {
	s := d.Stats()
	samples, hidden := d.samples()
	for _, p := range samples {
		ch <- prometheus.MustNewConstMetric(descProperty, prometheus.GaugeValue, p.value, p.namespace, p.device, p.property, p.unit)
	}
	for desc, v := range map[*prometheus.Desc]int{
		descHidden: hidden, descDevices: s.Devices, descTwins: s.Nodes, descWatchers: s.Watchers, descLive: s.LiveBytes, descQueue: s.StatusQueue,
	} {
		ch <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, float64(v))
	}
	for desc, v := range map[*prometheus.Desc]uint64{
		descFrames: s.Frames, descValues: s.Values, descOlder: s.Older, descRefused: s.Refused, descRestored: s.Restored,
		descCommands: s.Commands, descPatches: s.Patches, descSlow: s.SlowWatchers,
		descWrites: s.StatusWrites, descUrgent: s.UrgentWrites, descSame: s.Unchanged, descFailed: s.FailedWrites,
		descCreated: s.DevicesCreated, descDeleted: s.DevicesDeleted, descPromoted: s.OverridesMadeDesired,
	} {
		ch <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(v))
	}
}

type sample struct {
	namespace, device, property, unit string
	value                             float64
}

// samples are the live values to show. Beyond the limit it is always the same
// ones that are left out, so that no series comes and goes.
func (d *Devices) samples() (shown []sample, hidden int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, tw := range d.twins {
		n := d.nodes[tw.device.Spec.NodeName]
		m := d.models[tw.device.Spec.ModelRef.Name]
		if n == nil || n.session == nil || m == nil {
			continue
		}
		for name, r := range tw.values {
			p := m.properties[name]
			if p == nil || !p.Metric || n.quality(r) != v1alpha1.QualityGood && n.quality(r) != v1alpha1.QualityUncertain {
				continue
			}
			v, ok := number(p.Type, r.value)
			if ok {
				shown = append(shown, sample{tw.ref.Namespace, tw.ref.Name, name, p.Unit, v})
			}
		}
	}
	if hidden = len(shown) - maxSeries; hidden <= 0 {
		return shown, 0
	}
	slices.SortFunc(shown, func(a, b sample) int {
		return cmp.Or(cmp.Compare(a.namespace, b.namespace), cmp.Compare(a.device, b.device), cmp.Compare(a.property, b.property))
	})
	return shown[:maxSeries], hidden
}

func number(kind string, raw []byte) (float64, bool) {
	switch kind {
	case v1alpha1.TypeBool:
		switch string(raw) {
		case "true":
			return 1, true
		case "false":
			return 0, true
		}
	case v1alpha1.TypeInt64, v1alpha1.TypeFloat64:
		v, err := strconv.ParseFloat(string(raw), 64)
		return v, err == nil
	}
	return 0, false
}

var (
	descBatches   = desc("telemetry_batches_total", "Batches of telemetry taken from nodes.")
	descRecords   = desc("telemetry_records_total", "Records of them that their ends took.")
	descNoRecords = desc("telemetry_refused_records_total", "Records that their ends refused for good.")
	descNotTaken  = desc("telemetry_failed_batches_total", "Batches that were not taken, and come again.")
)

// Describe tells of the counters.
func (t *Telemetry) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(t, ch) }

// Collect gives the counters.
func (t *Telemetry) Collect(ch chan<- prometheus.Metric) {
	s := t.Stats()
	for desc, v := range map[*prometheus.Desc]uint64{
		descBatches: s.Batches, descRecords: s.Records, descNoRecords: s.Refused, descNotTaken: s.Failed,
	} {
		ch <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(v))
	}
}
