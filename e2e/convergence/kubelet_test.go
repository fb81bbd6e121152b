package convergence

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/edgecore/store"
)

const ns = "default"

// kubelet is the model of a node's kubelet, and of what must hold for it: it
// notes what it was told to run, what it wrote and was told is written.
type kubelet struct {
	mu      sync.Mutex
	rng     *rand.Rand
	running map[string]string    // name of a pod -> uid of the one that runs
	ended   map[types.UID]int    // pods that it has confirmed, and in which run
	last    map[types.UID]string // uid -> message of the last status written
	landed  map[types.UID]string // uid -> message of the last status that reached the cloud
	gone    map[types.UID]int    // pods that left after that, and in which run
	static  map[string]string    // static pods by the name of their mirror -> hash
	events  map[string]int32     // count of the events written since the start
	runs    int
	step    int
	wrong   []string // rules that were broken
}

func newKubelet(rng *rand.Rand) *kubelet {
	return &kubelet{
		rng: rng, running: map[string]string{}, ended: map[types.UID]int{}, gone: map[types.UID]int{}, last: map[types.UID]string{},
		landed: map[types.UID]string{}, static: map[string]string{}, events: map[string]int32{},
	}
}

func (k *kubelet) complainLocked(format string, args ...any) {
	if len(k.wrong) < 10 {
		k.wrong = append(k.wrong, fmt.Sprintf(format, args...))
	}
}

func (k *kubelet) complaints() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.wrong
}

// told hears from the cloud what the node's writes do to its pods there.
func (k *kubelet) told(verb string, before, after *corev1.Pod) {
	k.mu.Lock()
	defer k.mu.Unlock()
	uid := before.UID
	switch {
	case verb == "status":
		// A mirror pod stands for whatever static pod has its name now.
		if after.Status.Message < k.landed[uid] && !isMirror(before) {
			k.complainLocked("pod %s (%s): status %q reached the cloud after %q", before.Name, uid, after.Status.Message, k.landed[uid])
		}
		k.landed[uid] = after.Status.Message
	case isMirror(before):
	case k.ended[uid] == 0:
		k.complainLocked("pod %s (%s): the node deleted in the cloud what its kubelet has not ended", before.Name, uid)
	case before.Status.Message != k.last[uid]:
		k.complainLocked("pod %s (%s): deleted with status %q, the last one written is %q", before.Name, uid, before.Status.Message, k.last[uid])
	}
}

func isMirror(p *corev1.Pod) bool {
	_, ok := p.Annotations[corev1.MirrorPodAnnotationKey]
	return ok
}

func final(p *corev1.Pod) bool {
	return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}

// start begins a run of the kubelet: it lists, and what ran must be there.
func (k *kubelet) start(t *testing.T, e *edge) (stop func()) {
	t.Helper()
	objs, rv := e.store.List("pods", "")
	k.mu.Lock()
	k.runs++
	k.events = map[string]int32{} // those of the last run may be lost with it
	there := map[string]bool{}
	for _, o := range objs {
		k.seenLocked(store.Added, o)
		there[o.UID] = true
	}
	for name, uid := range k.running {
		if !there[uid] {
			k.complainLocked("pod %s (%s) ran before the restart and is gone", name, uid)
		}
	}
	k.mu.Unlock()
	w, err := e.store.Watch(t.Context(), "pods", rv)
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			events, _, err := w.Next(ctx, 0)
			k.mu.Lock()
			for _, ev := range events {
				k.seenLocked(ev.Type, *ev.Object)
			}
			if err != nil && !errors.Is(err, context.Canceled) {
				k.complainLocked("watch: %v", err)
			}
			k.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return func() { cancel(); <-done }
}

