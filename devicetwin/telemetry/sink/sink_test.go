package sink

import (
	"bufio"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"
	"github.com/klauspost/compress/snappy"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

var route = edgeapi.DeviceRef{Namespace: "home", Name: "energy"}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newSink(t testing.TB, spec v1alpha1.RouteSink, secret map[string][]byte) Sink {
	t.Helper()
	s, err := New(Config{Spec: spec, Route: route, Node: "pi-01", Secret: secret, Timeout: 2 * time.Second})
	must(t, err)
	t.Cleanup(s.Close)
	return s
}

func reading(n int, value string) edgeapi.TelemetryRecord {
	return edgeapi.TelemetryRecord{
		ID: fmt.Sprintf("9f3c01aa77e2b410-1-%d", n), Device: &edgeapi.DeviceRef{Namespace: "home", Name: "plug-1"},
		Property: "power", Value: json.RawMessage(value), TS: 1_700_000_000_000 + int64(n),
	}
}

// receiver is a webhook's other end.
type receiver struct {
	*httptest.Server
	mu      sync.Mutex
	answer  func(w http.ResponseWriter, body string) // under mu; nil: 200
	bodies  []string
	headers []http.Header
}

func newReceiver(t testing.TB, tls bool) *receiver {
	r := &receiver{}
	h := http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		b, err := io.ReadAll(req.Body)
		if err != nil {
			return
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		r.bodies = append(r.bodies, string(b))
		r.headers = append(r.headers, req.Header)
		if r.answer != nil {
			r.answer(w, string(b))
		}
	})
	if tls {
		r.Server = httptest.NewTLSServer(h)
	} else {
		r.Server = httptest.NewServer(h)
	}
	t.Cleanup(r.Close)
	return r
}

func TestWebhook(t *testing.T) {
	r := newReceiver(t, true)
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.Certificate().Raw})
	spec := v1alpha1.RouteSink{Webhook: &v1alpha1.WebhookSink{URL: r.URL + "/in?key=hush"}}
	if err := newSink(t, spec, nil).Send(t.Context(), []edgeapi.TelemetryRecord{reading(1, "1")}); err == nil || strings.Contains(err.Error(), "hush") {
		t.Errorf("a certificate that nobody vouches for: %v", err)
	}
	s := newSink(t, spec, map[string][]byte{"ca.crt": ca, "token": []byte("s3cret\n")})
	batch := []edgeapi.TelemetryRecord{
		reading(1, "12.5"), reading(2, "true"),
		{ID: "x-1-3", Topic: "a/b", Payload: []byte(`{"t":21}`), TS: 5, Quality: "uncertain"},
		{ID: "x-1-4", Topic: "a/b", Payload: []byte("on"), TS: 5, Backfill: true},
		{ID: "x-1-5", Topic: "a/b", Payload: []byte{0xff, 0}, TS: 5},
		{ID: "x-1-6-gap", TS: 6, Gap: &edgeapi.TelemetryGap{From: "x-1-6", To: "x-2-6", Count: 9}},
	}
	must(t, s.Send(t.Context(), batch))
	must(t, s.Send(t.Context(), batch))
	must(t, s.Send(t.Context(), batch[:1]))
	want := strings.Join([]string{
		`{"id":"9f3c01aa77e2b410-1-1","node":"pi-01","route":"home/energy","namespace":"home","device":"plug-1","property":"power","value":12.5,"ts":1700000000001,"quality":"good"}`,
		`{"id":"9f3c01aa77e2b410-1-2","node":"pi-01","route":"home/energy","namespace":"home","device":"plug-1","property":"power","value":true,"ts":1700000000002,"quality":"good"}`,
		`{"id":"x-1-3","node":"pi-01","route":"home/energy","topic":"a/b","payload":{"t":21},"ts":5,"quality":"uncertain"}`,
		`{"id":"x-1-4","node":"pi-01","route":"home/energy","topic":"a/b","text":"on","ts":5,"quality":"good","backfill":true}`,
		`{"id":"x-1-5","node":"pi-01","route":"home/energy","topic":"a/b","base64":"/wA=","ts":5,"quality":"good"}`,
		`{"id":"x-1-6-gap","node":"pi-01","route":"home/energy","ts":6,"gap":{"from":"x-1-6","to":"x-2-6","count":9}}`,
	}, "\n") + "\n"
	if r.bodies[0] != want {
		t.Errorf("sent\n%s\nwant\n%s", r.bodies[0], want)
	}
	var keys []string
	for _, h := range r.headers {
		keys = append(keys, h.Get("Idempotency-Key"))
		if h.Get("Authorization") != "Bearer s3cret" || h.Get("Content-Type") != "application/x-ndjson" {
			t.Errorf("headers %v", h)
		}
	}
	if len(keys) != 3 || keys[0] == "" || keys[0] != keys[1] || keys[1] == keys[2] {
		t.Errorf("idempotency keys %q", keys)
	}
}

