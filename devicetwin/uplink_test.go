package devicetwin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// hub is the other half of the conversation, as devices.md has it and no more.
type hub struct {
	mu       sync.Mutex
	uid      string // the Devices' that there are; "": any
	uids     map[edgeapi.DeviceRef]string
	inc      string
	epoch    uint64
	values   map[edgeapi.DeviceRef]map[string]edgeapi.TwinValue
	states   map[edgeapi.DeviceRef]edgeapi.TwinState
	found    []edgeapi.TwinFound
	wants    int
	frames   int
	sizes    []int
	got      []edgeapi.TwinValue
	replayed []string                          // a value older than what it had
	base     func(edgeapi.TwinBase) int        // nil: 200
	deaf     bool                              // acknowledges nothing
	replies  map[uint64]chan edgeapi.TwinReply // to its requests
	conn     *edgeapi.Conn
	asked    uint64
}

func newHub() *hub {
	return &hub{
		values:  make(map[edgeapi.DeviceRef]map[string]edgeapi.TwinValue),
		states:  make(map[edgeapi.DeviceRef]edgeapi.TwinState),
		uids:    make(map[edgeapi.DeviceRef]string),
		replies: make(map[uint64]chan edgeapi.TwinReply),
	}
}

func newer(a, b string) bool {
	x, _ := v1alpha1.ParseVersion(a)
	y, _ := v1alpha1.ParseVersion(b)
	return x.Supersedes(y)
}

func (h *hub) serve(s net.Conn) error {
	c := edgeapi.NewConn(s)
	h.mu.Lock()
	h.conn = c
	h.mu.Unlock()
	for {
		m, err := c.Receive()
		if err != nil {
			return err
		}
		var answers []edgeapi.Message
		h.mu.Lock()
		switch m := m.(type) {
		case edgeapi.TwinHello:
			h.inc, h.epoch = m.Incarnation, m.Epoch
		case edgeapi.TwinDigest:
			answers = h.digest(m)
			if m.Last {
				answers = append([]edgeapi.Message{edgeapi.TwinWelcome{Version: 1, Now: time.Now()}}, answers...)
			}
		case edgeapi.TwinFrame:
			h.frames++
			h.sizes = append(h.sizes, len(mustJSON(m)))
			for _, s := range m.States {
				h.uids[s.Device] = s.UID
				h.states[s.Device] = s
			}
			var back []edgeapi.TwinValue
			for _, v := range m.Values {
				if v, ok := h.take(v); !ok {
					back = append(back, v)
				}
			}
			if back != nil {
				answers = append(answers, edgeapi.TwinRestore{Values: back})
			}
			if !h.deaf {
				answers = append(answers, edgeapi.TwinAck{Seq: m.Seq})
			}
		case edgeapi.TwinFound:
			h.found = append(h.found, m)
		case edgeapi.TwinReply:
			if r := h.replies[m.ID]; r != nil {
				r <- m
			}
		case edgeapi.TwinRequest:
			code := 200
			var b edgeapi.TwinBase
			if err := json.Unmarshal(m.Body, &b); err != nil {
				code = 400
			} else if h.base != nil {
				code = h.base(b)
			}
			answers = append(answers, edgeapi.TwinReply{ID: m.ID, Code: code})
		}
		h.mu.Unlock()
		for _, a := range answers {
			if err := c.Send(a); err != nil {
				return err
			}
		}
	}
}

func (h *hub) digest(m edgeapi.TwinDigest) (answers []edgeapi.Message) {
	for _, item := range m.Items {
		h.uids[item.Device] = item.UID
		if h.uid != "" && item.UID != h.uid {
			continue
		}
		have := slices.Collect(maps.Values(h.values[item.Device]))
		hash, _ := edgeapi.TwinHash(have)
		if hash == item.Hash {
			continue
		}
		h.wants++
		answers = append(answers, edgeapi.TwinWant{Devices: []edgeapi.DeviceRef{item.Device}})
		var back []edgeapi.TwinValue
		for _, v := range have {
			// What this run of the node did not say, it may have lost.
			if ver, _ := v1alpha1.ParseVersion(v.Version); ver.Incarnation != h.inc || ver.Epoch < h.epoch {
				back = append(back, v)
			}
		}
		if back != nil {
			answers = append(answers, edgeapi.TwinRestore{Values: back})
		}
	}
	return answers
}

