package store

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	kubetypes "k8s.io/kubernetes/pkg/kubelet/types"
)

// patchStatus is a local status write, as the facade makes it.
func patchStatus(t testing.TB, s *Store, k Key, status string) {
	t.Helper()
	err := s.Local(t.Context(), func(tx *Tx) error {
		cur, ok := tx.Get(k)
		if !ok {
			return fmt.Errorf("%s not found", k)
		}
		d, err := parseDoc(cur.Body)
		if err != nil {
			return err
		}
		d.top["status"] = []byte(status)
		body, err := d.encode()
		if err != nil {
			return err
		}
		if _, err := tx.Put(k, cur.UID, body); err != nil {
			return err
		}
		tx.MarkDirty(Mark{Op: OpStatus, Key: k, UID: cur.UID})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// kubeletDelete is the kubelet's last word on a pod.
func kubeletDelete(t testing.TB, s *Store, k Key) {
	t.Helper()
	err := s.Local(t.Context(), func(tx *Tx) error {
		o, err := tx.Delete(k)
		if err != nil {
			return err
		}
		tx.MarkDirty(Mark{Op: OpDelete, Key: k, UID: o.UID})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// follow returns a function that gives "TYPE name uid" of what happened since.
func follow(t testing.TB, s *Store, resource string) func() []string {
	t.Helper()
	w, err := s.Watch(t.Context(), resource, s.RV())
	if err != nil {
		t.Fatal(err)
	}
	return func() []string {
		events, _, err := w.Next(t.Context(), time.Millisecond)
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, e := range events {
			out = append(out, fmt.Sprintf("%s %s %s", e.Type, e.Object.Name, e.Object.UID))
		}
		return out
	}
}

func same(t testing.TB, what string, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

// pendingOps lists what is in the outbox as "op name uid".
func pendingOps(t testing.TB, s *Store) []string {
	t.Helper()
	s.mu.RLock()
	defer s.mu.RUnlock()
	var out []string
	for el := s.outbox.order.Front(); el != nil; el = el.Next() {
		e := el.Value.(*entry)
		out = append(out, fmt.Sprintf("%s %s %s", e.op, e.key.Name, e.uid))
	}
	return out
}

func TestKubeletConditionsAreUpstreams(t *testing.T) {
	for _, c := range kubetypes.PodConditionsByKubelet {
		if !kubeletOwns(string(c)) {
			t.Errorf("the kubelet owns %s, the store does not know", c)
		}
	}
	for _, c := range []corev1.PodConditionType{"Ready", "DisruptionTarget", "custom.example/gate", "PodReadyToStartContainers", "AllContainersRestarting"} {
		if up := kubetypes.PodConditionByKubelet(c); up && !kubeletOwns(string(c)) {
			t.Errorf("%s: upstream says the kubelet owns it", c)
		}
	}
}

func TestLocalStatusWins(t *testing.T) {
	s := mustOpen(t, testConfig(t))
	k := podKey("a")
	upsertPod(t, s, "a", "u1", "1", `,"status":{"phase":"Pending","conditions":[{"type":"gate","status":"False"}]}`)
	patchStatus(t, s, k, `{"phase":"Running","conditions":[{"type":"Ready","status":"True"},{"type":"gate","status":"False"}]}`)
	apply(t, s, Delta{Upserts: []Upsert{{Key: k, UID: "u1", Rev: "2", Body: []byte(
		`{"metadata":{"name":"a","labels":{"x":"y"}},"spec":{"nodeName":"n1"},"status":{"phase":"Unknown","nominatedNodeName":"z","conditions":[{"type":"Ready","status":"Unknown"},{"type":"gate","status":"True"}]}}`)}}})
	o, _ := s.Get(k)
	if at(t, o.Body, "status", "phase") != "Running" || at(t, o.Body, "metadata", "labels", "x") != "y" || at(t, o.Body, "status", "nominatedNodeName") != "z" {
		t.Errorf("merged: %s", o.Body)
	}
	conds := fmt.Sprint(at(t, o.Body, "status", "conditions"))
	if conds != "[map[status:True type:Ready] map[status:True type:gate]]" {
		t.Errorf("conditions: %s", conds)
	}
	// A feed without status leaves it alone; a deletion known here is not undone.
	apply(t, s, Delta{Upserts: []Upsert{{Key: k, UID: "u1", Rev: "3", Body: []byte(`{"metadata":{"name":"a","deletionTimestamp":"2026-01-01T00:00:00Z","deletionGracePeriodSeconds":30}}`)}}})
	apply(t, s, Delta{Upserts: []Upsert{{Key: k, UID: "u1", Rev: "4", Body: []byte(`{"metadata":{"name":"a"}}`)}}})
	o, _ = s.Get(k)
	if fmt.Sprint(at(t, o.Body, "status", "conditions")) != conds || at(t, o.Body, "metadata", "deletionTimestamp") == nil || o.Rev != "4" {
		t.Errorf("after updates without status: %s", o.Body)
	}
}

func TestEchoCostsNothing(t *testing.T) {
	s := mustOpen(t, testConfig(t))
	upsertPod(t, s, "a", "u1", "1", "")
	events, commits, rv := follow(t, s, "pods"), s.Commits(), s.RV()
	upsertPod(t, s, "a", "u1", "2", "")
	upsertPod(t, s, "a", "u1", "3", "")
	if got := events(); len(got) != 0 || s.Commits() != commits || s.RV() != rv {
		t.Errorf("an update that changes nothing: events %v, commits %d, rv %d", got, s.Commits()-commits, s.RV()-rv)
	}
	if inv := s.Inventory(); len(inv) != 1 || inv[0].Rev != "3" {
		t.Errorf("inventory: %v", inv)
	}
	cfg := s.cfg
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if inv := mustOpen(t, cfg).Inventory(); len(inv) != 1 || inv[0].Rev != "3" {
		t.Errorf("inventory after a restart: %v", inv)
	}
}

func TestNamesakeWaits(t *testing.T) {
	cfg := testConfig(t)
	s := mustOpen(t, cfg)
	k := podKey("a")
	upsertPod(t, s, "a", "u1", "1", "")
	events := follow(t, s, "pods")
	upsertPod(t, s, "a", "u2", "2", "")
	same(t, "events", events(), "MODIFIED a u1")
	o, _ := s.Get(k)
	if o.UID != "u1" || at(t, o.Body, "metadata", "deletionTimestamp") == nil || at(t, o.Body, "metadata", "deletionGracePeriodSeconds") != 30.0 {
		t.Errorf("the old pod: %s", o.Body)
	}
	if inv := s.Inventory(); len(inv) != 1 || inv[0].UID != "u2" {
		t.Errorf("inventory: %v", inv)
	}
	// The cloud confirms the old one's end: its containers still need the kubelet's.
	apply(t, s, Delta{Deletions: []Deletion{{k, "u1"}}})
	if o, _ := s.Get(k); o.UID != "u1" {
		t.Errorf("the namesake did not wait: %+v", o)
	}
	if err := s.Close(); err != nil { // and all that survives a restart
		t.Fatal(err)
	}
	s = mustOpen(t, cfg)
	events = follow(t, s, "pods")
	kubeletDelete(t, s, k)
	same(t, "events", events(), "DELETED a u1", "ADDED a u2")
	same(t, "outbox", pendingOps(t, s), "delete a u1")
	if o, _ := s.Get(k); o.UID != "u2" || o.Rev != "2" || at(t, o.Body, "metadata", "deletionTimestamp") != nil {
		t.Errorf("the namesake: %+v %s", o, o.Body)
	}
	// What the cloud still sends of the ended pod is stale.
	upsertPod(t, s, "a", "u1", "9", "")
	if o, _ := s.Get(k); o.UID != "u2" {
		t.Errorf("an ended pod came back: %+v", o)
	}
}

func TestReplacedInOneDelta(t *testing.T) {
	s := mustOpen(t, testConfig(t))
	k := podKey("a")
	upsertPod(t, s, "a", "u1", "1", "")
	apply(t, s, Delta{Deletions: []Deletion{{k, "u1"}}, Upserts: []Upsert{{k, "u2", "2", podBody("a", "u2", "")}}})
	if o, _ := s.Get(k); o.UID != "u1" || at(t, o.Body, "metadata", "deletionTimestamp") == nil {
		t.Errorf("the old pod was not left to the kubelet: %+v", o)
	}
	apply(t, s, Delta{Deletions: []Deletion{{k, "u2"}}})
	kubeletDelete(t, s, k)
	if o, ok := s.Get(k); ok {
		t.Errorf("a namesake deleted while it waited came in: %+v", o)
	}
}

func TestForceDeletion(t *testing.T) {
	s := mustOpen(t, testConfig(t))
	k := podKey("a")
	upsertPod(t, s, "a", "u1", "1", "")
	patchStatus(t, s, k, `{"phase":"Running"}`)
	apply(t, s, Delta{Deletions: []Deletion{{k, "other"}}})
	if _, ok := s.Get(k); !ok {
		t.Fatal("a deletion of another uid removed the pod")
	}
	for range 2 { // the hub says it again at each reconnect
		apply(t, s, Delta{Deletions: []Deletion{{k, "u1"}}})
		if o, _ := s.Get(k); o.UID != "u1" || at(t, o.Body, "metadata", "deletionTimestamp") == nil {
			t.Errorf("the pod was not left to the kubelet: %+v", o)
		}
		same(t, "outbox", pendingOps(t, s))
	}
	// The namesake comes later than the deletion, and waits all the same.
	upsertPod(t, s, "a", "u2", "2", "")
	if o, _ := s.Get(k); o.UID != "u1" {
		t.Errorf("the namesake did not wait: %+v", o)
	}
	kubeletDelete(t, s, k)
	if o, _ := s.Get(k); o.UID != "u2" || at(t, o.Body, "metadata", "deletionTimestamp") != nil {
		t.Errorf("the namesake: %+v", o)
	}
	// One without containers goes at once.
	patchStatus(t, s, k, `{"phase":"Failed"}`)
	apply(t, s, Delta{Deletions: []Deletion{{k, "u2"}}})
	if _, ok := s.Get(k); ok {
		t.Error("the failed pod is still there")
	}
}

func TestDeletedHereIsNotBroughtBack(t *testing.T) {
	cfg := testConfig(t)
	s := mustOpen(t, cfg)
	k := podKey("a")
	upsertPod(t, s, "a", "u1", "1", "")
	patchStatus(t, s, k, `{"phase":"Succeeded"}`)
	kubeletDelete(t, s, k)
	for range 2 {
		upsertPod(t, s, "a", "u1", "2", "")
		if _, ok := s.Get(k); ok {
			t.Fatal("a pod the kubelet ended came back")
		}
		// The last status is told before the end, even after a restart.
		same(t, "outbox", pendingOps(t, s), "status a u1", "delete a u1")
		p, err := s.outbox.Next(t.Context(), LaneAll)
		if err != nil || at(t, p[0].Body, "status", "phase") != "Succeeded" {
			t.Fatalf("last status: %v %+v", err, p)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = mustOpen(t, cfg)
	}
	apply(t, s, Delta{Deletions: []Deletion{{k, "u1"}}})
	same(t, "outbox after the cloud's confirmation", pendingOps(t, s))
}

func TestMirrorPodIsAdopted(t *testing.T) {
	s := mustOpen(t, testConfig(t))
	k := podKey("static")
	const mirror = `"annotations":{"kubernetes.io/config.mirror":"h"}`
	err := s.Local(t.Context(), func(tx *Tx) error {
		if _, err := tx.Put(k, "local", []byte(`{"metadata":{"name":"static",`+mirror+`}}`)); err != nil {
			return err
		}
		tx.MarkDirty(Mark{Op: OpCreate, Key: k, UID: "local"})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	patchStatus(t, s, k, `{"phase":"Running"}`)
	same(t, "outbox", pendingOps(t, s), "create static local", "status static local")
	if inv := s.Inventory(); len(inv) != 0 {
		t.Errorf("a local pod is in the inventory: %v", inv)
	}
	events := follow(t, s, "pods")
	apply(t, s, Delta{Upserts: []Upsert{{k, "cloud", "5", []byte(`{"metadata":{"name":"static",` + mirror + `},"status":{"phase":"Pending"}}`)}}})
	same(t, "events", events(), "DELETED static local", "ADDED static cloud")
	same(t, "outbox", pendingOps(t, s), "status static cloud")
	if o, _ := s.Get(k); o.Rev != "5" || at(t, o.Body, "status", "phase") != "Running" {
		t.Errorf("adopted: %+v %s", o, o.Body)
	}
}

func TestNodeMerge(t *testing.T) {
	s := mustOpen(t, testConfig(t))
	k := Key{"nodes", "", "n1"}
	err := s.Local(t.Context(), func(tx *Tx) error {
		_, err := tx.Put(k, "local", []byte(`{"metadata":{"name":"n1","labels":{"os":"linux","zone":"mine"}},"status":{"v":"local"}}`))
		tx.MarkDirty(Mark{Op: OpCreate, Key: k, UID: "local"})
		tx.MarkDirty(Mark{Op: OpStatus, Key: k, UID: "local"})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	events := follow(t, s, "nodes")
	apply(t, s, Delta{Upserts: []Upsert{{k, "cloud", "7", []byte(`{"metadata":{"name":"n1","labels":{"zone":"theirs","team":"x"}},"spec":{"taints":[{"key":"t"}]},"status":{"v":"cloud"}}`)}}})
	same(t, "events", events(), "MODIFIED n1 cloud")
	o, _ := s.Get(k)
	if l := fmt.Sprint(at(t, o.Body, "metadata", "labels")); l != "map[os:linux team:x zone:mine]" || at(t, o.Body, "status", "v") != "local" || at(t, o.Body, "spec", "taints") == nil {
		t.Errorf("adopted node: %s", o.Body)
	}
	same(t, "outbox", pendingOps(t, s), "status n1 cloud", "update n1 cloud")
	var ids []uint64
	for s.outbox.Depth() > 0 {
		pend, err := s.outbox.Next(t.Context(), LaneAll)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range pend {
			if p.Op == OpUpdate && fmt.Sprint(p.Labels) != "[os zone]" {
				t.Errorf("labels to tell: %v", p.Labels)
			}
			ids = append(ids, p.ID)
			s.outbox.Done(p.ID)
		}
	}
	if len(ids) != 2 {
		t.Errorf("sent %d", len(ids))
	}
	// Acknowledged: from now on the cloud's labels count, removals included.
	apply(t, s, Delta{Upserts: []Upsert{{k, "cloud", "8", []byte(`{"metadata":{"name":"n1","labels":{"os":"linux","zone":"new"}},"status":{"v":"cloud"}}`)}}})
	o, _ = s.Get(k)
	if l := fmt.Sprint(at(t, o.Body, "metadata", "labels")); l != "map[os:linux zone:new]" || at(t, o.Body, "status", "v") != "local" {
		t.Errorf("after the ack: %s", o.Body)
	}
}

func TestDeltaIsAllOrNothing(t *testing.T) {
	s := mustOpen(t, testConfig(t))
	err := s.ApplyDelta(context.Background(), Delta{Synced: "x", Upserts: []Upsert{
		{podKey("a"), "u1", "1", podBody("a", "u1", "")}, {podKey("b"), "u2", "1", []byte(`nonsense`)}}})
	if err == nil {
		t.Fatal("a delta with a malformed object was taken")
	}
	if _, ok := s.Get(podKey("a")); ok || s.Synced() {
		t.Error("half a delta is in the store")
	}
	for _, u := range []Upsert{
		{podKey("a"), "", "1", podBody("a", "", "")},
		{podKey("a"), "u", "", podBody("a", "u", "")},
		{podKey("b"), "u", "1", podBody("a", "u", "")},
		{podKey("a"), "v", "1", podBody("a", "u", "")},
		{Key{"pods", "", "a"}, "u", "1", podBody("a", "u", "")},
		{Key{"pods", "default", "a/b"}, "u", "1", []byte(`{}`)},
		{Key{"widgets", "", "a"}, "u", "1", []byte(`{}`)},
	} {
		if err := s.ApplyDelta(context.Background(), Delta{Upserts: []Upsert{u}}); err == nil {
			t.Errorf("taken: %+v", u)
		}
	}
	apply(t, s, Delta{Upserts: []Upsert{{Key{"widgets", "", "a"}, "u", "1", []byte(`{"apiVersion":"x/v1","kind":"Widget"}`)}}})
}

func TestOwnedPrivateValuesGoWithThePod(t *testing.T) {
	s := mustOpen(t, testConfig(t))
	upsertPod(t, s, "a", "u1", "1", "")
	if err := s.Local(t.Context(), func(tx *Tx) error {
		if err := tx.PutPrivate("token", "free", "", []byte("x")); err != nil {
			return err
		}
		return tx.PutPrivate("token", "bound", "u1", []byte("y"))
	}); err != nil {
		t.Fatal(err)
	}
	if v, ok := s.Private("token", "bound"); !ok || string(v) != "y" {
		t.Errorf("private value: %q %t", v, ok)
	}
	kubeletDelete(t, s, podKey("a"))
	same(t, "private values", s.PrivateKeys("token"), "free")
}
