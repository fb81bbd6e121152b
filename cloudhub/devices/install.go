package devices

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/yaml"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
)

const (
	// manager owns the fields of what the hub applies.
	manager = "skerry-cloudhub"

	installRetry   = 500 * time.Millisecond
	establishEvery = 50 * time.Millisecond
)

var definitions = schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}

// Install brings the definitions of the devices' API into the cluster, or up to
// this hub's version, and returns once the API server serves them. It tries
// again until ctx ends.
func Install(ctx context.Context, client dynamic.Interface, log *slog.Logger) error {
	all, err := v1alpha1.CRDs()
	if err != nil {
		return fmt.Errorf("devices: %w", err)
	}
	told := false
	for name, manifest := range all {
		for {
			err := install(ctx, client, name, manifest)
			if err == nil {
				break
			}
			if ctx.Err() != nil {
				return fmt.Errorf("devices: %w", err)
			}
			if !told {
				told = true
				log.Warn("a definition of the devices' API could not be installed; it is tried again", "err", err)
			}
			if err := pause(ctx, installRetry); err != nil {
				return err
			}
		}
	}
	return nil
}

func install(ctx context.Context, client dynamic.Interface, name string, manifest []byte) error {
	var crd unstructured.Unstructured
	if err := yaml.Unmarshal(manifest, &crd.Object); err != nil {
		return fmt.Errorf("definition %s: %w", name, err)
	}
	got, err := client.Resource(definitions).Apply(ctx, name, &crd, metav1.ApplyOptions{FieldManager: manager, Force: true})
	if err != nil {
		return fmt.Errorf("apply definition %s: %w", name, err)
	}
	for !established(got) {
		if err := pause(ctx, establishEvery); err != nil {
			return fmt.Errorf("definition %s is not established: %w", name, err)
		}
		if got, err = client.Resource(definitions).Get(ctx, name, metav1.GetOptions{}); err != nil {
			return fmt.Errorf("read definition %s: %w", name, err)
		}
	}
	return nil
}

func established(crd *unstructured.Unstructured) bool {
	conditions, _, err := unstructured.NestedSlice(crd.Object, "status", "conditions")
	return err == nil && slices.ContainsFunc(conditions, func(c any) bool {
		m, ok := c.(map[string]any)
		return ok && m["type"] == "Established" && m["status"] == "True"
	})
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
