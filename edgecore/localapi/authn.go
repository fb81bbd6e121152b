package localapi

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"k8s.io/apiserver/pkg/authentication/serviceaccount"
	"k8s.io/apiserver/pkg/authentication/user"

	"github.com/skerry-io/skerry/edgecore/store"
	"github.com/skerry-io/skerry/edgecore/tokens"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

const (
	maxToken = 16 << 10
	// leeway is how far a clock that is ahead may be so without refusing a
	// token that has just expired by it.
	leeway = time.Minute

	// adminName is who the administrator of the device is here.
	adminName = "skerry:device-admin"
)

// authenticator tells who calls.
type authenticator struct {
	store *store.Store
	node  string
	local Verifier
	admin string
	clock func() time.Time

	mu     sync.Mutex // guards issuer
	issuer *issuer
}

// authenticate reads a request's bearer token. Where admin is not taken, only
// service accounts are.
func (a *authenticator) authenticate(r *http.Request, admin bool) (user.Info, error) {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	token = strings.TrimSpace(token)
	switch {
	case !strings.EqualFold(scheme, "Bearer"):
		return nil, errNoToken
	case plausible(token) != nil:
		return nil, plausible(token)
	case admin && sameSecret(token, a.admin):
		return &user.DefaultInfo{Name: adminName, Groups: []string{user.SystemPrivilegedGroup, user.AllAuthenticated}}, nil
	}
	return a.serviceAccount(token)
}

var errNoToken = errors.New("no bearer token")

// plausible bounds what is looked at.
func plausible(token string) error {
	switch {
	case token == "":
		return errNoToken
	case len(token) > maxToken:
		return errors.New("the token is too long")
	}
	return nil
}

func sameSecret(a, b string) bool {
	x, y := sha256.Sum256([]byte(a)), sha256.Sum256([]byte(b))
	return subtle.ConstantTimeCompare(x[:], y[:]) == 1
}

// holder is whom a token says it was made for.
type holder struct {
	namespace, name, uid string // the service account; uid may be empty
	pod, podUID          string
	node                 string // may be empty
}

// serviceAccount verifies a token and that its holder is here: a signature
// alone may be of a pod that has gone, or of another node's.
func (a *authenticator) serviceAccount(token string) (user.Info, error) {
	var claims cloudClaims
	if _, _, err := jwt.NewParser().ParseUnverified(token, &claims); err != nil {
		return nil, fmt.Errorf("the token cannot be read: %w", err)
	}
	cluster, err := a.clusterIssuer()
	if err != nil {
		return nil, err
	}
	var h holder
	if cluster != nil && claims.Issuer == cluster.name {
		h, err = cluster.verify(token, a.clock())
	} else {
		var id tokens.Identity
		if id, err = a.local.Verify(token, ""); err != nil && cluster == nil {
			err = fmt.Errorf("%w (the node does not know the cluster's token keys yet)", err)
		}
		h = holder{namespace: id.Namespace, name: id.ServiceAccount, pod: id.PodName, podUID: id.PodUID, node: id.NodeName}
	}
	if err != nil {
		return nil, err
	}
	return a.identify(h)
}

func (a *authenticator) identify(h holder) (user.Info, error) {
	if h.node != "" && h.node != a.node {
		return nil, fmt.Errorf("the token is for node %s", h.node)
	}
	pod, ok := a.store.Get(store.Key{Resource: "pods", Namespace: h.namespace, Name: h.pod})
	if !ok || pod.UID != h.podUID {
		return nil, fmt.Errorf("pod %s/%s of the token is not on this node", h.namespace, h.pod)
	}
	var spec struct {
		Spec struct {
			ServiceAccountName string `json:"serviceAccountName"`
		} `json:"spec"`
	}
	if err := json.Unmarshal(pod.Body, &spec); err != nil {
		return nil, fmt.Errorf("pod %s/%s: %w", h.namespace, h.pod, err)
	}
	if spec.Spec.ServiceAccountName != h.name {
		return nil, fmt.Errorf("pod %s/%s does not use service account %s", h.namespace, h.pod, h.name)
	}
	sa, ok := a.store.Get(store.Key{Resource: "serviceaccounts", Namespace: h.namespace, Name: h.name})
	if !ok || h.uid != "" && sa.UID != h.uid {
		return nil, fmt.Errorf("service account %s/%s of the token is gone", h.namespace, h.name)
	}
	info := (&serviceaccount.ServiceAccountInfo{
		Name: h.name, Namespace: h.namespace, UID: sa.UID, PodName: h.pod, PodUID: h.podUID, NodeName: a.node,
	}).UserInfo()
	return &user.DefaultInfo{
		Name: info.GetName(), UID: info.GetUID(), Extra: info.GetExtra(),
		Groups: append(slices.Clone(info.GetGroups()), user.AllAuthenticated),
	}, nil
}

// clusterIssuer is the cluster's, as the store has it now; nil if it has none.
func (a *authenticator) clusterIssuer() (*issuer, error) {
	ref := edgeapi.IssuerRef()
	o, ok := a.store.Get(store.Key{Resource: ref.Resource, Name: ref.Name})
	a.mu.Lock()
	defer a.mu.Unlock()
	if !ok {
		a.issuer = nil
		return nil, nil
	}
	if a.issuer == nil || a.issuer.rv != o.RV {
		i, err := parseIssuer(o.Body)
		if err != nil {
			return nil, fmt.Errorf("the cluster's token keys: %w", err)
		}
		i.rv = o.RV
		a.issuer = i
	}
	return a.issuer, nil
}
