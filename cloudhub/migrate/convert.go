package migrate

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/value"
)

// Options are what the manifests do not tell.
type Options struct {
	// CycleUnit is that of collectCycle and reportCycle; zero means a
	// millisecond, as KubeEdge's mappers take it.
	CycleUnit time.Duration
	// Profile for what is not reached by MQTT: external or kubeedge. Empty:
	// kubeedge from v1alpha2, else external.
	Profile string
}

// Result is what came of it.
type Result struct {
	YAML                          []byte
	Findings                      []Finding
	Models, Devices, Routes, Read int
}

// KubeEdge converts the manifests of in. Its error is for what cannot be read
// at all; all else is among the findings.
func KubeEdge(in io.Reader, opts Options) (*Result, error) {
	if opts.CycleUnit == 0 {
		opts.CycleUnit = time.Millisecond
	}
	switch opts.Profile {
	case "", v1alpha1.ProfileExternal, v1alpha1.ProfileKubeEdge:
	default:
		return nil, fmt.Errorf("profile %q: use %s or %s", opts.Profile, v1alpha1.ProfileExternal, v1alpha1.ProfileKubeEdge)
	}
	res := &Result{}
	s, err := read(in, &res.Findings)
	if err != nil {
		return nil, err
	}
	res.Read = s.read
	c := &converter{opts: opts, res: res, models: map[string]*modelV1beta1{}, names: map[string]string{}, taken: map[string]bool{}, routed: map[string]bool{}}
	c.nameModels(s.models)
	c.convert(s)
	if err := c.write(); err != nil {
		return nil, err
	}
	return res, nil
}

type converter struct {
	opts Options
	res  *Result

	models map[string]*modelV1beta1 // by namespace/name
	names  map[string]string        // of the models here, by namespace/name there
	taken  map[string]bool          // names here
	routed map[string]bool          // namespace/name of routes

	outModels  []*v1alpha1.DeviceModel
	outDevices []*v1alpha1.Device
	outRoutes  []*v1alpha1.TelemetryRoute
}

func namespaceOf(m *meta) string {
	if m.Namespace == "" {
		return "default"
	}
	return m.Namespace
}

// nameModels settles how each model is called in the cluster.
func (c *converter) nameModels(models []*modelV1beta1) {
	first := map[string]*modelV1beta1{}
	for _, m := range models {
		c.taken[m.Metadata.Name] = true // whoever has to yield does not take another's
	}
	for _, m := range models {
		key := namespaceOf(&m.Metadata) + "/" + m.Metadata.Name
		r := c.reporter("DeviceModel", &m.Metadata)
		if c.models[key] != nil {
			r.lost("", "it is there twice; the first one counts", "")
			continue
		}
		c.models[key] = m
		c.metadata(r, &m.Metadata)
		name := m.Metadata.Name
		other := first[name]
		switch {
		case other == nil:
			first[name] = m
		case equalJSON(other.Spec, m.Spec): // one for both
		default:
			name = c.free(namespaceOf(&m.Metadata) + "-" + name)
			r.check("metadata.name", fmt.Sprintf("models are the cluster's, and %s has another one of this name: here it is %s", namespaceOf(&other.Metadata), name), "")
		}
		c.names[key] = name
	}
}

// free is name, or the first of name-2, name-3 that nobody has.
func (c *converter) free(name string) string {
	if len(name) > 240 {
		name = strings.TrimRight(name[:240], ".-")
	}
	for n := 1; ; n++ {
		try := name
		if n > 1 {
			try += "-" + strconv.Itoa(n)
		}
		if !c.taken[try] {
			c.taken[try] = true
			return try
		}
	}
}

func equalJSON(a, b any) bool {
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && bytes.Equal(x, y)
}

// variant is a model as some of its devices have it.
type variant struct {
	model   *v1alpha1.DeviceModel
	devices []*v1alpha1.Device
	routes  map[string][]v1alpha1.RouteSink // by name
}

