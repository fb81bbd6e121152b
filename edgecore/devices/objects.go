package devices

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/edgecore/store"
)

// watched are the resources that this part is made of. Secrets hold what
// devices and sinks are known by.
var watched = []string{v1alpha1.Devices, v1alpha1.Models, v1alpha1.Discoveries, v1alpha1.Routes, "secrets"}

// objects reads what the node's store has of devices. It is used by one
// goroutine.
type objects struct {
	store *store.Store
	node  string

	decoded map[store.Key]decoded // of the last read
}

type decoded struct {
	rv  uint64
	obj any
	err error
}

// set is all of it at one moment.
type set struct {
	devices     []devicetwin.Bound
	discoveries []*v1alpha1.DeviceDiscovery
	routes      []*v1alpha1.TelemetryRoute
	unreadable  map[string]error // by object; what is wrong with one leaves the others alone
}

func (s set) empty() bool {
	return len(s.devices) == 0 && len(s.discoveries) == 0 && len(s.routes) == 0
}

// read decodes what changed since the last call.
func (o *objects) read() set {
	now := map[store.Key]decoded{}
	s := set{unreadable: map[string]error{}}
	models := map[string]*v1alpha1.DeviceModel{}
	for _, m := range readAll[v1alpha1.DeviceModel](o, v1alpha1.Models, now, s.unreadable) {
		models[m.Name] = m
	}
	for _, d := range readAll[v1alpha1.Device](o, v1alpha1.Devices, now, s.unreadable) {
		if d.Spec.NodeName == o.node {
			s.devices = append(s.devices, devicetwin.Bound{Device: d, Model: models[d.Spec.ModelRef.Name]})
		}
	}
	s.discoveries = readAll[v1alpha1.DeviceDiscovery](o, v1alpha1.Discoveries, now, s.unreadable)
	s.routes = readAll[v1alpha1.TelemetryRoute](o, v1alpha1.Routes, now, s.unreadable)
	o.decoded = now
	return s
}

func readAll[T any](o *objects, resource string, now map[store.Key]decoded, unreadable map[string]error) []*T {
	all, _ := o.store.List(resource, "")
	out := make([]*T, 0, len(all))
	for _, obj := range all {
		d, ok := o.decoded[obj.Key]
		if !ok || d.rv != obj.RV {
			t := new(T)
			d = decoded{rv: obj.RV, obj: t, err: json.Unmarshal(obj.Body, t)}
		}
		now[obj.Key] = d
		if d.err != nil {
			unreadable[obj.Key.String()] = d.err
			continue
		}
		out = append(out, d.obj.(*T))
	}
	return out
}

// problems tells what is unreadable, in few words.
func (s set) problems() string {
	names := make([]string, 0, len(s.unreadable))
	for name := range s.unreadable {
		names = append(names, name)
	}
	slices.Sort(names)
	const most = 3
	var b strings.Builder
	for i, name := range names {
		if i == most {
			fmt.Fprintf(&b, "; and %d more", len(names)-most)
			break
		}
		if i > 0 {
			b.WriteString("; ")
		}
		fmt.Fprintf(&b, "%s: %v", name, s.unreadable[name])
	}
	return b.String()
}

// follow calls changed after every change of what is watched, until ctx ends.
func follow(ctx context.Context, s *store.Store, changed func()) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, resource := range watched {
		g.Go(func() error {
			for {
				w, err := s.Watch(ctx, resource, s.RV())
				if err != nil {
					return fmt.Errorf("watch %s: %w", resource, err)
				}
				changed() // also for what came before the watch
				for {
					_, _, err := w.Next(ctx, 0)
					if errors.Is(err, store.ErrExpired) {
						break
					}
					if err != nil {
						return cmp.Or(ctx.Err(), err)
					}
					changed()
				}
			}
		})
	}
	return g.Wait()
}

// secret returns a Secret's data.
func secret(s *store.Store, namespace, name string) (map[string][]byte, bool) {
	o, ok := s.Get(store.Key{Resource: "secrets", Namespace: namespace, Name: name})
	if !ok {
		return nil, false
	}
	var body struct {
		Data map[string][]byte `json:"data"`
	}
	if err := json.Unmarshal(o.Body, &body); err != nil {
		return nil, false
	}
	return body.Data, true
}
