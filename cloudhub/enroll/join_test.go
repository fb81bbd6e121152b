package enroll_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/skerry-io/skerry/cloudhub/enroll"
	"github.com/skerry-io/skerry/cloudhub/enroll/enrolltest"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

const namespace = "skerry-system"

// Many machines with one single-use token, at two replicas at once: one joins.
func TestSingleUseTokenHasOneWinner(t *testing.T) {
	for range 5 {
		hubs := replicas(t, enrolltest.Client(), 2, enroll.Config{})
		token := newToken(t, hubs[0].Enroll, enroll.TokenOptions{})
		var won atomic.Int32
		var wg sync.WaitGroup
		for i := range 12 {
			e := newEdge(hubs[i%2], fmt.Sprintf("edge-%d", i))
			wg.Go(func() {
				switch err := e.join(t, token); {
				case err == nil:
					won.Add(1)
				case codeOf(err) != edgeapi.JoinTokenUsed:
					t.Errorf("%s: %v", e.name, err)
				}
			})
		}
		wg.Wait()
		if won.Load() != 1 {
			t.Fatalf("%d machines joined with one single-use token", won.Load())
		}
		if nodes, err := hubs[0].Nodes(t.Context()); err != nil || len(nodes) != 1 {
			t.Fatalf("%d nodes are on record, error %v", len(nodes), err)
		}
		if info := tokenInfo(t, hubs[1].Enroll, token); info.Used != 1 || info.State(time.Now()) != "used" {
			t.Fatalf("the token is %+v", info)
		}
	}
}

