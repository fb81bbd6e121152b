package link

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kubeletapis "k8s.io/kubelet/pkg/apis"

	"github.com/skerry-io/skerry/edgecore/store"
	"github.com/skerry-io/skerry/tunnel"
)

// A Node object that is deleted in the cloud ends this machine's membership.
// The hub says so in place of the differences (edgeapi.ReasonNodeDeleted), and
// from then on, over restarts, until this machine joins again:
//
//   - the pods run on from the store, or are stopped, as Config.WhenDeleted says;
//   - nothing is registered, sent or taken. Every deletedRetry or so the hub is
//     asked whether the Node is back, as when a backup was restored; then the
//     node goes on as after any absence;
//   - the status and the log say what to do.
//
// After a new joining, Rejoin has the Node made anew with the next connection.
// Pods that the cloud no longer has are then ended in order, and those it still
// has, by UID, are untouched.

// WhenDeleted says what becomes of the pods of a Node deleted in the cloud.
type WhenDeleted string

const (
	KeepPods WhenDeleted = "keep" // they run on
	StopPods WhenDeleted = "stop" // they are ended in order; static pods run on
)

// deletedRetry is about how long a deleted node waits before it asks again.
const deletedRetry = 30 * time.Minute

// noteTimeout bounds a commit of what must be noted although the tunnel ends.
const noteTimeout = 30 * time.Second

const (
	privateKind = "link"
	deletedKey  = "node-deleted"
)

// deletion is kept in the store from the moment the hub tells of it.
type deletion struct {
	Join string    `json:"join"` // the joining that it ended
	At   time.Time `json:"at"`   // when this node heard of it
}

func storedDeletion(s *store.Store) (d deletion, ok bool, err error) {
	raw, ok := s.Private(privateKind, deletedKey)
	if !ok {
		return d, false, nil
	}
	if err := json.Unmarshal(raw, &d); err != nil {
		return d, false, fmt.Errorf("link: the note of the Node's deletion: %w", err)
	}
	return d, true, nil
}

// Rejoin prepares the store of a node that was deleted in the cloud and has
// joined again since: its Node is to be registered as a new one. It must be
// called before the kubelet starts; in any other case it does nothing.
//
// The new Node has the taints that the node is configured with. It keeps the
// labels that a node may give itself, so that the node selectors of pods that
// run still hold.
func Rejoin(ctx context.Context, s *store.Store, node, join string, taints []corev1.Taint) (bool, error) {
	d, deleted, err := storedDeletion(s)
	if err != nil || !deleted || d.Join == join {
		return false, err
	}
	err = s.Local(ctx, func(tx *store.Tx) error {
		tx.DeletePrivate(privateKind, deletedKey)
		key := store.Key{Resource: "nodes", Name: node}
		o, ok := tx.Get(key)
		if !ok {
			return nil // the kubelet registers
		}
		body, err := anew(o.Body, taints)
		if err != nil {
			return err
		}
		if _, err := tx.PutLocal(key, o.UID, body); err != nil {
			return err
		}
		tx.MarkDirty(store.Mark{Op: store.OpCreate, Key: key, UID: o.UID})
		tx.MarkDirty(store.Mark{Op: store.OpStatus, Key: key, UID: o.UID})
		key.Resource = "csinodes" // it went with its owner
		if o, ok := tx.Get(key); ok {
			tx.MarkDirty(store.Mark{Op: store.OpCreate, Key: key, UID: o.UID})
		}
		return nil
	})
	if err != nil {
		return false, fmt.Errorf("prepare the Node's new registration: %w", err)
	}
	return true, nil
}

// anew is what a Node registers with that was deleted.
func anew(body []byte, taints []corev1.Taint) ([]byte, error) {
	var n corev1.Node
	if err := json.Unmarshal(body, &n); err != nil {
		return nil, fmt.Errorf("decode the Node: %w", err)
	}
	n.ObjectMeta = metav1.ObjectMeta{
		Name: n.Name, UID: n.UID, CreationTimestamp: n.CreationTimestamp,
		Labels: n.Labels, Annotations: n.Annotations,
	}
	for k := range n.Labels {
		if !mayLabelItself(k) {
			delete(n.Labels, k)
		}
	}
	for k := range n.Annotations {
		if !strings.HasPrefix(k, "volumes.kubernetes.io/") && !strings.HasPrefix(k, "csi.volume.kubernetes.io/") {
			delete(n.Annotations, k)
		}
	}
	n.Spec = corev1.NodeSpec{Taints: taints, ProviderID: n.Spec.ProviderID}
	return json.Marshal(&n)
}

