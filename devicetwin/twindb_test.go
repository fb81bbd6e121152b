package devicetwin_test

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/twindb"
)

type silent struct{}

func (silent) Set([]devicetwin.Bound, []*v1alpha1.DeviceDiscovery)  {}
func (silent) Write(context.Context, devicetwin.WriteRequest) error { return nil }
func (silent) Refresh(context.Context, devicetwin.Key) error        { return nil }
func (silent) Command(context.Context, devicetwin.CommandRequest) (json.RawMessage, error) {
	return nil, nil
}

// Over the real store: readings, local writes and commands at once, then the
// file is opened again and has all that was acknowledged, and at most one of
// each command was sent.
func TestOverTheRealStore(t *testing.T) {
	path := filepath.Join(t.TempDir(), "devices.db")
	model := &v1alpha1.DeviceModel{ObjectMeta: metav1.ObjectMeta{Name: "m"}, Spec: v1alpha1.DeviceModelSpec{
		Profile: "json",
		Properties: []v1alpha1.Property{
			{Name: "temp", Type: "float64", Access: "r"},
			{Name: "target", Type: "int64", Access: "rw", Authority: "edge"},
		},
		Commands: []v1alpha1.Command{{Name: "blink"}},
	}}
	var bound []devicetwin.Bound
	for i := range 20 {
		d := &v1alpha1.Device{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: fmt.Sprint("d", i), UID: types.UID(fmt.Sprint(i)), Generation: 1}}
		d.Spec.ModelRef.Name = "m"
		bound = append(bound, devicetwin.Bound{Device: d, Model: model})
	}
	open := func() (*devicetwin.Twins, *twindb.DB, func()) {
		db, err := twindb.Open(twindb.Config{Path: path})
		if err != nil {
			t.Fatal(err)
		}
		tw, err := devicetwin.New(devicetwin.Config{DB: db, Now: func() (time.Time, bool) { return time.Now(), true }})
		if err != nil {
			t.Fatal(err)
		}
		tw.Use(silent{})
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { tw.Run(ctx) })
		tw.Set(bound, nil)
		return tw, db, func() {
			cancel()
			wg.Wait()
			if err := db.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	tw, db, stop := open()
	epoch := db.Epoch()
	var wg sync.WaitGroup
	for i := range 20 {
		k := devicetwin.Key{Namespace: "n", Name: fmt.Sprint("d", i)}
		wg.Go(func() {
			for n := range 2000 {
				tw.Report(k, []devicetwin.Reading{{Property: "temp", Value: float64(n)}})
			}
		})
		wg.Go(func() {
			for n := range 5 {
				// The device takes the value at once, so no answer is waited for.
				tw.Report(k, []devicetwin.Reading{{Property: "target", Value: int64(n)}})
				r := tw.SetDesired(t.Context(), k, devicetwin.Patch{Props: map[string]json.RawMessage{"target": []byte(fmt.Sprint(n))}})
				if r.Code != 200 {
					t.Errorf("%s: %+v", k, r)
				}
			}
			if s := tw.Command(t.Context(), k, devicetwin.CommandCall{ID: "x", Name: "blink"}); s.State != devicetwin.CommandSucceeded {
				t.Errorf("%s: %+v", k, s)
			}
		})
	}
	wg.Wait()
	stop()

	tw, db, stop = open()
	defer stop()
	if db.Epoch() <= epoch {
		t.Errorf("epoch %d after %d", db.Epoch(), epoch)
	}
	for _, doc := range tw.List() {
		o := doc.Properties["target"].Override
		if o == nil || string(o.Value) != "4" {
			t.Errorf("%s: override %+v", doc.Name, o)
		}
		r := doc.Properties["temp"].Reported
		if r == nil || string(r.Value) != "1999" || r.Quality != v1alpha1.QualityStale || r.Version.Epoch != epoch {
			t.Errorf("%s: reported %+v", doc.Name, r)
		}
		if s, ok := tw.CommandStatus(devicetwin.Key{Namespace: "n", Name: doc.Name}, "x"); !ok || !s.Done() {
			t.Errorf("%s: command %+v", doc.Name, s)
		}
	}
}