// convert goes through the devices model by model.
func (c *converter) convert(s *set) {
	variants := map[string][]*variant{} // by name of the model here
	byShape := map[string]*variant{}
	seen := map[string]bool{}
	for _, d := range s.devices {
		ns := namespaceOf(&d.Metadata)
		r := c.reporter("Device", &d.Metadata)
		if seen[ns+"/"+d.Metadata.Name] {
			r.lost("", "it is there twice; the first one counts", "")
			continue
		}
		seen[ns+"/"+d.Metadata.Name] = true
		key := ns + "/" + d.Spec.DeviceModelRef.Name
		src := c.models[key]
		if src == nil {
			r.lost("", fmt.Sprintf("its model %s is not among the manifests, and without it no value has a type", key), "convert both together")
			continue
		}
		name := c.names[key]
		v := c.device(r, d, src, name)
		shape, err := json.Marshal([]any{name, v.model.Spec, v.routes})
		if err != nil {
			r.unreadable(err)
			continue
		}
		if same := byShape[string(shape)]; same != nil {
			same.devices = append(same.devices, v.devices...)
			continue
		}
		byShape[string(shape)] = v
		variants[name] = append(variants[name], v)
	}
	done := map[string]bool{}
	for _, src := range s.models {
		key := namespaceOf(&src.Metadata) + "/" + src.Metadata.Name
		name, ok := c.names[key]
		if !ok || c.models[key] != src || done[name] {
			continue
		}
		done[name] = true
		r := c.reporter("DeviceModel", &src.Metadata)
		if len(variants[name]) == 0 {
			variants[name] = []*variant{{model: c.modelAlone(r, src, name)}}
		}
		for i, v := range variants[name] {
			if i > 0 {
				v.model.Name = c.free(name + "-" + strconv.Itoa(i+1))
				r.check("", fmt.Sprintf("Device %s/%s and those like it are reached, reported or pushed otherwise than others of this model: theirs is %s",
					v.devices[0].Namespace, v.devices[0].Name, v.model.Name), "")
			}
			c.keep(r, v)
		}
	}
}

// keep takes the variant into what is written.
func (c *converter) keep(r *reporter, v *variant) {
	renamed := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(v.routes)) {
		renamed[name] = c.free(v.model.Name + "-" + name)
	}
	for i := range v.model.Spec.Properties {
		p := &v.model.Spec.Properties[i]
		p.Telemetry = renamed[p.Telemetry]
		if _, err := value.Compile(p); err != nil {
			r.check(fmt.Sprintf("spec.properties[%s]", p.Name), err.Error(), "mend it in what was written")
		}
	}
	v.model.Spec.Params = params(v)
	c.outModels = append(c.outModels, v.model)
	for _, d := range v.devices {
		d.Spec.ModelRef.Name = v.model.Name
		rd := &reporter{object: "Device " + d.Namespace + "/" + d.Name, to: &c.res.Findings}
		bad := value.CheckDesired(v.model, d.Spec.Desired)
		for _, name := range slices.Sorted(maps.Keys(bad)) {
			rd.lost(fmt.Sprintf("spec.properties[%s].desired.value", name), bad[name].Error(), "set spec.desired."+name)
			delete(d.Spec.Desired, name)
		}
		if len(d.Spec.Desired) == 0 {
			d.Spec.Desired = nil
		}
		c.outDevices = append(c.outDevices, d)
		for _, name := range slices.Sorted(maps.Keys(v.routes)) {
			if key := d.Namespace + "/" + renamed[name]; !c.routed[key] {
				c.routed[key] = true
				c.outRoutes = append(c.outRoutes, &v1alpha1.TelemetryRoute{
					TypeMeta:   typeMeta("TelemetryRoute"),
					ObjectMeta: metav1.ObjectMeta{Name: renamed[name], Namespace: d.Namespace},
					Spec:       v1alpha1.TelemetryRouteSpec{To: v.routes[name]},
				})
			}
		}
	}
}

// params of the model are those that its devices have.
func params(v *variant) []v1alpha1.Param {
	count := map[string]int{}
	for _, d := range v.devices {
		for name := range d.Spec.Params {
			count[name]++
		}
	}
	var out []v1alpha1.Param
	for _, name := range slices.Sorted(maps.Keys(count)) {
		out = append(out, v1alpha1.Param{Name: name, Required: count[name] == len(v.devices)})
	}
	return out
}

func typeMeta(kind string) metav1.TypeMeta {
	return metav1.TypeMeta{APIVersion: v1alpha1.GroupAndVer, Kind: kind}
}

func (c *converter) reporter(kind string, m *meta) *reporter {
	return &reporter{object: subject(kind, m), to: &c.res.Findings}
}

// metadata is what of it is the user's.
func (c *converter) metadata(r *reporter, m *meta) metav1.ObjectMeta {
	out := metav1.ObjectMeta{Name: m.Name, Labels: m.Labels}
	for k, v := range m.Annotations {
		if k == "kubectl.kubernetes.io/last-applied-configuration" {
			continue
		}
		metav1.SetMetaDataAnnotation(&out, k, v)
	}
	if len(m.Finalizers) > 0 {
		r.lost("metadata.finalizers", "who was to act on them is not here", "")
	}
	if len(m.OwnerReferences) > 0 {
		r.lost("metadata.ownerReferences", "the owner has another uid here, or none", "")
	}
	if m.Name == "" && m.GenerateName != "" {
		r.lost("metadata.generateName", "a Device needs a name", "")
	}
	return out
}

