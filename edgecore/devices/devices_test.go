package devices

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/edgecore/store"
)

// simulate is a lamp that does as it is told.
func (r *rig) simulate(id string) paho.Client {
	c := r.client("", "")
	token := c.Subscribe("lamps/"+id+"/set", 1, func(c paho.Client, m paho.Message) {
		c.Publish("lamps/"+id, 1, false, m.Payload())
	})
	if !token.WaitTimeout(soon) || token.Error() != nil {
		r.t.Fatal(token.Error())
	}
	return c
}

func TestNothingStartsWithoutDevices(t *testing.T) {
	r := &rig{t: t, dir: t.TempDir(), broker: freePort(t)}
	// As the defaults have it, but for the port.
	r.start(func(c *Config) { c.MQTT = MQTT{}; c.MQTT.Complete(noIP) })
	t.Cleanup(func() { r.stop() })
	eventually(t, "the API", func() (bool, string) {
		_, err := os.Stat(r.cfg.Socket)
		return err == nil, "no socket"
	})
	a := r.ask(full, http.MethodGet, "/v1/twins/home", "")
	if a.code != http.StatusServiceUnavailable || !strings.Contains(a.body, "no devices are served on this node") {
		t.Errorf("%d %s", a.code, a.body)
	}
	if _, err := os.Stat(r.cfg.Dir); err == nil {
		t.Error("a file was made")
	}
	if c := r.Conditions(); c != nil {
		t.Errorf("the Node has %+v", c)
	}
}

func TestADeviceOverHTTP(t *testing.T) {
	r := newRig(t, lamp(), lampDevice("l1"))
	dev := r.simulate("l1")
	publish(t, dev, "lamps/l1", `{"on":false,"power":0.5}`, false)
	r.twin("l1", "to report", reports("on", "false"))
	d := r.twin("l1", "to report all", func(d devicetwin.Doc) bool {
		return reports("power", "0.5")(d) && d.Phase != v1alpha1.PhaseUnknown
	})
	if d.Phase != v1alpha1.PhaseOnline || d.Namespace != home || d.Model != "lamp" {
		t.Errorf("%+v", d)
	}
	var tag string
	eventually(t, "the same version twice", func() (bool, string) {
		tag = r.ask(full, http.MethodGet, "/v1/twins/home/l1", "").header.Get("ETag")
		a := r.ask(full, http.MethodGet, "/v1/twins/home/l1", "", "If-None-Match", tag)
		return tag != "" && a.code == http.StatusNotModified && a.body == "", fmt.Sprint(tag, a)
	})

	w := r.watch("/v1/twins/home/l1", "")
	w.next(func(e Event) bool { return e.Type == devicetwin.ChangeSynced })
	a := r.ask(full, http.MethodPatch, "/v1/twins/home/l1", `{"id":"p1","desired":{"on":true},"ttl":"10m"}`, "If-Match", tag)
	var res devicetwin.Result
	if err := json.Unmarshal([]byte(a.body), &res); err != nil || a.code != http.StatusOK || a.header.Get("ETag") == "" {
		t.Fatalf("patch: %d %s", a.code, a.body)
	}
	d = r.twin("l1", "to follow", reports("on", "true"))
	if p := d.Properties["on"]; p.Override == nil || p.Override.By != "system:serviceaccount:home:full" || p.State != v1alpha1.DesiredApplied {
		t.Errorf("%+v", p)
	}
	id, _ := w.next(func(e Event) bool {
		return e.Type == devicetwin.ChangeUpdate && e.Name == "l1" && e.Doc != nil && reports("on", "true")(*e.Doc)
	})

	// The same version again is behind; and the twin can be followed from where
	// one was.
	if a := r.ask(full, http.MethodPatch, "/v1/twins/home/l1", `{"desired":{"on":false}}`, "If-Match", tag); a.code != http.StatusConflict {
		t.Errorf("a patch of what has changed: %d %s", a.code, a.body)
	}
	w = r.watch("/v1/twins/home", id)
	publish(t, dev, "lamps/l1", `{"power":7}`, false)
	w.next(func(e Event) bool {
		if e.Type == devicetwin.ChangeSnapshot {
			t.Errorf("a watch that goes on begins anew: %+v", e)
		}
		return e.Doc != nil && reports("power", "7")(*e.Doc)
	})

	// Giving it up.
	if a := r.ask(full, http.MethodPatch, "/v1/twins/home/l1", `{"desired":{"on":null}}`); a.code != http.StatusOK {
		t.Errorf("giving up: %d %s", a.code, a.body)
	}
	r.twin("l1", "to be without override", func(d devicetwin.Doc) bool { return d.Properties["on"].Override == nil })

	blinks := subscribe(t, dev, "lamps/l1/blink")
	if a := r.ask(full, http.MethodPost, "/v1/twins/home/l1/commands/blink?timeout=5s", `{"id":"b1","args":{"times":3}}`); a.code != http.StatusOK {
		t.Errorf("command: %d %s", a.code, a.body)
	}
	if m := blinks.next(any1); string(m.Payload()) != "3" {
		t.Errorf("blink %s", m.Payload())
	}
}

