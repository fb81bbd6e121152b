package identity

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// What lies in DataDir/identity.
const (
	dirName     = "identity"
	keyFile     = "node.key"
	certFile    = "node.crt"
	caFile      = "ca.crt"
	metaFile    = "identity.json"
	nextKeyFile = "next.key" // of a renewal under way

	metaVersion = 1
	maxFile     = 256 << 10
)

// ErrNotJoined is returned by Load on a machine that is no node.
var ErrNotJoined = errors.New("this machine has not joined a hub")

// Identity is a node's identity. Its methods may be called at once from many
// goroutines.
type Identity struct {
	dataDir string

	mu      sync.RWMutex
	current *material
	clock   func() time.Time
}

// material is one generation of the identity. Immutable.
type material struct {
	meta   meta
	hub    *url.URL
	cert   tls.Certificate // with Leaf
	keyPEM []byte
	cas    []*x509.Certificate
	roots  *x509.CertPool
}

// meta is identity.json.
type meta struct {
	Version   int    `json:"version"`
	Hub       string `json:"hub"`
	NodeName  string `json:"nodeName"`
	VirtualIP string `json:"virtualIP"`
	// IssuedAt is the hub's clock when it issued the certificate: this
	// machine's clock cannot rightly be before it.
	IssuedAt time.Time `json:"issuedAt"`
	// Join names the joining that this identity began with. Renewals keep it.
	Join string `json:"join,omitempty"`
}

// Load reads the identity of the node whose data lies in dataDir. A
// certificate that has expired is no error: the hub may still renew it.
func Load(dataDir string) (*Identity, error) {
	dir := filepath.Join(dataDir, dirName)
	if err := finishInstall(dataDir); err != nil {
		return nil, err
	}
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("identity: %s: %w; run: edgecore join https://HUB:10443 --token TOKEN", dir, ErrNotJoined)
	}
	m, err := readMaterial(dir)
	if err != nil {
		return nil, err
	}
	return newIdentity(dataDir, m), nil
}

func newIdentity(dataDir string, m *material) *Identity {
	return &Identity{dataDir: dataDir, current: m, clock: time.Now}
}

// Remove deletes the identity in dataDir, if there is one, and what is left of
// joins under way. The hub still has the node on record.
func Remove(dataDir string) error {
	for _, name := range []string{dirName, newDir, oldDir, pendingDir} {
		if err := os.RemoveAll(filepath.Join(dataDir, name)); err != nil {
			return fmt.Errorf("identity: remove: %w", err)
		}
	}
	return nil
}

// NodeName is the node's name in the cluster.
func (id *Identity) NodeName() string { return id.material().meta.NodeName }

// JoinID names the joining that made this machine a node. It differs from
// joining to joining and stays through renewals.
func (id *Identity) JoinID() string { return id.material().meta.Join }

// HubURL is the hub's base URL, without a path.
func (id *Identity) HubURL() *url.URL { u := *id.material().hub; return &u }

// VirtualIP is the node's InternalIP in the cluster, as the hub chose it.
func (id *Identity) VirtualIP() string { return id.material().meta.VirtualIP }

// Certificate is the node's present certificate.
func (id *Identity) Certificate() *x509.Certificate { return id.material().cert.Leaf }

// Reload reads the identity from disk again, after another process changed
// it. On an error the present one stays.
func (id *Identity) Reload() error {
	m, err := readMaterial(filepath.Join(id.dataDir, dirName))
	if err != nil {
		return err
	}
	id.adopt(m)
	return nil
}

func (id *Identity) adopt(m *material) {
	id.mu.Lock()
	id.current = m
	id.mu.Unlock()
}

func (id *Identity) material() *material {
	id.mu.RLock()
	defer id.mu.RUnlock()
	return id.current
}

// IssuedAt is the hub's clock when it issued the certificate: that moment has
// passed.
func (id *Identity) IssuedAt() time.Time { return id.material().meta.IssuedAt }

// UseClock has certificates judged by another clock than this machine's, which
// may be wrong.
func (id *Identity) UseClock(now func() time.Time) {
	id.mu.Lock()
	defer id.mu.Unlock()
	id.clock = now
}

