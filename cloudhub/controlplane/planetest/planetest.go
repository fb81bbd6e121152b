// Package planetest starts a real control plane for the tests of the packages
// that work with one. It is imported by tests only.
package planetest

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/skerry-io/skerry/cloudhub/controlplane"
)

// Main is for TestMain: it quiets the Kubernetes libraries, which would bury
// a test's own output. SKERRY_TEST_LOG=debug shows everything.
func Main(m *testing.M) int {
	controlplane.RedirectKlog(context.Background(), Log())
	return m.Run()
}

// Log is the log of a test run.
func Log() *slog.Logger {
	level := slog.LevelError
	if os.Getenv("SKERRY_TEST_LOG") != "" {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
}

// Plane is a running plane.
type Plane struct {
	*controlplane.Plane
	Admin  *rest.Config
	Client kubernetes.Interface // as administrator
}

// Start fills in what cfg leaves out, starts the plane and returns once it and
// the default service account are there. configure, if not nil, is called with
// the plane before it runs. The plane stops when the test ends.
func Start(t testing.TB, cfg controlplane.Config, configure func(*controlplane.Plane)) *Plane {
	t.Helper()
	if cfg.DataDir == "" {
		cfg.DataDir = t.TempDir()
	}
	if cfg.Listen == "" {
		cfg.Listen = "127.0.0.1:0"
	}
	if cfg.DialNode == nil {
		cfg.DialNode = func(context.Context, string, string) (net.Conn, error) {
			return nil, errors.New("no node is connected")
		}
	}
	if cfg.Log == nil {
		cfg.Log = Log()
	}
	plane, err := controlplane.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if configure != nil {
		configure(plane)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- plane.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the control plane's end: %v", err)
		}
	})
	select {
	case <-plane.Ready():
	case err := <-done:
		done <- nil
		t.Fatalf("the control plane did not start: %v", err)
	}
	p := &Plane{Plane: plane}
	if p.Admin, err = clientcmd.BuildConfigFromFlags("", plane.AdminKubeconfigPath()); err != nil {
		t.Fatal(err)
	}
	p.Admin.QPS = -1
	if p.Client, err = kubernetes.NewForConfig(p.Admin); err != nil {
		t.Fatal(err)
	}
	Await(t, "the default service account", func() error {
		_, err := p.Client.CoreV1().ServiceAccounts("default").Get(ctx, "default", metav1.GetOptions{})
		return err
	})
	return p
}

// Await tries every 20 ms until f succeeds, for at most 30 s.
func Await(t testing.TB, what string, f func() error) {
	t.Helper()
	deadline := time.NewTimer(30 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("waiting for %s: %v", what, err)
		}
	}
}
