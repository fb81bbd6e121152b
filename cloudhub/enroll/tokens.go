package enroll

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base32"
	"encoding/json"
	"errors"
	"fmt"
	"sort"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

const (
	defaultTokenTTL = 24 * time.Hour
	// maxTokenUses bounds the list of redemptions in a token's Secret. Who
	// needs more makes the token unlimited.
	maxTokenUses = 1000
	// tokenRetention is how long a token that cannot be used any more stays
	// on record, so that an edge which brings it is told what became of it.
	tokenRetention = 7 * 24 * time.Hour
)

// Unlimited, as TokenOptions.Uses, lets any number of nodes join.
const Unlimited = -1

// ErrNoToken is returned for a token id that is not on record.
var ErrNoToken = errors.New("no such join token")

// TokenOptions say what a new token is good for.
type TokenOptions struct {
	TTL          time.Duration // zero means 24 hours
	Uses         int           // joins it is good for; zero means one; Unlimited
	AllowReplace bool          // may take over the name of a node that joined before
	NodeName     string        // only this node may join with it; empty means any
}

// TokenInfo is a token without its secret.
type TokenInfo struct {
	ID           string    `json:"id"`
	CreatedAt    time.Time `json:"createdAt"`
	ExpiresAt    time.Time `json:"expiresAt"`
	RevokedAt    time.Time `json:"revokedAt,omitzero"`
	Uses         int       `json:"uses"` // Unlimited or how many in all
	Used         int       `json:"used"`
	AllowReplace bool      `json:"allowReplace"`
	NodeName     string    `json:"nodeName,omitempty"`
	Nodes        []string  `json:"nodes,omitempty"` // who joined with it
}

// State says in a word whether the token can be used: "usable", "used",
// "expired" or "revoked".
func (t TokenInfo) State(now time.Time) string {
	switch {
	case !t.RevokedAt.IsZero():
		return "revoked"
	case t.Uses != Unlimited && t.Used >= t.Uses:
		return "used"
	case !now.Before(t.ExpiresAt):
		return "expired"
	}
	return "usable"
}

// Tokens are the join tokens on record.
type Tokens struct {
	secrets typedcorev1.SecretInterface
	now     func() time.Time
	pin     edgeapi.CAPin
	// turns let one update of a token at a time leave this replica; without
	// them many joins with one token would meet mostly each other's conflicts.
	turns [64]chan struct{}
}

func newTokens(secrets typedcorev1.SecretInterface, now func() time.Time, pin edgeapi.CAPin) *Tokens {
	t := &Tokens{secrets: secrets, now: now, pin: pin}
	for i := range t.turns {
		t.turns[i] = make(chan struct{}, 1)
	}
	return t
}

// tokenState is a token as it is stored. The secret itself is not.
type tokenState struct {
	Hash         string       `json:"hash"`
	CreatedAt    time.Time    `json:"createdAt"`
	ExpiresAt    time.Time    `json:"expiresAt"`
	RevokedAt    time.Time    `json:"revokedAt,omitzero"`
	Uses         int          `json:"uses"`
	AllowReplace bool         `json:"allowReplace,omitempty"`
	NodeName     string       `json:"nodeName,omitempty"`
	Redemptions  []redemption `json:"redemptions,omitempty"`
}

