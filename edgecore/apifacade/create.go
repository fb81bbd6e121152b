package apifacade

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utiljson "k8s.io/apimachinery/pkg/util/json"
	utilrand "k8s.io/apimachinery/pkg/util/rand"
	"k8s.io/apimachinery/pkg/util/uuid"
	"k8s.io/kubernetes/pkg/apis/core/v1/helper/qos"

	"github.com/skerry-io/skerry/edgecore/store"
)

// errDryRun makes the store forget a write that was only tried.
var errDryRun = errors.New("dry run")

// dryRun reads the dryRun parameter.
func dryRun(r *http.Request) (bool, error) {
	values := r.URL.Query()["dryRun"]
	for _, v := range values {
		if v != metav1.DryRunAll {
			return false, apierrors.NewBadRequest(fmt.Sprintf("dryRun %q is not supported, use All", v))
		}
	}
	return len(values) > 0, nil
}

// local runs one write, or tries it.
func (f *Facade) local(r *http.Request, fn func(tx *store.Tx) error) error {
	dry, err := dryRun(r)
	if err != nil {
		return err
	}
	err = f.cfg.Store.Local(r.Context(), func(tx *store.Tx) error {
		if err := fn(tx); err != nil || !dry {
			return err
		}
		return errDryRun
	})
	if errors.Is(err, errDryRun) {
		return nil
	}
	return err
}

// decode reads a body into the resource's type.
func decode(q *request, body []byte) (metav1.Object, error) {
	var tm metav1.TypeMeta
	if err := json.Unmarshal(body, &tm); err != nil {
		return nil, apierrors.NewBadRequest("the body is not a JSON object: " + err.Error())
	}
	if tm.Kind != "" && tm.Kind != q.kind || tm.APIVersion != "" && tm.APIVersion != q.apiVersion() {
		return nil, apierrors.NewBadRequest(fmt.Sprintf("the body is a %s %s, expected %s %s", tm.APIVersion, tm.Kind, q.apiVersion(), q.kind))
	}
	obj := q.new()
	if err := utiljson.Unmarshal(body, obj); err != nil { // case-sensitive, as an API server is
		return nil, apierrors.NewBadRequest(fmt.Sprintf("the body is not a %s: %v", q.kind, err))
	}
	return obj, nil
}

func (f *Facade) create(w http.ResponseWriter, r *http.Request, q *request) error {
	body, _, err := readBody(w, r, "application/json")
	if err != nil {
		return err
	}
	obj, err := decode(q, body)
	if err != nil {
		return err
	}
	if err := f.prepareCreate(q, obj); err != nil {
		return err
	}
	if body, err = json.Marshal(obj); err != nil {
		return apierrors.NewInternalError(err)
	}
	key := store.Key{Resource: q.resource.name, Namespace: q.namespace, Name: obj.GetName()}
	var made store.Object
	err = f.local(r, func(tx *store.Tx) error {
		if _, exists := tx.Get(key); exists {
			return apierrors.NewAlreadyExists(q.gr(), key.Name)
		}
		var err error
		if made, err = tx.Put(key, string(obj.GetUID()), body); err != nil {
			return apierrors.NewBadRequest(err.Error())
		}
		switch key.Resource {
		case "events":
			tx.MarkDirty(store.Mark{Op: store.OpEvent, Key: key, UID: made.UID})
		case "nodes":
			// When the cloud has this Node already, the create tells it
			// nothing; the status must reach it all the same.
			tx.MarkDirty(store.Mark{Op: store.OpCreate, Key: key, UID: made.UID})
			tx.MarkDirty(store.Mark{Op: store.OpStatus, Key: key, UID: made.UID})
		case "pods", "csinodes":
			tx.MarkDirty(store.Mark{Op: store.OpCreate, Key: key, UID: made.UID})
		}
		return nil
	})
	if err != nil {
		return err
	}
	f.respond(w, http.StatusCreated, made.Body)
	return nil
}

// prepareCreate checks a new object and gives it what an API server would.
func (f *Facade) prepareCreate(q *request, obj metav1.Object) error {
	if obj.GetName() == "" && obj.GetGenerateName() != "" {
		obj.SetName(obj.GetGenerateName() + utilrand.String(5))
	}
	switch {
	case obj.GetName() == "":
		return apierrors.NewBadRequest("metadata.name is required")
	case q.namespaced && q.namespace == "":
		return apierrors.NewBadRequest("a namespace is required in the path")
	case obj.GetNamespace() != "" && obj.GetNamespace() != q.namespace:
		return apierrors.NewBadRequest(fmt.Sprintf("the body's namespace %q is not the path's %q", obj.GetNamespace(), q.namespace))
	case obj.GetResourceVersion() != "":
		return apierrors.NewBadRequest("resourceVersion should not be set on objects to be created")
	}
	obj.SetNamespace(q.namespace)
	obj.SetUID(uuid.NewUUID())
	obj.SetCreationTimestamp(metav1.NewTime(time.Now().Truncate(time.Second)))
	obj.SetDeletionTimestamp(nil)
	obj.SetDeletionGracePeriodSeconds(nil)
	obj.SetManagedFields(nil)
	obj.SetSelfLink("")

	forbidden := func(format string, args ...any) error {
		return apierrors.NewForbidden(q.gr(), obj.GetName(), fmt.Errorf(format, args...))
	}
	switch o := obj.(type) {
	case *corev1.Pod:
		if _, mirror := o.Annotations[corev1.MirrorPodAnnotationKey]; !mirror {
			return forbidden("pods are created in the cloud; here only the kubelet's mirror pods are")
		}
		if o.Spec.NodeName != f.cfg.NodeName {
			return forbidden("this is node %q, the pod's is %q", f.cfg.NodeName, o.Spec.NodeName)
		}
		o.Generation = 1
		o.Status = corev1.PodStatus{Phase: corev1.PodPending, QOSClass: qos.ComputePodQOS(o)}
	case *corev1.Node:
		if o.Name != f.cfg.NodeName {
			return forbidden("this is node %q", f.cfg.NodeName)
		}
	default:
		if q.resource.name == "csinodes" && obj.GetName() != f.cfg.NodeName {
			return forbidden("this is node %q", f.cfg.NodeName)
		}
	}
	return nil
}

// token answers a TokenRequest.
func (f *Facade) token(w http.ResponseWriter, r *http.Request, q *request) error {
	body, _, err := readBody(w, r, "application/json")
	if err != nil {
		return err
	}
	var req authenticationv1.TokenRequest
	if err := json.Unmarshal(body, &req); err != nil {
		return apierrors.NewBadRequest("the body is not a TokenRequest: " + err.Error())
	}
	if dry, err := dryRun(r); err != nil {
		return err
	} else if dry {
		return apierrors.NewBadRequest("dryRun is not supported for tokens")
	}
	if f.cfg.Tokens == nil {
		return apierrors.NewServiceUnavailable("no token source is configured")
	}
	got, err := f.cfg.Tokens.CreateToken(r.Context(), q.namespace, q.name, &req)
	if err != nil {
		var api apierrors.APIStatus
		if !errors.As(err, &api) && r.Context().Err() == nil {
			return apierrors.NewServiceUnavailable(err.Error())
		}
		return err
	}
	out := got.DeepCopy()
	out.Kind, out.APIVersion = "TokenRequest", authenticationv1.SchemeGroupVersion.String()
	out.Name, out.Namespace = q.name, q.namespace
	return f.respondValue(w, http.StatusCreated, out)
}
