package edgeapi

import "encoding/json"

// ResourceIssuers is the Resource of the one object in a node's set that is
// none of the API server's: how to tell the cluster's service account tokens
// from others, without asking the cluster. An edge older than it keeps it and
// does nothing with it.
const ResourceIssuers = "tokenissuers"

const (
	issuerName       = "cluster"
	issuerKind       = "TokenIssuer"
	issuerAPIVersion = "edge.skerry.dev/v1alpha1"

	// IssuerUID is the same for every cluster: a node belongs to one.
	IssuerUID = "tokenissuer"
)

// IssuerRef is the ref of the only TokenIssuer.
func IssuerRef() Ref { return Ref{Resource: ResourceIssuers, Name: issuerName} }

// TokenIssuer is who signs a cluster's service account tokens.
type TokenIssuer struct {
	Kind       string `json:"kind"`
	APIVersion string `json:"apiVersion"`
	Metadata   struct {
		Name string `json:"name"`
	} `json:"metadata"`

	Issuer    string          `json:"issuer"`    // their iss
	Audiences []string        `json:"audiences"` // the API server's own, one of which a token for it names
	JWKS      json.RawMessage `json:"jwks"`      // public keys, RFC 7517
}

// NewTokenIssuer fills in what every one has.
func NewTokenIssuer(issuer string, audiences []string, jwks []byte) TokenIssuer {
	t := TokenIssuer{Kind: issuerKind, APIVersion: issuerAPIVersion, Issuer: issuer, Audiences: audiences, JWKS: jwks}
	t.Metadata.Name = issuerName
	return t
}
