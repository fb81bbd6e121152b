package enroll

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// How this package's Secrets are named and told apart.
const (
	labelKind  = "skerry.dev/enroll"
	labelToken = "skerry.dev/token" // on a node: the token it joined with

	kindCA    = "ca"
	kindNode  = "node"
	kindIP    = "ip"
	kindToken = "token"

	typeNode  = corev1.SecretType("skerry.dev/node")
	typeIP    = corev1.SecretType("skerry.dev/ip-claim")
	typeToken = corev1.SecretType("skerry.dev/join-token")

	nodePrefix  = "node."
	ipPrefix    = "ip."
	tokenPrefix = "join-token."

	nodeField  = "node.json"
	ipField    = "node"
	tokenField = "token.json"
)

// NodeRecord is one node as the hub knows it.
type NodeRecord struct {
	Name string `json:"name"`
	// Enrollment names one joining: it changes when the name is taken over by
	// another machine, and stays through renewals.
	Enrollment string     `json:"enrollment"`
	VirtualIP  netip.Addr `json:"virtualIP"`
	// Key is the fingerprint of the node's key; NextKey that of a renewal not
	// seen in use so far. Until it is, both are accepted, so that a renewal
	// whose answer is lost locks nobody out.
	Key     string `json:"key"`
	NextKey string `json:"nextKey,omitempty"`
	// Serial and NotAfter are of the certificate issued last.
	Serial   string    `json:"serial"`
	NotAfter time.Time `json:"notAfter"`

	TokenID   string    `json:"tokenID"`
	JoinedAt  time.Time `json:"joinedAt"`
	RenewedAt time.Time `json:"renewedAt,omitzero"`

	RevokedAt    time.Time `json:"revokedAt,omitzero"`
	RevokeReason string    `json:"revokeReason,omitempty"`
}

// Revoked reports whether the node is kept out although it is on record.
func (r NodeRecord) Revoked() bool { return !r.RevokedAt.IsZero() }

// RevokeReason says how an identity lost its standing.
type RevokeReason string

const (
	Forgotten RevokeReason = "forgotten"
	Revoked   RevokeReason = "revoked"
	Replaced  RevokeReason = "replaced"
)

// encode writes r into secret, which may be fresh or read before.
func (r NodeRecord) encode(secret *corev1.Secret) (*corev1.Secret, error) {
	body, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("encode node %s: %w", r.Name, err)
	}
	if secret == nil {
		secret = &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: nodePrefix + r.Name}, Type: typeNode}
	} else {
		secret = secret.DeepCopy()
	}
	if secret.Labels == nil {
		secret.Labels = map[string]string{}
	}
	secret.Labels[labelKind] = kindNode
	secret.Labels[labelToken] = r.TokenID
	secret.Data = map[string][]byte{nodeField: body}
	return secret, nil
}

// decodeNode reads a record and checks what the rest relies on.
func decodeNode(secret *corev1.Secret) (NodeRecord, error) {
	var r NodeRecord
	dec := json.NewDecoder(bytes.NewReader(secret.Data[nodeField]))
	if err := dec.Decode(&r); err != nil {
		return r, fmt.Errorf("Secret %s: %s: %w", secret.Name, nodeField, err)
	}
	switch {
	case r.Name != strings.TrimPrefix(secret.Name, nodePrefix):
		return r, fmt.Errorf("Secret %s: %s is about node %q", secret.Name, nodeField, r.Name)
	case r.Key == "" || r.Enrollment == "":
		return r, fmt.Errorf("Secret %s: %s names no key or enrollment", secret.Name, nodeField)
	case !r.VirtualIP.IsValid():
		return r, fmt.Errorf("Secret %s: %s names no virtual IP", secret.Name, nodeField)
	}
	return r, nil
}

// maxNodeName is what fits into the label kubernetes.io/hostname, which the
// kubelet sets to the node's name.
const maxNodeName = validation.LabelValueMaxLength

func checkNodeName(name string) error {
	if name == "" {
		return refuse(edgeapi.JoinBadName, "the request names no node")
	}
	if len(name) > maxNodeName {
		return refuse(edgeapi.JoinBadName, "node name %q has %d characters, more than the %d a node's hostname label holds", clip(name, 80), len(name), maxNodeName)
	}
	if msgs := validation.IsDNS1123Subdomain(name); len(msgs) > 0 {
		return refuse(edgeapi.JoinBadName, "node name %q is not allowed: %s", name, msgs[0])
	}
	return nil
}

func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return s[:n] + "…"
}
