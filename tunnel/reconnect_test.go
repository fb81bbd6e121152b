package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
)

// pipeHub is a hub behind TLS over pipes, for virtual time.
type pipeHub struct {
	certs    *testCerts
	ln       *pipeListener
	sessions chan *Session

	mu     sync.Mutex
	down   bool           // refuses connections
	bare   func(net.Conn) // serves connections in place of TLS
	answer func(w http.ResponseWriter, r *http.Request) bool
	dials  []time.Time
}

func newPipeHub(t *testing.T) *pipeHub {
	h := &pipeHub{certs: newCerts(t), ln: newPipeListener(), sessions: make(chan *Session, 16)}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.mu.Lock()
		answer := h.answer
		h.mu.Unlock()
		if answer != nil && answer(w, r) {
			return
		}
		if s, err := Upgrade(w, r, Config{}); err == nil {
			h.sessions <- s
		}
	})}
	var served sync.WaitGroup
	served.Go(func() { _ = srv.Serve(tls.NewListener(h.ln, h.certs.hubTLS())) })
	t.Cleanup(func() { _ = srv.Close(); served.Wait() })
	return h
}

func (h *pipeHub) dialer() *Dialer {
	return &Dialer{
		URL: "https://hub/tunnel", TLS: h.certs.edgeTLS(),
		NetDial: func(ctx context.Context, network, addr string) (net.Conn, error) {
			h.mu.Lock()
			h.dials = append(h.dials, time.Now())
			down, bare := h.down, h.bare
			h.mu.Unlock()
			if down {
				return nil, errors.New("no such luck")
			}
			if bare != nil {
				near, far := net.Pipe()
				go bare(far)
				return near, nil
			}
			return h.ln.dial(ctx, network, addr)
		},
	}
}

func (h *pipeHub) set(down bool, answer func(w http.ResponseWriter, r *http.Request) bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.down, h.answer = down, answer
}

// raw has connections served without TLS; nil ends that.
func (h *pipeHub) raw(serve func(net.Conn)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.bare = serve
}

// upgradeOnly takes the WebSocket and leaves it at that.
func (h *pipeHub) upgradeOnly(w http.ResponseWriter, r *http.Request) (net.Conn, error) {
	up := websocket.Upgrader{Subprotocols: []string{Subprotocol}}
	ws, err := up.Upgrade(w, r, nil)
	if err != nil {
		return nil, err
	}
	return ws.NetConn(), nil
}

func (h *pipeHub) takeDials() []time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	d := h.dials
	h.dials = nil
	return d
}

// runDialer runs a Dialer until the test ends.
func runDialer(t *testing.T, d *Dialer, serve func(ctx context.Context, s *Session) error) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- d.Run(ctx, serve) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run: %v", err)
		}
	})
}

func untilDone(ctx context.Context, _ *Session) error {
	<-ctx.Done()
	return ctx.Err()
}

// After a session that lived the first attempt comes at once; then the waits
// grow to their bound, and a success starts over.
func TestReconnectBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newPipeHub(t)
		runDialer(t, h.dialer(), untilDone)
		s := <-h.sessions
		time.Sleep(2 * time.Minute)
		h.takeDials()
		h.set(true, nil)
		lost := time.Now()
		s.Close()
		time.Sleep(10 * time.Minute)
		dials := h.takeDials()
		if first := dials[0].Sub(lost); first > 260*time.Millisecond {
			t.Errorf("first attempt after %v", first)
		}
		var longest time.Duration
		for i := 1; i < len(dials); i++ {
			wait := dials[i].Sub(dials[i-1])
			longest = max(longest, wait)
			if bound := min(500*time.Millisecond<<min(i-1, 10), 30*time.Second); wait > bound+time.Millisecond {
				t.Errorf("attempt %d after %v; want at most %v", i, wait, bound)
			}
		}
		if len(dials) < 20 || len(dials) > 120 || longest < 10*time.Second {
			t.Errorf("%d attempts in ten minutes, longest wait %v", len(dials), longest)
		}
		h.set(false, nil)
		s = <-h.sessions
		time.Sleep(2 * time.Minute)
		h.takeDials()
		lost = time.Now()
		s.Close()
		s = <-h.sessions
		if took := time.Since(lost); took > 300*time.Millisecond {
			t.Errorf("reconnected after %v", took)
		}
		s.Close()
	})
}

