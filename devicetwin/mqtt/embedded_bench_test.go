package mqtt

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
)

// BenchmarkQoS1 is messages of QoS 1 through a broker: from publishers, each
// with at most 20 unacknowledged, to one subscriber. p50 and p99 are from the
// publisher's send to the subscriber's receipt. "captured" syncs each to disk
// before PUBACK; mosquitto is beside for scale.
func BenchmarkQoS1(b *testing.B) {
	for _, publishers := range []int{1, 10, 50} {
		b.Run(fmt.Sprintf("embedded/%d", publishers), func(b *testing.B) {
			e := startEmbedded(b, EmbeddedConfig{})
			benchQoS1(b, e.addr(), publishers, 0)
		})
		b.Run(fmt.Sprintf("captured/%d", publishers), func(b *testing.B) {
			e := startEmbedded(b, EmbeddedConfig{CaptureAll: syncedCapture(b)})
			benchQoS1(b, e.addr(), publishers, 0)
		})
		b.Run(fmt.Sprintf("mosquitto/%d", publishers), func(b *testing.B) {
			m := startMosquitto(b, "max_queued_messages 0", "max_inflight_messages 1000")
			benchQoS1(b, m.addr, publishers, 0)
		})
	}
}

// BenchmarkLatency is the same at 1,000 messages a second.
func BenchmarkLatency(b *testing.B) {
	b.Run("embedded", func(b *testing.B) {
		e := startEmbedded(b, EmbeddedConfig{})
		benchQoS1(b, e.addr(), 10, 1000)
	})
	b.Run("captured", func(b *testing.B) {
		e := startEmbedded(b, EmbeddedConfig{CaptureAll: syncedCapture(b)})
		benchQoS1(b, e.addr(), 10, 1000)
	})
	b.Run("mosquitto", func(b *testing.B) {
		m := startMosquitto(b)
		benchQoS1(b, m.addr, 10, 1000)
	})
}

// syncedCapture appends to one file, many messages to an fsync.
func syncedCapture(b *testing.B) func([]Message) error {
	f, err := os.Create(filepath.Join(b.TempDir(), "log"))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { f.Close() })
	var mu sync.Mutex
	var waiting []chan error
	var pending bytes.Buffer
	syncing := false
	return func(ms []Message) error {
		done := make(chan error, 1)
		mu.Lock()
		for _, m := range ms {
			pending.Write(m.Payload)
		}
		waiting = append(waiting, done)
		lead := !syncing
		syncing = true
		mu.Unlock()
		for lead {
			mu.Lock()
			batch, text := waiting, bytes.Clone(pending.Bytes())
			waiting = nil
			pending.Reset()
			if len(batch) == 0 {
				syncing = false
				mu.Unlock()
				break
			}
			mu.Unlock()
			_, err := f.Write(text)
			if err == nil {
				err = f.Sync()
			}
			for _, d := range batch {
				d <- err
			}
		}
		return <-done
	}
}

// benchQoS1 sends b.N messages of 120 bytes, at most rate a second if that is
// not zero.
func benchQoS1(b *testing.B, addr string, publishers, rate int) {
	const window = 20
	sub := dialWire(b, addr, connectAs("sub", 4, true))
	sub.subscribe(packets.Subscription{Filter: "bench/#", Qos: 1})
	pubs := make([]*wire, publishers)
	for i := range pubs {
		pubs[i] = dialWire(b, addr, connectAs(fmt.Sprint("pub", i), 4, true))
	}
	took := make([]time.Duration, 0, b.N)
	start := time.Now()
	b.ResetTimer()
	var wg sync.WaitGroup
	wg.Go(func() {
		for range b.N {
			pk, err := sub.next()
			if err != nil {
				b.Error(err)
				return
			}
			took = append(took, time.Since(start)-time.Duration(binary.BigEndian.Uint64(pk.Payload)))
			sub.net.Write([]byte{packets.Puback << 4, 2, byte(pk.PacketID >> 8), byte(pk.PacketID)})
		}
	})
	var sent atomic.Int64
	for i, p := range pubs {
		slots := make(chan struct{}, window)
		mine := b.N / publishers
		if i < b.N%publishers {
			mine++
		}
		wg.Go(func() {
			for n := range mine {
				if rate > 0 {
					due := start.Add(time.Duration(sent.Add(1)) * time.Second / time.Duration(rate))
					time.Sleep(time.Until(due))
				}
				slots <- struct{}{}
				if _, err := p.net.Write(benchPublish(i, n, time.Since(start))); err != nil {
					b.Error(err)
					return
				}
			}
		})
		wg.Go(func() {
			for range mine {
				if _, err := p.next(); err != nil {
					b.Error(err)
					return
				}
				<-slots
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	for _, w := range append(pubs, sub) {
		w.net.(*net.TCPConn).Close()
	}
	slices.Sort(took)
	if len(took) > 0 {
		b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msg/s")
		b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
		b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
	}
}

func benchPublish(publisher, n int, at time.Duration) []byte {
	o := &outgoing{m: &stored{Message: Message{Topic: fmt.Sprintf("bench/%d/state", publisher), Payload: make([]byte, 120)}},
		qos: 1, packetID: uint16(n%60000 + 1)}
	binary.BigEndian.PutUint64(o.m.Payload, uint64(at))
	return appendPublish(nil, o, 4, time.Time{})
}
