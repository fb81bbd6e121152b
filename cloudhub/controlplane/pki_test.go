package controlplane

import (
	"context"
	"crypto/x509"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

var testNames = serverNames{dns: []string{"localhost"}, ips: []net.IP{net.IPv4(127, 0, 0, 1)}}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

func readAll(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	files := make(map[string]string)
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		files[e.Name()] = string(data)
	}
	return files
}

func TestPKIKept(t *testing.T) {
	dir := t.TempDir()
	if _, err := openPKI(dir, testNames, discard()); err != nil {
		t.Fatal(err)
	}
	first := readAll(t, dir)
	for name := range first {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		want := os.FileMode(0o644)
		if strings.HasSuffix(name, ".key") {
			want = 0o600
		}
		if info.Mode().Perm() != want {
			t.Errorf("%s has mode %o, want %o", name, info.Mode().Perm(), want)
		}
	}
	if len(first) != 2*2+2+7*2 {
		t.Errorf("%d files: %v", len(first), first)
	}
	// A key left open to others is closed.
	if err := os.Chmod(filepath.Join(dir, "sa.key"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := openPKI(dir, testNames, discard()); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(filepath.Join(dir, "sa.key")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("sa.key: %v %v", info.Mode(), err)
	}
	for name, data := range readAll(t, dir) {
		if data != first[name] {
			t.Errorf("%s changed though nothing was due", name)
		}
	}
}

func TestPKIRepaired(t *testing.T) {
	open := func(t *testing.T, dir string, names serverNames) map[string]string {
		t.Helper()
		if _, err := openPKI(dir, names, discard()); err != nil {
			t.Fatal(err)
		}
		return readAll(t, dir)
	}
	for _, tc := range []struct {
		name    string
		change  func(t *testing.T, dir string) serverNames
		changed string
	}{
		{"a new server name", func(*testing.T, string) serverNames {
			return serverNames{dns: []string{"localhost", "hub.example.com"}, ips: testNames.ips}
		}, "apiserver.crt"},
		{"a new server address", func(*testing.T, string) serverNames {
			return serverNames{dns: testNames.dns, ips: append([]net.IP{net.IPv4(10, 0, 0, 1)}, testNames.ips...)}
		}, "apiserver.crt"},
		{"a lost leaf", func(t *testing.T, dir string) serverNames {
			os.Remove(filepath.Join(dir, "scheduler.crt"))
			return testNames
		}, "scheduler.crt"},
		{"a torn leaf", func(t *testing.T, dir string) serverNames {
			os.WriteFile(filepath.Join(dir, "cloudhub.crt"), []byte("-----BEGIN"), 0o644)
			return testNames
		}, "cloudhub.crt"},
		{"a lost key of a leaf", func(t *testing.T, dir string) serverNames {
			os.Remove(filepath.Join(dir, "cloudhub.key"))
			return testNames
		}, "cloudhub.crt cloudhub.key"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			before := open(t, dir, testNames)
			after := open(t, dir, tc.change(t, dir))
			for name := range before {
				changed := before[name] != after[name]
				if want := strings.Contains(" "+tc.changed+" ", " "+name+" "); changed != want {
					t.Errorf("%s changed: %t, want %t", name, changed, want)
				}
			}
		})
	}
}

// TestPKIRenewed lets a plane's renewal run for two years.
func TestPKIRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, err := New(testConfig(t.TempDir()))
		if err != nil {
			t.Fatal(err)
		}
		p.log = discard()
		dir := privateTestDir(t, filepath.Join(p.cfg.DataDir, "pki"))
		if p.pki, err = openPKI(dir, testNames, p.log); err != nil {
			t.Fatal(err)
		}
		p.addr = &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 6443}
		if err := p.writeKubeconfigs(); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			p.renewLoop(ctx)
		}()
		first := readAll(t, dir)
		began := time.Now()
		lastAdmin := ""
		renewals := 0
		for day := range 2 * 365 {
			time.Sleep(24 * time.Hour)
			synctest.Wait()
			now := readAll(t, dir)
			for _, l := range p.pki.leaves() {
				cert, _, err := readCertificate(filepath.Join(dir, l.file+".crt"))
				if err != nil {
					t.Fatal(err)
				}
				if left := cert.NotAfter.Sub(time.Now()); left < renewBefore-renewEvery {
					t.Fatalf("day %d: %s has only %s left", day, l.file, left)
				}
				if _, err := cert.Verify(x509.VerifyOptions{Roots: l.issuer.pool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
					t.Fatalf("day %d: %s: %v", day, l.file, err)
				}
				if now[l.file+".key"] != first[l.file+".key"] {
					t.Fatalf("day %d: the key of %s changed", day, l.file)
				}
			}
			if now["ca.crt"] != first["ca.crt"] || now["front-proxy-ca.crt"] != first["front-proxy-ca.crt"] || now["sa.key"] != first["sa.key"] {
				t.Fatalf("day %d: an authority or the service account key changed", day)
			}
			if now["admin.crt"] != lastAdmin {
				lastAdmin = now["admin.crt"]
				renewals++
			}
		}
		cancel()
		<-done
		if renewals != 3 { // the first, and one for each eleven months
			t.Errorf("%d certificates of the administrator in %s, want 3", renewals, time.Since(began))
		}
		r := &running{Plane: p}
		if got := string(r.admin(t).CertData); got != lastAdmin {
			t.Error("the administrator's kubeconfig has not the renewed certificate")
		}
		info, err := os.Stat(p.AdminKubeconfigPath())
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("admin.kubeconfig: %v %v", info.Mode(), err)
		}
	})
}

