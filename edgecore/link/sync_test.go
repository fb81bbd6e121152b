package link

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/skerry-io/skerry/edgecore/store"
	"github.com/skerry-io/skerry/tunnel"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

func TestFirstSync(t *testing.T) {
	r := newRig(t, openStore(t))
	c := r.welcome()
	if c.hello.Version != edgeapi.Version || c.hello.Agent != "edgecore/test" || c.hello.Synced || len(c.items) != 0 {
		t.Errorf("hello %+v with %d items", c.hello, len(c.items))
	}
	// A part of the set is no set: the kubelet must not see it.
	c.delta(edgeapi.Delta{Seq: 1, Upserts: []edgeapi.Upsert{upsert("pods", "a", "u1", "")}})
	if isClosed(r.FirstSync()) || r.store.Synced() {
		t.Fatal("synced by half a set")
	}
	c.delta(edgeapi.Delta{Seq: 2, Upserts: []edgeapi.Upsert{upsert("pods", "b", "u2", "")}, Synced: true})
	if !r.store.Synced() { // durable by the time it is acknowledged
		t.Fatal("acknowledged, but the store is not synced")
	}
	r.await("first sync", func() bool { return isClosed(r.FirstSync()) })
	if s := r.State(); !s.Connected || s.Hub != "hub/test" || s.LastSync.IsZero() || s.LastError != "" {
		t.Errorf("state %+v", s)
	}
	// The next conversation, and the next process, start from there.
	r.stop()
	again := newRig(t, r.store)
	if !isClosed(again.FirstSync()) {
		t.Error("a store that was complete before waits for the hub")
	}
	d := again.welcome()
	if !d.hello.Synced || d.hello.StoreID == "" || len(d.items) != 2 || d.items[0].UID != "u1" || d.items[0].Rev != "rev-u1" {
		t.Errorf("hello %+v, items %+v", d.hello, d.items)
	}
}

func TestInventoryComesInBatches(t *testing.T) {
	s := openStore(t)
	var d store.Delta
	const n = 3000
	for i := range n {
		up := upsert("configmaps", fmt.Sprintf("a-configmap-with-a-name-%d", i), fmt.Sprintf("uid-%d", i), "")
		d.Upserts = append(d.Upserts, store.Upsert{Key: keyOf(up.Ref), UID: up.UID, Rev: up.Rev, Body: up.Body})
	}
	d.Synced = "1"
	must(t, s.ApplyDelta(t.Context(), d))
	r := newRig(t, s)
	c := r.welcome()
	if len(c.items) != n || c.batches < 3 {
		t.Errorf("%d items in %d batches", len(c.items), c.batches)
	}
}

// An Ack says that the delta is on the disk; without the store there is none.
func TestNoAckWithoutCommit(t *testing.T) {
	s, err := store.Open(store.Config{Path: t.TempDir() + "/edge.db"})
	must(t, err)
	r := newRig(t, s)
	c := r.synced()
	must(t, s.Close())
	_ = c.Send(edgeapi.Delta{Seq: 2, Upserts: []edgeapi.Upsert{upsert("pods", "a", "u1", "")}}) // it may be gone already
	must(t, c.stream.SetReadDeadline(time.Now().Add(soon)))
	if m, err := c.Receive(); err == nil {
		t.Fatalf("a delta that cannot be stored was answered with %#v", m)
	}
	c.ended()
	r.await("told", func() bool { return strings.Contains(r.State().LastError, "closed") })
}

func TestADeltaThatCannotBeStoredEndsTheConversation(t *testing.T) {
	r := newRig(t, openStore(t))
	c := r.welcome()
	bad := upsert("pods", "a", "u1", "")
	bad.Body = []byte(`{"metadata":{"name":"another"}}`)
	c.send(edgeapi.Delta{Seq: 1, Upserts: []edgeapi.Upsert{bad}, Synced: true})
	c.ended()
	r.await("told", func() bool { return strings.Contains(r.State().LastError, "delta 1") })
	if r.store.Synced() || isClosed(r.FirstSync()) {
		t.Error("synced")
	}
	r.synced() // and it comes again
	r.await("synced", func() bool { return isClosed(r.FirstSync()) })
}

