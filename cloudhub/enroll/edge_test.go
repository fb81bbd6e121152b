package enroll_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes/fake"

	"github.com/skerry-io/skerry/cloudhub/enroll"
	"github.com/skerry-io/skerry/cloudhub/enroll/enrolltest"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// clock is the machine's clock, moved.
type clock struct{ offset atomic.Int64 }

func (c *clock) now() time.Time          { return time.Now().Add(time.Duration(c.offset.Load())) }
func (c *clock) advance(d time.Duration) { c.offset.Add(int64(d)) }

// edge is a machine that joins by hand, so that it can do what edgecore never
// would.
type edge struct {
	hub  *enrolltest.Hub
	name string
	key  crypto.Signer
	cert *tls.Certificate
}

func newEdge(hub *enrolltest.Hub, name string) *edge {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	return &edge{hub: hub, name: name, key: key}
}

func csrOf(key crypto.Signer) []byte {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		panic(err)
	}
	return der
}

// client trusts the hub's CA and shows e's certificate, if it has one.
func (e *edge) client() *http.Client {
	roots := x509.NewCertPool()
	roots.AddCert(e.hub.CACertificate())
	conf := &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots}
	if e.cert != nil {
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return e.cert, nil }
	}
	return &http.Client{Transport: &http.Transport{TLSClientConfig: conf, DisableKeepAlives: true}, Timeout: 30 * time.Second}
}

// post returns the hub's answer; a refusal is a *edgeapi.JoinError.
func (e *edge) post(path string, body any) (*edgeapi.JoinResponse, error) {
	encoded, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	resp, err := e.client().Post(e.hub.URL+path, "application/json", bytes.NewReader(encoded))
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.Header.Get(edgeapi.HubHeader) == "" {
		return nil, fmt.Errorf("answer %s without %s", resp.Status, edgeapi.HubHeader)
	}
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		var refusal edgeapi.JoinError
		if err := json.Unmarshal(answer, &refusal); err != nil {
			return nil, fmt.Errorf("%s: %q: %w", resp.Status, answer, err)
		}
		return nil, &refusal
	}
	var joined edgeapi.JoinResponse
	return &joined, json.Unmarshal(answer, &joined)
}

func (e *edge) request(t *testing.T, token string) edgeapi.JoinRequest {
	t.Helper()
	parsed, err := edgeapi.ParseToken(token)
	if err != nil {
		t.Fatal(err)
	}
	return edgeapi.JoinRequest{TokenID: parsed.ID, TokenSecret: parsed.Secret, NodeName: e.name, CSR: csrOf(e.key)}
}

func (e *edge) join(t *testing.T, token string) error {
	t.Helper()
	return e.send(e.request(t, token))
}

func (e *edge) send(req edgeapi.JoinRequest) error {
	resp, err := e.post(edgeapi.JoinPath, req)
	if err != nil {
		return err
	}
	return e.take(resp.Certificate, e.key)
}

func (e *edge) take(der []byte, key crypto.Signer) error {
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	e.key, e.cert = key, &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
	return nil
}

// whoAmI asks as any endpoint but join and renew would find out.
func (e *edge) whoAmI() (string, error) {
	resp, err := e.client().Get(e.hub.URL + enrolltest.WhoAmI)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		var refusal edgeapi.JoinError
		if err := json.Unmarshal(body, &refusal); err != nil {
			return "", fmt.Errorf("%s: %q", resp.Status, body)
		}
		return "", &refusal
	}
	return string(body), nil
}

func newToken(t *testing.T, e *enroll.Enroll, opts enroll.TokenOptions) string {
	t.Helper()
	text, _, err := e.Tokens().Create(context.Background(), opts)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func tokenInfo(t *testing.T, e *enroll.Enroll, text string) enroll.TokenInfo {
	t.Helper()
	token, err := edgeapi.ParseToken(text)
	if err != nil {
		t.Fatal(err)
	}
	list, err := e.Tokens().List(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for _, info := range list {
		if info.ID == token.ID {
			return info
		}
	}
	t.Fatalf("token %s is not listed", token.ID)
	return enroll.TokenInfo{}
}

func codeOf(err error) edgeapi.JoinErrorCode {
	var refusal *edgeapi.JoinError
	if errors.As(err, &refusal) {
		return refusal.Code
	}
	return ""
}

func wantCode(t *testing.T, err error, code edgeapi.JoinErrorCode) {
	t.Helper()
	if codeOf(err) != code {
		t.Fatalf("got %v, want refusal %s", err, code)
	}
}

func wantName(t *testing.T, e *edge) {
	t.Helper()
	if got, err := e.whoAmI(); err != nil || got != e.name {
		t.Fatalf("the hub takes %s for %q, error %v", e.name, got, err)
	}
}

// replicas starts n hubs over one cluster.
func replicas(t *testing.T, client *fake.Clientset, n int, cfg enroll.Config) []*enrolltest.Hub {
	cfg.Client = client
	var hubs []*enrolltest.Hub
	for range n {
		hubs = append(hubs, enrolltest.Start(t, cfg))
	}
	return hubs
}

func await(t *testing.T, what string, met func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !met() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
		timer := time.NewTimer(5 * time.Millisecond)
		select {
		case <-timer.C:
		case <-t.Context().Done():
			t.FailNow()
		}
	}
}

func isSecret(name, prefix string) bool { return strings.HasPrefix(name, prefix) }
