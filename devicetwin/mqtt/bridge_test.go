package mqtt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

var listeners atomic.Int32

// listen hears a broker with a client of its own.
func listen(t testing.TB, m *mosquitto, filters ...string) *heard {
	t.Helper()
	h := new(heard)
	e := runExternal(t, ExternalConfig{URL: m.url(), ClientID: fmt.Sprint("listener", listeners.Add(1))}, func(e *External) {
		for _, f := range filters {
			subscribe(t, e, f, 1, h.handle)
		}
	})
	subscribed(t, e)
	return h
}

func topics(t testing.TB, lines ...string) (topics []BridgeTopic) {
	t.Helper()
	for _, line := range lines {
		topic, err := ParseBridgeTopic(line)
		if err != nil {
			t.Fatal(err)
		}
		topics = append(topics, topic)
	}
	return topics
}

// runBridge runs a bridge between two brokers until the test ends.
func runBridge(t testing.TB, local Broker, remote string, cfg BridgeConfig) *Bridge {
	t.Helper()
	if cfg.Name == "" {
		cfg.Name = "b1"
	}
	cfg.Local = local
	cfg.Remote.URL = remote
	cfg.Remote.MinBackoff, cfg.Remote.MaxBackoff = 20*time.Millisecond, 100*time.Millisecond
	cfg.Log = testLog(t)
	b, err := NewBridge(cfg)
	if err != nil {
		t.Fatal(err)
	}
	runUntilEnd(t, b)
	return b
}

// settledBridge waits until both sides have answered to subscriptions.
func settledBridge(t testing.TB, b *Bridge) {
	t.Helper()
	local := b.cfg.Local.(*External)
	eventually(t, "bridge subscribed", func() bool {
		return len(local.currentRoutes().wild)+len(b.remote.currentRoutes().wild) > 0
	})
	subscribed(t, b.remote)
	subscribed(t, local)
}

func TestBridgeCarries(t *testing.T) {
	here, there := startMosquitto(t), startMosquitto(t)
	hearHere, hearThere := listen(t, here, "#"), listen(t, there, "#")
	there.pub("-t", "cloud/in/kept", "-m", "k", "-r", "-q", "1")
	local := runExternal(t, ExternalConfig{URL: here.url(), ClientID: "local", Bridge: true}, nil)
	b := runBridge(t, local, there.url(), BridgeConfig{NoNotifications: true, Topics: topics(t,
		`topic sensors/# out 1 "" site1/`,
		`topic # in 1 orders/ cloud/in/`,
		`topic "" out 1 door/state doors/front`,
		`topic sensors/# out 0 "" second/`, // the first line that matches has it
	)})
	settledBridge(t, b)
	here.pub("-t", "sensors/a/t", "-m", "20", "-q", "1", "-r")
	here.pub("-t", "door/state", "-m", "open", "-q", "0")
	there.pub("-t", "cloud/in/x/y", "-m", "go", "-q", "1")
	eventually(t, "all carried", func() bool { return hearThere.len() == 4 && hearHere.len() == 4 })
	for _, want := range []string{"site1/sensors/a/t=20", "doors/front=open", "cloud/in/x/y=go", "cloud/in/kept=k"} {
		if !slices.Contains(hearThere.all(), want) {
			t.Errorf("there: %v, and not %s", hearThere.all(), want)
		}
	}
	for _, want := range []string{"sensors/a/t=20", "door/state=open", "orders/x/y=go", "orders/kept=k"} {
		if !slices.Contains(hearHere.all(), want) {
			t.Errorf("here: %v, and not %s", hearHere.all(), want)
		}
	}
	// What was to be retained is, on the other side.
	if got := listen(t, there, "site1/#"); !eventuallyLen(got, 1) || !got.msgs[0].Retain {
		t.Error("not retained there")
	}
	if s := b.Stats(); s.Out != 2 || s.In != 2 || s.Dropped != 0 {
		t.Errorf("%+v", s)
	}
}

func eventuallyLen(h *heard, n int) bool {
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		if h.len() >= n {
			return true
		}
	}
	return false
}

