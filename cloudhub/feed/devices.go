package feed

import (
	"encoding/json"
	"fmt"
	"log/slog"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/tools/cache"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// A node's devices are those whose spec names it. With them go their models,
// the Secrets by which they are known, the TelemetryRoutes of their namespaces,
// and the Secrets of the sinks that the node itself reaches. A DeviceDiscovery
// goes to the nodes that it selects.
//
// The objects are held as their Go types, about 2 kB for a Device with ten
// values in its status: half of what they are as maps. They come through a
// dynamic client, because one object that does not decode must not stop the
// rest; see decodeDevices.

// addDevices adds the sources of the devices' API. Models and Secrets stand
// before what names them.
func (f *Feed) addDevices(client dynamic.Interface) error {
	add := func(resource, kind string, sc scope, into func() metav1.Object) (*source, error) {
		informer := dynamicinformer.NewFilteredDynamicInformer(client, v1alpha1.Resource(resource), metav1.NamespaceAll, 0,
			cache.Indexers{cache.NamespaceIndex: cache.MetaNamespaceIndexFunc}, nil).Informer()
		if err := informer.SetTransform(decodeDevices(into, f.log)); err != nil {
			return nil, fmt.Errorf("feed: watch %s: %w", resource, err)
		}
		f.loose = append(f.loose, informer)
		return f.add(resource, kind, v1alpha1.GroupAndVer, sc, informer), nil
	}
	if _, err := add(v1alpha1.Models, "DeviceModel", onDemand, func() metav1.Object { return &v1alpha1.DeviceModel{} }); err != nil {
		return err
	}
	if _, err := add(v1alpha1.Routes, "TelemetryRoute", onDemand, func() metav1.Object { return &v1alpha1.TelemetryRoute{} }); err != nil {
		return err
	}
	devices, err := add(v1alpha1.Devices, "Device", boundNode, func() metav1.Object { return &v1alpha1.Device{} })
	if err != nil {
		return err
	}
	devices.nodeOf = func(obj any) string { return obj.(*v1alpha1.Device).Spec.NodeName }
	if err := devices.informer.AddIndexers(cache.Indexers{ByNode: func(obj any) ([]string, error) {
		return []string{devices.nodeOf(obj)}, nil
	}}); err != nil {
		return fmt.Errorf("feed: index devices by node: %w", err)
	}
	_, err = add(v1alpha1.Discoveries, "DeviceDiscovery", selectedNodes, func() metav1.Object { return &v1alpha1.DeviceDiscovery{} })
	return err
}

// lastApplied is kubectl's own copy of an object: no device's business.
const lastApplied = "kubectl.kubernetes.io/last-applied-configuration"

// decodeDevices makes the Go type of what the dynamic client delivers, less
// what nobody reads. An object that does not decode, as one could be that was
// stored under another version of its definition, is held with its metadata
// only: it goes to no node, and the others do.
func decodeDevices(into func() metav1.Object, log *slog.Logger) cache.TransformFunc {
	return func(obj any) (any, error) {
		u, ok := obj.(*unstructured.Unstructured)
		if !ok {
			return obj, nil // seen before, or a deletion whose object was missed
		}
		out := into()
		err := decodeObject(u.Object, out)
		if err != nil {
			// A status may be anybody's; the spec is what counts.
			spec := map[string]any{}
			for k, v := range u.Object {
				if k != "status" {
					spec[k] = v
				}
			}
			out = into()
			if specErr := decodeObject(spec, out); specErr != nil {
				log.Error("an object of the devices' API cannot be used and goes to no node; see whether its definition is this hub's",
					"kind", u.GetKind(), "namespace", u.GetNamespace(), "name", u.GetName(), "err", specErr)
				out = into()
				meta := map[string]any{"metadata": u.Object["metadata"]}
				if err := decodeObject(meta, out); err != nil {
					return nil, fmt.Errorf("decode metadata of %s %s/%s: %w", u.GetKind(), u.GetNamespace(), u.GetName(), err)
				}
			}
		}
		switch o := out.(type) { // informers' objects carry no TypeMeta
		case *v1alpha1.Device:
			o.TypeMeta = metav1.TypeMeta{}
		case *v1alpha1.DeviceModel:
			o.TypeMeta = metav1.TypeMeta{}
		case *v1alpha1.DeviceDiscovery:
			o.TypeMeta = metav1.TypeMeta{}
		case *v1alpha1.TelemetryRoute:
			o.TypeMeta = metav1.TypeMeta{}
		}
		if d, ok := out.(*v1alpha1.Device); ok {
			noteDesiredTimes(d)
		}
		out.SetManagedFields(nil)
		if a := out.GetAnnotations(); a[lastApplied] != "" {
			delete(a, lastApplied)
			out.SetAnnotations(a)
		}
		return out, nil
	}
}

// noteDesiredTimes keeps of the managed fields what settles the authority lww.
// A write of the status alone does not change it.
func noteDesiredTimes(d *v1alpha1.Device) {
	delete(d.Annotations, v1alpha1.AnnotationDesiredTimes) // nobody else's word
	times := v1alpha1.DesiredTimes(d.ManagedFields)
	if len(times) == 0 {
		return
	}
	b, err := json.Marshal(times)
	if err != nil {
		return // a year beyond 9999; the time of arrival counts then
	}
	metav1.SetMetaDataAnnotation(&d.ObjectMeta, v1alpha1.AnnotationDesiredTimes, string(b))
}

func decodeObject(from map[string]any, to any) error {
	b, err := json.Marshal(from)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, to)
}

