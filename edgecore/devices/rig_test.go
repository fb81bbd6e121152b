package devices

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apiserver/pkg/authentication/user"
	kubeauthorizer "k8s.io/apiserver/pkg/authorization/authorizer"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/edgecore/store"
)

const (
	node  = "edge-1"
	soon  = 20 * time.Second
	home  = "home"
	full  = "full"  // a token that may everything
	looks = "looks" // one that may look
	none  = "none"  // one that may nothing
)

// rights are what tokens stand for; what localapi makes of real ones is its own
// tests' subject.
type rights struct{}

func (rights) Authenticate(token string) (user.Info, error) {
	switch token {
	case full, looks, none:
		return &user.DefaultInfo{Name: "system:serviceaccount:home:" + token}, nil
	}
	return nil, errors.New("no such token")
}

func (rights) Allowed(_ context.Context, a kubeauthorizer.Attributes) (bool, string, error) {
	if a.GetAPIGroup() != v1alpha1.Group || a.GetNamespace() != home && a.GetUser().GetName() != adminName {
		return false, "", nil
	}
	switch _, name, _ := strings.Cut(a.GetUser().GetName(), "home:"); name {
	case full:
		return true, "", nil
	case looks:
		return a.GetSubresource() == "twin", "", nil
	}
	return a.GetUser().GetName() == adminName, "", nil
}

// rig is the part over a real store, with a broker of its own.
type rig struct {
	*Part
	t      *testing.T
	dir    string
	store  *store.Store
	broker string          // address
	first  []metav1.Object // in the store before the part starts: it listens before devices speak
	stop   func()
}

func newRig(t *testing.T, objects ...metav1.Object) *rig {
	t.Helper()
	r := &rig{t: t, dir: t.TempDir(), broker: freePort(t), first: objects}
	r.start()
	t.Cleanup(func() { r.stop() })
	return r
}

func (r *rig) config() Config {
	m := MQTT{Listen: r.broker, Mode: ModeEmbedded}
	m.Complete(noIP)
	return Config{
		Store: r.store, NodeName: node, Dir: filepath.Join(r.dir, "devices"), Access: rights{}, MQTT: m,
		Socket: filepath.Join(r.dir, "run", "api.sock"), Now: func() (time.Time, bool) { return time.Now(), true },
		Log: slog.New(slog.NewTextHandler(r.t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn})),
	}
}

// start opens all from the disk, as a restart of edgecore does.
func (r *rig) start(change ...func(*Config)) {
	r.t.Helper()
	var err error
	if r.store, err = store.Open(store.Config{Path: filepath.Join(r.dir, "edge.db")}); err != nil {
		r.t.Fatal(err)
	}
	r.apply(r.first...)
	cfg := r.config()
	for _, c := range change {
		c(&cfg)
	}
	if r.Part, err = New(cfg); err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			r.t.Errorf("run: %v", err)
		}
		if err := r.store.Close(); err != nil {
			r.t.Errorf("close: %v", err)
		}
	})
}

var noIP netip.Addr

var rev int

func (r *rig) apply(objects ...metav1.Object) {
	r.t.Helper()
	var d store.Delta
	for _, o := range objects {
		rev++
		body, err := json.Marshal(o)
		if err != nil {
			r.t.Fatal(err)
		}
		d.Upserts = append(d.Upserts, store.Upsert{Key: keyOf(o), UID: string(o.GetUID()), Rev: fmt.Sprint(rev), Body: body})
	}
	if err := r.store.ApplyDelta(r.t.Context(), d); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) remove(o metav1.Object) {
	r.t.Helper()
	if err := r.store.ApplyDelta(r.t.Context(), store.Delta{Deletions: []store.Deletion{{Key: keyOf(o), UID: string(o.GetUID())}}}); err != nil {
		r.t.Fatal(err)
	}
}