// What an answer means.
func TestAnswers(t *testing.T) {
	r := newReceiver(t, false)
	hook := v1alpha1.RouteSink{Webhook: &v1alpha1.WebhookSink{URL: r.URL}}
	write := v1alpha1.RouteSink{RemoteWrite: &v1alpha1.RemoteWriteSink{URL: r.URL}}
	for _, c := range []struct {
		code    int
		after   string
		refused bool
		later   time.Duration
	}{
		{code: 200}, {code: 204},
		{code: 400, refused: true}, {code: 413, refused: true}, {code: 422, refused: true},
		{code: 401}, {code: 403}, {code: 404}, {code: 408}, // the records are not to blame
		{code: 302}, {code: 500},
		{code: 429, after: "7", later: 7 * time.Second}, {code: 503, after: "999999", later: maxRetryAfter},
	} {
		for _, spec := range []v1alpha1.RouteSink{hook, write} {
			r.answer = func(w http.ResponseWriter, _ string) {
				if c.after != "" {
					w.Header().Set("Retry-After", c.after)
				}
				w.WriteHeader(c.code)
			}
			err := newSink(t, spec, map[string][]byte{"token": []byte("hush")}).Send(t.Context(), []edgeapi.TelemetryRecord{reading(1, "1")})
			var refused *Refused
			var later *Later
			if (err == nil) != (c.code/100 == 2) || errors.As(err, &refused) != c.refused || errors.As(err, &later) != (c.later > 0) ||
				later != nil && later.After != c.later || err != nil && strings.Contains(err.Error(), "hush") {
				t.Errorf("%d %s: %v", c.code, c.after, err)
			}
		}
	}
	r.Close()
	for _, spec := range []v1alpha1.RouteSink{hook, write} {
		var refused *Refused
		if err := newSink(t, spec, nil).Send(t.Context(), []edgeapi.TelemetryRecord{reading(1, "1")}); err == nil || errors.As(err, &refused) {
			t.Errorf("nobody there: %v", err)
		}
	}
}

// A record that the receiver cannot bear does not take the others with it.
func TestOneBadRecord(t *testing.T) {
	r := newReceiver(t, false)
	got := map[string]bool{}
	r.answer = func(w http.ResponseWriter, body string) {
		if strings.Contains(body, `"value":666`) {
			http.Error(w, "no devils", http.StatusUnprocessableEntity)
			return
		}
		for l := range strings.Lines(body) {
			got[l] = true
		}
	}
	var batch []edgeapi.TelemetryRecord
	for n := range 1000 {
		batch = append(batch, reading(n, "1"))
	}
	batch[123] = reading(123, "666")
	err := newSink(t, v1alpha1.RouteSink{Webhook: &v1alpha1.WebhookSink{URL: r.URL}}, nil).Send(t.Context(), batch)
	var refused *Refused
	if !errors.As(err, &refused) || refused.Count != 1 || !strings.Contains(refused.Why, "devils") || len(got) != 999 {
		t.Errorf("%v, %d taken", err, len(got))
	}
	r.answer = func(w http.ResponseWriter, _ string) { w.WriteHeader(http.StatusBadRequest) }
	r.bodies = nil
	err = newSink(t, v1alpha1.RouteSink{Webhook: &v1alpha1.WebhookSink{URL: r.URL}}, nil).Send(t.Context(), batch)
	if !errors.As(err, &refused) || refused.Count != 1000 || len(r.bodies) > maxParts {
		t.Errorf("%v after %d requests", err, len(r.bodies))
	}
}

