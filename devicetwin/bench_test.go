package devicetwin

import (
	"context"
	"fmt"
	"runtime"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
)

// plant is n devices with ten properties each.
func plant(b testing.TB, n int) (*Twins, []Key) {
	m := &v1alpha1.DeviceModel{ObjectMeta: metav1.ObjectMeta{Name: "m"}, Spec: v1alpha1.DeviceModelSpec{Profile: "json"}}
	for i := range 10 {
		m.Spec.Properties = append(m.Spec.Properties, v1alpha1.Property{Name: fmt.Sprintf("p%d", i), Type: "float64", Access: "rw", Min: "-1000000", Max: "1000000"})
	}
	m.Spec.Liveness = &v1alpha1.Liveness{ExpectedInterval: metav1.Duration{Duration: time.Minute}}
	tw, err := New(Config{DB: newDisk(), Now: func() (time.Time, bool) { return time.Now(), true }})
	if err != nil {
		b.Fatal(err)
	}
	tw.Use(&gadget{t: tw})
	var bound []Bound
	var keys []Key
	for i := range n {
		d := &v1alpha1.Device{ObjectMeta: metav1.ObjectMeta{Namespace: "plant", Name: fmt.Sprintf("device-%05d", i), UID: types.UID(fmt.Sprint(i)), Generation: 1}}
		d.Spec.ModelRef.Name = "m"
		bound = append(bound, Bound{Device: d, Model: m})
		keys = append(keys, Key{"plant", d.Name})
	}
	tw.Set(bound, nil)
	return tw, keys
}

func BenchmarkReport(b *testing.B) {
	for _, c := range []struct {
		name    string
		changed bool
		watch   bool
	}{{"changed", true, false}, {"repeated", false, false}, {"changed, watched", true, true}} {
		b.Run(c.name, func(b *testing.B) {
			tw, keys := plant(b, 1000)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			if c.watch {
				go func() {
					for range tw.Watch(ctx, v1alpha1.Version{}) {
					}
				}()
			}
			r := []Reading{{Property: "p3", Value: 20.5}}
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				if c.changed {
					r[0].Value = float64(i % 1000000)
				}
				tw.Report(keys[i%len(keys)], r)
				i++
			}
		})
	}
}

// What a thousand devices with ten properties, all reported, take.
func BenchmarkMemoryPerThousand(b *testing.B) {
	for b.Loop() {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		tw, keys := plant(b, 1000)
		for _, k := range keys {
			for p := range 10 {
				tw.Report(k, []Reading{{Property: fmt.Sprintf("p%d", p), Value: 20.5 + float64(p)}})
			}
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/(1<<20), "MB/1000devices")
		runtime.KeepAlive(tw)
	}
}

func BenchmarkDoc(b *testing.B) {
	tw, keys := plant(b, 1)
	for p := range 10 {
		tw.Report(keys[0], []Reading{{Property: fmt.Sprintf("p%d", p), Value: 20.5}})
	}
	b.ReportAllocs()
	for b.Loop() {
		tw.Get(keys[0])
	}
}