// Create makes a token and returns its text, which is not kept anywhere.
func (t *Tokens) Create(ctx context.Context, opts TokenOptions) (string, TokenInfo, error) {
	if opts.TTL == 0 {
		opts.TTL = defaultTokenTTL
	}
	if opts.Uses == 0 {
		opts.Uses = 1
	}
	if opts.TTL < 0 {
		return "", TokenInfo{}, fmt.Errorf("create join token: lifetime %s is negative", opts.TTL)
	}
	if opts.Uses < Unlimited || opts.Uses > maxTokenUses {
		return "", TokenInfo{}, fmt.Errorf("create join token: %d uses is not within 1 to %d; make it unlimited instead", opts.Uses, maxTokenUses)
	}
	if opts.NodeName != "" {
		if err := checkNodeName(opts.NodeName); err != nil {
			return "", TokenInfo{}, fmt.Errorf("create join token: %w", err)
		}
		if opts.Uses != 1 && !opts.AllowReplace {
			return "", TokenInfo{}, fmt.Errorf("create join token: a token for node %s alone can be used once, unless it allows replacing", opts.NodeName)
		}
	}
	now := t.now().UTC().Truncate(time.Second)
	state := tokenState{
		CreatedAt: now, ExpiresAt: now.Add(opts.TTL),
		Uses: opts.Uses, AllowReplace: opts.AllowReplace, NodeName: opts.NodeName,
	}
	for range 5 {
		token := edgeapi.Token{ID: randomText(5), Secret: randomText(20), Pin: t.pin}
		state.Hash = hashToken(token.ID, token.Secret)
		secret, err := state.encode(&corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{Name: tokenPrefix + token.ID, Labels: map[string]string{labelKind: kindToken}},
			Type:       typeToken,
		})
		if err != nil {
			return "", TokenInfo{}, err
		}
		_, err = t.secrets.Create(ctx, secret, metav1.CreateOptions{})
		switch {
		case err == nil:
			return token.Text(), state.info(token.ID, nil), nil
		case !apierrors.IsAlreadyExists(err): // an id met twice is drawn again
			return "", TokenInfo{}, fmt.Errorf("create join token: %w", err)
		}
	}
	return "", TokenInfo{}, errors.New("create join token: five ids in a row were taken")
}

// List returns every token on record, youngest first.
func (t *Tokens) List(ctx context.Context) ([]TokenInfo, error) {
	list, err := t.secrets.List(ctx, metav1.ListOptions{LabelSelector: labelKind + " in (" + kindToken + "," + kindNode + ")"})
	if err != nil {
		return nil, fmt.Errorf("list join tokens: %w", err)
	}
	joined := map[string][]string{}
	for _, s := range list.Items {
		if s.Labels[labelKind] == kindNode {
			id := s.Labels[labelToken]
			joined[id] = append(joined[id], strings.TrimPrefix(s.Name, nodePrefix))
		}
	}
	var infos []TokenInfo
	for i := range list.Items {
		s := &list.Items[i]
		if s.Labels[labelKind] != kindToken {
			continue
		}
		state, err := decodeToken(s)
		if err != nil {
			return nil, fmt.Errorf("list join tokens: %w", err)
		}
		id := strings.TrimPrefix(s.Name, tokenPrefix)
		infos = append(infos, state.info(id, joined[id]))
	}
	sort.Slice(infos, func(i, j int) bool {
		if !infos[i].CreatedAt.Equal(infos[j].CreatedAt) {
			return infos[i].CreatedAt.After(infos[j].CreatedAt)
		}
		return infos[i].ID < infos[j].ID
	})
	return infos, nil
}

