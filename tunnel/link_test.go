package tunnel

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// Streams nobody reads hold up their own writers and nobody else, and take the
// memory of their windows.
func TestStalledStreams(t *testing.T) {
	for _, stalled := range []int{1, 16} {
		for _, up := range []bool{true, false} {
			t.Run(fmt.Sprintf("stalled=%d/up=%v", stalled, up), func(t *testing.T) {
				noLeaks(t)
				edge, hub := newTLSPair(t, Config{}, Config{})
				from, to := hub, edge
				if up {
					from, to = edge, hub
				}
				near, far := streamPair(t, from, to, ClassStream)
				defer near.Close()
				var echo sync.WaitGroup
				echo.Go(func() { defer far.Close(); _, _ = io.Copy(far, far) })
				before := heap()
				var writers sync.WaitGroup
				var streams []*Stream
				for range stalled {
					st, stuck := streamPair(t, from, to, ClassStream)
					streams = append(streams, st, stuck)
					writers.Go(func() {
						buf := make([]byte, 32<<10)
						for {
							if _, err := st.Write(buf); err != nil {
								return
							}
						}
					})
				}
				waitFor(t, func() bool { return to.Stats().BytesIn[ClassStream] >= uint64(stalled*InitialWindow) })
				msg := make([]byte, 64)
				for range 1000 {
					near.SetDeadline(time.Now().Add(10 * time.Second))
					if _, err := near.Write(msg); err != nil {
						t.Fatal(err)
					}
					if _, err := io.ReadFull(near, msg); err != nil {
						t.Fatal(err)
					}
				}
				grown := heap() - before
				t.Logf("heap grew by %d kB", grown>>10)
				if grown > 3<<20 {
					t.Errorf("heap grew by %d bytes", grown)
				}
				for _, st := range streams {
					st.Close()
				}
				writers.Wait()
				near.Close()
				echo.Wait()
			})
		}
	}
}

func TestStallTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		edge, hub := newPair(t, Config{}, Config{}, nil)
		for name, reads := range map[string]bool{"reader that has gone": false, "slow reader": true} {
			near, far := streamPair(t, edge, hub, ClassStream)
			far.SetStallTimeout(time.Minute)
			ended := make(chan error, 1)
			go func() {
				var err error
				for err == nil {
					_, err = near.Write(make([]byte, 32<<10))
				}
				ended <- err
			}()
			start := time.Now()
			var err error
			for err == nil && time.Since(start) < 10*time.Minute {
				select {
				case err = <-ended:
				case <-time.After(50 * time.Second):
				}
				if reads {
					if _, err := io.ReadFull(far, make([]byte, 100)); err != nil {
						t.Fatal(err)
					}
				}
			}
			var reset *ResetError
			switch {
			case reads && err != nil:
				t.Errorf("%s: %v", name, err)
			case !reads && (!errors.As(err, &reset) || reset.Code != CodeStalled || time.Since(start) > 3*time.Minute):
				t.Errorf("%s: %v after %v", name, err, time.Since(start))
			}
			if _, err := far.Read(make([]byte, 1)); !reads && (!errors.As(err, &reset) || reset.Code != CodeStalled) {
				t.Errorf("%s: Read %v", name, err)
			}
			near.Close()
			far.Close()
		}
	})
}

// cutConn is a link that can be cut without either end being told: from then on
// what is written vanishes and nothing arrives.
type cutConn struct {
	net.Conn
	cut chan struct{}
}

func newCut() (wrapDial, func()) {
	cut := make(chan struct{})
	return func(c net.Conn) net.Conn { return &cutConn{c, cut} }, func() { close(cut) }
}

func (c *cutConn) Write(p []byte) (int, error) {
	select {
	case <-c.cut:
		return len(p), nil
	default:
		return c.Conn.Write(p)
	}
}

// Close after the cut is not seen by the other end either.
func (c *cutConn) Close() error {
	select {
	case <-c.cut:
		return c.Conn.SetReadDeadline(time.Unix(1, 0))
	default:
		return c.Conn.Close()
	}
}

func (c *cutConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	select {
	case <-c.cut:
		for err == nil { // swallow until it is closed
			_, err = c.Conn.Read(p)
		}
		return 0, err
	default:
		return n, err
	}
}

func TestHalfOpenLinkIsNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wrap, cut := newCut()
		edge, hub := newPair(t, Config{}, Config{}, wrap)
		// Both live on. A second more, so that the cut falls between two pings
		// and not beside one.
		time.Sleep(5*time.Hour + time.Second)
		if edge.Err() != nil || hub.Err() != nil {
			t.Fatalf("edge %v, hub %v", edge.Err(), hub.Err())
		}
		interval := hub.Stats().PingInterval
		if interval > 50*time.Second {
			t.Errorf("an idle link is silent for %v by default: a dead node would be Ready for too long", interval)
		}
		cut()
		start := time.Now()
		<-edge.Done()
		if took, most := time.Since(start), interval+20*time.Second; took > most {
			t.Errorf("edge took %v; want at most %v", took, most)
		}
		wantDead(t, edge, "no answer to a ping")
		<-hub.Done()
		if took, most := time.Since(start), interval+26*time.Second; took > most || took < interval {
			t.Errorf("hub took %v; want %v to %v", took, interval, most)
		}
		wantDead(t, hub, "nothing heard")
	})
}

func wantDead(t *testing.T, s *Session, reason string) {
	t.Helper()
	var closed *CloseError
	if !errors.As(s.Err(), &closed) || closed.Code != CloseDead || len(closed.Reason) < len(reason) || closed.Reason[:len(reason)] != reason {
		t.Errorf("session ended with %v; want dead, %s", s.Err(), reason)
	}
}

// While someone is likely to wait, a dead link is noticed sooner.
func TestHalfOpenLinkIsNoticedSoonWhenBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wrap, cut := newCut()
		edge, hub := newPair(t, Config{}, Config{}, wrap)
		near, far := streamPair(t, hub, edge, ClassStream)
		if _, err := near.Write([]byte("ls")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(far, make([]byte, 2)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(15 * time.Second) // the ping that announces the short interval
		cut()
		start := time.Now()
		<-edge.Done()
		if took := time.Since(start); took > 31*time.Second {
			t.Errorf("edge took %v", took)
		}
		<-hub.Done()
		if took := time.Since(start); took > 36*time.Second || took < 30*time.Second {
			t.Errorf("hub took %v; an edge that lives has given up by 30 s", took)
		}
		if _, err := near.Read(make([]byte, 1)); err == nil {
			t.Error("the stream lives")
		}
	})
}

// An edge that pings rarely, as it asked for, is missed soon after its word too.
func TestHalfOpenLinkIsNoticedOnAnExpensiveLink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wrap, cut := newCut()
		edge, hub := newPair(t, Config{PingMax: 230 * time.Second}, Config{}, wrap)
		time.Sleep(5 * time.Hour)
		cut()
		start := time.Now()
		<-hub.Done()
		if took := time.Since(start); took > 256*time.Second {
			t.Errorf("hub took %v", took)
		}
		<-edge.Done()
	})
}

// A change of the network has the link tested at once.
func TestProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wrap, cut := newCut()
		edge, _ := newPair(t, Config{}, Config{}, wrap)
		time.Sleep(time.Minute)
		before := edge.Stats().MessagesOut
		edge.Probe()
		time.Sleep(25 * time.Second)
		if got := edge.Stats().MessagesOut - before; edge.Err() != nil || got != 1 {
			t.Fatalf("%d messages for a probe, session %v", got, edge.Err())
		}
		cut()
		start := time.Now()
		for range 5 {
			edge.Probe()
		}
		<-edge.Done()
		if took := time.Since(start); took > 21*time.Second {
			t.Errorf("took %v", took)
		}
		wantDead(t, edge, "no answer to a ping")
		edge.Probe()
	})
}

func TestNoHello(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ws, hub := newRawEdge(t, Config{}, nil)
		go func() {
			for {
				if _, _, err := ws.ReadMessage(); err != nil {
					return
				}
			}
		}()
		<-hub.Done()
		wantDead(t, hub, "no HELLO")
	})
}

// An idle link costs a ping now and then; where the edge asks for it ever fewer,
// up to the hub's cap.
func TestPingIntervalClimbs(t *testing.T) {
	const s = time.Second
	for _, c := range []struct{ asked, limit, want time.Duration }{
		{0, 0, 50 * s}, {230 * s, 0, 230 * s}, {230 * s, 100 * s, 100 * s}, {20 * s, 0, 20 * s}, {0, 30 * s, 30 * s},
	} {
		limit, want := c.limit, c.want
		t.Run(fmt.Sprint(c.asked, limit), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				edge, hub := newPair(t, Config{PingMax: c.asked}, Config{PingMax: limit}, nil)
				time.Sleep(time.Minute)
				first := edge.Stats().MessagesOut
				time.Sleep(3 * time.Hour)
				if edge.Err() != nil || hub.Err() != nil {
					t.Fatalf("edge %v, hub %v", edge.Err(), hub.Err())
				}
				if got := hub.Stats().PingInterval; got != want {
					t.Errorf("interval %v after three hours; want %v", got, want)
				}
				before := edge.Stats().MessagesOut
				time.Sleep(time.Hour)
				got, most := edge.Stats().MessagesOut-before, uint64(time.Hour/want)+1
				if got > most {
					t.Errorf("%d pings an hour; want at most %d", got, most)
				}
				t.Logf("%d messages in the first three hours, then %d an hour", before-first, got)
			})
		})
	}
}

