package store

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// model is what the store is meant to be, in a few maps: who is there under
// which uid, who waits, which status was written last, what the cloud must hear.
type model struct {
	pods   map[string]*modelPod // by name
	parked map[string]string    // name -> uid
	ended  map[string]string    // uid -> name of those the kubelet finished
	tell   map[string]string    // "op name uid" -> last status, for a status
}

type modelPod struct {
	uid, status string
	deleted     bool
}

// Random operations on store, outbox and feed, with restarts, against the model.
func TestModel(t *testing.T) {
	for seed := range uint64(8) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { runModel(t, rand.New(rand.NewPCG(seed, 99)), 300) })
	}
}

func runModel(t *testing.T, rng *rand.Rand, steps int) {
	cfg := testConfig(t)
	s, err := Open(cfg)
	must(t, err)
	m := &model{map[string]*modelPod{}, map[string]string{}, map[string]string{}, map[string]string{}}
	watch, err := s.Watch(t.Context(), "pods", s.RV())
	must(t, err)
	seen := map[string]string{} // what a watcher would have: name -> uid
	uids := 0
	var out []Pending
	for step := range steps {
		name := fmt.Sprintf("p%d", rng.IntN(4))
		k, cur := podKey(name), m.pods[name]
		op := rng.IntN(100)
		switch {
		case op < 20: // the cloud has a (new) pod of that name
			uids++
			uid := fmt.Sprintf("u%d", uids)
			upsertPod(t, s, name, uid, fmt.Sprint(step), "")
			if cur == nil {
				m.pods[name] = &modelPod{uid: uid}
			} else {
				m.parked[name] = uid
				cur.deleted = true
			}
		case op < 35 && cur != nil: // the cloud repeats itself, with a status of its own
			upsertPod(t, s, name, cur.uid, fmt.Sprint(step), `,"status":{"phase":"cloud"}`)
			if cur.status == "" {
				cur.status = "cloud"
			}
		case op < 40: // a late word of a pod long gone
			for uid, old := range m.ended {
				upsertPod(t, s, old, uid, fmt.Sprint(step), "")
				break
			}
		case op < 62 && cur != nil: // the kubelet reports
			cur.status = fmt.Sprint(step)
			patchStatus(t, s, k, fmt.Sprintf(`{"phase":%q}`, cur.status))
			m.tell["status "+name+" "+cur.uid] = cur.status
		case op < 72 && cur != nil: // the kubelet is done
			kubeletDelete(t, s, k)
			m.ended[cur.uid] = name
			m.tell["delete "+name+" "+cur.uid] = ""
			m.leave(name)
		case op < 78 && cur != nil: // the cloud forces the end, or confirms it
			apply(t, s, Delta{Deletions: []Deletion{{k, cur.uid}}})
			if m.parked[name] == "" {
				delete(m.tell, "status "+name+" "+cur.uid)
				cur.deleted = true // its containers may run: the kubelet has the last word
			}
		case op < 81 && m.parked[name] != "":
			apply(t, s, Delta{Deletions: []Deletion{{k, m.parked[name]}}})
			delete(m.parked, name)
		case op < 88: // the link takes some
			batch, _, _ := s.outbox.take(time.Now(), LaneAll)
			out = append(out, batch...)
		case op < 95 && len(out) > 0: // the hub answers
			p := out[0]
			out = out[1:]
			id := fmt.Sprintf("%s %s %s", p.Op, p.Key.Name, p.UID)
			s.outbox.Done(p.ID)
			var sent struct {
				Status struct {
					Phase string `json:"phase"`
				} `json:"status"`
			}
			if p.Op == OpStatus {
				must(t, json.Unmarshal(p.Body, &sent))
			}
			if want, ok := m.tell[id]; ok && want == sent.Status.Phase {
				delete(m.tell, id)
			}
		case op < 97: // a new session
			s.outbox.Release()
			out = nil
		default: // power
			must(t, s.Close())
			s, err = Open(cfg)
			must(t, err)
			watch, err = s.Watch(t.Context(), "pods", s.RV())
			must(t, err)
			out = nil
			clear(m.ended) // the graveyard is memory; the outbox still guards what is pending
			for id := range m.tell {
				var op, n, uid string
				if _, err := fmt.Sscan(id, &op, &n, &uid); err == nil && op == "delete" {
					m.ended[uid] = n
				}
			}
		}
		events, rv, err := watch.Next(t.Context(), time.Microsecond)
		must(t, err)
		if rv != s.RV() {
			t.Fatalf("step %d: watch is at %d, the store at %d", step, rv, s.RV())
		}
		for _, e := range events {
			if e.Type == Deleted {
				delete(seen, e.Object.Name)
			} else {
				seen[e.Object.Name] = e.Object.UID
			}
		}
		m.compare(t, step, s, seen)
	}
	must(t, s.Close())
}

// leave lets the one who waited in.
func (m *model) leave(name string) {
	delete(m.pods, name)
	if uid := m.parked[name]; uid != "" {
		m.pods[name] = &modelPod{uid: uid}
		delete(m.parked, name)
	}
}

func (m *model) compare(t *testing.T, step int, s *Store, seen map[string]string) {
	t.Helper()
	list, _ := s.List("pods", "")
	if len(list) != len(m.pods) || len(seen) != len(m.pods) {
		t.Fatalf("step %d: %d stored, %d watched, %d expected", step, len(list), len(seen), len(m.pods))
	}
	for _, o := range list {
		want := m.pods[o.Name]
		if want == nil || want.uid != o.UID || seen[o.Name] != o.UID {
			t.Fatalf("step %d: %s is %s (watched %s), expected %+v", step, o.Name, o.UID, seen[o.Name], want)
		}
		got, _ := at(t, o.Body, "status", "phase").(string)
		if got != want.status || (at(t, o.Body, "metadata", "deletionTimestamp") != nil) != want.deleted {
			t.Fatalf("step %d: %s: status %q, expected %+v: %s", step, o.Name, got, want, o.Body)
		}
	}
	var inv, wantInv []string
	for _, i := range s.Inventory() {
		inv = append(inv, i.Key.Name+" "+i.UID)
	}
	for name, p := range m.pods {
		if m.parked[name] != "" {
			wantInv = append(wantInv, name+" "+m.parked[name])
		} else {
			wantInv = append(wantInv, name+" "+p.uid)
		}
	}
	slices.Sort(wantInv)
	if !slices.Equal(inv, wantInv) {
		t.Fatalf("step %d: inventory %v, expected %v", step, inv, wantInv)
	}
	have := map[string]bool{}
	for _, id := range pendingOps(t, s) {
		have[id] = true
	}
	for id := range m.tell { // more than needed may be told after a restart, never less
		if !have[id] {
			t.Fatalf("step %d: %q is not in the outbox: %v", step, id, have)
		}
	}
}
