// Package config holds the example configurations and the check that the
// programs take them, comments and all.
package config

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const bin = "../../bin"

// commented finds keys and list items that are commented out.
var commented = regexp.MustCompile(`(?m)^( *)# ( *(?:[A-Za-z]+:|- \{))`)

func TestExamples(t *testing.T) {
	for name, program := range map[string]struct {
		run  func(dir string) []string // reads the configuration, and fails soon after
		want string                    // how it then fails
	}{
		"cloudhub.yaml": {
			func(dir string) []string {
				return []string{"cloudhub", "standalone", "--config", filepath.Join(dir, "config.yaml"), "--data-dir", dir, "--listen", "203.0.113.1:1"}
			}, "listen for edge nodes",
		},
		"edgecore.yaml": {
			func(dir string) []string { return []string{"edgecore", "run", "--data-dir", dir} }, "edgecore join",
		},
	} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		full := commented.ReplaceAllString(string(text), "$1$2")
		for variant, text := range map[string]string{"as it is": string(text), "uncommented": full} {
			t.Run(name+" "+variant, func(t *testing.T) {
				dir := t.TempDir()
				if err := os.WriteFile(filepath.Join(dir, "config.yaml"), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
				args := program.run(dir)
				out, err := exec.CommandContext(t.Context(), filepath.Join(bin, args[0]), args[1:]...).CombinedOutput()
				if err == nil || !strings.Contains(string(out), program.want) {
					t.Errorf("%s: %v: %s\nwant an error with %q\nthe configuration:\n%s", strings.Join(args, " "), err, out, program.want, text)
				}
			})
		}
	}
}
