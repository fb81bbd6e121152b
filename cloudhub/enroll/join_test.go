package enroll_test

import (
	"bytes"
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
	if want := "the cluster has a Node worker-1 that is not on this hub's record; choose another name, take it over with --replace and a token from cloudhub token create --allow-replace, or delete it with: kubectl delete node worker-1"; err.Error() != want {
		t.Errorf("got  %s\nwant %s", err, want)
	}
	req := e.request(t, newToken(t, hub.Enroll, enroll.TokenOptions{AllowReplace: true}))
	req.Replace = true
	if err := e.send(req); err != nil {
		t.Fatal(err)
	}
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
