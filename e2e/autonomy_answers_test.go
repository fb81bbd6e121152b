package e2e

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/skerry-io/skerry/e2e/cluster"
	"github.com/skerry-io/skerry/e2e/machine"
)

// TestOthersAnswerInTheHubsPlace is an outage in which the hub's address
// belongs to somebody else, or to a hub that does not get on. Whatever the
// answer, nodes try again at their pace and their pods run on.
func TestOthersAnswerInTheHubsPlace(t *testing.T) {
	ns := namespace(t)
	var checks []func()
	for _, n := range world.nodes {
		checks = append(checks, untouched(t, n, ns, "untouched-on-"+n.Name()))
	}
	stalled(t)
	const window = 8 * time.Second
	restore := withoutHub(t)
	for _, impostor := range []struct {
		name   string
		answer func(net.Conn)
	}{
		{"accepts and says nothing", func(c net.Conn) { _, _ = io.Copy(io.Discard, c) }},
		{"accepts and hangs up", func(net.Conn) {}},
		{"a captive portal without TLS", redirect},
		{"a captive portal with a certificate of its own", withCertificate(t, redirect)},
	} {
		t.Run(impostor.name, func(t *testing.T) {
			var stops []func()
			for _, n := range world.nodes {
				stops = append(stops, observe(t, n))
			}
			dials := impersonate(t, window, impostor.answer)
			for _, stop := range stops {
				stop()
			}
			for _, n := range world.nodes {
				st, err := n.StatusBySocket(t.Context())
				if err != nil || st.Connected || st.LastError == "" {
					t.Errorf("%s: %+v %v", n.Name(), st, err)
				}
				t.Logf("%s dialled %d times in %s: %s", n.Name(), dials[n.IP()], window, st.LastError)
				// Pauses of half a second on average, doubling, come to five
				// within that time; a few short ones in a row double it.
				if dials[n.IP()] > 12 {
					t.Errorf("%s dialled %d times in %s", n.Name(), dials[n.IP()], window)
				}
			}
		})
	}
	since := restore()
	for _, n := range world.nodes {
		backInSync(t, n, since)
	}
	for _, check := range checks {
		check()
	}
}

// stalled stops the hub where it is: its connections stay, new ones are
// accepted, by the kernel, and nobody answers.
func stalled(t *testing.T) {
	t.Helper()
	var stops []func()
	for _, n := range world.nodes {
		stops = append(stops, observe(t, n))
	}
	if err := world.hub.Pause(); err != nil {
		t.Fatal(err)
	}
	timer := time.NewTimer(10 * time.Second)
	defer timer.Stop()
	<-timer.C
	if err := world.hub.Resume(); err != nil {
		t.Fatal(err)
	}
	since := time.Now()
	for i, n := range world.nodes {
		stops[i]()
		backInSync(t, n, since)
	}
}

// impersonate answers at the hub's port for a while and returns how often each
// address has dialled.
func impersonate(t *testing.T, during time.Duration, answer func(net.Conn)) map[string]int {
	t.Helper()
	l, err := net.Listen("tcp", "0.0.0.0:"+world.hub.Port())
	if err != nil {
		t.Fatal(err)
	}
	dials := map[string]int{}
	ended, end := context.WithTimeout(t.Context(), during)
	defer end()
	context.AfterFunc(ended, func() { l.Close() })
	var conns sync.WaitGroup
	for {
		c, err := l.Accept()
		if err != nil {
			break
		}
		host, _, err := net.SplitHostPort(c.RemoteAddr().String())
		if err != nil {
			t.Fatal(err)
		}
		dials[host]++
		conns.Go(func() {
			defer c.Close()
			stop := context.AfterFunc(ended, func() { c.Close() })
			defer stop()
			answer(c)
		})
	}
	conns.Wait()
	return dials
}