// A one-way flow from the hub still makes the edge speak.
func TestEdgeIsHeardThoughItOnlyListens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		edge, hub := newPair(t, Config{}, Config{}, nil)
		near, far := streamPair(t, hub, edge, ClassSync)
		for range 200 {
			if _, err := near.Write([]byte("tick")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(far, make([]byte, 4)); err != nil {
				t.Fatal(err)
			}
			time.Sleep(20 * time.Second)
		}
		if hub.Err() != nil {
			t.Error(hub.Err())
		}
	})
}

func TestLearnedIntervalIsHalvedOnLoss(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		learned := new(pingInterval)
		wrap, cut := newCut()
		edge, _ := newPair(t, Config{learned: learned, PingMax: 230 * time.Second}, Config{}, wrap)
		time.Sleep(time.Hour)
		before := learned.get()
		cut()
		<-edge.Done()
		if got := learned.get(); got != before/2 {
			t.Errorf("interval %v became %v", before, got)
		}
		// Remembered in the same network, not in another.
		if got := learned.start(edge.cfg, edge.LocalAddr().String()); got != before/2 {
			t.Errorf("same network: %v", got)
		}
		if got := learned.start(edge.cfg, "elsewhere"); got != 50*time.Second {
			t.Errorf("other network: %v", got)
		}
	})
}

// blockConn is a link that takes nothing once blocked.
type blockConn struct {
	net.Conn
	blocked chan struct{}
	closed  chan struct{}
	once    sync.Once
}

func (c *blockConn) Write(p []byte) (int, error) {
	select {
	case <-c.blocked:
		<-c.closed
		return 0, net.ErrClosed
	default:
		return c.Conn.Write(p)
	}
}

func (c *blockConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// Close does not wait for a write that is blocked, and the writer is let go; nor
// do deadlines and Close of a stream wait for it.
func TestCloseDuringBlockedWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		blocked := make(chan struct{})
		edge, hub := newPair(t, Config{}, Config{}, func(c net.Conn) net.Conn {
			return &blockConn{Conn: c, blocked: blocked, closed: make(chan struct{})}
		})
		one, _ := streamPair(t, edge, hub, ClassStream)
		two, _ := streamPair(t, edge, hub, ClassStream)
		three, _ := streamPair(t, edge, hub, ClassStream)
		close(blocked)
		errs := make(chan error, 1)
		go func() {
			_, err := one.Write(make([]byte, 1<<20))
			errs <- err
		}()
		synctest.Wait()
		start := time.Now()
		two.SetWriteDeadline(start.Add(time.Second))
		if _, err := two.Write(make([]byte, 100)); err == nil || time.Since(start) != time.Second {
			t.Errorf("Write with a deadline: %v after %v", err, time.Since(start))
		}
		three.Close()
		two.Reset(CodeCancelled)
		start = time.Now()
		edge.Close()
		if took := time.Since(start); took > edge.cfg.CloseGrace {
			t.Errorf("Close took %v", took)
		}
		if err := <-errs; err == nil {
			t.Error("the blocked Write succeeded")
		}
	})
}

