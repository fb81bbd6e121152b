package devices

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/kubernetes"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
)

const (
	// An answer of the API server is used again for so long: what was taken away
	// from a user works that much longer.
	tokenFor  = 10 * time.Second
	accessFor = 10 * time.Second

	maxAnswers = 4096
	askTimeout = 10 * time.Second
)

// access asks the API server who a caller is and what it may do.
type access struct {
	client kubernetes.Interface

	mu     sync.Mutex
	users  map[[sha256.Size]byte]answer[user.Info]
	rights map[string]answer[error]
}

type answer[T any] struct {
	is    T
	until time.Time
}

func newAccess(client kubernetes.Interface) *access {
	return &access{client: client, users: map[[sha256.Size]byte]answer[user.Info]{}, rights: map[string]answer[error]{}}
}

var errUnauthenticated = errors.New("a bearer token of this cluster is required")

// caller tells who the request is from, by its bearer token.
func (a *access) caller(r *http.Request) (user.Info, error) {
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok || token == "" {
		return nil, errUnauthenticated
	}
	key := sha256.Sum256([]byte(token))
	now := time.Now()
	a.mu.Lock()
	known, ok := a.users[key]
	a.mu.Unlock()
	if ok && now.Before(known.until) {
		return known.is, nil
	}
	ctx, cancel := context.WithTimeout(r.Context(), askTimeout)
	defer cancel()
	review, err := a.client.AuthenticationV1().TokenReviews().Create(ctx,
		&authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token}}, metav1.CreateOptions{})
	if err != nil {
		return nil, fmt.Errorf("review the token: %w", err)
	}
	if !review.Status.Authenticated {
		return nil, errUnauthenticated
	}
	u := review.Status.User
	info := &user.DefaultInfo{Name: u.Username, UID: u.UID, Groups: u.Groups, Extra: map[string][]string{}}
	for k, v := range u.Extra {
		info.Extra[k] = v
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.users) >= maxAnswers {
		clear(a.users)
	}
	a.users[key] = answer[user.Info]{info, now.Add(tokenFor)}
	return info, nil
}

// errForbidden says what a user may not do.
type errForbidden struct{ message string }

func (e errForbidden) Error() string { return e.message }

// may tells whether the user may do verb to devices, or to a part of them.
func (a *access) may(ctx context.Context, u user.Info, verb, subresource, namespace, name string) error {
	key := strings.Join([]string{u.GetName(), u.GetUID(), strings.Join(u.GetGroups(), "\x01"), verb, subresource, namespace, name}, "\x00")
	now := time.Now()
	a.mu.Lock()
	known, ok := a.rights[key]
	a.mu.Unlock()
	if ok && now.Before(known.until) {
		return known.is
	}
	extra := map[string]authorizationv1.ExtraValue{}
	for k, v := range u.GetExtra() {
		extra[k] = v
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	review, err := a.client.AuthorizationV1().SubjectAccessReviews().Create(ctx, &authorizationv1.SubjectAccessReview{
		Spec: authorizationv1.SubjectAccessReviewSpec{
			User: u.GetName(), UID: u.GetUID(), Groups: u.GetGroups(), Extra: extra,
			ResourceAttributes: &authorizationv1.ResourceAttributes{
				Group: v1alpha1.Group, Version: v1alpha1.APIVersion, Resource: v1alpha1.Devices,
				Subresource: subresource, Verb: verb, Namespace: namespace, Name: name,
			},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("review the access of %s: %w", u.GetName(), err)
	}
	var verdict error
	if !review.Status.Allowed {
		what := v1alpha1.Devices
		if subresource != "" {
			what += "/" + subresource
		}
		where := "in any namespace"
		if namespace != "" {
			where = "in namespace " + namespace
		}
		verdict = errForbidden{fmt.Sprintf("user %q may not %s %s.%s %s", u.GetName(), verb, what, v1alpha1.Group, where)}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.rights) >= maxAnswers {
		clear(a.rights)
	}
	a.rights[key] = answer[error]{verdict, now.Add(accessFor)}
	return verdict
}
