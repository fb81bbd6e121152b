package feed

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"k8s.io/client-go/rest"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

const (
	// issuerEvery is how long the nodes may lag behind a change of the
	// cluster's token keys.
	issuerEvery = time.Minute
	// issuerRetry is the pause after a failure.
	issuerRetry = 5 * time.Second
	// maxJWKS is far above any key set.
	maxJWKS = 256 << 10
)

// ClusterIssuer asks an API server who signs its service account tokens.
// audiences are the API server's own if they are not just its issuer
// (--api-audiences); it tells them to nobody.
func ClusterIssuer(api rest.Interface, audiences []string) func(context.Context) (edgeapi.TokenIssuer, error) {
	return func(ctx context.Context) (edgeapi.TokenIssuer, error) {
		var discovery struct {
			Issuer string `json:"issuer"`
		}
		raw, err := api.Get().AbsPath("/.well-known/openid-configuration").DoRaw(ctx)
		if err == nil {
			err = json.Unmarshal(raw, &discovery)
		}
		if err == nil && discovery.Issuer == "" {
			err = errors.New("the answer names no issuer")
		}
		if err != nil {
			return edgeapi.TokenIssuer{}, fmt.Errorf("read /.well-known/openid-configuration: %w", err)
		}
		// Not at jwks_uri, which is for the world outside and may not be served
		// by this API server.
		keys, err := api.Get().AbsPath("/openid/v1/jwks").DoRaw(ctx)
		if err == nil && (len(keys) > maxJWKS || !json.Valid(keys)) {
			err = fmt.Errorf("%d bytes that are no key set", len(keys))
		}
		if err != nil {
			return edgeapi.TokenIssuer{}, fmt.Errorf("read /openid/v1/jwks: %w", err)
		}
		if len(audiences) == 0 {
			audiences = []string{discovery.Issuer}
		}
		return edgeapi.NewTokenIssuer(discovery.Issuer, audiences, keys), nil
	}
}

// followIssuer keeps the token issuer up to date until ctx ends.
func (f *Feed) followIssuer(ctx context.Context) {
	if f.askIssuer == nil {
		return
	}
	failing := false
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		wait := issuerEvery
		issuer, err := f.askIssuer(ctx)
		if err == nil {
			err = f.setIssuer(issuer)
		}
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			wait = issuerRetry
			if !failing {
				f.log.Warn("the cluster's token issuer is not known; nodes keep what they have", "err", err)
			}
		}
		failing = err != nil
		timer.Reset(wait)
	}
}

func (f *Feed) setIssuer(issuer edgeapi.TokenIssuer) error {
	body, err := json.Marshal(issuer)
	if err != nil {
		return fmt.Errorf("encode the token issuer: %w", err)
	}
	sum := sha256.Sum256(body)
	u := &edgeapi.Upsert{
		Ref: edgeapi.IssuerRef(), UID: edgeapi.IssuerUID,
		Rev: base64.RawURLEncoding.EncodeToString(sum[:12]), Body: body,
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if old := f.issuer.Load(); old != nil && old.Rev == u.Rev {
		return nil
	}
	f.issuer.Store(u)
	for _, cs := range f.nodes {
		mark(cs, u.Ref)
	}
	return nil
}

// issuerDifference is difference for the token issuer. While the hub does not
// know it, the node keeps what it has.
func (c *conversation) issuerDifference(delta *edgeapi.Delta) int {
	u := c.f.issuer.Load()
	if u == nil || c.sent[u.Ref] == (have{u.UID, u.Rev}) {
		return 0
	}
	delta.Upserts = append(delta.Upserts, *u)
	c.sent[u.Ref] = have{u.UID, u.Rev}
	return len(u.Body)
}