func TestWritesWaitForTheHubsDifferences(t *testing.T) {
	s := openStore(t)
	must(t, s.ApplyDelta(t.Context(), store.Delta{Synced: "1"}))
	r := newRig(t, s)
	c := r.welcome()
	r.report("a", "u1", "old news")
	c.quiet("before the set is complete")
	c.delta(edgeapi.Delta{Seq: 1, Upserts: []edgeapi.Upsert{upsert("configmaps", "m", "u9", "")}})
	c.quiet("after a part of it")
	c.delta(edgeapi.Delta{Seq: 2, Synced: true})
	if w := receive[edgeapi.Write](c); w.Op != edgeapi.OpStatus || w.Name != "a" || message(t, w) != "old news" {
		t.Errorf("%+v", w)
	}
}

func TestWritesInFlightAreBounded(t *testing.T) {
	r := newRig(t, openStore(t))
	c := r.synced()
	const n = 3 * statesInFlight
	for i := range n {
		r.report(fmt.Sprintf("pod-%02d", i), fmt.Sprintf("u%d", i), "x")
	}
	var out []edgeapi.Write
	for range statesInFlight {
		out = append(out, receive[edgeapi.Write](c))
	}
	c.quiet("with a full window")
	seen := map[string]int{}
	for len(out) > 0 {
		w := out[0]
		out = out[1:]
		if seen[w.Name]++; seen[w.Name] > 1 {
			t.Errorf("%s was sent twice", w.Name)
		}
		c.result(w, 200)
		if len(seen)+len(out) < n {
			out = append(out, receive[edgeapi.Write](c))
		}
	}
	c.quiet("after the last")
	r.await("an empty outbox", func() bool { return s0(r) == 0 })
}

func s0(r *rig) int { return r.store.Outbox().Depth() }

func TestResultCodes(t *testing.T) {
	for _, tc := range []struct {
		code  int
		again bool
	}{
		{200, false}, {201, false}, {404, false}, {409, false}, {410, false}, {400, false}, {403, false}, {422, false},
		{503, true}, {500, true}, {429, true}, {401, true}, {0, true},
	} {
		t.Run(fmt.Sprint(tc.code), func(t *testing.T) {
			r := newRig(t, openStore(t))
			c := r.synced()
			r.report("a", "u1", "x")
			first := receive[edgeapi.Write](c)
			c.result(first, tc.code)
			if !tc.again {
				r.await("an empty outbox", func() bool { return s0(r) == 0 })
				return
			}
			second := receive[edgeapi.Write](c)
			if second.ID == first.ID || second.Name != "a" {
				t.Errorf("%+v after %+v", second, first)
			}
			c.result(second, 200)
			r.await("an empty outbox", func() bool { return s0(r) == 0 })
		})
	}
}

// What the hub answers, and does not, is held against what was sent.
func TestResultOfAWriteThatWasNotSent(t *testing.T) {
	r := newRig(t, openStore(t))
	c := r.synced()
	c.send(edgeapi.WriteResult{ID: 77, Code: 200})
	c.ended()
	r.await("told", func() bool { return strings.Contains(r.State().LastError, "write 77") })

	c = r.synced()
	r.report("a", "u1", "x")
	w := receive[edgeapi.Write](c)
	c.send(edgeapi.WriteResult{ID: w.ID + 100, Code: 200})
	c.ended()
	if s0(r) == 0 {
		t.Error("somebody else's result took the write out of the outbox")
	}
}

