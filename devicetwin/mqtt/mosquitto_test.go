package mqtt

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// mosquitto is a broker of a test's own.
type mosquitto struct {
	t    testing.TB
	dir  string
	addr string
	conf string
	cmd  *exec.Cmd
	done chan struct{} // closed when cmd has ended
}

// startMosquitto starts one on a free port of loopback. conf is added to its
// configuration; %d in it is the directory, %p the port. Without a listener in
// it there is one for anybody.
func startMosquitto(t testing.TB, conf ...string) *mosquitto {
	t.Helper()
	path, err := exec.LookPath("mosquitto")
	if err != nil {
		path = "/usr/sbin/mosquitto"
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatal("mosquitto is not installed; run make deps")
	}
	m := &mosquitto{t: t, dir: t.TempDir(), addr: freeAddr(t), conf: path}
	_, port, _ := net.SplitHostPort(m.addr)
	text := strings.Join(conf, "\n")
	if !strings.Contains(text, "listener ") {
		text = "listener %p 127.0.0.1\nallow_anonymous true\n" + text
	}
	text = strings.NewReplacer("%d", m.dir, "%p", port).Replace(text)
	text = "user root\nlog_dest file " + m.dir + "/log\nset_tcp_nodelay true\n" + text + "\n"
	if err := os.WriteFile(filepath.Join(m.dir, "conf"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	m.start()
	t.Cleanup(func() {
		m.kill()
		if t.Failed() {
			log, _ := os.ReadFile(m.dir + "/log")
			t.Logf("mosquitto's log:\n%s", log[max(0, len(log)-4000):])
		}
	})
	return m
}

func freeAddr(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// start starts it, and returns when it listens.
func (m *mosquitto) start() {
	m.t.Helper()
	m.cmd = exec.Command(m.conf, "-c", filepath.Join(m.dir, "conf"))
	if err := m.cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	m.done = make(chan struct{})
	go func(cmd *exec.Cmd, done chan struct{}) {
		_ = cmd.Wait()
		close(done)
	}(m.cmd, m.done)
	for deadline := time.Now().Add(20 * time.Second); ; {
		c, err := net.Dial("tcp", m.addr)
		if err == nil {
			c.Close()
			return
		}
		select {
		case <-m.done:
			log, _ := os.ReadFile(m.dir + "/log")
			m.t.Fatalf("mosquitto ended at once:\n%s", log)
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			m.t.Fatal("mosquitto does not listen")
		}
	}
}

// kill is SIGKILL.
func (m *mosquitto) kill() {
	_ = m.cmd.Process.Kill()
	<-m.done
}

// stop is SIGTERM, at which it writes its store.
func (m *mosquitto) stop() {
	_ = m.cmd.Process.Signal(os.Interrupt)
	<-m.done
}

func (m *mosquitto) url() string { return "mqtt://" + m.addr }

// pub is mosquitto_pub.
func (m *mosquitto) pub(args ...string) {
	m.t.Helper()
	host, port, _ := net.SplitHostPort(m.addr)
	out, err := exec.Command("mosquitto_pub", append([]string{"-h", host, "-p", port}, args...)...).CombinedOutput()
	if err != nil {
		m.t.Fatalf("mosquitto_pub %v: %v\n%s", args, err, out)
	}
}

// testLog writes to the test's log.
func testLog(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimRight(string(p), "\n"))
	return len(p), nil
}

// runExternal makes a client of cfg and runs it until the test ends. prepare
// subscribes.
func runExternal(t testing.TB, cfg ExternalConfig, prepare func(*External)) *External {
	t.Helper()
	e := newExternal(t, cfg)
	if prepare != nil {
		prepare(e)
	}
	runUntilEnd(t, e)
	return e
}

// newExternal makes a client of cfg that is quick to reconnect.
func newExternal(t testing.TB, cfg ExternalConfig) *External {
	t.Helper()
	if cfg.MinBackoff == 0 {
		cfg.MinBackoff, cfg.MaxBackoff = 20*time.Millisecond, 100*time.Millisecond
	}
	if cfg.Log == nil {
		cfg.Log = testLog(t)
	}
	e, err := NewExternal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// runUntilEnd runs b until the test ends, and waits for it.
func runUntilEnd(t testing.TB, b interface{ Run(context.Context) error }) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- b.Run(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(20 * time.Second):
			t.Error("Run does not end")
		}
	}
	t.Cleanup(stop)
	return stop
}

// eventually waits until ok.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30s: %s", what)
		}
	}
}

func connected(t testing.TB, e *External) {
	t.Helper()
	eventually(t, fmt.Sprintf("connected to %s", e.State().Address), func() bool { return e.State().Connected })
}

// subscribed waits until the broker has answered to all of e's subscriptions.
func subscribed(t testing.TB, e *External) {
	t.Helper()
	eventually(t, "subscriptions answered", func() bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		return e.link != nil && e.link.settled.Load() == e.routes
	})
}
