package mqtt

import (
	"context"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// failsWith runs cfg until State tells an error with part in it.
func failsWith(t *testing.T, cfg ExternalConfig, part string) {
	t.Helper()
	e := newExternal(t, cfg)
	stop := runUntilEnd(t, e)
	defer stop()
	eventually(t, "error "+part, func() bool { return strings.Contains(e.State().Error, part) })
	if e.State().Connected {
		t.Error("connected")
	}
}

// TestExternalTLS: the broker is verified, and we to it.
func TestExternalTLS(t *testing.T) {
	ca, other := newAuthority(t), newAuthority(t)
	ca.issue("broker", "broker")
	ca.issue("node", "node")
	other.issue("node", "node")
	m := startMosquitto(t, "listener %p 127.0.0.1", "cafile "+ca.path("ca.pem"), "certfile "+ca.path("broker.pem"), "keyfile "+ca.path("broker.key"),
		"require_certificate true", "use_identity_as_username true")
	good := ExternalConfig{URL: "mqtts://" + m.addr, CAFile: ca.path("ca.pem"), CertFile: ca.path("node.pem"), KeyFile: ca.path("node.key")}
	e := runExternal(t, good, nil)
	connected(t, e)
	publish(t, e, Message{Topic: "a", QoS: 1})

	bad := good
	bad.CAFile = other.path("ca.pem")
	failsWith(t, bad, "certificate")
	bad.CAFile = "" // the system's
	failsWith(t, bad, "certificate")
	bad = good
	bad.URL = "mqtts://" + strings.Replace(m.addr, "127.0.0.1", "localhost", 1)
	failsWith(t, bad, "localhost")
	bad = good
	bad.CertFile, bad.KeyFile = other.path("node.pem"), other.path("node.key")
	eventuallyFails(t, bad)
	bad.CertFile, bad.KeyFile = "", ""
	eventuallyFails(t, bad)
	bad = good
	bad.CAFile = ca.path("none")
	failsWith(t, bad, "no such file")
}

// eventuallyFails: with TLS 1.3 a client hears of a refusal when it reads.
func eventuallyFails(t *testing.T, cfg ExternalConfig) {
	t.Helper()
	e := newExternal(t, cfg)
	stop := runUntilEnd(t, e)
	defer stop()
	eventually(t, "a failed connection", func() bool { return !strings.Contains(e.State().Error, "not connected yet") })
	if s := e.State(); s.Connected || s.Error == "" {
		t.Errorf("%+v", s)
	}
}

// TestExternalPassword: a changed password file is read at the next attempt.
func TestExternalPassword(t *testing.T) {
	dir := t.TempDir()
	passwords, password := dir+"/passwords", dir+"/password"
	writeFile(t, passwords, "", 0o600)
	if out, err := exec.Command("mosquitto_passwd", "-b", passwords, "node", "right").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	writeFile(t, password, "wrong\n", 0o600)
	m := startMosquitto(t, "listener %p 127.0.0.1", "allow_anonymous false", "password_file "+passwords)
	e := runExternal(t, ExternalConfig{URL: m.url(), Username: "node", PasswordFile: password}, nil)
	eventually(t, "refusal told", func() bool { return strings.Contains(e.State().Error, "check username") })
	if err := os.WriteFile(password, []byte("right\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	connected(t, e)
}

// TestExternalWebsocket: mosquitto's websockets.
func TestExternalWebsocket(t *testing.T) {
	// With websockets alone mosquitto 2.0.11 says that nothing listens.
	m := startMosquitto(t, "allow_anonymous true", "listener 0 %d/socket", "listener %p 127.0.0.1", "protocol websockets")
	var a heard
	e := runExternal(t, ExternalConfig{URL: "ws://" + m.addr + "/mqtt"}, func(e *External) { subscribe(t, e, "a", 1, a.handle) })
	subscribed(t, e)
	publish(t, e, Message{Topic: "a", QoS: 1, Payload: []byte("x")})
	eventually(t, "message", func() bool { return a.len() == 1 })
}

// TestExternalStartsWithoutBroker: Run does not wait for one, and ends at once.
func TestExternalStartsWithoutBroker(t *testing.T) {
	e := newExternal(t, ExternalConfig{URL: "mqtt://" + freeAddr(t)})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- e.Run(ctx) }()
	eventually(t, "error told", func() bool { return strings.Contains(e.State().Error, "refused") })
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}

	// A host that takes the connection and says nothing.
	taken := make(chan struct{}, 1)
	silent := newExternal(t, ExternalConfig{URL: "mqtt://" + listening(t, func(net.Conn) { taken <- struct{}{} })})
	stop := runUntilEnd(t, silent)
	<-taken
	stop()
}