func keyOf(o metav1.Object) store.Key {
	resource := v1alpha1.Devices
	switch o.(type) {
	case *v1alpha1.DeviceModel:
		resource = v1alpha1.Models
	case *v1alpha1.TelemetryRoute:
		resource = v1alpha1.Routes
	}
	return store.Key{Resource: resource, Namespace: o.GetNamespace(), Name: o.GetName()}
}

// lamp is a model of a lamp that says {"on":…,"power":…} at lamps/ID.
func lamp() *v1alpha1.DeviceModel {
	return &v1alpha1.DeviceModel{
		TypeMeta:   metav1.TypeMeta{APIVersion: v1alpha1.GroupAndVer, Kind: "DeviceModel"},
		ObjectMeta: metav1.ObjectMeta{Name: "lamp", UID: "model"},
		Spec: v1alpha1.DeviceModelSpec{
			Profile: v1alpha1.ProfileJSON,
			Params:  []v1alpha1.Param{{Name: "id", Required: true}},
			Properties: []v1alpha1.Property{
				{Name: "on", Type: v1alpha1.TypeBool, Access: "rw", LocalOverride: &v1alpha1.LocalOverride{When: "always"},
					Read:  []v1alpha1.Read{{Topic: "lamps/${id}", Path: "on"}},
					Write: &v1alpha1.Write{Topic: "lamps/${id}/set", Payload: `{"on":${value}}`}},
				{Name: "power", Type: v1alpha1.TypeFloat64, Access: "r", Read: []v1alpha1.Read{{Topic: "lamps/${id}", Path: "power"}}},
			},
			Commands: []v1alpha1.Command{{Name: "blink", Write: v1alpha1.Write{Topic: "lamps/${id}/blink", Payload: `${times}`},
				Params: []v1alpha1.CommandParam{{Name: "times", Type: v1alpha1.TypeInt64, Required: true}}}},
		},
	}
}

func lampDevice(name string) *v1alpha1.Device {
	return &v1alpha1.Device{
		TypeMeta:   metav1.TypeMeta{APIVersion: v1alpha1.GroupAndVer, Kind: "Device"},
		ObjectMeta: metav1.ObjectMeta{Namespace: home, Name: name, UID: types.UID("uid-" + name), Generation: 1},
		Spec:       v1alpha1.DeviceSpec{ModelRef: v1alpha1.ModelRef{Name: "lamp"}, NodeName: node, Params: map[string]string{"id": name}},
	}
}

// client connects to the broker.
func (r *rig) client(user, password string) paho.Client {
	r.t.Helper()
	c := r.unconnected(user, password)
	eventually(r.t, "a connection to the broker", func() (bool, string) {
		token := c.Connect()
		token.Wait()
		return token.Error() == nil, fmt.Sprint(token.Error())
	})
	r.t.Cleanup(func() { c.Disconnect(10) })
	return c
}

var clients int

func (r *rig) unconnected(user, password string) paho.Client {
	clients++
	return paho.NewClient(paho.NewClientOptions().AddBroker("tcp://" + r.broker).SetClientID(fmt.Sprintf("c%d", clients)).
		SetUsername(user).SetPassword(password).SetAutoReconnect(false).SetOrderMatters(false).SetConnectTimeout(soon))
}

func publish(t *testing.T, c paho.Client, topic, payload string, retained bool) {
	t.Helper()
	token := c.Publish(topic, 1, retained, payload)
	if !token.WaitTimeout(soon) || token.Error() != nil {
		t.Fatalf("publish %s: %v", topic, token.Error())
	}
}

// heard is what came to a subscription.
type heard struct {
	t    *testing.T
	what string
	c    chan paho.Message
}

func subscribe(t *testing.T, c paho.Client, filter string) *heard {
	t.Helper()
	h := &heard{t, filter, make(chan paho.Message, 1000)}
	token := c.Subscribe(filter, 1, func(_ paho.Client, m paho.Message) { h.c <- m })
	if !token.WaitTimeout(soon) || token.Error() != nil {
		t.Fatalf("subscribe %s: %v", filter, token.Error())
	}
	return h
}

