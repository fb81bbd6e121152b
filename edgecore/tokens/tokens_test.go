package tokens

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/edgecore/store"
)

// fakeCloud issues tokens while err is nil.
type fakeCloud struct {
	mu    sync.Mutex
	err   error
	now   func() time.Time
	calls atomic.Int64
	hold  chan struct{} // not nil: answers wait for it
}

func (c *fakeCloud) set(err error) { c.mu.Lock(); c.err = err; c.mu.Unlock() }

func (c *fakeCloud) CreateToken(ctx context.Context, namespace, sa string, req *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
	n := c.calls.Add(1)
	if c.hold != nil {
		select {
		case <-c.hold:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return nil, c.err
	}
	out := req.DeepCopy()
	out.Status.Token = fmt.Sprintf("cloud-%d", n)
	out.Status.ExpirationTimestamp = metav1.NewTime(c.now().Add(time.Duration(*req.Spec.ExpirationSeconds) * time.Second))
	return out, nil
}

type rig struct {
	*Source
	cfg   Config
	store *store.Store
	cloud *fakeCloud
	now   time.Time
	sc    store.Config
}

var errOffline = errors.New("no session with the hub")

func newRig(t *testing.T) *rig {
	t.Helper()
	dir := t.TempDir()
	r := &rig{now: time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC), sc: store.Config{Path: filepath.Join(dir, "edge.db")}}
	r.cloud = &fakeCloud{now: func() time.Time { return r.now }}
	r.cfg = Config{NodeName: "n1", KeyFile: filepath.Join(dir, "issuer.key"), Cloud: r.cloud, Clock: func() time.Time { return r.now }, CloudTimeout: 5 * time.Second,
		Boot: func() time.Duration { return r.now.Sub(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)) }}
	r.open(t)
	err := r.store.ApplyDelta(t.Context(), store.Delta{Synced: "1", Upserts: []store.Upsert{{
		Key: store.Key{Resource: "pods", Namespace: "default", Name: "p"}, UID: "up", Rev: "1",
		Body: []byte(`{"metadata":{"name":"p"},"spec":{"serviceAccountName":"sa","nodeName":"n1"}}`),
	}}})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *rig) open(t *testing.T) {
	t.Helper()
	s, err := store.Open(r.sc)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	r.store, r.cfg.Store = s, s
	if r.Source, err = New(r.cfg); err != nil {
		t.Fatal(err)
	}
}

func request(ttl int64, audiences ...string) *authenticationv1.TokenRequest {
	return &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		Audiences: audiences, ExpirationSeconds: &ttl,
		BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: "p", UID: types.UID("up")},
	}}
}

func (r *rig) create(t *testing.T, req *authenticationv1.TokenRequest) string {
	t.Helper()
	got, err := r.CreateToken(t.Context(), "default", "sa", req)
	if err != nil {
		t.Fatal(err)
	}
	if got.Status.ExpirationTimestamp.IsZero() || got.Spec.ExpirationSeconds == nil {
		t.Fatalf("without an expiration the kubelet never renews: %+v", got)
	}
	if iat := got.Status.ExpirationTimestamp.Add(-time.Duration(*got.Spec.ExpirationSeconds) * time.Second); iat.After(r.now) {
		t.Fatalf("issued in the future: %v", iat)
	}
	return got.Status.Token
}

