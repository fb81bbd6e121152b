package link

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/skerry-io/skerry/edgecore/store"
	"github.com/skerry-io/skerry/tunnel"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// ownNode is this node's Node with what the cloud has put on it.
func ownNode() edgeapi.Upsert {
	n := upsert("nodes", "edge-1", "un", `,"status":{"phase":"here"},"spec":{"unschedulable":true,"taints":[{"key":"node.kubernetes.io/unreachable","effect":"NoExecute"}]}`)
	n.Body = json.RawMessage(strings.Replace(string(n.Body), `"metadata":{`,
		`"metadata":{"labels":{"example.com/site":"7","node-role.kubernetes.io/worker":"","kubernetes.io/hostname":"edge-1"},"annotations":{"a":"b"},"finalizers":["f"],`, 1))
	return n
}

func joinedAs(id string, then WhenDeleted) func(*Config) {
	return func(c *Config) { c.JoinID, c.WhenDeleted = id, then }
}

// dismiss has the hub say that the Node is gone.
func (c *conversation) dismiss() {
	c.t.Helper()
	c.send(edgeapi.Goodbye{Reason: edgeapi.ReasonNodeDeleted, Message: "the Node object was deleted"})
	c.ended()
}

func deletionMark(t *testing.T, s *store.Store, k edgeapi.Ref) bool {
	t.Helper()
	o, ok := s.Get(keyOf(k))
	if !ok {
		t.Fatalf("%v left the store", k)
	}
	return strings.Contains(string(o.Body), "deletionTimestamp")
}

// A node whose Node is deleted keeps its pods over restarts, registers nothing,
// and leaves the hub alone, until it has joined again.
func TestADeletedNodeKeepsItsPodsUntilItHasJoinedAgain(t *testing.T) {
	s := openStore(t)
	node, pod, gone := ownNode(), upsert("pods", "stays", "u1", ""), upsert("pods", "gone", "u2", "")
	r := newRig(t, s, joinedAs("first", ""))
	r.synced(node, pod, gone).dismiss()
	r.await("the deletion is known", func() bool { return !r.State().Deleted.IsZero() && !r.State().Connected })
	at := r.State().Deleted
	r.stop()

	// The next process of the same joining.
	if again, err := Rejoin(t.Context(), s, "edge-1", "first", nil); again || err != nil {
		t.Fatalf("joined again: %v, %v", again, err)
	}
	r = newRig(t, s, joinedAs("first", ""))
	if !r.State().Deleted.Equal(at) {
		t.Errorf("deleted at %v, before the restart %v", r.State().Deleted, at)
	}
	select {
	case <-r.FirstSync():
	default:
		t.Error("the pods wait for a sync")
	}
	c := r.welcome()
	c.quiet("before the hub's differences")
	if !hasItem(c.items, node.Ref) {
		t.Errorf("the inventory hides the Node that it had: %v", c.items)
	}
	c.dismiss()
	r.await("the end", func() bool { return !r.State().Connected })
	for _, up := range []edgeapi.Upsert{pod, gone} {
		if deletionMark(t, s, up.Ref) {
			t.Errorf("%s is being ended", up.Name)
		}
	}
	r.stop()

	// It joins again.
	taints := []corev1.Taint{{Key: "example.com/mine", Effect: corev1.TaintEffectNoSchedule}}
	if again, err := Rejoin(t.Context(), s, "edge-1", "second", taints); !again || err != nil {
		t.Fatalf("joined again: %v, %v", again, err)
	}
	r = newRig(t, s, joinedAs("second", ""))
	c = r.welcome()
	if hasItem(c.items, node.Ref) || !hasItem(c.items, pod.Ref) {
		t.Errorf("inventory %v; want the pods and no Node", c.items)
	}
	c.delta(edgeapi.Delta{Seq: 1, Deletes: []edgeapi.Item{{Ref: gone.Ref, UID: "u2"}}, Synced: true})
	if !deletionMark(t, s, gone.Ref) || deletionMark(t, s, pod.Ref) {
		t.Error("the pod that the cloud lacks must end, the other stay")
	}
	var w edgeapi.Write
	for w.Op != edgeapi.OpCreate || w.Resource != "nodes" {
		w = receive[edgeapi.Write](c)
		if w.Op != edgeapi.OpCreate {
			c.result(w, 404)
		}
	}
	var n corev1.Node
	must(t, json.Unmarshal(w.Body, &n))
	_, role := n.Labels["node-role.kubernetes.io/worker"]
	if w.UID != "" || role || n.Labels["example.com/site"] != "7" || n.Labels["kubernetes.io/hostname"] != "edge-1" ||
		n.Spec.Unschedulable || len(n.Spec.Taints) != 1 || n.Spec.Taints[0].Key != "example.com/mine" ||
		len(n.Finalizers) != 0 || n.Annotations["a"] != "" || n.Status.Phase != "here" {
		t.Errorf("registers as %s (uid %q)", w.Body, w.UID)
	}
	c.result(w, 200)
	anew := upsert("nodes", "edge-1", "un2", `,"status":{}`)
	c.send(edgeapi.Delta{Seq: 2, Upserts: []edgeapi.Upsert{anew}})
	r.await("the new uid", func() bool {
		o, _ := s.Get(keyOf(node.Ref))
		return o.UID == "un2" && strings.Contains(string(o.Body), `"here"`)
	})
	if !r.State().Deleted.IsZero() {
		t.Error("still deleted")
	}
}

