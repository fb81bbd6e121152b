package enroll_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/skerry-io/skerry/cloudhub/enroll"
	"github.com/skerry-io/skerry/cloudhub/enroll/enrolltest"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// losses records what OnRevoked was told.
type losses struct {
	mu  sync.Mutex
	all map[string]enroll.RevokeReason // by enrollment
}

func (l *losses) add(rec enroll.NodeRecord, why enroll.RevokeReason) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all == nil {
		l.all = map[string]enroll.RevokeReason{}
	}
	l.all[rec.Enrollment] = why
}

func (l *losses) of(enrollment string) enroll.RevokeReason {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all[enrollment]
}

// What one replica does to a node, every replica learns and tells.
func TestLossOfStandingReachesEveryReplica(t *testing.T) {
	client := enrolltest.Client()
	var lost [2]losses
	hubs := []*enrolltest.Hub{
		enrolltest.Start(t, enroll.Config{Client: client, OnRevoked: lost[0].add}),
		enrolltest.Start(t, enroll.Config{Client: client, OnRevoked: lost[1].add}),
	}
	for _, c := range []struct {
		why  enroll.RevokeReason
		code edgeapi.JoinErrorCode
		do   func(e *edge) error
	}{
		{enroll.Forgotten, edgeapi.JoinUnknownNode, func(e *edge) error { return hubs[0].Forget(t.Context(), e.name) }},
		{enroll.Revoked, edgeapi.JoinNodeRevoked, func(e *edge) error { return hubs[0].Revoke(t.Context(), e.name, "stolen") }},
		{enroll.Replaced, edgeapi.JoinNodeReplaced, func(e *edge) error {
			thief := newEdge(hubs[0], e.name)
			req := thief.request(t, newToken(t, hubs[0].Enroll, enroll.TokenOptions{AllowReplace: true}))
			req.Replace = true
			return thief.send(req)
		}},
	} {
		t.Run(string(c.why), func(t *testing.T) {
			e := newEdge(hubs[1], "edge-"+string(c.why))
			if err := e.join(t, newToken(t, hubs[0].Enroll, enroll.TokenOptions{})); err != nil {
				t.Fatal(err)
			}
			wantName(t, e)
			rec, err := hubs[1].Identify(e.cert.Leaf)
			if err != nil || !hubs[1].Current(rec) {
				t.Fatalf("%+v is not current, error %v", rec, err)
			}
			// The other replica takes it at once, whether it has heard or not.
			if got, err := hubs[0].Identify(e.cert.Leaf); err != nil || got.Name != e.name {
				t.Fatalf("the other replica takes %s for %q, error %v", e.name, got.Name, err)
			}
			if err := c.do(e); err != nil {
				t.Fatal(err)
			}
			for i := range hubs {
				await(t, "every replica to hear of it", func() bool { return lost[i].of(rec.Enrollment) == c.why })
				if hubs[i].Current(rec) {
					t.Errorf("replica %d holds the enrollment for current", i)
				}
			}
			_, err = e.whoAmI()
			wantCode(t, err, c.code)
		})
	}
}

// A forgotten node cannot come back by repeating the join it made, although
// its answer might have been lost.
func TestForgottenNodeCannotRepeatItsJoin(t *testing.T) {
	hub := enrolltest.Start(t, enroll.Config{})
	for uses, want := range map[int]edgeapi.JoinErrorCode{1: edgeapi.JoinTokenUsed, 2: ""} {
		e := newEdge(hub, fmt.Sprintf("edge-%d", uses))
		req := e.request(t, newToken(t, hub.Enroll, enroll.TokenOptions{Uses: uses}))
		if err := e.send(req); err != nil {
			t.Fatal(err)
		}
		if err := hub.Forget(t.Context(), e.name); err != nil {
			t.Fatal(err)
		}
		// A token with another use left spends that one.
		if err := e.send(req); codeOf(err) != want || want == "" && err != nil {
			t.Fatalf("%s: %v, want %q", e.name, err, want)
		}
		if err := hub.Forget(t.Context(), e.name); want == "" && err != nil {
			t.Fatal(err)
		}
		wantCode(t, e.send(req), edgeapi.JoinTokenUsed)
	}
}

