package tunnel

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// Whatever answers in the hub's place, and however it stalls, the edge dials
// seldom, holds one connection at a time, says what it met, and is back within
// one step of the backoff.
func TestBadHubsAreNotHammered(t *testing.T) {
	hang := func(release <-chan struct{}) func(net.Conn) {
		return func(c net.Conn) {
			defer c.Close()
			go func() { _, _ = io.Copy(io.Discard, c) }()
			<-release
		}
	}
	for _, c := range []struct {
		name   string
		serve  func(h *pipeHub, release <-chan struct{}) // sets the hub up to be bad
		reason DialReason                                // "" where a session comes up
		says   string
	}{
		{"nobody answers", func(h *pipeHub, _ <-chan struct{}) { h.set(true, nil) }, DialProtocol, ""},
		{"accepts and never speaks TLS", func(h *pipeHub, release <-chan struct{}) { h.raw(hang(release)) }, DialTimeout, "the TLS handshake"},
		{"speaks plain HTTP", func(h *pipeHub, _ <-chan struct{}) {
			h.raw(func(c net.Conn) {
				defer c.Close()
				_, _ = c.Read(make([]byte, 4096))
				_, _ = io.WriteString(c, "HTTP/1.1 302 Found\r\nLocation: http://portal/\r\nContent-Length: 0\r\n\r\n")
			})
		}, DialPortal, "plain HTTP"},
		{"cuts the connection", func(h *pipeHub, _ <-chan struct{}) {
			h.raw(func(c net.Conn) { _, _ = c.Read(make([]byte, 4096)); c.Close() })
		}, DialLost, ""},
		{"never upgrades", func(h *pipeHub, release <-chan struct{}) {
			h.set(false, func(http.ResponseWriter, *http.Request) bool { <-release; return true })
		}, DialTimeout, "the hub's answer"},
		{"a page to sign in", func(h *pipeHub, _ <-chan struct{}) {
			h.set(false, func(w http.ResponseWriter, _ *http.Request) bool {
				w.Header().Set("Content-Type", "text/html")
				w.WriteHeader(http.StatusNetworkAuthenticationRequired)
				return true
			})
		}, DialPortal, "captive portal"},
		{"never says HELLO", func(h *pipeHub, release <-chan struct{}) {
			h.set(false, func(w http.ResponseWriter, r *http.Request) bool {
				conn, err := h.upgradeOnly(w, r)
				if err != nil {
					return true
				}
				go hang(release)(conn)
				return true
			})
		}, "", "no HELLO within"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newPipeHub(t)
				release := make(chan struct{})
				t.Cleanup(func() { close(release) })
				c.serve(h, release)
				d := h.dialer()
				var mu sync.Mutex
				var last error
				var longest time.Duration
				d.Retry = func(err error, wait time.Duration) error {
					mu.Lock()
					defer mu.Unlock()
					last, longest = err, max(longest, wait)
					return nil
				}
				var up sync.WaitGroup
				defer up.Wait()
				runDialer(t, d, untilDone)
				time.Sleep(30 * time.Minute)
				mu.Lock()
				err := last
				mu.Unlock()
				dials := h.takeDials()
				// Waits are even from 0 to 30 s: 2 a minute and a little.
				if n := len(dials); n < 20 || n > 150 {
					t.Errorf("%d dials in half an hour", n)
				}
				if per := mostWithin(dials, time.Minute); per > 14 {
					t.Errorf("%d dials in one minute", per)
				}
				var de *DialError
				errors.As(err, &de)
				if c.reason != "" && (de == nil || de.Reason != c.reason) || c.reason == "" && de != nil || !strings.Contains(err.Error(), c.says) {
					t.Errorf("says %v", err)
				}
				if longest > 30*time.Second {
					t.Errorf("waited %v", longest)
				}
				// The link is good again.
				h.raw(nil)
				h.set(false, nil)
				back := time.Now()
				<-h.sessions
				if took := time.Since(back); took > 30*time.Second+30*time.Second { // an attempt under way may time out first
					t.Errorf("back after %v", took)
				}
			})
		})
	}
}

func mostWithin(at []time.Time, d time.Duration) (most int) {
	for i := range at {
		n := 0
		for _, later := range at[i:] {
			if later.Sub(at[i]) < d {
				n++
			}
		}
		most = max(most, n)
	}
	return most
}