// take is false, with what the hub has, when that is newer.
func (h *hub) take(v edgeapi.TwinValue) (edgeapi.TwinValue, bool) {
	h.got = append(h.got, v)
	if h.uid != "" && h.uids[v.Device] != h.uid {
		return v, true // of a Device that is not any more
	}
	have, ok := h.values[v.Device][v.Property]
	if ok && !newer(v.Version, have.Version) {
		if v.Version != have.Version {
			h.replayed = append(h.replayed, fmt.Sprintf("%s %s after %s", v.Property, v.Version, have.Version))
			return have, false
		}
		return v, true
	}
	if h.values[v.Device] == nil {
		h.values[v.Device] = make(map[string]edgeapi.TwinValue)
	}
	h.values[v.Device][v.Property] = v
	return v, true
}

func (h *hub) has(k Key, property string) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return string(h.values[refOf(k)][property].Value)
}

func (h *hub) state(k Key) edgeapi.TwinState {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.states[refOf(k)]
}

func (h *hub) ask(r edgeapi.TwinRequest) edgeapi.TwinReply {
	h.mu.Lock()
	h.asked++
	r.ID = h.asked
	ch := make(chan edgeapi.TwinReply, 1)
	h.replies[r.ID] = ch
	c := h.conn
	h.mu.Unlock()
	if err := c.Send(r); err != nil {
		return edgeapi.TwinReply{Message: err.Error()}
	}
	return <-ch
}

// link is one tunnel between the two.
type link struct {
	cancel context.CancelFunc
	done   sync.WaitGroup
	err    error
}

type duplex struct {
	*edgeapi.Conn
	io.Closer
}

func connect(tw *Twins, h *hub) *link {
	a, b := net.Pipe()
	ctx, cancel := context.WithCancel(context.Background())
	l := &link{cancel: cancel}
	l.done.Go(func() { l.err = tw.Converse(ctx, duplex{edgeapi.NewConn(a), a}) })
	l.done.Go(func() { h.serve(b); b.Close() })
	return l
}

func (l *link) cut() { l.cancel(); l.done.Wait() }

func settleDown() { time.Sleep(2 * time.Second); synctest.Wait() }

func TestTheHubSeesWhatChanges(t *testing.T) {
	virtual(t, func(r *rig) {
		h := newHub()
		r.set(trvDevice(1, map[string]string{"setpoint": "20"}))
		r.report("temp", 21.0)
		l := connect(r.tw, h)
		defer func() { l.cut() }()
		settleDown()
		if h.has(trv, "temp") != "21" || h.has(trv, "setpoint") != "20" || !r.tw.Connected() {
			t.Errorf("the hub has %+v", h.values)
		}
		s := h.state(trv)
		if s.UID != "u1" || s.ObservedGeneration != 1 || s.Phase != v1alpha1.PhaseOnline || s.Desired["setpoint"].State != v1alpha1.DesiredApplied {
			t.Errorf("%+v", s)
		}
		r.report("temp", 22.0)
		settleDown()
		if h.has(trv, "temp") != "22" {
			t.Errorf("the hub has %s", h.has(trv, "temp"))
		}
		// What repeats does not travel; when it was seen does, once a minute.
		frames := h.frames
		for range 55 {
			time.Sleep(time.Second)
			r.report("temp", 22.0)
		}
		if n := h.frames - frames; n > 1 {
			t.Errorf("%d frames of what repeats", n)
		}
		time.Sleep(10 * time.Second)
		r.report("temp", 22.0)
		settleDown()
		if seen := h.state(trv).LastSeen; time.Since(time.UnixMilli(seen)) > 10*time.Second {
			t.Errorf("last seen %v ago", time.Since(time.UnixMilli(seen)))
		}
		r.tw.Sight(trv, Sighting{Evidence: EvidenceAvailability, State: v1alpha1.PhaseOffline})
		settleDown()
		if s := h.state(trv); s.Phase != v1alpha1.PhaseOffline || h.values[refOf(trv)]["temp"].Quality != v1alpha1.QualityStale {
			t.Errorf("%+v %+v", s, h.values)
		}
	})
}

