package enrolment

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/skerry-io/skerry/cloudhub/enroll"
	"github.com/skerry-io/skerry/cloudhub/enroll/enrolltest"
	"github.com/skerry-io/skerry/edgecore/identity"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// clock is the machine's clock, moved.
type clock struct{ offset atomic.Int64 }

func (c *clock) now() time.Time          { return time.Now().Add(time.Duration(c.offset.Load())) }
func (c *clock) advance(d time.Duration) { c.offset.Add(int64(d)) }

// whoAmI asks the hub who the caller is, over a connection of its own.
func whoAmI(hub *enrolltest.Hub, id *identity.Identity) (string, error) {
	transport := &http.Transport{TLSClientConfig: id.ClientTLS(), DisableKeepAlives: true}
	resp, err := (&http.Client{Transport: transport, Timeout: 10 * time.Second}).Get(hub.URL + enrolltest.WhoAmI)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s: %s", resp.Status, body)
	}
	return string(body), nil
}

func wantName(t *testing.T, hub *enrolltest.Hub, id *identity.Identity, want string) {
	t.Helper()
	if got, err := whoAmI(hub, id); err != nil || got != want {
		t.Fatalf("the hub takes the caller for %q, error %v; want %q", got, err, want)
	}
}

func wantRefused(t *testing.T, hub *enrolltest.Hub, id *identity.Identity, code edgeapi.JoinErrorCode) {
	t.Helper()
	got, err := whoAmI(hub, id)
	if err == nil || !strings.Contains(err.Error(), `"`+string(code)+`"`) {
		t.Fatalf("the hub takes the caller for %q, error %v; want refusal %s", got, err, code)
	}
}

func TestJoin(t *testing.T) {
	s := newSituation(t)
	joined := s.join(t, identity.JoinOptions{})
	wantName(t, s.hub, joined, "edge-7")

	id, err := identity.Load(s.opts.DataDir)
	if err != nil {
		t.Fatal(err)
	}
	wantName(t, s.hub, id, "edge-7")
	if id.NodeName() != "edge-7" || id.HubURL().String() != s.hub.URL {
		t.Errorf("identity is of %s at %s", id.NodeName(), id.HubURL())
	}
	ip, ok := s.hub.IPOf("edge-7")
	if !ok || ip.String() != id.VirtualIP() {
		t.Errorf("virtual IP is %s at the edge, %s at the hub", id.VirtualIP(), ip)
	}
	if name, ok := s.hub.NodeByIP(ip); !ok || name != "edge-7" {
		t.Errorf("%s belongs to %q", ip, name)
	}
	for name, mode := range map[string]os.FileMode{"identity": 0o700 | os.ModeDir, "identity/node.key": 0o600, "identity/node.crt": 0o644, "identity/ca.crt": 0o644, "identity/identity.json": 0o644} {
		info, err := os.Stat(filepath.Join(s.opts.DataDir, name))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != mode {
			t.Errorf("%s has mode %s, want %s", name, info.Mode(), mode)
		}
	}
	left, err := filepath.Glob(filepath.Join(s.opts.DataDir, "*"))
	if err != nil || len(left) != 2 { // identity, identity.lock
		t.Errorf("the data directory holds %v", left)
	}
}

// The hub's answer is lost on the link: the same command, run again, succeeds
// with the same single-use token.
func TestJoinAgainAfterLostAnswer(t *testing.T) {
	s := newSituation(t)
	// A power cut after the hub's answer but before the install leaves the
	// pending key and no identity.
	s.join(t, identity.JoinOptions{})
	pending := filepath.Join(s.opts.DataDir, "identity.pending")
	if err := os.Mkdir(pending, 0o700); err != nil {
		t.Fatal(err)
	}
	token, _ := edgeapi.ParseToken(s.opts.Token)
	record := fmt.Sprintf(`{"hub":%q,"node":"edge-7","tokenID":%q}`, s.hub.URL, token.ID)
	if err := os.WriteFile(filepath.Join(pending, "join.json"), []byte(record), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(s.opts.DataDir, "identity", "node.key"), filepath.Join(pending, "node.key")); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(s.opts.DataDir, "identity")); err != nil {
		t.Fatal(err)
	}

	id := s.join(t, identity.JoinOptions{})
	wantName(t, s.hub, id, "edge-7")

	// Not so for another machine, nor for this one with another key.
	if err := identity.Remove(s.opts.DataDir); err != nil {
		t.Fatal(err)
	}
	_, err := identity.Join(t.Context(), s.opts)
	var e *identity.Error
	if !errors.As(err, &e) || e.Reason != identity.Reason(edgeapi.JoinTokenUsed) {
		t.Fatalf("another key joins with a used token: %v", err)
	}
}

