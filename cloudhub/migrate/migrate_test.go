package migrate

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/value"
)

var update = flag.Bool("update", false, "write the golden files")

func TestGolden(t *testing.T) {
	inputs, err := filepath.Glob("testdata/*.in.yaml")
	if err != nil || len(inputs) == 0 {
		t.Fatal(inputs, err)
	}
	for _, in := range inputs {
		name := strings.TrimSuffix(filepath.Base(in), ".in.yaml")
		t.Run(name, func(t *testing.T) {
			data, err := os.ReadFile(in)
			if err != nil {
				t.Fatal(err)
			}
			res, err := KubeEdge(bytes.NewReader(data), Options{})
			if err != nil {
				t.Fatal(err)
			}
			var report bytes.Buffer
			if err := res.WriteReport(&report); err != nil {
				t.Fatal(err)
			}
			golden(t, "testdata/"+name+".out.yaml", res.YAML)
			golden(t, "testdata/"+name+".report", report.Bytes())
			decodeOutput(t, res)
		})
	}
}

func golden(t *testing.T, path string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs; look at what -update makes of it:\n%s", path, got)
	}
}

type output struct {
	models  map[string]*v1alpha1.DeviceModel
	devices map[string]*v1alpha1.Device
	routes  map[string]*v1alpha1.TelemetryRoute
}

// decodeOutput reads what was written strictly, and checks that its parts fit.
func decodeOutput(t testing.TB, res *Result) output {
	t.Helper()
	out := output{map[string]*v1alpha1.DeviceModel{}, map[string]*v1alpha1.Device{}, map[string]*v1alpha1.TelemetryRoute{}}
	for _, doc := range strings.Split(string(res.YAML), "---\n") {
		if doc == "" {
			continue
		}
		var o object
		if err := yaml.Unmarshal([]byte(doc), &o); err != nil {
			t.Fatalf("%v in:\n%s", err, doc)
		}
		var err error
		fresh := true
		key := o.Metadata.Namespace + "/" + o.Metadata.Name
		switch o.Kind {
		case "DeviceModel":
			m := &v1alpha1.DeviceModel{}
			err = yaml.UnmarshalStrict([]byte(doc), m)
			fresh = out.models[m.Name] == nil
			out.models[m.Name] = m
		case "Device":
			d := &v1alpha1.Device{}
			err = yaml.UnmarshalStrict([]byte(doc), d)
			fresh = out.devices[key] == nil
			out.devices[key] = d
		case "TelemetryRoute":
			r := &v1alpha1.TelemetryRoute{}
			err = yaml.UnmarshalStrict([]byte(doc), r)
			fresh = out.routes[key] == nil
			out.routes[key] = r
		default:
			t.Fatalf("kind %q", o.Kind)
		}
		if err != nil {
			t.Fatalf("%v in:\n%s", err, doc)
		}
		if !fresh {
			t.Fatalf("%s %s twice", o.Kind, key)
		}
	}
	for key, d := range out.devices {
		m := out.models[d.Spec.ModelRef.Name]
		if m == nil {
			t.Fatalf("Device %s: no model %s", key, d.Spec.ModelRef.Name)
		}
		if bad := value.CheckDesired(m, d.Spec.Desired); bad != nil {
			t.Fatalf("Device %s: %v", key, bad)
		}
		for _, p := range m.Spec.Params {
			if _, ok := d.Spec.Params[p.Name]; p.Required && !ok {
				t.Fatalf("Device %s lacks param %s", key, p.Name)
			}
		}
		for _, p := range m.Spec.Properties {
			if p.Telemetry != "" && out.routes[d.Namespace+"/"+p.Telemetry] == nil {
				t.Fatalf("Device %s, property %s: no route %s", key, p.Name, p.Telemetry)
			}
		}
	}
	return out
}

// Thousands of devices of one model are of one model again.
func TestManyDevicesOneModel(t *testing.T) {
	in := &strings.Builder{}
	in.WriteString("apiVersion: devices.kubeedge.io/v1beta1\nkind: DeviceModel\nmetadata: {name: th}\nspec: {protocol: mqtt, properties: [{name: t, type: FLOAT, accessMode: ReadOnly}]}\n")
	for i := range 3000 {
		fmt.Fprintf(in, "---\napiVersion: devices.kubeedge.io/v1beta1\nkind: Device\nmetadata: {name: d%d}\nspec: {deviceModelRef: {name: th}, nodeName: n1, protocol: {protocolName: mqtt}, properties: [{name: t, visitors: {protocolName: mqtt, configData: {topic: site/%d/t, path: v}}}]}\n", i, i)
	}
	res, err := KubeEdge(strings.NewReader(in.String()), Options{})
	if err != nil {
		t.Fatal(err)
	}
	out := decodeOutput(t, res)
	if len(out.models) != 1 || len(out.devices) != 3000 {
		t.Fatalf("%d models, %d devices", len(out.models), len(out.devices))
	}
	if got := out.devices["default/d17"].Spec.Params["t_topic"]; got != "site/17/t" {
		t.Errorf("d17 is at %q", got)
	}
	if len(res.Findings) != 0 {
		t.Errorf("findings: %v", res.Findings[:min(3, len(res.Findings))])
	}
}

