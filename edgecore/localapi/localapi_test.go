package localapi

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/skerry-io/skerry/edgecore/store"
)

var list = metav1.ListOptions{}

func TestPodReadsWhatItsRolesGive(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	for name, token := range map[string]string{"cloud": r.cloudToken(t, "shop", "a", reader), "edge": r.edgeToken(t, "shop", "a", reader)} {
		t.Run(name, func(t *testing.T) {
			c := client(t, r.podConfig(token)).CoreV1()
			pods, err := c.Pods("shop").List(ctx, list)
			if err != nil || len(pods.Items) != 2 {
				t.Fatalf("own namespace: %v %+v", err, pods)
			}
			if _, err := c.Pods("shop").Get(ctx, "b", metav1.GetOptions{}); err != nil {
				t.Error(err)
			}
			const who = `User "system:serviceaccount:shop:reader" cannot `
			for what, err := range map[string]error{
				`list resource "pods" in API group "" in the namespace "bank"`:     second(c.Pods("bank").List(ctx, list)),
				`list resource "pods" in API group "" at the cluster scope`:        second(c.Pods("").List(ctx, list)),
				`get resource "secrets" in API group "" in the namespace "shop"`:   second(c.Secrets("shop").Get(ctx, "s", metav1.GetOptions{})),
				`list resource "nodes" in API group "" at the cluster scope`:       second(c.Nodes().List(ctx, list)),
				`watch resource "secrets" in API group "" in the namespace "shop"`: second(c.Secrets("shop").Watch(ctx, list)),
			} {
				if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), who+what) {
					t.Errorf("want refusal to %s, got %v", what, err)
				}
			}
		})
	}
	c := client(t, r.podConfig(r.cloudToken(t, "shop", "b", idle))).CoreV1()
	if _, err := c.Pods("shop").List(ctx, list); !apierrors.IsForbidden(err) {
		t.Errorf("an account without roles: %v", err)
	}
}

func second[T any](_ T, err error) error { return err }

// A controller that only reads works as it is, and sees what comes.
func TestInformer(t *testing.T) {
	r := newRig(t)
	c := client(t, r.podConfig(r.cloudToken(t, "shop", "a", reader)))
	factory := informers.NewSharedInformerFactoryWithOptions(c, 0, informers.WithNamespace("shop"))
	added := make(chan string, 10)
	informer := factory.Core().V1().Pods().Informer()
	if _, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: func(o any) { added <- o.(*corev1.Pod).Name }}); err != nil {
		t.Fatal(err)
	}
	factory.Start(t.Context().Done())
	if !cache.WaitForCacheSync(t.Context().Done(), informer.HasSynced) {
		t.Fatal("not synced")
	}
	if err := r.store.ApplyDelta(t.Context(), store.Delta{Upserts: []store.Upsert{up(t, "pods", pod("shop", "new", idle))}}); err != nil {
		t.Fatal(err)
	}
	for want := map[string]bool{"a": true, "b": true, "new": true}; len(want) > 0; {
		select {
		case name := <-added:
			delete(want, name)
		case <-time.After(10 * time.Second):
			t.Fatalf("not told of %v", want)
		}
	}
}

