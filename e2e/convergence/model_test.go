package convergence

import (
	"encoding/json"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/klog/v2"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

var (
	seedFlag  = flag.Uint64("seed", 0, "run the model test with this seed only")
	stepsFlag = flag.Int("steps", 3000, "steps of a model test run")
	runsFlag  = flag.Int("runs", 3, "model test runs, each with a seed of its own")
)

func TestMain(m *testing.M) {
	flag.Parse()
	klog.SetSlogLogger(slog.New(slog.DiscardHandler))
	os.Exit(m.Run())
}

// Both sides do what they like while the connection breaks; once it is whole
// again they agree, and what was written on the node has reached the cloud.
func TestConvergence(t *testing.T) {
	if *seedFlag != 0 {
		run(t, *seedFlag)
		return
	}
	for range *runsFlag {
		seed := rand.Uint64()>>32 + 1
		t.Run(fmt.Sprint(seed), func(t *testing.T) { run(t, seed) })
	}
}

// world is one run of the test.
type world struct {
	t     *testing.T
	rng   *rand.Rand
	dir   string
	cloud *cloud
	hub   *hub
	wire  *wire
	edge  *edge
	k     *kubelet
	stop  func() // the kubelet's watch

	breaks, restarts int
}

func run(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 1))
	w := &world{t: t, rng: rng, dir: t.TempDir(), wire: &wire{}, k: newKubelet(rng)}
	defer func() {
		if t.Failed() {
			t.Logf("again with: go test ./e2e/convergence -run TestConvergence -seed %d -steps %d", seed, *stepsFlag)
		}
	}()
	w.wire.left.Store(-1)
	w.cloud = newCloud(rand.New(rand.NewPCG(seed, 2)))
	w.cloud.told = w.k.told
	w.hub = startHub(t, w.cloud)
	w.start()
	defer func() { w.stop(); w.edge.stop(t) }()
	w.cloud.failures = 2
	for range *stepsFlag {
		w.step()
		if wrong := w.k.complaints(); len(wrong) > 0 {
			t.Fatalf("seed %d:\n%s", seed, strings.Join(wrong, "\n"))
		}
	}
	w.heal()
	deadline := time.Now().Add(12 * time.Second)
	for {
		w.k.finish(t, w.edge)
		diff := w.difference()
		if wrong := w.k.complaints(); len(wrong) > 0 {
			t.Fatalf("seed %d: after healing:\n%s", seed, strings.Join(wrong, "\n"))
		}
		if len(diff) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("seed %d: cloud and node differ:\n%s\nlink: %+v", seed, strings.Join(diff, "\n"), w.edge.link.State())
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Logf("%d steps, %d uids, %d breaks, %d restarts, %d changes in the cloud, %d writes on the node",
		*stepsFlag, w.cloud.uids, w.breaks, w.restarts, len(w.cloud.history), w.k.step)
}

func (w *world) start() {
	w.t.Helper()
	w.edge = startEdge(w.t, w.dir, w.hub, w.wire)
	if !w.edge.store.Synced() {
		down := w.wire.down.Swap(false)
		w.wire.left.Store(-1)
		select {
		case <-w.edge.link.FirstSync():
		case <-time.After(20 * time.Second):
			w.t.Fatalf("no first sync: %+v", w.edge.link.State())
		}
		w.wire.down.Store(down)
	}
	w.stop = w.k.start(w.t, w.edge)
	w.k.register(w.t, w.edge)
	w.k.mirror(w.t, w.edge)
}

// step is one thing that happens.
func (w *world) step() {
	if w.wire.down.Load() && w.rng.IntN(30) == 0 {
		w.wire.down.Store(false)
	}
	switch roll := w.rng.IntN(100); {
	case roll < 45:
		w.k.act(w.t, w.edge)
	case roll < 85:
		w.cloudActs()
	case roll < 92: // a while, for both sides to get somewhere
		time.Sleep(time.Duration(w.rng.IntN(20)) * time.Millisecond)
	case roll < 97:
		w.wire.left.Store(int64(w.rng.IntN(6000)))
		w.breaks++
	case roll < 98:
		w.wire.breakNow()
		w.breaks++
	case roll < 99:
		// Offline for about thirty steps, online for about a hundred.
		if w.wire.down.Store(!w.wire.down.Load()); w.wire.down.Load() {
			w.wire.breakNow()
			w.breaks++
		}
	case w.rng.IntN(3) == 0:
		w.stop()
		w.edge.stop(w.t)
		w.start()
		w.restarts++
	}
}

