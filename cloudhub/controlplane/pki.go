package controlplane

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"
)

const (
	authorityLife     = 10 * 365 * 24 * time.Hour
	leafLife          = 365 * 24 * time.Hour
	renewBefore       = 30 * 24 * time.Hour
	kubeletLife       = 7 * 24 * time.Hour
	backdate          = 5 * time.Minute // for clients whose clock is a little behind
	hubUser           = "skerry:cloudhub"
	kubeletClientName = "kube-apiserver-kubelet-client"
	frontProxyName    = "front-proxy-client"
)

// pki is the plane's certificates on disk. The authorities and keys are made
// once; leaves are issued again, for the same key, when they near their end
// or no longer say what they must. Keeping the key lets one rename replace a
// certificate: no reader ever sees a pair that does not match.
type pki struct {
	dir        string
	log        *slog.Logger
	server     serverNames
	cluster    *authority
	frontProxy *authority
	kubeletKey *ecdsa.PrivateKey // of all kubelet serving certificates; never leaves this process
}

// authority signs leaves.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
	pem  []byte
}

func (a *authority) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.cert)
	return p
}

// serverNames are what the API server's serving certificate must cover.
type serverNames struct {
	dns []string
	ips []net.IP
}

type leaf struct {
	file    string
	issuer  *authority
	subject pkix.Name
	server  bool
	names   serverNames
}

func (p *pki) leaves() []leaf {
	client := func(file, name string, groups ...string) leaf {
		return leaf{file: file, issuer: p.cluster, subject: pkix.Name{CommonName: name, Organization: groups}}
	}
	return []leaf{
		{file: "apiserver", issuer: p.cluster, subject: pkix.Name{CommonName: "kube-apiserver"}, server: true, names: p.server},
		{file: "front-proxy-client", issuer: p.frontProxy, subject: pkix.Name{CommonName: frontProxyName}},
		client("apiserver-kubelet-client", kubeletClientName),
		client("controller-manager", "system:kube-controller-manager"),
		client("scheduler", "system:kube-scheduler"),
		client("cloudhub", hubUser),
		client("admin", "kubernetes-admin", "system:masters"),
	}
}

// openPKI loads what is in dir, makes what is missing and renews what is due.
func openPKI(dir string, server serverNames, log *slog.Logger) (*pki, error) {
	p := &pki{dir: dir, log: log, server: server}
	var err error
	if p.cluster, err = p.authority("ca", "skerry-cluster-ca"); err != nil {
		return nil, err
	}
	if p.frontProxy, err = p.authority("front-proxy-ca", "skerry-front-proxy-ca"); err != nil {
		return nil, err
	}
	if err := p.serviceAccountKey(); err != nil {
		return nil, err
	}
	if p.kubeletKey, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, fmt.Errorf("control plane: make the key of kubelet connections: %w", err)
	}
	return p, p.renew()
}

// renew issues every leaf again that is missing, near its end or wrong.
func (p *pki) renew() error {
	for _, l := range p.leaves() {
		if err := p.ensure(l); err != nil {
			return fmt.Errorf("control plane: certificate %s: %w", p.path(l.file+".crt"), err)
		}
	}
	return nil
}

func (p *pki) path(name string) string { return filepath.Join(p.dir, name) }

func (p *pki) ensure(l leaf) error {
	key, err := p.key(l.file + ".key")
	if err != nil {
		return err
	}
	reason := l.wrong(p.path(l.file+".crt"), key, time.Now())
	if reason == "" {
		return nil
	}
	usage := x509.ExtKeyUsageClientAuth
	if l.server {
		usage = x509.ExtKeyUsageServerAuth
	}
	der, err := l.issuer.issue(&x509.Certificate{
		Subject:     l.subject,
		ExtKeyUsage: []x509.ExtKeyUsage{usage},
		DNSNames:    l.names.dns,
		IPAddresses: l.names.ips,
	}, leafLife, key.Public())
	if err != nil {
		return err
	}
	p.log.Info("issuing certificate", "name", l.file, "reason", reason)
	return writeFile(p.path(l.file+".crt"), encode("CERTIFICATE", der), 0o644)
}

// wrong says why the certificate on disk will not do; empty when it will.
func (l leaf) wrong(path string, key crypto.Signer, now time.Time) string {
	cert, _, err := readCertificate(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "there is none"
	case err != nil:
		return err.Error()
	case !samePublicKey(cert, key):
		return "it is for another key"
	case cert.CheckSignatureFrom(l.issuer.cert) != nil:
		return "it is from another authority"
	case now.Before(cert.NotBefore):
		return "it is not valid yet by this machine's clock"
	case now.Add(renewBefore).After(cert.NotAfter) && cert.NotAfter.Before(l.issuer.cert.NotAfter):
		return "it ends " + cert.NotAfter.UTC().Format(time.RFC3339)
	case cert.Subject.CommonName != l.subject.CommonName || !slices.Equal(cert.Subject.Organization, l.subject.Organization):
		return "it has another subject"
	}
	for _, name := range l.names.dns {
		if !slices.Contains(cert.DNSNames, name) {
			return "it does not cover " + name
		}
	}
	for _, ip := range l.names.ips {
		if !slices.ContainsFunc(cert.IPAddresses, ip.Equal) {
			return "it does not cover " + ip.String()
		}
	}
	return ""
}

