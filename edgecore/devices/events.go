package devices

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/uuid"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/edgecore/store"
)

// recorder makes Events of devices. They go the way of the kubelet's: through
// the store's outbox, which is bounded.
type recorder struct {
	store *store.Store
	node  string
	log   *slog.Logger

	mu     sync.Mutex
	tokens float64 // for Events
	filled time.Time
	unsaid uint64
}

const (
	eventsPerMinute = 30 // of all devices together
	eventsAtOnce    = 60
	maxMessage      = 1024 // what an API server takes
)

// tell makes an Event of a Device, or of a DeviceDiscovery or TelemetryRoute.
func (r *recorder) tell(kind string, key devicetwin.Key, uid, typ, reason, message string) {
	if !r.room() {
		return
	}
	now := time.Now()
	e := corev1.Event{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Event"},
		ObjectMeta: metav1.ObjectMeta{
			Name: fmt.Sprintf("%.200s.%x", key.Name, now.UnixNano()), Namespace: key.Namespace,
			UID: uuid.NewUUID(), CreationTimestamp: metav1.NewTime(now.Truncate(time.Second)),
		},
		InvolvedObject: corev1.ObjectReference{
			APIVersion: v1alpha1.GroupAndVer, Kind: kind, Namespace: key.Namespace, Name: key.Name, UID: types.UID(uid),
		},
		Reason: reason, Message: message[:min(len(message), maxMessage)], Type: typ, Count: 1,
		FirstTimestamp: metav1.NewTime(now), LastTimestamp: metav1.NewTime(now),
		Source: corev1.EventSource{Component: "edgecore", Host: r.node}, ReportingController: "edgecore", ReportingInstance: r.node,
	}
	body, err := json.Marshal(e)
	if err == nil {
		k := store.Key{Resource: "events", Namespace: e.Namespace, Name: e.Name}
		err = r.store.Local(context.Background(), func(tx *store.Tx) error {
			if _, err := tx.Put(k, string(e.UID), body); err != nil {
				return err
			}
			tx.MarkDirty(store.Mark{Op: store.OpEvent, Key: k, UID: string(e.UID)})
			return nil
		})
	}
	if err != nil {
		r.log.Warn("an event is not made", "of", key.String(), "reason", reason, "err", err)
	}
}

// room takes a place among the Events of the moment.
func (r *recorder) room() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if r.filled.IsZero() {
		r.tokens = eventsAtOnce
	} else {
		r.tokens = min(eventsAtOnce, r.tokens+now.Sub(r.filled).Minutes()*eventsPerMinute)
	}
	r.filled = now
	if r.tokens < 1 {
		r.unsaid++
		return false
	}
	r.tokens--
	return true
}
