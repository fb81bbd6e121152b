package tunnel

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"
)

// The benchmarks compare a session with raw TLS connections in the same run.
// Read the ratios; absolute numbers are the machine's.

const bulkWrite = 32 << 10

// benchLink is one way to get n byte streams from a sender to a receiver.
type benchLink struct {
	name string
	dial func(b *testing.B, n int) (senders, receivers []net.Conn)
}

func benchLinks() []benchLink {
	mux := func(up bool) func(b *testing.B, n int) (senders, receivers []net.Conn) {
		return func(b *testing.B, n int) (senders, receivers []net.Conn) {
			edge, hub := newTLSPair(b, Config{}, Config{})
			from, to := hub, edge
			if up {
				from, to = edge, hub
			}
			for range n {
				near, far := streamPair(b, from, to, ClassStream)
				senders, receivers = append(senders, near), append(receivers, far)
			}
			return senders, receivers
		}
	}
	return []benchLink{
		{"tls", func(b *testing.B, n int) (senders, receivers []net.Conn) { return rawTLS(b, n) }},
		{"down", mux(false)},
		{"up", mux(true)},
	}
}

// rawTLS makes n TLS connections.
func rawTLS(b *testing.B, n int) (clients, servers []net.Conn) {
	b.Helper()
	certs := newCerts(b)
	ln, err := tls.Listen("tcp", "127.0.0.1:0", certs.hubTLS())
	if err != nil {
		b.Fatal(err)
	}
	defer ln.Close()
	cfg := certs.edgeTLS()
	cfg.DynamicRecordSizingDisabled = true
	for range n {
		accepted := make(chan net.Conn, 1)
		go func() {
			c, err := ln.Accept()
			if err == nil {
				err = c.(*tls.Conn).HandshakeContext(b.Context())
			}
			if err != nil {
				b.Error(err)
			}
			accepted <- c
		}()
		c, err := tls.Dial("tcp", ln.Addr().String(), cfg)
		if err != nil {
			b.Fatal(err)
		}
		s := <-accepted
		b.Cleanup(func() { _ = c.Close(); _ = s.Close() })
		clients, servers = append(clients, c), append(servers, s)
	}
	return clients, servers
}

func BenchmarkBulk(b *testing.B) {
	for _, n := range []int{1, 8} {
		for _, link := range benchLinks() {
			b.Run(fmt.Sprintf("%s/streams=%d", link.name, n), func(b *testing.B) {
				senders, receivers := link.dial(b, n)
				warm := make([]byte, 4<<20)
				transfer(senders, receivers, warm, 1)
				b.SetBytes(bulkWrite)
				b.ReportAllocs()
				b.ResetTimer()
				transfer(senders, receivers, make([]byte, bulkWrite), b.N)
			})
		}
	}
}

// transfer writes buf count times over all streams together and waits until it
// was read.
func transfer(senders, receivers []net.Conn, buf []byte, count int) {
	var tasks sync.WaitGroup
	for i := range senders {
		mine := count / len(senders)
		if i < count%len(senders) {
			mine++
		}
		tasks.Go(func() {
			for range mine {
				if _, err := senders[i].Write(buf); err != nil {
					return
				}
			}
		})
		tasks.Go(func() {
			p := make([]byte, bulkWrite)
			for left := mine * len(buf); left > 0; {
				n, err := receivers[i].Read(p[:min(left, len(p))])
				if err != nil {
					return
				}
				left -= n
			}
		})
	}
	tasks.Wait()
}

func BenchmarkEcho(b *testing.B) {
	for _, bulk := range []int{0, 1, 8} {
		b.Run(fmt.Sprintf("tls/beside=%d", bulk), func(b *testing.B) {
			clients, servers := rawTLS(b, 1+bulk)
			benchEcho(b, clients[0], servers[0], clients[1:], servers[1:])
		})
		b.Run(fmt.Sprintf("mux/beside=%d", bulk), func(b *testing.B) {
			edge, hub := newTLSPair(b, Config{}, Config{})
			near, far := streamPair(b, hub, edge, ClassStream)
			var senders, receivers []net.Conn
			for range bulk {
				s, r := streamPair(b, edge, hub, ClassStream)
				senders, receivers = append(senders, s), append(receivers, r)
			}
			benchEcho(b, near, far, senders, receivers)
		})
	}
}

