package edgeapi

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"
)

// Joining, in short. An operator makes a join token at the hub and hands its
// text to the edge. The edge dials the hub's only port over TLS 1.3, accepts
// nothing but a chain that ends in the CA whose hash stands in the token, and
// POSTs a JoinRequest to JoinPath without a client certificate. The hub
// answers a JoinResponse with the node's certificate. From then on the edge
// speaks mutual TLS only, and trades its certificate for a younger one by
// POSTing a RenewRequest to RenewPath.
//
// Bodies are JSON in both directions and at most MaxJoinBody long. Any status
// but 200 carries a JoinError. Unknown members are ignored, so that a younger
// peer may add some. Every answer carries HubHeader, which is how an edge
// tells a hub from whatever else may answer on that address.
//
// History: 1 (2026-11) first.
const (
	JoinPath  = "/v1/join"
	RenewPath = "/v1/renew"

	// HubHeader names the version of this exchange in every answer of a hub.
	HubHeader      = "Skerry-Hub"
	HubHeaderValue = "1"

	// MaxJoinBody bounds every request and answer of this exchange.
	MaxJoinBody = 32 << 10

	// NodeUserPrefix and NodesGroup make a node certificate's subject: the
	// names Kubernetes' Node authorizer knows nodes by.
	NodeUserPrefix = "system:node:"
	NodesGroup     = "system:nodes"

	// HubOrganization stands in the subject of every hub's CA, so that an
	// edge can tell another hub from something that is no hub at all.
	HubOrganization = "Skerry"
)

// JoinRequest asks for a node's first certificate.
type JoinRequest struct {
	TokenID     string `json:"tokenID"`
	TokenSecret string `json:"tokenSecret"`
	NodeName    string `json:"nodeName"`
	// CSR is a PKCS #10 request, DER. Only its public key and its proof of
	// possession are used; the hub composes subject and extensions itself.
	CSR []byte `json:"csr"`
	// Replace takes the name over from the node that has it now. The token
	// must allow it.
	Replace bool `json:"replace,omitempty"`
}

// JoinResponse answers a join and a renewal alike.
type JoinResponse struct {
	NodeName    string `json:"nodeName"`
	Certificate []byte `json:"certificate"` // DER, the node's own
	// CAs are the certificates the hub's own chain may end in, DER. More than
	// one while the hub's CA is being changed.
	CAs       [][]byte `json:"cas"`
	VirtualIP string   `json:"virtualIP"` // the node's InternalIP in the cluster
	// Time is the hub's clock when it answered, for edges without a clock of
	// their own.
	Time time.Time `json:"time"`
}

// RenewRequest asks, over mutual TLS, for a younger certificate. The key in
// the CSR may be the present one or a fresh one; a fresh one replaces the
// present one only once it has been used.
type RenewRequest struct {
	CSR []byte `json:"csr"`
}

// JoinErrorCode tells refusals apart for programs.
type JoinErrorCode string

const (
	JoinBadRequest         JoinErrorCode = "bad-request"         // 400; the request itself is wrong
	JoinBadName            JoinErrorCode = "bad-node-name"       // 400
	JoinBadKey             JoinErrorCode = "bad-key"             // 400; CSR unsigned, or key kind or size refused
	JoinTokenUnknown       JoinErrorCode = "token-unknown"       // 401; no such id, or wrong secret
	JoinTokenExpired       JoinErrorCode = "token-expired"       // 401
	JoinTokenUsed          JoinErrorCode = "token-used"          // 401
	JoinTokenRevoked       JoinErrorCode = "token-revoked"       // 401
	JoinTokenWrongNode     JoinErrorCode = "token-other-node"    // 403; the token is pinned to another name
	JoinNameInUse          JoinErrorCode = "node-name-in-use"    // 409
	JoinNoCertificate      JoinErrorCode = "no-certificate"      // 401; renewal without client certificate
	JoinUnknownNode        JoinErrorCode = "node-unknown"        // 403; forgotten, or never joined here
	JoinNodeRevoked        JoinErrorCode = "node-revoked"        // 403
	JoinNodeReplaced       JoinErrorCode = "node-replaced"       // 403; the name belongs to another key now
	JoinCertificateExpired JoinErrorCode = "certificate-expired" // 403; renew first, or beyond the grace: join again
	JoinTooMany            JoinErrorCode = "too-many-requests"   // 429; Retry-After says when
	JoinUnavailable        JoinErrorCode = "unavailable"         // 503; try again as is, nothing was used up
)

