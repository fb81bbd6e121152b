package devicetwin

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// FuzzRestore opens twins over a disk that says anything: it is read or left
// out, and what comes of it can be written and read again.
func FuzzRestore(f *testing.F) {
	f.Add(`{"uid":"u1","gen":3,"p":{"setpoint":{"v":20.5,"gen":2}}}`,
		`{"uid":"u1","p":{"temp":{"v":21,"q":"good","rx":1,"e":1,"s":9},"mode":{"q":"bad","msg":"x","e":1}}}`,
		`{"uid":"u1","p":[{"p":"free","v":true,"by":"a","base":1,"since":1,"exp":99999999999999,"e":1,"s":2}]}`,
		`{"uid":"u1","c":[{"id":"1","name":"later","state":"queued","exp":99999999999999},{"id":"2","name":"again","state":"sent"}]}`)
	f.Add(`{`, `null`, `{"uid":"u1","p":[{}]}`, `{"uid":"u1","c":[{}]}`)
	f.Add(`{"uid":"u1","p":{"setpoint":{}}}`, `{"uid":"u1","p":{"temp":{"v":1e999,"q":"good"}}}`, `[]`, `{"uid":"u1","c":null}`)
	f.Fuzz(func(t *testing.T, desired, twin, override, command string) {
		d := newDisk()
		d.put(bucketModel, "home/trv", []byte(desired))
		d.put(bucketTwin, "home/trv", []byte(twin))
		d.put(bucketOverride, "home/trv", []byte(override))
		d.put(bucketCommand, "home/trv", []byte(command))
		d.put(bucketTwin, "nokey", []byte(twin))
		open := func() *Twins {
			tw, err := New(Config{DB: d, Now: func() (time.Time, bool) { return time.Unix(1e9, 0), true }})
			if err != nil {
				t.Fatal(err)
			}
			tw.Use(&gadget{t: tw})
			tw.Set([]Bound{{Device: trvDevice(1, map[string]string{"setpoint": "20"}), Model: trvModel()}}, nil)
			return tw
		}
		tw := open()
		doc, _ := tw.Get(trv)
		if _, err := json.Marshal(doc); err != nil {
			t.Fatal(err)
		}
		raw := tw.encodeTwin(trv)
		d.put(bucketTwin, "home/trv", raw)
		if again := open().encodeTwin(trv); string(again) != string(raw) {
			t.Fatalf("%s became %s", raw, again)
		}
	})
}

// FuzzFromHub gives the node what a hub should not.
func FuzzFromHub(f *testing.F) {
	f.Add(`{"values":[{"d":{"ns":"home","n":"trv"},"p":"temp","v":21,"rx":1,"q":"good","ver":"00000000000000aa/0/7"}]}`, `{"id":1,"op":"command","d":{"ns":"home","n":"trv"},"timeout":1,"body":{"id":"1","name":"identify"}}`)
	f.Add(`{"values":[{"d":{"ns":"home","n":"trv"},"p":"mode","v":"hot","q":"good","ver":"00000000000000ab/9/7"}]}`, `{"op":"x"}`)
	f.Fuzz(func(t *testing.T, restore, request string) {
		tw, err := New(Config{DB: newDisk(), Now: func() (time.Time, bool) { return time.Unix(1e9, 0), true }})
		if err != nil {
			t.Fatal(err)
		}
		tw.Use(&gadget{t: tw})
		tw.Set([]Bound{{Device: trvDevice(1, nil), Model: trvModel()}}, nil)
		var r edgeapi.TwinRestore
		if json.Unmarshal([]byte(restore), &r) == nil {
			tw.restoreFromHub(r)
		}
		var q edgeapi.TwinRequest
		if json.Unmarshal([]byte(request), &q) == nil {
			q.Timeout = 1
			tw.serve(t.Context(), q)
		}
		doc, _ := tw.Get(trv)
		for name, p := range doc.Properties {
			if p.Reported != nil && p.Reported.Quality != v1alpha1.QualityStale && p.Reported.Quality != v1alpha1.QualityBad {
				t.Errorf("%s from the hub is %s", name, p.Reported.Quality)
			}
		}
		if _, err := json.Marshal(doc); err != nil {
			t.Fatal(err)
		}
	})
}
