package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/skerry-io/skerry/e2e/cluster"
	"github.com/skerry-io/skerry/e2e/machine"
)

// TestADamagedStoreWithoutACloud starts edgecore on what a bad disk has left of
// its store, with nobody to ask and containers that run.
func TestADamagedStoreWithoutACloud(t *testing.T) {
	n := world.nodes[0]
	ns := apply(t, web, asPod("other", n.Name()))
	ready(t, ns, "web")
	ready(t, ns, "other")
	eye := inspect(t, n)
	ran := mustRun(t, eye, ns)
	restoreLink := cut(t, n, machine.LinkDown)
	if err := n.KillEdgecore(t.Context()); err != nil {
		t.Fatal(err)
	}
	db := n.Disk(filepath.Join(cluster.EdgeDataDir, "store.db"))
	whole, err := os.ReadFile(db)
	if err != nil {
		t.Fatal(err)
	}
	var good []byte // maybe there is no copy yet
	if good, err = os.ReadFile(db + ".good"); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	put := func(db2, good2 []byte) {
		t.Helper()
		for path, b := range map[string][]byte{db: db2, db + ".good": good2} {
			err := os.Remove(path)
			if b != nil {
				err = os.WriteFile(path, b, 0o600)
			}
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
		}
	}
	running := true
	t.Cleanup(func() {
		if !running {
			put(whole, good)
			if err := n.Run(context.Background()); err != nil {
				t.Error(err)
			}
		}
	})

	running = false
	// Nothing is left but containers: an empty start would end them.
	put(nil, nil)
	if err := n.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	select {
	case <-n.EdgecoreEnded():
	case <-time.After(30 * time.Second):
		t.Fatal("edgecore runs on without its store")
	}
	if log, err := os.ReadFile(n.LogPath()); err != nil || !strings.Contains(string(log[max(0, len(log)-2000):]), "store.db") {
		t.Errorf("the log's end does not name the store: %v", err)
	}
	if now := mustRun(t, eye, ns); !sameContainers(ran, now) {
		t.Errorf("containers changed with a store that is gone:\n%v\n%v", ran, now)
	}

	// A torn file beside a good copy mends itself.
	put(whole[:8192], whole) // what follows the meta pages is lost
	if err := n.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	running = true
	eventually(t, 30*time.Second, "the mended store", func(ctx context.Context) (bool, string) {
		st, err := n.StatusBySocket(ctx)
		return err == nil && !st.Connected && st.StoreMended != nil && st.StoreMended.Pods >= len(ran), fmt.Sprintf("%+v %v", st, err)
	})
	crashed(t, n, ns, "web")
	if now := mustRun(t, eye, ns); now["other"] != ran["other"] {
		t.Errorf("a container changed with a store that was mended: %+v, before %+v", now["other"], ran["other"])
	}
	restoreLink()
	if p := ready(t, ns, "web"); p.Status.ContainerStatuses[0].RestartCount != 1 {
		t.Errorf("web: %s", podIdentity(p))
	}
	if now := mustRun(t, eye, ns); now["other"] != ran["other"] {
		t.Errorf("a container changed with the cloud's return: %+v, before %+v", now["other"], ran["other"])
	}
}

// crashed kills a pod's container and waits for the kubelet to start it again.
func crashed(t *testing.T, n *cluster.Node, ns, name string) {
	t.Helper()
	eye := inspect(t, n)
	c := mustRun(t, eye, ns)[name]
	if _, err := n.Machine.Run(t.Context(), "ctr", "-n", "k8s.io", "tasks", "kill", "-s", "SIGKILL", c.id); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, name+" to be started again", func(ctx context.Context) (bool, string) {
		now, err := eye.running(ctx, ns)
		return err == nil && now[name].restarts == c.restarts+1, fmt.Sprint(now, err)
	})
}

