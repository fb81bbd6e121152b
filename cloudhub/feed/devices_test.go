package feed

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"sigs.k8s.io/yaml"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// deviceWorld is a cluster with devices, in the part of it that the feed reads.
type deviceWorld struct {
	t      *testing.T
	client *dynamicfake.FakeDynamicClient
}

func startDevices(t *testing.T, core []any, manifests ...string) (deviceWorld, *Feed) {
	t.Helper()
	dyn := dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{
		v1alpha1.Resource(v1alpha1.Devices):     "DeviceList",
		v1alpha1.Resource(v1alpha1.Models):      "DeviceModelList",
		v1alpha1.Resource(v1alpha1.Discoveries): "DeviceDiscoveryList",
		v1alpha1.Resource(v1alpha1.Routes):      "TelemetryRouteList",
	})
	w := deviceWorld{t, dyn}
	for _, m := range manifests {
		w.create(m)
	}
	_, f := startWith(t, Config{Devices: dyn}, core...)
	return w, f
}

func (w deviceWorld) object(manifest string) (*unstructured.Unstructured, schema.GroupVersionResource) {
	w.t.Helper()
	u := &unstructured.Unstructured{}
	if err := yaml.Unmarshal([]byte(manifest), &u.Object); err != nil {
		w.t.Fatal(err)
	}
	u.SetAPIVersion(v1alpha1.GroupAndVer)
	if u.GetUID() == "" {
		u.SetUID(types.UID(strings.ToLower(u.GetKind()) + "-" + u.GetName()))
	}
	resource := map[string]string{
		"Device": v1alpha1.Devices, "DeviceModel": v1alpha1.Models, "DeviceDiscovery": v1alpha1.Discoveries, "TelemetryRoute": v1alpha1.Routes,
	}[u.GetKind()]
	return u, v1alpha1.Resource(resource)
}

func (w deviceWorld) create(manifest string) {
	w.t.Helper()
	u, r := w.object(manifest)
	if _, err := w.client.Resource(r).Namespace(u.GetNamespace()).Create(context.Background(), u, metav1.CreateOptions{}); err != nil {
		w.t.Fatal(err)
	}
}

func (w deviceWorld) update(manifest string) {
	w.t.Helper()
	u, r := w.object(manifest)
	if _, err := w.client.Resource(r).Namespace(u.GetNamespace()).Update(context.Background(), u, metav1.UpdateOptions{}); err != nil {
		w.t.Fatal(err)
	}
}

// names lists what the node has of the devices' API and of Secrets.
func (e *edge) names() []string {
	var out []string
	for ref := range e.have {
		switch ref.Resource {
		case v1alpha1.Devices, v1alpha1.Models, v1alpha1.Discoveries, v1alpha1.Routes, "secrets":
			out = append(out, ref.Resource+"/"+ref.Name)
		}
	}
	slices.Sort(out)
	return out
}

func (e *edge) wantNames(want ...string) {
	e.t.Helper()
	if got := e.names(); !slices.Equal(got, want) {
		e.t.Fatalf("the node has %q, want %q", got, want)
	}
}

func secret(name string) *corev1.Secret {
	return &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "home", Name: name, UID: types.UID("secret-" + name)}}
}

func labelled(name, site string) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("node-" + name), Labels: map[string]string{"site": site}}}
}

const (
	plugModel = `{kind: DeviceModel, metadata: {name: plug}, spec: {profile: tasmota, properties: [{name: relay, type: bool, access: rw}]}}`
	plug      = `{kind: Device, metadata: {namespace: home, name: plug-1, generation: 1}, spec: {modelRef: {name: plug}, nodeName: pi-1, credentialsSecret: plug-1}}`
	route     = `{kind: TelemetryRoute, metadata: {namespace: home, name: energy}, spec: {to: [{webhook: {url: "https://x/", secretRef: {name: hook}}}, {hub: {webhook: {url: "https://y/", secretRef: {name: behind-hub}}}}]}}`
	find      = `{kind: DeviceDiscovery, metadata: {namespace: home, name: find}, spec: {nodeSelector: {site: home}, source: {profile: tasmota}}}`
)