func (w *world) heal() {
	w.cloud.mu.Lock()
	w.cloud.failures = 0
	w.cloud.mu.Unlock()
	// A last outage, in which the cloud's controllers write over every status
	// while the kubelet has nothing new to say.
	w.wire.left.Store(-1)
	w.wire.down.Store(true)
	w.wire.breakNow()
	for deadline := time.Now().Add(20 * time.Second); len(w.hub.edges.Nodes()) > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			w.t.Fatal("the hub keeps a tunnel that is cut")
		}
	}
	w.nodeIsAway(key{"nodes", "", nodeName})
	for k := range w.cloud.all("pods") {
		w.nodeIsAway(k)
	}
	w.wire.down.Store(false) // what waits to be tried again goes at once
	for k := range w.cloud.all("pods") {
		w.cloud.edit(k, func(o object) { o.SetFinalizers(nil) })
	}
}

func (w *world) cloudActs() {
	i := w.rng.IntN(6)
	pod := key{"pods", ns, fmt.Sprintf("pod-%d", i)}
	word := fmt.Sprintf("%08d", w.rng.IntN(1e8))
	switch roll := w.rng.IntN(100); {
	case roll < 25:
		_ = w.cloud.create("pods", ns, w.newPod(pod.name)) // or it is there
	case roll < 40:
		w.cloud.edit(pod, func(o object) { o.SetLabels(map[string]string{"word": word}) })
	case roll < 50:
		w.cloud.remove(pod, 30)
	case roll < 55:
		w.cloud.remove(pod, 0)
	case roll < 63:
		w.cloud.remove(pod, 0)
		_ = w.cloud.create("pods", ns, w.newPod(pod.name))
	case roll < 66:
		w.cloud.edit(pod, func(o object) { o.SetFinalizers(nil) })
	case roll < 70: // a readiness gate, by its controller
		w.cloud.disturb(pod, func(o object) {
			p := o.(*corev1.Pod)
			p.Status.Conditions = slices.DeleteFunc(p.Status.Conditions, func(c corev1.PodCondition) bool { return c.Type == "example.com/gate" })
			p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: "example.com/gate", Status: corev1.ConditionTrue, Message: word})
		})
	case roll < 86:
		resource := []string{"configmaps", "secrets"}[w.rng.IntN(2)]
		k := key{resource, ns, fmt.Sprintf("data-%d", w.rng.IntN(4))}
		w.changeData(k, word)
	case roll < 92:
		k := key{"services", ns, fmt.Sprintf("service-%d", w.rng.IntN(3))}
		if w.rng.IntN(3) == 0 {
			w.cloud.remove(k, 0)
		} else if w.cloud.create("services", ns, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: k.name}}) != nil {
			w.cloud.edit(k, func(o object) { o.SetAnnotations(map[string]string{"word": word}) })
		}
	case roll < 97:
		w.cloud.edit(key{"nodes", "", nodeName}, func(o object) {
			n := o.(*corev1.Node)
			if n.Labels == nil {
				n.Labels = map[string]string{}
			}
			n.Labels[fmt.Sprintf("cloud/%d", w.rng.IntN(3))] = word
			n.Labels[fmt.Sprintf("edge/%d", w.rng.IntN(3))] = word // contested
			n.Spec.Unschedulable = !n.Spec.Unschedulable
		})
	case w.wire.down.Load(): // the node lifecycle controller, of a node that is away
		w.nodeIsAway(key{"nodes", "", nodeName})
		w.nodeIsAway(pod)
	}
}

// nodeIsAway writes what the node lifecycle controller does over the status of
// a node that it does not hear of, or of its pod.
func (w *world) nodeIsAway(k key) {
	w.cloud.disturb(k, func(o object) {
		switch o := o.(type) {
		case *corev1.Node:
			for i := range o.Status.Conditions {
				if o.Status.Conditions[i].Type == corev1.NodeReady {
					o.Status.Conditions[i].Status = corev1.ConditionUnknown
				}
			}
		case *corev1.Pod:
			for i := range o.Status.Conditions {
				if o.Status.Conditions[i].Type == corev1.PodReady {
					o.Status.Conditions[i].Status = corev1.ConditionFalse
				}
			}
		}
	})
}

func (w *world) changeData(k key, word string) {
	if w.rng.IntN(4) == 0 {
		w.cloud.remove(k, 0)
		return
	}
	var o object = &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: k.name}, Data: map[string]string{"word": word}}
	if k.resource == "secrets" {
		o = &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: k.name}, Data: map[string][]byte{"word": []byte(word)}}
	}
	if w.cloud.create(k.resource, ns, o) == nil {
		return
	}
	w.cloud.edit(k, func(o object) {
		switch o := o.(type) {
		case *corev1.ConfigMap:
			o.Data = map[string]string{"word": word}
		case *corev1.Secret:
			o.Data = map[string][]byte{"word": []byte(word)}
		}
	})
}

