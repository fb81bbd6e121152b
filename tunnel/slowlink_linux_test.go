package tunnel

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skerry-io/skerry/e2e/netem"
)

// slowLink joins two network namespaces, each with the kernel's own TCP, by a
// link with a rate, a round trip and a queue that drops what does not fit. It
// needs root.
type slowLink struct {
	cc        string // TCP congestion control
	near, far *netns
	tasks     sync.WaitGroup
}

// netns runs functions in a network namespace of its own.
type netns struct {
	calls chan func()
	tun   *os.File
}

func newSlowLink(b *testing.B, cc string, rate int, rtt time.Duration, queue int) *slowLink {
	b.Helper()
	if os.Getuid() != 0 {
		b.Skip("needs root for network namespaces and TUN devices")
	}
	l := &slowLink{cc: cc, near: newNetns(b, "10.78.0.1", "10.78.0.2"), far: newNetns(b, "10.78.0.2", "10.78.0.1")}
	shape := netem.Shape{Rate: rate, Queue: queue, Delay: rtt / 2}
	l.tasks.Go(func() { netem.NewLine(shape, 1).Carry(l.near.tun, l.far.tun) })
	l.tasks.Go(func() { netem.NewLine(shape, 2).Carry(l.far.tun, l.near.tun) })
	b.Cleanup(func() {
		_ = l.near.tun.Close()
		_ = l.far.tun.Close()
		l.tasks.Wait()
		close(l.near.calls)
		close(l.far.calls)
	})
	return l
}

func newNetns(b *testing.B, addr, peer string) *netns {
	b.Helper()
	ns := &netns{calls: make(chan func())}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		ready <- ns.setup(addr, peer)
		for f := range ns.calls {
			f()
		}
	}()
	if err := <-ready; err != nil {
		b.Fatal(err)
	}
	return ns
}

func (ns *netns) setup(addr, peer string) error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("new network namespace: %w", err)
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("open /dev/net/tun: %w", err)
	}
	req, err := unix.NewIfreq("link0")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return fmt.Errorf("make TUN device: %w", err)
	}
	ns.tun = os.NewFile(uintptr(fd), "tun")
	for _, args := range []string{"addr add " + addr + " peer " + peer + " dev link0", "link set link0 mtu 1500 up"} {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", args, err, out)
		}
	}
	return nil
}

// in runs f in the namespace: sockets it makes belong there.
func (ns *netns) in(f func()) {
	done := make(chan struct{})
	ns.calls <- func() { defer close(done); f() }
	<-done
}

// BenchmarkSlowLink times 64-byte echoes beside bulk on a slow link: through one
// session, and for comparison over a TLS connection of its own.
func BenchmarkSlowLink(b *testing.B) {
	for _, l := range []struct {
		name string
		rate int
		rtt  time.Duration
		q    int
	}{
		{"10Mbit-50ms", 1_250_000, 50 * time.Millisecond, 125_000},
		{"1Mbit-100ms", 125_000, 100 * time.Millisecond, 62_500},
	} {
		for _, cc := range []string{"cubic", "bbr"} {
			for _, bulk := range []int{0, 1, 8} {
				for _, kind := range []string{"tls", "mux"} {
					b.Run(fmt.Sprintf("%s/%s/%s/beside=%d", l.name, cc, kind, bulk), func(b *testing.B) {
						link := newSlowLink(b, cc, l.rate, l.rtt, l.q)
						echo, bulks := link.connect(b, kind, bulk)
						benchSlow(b, echo, bulks)
					})
				}
			}
		}
	}
}

// control sets a socket's congestion control before it is used.
func (l *slowLink) control(_, _ string, rc syscall.RawConn) error {
	var err error
	if cerr := rc.Control(func(fd uintptr) {
		err = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, l.cc)
	}); cerr != nil {
		return cerr
	}
	return err
}

