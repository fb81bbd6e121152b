package e2e

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/e2e/cluster"
)

func TestEdgecoresOwnMetrics(t *testing.T) {
	want := []string{
		`skerry_build_info{`, `program="edgecore"`, "skerry_edge_connected 1", "skerry_edge_store_written_bytes_total",
		"skerry_edge_outbox_entries", "process_resident_memory_bytes", "skerry_host_",
	}
	check := func(where, text string) {
		t.Helper()
		for _, w := range want {
			if !strings.Contains(text, w) {
				t.Errorf("%s lacks %s", where, w)
			}
		}
	}
	check("through the tunnel", kubectl(t, "get", "--raw", "/api/v1/nodes/edge-1/proxy/metrics/edgecore"))

	// On loopback with the token, and not without.
	n := world.nodes[0]
	get := func(args ...string) cluster.Result {
		res, err := n.Command(t.Context(), nil, append([]string{"curl", "-s", "-S", "-w", "%{http_code}", "http://127.0.0.1:10270/metrics"}, args...)...)
		if err != nil {
			t.Fatal(err)
		}
		return res
	}
	tok, err := n.Machine.Run(t.Context(), "cat", cluster.EdgeDataDir+"/metrics.token")
	if err != nil {
		t.Fatal(err)
	}
	check("on loopback", get("-H", "Authorization: Bearer "+strings.TrimSpace(string(tok))).Stdout)
	for _, args := range [][]string{nil, {"-H", "Authorization: Bearer wrong"}} {
		if res := get(args...); !strings.HasSuffix(res.Stdout, "403") || strings.Contains(res.Stdout, "skerry") {
			t.Errorf("%v: %s", args, res.Stdout)
		}
	}
}

func TestTheHubsMetricsAreForThoseWhoMay(t *testing.T) {
	ns := namespace(t)
	ctx := t.Context()
	for _, name := range []string{"scraper", "nobody"} {
		if _, err := world.client.CoreV1().ServiceAccounts(ns).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	role := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: ns + "-scraper"},
		Rules: []rbacv1.PolicyRule{{NonResourceURLs: []string{"/metrics"}, Verbs: []string{"get"}}}}
	binding := &rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: ns + "-scraper"},
		RoleRef:  rbacv1.RoleRef{APIGroup: "rbac.authorization.k8s.io", Kind: "ClusterRole", Name: role.Name},
		Subjects: []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: ns, Name: "scraper"}}}
	if _, err := world.client.RbacV1().ClusterRoles().Create(ctx, role, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := world.client.RbacV1().ClusterRoleBindings().Create(ctx, binding, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.Background()
		if err := world.client.RbacV1().ClusterRoleBindings().Delete(ctx, binding.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
		if err := world.client.RbacV1().ClusterRoles().Delete(ctx, role.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	client := hubClient(t)
	get := func(token string) (int, string) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://127.0.0.1:"+world.hub.Port()+"/metrics", nil)
		if err != nil {
			t.Fatal(err)
		}
		if token != "" {
			req.Header.Set("Authorization", "Bearer "+token)
		}
		res, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, string(b)
	}
	tokenOf := func(account string) string {
		tr, err := world.client.CoreV1().ServiceAccounts(ns).CreateToken(ctx, account, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return tr.Status.Token
	}
	for who, tok := range map[string]string{"anonymous": "", "a stranger": "x.y.z", "an account without the right": tokenOf("nobody")} {
		if code, text := get(tok); code != http.StatusForbidden || strings.Contains(text, "skerry_") {
			t.Errorf("%s: %d %.100s", who, code, text)
		}
	}
	scraper := tokenOf("scraper")
	eventually(t, 10*time.Second, "the scraper's metrics", func(context.Context) (bool, string) {
		code, text := get(scraper)
		return code == http.StatusOK && strings.Contains(text, "skerry_hub_connected_nodes 2") && strings.Contains(text, "skerry_hub_upstream_writes_total"), fmt.Sprintf("%d %.200s", code, text)
	})
}

// hubClient trusts the hub by the CA that its nodes trust.
func hubClient(t *testing.T) *http.Client {
	t.Helper()
	b, err := world.nodes[0].Machine.Run(t.Context(), "cat", cluster.EdgeDataDir+"/identity/ca.crt")
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		t.Fatal("no certificate in ca.crt")
	}
	ca, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13}}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 10 * time.Second}
}