// authority loads or makes one. A certificate without its key, or the
// reverse of what the clock says, is refused: a new authority would lock out
// every kubeconfig that trusts the old one.
func (p *pki) authority(file, name string) (*authority, error) {
	certPath, keyPath := p.path(file+".crt"), p.path(file+".key")
	cert, raw, err := readCertificate(certPath)
	if errors.Is(err, fs.ErrNotExist) {
		return p.newAuthority(file, name)
	}
	if err != nil {
		return nil, fmt.Errorf("control plane: authority %s: %w; restore it from a backup", certPath, err)
	}
	if _, err := os.Stat(keyPath); err != nil {
		return nil, fmt.Errorf("control plane: key of authority %s: %w; restore it from a backup", certPath, err)
	}
	key, err := p.key(file + ".key")
	if err != nil {
		return nil, fmt.Errorf("control plane: authority: %w; restore it from a backup", err)
	}
	if !samePublicKey(cert, key) {
		return nil, fmt.Errorf("control plane: %s is not the key of %s; restore both from one backup", keyPath, certPath)
	}
	now := time.Now()
	if now.Before(cert.NotBefore) {
		return nil, fmt.Errorf("control plane: authority %s is valid from %s but this machine's clock says %s; set the clock",
			certPath, cert.NotBefore.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	if now.After(cert.NotAfter) {
		return nil, fmt.Errorf("control plane: authority %s ended %s and this machine's clock says %s; if the clock is right, move %s and %s away to make a new authority (kubeconfigs must then be handed out again)",
			certPath, cert.NotAfter.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339), certPath, keyPath)
	}
	if left := cert.NotAfter.Sub(now); left < leafLife {
		p.log.Warn("authority nears its end; plan to replace it", "file", certPath, "notAfter", cert.NotAfter)
	}
	return &authority{cert: cert, key: key, pem: raw}, nil
}

func (p *pki) newAuthority(file, name string) (*authority, error) {
	key, err := p.key(file + ".key")
	if err != nil {
		return nil, fmt.Errorf("control plane: make authority %s: %w", name, err)
	}
	a := &authority{key: key}
	a.cert = &x509.Certificate{
		Subject:               pkix.Name{CommonName: name},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature | x509.KeyUsageCRLSign,
		NotAfter:              time.Now().Add(authorityLife),
	}
	der, err := a.issue(a.cert, authorityLife, key.Public())
	if err == nil {
		a.cert, err = x509.ParseCertificate(der)
	}
	if err == nil {
		a.pem = encode("CERTIFICATE", der)
		err = writeFile(p.path(file+".crt"), a.pem, 0o644)
	}
	if err != nil {
		return nil, fmt.Errorf("control plane: make authority %s: %w", name, err)
	}
	return a, nil
}

// issue signs t for life from now, but not beyond the authority's own end.
func (a *authority) issue(t *x509.Certificate, life time.Duration, public crypto.PublicKey) ([]byte, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	now := time.Now()
	t.SerialNumber = serial
	t.NotBefore = now.Add(-backdate)
	t.NotAfter = now.Add(life)
	if t.NotAfter.After(a.cert.NotAfter) {
		t.NotAfter = a.cert.NotAfter
	}
	if t.KeyUsage == 0 {
		t.KeyUsage = x509.KeyUsageDigitalSignature
	}
	return x509.CreateCertificate(rand.Reader, t, a.cert, public, a.key)
}

// kubeletServing issues the in-memory certificate of one virtual IP.
func (p *pki) kubeletServing(ip netip.Addr) (*tls.Certificate, error) {
	der, err := p.cluster.issue(&x509.Certificate{
		Subject:     pkix.Name{CommonName: "kubelet at " + ip.String()},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IPAddresses: []net.IP{ip.AsSlice()},
	}, kubeletLife, p.kubeletKey.Public())
	if err != nil {
		return nil, fmt.Errorf("issue kubelet serving certificate for %s: %w", ip, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("issue kubelet serving certificate for %s: %w", ip, err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: p.kubeletKey, Leaf: cert}, nil
}

// serviceAccountKey is the key that signs service account tokens. Its public
// half is a file of its own, as the API server wants it.
func (p *pki) serviceAccountKey() error {
	key, err := p.key("sa.key")
	if err != nil {
		return fmt.Errorf("control plane: service account key: %w", err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err == nil {
		err = writeFile(p.path("sa.pub"), encode("PUBLIC KEY", der), 0o644)
	}
	if err != nil {
		return fmt.Errorf("control plane: service account key: %w", err)
	}
	return nil
}

// key loads the private key, or makes it when there is none; either way the
// file is its owner's alone.
func (p *pki) key(name string) (*ecdsa.PrivateKey, error) {
	path := p.path(name)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return newKey(path)
	}
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "EC PRIVATE KEY" {
		return nil, fmt.Errorf("%s is not an EC private key in PEM", path)
	}
	key, err := x509.ParseECPrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return key, nil
}

func newKey(path string) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, err
	}
	return key, writeFile(path, encode("EC PRIVATE KEY", der), 0o600)
}

func readCertificate(path string) (*x509.Certificate, []byte, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, nil, fmt.Errorf("%s is not a certificate in PEM", path)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	return cert, data, nil
}

func samePublicKey(cert *x509.Certificate, key crypto.Signer) bool {
	public, ok := cert.PublicKey.(*ecdsa.PublicKey)
	return ok && public.Equal(key.Public())
}

func encode(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}