// redirect is what a captive portal answers to any request.
func redirect(c net.Conn) {
	in := bufio.NewReader(c)
	if first, err := in.Peek(1); err == nil && first[0] < ' ' { // a TLS hello, at a port that has none
		fmt.Fprint(c, "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
		return
	}
	if _, err := http.ReadRequest(in); err == nil {
		fmt.Fprint(c, "HTTP/1.1 302 Found\r\nLocation: http://portal.example/login\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
	}
}

// withCertificate answers by way of TLS, with a certificate that nobody has
// signed.
func withCertificate(t *testing.T, answer func(net.Conn)) func(net.Conn) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "portal.example"}, DNSNames: []string{"portal.example"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cfg := &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	return func(c net.Conn) { answer(tls.Server(c, cfg)) }
}

const hubName = "hub.skerry.test"

// TestTheNameServerIsGone has a node that knows its hub by name.
func TestTheNameServerIsGone(t *testing.T) {
	n := world.nodes[1]
	ns := namespace(t)
	check := untouched(t, n, ns, "untouched")
	dns := serveDNS(t, n.HostIP())
	resolv := n.Disk("/etc/resolv.conf")
	if err := os.WriteFile(resolv, []byte("nameserver "+n.HostIP()+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	reconfigure := func(ctx context.Context, over map[string]any) error {
		if err := n.StopEdgecore(ctx); err != nil {
			return err
		}
		if err := n.WriteConfig(over); err != nil {
			return err
		}
		return n.Run(ctx)
	}
	if err := reconfigure(t.Context(), map[string]any{"hub": "https://" + hubName + ":" + world.hub.Port()}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(os.WriteFile(resolv, []byte("# This machine has no name server.\n"), 0o644), reconfigure(context.Background(), nil)); err != nil {
			t.Error(err)
		}
	})
	connected(t, n)
	if dns.asked() == 0 {
		t.Fatal("the node has not asked for its hub's name")
	}

	restoreLink := cutUntilSeen(t, n)
	dns.answer(false)
	restoreLink()
	stop := observe(t, n)
	before := dns.asked()
	timer := time.NewTimer(10 * time.Second)
	defer timer.Stop()
	<-timer.C
	stop()
	asked := dns.asked() - before
	st, err := n.StatusBySocket(t.Context())
	t.Logf("%d questions in 10 s without an answer; %s", asked, st.LastError)
	if err != nil || !st.Connected && !strings.Contains(st.LastError, hubName) {
		t.Errorf("without a name server: %+v %v", st, err)
	}
	if asked > 40 { // an attempt has two kinds of address, and asks twice
		t.Errorf("%d questions in 10 s", asked)
	}
	dns.answer(true)
	backInSync(t, n, time.Now())
	check()
}

// nameServer knows one name, and can be told to stay silent.
type nameServer struct {
	ip   [4]byte
	mu   sync.Mutex
	mute bool
	n    int
}

func serveDNS(t *testing.T, ip string) *nameServer {
	t.Helper()
	conn, err := net.ListenPacket("udp", net.JoinHostPort(ip, "53"))
	if err != nil {
		t.Fatal(err)
	}
	s := &nameServer{ip: [4]byte(net.ParseIP(ip).To4())}
	done := make(chan struct{})
	go func() { defer close(done); s.serve(conn) }()
	t.Cleanup(func() { conn.Close(); <-done })
	return s
}

func (s *nameServer) answer(yes bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mute = !yes
}

func (s *nameServer) asked() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.n
}

func (s *nameServer) serve(conn net.PacketConn) {
	buf := make([]byte, 1500)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return
		}
		var m dnsmessage.Message
		if m.Unpack(buf[:n]) != nil || len(m.Questions) != 1 {
			continue
		}
		q := m.Questions[0]
		s.mu.Lock()
		mute := s.mute
		if strings.HasPrefix(q.Name.String(), hubName) {
			s.n++
		}
		s.mu.Unlock()
		if mute {
			continue
		}
		out := dnsmessage.Message{Header: dnsmessage.Header{ID: m.ID, Response: true, Authoritative: true}, Questions: m.Questions}
		switch {
		case q.Name.String() != hubName+".":
			out.RCode = dnsmessage.RCodeNameError
		case q.Type == dnsmessage.TypeA:
			out.Answers = []dnsmessage.Resource{{
				Header: dnsmessage.ResourceHeader{Name: q.Name, Class: dnsmessage.ClassINET, TTL: 1},
				Body:   &dnsmessage.AResource{A: s.ip}}}
		}
		if b, err := out.Pack(); err == nil {
			_, _ = conn.WriteTo(b, from)
		}
	}
}

// cutUntilSeen takes the link and waits until edgecore has seen that, so that
// it has to connect anew.
func cutUntilSeen(t *testing.T, n *cluster.Node) (restore func()) {
	t.Helper()
	if err := n.CutLink(t.Context(), machine.LinkDown); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.RestoreLink(context.Background()); err != nil {
			t.Error(err)
		}
	})
	eventually(t, time.Minute, n.Name()+" to see the cut", func(ctx context.Context) (bool, string) {
		st, err := n.StatusBySocket(ctx)
		return err == nil && !st.Connected, fmt.Sprintf("%+v %v", st, err)
	})
	return func() {
		t.Helper()
		if err := n.RestoreLink(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}