func hasItem(items []edgeapi.Item, ref edgeapi.Ref) bool {
	for _, it := range items {
		if it.Ref == ref {
			return true
		}
	}
	return false
}

// With WhenDeleted: stop the pods end in order; static ones are not the cloud's.
func TestADeletedNodeStopsItsPods(t *testing.T) {
	s := openStore(t)
	pod, mirror := upsert("pods", "ends", "u1", ""), upsert("pods", "static-edge-1", "u2", "")
	mirror.Body = json.RawMessage(strings.Replace(string(mirror.Body), `"metadata":{`, `"metadata":{"annotations":{"kubernetes.io/config.mirror":"x"},`, 1))
	r := newRig(t, s, joinedAs("first", StopPods))
	r.synced(ownNode(), pod, mirror).dismiss()
	r.await("the pod's end", func() bool { return deletionMark(t, s, pod.Ref) })
	if deletionMark(t, s, mirror.Ref) {
		t.Error("the static pod ends")
	}
	r.await("the state", func() bool { return !r.State().Deleted.IsZero() })
}

// An operator may choose to stop them later.
func TestADeletedNodeStopsItsPodsLater(t *testing.T) {
	s := openStore(t)
	pod := upsert("pods", "ends", "u1", "")
	r := newRig(t, s, joinedAs("first", KeepPods))
	r.synced(ownNode(), pod).dismiss()
	r.await("the state", func() bool { return !r.State().Deleted.IsZero() })
	r.stop()
	r = newRig(t, s, joinedAs("first", StopPods))
	r.await("the pod's end", func() bool { return deletionMark(t, s, pod.Ref) })
}

// A Node that is back in the cloud, as from a backup, ends the state.
func TestADeletedNodeThatIsBack(t *testing.T) {
	s := openStore(t)
	r := newRig(t, s, joinedAs("first", ""))
	r.synced(ownNode()).dismiss()
	r.await("the state", func() bool { return !r.State().Deleted.IsZero() })
	r.stop()
	r = newRig(t, s, joinedAs("first", ""))
	r.synced()
	r.await("the state's end", func() bool { return r.State().Deleted.IsZero() })
	if _, ok := s.Private(privateKind, deletedKey); ok {
		t.Error("the note is still there")
	}
}

// A deleted node asks rarely.
func TestADeletedNodeAsksRarely(t *testing.T) {
	s := openStore(t)
	told := make(chan time.Duration, 16)
	r := newRig(t, s, joinedAs("first", ""), func(c *Config) {
		c.Dialer.Retry = func(_ error, wait time.Duration) error { told <- wait; return nil }
	})
	r.synced(ownNode()).dismiss()
	if wait := <-told; wait < deletedRetry/2 || wait > deletedRetry {
		t.Errorf("asks again after %v", wait)
	}
	var later *tunnel.Later
	if err := r.deleted(t.Context(), errors.New("gone")); !errors.As(err, &later) {
		t.Errorf("%v", err)
	}
}

func TestLabelsThatANodeMayGiveItself(t *testing.T) {
	for label, want := range map[string]bool{
		"plain": true, "example.com/x": true, "topology.kubernetes.io/zone": true, "kubernetes.io/hostname": true,
		"node.kubernetes.io/anything": true, "kubelet.kubernetes.io/x": true,
		"node-role.kubernetes.io/worker": false, "kubernetes.io/other": false, "k8s.io/x": false, "a.k8s.io/x": false,
		"node-restriction.kubernetes.io/x": false, "example.node-restriction.kubernetes.io/x": false,
	} {
		if got := mayLabelItself(label); got != want {
			t.Errorf("%s: %v", label, got)
		}
	}
}