func TestWhatIsRefusedOverHTTP(t *testing.T) {
	r := newRig(t, lamp(), lampDevice("l1"))
	r.twin("l1", "to be there", func(devicetwin.Doc) bool { return true })
	set := `{"desired":{"on":true}}`
	for _, c := range []struct {
		what, token, method, path, body string
		code                            int
		text                            string
	}{
		{"no token", "", "GET", "/v1/twins/home/l1", "", 401, "Unauthorized"},
		{"a wrong token", "x", "GET", "/v1/twins/home/l1", "", 401, "Unauthorized"},
		{"no right", none, "GET", "/v1/twins/home/l1", "", 403, "system:serviceaccount:home:none may not get devices/twin in API group devices.skerry.dev, l1 in namespace home"},
		{"no right to set", looks, "PATCH", "/v1/twins/home/l1", set, 403, "may not patch devices/desired"},
		{"no right to command", looks, "POST", "/v1/twins/home/l1/commands/blink", "{}", 403, "may not create devices/commands"},
		{"no right to all namespaces", full, "GET", "/v1/twins", "", 403, "may not list devices/twin"},
		{"no right to watch all", full, "GET", "/v1/twins?watch=1", "", 403, "may not watch devices/twin"},
		{"no such device", full, "GET", "/v1/twins/home/l2", "", 404, "there is no device home/l2 on node edge-1"},
		{"a set by GET", full, "GET", "/v1/twins/home/l1/commands/blink", "", 405, ""},
		{"nothing desired", full, "PATCH", "/v1/twins/home/l1", "{}", 422, `\"desired\" is required`},
		{"not JSON", full, "PATCH", "/v1/twins/home/l1", "{", 400, "the body is not what is expected"},
		{"an unknown key", full, "PATCH", "/v1/twins/home/l1", `{"desire":{}}`, 400, `unknown field \"desire\"`},
		{"too much", full, "PATCH", "/v1/twins/home/l1", `{"desired":{"on":"` + strings.Repeat("x", maxPatchBody) + `"}}`, 413, "larger than"},
		{"a wrong type", full, "PATCH", "/v1/twins/home/l1", `{"desired":{"on":"yes"}}`, 422, "on"},
		{"an unknown property", full, "PATCH", "/v1/twins/home/l1", `{"desired":{"off":true}}`, 422, "off"},
		{"a property of the device's", full, "PATCH", "/v1/twins/home/l1", `{"desired":{"power":1}}`, 422, "power"},
		{"a ttl of words", full, "PATCH", "/v1/twins/home/l1", `{"desired":{"on":true},"ttl":"long"}`, 422, "ttl"},
		{"a long timeout", full, "POST", "/v1/twins/home/l1/commands/blink?timeout=1h", "{}", 400, "timeout"},
		{"no such command", full, "POST", "/v1/twins/home/l1/commands/dance", "{}", 404, "dance"},
		{"a wrong version", full, "GET", "/v1/twins/home/l1?watch=1&since=x", "", 400, "Last-Event-ID"},
	} {
		if a := r.ask(c.token, c.method, c.path, c.body); a.code != c.code || !strings.Contains(a.body, c.text) {
			t.Errorf("%s: %d %s, want %d %s", c.what, a.code, a.body, c.code, c.text)
		}
	}
}

