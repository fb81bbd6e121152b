package devices

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// attach makes a conversation without a stream: frames are taken directly.
func (h *hub) attach(node string) *session {
	s := &session{d: h.Devices, node: node, hello: edgeapi.TwinHello{Incarnation: life, Epoch: 5}, close: func() {}, kick: make(chan struct{}, 1),
		uids: map[edgeapi.DeviceRef]string{}, refused: map[edgeapi.DeviceRef]struct{}{}, ask: map[edgeapi.DeviceRef]struct{}{}, pending: map[uint64]chan edgeapi.TwinReply{}}
	h.begin(s)
	return s
}

func (h *hub) tell(t *testing.T, s *session, states []edgeapi.TwinState, values ...edgeapi.TwinValue) {
	t.Helper()
	if _, err := h.takeFrame(s, edgeapi.TwinFrame{States: states, Values: values}); err != nil {
		t.Fatal(err)
	}
}

// run writes statuses for d in a bubble.
func (h *hub) run(d time.Duration, during func()) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	done := make(chan struct{})
	go func() { h.writeStatuses(ctx); close(done) }()
	during()
	<-done
}

// worst is the most writes in any second.
func worst(writes []write) (most int) {
	from := 0
	for i, w := range writes {
		for !writes[from].at.After(w.at.Add(-time.Second)) {
			from++
		}
		most = max(most, i-from+1)
	}
	return most
}

// settle makes of devices that the hub has just come to know some that it has
// known for long.
func (h *hub) settle() {
	now := time.Now()
	h.Devices.mu.Lock()
	defer h.Devices.mu.Unlock()
	i := 0
	for ref := range h.twins {
		h.status.forget(ref)
		h.status.entry(ref)
	}
	for ref := range h.twins {
		h.status.entry(ref).last = now.Add(-h.status.interval() * time.Duration(i) / time.Duration(len(h.twins)))
		i++
	}
}

// TestBudget: ten thousand devices that each say something new every second, a
// third of which change their phase again and again, cause at most 50 writes a
// second; and transitions have their third of it, and no more while values wait.
func TestBudget(t *testing.T) {
	const devices, nodes, length = 10_000, 20, time.Minute
	synctest.Test(t, func(t *testing.T) {
		h := newHub(t)
		h.setModel(thermostat())
		names := make([]string, devices)
		var sessions []*session
		for n := range nodes {
			sessions = append(sessions, h.attach(fmt.Sprintf("node-%d", n)))
		}
		frames := make([]edgeapi.TwinFrame, nodes)
		for i := range devices {
			names[i] = fmt.Sprintf("d%d", i)
			h.setDevice(device(names[i], fmt.Sprintf("node-%d", i%nodes), 1, "20"))
			h.tell(t, sessions[i%nodes], []edgeapi.TwinState{state(names[i], 5, 1, 1)})
		}
		h.settle()
		h.run(length, func() {
			seq := uint64(1)
			for second := range int(length/time.Second) - 1 {
				value := fmt.Sprint(second)
				for n := range frames {
					frames[n].States, frames[n].Values = frames[n].States[:0], frames[n].Values[:0]
				}
				for i, name := range names {
					seq++
					if n := i % nodes; i%3 == 0 && i > 0 && second%20 == i%20 {
						st := state(name, 5, seq, 1)
						st.Phase = []string{v1alpha1.PhaseOffline, v1alpha1.PhaseOnline}[(second/20)%2]
						frames[n].States = append(frames[n].States, st)
					}
					frames[i%nodes].Values = append(frames[i%nodes].Values, val(name, "temp", value, 5, seq))
				}
				for n := range frames {
					h.tell(t, sessions[n], frames[n].States, frames[n].Values...)
				}
				time.Sleep(time.Second)
			}
		})
		writes := h.written()
		if got := worst(writes); got > writesPerSecond {
			t.Errorf("%d writes in a second, the budget is %d", got, writesPerSecond)
		}
		if least := int(length/time.Second) * writesPerSecond * 9 / 10; len(writes) < least {
			t.Errorf("%d writes in %s: the budget was not used (%d)", len(writes), length, least)
		}
		urgent := int(h.urgentWrites.Load())
		if urgent < len(writes)*30/100 || urgent > len(writes)*40/100 {
			t.Errorf("%d of %d writes were for transitions, want a third", urgent, len(writes))
		}
		t.Logf("%d writes, %d of them for transitions", len(writes), urgent)
	})
}

