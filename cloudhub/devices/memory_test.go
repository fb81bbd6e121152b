package devices

import (
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// BenchmarkFrames takes frames of 100 values, of 10,000 devices with a watch
// open; it tells what a device of ten properties takes.
func BenchmarkFrames(b *testing.B) {
	const devices, properties = 10_000, 10
	model := thermostat()
	model.Spec.Properties = nil
	for i := range properties {
		model.Spec.Properties = append(model.Spec.Properties, v1alpha1.Property{Name: fmt.Sprintf("p%d", i), Type: v1alpha1.TypeFloat64, Access: "r"})
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	h := newHub(b)
	h.setModel(model)
	s := h.attach("pi")
	seq := uint64(0)
	for i := range devices {
		name := fmt.Sprintf("d%d", i)
		h.setDevice(device(name, "pi", 1, ""))
		f := edgeapi.TwinFrame{States: []edgeapi.TwinState{state(name, 5, 1, 1)}}
		for p := range properties {
			seq++
			f.Values = append(f.Values, val(name, fmt.Sprintf("p%d", p), "20.25", 5, seq))
		}
		if _, err := h.takeFrame(s, f); err != nil {
			b.Fatal(err)
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	frames := make([]edgeapi.TwinFrame, 100)
	n := 0
	for b.Loop() {
		f := &frames[n%len(frames)]
		n++
		f.Values = f.Values[:0]
		for i := range 100 {
			seq++
			f.Values = append(f.Values, val(fmt.Sprintf("d%d", (n*100+i)%devices), "p1", "21", 5, seq))
		}
		if _, err := h.takeFrame(s, *f); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/devices, "B/device")
	b.ReportMetric(float64(b.N)*100/b.Elapsed().Seconds(), "values/s")
}

// TestMetrics: properties that opt in are gauges while they are live.
func TestMetrics(t *testing.T) {
	h := newHub(t)
	h.setModel(thermostat())
	h.setDevice(device("a", "pi", 1, ""))
	s := h.attach("pi")
	h.tell(t, s, []edgeapi.TwinState{state("a", 5, 1, 1)}, val("a", "temp", "20.5", 5, 2), val("a", "setpoint", "20", 5, 3))
	reg := prometheus.NewPedanticRegistry()
	if err := reg.Register(h.Devices); err != nil {
		t.Fatal(err)
	}
	want := `
# HELP skerry_device_property A live numeric or boolean value of a device, of properties whose model has metric set. Absent while it is not live.
# TYPE skerry_device_property gauge
skerry_device_property{device="a",namespace="home",property="temp",unit="Cel"} 20.5
`
	if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "skerry_device_property"); err != nil {
		t.Error(err)
	}
	if n, err := testutil.GatherAndCount(reg, "skerry_hub_twin_values_total", "skerry_hub_device_status_writes_total"); err != nil || n != 2 {
		t.Errorf("%d, %v", n, err)
	}
	h.end(s)
	if n, err := testutil.GatherAndCount(reg, "skerry_device_property"); err != nil || n != 0 {
		t.Errorf("%d series of a node that is not there, %v", n, err)
	}
}
