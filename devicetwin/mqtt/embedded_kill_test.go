package mqtt

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A test binary with this in its environment is a broker at that address, and
// captures into the file named behind it.
const victimEnv = "SKERRY_TEST_EMBEDDED"

func TestMain(m *testing.M) {
	if s := os.Getenv(victimEnv); s != "" {
		if err := beVictim(s); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func beVictim(s string) error {
	addr, path, _ := strings.Cut(s, " ")
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	log := &captureLog{f: f, ids: map[string]bool{}}
	b, err := NewEmbedded(EmbeddedConfig{Listeners: []ListenerConfig{{Address: addr}}, Capture: log.capture,
		Log: slog.New(slog.NewTextHandler(os.Stderr, nil))})
	if err != nil {
		return err
	}
	return b.Run(context.Background())
}

// TestEmbeddedKilled kills a broker again and again while a device sends 1,000
// messages a second: what it acknowledged is on disk.
func TestEmbeddedKilled(t *testing.T) {
	addr, path := freeAddr(t), filepath.Join(t.TempDir(), "captured")
	p := startPublisher(t, addr)
	connects := int32(0)
	var victim *exec.Cmd
	start := func() {
		victim = exec.Command(os.Args[0])
		victim.Env = append(os.Environ(), victimEnv+"="+addr+" "+path)
		victim.Stderr = os.Stderr
		if err := victim.Start(); err != nil {
			t.Fatal(err)
		}
	}
	kill := func() {
		victim.Process.Kill()
		victim.Wait()
	}
	t.Cleanup(func() { kill() })
	start()
	for range *kills {
		eventually(t, "the device is connected again", func() bool { return p.connected.Load() && p.connects.Load() > connects })
		<-time.After(50*time.Millisecond + rand.N(200*time.Millisecond))
		connects = p.connects.Load()
		kill()
		start()
	}
	p.finish()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	captured, lines := map[string]bool{}, 0
	for id := range strings.Lines(string(b)) {
		captured[strings.TrimSpace(id)] = true
		lines++
	}
	lost := 0
	for _, id := range p.acked() {
		if !captured[id] {
			lost++
		}
	}
	t.Logf("%d kills, %d connects: %d messages acknowledged, %d captured (%d duplicates), %d lost",
		*kills, p.connects.Load(), len(p.acked()), len(captured), lines-len(captured), lost)
	if lost > 0 || len(p.acked()) == 0 {
		t.Errorf("%d of %d acknowledged messages are lost", lost, len(p.acked()))
	}
}

// mosquitto's clients as devices.
func TestEmbeddedMosquittoClients(t *testing.T) {
	ca := newAuthority(t)
	ca.issue("server", "broker")
	ca.issue("plug", "home/plug")
	acl := NewACLTable(ACLConfig{Local: true})
	acl.Set(map[string]Grants{"home/plug": {Publish: []string{"tele/#"}, Subscribe: []string{"cmnd/plug/#"}}})
	passwords := filepath.Join(t.TempDir(), "passwords")
	writeFile(t, passwords, "", 0o600)
	if out, err := exec.Command("mosquitto_passwd", "-b", passwords, "home/plug", "se:cret").CombinedOutput(); err != nil {
		t.Fatalf("mosquitto_passwd: %v\n%s", err, out)
	}
	devices, err := NewPasswords(passwords)
	if err != nil {
		t.Fatal(err)
	}
	b := startEmbedded(t, EmbeddedConfig{ACL: acl, Auth: AnyOf{devices, Certificates{}, Anonymous{}},
		Listeners: []ListenerConfig{{Address: "127.0.0.1:0"}, {Address: "127.0.0.1:0", TLS: &TLSConfig{CertFile: ca.path("server.pem"),
			KeyFile: ca.path("server.key"), ClientCAFile: ca.path("ca.pem")}}}})
	run := func(program string, addr net.Addr, args ...string) (string, error) {
		host, port, _ := net.SplitHostPort(addr.String())
		out, err := exec.Command(program, append([]string{"-h", host, "-p", port}, args...)...).CombinedOutput()
		return string(out), err
	}
	plain, encrypted := b.Addrs()[0], b.Addrs()[1]
	must := func(out string, err error) string {
		t.Helper()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return strings.TrimSpace(out)
	}
	var got heard
	subscribe(t, b, "#", 2, got.handle)
	for _, version := range []string{"mqttv31", "mqttv311", "mqttv5"} {
		for _, qos := range []string{"0", "1", "2"} {
			n := got.len()
			must(run("mosquitto_pub", plain, "-V", version, "-q", qos, "-r", "-t", "kept/"+version, "-m", qos))
			eventually(t, "it comes", func() bool { return got.len() == n+1 })
			out := must(run("mosquitto_sub", plain, "-V", version, "-q", qos, "-t", "kept/#", "-F", "%t %p %q %r", "--retained-only", "-C", "1", "-W", "20"))
			if want := "kept/" + version + " " + qos + " " + qos + " 1"; out != want {
				t.Errorf("mosquitto_sub: %q, want %q", out, want)
			}
			must(run("mosquitto_pub", plain, "-V", version, "-q", qos, "-r", "-n", "-t", "kept/"+version))
			eventually(t, "it is kept no more", func() bool { return b.Stats().Retained == 0 })
		}
	}
	// A password from mosquitto_passwd, and a certificate, over TLS.
	n := got.len()
	tls := []string{"--cafile", ca.path("ca.pem")}
	must(run("mosquitto_pub", encrypted, append(tls, "-u", "home/plug", "-P", "se:cret", "-q", "1", "-t", "tele/a", "-m", "password")...))
	must(run("mosquitto_pub", encrypted, append(tls, "--cert", ca.path("plug.pem"), "--key", ca.path("plug.key"), "-q", "1", "-t", "tele/a", "-m", "certificate")...))
	eventually(t, "both come", func() bool { return got.len() == n+2 })
	if out, err := run("mosquitto_pub", encrypted, append(tls, "-u", "home/plug", "-P", "wrong", "-t", "tele/a", "-m", "x")...); err == nil {
		t.Errorf("a wrong password was taken: %s", out)
	}
	if out, _ := run("mosquitto_sub", plain, "-u", "home/plug", "-P", "se:cret", "-t", "tele/a", "-E", "-W", "20"); !strings.Contains(out, "denied") {
		t.Errorf("a subscription that is not granted: %q", out)
	}
	if out, err := run("mosquitto_pub", plain, "-V", "mqttv5", "-u", "home/plug", "-P", "se:cret", "-q", "1", "-t", "other", "-m", "x"); err == nil && !strings.Contains(out, "Not authorized") {
		t.Errorf("a publication that is not granted: %q", out)
	}
	// Large ones, up to the packet's bound.
	n = got.len()
	big := filepath.Join(t.TempDir(), "big")
	writeFile(t, big, strings.Repeat("x", 250<<10), 0o600)
	must(run("mosquitto_pub", plain, "-q", "1", "-t", "big", "-f", big))
	eventually(t, "250 KiB come", func() bool { return got.len() == n+1 && len(got.msgs[n].Payload) == 250<<10 })
	writeFile(t, big, strings.Repeat("x", 10<<20), 0o600)
	for _, version := range []string{"mqttv311", "mqttv5"} {
		run("mosquitto_pub", plain, "-V", version, "-q", "1", "-t", "big", "-f", big)
	}
	must(run("mosquitto_pub", plain, "-q", "1", "-t", "small", "-m", "x"))
	eventually(t, "what is sent after 10 MiB comes", func() bool { return got.len() == n+2 })
}