// Devices is the informer of all Devices, for others to share, as
// *v1alpha1.Device; nil if the feed carries none.
func (f *Feed) Devices() cache.SharedIndexInformer { return f.informerOf(v1alpha1.Devices) }

// Models, Discoveries and Routes are those of the other kinds, likewise.
func (f *Feed) Models() cache.SharedIndexInformer { return f.informerOf(v1alpha1.Models) }

// Discoveries is the informer of all DeviceDiscoveries.
func (f *Feed) Discoveries() cache.SharedIndexInformer { return f.informerOf(v1alpha1.Discoveries) }

// Routes is the informer of all TelemetryRoutes.
func (f *Feed) Routes() cache.SharedIndexInformer { return f.informerOf(v1alpha1.Routes) }

// Secrets is the informer of all Secrets.
func (f *Feed) Secrets() cache.SharedIndexInformer { return f.byName["secrets"].informer }

func (f *Feed) informerOf(resource string) cache.SharedIndexInformer {
	if s := f.byName[resource]; s != nil {
		return s.informer
	}
	return nil
}

// routesIn stands among the refs for the TelemetryRoutes of a namespace, as
// subjects do for what binds them: never sent, so that a new route reaches the
// nodes with devices there.
const routesIn = "#routes"

func routesRef(namespace string) edgeapi.Ref {
	return edgeapi.Ref{Resource: routesIn, Name: namespace}
}

func (f *Feed) routesOf(namespace string) []edgeapi.Ref {
	objs, err := f.byName[v1alpha1.Routes].indexer.ByIndex(cache.NamespaceIndex, namespace)
	if err != nil {
		f.log.Error("routes have no index", "err", err)
		return nil
	}
	refs := make([]edgeapi.Ref, 0, len(objs))
	for _, obj := range objs {
		refs = append(refs, refTo(v1alpha1.Routes, obj))
	}
	return refs
}

// deviceRefs are what a Device needs beside it.
func deviceRefs(d *v1alpha1.Device) []edgeapi.Ref {
	refs := []edgeapi.Ref{routesRef(d.Namespace)}
	if d.Spec.ModelRef.Name != "" {
		refs = append(refs, edgeapi.Ref{Resource: v1alpha1.Models, Name: d.Spec.ModelRef.Name})
	}
	if d.Spec.CredentialsSecret != "" {
		refs = append(refs, edgeapi.Ref{Resource: "secrets", Namespace: d.Namespace, Name: d.Spec.CredentialsSecret})
	}
	return refs
}

// routeRefs are the Secrets of the sinks that nodes reach by themselves. Those
// behind the hub stay with the hub.
func routeRefs(r *v1alpha1.TelemetryRoute) []edgeapi.Ref {
	var refs []edgeapi.Ref
	seen := map[string]bool{}
	add := func(s *v1alpha1.SecretRef) {
		if s != nil && s.Name != "" && !seen[s.Name] {
			seen[s.Name] = true
			refs = append(refs, edgeapi.Ref{Resource: "secrets", Namespace: r.Namespace, Name: s.Name})
		}
	}
	for _, to := range r.Spec.To {
		switch {
		case to.MQTT != nil:
			add(to.MQTT.SecretRef)
		case to.Webhook != nil:
			add(to.Webhook.SecretRef)
		case to.RemoteWrite != nil:
			add(to.RemoteWrite.SecretRef)
		}
	}
	return refs
}

// selects tells whether the node is one of those that the discovery looks on.
func (f *Feed) selects(obj any, node string) bool {
	d, ok := obj.(*v1alpha1.DeviceDiscovery)
	if !ok {
		return false
	}
	n, found, err := f.byName["nodes"].indexer.GetByKey(node)
	if err != nil || !found {
		return false
	}
	return labels.SelectorFromSet(d.Spec.NodeSelector).Matches(labels.Set(n.(metav1.Object).GetLabels()))
}

// selectionChangedLocked marks, for a node with other labels than before, what
// is sent to nodes by their labels.
func (f *Feed) selectionChangedLocked(node string, old, now any) {
	s := f.byName[v1alpha1.Discoveries]
	if s == nil || len(f.nodes[node]) == 0 {
		return
	}
	if was, ok := old.(metav1.Object); ok && labels.Equals(was.GetLabels(), now.(metav1.Object).GetLabels()) {
		return
	}
	for _, obj := range s.indexer.List() {
		mark(f.nodes[node], refTo(s.resource, obj))
	}
}

// cloudDevice is the part of an object of the devices' API that goes down: all
// but its status, which says what is known in the cloud.
func cloudDevice(obj any) (metav1.Object, bool) {
	var out metav1.Object
	switch o := obj.(type) {
	case *v1alpha1.Device:
		out = &v1alpha1.Device{ObjectMeta: o.ObjectMeta, Spec: o.Spec}
	case *v1alpha1.DeviceDiscovery:
		out = &v1alpha1.DeviceDiscovery{ObjectMeta: o.ObjectMeta, Spec: o.Spec}
	case *v1alpha1.TelemetryRoute:
		out = &v1alpha1.TelemetryRoute{ObjectMeta: o.ObjectMeta, Spec: o.Spec}
	default:
		return nil, false
	}
	out.SetResourceVersion("")
	return out, true
}
