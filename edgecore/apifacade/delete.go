package apifacade

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/edgecore/store"
)

func (f *Facade) delete(w http.ResponseWriter, r *http.Request, q *request) error {
	opts, err := deleteOptions(w, r)
	if err != nil {
		return err
	}
	if q.resource.name == "csinodes" && q.name != f.cfg.NodeName {
		return apierrors.NewForbidden(q.gr(), q.name, fmt.Errorf("this is node %q", f.cfg.NodeName))
	}
	var out store.Object
	err = f.local(r, func(tx *store.Tx) error {
		cur, ok := tx.Get(q.key())
		if !ok {
			return apierrors.NewNotFound(q.gr(), q.name)
		}
		if err := checkPreconditions(q, cur, opts.Preconditions); err != nil {
			return err
		}
		if q.resource.name == "pods" {
			graceful, err := f.deleteGracefully(tx, q, cur, opts, &out)
			if graceful || err != nil {
				return err
			}
		}
		var err error
		if out, err = tx.Delete(q.key()); err != nil {
			return apierrors.NewInternalError(err)
		}
		if q.resource.name == "pods" || q.resource.name == "csinodes" {
			tx.MarkDirty(store.Mark{Op: store.OpDelete, Key: q.key(), UID: cur.UID})
		}
		return nil
	})
	if err != nil {
		return err
	}
	if q.resource.name == "pods" {
		f.respond(w, http.StatusOK, out.Body) // as the API server does
		return nil
	}
	return f.respondValue(w, http.StatusOK, metav1.Status{
		TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusSuccess, Code: http.StatusOK,
		Details: &metav1.StatusDetails{Name: q.name, Group: q.group, Kind: q.resource.name, UID: types.UID(out.UID)},
	})
}

// deleteOptions come as a body or as query parameters.
func deleteOptions(w http.ResponseWriter, r *http.Request) (*metav1.DeleteOptions, error) {
	body, _, err := readBody(w, r, "application/json")
	if err != nil {
		return nil, err
	}
	opts := &metav1.DeleteOptions{}
	if len(body) > 0 {
		if err := json.Unmarshal(body, opts); err != nil {
			return nil, apierrors.NewBadRequest("the body is not a DeleteOptions: " + err.Error())
		}
		if opts.Kind != "" && opts.Kind != "DeleteOptions" {
			return nil, apierrors.NewBadRequest(fmt.Sprintf("the body is a %s, expected DeleteOptions", opts.Kind))
		}
	}
	if g := r.URL.Query().Get("gracePeriodSeconds"); g != "" {
		n, err := strconv.ParseInt(g, 10, 64)
		if err != nil {
			return nil, apierrors.NewBadRequest(fmt.Sprintf("gracePeriodSeconds %q is not a number", g))
		}
		opts.GracePeriodSeconds = &n
	}
	if len(opts.DryRun) > 0 {
		query := r.URL.Query()
		query["dryRun"] = opts.DryRun
		r.URL.RawQuery = query.Encode() // the request is ours
	}
	return opts, nil
}

func checkPreconditions(q *request, cur store.Object, p *metav1.Preconditions) error {
	if p == nil {
		return nil
	}
	if p.UID != nil && string(*p.UID) != cur.UID {
		return apierrors.NewConflict(q.gr(), q.name, fmt.Errorf("Precondition failed: UID in precondition: %v, UID in object meta: %v", *p.UID, cur.UID))
	}
	if rv := strconv.FormatUint(cur.RV, 10); p.ResourceVersion != nil && *p.ResourceVersion != rv {
		return apierrors.NewConflict(q.gr(), q.name, fmt.Errorf("Precondition failed: ResourceVersion in precondition: %v, ResourceVersion in object meta: %v", *p.ResourceVersion, rv))
	}
	return nil
}

// deleteGracefully marks a pod deleted and leaves the rest to the kubelet, by
// the API server's rules (BeforeDelete and the pod strategy). It returns false
// when the pod is to go now. Finalizers do not hold a pod here: the controllers
// that clear them are in the cloud, and the cloud's copy waits for them.
func (f *Facade) deleteGracefully(tx *store.Tx, q *request, cur store.Object, opts *metav1.DeleteOptions, out *store.Object) (bool, error) {
	var pod corev1.Pod
	if err := json.Unmarshal(cur.Body, &pod); err != nil {
		return false, apierrors.NewInternalError(err)
	}
	grace := int64(corev1.DefaultTerminationGracePeriodSeconds)
	if pod.Spec.TerminationGracePeriodSeconds != nil {
		grace = *pod.Spec.TerminationGracePeriodSeconds
	}
	if opts.GracePeriodSeconds != nil {
		grace = *opts.GracePeriodSeconds
	}
	if grace < 0 {
		grace = 1
	}
	if pod.Spec.NodeName == "" || pod.Status.Phase == corev1.PodFailed || pod.Status.Phase == corev1.PodSucceeded {
		grace = 0
	}
	if grace == 0 {
		return false, nil
	}
	if pod.DeletionTimestamp != nil {
		current := int64(0)
		if pod.DeletionGracePeriodSeconds != nil {
			current = *pod.DeletionGracePeriodSeconds
		}
		if opts.GracePeriodSeconds == nil || grace >= current {
			*out = cur // already on its way, and no later than asked
			return true, nil
		}
	}
	top, meta, err := open(cur.Body)
	if err != nil {
		return false, err
	}
	// Counted from the first request, as the API server does when it shortens.
	start := time.Now()
	if pod.DeletionTimestamp != nil && pod.DeletionGracePeriodSeconds != nil {
		start = pod.DeletionTimestamp.Add(-time.Duration(*pod.DeletionGracePeriodSeconds) * time.Second)
	}
	at := metav1.NewTime(start.Add(time.Duration(min(grace, 1<<31)) * time.Second))
	if meta["deletionTimestamp"], err = json.Marshal(at); err != nil {
		return false, apierrors.NewInternalError(err)
	}
	meta["deletionGracePeriodSeconds"] = strconv.AppendInt(nil, grace, 10)
	if top["metadata"], err = json.Marshal(meta); err != nil {
		return false, apierrors.NewInternalError(err)
	}
	body, err := json.Marshal(top)
	if err != nil {
		return false, apierrors.NewInternalError(err)
	}
	if *out, err = tx.Put(q.key(), cur.UID, body); err != nil {
		return false, apierrors.NewInternalError(err)
	}
	return true, nil
}
