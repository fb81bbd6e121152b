package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/uuid"

	"github.com/skerry-io/skerry/edgecore/store"
)

// notices tells of the store's troubles as Events of the Node, which the cloud
// gets like the kubelet's own.
type notices struct {
	store  *store.Store
	node   string
	inStep func() bool // with the cloud
	log    *slog.Logger

	unwritable bool
}

// maxMessage is what an API server takes.
const maxMessage = 1024

// noticeEvery is how often the store is asked. It costs a lock.
const noticeEvery = 5 * time.Second

func (n *notices) run(ctx context.Context) error {
	if m := n.store.Mended(); m != nil {
		n.tell(ctx, corev1.EventTypeWarning, "StoreMended", m.At, fmt.Sprintf(
			"The node's store was damaged and was mended at the start of edgecore: %d pods, %d objects, %d not found. Cause: %s", m.Pods, m.Objects, m.Missing, m.Cause))
	}
	tick := time.NewTicker(noticeEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			n.disk(ctx)
			n.drops(ctx)
		}
	}
}

func (n *notices) disk(ctx context.Context) {
	t := n.store.Trouble()
	switch {
	case t != nil && !n.unwritable:
		n.tell(ctx, corev1.EventTypeWarning, "StoreUnwritable", t.Since, "The disk takes no writes; pods run on from memory: "+t.Error)
	case t == nil && n.unwritable:
		n.tell(ctx, corev1.EventTypeNormal, "StoreWritable", time.Now(), "The disk takes writes again")
	}
	n.unwritable = t != nil
}

// drops tells what there was no room for in the outbox, once the node is in
// step again: then no more is dropped.
func (n *notices) drops(ctx context.Context) {
	box := n.store.Outbox()
	d := box.Unreported()
	if d.Events == 0 && d.States == 0 || !n.inStep() {
		return
	}
	var what []string
	if d.Events > 0 {
		what = append(what, fmt.Sprintf("%d Events", d.Events))
	}
	if d.States > 0 {
		what = append(what, fmt.Sprintf("%d last statuses or deletions of pods that are gone", d.States))
	}
	message := fmt.Sprintf("%s were dropped while the node was away, since %s: its outbox was full",
		strings.Join(what, " and "), d.Since.UTC().Format(time.RFC3339))
	if n.tell(ctx, corev1.EventTypeWarning, "EventsDropped", d.Since, message) {
		box.Reported(d)
	}
}

func (n *notices) tell(ctx context.Context, kind, reason string, since time.Time, message string) bool {
	now := time.Now()
	message = message[:min(len(message), maxMessage)]
	e := corev1.Event{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Event"},
		ObjectMeta: metav1.ObjectMeta{
			Name: fmt.Sprintf("%s.%x", n.node, now.UnixNano()), Namespace: metav1.NamespaceDefault,
			UID: uuid.NewUUID(), CreationTimestamp: metav1.NewTime(now.Truncate(time.Second)),
		},
		// The kubelet's own Events of its Node name it like this.
		InvolvedObject: corev1.ObjectReference{Kind: "Node", Name: n.node, UID: types.UID(n.node)},
		Reason:         reason, Message: message, Type: kind, Count: 1,
		FirstTimestamp: metav1.NewTime(since), LastTimestamp: metav1.NewTime(now),
		Source: corev1.EventSource{Component: "edgecore", Host: n.node}, ReportingController: "edgecore", ReportingInstance: n.node,
	}
	body, err := json.Marshal(e)
	if err == nil {
		k := store.Key{Resource: "events", Namespace: e.Namespace, Name: e.Name}
		err = n.store.Local(ctx, func(tx *store.Tx) error {
			if _, err := tx.Put(k, string(e.UID), body); err != nil {
				return err
			}
			tx.MarkDirty(store.Mark{Op: store.OpEvent, Key: k, UID: string(e.UID)})
			return nil
		})
	}
	if err != nil {
		n.log.Error("the node's event is not made", "reason", reason, "err", err)
		return false
	}
	return true
}