func TestRenewal(t *testing.T) {
	clock := &clock{}
	hub := enrolltest.Start(t, enroll.Config{Clock: clock.now})
	e := newEdge(hub, "edge-7")
	if err := e.join(t, newToken(t, hub.Enroll, enroll.TokenOptions{})); err != nil {
		t.Fatal(err)
	}
	renew := func(key *ecdsa.PrivateKey) (*edge, error) {
		resp, err := e.post(edgeapi.RenewPath, edgeapi.RenewRequest{CSR: csrOf(key)})
		if err != nil {
			return nil, err
		}
		fresh := &edge{hub: hub, name: e.name}
		return fresh, fresh.take(resp.Certificate, key)
	}

	// With the same key: both certificates are good.
	clock.advance(30 * 24 * time.Hour)
	same, err := renew(e.key.(*ecdsa.PrivateKey))
	if err != nil {
		t.Fatal(err)
	}
	if !same.cert.Leaf.NotAfter.After(e.cert.Leaf.NotAfter) {
		t.Error("the renewed certificate lasts no longer")
	}
	wantName(t, same)
	wantName(t, e)

	// With a fresh key: both until the fresh one is used, then that alone.
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	fresh, err := renew(key)
	if err != nil {
		t.Fatal(err)
	}
	wantName(t, e)
	if again, err := renew(key); err != nil { // the answer was lost
		t.Fatal(err)
	} else {
		wantName(t, again)
	}
	await(t, "the old key to be dropped", func() bool { _, err := e.whoAmI(); return err != nil })
	_, err = e.whoAmI()
	wantCode(t, err, edgeapi.JoinNodeReplaced)
	_, err = renew(key)
	wantCode(t, err, edgeapi.JoinNodeReplaced)
	wantName(t, fresh)

	// Renewing in a loop is stopped.
	e, limited := fresh, false
	for range 10 {
		if _, err := renew(key); err != nil {
			wantCode(t, err, edgeapi.JoinTooMany)
			limited = true
		}
	}
	if !limited {
		t.Error("a node renews as often as it likes")
	}
	// Without a certificate there is nothing to renew.
	_, err = newEdge(hub, "edge-7").post(edgeapi.RenewPath, edgeapi.RenewRequest{CSR: csrOf(key)})
	wantCode(t, err, edgeapi.JoinNoCertificate)
}

// Expired certificates pass the handshake only if their node is known, and
// then get nothing but a renewal.
func TestExpiry(t *testing.T) {
	clock := &clock{}
	hub := enrolltest.Start(t, enroll.Config{Clock: clock.now, CertLifetime: time.Hour, GraceAfterExpiry: 24 * time.Hour})
	known, forgotten, late := newEdge(hub, "known"), newEdge(hub, "forgotten"), newEdge(hub, "late")
	for _, e := range []*edge{known, forgotten, late} {
		if err := e.join(t, newToken(t, hub.Enroll, enroll.TokenOptions{})); err != nil {
			t.Fatal(err)
		}
	}
	if err := hub.Forget(t.Context(), "forgotten"); err != nil {
		t.Fatal(err)
	}
	clock.advance(2 * time.Hour)
	_, err := known.whoAmI()
	wantCode(t, err, edgeapi.JoinCertificateExpired)
	if _, err := forgotten.whoAmI(); err == nil || codeOf(err) != "" {
		t.Errorf("an expired certificate of a forgotten node passed the handshake: %v", err)
	}
	resp, err := known.post(edgeapi.RenewPath, edgeapi.RenewRequest{CSR: csrOf(known.key)})
	if err != nil {
		t.Fatal(err)
	}
	if err := known.take(resp.Certificate, known.key); err != nil {
		t.Fatal(err)
	}
	wantName(t, known)
	clock.advance(24 * time.Hour)
	if _, err := late.post(edgeapi.RenewPath, edgeapi.RenewRequest{CSR: csrOf(late.key)}); err == nil || codeOf(err) != "" {
		t.Errorf("a certificate beyond its grace passed the handshake: %v", err)
	}
}