func TestRolesChange(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	c := client(t, r.podConfig(r.cloudToken(t, "shop", "a", reader))).CoreV1()
	if _, err := c.Pods("shop").List(ctx, list); err != nil {
		t.Fatal(err)
	}
	binding := store.Key{Resource: "rolebindings", Namespace: "shop", Name: "read"}
	if err := r.store.ApplyDelta(ctx, store.Delta{Deletions: []store.Deletion{{Key: binding}}}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Pods("shop").List(ctx, list); !apierrors.IsForbidden(err) {
		t.Errorf("after the binding went: %v", err)
	}
}

func TestNobodyWrites(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	for name, config := range map[string]*rest.Config{"pod": r.podConfig(r.cloudToken(t, "shop", "a", reader)), "admin": r.adminConfig(t)} {
		c := client(t, config)
		for what, err := range map[string]error{
			"create pods":                  second(c.CoreV1().Pods("shop").Create(ctx, pod("shop", "x", reader), metav1.CreateOptions{})),
			"delete pods":                  c.CoreV1().Pods("shop").Delete(ctx, "a", metav1.DeleteOptions{}),
			"deletecollection pods":        c.CoreV1().Pods("shop").DeleteCollection(ctx, metav1.DeleteOptions{}, list),
			"update configmaps":            second(c.CoreV1().ConfigMaps("shop").Update(ctx, &corev1.ConfigMap{ObjectMeta: meta("shop", "x")}, metav1.UpdateOptions{})),
			"update pods/status":           second(c.CoreV1().Pods("shop").UpdateStatus(ctx, pod("shop", "a", reader), metav1.UpdateOptions{})),
			"create serviceaccounts/token": second(c.CoreV1().ServiceAccounts("shop").CreateToken(ctx, reader, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})),
		} {
			if !apierrors.IsForbidden(err) || !strings.Contains(fmt.Sprint(err), "cannot "+what+" here: edge node "+node+" is read-only for local clients") {
				t.Errorf("%s, %s: %v", name, what, err)
			}
		}
		err := c.AppsV1().RESTClient().Post().AbsPath("/apis/apps/v1/namespaces/shop/deployments").Body([]byte("{}")).Do(ctx).Error()
		if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "cannot create deployments.apps here") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if pods, _ := r.store.List("pods", ""); len(pods) != 3 {
		t.Errorf("%d pods", len(pods))
	}
}

// get asks over TLS with a raw path.
func (r *rig) get(t *testing.T, token, path string, change ...func(*http.Request)) (int, string) {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(r.ca.cert)
	h := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+r.inPod.Addr().String()+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	for _, c := range change {
		c(req)
	}
	res, err := h.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(body)
}

// Ways around the rules. The reader may list pods in shop, and no more.
func TestEscalation(t *testing.T) {
	r := newRig(t)
	token := r.cloudToken(t, "shop", "a", reader)
	if code, body := r.get(t, token, "/api/v1/namespaces/shop/pods"); code != http.StatusOK {
		t.Fatalf("%d %s", code, body)
	}
	for _, path := range []string{
		"/api/v1/namespaces/shop/pods/../secrets/s", "/api/v1/namespaces/shop/pods/%2e%2e/secrets/s", "/api/v1/namespaces/shop%2fpods/../bank/pods",
		"/api/v1/namespaces/shop/pods/../../bank/pods", "//api/v1/namespaces/shop/secrets", "/api/v1//namespaces/shop/secrets", "/api/v1/namespaces//secrets/s",
		"/api/v1/watch/namespaces/shop/secrets", "/api/v1/proxy/namespaces/shop/pods/a", "/api/v1/namespaces/shop/secrets/s/", "/api/v1/secrets?fieldSelector=metadata.namespace%3Dshop",
		"/api/v1/pods?fieldSelector=metadata.namespace%3Dshop", "/api/v1/pods?watch=1", "/api/v1/pods?watch=true&fieldSelector=metadata.name%3Da",
		"/apis/rbac.authorization.k8s.io/v1/namespaces/shop/roles", "/api/v1/nodes/edge-1/proxy/pods", "/metrics", "/debug/pprof/", "/apis/tokenissuers",
		"/api/v1/tokenissuers", "/readyz",
	} {
		if code, body := r.get(t, token, path); code != http.StatusForbidden && code != http.StatusNotFound {
			t.Errorf("%s: %d %s", path, code, body)
		}
	}
	for _, header := range []string{"Impersonate-User", "Impersonate-Group", "Impersonate-Uid"} {
		code, body := r.get(t, token, "/api/v1/namespaces/shop/pods", func(q *http.Request) { q.Header.Set(header, "system:masters") })
		if code != http.StatusForbidden || !strings.Contains(body, "nobody is impersonated") {
			t.Errorf("%s: %d %s", header, code, body)
		}
	}
	// What acts in a container is not a pod's.
	for _, sub := range []string{"exec?command=id", "attach", "portforward"} {
		if code, body := r.get(t, token, "/api/v1/namespaces/shop/pods/a/"+sub); code != http.StatusForbidden || !strings.Contains(body, "read-only for local clients") {
			t.Errorf("%s: %d %s", sub, code, body)
		}
	}
	if code, _ := r.get(t, token, "/api/v1/namespaces/bank/pods/c/log"); code != http.StatusForbidden {
		t.Errorf("log in another namespace: %d", code)
	}
}

