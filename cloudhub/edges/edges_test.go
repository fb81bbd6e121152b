package edges

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/tunnel"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

func TestNewestTunnelWinsAndTheOlderIsFenced(t *testing.T) {
	holding, release := make(chan struct{}, 1), make(chan struct{})
	r := newRig(t)
	r.sync.hold = func(context.Context, string) { // a write that the API server takes its time for
		select {
		case holding <- struct{}{}:
		default:
		}
		<-release
	}
	first := r.connect("edge-1")
	r.openSync(first)
	<-r.sync.began

	second := r.connect("edge-1")
	r.openSync(second)
	<-holding
	if ce := closed(t, first); ce.Code != tunnel.CloseReplaced || ce.Reason == "" {
		t.Errorf("the older was told %v", ce)
	}
	select {
	case <-r.sync.began:
		t.Error("the newer tunnel's sync began while a write of the older was under way")
	case <-time.After(100 * time.Millisecond):
	}
	close(release)
	select {
	case <-r.sync.began:
	case <-time.After(soon):
		t.Fatal("the newer tunnel is not served")
	}
	if got := r.Nodes(); len(got) != 1 || got[0] != "edge-1" {
		t.Errorf("connected: %v", got)
	}
	if second.Err() != nil {
		t.Error(second.Err())
	}
}

// A peer that is gone without a word must cost nobody else a wait: a farewell
// to it takes CloseGrace.
func TestReplacingADeadTunnelHoldsNobodyUp(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Tunnel.CloseGrace = 5 * time.Second })
	d := r.dialer("edge-1", "1")
	var stalled net.Conn
	d.NetDial = func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := (&net.Dialer{}).DialContext(ctx, network, addr)
		stalled = &mute{Conn: c, stop: make(chan struct{})}
		return stalled, err
	}
	old, err := d.Dial(t.Context())
	must(t, err)
	r.await("connected", func() bool { return len(r.Nodes()) == 1 })
	close(stalled.(*mute).stop)
	t.Cleanup(func() { stalled.Close(); old.Close() })

	began := time.Now()
	r.connect("edge-1")
	r.connect("edge-2")
	r.Connected()
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("two nodes took %v to connect", took)
	}
	stalled.Close()
}

// mute reads nothing any more once stop is closed.
type mute struct {
	net.Conn
	stop chan struct{}
}

func (m *mute) Read(p []byte) (int, error) {
	n, err := m.Conn.Read(p)
	select {
	case <-m.stop:
		return 0, errors.New("muted")
	default:
		return n, err
	}
}

func TestCut(t *testing.T) {
	r := newRig(t)
	s := r.connect("edge-1") // with enrolment 1
	r.Cut("edge-1", "0", "an older enrolment")
	r.Cut("edge-2", "1", "somebody else")
	if s.Err() != nil || len(r.Nodes()) != 1 {
		t.Fatalf("cut by another's enrolment: %v", s.Err())
	}
	r.Cut("edge-1", "1", "this node was forgotten")
	if ce := closed(t, s); ce.Code != tunnel.CloseRevoked || ce.Reason != "this node was forgotten" {
		t.Errorf("told %v", ce)
	}
	r.await("gone", func() bool { return len(r.Nodes()) == 0 })
	if got := r.told.all(); !slices.Equal(got, []string{"away edge-1 EnrolmentEnded"}) || r.told.last["edge-1"].Message != "this node was forgotten" {
		t.Errorf("told of %q, %+v", got, r.told.last)
	}
}