// seenLocked holds what the kubelet is told against what it runs.
func (k *kubelet) seenLocked(typ store.EventType, o store.Object) {
	var p corev1.Pod
	if err := json.Unmarshal(o.Body, &p); err != nil {
		k.complainLocked("pod %s: %v", o.Key, err)
		return
	}
	if isMirror(&p) {
		return // its static pod runs, not it
	}
	if p.Spec.NodeName != nodeName {
		k.complainLocked("pod %s of node %q came here", p.Name, p.Spec.NodeName)
	}
	runs := k.running[p.Name]
	switch typ {
	case store.Added:
		if runs != "" && runs != o.UID {
			k.complainLocked("pod %s (%s) came while %s runs", p.Name, o.UID, runs)
		}
		// One that a finalizer holds in the cloud is met again by a kubelet that
		// restarted, as with any API server: as a pod that has ended.
		if run := k.gone[p.UID]; run == k.runs || run != 0 && (p.DeletionTimestamp == nil || !final(&p)) {
			k.complainLocked("pod %s (%s) came back after its end", p.Name, o.UID)
		}
		if !final(&p) {
			k.running[p.Name] = o.UID
		}
	case store.Modified:
		if final(&p) && runs == o.UID {
			delete(k.running, p.Name)
		}
	case store.Deleted:
		if k.ended[p.UID] == 0 && !final(&p) {
			k.complainLocked("pod %s (%s) went while it runs", p.Name, o.UID)
		}
		if k.ended[p.UID] != 0 {
			k.gone[p.UID] = k.runs
		}
		if runs == o.UID {
			delete(k.running, p.Name)
		}
	}
}

// next returns a word that sorts after all before it.
func (k *kubelet) next() string {
	k.step++
	return fmt.Sprintf("%08d", k.step)
}

// moved tells whether an error says that the object changed meanwhile, which
// a kubelet takes as it comes.
func moved(err error) bool { return apierrors.IsNotFound(err) || apierrors.IsConflict(err) }

// act does one thing at random.
func (k *kubelet) act(t *testing.T, e *edge) {
	t.Helper()
	switch roll := k.rng.IntN(100); {
	case roll < 8:
		k.reportNode(t, e)
	case roll < 14:
		k.event(t, e)
	case roll < 20:
		k.toggleStatic()
		k.mirror(t, e)
	default:
		pods, err := e.client.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{})
		must(t, err)
		if len(pods.Items) > 0 {
			k.tend(t, e, &pods.Items[k.rng.IntN(len(pods.Items))], false)
		}
	}
}

// tend does what a kubelet may do to a pod; with finish set, what it must do
// in the end.
func (k *kubelet) tend(t *testing.T, e *edge, p *corev1.Pod, finish bool) {
	t.Helper()
	switch {
	case isMirror(p):
		if k.static[p.Name] != p.Annotations[corev1.MirrorPodAnnotationKey] || p.DeletionTimestamp != nil {
			k.confirm(t, e, p)
			k.mirror(t, e)
		} else if !finish {
			k.report(t, e, p, corev1.PodRunning)
		}
	case p.DeletionTimestamp != nil && (finish || k.rng.IntN(2) == 0):
		if !final(p) {
			k.report(t, e, p, corev1.PodSucceeded)
		}
		k.confirm(t, e, p)
	case finish || final(p):
	case k.rng.IntN(20) == 0:
		k.report(t, e, p, corev1.PodFailed)
	default:
		k.report(t, e, p, corev1.PodRunning)
	}
}

// report writes a status, with a word of its own.
func (k *kubelet) report(t *testing.T, e *edge, p *corev1.Pod, phase corev1.PodPhase) {
	t.Helper()
	word := k.next()
	patch := fmt.Sprintf(`{"metadata":{"uid":%q},"status":{"phase":%q,"message":%q,"conditions":[{"type":"Ready","status":"True","message":%q}]}}`,
		p.UID, phase, word, word)
	// Noted first: the cloud may hear of it before the answer is here.
	k.mu.Lock()
	before := k.last[p.UID]
	k.last[p.UID] = word
	k.mu.Unlock()
	_, err := e.client.CoreV1().Pods(ns).Patch(t.Context(), p.Name, types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{}, "status")
	if moved(err) {
		k.mu.Lock()
		k.last[p.UID] = before
		k.mu.Unlock()
		return
	}
	must(t, err)
}

