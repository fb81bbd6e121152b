package profile

import (
	"slices"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/mqtt"
)

// keeping is a Sink that keeps what it is told.
type keeping struct {
	readings []devicetwin.Reading
	sighted  []devicetwin.Sighting
}

func (k *keeping) Report(_ devicetwin.Key, r []devicetwin.Reading) {
	k.readings = append(k.readings, slices.Clone(r)...)
}
func (k *keeping) Sight(_ devicetwin.Key, s devicetwin.Sighting)   { k.sighted = append(k.sighted, s) }
func (k *keeping) Found(devicetwin.Key, []v1alpha1.Candidate, int) {}

func TestReplay(t *testing.T) {
	sink := &keeping{}
	d, err := New(Config{Node: "edge-1", Broker: newMemory(), Sink: sink})
	if err != nil {
		t.Fatal(err)
	}
	d.Set([]devicetwin.Bound{{
		Device: &v1alpha1.Device{ObjectMeta: metav1.ObjectMeta{Namespace: "home", Name: "th"}, Spec: v1alpha1.DeviceSpec{ModelRef: v1alpha1.ModelRef{Name: "th"}}},
		Model: &v1alpha1.DeviceModel{ObjectMeta: metav1.ObjectMeta{Name: "th"}, Spec: v1alpha1.DeviceModelSpec{Profile: v1alpha1.ProfileJSON, Properties: []v1alpha1.Property{
			{Name: "temp", Type: v1alpha1.TypeFloat64, Access: "r", Read: []v1alpha1.Read{{Topic: "th/data", Path: "t"}}},
			{Name: "hum", Type: v1alpha1.TypeFloat64, Access: "r", Read: []v1alpha1.Read{{Topic: "+/hum"}}},
		}}},
	}}, nil)
	at := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	d.Replay(slices.Values([]mqtt.Message{
		{Topic: "th/data", Payload: []byte(`{"t":20.5}`), Received: at},
		{Topic: "th/hum", Payload: []byte(`41`), Received: at.Add(time.Second)},
		{Topic: "other", Payload: []byte(`1`), Received: at},
	}))
	want := []devicetwin.Reading{
		{Property: "temp", Value: 20.5, TS: at, Retained: true}, {Property: "temp", Value: 20.5, TS: at, Historical: true},
		{Property: "hum", Value: 41.0, TS: at.Add(time.Second), Retained: true}, {Property: "hum", Value: 41.0, TS: at.Add(time.Second), Historical: true},
	}
	if !slices.EqualFunc(sink.readings, want, func(a, b devicetwin.Reading) bool {
		return a.Property == b.Property && a.Value == b.Value && a.TS.Equal(b.TS) && a.Retained == b.Retained && a.Historical == b.Historical && a.Bad == nil
	}) {
		t.Errorf("%+v", sink.readings)
	}
	if len(sink.sighted) > 0 {
		t.Errorf("what was heard before is taken for evidence: %+v", sink.sighted)
	}
}
