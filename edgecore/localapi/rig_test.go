package localapi

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"net"
	"net/http"
	"path/filepath"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/skerry-io/skerry/edgecore/store"
	"github.com/skerry-io/skerry/edgecore/tokens"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

const (
	node         = "edge-1"
	cloudName    = "https://kubernetes.default.svc"
	reader, idle = "reader", "idle" // service accounts in namespace shop
)

// rig is a local API over a real store, with two pods: one whose service
// account may list pods in its namespace, and one whose may nothing.
type rig struct {
	*Server
	dir     string
	store   *store.Store
	tokens  *tokens.Source
	key     *ecdsa.PrivateKey // the cluster's
	now     time.Time
	kubelet http.Handler
	stop    func()
}

func newRig(t testing.TB) *rig {
	t.Helper()
	r := &rig{dir: t.TempDir(), now: time.Now()}
	var err error
	if r.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	r.start(t)
	t.Cleanup(func() { r.stop() })
	issuer, err := json.Marshal(edgeapi.NewTokenIssuer(cloudName, []string{cloudName}, jwks(t, "k1", r.key)))
	if err != nil {
		t.Fatal(err)
	}
	ref := edgeapi.IssuerRef()
	read := rbacv1.PolicyRule{Verbs: []string{"get", "list", "watch"}, APIGroups: []string{""}, Resources: []string{"pods", "pods/log"}}
	ups := []store.Upsert{
		{Key: store.Key{Resource: ref.Resource, Name: ref.Name}, UID: edgeapi.IssuerUID, Rev: "1", Body: issuer},
		up(t, "pods", pod("shop", "a", reader)), up(t, "pods", pod("shop", "b", idle)), up(t, "pods", pod("bank", "c", reader)),
		up(t, "serviceaccounts", account("shop", reader)), up(t, "serviceaccounts", account("shop", idle)), up(t, "serviceaccounts", account("bank", reader)),
		up(t, "secrets", &corev1.Secret{ObjectMeta: meta("shop", "s"), Data: map[string][]byte{"k": []byte("v")}}),
		up(t, "roles", &rbacv1.Role{ObjectMeta: meta("shop", "read"), Rules: []rbacv1.PolicyRule{read}}),
		up(t, "rolebindings", &rbacv1.RoleBinding{ObjectMeta: meta("shop", "read"), RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: "read"},
			Subjects: []rbacv1.Subject{{Kind: "ServiceAccount", Name: reader, Namespace: "shop"}}}),
		up(t, "clusterroles", &rbacv1.ClusterRole{ObjectMeta: meta("", "basic"), Rules: []rbacv1.PolicyRule{
			{Verbs: []string{"create"}, APIGroups: []string{"authorization.k8s.io"}, Resources: []string{"selfsubjectaccessreviews", "selfsubjectrulesreviews"}},
			{Verbs: []string{"create"}, APIGroups: []string{"authentication.k8s.io"}, Resources: []string{"selfsubjectreviews"}},
			{Verbs: []string{"get"}, NonResourceURLs: []string{"/api", "/api/*", "/apis", "/apis/*", "/version"}}}}),
		up(t, "clusterrolebindings", &rbacv1.ClusterRoleBinding{ObjectMeta: meta("", "basic"), RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "basic"},
			Subjects: []rbacv1.Subject{{Kind: "Group", APIGroup: rbacv1.GroupName, Name: "system:authenticated"}}}),
	}
	if err := r.store.ApplyDelta(t.Context(), store.Delta{Upserts: ups, Synced: "1"}); err != nil {
		t.Fatal(err)
	}
	return r
}

// start opens all from the disk, as a reboot does.
func (r *rig) start(t testing.TB) {
	t.Helper()
	var err error
	if r.store, err = store.Open(store.Config{Path: filepath.Join(r.dir, "edge.db")}); err != nil {
		t.Fatal(err)
	}
	clock := func() time.Time { return r.now }
	if r.tokens, err = tokens.New(tokens.Config{Store: r.store, NodeName: node, KeyFile: filepath.Join(r.dir, "issuer.key"), Clock: clock}); err != nil {
		t.Fatal(err)
	}
	r.Server, err = New(Config{
		Store: r.store, NodeName: node, Tokens: r.tokens, Dir: r.dir, Listen: freePort(t), PodListen: "169.254.20.20:10271", Clock: clock,
		Kubelet: func(context.Context) (http.Handler, error) { return r.kubelet, nil },
		Notice:  func() string { return "it is away" },
	})
	if err != nil {
		t.Fatal(err)
	}
	// Pods' listener on loopback too: what it takes is the subject, not routing.
	if r.admin, err = net.Listen("tcp", r.cfg.Listen); err != nil {
		t.Fatal(err)
	}
	if r.inPod, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	r.stop = func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
		if err := r.store.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
}