func TestPodsOverMQTT(t *testing.T) {
	r := newRig(t, lamp(), lampDevice("l1"))
	dev := r.simulate("l1")
	publish(t, dev, "lamps/l1", `{"on":false}`, false)
	r.twin("l1", "to report", reports("on", "false"))
	pod := r.client("pod", full)
	const topic = "skerry/v1/twin/home/l1"
	all := subscribe(t, pod, "skerry/v1/twin/home/+/delta")
	results := subscribe(t, pod, topic+"/desired/result/+")
	reported := subscribe(t, pod, topic+"/reported")

	publish(t, pod, topic+"/desired/set", `{"id":"a1","props":{"on":true},"ttl":"10m"}`, false)
	m := results.next(any1)
	var res devicetwin.Result
	if err := json.Unmarshal(m.Payload(), &res); err != nil || res.Code != 200 || m.Topic() != topic+"/desired/result/a1" {
		t.Errorf("%s: %s", m.Topic(), m.Payload())
	}
	all.next(func(m paho.Message) bool {
		var d devicetwin.Delta
		return json.Unmarshal(m.Payload(), &d) == nil && string(d.Props["on"].Want) == "true" && d.Props["on"].By == "system:serviceaccount:home:full"
	})
	reported.next(func(m paho.Message) bool {
		var c reportedChange
		return json.Unmarshal(m.Payload(), &c) == nil && string(c.Props["on"].Value) == "true"
	})
	all.next(func(m paho.Message) bool { // and then all is as wanted
		var d devicetwin.Delta
		return json.Unmarshal(m.Payload(), &d) == nil && len(d.Props) == 0
	})

	// The document is kept for who comes later.
	late := subscribe(t, r.client("pod", looks), topic)
	late.next(func(m paho.Message) bool {
		var d devicetwin.Doc
		return json.Unmarshal(m.Payload(), &d) == nil && reports("on", "true")(d)
	})

	// Retained, it is refused; and by one who may not, nothing happens.
	publish(t, r.client("pod", looks), topic+"/desired/set", `{"id":"a2","props":{"on":false}}`, false)
	refused := r.unconnected("pod", full)
	if token := refused.Connect(); token.Wait() && token.Error() != nil {
		t.Fatal(token.Error())
	}
	refused.Publish(topic+"/desired/set", 1, true, `{"id":"a3","props":{"on":false}}`).WaitTimeout(soon)
	refused.Disconnect(10)
	publish(t, pod, topic+"/desired/set", `{"id":"a4","props":{"on":"x"}}`, false)
	m = results.next(func(m paho.Message) bool {
		if strings.HasSuffix(m.Topic(), "a2") {
			t.Errorf("who may look has set: %s", m.Payload())
		}
		return strings.HasSuffix(m.Topic(), "a4")
	})
	if err := json.Unmarshal(m.Payload(), &res); err != nil || res.Code != 422 {
		t.Errorf("%s", m.Payload())
	}
	if d := r.twin("l1", "to be as it was", func(devicetwin.Doc) bool { return true }); !reports("on", "true")(d) {
		t.Errorf("%+v", d)
	}

	status := subscribe(t, pod, topic+"/cmd/blink/+/status")
	blinks := subscribe(t, dev, "lamps/l1/blink")
	publish(t, pod, topic+"/cmd/blink/b7", `{"args":{"times":2}}`, false)
	if m := blinks.next(any1); string(m.Payload()) != "2" {
		t.Errorf("blink %s", m.Payload())
	}
	status.next(func(m paho.Message) bool {
		var s devicetwin.CommandStatus
		return json.Unmarshal(m.Payload(), &s) == nil && m.Topic() == topic+"/cmd/blink/b7/status" && s.Code == 200
	})

	// A device that goes takes its document along.
	gone := subscribe(t, pod, topic)
	r.remove(lampDevice("l1"))
	gone.next(func(m paho.Message) bool { return len(m.Payload()) == 0 })
}