// TestClock opens the certificates with a clock that is wrong.
func TestClock(t *testing.T) {
	t.Run("behind", func(t *testing.T) {
		dir := t.TempDir()
		if _, err := openPKI(dir, testNames, discard()); err != nil {
			t.Fatal(err)
		}
		synctest.Test(t, func(t *testing.T) { // its clock begins in the year 2000
			_, err := openPKI(dir, testNames, discard())
			if err == nil || !strings.Contains(err.Error(), "set the clock") {
				t.Errorf("got %v", err)
			}
		})
	})
	t.Run("after the authority's end", func(t *testing.T) {
		dir := t.TempDir()
		synctest.Test(t, func(t *testing.T) {
			if _, err := openPKI(dir, testNames, discard()); err != nil {
				t.Fatal(err)
			}
			time.Sleep(authorityLife - 24*time.Hour)
			// Leaves end with their authority; that is no reason to issue them
			// again and again.
			if _, err := openPKI(dir, testNames, discard()); err != nil {
				t.Fatal(err)
			}
			before := readAll(t, dir)
			if _, err := openPKI(dir, testNames, discard()); err != nil {
				t.Fatal(err)
			}
			for name, data := range readAll(t, dir) {
				if data != before[name] {
					t.Errorf("%s was issued again", name)
				}
			}
			time.Sleep(48 * time.Hour)
			_, err := openPKI(dir, testNames, discard())
			if err == nil || !strings.Contains(err.Error(), "to make a new authority") {
				t.Errorf("got %v", err)
			}
		})
	})
}

func TestKubeletServing(t *testing.T) {
	p, err := openPKI(t.TempDir(), testNames, discard())
	if err != nil {
		t.Fatal(err)
	}
	cert, err := p.kubeletServing(netip.MustParseAddr("100.64.0.7"))
	if err != nil {
		t.Fatal(err)
	}
	opts := x509.VerifyOptions{Roots: p.cluster.pool(), DNSName: "100.64.0.7"}
	if _, err := cert.Leaf.Verify(opts); err != nil {
		t.Error(err)
	}
	opts.DNSName = "100.64.0.8"
	if _, err := cert.Leaf.Verify(opts); err == nil {
		t.Error("the certificate is good for another node's address")
	}
	opts.DNSName, opts.KeyUsages = "", []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if _, err := cert.Leaf.Verify(opts); err == nil {
		t.Error("the certificate is good for a client")
	}
}