// endPod is the kubelet's DELETE.
func (r *rig) endPod(t *testing.T) {
	t.Helper()
	if err := r.store.Local(t.Context(), func(tx *store.Tx) error {
		_, err := tx.Delete(store.Key{Resource: "pods", Namespace: "default", Name: "p"})
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

func TestOrderOfSources(t *testing.T) {
	r := newRig(t)
	if got := r.create(t, request(3600)); got != "cloud-1" {
		t.Errorf("first: %s", got)
	}
	// A restarted kubelet asks again at once: no traffic for that.
	r.now = r.now.Add(30 * time.Minute)
	if got := r.create(t, request(3600)); got != "cloud-1" || r.cloud.calls.Load() != 1 {
		t.Errorf("fresh: %s after %d calls", got, r.cloud.calls.Load())
	}
	if got := r.create(t, request(3600, "vault")); got != "cloud-2" {
		t.Errorf("other audience: %s", got)
	}
	// At 80 % the kubelet wants a new one.
	r.now = r.now.Add(18 * time.Minute)
	if got := r.create(t, request(3600)); got != "cloud-3" {
		t.Errorf("renewed: %s", got)
	}
	r.cloud.set(errOffline)
	r.now = r.now.Add(50 * time.Minute)
	if got := r.create(t, request(3600)); got != "cloud-3" {
		t.Errorf("offline, stored and valid: %s", got)
	}
	// Through a reboot.
	if err := r.store.Close(); err != nil {
		t.Fatal(err)
	}
	r.open(t)
	if got := r.create(t, request(3600)); got != "cloud-3" {
		t.Errorf("after a reboot: %s", got)
	}
	r.now = r.now.Add(10 * time.Minute)
	edge := r.create(t, request(3600))
	id, err := r.Verify(edge, "")
	if err != nil || id.Username() != "system:serviceaccount:default:sa" || id.PodUID != "up" {
		t.Errorf("issued here: %v %+v", err, id)
	}
	r.cloud.set(nil)
	if got := r.create(t, request(3600)); !strings.HasPrefix(got, "cloud-") {
		t.Errorf("connected again: %s", got)
	}
	raw, err := os.ReadFile(r.sc.Path)
	if err != nil || strings.Contains(string(raw), "cloud-3") {
		t.Errorf("a token lies on disk in the clear (%v)", err)
	}
}

func TestEdgeTokensAreShortLived(t *testing.T) {
	r := newRig(t)
	r.cloud.set(errOffline)
	got, err := r.CreateToken(t.Context(), "default", "sa", request(86400))
	if err != nil || *got.Spec.ExpirationSeconds != 600 || got.Status.ExpirationTimestamp.Sub(r.now) != 10*time.Minute {
		t.Errorf("%v %+v", err, got)
	}
	if keys := r.store.PrivateKeys(privateKind); len(keys) != 0 {
		t.Errorf("tokens issued here are stored: %v", keys)
	}
}

func TestRefusalsAreTheClouds(t *testing.T) {
	r := newRig(t)
	pods := schema.GroupResource{Resource: "serviceaccounts"}
	r.cloud.set(apierrors.NewNotFound(pods, "sa"))
	if _, err := r.CreateToken(t.Context(), "default", "sa", request(3600)); !apierrors.IsNotFound(err) {
		t.Errorf("a refusal was papered over: %v", err)
	}
	r.cloud.set(apierrors.NewServiceUnavailable("etcd"))
	if _, err := r.Verify(r.create(t, request(3600)), ""); err != nil {
		t.Errorf("a cloud out of order is as good as none: %v", err)
	}
	r.cloud.set(nil)
	r.create(t, request(3600))
	r.now = r.now.Add(50 * time.Minute)
	r.cloud.set(apierrors.NewForbidden(pods, "sa", errors.New("no relationship found yet")))
	if got := r.create(t, request(3600)); !strings.HasPrefix(got, "cloud-") {
		t.Errorf("a valid stored token was not used: %s", got)
	}
	r.cloud.set(apierrors.NewConflict(pods, "sa", errors.New("uid")))
	if _, err := r.CreateToken(t.Context(), "default", "sa", request(3600)); !apierrors.IsConflict(err) {
		t.Errorf("a token for a pod that is gone: %v", err)
	}
}

func TestOnlyForPodsOfThisNode(t *testing.T) {
	r := newRig(t)
	r.cloud.set(errOffline)
	bad := map[string]struct {
		sa     string
		change func(*authenticationv1.TokenRequest)
		is     func(error) bool
	}{
		"unbound":     {"sa", func(q *authenticationv1.TokenRequest) { q.Spec.BoundObjectRef = nil }, apierrors.IsForbidden},
		"other sa":    {"admin", func(*authenticationv1.TokenRequest) {}, apierrors.IsForbidden},
		"unknown pod": {"sa", func(q *authenticationv1.TokenRequest) { q.Spec.BoundObjectRef.Name = "x" }, apierrors.IsNotFound},
		"other uid":   {"sa", func(q *authenticationv1.TokenRequest) { q.Spec.BoundObjectRef.UID = "x" }, apierrors.IsConflict},
		"too short":   {"sa", func(q *authenticationv1.TokenRequest) { *q.Spec.ExpirationSeconds = 10 }, apierrors.IsBadRequest},
	}
	for name, tc := range bad {
		q := request(3600)
		tc.change(q)
		if _, err := r.CreateToken(t.Context(), "default", tc.sa, q); !tc.is(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestVerifyRefuses(t *testing.T) {
	r := newRig(t)
	r.cloud.set(errOffline)
	token := r.create(t, request(3600, "aud"))
	if _, err := r.Verify(token, "aud"); err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(token, ".")
	other := newRig(t)
	other.cloud.set(errOffline)
	foreign := other.create(t, request(3600, "aud"))
	none, err := jwt.NewWithClaims(jwt.SigningMethodNone, jwt.MapClaims{"iss": r.issuer.name}).SignedString(jwt.UnsafeAllowNoneSignatureType)
	if err != nil {
		t.Fatal(err)
	}
	hs := jwt.NewWithClaims(jwt.SigningMethodHS256, jwt.MapClaims{"iss": r.issuer.name})
	hs.Header["kid"] = r.issuer.kid
	hmac, err := hs.SignedString([]byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string]string{
		"empty": "", "text": "a.b.c", "cut": token[:len(token)-4], "no signature": parts[0] + "." + parts[1] + ".",
		"other key": foreign, "alg none": none, "alg HS256": hmac, "long": token + strings.Repeat("x", maxToken),
	} {
		if _, err := r.Verify(bad, "aud"); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := r.Verify(token, ""); err == nil {
		t.Error("another audience: accepted")
	}
	r.now = r.now.Add(11 * time.Minute)
	if _, err := r.Verify(token, "aud"); err == nil {
		t.Error("expired: accepted")
	}
	r.now = r.now.Add(-11 * time.Minute)
	r.endPod(t)
	if _, err := r.Verify(token, "aud"); err == nil {
		t.Error("its pod is gone: accepted")
	}
}

// The wall clock jumps by decades while a pod has a token issued here: it stands
// for its time by the clock that does not jump, and the kubelet is told its end
// by the clock that it reads.
func TestTokensOutliveClockJumps(t *testing.T) {
	r := newRig(t)
	r.cloud.set(errOffline)
	date, boot, off := r.now, time.Hour, time.Duration(0)
	cfg := r.cfg
	cfg.Store, cfg.KeyFile = r.store, filepath.Join(t.TempDir(), "key")
	cfg.Clock = func() time.Time { return date }
	cfg.Boot = func() time.Duration { return boot }
	cfg.Off = func() time.Duration { return off }
	src, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	issue := func() (string, time.Time) {
		t.Helper()
		got, err := src.CreateToken(t.Context(), "default", "sa", request(3600))
		if err != nil {
			t.Fatal(err)
		}
		return got.Status.Token, got.Status.ExpirationTimestamp.Time
	}
	verify := func(what, token string, good bool) {
		t.Helper()
		if _, err := src.Verify(token, ""); (err == nil) != good {
			t.Errorf("%s: %v", what, err)
		}
	}
	const decades = 30 * 365 * 24 * time.Hour
	start := date
	token, _ := issue()
	date = start.Add(decades)
	verify("the clock went forward", token, true)
	boot += 11 * time.Minute
	verify("and its time is over", token, false)

	date = start
	token, _ = issue()
	date = start.Add(-decades)
	boot += 11 * time.Minute
	verify("the clock went back, and the kubelet's with it", token, true)

	date, off = start, decades // the machine's clock is ahead, the hub's known
	token, until := issue()
	if want := date.Add(10 * time.Minute).Add(decades); until.Sub(want).Abs() > time.Second {
		t.Errorf("the kubelet is told %v; by its clock it is %v", until, want)
	}
	off = 0
	boot += 11 * time.Minute
	date = date.Add(11 * time.Minute)
	verify("NTP set the kubelet's clock back", token, true)

	token, _ = issue()
	src.issuer.boot = "another"
	verify("in another boot, by the date", token, true)
	date = date.Add(11 * time.Minute)
	verify("which has passed", token, false)
}

func TestTokensGoWithTheirPod(t *testing.T) {
	r := newRig(t)
	r.create(t, request(3600))
	if n := len(r.store.PrivateKeys(privateKind)); n != 1 {
		t.Fatalf("%d stored", n)
	}
	r.endPod(t)
	if keys := r.store.PrivateKeys(privateKind); len(keys) != 0 {
		t.Errorf("still stored: %v", keys)
	}
}

func TestManyAskOnce(t *testing.T) {
	r := newRig(t)
	r.cloud.hold = make(chan struct{})
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			if _, err := r.CreateToken(t.Context(), "default", "sa", request(3600)); err != nil {
				t.Error(err)
			}
		})
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := r.CreateToken(ctx, "default", "sa", request(3600)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("an impatient caller: %v", err)
	}
	close(r.cloud.hold)
	wg.Wait()
	if n := r.cloud.calls.Load(); n != 1 {
		t.Errorf("%d calls", n)
	}
}

func TestIssuerKey(t *testing.T) {
	r := newRig(t)
	info, err := os.Stat(r.cfg.KeyFile)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("key file: %v %v", err, info)
	}
	again, err := New(r.cfg)
	if err != nil || again.issuer.kid != r.issuer.kid {
		t.Errorf("the key changed over a restart: %v", err)
	}
	for name, damage := range map[string]func() error{
		"readable": func() error { return os.Chmod(r.cfg.KeyFile, 0o644) },
		"garbage": func() error {
			return errors.Join(os.Chmod(r.cfg.KeyFile, 0o600), os.WriteFile(r.cfg.KeyFile, []byte("x"), 0o600))
		},
	} {
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		if _, err := New(r.cfg); err == nil || !strings.Contains(err.Error(), r.cfg.KeyFile) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzVerify(f *testing.F) {
	dir := f.TempDir()
	s, err := store.Open(store.Config{Path: filepath.Join(dir, "edge.db")})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = s.Close() })
	src, err := New(Config{Store: s, NodeName: "n", KeyFile: filepath.Join(dir, "k")})
	if err != nil {
		f.Fatal(err)
	}
	token, err := src.issuer.sign(time.Now(), time.Now().Add(time.Hour), nil, Identity{"d", "sa", "p", "u", "n"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(token)
	f.Add("eyJhbGciOiJub25lIn0.e30.")
	f.Fuzz(func(t *testing.T, text string) {
		if id, err := src.Verify(text, ""); err == nil {
			t.Fatalf("accepted for a pod that is not here: %+v", id)
		}
	})
}
