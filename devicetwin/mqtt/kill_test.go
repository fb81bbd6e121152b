package mqtt

import (
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/eclipse/paho.mqtt.golang/packets"
)

var kills = flag.Int("kills", 20, "how often the tests of killed brokers kill one")

// TestMosquittoKilled kills mosquitto again and again while a publisher sends
// 1,000 messages a second at QoS 1, each until it is acknowledged, and External,
// with a session that the broker keeps, has each captured with an fsync.
//
// A relay before External sees all that passes. What External acknowledged was
// on disk before; and what the publisher was told is safe and was not captured
// must never have reached External: mosquitto answers PUBACK before it saves,
// whatever autosave is set to, and what it lost so it has lost. With the window
// open (max_inflight_messages 0) that is what it held for a subscriber that was
// just not there.
func TestMosquittoKilled(t *testing.T) {
	m := startMosquitto(t, "persistence true", "persistence_location %d/", "autosave_on_changes true", "autosave_interval 1",
		"max_inflight_messages 0", "max_queued_messages 0")
	log := openCapture(t)
	r := startRelay(t, m.addr, log.has)
	e := runExternal(t, ExternalConfig{URL: "mqtt://" + r.addr, Capture: log.capture}, func(e *External) {
		subscribe(t, e, "dev/#", 1, func(Message) error { return nil })
	})
	subscribed(t, e)
	p := startPublisher(t, m.addr)
	ours, theirs := uint64(0), int32(0)
	for range *kills {
		eventually(t, "both connected again", func() bool {
			return e.State().Connected && e.Stats().Connects > ours && p.connected.Load() && p.connects.Load() > theirs
		})
		<-time.After(100*time.Millisecond + rand.N(250*time.Millisecond))
		ours, theirs = e.Stats().Connects, p.connects.Load()
		m.kill()
		m.start()
	}
	p.finish()
	eventually(t, "all that mosquitto has", func() bool { return e.State().Connected && r.quiet() && e.Stats().Queued == 0 })
	acked := p.acked()
	lost := 0
	for _, id := range acked {
		if !log.has(id) {
			lost++
			if r.delivered(id) {
				t.Errorf("message %s came to us and was not captured", id)
			}
		}
	}
	if n := r.early.Load(); n > 0 {
		t.Errorf("%d messages were acknowledged before they were on disk", n)
	}
	total, distinct := log.counts()
	t.Logf("%d kills, %d connects: %d messages acknowledged to the publisher, %d captured (%d duplicates), %d that mosquitto lost",
		*kills, e.Stats().Connects, len(acked), distinct, total-distinct, lost)
	if len(acked) == 0 || distinct == 0 {
		t.Error("nothing went through")
	}
	// How much mosquitto loses between PUBACK and save is its own: the more, the
	// larger its file has grown. That it kept the session for us is ours to ask.
	if n := r.clean.Load(); n > 0 {
		t.Errorf("%d connects asked for no session to be kept", n)
	}
}

// captureLog is a file that many messages at a time are synced to.
type captureLog struct {
	f *os.File

	mu       sync.Mutex
	ids      map[string]bool // on disk
	total    int
	waiting  []waiter
	syncing  bool
	finished sync.WaitGroup
}

type waiter struct {
	id   string
	done chan error
}

func openCapture(t testing.TB) *captureLog {
	f, err := os.Create(filepath.Join(t.TempDir(), "captured"))
	if err != nil {
		t.Fatal(err)
	}
	c := &captureLog{f: f, ids: make(map[string]bool)}
	t.Cleanup(func() {
		c.finished.Wait()
		f.Close()
	})
	return c
}

// capture returns when m is on disk.
func (c *captureLog) capture(m Message) error {
	w := waiter{string(m.Payload), make(chan error, 1)}
	c.mu.Lock()
	c.waiting = append(c.waiting, w)
	if !c.syncing {
		c.syncing = true
		c.finished.Go(c.sync)
	}
	c.mu.Unlock()
	return <-w.done
}

func (c *captureLog) sync() {
	for {
		c.mu.Lock()
		batch := c.waiting
		c.waiting = nil
		if len(batch) == 0 {
			c.syncing = false
			c.mu.Unlock()
			return
		}
		c.mu.Unlock()
		var text []byte
		for _, w := range batch {
			text = append(append(text, w.id...), '\n')
		}
		_, err := c.f.Write(text)
		if err == nil {
			err = c.f.Sync()
		}
		c.mu.Lock()
		for _, w := range batch {
			if err == nil {
				c.ids[w.id] = true
				c.total++
			}
		}
		c.mu.Unlock()
		for _, w := range batch {
			w.done <- err
		}
	}
}

func (c *captureLog) has(id string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ids[id]
}

func (c *captureLog) counts() (total, distinct int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.total, len(c.ids)
}

// publisher is a device that sends 1,000 messages a second, and each again on
// each connection until it is acknowledged.
type publisher struct {
	addr      string
	connected atomic.Bool
	connects  atomic.Int32
	stopping  atomic.Bool
	done      chan struct{}

	mu      sync.Mutex
	conn    net.Conn
	next    int
	open    map[uint16]string // not acknowledged, by packet identifier
	order   []uint16          // of open, and of some that no longer are
	ackedID []string
}

func startPublisher(t testing.TB, addr string) *publisher {
	p := &publisher{addr: addr, done: make(chan struct{}), open: make(map[uint16]string)}
	go p.run()
	t.Cleanup(p.finish)
	return p
}

// finish stops making messages, and returns when all are acknowledged.
func (p *publisher) finish() {
	p.stopping.Store(true)
	<-p.done
}