func TestWhoMayConnect(t *testing.T) {
	r := newRig(t, lamp(), lampDevice("l1"))
	r.twin("l1", "to be there", func(devicetwin.Doc) bool { return true })
	for _, c := range []struct{ user, password string }{{"pod", "x"}, {"pod", ""}, {"someone", full}} {
		client := r.unconnected(c.user, c.password)
		if token := client.Connect(); token.WaitTimeout(soon) && token.Error() == nil {
			t.Errorf("%s got in with %q", c.user, c.password)
			client.Disconnect(0)
		}
	}
	// A pod is no device, and a device no pod.
	r.client("", "") // may
	pod := r.client("pod", full)
	publish(t, pod, "lamps/l1", `{"on":true}`, false) // is acknowledged, as other brokers do, and goes nowhere
	dev := r.client("", "")
	publish(t, dev, "skerry/v1/twin/home/l1/desired/set", `{"id":"z","props":{"on":true}}`, false)
	publish(t, dev, "lamps/l1", `{"power":3}`, false)
	d := r.twin("l1", "to report", reports("power", "3"))
	if p := d.Properties["on"]; p.Reported != nil || p.Override != nil {
		t.Errorf("%+v", p)
	}
}

func TestARestart(t *testing.T) {
	r := newRig(t, lamp(), lampDevice("l1"))
	dev := r.simulate("l1")
	publish(t, dev, "lamps/l1", `{"on":false,"power":4}`, false)
	r.twin("l1", "to report", reports("power", "4"))
	if a := r.ask(full, http.MethodPatch, "/v1/twins/home/l1", `{"desired":{"on":true},"ttl":"10m"}`); a.code != http.StatusOK {
		t.Fatalf("%d %s", a.code, a.body)
	}
	before := r.twin("l1", "to follow", reports("on", "true"))
	r.stop()
	r.start()
	d := r.twin("l1", "to be back", func(d devicetwin.Doc) bool { return d.Properties["power"].Reported != nil })
	if p := d.Properties["power"].Reported; string(p.Value) != "4" || p.Quality != v1alpha1.QualityStale || p.Version != before.Properties["power"].Reported.Version {
		t.Errorf("%+v", p)
	}
	if d.Phase != v1alpha1.PhaseUnknown || d.Properties["on"].Override == nil {
		t.Errorf("phase %s, override %+v", d.Phase, d.Properties["on"].Override)
	}
	dev = r.simulate("l1")
	publish(t, dev, "lamps/l1", `{"power":5}`, false)
	d = r.twin("l1", "to be heard", reports("power", "5"))
	if d.Phase != v1alpha1.PhaseOnline || d.Properties["power"].Reported.Version.Epoch <= before.Version.Epoch {
		t.Errorf("%+v", d)
	}
}