// TestTransitionAmongValues: with the values of ten thousand devices using up
// the budget each gets its turn, and a phase is told at once.
func TestTransitionAmongValues(t *testing.T) {
	const devices, seconds = 10_000, 230
	synctest.Test(t, func(t *testing.T) {
		h := newHub(t)
		h.setModel(thermostat())
		s := h.attach("pi")
		names := make([]string, devices)
		for i := range devices {
			names[i] = fmt.Sprintf("d%d", i)
			h.setDevice(device(names[i], "pi", 1, ""))
			h.tell(t, s, []edgeapi.TwinState{state(names[i], 5, 1, 1)})
		}
		h.settle()
		var at time.Time
		h.run(seconds*time.Second, func() {
			seq := uint64(1)
			for second := range seconds - 1 {
				var f edgeapi.TwinFrame
				for i := second % 20; i < devices; i += 20 {
					seq++
					f.Values = append(f.Values, val(names[i], "temp", fmt.Sprint(second), 5, seq))
				}
				if second == 200 {
					at = time.Now()
					seq++
					st := state("d77", 5, seq, 1)
					st.Phase = v1alpha1.PhaseOffline
					f.States = append(f.States, st)
				}
				h.tell(t, s, f.States, f.Values...)
				time.Sleep(time.Second)
			}
		})
		written, took := map[string]bool{}, time.Duration(0)
		for _, w := range h.written() {
			written[w.name] = true
			if w.name == "d77" && w.status.Phase == v1alpha1.PhaseOffline {
				took = w.at.Sub(at)
			}
		}
		if len(written) != devices {
			t.Errorf("%d of %d devices had their turn in %d s", len(written), devices, seconds)
		}
		if took == 0 || took > debounce+time.Second {
			t.Errorf("the transition took %s", took)
		}
	})
}

// TestNothingNew: a device that says the same again and again is written once,
// and then seldom, for when it was seen.
func TestNothingNew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHub(t)
		h.setModel(thermostat())
		s := h.attach("pi")
		h.setDevice(device("a", "pi", 1, ""))
		h.run(time.Hour, func() {
			for i := range uint64(3590) {
				st := state("a", 5, 1, 1)
				st.LastSeen += int64(i) * 1000
				h.tell(t, s, []edgeapi.TwinState{st}, val("a", "temp", "20", 5, i+2))
				time.Sleep(time.Second)
			}
		})
		// Once at the start, and 10 intervals apart after that.
		if got := len(h.written()); got < 5 || got > 8 {
			t.Errorf("%d writes in an hour in which nothing changed", got)
		}
	})
}

// TestFlapping: one device's transitions do not take the share of others.
func TestFlapping(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHub(t)
		h.setModel(thermostat())
		s := h.attach("pi")
		h.setDevice(device("a", "pi", 1, ""))
		h.run(10*time.Minute, func() {
			for i := range 590 {
				st := state("a", 5, uint64(i+1), 1)
				st.Phase = []string{v1alpha1.PhaseOnline, v1alpha1.PhaseOffline}[i%2]
				h.tell(t, s, []edgeapi.TwinState{st})
				time.Sleep(time.Second)
			}
		})
		if got, most := len(h.written()), 600/int(urgentGap.Seconds())+urgentBurst; got > most {
			t.Errorf("%d writes of one device in ten minutes, want at most %d", got, most)
		}
	})
}

// TestNodeGoes: each device of a node that stays away is told of once; a node
// that is back soon is not told of; and a hub that has just started waits.
func TestNodeGoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHub(t)
		h.setModel(thermostat())
		s := h.attach("pi")
		for i := range 100 {
			h.setDevice(device(fmt.Sprintf("d%d", i), "pi", 1, ""))
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() { h.watchNodes(ctx); close(done) }()
		h.run(10*time.Minute, func() {
			for i := range 100 {
				h.tell(t, s, []edgeapi.TwinState{state(fmt.Sprintf("d%d", i), 5, uint64(i+1), 1)})
			}
			time.Sleep(3 * time.Minute)
			if got := len(h.written()); got != 100 {
				t.Errorf("%d writes, want one for each", got)
			}
			h.end(s)
			time.Sleep(5 * time.Second)
			s = h.attach("pi") // only a reconnect
			time.Sleep(time.Minute)
			if got := len(h.written()); got != 100 {
				t.Errorf("%d writes after a reconnect, want none more", got)
			}
			h.end(s)
			time.Sleep(time.Minute)
		})
		cancel()
		<-done
		writes := h.written()
		if len(writes) != 200 || worst(writes) > writesPerSecond {
			t.Errorf("%d writes, %d in a second; want 200 within the budget", len(writes), worst(writes))
		}
		end := writes[len(writes)-1].status
		if end.Phase != v1alpha1.PhaseUnknown || conditionOf(end, v1alpha1.ConditionNodeConnected) != "False/NodeNotConnected" {
			t.Errorf("the last status is %+v", end)
		}
	})
}