// TestBridgeCutsLoops: a topic carried both ways, between brokers that take us
// for a bridge and such that do not.
func TestBridgeCutsLoops(t *testing.T) {
	for _, private := range []bool{true, false} {
		t.Run(fmt.Sprintf("private=%v", private), func(t *testing.T) {
			here, there := startMosquitto(t), startMosquitto(t)
			hearHere, hearThere := listen(t, here, "both/#"), listen(t, there, "both/#")
			local := runExternal(t, ExternalConfig{URL: here.url(), ClientID: "local", Bridge: private}, nil)
			b := runBridge(t, local, there.url(), BridgeConfig{NoNotifications: true, NoPrivate: !private,
				Topics: topics(t, `topic both/# both 1 "" ""`)})
			settledBridge(t, b)
			const n = 20
			for i := range n {
				here.pub("-t", "both/a", "-m", fmt.Sprintf("h%d", i), "-q", "1")
				there.pub("-t", "both/a", "-m", fmt.Sprintf("t%d", i), "-q", "0")
			}
			// The same again is carried again.
			here.pub("-t", "both/b", "-m", "same", "-q", "1")
			here.pub("-t", "both/b", "-m", "same", "-q", "1")
			here.pub("-t", "both/end", "-m", "", "-q", "1")
			there.pub("-t", "both/end", "-m", "", "-q", "1")
			ends := func(h *heard) (n int) {
				for _, s := range h.all() {
					if s == "both/end=" {
						n++
					}
				}
				return n
			}
			eventually(t, "the ends", func() bool { return ends(hearHere) >= 2 && ends(hearThere) >= 2 })
			if hearHere.len() != 2*n+4 || hearThere.len() != 2*n+4 {
				t.Errorf("%d heard here and %d there of %d: %v", hearHere.len(), hearThere.len(), 2*n+4, hearThere.all())
			}
			if s := b.Stats(); private != (s.Echoes == 0) {
				t.Errorf("%+v", s)
			}
		})
	}
}

// TestBridgeKeeps: what comes while the other side is away is carried when it is
// back, in order.
func TestBridgeKeeps(t *testing.T) {
	here, there := startMosquitto(t), startMosquitto(t, "persistence true", "persistence_location %d/")
	hear := listen(t, there, "a/#")
	local := runExternal(t, ExternalConfig{URL: here.url(), ClientID: "local", Bridge: true}, nil)
	b := runBridge(t, local, there.url(), BridgeConfig{Topics: topics(t, `topic a/# out 1 "" ""`)})
	settledBridge(t, b)
	device := runExternal(t, ExternalConfig{URL: here.url(), ClientID: "device"}, nil)
	connected(t, device)
	there.stop()
	eventually(t, "loss noticed", func() bool { return !b.State().Connected })
	const n = 200
	for i := range n {
		publish(t, device, Message{Topic: "a/b", QoS: 1, Payload: fmt.Appendf(nil, "%d", i)})
	}
	publish(t, device, Message{Topic: "a/zero", QoS: 0})
	eventually(t, "all queued", func() bool { return b.Stats().WaitOut == n && b.Stats().Dropped == 1 })
	there.start()
	eventually(t, "all heard", func() bool { return hear.len() == n && b.Stats().WaitOut == 0 })
	for i, got := range hear.all() {
		if got != fmt.Sprintf("a/b=%d", i) {
			t.Fatalf("at %d: %s", i, got)
		}
	}

	// Without it, nothing is kept.
	there.stop()
	clean := runBridge(t, local, there.url(), BridgeConfig{Name: "b2", LocalCleanSession: true, Topics: topics(t, `topic c/# out 1 "" ""`)})
	eventually(t, "subscribed", func() bool { return local.currentRoutes().find("c/x") != nil })
	subscribed(t, local)
	publish(t, device, Message{Topic: "c/x", QoS: 1})
	eventually(t, "dropped", func() bool { s := clean.Stats(); return s.Dropped == 1 && s.WaitOut == 0 })
}