func TestReplace(t *testing.T) {
	s := newSituation(t)
	old := s.occupy(t)
	wantName(t, s.hub, old, "edge-7")
	s.opts.Token, s.opts.Replace = s.token(t, enroll.TokenOptions{AllowReplace: true}), true
	id, err := identity.Join(t.Context(), s.opts)
	if err != nil {
		t.Fatal(err)
	}
	wantName(t, s.hub, id, "edge-7")
	wantRefused(t, s.hub, old, edgeapi.JoinNodeReplaced)
	if old.VirtualIP() != id.VirtualIP() {
		t.Errorf("the name's address changed from %s to %s", old.VirtualIP(), id.VirtualIP())
	}
}

func TestForgetAndRevoke(t *testing.T) {
	s := newSituation(t)
	id := s.join(t, identity.JoinOptions{})
	wantName(t, s.hub, id, "edge-7")
	if err := s.hub.Revoke(t.Context(), "edge-7", "stolen"); err != nil {
		t.Fatal(err)
	}
	wantRefused(t, s.hub, id, edgeapi.JoinNodeRevoked)
	if err := s.hub.Forget(t.Context(), "edge-7"); err != nil {
		t.Fatal(err)
	}
	s.clock.advance(time.Minute) // past the memory of the refusal
	wantRefused(t, s.hub, id, edgeapi.JoinUnknownNode)
	err := id.Renew(t.Context(), nil)
	want := "renew " + s.hub.URL + " as node edge-7: the hub has no node edge-7: it was forgotten, or it never joined this hub; join again with: edgecore join " + s.hub.URL + " --token TOKEN --replace"
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
	if err := s.hub.Forget(t.Context(), "edge-7"); !errors.Is(err, enroll.ErrNoNode) {
		t.Errorf("forgetting twice: %v", err)
	}
}