// modelAlone is a model without devices.
func (c *converter) modelAlone(r *reporter, src *modelV1beta1, name string) *v1alpha1.DeviceModel {
	m := c.model(r, src, name, c.opts.Profile)
	if src.Spec.Protocol == "mqtt" {
		r.check("spec.protocol", "how MQTT devices are reached, KubeEdge keeps in Devices, and none of this model is among the manifests", "convert them together")
	}
	return m
}

var types = map[string]string{
	"INT": v1alpha1.TypeInt64, "FLOAT": v1alpha1.TypeFloat64, "DOUBLE": v1alpha1.TypeFloat64,
	"STRING": v1alpha1.TypeString, "BOOLEAN": v1alpha1.TypeBool, "BYTES": v1alpha1.TypeBytes,
}

// nameForm is that of names of properties, params and commands.
var nameForm = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?$`)

func (c *converter) model(r *reporter, src *modelV1beta1, name, profile string) *v1alpha1.DeviceModel {
	if profile == "" {
		profile = v1alpha1.ProfileExternal
	}
	m := &v1alpha1.DeviceModel{TypeMeta: typeMeta("DeviceModel"), ObjectMeta: metav1.ObjectMeta{Name: name, Labels: src.Metadata.Labels}}
	for k, v := range src.Metadata.Annotations {
		if k != "kubectl.kubernetes.io/last-applied-configuration" {
			metav1.SetMetaDataAnnotation(&m.ObjectMeta, k, v)
		}
	}
	m.Spec.Profile = profile
	m.Spec.Properties = []v1alpha1.Property{}
	for i, p := range src.Spec.Properties {
		at := fmt.Sprintf("spec.properties[%d]", i)
		kind, ok := types[strings.ToUpper(p.Type)]
		switch {
		case !ok && strings.EqualFold(p.Type, "STREAM"):
			r.lost(at, fmt.Sprintf("%s is a STREAM: a twin has values, no video", p.Name), "run what handles the stream as a pod on the node")
			continue
		case !ok:
			r.lost(at+".type", fmt.Sprintf("%s has the unknown type %q", p.Name, p.Type), "")
			continue
		case len(p.Name) > 128 || !nameForm.MatchString(p.Name):
			r.lost(at+".name", fmt.Sprintf("%q: names are of letters, digits, and _ . - within", p.Name), "name it otherwise, there and in its Devices")
			continue
		case slices.ContainsFunc(m.Spec.Properties, func(q v1alpha1.Property) bool { return q.Name == p.Name }):
			r.lost(at, p.Name+" is there twice; the first one counts", "")
			continue
		}
		out := v1alpha1.Property{Name: p.Name, Description: p.Description, Type: kind, Unit: p.Unit, Access: "rw"}
		if len(out.Description) > 1024 {
			out.Description = strings.ToValidUTF8(out.Description[:1024], "")
			r.check(at+".description", "longer than 1024 bytes: cut", "")
		}
		switch p.AccessMode {
		case "ReadOnly":
			out.Access = "r"
		case "ReadWrite":
		default:
			out.Access = "r"
			r.check(at+".accessMode", fmt.Sprintf("%q is none of ReadOnly and ReadWrite: taken as ReadOnly", p.AccessMode), "")
		}
		numeric := kind == v1alpha1.TypeInt64 || kind == v1alpha1.TypeFloat64
		for _, b := range []struct {
			field, text string
			into        *json.Number
		}{{"minimum", p.Minimum, &out.Min}, {"maximum", p.Maximum, &out.Max}} {
			switch {
			case b.text == "":
			case !numeric:
				r.lost(at+"."+b.field, "only numbers have bounds", "")
			case !jsonNumber(b.text):
				r.lost(at+"."+b.field, fmt.Sprintf("%q is no number", b.text), "")
			default:
				*b.into = json.Number(b.text)
				// KubeEdge keeps these and never looks at them.
			}
		}
		if out.Min != "" || out.Max != "" {
			if _, err := value.Compile(&out); err != nil {
				r.lost(at+".minimum", err.Error(), "")
				out.Min, out.Max = "", ""
			}
		}
		m.Spec.Properties = append(m.Spec.Properties, out)
	}
	return m
}

// jsonNumber tells whether s can stand in JSON as a number.
func jsonNumber(s string) bool {
	var n json.Number
	return len(s) <= 64 && json.Unmarshal([]byte(s), &n) == nil && string(n) == s && s[0] != '"'
}