// TestBridgeSurvivesRestarts: the remote broker is restarted again and again; in
// the end it has been given all.
func TestBridgeSurvivesRestarts(t *testing.T) {
	here := startMosquitto(t, "max_queued_messages 0")
	there := startMosquitto(t, "persistence true", "persistence_location %d/")
	hear := listen(t, there, "a/#")
	local := runExternal(t, ExternalConfig{URL: here.url(), ClientID: "local", Bridge: true}, nil)
	b := runBridge(t, local, there.url(), BridgeConfig{NoNotifications: true, Out: NewMemoryQueue(10_000), Topics: topics(t, `topic a/# out 1 "" ""`)})
	settledBridge(t, b)
	device := runExternal(t, ExternalConfig{URL: here.url(), ClientID: "device"}, nil)
	connected(t, device)
	const n = 3000
	for i := range n {
		publish(t, device, Message{Topic: "a/b", QoS: 1, Payload: fmt.Appendf(nil, "%d", i)})
		if i%500 == 250 {
			there.stop() // it keeps what it acknowledged
			there.start()
		}
	}
	heardAll := func() bool {
		seen := make(map[string]bool)
		for _, s := range hear.all() {
			seen[s] = true
		}
		return len(seen) == n
	}
	eventually(t, "all heard", heardAll)
	eventually(t, "nothing open", func() bool { return b.Stats().WaitOut == 0 })
}

// TestBridgeNotifies: the state of the bridge is retained at both ends.
func TestBridgeNotifies(t *testing.T) {
	here, there := startMosquitto(t), startMosquitto(t, "persistence true", "persistence_location %d/")
	const topic = "skerry/bridge/b1/state"
	hearHere, hearThere := listen(t, here, topic), listen(t, there, topic)
	last := func(h *heard) string {
		if all := h.all(); len(all) > 0 {
			return strings.TrimPrefix(all[len(all)-1], topic+"=")
		}
		return ""
	}
	local := runExternal(t, ExternalConfig{URL: here.url(), ClientID: "local", Bridge: true}, nil)
	b, err := NewBridge(BridgeConfig{Name: "b1", Local: local, Remote: ExternalConfig{URL: there.url(), MinBackoff: 10 * time.Millisecond, MaxBackoff: 50 * time.Millisecond},
		Topics: topics(t, `topic a/# out 1 "" ""`), Log: testLog(t)})
	if err != nil {
		t.Fatal(err)
	}
	stop := runUntilEnd(t, b)
	eventually(t, "1 at both", func() bool { return last(hearHere) == "1" && last(hearThere) == "1" })
	there.stop()
	eventually(t, "0 here", func() bool { return last(hearHere) == "0" })
	there.start()
	eventually(t, "1 at both again", func() bool { return last(hearHere) == "1" && last(hearThere) == "1" })
	// The connection is cut, not closed: the will.
	b.remote.mu.Lock()
	l := b.remote.link
	b.remote.mu.Unlock()
	before := hearThere.len()
	l.fail(errors.New("test"))
	eventually(t, "will, and birth", func() bool {
		all := hearThere.all()
		return len(all) >= before+2 && last(hearThere) == "1" && slices.Contains(all[before:], topic+"=0")
	})
	stop()
	eventually(t, "0 at both", func() bool { return last(hearHere) == "0" && last(hearThere) == "0" })
}

// TestBridgeRetained: what the bridge has put there does not come back as news,
// and does not overwrite newer words.
func TestBridgeRetained(t *testing.T) {
	here, there := startMosquitto(t), startMosquitto(t, "persistence true", "persistence_location %d/")
	local := runExternal(t, ExternalConfig{URL: here.url(), ClientID: "local", Bridge: true}, nil)
	b := runBridge(t, local, there.url(), BridgeConfig{NoNotifications: true, Topics: topics(t, `topic lamp/# both 1 "" ""`)})
	settledBridge(t, b)
	device := runExternal(t, ExternalConfig{URL: here.url(), ClientID: "device"}, nil)
	connected(t, device)
	hearHere := listen(t, here, "lamp/#")
	publish(t, device, Message{Topic: "lamp/1", QoS: 1, Retain: true, Payload: []byte("on")})
	eventually(t, "carried", func() bool { return b.Stats().Out == 1 })
	there.stop()
	eventually(t, "loss noticed", func() bool { return !b.State().Connected })
	publish(t, device, Message{Topic: "lamp/1", QoS: 1, Retain: true, Payload: []byte("off")})
	eventually(t, "queued", func() bool { return b.Stats().WaitOut == 1 })
	there.start()
	eventually(t, "carried", func() bool { return b.Stats().Out == 2 })
	settledBridge(t, b)
	there.pub("-t", "lamp/end", "-m", "1", "-q", "1")
	eventually(t, "the end", func() bool { return slices.Contains(hearHere.all(), "lamp/end=1") })
	if got := hearHere.all(); !slices.Equal(got, []string{"lamp/1=on", "lamp/1=off", "lamp/end=1"}) {
		t.Errorf("here: %v", got)
	}
}