func TestTheHubSpeaksOutOfTurn(t *testing.T) {
	r := newRig(t, openStore(t))
	for _, m := range []edgeapi.Message{edgeapi.Hello{}, edgeapi.Ack{Seq: 1}, edgeapi.Write{ID: 1}, edgeapi.Welcome{}} {
		c := r.synced()
		c.send(m)
		c.ended()
		r.await("told", func() bool { return strings.Contains(r.State().LastError, "unexpected") })
		c = r.hello()
		c.send(edgeapi.Delta{Seq: 1, Synced: true}) // before Welcome
		c.ended()
	}
	if !strings.Contains(r.State().LastError, "Welcome") {
		t.Errorf("%+v", r.State())
	}
	c := r.synced()
	if _, err := c.stream.Write([]byte("GET / HTTP/1.1\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	c.ended()
}

func TestGoodbye(t *testing.T) {
	r := newRig(t, openStore(t))
	c := r.hello()
	c.send(edgeapi.Goodbye{Reason: edgeapi.ReasonVersion, Message: "node edge-1 speaks version 1, this hub 2: upgrade the older of the two"})
	c.ended()
	r.await("told", func() bool { return strings.Contains(r.State().LastError, "upgrade the older") })
	c = r.synced()
	c.send(edgeapi.Goodbye{Reason: edgeapi.ReasonRevoked, Message: "this node is no longer enrolled"})
	c.ended()
	r.await("told", func() bool { return strings.Contains(r.State().LastError, "no longer enrolled") })
}

func TestAnotherNodesName(t *testing.T) {
	r := newRig(t, openStore(t))
	c := r.hello()
	c.send(edgeapi.Welcome{Version: 1, NodeName: "edge-9", Now: time.Now()})
	c.ended()
	r.await("told", func() bool {
		return strings.Contains(r.State().LastError, "edge-9") && strings.Contains(r.State().LastError, "join again")
	})
}

// A hub that says nothing after Hello costs a tunnel, not the node's stop.
func TestStopWhileTheHubStalls(t *testing.T) {
	for _, stage := range []string{"no stream taken", "no welcome", "no results"} {
		r := newRig(t, openStore(t))
		switch stage {
		case "no stream taken":
			r.session()
		case "no welcome":
			r.hello()
		default:
			c := r.synced()
			r.report("a", "u1", "x")
			receive[edgeapi.Write](c)
		}
		began := time.Now()
		r.stop()
		if took := time.Since(began); took > 3*time.Second {
			t.Errorf("%s: stopping took %v", stage, took)
		}
	}
}

func TestReconnectSendsAgainWhatWasInFlight(t *testing.T) {
	r := newRig(t, openStore(t))
	c := r.synced(upsert("pods", "a", "u1", ""))
	if w := receive[edgeapi.Write](c); w.Op != edgeapi.OpStatus || w.UID != "u1" { // asserted
		t.Fatalf("%+v", w)
	}
	c.session.Close() // the answer never comes
	r.report("b", "u2", "meanwhile")
	c = r.welcome()
	if n := c.hello.Outbox; n < 1 || n > 2 { // what was in flight counts; b may come later
		t.Errorf("hello tells of %d changes that wait", n)
	}
	c.delta(edgeapi.Delta{Seq: 1, Synced: true})
	got := map[string]edgeapi.Write{}
	for range 2 {
		w := receive[edgeapi.Write](c)
		got[w.Name] = w
		c.result(w, 200)
	}
	if got["a"].UID != "u1" || message(t, got["b"]) != "meanwhile" {
		t.Errorf("%+v", got)
	}
	r.await("an empty outbox", func() bool { return s0(r) == 0 })
	c.quiet("when all is said")
}

func TestStatusesAreAssertedAfterAnOutage(t *testing.T) {
	r := newRig(t, openStore(t))
	for range 3 {
		c := r.welcome()
		d := edgeapi.Delta{Seq: 1, Synced: true}
		if len(c.items) == 0 {
			d.Upserts = []edgeapi.Upsert{upsert("nodes", "edge-1", "un", `,"status":{}`), upsert("pods", "a", "u1", ""), upsert("configmaps", "m", "u2", "")}
		}
		c.delta(d)
		said := map[string]bool{}
		for range 2 {
			w := receive[edgeapi.Write](c)
			said[w.Op+" "+w.Resource] = true
			c.result(w, 200)
		}
		if !said["status nodes"] || !said["status pods"] {
			t.Errorf("asserted %v", said)
		}
		c.quiet("once both are asserted")
		c.session.Close()
	}
}

// The same delta twice is no change the second time.
func TestADeltaSentTwice(t *testing.T) {
	r := newRig(t, openStore(t))
	ups := []edgeapi.Upsert{upsert("configmaps", "m", "u2", `,"data":{"k":"v"}`), upsert("pods", "a", "u1", "")}
	c := r.synced(ups...)
	rv := r.store.RV()
	c.session.Close()
	c = r.welcome()
	c.delta(edgeapi.Delta{Seq: 1, Upserts: ups, Synced: true})
	if now := r.store.RV(); now != rv {
		t.Errorf("the store went from %d to %d", rv, now)
	}
}

// While a session is drained the next one runs beside it: the older one's end
// must not look like the newer's, and must keep no write to itself.
func TestDrain(t *testing.T) {
	r := newRig(t, openStore(t))
	first := r.synced()
	ctx, cancel := context.WithCancel(t.Context())
	drained := make(chan error, 1)
	go func() { drained <- first.session.Drain(ctx, tunnel.GoAway{Deadline: time.Minute, Reason: "upgrade"}) }()
	second := r.synced()
	for i := range 2 * statesInFlight { // whichever conversation would take them
		r.report(fmt.Sprintf("pod-%d", i), fmt.Sprintf("u%d", i), "x")
	}
	seen := map[string]bool{}
	for len(seen) < 2*statesInFlight {
		w := receive[edgeapi.Write](second)
		seen[w.Name] = true
		second.result(w, 200)
	}
	cancel()
	must(t, <-drained)
	first.ended()
	r.await("an empty outbox", func() bool { return s0(r) == 0 })
	second.quiet("when all is said")
	if s := r.State(); !s.Connected || s.Tunnel.Started.IsZero() {
		t.Errorf("the newer tunnel is there, the state says %+v", s)
	}
	conn, err := r.DialAPI(t.Context())
	must(t, err)
	conn.Close()
}

func TestBytesAreCountedWhileConnected(t *testing.T) {
	r := newRig(t, openStore(t))
	c := r.synced(upsert("configmaps", "m", "u1", `,"data":{"k":"`+strings.Repeat("v", 5000)+`"}`))
	one := r.State()
	if one.RawIn < 5000 || one.WireIn == 0 || one.WireIn > one.RawIn || one.RawOut == 0 {
		t.Errorf("while connected: %+v", one)
	}
	c.session.Close()
	r.synced()
	if two := r.State(); two.RawIn < one.RawIn || two.RawOut <= one.RawOut {
		t.Errorf("after a second conversation %+v, before %+v", two, one)
	}
}

// The hub's clock is passed on with each welcome.
func TestTheHubsTime(t *testing.T) {
	told := make(chan time.Time, 4)
	r := newRig(t, openStore(t), func(c *Config) { c.HubTime = func(now time.Time) { told <- now } })
	at := time.Date(2031, 1, 2, 3, 4, 5, 0, time.UTC)
	r.hello().send(edgeapi.Welcome{Version: edgeapi.Version, Agent: "hub/test", NodeName: "edge-1", Now: at})
	select {
	case got := <-told:
		if !got.Equal(at) {
			t.Errorf("told %v", got)
		}
	case <-time.After(soon):
		t.Fatal("not told")
	}
}

// A change of the network ends the wait for the next dial, and tests a tunnel
// that is up.
func TestNetworkChanged(t *testing.T) {
	r := newRig(t, openStore(t), func(c *Config) {
		c.Dialer.Backoff = tunnel.Backoff{First: time.Hour, Base: time.Hour, Max: time.Hour}
	})
	c := r.synced()
	before := c.session.Stats().FramesIn
	r.NetworkChanged()
	r.await("a ping", func() bool { return c.session.Stats().FramesIn > before })
	c.session.Close()
	r.await("the cut", func() bool { return !r.State().Connected })
	r.NetworkChanged()
	r.synced()
}