func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// adminConfig is what kubectl makes of the kubeconfig.
func (r *rig) adminConfig(t testing.TB) *rest.Config {
	t.Helper()
	c, err := clientcmd.BuildConfigFromFlags("", filepath.Join(r.dir, Kubeconfig))
	if err != nil {
		t.Fatal(err)
	}
	c.QPS = -1
	return c
}

// podConfig is what client-go makes of a pod's files and variables.
func (r *rig) podConfig(token string) *rest.Config {
	return &rest.Config{Host: "https://" + r.inPod.Addr().String(), BearerToken: token, TLSClientConfig: rest.TLSClientConfig{CAData: r.ca.pem}, QPS: -1}
}

func client(t testing.TB, c *rest.Config) *kubernetes.Clientset {
	t.Helper()
	k, err := kubernetes.NewForConfig(c)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func meta(ns, name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: ns, Name: name, UID: types.UID("uid-" + ns + "-" + name)}
}

func pod(ns, name, sa string) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: meta(ns, name), Spec: corev1.PodSpec{NodeName: node, ServiceAccountName: sa, Containers: []corev1.Container{{Name: "c", Image: "i"}}}}
}

func account(ns, name string) *corev1.ServiceAccount {
	return &corev1.ServiceAccount{ObjectMeta: meta(ns, name)}
}

func up(t testing.TB, resource string, o metav1.Object) store.Upsert {
	t.Helper()
	body, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	return store.Upsert{Key: store.Key{Resource: resource, Namespace: o.GetNamespace(), Name: o.GetName()}, UID: string(o.GetUID()), Rev: "1", Body: body}
}

func jwks(t testing.TB, kid string, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	point, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	b := base64.RawURLEncoding.EncodeToString
	raw, err := json.Marshal(map[string]any{"keys": []any{
		map[string]string{"kty": "EC", "kid": kid, "use": "sig", "alg": "ES256", "crv": "P-256", "x": b(point[1:33]), "y": b(point[33:])},
	}})
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// claim is a cloud token's claims for a pod; change them at will.
func (r *rig) claims(ns, pod, sa string) *cloudClaims {
	c := &cloudClaims{RegisteredClaims: jwt.RegisteredClaims{
		Issuer: cloudName, Audience: jwt.ClaimStrings{cloudName}, Subject: "system:serviceaccount:" + ns + ":" + sa,
		IssuedAt: jwt.NewNumericDate(r.now), NotBefore: jwt.NewNumericDate(r.now), ExpiresAt: jwt.NewNumericDate(r.now.Add(time.Hour)),
	}}
	c.Kubernetes.Namespace = ns
	c.Kubernetes.Pod = named{pod, "uid-" + ns + "-" + pod}
	c.Kubernetes.ServiceAccount = named{sa, "uid-" + ns + "-" + sa}
	c.Kubernetes.Node = named{Name: node}
	return c
}

func sign(t testing.TB, method jwt.SigningMethod, kid string, key crypto.PrivateKey, c jwt.Claims) string {
	t.Helper()
	token := jwt.NewWithClaims(method, c)
	token.Header["kid"] = kid
	s, err := token.SignedString(key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (r *rig) cloudToken(t testing.TB, ns, pod, sa string) string {
	t.Helper()
	return sign(t, jwt.SigningMethodES256, "k1", r.key, r.claims(ns, pod, sa))
}

func (r *rig) edgeToken(t testing.TB, ns, pod, sa string) string {
	t.Helper()
	got, err := r.tokens.CreateToken(t.Context(), ns, sa, &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod, UID: types.UID("uid-" + ns + "-" + pod)},
	}})
	if err != nil {
		t.Fatal(err)
	}
	return got.Status.Token
}