// mayLabelItself follows the NodeRestriction admission plugin, which refuses a
// registration with any other label
// (plugin/pkg/admission/noderestriction/admission.go, getForbiddenLabels).
func mayLabelItself(label string) bool {
	namespace, _, ok := strings.Cut(label, "/")
	if !ok {
		return true
	}
	in := func(domain string) bool { return namespace == domain || strings.HasSuffix(namespace, "."+domain) }
	if in("node-restriction.kubernetes.io") {
		return false
	}
	return !in("kubernetes.io") && !in("k8s.io") || kubeletapis.IsKubeletLabel(label)
}

// deleted notes that the Node was deleted in the cloud, durably, and does what
// the operator chose. What it returns ends the tunnel for a while.
func (l *Link) deleted(ctx context.Context, goodbye error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), noteTimeout)
	defer cancel()
	later := &tunnel.Later{Wait: deletedRetry, Err: goodbye}
	if l.isDeleted() {
		return later
	}
	if l.cfg.WhenDeleted == StopPods {
		if err := l.stopPods(ctx); err != nil {
			return fmt.Errorf("stop the pods, as %w: %w", goodbye, err)
		}
	}
	d := deletion{Join: l.cfg.JoinID, At: time.Now().UTC().Truncate(time.Second)}
	raw, err := json.Marshal(d)
	if err == nil {
		err = l.cfg.Store.Local(ctx, func(tx *store.Tx) error { return tx.PutPrivate(privateKind, deletedKey, "", raw) })
	}
	if err != nil {
		// Not noted, not known: the hub tells again.
		return fmt.Errorf("note that %w: %w", goodbye, err)
	}
	l.mu.Lock()
	l.state.Deleted = d.At
	l.mu.Unlock()
	l.log.Warn("this node's Node object was deleted in the cloud; it needs a new join", "node", l.cfg.NodeName,
		"pods", string(l.cfg.WhenDeleted), "next", RejoinHint(l.cfg.NodeName))
	return later
}

// RejoinHint says how a deleted node becomes one again.
func RejoinHint(node string) string {
	return "at the hub run: cloudhub token create --allow-replace --node-name " + node +
		"; here run the edgecore join command that it prints, and restart edgecore"
}

// stopPods ends the cloud's pods as if the cloud had deleted each.
func (l *Link) stopPods(ctx context.Context) error {
	var d store.Delta
	pods, _ := l.cfg.Store.List("pods", "")
	for _, o := range pods {
		var p metav1.PartialObjectMetadata
		if err := json.Unmarshal(o.Body, &p); err != nil {
			return fmt.Errorf("decode %s: %w", o.Key, err)
		}
		if _, static := p.Annotations[corev1.MirrorPodAnnotationKey]; !static {
			d.Deletions = append(d.Deletions, store.Deletion{Key: o.Key, UID: o.UID})
		}
	}
	return l.cfg.Store.ApplyDelta(ctx, d)
}

// returned notes that the cloud has the Node again.
func (l *Link) returned(ctx context.Context) {
	if !l.isDeleted() {
		return
	}
	err := l.cfg.Store.Local(ctx, func(tx *store.Tx) error {
		tx.DeletePrivate(privateKind, deletedKey)
		return nil
	})
	if err != nil {
		l.log.Error("the note of the Node's deletion stays although the Node is back", "err", err)
		return
	}
	l.mu.Lock()
	l.state.Deleted = time.Time{}
	l.mu.Unlock()
	l.log.Info("the cloud has this node's Node object again", "node", l.cfg.NodeName)
}

func (l *Link) isDeleted() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.state.Deleted.IsZero()
}
