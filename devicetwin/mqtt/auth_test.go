package mqtt

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha512"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
	"golang.org/x/crypto/argon2"
	"golang.org/x/crypto/bcrypt"
)

func bcryptOf(t testing.TB, password string) string {
	hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	return string(hash)
}

func argonOf(password string) string {
	salt := []byte("0123456789abcdef")
	sum := argon2.IDKey([]byte(password), salt, 1, 64, 1, 32)
	enc := base64.RawStdEncoding.EncodeToString
	return fmt.Sprintf("$argon2id$v=19$m=64,t=1,p=1$%s$%s", enc(salt), enc(sum))
}

func mosquittoOf(t testing.TB, password string) string {
	salt := []byte("0123456789ab")
	sum, err := pbkdf2.Key(sha512.New, password, salt, 101, 64)
	if err != nil {
		t.Fatal(err)
	}
	enc := base64.StdEncoding.EncodeToString
	return fmt.Sprintf("$7$101$%s$%s", enc(salt), enc(sum))
}

func writeFile(t testing.TB, path, content string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func TestPasswords(t *testing.T) {
	path := filepath.Join(t.TempDir(), "passwords")
	writeFile(t, path, "# devices\nplug:"+bcryptOf(t, "one")+"\n\nhome/trv:"+argonOf("two")+"\nold:"+mosquittoOf(t, "three")+"\n", 0o600)
	p, err := NewPasswords(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	try := func(user, password string) error {
		pr, err := p.Authenticate(ctx, Credentials{User: user, Password: []byte(password)})
		if err == nil && (pr.Name != user || pr.Kind != PrincipalDevice) {
			t.Errorf("%q is %+v", user, pr)
		}
		return err
	}
	for user, password := range map[string]string{"plug": "one", "home/trv": "two", "old": "three"} {
		for range 2 { // the second time from what is remembered
			if err := try(user, password); err != nil {
				t.Errorf("%s: %v", user, err)
			}
		}
		if err := try(user, password+"x"); !errors.Is(err, ErrBadCredentials) {
			t.Errorf("%s with a wrong password: %v", user, err)
		}
		if err := try(user, ""); !errors.Is(err, ErrUnknownCredentials) {
			t.Errorf("%s without a password: %v", user, err)
		}
	}
	if err := try("nobody", "one"); !errors.Is(err, ErrUnknownCredentials) {
		t.Errorf("nobody: %v", err)
	}
	// It is read again, and a file that is bad changes nothing.
	again := func(content string, mode os.FileMode) {
		writeFile(t, path, content, mode)
		os.Chtimes(path, time.Time{}, time.Now().Add(time.Hour))
		p.mu.Lock()
		p.checked = time.Time{}
		p.mu.Unlock()
	}
	again("plug:"+bcryptOf(t, "four")+"\n", 0o600)
	if err := try("plug", "one"); !errors.Is(err, ErrBadCredentials) {
		t.Errorf("an old password: %v", err)
	}
	if err := errors.Join(try("plug", "four"), p.Err()); err != nil {
		t.Error(err)
	}
	again("plug:plain text\n", 0o600)
	if err := try("plug", "four"); err != nil || p.Err() == nil || !strings.Contains(p.Err().Error(), "line 1") {
		t.Errorf("%v; %v", err, p.Err())
	}
	again("plug:"+bcryptOf(t, "five")+"#\n", 0o644)
	if err := try("plug", "four"); err != nil || p.Err() == nil || !strings.Contains(p.Err().Error(), "chmod 600") {
		t.Errorf("%v; %v", err, p.Err())
	}
	if _, err := NewPasswords(path); err == nil {
		t.Error("a file that all can read was taken")
	}
}

func FuzzPasswordFile(f *testing.F) {
	f.Add([]byte("plug:" + bcryptOf(f, "one") + "\na:" + argonOf("two") + "\nb:" + mosquittoOf(f, "three")))
	f.Add([]byte("a:$argon2id$v=19$m=99999999,t=1,p=1$AAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAA"))
	f.Add([]byte("a:$7$999999999$AAAAAAAAAAAA$AA=="))
	f.Fuzz(func(t *testing.T, b []byte) {
		hashes, err := parsePasswords(b)
		if err == nil {
			for user, hash := range hashes {
				if user == "" || strings.ContainsAny(user, ":\n") {
					t.Errorf("user %q", user)
				}
				if _, err := parseHash(hash); err != nil {
					t.Error(err)
				}
			}
		}
	})
}

// authority issues certificates for tests.
type authority struct {
	t    testing.TB
	dir  string
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	pem  []byte
}

func newAuthority(t testing.TB) *authority {
	a := &authority{t: t, dir: t.TempDir()}
	a.cert, a.key, a.pem, _ = a.sign(&x509.Certificate{Subject: pkix.Name{CommonName: "test CA"}, IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	writeFile(t, a.path("ca.pem"), string(a.pem), 0o600)
	return a
}

func (a *authority) path(name string) string { return filepath.Join(a.dir, name) }

func (a *authority) sign(tmpl *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey, []byte, []byte) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	tmpl.SerialNumber = big.NewInt(time.Now().UnixNano())
	tmpl.NotBefore, tmpl.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := tmpl, key
	if a.cert != nil {
		parent, signer = a.cert, a.key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, &key.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, _ := x509.ParseCertificate(der)
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER})
}

// issue writes name.pem and name.key.
func (a *authority) issue(name, cn string) {
	_, _, certPEM, keyPEM := a.sign(&x509.Certificate{Subject: pkix.Name{CommonName: cn}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}})
	writeFile(a.t, a.path(name+".pem"), string(certPEM), 0o600)
	writeFile(a.t, a.path(name+".key"), string(keyPEM), 0o600)
}

func (a *authority) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

// dial connects with the certificate of a name; "": none.
func (a *authority) dial(addr, name string, connect packets.Packet) (*wire, error) {
	cfg := &tls.Config{RootCAs: a.pool()}
	if name != "" {
		pair, err := tls.LoadX509KeyPair(a.path(name+".pem"), a.path(name+".key"))
		if err != nil {
			a.t.Fatal(err)
		}
		cfg.Certificates = []tls.Certificate{pair}
	}
	c, err := tls.Dial("tcp", addr, cfg)
	if err != nil {
		return nil, err
	}
	a.t.Cleanup(func() { c.Close() })
	return wireOver(a.t, c, connect)
}

// Each kind of credentials on the listener that it is for, and what each may do.
func TestEmbeddedWhoMayWhat(t *testing.T) {
	ca := newAuthority(t)
	ca.issue("server", "broker")
	ca.issue("press", "plant/press")
	stranger := newAuthority(t)
	stranger.issue("press", "plant/press")
	passwords := filepath.Join(t.TempDir(), "passwords")
	writeFile(t, passwords, "home/plug:"+bcryptOf(t, "secret")+"\n", 0o600)
	devices, err := NewPasswords(passwords)
	if err != nil {
		t.Fatal(err)
	}
	acl := NewACLTable(ACLConfig{Local: true, Reserved: func(p Principal, topic string, write bool) bool {
		return p.Kind == PrincipalPod && p.Data == "uid-1" && (!write || strings.HasSuffix(topic, "/set"))
	}})
	grants := map[string]Grants{
		"home/plug":   {Publish: []string{"tele/plug/#", "stat/plug/+"}, Subscribe: []string{"cmnd/plug/#"}},
		"plant/press": {Publish: []string{"spBv1.0/plant/+/press"}},
	}
	if err := acl.Set(grants); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "mqtt.sock")
	tlsFiles := TLSConfig{CertFile: ca.path("server.pem"), KeyFile: ca.path("server.key"), ClientCAFile: ca.path("ca.pem")}
	strict := tlsFiles
	strict.RequireClientCert = true
	b := startEmbedded(t, EmbeddedConfig{
		Listeners: []ListenerConfig{{Address: "127.0.0.1:0"}, {Address: "127.0.0.1:0", TLS: &tlsFiles},
			{Address: "127.0.0.1:0", TLS: &strict}, {Network: "unix", Address: socket}},
		Auth: AnyOf{Tokens{Verify: func(_ context.Context, token string) (Principal, error) {
			if token != "good" {
				return Principal{}, errors.New("not a token of this node")
			}
			return Principal{Name: "home/app", Data: "uid-1"}, nil
		}}, devices, Certificates{}, Anonymous{}},
		ACL: acl,
	})
	addrs := b.Addrs()
	plain, encrypted, mutual := addrs[0].String(), addrs[1].String(), addrs[2].String()
	as := func(user, password string) packets.Packet {
		connect := connectAs("", 5, true)
		connect.Connect.UsernameFlag, connect.Connect.Username = user != "", []byte(user)
		connect.Connect.PasswordFlag, connect.Connect.Password = password != "", []byte(password)
		return connect
	}
	may := func(w *wire, topic string) bool {
		w.write(publishOf(topic, "x", 1, 1))
		return w.want(packets.Puback).ReasonCode == 0
	}
	mayHear := func(w *wire, filter string) bool {
		return w.subscribe(packets.Subscription{Filter: filter})[0] < 0x80
	}
	check := func(what string, got, want bool) {
		t.Helper()
		if got != want {
			t.Errorf("%s: %v", what, got)
		}
	}

	plug := dialWire(t, plain, as("home/plug", "secret"))
	check("plug publishes tele/plug/STATE", may(plug, "tele/plug/STATE"), true)
	check("plug publishes tele/plug/a/b", may(plug, "tele/plug/a/b"), true)
	check("plug publishes stat/plug/a/b", may(plug, "stat/plug/a/b"), false)
	check("plug publishes for another", may(plug, "tele/other/STATE"), false)
	check("plug commands itself", may(plug, "cmnd/plug/POWER"), false)
	check("plug uses the API", may(plug, "skerry/v1/twin/home/plug/desired/set"), false)
	check("plug hears its commands", mayHear(plug, "cmnd/plug/POWER"), true)
	check("plug hears another's", mayHear(plug, "cmnd/other/POWER"), false)
	check("plug hears all", mayHear(plug, "#"), true) // of what it may
	local := dialWire(t, plain, as("", ""))
	check("a local client commands the plug", may(local, "cmnd/other/POWER"), true)
	check("a local client commands the plug", may(local, "cmnd/plug/POWER"), true)
	if pk := plug.want(packets.Publish); pk.TopicName != "cmnd/plug/POWER" {
		t.Errorf("plug heard %q", pk.TopicName)
	}
	plug.ping()
	check("a local client uses the API", may(local, "skerry/v1/twin/home/plug/desired/set"), false)
	check("a local client hears the API", mayHear(local, "skerry/v1/twin/home/plug"), false)
	check("a local client writes $SYS", may(local, "$SYS/broker"), false)

	pod := dialWire(t, plain, as("pod", "good"))
	check("a pod sets", may(pod, "skerry/v1/twin/home/plug/desired/set"), true)
	check("a pod writes another topic of the API", may(pod, "skerry/v1/twin/home/plug"), false)
	check("a pod hears", mayHear(pod, "skerry/v1/twin/home/plug"), true)
	check("a pod commands the plug", may(pod, "cmnd/plug/POWER"), false)

	for name, pk := range map[string]packets.Packet{"a wrong password": as("home/plug", "wrong"), "a wrong token": as("pod", "bad"),
		"an unknown user": as("who", "secret"), "a user without password": as("home/plug", "")} {
		if w, err := tryWire(t, plain, pk); err != nil || w.connack.ReasonCode != packets.ErrBadUsernameOrPassword.Code {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := b.Stats().AuthFailed; n != 4 {
		t.Errorf("%d refused", n)
	}

	press, err := ca.dial(mutual, "press", as("", ""))
	if err != nil {
		t.Fatal(err)
	}
	check("press publishes its data", may(press, "spBv1.0/plant/DDATA/press"), true)
	check("press publishes another's", may(press, "spBv1.0/plant/DDATA/other"), false)
	if _, err := ca.dial(mutual, "", as("home/plug", "secret")); err == nil {
		t.Error("the listener with mTLS took a client without a certificate")
	}
	stranger.cert = ca.cert // it believes the broker, not the reverse
	if _, err := stranger.dial(mutual, "press", as("", "")); err == nil {
		t.Error("the listener with mTLS took a certificate of another CA")
	}
	if _, err := stranger.dial(encrypted, "press", as("", "")); err == nil {
		t.Error("the listener with TLS took a certificate of another CA")
	}
	if w, err := ca.dial(encrypted, "", as("home/plug", "secret")); err != nil || w.connack.ReasonCode != 0 {
		t.Errorf("a password over TLS: %v", err)
	}
	// The least version is named: of itself a client would not even ask.
	old, err := tls.Dial("tcp", encrypted, &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11, RootCAs: ca.pool()})
	if err == nil {
		old.Close()
		t.Error("TLS 1.1 was taken")
	} else if !strings.Contains(err.Error(), "remote error: tls: protocol version") {
		t.Errorf("TLS 1.1 was not refused by the broker for its version: %v", err)
	}

	nc, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if w, err := wireOver(t, nc, as("", "")); err != nil || !may(w, "a/b") {
		t.Errorf("over the unix socket: %v", err)
	}
	if info, err := os.Stat(socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket: %v, %v", info.Mode(), err)
	}

	// What is granted can change under a client.
	grants["home/plug"] = Grants{Publish: []string{"stat/plug/#"}}
	acl.Set(grants)
	check("plug publishes tele/plug/STATE", may(plug, "tele/plug/STATE"), false)
	check("plug publishes stat/plug/a/b", may(plug, "stat/plug/a/b"), true)
	check("a local client commands the plug", may(local, "cmnd/plug/POWER"), true)
	plug.ping() // and did not hear it
	if err := acl.Set(map[string]Grants{"x": {Publish: []string{"a/#/b", "ok"}}}); err == nil || !acl.May(Principal{Name: "x"}, "ok", true) {
		t.Errorf("a bad filter: %v", err)
	}

	// A name that is taken by another is not for who asks.
	named := as("home/plug", "secret")
	named.Connect.ClientIdentifier = "mine"
	dialWire(t, plain, named)
	named.Connect.UsernameFlag, named.Connect.Username, named.Connect.PasswordFlag, named.Connect.Password = false, nil, false, nil
	if w, err := tryWire(t, plain, named); err != nil || w.connack.ReasonCode != packets.ErrClientIdentifierNotValid.Code {
		t.Errorf("another's name: %v", err)
	}
	// Nor is a will to where it may not publish.
	dying := as("home/plug", "secret")
	dying.Connect.WillFlag, dying.Connect.WillTopic, dying.Connect.WillPayload = true, "tele/other/LWT", []byte("x")
	var heardWill heard
	subscribe(t, b, "tele/other/LWT", 1, heardWill.handle)
	before := b.Stats()
	dialWire(t, plain, dying).net.Close()
	eventually(t, "it is gone", func() bool { return b.Stats().Clients == before.Clients })
	if after := b.Stats(); after.Denied != before.Denied+1 || heardWill.len() != 0 {
		t.Errorf("a will was published where its client may not: %q", heardWill.all())
	}
}

// A certificate that was renewed is used for the next connection; one that
// cannot be read is not.
func TestEmbeddedCertificateReload(t *testing.T) {
	ca := newAuthority(t)
	ca.issue("server", "first")
	b := startEmbedded(t, EmbeddedConfig{Auth: AnyOf{Anonymous{}}, Listeners: []ListenerConfig{{Address: "127.0.0.1:0",
		TLS: &TLSConfig{CertFile: ca.path("server.pem"), KeyFile: ca.path("server.key")}}}})
	serverName := func() string {
		t.Helper()
		w, err := ca.dial(b.addr(), "", connectAs("", 4, true))
		if err != nil {
			t.Fatal(err)
		}
		return w.net.(*tls.Conn).ConnectionState().PeerCertificates[0].Subject.CommonName
	}
	if got := serverName(); got != "first" {
		t.Errorf("got %q", got)
	}
	ca.issue("server", "second")
	eventually(t, "the new certificate is used", func() bool { return serverName() == "second" })
	writeFile(t, ca.path("server.pem"), "nothing", 0o600)
	b.mu.Lock()
	files := b.listeners[0].tls
	b.mu.Unlock()
	files.mu.Lock()
	files.checked = time.Time{}
	files.mu.Unlock()
	if got := serverName(); got != "second" {
		t.Errorf("got %q", got)
	}
}

// The trie answers as Match does.
func FuzzFilterSet(f *testing.F) {
	f.Add("a/+/c\na/#\n$SYS/#\n#\n+/b", "a/b/c")
	f.Add("a/#", "a")
	f.Add("#", "$SYS/x")
	f.Add("$SYS/+", "$SYS/x")
	f.Add("+/x", "$SYS/x")
	f.Add("a/+", "a/")
	f.Fuzz(func(t *testing.T, filters, topic string) {
		if CheckTopic(topic) != nil {
			return
		}
		var set filterSet
		want := false
		for filter := range strings.SplitSeq(filters, "\n") {
			if CheckFilter(filter) == nil && !strings.HasPrefix(filter, "$share/") {
				set.add(filter)
				want = want || Match(filter, topic)
			}
		}
		if got := set.match(topic); got != want {
			t.Errorf("%q of %q: %v, want %v", topic, filters, got, want)
		}
	})
}
