package v1alpha1

import (
	"embed"
	"fmt"
	"path"
)

// The manifests are made from types.go by "make generate".
//
//go:embed crds/*.yaml
var crds embed.FS

// CRDs returns the CustomResourceDefinitions of this API, in YAML, by name.
func CRDs() (map[string][]byte, error) {
	files, err := crds.ReadDir("crds")
	if err != nil {
		return nil, fmt.Errorf("read the embedded definitions: %w", err)
	}
	out := map[string][]byte{}
	for _, f := range files {
		b, err := crds.ReadFile(path.Join("crds", f.Name()))
		if err != nil {
			return nil, fmt.Errorf("read the embedded definitions: %w", err)
		}
		var resource string
		if _, err := fmt.Sscanf(f.Name(), Group+"_%s", &resource); err != nil {
			return nil, fmt.Errorf("definition %s: unexpected name", f.Name())
		}
		resource = resource[:len(resource)-len(path.Ext(resource))]
		out[resource+"."+Group] = b
	}
	return out, nil
}