// TestBridgeWindow: no more is in flight than the other side takes.
func TestBridgeWindow(t *testing.T) {
	here, there := startMosquitto(t), startFakeBroker(t)
	there.mute.Store(true)
	local := runExternal(t, ExternalConfig{URL: here.url(), ClientID: "local", Bridge: true}, nil)
	b := runBridge(t, local, there.url(), BridgeConfig{NoNotifications: true, Topics: topics(t, `topic a/# out 1 "" ""`)})
	connected(t, b.remote)
	subscribed(t, local)
	device := runExternal(t, ExternalConfig{URL: here.url(), ClientID: "device"}, nil)
	connected(t, device)
	for i := range 100 {
		publish(t, device, Message{Topic: "a/b", QoS: 1, Payload: fmt.Append(nil, i)})
	}
	eventually(t, "all queued", func() bool { return b.Stats().WaitOut == 100 && there.publishes.Load() >= 20 })
	if n := there.publishes.Load(); n != 20 {
		t.Errorf("%d in flight", n)
	}
	there.mute.Store(false)
	there.cut()
	eventually(t, "all carried", func() bool { return b.Stats().WaitOut == 0 })
	if n := there.publishes.Load(); n != 120 {
		t.Errorf("%d sent in all", n)
	}
}

// TestBridgeLazy: no connection before there is enough to say, none after.
func TestBridgeLazy(t *testing.T) {
	here, there := startMosquitto(t), startMosquitto(t)
	hear := listen(t, there, "#")
	local := runExternal(t, ExternalConfig{URL: here.url(), ClientID: "local", Bridge: true}, nil)
	b := runBridge(t, local, there.url(), BridgeConfig{NoNotifications: true, Lazy: true, Threshold: 3, IdleTimeout: 100 * time.Millisecond,
		Topics: topics(t, `topic a/# out 1 "" ""`)})
	subscribed(t, local)
	device := runExternal(t, ExternalConfig{URL: here.url(), ClientID: "device"}, nil)
	connected(t, device)
	for round := range 2 {
		publish(t, device, Message{Topic: "a/b", QoS: 1})
		publish(t, device, Message{Topic: "a/b", QoS: 1})
		eventually(t, "two wait", func() bool { return b.Stats().WaitOut == 2 })
		if b.State().Connected {
			t.Error("connected for two messages")
		}
		publish(t, device, Message{Topic: "a/b", QoS: 1})
		eventually(t, "carried", func() bool { return hear.len() == 3*(round+1) })
		eventually(t, "connection closed", func() bool { return !b.State().Connected })
	}
}

// TestBridgeToOldBroker: one that refuses what it takes for an unknown version
// gets an ordinary connection.
func TestBridgeToOldBroker(t *testing.T) {
	for _, code := range []byte{1, 0x84, 255} { // refuses, in MQTT 5's words, cuts
		there := startFakeBroker(t)
		there.refuseBridge = code
		here := startMosquitto(t)
		local := runExternal(t, ExternalConfig{URL: here.url(), ClientID: "local"}, nil)
		b := runBridge(t, local, there.url(), BridgeConfig{NoNotifications: true, Topics: topics(t, `topic a/# both 1 "" ""`)})
		subscribed(t, b.remote)
		if b.remote.private() {
			t.Error("taken for a bridge")
		}
	}
}