// A link that flaps every few seconds is not dialled more for it, though each
// return is told; the last return is used within seconds.
func TestFlappingLink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newPipeHub(t)
		d := h.dialer()
		runDialer(t, d, untilDone)
		ctx, stop := context.WithCancel(t.Context())
		var hub sync.WaitGroup
		hub.Go(func() { // sessions break when the link does
			for ctx.Err() == nil {
				select {
				case s := <-h.sessions:
					time.Sleep(3 * time.Second)
					h.set(true, nil)
					s.end(errors.New("the link is gone"), false)
					time.Sleep(3 * time.Second)
					h.set(false, nil)
					d.Kick()
				case <-ctx.Done():
				}
			}
		})
		time.Sleep(30 * time.Minute)
		dials := h.takeDials()
		if per := mostWithin(dials, time.Minute); per > 25 {
			t.Errorf("%d dials in one minute", per)
		}
		stop()
		hub.Wait()
	})
}

// A change of the network ends the wait, but not one that the hub asked for;
// and not more often than every few seconds.
func TestKick(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newPipeHub(t)
		h.set(true, nil)
		d := h.dialer()
		d.Backoff = Backoff{Base: time.Hour, Max: time.Hour}
		runDialer(t, d, untilDone)
		time.Sleep(time.Second)
		h.takeDials()
		start := time.Now()
		for range 600 {
			d.Kick()
			time.Sleep(100 * time.Millisecond)
		}
		dials := h.takeDials()
		if n := len(dials); n < 10 || n > 14 {
			t.Errorf("%d dials in a minute of kicks", n)
		}
		if first := dials[0].Sub(start); first > 0 {
			t.Errorf("the first after %v", first)
		}
		time.Sleep(10 * time.Second) // the last kick
		h.takeDials()
		h.set(false, func(w http.ResponseWriter, _ *http.Request) bool {
			http.Error(w, "expired", http.StatusForbidden)
			return true
		})
		d.Kick()
		time.Sleep(time.Second)
		if n := len(h.takeDials()); n != 1 {
			t.Fatalf("%d dials", n)
		}
		d.Kick()
		time.Sleep(time.Minute)
		if n := len(h.takeDials()); n != 0 {
			t.Errorf("%d dials although the hub has refused", n)
		}
		h.set(false, nil)
		d.Redial()
		time.Sleep(time.Second)
		<-h.sessions
	})
}

// What serve wants is waited for.
func TestLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newPipeHub(t)
		runDialer(t, h.dialer(), func(context.Context, *Session) error {
			return &Later{Wait: 10 * time.Minute, Err: errors.New("no use")}
		})
		var hubs sync.WaitGroup
		stop := make(chan struct{})
		hubs.Go(func() {
			for {
				select {
				case s := <-h.sessions:
					<-s.Done()
				case <-stop:
					return
				}
			}
		})
		time.Sleep(50 * time.Minute)
		dials := h.takeDials()
		for i := 1; i < len(dials); i++ {
			if wait := dials[i].Sub(dials[i-1]); wait < 5*time.Minute || wait > 10*time.Minute+time.Second {
				t.Errorf("dialled after %v", wait)
			}
		}
		if len(dials) < 5 {
			t.Errorf("%d dials", len(dials))
		}
		close(stop)
		hubs.Wait()
	})
}

// Names that no longer resolve do not keep an edge from the hub it has reached.
func TestKnownAddress(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	gone := "gone.invalid:" + port
	known := &knownAddress{asked: gone, addr: ln.Addr().String()}
	conn, err := known.dial(t.Context(), "tcp", gone)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	var dns *net.DNSError
	if _, err := known.dial(t.Context(), "tcp", "other.invalid:"+port); !errors.As(err, &dns) {
		t.Errorf("another name: %v", err)
	}
	conn, err = known.dial(t.Context(), "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if known.of(ln.Addr().String()) != ln.Addr().String() {
		t.Error("the address is not remembered")
	}
	ln.Close()
	known = &knownAddress{asked: gone, addr: ln.Addr().String()}
	if _, err := known.dial(t.Context(), "tcp", gone); !errors.As(err, &dns) {
		t.Errorf("nobody there: %v", err)
	}
}