func TestOnlyDifferencesTravelOnReturn(t *testing.T) {
	virtual(t, func(r *rig) {
		h := newHub()
		var bound []Bound
		for i := range 1200 {
			d := trvDevice(1, nil)
			d.Name, d.UID = fmt.Sprintf("d%04d", i), types.UID(fmt.Sprint("u", i))
			bound = append(bound, Bound{Device: d, Model: r.model})
		}
		r.tw.Set(bound, nil)
		for _, b := range bound {
			r.tw.Report(Key{"home", b.Device.Name}, []Reading{{Property: "temp", Value: 20.0}, {Property: "mode", Value: "heat"}})
		}
		l := connect(r.tw, h)
		settleDown()
		if len(h.values) != 1200 {
			t.Fatalf("the hub has %d twins", len(h.values))
		}
		for _, size := range h.sizes {
			if size > 2*frameBytes {
				t.Errorf("a frame of %d bytes", size)
			}
		}
		l.cut()
		h.wants, h.got = 0, nil
		// Away, a device says a lot; only the latest is told.
		for i := range 10000 {
			r.tw.Report(Key{"home", "d0007"}, []Reading{{Property: "temp", Value: float64(i%70) + 0.5}})
		}
		l = connect(r.tw, h)
		settleDown()
		if h.wants != 1 || len(h.got) != 2 || h.has(Key{"home", "d0007"}, "temp") != "59.5" {
			t.Errorf("%d twins wanted, %d values sent: %v", h.wants, len(h.got), h.got)
		}
		l.cut()
		// A hub that knows nothing any more is told everything.
		h = newHub()
		l = connect(r.tw, h)
		settleDown()
		if len(h.values) != 1200 {
			t.Errorf("the hub has %d twins", len(h.values))
		}
		l.cut()
	})
}

func TestWhatThePowerTookComesBackFromTheHub(t *testing.T) {
	virtual(t, func(r *rig) {
		h := newHub()
		r.set(trvDevice(1, nil))
		l := connect(r.tw, h)
		r.report("temp", 21.0)
		r.disk.flush()
		r.report("temp", 25.0)
		r.report("mode", "heat") // not on the disk at all
		settleDown()
		version := h.values[refOf(trv)]["temp"].Version
		l.cut()
		r.reboot()
		r.set(trvDevice(1, nil))
		r.reported("temp", "21", v1alpha1.QualityStale)
		l = connect(r.tw, h)
		settleDown()
		r.reported("temp", "25", v1alpha1.QualityStale)
		r.reported("mode", `"heat"`, v1alpha1.QualityStale)
		if v := r.doc().Properties["temp"].Reported.Version.String(); v != version || h.has(trv, "temp") != "25" {
			t.Errorf("version %s, the hub's %s", v, version)
		}
		// And lasts.
		r.disk.flush()
		l.cut()
		r.reboot()
		r.set(trvDevice(1, nil))
		r.reported("temp", "25", v1alpha1.QualityStale)
		// What the device says now is above it.
		r.report("temp", 23.0)
		l = connect(r.tw, h)
		settleDown()
		if h.has(trv, "temp") != "23" || len(h.replayed) > 1 {
			t.Errorf("the hub has %s; replayed %v", h.has(trv, "temp"), h.replayed)
		}
		l.cut()
	})
}

func TestDeadbandAndLeastInterval(t *testing.T) {
	virtual(t, func(r *rig) {
		r.model.Spec.Properties[0].Report = v1alpha1.Report{Deadband: 0.5}
		r.model.Spec.Properties = append(r.model.Spec.Properties, v1alpha1.Property{
			Name: "power", Type: "int64", Access: "r", Report: v1alpha1.Report{MinInterval: metav1.Duration{Duration: time.Minute}},
		})
		h := newHub()
		r.set(trvDevice(1, nil))
		l := connect(r.tw, h)
		defer func() { l.cut() }()
		settleDown()
		r.report("temp", 20.0)
		settleDown()
		r.report("temp", 20.4)
		settleDown()
		r.reported("temp", "20.4", v1alpha1.QualityGood)
		if h.has(trv, "temp") != "20" {
			t.Errorf("the hub has %s", h.has(trv, "temp"))
		}
		// It is counted from what the hub has: small steps add up.
		r.report("temp", 20.6)
		settleDown()
		if h.has(trv, "temp") != "20.6" {
			t.Errorf("the hub has %s", h.has(trv, "temp"))
		}
		h.got = nil
		for i := range 300 {
			time.Sleep(time.Second)
			r.report("power", int64(i))
			r.tw.Report(trv, []Reading{{Property: "mode", Value: []string{"heat", "off"}[i%2]}})
		}
		time.Sleep(time.Minute)
		settleDown()
		n := 0
		modes := 0
		for _, v := range h.got {
			switch v.Property {
			case "power":
				n++
			case "mode":
				modes++
			}
		}
		if n < 5 || n > 7 || h.has(trv, "power") != "299" {
			t.Errorf("told %d times in five minutes; at last %s", n, h.has(trv, "power"))
		}
		if modes < 250 {
			t.Errorf("another property was held back: %d", modes)
		}
	})
}