// TestHowANodeWent goes through the ends of a tunnel that are not the hub's wish.
func TestHowANodeWent(t *testing.T) {
	r := newRig(t)
	var wire net.Conn
	for _, tc := range []struct {
		name, want, message string
		end                 func(s *tunnel.Session)
	}{
		{"stops", "TunnelClosed", "edgecore stops", func(s *tunnel.Session) { s.CloseWith(tunnel.CloseNormal, "edgecore stops") }},
		{"breaks", "TunnelBroken", "lost on read", func(*tunnel.Session) { wire.Close() }},
		{"fails", "TunnelBroken", "a sync that cannot be", func(s *tunnel.Session) {
			r.openSync(s)
			<-r.sync.began
			r.sync.fail <- errors.New("a sync that cannot be")
		}},
	} {
		before := time.Now()
		d := r.dialer(tc.name, "1")
		d.NetDial = func(ctx context.Context, network, addr string) (c net.Conn, err error) {
			wire, err = (&net.Dialer{}).DialContext(ctx, network, addr)
			return wire, err
		}
		s, err := d.Dial(t.Context())
		must(t, err)
		t.Cleanup(func() { s.Close() })
		r.await("connected", func() bool { return len(r.Nodes()) == 1 })
		connected := time.Now()
		tc.end(s)
		r.await("gone", func() bool { return len(r.Nodes()) == 0 })
		r.told.mu.Lock()
		a := r.told.last[tc.name]
		r.told.mu.Unlock()
		if a.Reason != tc.want || !strings.Contains(a.Message, tc.message) {
			t.Errorf("%s: %+v, want %s with %q", tc.name, a, tc.want, tc.message)
		}
		if a.Heard.Before(before) || a.Heard.After(connected.Add(soon)) {
			t.Errorf("%s: heard %v, connected between %v and %v", tc.name, a.Heard, before, connected)
		}
	}
	// A tunnel that takes another's place is no absence.
	r.connect("moves")
	r.connect("moves")
	if got := r.told.all(); len(got) != 3 {
		t.Errorf("told of %q", got)
	}
}

// A node ends a tunnel whose sync stream has gone. If it saw that first, it
// would leave with no idea why it was cut.
func TestTheReasonComesBeforeTheStreamsEnd(t *testing.T) {
	r := newRig(t)
	for range 100 {
		s := r.connect("edge-1")
		st := r.openSync(s)
		<-r.sync.began
		r.Cut("edge-1", "1", "this node was forgotten")
		_, err := st.Read(make([]byte, 1))
		var ce *tunnel.CloseError
		if !errors.As(err, &ce) || ce.Code != tunnel.CloseRevoked {
			t.Fatalf("the sync stream ended with %v", err)
		}
		r.await("gone", func() bool { return len(r.Nodes()) == 0 })
	}
}

func TestRevokedWhileConnecting(t *testing.T) {
	r := newRig(t)
	r.registry.revoked["edge-1"] = true
	s, err := r.dialer("edge-1", "1").Dial(t.Context())
	must(t, err)
	t.Cleanup(func() { s.Close() })
	if ce := closed(t, s); ce.Code != tunnel.CloseRevoked {
		t.Errorf("told %v", ce)
	}
	r.await("gone", func() bool { return len(r.Nodes()) == 0 })
}

func TestWhoIsNotLetIn(t *testing.T) {
	r := newRig(t)
	dial := func(d *tunnel.Dialer) *tunnel.DialError {
		t.Helper()
		s, err := d.Dial(t.Context())
		if err == nil {
			s.Close()
			t.Fatal("let in")
		}
		var de *tunnel.DialError
		if !errors.As(err, &de) {
			t.Fatal(err)
		}
		return de
	}
	bare := r.dialer("edge-1", "1")
	bare.TLS.Certificates = nil
	if de := dial(bare); de.Status != http.StatusUnauthorized || !strings.Contains(de.Body, "join") {
		t.Errorf("without a certificate: %v", de)
	}
	foreign := r.dialer("edge-1", "1")
	self := (&rig{t: t}).certificate("edge-1", "1") // signed by itself
	foreign.TLS.Certificates = append(foreign.TLS.Certificates[:0], self)
	if de := dial(foreign); de.Status != http.StatusUnauthorized && de.Reason != tunnel.DialTLS {
		t.Errorf("with a certificate of its own making: %v", de)
	}
	r.registry.refused["edge-2"] = &edgeapi.JoinError{Code: edgeapi.JoinNodeRevoked, Message: "node edge-2 was revoked"}
	if de := dial(r.dialer("edge-2", "1")); de.Status != http.StatusForbidden || !strings.Contains(de.Body, "revoked") {
		t.Errorf("revoked: %v", de)
	}
	if len(r.Nodes()) != 0 {
		t.Errorf("connected: %v", r.Nodes())
	}
	// A request with a certificate that is no tunnel is answered, not entered.
	c := &http.Client{Transport: &http.Transport{TLSClientConfig: r.dialer("edge-1", "1").TLS}}
	defer c.CloseIdleConnections()
	res, err := c.Get(r.url)
	must(t, err)
	res.Body.Close()
	if res.StatusCode != http.StatusBadRequest || len(r.Nodes()) != 0 {
		t.Errorf("plain GET: %s, connected %v", res.Status, r.Nodes())
	}
}

