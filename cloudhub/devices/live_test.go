package devices

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/skerry-io/skerry/cloudhub/controlplane/planetest"
	"github.com/skerry-io/skerry/cloudhub/feed"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// liveWorld is a hub's part for devices over a real API server.
type liveWorld struct {
	t     *testing.T
	plane *planetest.Plane
	admin dynamic.Interface
	hub   *hub
	url   string
}

func startLive(t *testing.T, plane *planetest.Plane) *liveWorld {
	t.Helper()
	rc := rest.CopyConfig(plane.HubClientConfig())
	rc.QPS = -1
	client, err := kubernetes.NewForConfig(rc)
	if err != nil {
		t.Fatal(err)
	}
	dyn := dynamicClient(t, rc)
	f, err := feed.New(feed.Config{Client: client, Devices: dyn})
	if err != nil {
		t.Fatal(err)
	}
	d, err := New(Config{Client: client, Dynamic: dyn, Devices: f.Devices(), Models: f.Models(), Discoveries: f.Discoveries(), Routes: f.Routes()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 2)
	go func() { done <- f.Run(ctx) }()
	<-f.Ready()
	go func() { done <- d.Run(ctx) }()
	srv := httptest.NewServer(d.Handler("", nil, true))
	t.Cleanup(func() {
		srv.CloseClientConnections()
		srv.Close()
		cancel()
		for range 2 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	})
	return &liveWorld{t, plane, dynamicClient(t, plane.Admin), &hub{Devices: d}, srv.URL}
}

// token makes a service account of namespace home with rules, and a token.
func (w *liveWorld) token(name string, rules ...rbacv1.PolicyRule) string {
	w.t.Helper()
	ctx, client := w.t.Context(), w.plane.Client
	meta := metav1.ObjectMeta{Namespace: "home", Name: name}
	if _, err := client.CoreV1().ServiceAccounts("home").Create(ctx, &corev1.ServiceAccount{ObjectMeta: meta}, metav1.CreateOptions{}); err != nil {
		w.t.Fatal(err)
	}
	if _, err := client.RbacV1().Roles("home").Create(ctx, &rbacv1.Role{ObjectMeta: meta, Rules: rules}, metav1.CreateOptions{}); err != nil {
		w.t.Fatal(err)
	}
	if _, err := client.RbacV1().RoleBindings("home").Create(ctx, &rbacv1.RoleBinding{ObjectMeta: meta,
		RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: name}, Subjects: []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: "home", Name: name}}}, metav1.CreateOptions{}); err != nil {
		w.t.Fatal(err)
	}
	tok, err := client.CoreV1().ServiceAccounts("home").CreateToken(ctx, name, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		w.t.Fatal(err)
	}
	return tok.Status.Token
}