func TestAHubThatDoesNotKeepUp(t *testing.T) {
	virtual(t, func(r *rig) {
		h := newHub()
		h.deaf = true
		r.set(trvDevice(1, nil))
		l := connect(r.tw, h)
		for i := range 3000 {
			r.tw.Report(trv, []Reading{{Property: "temp", Value: float64(i%50) + 0.5}})
			time.Sleep(10 * time.Millisecond)
		}
		h.mu.Lock()
		frames := h.frames
		h.mu.Unlock()
		if frames > window {
			t.Errorf("%d frames are on their way", frames)
		}
		time.Sleep(ackWithin + 2*welcomeIn)
		synctest.Wait()
		if r.tw.Connected() {
			t.Error("the conversation goes on without acknowledgements")
		}
		l.cut()
		if l.err == nil {
			t.Error("no error")
		}
	})
}

func TestTheNewerConversationHolds(t *testing.T) {
	virtual(t, func(r *rig) {
		h := newHub()
		r.set(trvDevice(1, nil))
		first := connect(r.tw, h)
		settleDown()
		second := connect(r.tw, h)
		settleDown()
		first.done.Wait()
		if !errors.Is(first.err, errNewer) || !r.tw.Connected() {
			t.Errorf("the first ended with %v", first.err)
		}
		r.report("temp", 23.0)
		settleDown()
		if h.has(trv, "temp") != "23" {
			t.Error("the second tells nothing")
		}
		second.cut()
		first.cancel()
		if r.tw.Connected() {
			t.Error("still connected")
		}
	})
}

func TestRequestsBothWays(t *testing.T) {
	virtual(t, func(r *rig) {
		h := newHub()
		r.set(trvDevice(1, map[string]string{"free": "false"}))
		l := connect(r.tw, h)
		defer func() { l.cut() }()
		settleDown()
		body, _ := json.Marshal(edgeapi.TwinCommand{ID: "c1", Name: "identify"})
		reply := h.ask(edgeapi.TwinRequest{Op: edgeapi.TwinOpCommand, Device: refOf(trv), Timeout: 5000, By: "jane", Body: body})
		var s CommandStatus
		if err := json.Unmarshal(reply.Body, &s); err != nil || reply.Code != 200 || s.State != CommandSucceeded || s.By != "jane" {
			t.Errorf("%+v %s", reply, reply.Body)
		}
		if reply := h.ask(edgeapi.TwinRequest{Op: edgeapi.TwinOpRefresh, Device: refOf(trv), Timeout: 5000}); reply.Code != 200 {
			t.Errorf("%+v", reply)
		}
		if reply := h.ask(edgeapi.TwinRequest{Op: "explode", Device: refOf(trv)}); reply.Code != 501 {
			t.Errorf("%+v", reply)
		}
		// Online and authority cloud: the hub judges the base.
		if res := r.patch("setpoint", "20"); res.Code != 403 {
			t.Errorf("%+v", res)
		}
		if res := r.patch("free", "true"); res.Code != 200 {
			t.Errorf("%+v", res)
		}
		h.mu.Lock()
		h.base = func(b edgeapi.TwinBase) int {
			if b.UID != "u1" || b.Generation != 1 || !slices.Equal(b.Properties, []string{"free"}) {
				t.Errorf("%+v", b)
			}
			return 409
		}
		h.mu.Unlock()
		if res := r.patch("free", "false"); res.Code != 409 {
			t.Errorf("%+v", res)
		}
		settleDown()
		if s := h.state(trv); len(s.Overrides) != 1 || s.Overrides[0].Property != "free" || s.Desired["free"].State != v1alpha1.DesiredOverridden {
			t.Errorf("%+v", s)
		}
	})
}

func TestDiscoveries(t *testing.T) {
	virtual(t, func(r *rig) {
		h := newHub()
		disc := &v1alpha1.DeviceDiscovery{ObjectMeta: metav1.ObjectMeta{Namespace: "home", Name: "z2m"}}
		r.tw.Set(nil, []*v1alpha1.DeviceDiscovery{disc})
		k := Key{"home", "z2m"}
		many := make([]v1alpha1.Candidate, 700)
		for i := range many {
			many[i] = v1alpha1.Candidate{Name: fmt.Sprint("zigbee2mqtt-", i), LastSeen: metav1.Now()}
		}
		r.tw.Found(k, many[:3], 0)
		r.tw.Found(Key{"home", "other"}, many, 0)
		l := connect(r.tw, h)
		settleDown()
		if len(h.found) != 1 || len(h.found[0].Candidates) != 3 {
			t.Fatalf("%+v", h.found)
		}
		for range 100 {
			r.tw.Found(k, many, 5)
		}
		settleDown()
		if n := len(h.found); n > 3 || len(h.found[n-1].Candidates) != maxFound || h.found[n-1].Dropped != 205 {
			t.Errorf("%d messages, the last of %d, %d dropped", n, len(h.found[n-1].Candidates), h.found[n-1].Dropped)
		}
		l.cut()
	})
}
