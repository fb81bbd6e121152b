package tokens

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/singleflight"
	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/skerry-io/skerry/edgecore/store"
)

// Cloud creates tokens at the API server. An error that is not an API status
// means the cloud could not be asked.
type Cloud interface {
	CreateToken(ctx context.Context, namespace, serviceAccount string, req *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error)
}

// Config is what tokens needs.
type Config struct {
	Store        *store.Store     // required; keeps tokens, encrypted, as long as their pod
	NodeName     string           // required
	KeyFile      string           // ECDSA key of the edge issuer, made 0600 when missing; required
	Cloud        Cloud            // nil: never connected
	CloudTimeout time.Duration    // zero means 10s
	EdgeTTL      time.Duration    // life of a token issued here; zero means 10m
	Clock        func() time.Time // what the date is; nil means time.Now
	// Off is by how much the machine's clock, which the kubelet goes by, is
	// ahead of Clock; nil means not at all.
	Off func() time.Duration
	// Boot is the time since boot; nil asks the kernel.
	Boot func() time.Duration
	Log  *slog.Logger // nil discards
}

// Source implements apifacade.TokenSource.
type Source struct {
	cfg     Config
	issuer  *issuer
	flights singleflight.Group
}

const (
	privateKind = "token"

	// The kubelet renews a token at 80 % of its life or after 24 h, up to 10 s
	// earlier (pkg/kubelet/token). A stored token must be further from that, or
	// the kubelet would be handed again what it wants renewed.
	kubeletMaxAge = 24 * time.Hour
	freshMargin   = 30 * time.Second
	// A stored token about to expire is no better than one issued here.
	validMargin = time.Minute

	defaultTTL = int64(3600)
	minTTL     = int64(600)
	maxTTL     = int64(1) << 32
)