// JoinError is the body of every refusal. Message is a whole clause for a
// person: what was refused and why.
type JoinError struct {
	Code    JoinErrorCode `json:"code"`
	Message string        `json:"message"`
	Time    time.Time     `json:"time"` // the hub's clock
}

func (e *JoinError) Error() string { return e.Message }

// Token is a join token in parts. Its text is
//
//	skerry1.ID.SECRET.PIN
//
// with ID 8 and SECRET 32 characters of lower-case base32 (a-z, 2-7), and PIN
// the SHA-256 of the hub CA's SubjectPublicKeyInfo in base64url without
// padding. SECRET is the only secret part.
type Token struct {
	ID     string
	Secret string
	Pin    CAPin
}

const (
	tokenScheme    = "skerry1"
	tokenIDLen     = 8
	tokenSecretLen = 32
	maxTokenText   = 256
)

// CAPin identifies a CA by the SHA-256 of its SubjectPublicKeyInfo.
type CAPin [sha256.Size]byte

// PinOf returns the pin of a CA certificate.
func PinOf(ca *x509.Certificate) CAPin { return sha256.Sum256(ca.RawSubjectPublicKeyInfo) }

func (p CAPin) String() string { return "sha256:" + hex.EncodeToString(p[:]) }

// ParseToken takes a token's text apart. Errors never repeat the text, as it
// holds a secret.
func ParseToken(text string) (Token, error) {
	text = strings.TrimSpace(text)
	switch {
	case text == "":
		return Token{}, errors.New("token is empty")
	case len(text) > maxTokenText:
		return Token{}, fmt.Errorf("token has %d characters, more than any token has", len(text))
	case !strings.HasPrefix(text, "skerry"):
		return Token{}, errors.New(`token does not begin with "skerry1.": it is no Skerry join token`)
	}
	parts := strings.Split(text, ".")
	if parts[0] != tokenScheme {
		return Token{}, fmt.Errorf("token is of a form this version does not know (it begins with something other than %q)", tokenScheme+".")
	}
	if len(parts) != 4 {
		return Token{}, fmt.Errorf("token has %d parts between dots, not 4: it was cut or joined when it was copied", len(parts))
	}
	if err := checkBase32("id", parts[1], tokenIDLen); err != nil {
		return Token{}, err
	}
	if err := checkBase32("secret", parts[2], tokenSecretLen); err != nil {
		return Token{}, err
	}
	pin, err := base64.RawURLEncoding.Strict().DecodeString(parts[3])
	if err != nil || len(pin) != sha256.Size {
		return Token{}, errors.New("token's last part is not a CA hash: it was cut or changed when it was copied")
	}
	return Token{ID: parts[1], Secret: parts[2], Pin: CAPin(pin)}, nil
}

func checkBase32(part, s string, want int) error {
	if len(s) != want {
		return fmt.Errorf("token's %s has %d characters, not %d: it was cut or changed when it was copied", part, len(s), want)
	}
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < '2' || c > '7') {
			return fmt.Errorf("token's %s has a character other than a-z and 2-7: it was changed when it was copied", part)
		}
	}
	return nil
}

// Text returns the token as an operator copies it, secret included.
func (t Token) Text() string {
	return tokenScheme + "." + t.ID + "." + t.Secret + "." + base64.RawURLEncoding.EncodeToString(t.Pin[:])
}

// String leaves the secret out, as it ends up in logs.
func (t Token) String() string { return tokenScheme + "." + t.ID + ".…" }

// GoString leaves the secret out, too.
func (t Token) GoString() string { return t.String() }

// LogValue implements slog.LogValuer without the secret.
func (t Token) LogValue() slog.Value { return slog.StringValue(t.String()) }