func TestBeforeRunTheHubIsStarting(t *testing.T) {
	e, err := New(Config{Registry: &registry{}, Feed: &syncer{}, Upstream: &relay{}, Presence: &presences{}, Client: newRig(t).client})
	must(t, err)
	rec := &recorder{header: http.Header{}}
	e.ServeHTTP(rec, &http.Request{})
	if rec.code != http.StatusServiceUnavailable || rec.header.Get("Retry-After") == "" {
		t.Errorf("%d %v", rec.code, rec.header)
	}
	if _, err := New(Config{}); err == nil {
		t.Error("an empty Config is accepted")
	}
}

type recorder struct {
	header http.Header
	code   int
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(code int)        { r.code = code }
func (r *recorder) Write(p []byte) (int, error) { return len(p), nil }

func TestStreams(t *testing.T) {
	r := newRig(t)
	s := r.connect("edge-1")
	open := func(kind string) *tunnel.Stream {
		t.Helper()
		st, err := s.Open(t.Context(), tunnel.OpenRequest{Kind: kind})
		must(t, err)
		return st
	}
	for _, kind := range []string{"mystery", edgeapi.KindKubelet, "SYNC"} {
		if code := resetCode(t, open(kind)); code != tunnel.CodeNoKind {
			t.Errorf("stream of kind %q: code %d", kind, code)
		}
	}
	first := r.openSync(s)
	<-r.sync.began
	if code := resetCode(t, r.openSync(s)); code != tunnel.CodeRefused {
		t.Errorf("second sync stream: code %d", code)
	}
	if s.Err() != nil {
		t.Fatal(s.Err())
	}
	// The node's sync is why its tunnel is there.
	first.Close()
	closed(t, s)
	r.await("gone", func() bool { return len(r.Nodes()) == 0 })
}

func TestAFailedSyncEndsTheTunnel(t *testing.T) {
	r := newRig(t)
	s := r.connect("edge-1")
	r.openSync(s)
	<-r.sync.began
	r.sync.fail <- errors.New("inventory of more than a few objects")
	closed(t, s)
	r.await("gone", func() bool { return len(r.Nodes()) == 0 })
}

func TestAPIBacklog(t *testing.T) {
	r := newRig(t) // whose relay accepts none
	s := r.connect("edge-1")
	var waiting []*tunnel.Stream
	for range apiBacklog {
		st, err := s.Open(t.Context(), tunnel.OpenRequest{Kind: edgeapi.KindAPI})
		must(t, err)
		waiting = append(waiting, st)
	}
	for range 3 {
		st, err := s.Open(t.Context(), tunnel.OpenRequest{Kind: edgeapi.KindAPI})
		must(t, err)
		if code := resetCode(t, st); code != tunnel.CodeRefused {
			t.Errorf("beyond the backlog: code %d", code)
		}
	}
	for _, st := range waiting {
		must(t, st.SetReadDeadline(time.Now().Add(-time.Second)))
		var timeout net.Error
		if _, err := st.Read(make([]byte, 1)); !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Fatalf("one within the backlog: %v", err)
		}
	}
}

func TestAPIRequestsAreTheNodes(t *testing.T) {
	r := newRig(t, func(c *Config) {
		c.Upstream = &relay{handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) { io.WriteString(w, req.URL.Path) })}
	})
	for _, node := range []string{"edge-1", "edge-2"} {
		s := r.connect(node)
		c := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return s.Open(ctx, tunnel.OpenRequest{Kind: edgeapi.KindAPI})
		}}}
		res, err := c.Get("http://hub/api/v1")
		must(t, err)
		body, _ := io.ReadAll(res.Body)
		res.Body.Close()
		c.CloseIdleConnections()
		if res.Header.Get("Node") != node || string(body) != "/api/v1" {
			t.Errorf("%s: %v %q", node, res.Header, body)
		}
	}
}