// New checks cfg and loads or makes the edge issuer's key.
func New(cfg Config) (*Source, error) {
	switch {
	case cfg.Store == nil:
		return nil, errors.New("tokens: Store is required")
	case cfg.NodeName == "":
		return nil, errors.New("tokens: NodeName is required")
	case cfg.KeyFile == "":
		return nil, errors.New("tokens: KeyFile is required")
	}
	if cfg.CloudTimeout <= 0 {
		cfg.CloudTimeout = 10 * time.Second
	}
	if cfg.EdgeTTL <= 0 {
		cfg.EdgeTTL = 10 * time.Minute
	}
	if cfg.Clock == nil {
		cfg.Clock = time.Now
	}
	if cfg.Off == nil {
		cfg.Off = func() time.Duration { return 0 }
	}
	if cfg.Boot == nil {
		cfg.Boot = sinceBoot
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	iss, err := newIssuer(cfg)
	if err != nil {
		return nil, err
	}
	return &Source{cfg: cfg, issuer: iss}, nil
}

// CreateToken answers one TokenRequest.
func (s *Source) CreateToken(ctx context.Context, namespace, serviceAccount string, req *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
	if req == nil {
		return nil, apierrors.NewBadRequest("a TokenRequest is required")
	}
	r := req.DeepCopy()
	if r.Spec.ExpirationSeconds == nil {
		ttl := defaultTTL
		r.Spec.ExpirationSeconds = &ttl
	}
	if ttl := *r.Spec.ExpirationSeconds; ttl < minTTL || ttl > maxTTL {
		return nil, apierrors.NewBadRequest(fmt.Sprintf("spec.expirationSeconds is %d, allowed are %d to %d", ttl, minTTL, maxTTL))
	}
	podUID := ""
	if ref := r.Spec.BoundObjectRef; ref != nil && ref.Kind == "Pod" {
		podUID = string(ref.UID)
	}
	key := cacheKey(namespace, serviceAccount, podUID, r.Spec.Audiences)

	kept, ok := s.stored(key)
	if ok && kept.fresh(s.cfg.Clock()) {
		return s.answer(kept, r), nil
	}
	got, err := s.fromCloud(ctx, key, namespace, serviceAccount, podUID, r)
	if err == nil {
		return s.answer(got, r), nil
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if ok && kept.valid(s.cfg.Clock()) && !gone(err) {
		return s.answer(kept, r), nil
	}
	if refused(err) {
		return nil, err
	}
	s.cfg.Log.Debug("token issued on the node", "namespace", namespace, "serviceAccount", serviceAccount, "why", err)
	return s.issue(namespace, serviceAccount, r)
}

var errNotConnected = errors.New("not connected to the cloud")

// fromCloud asks the cloud once for all who want the same token, and keeps it.
func (s *Source) fromCloud(ctx context.Context, key, namespace, serviceAccount, podUID string, r *authenticationv1.TokenRequest) (*keptToken, error) {
	if s.cfg.Cloud == nil {
		return nil, errNotConnected
	}
	flight := s.flights.DoChan(key, func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.CloudTimeout)
		defer cancel()
		got, err := s.cfg.Cloud.CreateToken(ctx, namespace, serviceAccount, r.DeepCopy())
		if err != nil {
			return nil, err
		}
		k, err := newKept(got, r)
		if err != nil {
			return nil, err
		}
		if err := s.keep(ctx, key, podUID, k); err != nil {
			// The pod can have its token; only the next power loss would miss it.
			s.cfg.Log.Error("token is not stored", "namespace", namespace, "serviceAccount", serviceAccount, "error", err)
		}
		return k, nil
	})
	select {
	case res := <-flight:
		if res.Err != nil {
			return nil, res.Err
		}
		return res.Val.(*keptToken), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// refused tells whether the API server itself said no: then a token issued here
// would hide the truth.
func refused(err error) bool {
	var status apierrors.APIStatus
	if !errors.As(err, &status) {
		return false
	}
	code := status.Status().Code
	return code >= 400 && code < 500 && code != http.StatusRequestTimeout && code != http.StatusTooManyRequests
}

// gone tells whether the pod or its service account no longer exists in the cloud.
func gone(err error) bool { return apierrors.IsNotFound(err) || apierrors.IsConflict(err) }

// keptToken is a cloud token as stored.
type keptToken struct {
	Token   string    `json:"token"`
	Expires time.Time `json:"expires"`
	TTL     int64     `json:"ttl"` // spec.expirationSeconds
}

func newKept(got, asked *authenticationv1.TokenRequest) (*keptToken, error) {
	if got == nil || got.Status.Token == "" || got.Status.ExpirationTimestamp.IsZero() {
		return nil, errors.New("tokens: the cloud's answer has no token or no expiration")
	}
	ttl := *asked.Spec.ExpirationSeconds
	if got.Spec.ExpirationSeconds != nil {
		ttl = *got.Spec.ExpirationSeconds
	}
	return &keptToken{got.Status.Token, got.Status.ExpirationTimestamp.Time, ttl}, nil
}

func (k *keptToken) valid(now time.Time) bool { return now.Before(k.Expires.Add(-validMargin)) }

// fresh tells whether the kubelet would be content with the token.
func (k *keptToken) fresh(now time.Time) bool {
	ttl := time.Duration(k.TTL) * time.Second
	issued := k.Expires.Add(-ttl)
	return now.Before(k.Expires.Add(-ttl/5-freshMargin)) && now.Before(issued.Add(kubeletMaxAge-freshMargin))
}

// answer tells the token's end by the machine's clock: by that the kubelet
// decides when to renew it.
func (s *Source) answer(k *keptToken, r *authenticationv1.TokenRequest) *authenticationv1.TokenRequest {
	out := r.DeepCopy()
	ttl := k.TTL
	out.Spec.ExpirationSeconds = &ttl
	out.Status = authenticationv1.TokenRequestStatus{Token: k.Token, ExpirationTimestamp: metav1.NewTime(k.Expires.Add(s.cfg.Off()))}
	return out
}

func cacheKey(namespace, serviceAccount, podUID string, audiences []string) string {
	a := slices.Clone(audiences)
	slices.Sort(a)
	h := sha256.New()
	for _, s := range slices.Compact(a) {
		fmt.Fprintf(h, "%d:%s", len(s), s)
	}
	return strings.Join([]string{namespace, serviceAccount, podUID, base64.RawURLEncoding.EncodeToString(h.Sum(nil)[:15])}, "/")
}

func (s *Source) stored(key string) (*keptToken, bool) {
	raw, ok := s.cfg.Store.Private(privateKind, key)
	if !ok {
		return nil, false
	}
	var k keptToken
	if err := json.Unmarshal(raw, &k); err != nil {
		return nil, false // from another version: ask anew
	}
	return &k, true
}

// keep stores a token and forgets those that have expired. A pod's first token
// is on disk when it returns. One in place of an older one may follow later: the
// kubelet renews it every hour, for each pod, and a power cut that takes it
// leaves the older one, or one issued here.
func (s *Source) keep(ctx context.Context, key, podUID string, k *keptToken) error {
	raw, err := json.Marshal(k)
	if err != nil {
		return err
	}
	now := s.cfg.Clock()
	var expired []string
	for _, other := range s.cfg.Store.PrivateKeys(privateKind) {
		if old, ok := s.stored(other); !ok || now.After(old.Expires) {
			expired = append(expired, other)
		}
	}
	_, renewed := s.cfg.Store.Private(privateKind, key)
	return s.cfg.Store.Local(ctx, func(tx *store.Tx) error {
		if renewed {
			tx.Soon()
		}
		for _, e := range expired {
			if e != key {
				tx.DeletePrivate(privateKind, e)
			}
		}
		return tx.PutPrivate(privateKind, key, podUID, raw)
	})
}

// issue makes a token of the node's own, for a pod the node has.
func (s *Source) issue(namespace, serviceAccount string, r *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
	gr := schema.GroupResource{Resource: "serviceaccounts/token"}
	ref := r.Spec.BoundObjectRef
	if ref == nil || ref.Kind != "Pod" || ref.Name == "" || ref.UID == "" {
		return nil, apierrors.NewForbidden(gr, serviceAccount, errors.New("a token issued on the node must be bound to a pod"))
	}
	pod, err := s.pod(namespace, ref.Name)
	if err != nil {
		return nil, err
	}
	if pod.uid != string(ref.UID) {
		return nil, apierrors.NewConflict(gr, serviceAccount, fmt.Errorf("the uid in spec.boundObjectRef (%s) does not match that of pod %s/%s (%s)", ref.UID, namespace, ref.Name, pod.uid))
	}
	if pod.serviceAccount != serviceAccount {
		return nil, apierrors.NewForbidden(gr, serviceAccount, fmt.Errorf("pod %s/%s uses service account %q", namespace, ref.Name, pod.serviceAccount))
	}
	ttl := min(time.Duration(*r.Spec.ExpirationSeconds)*time.Second, s.cfg.EdgeTTL)
	now := s.cfg.Clock()
	token, err := s.issuer.sign(now, now.Add(ttl), r.Spec.Audiences, Identity{
		Namespace: namespace, ServiceAccount: serviceAccount, PodName: ref.Name, PodUID: string(ref.UID), NodeName: s.cfg.NodeName,
	})
	if err != nil {
		return nil, apierrors.NewInternalError(fmt.Errorf("tokens: issue for %s/%s: %w", namespace, serviceAccount, err))
	}
	k := &keptToken{token, now.Add(ttl).Truncate(time.Second), int64(ttl / time.Second)}
	return s.answer(k, r), nil
}

type podRef struct{ uid, serviceAccount string }

func (s *Source) pod(namespace, name string) (podRef, error) {
	o, ok := s.cfg.Store.Get(store.Key{Resource: "pods", Namespace: namespace, Name: name})
	if !ok {
		return podRef{}, apierrors.NewNotFound(schema.GroupResource{Resource: "pods"}, name)
	}
	var p struct {
		Spec struct {
			ServiceAccountName string `json:"serviceAccountName"`
		} `json:"spec"`
	}
	if err := json.Unmarshal(o.Body, &p); err != nil {
		return podRef{}, apierrors.NewInternalError(fmt.Errorf("tokens: pod %s/%s: %w", namespace, name, err))
	}
	if p.Spec.ServiceAccountName == "" {
		p.Spec.ServiceAccountName = "default"
	}
	return podRef{o.UID, p.Spec.ServiceAccountName}, nil
}
