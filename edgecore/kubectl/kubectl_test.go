package kubectl

import (
	"bytes"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/cli-runtime/pkg/genericiooptions"
)

func TestKubeconfig(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "local.kubeconfig")
	if _, err := findKubeconfig(path); err == nil || !strings.Contains(err.Error(), "--data-dir") {
		t.Errorf("a missing kubeconfig: %v", err)
	}
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer abc" {
			http.Error(w, "who?", http.StatusUnauthorized)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, `{"major":"1","minor":"36","gitVersion":"v1.36.3+here"}`)
	}))
	defer srv.Close()
	ca := base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}))
	config := fmt.Sprintf("apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: %q, certificate-authority-data: %q}}]\nusers: [{name: u, user: {token: abc}}]\n"+
		"contexts: [{name: x, context: {cluster: c, user: u}}]\ncurrent-context: x\n", srv.URL, ca)
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	// The device's, whatever the user's environment says.
	t.Setenv("KUBECONFIG", filepath.Join(dir, "elsewhere"))
	var out bytes.Buffer
	path, err := findKubeconfig(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := newKubectl(path, []string{"get", "--raw", "/version"}, genericiooptions.IOStreams{In: &out, Out: &out, ErrOut: &out}).Execute(); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "v1.36.3+here") {
		t.Errorf("%s", out.String())
	}
}