// TestWriteFails: a status that the API server does not take is tried again, ever
// less often, and is written once it does.
func TestWriteFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHub(t)
		h.setModel(thermostat())
		s := h.attach("pi")
		h.setDevice(device("a", "pi", 1, ""))
		h.fail = errors.New("the API server is not there")
		h.run(10*time.Minute, func() {
			h.tell(t, s, []edgeapi.TwinState{state("a", 5, 1, 1)})
			time.Sleep(5 * time.Minute)
			if got := h.Stats().FailedWrites; got < 4 || got > 12 {
				t.Errorf("%d attempts in five minutes", got)
			}
			h.mu.Lock()
			h.fail = nil
			h.mu.Unlock()
		})
		if got := len(h.written()); got != 1 {
			t.Errorf("%d writes, want 1", got)
		}
	})
}

// TestDesiredValid: what the model does not allow is told, of the very property.
func TestDesiredValid(t *testing.T) {
	h := newHub(t)
	h.setDevice(device("a", "pi", 1, "99"))
	compose := func() v1alpha1.DeviceStatus {
		h.Devices.mu.Lock()
		defer h.Devices.mu.Unlock()
		st, _ := h.composeLocked(h.twins[refOf("home", "a")], time.Now())
		return st
	}
	if got := conditionOf(compose(), v1alpha1.ConditionDesiredValid); got != "False/NoModel" {
		t.Errorf("without the model: %s", got)
	}
	h.setModel(thermostat())
	st := compose()
	if got := conditionOf(st, v1alpha1.ConditionDesiredValid); got != "False/Invalid" {
		t.Errorf("99 degrees: %s", got)
	}
	h.setDevice(device("a", "pi", 2, "20"))
	if got := conditionOf(compose(), v1alpha1.ConditionDesiredValid); got != "True/Valid" {
		t.Errorf("20 degrees: %s", got)
	}
}

// TestSchedulerInvariants: whatever happens, no device is lost: what was told is
// looked at in the end.
func TestSchedulerInvariants(t *testing.T) {
	s := newScheduler()
	rnd := rand.New(rand.NewPCG(1, 2))
	now := time.Unix(0, 0)
	owed := map[edgeapi.DeviceRef]bool{}
	for range 200_000 {
		ref := refOf("n", fmt.Sprint(rnd.IntN(300)))
		switch rnd.IntN(12) {
		case 0:
			s.transition(ref, now)
			owed[ref] = true
		case 1, 2, 3, 4:
			s.changed(ref, now)
			owed[ref] = true
		case 5:
			s.forget(ref)
			delete(owed, ref)
		default:
			got, urgent, ok, _ := s.next(now)
			if ok {
				delete(owed, got)
				if rnd.IntN(5) == 0 {
					s.failedWrite(got, now)
					owed[got] = true
				} else {
					s.wrote(got, now, urgent, rnd.IntN(2) == 0)
				}
			}
			now = now.Add(time.Duration(rnd.IntN(200)) * time.Millisecond)
		}
	}
	for end := now.Add(2 * time.Hour); now.Before(end) && len(owed) > 0; now = now.Add(100 * time.Millisecond) {
		if got, urgent, ok, _ := s.next(now); ok {
			delete(owed, got)
			s.wrote(got, now, urgent, true)
		}
	}
	if len(owed) > 0 || s.waiting() > 0 {
		t.Errorf("%d devices are never looked at, %d wait", len(owed), s.waiting())
	}
}

// TestPromote: an override becomes what the cloud wants only if the spec has
// left the property alone.
func TestPromote(t *testing.T) {
	h := newHub(t)
	h.setModel(thermostat())
	s := h.attach("pi")
	h.setDevice(device("a", "pi", 3, "20"))
	over := func(seq uint64, base int64) int {
		st := state("a", 5, seq, 3)
		st.Overrides = []edgeapi.TwinOverride{{Property: "setpoint", Value: []byte("25"), By: "pod", BaseGen: base}, {Property: "note", Value: []byte(`"x"`), BaseGen: base}}
		h.tell(t, s, []edgeapi.TwinState{st})
		h.Devices.mu.Lock()
		defer h.Devices.mu.Unlock()
		return len(h.promotionsLocked())
	}
	if got := over(1, 2); got != 0 {
		t.Error("promoted, though the spec may have changed before the hub started")
	}
	if got := over(2, 3); got != 1 {
		t.Error("not promoted, though the spec is as it was")
	}
	h.setDevice(device("a", "pi", 4, "21"))
	if got := over(3, 3); got != 0 {
		t.Error("promoted over what the cloud changed meanwhile")
	}
	h.setDevice(device("a", "pi", 5, "25"))
	if got := over(4, 5); got != 0 {
		t.Error("promoted what the spec has already")
	}
}

