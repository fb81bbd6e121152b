package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/skerry-io/skerry/e2e/cluster"
	"github.com/skerry-io/skerry/e2e/machine"
)

// TestANodeAwayForLongerThanItsCertificate comes back without a visit. Its hub
// is its own, whose certificates live a minute.
func TestANodeAwayForLongerThanItsCertificate(t *testing.T) {
	t.Parallel()
	n := bareNode(t, "edge-8")
	hub, err := cluster.NewHub(cluster.HubConfig{
		Dir: filepath.Join(t.TempDir(), "hub"), Programs: world.programs, Names: []string{n.HostIP()}, Args: []string{"--cert-lifetime", "1m"},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if err := hub.Start(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := hub.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	if err := n.Join(t.Context(), hub); err != nil {
		t.Fatal(err)
	}
	if err := n.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	state := func(what string, within time.Duration, cond func(cluster.Status) bool) (st cluster.Status) {
		t.Helper()
		eventually(t, within, what, func(ctx context.Context) (bool, string) {
			var err error
			st, err = n.Status(ctx)
			return err == nil && cond(st), fmt.Sprintf("%+v %v", st, err)
		})
		return st
	}
	first := state("a tunnel", time.Minute, func(st cluster.Status) bool { return st.Connected && st.Synced }).CertificateEnds
	if left := time.Until(first); left > time.Minute || left < 0 {
		t.Fatalf("the certificate ends in %v", left)
	}
	last := state("a renewal in time", time.Minute, func(st cluster.Status) bool {
		return st.Connected && st.CertificateEnds.After(first)
	}).CertificateEnds

	if err := n.CutLink(t.Context(), machine.LinkDown); err != nil {
		t.Fatal(err)
	}
	state("the cut", time.Minute, func(st cluster.Status) bool { return !st.Connected })
	eventually(t, 2*time.Minute, "the certificate's end", func(ctx context.Context) (bool, string) {
		st, err := n.Status(ctx)
		last = st.CertificateEnds // it may have been renewed once more before the cut
		return err == nil && time.Since(last) > 2*time.Second, fmt.Sprintf("%+v %v", st, err)
	})
	if err := n.RestoreLink(t.Context()); err != nil {
		t.Fatal(err)
	}
	back := time.Now()
	state("the node to be back with a new certificate", time.Minute, func(st cluster.Status) bool {
		return st.Connected && st.CertificateEnds.After(last)
	})
	t.Logf("back %.1f s after the link, with a certificate that had ended %.0f s before", time.Since(back).Seconds(), back.Sub(last).Seconds())
	var nodes []struct {
		NotAfter time.Time `json:"notAfter"`
	}
	res, err := hub.Cloudhub(t.Context(), "node", "list", "-o", "json")
	if err != nil || json.Unmarshal([]byte(res.Stdout), &nodes) != nil || len(nodes) != 1 || !nodes[0].NotAfter.After(last) {
		t.Errorf("node list: %v %s%s", err, res.Stdout, res.Stderr)
	}
}