// connect makes one stream for echoes, which the hub opens, and n for uploads.
func (l *slowLink) connect(b *testing.B, kind string, n int) (echo [2]net.Conn, bulk [][2]net.Conn) {
	b.Helper()
	certs := newCerts(b)
	var tcp net.Listener
	var err error
	lc, nd := net.ListenConfig{Control: l.control}, net.Dialer{Control: l.control}
	l.far.in(func() { tcp, err = lc.Listen(b.Context(), "tcp", "10.78.0.2:0") })
	if err != nil {
		b.Fatal(err)
	}
	if kind == "tls" {
		ln := tls.NewListener(tcp, certs.hubTLS())
		defer ln.Close()
		dial := func() (pair [2]net.Conn) {
			cfg := certs.edgeTLS()
			cfg.ServerName, cfg.DynamicRecordSizingDisabled = "hub", true
			accepted := make(chan net.Conn, 1)
			go func() {
				c, err := ln.Accept()
				if err != nil {
					b.Error(err)
				}
				_ = c.(*tls.Conn).HandshakeContext(b.Context())
				accepted <- c
			}()
			var raw net.Conn
			l.near.in(func() { raw, err = nd.Dial("tcp", tcp.Addr().String()) })
			if err != nil {
				b.Fatal(err)
			}
			c := tls.Client(raw, cfg)
			if err := c.HandshakeContext(b.Context()); err != nil {
				b.Fatal(err)
			}
			pair = [2]net.Conn{c, <-accepted}
			b.Cleanup(func() { _ = raw.Close() })
			return pair
		}
		e := dial()
		echo = [2]net.Conn{e[1], e[0]}
		for range n {
			bulk = append(bulk, dial())
		}
		return echo, bulk
	}
	hubs := make(chan *Session, 1)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if s, err := Upgrade(w, r, Config{}); err == nil {
			hubs <- s
		}
	})}
	go func() { _ = srv.Serve(tls.NewListener(tcp, certs.hubTLS())) }()
	cfg := certs.edgeTLS()
	cfg.ServerName = "hub"
	d := &Dialer{URL: "https://" + tcp.Addr().String(), TLS: cfg,
		NetDial: func(_ context.Context, network, addr string) (c net.Conn, err error) {
			l.near.in(func() { c, err = nd.Dial(network, addr) })
			return c, err
		}}
	edge, err := d.Dial(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	hub := <-hubs
	b.Cleanup(func() { _ = edge.Close(); _ = hub.Close(); _ = srv.Close() })
	near, far := streamPair(b, hub, edge, ClassStream)
	echo = [2]net.Conn{near, far}
	for range n {
		s, r := streamPair(b, edge, hub, ClassStream)
		bulk = append(bulk, [2]net.Conn{s, r})
	}
	return echo, bulk
}

// benchSlow runs for a fixed time, as what it measures settles slowly.
func benchSlow(b *testing.B, echo [2]net.Conn, bulk [][2]net.Conn) {
	var tasks sync.WaitGroup
	tasks.Go(func() {
		_, _ = io.CopyBuffer(struct{ io.Writer }{echo[1]}, struct{ io.Reader }{echo[1]}, make([]byte, 64))
	})
	var mu sync.Mutex
	received, counting := 0, false
	for _, pair := range bulk {
		tasks.Go(func() {
			for buf := make([]byte, bulkWrite); ; {
				if _, err := pair[0].Write(buf); err != nil {
					return
				}
			}
		})
		tasks.Go(func() {
			for buf := make([]byte, bulkWrite); ; {
				n, err := pair[1].Read(buf)
				if err != nil {
					return
				}
				mu.Lock()
				if counting {
					received += n
				}
				mu.Unlock()
			}
		})
	}
	time.Sleep(3 * time.Second)
	mu.Lock()
	counting = true
	mu.Unlock()
	start := time.Now()
	var times []time.Duration
	msg := make([]byte, 64)
	for time.Since(start) < 7*time.Second {
		sent := time.Now()
		if _, err := echo[0].Write(msg); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(echo[0], msg); err != nil {
			b.Fatal(err)
		}
		times = append(times, time.Since(sent))
		time.Sleep(20 * time.Millisecond)
	}
	mu.Lock()
	rate := float64(received) / time.Since(start).Seconds() / 1e6
	mu.Unlock()
	slices.Sort(times)
	b.ReportMetric(float64(times[len(times)/2].Microseconds())/1e3, "p50-ms")
	b.ReportMetric(float64(times[len(times)*99/100].Microseconds())/1e3, "p99-ms")
	b.ReportMetric(rate, "bulk-MB/s")
	b.ReportMetric(0, "ns/op")
	for _, pair := range append(bulk, echo) {
		for _, c := range pair {
			if t, ok := c.(*tls.Conn); ok {
				c = t.NetConn() // without waiting for a goodbye to get through
			}
			_ = c.Close()
		}
	}
	tasks.Wait()
}
