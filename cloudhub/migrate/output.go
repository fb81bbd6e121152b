package migrate

import (
	"bytes"
	"encoding/json"
	"fmt"

	"sigs.k8s.io/yaml"
)

// write puts what was made into YAML: models first, as what names them comes
// after.
func (c *converter) write() error {
	var b bytes.Buffer
	put := func(v any) error {
		text, err := document(v)
		if err != nil {
			return err
		}
		b.WriteString("---\n")
		b.Write(text)
		return nil
	}
	for _, m := range c.outModels {
		if err := put(m); err != nil {
			return fmt.Errorf("DeviceModel %s: %w", m.Name, err)
		}
	}
	for _, t := range c.outRoutes {
		if err := put(t); err != nil {
			return fmt.Errorf("TelemetryRoute %s/%s: %w", t.Namespace, t.Name, err)
		}
	}
	for _, d := range c.outDevices {
		if err := put(d); err != nil {
			return fmt.Errorf("Device %s/%s: %w", d.Namespace, d.Name, err)
		}
	}
	c.res.YAML = b.Bytes()
	c.res.Models, c.res.Routes, c.res.Devices = len(c.outModels), len(c.outRoutes), len(c.outDevices)
	return nil
}

// document is v as a person would write it: without what is empty.
func document(v any) ([]byte, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber()
	var tree map[string]any
	if err := dec.Decode(&tree); err != nil {
		return nil, err
	}
	prune(tree)
	if raw, err = json.Marshal(tree); err != nil {
		return nil, err
	}
	return yaml.JSONToYAML(raw)
}

// durations that are zero were not given.
var durations = map[string]bool{"ttl": true, "timeout": true, "interval": true, "minInterval": true, "expectedInterval": true, "maxAge": true}

func prune(m map[string]any) {
	for k, v := range m {
		switch v := v.(type) {
		case nil:
			delete(m, k)
		case string:
			if durations[k] && v == "0s" {
				delete(m, k)
			}
		case []any:
			for _, e := range v {
				if e, ok := e.(map[string]any); ok {
					prune(e)
				}
			}
		case map[string]any:
			switch k {
			case "params", "desired", "profileConfig", "map", "labels", "annotations": // the user's
				continue
			}
			prune(v)
			if len(v) == 0 && k != "write" {
				delete(m, k)
			}
		}
	}
}
