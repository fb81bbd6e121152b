package devices

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/skerry-io/skerry/cloudhub/controlplane"
	"github.com/skerry-io/skerry/cloudhub/controlplane/planetest"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
)

// TestOnPlane works with one real API server, for starting it takes longest.
func TestOnPlane(t *testing.T) {
	plane := planetest.Start(t, controlplane.Config{}, nil)
	client := dynamicClient(t, plane.HubClientConfig())
	admin := dynamicClient(t, plane.Admin)
	for range 2 { // a hub that starts again finds them there
		if err := Install(t.Context(), client, planetest.Log()); err != nil {
			t.Fatal(err)
		}
	}
	for _, ns := range []string{"home", "plant"} {
		if _, err := plane.Client.CoreV1().Namespaces().Create(t.Context(),
			&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("schemas and types agree", func(t *testing.T) { testRoundTrip(t, admin) })
	t.Run("refusals", func(t *testing.T) { testRefusals(t, admin) })
	t.Run("live", func(t *testing.T) { testLive(t, plane) })
}

func dynamicClient(t *testing.T, rc *rest.Config) dynamic.Interface {
	t.Helper()
	rc = rest.CopyConfig(rc)
	rc.QPS = -1
	c, err := dynamic.NewForConfig(rc)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func resourceOf(t *testing.T, kind string) (schema.GroupVersionResource, any) {
	t.Helper()
	switch kind {
	case "Device":
		return v1alpha1.Resource(v1alpha1.Devices), &v1alpha1.Device{}
	case "DeviceModel":
		return v1alpha1.Resource(v1alpha1.Models), &v1alpha1.DeviceModel{}
	case "DeviceDiscovery":
		return v1alpha1.Resource(v1alpha1.Discoveries), &v1alpha1.DeviceDiscovery{}
	case "TelemetryRoute":
		return v1alpha1.Resource(v1alpha1.Routes), &v1alpha1.TelemetryRoute{}
	}
	t.Fatalf("kind %q", kind)
	return schema.GroupVersionResource{}, nil
}

// manifests reads the documents of a YAML file, the repository's examples and
// this package's own.
func manifests(t *testing.T, files ...string) []*unstructured.Unstructured {
	t.Helper()
	var out []*unstructured.Unstructured
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for doc := range bytes.SplitSeq(b, []byte("\n---\n")) {
			u := &unstructured.Unstructured{}
			if err := yaml.Unmarshal(doc, &u.Object); err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			if u.GetAPIVersion() == "" {
				u.SetAPIVersion(v1alpha1.GroupAndVer)
			}
			if u.GroupVersionKind().Group == v1alpha1.Group {
				out = append(out, u)
			}
		}
	}
	return out
}

// testRoundTrip: what the API server takes decodes into the Go types without
// loss, and what these encode the API server takes without a word of unknown
// fields.
func testRoundTrip(t *testing.T, client dynamic.Interface) {
	files, err := filepath.Glob("../../deploy/examples/devices/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	strict := metav1.CreateOptions{FieldValidation: metav1.FieldValidationStrict}
	for _, u := range manifests(t, append(files, "testdata/examples.yaml")...) {
		what := u.GetKind() + " " + u.GetName()
		resource, typed := resourceOf(t, u.GetKind())
		in := client.Resource(resource).Namespace(u.GetNamespace())
		got, err := in.Create(t.Context(), u, strict)
		if err != nil {
			t.Errorf("%s: %v", what, err)
			continue
		}
		b, err := json.Marshal(got.Object)
		if err != nil {
			t.Fatal(err)
		}
		d := json.NewDecoder(bytes.NewReader(b))
		d.DisallowUnknownFields()
		if err := d.Decode(typed); err != nil {
			t.Errorf("%s: the type does not take what the schema does: %v", what, err)
			continue
		}
		if b, err = json.Marshal(typed); err != nil {
			t.Fatal(err)
		}
		again := &unstructured.Unstructured{}
		if err := again.UnmarshalJSON(b); err != nil {
			t.Fatal(err)
		}
		if err := in.Delete(t.Context(), u.GetName(), metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		again.SetResourceVersion("")
		again.SetUID("")
		second, err := in.Create(t.Context(), again, strict)
		if err != nil {
			t.Errorf("%s: the schema does not take what the type encodes: %v", what, err)
			continue
		}
		_, back := resourceOf(t, u.GetKind())
		if b, err = json.Marshal(second.Object); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(b, back); err != nil {
			t.Fatal(err)
		}
		if was, is := reflect.ValueOf(typed).Elem().FieldByName("Spec").Interface(), reflect.ValueOf(back).Elem().FieldByName("Spec").Interface(); !reflect.DeepEqual(was, is) {
			t.Errorf("%s: came back otherwise:\n%+v\n%+v", what, is, was)
		}
		// Examples share names.
		if err := in.Delete(t.Context(), u.GetName(), metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
}

// testRefusals: what can be told without the model is told at once.
func testRefusals(t *testing.T, client dynamic.Interface) {
	for manifest, want := range map[string]string{
		`{kind: DeviceModel, metadata: {name: bad}, spec: {profile: modbus, properties: []}}`:                                                                "spec.profile",
		`{kind: DeviceModel, metadata: {name: bad}, spec: {profile: raw, properties: [{name: a, type: enum, access: r}]}}`:                                   "needs its enum",
		`{kind: DeviceModel, metadata: {name: bad}, spec: {profile: raw, properties: [{name: a, type: int64, access: r, min: 2, max: 1}]}}`:                  "min is above max",
		`{kind: DeviceModel, metadata: {name: bad}, spec: {profile: raw, properties: [{name: a, type: bool, access: r}, {name: a, type: bool, access: r}]}}`: "Duplicate",
		`{kind: DeviceModel, metadata: {name: bad}, spec: {profile: raw, properties: [], liveness: {expectedInterval: soon}}}`:                               "expectedInterval",
		`{kind: DeviceModel, metadata: {name: bad}, spec: {profile: raw, properties: [], liveness: {expectedInterval: 999999999m}}}`:                         "expectedInterval",
		`{kind: TelemetryRoute, metadata: {name: bad, namespace: home}, spec: {to: [{}]}}`:                                                                   "exactly one",
		`{kind: TelemetryRoute, metadata: {name: bad, namespace: home}, spec: {to: [{webhook: {url: "file:///etc"}}]}}`:                                      "url",
		`{kind: TelemetryRoute, metadata: {name: bad, namespace: home}, spec: {to: [{hub: {}}]}}`:                                                            "exactly one",
		`{kind: Device, metadata: {name: bad, namespace: home}, spec: {nodeName: x}}`:                                                                        "modelRef",
		`{kind: Device, metadata: {name: bad, namespace: home}, spec: {modelRef: {name: m}, desierd: {}}}`:                                                   "desierd",
		`{kind: DeviceDiscovery, metadata: {name: bad, namespace: home}, spec: {source: {profile: tasmota}, mode: Suggest, limits: {maxDevices: 100000}}}`:   "maxDevices",
	} {
		u := &unstructured.Unstructured{}
		if err := yaml.Unmarshal([]byte(manifest), &u.Object); err != nil {
			t.Fatal(err)
		}
		u.SetAPIVersion(v1alpha1.GroupAndVer)
		resource, _ := resourceOf(t, u.GetKind())
		_, err := client.Resource(resource).Namespace(u.GetNamespace()).Create(t.Context(), u, metav1.CreateOptions{FieldValidation: metav1.FieldValidationStrict})
		if err == nil || !strings.Contains(err.Error(), want) || !apierrors.IsInvalid(err) && !apierrors.IsBadRequest(err) {
			t.Errorf("%s: %v; want a refusal that names %q", manifest, err, want)
		}
	}
}
