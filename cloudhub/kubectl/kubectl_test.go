package kubectl

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/cli-runtime/pkg/genericiooptions"
)

func TestKubeconfig(t *testing.T) {
	dir := t.TempDir()
	ours := filepath.Join(dir, "admin.kubeconfig")
	home := filepath.Join(dir, "home")
	t.Setenv("HOME", home)
	t.Setenv("KUBECONFIG", "")
	check := func(what, path, want string) {
		t.Helper()
		if got := findKubeconfig(path); got != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	write := func(path string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	check("no hub here", ours, "")
	check("nothing given", "", "")
	write(ours)
	check("a hub here", ours, ours)
	t.Setenv("KUBECONFIG", "/elsewhere")
	check("KUBECONFIG set", ours, "")
	t.Setenv("KUBECONFIG", "")
	write(filepath.Join(home, ".kube", "config"))
	check("the user's own", ours, "")
}

const config = `apiVersion: v1
kind: Config
current-context: hub
clusters: [{name: hub, cluster: {server: "https://hub.example.com:6443"}}]
contexts: [{name: hub, context: {cluster: hub}}]
`

func TestRun(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("HOME", dir)
	t.Setenv("KUBECONFIG", "")
	ours := filepath.Join(dir, "admin.kubeconfig")
	if err := os.WriteFile(ours, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := useKubeconfig(ours); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"config", "current-context"}, "hub\n"},
		{[]string{"config", "view", "-o", "jsonpath={.clusters[0].cluster.server}"}, "https://hub.example.com:6443"},
		{[]string{"version", "--client"}, "Client Version"},
	} {
		var out, errOut bytes.Buffer
		c := newKubectl(tc.args, genericiooptions.IOStreams{In: strings.NewReader(""), Out: &out, ErrOut: &errOut})
		if err := c.Execute(); err != nil || !strings.Contains(out.String(), tc.want) {
			t.Errorf("kubectl %s: %v, %q, %q", strings.Join(tc.args, " "), err, out.String(), errOut.String())
		}
	}
}

func TestCommand(t *testing.T) {
	c := NewCommand("")
	if c.Name() != "kubectl" || !c.DisableFlagParsing {
		t.Errorf("%q, flags parsed by the parent: %t", c.Name(), !c.DisableFlagParsing)
	}
}
