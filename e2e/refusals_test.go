package e2e

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/e2e/cluster"
)

// refused runs a program of the host that must fail by itself.
func refused(t *testing.T, program string, args ...string) cluster.Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var stdout, stderr strings.Builder
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if ctx.Err() != nil {
		t.Fatalf("%s %v did not end:\n%s", program, args, stderr.String())
	}
	res := cluster.Result{Stdout: stdout.String(), Stderr: stderr.String()}
	if err != nil {
		res.Code = cmd.ProcessState.ExitCode()
	}
	return res
}

func TestTheHubRefusesToStart(t *testing.T) {
	hub := world.programs.Cloudhub
	dir := t.TempDir()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	port := taken.Addr().String()

	t.Run("port of nodes in use", func(t *testing.T) {
		says(t, refused(t, hub, "standalone", "--data-dir", dir, "--listen", port, "--apiserver-listen", "127.0.0.1:0"),
			port, "address already in use", "--listen")
	})
	t.Run("port of the API server in use", func(t *testing.T) {
		says(t, refused(t, hub, "standalone", "--data-dir", dir, "--listen", "127.0.0.1:0", "--apiserver-listen", port),
			port, "in use")
	})
	t.Run("data directory of a running hub", func(t *testing.T) {
		says(t, refused(t, hub, "standalone", "--data-dir", world.hub.DataDir(), "--listen", "127.0.0.1:0", "--apiserver-listen", "127.0.0.1:0"),
			world.hub.DataDir(), "in use")
	})
	t.Run("data directory cannot be made", func(t *testing.T) {
		file := filepath.Join(dir, "file")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		says(t, refused(t, hub, "standalone", "--data-dir", filepath.Join(file, "data"), "--listen", "127.0.0.1:0"), file)
	})
	t.Run("unknown key", func(t *testing.T) {
		file := filepath.Join(dir, "config.yaml")
		if err := os.WriteFile(file, []byte("apiVersion: cloudhub.skerry.dev/v1alpha1\nkind: Config\nlisten: :1\nlisten_port: 2\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		says(t, refused(t, hub, "standalone", "--config", file), file, `unknown field "listen_port"`)
	})
	t.Run("unknown version", func(t *testing.T) {
		file := filepath.Join(dir, "old.yaml")
		if err := os.WriteFile(file, []byte("apiVersion: v0\nkind: Config\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		says(t, refused(t, hub, "standalone", "--config", file), file, "cloudhub.skerry.dev/v1alpha1")
	})
	t.Run("administration without access", func(t *testing.T) {
		says(t, refused(t, hub, "token", "create", "--data-dir", filepath.Join(dir, "nowhere")), "admin.kubeconfig", "--kubeconfig")
	})
}

// edgecoreEnds starts edgecore, which must end by itself, and returns what it
// said last.
func edgecoreEnds(t *testing.T, n *cluster.Node) cluster.Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	res, err := n.Edgecore(ctx, "run")
	if err != nil {
		t.Fatalf("edgecore run: %v\n%s", err, res.Stderr)
	}
	lines := strings.Split(strings.TrimSpace(res.Stderr), "\n")
	res.Stderr = lines[len(lines)-1]
	return res
}

func TestEdgecoreRefusesToStart(t *testing.T) {
	n := bareNode(t, "edge-7")
	t.Run("not joined", func(t *testing.T) {
		says(t, edgecoreEnds(t, n), "has not joined", "edgecore join")
	})
	if res := join(t, n, hubURL(), "--token", token(t), "--node-name", "edge-7"); res.Code != 0 {
		t.Fatalf("join: %s", res.Stderr)
	}
	defer func() {
		if res, err := world.hub.Cloudhub(context.Background(), "node", "forget", "edge-7"); err != nil || res.Code != 0 {
			t.Errorf("forget: %v %s", err, res.Stderr)
		}
	}()
	t.Run("unknown key", func(t *testing.T) {
		if err := n.WriteConfig(map[string]any{"hubb": "x"}); err != nil {
			t.Fatal(err)
		}
		says(t, edgecoreEnds(t, n), "config.yaml", `unknown field "hubb"`)
	})
	t.Run("unknown key of the kubelet", func(t *testing.T) {
		if err := n.WriteConfig(map[string]any{"kubelet": map[string]any{"config": map[string]any{"maxPodz": 1}}}); err != nil {
			t.Fatal(err)
		}
		says(t, edgecoreEnds(t, n), "maxPodz")
	})
	t.Run("metrics on an open address", func(t *testing.T) {
		if err := n.WriteConfig(map[string]any{"metrics": map[string]any{"listen": "0.0.0.0:10270"}}); err != nil {
			t.Fatal(err)
		}
		says(t, edgecoreEnds(t, n), "metrics.listen", "loopback")
	})
	if err := n.WriteConfig(nil); err != nil {
		t.Fatal(err)
	}
	t.Run("containerd missing", func(t *testing.T) {
		res, err := n.Edgecore(t.Context(), "check")
		if err != nil {
			t.Fatal(err)
		}
		if res.Code == 0 || !strings.Contains(res.Stdout, "containerd.sock") || !strings.Contains(res.Stdout, "containerd") {
			t.Errorf("check: exit %d\n%s%s", res.Code, res.Stdout, res.Stderr)
		}
		t.Logf("%s", res.Stdout)
	})

	// A store that holds a pod, then damaged in each way a disk does it.
	ns := apply(t, asPod("kept", "edge-7"))
	defer kubectl(t, "delete", "pod", "-n", ns, "kept", "--force", "--ignore-not-found")
	if err := n.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "the first sync", func(ctx context.Context) (bool, string) {
		st, err := n.Status(ctx)
		return err == nil && st.Synced && st.Objects["pods"] == 1, fmt.Sprintf("%+v %v", st, err)
	})
	t.Run("second edgecore", func(t *testing.T) {
		says(t, edgecoreEnds(t, n), "store.db", "in use by another edgecore")
	})
	if err := n.StopEdgecore(t.Context()); err != nil {
		t.Fatal(err)
	}
	db := n.Disk(cluster.EdgeDataDir + "/store.db")
	whole, err := os.ReadFile(db)
	if err != nil {
		t.Fatal(err)
	}
	for name, damage := range map[string]func() error{
		"store torn":    func() error { return os.Truncate(db, 8192) },
		"store zeroed":  func() error { return os.WriteFile(db, make([]byte, len(whole)), 0o600) },
		"store emptied": func() error { return os.Truncate(db, 0) },
		"store missing": func() error { return os.Remove(db) },
		"store garbled": func() error {
			b := append([]byte(nil), whole...)
			for i := 8192; i < len(b); i += 37 {
				b[i] ^= 0x5a
			}
			return os.WriteFile(db, b, 0o600)
		},
		"key missing": func() error {
			return os.Rename(n.Disk(cluster.EdgeDataDir+"/store.key"), n.Disk(cluster.EdgeDataDir+"/key.away"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(db, whole, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := damage(); err != nil {
				t.Fatal(err)
			}
			says(t, edgecoreEnds(t, n), "store", "edgecore reset")
			if name == "key missing" {
				if err := os.Rename(n.Disk(cluster.EdgeDataDir+"/key.away"), n.Disk(cluster.EdgeDataDir+"/store.key")); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
	// Beside a good copy the same damage mends itself, and is told.
	mends := 0
	for name, damage := range map[string]func() error{
		"torn":    func() error { return os.Truncate(db, 8192) },
		"missing": func() error { return os.Remove(db) },
		"one byte of the newest meta page": func() error {
			b := append([]byte(nil), whole...)
			newest := 0
			if txid(b, 4096) > txid(b, 0) {
				newest = 4096
			}
			b[newest+20] ^= 0xff
			return os.WriteFile(db, b, 0o600)
		},
	} {
		t.Run("mended: "+name, func(t *testing.T) {
			if err := os.WriteFile(db, whole, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(db+".good", whole, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := damage(); err != nil {
				t.Fatal(err)
			}
			if err := n.Run(t.Context()); err != nil {
				t.Fatal(err)
			}
			mends++
			defer func() { // the next case is not to fail for this one's sake
				if err := n.StopEdgecore(context.WithoutCancel(t.Context())); err != nil {
					t.Error(err)
				}
				if err := os.Remove(db + ".good"); err != nil {
					t.Error(err)
				}
			}()
			eventually(t, 20*time.Second, "the mended store in step", func(ctx context.Context) (bool, string) {
				st, err := n.Status(ctx)
				return err == nil && st.Connected && st.Objects["pods"] == 1 && st.StoreMended != nil && st.StoreMended.Pods == 1, fmt.Sprintf("%+v %v", st, err)
			})
			eventually(t, 20*time.Second, "an Event of the Node in the cloud", func(ctx context.Context) (bool, string) {
				// Other nodes' stores are damaged by other tests.
				list, err := world.client.CoreV1().Events("default").List(ctx, metav1.ListOptions{FieldSelector: "reason=StoreMended,involvedObject.name=edge-7"})
				return err == nil && len(list.Items) >= mends && strings.Contains(list.Items[0].Message, "1 pods"), fmt.Sprintf("%+v %v", list, err)
			})
		})
	}
	if whole, err = os.ReadFile(db); err != nil {
		t.Fatal(err)
	}
	t.Run("a copy put back", func(t *testing.T) {
		if err := os.WriteFile(n.Disk(cluster.EdgeDataDir+"/copy.db"), whole, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(db, 0); err != nil {
			t.Fatal(err)
		}
		if res, err := n.Edgecore(t.Context(), "reset", "--restore", cluster.EdgeDataDir+"/copy.db"); err != nil || res.Code != 0 {
			t.Fatalf("restore: %v %s", err, res.Stderr)
		}
		if err := n.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
		eventually(t, 20*time.Second, "the stored pod", func(ctx context.Context) (bool, string) {
			st, err := n.Status(ctx)
			return err == nil && st.Synced && st.Objects["pods"] == 1, fmt.Sprintf("%+v %v", st, err)
		})
		if err := n.StopEdgecore(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("the way out", func(t *testing.T) {
		if res, err := n.Edgecore(t.Context(), "reset", "--keep-identity"); err != nil || res.Code != 0 {
			t.Fatalf("reset: %v %s", err, res.Stderr)
		}
		if err := n.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
		eventually(t, 20*time.Second, "a new first sync", func(ctx context.Context) (bool, string) {
			st, err := n.Status(ctx)
			return err == nil && st.Synced, fmt.Sprintf("%+v %v", st, err)
		})
		if err := n.StopEdgecore(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("data directory read-only", func(t *testing.T) {
		if out, err := n.Machine.Run(t.Context(), "mount", "--bind", cluster.EdgeDataDir, cluster.EdgeDataDir); err != nil {
			t.Fatalf("%v %s", err, out)
		}
		if out, err := n.Machine.Run(t.Context(), "mount", "-o", "remount,ro,bind", cluster.EdgeDataDir); err != nil {
			t.Fatalf("%v %s", err, out)
		}
		says(t, edgecoreEnds(t, n), "read-only")
	})
}

// txid is the transaction of the bbolt meta page at an offset.
func txid(db []byte, at int) uint64 { return binary.LittleEndian.Uint64(db[at+16+48:]) }
