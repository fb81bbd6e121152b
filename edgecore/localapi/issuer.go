package localapi

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"k8s.io/apiserver/pkg/authentication/serviceaccount"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// issuer is who signs the cluster's tokens, as the cloud has told it.
type issuer struct {
	rv        uint64 // of the object it was read from
	name      string
	audiences []string
	keys      map[string]crypto.PublicKey // by key id
}

// maxKeys bounds a key set; clusters have one key, or two while they change it.
const maxKeys = 64

func parseIssuer(body []byte) (*issuer, error) {
	var t edgeapi.TokenIssuer
	if err := json.Unmarshal(body, &t); err != nil {
		return nil, err
	}
	if t.Issuer == "" || len(t.Audiences) == 0 {
		return nil, errors.New("issuer and audiences are required")
	}
	keys, err := parseJWKS(t.JWKS)
	if err != nil {
		return nil, err
	}
	return &issuer{name: t.Issuer, audiences: t.Audiences, keys: keys}, nil
}

// parseJWKS reads a key set (RFC 7517, 7518 6). Keys of other kinds than
// Kubernetes signs with, or for something else, are left out.
func parseJWKS(raw []byte) (map[string]crypto.PublicKey, error) {
	var set struct {
		Keys []struct {
			Kty string `json:"kty"`
			Kid string `json:"kid"`
			Use string `json:"use"`
			Crv string `json:"crv"`
			N   string `json:"n"`
			E   string `json:"e"`
			X   string `json:"x"`
			Y   string `json:"y"`
		} `json:"keys"`
	}
	if err := json.Unmarshal(raw, &set); err != nil {
		return nil, fmt.Errorf("key set: %w", err)
	}
	if len(set.Keys) > maxKeys {
		return nil, fmt.Errorf("key set of %d keys", len(set.Keys))
	}
	keys := map[string]crypto.PublicKey{}
	for i, k := range set.Keys {
		if k.Kid == "" || k.Use != "" && k.Use != "sig" {
			continue
		}
		var key crypto.PublicKey
		var err error
		switch k.Kty {
		case "RSA":
			key, err = rsaKey(k.N, k.E)
		case "EC":
			key, err = ecKey(k.Crv, k.X, k.Y)
		default:
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("key %d of the set: %w", i, err)
		}
		keys[k.Kid] = key
	}
	if len(keys) == 0 {
		return nil, errors.New("key set: no key that signs tokens")
	}
	return keys, nil
}

func rsaKey(n, e string) (*rsa.PublicKey, error) {
	modulus, err := bigInt(n, 2048)
	if err != nil {
		return nil, fmt.Errorf("n: %w", err)
	}
	exponent, err := bigInt(e, 4)
	if err != nil || !exponent.IsInt64() || exponent.Int64() < 3 || exponent.Int64() > 1<<31-1 {
		return nil, errors.New("e is no exponent")
	}
	if modulus.BitLen() < 2048 {
		return nil, fmt.Errorf("an RSA key of %d bits is too weak", modulus.BitLen())
	}
	return &rsa.PublicKey{N: modulus, E: int(exponent.Int64())}, nil
}

func ecKey(crv, x, y string) (*ecdsa.PublicKey, error) {
	curve, size := elliptic.Curve(nil), 0
	switch crv {
	case "P-256":
		curve, size = elliptic.P256(), 32
	case "P-384":
		curve, size = elliptic.P384(), 48
	case "P-521":
		curve, size = elliptic.P521(), 66
	default:
		return nil, fmt.Errorf("curve %q is not known", crv)
	}
	bx, err := bigInt(x, size)
	if err != nil {
		return nil, fmt.Errorf("x: %w", err)
	}
	by, err := bigInt(y, size)
	if err != nil {
		return nil, fmt.Errorf("y: %w", err)
	}
	point := make([]byte, 1+2*size)
	point[0] = 4 // uncompressed, SEC 1 2.3.3
	bx.FillBytes(point[1 : 1+size])
	by.FillBytes(point[1+size:])
	return ecdsa.ParseUncompressedPublicKey(curve, point)
}

func bigInt(s string, max int) (*big.Int, error) {
	b, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil {
		return nil, err
	}
	if len(b) == 0 || len(b) > max {
		return nil, fmt.Errorf("%d bytes, expected up to %d", len(b), max)
	}
	return new(big.Int).SetBytes(b), nil
}

// cloudClaims have the layout of Kubernetes' bound tokens.
type cloudClaims struct {
	jwt.RegisteredClaims
	Kubernetes struct {
		Namespace      string `json:"namespace"`
		Node           named  `json:"node"`
		Pod            named  `json:"pod"`
		ServiceAccount named  `json:"serviceaccount"`
	} `json:"kubernetes.io"`
}

type named struct {
	Name string `json:"name"`
	UID  string `json:"uid"`
}

// verify tells whom a token of the cluster's was made for.
//
// A clock behind the token's time of issue is wrong, as the signature proves
// that time to have been: it is taken for that time. So a device that boots in
// 1970 is not locked out, and no token lives longer than by its own clock.
func (i *issuer) verify(token string, now time.Time) (holder, error) {
	var c cloudClaims
	parser := jwt.NewParser(
		jwt.WithValidMethods([]string{"RS256", "RS384", "RS512", "ES256", "ES384", "ES512"}),
		jwt.WithStrictDecoding(), jwt.WithoutClaimsValidation(),
	)
	_, err := parser.ParseWithClaims(token, &c, func(t *jwt.Token) (any, error) {
		kid, _ := t.Header["kid"].(string)
		key, ok := i.keys[kid]
		if !ok {
			return nil, errors.New("signed by a key that the cloud has not told this node")
		}
		return key, nil
	})
	if err != nil {
		return holder{}, fmt.Errorf("the token does not hold: %w", err)
	}
	for _, t := range []*jwt.NumericDate{c.IssuedAt, c.NotBefore} {
		if t != nil && now.Before(t.Time) {
			now = t.Time
		}
	}
	validator := jwt.NewValidator(
		jwt.WithIssuer(i.name), jwt.WithExpirationRequired(), jwt.WithLeeway(leeway),
		jwt.WithTimeFunc(func() time.Time { return now }),
	)
	if err := validator.Validate(&c); err != nil {
		return holder{}, fmt.Errorf("the token does not hold: %w", err)
	}
	if !slices.ContainsFunc(c.Audience, func(a string) bool { return slices.Contains(i.audiences, a) }) {
		return holder{}, fmt.Errorf("the token is for %v, not for the API", []string(c.Audience))
	}
	k := c.Kubernetes
	if c.Subject != serviceaccount.MakeUsername(k.Namespace, k.ServiceAccount.Name) {
		return holder{}, errors.New("the token's subject and its service account differ")
	}
	if k.Pod.Name == "" || k.Pod.UID == "" {
		return holder{}, errors.New("the token is not bound to a pod; only tokens of this node's pods are taken here")
	}
	return holder{
		namespace: k.Namespace, name: k.ServiceAccount.Name, uid: k.ServiceAccount.UID,
		pod: k.Pod.Name, podUID: k.Pod.UID, node: k.Node.Name,
	}, nil
}
