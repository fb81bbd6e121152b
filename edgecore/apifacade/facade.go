// Package apifacade is the Kubernetes API over the node's store.
package apifacade

import (
	"context"
	"errors"
	"log/slog"
	"net/http"

	authenticationv1 "k8s.io/api/authentication/v1"

	"github.com/skerry-io/skerry/edgecore/store"
)

// TokenSource answers TokenRequests.
type TokenSource interface {
	CreateToken(ctx context.Context, namespace, serviceAccount string, req *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error)
}

// Config is what the facade needs.
type Config struct {
	Store    *store.Store // required
	NodeName string       // required
	Tokens   TokenSource  // nil: TokenRequests are answered 503
	Log      *slog.Logger // nil discards
}

// Facade is an http.Handler.
type Facade struct{}

// New checks cfg; it starts nothing.
func New(cfg Config) (*Facade, error) { return nil, errors.New("apifacade: not in this build yet") }

func (f *Facade) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	http.Error(w, "not in this build yet", http.StatusNotImplemented)
}

// Transport carries requests to the facade without a network.
func (f *Facade) Transport() http.RoundTripper { return nil }