// TestDiscovery: what a node finds is matched, shown, and in mode Create made
// into Devices, up to the limit.
func TestDiscovery(t *testing.T) {
	h := newHub(t)
	s := h.attach("pi")
	now := time.Now()
	o := &v1alpha1.DeviceDiscovery{
		ObjectMeta: metav1.ObjectMeta{Namespace: "home", Name: "z2m", UID: "uid-z2m", Generation: 1},
		Spec: v1alpha1.DeviceDiscoverySpec{Source: v1alpha1.DiscoverySource{Profile: "zigbee2mqtt"}, Match: map[string][]string{"model": {"TS0601*"}}, Block: map[string][]string{"friendlyName": {"test-*"}},
			Mode: v1alpha1.DiscoveryCreate, Limits: v1alpha1.DiscoveryLimits{MaxDevices: 2}, Template: v1alpha1.DiscoveryTemplate{ModelRef: v1alpha1.ModelRef{Name: "trv"}}},
	}
	h.setDiscovery(o)
	find := func(name, model, friendly string, seen time.Time) edgeapi.TwinCandidate {
		return edgeapi.TwinCandidate{Name: name, Attributes: map[string]string{"model": model, "friendlyName": friendly}, Params: map[string]string{"topic": "z/" + name}, LastSeen: seen.UnixMilli()}
	}
	h.takeFound(s, edgeapi.TwinFound{Discovery: refOf("home", "z2m"), Candidates: []edgeapi.TwinCandidate{
		find("z-a", "TS0601_x", "a", now), find("z-b", "TS0601", "b", now), find("z-c", "TS0601", "c", now),
		find("z-d", "other", "d", now), find("z-e", "TS0601", "test-e", now), find("Not A Name", "TS0601", "f", now),
	}})
	names := func(at time.Time) (out []string) {
		h.Devices.mu.Lock()
		defer h.Devices.mu.Unlock()
		for _, todo := range h.planLocked(refOf("home", "z2m"), h.found[refOf("home", "z2m")], at) {
			out = append(out, todo.what)
		}
		return out
	}
	if got := fmt.Sprint(names(now)); got != "[create Device home/z-a create Device home/z-b status of DeviceDiscovery home/z2m]" {
		t.Fatalf("to do: %s", got)
	}
	make := func(name, uid string) *v1alpha1.Device {
		dev := device(name, "pi", 1, "")
		dev.Labels = map[string]string{LabelDiscovery: "z2m"}
		dev.Annotations = map[string]string{AnnotationDiscovery: uid}
		dev.CreationTimestamp = metav1.NewTime(now)
		return dev
	}
	h.setDevice(make("z-a", "uid-z2m"))
	h.setDevice(make("z-b", "uid-z2m"))
	h.setDevice(make("z-mine", string(types.UID("of another"))))
	if got := names(now.Add(time.Second)); len(got) != 0 {
		t.Errorf("to do at the limit: %q", got)
	}
	// A week on only z-b was seen.
	week := now.Add(defaultAbsentFor + time.Minute)
	h.takeFound(s, edgeapi.TwinFound{Discovery: refOf("home", "z2m"), Candidates: []edgeapi.TwinCandidate{find("z-b", "TS0601", "b", week)}})
	if got := names(week); len(got) < 1 || got[0] != "delete Device home/z-a" || fmt.Sprint(got) != "[delete Device home/z-a status of DeviceDiscovery home/z2m]" {
		t.Errorf("after a week: %q, want z-a deleted and nothing of others", got)
	}
	// While the node is away nothing is known to be absent.
	h.end(s)
	if got := fmt.Sprint(names(week.Add(time.Minute))); got != "[status of DeviceDiscovery home/z2m]" && got != "[]" {
		t.Errorf("while the node is away: %s", got)
	}
}

func TestGlob(t *testing.T) {
	for _, c := range []struct {
		pattern, text string
		want          bool
	}{
		{"TS*", "TS0601", true}, {"TS*", "xTS", false}, {"*", "", true}, {"a*c*e", "abcde", true}, {"a*c*e", "ace", true}, {"a*a", "a", false}, {"", "", true}, {"a", "ab", false},
	} {
		if got := glob(c.pattern, c.text); got != c.want {
			t.Errorf("glob(%q, %q) = %v", c.pattern, c.text, got)
		}
	}
}
