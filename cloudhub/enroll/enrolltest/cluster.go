// Package enrolltest gives tests a hub that nodes can join, without a cluster:
// the real enroll package behind a real TLS listener, over client-go's object
// tracker to which the API server's rules that enroll rests on were added
// (resourceVersion, uid and preconditions of Secrets). What the tracker cannot
// show is tested against a real API server.
package enrolltest

import (
	"fmt"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
)

// Client returns an empty cluster.
func Client() *fake.Clientset {
	client := fake.NewSimpleClientset()
	v := &versions{tracker: client.Tracker()}
	client.PrependReactor("create", "secrets", v.create)
	client.PrependReactor("update", "secrets", v.update)
	client.PrependReactor("delete", "secrets", v.delete)
	return client
}

// versions adds optimistic concurrency to the tracker. The clientset calls
// reactors one at a time.
type versions struct {
	tracker clienttesting.ObjectTracker
	last    int
}

func (v *versions) next() string { v.last++; return strconv.Itoa(v.last) }

func (v *versions) stored(action clienttesting.Action, name string) (*corev1.Secret, error) {
	obj, err := v.tracker.Get(action.GetResource(), action.GetNamespace(), name)
	if err != nil {
		return nil, err
	}
	return obj.(*corev1.Secret), nil
}

func (v *versions) create(action clienttesting.Action) (bool, runtime.Object, error) {
	s := action.(clienttesting.CreateAction).GetObject().(*corev1.Secret).DeepCopy()
	s.Namespace = action.GetNamespace()
	s.ResourceVersion = v.next()
	s.UID = types.UID(fmt.Sprintf("uid-%d", v.last))
	s.CreationTimestamp = metav1.NewTime(time.Now())
	return true, s.DeepCopy(), v.tracker.Create(action.GetResource(), s, action.GetNamespace())
}

func (v *versions) update(action clienttesting.Action) (bool, runtime.Object, error) {
	s := action.(clienttesting.UpdateAction).GetObject().(*corev1.Secret).DeepCopy()
	old, err := v.stored(action, s.Name)
	if err != nil {
		return true, nil, err
	}
	if s.ResourceVersion != "" && s.ResourceVersion != old.ResourceVersion {
		return true, nil, conflict(action, s.Name, "the object has been modified")
	}
	if old.Immutable != nil && *old.Immutable {
		return true, nil, apierrors.NewForbidden(action.GetResource().GroupResource(), s.Name, fmt.Errorf("field is immutable when `immutable` is set"))
	}
	s.ResourceVersion, s.UID, s.CreationTimestamp = v.next(), old.UID, old.CreationTimestamp
	return true, s.DeepCopy(), v.tracker.Update(action.GetResource(), s, action.GetNamespace())
}

func (v *versions) delete(action clienttesting.Action) (bool, runtime.Object, error) {
	del := action.(clienttesting.DeleteActionImpl)
	old, err := v.stored(action, del.Name)
	if err != nil {
		return true, nil, err
	}
	if p := del.DeleteOptions.Preconditions; p != nil {
		if p.UID != nil && *p.UID != old.UID || p.ResourceVersion != nil && *p.ResourceVersion != old.ResourceVersion {
			return true, nil, conflict(action, del.Name, "the precondition failed")
		}
	}
	return true, nil, v.tracker.Delete(action.GetResource(), action.GetNamespace(), del.Name)
}

func conflict(action clienttesting.Action, name, why string) error {
	return apierrors.NewConflict(action.GetResource().GroupResource(), name, fmt.Errorf("%s", why))
}
