package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// JoinOptions say which hub to join, and as whom.
type JoinOptions struct {
	HubURL string // as ParseHubURL takes it; required
	Token  string // the text cloudhub token create printed; required
	// NodeName is the node's name in the cluster; empty means this machine's
	// host name.
	NodeName string
	// Replace takes the name over from the node that has it, if the token
	// allows that. It implies Force.
	Replace bool
	// Force gives up the identity this machine has, once the new one is there.
	Force   bool
	DataDir string        // required; made if missing
	Timeout time.Duration // for all of it, retries included; zero means 1 minute
	Log     *slog.Logger  // nil discards
}

// Join enrols this machine at a hub and writes its identity to
// DataDir/identity. Until that has succeeded nothing that was there changes.
//
// Join may be repeated after any failure: the key is kept until the hub's
// answer is on disk, so that a hub whose answer was lost recognises the
// machine and does not ask for another token.
//
// Errors say what failed, where, and what to do next; those about the hub are
// *Error.
func Join(ctx context.Context, opts JoinOptions) (*Identity, error) {
	j, err := opts.complete()
	if err != nil {
		return nil, err
	}
	if err := prepareDir(j.dataDir); err != nil {
		return nil, err
	}
	release, err := lock(j.dataDir)
	if err != nil {
		return nil, fmt.Errorf("join: %w", err)
	}
	defer release()
	if err := j.refuseSecondJoin(opts.Replace || opts.Force); err != nil {
		return nil, err
	}
	key, keyPEM, err := j.pendingKey()
	if err != nil {
		return nil, err
	}

	ctx, cancel := context.WithTimeout(ctx, j.timeout)
	defer cancel()
	hub := &hubClient{url: j.hub, node: j.node, op: "join", log: j.log}
	ca, err := hub.pinnedCA(ctx, j.token.Pin)
	if err != nil {
		return nil, err
	}
	resp, err := j.ask(ctx, hub, ca, key, opts.Replace)
	if err != nil {
		return nil, err
	}
	m, err := accept(resp, acceptance{hub: j.hub, node: j.node, keyPEM: keyPEM, key: key, trusted: []*x509.Certificate{ca}})
	if err != nil {
		return nil, hub.fail(ReasonBadAnswer, err, "the hub's answer cannot be used: "+err.Error(), "update edgecore or cloudhub so that their versions fit")
	}
	m.meta.Join = rand.Text()
	if err := install(j.dataDir, m); err != nil {
		return nil, fmt.Errorf("join: the hub accepted this machine as node %s, but %w; then run the same command again within 10 minutes", j.node, err)
	}
	if err := os.RemoveAll(filepath.Join(j.dataDir, pendingDir)); err != nil {
		j.log.Warn("a left-over directory could not be removed", "error", err)
	}
	j.warnSkew(resp.Time)
	return newIdentity(j.dataDir, m), nil
}

// joining is a JoinOptions after its checks.
type joining struct {
	hub     *url.URL
	token   edgeapi.Token
	node    string
	dataDir string
	timeout time.Duration
	log     *slog.Logger
}

func (o JoinOptions) complete() (*joining, error) {
	hub, err := ParseHubURL(o.HubURL)
	if err != nil {
		return nil, fmt.Errorf("join: %w", err)
	}
	token, err := edgeapi.ParseToken(o.Token)
	if err != nil {
		return nil, fmt.Errorf("join: %w; copy the whole line that cloudhub token create printed", err)
	}
	node, err := nodeName(o.NodeName, os.Hostname)
	if err != nil {
		return nil, fmt.Errorf("join: %w", err)
	}
	if o.DataDir == "" {
		return nil, errors.New("join: the data directory is missing; give it with --data-dir")
	}
	j := &joining{hub: hub, token: token, node: node, dataDir: o.DataDir, timeout: o.Timeout, log: o.Log}
	if j.timeout == 0 {
		j.timeout = time.Minute
	}
	if j.log == nil {
		j.log = slog.New(slog.DiscardHandler)
	}
	return j, nil
}

// nodeName checks the name asked for, or makes one of the host's.
func nodeName(asked string, hostname func() (string, error)) (string, error) {
	name, whose := asked, "node name"
	if name == "" {
		host, err := hostname()
		if err != nil {
			return "", fmt.Errorf("find this machine's host name: %w; give one with --node-name", err)
		}
		name, whose = strings.ToLower(strings.TrimSuffix(host, ".")), "this machine's host name"
		if name == "" || name == "localhost" || strings.HasPrefix(name, "localhost.") {
			return "", fmt.Errorf("this machine's host name is %q, as many others' is; give a node name with --node-name", host)
		}
	}
	msgs := validation.IsDNS1123Subdomain(name)
	if len(msgs) == 0 && len(name) > validation.LabelValueMaxLength {
		msgs = []string{fmt.Sprintf("it has %d characters, more than %d", len(name), validation.LabelValueMaxLength)}
	}
	if len(msgs) == 0 {
		return name, nil
	}
	next := "give another with --node-name"
	if s := suggestName(name); s != "" {
		next = "give another with --node-name, for instance " + s
	}
	return "", fmt.Errorf("%s %q cannot name a node: %s; %s", whose, name, msgs[0], next)
}

// suggestName turns name into an allowed one, or "".
func suggestName(name string) string {
	s := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9', r == '-', r == '.':
			return r
		}
		return '-'
	}, strings.ToLower(name))
	s = strings.Trim(s[:min(len(s), validation.LabelValueMaxLength)], "-.")
	if len(validation.IsDNS1123Subdomain(s)) > 0 {
		return ""
	}
	return s
}

