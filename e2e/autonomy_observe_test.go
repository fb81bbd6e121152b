package e2e

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/e2e/cluster"
)

// backoffStep is the longest pause between two attempts to reach the hub, and
// what an attempt may take on a machine that is busy with other tests.
const backoffStep = 30*time.Second + 5*time.Second

// maxWaiting is more than the few pods of a scenario have to tell at any time:
// an outbox that holds one entry for each object stays far below.
const maxWaiting = 200

// observe watches an edgecore in trouble. The function it returns ends that and
// fails the test when edgecore was busy with its trouble, or piled things up.
func observe(t *testing.T, n *cluster.Node) (stop func()) {
	t.Helper()
	pid, err := n.EdgecoreHostPID()
	if err != nil {
		t.Fatal(err)
	}
	began, before := time.Now(), cpuTime(t, pid)
	ctx, cancel := context.WithCancel(t.Context())
	deepest := 0
	var looking sync.WaitGroup
	looking.Go(func() {
		tick := time.NewTicker(500 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
			if st, err := n.StatusBySocket(ctx); err == nil {
				deepest = max(deepest, st.Outbox)
			}
		}
	})
	return func() {
		t.Helper()
		cancel()
		looking.Wait()
		took, used := time.Since(began), cpuTime(t, pid)-before
		share := used.Seconds() / took.Seconds()
		t.Logf("%s used %.0f %% of a core over %.0f s; at most %d changes waited", n.Name(), share*100, took.Seconds(), deepest)
		if share > 0.5 {
			t.Errorf("edgecore of %s used %.0f %% of a core for %s: it is busy with its trouble", n.Name(), share*100, took)
		}
		if deepest > maxWaiting {
			t.Errorf("%s had %d changes to send", n.Name(), deepest)
		}
	}
}

// cpuTime a process of the host has used.
func cpuTime(t testing.TB, pid int) time.Duration {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	user, uerr := strconv.ParseInt(f[11], 10, 64)
	system, serr := strconv.ParseInt(f[12], 10, 64)
	if uerr != nil || serr != nil {
		t.Fatal(uerr, serr)
	}
	return time.Duration(user+system) * 10 * time.Millisecond // USER_HZ is 100
}

// backInSync waits for the node to hear of a change made after since, and for
// the cloud to have heard all from it. It must not take longer than one step of
// the backoff.
func backInSync(t *testing.T, n *cluster.Node, since time.Time) {
	t.Helper()
	_, err := world.client.CoreV1().Nodes().Patch(t.Context(), n.Name(), types.MergePatchType,
		fmt.Appendf(nil, `{"metadata":{"annotations":{"e2e/changed":%q}}}`, time.Now()), metav1.PatchOptions{})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, backoffStep, n.Name()+" to be in step with the cloud again", func(ctx context.Context) (bool, string) {
		st, err := n.StatusBySocket(ctx)
		return err == nil && st.Connected && st.Synced && st.LastSync.After(since) && st.Outbox == 0, fmt.Sprintf("%+v %v", st, err)
	})
	t.Logf("%s was in step, all told, %.1f s after its trouble's end (load %s)", n.Name(), time.Since(since).Seconds(), load(t))
}