// TestBridgeFromEmbedded: what devices say to the embedded broker while the node
// is cut off, and what of it a queue has kept over a restart of the node, is
// carried once it is connected, retained where it is to be; and nothing loops.
func TestBridgeFromEmbedded(t *testing.T) {
	q := NewMemoryQueue(1000)
	there := startMosquitto(t, "persistence true", "persistence_location %d/")
	hear := listen(t, there, "site/#")
	start := func() (*Embedded, func()) {
		local, err := NewEmbedded(EmbeddedConfig{Log: testLog(t)})
		if err != nil {
			t.Fatal(err)
		}
		stopLocal := runUntilEnd(t, local)
		b, err := NewBridge(BridgeConfig{Name: "b1", Local: local, NoNotifications: true, Out: q, Log: testLog(t),
			Remote: ExternalConfig{URL: there.url(), MinBackoff: 10 * time.Millisecond, MaxBackoff: 50 * time.Millisecond},
			Topics: topics(t, `topic # both 1 "" site/`)})
		if err != nil {
			t.Fatal(err)
		}
		stop := runUntilEnd(t, b)
		eventually(t, "bridge subscribed", func() bool { return len(b.remote.currentRoutes().wild) == 1 })
		return local, func() {
			stop()
			stopLocal()
			q.mu.Lock()
			q.next = q.first // as one on disk begins
			q.mu.Unlock()
		}
	}
	there.stop()
	local, stop := start()
	const n = 50
	for i := range n {
		publish(t, local, Message{Topic: "dev/1", QoS: 1, Payload: fmt.Append(nil, i)})
	}
	publish(t, local, Message{Topic: "dev/2", QoS: 1, Retain: true, Payload: []byte("kept")})
	eventually(t, "all queued", func() bool { return q.Len() == n+1 })
	stop()
	there.start()
	local, stop = start()
	defer stop()
	var here heard
	defer subscribe(t, local, "#", 1, here.handle)()
	eventually(t, "all heard", func() bool { return hear.len() == n+1 && q.Len() == 0 })
	for i, got := range hear.all()[:n] {
		if got != fmt.Sprintf("site/dev/1=%d", i) {
			t.Fatalf("at %d: %s", i, got)
		}
	}
	if kept := listen(t, there, "site/dev/2"); !eventuallyLen(kept, 1) || !kept.msgs[0].Retain {
		t.Error("not retained there")
	}
	there.pub("-t", "site/cmd", "-m", "go", "-q", "1")
	publish(t, local, Message{Topic: "end", QoS: 1})
	eventually(t, "the end there", func() bool { return hear.len() >= n+3 })
	eventually(t, "command here", func() bool { return here.len() >= 2 })
	for _, s := range here.all() {
		if s != "cmd=go" && s != "end=" {
			t.Errorf("here came %s", s)
		}
	}
	if hear.len() != n+3 {
		t.Errorf("there came %v", hear.all()[n:])
	}
}

func TestParseBridgeTopic(t *testing.T) {
	for line, want := range map[string]BridgeTopic{
		"topic # both 2 local/ remote/": {"#", "both", 2, "local/", "remote/"},
		"topic a":                       {"a", "out", 0, "", ""},
		"a/+ in":                        {"a/+", "in", 0, "", ""},
		`topic # out 1 "" site/`:        {"#", "out", 1, "", "site/"},
		`topic "" out 1 a/b c/d`:        {"", "out", 1, "a/b", "c/d"},
	} {
		got, err := ParseBridgeTopic(line)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", line, got, err)
		}
	}
	for _, line := range []string{"", "topic", "topic a up", "topic a out 3", "topic a out x", "topic a out 0 +/ b/", "topic a# out", `topic "" out 0 a`, "topic a out 0 b c d"} {
		if got, err := ParseBridgeTopic(line); err == nil {
			t.Errorf("%q: %+v", line, got)
		}
	}
}

func TestParseBridges(t *testing.T) {
	specs, err := ParseBridges(strings.NewReader(`
# to the cloud
connection cloud
address broker.example.com:8883
bridge_cafile /etc/ca.pem
remote_clientid site1
remote_username u
topic sensors/# out 1 "" site1/
topic orders/# in 1 "" site1/
cleansession false
local_cleansession true
restart_timeout 5 60
start_type automatic
notification_topic bridges/site1
keepalive_interval 20

connection second
address 10.0.0.1
topic # both
start_type lazy
threshold 5
idle_timeout 30
notifications false
`))
	if err != nil {
		t.Fatal(err)
	}
	a, b := specs[0], specs[1]
	if a.URL != "mqtts://broker.example.com:8883" || a.ClientID != "site1" || len(a.Topics) != 2 || a.CleanSession || !a.LocalCleanSession ||
		a.MinRestart != 5*time.Second || a.MaxRestart != time.Minute || a.KeepAlive != 20*time.Second {
		t.Errorf("%+v", a)
	}
	if b.URL != "mqtt://10.0.0.1:1883" || !b.Lazy || b.Threshold != 5 || !b.NoNotifications || b.Topics[0].Direction != "both" {
		t.Errorf("%+v", b)
	}
	for _, bad := range []string{
		"address a", "connection a\ntopic #", "connection a\naddress x", "connection a\naddress x:0\ntopic #",
		"connection a\naddress x\ntopic #\nbridge_insecure true", "connection a\naddress x\ntopic #\nround_robin true",
		"connection a\naddress x y\ntopic #", "connection a\naddress x\ntopic #\nrestart_timeout 60 5",
	} {
		if specs, err := ParseBridges(strings.NewReader(bad)); err == nil {
			t.Errorf("%q: %+v", bad, specs)
		}
	}
}

