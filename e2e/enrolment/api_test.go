// Package enrolment tests joining, renewing and revoking with both ends: the
// hub's registry, against a real API server too with the rights a
// hub has there, and edgecore's own client.
package enrolment

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/skerry-io/skerry/cloudhub/controlplane"
	"github.com/skerry-io/skerry/cloudhub/enroll"
	"github.com/skerry-io/skerry/cloudhub/enroll/enrolltest"
	"github.com/skerry-io/skerry/edgecore/identity"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// client acts as the hub does at the API server; TestMain sets it.
var client kubernetes.Interface

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError}))
	slog.SetDefault(log)
	controlplane.RedirectKlog(context.Background(), log)
	dir, err := os.MkdirTemp("", "skerry-enroll-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	plane, err := controlplane.New(controlplane.Config{
		DataDir: dir, Listen: "127.0.0.1:0", Log: log,
		DialNode: func(context.Context, string, string) (net.Conn, error) {
			return nil, errors.New("no node is connected")
		},
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- plane.Run(ctx) }()
	defer func() { cancel(); <-done }()
	select {
	case <-plane.Ready():
	case err := <-done:
		done <- err
		fmt.Fprintln(os.Stderr, "the control plane ended while starting:", err)
		return 1
	}
	conf := rest.CopyConfig(plane.HubClientConfig())
	conf.QPS = -1
	if client, err = kubernetes.NewForConfig(conf); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

func start(t *testing.T, cfg enroll.Config) *enrolltest.Hub {
	t.Helper()
	cfg.Client = client
	if cfg.JoinBurst == 0 {
		cfg.JoinBurst = 1000
	}
	return enrolltest.Start(t, cfg)
}

func token(t *testing.T, hub *enrolltest.Hub, opts enroll.TokenOptions) string {
	t.Helper()
	text, _, err := hub.Tokens().Create(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestLifeOfANode(t *testing.T) {
	lost := make(chan enroll.RevokeReason, 8)
	hubs := []*enrolltest.Hub{start(t, enroll.Config{}), start(t, enroll.Config{
		OnRevoked: func(rec enroll.NodeRecord, why enroll.RevokeReason) {
			if rec.Name == "life" {
				lost <- why
			}
		},
	})}
	if a, b := hubs[0].CACertificate(), hubs[1].CACertificate(); !a.Equal(b) {
		t.Fatal("two replicas have two authorities")
	}
	id, err := identity.Join(t.Context(), identity.JoinOptions{
		HubURL: hubs[0].URL, Token: token(t, hubs[0], enroll.TokenOptions{}), NodeName: "life", DataDir: t.TempDir(),
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, hub := range hubs {
		if got, err := whoAmI(hub, id); err != nil || got != "life" {
			t.Fatalf("the hub takes the node for %q, error %v", got, err)
		}
	}
	for range 3 {
		if err := id.Renew(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		if got, err := whoAmI(hubs[1], id); err != nil || got != "life" {
			t.Fatalf("after a renewal the hub takes the node for %q, error %v", got, err)
		}
	}
	if err := hubs[0].Forget(t.Context(), "life"); err != nil {
		t.Fatal(err)
	}
	select {
	case why := <-lost:
		if why != enroll.Forgotten {
			t.Errorf("the other replica hears %s", why)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the other replica does not hear that the node was forgotten")
	}
	if got, err := whoAmI(hubs[1], id); err == nil {
		t.Errorf("the forgotten node is taken for %q", got)
	}
}

func TestOneWinnerPerToken(t *testing.T) {
	hubs := []*enrolltest.Hub{start(t, enroll.Config{}), start(t, enroll.Config{})}
	for round := range 3 {
		text := token(t, hubs[0], enroll.TokenOptions{})
		var won atomic.Int32
		var wg sync.WaitGroup
		for i := range 10 {
			opts := identity.JoinOptions{HubURL: hubs[i%2].URL, Token: text, NodeName: fmt.Sprintf("racer-%d-%d", round, i), DataDir: t.TempDir()}
			wg.Go(func() {
				_, err := identity.Join(t.Context(), opts)
				var e *identity.Error
				switch {
				case err == nil:
					won.Add(1)
				case !errors.As(err, &e) || e.Reason != identity.Reason(edgeapi.JoinTokenUsed):
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if won.Load() != 1 {
			t.Fatalf("%d machines joined with one single-use token", won.Load())
		}
	}
}

func TestOneWinnerPerName(t *testing.T) {
	hubs := []*enrolltest.Hub{start(t, enroll.Config{}), start(t, enroll.Config{})}
	var won atomic.Int32
	var wg sync.WaitGroup
	for i := range 10 {
		opts := identity.JoinOptions{HubURL: hubs[i%2].URL, Token: token(t, hubs[0], enroll.TokenOptions{}), NodeName: "same", DataDir: t.TempDir()}
		wg.Go(func() {
			_, err := identity.Join(t.Context(), opts)
			var e *identity.Error
			switch {
			case err == nil:
				won.Add(1)
			case !errors.As(err, &e) || e.Reason != identity.Reason(edgeapi.JoinNameInUse):
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 {
		t.Fatalf("%d machines have one name", won.Load())
	}
}

func TestManyJoinWithOneToken(t *testing.T) {
	const nodes = 60
	hubs := []*enrolltest.Hub{start(t, enroll.Config{}), start(t, enroll.Config{})}
	for name, uses := range map[string]int{"unlimited": enroll.Unlimited, "counted": nodes} {
		text := token(t, hubs[0], enroll.TokenOptions{Uses: uses})
		began := time.Now()
		var wg sync.WaitGroup
		ips := make([]string, nodes)
		for i := range nodes {
			opts := identity.JoinOptions{HubURL: hubs[i%2].URL, Token: text, NodeName: fmt.Sprintf("%s-%d", name, i), DataDir: t.TempDir()}
			wg.Go(func() {
				id, err := identity.Join(t.Context(), opts)
				if err != nil {
					t.Error(err)
					return
				}
				ips[i] = id.VirtualIP()
			})
		}
		wg.Wait()
		t.Logf("%d joins with one %s token at two replicas took %s", nodes, name, time.Since(began).Round(time.Millisecond))
		seen := map[string]bool{}
		for _, ip := range ips {
			if seen[ip] {
				t.Errorf("%s was given out twice", ip)
			}
			seen[ip] = true
		}
	}
}
