package main

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/skerry-io/skerry/e2e/machine"
)

func TestMain(m *testing.M) {
	machine.Main()
	os.Exit(m.Run())
}

// The demo comes up, comes up again over itself, and leaves nothing.
func TestDemo(t *testing.T) {
	before, err := machine.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "demo")
	do := func(ctx context.Context, what string) error {
		return run(ctx, []string{"--dir", dir, "--bin", "../../bin", what})
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 2*time.Minute)
		defer cancel()
		if t.Failed() {
			for _, log := range []string{"hub/cloudhub.log", "machine/edgecore.log", "machine/disk/var/log/containerd.log"} {
				t.Logf("the end of %s:\n%s", log, tail(filepath.Join(dir, log)))
			}
		}
		if err := do(ctx, "down"); err != nil {
			t.Error(err)
		}
		left, err := machine.Leaks(ctx, before)
		if err != nil {
			t.Error(err)
		}
		for _, l := range left {
			t.Errorf("left behind: %s", l)
		}
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the demo's folder is still there: %v", err)
		}
		if err := do(ctx, "down"); err != nil {
			t.Errorf("taking down what is not there: %v", err)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	if err := do(ctx, "up"); err != nil {
		t.Fatal(err)
	}
	hub := hubOf(t, dir)
	if err := do(ctx, "up"); err != nil {
		t.Fatalf("the second time: %v", err)
	}
	if again := hubOf(t, dir); again != hub {
		t.Errorf("the second run has another hub: %+v; want %+v", again, hub)
	}
}

func hubOf(t *testing.T, dir string) state {
	t.Helper()
	st, err := loadState(filepath.Join(dir, "demo.json"))
	if err != nil || !st.hubRuns() {
		t.Fatalf("the hub does not run: %+v, %v", st, err)
	}
	return st
}