func TestCycleUnit(t *testing.T) {
	const in = `apiVersion: devices.kubeedge.io/v1beta1
kind: DeviceModel
metadata: {name: m}
spec: {protocol: modbus, properties: [{name: t, type: INT, accessMode: ReadOnly}]}
---
apiVersion: devices.kubeedge.io/v1beta1
kind: Device
metadata: {name: d}
spec: {deviceModelRef: {name: m}, nodeName: n1, protocol: {protocolName: modbus}, properties: [{name: t, collectCycle: %s}]}
`
	for _, c := range []struct {
		cycle string
		unit  time.Duration
		want  time.Duration
		says  string
	}{
		{"10000", 0, 10 * time.Second, ""},
		{"10000000", 0, 10000 * time.Second, "if nanoseconds were meant (10ms)"},
		{"10000000000", 0, 0, "if nanoseconds were meant (10s), convert with --cycle-unit ns"},
		{"10000000000", time.Nanosecond, 10 * time.Second, ""},
		{"9223372036854775807", 0, 0, "no time between two looks"},
		{"-5", 0, 0, "no time between two looks"},
	} {
		res, err := KubeEdge(strings.NewReader(fmt.Sprintf(in, c.cycle)), Options{CycleUnit: c.unit})
		if err != nil {
			t.Fatal(err)
		}
		out := decodeOutput(t, res)
		var got time.Duration
		if r := out.models["m"].Spec.Properties[0].Refresh; r != nil {
			got = r.Interval.Duration
		}
		if got != c.want {
			t.Errorf("%s × %s: every %s; want %s", c.cycle, c.unit, got, c.want)
		}
		if told := slices.ContainsFunc(res.Findings, func(f Finding) bool { return strings.Contains(f.String(), c.says) }); c.says != "" && !told || c.says == "" && len(res.Findings) > 0 {
			t.Errorf("%s × %s: findings %v; want %q", c.cycle, c.unit, res.Findings, c.says)
		}
	}
}

func TestSecretsAreNotInTheReport(t *testing.T) {
	data, err := os.ReadFile("testdata/awkward.in.yaml")
	if err != nil {
		t.Fatal(err)
	}
	res, err := KubeEdge(bytes.NewReader(data), Options{})
	if err != nil {
		t.Fatal(err)
	}
	var report bytes.Buffer
	if err := res.WriteReport(&report); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(report.String(), "hunter2") {
		t.Error("the report tells a password")
	}
}

func TestUnreadable(t *testing.T) {
	deep := strings.Repeat("[", 20000)
	for name, in := range map[string]io.Reader{
		"not YAML":         strings.NewReader("a: [b"),
		"no kind":          strings.NewReader("a: b"),
		"a key twice":      strings.NewReader("kind: A\nkind: B"),
		"deep":             strings.NewReader(deep),
		"no name":          strings.NewReader("apiVersion: devices.kubeedge.io/v1beta1\nkind: Device"),
		"too much":         io.LimitReader(spaces{}, MaxInput+1),
		"cannot be read":   broken{},
		"a billion laughs": strings.NewReader(laughs()),
	} {
		if _, err := KubeEdge(in, Options{}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := KubeEdge(strings.NewReader(""), Options{Profile: "tasmota"}); err == nil {
		t.Error("a profile that makes no sense was taken")
	}
}

type spaces struct{}

func (spaces) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = '\n'
	}
	return len(p), nil
}

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, errors.New("broken") }

func laughs() string {
	b := &strings.Builder{}
	b.WriteString("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n")
	for i := 1; i < 10; i++ {
		fmt.Fprintf(b, "a%d: &a%d [", i, i)
		for j := range 10 {
			if j > 0 {
				b.WriteByte(',')
			}
			fmt.Fprintf(b, "*a%d", i-1)
		}
		b.WriteString("]\n")
	}
	return b.String()
}

func FuzzKubeEdge(f *testing.F) {
	inputs, err := filepath.Glob("testdata/*.in.yaml")
	if err != nil {
		f.Fatal(err)
	}
	for _, in := range inputs {
		data, err := os.ReadFile(in)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, "")
		f.Add(data, "kubeedge")
	}
	f.Fuzz(func(t *testing.T, data []byte, profile string) {
		res, err := KubeEdge(bytes.NewReader(data), Options{Profile: profile})
		if err != nil {
			return
		}
		decodeOutput(t, res)
		for _, finding := range res.Findings {
			if _, err := json.Marshal(finding); err != nil || strings.ContainsAny(finding.String(), "\n\x1b") {
				t.Errorf("%q", finding.String())
			}
		}
	})
}