func TestTokens(t *testing.T) {
	r := newRig(t)
	foreign, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	mine := func(change func(c *cloudClaims)) string {
		c := r.claims("shop", "a", reader)
		change(c)
		return sign(t, jwt.SigningMethodES256, "k1", r.key, c)
	}
	good := r.cloudToken(t, "shop", "a", reader)
	parts := strings.Split(good, ".")
	other, _ := json.Marshal(r.claims("bank", "c", reader))
	admin, err := os.ReadFile(filepath.Join(r.dir, adminFile))
	if err != nil {
		t.Fatal(err)
	}
	for name, token := range map[string]string{
		"none":              "",
		"garbage":           "abc",
		"long":              strings.Repeat("a", maxToken+1),
		"admin's, in a pod": strings.TrimSpace(string(admin)),
		"foreign key":       sign(t, jwt.SigningMethodES256, "k1", foreign, r.claims("shop", "a", reader)),
		"unknown key id":    sign(t, jwt.SigningMethodES256, "k2", r.key, r.claims("shop", "a", reader)),
		"tampered":          parts[0] + "." + base64.RawURLEncoding.EncodeToString(other) + "." + parts[2],
		"no signature":      parts[0] + "." + parts[1] + ".",
		"alg none":          sign(t, jwt.SigningMethodNone, "k1", jwt.UnsafeAllowNoneSignatureType, r.claims("shop", "a", reader)),
		"alg HS256":         sign(t, jwt.SigningMethodHS256, "k1", jwks(t, "k1", r.key), r.claims("shop", "a", reader)),
		"expired": mine(func(c *cloudClaims) {
			c.IssuedAt, c.NotBefore, c.ExpiresAt = at(r, -2*time.Hour), nil, at(r, -leeway-time.Second)
		}),
		"without an end":   mine(func(c *cloudClaims) { c.ExpiresAt = nil }),
		"other issuer":     mine(func(c *cloudClaims) { c.Issuer = "https://elsewhere" }),
		"other audience":   mine(func(c *cloudClaims) { c.Audience = jwt.ClaimStrings{"vault"} }),
		"other node":       mine(func(c *cloudClaims) { c.Kubernetes.Node.Name = "edge-2" }),
		"not of a pod":     mine(func(c *cloudClaims) { c.Kubernetes.Pod = named{} }),
		"pod is elsewhere": mine(func(c *cloudClaims) { c.Kubernetes.Pod = named{"z", "uid-shop-z"} }),
		"older namesake":   mine(func(c *cloudClaims) { c.Kubernetes.Pod.UID = "older" }),
		"older account":    mine(func(c *cloudClaims) { c.Kubernetes.ServiceAccount.UID = "older" }),
		"another's pod":    mine(func(c *cloudClaims) { c.Kubernetes.Pod = named{"b", "uid-shop-b"} }),
		"another subject":  mine(func(c *cloudClaims) { c.Subject = "system:serviceaccount:kube-system:admin" }),
	} {
		if code, body := r.get(t, token, "/api/v1/namespaces/shop/pods"); code != http.StatusUnauthorized || !strings.Contains(body, `"reason":"Unauthorized"`) {
			t.Errorf("%s: %d %s", name, code, body)
		}
	}
	for name, token := range map[string]string{
		"good": good, "just expired": mine(func(c *cloudClaims) { c.ExpiresAt = at(r, -leeway+2*time.Second) }),
		"no node claim": mine(func(c *cloudClaims) { c.Kubernetes.Node = named{} }),
		"two audiences": mine(func(c *cloudClaims) { c.Audience = jwt.ClaimStrings{"vault", cloudName} }),
	} {
		if code, body := r.get(t, token, "/api/v1/namespaces/shop/pods"); code != http.StatusOK {
			t.Errorf("%s: %d %s", name, code, body)
		}
	}
	code, _ := r.get(t, "", "/api/v1/namespaces/shop/pods", func(q *http.Request) { q.SetBasicAuth("a", good) })
	if code != http.StatusUnauthorized {
		t.Errorf("basic auth: %d", code)
	}
}