// On a link with a long round trip the window grows until it fills the link; on
// an idle stream it shrinks again; budgets hold it down.
func TestWindowGrowth(t *testing.T) {
	const rtt = 100 * time.Millisecond
	run := func(t *testing.T, hubCfg Config, check func(t *testing.T, far *Stream, hub *Session)) {
		synctest.Test(t, func(t *testing.T) {
			edge, hub := newPair(t, Config{}, hubCfg, func(c net.Conn) net.Conn { return newDelayConn(t, c, rtt/2) })
			near, far := streamPair(t, edge, hub, ClassStream)
			go func() {
				buf := make([]byte, 32<<10)
				for {
					if _, err := near.Write(buf); err != nil {
						return
					}
				}
			}()
			if _, err := io.CopyN(io.Discard, far, 40<<20); err != nil {
				t.Fatal(err)
			}
			check(t, far, hub)
		})
	}
	t.Run("grows", func(t *testing.T) {
		run(t, Config{}, func(t *testing.T, far *Stream, hub *Session) {
			if w := hub.Stats().Windows; w < 4<<20 || w > 8<<20 {
				t.Errorf("window %d after 40 MiB", w)
			}
			time.Sleep(windowIdle + time.Second)
			if _, err := io.CopyN(io.Discard, far, 9<<20); err != nil {
				t.Fatal(err)
			}
			// It shrank and, as data flows on, grows anew.
			if w := hub.Stats().Windows; w > 4<<20 {
				t.Errorf("window %d after a pause", w)
			}
		})
	})
	t.Run("session's budget", func(t *testing.T) {
		run(t, Config{WindowBudget: 512 << 10}, func(t *testing.T, _ *Stream, hub *Session) {
			if w := hub.Stats().Windows; w != 512<<10 {
				t.Errorf("window %d", w)
			}
		})
	})
	t.Run("process's budget", func(t *testing.T) {
		mem := NewMemory(256 << 10)
		run(t, Config{Memory: mem}, func(t *testing.T, _ *Stream, hub *Session) {
			if w := hub.Stats().Windows; w != 256<<10 || mem.Windows() != w {
				t.Errorf("window %d, process %d", w, mem.Windows())
			}
		})
		if mem.Windows() != 0 {
			t.Errorf("%d bytes still charged", mem.Windows())
		}
	})
}

// delayConn delivers what is written after a delay each way, without a limit on
// how much is on the way.
type delayConn struct {
	net.Conn
	out, in *delayLine
}

func newDelayConn(t testing.TB, c net.Conn, delay time.Duration) net.Conn {
	d := &delayConn{Conn: c, out: newDelayLine(delay), in: newDelayLine(delay)}
	var tasks sync.WaitGroup
	tasks.Go(func() { // out to the pipe
		for {
			p, err := d.out.take()
			if err != nil {
				return
			}
			if _, err := c.Write(p); err != nil {
				return
			}
		}
	})
	tasks.Go(func() { // from the pipe to in
		for {
			p := make([]byte, 32<<10)
			n, err := c.Read(p)
			if err != nil {
				d.in.close()
				return
			}
			d.in.put(p[:n])
		}
	})
	t.Cleanup(func() { _ = d.Close(); tasks.Wait() })
	return d
}

func (d *delayConn) Write(p []byte) (int, error) {
	d.out.put(append([]byte(nil), p...))
	return len(p), nil
}

func (d *delayConn) Read(p []byte) (int, error) { return d.in.read(p) }

func (d *delayConn) Close() error {
	d.out.close()
	d.in.close()
	return d.Conn.Close()
}

type delayLine struct {
	delay time.Duration
	mu    sync.Mutex
	queue []delayed
	rest  []byte
	more  chan struct{}
	done  chan struct{}
	once  sync.Once
}

type delayed struct {
	at time.Time
	p  []byte
}

func newDelayLine(d time.Duration) *delayLine {
	return &delayLine{delay: d, more: make(chan struct{}, 1), done: make(chan struct{})}
}

func (l *delayLine) put(p []byte) {
	l.mu.Lock()
	l.queue = append(l.queue, delayed{time.Now().Add(l.delay), p})
	l.mu.Unlock()
	select {
	case l.more <- struct{}{}:
	default:
	}
}

func (l *delayLine) close() { l.once.Do(func() { close(l.done) }) }

func (l *delayLine) take() ([]byte, error) {
	for {
		l.mu.Lock()
		if len(l.queue) > 0 {
			d := l.queue[0]
			l.queue = l.queue[1:]
			l.mu.Unlock()
			select {
			case <-time.After(time.Until(d.at)):
				return d.p, nil
			case <-l.done:
				return nil, io.ErrClosedPipe
			}
		}
		l.mu.Unlock()
		select {
		case <-l.more:
		case <-l.done:
			return nil, io.ErrClosedPipe
		}
	}
}

func (l *delayLine) read(p []byte) (int, error) {
	if len(l.rest) == 0 {
		q, err := l.take()
		if err != nil {
			return 0, io.EOF
		}
		l.rest = q
	}
	n := copy(p, l.rest)
	l.rest = l.rest[n:]
	return n, nil
}
