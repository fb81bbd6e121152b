package devices

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// promoter owns the fields of desired values that were overrides.
const promoter = "skerry-promote"

// promoteLocked remembers a twin whose overrides may become what the cloud
// wants.
func (d *Devices) promoteLocked(tw *twin) {
	m := d.models[tw.device.Spec.ModelRef.Name]
	if m == nil || tw.state == nil {
		return
	}
	if len(d.promotable(tw, m)) > 0 {
		d.promote[tw.ref] = struct{}{}
	}
}

// promotable are the overrides that the model says to promote and whose
// property the spec has left alone since.
func (d *Devices) promotable(tw *twin, m *model) map[string]json.RawMessage {
	out := map[string]json.RawMessage{}
	for _, o := range tw.state.Overrides {
		p := m.properties[o.Property]
		if p == nil || p.Promote != v1alpha1.PromoteIfUnchanged || slices.Equal(tw.device.Spec.Desired[o.Property].Raw, o.Value) {
			continue
		}
		at, known := tw.changed[o.Property]
		switch {
		case known && at > o.BaseGen:
			continue
		case !known && o.BaseGen < tw.first:
			continue // it may have changed before the hub started
		}
		out[o.Property] = o.Value
	}
	return out
}

func (d *Devices) promotionsLocked() []task {
	var todo []task
	for ref := range d.promote {
		delete(d.promote, ref)
		tw := d.twins[ref]
		if tw == nil || tw.state == nil {
			continue
		}
		m := d.models[tw.device.Spec.ModelRef.Name]
		if m == nil {
			continue
		}
		if values := d.promotable(tw, m); len(values) > 0 {
			dev := tw.device
			todo = append(todo, task{"promote overrides of Device " + key(ref), func(ctx context.Context) error { return d.promoteValues(ctx, ref, dev, values) }})
		}
	}
	return todo
}

// promoteValues writes overrides into the spec of the very generation that they
// were compared with.
func (d *Devices) promoteValues(ctx context.Context, ref edgeapi.DeviceRef, dev *v1alpha1.Device, values map[string]json.RawMessage) error {
	again := func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.promote[ref] = struct{}{}
	}
	devices := d.cfg.Dynamic.Resource(v1alpha1.Resource(v1alpha1.Devices)).Namespace(ref.Namespace)
	got, err := devices.Get(ctx, ref.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		again()
		return err
	}
	if got.GetUID() != dev.UID || got.GetGeneration() != dev.Generation {
		again() // the informer is behind
		return nil
	}
	desired := map[string]json.RawMessage{}
	for p, v := range dev.Spec.Desired {
		desired[p] = v.Raw
	}
	for p, v := range values {
		desired[p] = v
	}
	patch, err := json.Marshal([]map[string]any{
		{"op": "replace", "path": "/metadata/resourceVersion", "value": got.GetResourceVersion()},
		{"op": "add", "path": "/spec/desired", "value": desired},
	})
	if err != nil {
		return fmt.Errorf("encode: %w", err)
	}
	_, err = devices.Patch(ctx, ref.Name, types.JSONPatchType, patch, metav1.PatchOptions{FieldManager: promoter})
	switch {
	case apierrors.IsConflict(err):
		again()
		return nil
	case apierrors.IsInvalid(err), apierrors.IsNotFound(err):
		return nil
	case err != nil:
		again()
		return err
	}
	d.promoted.Add(uint64(len(values)))
	d.log.Info("overrides made what the cloud wants", "device", key(ref), "properties", len(values))
	return nil
}
