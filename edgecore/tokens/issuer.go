package tokens

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"golang.org/x/sys/unix"
)

const (
	maxToken = 16 << 10
	leeway   = 10 * time.Second
)

// Identity is whom a token of this node speaks for.
type Identity struct {
	Namespace      string
	ServiceAccount string
	PodName        string
	PodUID         string
	NodeName       string
}

// Username is the name Kubernetes gives the service account.
func (id Identity) Username() string {
	return "system:serviceaccount:" + id.Namespace + ":" + id.ServiceAccount
}

// issuer signs with the node's own key.
type issuer struct {
	key  *ecdsa.PrivateKey
	kid  string
	name string               // the iss claim
	boot string               // names this boot of the machine
	at   func() time.Duration // since it
	off  func() time.Duration
}

// claims have the layout of Kubernetes' own bound tokens.
type claims struct {
	jwt.RegisteredClaims
	Kubernetes struct {
		Namespace      string `json:"namespace"`
		Node           ref    `json:"node"`
		Pod            ref    `json:"pod"`
		ServiceAccount ref    `json:"serviceaccount"`
	} `json:"kubernetes.io"`
	// Boot and At are when the token was issued by a clock that does not jump,
	// Off is Config.Off then.
	Boot string        `json:"edge.skerry.dev/boot,omitempty"`
	At   time.Duration `json:"edge.skerry.dev/at,omitempty"`
	Off  time.Duration `json:"edge.skerry.dev/off,omitempty"`
}

type ref struct {
	Name string `json:"name"`
	UID  string `json:"uid,omitempty"`
}

func newIssuer(cfg Config) (*issuer, error) {
	key, err := readOrMakeKey(cfg.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("tokens: edge issuer's key %s: %w", cfg.KeyFile, err)
	}
	spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("tokens: edge issuer's key %s: %w", cfg.KeyFile, err)
	}
	id := sha256.Sum256(spki)
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("tokens: name this boot: %w", err)
	}
	return &issuer{
		key: key, kid: base64.RawURLEncoding.EncodeToString(id[:]), name: "https://edge.skerry.local/" + cfg.NodeName,
		boot: strings.TrimSpace(string(boot)), at: cfg.Boot, off: cfg.Off,
	}, nil
}

func sinceBoot() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("tokens: CLOCK_BOOTTIME: " + err.Error()) // since Linux 2.6.39
	}
	return time.Duration(ts.Nano())
}

func readOrMakeKey(path string) (*ecdsa.PrivateKey, error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return makeKey(path)
	}
	if err != nil {
		return nil, err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("readable by others (mode %o); chmod 600 it", info.Mode().Perm())
	}
	if info.Size() > 1<<16 {
		return nil, errors.New("too large for a key")
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	const way = "; remove the file to have a new one made (tokens issued here before become void)"
	block, _ := pem.Decode(raw)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, errors.New("not a PEM private key" + way)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%w%s", err, way)
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, errors.New("not an ECDSA P-256 key" + way)
	}
	return key, nil
}

func makeKey(path string) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	tmp := path + ".tmp"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	err = pem.Encode(f, &pem.Block{Type: "PRIVATE KEY", Bytes: der})
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return nil, errors.Join(err, os.Remove(tmp))
	}
	return key, nil
}

func (i *issuer) sign(now, expires time.Time, audiences []string, id Identity) (string, error) {
	if len(audiences) == 0 {
		audiences = []string{i.name}
	}
	c := claims{RegisteredClaims: jwt.RegisteredClaims{
		Issuer: i.name, Subject: id.Username(), Audience: audiences,
		IssuedAt: jwt.NewNumericDate(now), NotBefore: jwt.NewNumericDate(now), ExpiresAt: jwt.NewNumericDate(expires),
		ID: rand.Text(),
	}}
	c.Boot, c.At, c.Off = i.boot, i.at(), i.off()
	c.Kubernetes.Namespace = id.Namespace
	c.Kubernetes.Node = ref{Name: id.NodeName}
	c.Kubernetes.Pod = ref{id.PodName, id.PodUID}
	c.Kubernetes.ServiceAccount = ref{Name: id.ServiceAccount}
	t := jwt.NewWithClaims(jwt.SigningMethodES256, c)
	t.Header["kid"] = i.kid
	return t.SignedString(i.key)
}

// judgeAt is the moment to judge a token at. In the boot that it was issued in
// that is its issue and what has passed since: NTP may move the clock by decades
// meanwhile, and the pod must not lose its token by that. A kubelet whose clock
// went back renews nothing before it is where it was; till then the token stands.
func (s *Source) judgeAt(c *claims) time.Time {
	now := s.cfg.Clock()
	if c.Boot != s.issuer.boot || c.IssuedAt == nil {
		return now
	}
	if now.Add(leeway).Before(c.IssuedAt.Time) || s.cfg.Off()+leeway < c.Off {
		return c.IssuedAt.Time
	}
	return c.IssuedAt.Time.Add(s.cfg.Boot() - c.At)
}

// Verify tells whom a token issued here speaks for. audience must be among the
// token's; empty means the node's local API. A token dies with its pod.
func (s *Source) Verify(token, audience string) (Identity, error) {
	if len(token) > maxToken {
		return Identity{}, errors.New("tokens: verify: token is too long")
	}
	if audience == "" {
		audience = s.issuer.name
	}
	var c claims
	_, err := jwt.ParseWithClaims(token, &c,
		func(t *jwt.Token) (any, error) {
			if t.Header["kid"] != s.issuer.kid {
				return nil, errors.New("signed by another key")
			}
			return &s.issuer.key.PublicKey, nil
		},
		jwt.WithValidMethods([]string{jwt.SigningMethodES256.Alg()}), jwt.WithStrictDecoding(), jwt.WithoutClaimsValidation(),
	)
	if err == nil {
		err = jwt.NewValidator(
			jwt.WithIssuer(s.issuer.name), jwt.WithAudience(audience), jwt.WithExpirationRequired(), jwt.WithLeeway(leeway),
			jwt.WithTimeFunc(func() time.Time { return s.judgeAt(&c) }),
		).Validate(&c)
	}
	if err != nil {
		return Identity{}, fmt.Errorf("tokens: verify: %w", err)
	}
	id := Identity{c.Kubernetes.Namespace, c.Kubernetes.ServiceAccount.Name, c.Kubernetes.Pod.Name, c.Kubernetes.Pod.UID, c.Kubernetes.Node.Name}
	if c.Subject != id.Username() {
		return Identity{}, errors.New("tokens: verify: subject and service account differ")
	}
	pod, err := s.pod(id.Namespace, id.PodName)
	if err != nil || pod.uid != id.PodUID {
		return Identity{}, fmt.Errorf("tokens: verify: pod %s/%s of the token is gone", id.Namespace, id.PodName)
	}
	return id, nil
}