func (p *publisher) acked() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ackedID
}

func (p *publisher) run() {
	defer close(p.done)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	var reading sync.WaitGroup
	defer reading.Wait()
	for range tick.C {
		if !p.connected.Load() {
			reading.Wait()
			p.connect(&reading)
		}
		p.mu.Lock()
		open := len(p.open)
		conn := p.conn
		p.mu.Unlock()
		if p.stopping.Load() && open == 0 {
			if conn != nil {
				conn.Close()
			}
			return
		}
		if !p.stopping.Load() && open < 5000 {
			for range 10 {
				p.publish()
			}
		}
	}
}

func (p *publisher) publish() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.next++
	mid := uint16(p.next%65000 + 1)
	p.open[mid] = fmt.Sprint(p.next)
	p.order = append(p.order, mid)
	p.sendLocked(mid, false)
}

func (p *publisher) sendLocked(mid uint16, dup bool) {
	if p.conn == nil || !p.connected.Load() {
		return
	}
	m := &packets.PublishPacket{
		FixedHeader: packets.FixedHeader{MessageType: packets.Publish, Qos: 1, Dup: dup},
		MessageID:   mid, TopicName: fmt.Sprintf("dev/%d/state", mid%50), Payload: []byte(p.open[mid]),
	}
	if m.Write(p.conn) != nil {
		p.connected.Store(false)
	}
}

func (p *publisher) connect(reading *sync.WaitGroup) {
	conn, err := net.Dial("tcp", p.addr)
	if err != nil {
		return
	}
	c := packets.NewControlPacket(packets.Connect).(*packets.ConnectPacket)
	c.ProtocolName, c.ProtocolVersion, c.CleanSession, c.ClientIdentifier, c.Keepalive = "MQTT", 4, true, "publisher", 60
	if c.Write(conn) != nil {
		conn.Close()
		return
	}
	if ack, err := packets.ReadPacket(conn); err != nil || ack.(*packets.ConnackPacket).ReturnCode != 0 {
		conn.Close()
		return
	}
	p.mu.Lock()
	p.conn = conn
	p.mu.Unlock()
	p.connected.Store(true)
	p.connects.Add(1)
	reading.Go(func() { p.read(conn) })
	p.mu.Lock()
	defer p.mu.Unlock()
	still := p.order[:0]
	for _, mid := range p.order {
		if _, ok := p.open[mid]; ok {
			still = append(still, mid)
			p.sendLocked(mid, true)
		}
	}
	p.order = still
}

func (p *publisher) read(conn net.Conn) {
	defer conn.Close()
	defer p.connected.Store(false)
	for {
		packet, err := packets.ReadPacket(conn)
		if err != nil {
			return
		}
		if ack, ok := packet.(*packets.PubackPacket); ok {
			p.mu.Lock()
			if id, ok := p.open[ack.MessageID]; ok {
				p.ackedID = append(p.ackedID, id)
				delete(p.open, ack.MessageID)
			}
			p.mu.Unlock()
		}
	}
}

// relay stands between a client and the broker and sees what passes.
type relay struct {
	addr  string
	onto  string
	saved func(id string) bool
	early atomic.Int32 // acknowledged before saved
	clean atomic.Int32 // connects that want no session kept

	mu   sync.Mutex
	came map[string]bool // delivered to the client
	last time.Time
}

func startRelay(t testing.TB, onto string, saved func(string) bool) *relay {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{addr: l.Addr().String(), onto: onto, saved: saved, came: make(map[string]bool), last: time.Now()}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { r.serve(c) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		serving.Wait()
	})
	return r
}

// quiet says that nothing has come for a while.
func (r *relay) quiet() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return time.Since(r.last) > 500*time.Millisecond
}

func (r *relay) delivered(id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.came[id]
}

func (r *relay) serve(client net.Conn) {
	defer client.Close()
	broker, err := net.Dial("tcp", r.onto)
	if err != nil {
		return
	}
	defer broker.Close()
	var mu sync.Mutex
	open := make(map[uint16]string)
	var up sync.WaitGroup
	up.Go(func() {
		defer func() { _, _ = io.Copy(io.Discard, client) }()
		defer broker.Close()
		pass(client, broker, func(p packets.ControlPacket) {
			switch p := p.(type) {
			case *packets.ConnectPacket:
				if p.CleanSession {
					r.clean.Add(1)
				}
			case *packets.PubackPacket:
				mu.Lock()
				id := open[p.MessageID]
				mu.Unlock()
				if !r.saved(id) {
					r.early.Add(1)
				}
			}
		})
	})
	pass(broker, client, func(p packets.ControlPacket) {
		if m, ok := p.(*packets.PublishPacket); ok {
			mu.Lock()
			open[m.MessageID] = string(m.Payload)
			mu.Unlock()
		}
	}, func(p packets.ControlPacket) {
		if m, ok := p.(*packets.PublishPacket); ok {
			r.mu.Lock()
			r.came[string(m.Payload)] = true
			r.last = time.Now()
			r.mu.Unlock()
		}
	})
	// The client is to read all of it: a close would cut off, with a reset, what
	// it has not read yet.
	_ = client.(*net.TCPConn).CloseWrite()
	up.Wait()
}

// pass passes packets on, and tells of each before and after.
func pass(from io.Reader, to io.Writer, before func(packets.ControlPacket), after ...func(packets.ControlPacket)) {
	for {
		p, err := packets.ReadPacket(from)
		if err != nil {
			return
		}
		before(p)
		if p.Write(to) != nil {
			return
		}
		for _, f := range after {
			f(p)
		}
	}
}