// decodeWriteRequest reads prometheus.WriteRequest by its published schema.
func decodeWriteRequest(t *testing.T, b []byte) map[string]map[int64]float64 {
	t.Helper()
	out := map[string]map[int64]float64{}
	fields(t, b, func(n protowire.Number, ts []byte, _ uint64) {
		if n != 1 {
			t.Fatalf("field %d of WriteRequest", n)
		}
		var labels []string
		samples := map[int64]float64{}
		last := int64(math.MinInt64)
		fields(t, ts, func(n protowire.Number, v []byte, _ uint64) {
			switch n {
			case 1:
				var pair [3]string
				fields(t, v, func(n protowire.Number, s []byte, _ uint64) { pair[n] = string(s) })
				labels = append(labels, pair[1]+"="+pair[2])
			case 2:
				var value float64
				var at int64
				fields(t, v, func(n protowire.Number, _ []byte, x uint64) {
					if n == 1 {
						value = math.Float64frombits(x)
					} else {
						at = int64(x)
					}
				})
				if at <= last {
					t.Errorf("sample of %d after %d", at, last)
				}
				last = at
				samples[at] = value
			default:
				t.Fatalf("field %d of TimeSeries", n)
			}
		})
		if !slices.IsSorted(labels) {
			t.Errorf("labels are not sorted: %q", labels)
		}
		out[strings.Join(labels, ",")] = samples
	})
	return out
}

func fields(t *testing.T, b []byte, fn func(n protowire.Number, v []byte, x uint64)) {
	t.Helper()
	for len(b) > 0 {
		n, typ, size := protowire.ConsumeTag(b)
		if size < 0 {
			t.Fatal(protowire.ParseError(size))
		}
		b = b[size:]
		var v []byte
		var x uint64
		switch typ {
		case protowire.BytesType:
			v, size = protowire.ConsumeBytes(b)
		case protowire.Fixed64Type:
			x, size = protowire.ConsumeFixed64(b)
		case protowire.VarintType:
			x, size = protowire.ConsumeVarint(b)
		default:
			t.Fatalf("wire type %d", typ)
		}
		if size < 0 {
			t.Fatal(protowire.ParseError(size))
		}
		fn(n, v, x)
		b = b[size:]
	}
}

func TestRemoteWrite(t *testing.T) {
	r := newReceiver(t, false)
	s := newSink(t, v1alpha1.RouteSink{RemoteWrite: &v1alpha1.RemoteWriteSink{URL: r.URL}}, map[string][]byte{"username": []byte("u"), "password": []byte("p")})
	other := reading(9, "-3")
	other.Device = &edgeapi.DeviceRef{Namespace: "home", Name: "plug-2"}
	late := reading(0, "0.5")
	late.TS -= 10
	again := reading(2, "8")
	must(t, s.Send(t.Context(), []edgeapi.TelemetryRecord{
		reading(1, "12.5"), reading(2, "7"), other, late, again, reading(3, "true"),
		reading(4, `"text"`), reading(5, `null`), reading(6, `{"a":1}`), {ID: "m", Topic: "a", Payload: []byte("1")},
		{ID: "g", Gap: &edgeapi.TelemetryGap{Count: 1}},
	}))
	h := r.headers[0]
	if h.Get("Content-Encoding") != "snappy" || h.Get("Content-Type") != "application/x-protobuf" || h.Get("X-Prometheus-Remote-Write-Version") != "0.1.0" || h.Get("Authorization") != "Basic dTpw" {
		t.Errorf("headers %v", h)
	}
	raw, err := snappy.Decode(nil, []byte(r.bodies[0]))
	must(t, err)
	got := decodeWriteRequest(t, raw)
	const base = 1_700_000_000_000
	want := map[string]map[int64]float64{
		"__name__=skerry_device_property,device=plug-1,namespace=home,node=pi-01,property=power": {base - 10: 0.5, base + 1: 12.5, base + 2: 8, base + 3: 1},
		"__name__=skerry_device_property,device=plug-2,namespace=home,node=pi-01,property=power": {base + 9: -3},
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %v\nwant %v", got, want)
	}
	must(t, s.Send(t.Context(), []edgeapi.TelemetryRecord{reading(4, `"text"`)}))
	if len(r.bodies) != 1 {
		t.Error("a request about nothing")
	}
}