func TestDialKubeletSaysWhatIsTheMatter(t *testing.T) {
	now := time.Now()
	r := newRig(t, func(c *Config) { c.Clock = func() time.Time { return now } })
	ctx := t.Context()
	text := func(ip string) string {
		t.Helper()
		c, err := r.DialKubelet(ctx, ip)
		if err == nil {
			c.Close()
			t.Fatal("connected")
		}
		return err.Error()
	}
	is := func(what, got string, parts ...string) {
		t.Helper()
		for _, p := range parts {
			if !strings.Contains(got, p) {
				t.Errorf("%s: %q lacks %q", what, got, p)
			}
		}
	}
	is("no address", text("edge-1"), `"edge-1"`)
	is("unknown address", text("100.64.9.9"), "no edge node has the address 100.64.9.9")
	if got := text("100.64.0.1"); got != "node edge-1 is not connected (never seen)" {
		t.Error(got)
	}
	// A hub that restarted knows from the Lease.
	lease := func(at time.Time) {
		t.Helper()
		_ = r.client.CoordinationV1().Leases(leaseNamespace).Delete(ctx, "edge-1", metav1.DeleteOptions{})
		renewed := metav1.NewMicroTime(at)
		_, err := r.client.CoordinationV1().Leases(leaseNamespace).Create(ctx, &coordinationv1.Lease{
			ObjectMeta: metav1.ObjectMeta{Name: "edge-1", Namespace: leaseNamespace}, Spec: coordinationv1.LeaseSpec{RenewTime: &renewed},
		}, metav1.CreateOptions{})
		must(t, err)
	}
	lease(now.Add(-90 * time.Minute))
	is("from the Lease", text("100.64.0.1"), "last seen "+now.Add(-90*time.Minute).Local().Format("15:04:05")+",", "1h30m0s ago")
	lease(now.Add(-26 * time.Hour))
	is("yesterday", text("100.64.0.1"), "last seen "+now.Add(-26*time.Hour).Local().Format("2006-01-02 15:04:05"), "26h0m0s ago")

	s := r.connect("edge-1")
	conn, err := r.DialKubelet(ctx, "100.64.0.1")
	must(t, err)
	st, err := s.Accept(ctx)
	must(t, err)
	if st.Kind() != edgeapi.KindKubelet {
		t.Errorf("a stream of kind %q", st.Kind())
	}
	go func() { io.WriteString(st, "hello"); st.Close() }()
	if got, err := io.ReadAll(conn); string(got) != "hello" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	conn.Close()
	s.Close()
	r.await("gone", func() bool { return len(r.Nodes()) == 0 })
	now = now.Add(12 * time.Second)
	is("just gone", text("100.64.0.1"), "last seen ", "s ago)") // its own word beats the Lease's
	if strings.Contains(text("100.64.0.1"), "26h") {
		t.Error(text("100.64.0.1"))
	}
}

func TestStopEndsAllTunnels(t *testing.T) {
	r := newRig(t)
	var sessions []*tunnel.Session
	for i := range 5 {
		s := r.connect(fmt.Sprintf("edge-%d", i))
		r.openSync(s)
		<-r.sync.began
		sessions = append(sessions, s)
	}
	began := time.Now()
	r.stop()
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("stopping took %v", took)
	}
	for _, s := range sessions {
		if ce := closed(t, s); ce.Code != tunnel.CloseDrain || !strings.Contains(ce.Reason, "stopping") {
			t.Errorf("told %v", ce)
		}
	}
	if s, err := r.dialer("edge-9", "1").Dial(t.Context()); err == nil { // let in no more
		closed(t, s)
	}
	if len(r.Nodes()) != 0 {
		t.Errorf("connected: %v", r.Nodes())
	}
}