// benchEcho times 64-byte round trips beside bulk.
func benchEcho(b *testing.B, near, far net.Conn, senders, receivers []net.Conn) {
	var tasks sync.WaitGroup
	tasks.Go(func() { _, _ = io.CopyBuffer(struct{ io.Writer }{far}, struct{ io.Reader }{far}, make([]byte, 64)) })
	stop := make(chan struct{})
	for i := range senders {
		tasks.Go(func() {
			buf := make([]byte, bulkWrite)
			for {
				select {
				case <-stop:
					_ = senders[i].Close()
					return
				default:
				}
				if _, err := senders[i].Write(buf); err != nil {
					return
				}
			}
		})
		tasks.Go(func() {
			_, _ = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{receivers[i]}, make([]byte, bulkWrite))
		})
	}
	if len(senders) > 0 {
		time.Sleep(200 * time.Millisecond) // let windows and queues reach their size
	}
	msg, times := make([]byte, 64), make([]time.Duration, 0, 1<<16)
	b.ReportAllocs()
	for b.Loop() {
		start := time.Now()
		if _, err := near.Write(msg); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(near, msg); err != nil {
			b.Fatal(err)
		}
		if len(times) < cap(times) {
			times = append(times, time.Since(start))
		}
	}
	b.StopTimer()
	slices.Sort(times)
	b.ReportMetric(float64(times[len(times)/2].Nanoseconds())/1e3, "p50-µs")
	b.ReportMetric(float64(times[len(times)*99/100].Nanoseconds())/1e3, "p99-µs")
	close(stop)
	_ = near.Close()
	_ = far.Close()
	tasks.Wait()
}

func BenchmarkOpen(b *testing.B) {
	for _, name := range []string{"hub", "edge"} {
		for _, parallel := range []int{1, 16} {
			b.Run(fmt.Sprintf("%s/at-once=%d", name, parallel), func(b *testing.B) {
				edge, hub := newTLSPair(b, Config{}, Config{})
				opener, acceptor := hub, edge
				if name == "edge" {
					opener, acceptor = edge, hub
				}
				go func() {
					for {
						st, err := acceptor.Accept(b.Context())
						if err != nil {
							return
						}
						go func() {
							defer st.Close()
							var p [1]byte
							if _, err := io.ReadFull(st, p[:]); err == nil {
								_, _ = st.Write(p[:])
							}
						}()
					}
				}()
				if _, err := opener.Ping(b.Context()); err != nil {
					b.Fatal(err)
				}
				b.ReportAllocs()
				b.ResetTimer()
				var tasks sync.WaitGroup
				for i := range parallel {
					tasks.Go(func() {
						var p [1]byte
						for n := i; n < b.N; n += parallel {
							st, err := opener.Open(b.Context(), OpenRequest{Kind: "one"})
							if err != nil {
								b.Error(err)
								return
							}
							if _, err := st.Write(p[:]); err != nil {
								b.Error(err)
							}
							if _, err := io.ReadFull(st, p[:]); err != nil {
								b.Error(err)
							}
							_ = st.Close()
						}
					})
				}
				tasks.Wait()
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "streams/s")
			})
		}
	}
}

// BenchmarkIdle reports what an idle session costs, both ends together, as the
// ends are in one process, against a pair of raw TLS connections.
func BenchmarkIdle(b *testing.B) {
	const n = 200
	b.Run("tls", func(b *testing.B) {
		for b.Loop() {
			before := inUse()
			clients, servers := rawTLS(b, n)
			for i := range clients {
				go func() { _, _ = clients[i].Read(make([]byte, 512)) }()
				go func() { _, _ = servers[i].Read(make([]byte, 512)) }()
			}
			reportIdle(b, before, n)
		}
	})
	b.Run("mux", func(b *testing.B) {
		for b.Loop() {
			certs, mem := newCerts(b), NewMemory(0)
			h := newHub(b, certs, Config{Memory: mem})
			d := &Dialer{URL: h.url, TLS: certs.edgeTLS(), Config: Config{Memory: mem}}
			before := inUse()
			var edges, hubs []*Session
			for range n {
				s, err := d.Dial(b.Context())
				if err != nil {
					b.Fatal(err)
				}
				edges, hubs = append(edges, s), append(hubs, <-h.sessions)
			}
			reportIdle(b, before, n)
			for i := range edges {
				_ = edges[i].Close()
				_ = hubs[i].Close()
			}
		}
	})
}

func reportIdle(b *testing.B, before runtime.MemStats, n int) {
	time.Sleep(100 * time.Millisecond)
	after := inUse()
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/float64(n)/1024, "heap-kB/pair")
	b.ReportMetric(float64(after.StackInuse)/float64(n)/1024-float64(before.StackInuse)/float64(n)/1024, "stack-kB/pair")
}

func inUse() (m runtime.MemStats) {
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m
}
