package identity

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

func TestParseHubURL(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"https://hub.example:10443", "https://hub.example:10443"},
		{"https://hub.example", "https://hub.example:443"},
		{"https://HUB.example/", "https://hub.example:443"},
		{" hub.example ", "https://hub.example:10443"},
		{"192.0.2.1", "https://192.0.2.1:10443"},
		{"hub:443", "https://hub:443"},
		{"2001:db8::1", "https://[2001:db8::1]:10443"},
		{"https://[2001:db8::1]:7", "https://[2001:db8::1]:7"},
		{"wss://hub.example:10443", "https://hub.example:10443"},
	} {
		if got, err := ParseHubURL(c.in); err != nil || got.String() != c.want {
			t.Errorf("%q is read as %v, error %v; want %s", c.in, got, err, c.want)
		}
	}
	for _, c := range []struct{ in, want string }{
		{"", "the hub's URL is missing; give it as https://HOST:10443"},
		{"http://hub", `hub URL "http://hub" begins with http://; a hub speaks https only; give it as https://HOST:10443`},
		{"https://", `hub URL "https://" names no host; give it as https://HOST:10443`},
		{"https://a:b@hub", `hub URL "https://a:b@hub" names a user; a hub knows nodes by certificate only; give it as https://HOST:10443`},
		{"https://hub/v1/join", `hub URL "https://hub/v1/join" has a path; the hub's address has none; give it as https://HOST:10443`},
		{"https://hub?x=1", `hub URL "https://hub?x=1" has a query or fragment; the hub's address has none; give it as https://HOST:10443`},
		{"https://hub:0", `hub URL "https://hub:0" has port 0, which is not within 1 to 65535; give it as https://HOST:10443`},
		{"https://hub:99999", `hub URL "https://hub:99999" has port 99999, which is not within 1 to 65535; give it as https://HOST:10443`},
		{"https://hub:x", `hub URL "https://hub:x" cannot be read: invalid port ":x" after host; give it as https://HOST:10443`},
	} {
		if got, err := ParseHubURL(c.in); err == nil || err.Error() != c.want {
			t.Errorf("%q is read as %v\ngot  %v\nwant %s", c.in, got, err, c.want)
		}
	}
}

func FuzzParseHubURL(f *testing.F) {
	f.Add("https://hub.example:10443")
	f.Add("[::1]:7")
	f.Add("2001:db8::1")
	f.Fuzz(func(t *testing.T, s string) {
		u, err := ParseHubURL(s)
		if err != nil {
			return
		}
		again, err := ParseHubURL(u.String())
		if err != nil || again.String() != u.String() {
			t.Errorf("%q is read as %s, and that as %v, error %v", s, u, again, err)
		}
	})
}

func TestNodeNameOfHost(t *testing.T) {
	host := func(name string) func() (string, error) { return func() (string, error) { return name, nil } }
	for in, want := range map[string]string{"edge-7": "edge-7", "Edge-7.Berlin.": "edge-7.berlin"} {
		if got, err := nodeName("", host(in)); err != nil || got != want {
			t.Errorf("host %q is named %q, error %v; want %q", in, got, err, want)
		}
	}
	for in, want := range map[string]string{
		"localhost":             `this machine's host name is "localhost", as many others' is; give a node name with --node-name`,
		"Raspberry Pi":          `for instance raspberry-pi`,
		"_":                     `give another with --node-name`,
		strings.Repeat("x", 70): `it has 70 characters, more than 63; give another with --node-name, for instance ` + strings.Repeat("x", 63),
	} {
		if got, err := nodeName("", host(in)); err == nil || !strings.HasSuffix(err.Error(), want) {
			t.Errorf("host %q is named %q\ngot  %v\nwant ... %s", in, got, err, want)
		}
	}
}

// testCA issues as a hub does, and as one would that is not to be trusted.
type testCA struct {
	cert *x509.Certificate
	key  any
}

