// Package versions holds the check that Kubernetes' own libraries are linked at
// the versions Kubernetes was tested with.
package versions

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"strings"
	"testing"
)

// pinned are modules that carry Kubernetes' behaviour: validation, merging,
// schemas, container figures, storage. Another dependency may raise them in
// go.mod without a word, and the API server then runs on versions that nobody
// has tested it with.
var pinned = []string{
	"github.com/google/cadvisor",
	"github.com/google/cel-go",
	"go.etcd.io/etcd/api/v3",
	"go.etcd.io/etcd/client/v3",
	"k8s.io/kube-openapi",
	"sigs.k8s.io/structured-merge-diff/v6",
}

type module struct {
	Path, Version, GoMod string
	Replace              *module
}

func TestKubernetesPins(t *testing.T) {
	ours := map[string]module{}
	dec := json.NewDecoder(bytes.NewReader(goCommand(t, append([]string{"list", "-m", "-json", "k8s.io/kubernetes"}, pinned...)...)))
	for {
		var m module
		err := dec.Decode(&m)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		ours[m.Path] = m
	}
	kube := ours["k8s.io/kubernetes"]
	var theirs struct {
		Require []module
	}
	if err := json.Unmarshal(goCommand(t, "mod", "edit", "-json", kube.GoMod), &theirs); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{}
	for _, m := range theirs.Require {
		want[m.Path] = m.Version
	}
	for _, path := range pinned {
		switch m := ours[path]; {
		case want[path] == "":
			t.Errorf("k8s.io/kubernetes %s does not require %s; mend the list", kube.Version, path)
		case m.Replace != nil:
			t.Errorf("%s is replaced by %s %s", path, m.Replace.Path, m.Replace.Version)
		case m.Version != want[path]:
			t.Errorf("%s is at %s; k8s.io/kubernetes %s pins %s", path, m.Version, kube.Version, want[path])
		}
	}
}

// The libraries that Kubernetes publishes from its own tree have to be the same
// release as k8s.io/kubernetes.
func TestStagingModules(t *testing.T) {
	var mod struct {
		Require []module
		Replace []struct{ Old, New module }
	}
	if err := json.Unmarshal(goCommand(t, "mod", "edit", "-json"), &mod); err != nil {
		t.Fatal(err)
	}
	var kube string
	for _, m := range mod.Require {
		if m.Path == "k8s.io/kubernetes" {
			kube = m.Version
		}
	}
	want := strings.Replace(kube, "v1.", "v0.", 1)
	if len(mod.Replace) < 30 {
		t.Errorf("go.mod replaces %d modules; k8s.io/kubernetes needs all of its staging modules replaced", len(mod.Replace))
	}
	for _, r := range mod.Replace {
		if strings.HasPrefix(r.Old.Path, "k8s.io/") && (r.New.Path != r.Old.Path || r.New.Version != want) {
			t.Errorf("%s is replaced by %s %s; want %s", r.Old.Path, r.New.Path, r.New.Version, want)
		}
	}
}

func goCommand(t *testing.T, args ...string) []byte {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", args...)
	var msg bytes.Buffer
	cmd.Stderr = &msg
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go %s: %v: %s", strings.Join(args, " "), err, msg.Bytes())
	}
	return out
}