// A session that ends as soon as it began is not a success.
func TestReconnectBacksOffFromShortSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newPipeHub(t)
		runDialer(t, h.dialer(), func(context.Context, *Session) error { return errors.New("no") })
		var hubs sync.WaitGroup
		stop := make(chan struct{})
		hubs.Go(func() {
			for {
				select {
				case s := <-h.sessions:
					s.Close()
				case <-stop:
					return
				}
			}
		})
		time.Sleep(10 * time.Minute)
		if n := len(h.takeDials()); n > 120 {
			t.Errorf("%d attempts in ten minutes", n)
		}
		close(stop)
		hubs.Wait()
	})
}

func TestReconnectHonoursTheHub(t *testing.T) {
	cases := []struct {
		name        string
		answer      func(w http.ResponseWriter, r *http.Request) bool
		reason      DialReason
		least, most time.Duration
	}{
		{"Retry-After", func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Retry-After", "40")
			http.Error(w, "busy", http.StatusServiceUnavailable)
			return true
		}, DialHTTP, 40 * time.Second, 45 * time.Second},
		{"403", func(w http.ResponseWriter, _ *http.Request) bool {
			http.Error(w, "who are you", http.StatusForbidden)
			return true
		}, DialRejected, 150 * time.Second, 5 * time.Minute},
		{"410", func(w http.ResponseWriter, _ *http.Request) bool {
			http.Error(w, "forgotten", http.StatusGone)
			return true
		}, DialGone, 150 * time.Second, 5 * time.Minute},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newPipeHub(t)
				h.set(false, c.answer)
				d := h.dialer()
				var first error
				d.Retry = func(err error, wait time.Duration) error {
					if first == nil {
						first = err
					}
					return nil
				}
				runDialer(t, d, untilDone)
				time.Sleep(30 * time.Minute)
				dials := h.takeDials()
				for i := 1; i < len(dials); i++ {
					if wait := dials[i].Sub(dials[i-1]); wait < c.least || wait > c.most {
						t.Errorf("attempt %d after %v", i, wait)
					}
				}
				var de *DialError
				if !errors.As(first, &de) || de.Reason != c.reason {
					t.Errorf("error %v", first)
				}
			})
		})
	}
}

func TestRetryEndsRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newPipeHub(t)
		h.set(true, nil)
		d := h.dialer()
		enough := errors.New("enough")
		tries := 0
		d.Retry = func(error, time.Duration) error {
			if tries++; tries == 3 {
				return enough
			}
			return nil
		}
		if err := d.Run(t.Context(), untilDone); !errors.Is(err, enough) || tries != 3 {
			t.Errorf("Run: %v after %d", err, tries)
		}
	})
}

// A drained session lets its streams finish while the next one is up already;
// no moment is without a session that takes new streams.
func TestDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newPipeHub(t)
		edges := make(chan *Session, 4)
		runDialer(t, h.dialer(), func(ctx context.Context, s *Session) error {
			edges <- s
			return untilDone(ctx, s)
		})
		hub1, edge1 := <-h.sessions, <-edges
		near, far := streamPair(t, hub1, edge1, ClassStream)
		time.Sleep(2 * time.Minute)
		drained := make(chan error, 1)
		start := time.Now()
		go func() {
			drained <- hub1.Drain(t.Context(), GoAway{Deadline: time.Minute, Slot: 5 * time.Second, Reason: "upgrade"})
		}()
		hub2, edge2 := <-h.sessions, <-edges
		if took := time.Since(start); took < 5*time.Second || took > 6*time.Second {
			t.Errorf("next session after %v; its slot is 5 s", took)
		}
		if g, ok := edge1.GoAway(); !ok || g.Reason != "upgrade" || g.Code != CloseDrain {
			t.Errorf("edge was told %+v %v", g, ok)
		}
		if _, err := edge1.Open(t.Context(), OpenRequest{Kind: "x"}); !errors.Is(err, ErrDraining) {
			t.Errorf("Open on the drained session: %v", err)
		}
		if edge1.Err() != nil {
			t.Fatalf("drained session ended with a stream open: %v", edge1.Err())
		}
		go func() { _, _ = near.Write([]byte("still here")); near.Close() }()
		if got, err := io.ReadAll(far); err != nil || string(got) != "still here" {
			t.Errorf("%q, %v", got, err)
		}
		far.Close()
		if err := <-drained; err != nil {
			t.Error(err)
		}
		<-edge1.Done()
		var closed *CloseError
		if !errors.As(edge1.Err(), &closed) || closed.Code != CloseDrain {
			t.Errorf("drained session ended with %v", edge1.Err())
		}
		st, _ := streamPair(t, edge2, hub2, ClassStream)
		st.Close()
		hub2.Close()
	})
}

func TestDrainDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		edge, hub := newPair(t, Config{}, Config{}, nil)
		near, _ := streamPair(t, hub, edge, ClassStream)
		start := time.Now()
		if err := hub.Drain(t.Context(), GoAway{Deadline: 10 * time.Second}); err != nil {
			t.Error(err)
		}
		if took := time.Since(start); took < 10*time.Second || took > 11*time.Second {
			t.Errorf("took %v", took)
		}
		<-edge.Done()
		if _, err := near.Read(make([]byte, 1)); err == nil {
			t.Error("the stream lives")
		}
	})
}

// Failures to dial are told apart, and say what to do.
func TestDialErrors(t *testing.T) {
	certs, others := newCerts(t), newCerts(t)
	serve := func(t *testing.T, cfg *tls.Config, handler http.HandlerFunc) string {
		t.Helper()
		ln, err := tls.Listen("tcp", "127.0.0.1:0", cfg)
		if err != nil {
			t.Fatal(err)
		}
		srv := &http.Server{Handler: handler, ErrorLog: log.New(io.Discard, "", 0)}
		var served sync.WaitGroup
		served.Go(func() { _ = srv.Serve(ln) })
		t.Cleanup(func() { _ = srv.Close(); served.Wait() })
		return "https://" + ln.Addr().String()
	}
	status := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { http.Error(w, fmt.Sprint("says ", code), code) }
	}
	page := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/html; charset=utf-8")
			w.Header().Set("Location", "http://portal.example/login?then=hub")
			w.WriteHeader(code)
			_, _ = io.WriteString(w, "<html>Welcome to the hotel")
		}
	}
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	silentHTTP := make(chan struct{})
	defer close(silentHTTP)
	cases := []struct {
		name   string
		url    string
		tls    *tls.Config
		reason DialReason
		text   string
	}{
		{"refused", "https://" + closed.Addr().String(), certs.edgeTLS(), DialRefused, "check that the hub runs"},
		{"dns", "https://no-such-hub.invalid", certs.edgeTLS(), DialDNS, "DNS"},
		{"silent", "https://" + silent.Addr().String(), certs.edgeTLS(), DialTimeout, "waiting for the TLS handshake"},
		{"silent HTTP", serve(t, certs.hubTLS(), func(http.ResponseWriter, *http.Request) { <-silentHTTP }), certs.edgeTLS(), DialTimeout, "waiting for the hub's answer"},
		{"page", serve(t, certs.hubTLS(), page(200)), certs.edgeTLS(), DialPortal, "captive portal"},
		{"sign in", serve(t, certs.hubTLS(), page(511)), certs.edgeTLS(), DialPortal, "511 Network Authentication Required"},
		{"sent elsewhere", serve(t, certs.hubTLS(), page(302)), certs.edgeTLS(), DialPortal, "go to portal.example"},
		{"hub of another CA", serve(t, others.hubTLS(), status(200)), certs.edgeTLS(), DialCertificate, "a captive portal"},
		{"edge of another CA", serve(t, certs.hubTLS(), status(200)), &tls.Config{RootCAs: certs.pool, Certificates: others.edgeTLS().Certificates}, DialTLS, "this node's certificate"},
		{"edge without certificate", serve(t, certs.hubTLS(), status(200)), &tls.Config{RootCAs: certs.pool}, DialTLS, "this node's certificate"},
		{"401", serve(t, certs.hubTLS(), status(401)), certs.edgeTLS(), DialRejected, "says 401"},
		{"403", serve(t, certs.hubTLS(), status(403)), certs.edgeTLS(), DialRejected, "says 403"},
		{"410", serve(t, certs.hubTLS(), status(410)), certs.edgeTLS(), DialGone, "join again"},
		{"404", serve(t, certs.hubTLS(), status(404)), certs.edgeTLS(), DialProtocol, "URL"},
		{"502", serve(t, certs.hubTLS(), status(502)), certs.edgeTLS(), DialHTTP, "502 Bad Gateway"},
		{"no TLS", "https://hub", nil, DialConfig, "TLS"},
		{"plain", "http://hub", certs.edgeTLS(), DialConfig, "scheme"},
		{"user in URL", "https://me@hub", certs.edgeTLS(), DialConfig, "user"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			timeout := 5 * time.Second
			if c.reason == DialTimeout {
				timeout = 100 * time.Millisecond
			}
			d := &Dialer{URL: c.url, TLS: c.tls, Timeout: timeout}
			s, err := d.Dial(t.Context())
			if err == nil {
				s.Close()
				t.Fatal("dialled")
			}
			var de *DialError
			if !errors.As(err, &de) || de.Reason != c.reason || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v; want %s and %q", err, c.reason, c.text)
			}
			t.Log(err)
		})
	}
	t.Run("plain HTTP server", func(t *testing.T) {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		srv := &http.Server{Handler: status(200), ErrorLog: log.New(io.Discard, "", 0)}
		go func() { _ = srv.Serve(ln) }()
		defer srv.Close()
		_, err = (&Dialer{URL: "https://" + ln.Addr().String(), TLS: certs.edgeTLS()}).Dial(t.Context())
		var de *DialError
		if !errors.As(err, &de) || de.Reason != DialPortal || !strings.Contains(err.Error(), "plain HTTP") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("name servers that do not answer", func(t *testing.T) {
		silent, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer silent.Close()
		resolver := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "udp", silent.LocalAddr().String())
		}}
		d := &Dialer{
			URL: "https://hub.example:10443", TLS: certs.edgeTLS(), Timeout: 200 * time.Millisecond,
			NetDial: (&net.Dialer{Resolver: resolver}).DialContext,
		}
		start := time.Now()
		_, err = d.Dial(t.Context())
		var de *DialError
		if !errors.As(err, &de) || de.Reason != DialDNS || time.Since(start) > 5*time.Second {
			t.Errorf("got %v after %v", err, time.Since(start))
		}
		t.Log(err)
	})
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(50*time.Millisecond, cancel)
		d := &Dialer{URL: serve(t, certs.hubTLS(), func(http.ResponseWriter, *http.Request) { <-silentHTTP }), TLS: certs.edgeTLS()}
		start := time.Now()
		if _, err := d.Dial(ctx); !errors.Is(err, context.Canceled) || time.Since(start) > 5*time.Second {
			t.Errorf("got %v after %v", err, time.Since(start))
		}
	})
}

func TestUpgradeRefuses(t *testing.T) {
	ln := newPipeListener()
	errs := make(chan error, 1)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, err := Upgrade(w, r, Config{})
		errs <- err
	})}
	go func() { _ = srv.Serve(ln) }()
	defer srv.Close()
	client := &http.Client{Transport: &http.Transport{DialContext: ln.dial, DisableKeepAlives: true}}
	for name, hdr := range map[string]http.Header{
		"no WebSocket": {},
		"no subprotocol": {
			"Connection": {"Upgrade"}, "Upgrade": {"websocket"}, "Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {"dGhlIHNhbXBsZSBub25jZQ=="},
		},
		"browser": {
			"Connection": {"Upgrade"}, "Upgrade": {"websocket"}, "Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {"dGhlIHNhbXBsZSBub25jZQ=="},
			"Sec-Websocket-Protocol": {Subprotocol}, "Origin": {"http://hub"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://hub/", nil)
			req.Header = hdr
			resp, err := client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if err := <-errs; err == nil || resp.StatusCode < 400 {
				t.Errorf("status %d, error %v", resp.StatusCode, err)
			}
		})
	}
}