// TestNodeGetsItsDevices: a device comes with its model, its credentials, the
// routes of its namespace and the Secrets of their sinks, but for those that
// the hub reaches; with the last device all of it goes.
func TestNodeGetsItsDevices(t *testing.T) {
	w, f := startDevices(t, []any{labelled("pi-1", "away"), labelled("pi-2", "home"), secret("plug-1"), secret("hook"), secret("behind-hub"), secret("other")},
		plugModel, plug, route, find,
		`{kind: DeviceModel, metadata: {name: unused}, spec: {profile: raw, properties: []}}`,
		`{kind: TelemetryRoute, metadata: {namespace: elsewhere, name: r}, spec: {to: []}}`)
	e := connect(t, f, "pi-1", nil)
	e.sync()
	all := []string{"devicemodels/plug", "devices/plug-1", "secrets/hook", "secrets/plug-1", "telemetryroutes/energy"}
	e.wantNames(all...)

	// The model stands before the device, and the device tells no status.
	body := e.have[edgeapi.Ref{Resource: v1alpha1.Devices, Namespace: "home", Name: "plug-1"}].Body
	var d v1alpha1.Device
	if err := json.Unmarshal(body, &d); err != nil || d.Kind != "Device" || d.APIVersion != v1alpha1.GroupAndVer || strings.Contains(string(body), `"status"`) {
		t.Fatalf("body %s: %v", body, err)
	}

	// A new route of the namespace comes, one that went goes.
	w.create(`{kind: TelemetryRoute, metadata: {namespace: home, name: alarms}, spec: {to: [{mqtt: {url: "mqtts://b", topic: t, secretRef: {name: other}}}]}}`)
	for !slices.Contains(e.names(), "secrets/other") {
		e.delta()
	}
	if err := w.client.Resource(v1alpha1.Resource(v1alpha1.Routes)).Namespace("home").Delete(t.Context(), "alarms", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	for slices.Contains(e.names(), "secrets/other") {
		e.delta()
	}
	e.wantNames(all...)

	// Moved to another node: all goes there.
	w.update(strings.Replace(strings.Replace(plug, "pi-1", "pi-2", 1), "generation: 1", "generation: 2", 1))
	for len(e.names()) > 0 {
		e.delta()
	}
	other := connect(t, f, "pi-2", nil)
	other.sync()
	other.wantNames(append([]string{"devicediscoveries/find"}, all...)...)
}

// TestDeviceStatusIsNoDelta: what the hub writes of a device does not come back
// to the node.
func TestDeviceStatusIsNoDelta(t *testing.T) {
	w, f := startDevices(t, []any{labelled("pi-1", "home")}, plugModel, plug)
	e := connect(t, f, "pi-1", nil)
	e.sync()
	w.update(strings.TrimSuffix(plug, "}") + `, status: {phase: Online, reportedVersion: 9f3c01aa77e2b410/1/2}}`)
	w.create(strings.Replace(plug, "plug-1, gen", "plug-2, gen", 1))
	d := e.delta()
	if len(d.Upserts) != 1 || d.Upserts[0].Name != "plug-2" {
		t.Fatalf("got %+v, want plug-2 alone", d)
	}
}

// TestDiscoveryFollowsLabels: a node that gets another label is looked on, and
// no more once the label has gone.
func TestDiscoveryFollowsLabels(t *testing.T) {
	w, f := startDevices(t, []any{labelled("pi-1", "away")}, find)
	e := connect(t, f, "pi-1", nil)
	e.sync()
	e.wantNames()
	relabel := func(site string) {
		t.Helper()
		if _, err := f.client.CoreV1().Nodes().Update(t.Context(), labelled("pi-1", site), metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	relabel("home")
	for len(e.names()) == 0 {
		e.delta()
	}
	e.wantNames("devicediscoveries/find")
	relabel("away")
	for len(e.names()) > 0 {
		e.delta()
	}
	relabel("home")
	for len(e.names()) == 0 {
		e.delta()
	}
	w.update(strings.Replace(find, "site: home", "site: barn", 1))
	for len(e.names()) > 0 {
		e.delta()
	}
}

// TestUndecodableDevice: an object that this hub cannot read goes to nobody and
// stops nothing.
func TestUndecodableDevice(t *testing.T) {
	_, f := startDevices(t, []any{labelled("pi-1", "home")}, plugModel, plug,
		`{kind: Device, metadata: {namespace: home, name: odd}, spec: {modelRef: plug, nodeName: pi-1}}`,
		`{kind: Device, metadata: {namespace: home, name: odd-status}, spec: {modelRef: {name: plug}, nodeName: pi-1}, status: {lastSeenTime: yesterday}}`)
	e := connect(t, f, "pi-1", nil)
	e.sync()
	e.wantNames("devicemodels/plug", "devices/odd-status", "devices/plug-1")
}

// TestDesiredTimesGoDown: the authority lww goes by when a value was set, which
// only the API server knows.
func TestDesiredTimesGoDown(t *testing.T) {
	timed := strings.Replace(plug, "metadata: {", `metadata: {managedFields: [
		{manager: kubectl, operation: Update, time: "2026-11-20T08:00:00Z", fieldsType: FieldsV1, fieldsV1: {"f:spec": {"f:desired": {"f:relay": {}}}}},
		{manager: hub, operation: Update, subresource: status, time: "2026-11-21T08:00:00Z", fieldsV1: {"f:status": {"f:phase": {}}}}], `, 1)
	_, f := startDevices(t, []any{labelled("pi-1", "home")}, plugModel, timed)
	e := connect(t, f, "pi-1", nil)
	for {
		d := e.delta()
		for _, u := range d.Upserts {
			if u.Resource != v1alpha1.Devices {
				continue
			}
			var got v1alpha1.Device
			if err := json.Unmarshal(u.Body, &got); err != nil {
				t.Fatal(err)
			}
			if a := got.Annotations[v1alpha1.AnnotationDesiredTimes]; a != `{"relay":"2026-11-20T08:00:00Z"}` || len(got.ManagedFields) > 0 {
				t.Errorf("annotation %s, managed fields %v", a, got.ManagedFields)
			}
			return
		}
		if d.Synced {
			t.Fatal("no Device came")
		}
	}
}