func at(r *rig, d time.Duration) *jwt.NumericDate { return jwt.NewNumericDate(r.now.Add(d)) }

// A device without a battery boots in 1970, offline, and its pods still read.
func TestAfterAReboot(t *testing.T) {
	r := newRig(t)
	cloud, before := r.cloudToken(t, "shop", "a", reader), r.ca.pem
	earlier := r.edgeToken(t, "shop", "a", reader)
	r.stop()
	r.now = time.Unix(3600, 0)
	r.start(t)
	if !bytes.Equal(r.ca.pem, before) {
		t.Error("another authority")
	}
	for name, token := range map[string]string{"cloud": cloud, "edge": r.edgeToken(t, "shop", "a", reader), "edge, from before": earlier} {
		pods, err := client(t, r.podConfig(token)).CoreV1().Pods("shop").List(t.Context(), list)
		if err != nil || len(pods.Items) != 2 {
			t.Errorf("%s: %v", name, err)
		}
	}
	// With its pod a token ends, whoever issued it.
	r.now = time.Now()
	edge := r.edgeToken(t, "shop", "a", reader)
	if err := r.store.Local(t.Context(), func(tx *store.Tx) error {
		_, err := tx.Delete(store.Key{Resource: "pods", Namespace: "shop", Name: "a"})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	for name, token := range map[string]string{"cloud": cloud, "edge": edge} {
		if code, body := r.get(t, token, "/api/v1/namespaces/shop/pods"); code != http.StatusUnauthorized {
			t.Errorf("%s: %d %s", name, code, body)
		}
	}
}

func TestAdmin(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	for _, name := range Files() {
		info, err := os.Stat(filepath.Join(r.dir, name))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", name, info.Mode(), err)
		}
	}
	c := client(t, r.adminConfig(t))
	pods, err := c.CoreV1().Pods("").List(ctx, list)
	if err != nil || len(pods.Items) != 3 {
		t.Errorf("pods: %v", err)
	}
	if _, err := c.CoreV1().Secrets("shop").Get(ctx, "s", metav1.GetOptions{}); err != nil {
		t.Error(err)
	}
	var warnings []string
	config := r.adminConfig(t)
	config.WarningHandler = warningFunc(func(code int, _, text string) { warnings = append(warnings, fmt.Sprint(code, " ", text)) })
	if _, err := client(t, config).CoreV1().Pods("").List(ctx, list); err != nil {
		t.Fatal(err)
	}
	if len(warnings) != 1 || !strings.Contains(warnings[0], "299 node edge-1 answers from its own store") || !strings.Contains(warnings[0], "it is away") {
		t.Errorf("warnings %q", warnings)
	}
	// The files are the same after a restart; one that others may read is not
	// taken.
	kubeconfig, err := os.ReadFile(filepath.Join(r.dir, adminFile))
	if err != nil {
		t.Fatal(err)
	}
	r.stop()
	r.start(t)
	if again, err := os.ReadFile(filepath.Join(r.dir, adminFile)); err != nil || !bytes.Equal(again, kubeconfig) {
		t.Errorf("another token (%v)", err)
	}
	for _, name := range []string{authorityFile, adminFile} {
		path := filepath.Join(r.dir, name)
		if err := os.Chmod(path, 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := New(r.cfg); err == nil || !strings.Contains(err.Error(), "chmod 600") {
			t.Errorf("%s is readable by others: %v", name, err)
		}
		if err := os.Chmod(path, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(r.dir, authorityFile), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(r.cfg); err == nil || !strings.Contains(err.Error(), "remove the file") {
		t.Errorf("a damaged authority: %v", err)
	}
}

type warningFunc func(code int, agent, text string)

func (f warningFunc) HandleWarningHeader(code int, agent, text string) { f(code, agent, text) }

func TestReviews(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	c := client(t, r.podConfig(r.cloudToken(t, "shop", "a", reader)))
	ask := func(a authorizationv1.ResourceAttributes) authorizationv1.SubjectAccessReviewStatus {
		t.Helper()
		got, err := c.AuthorizationV1().SelfSubjectAccessReviews().Create(ctx, &authorizationv1.SelfSubjectAccessReview{
			Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &a}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return got.Status
	}
	if s := ask(authorizationv1.ResourceAttributes{Verb: "list", Resource: "pods", Namespace: "shop"}); !s.Allowed || !strings.Contains(s.Reason, "RBAC: allowed by RoleBinding") {
		t.Errorf("own pods: %+v", s)
	}
	if s := ask(authorizationv1.ResourceAttributes{Verb: "list", Resource: "pods", Namespace: "bank"}); s.Allowed {
		t.Errorf("others' pods: %+v", s)
	}
	if s := ask(authorizationv1.ResourceAttributes{Verb: "delete", Resource: "pods", Namespace: "shop"}); s.Allowed || !strings.Contains(s.Reason, "read-only") {
		t.Errorf("delete: %+v", s)
	}
	rules, err := c.AuthorizationV1().SelfSubjectRulesReviews().Create(ctx, &authorizationv1.SelfSubjectRulesReview{
		Spec: authorizationv1.SelfSubjectRulesReviewSpec{Namespace: "shop"}}, metav1.CreateOptions{})
	if err != nil || len(rules.Status.ResourceRules) != 3 || len(rules.Status.NonResourceRules) != 1 {
		t.Errorf("rules: %v %+v", err, rules)
	}
	me, err := c.AuthenticationV1().SelfSubjectReviews().Create(ctx, &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
	if err != nil || me.Status.UserInfo.Username != "system:serviceaccount:shop:reader" || me.Status.UserInfo.UID != "uid-shop-reader" || len(me.Status.UserInfo.Groups) != 3 {
		t.Errorf("who: %v %+v", err, me)
	}
}

func TestStreams(t *testing.T) {
	r := newRig(t)
	got := make(chan string, 1)
	r.kubelet = http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if q.Header.Get("Authorization") != "" {
			t.Error("the token went on to the kubelet")
		}
		got <- q.Method + " " + q.URL.RequestURI()
		fmt.Fprint(w, "hello\n")
	})
	ctx := t.Context()
	lines, err := client(t, r.podConfig(r.cloudToken(t, "shop", "a", reader))).CoreV1().Pods("shop").GetLogs("b", &corev1.PodLogOptions{TailLines: new(int64), Follow: true}).DoRaw(ctx)
	if err != nil || string(lines) != "hello\n" {
		t.Fatalf("logs: %v %q", err, lines)
	}
	if q := <-got; q != "GET /containerLogs/shop/b/c?follow=true&tailLines=0" {
		t.Errorf("asked the kubelet %s", q)
	}
	admin := client(t, r.adminConfig(t)).CoreV1().RESTClient()
	for ours, theirs := range map[string]string{
		"exec?container=c&command=ls&command=-l&stdin=true&stdout=true&tty=false": "POST /exec/shop/a/c?command=ls&command=-l&input=1&output=1",
		"attach?stdout=1&stderr=1&tty=1":                                          "POST /attach/shop/a/c?error=1&output=1&tty=1",
		"portforward?ports=8080":                                                  "POST /portForward/shop/a?port=8080",
	} {
		if err := admin.Post().RequestURI("/api/v1/namespaces/shop/pods/a/" + ours).Do(ctx).Error(); err != nil {
			t.Errorf("%s: %v", ours, err)
			continue
		}
		if q := <-got; q != theirs {
			t.Errorf("%s: asked the kubelet %s", ours, q)
		}
	}
	if err := admin.Get().AbsPath("/api/v1/namespaces/shop/pods/none/log").Do(ctx).Error(); !apierrors.IsNotFound(err) {
		t.Errorf("log of no pod: %v", err)
	}
	if err := admin.Get().AbsPath("/api/v1/namespaces/shop/pods/a/log").Param("container", "x/../../y").Do(ctx).Error(); !apierrors.IsBadRequest(err) {
		t.Errorf("log of no container: %v", err)
	}
}

func TestTooManyRequests(t *testing.T) {
	r := newRig(t)
	for range maxShort {
		r.short <- struct{}{}
	}
	token := r.cloudToken(t, "shop", "a", reader)
	if code, body := r.get(t, token, "/api/v1/namespaces/shop/pods"); code != http.StatusTooManyRequests {
		t.Errorf("%d %s", code, body)
	}
	if code, _ := r.get(t, token, "/api/v1/namespaces/shop/pods?watch=1&timeoutSeconds=1"); code != http.StatusOK {
		t.Errorf("a watch is refused for others' gets: %d", code)
	}
}

// The certificate is good by whatever the clock says, and renewed in time.
func TestAuthority(t *testing.T) {
	r := newRig(t)
	roots := x509.NewCertPool()
	roots.AddCert(r.ca.cert)
	check := func(now time.Time) *x509.Certificate {
		t.Helper()
		r.now = now
		pair, err := r.ca.serving()
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := x509.ParseCertificate(pair.Certificate[0])
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"localhost", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local", "127.0.0.1", "169.254.20.20"} {
			if _, err := leaf.Verify(x509.VerifyOptions{DNSName: name, Roots: roots, CurrentTime: now}); err != nil {
				t.Errorf("at %s for %s: %v", now, name, err)
			}
		}
		return leaf
	}
	start := time.Date(2026, 11, 24, 0, 0, 0, 0, time.UTC)
	first := check(start)
	if again := check(start.Add(leafLife / 2)); !again.Equal(first) {
		t.Error("renewed at half its life")
	}
	if again := check(start.Add(leafLife + time.Second)); again.Equal(first) {
		t.Error("not renewed at the end of its life")
	}
	for _, year := range []int{1970, 2000, 2026, 2049, 2051, 2100} {
		check(time.Date(year, 1, 1, 0, 0, 1, 0, time.UTC))
	}
}

func TestKubeletView(t *testing.T) {
	r := newRig(t)
	view := r.KubeletView()
	see := func(resource, body string, key store.Key, into any) {
		t.Helper()
		key.Resource = resource
		if err := json.Unmarshal(view(&store.Object{Key: key, Body: []byte(body)}), into); err != nil {
			t.Fatal(err)
		}
	}
	var svc corev1.Service
	here := store.Key{Namespace: "default", Name: "kubernetes"}
	const service = `{"metadata":{"name":"kubernetes","resourceVersion":"7"},"spec":{"clusterIP":"10.96.0.1","clusterIPs":["10.96.0.1"],"type":"ClusterIP","ports":[{"port":443}]}}`
	see("services", service, here, &svc)
	if svc.Spec.ClusterIP != "169.254.20.20" || len(svc.Spec.ClusterIPs) != 1 || svc.Spec.Ports[0].Port != 10271 || svc.Spec.Type != "ClusterIP" || svc.ResourceVersion != "7" {
		t.Errorf("service %+v", svc)
	}
	svc = corev1.Service{}
	if see("services", service, store.Key{Namespace: "shop", Name: "kubernetes"}, &svc); svc.Spec.ClusterIP != "10.96.0.1" {
		t.Errorf("another service %+v", svc.Spec)
	}
	var cm corev1.ConfigMap
	see("configmaps", `{"data":{"ca.crt":"-----CLUSTER-----","x":"y"}}`, store.Key{Namespace: "shop", Name: "kube-root-ca.crt"}, &cm)
	if cm.Data["ca.crt"] != "-----CLUSTER-----\n"+string(r.ca.pem) || cm.Data["x"] != "y" {
		t.Errorf("configmap %+v", cm.Data)
	}
	if got := view(&store.Object{Key: store.Key{Resource: "services", Namespace: "default", Name: "kubernetes"}, Body: []byte(`{"spec":3}`)}); string(got) != `{"spec":3}` {
		t.Errorf("a broken object became %s", got)
	}
	if (*Server)(nil).KubeletView() != nil {
		t.Error("a local API that is off changes what the kubelet sees")
	}
}

func TestConfig(t *testing.T) {
	r := newRig(t)
	for change, want := range map[string]func(*Config){
		"loopback":     func(c *Config) { c.Listen = "0.0.0.0:1" },
		"can reach":    func(c *Config) { c.PodListen = "127.0.0.1:1" },
		"can reach ":   func(c *Config) { c.PodListen = "nonsense" },
		"are required": func(c *Config) { c.Dir = "" },
	} {
		c := r.cfg
		want(&c)
		if _, err := New(c); err == nil || !strings.Contains(err.Error(), strings.TrimSpace(change)) {
			t.Errorf("%s: %v", change, err)
		}
	}
	c := r.cfg
	c.PodListen = "198.51.100.7:10271"
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	r.stop()
	defer r.start(t)
	if err := s.Listen(); err == nil || !strings.Contains(err.Error(), "set localAPI.podListen") {
		t.Errorf("an address that is nobody's: %v", err)
	}
}

func FuzzJWKS(f *testing.F) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(jwks(f, "k", key))
	rsaOne, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(fmt.Sprintf(`{"keys":[{"kty":"RSA","kid":"r","n":%q,"e":"AQAB"}]}`, base64.RawURLEncoding.EncodeToString(rsaOne.N.Bytes()))))
	f.Add([]byte(`{"keys":[{"kty":"EC","kid":"k","crv":"P-256","x":"AA","y":"AA"}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		keys, err := parseJWKS(raw)
		if err == nil && (len(keys) == 0 || len(keys) > maxKeys) {
			t.Errorf("%d keys", len(keys))
		}
		for _, k := range keys {
			switch k := k.(type) {
			case *rsa.PublicKey:
				if k.N.BitLen() < 2048 || k.E < 3 {
					t.Errorf("weak key %v", k)
				}
			case *ecdsa.PublicKey:
				if _, err := k.Bytes(); err != nil {
					t.Error(err)
				}
			}
		}
	})
}

func TestRSAKey(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	r := newRig(t)
	b := base64.RawURLEncoding.EncodeToString
	set := fmt.Sprintf(`{"keys":[{"kty":"RSA","alg":"RS256","use":"sig","kid":"r","n":%q,"e":%q},{"kty":"oct","kid":"x","k":"AAAA"},{"kty":"EC","use":"enc","kid":"e"}]}`,
		b(key.N.Bytes()), b(big.NewInt(int64(key.E)).Bytes()))
	keys, err := parseJWKS([]byte(set))
	if err != nil || len(keys) != 1 {
		t.Fatalf("%v %v", keys, err)
	}
	i := &issuer{name: cloudName, audiences: []string{cloudName}, keys: keys}
	h, err := i.verify(sign(t, jwt.SigningMethodRS256, "r", key, r.claims("shop", "a", reader)), r.now)
	if err != nil || h.pod != "a" {
		t.Errorf("%+v %v", h, err)
	}
	for _, bad := range []string{`{}`, `{"keys":[]}`, `[]`, `{"keys":[{"kty":"RSA","kid":"r","n":"AQAB","e":"AQAB"}]}`, `{"keys":[{"kty":"EC","kid":"r","crv":"secp256k1","x":"AA","y":"AA"}]}`} {
		if _, err := parseJWKS([]byte(bad)); err == nil {
			t.Errorf("taken: %s", bad)
		}
	}
}

func FuzzToken(f *testing.F) {
	r := newRig(f)
	f.Add(r.cloudToken(f, "shop", "a", reader))
	f.Add(r.edgeToken(f, "shop", "a", reader))
	f.Add("a.b.c")
	f.Add(base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + "." + base64.RawURLEncoding.EncodeToString([]byte(`{"iss":"`+cloudName+`"}`)) + ".")
	f.Fuzz(func(t *testing.T, token string) {
		who, err := r.auth.serviceAccount(token)
		if err == nil && who.GetName() != "system:serviceaccount:shop:reader" {
			t.Errorf("%q is %s", token, who.GetName())
		}
	})
}