func (w *liveWorld) do(method, path, token, body string, header ...string) (int, http.Header, string) {
	w.t.Helper()
	req, err := http.NewRequestWithContext(w.t.Context(), method, w.url+path, strings.NewReader(body))
	if err != nil {
		w.t.Fatal(err)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		w.t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return res.StatusCode, res.Header, string(b)
}

func (w *liveWorld) apply(o any) *unstructured.Unstructured {
	w.t.Helper()
	u, err := toUnstructured(o)
	if err != nil {
		w.t.Fatal(err)
	}
	u.SetUID("")
	resource, _ := resourceOf(w.t, u.GetKind())
	got, err := w.admin.Resource(resource).Namespace(u.GetNamespace()).Create(w.t.Context(), u, metav1.CreateOptions{FieldValidation: metav1.FieldValidationStrict})
	if err != nil {
		w.t.Fatal(err)
	}
	return got
}

func (w *liveWorld) status(name string) v1alpha1.DeviceStatus {
	w.t.Helper()
	got, err := w.admin.Resource(v1alpha1.Resource(v1alpha1.Devices)).Namespace("home").Get(w.t.Context(), name, metav1.GetOptions{})
	if err != nil {
		w.t.Fatal(err)
	}
	b, err := got.MarshalJSON()
	if err != nil {
		w.t.Fatal(err)
	}
	var dev v1alpha1.Device
	if err := json.Unmarshal(b, &dev); err != nil {
		w.t.Fatal(err)
	}
	return dev.Status
}

func conditionOf(st v1alpha1.DeviceStatus, kind string) string {
	for _, c := range st.Conditions {
		if c.Type == kind {
			return string(c.Status) + "/" + c.Reason
		}
	}
	return ""
}

// testLive: a device's values, desired values and commands go both ways, and
// its status tells, with all the API server's judgement of who may what.
func testLive(t *testing.T, plane *planetest.Plane) {
	w := startLive(t, plane)
	model, dev := thermostat(), device("trv-1", "pi", 0, "20")
	model.TypeMeta = metav1.TypeMeta{APIVersion: v1alpha1.GroupAndVer, Kind: "DeviceModel"}
	dev.TypeMeta = metav1.TypeMeta{APIVersion: v1alpha1.GroupAndVer, Kind: "Device"}
	w.apply(model)
	uid := string(w.apply(dev).GetUID())
	planetest.Await(t, "the device at the hub", func() error { _, err := w.hub.twinOf("home", "trv-1"); return err })
	st := func(seq uint64, generation int64, desired string) edgeapi.TwinState {
		s := state("trv-1", 5, seq, generation)
		s.UID, s.Desired = uid, map[string]edgeapi.TwinDesired{"setpoint": {Generation: generation, State: desired}}
		return s
	}
	p := w.hub.dial(t, "pi", 5)
	p.agreed()
	p.frame([]edgeapi.TwinState{st(1, 1, "applied")}, val("trv-1", "temp", "20.5", 5, 2), val("trv-1", "setpoint", "20", 5, 3),
		val("trv-1", "note", `"`+strings.Repeat("x", 400)+`"`, 5, 4))

	edit := w.token("editor", rbacv1.PolicyRule{APIGroups: []string{v1alpha1.Group}, Resources: []string{"devices", "devices/twin", "devices/commands"}, Verbs: []string{"get", "list", "watch", "patch", "create"}})
	view := w.token("viewer", rbacv1.PolicyRule{APIGroups: []string{v1alpha1.Group}, Resources: []string{"devices/twin"}, Verbs: []string{"get", "list", "watch"}})
	none := w.token("nobody")

	t.Run("who may", func(t *testing.T) {
		patch := `{"desired":{"setpoint":21}}`
		for _, c := range []struct {
			method, path, token, body string
			want                      int
		}{
			{"GET", "/v1/twins/home/trv-1", "", "", 401},
			{"GET", "/v1/twins/home/trv-1", "nonsense", "", 401},
			{"GET", "/v1/twins/home/trv-1", none, "", 403},
			{"GET", "/v1/twins/home/trv-1", view, "", 200},
			{"GET", "/v1/twins/home/gone", view, "", 404},
			{"GET", "/v1/twins/home", view, "", 200},
			{"GET", "/v1/twins/plant", view, "", 403},
			{"GET", "/v1/twins", view, "", 403},
			{"GET", "/v1/twins?watch=1", view, "", 403},
			{"PATCH", "/v1/twins/home/trv-1", view, patch, 403},
			{"PATCH", "/v1/twins/home?labelSelector=room%3Dkitchen", none, patch, 403},
			{"PATCH", "/v1/twins/home", edit, patch, 400},
			{"PATCH", "/v1/twins/home/trv-1", edit, `{"desired":{"setpoint":99}}`, 422},
			{"PATCH", "/v1/twins/home/trv-1", edit, `{"desired":{"temp":1}}`, 422},
			{"PATCH", "/v1/twins/home/trv-1", edit, `{"spec":{}}`, 400},
			{"PATCH", "/v1/twins/home/trv-1", edit, `{"desired":{"note":"` + strings.Repeat("x", 2<<20) + `"}}`, 413},
			{"POST", "/v1/twins/home/trv-1/commands/boost", view, "{}", 403},
			{"POST", "/v1/twins/home/trv-1/commands/boost", edit, "{}", 422},
			{"POST", "/v1/twins/home/trv-1/commands/nosuch", edit, "{}", 404},
			{"POST", "/v1/twins/home/trv-1/refresh", view, "", 403},
			{"DELETE", "/v1/twins/home/trv-1", edit, "", 405},
		} {
			if got, _, body := w.do(c.method, c.path, c.token, c.body); got != c.want {
				t.Errorf("%s %s: %d %s, want %d", c.method, c.path, got, body, c.want)
			}
		}
	})

	t.Run("status", func(t *testing.T) {
		var got v1alpha1.DeviceStatus
		planetest.Await(t, "the status", func() error {
			if got = w.status("trv-1"); got.Phase != v1alpha1.PhaseOnline {
				return fmt.Errorf("%+v", got)
			}
			return nil
		})
		if got.Summary != "temp=20.5Cel setpoint=20" || got.ObservedGeneration != 1 || got.ReportedVersion != version(5, 4) || got.LastSeenTime == nil {
			t.Errorf("status %+v", got)
		}
		for kind, want := range map[string]string{
			v1alpha1.ConditionNodeConnected: "True/Connected", v1alpha1.ConditionDesiredValid: "True/Valid", v1alpha1.ConditionDesiredSynced: "True/Applied",
		} {
			if c := conditionOf(got, kind); c != want {
				t.Errorf("%s is %s, want %s", kind, c, want)
			}
		}
		if len(got.Properties) != 3 || !got.Properties[2].Truncated || len(got.Properties[2].Value.Raw) > maxStatusValue+2 {
			t.Errorf("properties %+v", got.Properties)
		}
	})

	t.Run("desired", func(t *testing.T) {
		_, header, _ := w.do("GET", "/v1/twins/home/trv-1", edit, "")
		etag := header.Get("ETag")
		code, _, body := w.do("PATCH", "/v1/twins/home/trv-1", edit, `{"desired":{"setpoint":21.5}}`, "If-Match", etag)
		if code != 200 || !strings.Contains(body, `"generation":2`) {
			t.Fatalf("%d %s", code, body)
		}
		if code, _, body := w.do("PATCH", "/v1/twins/home/trv-1", edit, `{"desired":{"setpoint":22}}`, "If-Match", etag); code != http.StatusPreconditionFailed {
			t.Errorf("%d %s, want 412: the ETag is old", code, body)
		}
		planetest.Await(t, "the change at the hub", func() error {
			twin, err := w.hub.twinOf("home", "trv-1")
			if err == nil && (twin.Generation != 2 || string(twin.Properties["setpoint"].Desired) != "21.5") {
				err = fmt.Errorf("%+v", twin)
			}
			return err
		})
		code, _, body = w.do("PATCH", "/v1/twins/home?labelSelector=room%3Dkitchen", edit, `{"desired":{"setpoint":null}}`)
		if code != 200 || !strings.Contains(body, `"code":200`) || strings.Count(body, "\n") != 1 {
			t.Errorf("bulk: %d %s", code, body)
		}
	})

	t.Run("as a person", func(t *testing.T) {
		// Who is no service account has groups; the API server judges by them.
		as := func(u *user.DefaultInfo) int {
			res := httptest.NewRecorder()
			req := httptest.NewRequestWithContext(t.Context(), "PATCH", "/skerry/v1/twins/home/trv-1", strings.NewReader(`{"desired":{"setpoint":25}}`))
			w.hub.Handler("/skerry", func(*http.Request) (user.Info, error) { return u, nil }, false).ServeHTTP(res, req)
			return res.Code
		}
		if got := as(&user.DefaultInfo{Name: "jane", Groups: []string{"system:masters", "system:authenticated"}}); got != 200 {
			t.Errorf("an administrator: %d", got)
		}
		if _, err := plane.Client.RbacV1().RoleBindings("home").Create(t.Context(), &rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Name: "operators"},
			RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: "editor"}, Subjects: []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: "Group", Name: "operators"}}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		planetest.Await(t, "an operator's right", func() error {
			if got := as(&user.DefaultInfo{Name: "ann", Groups: []string{"operators", "system:authenticated"}}); got != 200 {
				return fmt.Errorf("an operator: %d", got)
			}
			return nil
		})
		if got := as(&user.DefaultInfo{Name: "joe", Groups: []string{"system:authenticated"}}); got != 403 {
			t.Errorf("anybody: %d", got)
		}
	})

	t.Run("discovery", func(t *testing.T) {
		dd := &v1alpha1.DeviceDiscovery{
			TypeMeta: metav1.TypeMeta{APIVersion: v1alpha1.GroupAndVer, Kind: "DeviceDiscovery"}, ObjectMeta: metav1.ObjectMeta{Namespace: "home", Name: "found"},
			Spec: v1alpha1.DeviceDiscoverySpec{Source: v1alpha1.DiscoverySource{Profile: "tasmota"}, Mode: v1alpha1.DiscoveryCreate, Template: v1alpha1.DiscoveryTemplate{ModelRef: v1alpha1.ModelRef{Name: "trv"}}},
		}
		w.apply(dd)
		ref := refOf("home", "found")
		planetest.Await(t, "the discovery at the hub", func() error {
			w.hub.Devices.mu.Lock()
			defer w.hub.Devices.mu.Unlock()
			if w.hub.found[ref] == nil {
				return errors.New("not there")
			}
			return nil
		})
		p.send(edgeapi.TwinFound{Discovery: ref, Candidates: []edgeapi.TwinCandidate{{Name: "tasmota-x-1", Params: map[string]string{"topic": "x"}, LastSeen: time.Now().UnixMilli()}}})
		planetest.Await(t, "the Device and the discovery's status", func() error {
			if _, err := w.hub.twinOf("home", "tasmota-x-1"); err != nil {
				return err
			}
			got, err := w.admin.Resource(v1alpha1.Resource(v1alpha1.Discoveries)).Namespace("home").Get(t.Context(), "found", metav1.GetOptions{})
			if err != nil {
				return err
			}
			if n, _, _ := unstructured.NestedInt64(got.Object, "status", "found"); n != 1 {
				return fmt.Errorf("status %v", got.Object["status"])
			}
			return nil
		})
		// It is kept out of what the other tests select.
		if err := w.admin.Resource(v1alpha1.Resource(v1alpha1.Discoveries)).Namespace("home").Delete(t.Context(), "found", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		if err := w.admin.Resource(v1alpha1.Resource(v1alpha1.Devices)).Namespace("home").Delete(t.Context(), "tasmota-x-1", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	})

	t.Run("command", func(t *testing.T) {
		asked := make(chan edgeapi.TwinRequest, 1)
		go func() {
			m, err := p.conn.Receive()
			r, ok := m.(edgeapi.TwinRequest)
			if err != nil || !ok {
				close(asked)
				return
			}
			asked <- r
			_ = p.conn.Send(edgeapi.TwinReply{ID: r.ID, Code: 200, Body: json.RawMessage(`{"state":"succeeded"}`)})
		}()
		code, _, body := w.do("POST", "/v1/twins/home/trv-1/commands/boost?timeout=3s", edit, `{"id":"k1","args":{"minutes":5}}`)
		r := <-asked
		var c edgeapi.TwinCommand
		if err := json.Unmarshal(r.Body, &c); err != nil || code != 200 || !strings.Contains(body, "succeeded") || c.ID != "k1" || r.Timeout != 3000 || r.By != "system:serviceaccount:home:editor" {
			t.Errorf("%d %s; asked %+v, %v", code, body, r, err)
		}
	})

	t.Run("watch", func(t *testing.T) { testWatch(t, w, p, view) })

	t.Run("through the API server", func(t *testing.T) {
		// Of the plane alone there is no handler; its authorization is there.
		err := plane.Client.CoreV1().RESTClient().Get().AbsPath("/skerry/v1/twins/home/trv-1").Do(t.Context()).Error()
		if err == nil || !strings.Contains(err.Error(), "could not find") {
			t.Errorf("%v, want not found", err)
		}
	})
}

func testWatch(t *testing.T, w *liveWorld, p *peer, token string) {
	open := func(resume string) (func() event, func()) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		req, err := http.NewRequestWithContext(ctx, "GET", w.url+"/v1/twins/home?watch=1&labelSelector=room%3Dkitchen&resume="+resume, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+token)
		req.Header.Set("Accept", "text/event-stream")
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(res.Body)
		lines.Buffer(nil, 1<<20)
		return func() event {
			t.Helper()
			for lines.Scan() {
				if data, ok := strings.CutPrefix(lines.Text(), "data: "); ok {
					var e event
					if err := json.Unmarshal([]byte(data), &e); err != nil {
						t.Fatal(err)
					}
					return e
				}
			}
			t.Fatalf("the watch ended: %v", errors.Join(lines.Err(), ctx.Err()))
			return event{}
		}, func() { res.Body.Close(); cancel() }
	}
	next, end := open("")
	if e := next(); e.Type != eventSnapshot || e.Twin.Name != "trv-1" {
		t.Errorf("first %+v", e)
	}
	e := next()
	if e.Type != eventSynced || e.Resume == "" {
		t.Errorf("then %+v, want synced", e)
	}
	p.frame(nil, val("trv-1", "temp", "22.5", 5, 100))
	for {
		if e = next(); e.Type == eventUpdate && string(e.Twin.Properties["temp"].Reported.Value) == "22.5" {
			break
		}
	}
	resume := e.Resume
	end()
	p.frame(nil, val("trv-1", "temp", "23", 5, 101))
	next, end = open(resume)
	if e := next(); e.Type != eventUpdate || string(e.Twin.Properties["temp"].Reported.Value) != "23" {
		t.Errorf("after the resume %+v, want what changed meanwhile and no snapshot", e)
	}
	if err := w.admin.Resource(v1alpha1.Resource(v1alpha1.Devices)).Namespace("home").Delete(t.Context(), "trv-1", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	for {
		if e = next(); e.Type == eventDelete {
			break
		}
	}
	end()
	next, end = open("another-7")
	if e := next(); e.Type != eventSynced {
		t.Errorf("%+v, want an empty snapshot: the token is of another life", e)
	}
	end()
}