// ClientTLS returns the configuration for connections to the hub: TLS 1.3,
// the hub's CA as the only root, and the certificate that is present when the
// connection is made, so that one configuration outlives renewals. A change of
// the hub's CA needs a new one.
//
// A clock that stands before the moment the certificate was issued, as that
// of a board without a battery does after power was cut, is taken to stand at
// that moment; otherwise such a node could not reach the hub to learn the time.
func (id *Identity) ClientTLS() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		RootCAs:    id.material().roots,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			cert := id.material().cert
			return &cert, nil
		},
		// No session cache: a resumed session carries the certificate it began
		// with, and a ticket that arrives while the certificate is renewed
		// would bring the old key back after the hub has dropped it.
		Time: id.now,
	}
}

func (id *Identity) now() time.Time {
	id.mu.RLock()
	now, floor := id.clock, id.current.meta.IssuedAt
	id.mu.RUnlock()
	if at := now(); at.After(floor) {
		return at
	}
	return floor
}

func readMaterial(dir string) (*material, error) {
	if info, err := os.Lstat(dir); err != nil {
		return nil, fmt.Errorf("identity: %w", explainFile(err))
	} else if !info.IsDir() {
		return nil, fmt.Errorf("identity: %s is not a directory", dir)
	}
	read := func(name string) ([]byte, error) {
		body, err := readBounded(filepath.Join(dir, name))
		if err != nil {
			return nil, fmt.Errorf("identity: %w", explainFile(err))
		}
		return body, nil
	}
	key, err := read(keyFile)
	if err != nil {
		return nil, err
	}
	if err := checkPrivate(filepath.Join(dir, keyFile)); err != nil {
		return nil, err
	}
	cert, err := read(certFile)
	if err != nil {
		return nil, err
	}
	ca, err := read(caFile)
	if err != nil {
		return nil, err
	}
	metaJSON, err := read(metaFile)
	if err != nil {
		return nil, err
	}
	m, err := parseMaterial(metaJSON, key, cert, ca)
	if err != nil {
		return nil, fmt.Errorf("identity: %s: %w", dir, err)
	}
	return m, nil
}

const rejoinHint = "restore the directory from a backup, or join again with: edgecore join HUB --token TOKEN --replace"

func explainFile(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w; %s", err, rejoinHint)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w; run as root", err)
	}
	return err
}

// checkPrivate refuses a key that others on this machine can read.
func checkPrivate(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return fmt.Errorf("identity: %s may be read by others (mode %04o); run: chmod 600 %s; if somebody may have read it, join again with --replace", path, mode, path)
	}
	return nil
}

func parseMaterial(metaJSON, keyPEM, certPEM, caPEM []byte) (*material, error) {
	m := &material{keyPEM: keyPEM}
	dec := json.NewDecoder(bytes.NewReader(metaJSON))
	if err := dec.Decode(&m.meta); err != nil {
		return nil, fmt.Errorf("%s: %w; %s", metaFile, err, rejoinHint)
	}
	if m.meta.Version != metaVersion {
		return nil, fmt.Errorf("%s is of version %d, this edgecore knows %d; use the edgecore that wrote it", metaFile, m.meta.Version, metaVersion)
	}
	var err error
	if m.hub, err = ParseHubURL(m.meta.Hub); err != nil {
		return nil, fmt.Errorf("%s: %w", metaFile, err)
	}
	if m.cert, err = tls.X509KeyPair(certPEM, keyPEM); err != nil {
		if _, certErr := parseCertificates(certPEM); certErr != nil {
			return nil, fmt.Errorf("%s: %w; %s", certFile, certErr, rejoinHint)
		}
		return nil, fmt.Errorf("%s does not belong to %s; %s", keyFile, certFile, rejoinHint)
	}
	if m.cert.Leaf == nil {
		if m.cert.Leaf, err = x509.ParseCertificate(m.cert.Certificate[0]); err != nil {
			return nil, fmt.Errorf("%s: %w; %s", certFile, err, rejoinHint)
		}
	}
	if got := strings.TrimPrefix(m.cert.Leaf.Subject.CommonName, edgeapi.NodeUserPrefix); got != m.meta.NodeName {
		return nil, fmt.Errorf("%s is for node %q, %s for %q; %s", certFile, got, metaFile, m.meta.NodeName, rejoinHint)
	}
	if m.cas, err = parseCertificates(caPEM); err != nil {
		return nil, fmt.Errorf("%s: %w; %s", caFile, err, rejoinHint)
	}
	m.roots = x509.NewCertPool()
	for _, ca := range m.cas {
		m.roots.AddCert(ca)
	}
	return m, nil
}

func parseCertificates(pemBytes []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		if block, pemBytes = pem.Decode(pemBytes); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, errors.New("no certificate in it")
	}
	return certs, nil
}