func TestRenew(t *testing.T) {
	s := newSituation(t)
	id := s.join(t, identity.JoinOptions{})
	conf := id.ClientTLS() // made before the renewal, used after it
	before := id.Certificate()
	old, err := identity.Load(s.opts.DataDir)
	if err != nil {
		t.Fatal(err)
	}
	s.clock.advance(60 * 24 * time.Hour)
	if err := id.Renew(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	after := id.Certificate()
	if !after.NotAfter.After(before.NotAfter) {
		t.Errorf("the new certificate ends at %s, the old one at %s", after.NotAfter, before.NotAfter)
	}
	// Until the new one is used, the old one is good.
	wantName(t, s.hub, old, "edge-7")
	cert, err := conf.GetClientCertificate(nil)
	if err != nil || !cert.Leaf.Equal(after) {
		t.Errorf("a configuration made before the renewal does not show the new certificate")
	}
	wantName(t, s.hub, id, "edge-7")
	await(t, "the old key to be refused", func() bool {
		_, err := whoAmI(s.hub, old)
		return err != nil
	})
	wantRefused(t, s.hub, old, edgeapi.JoinNodeReplaced)
	again, err := identity.Load(s.opts.DataDir)
	if err != nil {
		t.Fatal(err)
	}
	wantName(t, s.hub, again, "edge-7")
}

// An answer to a renewal that is lost, any number of times, locks nobody out.
func TestRenewAnswerLost(t *testing.T) {
	s := newSituation(t)
	s.join(t, identity.JoinOptions{})
	dir := filepath.Join(s.opts.DataDir, "identity")
	for range 3 {
		kept := map[string][]byte{}
		for _, name := range []string{"node.key", "node.crt", "ca.crt", "identity.json"} {
			body, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			kept[name] = body
		}
		id, err := identity.Load(s.opts.DataDir)
		if err != nil {
			t.Fatal(err)
		}
		if err := id.Renew(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		next, err := os.ReadFile(filepath.Join(dir, "node.key"))
		if err != nil {
			t.Fatal(err)
		}
		// Put the state before the answer back: old files, next key on disk.
		kept["next.key"] = next
		for name, body := range kept {
			if err := os.WriteFile(filepath.Join(dir, name), body, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	id, err := identity.Load(s.opts.DataDir)
	if err != nil {
		t.Fatal(err)
	}
	wantName(t, s.hub, id, "edge-7")
	if err := id.Renew(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	wantName(t, s.hub, id, "edge-7")
}

// A node that lay in a drawer comes back with an expired certificate: nothing
// takes it but the renewal.
func TestExpiredCertificateRenews(t *testing.T) {
	s := newSituation(t)
	id := s.join(t, identity.JoinOptions{})
	s.clock.advance(200 * 24 * time.Hour)
	wantRefused(t, s.hub, id, edgeapi.JoinCertificateExpired)
	if err := id.Renew(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	wantName(t, s.hub, id, "edge-7")

	s.clock.advance((90 + 366) * 24 * time.Hour) // beyond the grace
	if got, err := whoAmI(s.hub, id); err == nil {
		t.Fatalf("a certificate beyond its grace is taken for %s", got)
	}
	if err := id.Renew(t.Context(), nil); err == nil {
		t.Fatal("a certificate beyond its grace was renewed")
	}
}

func TestRenewerKick(t *testing.T) {
	s := newSituation(t)
	id := s.join(t, identity.JoinOptions{})
	before := id.Certificate()
	r, err := identity.NewRenewer(identity.RenewerConfig{Identity: id})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	r.Kick()
	await(t, "a new certificate", func() bool { return !id.Certificate().Equal(before) })
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestConcurrentUse(t *testing.T) {
	s := newSituation(t)
	id := s.join(t, identity.JoinOptions{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 5 {
				// A connection begun with a key that two renewals overtook is
				// refused; the next one is not.
				if _, err := whoAmI(s.hub, id); err != nil {
					if _, err = whoAmI(s.hub, id); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	for range 3 {
		if err := id.Renew(t.Context(), nil); err != nil {
			t.Error(err)
		}
	}
	wg.Wait()
	wantName(t, s.hub, id, "edge-7")
}

func await(t *testing.T, what string, met func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !met() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
		timer := time.NewTimer(10 * time.Millisecond)
		select {
		case <-timer.C:
		case <-t.Context().Done():
			t.FailNow()
		}
	}
}

func TestLoadErrors(t *testing.T) {
	s := newSituation(t)
	s.join(t, identity.JoinOptions{})
	other := newSituation(t)
	other.join(t, identity.JoinOptions{})
	otherKey, err := os.ReadFile(filepath.Join(other.opts.DataDir, "identity", "node.key"))
	if err != nil {
		t.Fatal(err)
	}
	const rejoin = "; restore the directory from a backup, or join again with: edgecore join HUB --token TOKEN --replace"
	cases := []struct {
		name  string
		spoil func(dir string) error
		want  string
	}{
		{"never joined", func(dir string) error { return os.RemoveAll(dir) },
			"identity: {DIR}: this machine has not joined a hub; run: edgecore join https://HUB:10443 --token TOKEN"},
		{"key missing", func(dir string) error { return os.Remove(filepath.Join(dir, "node.key")) },
			"identity: open {DIR}/node.key: no such file or directory" + rejoin},
		{"certificate missing", func(dir string) error { return os.Remove(filepath.Join(dir, "node.crt")) },
			"identity: open {DIR}/node.crt: no such file or directory" + rejoin},
		{"key readable by others", func(dir string) error { return os.Chmod(filepath.Join(dir, "node.key"), 0o644) },
			"identity: {DIR}/node.key may be read by others (mode 0644); run: chmod 600 {DIR}/node.key; if somebody may have read it, join again with --replace"},
		{"another node's key", func(dir string) error { return os.WriteFile(filepath.Join(dir, "node.key"), otherKey, 0o600) },
			"identity: {DIR}: node.key does not belong to node.crt" + rejoin},
		{"certificate damaged", func(dir string) error { return os.WriteFile(filepath.Join(dir, "node.crt"), []byte("x"), 0o600) },
			"identity: {DIR}: node.crt: no certificate in it" + rejoin},
		{"CA empty", func(dir string) error { return os.WriteFile(filepath.Join(dir, "ca.crt"), nil, 0o600) },
			"identity: {DIR}: ca.crt: no certificate in it" + rejoin},
		{"meta cut", func(dir string) error { return os.Truncate(filepath.Join(dir, "identity.json"), 10) },
			"identity: {DIR}: identity.json: unexpected EOF" + rejoin},
		{"of another version", func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "identity.json"), []byte(`{"version":9}`), 0o600)
		}, "identity: {DIR}: identity.json is of version 9, this edgecore knows 1; use the edgecore that wrote it"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			data := t.TempDir()
			dir := filepath.Join(data, "identity")
			if err := os.CopyFS(dir, os.DirFS(filepath.Join(s.opts.DataDir, "identity"))); err != nil {
				t.Fatal(err)
			}
			for _, path := range []string{"node.key"} { // CopyFS adds bits for all
				if err := os.Chmod(filepath.Join(dir, path), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if err := c.spoil(dir); err != nil {
				t.Fatal(err)
			}
			_, err := identity.Load(data)
			want := strings.ReplaceAll(c.want, "{DIR}", dir)
			if err == nil || err.Error() != want {
				t.Errorf("got  %v\nwant %s", err, want)
			}
		})
	}
}
