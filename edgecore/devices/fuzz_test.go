package devices

import (
	"bytes"
	"encoding/json"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/skerry-io/skerry/devicetwin/mqtt"
)

func FuzzParseAsk(f *testing.F) {
	f.Add("skerry/v1/twin/home/plug-1/desired/set", []byte(`{"id":"a1","props":{"relay":true}}`))
	f.Add("skerry/v1/twin/home/plug-1/cmd/toggle/7", []byte(nil))
	f.Add("skerry/v1/twin//plug-1/cmd/toggle/7", []byte(`{}`))
	f.Add("skerry/v1/twin/home/plug-1/cmd/toggle/", []byte(`{}`))
	f.Fuzz(func(t *testing.T, topic string, payload []byte) {
		a, err := parseAsk(mqtt.Message{Topic: topic, Payload: payload})
		if err != nil {
			return
		}
		if a.key.Namespace == "" || a.key.Name == "" || !strings.HasPrefix(topic, twinTopics+a.key.String()+"/") {
			t.Errorf("%q is taken for %+v", topic, a)
		}
		if a.command != "" && (a.id == "" || len(a.id) > maxID || strings.Contains(a.id, "/")) {
			t.Errorf("%q has the id %q", topic, a.id)
		}
		if len(a.body) > maxAsk || !bytes.Equal(a.body, payload) {
			t.Errorf("%d bytes of %d", len(a.body), len(payload))
		}
	})
}

func FuzzParseRecords(f *testing.F) {
	f.Add([]byte("{\"a\":1}\n\n2\r\nnull"))
	f.Add([]byte("{\n}"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		records, err := parseRecords(raw)
		if (err == nil) == (len(records) == 0) || len(records) > maxRecords {
			t.Fatalf("%d records, %v", len(records), err)
		}
		for _, r := range records {
			if !json.Valid(r) || bytes.ContainsRune(r, '\n') {
				t.Errorf("record %q", r)
			}
		}
	})
}

func FuzzPatchBody(f *testing.F) {
	f.Add([]byte(`{"id":"a1","desired":{"relay":false,"mode":null},"ttl":"10m"}`))
	f.Add([]byte(`{"desired":{}}`))
	f.Add([]byte(`{"desired":{"a":1},"ttl":"-1s"}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		r := httptest.NewRequest("PATCH", "/", bytes.NewReader(raw))
		var body patchBody
		if err := readJSON(httptest.NewRecorder(), r, maxPatchBody, &body); err != nil {
			return
		}
		p, err := body.patch("someone")
		if err == nil && (len(p.Props) == 0 || p.TTL < 0 || p.By != "someone") {
			t.Errorf("%s is taken for %+v", raw, p)
		}
	})
}