func TestForeignCertificates(t *testing.T) {
	hub, other := enrolltest.Start(t, enroll.Config{}), enrolltest.Start(t, enroll.Config{})
	e := newEdge(other, "edge-7")
	if err := e.join(t, newToken(t, other.Enroll, enroll.TokenOptions{})); err != nil {
		t.Fatal(err)
	}
	_, err := hub.Identify(e.cert.Leaf)
	wantCode(t, err, edgeapi.JoinUnknownNode)
	e.hub = hub
	if _, err := e.whoAmI(); err == nil || codeOf(err) != "" {
		t.Errorf("another hub's certificate passed the handshake: %v", err)
	}
	_, err = hub.Identify(nil)
	wantCode(t, err, edgeapi.JoinNoCertificate)

	// The hub's own serving certificate is no node's.
	serving, err := hub.ServerTLS().GetCertificate(&tls.ClientHelloInfo{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = hub.Identify(serving.Leaf)
	wantCode(t, err, edgeapi.JoinUnknownNode)
}

// Without its API server a hub goes on recognising the nodes it knows, and
// never says that it does not know one.
func TestIdentifyWithoutAPIServer(t *testing.T) {
	client := enrolltest.Client()
	reads := addFaults(client, "get", "node.")
	hub := replicas(t, client, 1, enroll.Config{})[0]
	e, forgotten := newEdge(hub, "edge-7"), newEdge(hub, "edge-8")
	for _, e := range []*edge{e, forgotten} {
		if err := e.join(t, newToken(t, hub.Enroll, enroll.TokenOptions{})); err != nil {
			t.Fatal(err)
		}
	}
	if err := hub.Forget(t.Context(), "edge-8"); err != nil {
		t.Fatal(err)
	}
	reads.on.Store(true)
	wantName(t, e)
	_, err := forgotten.whoAmI()
	wantCode(t, err, edgeapi.JoinUnavailable)
}

// The index answers for known nodes: nothing is read per connection.
func TestIdentifyReadsNothing(t *testing.T) {
	client := enrolltest.Client()
	hub := replicas(t, client, 1, enroll.Config{})[0]
	e := newEdge(hub, "edge-7")
	if err := e.join(t, newToken(t, hub.Enroll, enroll.TokenOptions{})); err != nil {
		t.Fatal(err)
	}
	forgotten := newEdge(hub, "edge-8")
	if err := forgotten.join(t, newToken(t, hub.Enroll, enroll.TokenOptions{})); err != nil {
		t.Fatal(err)
	}
	if err := hub.Forget(t.Context(), "edge-8"); err != nil {
		t.Fatal(err)
	}
	client.ClearActions()
	for range 20 {
		wantName(t, e)
	}
	if actions := client.Actions(); len(actions) > 0 {
		t.Errorf("20 connections of a known node cost %d requests, the first %v", len(actions), actions[0])
	}
	for range 20 { // a forgotten node that keeps trying
		_, err := forgotten.whoAmI()
		wantCode(t, err, edgeapi.JoinUnknownNode)
	}
	if actions := client.Actions(); len(actions) > 2 {
		t.Errorf("20 connections of a forgotten node cost %d requests", len(actions))
	}
}

func TestServingCertificateIsRenewed(t *testing.T) {
	clock := &clock{}
	hub := enrolltest.Start(t, enroll.Config{Clock: clock.now, ServerNames: []string{"hub.example", "127.0.0.1"}})
	get := func() *tls.Certificate {
		t.Helper()
		cert, err := hub.ServerTLS().GetCertificate(&tls.ClientHelloInfo{})
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	first := get()
	if err := first.Leaf.VerifyHostname("hub.example"); err != nil {
		t.Error(err)
	}
	if len(first.Certificate) != 2 {
		t.Errorf("the chain has %d certificates; an edge that joins looks for the CA in it", len(first.Certificate))
	}
	if get() != first {
		t.Error("the certificate changes without need")
	}
	clock.advance(300 * 24 * time.Hour)
	second := get()
	if second == first || !second.Leaf.NotAfter.After(first.Leaf.NotAfter) {
		t.Error("the certificate is not renewed in time")
	}
	if !second.Leaf.NotBefore.Equal(hub.CACertificate().NotBefore) {
		t.Errorf("the renewed certificate begins at %s: an edge whose clock is behind would refuse it", second.Leaf.NotBefore)
	}
}
