package enroll_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/cloudhub/enroll"
	"github.com/skerry-io/skerry/cloudhub/enroll/enrolltest"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

func TestCertificateIsTheHubsChoice(t *testing.T) {
	hub := enrolltest.Start(t, enroll.Config{})
	e := newEdge(hub, "edge-7")
	req := e.request(t, newToken(t, hub.Enroll, enroll.TokenOptions{}))
	var err error
	req.CSR, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject:  pkix.Name{CommonName: "system:admin", Organization: []string{"system:masters"}},
		DNSNames: []string{"kubernetes.default"},
	}, e.key)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.send(req); err != nil {
		t.Fatal(err)
	}
	c := e.cert.Leaf
	if c.Subject.CommonName != "system:node:edge-7" || fmt.Sprint(c.Subject.Organization) != "[system:nodes]" ||
		len(c.DNSNames)+len(c.IPAddresses)+len(c.URIs)+len(c.EmailAddresses) > 0 || c.IsCA ||
		len(c.ExtKeyUsage) != 1 || c.ExtKeyUsage[0] != x509.ExtKeyUsageClientAuth {
		t.Errorf("the certificate is for %s, names %v, CA %v, usages %v", c.Subject, c.DNSNames, c.IsCA, c.ExtKeyUsage)
	}
}

func TestKeyKinds(t *testing.T) {
	hub := enrolltest.Start(t, enroll.Config{JoinBurst: 100})
	token := newToken(t, hub.Enroll, enroll.TokenOptions{Uses: enroll.Unlimited})
	ec := func(c elliptic.Curve) crypto.Signer {
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("GODEBUG", "rsa1024min=0") // to make the weak key that must be refused
	rsa1024, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		key  crypto.Signer
		ok   bool
	}{
		{"ecdsa-p256", ec(elliptic.P256()), true}, {"ecdsa-p384", ec(elliptic.P384()), true}, {"ed25519", ed, true}, {"rsa-2048", rsa2048, true},
		{"ecdsa-p224", ec(elliptic.P224()), false}, {"ecdsa-p521", ec(elliptic.P521()), false}, {"rsa-1024", rsa1024, false},
	} {
		e := newEdge(hub, c.name)
		e.key = c.key
		if err := e.join(t, token); !c.ok {
			wantCode(t, err, edgeapi.JoinBadKey)
		} else if err != nil {
			t.Errorf("%s: %v", c.name, err)
		} else {
			wantName(t, e)
		}
	}

	// Somebody else's public key, without its private one.
	victim := newEdge(hub, "victim")
	req := victim.request(t, token)
	req.CSR[len(req.CSR)-1] ^= 1
	wantCode(t, victim.send(req), edgeapi.JoinBadKey)
}

func TestAuthorityIsMadeOnce(t *testing.T) {
	client := enrolltest.Client()
	var mu sync.Mutex
	pins := map[edgeapi.CAPin]bool{}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			e, err := enroll.New(context.Background(), enroll.Config{Client: client})
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			pins[edgeapi.PinOf(e.CACertificate())] = true
			mu.Unlock()
		})
	}
	wg.Wait()
	if len(pins) != 1 {
		t.Errorf("eight replicas made %d authorities", len(pins))
	}
}

// A hub must not make up another CA for nodes that trust the lost one.
func TestLostAuthority(t *testing.T) {
	client := enrolltest.Client()
	hub := replicas(t, client, 1, enroll.Config{})[0]
	if err := newEdge(hub, "edge-7").join(t, newToken(t, hub.Enroll, enroll.TokenOptions{})); err != nil {
		t.Fatal(err)
	}
	secrets := client.CoreV1().Secrets(namespace)
	if err := secrets.Delete(t.Context(), "skerry-ca", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	_, err := enroll.New(t.Context(), enroll.Config{Client: client})
	want := "enroll: Secret skerry-system/skerry-ca is gone but nodes have joined with it; restore it from a backup, or delete the Secrets labelled skerry.dev/enroll in namespace skerry-system to begin anew and join every node again"
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
	damaged := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "skerry-ca"}, Data: map[string][]byte{"tls.crt": []byte("x")}}
	if _, err := secrets.Create(t.Context(), damaged, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	_, err = enroll.New(t.Context(), enroll.Config{Client: client})
	want = "enroll: Secret skerry-system/skerry-ca holds the hub's CA but cannot be used: tls.crt is no PEM certificate; restore it from a backup"
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}
