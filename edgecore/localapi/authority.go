package localapi

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"
)

// leafLife is how long a serving certificate is used. It lives in memory, with
// its key, and is made anew with every start.
const leafLife = 60 * 24 * time.Hour

// Certificates are good by any clock: a device that boots in 1970, or whose
// clock jumps, has to be served, and the pods hold the authority as their root.
// What ends a serving certificate's use is its age, not its date.
var (
	noBeginning = time.Unix(0, 0).UTC()
	noEnd       = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC) // RFC 5280 4.1.2.5
)

// authority is the node's own certificate authority, for nothing but this API.
type authority struct {
	cert  *x509.Certificate
	key   crypto.Signer
	pem   []byte // the certificate
	names []string
	addrs []netip.Addr
	clock func() time.Time

	mu   sync.Mutex
	leaf *tls.Certificate
	from time.Time // clock when leaf was made
}

func openAuthority(path, node string, names []string, addrs []netip.Addr, clock func() time.Time) (*authority, error) {
	raw, err := readSecret(path)
	if errors.Is(err, fs.ErrNotExist) {
		raw, err = makeAuthority(path, node)
	}
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(raw, raw)
	if err == nil && !pair.Leaf.IsCA {
		err = errors.New("the certificate is not an authority's")
	}
	if err != nil {
		return nil, fmt.Errorf("local API: authority %s: %w; remove the file to have a new one made (pods trust it once their ca.crt is updated)", path, err)
	}
	a := &authority{cert: pair.Leaf, key: pair.PrivateKey.(crypto.Signer), names: names, addrs: addrs, clock: clock}
	a.pem = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
	return a, nil
}

func makeAuthority(path, node string) ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("local API: make an authority: %w", err)
	}
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: "skerry local API of " + node},
		NotBefore: noBeginning, NotAfter: noEnd,
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, fmt.Errorf("local API: make an authority: %w", err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("local API: make an authority: %w", err)
	}
	raw := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})...)
	return raw, writeSecret(path, raw)
}

func serial() *big.Int {
	b := make([]byte, 16)
	rand.Read(b)
	b[0] &= 0x7f
	return new(big.Int).SetBytes(b)
}

func (a *authority) base64() string { return base64.StdEncoding.EncodeToString(a.pem) }

func (a *authority) serverTLS() *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS12,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return a.serving() },
	}
}

// serving is the certificate to serve with now.
func (a *authority) serving() (*tls.Certificate, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.clock()
	if age := now.Sub(a.from); a.leaf != nil && age < leafLife && age > -leafLife {
		return a.leaf, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("local API: make a certificate: %w", err)
	}
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: "kubernetes"},
		NotBefore: noBeginning, NotAfter: noEnd,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames: a.names,
	}
	for _, ip := range a.addrs {
		template.IPAddresses = append(template.IPAddresses, net.IP(ip.AsSlice()))
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &key.PublicKey, a.key)
	if err != nil {
		return nil, fmt.Errorf("local API: make a certificate: %w", err)
	}
	a.leaf, a.from = &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, now
	return a.leaf, nil
}

// openToken returns the administrator's token, made when missing.
func openToken(path string) (string, error) {
	b, err := readSecret(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return "", err
	default:
		if token := strings.TrimSpace(string(b)); len(token) >= 32 {
			return token, nil
		}
	}
	raw := make([]byte, 24)
	rand.Read(raw)
	token := hex.EncodeToString(raw)
	return token, writeSecret(path, []byte(token+"\n"))
}