// confirm deletes a pod as a kubelet does once its containers are gone.
func (k *kubelet) confirm(t *testing.T, e *edge, p *corev1.Pod) {
	t.Helper()
	k.mu.Lock()
	k.ended[p.UID] = k.runs
	k.mu.Unlock()
	grace := int64(0)
	err := e.client.CoreV1().Pods(ns).Delete(t.Context(), p.Name, metav1.DeleteOptions{
		GracePeriodSeconds: &grace, Preconditions: &metav1.Preconditions{UID: &p.UID},
	})
	if err != nil && !moved(err) {
		t.Fatal(err)
	}
}

func (k *kubelet) toggleStatic() {
	name := "static-" + strconv.Itoa(k.rng.IntN(2)) + "-" + nodeName
	if k.static[name] != "" && k.rng.IntN(2) == 0 {
		delete(k.static, name)
	} else {
		k.static[name] = "hash-" + k.next()
	}
}

// mirror brings the mirror pods in step with the static ones.
func (k *kubelet) mirror(t *testing.T, e *edge) {
	t.Helper()
	pods, err := e.client.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{})
	must(t, err)
	there := map[string]bool{}
	for i := range pods.Items {
		p := &pods.Items[i]
		if isMirror(p) && k.static[p.Name] != p.Annotations[corev1.MirrorPodAnnotationKey] {
			k.confirm(t, e, p)
			continue
		}
		there[p.Name] = true
	}
	for name, hash := range k.static {
		if there[name] {
			continue
		}
		_, err := e.client.CoreV1().Pods(ns).Create(t.Context(), &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: ns, Annotations: map[string]string{corev1.MirrorPodAnnotationKey: hash}},
			Spec:       corev1.PodSpec{NodeName: nodeName, Containers: []corev1.Container{{Name: "c", Image: "i"}}},
		}, metav1.CreateOptions{})
		if err != nil && !apierrors.IsAlreadyExists(err) {
			t.Fatal(err)
		}
	}
}

func (k *kubelet) event(t *testing.T, e *edge) {
	t.Helper()
	name := "event-" + strconv.Itoa(k.rng.IntN(10))
	events := e.client.CoreV1().Events(ns)
	cur, err := events.Get(t.Context(), name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		// A count beyond all before, for the cloud may know the name from an earlier run.
		k.step++
		_, err = events.Create(t.Context(), &corev1.Event{
			ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: ns}, Count: int32(k.step),
			InvolvedObject: corev1.ObjectReference{Kind: "Node", Name: nodeName},
		}, metav1.CreateOptions{})
		must(t, err)
		k.events[name] = int32(k.step)
		return
	}
	must(t, err)
	_, err = events.Patch(t.Context(), name, types.StrategicMergePatchType, []byte(fmt.Sprintf(`{"count":%d}`, cur.Count+1)), metav1.PatchOptions{})
	must(t, err)
	k.events[name] = cur.Count + 1
}

// register makes the Node, or takes over the one that is there.
func (k *kubelet) register(t *testing.T, e *edge) {
	t.Helper()
	_, err := e.client.CoreV1().Nodes().Create(t.Context(), &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: nodeName, Labels: map[string]string{"kubernetes.io/hostname": nodeName}},
		Status:     corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.168.0.7"}}},
	}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	k.reportNode(t, e)
}

func (k *kubelet) reportNode(t *testing.T, e *edge) {
	t.Helper()
	word := k.next()
	patch, sub := fmt.Sprintf(`{"status":{"conditions":[{"type":"Ready","status":"True","message":%q}]}}`, word), []string{"status"}
	if k.rng.IntN(3) == 0 {
		patch, sub = fmt.Sprintf(`{"metadata":{"labels":{"edge/%d":%q}}}`, k.rng.IntN(3), word), nil
		if k.rng.IntN(4) == 0 {
			patch = fmt.Sprintf(`{"metadata":{"labels":{"edge/%d":null}}}`, k.rng.IntN(3))
		}
	}
	_, err := e.client.CoreV1().Nodes().Patch(t.Context(), nodeName, types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{}, sub...)
	must(t, err)
}

// finish brings to an end what the cloud wants to end.
func (k *kubelet) finish(t *testing.T, e *edge) {
	t.Helper()
	pods, err := e.client.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{})
	must(t, err)
	for i := range pods.Items {
		k.tend(t, e, &pods.Items[i], true)
	}
	k.mirror(t, e)
}
