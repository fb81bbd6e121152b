package apifacade

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/skerry-io/skerry/edgecore/store"
)

func (f *Facade) put(w http.ResponseWriter, r *http.Request, q *request) error {
	body, _, err := readBody(w, r, "application/json")
	if err != nil {
		return err
	}
	if _, err := decode(q, body); err != nil {
		return err
	}
	return f.update(w, r, q, func(store.Object) ([]byte, error) { return body, nil })
}

// update replaces an object, or what the request may write of it, by what
// change makes of the current one. It reads, checks and writes in one commit.
func (f *Facade) update(w http.ResponseWriter, r *http.Request, q *request, change func(cur store.Object) ([]byte, error)) error {
	if q.resource.name == "nodes" || q.resource.name == "csinodes" {
		if q.name != f.cfg.NodeName {
			return apierrors.NewForbidden(q.gr(), q.name, fmt.Errorf("this is node %q", f.cfg.NodeName))
		}
	}
	var out store.Object
	err := f.local(r, func(tx *store.Tx) error {
		cur, ok := tx.Get(q.key())
		if !ok {
			return apierrors.NewNotFound(q.gr(), q.name)
		}
		next, err := change(cur)
		if err != nil {
			return err
		}
		obj, err := decode(q, next)
		if err != nil {
			return err
		}
		if err := checkUpdate(q, cur, obj); err != nil {
			return err
		}
		body, marks, err := splice(q, cur, next, obj)
		if err != nil {
			return err
		}
		if same, err := unchanged(q, cur.Body, body); err != nil {
			return err
		} else if same {
			out = cur
			return nil
		}
		if q.resource.name == "nodes" && heartbeatOnly(cur.Body, body) {
			tx.Soon() // every five minutes, for years
		}
		if out, err = tx.Put(q.key(), cur.UID, body); err != nil {
			return apierrors.NewBadRequest(err.Error())
		}
		for _, m := range marks {
			m.Key, m.UID = q.key(), cur.UID
			tx.MarkDirty(m)
		}
		return nil
	})
	if err != nil {
		return err
	}
	f.respond(w, http.StatusOK, out.Body)
	return nil
}

// checkUpdate holds what a client says about identity against the object.
func checkUpdate(q *request, cur store.Object, obj metav1.Object) error {
	conflict := func(format string, args ...any) error {
		return apierrors.NewConflict(q.gr(), q.name, fmt.Errorf(format, args...))
	}
	switch rv := obj.GetResourceVersion(); {
	case obj.GetName() != "" && obj.GetName() != q.name:
		return apierrors.NewBadRequest(fmt.Sprintf("the body's name %q is not the path's %q", obj.GetName(), q.name))
	case obj.GetNamespace() != "" && obj.GetNamespace() != q.namespace:
		return apierrors.NewBadRequest(fmt.Sprintf("the body's namespace %q is not the path's %q", obj.GetNamespace(), q.namespace))
	case obj.GetUID() != "" && string(obj.GetUID()) != cur.UID:
		return conflict("Precondition failed: UID in precondition: %v, UID in object meta: %v", obj.GetUID(), cur.UID)
	case rv != "" && rv != "0" && rv != strconv.FormatUint(cur.RV, 10):
		return conflict("the object has been modified; please apply your changes to the latest version and try again")
	}
	return nil
}

type raws = map[string]json.RawMessage

func open(body []byte) (top, meta raws, err error) {
	if err = json.Unmarshal(body, &top); err == nil && top["metadata"] != nil {
		err = json.Unmarshal(top["metadata"], &meta)
	}
	if err != nil {
		return nil, nil, apierrors.NewBadRequest("the object is malformed: " + err.Error())
	}
	if meta == nil {
		meta = raws{}
	}
	return top, meta, nil
}