func TestBridgeConfigErrors(t *testing.T) {
	local, err := NewExternal(ExternalConfig{URL: "mqtt://x"})
	if err != nil {
		t.Fatal(err)
	}
	good := BridgeConfig{Name: "b", Local: local, Remote: ExternalConfig{URL: "mqtt://y"}, Topics: topics(t, "topic a")}
	if _, err := NewBridge(good); err != nil {
		t.Fatal(err)
	}
	for _, spoil := range []func(*BridgeConfig){
		func(c *BridgeConfig) { c.Name = "" },
		func(c *BridgeConfig) { c.Name = "a/#" },
		func(c *BridgeConfig) { c.Local = nil },
		func(c *BridgeConfig) { c.Topics = nil },
		func(c *BridgeConfig) { c.Topics = []BridgeTopic{{Pattern: "a"}} },
		func(c *BridgeConfig) { c.Remote.URL = "y" },
		func(c *BridgeConfig) { c.Lazy = true; c.Topics = topics(t, "topic a in") },
		func(c *BridgeConfig) { c.NotificationTopic = "a/#" },
	} {
		c := good
		spoil(&c)
		if _, err := NewBridge(c); err == nil {
			t.Errorf("%+v passes", c)
		}
	}
}

func FuzzParseBridges(f *testing.F) {
	f.Add("connection a\naddress x:1\ntopic a/# both 1 l/ r/\nrestart_timeout 1 2")
	f.Add("connection a\naddress [::1]\ntopic \"\" in 0 l r\nthreshold 9")
	f.Fuzz(func(t *testing.T, text string) {
		specs, err := ParseBridges(strings.NewReader(text))
		if err != nil {
			return
		}
		for _, s := range specs {
			if _, err := brokerURL(s.URL); err != nil {
				t.Errorf("%q: %v", text, err)
			}
			for _, topic := range s.Topics {
				again, err := ParseBridgeTopic(topic.String())
				if err != nil || again != topic {
					t.Errorf("%s: read again as %+v, %v", topic, again, err)
				}
			}
		}
	})
}

func FuzzParseRecord(f *testing.F) {
	f.Add(appendRecord(nil, Message{Topic: "a/b", Payload: []byte("x"), QoS: 1, Retain: true, Received: time.UnixMilli(5), Expiry: time.Second}))
	f.Add([]byte{recordKind, 7})
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parseRecord(b)
		if err != nil {
			return
		}
		again, err := parseRecord(appendRecord(nil, m))
		if err != nil || again.Topic != m.Topic || !bytes.Equal(again.Payload, m.Payload) || again.QoS != m.QoS ||
			again.Retain != m.Retain || !again.Received.Equal(m.Received) || again.Expiry != m.Expiry {
			t.Errorf("%+v, then %+v, %v", m, again, err)
		}
	})
}

// TestMemoryQueue: what was not acknowledged stays, within bounds.
func TestMemoryQueue(t *testing.T) {
	q, ctx := NewMemoryQueue(3), context.Background()
	for i := range 3 {
		if err := q.Append(ctx, []byte{byte(i)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := q.Append(ctx, nil); !errors.Is(err, ErrQueueFull) {
		t.Errorf("a fourth: %v", err)
	}
	var ids []uint64
	for i := range 3 {
		id, record, err := q.Next(ctx)
		if err != nil || record[0] != byte(i) {
			t.Fatalf("%d: %v %v", i, record, err)
		}
		ids = append(ids, id)
	}
	_ = q.Ack(ids[1])
	if q.Len() != 1 {
		t.Errorf("%d left", q.Len())
	}
	short, cancel := context.WithCancel(ctx)
	cancel()
	if _, _, err := q.Next(short); err == nil {
		t.Error("more than there was")
	}
}
