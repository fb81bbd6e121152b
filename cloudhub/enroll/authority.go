package enroll

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

const (
	caSecretName = "skerry-ca"
	caLifetime   = 20 * 365 * 24 * time.Hour
	// caBackdate lets edges join whose clock is up to a day behind the hub's.
	caBackdate = 24 * time.Hour
	// leafBackdate covers clocks that differ between hub replicas.
	leafBackdate = time.Hour
)

// authority is the hub's own CA, apart from the cluster's. Immutable.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
	pool *x509.CertPool // cert alone
}

func (a *authority) pin() edgeapi.CAPin { return edgeapi.PinOf(a.cert) }

// ensureAuthority reads the CA, or makes it when there is none. Of several
// replicas that make one at once, the API server lets one win and the others
// read its.
func ensureAuthority(ctx context.Context, secrets typedcorev1.SecretInterface, namespace string, now func() time.Time) (*authority, error) {
	subject := "Secret " + namespace + "/" + caSecretName
	for range 3 {
		secret, err := secrets.Get(ctx, caSecretName, metav1.GetOptions{})
		if err == nil {
			a, err := parseAuthority(secret.Data[corev1.TLSCertKey], secret.Data[corev1.TLSPrivateKeyKey])
			if err != nil {
				return nil, fmt.Errorf("enroll: %s holds the hub's CA but cannot be used: %w; restore it from a backup", subject, err)
			}
			return a, nil
		}
		if !apierrors.IsNotFound(err) {
			return nil, fmt.Errorf("enroll: read %s: %w", subject, err)
		}

		// A hub that lost its CA must not make up another: every node would
		// be locked out, and silently.
		nodes, err := secrets.List(ctx, metav1.ListOptions{LabelSelector: labelKind + "=" + kindNode, Limit: 1})
		if err != nil {
			return nil, fmt.Errorf("enroll: look for nodes in namespace %s: %w", namespace, err)
		}
		if len(nodes.Items) > 0 {
			return nil, fmt.Errorf("enroll: %s is gone but nodes have joined with it; restore it from a backup, or delete the Secrets labelled %s in namespace %s to begin anew and join every node again",
				subject, labelKind, namespace)
		}

		certPEM, keyPEM, err := newAuthorityPEM(now())
		if err != nil {
			return nil, fmt.Errorf("enroll: make a CA: %w", err)
		}
		immutable := true
		_, err = secrets.Create(ctx, &corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{Name: caSecretName, Labels: map[string]string{labelKind: kindCA}},
			Type:       corev1.SecretTypeTLS,
			Immutable:  &immutable, // a stray edit would lock every node out
			Data:       map[string][]byte{corev1.TLSCertKey: certPEM, corev1.TLSPrivateKeyKey: keyPEM},
		}, metav1.CreateOptions{})
		if err != nil && !apierrors.IsAlreadyExists(err) {
			return nil, fmt.Errorf("enroll: create %s: %w", subject, err)
		}
		// Read it back in either case: what the others will read counts.
	}
	return nil, fmt.Errorf("enroll: %s is created and vanishes again; something in the cluster deletes it", subject)
}

func newAuthorityPEM(now time.Time) (certPEM, keyPEM []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		// The serial in the name keeps two hubs' CAs apart in messages.
		Subject:               pkix.Name{Organization: []string{edgeapi.HubOrganization}, CommonName: fmt.Sprintf("Skerry hub CA %08x", serial.Bytes()[:4])},
		NotBefore:             now.Add(-caBackdate),
		NotAfter:              now.Add(caLifetime),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), nil
}

func parseAuthority(certPEM, keyPEM []byte) (*authority, error) {
	block, _ := pem.Decode(certPEM)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("tls.crt is no PEM certificate")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("tls.crt: %w", err)
	}
	if !cert.IsCA {
		return nil, errors.New("tls.crt is no CA certificate")
	}
	block, _ = pem.Decode(keyPEM)
	if block == nil {
		return nil, errors.New("tls.key is no PEM key")
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, errors.New("tls.key is no PKCS #8 key")
	}
	key, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, errors.New("tls.key is of a kind that cannot sign")
	}
	pub, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil || !bytes.Equal(pub, cert.RawSubjectPublicKeyInfo) {
		return nil, errors.New("tls.key does not belong to tls.crt")
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return &authority{cert: cert, key: key, pool: pool}, nil
}

// issueNode makes the certificate of a node: everything but the public key is
// the hub's choice.
func (a *authority) issueNode(name string, pub crypto.PublicKey, now time.Time, lifetime time.Duration) (*x509.Certificate, error) {
	return a.issue(&x509.Certificate{
		Subject:     pkix.Name{Organization: []string{edgeapi.NodesGroup}, CommonName: edgeapi.NodeUserPrefix + name},
		NotBefore:   now.Add(-leafBackdate),
		NotAfter:    now.Add(lifetime),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, pub)
}

func (a *authority) issue(template *x509.Certificate, pub crypto.PublicKey) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template.SerialNumber = serial
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.BasicConstraintsValid = true
	if template.NotBefore.Before(a.cert.NotBefore) {
		template.NotBefore = a.cert.NotBefore
	}
	if template.NotAfter.After(a.cert.NotAfter) {
		template.NotAfter = a.cert.NotAfter
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, pub, a.key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// newSerial returns a positive number of 127 bits (RFC 5280, 4.1.2.2).
func newSerial() (*big.Int, error) {
	b := make([]byte, 16)
	if _, err := rand.Read(b); err != nil {
		return nil, err
	}
	b[0] = b[0]&0x7f | 0x40
	return new(big.Int).SetBytes(b), nil
}

// requestedKey takes the public key out of a CSR, after the CSR proved that
// its sender holds the private one. Everything else in the CSR is ignored.
func requestedKey(der []byte) (crypto.PublicKey, string, error) {
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, "", refuse(edgeapi.JoinBadKey, "the certificate request cannot be read: %v", err)
	}
	if err := checkKey(csr.PublicKey); err != nil {
		return nil, "", refuse(edgeapi.JoinBadKey, "the certificate request's key is refused: %v", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, "", refuse(edgeapi.JoinBadKey, "the certificate request is not signed by its own key")
	}
	return csr.PublicKey, fingerprint(csr.RawSubjectPublicKeyInfo), nil
}

func checkKey(pub crypto.PublicKey) error {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		if k.Curve != elliptic.P256() && k.Curve != elliptic.P384() {
			return fmt.Errorf("curve %s is not P-256 or P-384", k.Curve.Params().Name)
		}
	case ed25519.PublicKey:
	case *rsa.PublicKey:
		// The upper bound keeps verification cheap for the hub.
		if bits := k.N.BitLen(); bits < 2048 || bits > 4096 {
			return fmt.Errorf("an RSA key of %d bits is not within 2048 to 4096", bits)
		}
	default:
		return fmt.Errorf("key kind %T is not ECDSA, Ed25519 or RSA", pub)
	}
	return nil
}

// fingerprint names a public key in records: hex SHA-256 of its
// SubjectPublicKeyInfo.
func fingerprint(spki []byte) string {
	sum := sha256.Sum256(spki)
	return hex.EncodeToString(sum[:])
}
