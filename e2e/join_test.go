package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/skerry-io/skerry/e2e/cluster"
)

// bareNode is a machine without containerd: enough to join, or to see why not.
func bareNode(t *testing.T, name string) *cluster.Node {
	t.Helper()
	n, err := cluster.NewNode(cluster.NodeConfig{
		Dir: filepath.Join(t.TempDir(), name), Name: name, Programs: world.programs, Bare: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Destroy(context.Background()); err != nil {
			t.Error(err)
		}
	})
	if err := n.Boot(t.Context()); err != nil {
		t.Fatal(err)
	}
	return n
}

func token(t *testing.T, args ...string) string {
	t.Helper()
	tok, err := world.hub.Token(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

// hubURL reaches the hub under an address in its certificate: the first node's
// link, which every machine has a route to.
func hubURL() string { return "https://" + world.nodes[0].HostIP() + ":" + world.hub.Port() }

// join runs edgecore join and returns what it did.
func join(t *testing.T, n *cluster.Node, args ...string) cluster.Result {
	t.Helper()
	res, err := n.Edgecore(t.Context(), append([]string{"join"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// says wants a failure that contains all the texts, in one message.
func says(t *testing.T, res cluster.Result, texts ...string) {
	t.Helper()
	if res.Code == 0 {
		t.Fatalf("succeeded: %s%s", res.Stdout, res.Stderr)
	}
	for _, text := range texts {
		if !strings.Contains(res.Stderr, text) {
			t.Errorf("message lacks %q:\n%s", text, res.Stderr)
		}
	}
	t.Logf("%s", strings.TrimSpace(res.Stderr))
}

func TestJoinTellsWhatIsWrong(t *testing.T) {
	n := bareNode(t, "edge-3")
	good := token(t, "--node-name", "edge-3")

	t.Run("wrong secret", func(t *testing.T) {
		parts := strings.Split(good, ".")
		parts[2] = strings.Repeat("a", len(parts[2]))
		says(t, join(t, n, hubURL(), "--token", strings.Join(parts, ".")), "token")
	})
	t.Run("not a token", func(t *testing.T) {
		says(t, join(t, n, hubURL(), "--token", "hello"), "token", "cloudhub token create")
	})
	t.Run("no token", func(t *testing.T) { says(t, join(t, n, hubURL()), "--token") })
	t.Run("another hub's CA", func(t *testing.T) {
		parts := strings.Split(good, ".")
		parts[3] = strings.Repeat("A", len(parts[3]))
		says(t, join(t, n, hubURL(), "--token", strings.Join(parts, ".")), "CA")
	})
	t.Run("nobody listens", func(t *testing.T) {
		says(t, join(t, n, "https://"+n.HostIP()+":1", "--token", good), ":1", "refused")
	})
	t.Run("no such host", func(t *testing.T) {
		says(t, join(t, n, "https://hub.invalid:10443", "--token", good), "hub.invalid")
	})
	t.Run("another node's token", func(t *testing.T) {
		says(t, join(t, n, hubURL(), "--token", good, "--node-name", "edge-4"), "edge-3")
	})
	t.Run("expired", func(t *testing.T) {
		short := token(t, "--ttl", "1s")
		eventually(t, 10*time.Second, "the token to expire", func(ctx context.Context) (bool, string) {
			res, err := world.hub.Cloudhub(ctx, "token", "list")
			return err == nil && strings.Contains(res.Stdout, strings.Split(short, ".")[1]+"   expired"), res.Stdout
		})
		says(t, join(t, n, hubURL(), "--token", short), "expired", "cloudhub token create")
	})
	t.Run("revoked", func(t *testing.T) {
		gone := token(t)
		res, err := world.hub.Cloudhub(t.Context(), "token", "revoke", strings.Split(gone, ".")[1])
		if err != nil || res.Code != 0 {
			t.Fatalf("revoke: %v %s", err, res.Stderr)
		}
		says(t, join(t, n, hubURL(), "--token", gone), "revoked", "cloudhub token create")
	})
	t.Run("name in use", func(t *testing.T) {
		says(t, join(t, n, hubURL(), "--token", token(t), "--node-name", "edge-1"), "edge-1", "--replace")
	})
	t.Run("token may not replace", func(t *testing.T) {
		says(t, join(t, n, hubURL(), "--token", token(t), "--node-name", "edge-1", "--replace"), "replace")
	})
	// Nothing so far has made this machine a node or burnt the good token.
	if res := join(t, n, hubURL(), "--token", good, "--node-name", "edge-3"); res.Code != 0 {
		t.Fatalf("join: %s", res.Stderr)
	}
	t.Run("joined already", func(t *testing.T) {
		says(t, join(t, n, hubURL(), "--token", token(t), "--node-name", "edge-3"), "edge-3")
	})
	t.Run("used", func(t *testing.T) {
		other := bareNode(t, "edge-5")
		says(t, join(t, other, hubURL(), "--token", good, "--node-name", "edge-3"), "used")
	})
	res, err := world.hub.Cloudhub(t.Context(), "node", "forget", "edge-3")
	if err != nil || res.Code != 0 {
		t.Fatalf("forget: %v %s", err, res.Stderr)
	}
}

// TestTheNewestIdentityWins replaces a node's machine, and then forgets the
// node: the old machine and the forgotten one are cut and told why.
func TestTheNewestIdentityWins(t *testing.T) {
	first, second := bareNode(t, "edge-6"), bareNode(t, "edge-6b")
	if res := join(t, first, hubURL(), "--token", token(t), "--node-name", "edge-6"); res.Code != 0 {
		t.Fatalf("join: %s", res.Stderr)
	}
	tunnelUp := func(n *cluster.Node) {
		if err := n.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
		eventually(t, 20*time.Second, "a tunnel", func(ctx context.Context) (bool, string) {
			st, err := n.Status(ctx)
			return err == nil && st.Connected, fmt.Sprintf("%+v %v", st, err)
		})
	}
	cut := func(n *cluster.Node) {
		eventually(t, 20*time.Second, "the tunnel's end", func(ctx context.Context) (bool, string) {
			st, err := n.Status(ctx)
			return err == nil && !st.Connected && strings.Contains(st.LastError, "enrolment"), fmt.Sprintf("%+v %v", st, err)
		})
	}
	tunnelUp(first)
	if res := join(t, second, hubURL(), "--token", token(t, "--allow-replace"), "--node-name", "edge-6", "--replace"); res.Code != 0 {
		t.Fatalf("join --replace: %s", res.Stderr)
	}
	cut(first)
	tunnelUp(second)
	var nodes []struct{ Name, VirtualIP string }
	res, err := world.hub.Cloudhub(t.Context(), "node", "list", "-o", "json")
	if err != nil || json.Unmarshal([]byte(res.Stdout), &nodes) != nil || len(nodes) != 3 {
		t.Errorf("node list: %v %s %s", err, res.Stdout, res.Stderr)
	}
	if res, err := world.hub.Cloudhub(t.Context(), "node", "forget", "edge-6"); err != nil || res.Code != 0 {
		t.Fatalf("forget: %v %s", err, res.Stderr)
	}
	cut(second)
}
