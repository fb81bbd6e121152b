package controlplane

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestConfigRefused(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*Config)
		want   string
	}{
		{"no data directory", func(c *Config) { c.DataDir = "" }, "no data directory"},
		{"no dialer", func(c *Config) { c.DialNode = nil }, "no way to dial nodes"},
		{"socket path", func(c *Config) { c.DataDir = "/var/lib/" + strings.Repeat("deep/", 25) }, "choose a shorter data directory, or a short runtime directory"},
		{"listen", func(c *Config) { c.Listen = "6443" }, "write it as host:port or :port"},
		{"service CIDR", func(c *Config) { c.ServiceCIDR = "10.96.0.0" }, "write it like 10.96.0.0/16"},
		{"service CIDR too small", func(c *Config) { c.ServiceCIDR = "10.96.0.0/30" }, "at least 16 addresses"},
		{"advertise", func(c *Config) { c.AdvertiseAddress = "127.0.0.1" }, "other machines can reach"},
		{"unknown flag", func(c *Config) { c.APIServerArgs = []string{"--nope=1"} }, "API server arguments: unknown flag: --nope"},
		{"unknown kcm flag", func(c *Config) { c.ControllerManagerArgs = []string{"--nope=1"} }, "controller manager arguments: unknown flag: --nope"},
		{"unknown scheduler flag", func(c *Config) { c.SchedulerArgs = []string{"--nope=1"} }, "scheduler arguments: unknown flag: --nope"},
		{"bad value", func(c *Config) { c.APIServerArgs = []string{"--event-ttl=soon"} }, "event-ttl"},
		{"not a flag", func(c *Config) { c.APIServerArgs = []string{"event-ttl=1h"} }, "write it as --name=value"},
		{"own flag", func(c *Config) { c.APIServerArgs = []string{"--etcd_servers=http://a"} }, "change the external etcd endpoints instead"},
		{"shared flag", func(c *Config) { c.SchedulerArgs = []string{"--feature-gates=A=true"} }, "give it as an API server argument"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg := testConfig(t.TempDir())
			tc.change(&cfg)
			_, err := New(cfg)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v; want an error saying %q", err, tc.want)
			}
		})
	}
	cfg := testConfig("/var/lib/" + strings.Repeat("deep/", 25))
	cfg.RuntimeDir = "/run/skerry"
	cfg.APIServerArgs = []string{"--feature-gates=ContextualLogging=true"}
	if _, err := New(cfg); err != nil {
		t.Errorf("a long data directory with a short runtime directory: %v", err)
	}
}

func TestRunRefused(t *testing.T) {
	run := func(t *testing.T, cfg Config, want string) {
		t.Helper()
		p, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Run(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v; want an error saying %q", err, want)
		}
	}
	t.Run("port in use", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		cfg := testConfig(t.TempDir())
		cfg.Listen = l.Addr().String()
		run(t, cfg, "is in use by another program; stop it, or choose another API server address")
		if _, err := os.Stat(filepath.Join(cfg.DataDir, "pki", "ca.crt")); err == nil {
			t.Error("a cluster was begun although its port is taken")
		}
	})
	t.Run("not this machine's address", func(t *testing.T) {
		cfg := testConfig(t.TempDir())
		cfg.Listen = "192.0.2.200:6443"
		run(t, cfg, "is not an address of this machine")
	})
	t.Run("data directory below a file", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		run(t, testConfig(filepath.Join(file, "data")), "cannot be written")
	})
	t.Run("data directory on a read-only file system", func(t *testing.T) {
		run(t, testConfig("/proc/skerry"), "/proc/skerry cannot be written")
	})
	t.Run("authority without its key", func(t *testing.T) {
		cfg := testConfig(t.TempDir())
		if _, err := openPKI(privateTestDir(t, filepath.Join(cfg.DataDir, "pki")), serverNames{}, cfg.Log); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(filepath.Join(cfg.DataDir, "pki", "ca.key")); err != nil {
			t.Fatal(err)
		}
		run(t, cfg, "restore it from a backup")
	})
	t.Run("twice", func(t *testing.T) {
		p, err := New(testConfig("/proc/skerry"))
		if err != nil {
			t.Fatal(err)
		}
		p.Run(t.Context())
		if err := p.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "run twice") {
			t.Errorf("the second run: %v", err)
		}
	})
}

func privateTestDir(t *testing.T, path string) string {
	t.Helper()
	if err := privateDir(path); err != nil {
		t.Fatal(err)
	}
	return path
}
