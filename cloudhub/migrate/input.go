package migrate

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	kjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

// Limits of what is read: far above any real set of manifests, and far below
// what a machine has of memory.
const (
	MaxInput   = 32 << 20
	maxObjects = 20000
)

// set is what the manifests hold, in their order.
type set struct {
	models  []*modelV1beta1
	devices []*device
	read    int
}

type device struct {
	*deviceV1beta1
	old bool // v1alpha2
}

// read takes the documents of in apart.
func read(in io.Reader, findings *[]Finding) (*set, error) {
	data, err := io.ReadAll(io.LimitReader(in, MaxInput+1))
	if err != nil {
		return nil, err
	}
	if len(data) > MaxInput {
		return nil, fmt.Errorf("more than %d MiB of manifests; convert them in parts, each model with its devices", MaxInput>>20)
	}
	s := &set{}
	docs := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(data)))
	for n := 1; ; n++ {
		doc, err := docs.Read()
		if errors.Is(err, io.EOF) {
			return s, nil
		}
		if err != nil {
			return nil, fmt.Errorf("document %d: %w", n, err)
		}
		raw, err := yaml.YAMLToJSONStrict(doc)
		if err != nil {
			return nil, fmt.Errorf("document %d: %w", n, err)
		}
		if string(raw) == "null" { // nothing but comments
			continue
		}
		if err := s.add(raw, findings, 0); err != nil {
			return nil, fmt.Errorf("document %d: %w", n, err)
		}
	}
}

func (s *set) add(raw []byte, findings *[]Finding, depth int) error {
	var o struct {
		object `json:",inline"`
		Items  []json.RawMessage `json:"items"`
	}
	if err := kjson.UnmarshalCaseSensitivePreserveInts(raw, &o); err != nil {
		return err
	}
	if o.Kind == "" || o.APIVersion == "" {
		return errors.New("no apiVersion or kind; this is no Kubernetes manifest")
	}
	if strings.HasSuffix(o.Kind, "List") && depth == 0 {
		for i, item := range o.Items {
			if err := s.add(item, findings, 1); err != nil {
				return fmt.Errorf("items[%d]: %w", i, err)
			}
		}
		return nil
	}
	if s.read++; s.read > maxObjects {
		return fmt.Errorf("more than %d objects; convert them in parts, each model with its devices", maxObjects)
	}
	if o.Metadata.Name == "" {
		return fmt.Errorf("%s without metadata.name", o.Kind)
	}
	r := &reporter{object: subject(o.Kind, &o.Metadata), to: findings}
	switch o.APIVersion + " " + o.Kind {
	case "devices.kubeedge.io/v1beta1 DeviceModel":
		m, err := decode[modelV1beta1](raw, r)
		if err != nil {
			r.unreadable(err)
			return nil
		}
		s.models = append(s.models, m)
	case "devices.kubeedge.io/v1alpha2 DeviceModel":
		m, err := decode[modelV1alpha2](raw, r)
		if err != nil {
			r.unreadable(err)
			return nil
		}
		s.models = append(s.models, m.upgrade(r))
	case "devices.kubeedge.io/v1beta1 Device":
		d, err := decode[deviceV1beta1](raw, r)
		if err != nil {
			r.unreadable(err)
			return nil
		}
		s.devices = append(s.devices, &device{deviceV1beta1: d})
	case "devices.kubeedge.io/v1alpha2 Device":
		d, err := decode[deviceV1alpha2](raw, r)
		if err != nil {
			r.unreadable(err)
			return nil
		}
		s.devices = append(s.devices, &device{deviceV1beta1: d.upgrade(r), old: true})
	case "devices.kubeedge.io/v1beta1 DeviceStatus":
		// What the device last said it says again.
	default:
		do := ""
		if strings.HasPrefix(o.APIVersion, "rules.kubeedge.io/") {
			do = "write a TelemetryRoute whose from.topics has the rule's source"
		}
		r.lost("", fmt.Sprintf("%s %s is no KubeEdge DeviceModel or Device of v1beta1 or v1alpha2", o.APIVersion, o.Kind), do)
	}
	return nil
}

// decode tells of the fields that it does not know.
func decode[T any](raw []byte, r *reporter) (*T, error) {
	v := new(T)
	unknown, err := kjson.UnmarshalStrict(raw, v)
	if err != nil {
		return nil, err
	}
	for _, u := range unknown {
		r.lost("", u.Error(), "")
	}
	return v, nil
}

func subject(kind string, m *meta) string {
	ns := m.Namespace
	if ns == "" {
		ns = "default"
	}
	return kind + " " + ns + "/" + m.Name
}