// Many machines with tokens of their own and one name: one joins, and the
// others' tokens stay good.
func TestNameHasOneWinner(t *testing.T) {
	hubs := replicas(t, enrolltest.Client(), 2, enroll.Config{})
	var mu sync.Mutex
	var spare []string
	var wg sync.WaitGroup
	for i := range 12 {
		e := newEdge(hubs[i%2], "edge-7")
		token := newToken(t, hubs[0].Enroll, enroll.TokenOptions{})
		wg.Go(func() {
			err := e.join(t, token)
			if err != nil && codeOf(err) != edgeapi.JoinNameInUse {
				t.Errorf("%v", err)
			}
			if err != nil {
				mu.Lock()
				spare = append(spare, token)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if len(spare) != 11 {
		t.Fatalf("%d of 12 machines were refused the one name", len(spare))
	}
	for i, token := range spare {
		if err := newEdge(hubs[1], fmt.Sprintf("other-%d", i)).join(t, token); err != nil {
			t.Errorf("a token whose join was refused is used up: %v", err)
		}
	}
}

// The same join sent many times at once, as by a link that loses answers,
// is one join.
func TestIdenticalJoinsAreOne(t *testing.T) {
	clock := &clock{}
	hubs := replicas(t, enrolltest.Client(), 2, enroll.Config{Clock: clock.now})
	token := newToken(t, hubs[0].Enroll, enroll.TokenOptions{})
	first := newEdge(hubs[0], "edge-7")
	req := first.request(t, token)
	var wg sync.WaitGroup
	for i := range 8 {
		twin := &edge{hub: hubs[i%2], name: first.name, key: first.key}
		wg.Go(func() {
			if err := twin.send(req); err != nil && codeOf(err) != edgeapi.JoinUnavailable {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if err := first.send(req); err != nil {
		t.Fatal(err)
	}
	wantName(t, first)
	rec, _ := hubs[0].Node("edge-7")
	if err := first.send(req); err != nil {
		t.Fatal(err)
	}
	if again, _ := hubs[0].Node("edge-7"); again.Enrollment != rec.Enrollment || again.VirtualIP != rec.VirtualIP {
		t.Errorf("a repeated join changed the enrollment: %+v, then %+v", rec, again)
	}
	if info := tokenInfo(t, hubs[0].Enroll, token); info.Used != 1 {
		t.Errorf("%d uses are burnt", info.Used)
	}

	clock.advance(11 * time.Minute)
	wantCode(t, first.send(req), edgeapi.JoinTokenUsed)
}

// faults makes writes of Secrets fail while on.
type faults struct {
	on     atomic.Bool
	verb   string
	prefix string
}

func addFaults(client *fake.Clientset, verb, prefix string) *faults {
	f := &faults{verb: verb, prefix: prefix}
	client.PrependReactor(verb, "secrets", func(action clienttesting.Action) (bool, runtime.Object, error) {
		var name string
		switch a := action.(type) {
		case clienttesting.CreateAction: // updates have the same methods
			name = a.GetObject().(*corev1.Secret).Name
		case clienttesting.GetAction:
			name = a.GetName()
		}
		if f.on.Load() && isSecret(name, f.prefix) {
			return true, nil, errors.New("etcdserver: request timed out")
		}
		return false, nil, nil
	})
	return f
}

func TestFailedJoinBurnsNothing(t *testing.T) {
	client := enrolltest.Client()
	nodeWrites := addFaults(client, "create", "node.")
	hub := replicas(t, client, 1, enroll.Config{})[0]
	token := newToken(t, hub.Enroll, enroll.TokenOptions{})
	nodeWrites.on.Store(true)
	err := newEdge(hub, "edge-6").join(t, token)
	wantCode(t, err, edgeapi.JoinUnavailable)
	if strings.Contains(err.Error(), "etcd") {
		t.Errorf("the refusal tells of the hub's insides: %v", err)
	}
	nodeWrites.on.Store(false)
	if info := tokenInfo(t, hub.Enroll, token); info.Used != 0 {
		t.Fatalf("a failed join burnt the token: %+v", info)
	}
	if err := newEdge(hub, "edge-7").join(t, token); err != nil {
		t.Fatal(err)
	}
}

// A hub that dies between reserving the token and writing the node leaves a
// reservation: its machine may finish, others get it when it is stale.
func TestDeadJoinGivesTokenBack(t *testing.T) {
	client, clock := enrolltest.Client(), &clock{}
	nodeWrites, tokenReads := addFaults(client, "create", "node."), addFaults(client, "get", "join-token.")
	// The hub "dies" on its first attempt to write the node: it cannot give
	// the token back either.
	client.PrependReactor("create", "secrets", func(action clienttesting.Action) (bool, runtime.Object, error) {
		if nodeWrites.on.Load() && isSecret(action.(clienttesting.CreateAction).GetObject().(*corev1.Secret).Name, "node.") {
			tokenReads.on.Store(true)
		}
		return false, nil, nil
	})
	hub := replicas(t, client, 1, enroll.Config{Clock: clock.now})[0]
	for _, resumed := range []bool{true, false} {
		token := newToken(t, hub.Enroll, enroll.TokenOptions{})
		died := newEdge(hub, fmt.Sprintf("died-%v", resumed))
		nodeWrites.on.Store(true)
		wantCode(t, died.join(t, token), edgeapi.JoinUnavailable)
		nodeWrites.on.Store(false)
		tokenReads.on.Store(false)

		other := newEdge(hub, fmt.Sprintf("other-%v", resumed))
		wantCode(t, other.join(t, token), edgeapi.JoinTokenUsed)
		if resumed {
			if err := died.join(t, token); err != nil {
				t.Fatalf("the same machine cannot finish its join: %v", err)
			}
			wantName(t, died)
			clock.advance(3 * time.Minute)
			wantCode(t, other.join(t, token), edgeapi.JoinTokenUsed)
			continue
		}
		clock.advance(3 * time.Minute)
		if err := other.join(t, token); err != nil {
			t.Fatalf("a dead join's token is not given back: %v", err)
		}
		wantCode(t, died.join(t, token), edgeapi.JoinTokenUsed)
	}
}

// A join that wrote its record but not that the token is used has used it.
func TestUnconfirmedJoinCountsAsUsed(t *testing.T) {
	client, clock := enrolltest.Client(), &clock{}
	tokenReads := addFaults(client, "get", "join-token.")
	var armed atomic.Bool
	client.PrependReactor("create", "secrets", func(action clienttesting.Action) (bool, runtime.Object, error) {
		if armed.Load() && isSecret(action.(clienttesting.CreateAction).GetObject().(*corev1.Secret).Name, "node.") {
			tokenReads.on.Store(true)
		}
		return false, nil, nil
	})
	hub := replicas(t, client, 1, enroll.Config{Clock: clock.now})[0]
	token := newToken(t, hub.Enroll, enroll.TokenOptions{})
	armed.Store(true)
	e := newEdge(hub, "edge-7")
	wantCode(t, e.join(t, token), edgeapi.JoinUnavailable)
	armed.Store(false)
	tokenReads.on.Store(false)
	clock.advance(3 * time.Minute)
	wantCode(t, newEdge(hub, "edge-8").join(t, token), edgeapi.JoinTokenUsed)
	if err := e.join(t, token); err != nil {
		t.Fatal(err)
	}
	wantName(t, e)
}

func TestVirtualIPsAreUnique(t *testing.T) {
	client := enrolltest.Client()
	hubs := replicas(t, client, 3, enroll.Config{VirtualCIDR: netip.MustParsePrefix("100.64.0.0/26")})
	token := newToken(t, hubs[0].Enroll, enroll.TokenOptions{Uses: enroll.Unlimited})
	var wg sync.WaitGroup
	for i := range 62 { // all there are
		e := newEdge(hubs[i%3], fmt.Sprintf("edge-%d", i))
		wg.Go(func() {
			if err := e.join(t, token); err != nil {
				t.Errorf("%s: %v", e.name, err)
			}
		})
	}
	wg.Wait()
	nodes, err := hubs[0].Nodes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	seen := map[netip.Addr]string{}
	for _, n := range nodes {
		if seen[n.VirtualIP] != "" {
			t.Errorf("%s and %s share %s", seen[n.VirtualIP], n.Name, n.VirtualIP)
		}
		seen[n.VirtualIP] = n.Name
	}
	if len(seen) != 62 {
		t.Fatalf("%d nodes have an address", len(seen))
	}
	wantCode(t, newEdge(hubs[0], "one-too-many").join(t, token), edgeapi.JoinUnavailable)
	if err := hubs[1].Forget(t.Context(), "edge-5"); err != nil {
		t.Fatal(err)
	}
	await(t, "the freed address", func() bool { return newEdge(hubs[0], "one-too-many").join(t, token) == nil })
	for _, hub := range hubs {
		await(t, "the other replicas to know", func() bool { _, ok := hub.IPOf("one-too-many"); return ok })
	}
	if info := tokenInfo(t, hubs[0].Enroll, token); info.Used != 62 || info.State(time.Now()) != "usable" {
		t.Errorf("the unlimited token is %d times used and %s", info.Used, info.State(time.Now()))
	}
}

// A name that a Node of the cluster has, which never joined here, is not to be
// had: its certificate would act as that node.
func TestNameOfForeignNode(t *testing.T) {
	client := enrolltest.Client()
	_, err := client.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "worker-1"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	hub := replicas(t, client, 1, enroll.Config{})[0]
	e := newEdge(hub, "worker-1")
	err = e.join(t, newToken(t, hub.Enroll, enroll.TokenOptions{}))
	wantCode(t, err, edgeapi.JoinNameInUse)
	if want := "the cluster has a Node worker-1 that is not on this hub's record; choose another name, or delete it with: kubectl delete node worker-1"; err.Error() != want {
		t.Errorf("got  %s\nwant %s", err, want)
	}
	req := e.request(t, newToken(t, hub.Enroll, enroll.TokenOptions{AllowReplace: true}))
	req.Replace = true
	if err := e.send(req); err != nil {
		t.Fatal(err)
	}
}

func TestCertificateIsTheHubsChoice(t *testing.T) {
	hub := enrolltest.Start(t, enroll.Config{})
	e := newEdge(hub, "edge-7")
	req := e.request(t, newToken(t, hub.Enroll, enroll.TokenOptions{}))
	var err error
	req.CSR, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject:  pkix.Name{CommonName: "system:admin", Organization: []string{"system:masters"}},
		DNSNames: []string{"kubernetes.default"},
	}, e.key)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.send(req); err != nil {
		t.Fatal(err)
	}
	c := e.cert.Leaf
	if c.Subject.CommonName != "system:node:edge-7" || fmt.Sprint(c.Subject.Organization) != "[system:nodes]" ||
		len(c.DNSNames)+len(c.IPAddresses)+len(c.URIs)+len(c.EmailAddresses) > 0 || c.IsCA ||
		len(c.ExtKeyUsage) != 1 || c.ExtKeyUsage[0] != x509.ExtKeyUsageClientAuth {
		t.Errorf("the certificate is for %s, names %v, CA %v, usages %v", c.Subject, c.DNSNames, c.IsCA, c.ExtKeyUsage)
	}
}

func TestKeyKinds(t *testing.T) {
	hub := enrolltest.Start(t, enroll.Config{JoinBurst: 100})
	token := newToken(t, hub.Enroll, enroll.TokenOptions{Uses: enroll.Unlimited})
	ec := func(c elliptic.Curve) crypto.Signer {
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("GODEBUG", "rsa1024min=0") // to make the weak key that must be refused
	rsa1024, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		key  crypto.Signer
		ok   bool
	}{
		{"ecdsa-p256", ec(elliptic.P256()), true}, {"ecdsa-p384", ec(elliptic.P384()), true}, {"ed25519", ed, true}, {"rsa-2048", rsa2048, true},
		{"ecdsa-p224", ec(elliptic.P224()), false}, {"ecdsa-p521", ec(elliptic.P521()), false}, {"rsa-1024", rsa1024, false},
	} {
		e := newEdge(hub, c.name)
		e.key = c.key
		if err := e.join(t, token); !c.ok {
			wantCode(t, err, edgeapi.JoinBadKey)
		} else if err != nil {
			t.Errorf("%s: %v", c.name, err)
		} else {
			wantName(t, e)
		}
	}

	// Somebody else's public key, without its private one.
	victim := newEdge(hub, "victim")
	req := victim.request(t, token)
	req.CSR[len(req.CSR)-1] ^= 1
	wantCode(t, victim.send(req), edgeapi.JoinBadKey)
}

func TestEndpointLimits(t *testing.T) {
	hub := enrolltest.Start(t, enroll.Config{JoinBurst: 20, JoinRate: 0.001})
	e := newEdge(hub, "edge-7")
	post := func(contentType, body string) (*http.Response, edgeapi.JoinError) {
		t.Helper()
		resp, err := e.client().Post(hub.URL+edgeapi.JoinPath, contentType, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var refusal edgeapi.JoinError
		if err := json.NewDecoder(resp.Body).Decode(&refusal); err != nil {
			t.Fatal(err)
		}
		return resp, refusal
	}
	for _, c := range []struct{ contentType, body, want string }{
		{"text/plain", "{}", "the request is not application/json"},
		{"application/json", "{", "the request cannot be read: unexpected EOF"},
		{"application/json", "{}{}", "the request cannot be read: something follows the JSON value"},
		{"application/json", "{}", "the request names no node"},
		{"application/json", `{"nodeName":"` + string(bytes.Repeat([]byte("a"), edgeapi.MaxJoinBody)) + `"}`, "the request is longer than 32768 bytes"},
	} {
		if resp, refusal := post(c.contentType, c.body); resp.StatusCode != http.StatusBadRequest || refusal.Message != c.want {
			t.Errorf("got  %s %q\nwant 400 %q", resp.Status, refusal.Message, c.want)
		}
	}
	resp, err := e.client().Head(hub.URL + edgeapi.JoinPath)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusMethodNotAllowed || resp.Header.Get("Date") == "" {
		t.Errorf("HEAD is answered %s, Date %q", resp.Status, resp.Header.Get("Date"))
	}
	var limited bool
	for range 30 {
		resp, refusal := post("application/json", "{}")
		if resp.StatusCode == http.StatusTooManyRequests {
			limited = true
			if refusal.Code != edgeapi.JoinTooMany || resp.Header.Get("Retry-After") == "" {
				t.Errorf("refusal %+v, Retry-After %q", refusal, resp.Header.Get("Retry-After"))
			}
		}
	}
	if !limited {
		t.Error("35 requests at once from one address were all served")
	}
}

func TestTokens(t *testing.T) {
	clock := &clock{}
	client := enrolltest.Client()
	hub := replicas(t, client, 1, enroll.Config{Clock: clock.now})[0]
	for _, opts := range []enroll.TokenOptions{
		{TTL: -time.Hour}, {Uses: -2}, {Uses: 1001}, {NodeName: "Not_A_Name"}, {NodeName: "edge-7", Uses: 2},
	} {
		if _, _, err := hub.Tokens().Create(t.Context(), opts); err == nil {
			t.Errorf("a token %+v was made", opts)
		}
	}
	text, info, err := hub.Tokens().Create(t.Context(), enroll.TokenOptions{Uses: 2, TTL: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	if info.Uses != 2 || info.ExpiresAt.Sub(info.CreatedAt) != time.Hour || info.State(clock.now()) != "usable" {
		t.Errorf("the token is %+v", info)
	}
	token, err := edgeapi.ParseToken(text)
	if err != nil {
		t.Fatal(err)
	}
	secrets, err := client.CoreV1().Secrets(namespace).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if stored, err := json.Marshal(secrets); err != nil || bytes.Contains(stored, []byte(token.Secret)) {
		t.Errorf("the token's secret is stored, or error %v", err)
	}
	for i, want := range []edgeapi.JoinErrorCode{"", "", edgeapi.JoinTokenUsed} {
		if err := newEdge(hub, fmt.Sprintf("edge-%d", i)).join(t, text); codeOf(err) != want || want == "" && err != nil {
			t.Errorf("join %d: %v, want %q", i, err, want)
		}
	}
	if info := tokenInfo(t, hub.Enroll, text); fmt.Sprint(info.Nodes) != "[edge-0 edge-1]" {
		t.Errorf("the token says it was used by %v", info.Nodes)
	}
	if err := hub.Tokens().Revoke(t.Context(), token.ID); err != nil {
		t.Fatal(err)
	}
	wantCode(t, newEdge(hub, "edge-0").join(t, text), edgeapi.JoinTokenRevoked)
	for _, id := range []string{"nosuchid", "../../x", ""} {
		if err := hub.Tokens().Revoke(t.Context(), id); !errors.Is(err, enroll.ErrNoToken) {
			t.Errorf("revoking %q: %v", id, err)
		}
	}
	req := newEdge(hub, "edge-9").request(t, text)
	for _, id := range []string{"", "../skerry-ca", strings.Repeat("a", 5000), "aaaaaaaa"} {
		req.TokenID = id
		_, err := newEdge(hub, "edge-9").post(edgeapi.JoinPath, req)
		wantCode(t, err, edgeapi.JoinTokenUnknown)
	}
}

func TestHousekeeping(t *testing.T) {
	client, clock := enrolltest.Client(), &clock{}
	hub := replicas(t, client, 1, enroll.Config{Clock: clock.now})[0]
	if err := newEdge(hub, "edge-7").join(t, newToken(t, hub.Enroll, enroll.TokenOptions{TTL: time.Hour})); err != nil {
		t.Fatal(err)
	}
	long := newToken(t, hub.Enroll, enroll.TokenOptions{TTL: 100 * 24 * time.Hour})
	orphan := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: "ip.100.64.9.9", Labels: map[string]string{"skerry.dev/enroll": "ip"}},
		Type:       "skerry.dev/ip-claim", Data: map[string][]byte{"node": []byte("edge-7")},
	}
	if _, err := client.CoreV1().Secrets(namespace).Create(t.Context(), orphan, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	names := func() string {
		t.Helper()
		if err := enroll.Sweep(hub.Enroll, t.Context()); err != nil {
			t.Fatal(err)
		}
		list, err := client.CoreV1().Secrets(namespace).List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var all []string
		for _, s := range list.Items {
			all = append(all, strings.SplitN(s.Name, ".", 2)[0])
		}
		return fmt.Sprint(all)
	}
	if got, want := names(), "[ip ip join-token join-token node skerry-ca]"; got != want {
		t.Errorf("at first the namespace holds %s, want %s", got, want)
	}
	clock.advance(11 * time.Minute)
	if got, want := names(), "[ip join-token join-token node skerry-ca]"; got != want {
		t.Errorf("after claims ran out the namespace holds %s, want %s", got, want)
	}
	clock.advance(8 * 24 * time.Hour)
	if got, want := names(), "[ip join-token node skerry-ca]"; got != want {
		t.Errorf("after tokens ran out the namespace holds %s, want %s", got, want)
	}
	if info := tokenInfo(t, hub.Enroll, long); info.State(clock.now()) != "usable" {
		t.Errorf("the token that is left is %+v", info)
	}
}

func TestAuthorityIsMadeOnce(t *testing.T) {
	client := enrolltest.Client()
	var mu sync.Mutex
	pins := map[edgeapi.CAPin]bool{}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			e, err := enroll.New(context.Background(), enroll.Config{Client: client})
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			pins[edgeapi.PinOf(e.CACertificate())] = true
			mu.Unlock()
		})
	}
	wg.Wait()
	if len(pins) != 1 {
		t.Errorf("eight replicas made %d authorities", len(pins))
	}
}

// A hub must not make up another CA for nodes that trust the lost one.
func TestLostAuthority(t *testing.T) {
	client := enrolltest.Client()
	hub := replicas(t, client, 1, enroll.Config{})[0]
	if err := newEdge(hub, "edge-7").join(t, newToken(t, hub.Enroll, enroll.TokenOptions{})); err != nil {
		t.Fatal(err)
	}
	secrets := client.CoreV1().Secrets(namespace)
	if err := secrets.Delete(t.Context(), "skerry-ca", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	_, err := enroll.New(t.Context(), enroll.Config{Client: client})
	want := "enroll: Secret skerry-system/skerry-ca is gone but nodes have joined with it; restore it from a backup, or delete the Secrets labelled skerry.dev/enroll in namespace skerry-system to begin anew and join every node again"
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
	damaged := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "skerry-ca"}, Data: map[string][]byte{"tls.crt": []byte("x")}}
	if _, err := secrets.Create(t.Context(), damaged, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	_, err = enroll.New(t.Context(), enroll.Config{Client: client})
	want = "enroll: Secret skerry-system/skerry-ca holds the hub's CA but cannot be used: tls.crt is no PEM certificate; restore it from a backup"
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}
