package image

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Names of the images that Demo, Pause and InCluster build.
const (
	DemoName      = "localhost/skerry/demo:1"
	PauseName     = "localhost/skerry/pause:1"
	InClusterName = "localhost/skerry/incluster:1"
)

const programs = "github.com/skerry-io/skerry/e2e/image/"

// Demo builds the demo program and its image in dir, and returns the archive's
// path. The program is there under the names of the tools it stands in for.
func Demo(ctx context.Context, dir string) (string, error) {
	spec := Spec{
		Name:       DemoName,
		Entrypoint: []string{"/bin/demo"},
		Cmd:        []string{"serve"},
		Ports:      []string{"8080/tcp"},
		Out:        filepath.Join(dir, "demo.tar"),
		Files: []File{
			{Path: "/tmp", Dir: true, Mode: 0o777 | os.ModeSticky},
			{Path: "/etc/passwd", Text: "root:x:0:0:root:/root:/bin/demo\nnobody:x:65534:65534:nobody:/:/bin/demo\n", Mode: 0o644},
			{Path: "/etc/group", Text: "root:x:0:\nnogroup:x:65534:\n", Mode: 0o644},
			{Path: "/root", Dir: true, Mode: 0o700},
		},
	}
	for _, tool := range []string{"tar", "cat", "ls", "echo", "env", "id", "sleep"} {
		spec.Files = append(spec.Files, File{Path: "/bin/" + tool, Link: "demo"})
	}
	return buildProgram(ctx, dir, "demo", spec)
}

// Pause builds the sandbox image in dir and returns the archive's path.
func Pause(ctx context.Context, dir string) (string, error) {
	return buildProgram(ctx, dir, "pause", Spec{
		Name:       PauseName,
		Entrypoint: []string{"/bin/pause"},
		User:       "65534:65534",
		Out:        filepath.Join(dir, "pause.tar"),
	})
}

// InCluster builds the image of a client of the Kubernetes API in dir and
// returns the archive's path.
func InCluster(ctx context.Context, dir string) (string, error) {
	return buildProgram(ctx, dir, "incluster", Spec{
		Name:       InClusterName,
		Entrypoint: []string{"/bin/incluster"},
		Out:        filepath.Join(dir, "incluster.tar"),
	})
}

func buildProgram(ctx context.Context, dir, name string, spec Spec) (string, error) {
	bin, err := GoBuild(ctx, programs+name, filepath.Join(dir, name))
	if err != nil {
		return "", err
	}
	spec.Files = append(spec.Files, File{Path: "/bin/" + name, Host: bin})
	return Build(ctx, spec)
}

// GoBuild builds a package of this module as a static program and returns out.
// The working directory has to be inside the module, as it is in tests.
func GoBuild(ctx context.Context, pkg, out string) (string, error) {
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-ldflags=-s -w", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build %s: %w: %s", pkg, err, strings.TrimSpace(string(text)))
	}
	return out, nil
}
