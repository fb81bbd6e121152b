package controlplane

import (
	"bufio"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
)

const childDataDir = "SKERRY_TEST_CHILD_DATA_DIR"

// child runs a plane in a process of its own until it is told to stop.
func child(dir string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	p, err := New(Config{DataDir: dir, Listen: "127.0.0.1:0", DialNode: noNodes, Log: slog.Default()})
	if err != nil {
		fmt.Println("error", err)
		return 1
	}
	go func() {
		select {
		case <-p.Ready():
			fmt.Println("ready")
		case <-ctx.Done():
		}
	}()
	if err := p.Run(ctx); err != nil {
		fmt.Println("error", err)
		return 1
	}
	fmt.Println("stopped")
	return 0
}

// startChild returns once the child's plane is ready.
func startChild(t *testing.T, dir string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childDataDir+"="+dir)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if line != "ready\n" {
		t.Fatalf("the child said %q (%v)", line, err)
	}
	t.Logf("exec to ready %s, %s", time.Since(began).Round(time.Millisecond), rss(cmd.Process.Pid))
	return cmd
}

func rss(pid int) string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return err.Error()
	}
	var out []string
	for line := range strings.Lines(string(data)) {
		if strings.HasPrefix(line, "RssAnon") || strings.HasPrefix(line, "RssFile") {
			out = append(out, strings.Join(strings.Fields(line), " "))
		}
	}
	return strings.Join(out, " ")
}

// TestKilled kills the process while several clients write, and looks for
// everything it had acknowledged.
func TestKilled(t *testing.T) {
	dir := t.TempDir()
	cmd := startChild(t, dir)
	cfg, err := clientcmd.BuildConfigFromFlags("", AdminKubeconfigPath(dir))
	if err != nil {
		t.Fatal(err)
	}
	cfg.QPS = -1
	c := client(t, cfg)

	var mu sync.Mutex
	var acknowledged []string
	var writers sync.WaitGroup
	enough := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for w := range 4 {
		writers.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				name := fmt.Sprintf("written-%d-%d", w, i)
				_, err := c.CoreV1().ConfigMaps("default").Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
				if err != nil {
					return
				}
				mu.Lock()
				acknowledged = append(acknowledged, name)
				if len(acknowledged) == 200 {
					close(enough)
				}
				mu.Unlock()
			}
		})
	}
	select {
	case <-enough:
	case <-time.After(time.Minute):
		t.Fatal("200 writes took more than a minute")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	cancel()
	writers.Wait()

	// Another process takes over the directory: this one.
	p := start(t, testConfig(dir))
	list, err := client(t, p.admin(t)).CoreV1().ConfigMaps("default").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	have := make(map[string]bool)
	for _, cm := range list.Items {
		have[cm.Name] = true
	}
	for _, name := range acknowledged {
		if !have[name] {
			t.Errorf("%s was acknowledged and is gone", name)
		}
	}
	t.Logf("%d writes acknowledged before the kill", len(acknowledged))
}

// TestInUse finds the directory held by another process, and a clean stop of
// that process letting it go.
func TestInUse(t *testing.T) {
	dir := t.TempDir()
	cmd := startChild(t, dir)
	p, err := New(testConfig(dir))
	if err != nil {
		t.Fatal(err)
	}
	err = p.Run(t.Context())
	want := fmt.Sprintf("data directory %s is in use by another cloudhub (process %d)", dir, cmd.Process.Pid)
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("a second plane on the directory: %v; want %q", err, want)
	}
	began := time.Now()
	cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Errorf("the child's end: %v", err)
	}
	if took := time.Since(began); took > 4*time.Second {
		t.Errorf("a clean stop took %s", took)
	} else {
		t.Logf("stopped after %s", took)
	}
	start(t, testConfig(dir))
}