// startMosquitto starts a broker on a free port of loopback and returns its
// address.
func startMosquitto(t testing.TB) string {
	t.Helper()
	path, err := exec.LookPath("mosquitto")
	if err != nil {
		path = "/usr/sbin/mosquitto"
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatal("mosquitto is not installed; run make deps")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	addr := l.Addr().String()
	must(t, l.Close())
	_, port, _ := net.SplitHostPort(addr)
	conf := filepath.Join(t.TempDir(), "conf")
	must(t, os.WriteFile(conf, []byte("listener "+port+" 127.0.0.1\nallow_anonymous true\nuser root\nmax_queued_messages 0\nlog_dest none\n"), 0o600))
	cmd := exec.Command(path, "-c", conf)
	must(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if c, err := net.Dial("tcp", addr); err == nil {
			c.Close()
			return addr
		}
		if time.Now().After(deadline) {
			t.Fatal("mosquitto does not listen")
		}
	}
}

// cutter forwards to a broker and cuts the connection after some bytes.
func cutter(t *testing.T, to string) (addr string, cuts func() int) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	var wg sync.WaitGroup
	var mu sync.Mutex
	n := 0
	t.Cleanup(func() { l.Close(); wg.Wait() })
	wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", to)
			if err != nil {
				in.Close()
				continue
			}
			wg.Go(func() {
				defer in.Close()
				defer out.Close()
				wg.Go(func() { _, _ = io.Copy(in, out); in.Close() })
				if _, err := io.CopyN(out, in, 200+rand.Int64N(20_000)); err == nil {
					mu.Lock()
					n++
					mu.Unlock()
				}
			})
		}
	})
	return l.Addr().String(), func() int { mu.Lock(); defer mu.Unlock(); return n }
}