// splice takes from next what the request may write and leaves the rest of cur
// as it is, byte for byte: fields a newer cluster may have and this program
// does not know included.
func splice(q *request, cur store.Object, next []byte, obj metav1.Object) ([]byte, []store.Mark, error) {
	top, meta, err := open(cur.Body)
	if err != nil {
		return nil, nil, err
	}
	newTop, newMeta, err := open(next)
	if err != nil {
		return nil, nil, err
	}
	var marks []store.Mark
	switch name := q.resource.name; {
	case name == "pods": // status only, whatever else the request holds
		take(top, newTop, "status")
		marks = []store.Mark{{Op: store.OpStatus}}
	case name == "nodes":
		if q.subresource == "status" {
			if !sameJSON(top["status"], newTop["status"]) {
				take(top, newTop, "status")
				marks = append(marks, store.Mark{Op: store.OpStatus})
			}
		} else if newTop["spec"] != nil && !sameJSON(top["spec"], newTop["spec"]) {
			return nil, nil, apierrors.NewForbidden(q.gr(), q.name, errors.New("the spec of a Node is changed in the cloud"))
		}
		m := store.Mark{Op: store.OpUpdate}
		if m.Labels, err = takeMap(meta, newMeta, "labels"); err != nil {
			return nil, nil, err
		}
		if m.Annotations, err = takeMap(meta, newMeta, "annotations"); err != nil {
			return nil, nil, err
		}
		if len(m.Labels)+len(m.Annotations) > 0 {
			marks = append(marks, m)
		}
		if top["metadata"], err = json.Marshal(meta); err != nil {
			return nil, nil, apierrors.NewInternalError(err)
		}
	default:
		body, err := replaceWhole(cur, meta, obj)
		switch name {
		case "events":
			marks = []store.Mark{{Op: store.OpEvent}}
		case "csinodes":
			marks = []store.Mark{{Op: store.OpUpdate}}
		}
		return body, marks, err
	}
	body, err := json.Marshal(top)
	return body, marks, err
}

func take(to, from raws, field string) {
	if v, ok := from[field]; ok {
		to[field] = v
	} else {
		delete(to, field)
	}
}

// takeMap takes a map of strings over and tells which keys changed.
func takeMap(to, from raws, field string) ([]string, error) {
	var before, after map[string]string
	if raw := to[field]; raw != nil {
		if err := json.Unmarshal(raw, &before); err != nil {
			return nil, apierrors.NewInternalError(fmt.Errorf("metadata.%s: %w", field, err))
		}
	}
	if raw := from[field]; raw != nil {
		if err := json.Unmarshal(raw, &after); err != nil {
			return nil, apierrors.NewBadRequest(fmt.Sprintf("metadata.%s: %v", field, err))
		}
	}
	var changed []string
	for k, v := range after {
		if old, ok := before[k]; !ok || old != v {
			changed = append(changed, k)
		}
	}
	for k := range before {
		if _, ok := after[k]; !ok {
			changed = append(changed, k)
		}
	}
	slices.Sort(changed)
	if len(changed) > 0 {
		take(to, from, field)
	}
	return changed, nil
}

// replaceWhole is for objects that belong to the node entirely.
func replaceWhole(cur store.Object, curMeta raws, obj metav1.Object) ([]byte, error) {
	var created metav1.Time
	if raw := curMeta["creationTimestamp"]; raw != nil {
		if err := json.Unmarshal(raw, &created); err != nil {
			return nil, apierrors.NewInternalError(err)
		}
	}
	obj.SetName(cur.Name)
	obj.SetNamespace(cur.Namespace)
	obj.SetUID("")
	obj.SetResourceVersion("")
	obj.SetCreationTimestamp(created)
	obj.SetManagedFields(nil)
	body, err := json.Marshal(obj)
	if err != nil {
		return nil, apierrors.NewInternalError(err)
	}
	return body, nil
}

// unchanged tells whether a write would change nothing but the resourceVersion;
// an API server skips those, and here it saves the flash.
func unchanged(q *request, before, after []byte) (bool, error) {
	a, err := decode(q, before)
	if err != nil {
		return false, err
	}
	b, err := decode(q, after)
	if err != nil {
		return false, err
	}
	b.SetUID(a.GetUID())
	b.SetResourceVersion(a.GetResourceVersion())
	return equality.Semantic.DeepEqual(strip(a), strip(b)), nil
}

// heartbeatOnly tells whether two states of a Node differ in nothing but the
// times at which the kubelet last looked at its conditions.
func heartbeatOnly(before, after []byte) bool {
	var nodes [2]corev1.Node
	for i, body := range [][]byte{before, after} {
		if err := json.Unmarshal(body, &nodes[i]); err != nil {
			return false
		}
		nodes[i].ResourceVersion = ""
		for c := range nodes[i].Status.Conditions {
			nodes[i].Status.Conditions[c].LastHeartbeatTime = metav1.Time{}
		}
	}
	return equality.Semantic.DeepEqual(nodes[0], nodes[1])
}

// strip clears the TypeMeta, which one side may lack.
func strip(o metav1.Object) metav1.Object {
	if t, ok := o.(runtime.Object); ok {
		t.GetObjectKind().SetGroupVersionKind(schema.GroupVersionKind{})
	}
	return o
}

func sameJSON(a, b json.RawMessage) bool {
	if bytes.Equal(a, b) {
		return true
	}
	var x, y any
	if len(a) > 0 && json.Unmarshal(a, &x) != nil || len(b) > 0 && json.Unmarshal(b, &y) != nil {
		return false
	}
	return equality.Semantic.DeepEqual(x, y)
}