// next waits for a message that is as wanted.
func (h *heard) next(is func(m paho.Message) bool) paho.Message {
	h.t.Helper()
	timeout := time.After(soon)
	var last string
	for {
		select {
		case m := <-h.c:
			if is(m) {
				return m
			}
			last = m.Topic() + " " + string(m.Payload())
		case <-timeout:
			h.t.Fatalf("nothing as wanted came to %s; last %s", h.what, last)
			return nil
		}
	}
}

func any1(paho.Message) bool { return true }

func eventually(t *testing.T, what string, cond func() (bool, string)) {
	t.Helper()
	deadline := time.Now().Add(soon)
	for {
		ok, saw := cond()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited for %s; saw %s", what, saw)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func (r *rig) http() *http.Client {
	return &http.Client{Timeout: soon, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", r.cfg.Socket)
	}}}
}

type answer struct {
	code   int
	header http.Header
	body   string
}

func (r *rig) ask(token, method, path, body string, header ...string) answer {
	r.t.Helper()
	a, err := r.try(token, method, path, body, header...)
	if err != nil {
		r.t.Fatal(err)
	}
	return a
}

func (r *rig) try(token, method, path, body string, header ...string) (answer, error) {
	req, err := http.NewRequestWithContext(r.t.Context(), method, "http://x"+path, strings.NewReader(body))
	if err != nil {
		return answer{}, err
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := r.http().Do(req)
	if err != nil {
		return answer{}, err
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(res.Body)
	return answer{res.StatusCode, res.Header, string(raw)}, err
}

// twin waits for the device's twin to be as wanted.
func (r *rig) twin(name, what string, is func(d devicetwin.Doc) bool) (d devicetwin.Doc) {
	r.t.Helper()
	eventually(r.t, "twin "+name+" "+what, func() (bool, string) {
		a, err := r.try(full, http.MethodGet, "/v1/twins/home/"+name, "")
		d = devicetwin.Doc{}
		if err != nil {
			return false, err.Error()
		}
		if a.code != http.StatusOK || json.Unmarshal([]byte(a.body), &d) != nil {
			return false, fmt.Sprint(a)
		}
		return is(d), a.body
	})
	return d
}

func reports(prop, value string) func(devicetwin.Doc) bool {
	return func(d devicetwin.Doc) bool {
		p := d.Properties[prop].Reported
		return p != nil && string(p.Value) == value && p.Quality == v1alpha1.QualityGood
	}
}

// events reads server-sent events until one is as wanted, and returns it with
// its id.
type events struct {
	t    *testing.T
	body io.ReadCloser
	r    *bufio.Reader
}

func (r *rig) watch(path, since string) *events {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), 2*soon)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://x"+path+"?watch=1", nil)
	if err != nil {
		r.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+full)
	if since != "" {
		req.Header.Set("Last-Event-ID", since)
	}
	c := r.http()
	c.Timeout = 0
	res, err := c.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { cancel(); res.Body.Close() })
	if res.StatusCode != http.StatusOK || res.Header.Get("Content-Type") != "text/event-stream" {
		r.t.Fatalf("watch: %s", res.Status)
	}
	return &events{r.t, res.Body, bufio.NewReader(res.Body)}
}

func (e *events) next(is func(e Event) bool) (id string, ev Event) {
	e.t.Helper()
	for {
		var data []byte
		for {
			line, err := e.r.ReadBytes('\n')
			if err != nil {
				e.t.Fatalf("watch: %v", err)
			}
			line = bytes.TrimSuffix(line, []byte("\n"))
			if len(line) == 0 {
				break
			}
			if v, ok := bytes.CutPrefix(line, []byte("id: ")); ok {
				id = string(v)
			}
			if v, ok := bytes.CutPrefix(line, []byte("data: ")); ok {
				data = v
			}
		}
		if data == nil {
			continue
		}
		ev = Event{}
		if err := json.Unmarshal(data, &ev); err != nil {
			e.t.Fatalf("%s: %v", data, err)
		}
		if is(ev) {
			return id, ev
		}
	}
}

func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