// Over a connection that is cut and cut again, each record arrives; by their
// IDs they are exactly those that were sent.
func TestMQTTOverABadLine(t *testing.T) {
	broker := startMosquitto(t)
	var mu sync.Mutex
	got, topics := map[string]int{}, map[string]bool{}
	opts := paho.NewClientOptions().AddBroker("tcp://" + broker).SetClientID("sub").SetOrderMatters(true)
	opts.SetDefaultPublishHandler(func(_ paho.Client, m paho.Message) {
		var l line
		if err := json.Unmarshal(m.Payload(), &l); err != nil {
			t.Errorf("%q: %v", m.Payload(), err)
		}
		mu.Lock()
		defer mu.Unlock()
		got[l.ID]++
		topics[m.Topic()] = true
	})
	sub := paho.NewClient(opts)
	tok := sub.Connect()
	tok.Wait()
	must(t, tok.Error())
	tok = sub.Subscribe("t/#", 1, nil)
	tok.Wait()
	must(t, tok.Error())
	defer sub.Disconnect(0)

	addr, cuts := cutter(t, broker)
	s := newSink(t, v1alpha1.RouteSink{MQTT: &v1alpha1.MQTTSink{URL: "mqtt://" + addr, Topic: "t/${node}/${namespace}/${device}/${property}/${route}"}}, nil)
	const all = 1000
	failed := 0
	for n := 0; n < all; {
		size := min(1+rand.IntN(60), all-n)
		var batch []edgeapi.TelemetryRecord
		for i := range size {
			batch = append(batch, reading(n+i, "1"))
		}
		if err := s.Send(t.Context(), batch); err != nil {
			failed++
			continue
		}
		n += size
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		mu.Lock()
		have := len(got)
		mu.Unlock()
		if have == all {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d arrived", have, all)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	twice := 0
	for n := range all {
		if got[reading(n, "").ID] == 0 {
			t.Errorf("%d is missing", n)
		}
		if got[reading(n, "").ID] > 1 {
			twice++
		}
	}
	if len(topics) != 1 || !topics["t/pi-01/home/plug-1/power/energy"] {
		t.Errorf("topics %v", topics)
	}
	t.Logf("%d cuts, %d batches sent again, %d records came more than once", cuts(), failed, twice)
	if failed == 0 || cuts() == 0 {
		t.Error("the line was good")
	}
}

// A broker that takes connections and says nothing.
func TestMQTTSilence(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			_, _ = bufio.NewReader(c).Peek(1)
		}
	}()
	s := newSink(t, v1alpha1.RouteSink{MQTT: &v1alpha1.MQTTSink{URL: "mqtt://" + l.Addr().String(), Topic: "t"}}, map[string][]byte{"password": []byte("hush")})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := s.Send(ctx, []edgeapi.TelemetryRecord{reading(1, "1")}); !errors.Is(err, context.DeadlineExceeded) || strings.Contains(err.Error(), "hush") {
		t.Errorf("sent to nobody: %v", err)
	}
}

func TestWhatIsRefusedAtOnce(t *testing.T) {
	three := int32(3)
	for _, s := range []v1alpha1.RouteSink{
		{},
		{Hub: &v1alpha1.HubSink{}},
		{Webhook: &v1alpha1.WebhookSink{URL: "ftp://x"}},
		{Webhook: &v1alpha1.WebhookSink{URL: "https://"}},
		{RemoteWrite: &v1alpha1.RemoteWriteSink{URL: "x"}},
		{MQTT: &v1alpha1.MQTTSink{URL: "tcp://x", Topic: "t"}},
		{MQTT: &v1alpha1.MQTTSink{URL: "mqtt://x", Topic: "t/#"}},
		{MQTT: &v1alpha1.MQTTSink{URL: "mqtt://x"}},
		{MQTT: &v1alpha1.MQTTSink{URL: "mqtt://x", Topic: "t", QoS: &three}},
	} {
		if _, err := New(Config{Spec: s, Route: route}); err == nil {
			t.Errorf("%+v was taken", s)
		}
	}
	for _, secret := range []map[string][]byte{{"ca.crt": []byte("hush")}, {"tls.crt": []byte("hush")}, {"tls.key": []byte("hush")}} {
		_, err := New(Config{Spec: v1alpha1.RouteSink{Webhook: &v1alpha1.WebhookSink{URL: "https://x"}}, Secret: secret})
		if err == nil || strings.Contains(err.Error(), "hush") {
			t.Errorf("%v: %v", secret, err)
		}
	}
}

func FuzzRetryAfter(f *testing.F) {
	f.Add("120")
	f.Add("Wed, 21 Oct 2015 07:28:00 GMT")
	f.Fuzz(func(t *testing.T, v string) {
		if d := retryAfter(v, time.Unix(1, 0)); d < 0 || d > maxRetryAfter {
			t.Errorf("%q is %v", v, d)
		}
	})
}

func FuzzNumber(f *testing.F) {
	f.Add([]byte("1e999"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if v, ok := number(b); ok && (math.IsNaN(v) || math.IsInf(v, 0)) {
			t.Errorf("%q is %v", b, v)
		}
	})
}