func (w *world) newPod(name string) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": name}},
		Spec:       corev1.PodSpec{NodeName: nodeName, Containers: []corev1.Container{{Name: "c", Image: "i"}}},
	}
	if w.rng.IntN(6) == 0 {
		p.Spec.NodeName = "edge-2"
	}
	if w.rng.IntN(6) == 0 {
		p.Finalizers = []string{"example.com/hold"}
	}
	for range w.rng.IntN(3) {
		ref := fmt.Sprintf("data-%d", w.rng.IntN(4))
		v := corev1.Volume{Name: fmt.Sprintf("v%d", len(p.Spec.Volumes))}
		if w.rng.IntN(2) == 0 {
			v.ConfigMap = &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: ref}}
		} else {
			v.Secret = &corev1.SecretVolumeSource{SecretName: ref}
		}
		p.Spec.Volumes = append(p.Spec.Volumes, v)
	}
	return p
}

// difference tells where cloud and node do not agree.
func (w *world) difference() []string {
	var out []string
	differ := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	want := map[key]object{}
	for _, resource := range []string{"services", "nodes"} {
		maps.Copy(want, w.cloud.all(resource))
	}
	for k, o := range w.cloud.all("pods") {
		p := o.(*corev1.Pod)
		if p.Spec.NodeName != nodeName {
			continue
		}
		want[k] = o
		for _, v := range p.Spec.Volumes {
			ref := key{resource: "configmaps", namespace: ns}
			if v.ConfigMap != nil {
				ref.name = v.ConfigMap.Name
			} else {
				ref.resource, ref.name = "secrets", v.Secret.SecretName
			}
			if o := w.cloud.get(ref); o != nil {
				want[ref] = o
			}
		}
	}
	have := map[key]object{}
	for _, resource := range []string{"services", "nodes", "pods", "configmaps", "secrets"} {
		objs, _ := w.edge.store.List(resource, "")
		for _, o := range objs {
			into := newObject(resource)
			must(w.t, json.Unmarshal(o.Body, into))
			have[key{resource, o.Namespace, o.Name}] = into
		}
	}
	for k, h := range have {
		c := want[k]
		if c == nil {
			differ("%v is on the node only", k)
			continue
		}
		if c.GetUID() != h.GetUID() {
			differ("%v: uid %s in the cloud, %s on the node", k, c.GetUID(), h.GetUID())
			continue
		}
		if a, b := comparable(c), comparable(h); !equality.Semantic.DeepEqual(a, b) {
			x, _ := json.Marshal(a)
			y, _ := json.Marshal(b)
			differ("%v differs:\n  cloud %s\n  node  %s", k, x, y)
		}
		if p, ok := c.(*corev1.Pod); ok {
			w.k.mu.Lock()
			if last, wrote := w.k.last[p.UID]; wrote && p.Status.Message != last {
				differ("%v: status %q in the cloud, %q was written last", k, p.Status.Message, last)
			}
			w.k.mu.Unlock()
		}
	}
	for k := range want {
		if have[k] == nil {
			differ("%v (%s) is in the cloud only", k, want[k].GetUID())
		}
	}
	for name, count := range w.k.events {
		if ev, ok := w.cloud.get(key{"events", ns, name}).(*corev1.Event); !ok || ev.Count != count {
			differ("event %s: count %d did not arrive", name, count)
		}
	}
	if n := w.edge.store.Outbox().Depth(); n > 0 {
		differ("%d entries in the outbox", n)
	}
	slices.Sort(out)
	return out
}

// comparable is an object without what each side has of its own.
func comparable(o object) object {
	o = o.DeepCopyObject().(object)
	o.SetResourceVersion("")
	o.GetObjectKind().SetGroupVersionKind(kinds["pods"])
	switch o := o.(type) {
	case *corev1.Pod:
		slices.SortFunc(o.Status.Conditions, func(a, b corev1.PodCondition) int { return strings.Compare(string(a.Type), string(b.Type)) })
	case *corev1.Node:
		o.Status.Addresses = nil // the hub publishes one of its own
		o.Status.DaemonEndpoints = corev1.NodeDaemonEndpoints{}
		// Each side has its own view of the tunnel.
		o.Status.Conditions = slices.DeleteFunc(o.Status.Conditions, func(c corev1.NodeCondition) bool { return c.Type == edgeapi.ConditionConnected })
	}
	return o
}
