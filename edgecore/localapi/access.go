package localapi

import (
	"context"
	"errors"
	"time"

	"k8s.io/apiserver/pkg/authentication/user"
	kubeauthorizer "k8s.io/apiserver/pkg/authorization/authorizer"

	"github.com/skerry-io/skerry/edgecore/store"
)

// AccessConfig is what Access judges by. All but Clock are required.
type AccessConfig struct {
	Store    *store.Store
	NodeName string
	Tokens   Verifier
	Clock    func() time.Time // nil means time.Now
}

// Access is the local API's judgement of pods, for other services that this
// node has for them.
type Access struct {
	auth *authenticator
	may  *authorizer
}

// NewAccess checks cfg.
func NewAccess(cfg AccessConfig) (*Access, error) {
	if cfg.Store == nil || cfg.NodeName == "" || cfg.Tokens == nil {
		return nil, errors.New("localapi: access needs Store, NodeName and Tokens")
	}
	if cfg.Clock == nil {
		cfg.Clock = time.Now
	}
	return &Access{
		auth: &authenticator{store: cfg.Store, node: cfg.NodeName, local: cfg.Tokens, clock: cfg.Clock},
		may:  newAuthorizer(cfg.Store, cfg.NodeName),
	}, nil
}

// Authenticate tells which service account a token is of, if the pod it was
// made for is on this node.
func (a *Access) Authenticate(token string) (user.Info, error) {
	if err := plausible(token); err != nil {
		return nil, err
	}
	return a.auth.serviceAccount(token)
}

// Allowed tells whether the RBAC objects that the node has give this, and if
// not, why.
func (a *Access) Allowed(ctx context.Context, attr kubeauthorizer.Attributes) (ok bool, reason string, err error) {
	return a.may.allowed(ctx, attr.GetUser(), attr)
}