// What is wrong with one object, or with the broker's port, is told and leaves
// the rest alone.
func TestTroubles(t *testing.T) {
	port := freePort(t)
	taken, err := net.Listen("tcp", port)
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, dir: t.TempDir(), broker: port}
	r.start()
	t.Cleanup(func() { r.stop() })
	r.apply(lamp(), lampDevice("l1"))
	if err := r.store.ApplyDelta(t.Context(), store.Delta{Upserts: []store.Upsert{{
		Key: store.Key{Resource: v1alpha1.Devices, Namespace: home, Name: "broken"}, UID: "b", Rev: "1",
		Body: []byte(`{"apiVersion":"devices.skerry.dev/v1alpha1","kind":"Device","metadata":{"name":"broken","namespace":"home"},"spec":{"params":7}}`),
	}}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the port to be told", func() (bool, string) {
		st := r.Status()
		return strings.Contains(st.Problem, port), st.Problem
	})
	if c := r.Conditions(); len(c) != 1 || c[0].Status != "False" || c[0].Reason != "NotRunning" {
		t.Errorf("%+v", c)
	}
	if a := r.ask(full, http.MethodGet, "/v1/twins/home", ""); a.code != http.StatusServiceUnavailable || a.header.Get("Retry-After") == "" {
		t.Errorf("%+v", a)
	}
	if err := taken.Close(); err != nil {
		t.Fatal(err)
	}
	r.twin("l1", "to be served", func(devicetwin.Doc) bool { return true })
	eventually(t, "the broken object to be told", func() (bool, string) {
		c := r.Conditions()
		return len(c) == 1 && c[0].Reason == "ObjectUnreadable" && strings.Contains(c[0].Message, "devices/home/broken"), ""
	})
	if st := r.Status(); st.Devices != 1 || !st.Running || st.Problem != "" {
		t.Errorf("%+v", st)
	}
}

func TestTelemetryOfPods(t *testing.T) {
	got := make(chan string, 100)
	sink := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		body, err := io.ReadAll(req.Body)
		if err != nil {
			t.Error(err)
		}
		for line := range strings.Lines(string(body)) {
			got <- line
		}
	}))
	t.Cleanup(sink.Close)
	route := &v1alpha1.TelemetryRoute{
		TypeMeta:   metav1.TypeMeta{APIVersion: v1alpha1.GroupAndVer, Kind: "TelemetryRoute"},
		ObjectMeta: metav1.ObjectMeta{Namespace: home, Name: "logs", UID: "route"},
		Spec:       v1alpha1.TelemetryRouteSpec{Capture: "sync", To: []v1alpha1.RouteSink{{Webhook: &v1alpha1.WebhookSink{URL: sink.URL}}}},
	}
	r := newRig(t, route)
	eventually(t, "the route", func() (bool, string) {
		a, err := r.try(full, http.MethodPost, "/v1/telemetry/home/logs", "{\"n\":1}\n{\"n\":2}\n")
		return err == nil && a.code == http.StatusAccepted, fmt.Sprint(a, err)
	})
	publish(t, r.client("pod", full), "skerry/v1/telemetry/home/logs", `{"n":3}`, false)
	for _, want := range []int{1, 2, 3} {
		select {
		case line := <-got:
			if !strings.Contains(line, fmt.Sprintf(`"payload":{"n":%d}`, want)) {
				t.Errorf("record %d: %s", want, line)
			}
		case <-time.After(soon):
			t.Fatalf("record %d does not come", want)
		}
	}
	for _, c := range []struct {
		token, path, body string
		code              int
		text              string
	}{
		{looks, "/v1/telemetry/home/logs", "{}", 403, "may not create telemetryroutes/records"},
		{full, "/v1/telemetry/home/others", "{}", 404, "there is no TelemetryRoute home/others"},
		{full, "/v1/telemetry/home/logs", "{}\nx\n", 400, "line 2 is no JSON value; none"},
		{full, "/v1/telemetry/home/logs", "\n", 400, "no records"},
		{full, "/v1/telemetry/home/logs", strings.Repeat(" ", maxTelemetryBody+1), 413, "larger"},
	} {
		if a := r.ask(c.token, http.MethodPost, c.path, c.body); a.code != c.code || !strings.Contains(a.body, c.text) {
			t.Errorf("%s %.20q: %d %s", c.path, c.body, a.code, a.body)
		}
	}
}
