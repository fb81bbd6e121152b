package enroll

import (
	"context"
	"errors"
	"time"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// redemption is one use of a token: reserved before the node's record is
// written, completed after. Only then the use is burnt.
type redemption struct {
	Node        string    `json:"node"`
	Key         string    `json:"key"` // fingerprint of the key that joins
	ReservedAt  time.Time `json:"reservedAt"`
	CompletedAt time.Time `json:"completedAt,omitzero"`
}

// grant is the right to join that a token gave.
type grant struct {
	tokenID      string
	node         string
	key          string
	allowReplace bool
	reserved     bool // a use is reserved and must be completed or released
}

// recordLookup reports whether node's record has key.
type recordLookup func(ctx context.Context, node, key string) (bool, error)

// check judges a token without using it up.
func (t *Tokens) check(ctx context.Context, req *joinAttempt, recordShows recordLookup) (tokenState, error) {
	_, state, err := t.read(ctx, req.tokenID)
	if errors.Is(err, ErrNoToken) {
		hashesEqual(hashToken(req.tokenID, req.tokenSecret), "")
		return state, refuseUnknownToken()
	}
	if err != nil {
		return state, &unavailable{"read join token", err}
	}
	if err := t.dropStale(ctx, &state, recordShows); err != nil {
		return state, &unavailable{"look for a join that died", err}
	}
	_, err = t.judge(ctx, &state, req, recordShows)
	return state, err
}

func refuseUnknownToken() error {
	return refuse(edgeapi.JoinTokenUnknown, "the hub does not know this token: it was changed when it was copied, or it was removed long ago")
}

// judge decides whether state lets req join now. again means that req repeats
// a join the token granted already, and needs no use of its own.
func (t *Tokens) judge(ctx context.Context, state *tokenState, req *joinAttempt, recordShows recordLookup) (again bool, err error) {
	if !hashesEqual(hashToken(req.tokenID, req.tokenSecret), state.Hash) {
		return false, refuseUnknownToken()
	}
	now := t.now()
	if !state.RevokedAt.IsZero() {
		return false, refuse(edgeapi.JoinTokenRevoked, "the token was revoked at %s", stamp(state.RevokedAt))
	}
	if state.NodeName != "" && state.NodeName != req.node {
		return false, refuse(edgeapi.JoinTokenWrongNode, "the token is for node %s only, not for %s", state.NodeName, req.node)
	}
	if again, err = state.repeats(ctx, req, now, recordShows); again || err != nil {
		return again, err
	}
	if !now.Before(state.ExpiresAt) {
		return false, refuse(edgeapi.JoinTokenExpired, "the token expired at %s, %s ago", stamp(state.ExpiresAt), roughly(now.Sub(state.ExpiresAt)))
	}
	if state.Uses != Unlimited && len(state.Redemptions) >= state.Uses {
		last := state.Redemptions[len(state.Redemptions)-1]
		if last.CompletedAt.IsZero() {
			return false, refuse(edgeapi.JoinTokenUsed, "the token is being used by node %s since %s", last.Node, stamp(last.ReservedAt))
		}
		return false, refuse(edgeapi.JoinTokenUsed, "the token was used up, last by node %s at %s", last.Node, stamp(last.CompletedAt))
	}
	return false, nil
}

// reserve takes one use of the token for req. Of several that want the last
// one, the API server's resourceVersion lets exactly one have it.
func (t *Tokens) reserve(ctx context.Context, req *joinAttempt, recordShows recordLookup) (*grant, error) {
	g := &grant{tokenID: req.tokenID, node: req.node, key: req.key}
	err := t.update(ctx, req.tokenID, func(state *tokenState) error {
		if err := t.dropStale(ctx, state, recordShows); err != nil {
			return err
		}
		again, err := t.judge(ctx, state, req, recordShows)
		if err != nil {
			return err
		}
		g.allowReplace = state.AllowReplace
		g.reserved = state.Uses != Unlimited
		if !g.reserved || again {
			return errUnchanged
		}
		state.Redemptions = append(state.Redemptions, redemption{Node: req.node, Key: req.key, ReservedAt: t.now().UTC()})
		return nil
	})
	return g, joinUpdateError(err)
}

// dropStale gives back uses that were reserved by a join which died before it
// wrote the node's record. A join lives joinTimeout, much less than a
// reservation; should one be late nevertheless, complete finds the
// reservation gone and the join fails.
func (t *Tokens) dropStale(ctx context.Context, state *tokenState, recordShows recordLookup) error {
	kept := state.Redemptions[:0:0]
	for _, r := range state.Redemptions {
		if r.CompletedAt.IsZero() && t.now().Sub(r.ReservedAt) > staleReservation {
			shown, err := recordShows(ctx, r.Node, r.Key)
			if err != nil {
				return err
			}
			if !shown {
				continue
			}
		}
		kept = append(kept, r)
	}
	state.Redemptions = kept
	return nil
}

// complete burns the reserved use. It fails if the reservation is gone.
func (t *Tokens) complete(ctx context.Context, g *grant) error {
	if !g.reserved {
		return nil
	}
	return joinUpdateError(t.update(ctx, g.tokenID, func(state *tokenState) error {
		if !state.RevokedAt.IsZero() {
			return refuse(edgeapi.JoinTokenRevoked, "the token was revoked at %s", stamp(state.RevokedAt))
		}
		i := state.find(g.node, g.key)
		if i < 0 {
			// Released by a twin of this request, or taken over. Asked again,
			// the token's state then gives the true answer.
			return refuse(edgeapi.JoinUnavailable, "the token changed while this join was under way")
		}
		if !state.Redemptions[i].CompletedAt.IsZero() {
			return errUnchanged
		}
		state.Redemptions[i].CompletedAt = t.now().UTC()
		return nil
	}))
}

// release gives the reserved use back after the join failed.
func (t *Tokens) release(ctx context.Context, g *grant) error {
	if !g.reserved {
		return nil
	}
	return t.update(ctx, g.tokenID, func(state *tokenState) error {
		i := state.find(g.node, g.key)
		if i < 0 || !state.Redemptions[i].CompletedAt.IsZero() {
			return errUnchanged
		}
		state.Redemptions = append(state.Redemptions[:i], state.Redemptions[i+1:]...)
		return nil
	})
}

// find returns the last redemption by node with key, or -1.
func (s *tokenState) find(node, key string) int {
	for i := len(s.Redemptions) - 1; i >= 0; i-- {
		if r := s.Redemptions[i]; r.Node == node && r.Key == key {
			return i
		}
	}
	return -1
}

// repeats reports whether req is a join this token granted already: the same
// node with the same key, which asks again because the answer was lost. A node
// that was forgotten or replaced since has nothing to repeat.
func (s *tokenState) repeats(ctx context.Context, req *joinAttempt, now time.Time, recordShows recordLookup) (bool, error) {
	i := s.find(req.node, req.key)
	if i < 0 {
		return false, nil
	}
	done := s.Redemptions[i].CompletedAt
	if done.IsZero() {
		return true, nil
	}
	if now.Sub(done) > repeatWindow {
		return false, nil
	}
	shown, err := recordShows(ctx, req.node, req.key)
	if err != nil {
		return false, &unavailable{"read node " + req.node, err}
	}
	return shown, nil
}