// Revoke makes a token useless at once, on every replica. Nodes that joined
// with it stay.
func (t *Tokens) Revoke(ctx context.Context, id string) error {
	err := t.update(ctx, id, func(state *tokenState) error {
		if state.RevokedAt.IsZero() {
			state.RevokedAt = t.now().UTC().Truncate(time.Second)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("revoke join token %s: %w", clip(id, 16), err)
	}
	return nil
}

// errUnchanged ends an update without a write.
var errUnchanged = errors.New("unchanged")

// update changes a token's state under optimistic concurrency: change may run
// several times, each on a state read anew.
func (t *Tokens) update(ctx context.Context, id string, change func(*tokenState) error) error {
	if !validTokenID(id) {
		return ErrNoToken
	}
	turn := t.turns[(id[0]^id[1]<<2^id[2]<<4)%byte(len(t.turns))]
	select {
	case turn <- struct{}{}:
		defer func() { <-turn }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return retryConflicts(ctx, func() error {
		secret, state, err := t.read(ctx, id)
		if err != nil {
			return err
		}
		if err := change(&state); err != nil {
			if errors.Is(err, errUnchanged) {
				return nil
			}
			return err
		}
		if secret, err = state.encode(secret); err != nil {
			return err
		}
		_, err = t.secrets.Update(ctx, secret, metav1.UpdateOptions{})
		return err
	})
}

// read gets a token from the API server itself: a revocation counts at once.
func (t *Tokens) read(ctx context.Context, id string) (*corev1.Secret, tokenState, error) {
	if !validTokenID(id) {
		return nil, tokenState{}, ErrNoToken
	}
	secret, err := t.secrets.Get(ctx, tokenPrefix+id, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, tokenState{}, ErrNoToken
	}
	if err != nil {
		return nil, tokenState{}, err
	}
	state, err := decodeToken(secret)
	return secret, state, err
}

// sweep removes tokens that have been useless for tokenRetention.
func (t *Tokens) sweep(ctx context.Context) (removed int, err error) {
	list, err := t.secrets.List(ctx, metav1.ListOptions{LabelSelector: labelKind + "=" + kindToken})
	if err != nil {
		return 0, fmt.Errorf("list join tokens: %w", err)
	}
	for i := range list.Items {
		s := &list.Items[i]
		state, err := decodeToken(s)
		if err != nil || t.now().Sub(state.uselessSince()) < tokenRetention {
			continue // what cannot be read is the operator's to look at
		}
		err = t.secrets.Delete(ctx, s.Name, deleteExactly(s))
		switch {
		case err == nil:
			removed++
		case !apierrors.IsNotFound(err) && !apierrors.IsConflict(err):
			return removed, fmt.Errorf("delete %s: %w", s.Name, err)
		}
	}
	return removed, nil
}

// uselessSince is when the token became, or will become, useless.
func (s *tokenState) uselessSince() time.Time {
	if !s.RevokedAt.IsZero() {
		return s.RevokedAt
	}
	return s.ExpiresAt
}

func (s *tokenState) info(id string, joined []string) TokenInfo {
	info := TokenInfo{
		ID: id, CreatedAt: s.CreatedAt, ExpiresAt: s.ExpiresAt, RevokedAt: s.RevokedAt,
		Uses: s.Uses, Used: len(s.Redemptions), AllowReplace: s.AllowReplace, NodeName: s.NodeName,
	}
	if s.Uses == Unlimited {
		info.Used, info.Nodes = len(joined), joined
		return info
	}
	for _, r := range s.Redemptions {
		info.Nodes = append(info.Nodes, r.Node)
	}
	return info
}

func (s *tokenState) encode(secret *corev1.Secret) (*corev1.Secret, error) {
	body, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("encode join token: %w", err)
	}
	secret = secret.DeepCopy()
	secret.Data = map[string][]byte{tokenField: body}
	return secret, nil
}

func decodeToken(secret *corev1.Secret) (tokenState, error) {
	var state tokenState
	if err := json.NewDecoder(bytes.NewReader(secret.Data[tokenField])).Decode(&state); err != nil {
		return state, fmt.Errorf("Secret %s: %s: %w", secret.Name, tokenField, err)
	}
	// Anything that cannot be matched must not be matched by chance.
	if len(state.Hash) != 2*sha256.Size || state.Uses == 0 || state.Uses < Unlimited {
		return state, fmt.Errorf("Secret %s: %s is damaged; delete it and make another token", secret.Name, tokenField)
	}
	return state, nil
}

// hashToken needs no salt or stretching: the secret has 160 random bits.
func hashToken(id, secret string) string {
	return fmt.Sprintf("%x", sha256.Sum256([]byte("skerry join token\x00"+id+"\x00"+secret)))
}

func hashesEqual(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }

var tokenEncoding = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// randomText returns n random bytes, a multiple of five, as base32.
func randomText(n int) string {
	b := make([]byte, n)
	rand.Read(b) // never fails: crypto/rand aborts the program instead
	return tokenEncoding.EncodeToString(b)
}

func validTokenID(id string) bool {
	if len(id) != 8 {
		return false
	}
	_, err := tokenEncoding.DecodeString(id)
	return err == nil
}
