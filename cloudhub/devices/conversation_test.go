package devices

import (
	"encoding/json"
	"errors"
	"net/http"
	"testing"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

func digestOf(t *testing.T, name string, ver string, values ...edgeapi.TwinValue) edgeapi.TwinDigestItem {
	t.Helper()
	hash, err := edgeapi.TwinHash(values)
	if err != nil {
		t.Fatal(err)
	}
	return edgeapi.TwinDigestItem{Device: refOf("home", name), UID: "uid-" + name, Version: ver, Hash: hash}
}

func (h *hub) wantLive(t *testing.T, name, property, want string) {
	t.Helper()
	if got := h.live(t, name, property); got != want {
		t.Errorf("%s.%s is %q, want %q", name, property, got, want)
	}
}

// TestValuesByVersion: each property takes the newer version; an older one is
// answered with what the hub knows; the same one changes nothing.
func TestValuesByVersion(t *testing.T) {
	h := newHub(t)
	h.setModel(thermostat())
	h.setDevice(device("a", "pi", 1, "20"))
	p := h.dial(t, "pi", 5, digestOf(t, "a", ""))
	if want, restore := p.agreed(); len(want) != 1 || len(restore) != 0 {
		t.Fatalf("want %v, restore %v; the hub knows nothing yet", want, restore)
	}
	p.frame([]edgeapi.TwinState{state("a", 5, 1, 1)}, val("a", "temp", "20.5", 5, 2), val("a", "note", `"x"`, 5, 3))
	p.frame(nil, val("a", "temp", "21", 5, 10))
	back := p.frame(nil, val("a", "temp", "19", 5, 9), val("a", "note", `"y"`, 5, 11), val("a", "temp", "18", 5, 10))
	h.wantLive(t, "a", "temp", "21 good")
	h.wantLive(t, "a", "note", `"y" good`)
	if len(back) != 1 || back[0].Property != "temp" || back[0].Version != version(5, 10) {
		t.Errorf("given back %+v, want temp as the hub has it", back)
	}

	// The node was without power: it lost temp, and says note anew.
	old := []edgeapi.TwinValue{val("a", "temp", "20.5", 5, 2), val("a", "note", `"y"`, 5, 3)}
	q := h.dial(t, "pi", 6, digestOf(t, "a", version(5, 3), old...))
	want, restore := q.agreed()
	if len(want) != 1 || len(restore) != 2 {
		t.Errorf("want %v, restore %+v; both values are newer here", want, restore)
	}
	h.wantLive(t, "a", "temp", "21 stale") // it may have changed meanwhile

	// One property said anew does not hide that another was lost.
	q = h.dial(t, "pi", 7, digestOf(t, "a", version(7, 1), val("a", "note", `"z"`, 7, 1)))
	if _, restore = q.agreed(); len(restore) != 2 {
		t.Errorf("restore %+v; temp was lost", restore)
	}
	q = h.dial(t, "pi", 7, digestOf(t, "a", version(5, 3), old...))
	q.agreed()
	// Its store is new: what it says counts, whatever the numbers.
	q.frame([]edgeapi.TwinState{state("a", 6, 1, 1)}, edgeapi.TwinValue{Device: refOf("home", "a"), Property: "temp", Value: json.RawMessage("1"), Quality: "good", Version: "00000000000000aa/1/1"})
	h.wantLive(t, "a", "temp", "1 good")

	// Nothing differs: nothing travels.
	h2 := newHub(t)
	h2.setModel(thermostat())
	h2.setDevice(device("a", "pi", 1, ""))
	p = h2.dial(t, "pi", 5)
	p.agreed()
	same := val("a", "temp", "20.5", 5, 2)
	p.frame([]edgeapi.TwinState{state("a", 5, 2, 1)}, same)
	p = h2.dial(t, "pi", 5, digestOf(t, "a", version(5, 2), same))
	if want, restore := p.agreed(); len(want)+len(restore) != 0 {
		t.Errorf("want %v, restore %v of a twin that is the same on both sides", want, restore)
	}
}

// TestWhoseValues: a node tells of the devices that are bound to it, by their
// UID, and of no others; what came too early is asked for again.
func TestWhoseValues(t *testing.T) {
	h := newHub(t)
	h.setModel(thermostat())
	h.setDevice(device("a", "pi", 1, ""))
	h.setDevice(device("other", "pi-2", 1, ""))
	p := h.dial(t, "pi", 5)
	p.agreed()
	p.frame(nil, val("a", "temp", "1", 5, 1)) // of which Device "a"?
	p.frame([]edgeapi.TwinState{state("other", 5, 2, 1), state("early", 5, 2, 1)}, val("other", "temp", "1", 5, 3), val("early", "temp", "1", 5, 3))
	p.frame([]edgeapi.TwinState{state("a", 5, 4, 1)}, val("a", "nosuch", "1", 5, 5))
	h.wantLive(t, "a", "temp", "")
	h.wantLive(t, "a", "nosuch", "")
	h.wantLive(t, "other", "temp", "")
	if got := h.Stats().Refused; got != 6 {
		t.Errorf("%d refused, want 6", got)
	}

	// The Device that it spoke of too early is made: it is asked for.
	asked := make(chan edgeapi.Message, 1)
	go func() { asked <- p.receive() }()
	h.setDevice(device("early", "pi", 1, ""))
	if w, ok := (<-asked).(edgeapi.TwinWant); !ok || len(w.Devices) != 1 || w.Devices[0].Name != "early" {
		t.Errorf("asked for %+v, want early", w)
	}
	p.frame([]edgeapi.TwinState{state("early", 5, 6, 1)}, val("early", "temp", "2", 5, 7))
	h.wantLive(t, "early", "temp", "2 good")

	// Made anew under the same name: nothing of the old one counts.
	again := device("early", "pi", 1, "")
	again.UID = "another"
	h.setDevice(again)
	h.wantLive(t, "early", "temp", "")
	p.frame([]edgeapi.TwinState{state("early", 5, 8, 1)}, val("early", "temp", "3", 5, 9))
	h.wantLive(t, "early", "temp", "")

	// Moved away: what this node said is void, and it may say no more.
	p.frame([]edgeapi.TwinState{state("a", 5, 10, 1)}, val("a", "temp", "4", 5, 11))
	h.wantLive(t, "a", "temp", "4 good")
	h.setDevice(device("a", "pi-2", 2, ""))
	h.wantLive(t, "a", "temp", "")
	p.frame(nil, val("a", "temp", "5", 5, 12))
	h.wantLive(t, "a", "temp", "")
	if got := h.Stats().LiveBytes; got != 0 {
		t.Errorf("%d bytes are counted for nothing", got)
	}
}

// TestNewestConversation: a newer conversation of a node ends the older one,
// whose values are not taken any more.
func TestNewestConversation(t *testing.T) {
	h := newHub(t)
	h.setModel(thermostat())
	h.setDevice(device("a", "pi", 1, ""))
	old := h.dial(t, "pi", 5)
	old.agreed()
	fresh := h.dial(t, "pi", 5)
	fresh.agreed()
	if err := <-old.done; err == nil {
		t.Error("the older conversation ended well")
	}
	fresh.frame([]edgeapi.TwinState{state("a", 5, 1, 1)}, val("a", "temp", "2", 5, 2))
	h.wantLive(t, "a", "temp", "2 good")
}

// TestTwoHubRestarts: a hub that knows nothing asks for everything, and the
// same values are back.
func TestTwoHubRestarts(t *testing.T) {
	value := val("a", "temp", "20.5", 5, 2)
	for range 3 {
		h := newHub(t)
		h.setModel(thermostat())
		dev := device("a", "pi", 1, "")
		dev.Status.ReportedVersion = version(5, 1)
		h.setDevice(dev)
		p := h.dial(t, "pi", 5, digestOf(t, "a", version(5, 2), value))
		if want, _ := p.agreed(); len(want) != 1 {
			t.Fatalf("want %v, want all", want)
		}
		p.frame([]edgeapi.TwinState{state("a", 5, 2, 1)}, value)
		h.wantLive(t, "a", "temp", "20.5 good")
	}
}

// TestDiskSetBack: a node whose disk was set back, epoch and all, is believed:
// it has the newest tunnel.
func TestDiskSetBack(t *testing.T) {
	h := newHub(t)
	h.setModel(thermostat())
	h.setDevice(device("a", "pi", 1, ""))
	p := h.dial(t, "pi", 9)
	p.agreed()
	p.frame([]edgeapi.TwinState{state("a", 9, 1, 1)}, val("a", "temp", "9", 9, 2))
	p = h.dial(t, "pi", 4, digestOf(t, "a", version(4, 0)))
	p.agreed()
	if back := p.frame([]edgeapi.TwinState{state("a", 4, 1, 1)}, val("a", "temp", "4", 4, 2)); len(back) != 0 {
		t.Errorf("given back %+v of a life that is void", back)
	}
	h.wantLive(t, "a", "temp", "4 good")
}

// TestBase: whether the cloud changed what a node is about to override. After
// an etcd restore the cluster is behind the node, and nothing stands.
func TestBase(t *testing.T) {
	h := newHub(t)
	h.setModel(thermostat())
	h.setDevice(device("a", "pi", 4, "20"))
	p := h.dial(t, "pi", 5)
	p.agreed()
	id := uint64(0)
	ask := func(property string, generation int64, want int) {
		t.Helper()
		id++
		body, err := json.Marshal(edgeapi.TwinBase{UID: "uid-a", Properties: []string{property}, Generation: generation})
		if err != nil {
			t.Fatal(err)
		}
		p.send(edgeapi.TwinRequest{ID: id, Op: edgeapi.TwinOpBase, Device: refOf("home", "a"), Body: body})
		if r, ok := p.receive().(edgeapi.TwinReply); !ok || r.ID != id || r.Code != want {
			t.Errorf("%s at generation %d: %+v, want %d", property, generation, r, want)
		}
	}
	ask("setpoint", 4, http.StatusOK)
	h.setDevice(device("a", "pi", 5, "21"))
	ask("setpoint", 4, http.StatusConflict)
	ask("temp", 4, http.StatusOK)       // another property changed
	ask("temp", 3, http.StatusConflict) // from before the hub knew
	ask("setpoint", 5, http.StatusOK)
	h.setDevice(device("a", "pi", 2, "18")) // restored
	ask("setpoint", 5, http.StatusConflict)
	if ok, reason, _ := synced(h.twins[refOf("home", "a")], true); ok || reason != "Pending" {
		t.Errorf("synced %v, %s: the node has another generation", ok, reason)
	}
}

// TestRequests: an answer comes back to whoever asked, and nobody waits for a
// node that is not there or goes.
func TestRequests(t *testing.T) {
	h := newHub(t)
	h.setModel(thermostat())
	h.setDevice(device("a", "pi", 1, ""))
	ref := refOf("home", "a")
	if _, err := h.request(t.Context(), ref, edgeapi.TwinRequest{Op: edgeapi.TwinOpRefresh}); !errors.Is(err, errAway) {
		t.Errorf("%v, want errAway", err)
	}
	p := h.dial(t, "pi", 5)
	p.agreed()
	type result struct {
		r   edgeapi.TwinReply
		err error
	}
	answers := make(chan result, 1)
	ask := func() {
		r, err := h.request(t.Context(), ref, edgeapi.TwinRequest{Op: edgeapi.TwinOpRefresh})
		answers <- result{r, err}
	}
	go ask()
	r, ok := p.receive().(edgeapi.TwinRequest)
	if !ok || r.Device != ref || r.Timeout != requestTimeout.Milliseconds() {
		t.Fatalf("got %+v", r)
	}
	p.send(edgeapi.TwinReply{ID: r.ID + 1, Code: 500})
	p.send(edgeapi.TwinReply{ID: r.ID, Code: 200, Body: json.RawMessage(`{"x":1}`)})
	if got := <-answers; got.err != nil || got.r.Code != 200 || string(got.r.Body) != `{"x":1}` {
		t.Errorf("got %+v", got)
	}
	go ask()
	p.receive()
	p.raw.Close()
	if got := <-answers; got.err != nil || got.r.Code != http.StatusGatewayTimeout {
		t.Errorf("got %+v, want 504: the node went", got)
	}
}

// TestBadPeer: what is no frame ends the conversation and harms nothing.
func TestBadPeer(t *testing.T) {
	h := newHub(t)
	h.setModel(thermostat())
	h.setDevice(device("a", "pi", 1, ""))
	for what, m := range map[string]edgeapi.Message{
		"a version that is none": edgeapi.TwinFrame{Seq: 1, States: []edgeapi.TwinState{state("a", 5, 1, 1)},
			Values: []edgeapi.TwinValue{{Device: refOf("home", "a"), Property: "temp", Value: json.RawMessage("1"), Version: "x"}}},
		"a message of the hub":   edgeapi.TwinAck{Seq: 1},
		"another conversation's": edgeapi.Ack{Seq: 1},
	} {
		p := h.dial(t, "pi", 5)
		p.agreed()
		p.send(m)
		if err := <-p.done; err == nil {
			t.Errorf("%s: the conversation ended well", what)
		}
	}
	h.wantLive(t, "a", "temp", "")
	if twin, err := h.twinOf("home", "a"); err != nil || twin.NodeConnected || twin.Phase != v1alpha1.PhaseUnknown {
		t.Errorf("%+v, %v: want a node that is not there", twin, err)
	}
}