// TestADiskThatTakesNoWrites has edgecore's data on a small disk of its own,
// which fills up and then goes bad, as flash does: the kernel lets nobody write
// to it any more. The node is offline meanwhile.
func TestADiskThatTakesNoWrites(t *testing.T) {
	n := world.nodes[1]
	ns := namespace(t)
	check := untouched(t, n, ns, "untouched")
	applyIn(t, ns, asPod("crashes", n.Name()))
	ready(t, ns, "crashes")
	onSmallDisk(t, n)
	connected(t, n)
	restoreLink := cutUntilSeen(t, n)

	filler := filepath.Join(cluster.EdgeDataDir, "filler")
	if out, err := n.Machine.Run(t.Context(), "dd", "if=/dev/zero", "of="+filler, "bs=64k"); err == nil || !strings.Contains(string(out), "No space left") {
		t.Fatalf("the disk did not fill up: %v %s", err, out)
	}
	stop := observe(t, n)
	crashed(t, n, ns, "crashes")
	stop()
	if _, err := n.Machine.Run(t.Context(), "rm", filler); err != nil {
		t.Fatal(err)
	}
	writable(t, n, true)

	// What an ext4 does with an error, asked for.
	if _, err := n.Machine.Run(t.Context(), "mount", "-o", "remount,abort", cluster.EdgeDataDir); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Machine.Run(t.Context(), "touch", filler); err == nil {
		t.Fatal("the disk takes writes")
	}
	stop = observe(t, n)
	crashed(t, n, ns, "crashes")
	writable(t, n, false)
	restoreLink() // with a disk that takes nothing it is in step with nobody, and goes on
	timer := time.NewTimer(10 * time.Second)
	defer timer.Stop()
	<-timer.C
	stop()
	check()
	remount(t, n) // a repair
	connected(t, n)
	writable(t, n, true)
	awaitPod(t, ns, "crashes", time.Minute, "to have restarted twice", func(p *corev1.Pod) bool {
		return isReady(p) && p.Status.ContainerStatuses[0].RestartCount == 2
	})
	check()
}

// writable waits for edgecore to tell that its disk takes writes, or does not.
func writable(t *testing.T, n *cluster.Node, want bool) {
	t.Helper()
	eventually(t, 75*time.Second, fmt.Sprintf("%s to tell that its disk takes writes: %t", n.Name(), want), func(ctx context.Context) (bool, string) {
		st, err := n.StatusBySocket(ctx)
		return err == nil && (st.StoreTrouble == nil) == want, fmt.Sprintf("%+v %v", st.StoreTrouble, err)
	})
}

const (
	smallDisk  = "/var/lib/e2e-disk.img"
	smallPlace = "/mnt/e2e-disk"
)

// onSmallDisk moves edgecore's data to a disk of 24 MiB, until the test ends.
func onSmallDisk(t *testing.T, n *cluster.Node) {
	t.Helper()
	if err := n.StopEdgecore(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"truncate", "-s", "24M", smallDisk},
		{"mkfs.ext4", "-q", smallDisk},
		{"mkdir", "-p", smallPlace},
		{"mount", "-o", "loop", smallDisk, smallPlace},
		{"cp", "-a", cluster.EdgeDataDir + "/.", smallPlace},
		{"umount", smallPlace},
		{"mount", "-o", "loop", smallDisk, cluster.EdgeDataDir},
	} {
		if _, err := n.Machine.Run(t.Context(), args...); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		ctx := context.Background()
		select {
		case <-n.EdgecoreEnded():
		default:
			if err := n.StopEdgecore(ctx); err != nil {
				t.Error(err)
			}
		}
		// The node goes on with what is on the small disk.
		for _, args := range [][]string{
			{"umount", cluster.EdgeDataDir},
			{"mount", "-o", "loop", smallDisk, smallPlace},
			{"cp", "-a", smallPlace + "/.", cluster.EdgeDataDir},
			{"umount", smallPlace},
			{"rm", smallDisk},
		} {
			if _, err := n.Machine.Run(ctx, args...); err != nil {
				t.Error(err)
			}
		}
		if err := n.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	if err := n.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// remount mounts the small disk anew, and starts edgecore again.
func remount(t *testing.T, n *cluster.Node) {
	t.Helper()
	if err := n.StopEdgecore(t.Context()); err != nil {
		t.Logf("edgecore with a disk that takes no writes ended with: %v", err)
	}
	for _, args := range [][]string{
		{"umount", cluster.EdgeDataDir},
		{"mount", "-o", "loop", smallDisk, cluster.EdgeDataDir},
	} {
		if _, err := n.Machine.Run(t.Context(), args...); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
}
