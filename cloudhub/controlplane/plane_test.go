package controlplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// TestMain is also the child of the tests that need a process of their own.
func TestMain(m *testing.M) {
	level := slog.LevelError
	if os.Getenv("SKERRY_TEST_LOG") != "" {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	RedirectKlog(context.Background(), log)
	slog.SetDefault(log)
	if dir := os.Getenv(childDataDir); dir != "" {
		os.Exit(child(dir))
	}
	os.Exit(m.Run())
}

func noNodes(context.Context, string, string) (net.Conn, error) {
	return nil, errors.New("no node is connected")
}

func testConfig(dataDir string) Config {
	return Config{DataDir: dataDir, Listen: "127.0.0.1:0", DialNode: noNodes, Log: slog.Default()}
}

// running is a plane that has become ready.
type running struct {
	*Plane
	cancel context.CancelFunc
	done   chan error
}

func start(t testing.TB, cfg Config) *running {
	t.Helper()
	p, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{Plane: p, cancel: cancel, done: make(chan error, 1)}
	go func() { r.done <- p.Run(ctx) }()
	select {
	case <-p.Ready():
	case err := <-r.done:
		cancel()
		t.Fatalf("the plane ended while starting: %v", err)
	case <-time.After(time.Minute):
		cancel()
		t.Fatalf("the plane was not ready within a minute; its end: %v", <-r.done)
	}
	t.Cleanup(func() { r.stop(t) })
	return r
}

func (r *running) stop(t testing.TB) time.Duration {
	t.Helper()
	began := time.Now()
	r.cancel()
	select {
	case err, ok := <-r.done:
		if ok && err != nil {
			t.Errorf("stopping the plane: %v", err)
		}
		if ok {
			close(r.done)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("the plane did not stop within 30 s")
	}
	return time.Since(began)
}

func (r *running) admin(t testing.TB) *rest.Config {
	t.Helper()
	cfg, err := clientcmd.BuildConfigFromFlags("", r.AdminKubeconfigPath())
	if err != nil {
		t.Fatal(err)
	}
	cfg.QPS = -1
	return cfg
}

func client(t testing.TB, cfg *rest.Config) kubernetes.Interface {
	t.Helper()
	c, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestStartStopAgain(t *testing.T) {
	dir := t.TempDir()
	for cycle := range 3 {
		began := time.Now()
		p := start(t, testConfig(dir))
		ready := time.Since(began)
		c := client(t, p.admin(t))
		name := func(cycle int) string { return fmt.Sprintf("written-%d", cycle) }
		for earlier := range cycle {
			if _, err := c.CoreV1().ConfigMaps("default").Get(t.Context(), name(earlier), metav1.GetOptions{}); err != nil {
				t.Errorf("cycle %d: what cycle %d wrote: %v", cycle, earlier, err)
			}
		}
		written := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name(cycle)}}
		if _, err := c.CoreV1().ConfigMaps("default").Create(t.Context(), written, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		// Somebody who watches must not hold up the stop.
		w, err := c.CoreV1().ConfigMaps("").Watch(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		stopped := p.stop(t)
		w.Stop()
		if stopped > 4*time.Second {
			t.Errorf("cycle %d: stopping took %s", cycle, stopped)
		}
		t.Logf("cycle %d: ready after %s, stopped after %s, %d goroutines left", cycle, ready, stopped, runtime.NumGoroutine())
	}
}

// TestStopWhileStarting stops at many points of the boot; none of them may
// hang, fail or take the process down.
func TestStopWhileStarting(t *testing.T) {
	dir := t.TempDir()
	for _, after := range []time.Duration{100, 600, 1200} {
		after *= time.Millisecond
		p, err := New(testConfig(dir))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- p.Run(ctx) }()
		time.Sleep(after) // the moment is the subject
		cancel()
		select {
		case err := <-done:
			if err != nil && !errors.Is(err, context.Canceled) {
				t.Errorf("stopped after %s: %v", after, err)
			}
		case <-time.After(30 * time.Second):
			t.Fatalf("stopped after %s: still running 30 s later", after)
		}
	}
	start(t, testConfig(dir))
}