func newTestCA(t *testing.T) *testCA {
	key, _, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "CA", Organization: []string{edgeapi.HubOrganization}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(10 * 365 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(nil, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &testCA{cert, key}
}

func (ca *testCA) node(t *testing.T, name string, pub any, life time.Duration) []byte {
	der, err := x509.CreateCertificate(nil, &x509.Certificate{
		SerialNumber: big.NewInt(7 << 8), Subject: pkix.Name{CommonName: edgeapi.NodeUserPrefix + name},
		NotBefore: time.Now(), NotAfter: time.Now().Add(life),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
	}, ca.cert, pub, ca.key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// newMaterial is the identity of node edge-7 from ca.
func newMaterial(t *testing.T, ca *testCA, life time.Duration) *material {
	t.Helper()
	key, keyPEM, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	hub := &url.URL{Scheme: "https", Host: "hub.example:10443"}
	m, err := accept(&edgeapi.JoinResponse{
		NodeName: "edge-7", Certificate: ca.node(t, "edge-7", key.Public(), life), CAs: [][]byte{ca.cert.Raw}, VirtualIP: "100.64.0.7", Time: time.Now(),
	}, acceptance{hub: hub, node: "edge-7", key: key, keyPEM: keyPEM, trusted: []*x509.Certificate{ca.cert}})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// What a hub answers is not believed.
func TestAnswersRefused(t *testing.T) {
	ca, foreign := newTestCA(t), newTestCA(t)
	key, keyPEM, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	otherKey, _, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		resp edgeapi.JoinResponse
		want string
	}{
		{"no certificate", edgeapi.JoinResponse{}, "certificate: x509: malformed certificate"},
		{"another key", edgeapi.JoinResponse{Certificate: ca.node(t, "edge-7", otherKey.Public(), time.Hour), CAs: [][]byte{ca.cert.Raw}}, "the certificate is for another key"},
		{"another name", edgeapi.JoinResponse{Certificate: ca.node(t, "edge-8", key.Public(), time.Hour), CAs: [][]byte{ca.cert.Raw}}, `the certificate is for "system:node:edge-8", not for node edge-7`},
		{"no CA", edgeapi.JoinResponse{Certificate: ca.node(t, "edge-7", key.Public(), time.Hour)}, "its CAs do not include the one this node trusts"},
		{"another CA alone", edgeapi.JoinResponse{Certificate: foreign.node(t, "edge-7", key.Public(), time.Hour), CAs: [][]byte{foreign.cert.Raw}}, "its CAs do not include the one this node trusts"},
		{"a leaf as CA", edgeapi.JoinResponse{Certificate: ca.node(t, "edge-7", key.Public(), time.Hour), CAs: [][]byte{ca.node(t, "x", key.Public(), time.Hour)}}, `CA: "system:node:x" is none`},
		{"of a CA that is not shown", edgeapi.JoinResponse{Certificate: foreign.node(t, "edge-7", key.Public(), time.Hour), CAs: [][]byte{ca.cert.Raw}}, "certificate: x509: certificate signed by unknown authority"},
	} {
		_, err := accept(&c.resp, acceptance{hub: &url.URL{}, node: "edge-7", key: key, keyPEM: keyPEM, trusted: []*x509.Certificate{ca.cert}})
		if err == nil || !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%s\ngot  %v\nwant %s", c.name, err, c.want)
		}
	}
}

// Power may go at any step of a change: the old or the new identity is there.
func TestInstallSurvivesPowerCuts(t *testing.T) {
	ca := newTestCA(t)
	old, fresh := newMaterial(t, ca, time.Hour), newMaterial(t, ca, 2*time.Hour)
	files, err := fresh.files()
	if err != nil {
		t.Fatal(err)
	}
	rename := func(dir, from, to string) {
		t.Helper()
		if err := os.Rename(filepath.Join(dir, from), filepath.Join(dir, to)); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name string
		cut  func(dir string) // leaves dir as a power cut would
		want *material
	}{
		{"while the new files are written", func(dir string) {
			if err := writeDir(filepath.Join(dir, newDir+".tmp"), files[:2]); err != nil {
				t.Fatal(err)
			}
		}, old},
		{"before the swap", func(dir string) {
			if err := writeDir(filepath.Join(dir, newDir), files); err != nil {
				t.Fatal(err)
			}
		}, old},
		{"between the swap's two steps", func(dir string) {
			if err := writeDir(filepath.Join(dir, newDir), files); err != nil {
				t.Fatal(err)
			}
			rename(dir, dirName, oldDir)
		}, fresh},
		{"after the swap", func(dir string) {
			if err := writeDir(filepath.Join(dir, newDir), files); err != nil {
				t.Fatal(err)
			}
			rename(dir, dirName, oldDir)
			rename(dir, newDir, dirName)
		}, fresh},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := install(dir, old); err != nil {
				t.Fatal(err)
			}
			c.cut(dir)
			id, err := Load(dir)
			if err != nil {
				t.Fatal(err)
			}
			if !id.Certificate().Equal(c.want.cert.Leaf) {
				t.Error("the other identity is there")
			}
			// And the next change is not in the way of what is left.
			if err := install(dir, fresh); err != nil {
				t.Fatal(err)
			}
			if id, err = Load(dir); err != nil || !id.Certificate().Equal(fresh.cert.Leaf) {
				t.Errorf("the next change failed: %v", err)
			}
			left, err := os.ReadDir(dir)
			if err != nil || len(left) != 1 {
				t.Errorf("%v is left over, error %v", left, err)
			}
		})
	}
}

func TestLock(t *testing.T) {
	dir := t.TempDir()
	release, err := lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	want := filepath.Join(dir, lockName) + " is locked: another edgecore is joining or renewing; wait for it to end"
	if _, err := lock(dir); err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
	release()
	release, err = lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	release()
}

// A board without a battery wakes up in 1970 and must reach its hub.
func TestClockFloor(t *testing.T) {
	m := newMaterial(t, newTestCA(t), time.Hour)
	m.meta.IssuedAt = time.Now().Add(24 * time.Hour)
	id := newIdentity(t.TempDir(), m)
	if got := id.ClientTLS().Time(); !got.Equal(m.meta.IssuedAt) {
		t.Errorf("a clock before the certificate's issue reads %s, want %s", got, m.meta.IssuedAt)
	}
	m.meta.IssuedAt = time.Now().Add(-24 * time.Hour)
	if got := id.ClientTLS().Time(); time.Since(got).Abs() > time.Minute {
		t.Errorf("a right clock reads %s", got)
	}
}

func TestRenewerSchedule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newTestCA(t)
		const life = 90 * 24 * time.Hour
		id := newIdentity(t.TempDir(), newMaterial(t, ca, life))
		r, err := NewRenewer(RenewerConfig{Identity: id})
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		var mu sync.Mutex
		var all []time.Duration
		fail := true
		r.attempt = func(context.Context) error {
			mu.Lock()
			defer mu.Unlock()
			all = append(all, time.Since(began))
			if fail {
				return errors.New("the hub cannot be reached")
			}
			id.adopt(newMaterial(t, ca, life))
			return nil
		}
		// triesAfter lets virtual time pass and returns all tries so far.
		triesAfter := func(d time.Duration) []time.Duration {
			time.Sleep(d)
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			return slices.Clone(all)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()

		tries := triesAfter(life * 2 / 3)
		if len(tries) == 0 || tries[0] < life*2/3-life/20 {
			t.Fatalf("tried after %v of %s", tries, time.Duration(life))
		}
		before := len(tries)
		tries = triesAfter(24 * time.Hour)
		if n := len(tries) - before; n < 12 || n > 40 {
			t.Errorf("%d tries in a day of failures", n)
		}
		for i := 1; i < len(tries); i++ {
			if gap := tries[i] - tries[i-1]; gap < time.Minute || gap > 90*time.Minute {
				t.Errorf("try %d came %s after the one before", i, gap)
			}
		}
		mu.Lock()
		fail = false
		mu.Unlock()
		renewed := len(triesAfter(2 * time.Hour))
		if n := len(triesAfter(30 * 24 * time.Hour)); n != renewed {
			t.Errorf("%d tries while nothing was due", n-renewed)
		}
		r.Kick()
		r.Kick()
		if n := len(triesAfter(0)); n == renewed || n > renewed+2 {
			t.Errorf("%d tries after a kick", n-renewed)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// Failures that cannot be brought about on every machine.
func TestExplain(t *testing.T) {
	h := &hubClient{url: &url.URL{Scheme: "https", Host: "hub.example:10443"}, node: "edge-7", op: "join"}
	op := func(name string, err error) error { return &net.OpError{Op: name, Net: "tcp", Err: err} }
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	own := &tls.Config{GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return nil, nil }}
	for _, c := range []struct {
		ctx    context.Context
		err    error
		conf   *tls.Config
		reason Reason
		want   string
	}{
		{t.Context(), op("dial", &net.DNSError{Err: "server misbehaving", Name: "hub.example", IsTemporary: true}), nil, ReasonDNS,
			`the DNS gives no answer about "hub.example" (lookup hub.example: server misbehaving); check the network and the name servers in /etc/resolv.conf, or give the hub's IP address`},
		{t.Context(), op("dial", os.NewSyscallError("connect", syscall.ENETUNREACH)), nil, ReasonUnreachable,
			"no route to hub.example:10443 (network is unreachable); check this machine's network and default route"},
		{t.Context(), op("dial", os.NewSyscallError("connect", syscall.EHOSTUNREACH)), nil, ReasonUnreachable,
			"no route to hub.example:10443 (no route to host); check this machine's network and default route"},
		{t.Context(), op("proxyconnect", os.NewSyscallError("connect", syscall.ECONNREFUSED)), nil, ReasonProxy,
			"the proxy of this machine's environment does not connect: connection refused; check HTTPS_PROXY and NO_PROXY"},
		{t.Context(), op("remote error", tls.AlertError(70)), nil, ReasonNotAHub,
			"hub.example:10443 refuses TLS as a hub speaks it (tls: protocol version not supported); " + notAHubHint},
		{t.Context(), op("remote error", tls.AlertError(42)), own, ReasonOwnCert,
			"the hub does not accept this node's certificate (tls: bad certificate); join again with: edgecore join https://hub.example:10443 --token TOKEN --replace"},
		{canceled, canceled.Err(), nil, ReasonInterrupted, "interrupted; run the same command again"},
		{t.Context(), errors.New("x\x1b[2Jy"), nil, ReasonOtherNetError, "the connection failed: x[2Jy; check the network and try again"},
	} {
		err := h.explain(c.ctx, fmt.Errorf("Head: %w", c.err), c.conf)
		var e *Error
		if !errors.As(err, &e) || e.Reason != c.reason || err.Error() != "join https://hub.example:10443 as node edge-7: "+c.want {
			t.Errorf("got  %v\nwant %s", err, c.want)
		}
	}
}

func TestExplainWrite(t *testing.T) {
	for err, want := range map[error]string{
		fs.ErrPermission: "permission denied; run as root, or choose another directory with --data-dir",
		syscall.EROFS:    "read-only file system; remount it writable, or choose another directory with --data-dir",
		syscall.ENOSPC:   "no space left on device; free some space, or choose another directory with --data-dir",
		syscall.ENOTDIR:  "not a directory; choose another directory with --data-dir",
	} {
		if got := explainWrite(err).Error(); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
}

func FuzzMaterial(f *testing.F) {
	f.Add([]byte(`{"version":1,"hub":"https://hub:1","nodeName":"a"}`), []byte("x"), []byte("y"), []byte("z"))
	f.Fuzz(func(t *testing.T, meta, key, cert, ca []byte) {
		if m, err := parseMaterial(meta, key, cert, ca); err == nil && (m.roots == nil || m.cert.Leaf == nil || m.hub == nil) {
			t.Error("an incomplete identity passed")
		}
	})
}

func FuzzRefusal(f *testing.F) {
	f.Add([]byte(`{"code":"token-used","message":"\u001b[2J"}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		refusal, err := decodeRefusal(body)
		if err != nil {
			return
		}
		if strings.ContainsAny(refusal.Message, "\x1b\n\r\x00") || len(refusal.Message) > 700 {
			t.Errorf("message %q would reach a terminal", refusal.Message)
		}
	})
}