// prepareDir makes the data directory and proves that it can be written,
// before a token is spent on it.
func prepareDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("join: make data directory %s: %w", dir, explainWrite(err))
	}
	probe := filepath.Join(dir, ".write-test")
	err := os.Remove(probe)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		err = writeFile(probe, 0o600, []byte("edgecore join checks that this directory can be written\n"))
	}
	if err != nil {
		return fmt.Errorf("join: write to data directory %s: %w", dir, explainWrite(err))
	}
	if err := os.Remove(probe); err != nil {
		return fmt.Errorf("join: write to data directory %s: %w", dir, explainWrite(err))
	}
	return nil
}

// refuseSecondJoin keeps a node from losing its identity by a slip.
func (j *joining) refuseSecondJoin(giveUp bool) error {
	present, err := Load(j.dataDir)
	switch {
	case giveUp || errors.Is(err, ErrNotJoined):
		return nil
	case err != nil:
		return fmt.Errorf("join: %s holds an identity that cannot be read: %w; with --force it is given up", j.dataDir, err)
	}
	return fmt.Errorf("join: this machine has joined %s as node %s already (%s); to give that up and join anew, add --force, or --replace to keep the name",
		present.HubURL(), present.NodeName(), filepath.Join(j.dataDir, dirName))
}

// pendingKey returns the key this join uses: the one an earlier try with the
// same token, hub and name left behind, or a new one. It is on disk before the
// hub hears of it.
func (j *joining) pendingKey() (*ecdsa.PrivateKey, []byte, error) {
	dir := filepath.Join(j.dataDir, pendingDir)
	want, err := json.Marshal(map[string]string{"hub": j.hub.String(), "tokenID": j.token.ID, "node": j.node})
	if err != nil {
		return nil, nil, fmt.Errorf("join: %w", err)
	}
	if have, err := readBounded(filepath.Join(dir, "join.json")); err == nil && string(have) == string(want) {
		if keyPEM, err := readBounded(filepath.Join(dir, keyFile)); err == nil {
			if key, err := parseKey(keyPEM); err == nil {
				return key, keyPEM, nil
			}
		}
	}
	key, keyPEM, err := newKey()
	if err != nil {
		return nil, nil, fmt.Errorf("join: make a key: %w", err)
	}
	err = os.RemoveAll(dir)
	if err == nil {
		err = writeDir(dir, []file{{keyFile, 0o600, keyPEM}, {"join.json", 0o600, want}})
	}
	if err == nil {
		err = syncDir(j.dataDir)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("join: keep the new key in %s: %w", dir, explainWrite(err))
	}
	return key, keyPEM, nil
}

func newKey() (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	return key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func parseKey(keyPEM []byte) (*ecdsa.PrivateKey, error) {
	block, _ := pem.Decode(keyPEM)
	if block == nil {
		return nil, errors.New("no PEM key")
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("a %T, not an ECDSA key", parsed)
	}
	return key, nil
}

func newCSR(key *ecdsa.PrivateKey) ([]byte, error) {
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
}

// ask sends the join request over a connection that ends in ca.
func (j *joining) ask(ctx context.Context, hub *hubClient, ca *x509.Certificate, key *ecdsa.PrivateKey, replace bool) (*edgeapi.JoinResponse, error) {
	csr, err := newCSR(key)
	if err != nil {
		return nil, fmt.Errorf("join: make a certificate request: %w", err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	return hub.post(ctx, &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots}, edgeapi.JoinPath, edgeapi.JoinRequest{
		TokenID: j.token.ID, TokenSecret: j.token.Secret, NodeName: j.node, CSR: csr, Replace: replace,
	})
}

// acceptance is what an answer must fit.
type acceptance struct {
	hub     *url.URL
	node    string
	key     *ecdsa.PrivateKey
	keyPEM  []byte
	trusted []*x509.Certificate // the CAs trusted so far
}

// accept checks a hub's answer before it becomes this node's identity.
func accept(resp *edgeapi.JoinResponse, want acceptance) (*material, error) {
	cert, err := x509.ParseCertificate(resp.Certificate)
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	if !want.key.PublicKey.Equal(cert.PublicKey) {
		return nil, errors.New("the certificate is for another key")
	}
	if cert.Subject.CommonName != edgeapi.NodeUserPrefix+want.node {
		return nil, fmt.Errorf("the certificate is for %q, not for node %s", cert.Subject.CommonName, want.node)
	}
	var cas []*x509.Certificate
	roots, kept := x509.NewCertPool(), false
	for _, der := range resp.CAs {
		ca, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("CA: %w", err)
		}
		if !ca.IsCA {
			return nil, fmt.Errorf("CA: %q is none", ca.Subject.CommonName)
		}
		for _, t := range want.trusted {
			kept = kept || t.Equal(ca)
		}
		cas = append(cas, ca)
		roots.AddCert(ca)
	}
	if !kept {
		return nil, errors.New("its CAs do not include the one this node trusts")
	}
	// Judged at its own moment: this machine's clock is no witness.
	if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: cert.NotAfter, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	m := &material{
		meta:   meta{Version: metaVersion, Hub: want.hub.String(), NodeName: want.node, VirtualIP: resp.VirtualIP, IssuedAt: resp.Time.UTC().Truncate(time.Second)},
		hub:    want.hub,
		cert:   tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: want.key, Leaf: cert},
		keyPEM: want.keyPEM,
		cas:    cas,
		roots:  roots,
	}
	return m, nil
}

// warnSkew tells of a clock that is off without having kept the join from
// succeeding.
func (j *joining) warnSkew(hubTime time.Time) {
	if hubTime.IsZero() {
		return
	}
	if off := time.Since(hubTime); off.Abs() > 2*time.Minute {
		j.log.Warn("this machine's clock differs from the hub's; set it, or logs and tokens will be off", "this", time.Now().UTC(), "hub", hubTime, "by", off.Round(time.Second))
	}
}
