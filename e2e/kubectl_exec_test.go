package e2e

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

func TestExec(t *testing.T) {
	t.Parallel()
	ns := apply(t, toolsPod("tools", "edge-1"))
	ready(t, ns, "tools")
	for name, env := range protocols {
		t.Run(name, func(t *testing.T) {
			exec := func(t *testing.T, stdin io.Reader, args ...string) *running {
				t.Helper()
				return kubectlStart(t, env, stdin, append([]string{"exec", "-n", ns, "tools"}, args...)...)
			}
			t.Run("exit code", func(t *testing.T) {
				r := exec(t, nil, "--", "/bin/demo", "exit", "7")
				if code := r.wait(t, 20*time.Second); code != 7 || !strings.Contains(r.stderr.tail(), "command terminated with exit code 7") {
					t.Errorf("exit %d, %q", code, r.stderr.tail())
				}
			})
			t.Run("no such program", func(t *testing.T) {
				r := exec(t, nil, "--", "/bin/nosuch")
				if code := r.wait(t, 20*time.Second); code == 0 || !strings.Contains(r.stderr.tail(), "no such file") {
					t.Errorf("exit %d, %q", code, r.stderr.tail())
				}
			})
			t.Run("stdout and stderr apart", func(t *testing.T) {
				r := exec(t, nil, "--", "/bin/cat", "/etc/group", "/missing")
				if code := r.wait(t, 20*time.Second); code != 1 {
					t.Errorf("exit %d", code)
				}
				if out := r.stdout.tail(); out != "root:x:0:\nnogroup:x:65534:\n" {
					t.Errorf("stdout %q", out)
				}
				if out := r.stderr.tail(); !strings.HasPrefix(out, "cat: open /missing: no such file") {
					t.Errorf("stderr %q", out)
				}
			})
			t.Run("stdin piped", func(t *testing.T) {
				data := make([]byte, 8<<20)
				rand.Read(data)
				r := exec(t, bytes.NewReader(data), "-i", "--", "/bin/cat")
				if code := r.wait(t, time.Minute); code != 0 {
					t.Fatalf("exit %d: %s", code, r.stderr.tail())
				}
				if out, _ := r.stdout.read(); out != string(data) {
					t.Errorf("%d bytes came back; want the same %d", len(out), len(data))
				}
			})
			t.Run("50 MiB out", func(t *testing.T) {
				const mib = 50
				r := exec(t, nil, "--", "/bin/demo", "print", "--mib", fmt.Sprint(mib))
				if code := r.wait(t, time.Minute); code != 0 {
					t.Fatalf("exit %d: %s", code, r.stderr.tail())
				}
				out, _ := r.stdout.read()
				if len(out) != mib<<20 || sha256.Sum256([]byte(out)) != sha256.Sum256([]byte(printed(mib))) {
					t.Errorf("%d bytes; want the %d that were printed", len(out), mib<<20)
				}
			})
			t.Run("terminal", func(t *testing.T) {
				s := kubectlOnTerminal(t, env, 31, 97, "exec", "-it", "-n", ns, "tools", "--", "/bin/demo", "tty")
				s.sawText(t, 20*time.Second, "31 97\r\n")
				s.resize(t, 50, 132)
				s.sawText(t, 10*time.Second, "50 132\r\n")
				s.press(t, "quit\r")
				if code := s.wait(t, 10*time.Second); code != 0 {
					t.Errorf("exit %d: %q", code, s.stdout.tail())
				}
			})
			t.Run("Ctrl-C on a terminal", func(t *testing.T) {
				s := kubectlOnTerminal(t, env, 24, 80, "exec", "-it", "-n", ns, "tools", "--", "/bin/cat")
				// The echo is the far terminal's: raw mode is on here.
				s.press(t, "typed\r")
				s.sawText(t, 20*time.Second, "typed\r\ntyped\r\n")
				s.press(t, "\x03")
				// Killed by SIGINT, as a shell tells it.
				if code := s.wait(t, 10*time.Second); code != 130 {
					t.Errorf("exit %d: %q", code, s.stdout.tail())
				}
			})
			t.Run("no terminal", func(t *testing.T) {
				r := exec(t, nil, "--", "/bin/demo", "tty")
				r.wait(t, 20*time.Second)
				if out := r.stdout.tail(); out != "not a tty\n" {
					t.Errorf("%q", out)
				}
			})
		})
	}
}

func TestCopy(t *testing.T) {
	t.Parallel()
	ns := apply(t, toolsPod("tools", "edge-2"))
	ready(t, ns, "tools")
	for name, env := range protocols {
		t.Run(name, func(t *testing.T) {
			cp := func(from, to string) {
				t.Helper()
				r := kubectlStart(t, env, nil, "cp", "-n", ns, from, to)
				if code := r.wait(t, time.Minute); code != 0 {
					t.Fatalf("cp %s %s: exit %d: %s", from, to, code, r.stderr.tail())
				}
			}
			dir := t.TempDir()
			big := filepath.Join(dir, "big")
			data := make([]byte, 20<<20)
			rand.Read(data)
			if err := os.WriteFile(big, data, 0o600); err != nil {
				t.Fatal(err)
			}
			far := "tools:/data/" + name
			cp(big, far+"-big")
			cp(far+"-big", filepath.Join(dir, "back"))
			back, err := os.ReadFile(filepath.Join(dir, "back"))
			if err != nil || !bytes.Equal(back, data) {
				t.Errorf("a file of %d bytes came back as %d bytes: %v", len(data), len(back), err)
			}

			tree := filepath.Join(dir, "tree")
			for path, text := range map[string]string{
				"a": "one\n", "empty": "", "sub/b": strings.Repeat("x", 513), "sub/deep er/ü": "a name to quote", "sub/deep er/c": "\x00\xff",
			} {
				path = filepath.Join(tree, path)
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			for i := range 300 {
				if err := os.WriteFile(filepath.Join(tree, fmt.Sprintf("sub/n%d", i)), fmt.Appendf(nil, "%d", i), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			cp(tree, far+"-tree")
			cp(far+"-tree", filepath.Join(dir, "tree-back"))
			want, got := files(t, tree), files(t, filepath.Join(dir, "tree-back"))
			if len(want) != len(got) {
				t.Errorf("%d files came back of %d", len(got), len(want))
			}
			for path, text := range want {
				if got[path] != text {
					t.Errorf("%s: %q; want %q", path, got[path], text)
				}
			}
		})
	}
	t.Run("a file that is not there", func(t *testing.T) {
		res := kubectlAny(t, "", "cp", "-n", ns, "tools:/data/nosuch", filepath.Join(t.TempDir(), "x"))
		// kubectl cp gives the far tar's complaint on its stdout.
		if res.Code == 0 || !strings.Contains(res.Stdout+res.Stderr, "/data/nosuch: no such file") {
			t.Errorf("exit %d, %q, %q", res.Code, res.Stdout, res.Stderr)
		}
	})
}

// files returns what is in the files below dir, by path.
func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		rel, _ := filepath.Rel(dir, path)
		all[rel] = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// A container is put into a running pod, which sees the processes of another
// one there.
func TestDebug(t *testing.T) {
	t.Parallel()
	ns := apply(t, web)
	ready(t, ns, "web")
	kubectl(t, "debug", "-n", ns, "web", "--image=localhost/skerry/demo:1", "--container=visitor", "--target=web",
		"--profile=general", "--", "/bin/sleep", "3600")
	awaitPod(t, ns, "web", time.Minute, "to have its visitor", func(p *corev1.Pod) bool {
		for _, s := range p.Status.EphemeralContainerStatuses {
			if s.Name == "visitor" && s.State.Running != nil {
				return true
			}
		}
		return false
	})
	// The network is the pod's, the processes are the target's.
	if out := kubectl(t, "exec", "-n", ns, "web", "-c", "visitor", "--", "/bin/demo", "get", "http://127.0.0.1:8080/healthz"); out != "ok\n" {
		t.Errorf("the target's port: %q", out)
	}
	if out := kubectl(t, "exec", "-n", ns, "web", "-c", "visitor", "--", "/bin/cat", "/proc/1/cmdline"); out != "/bin/demo\x00serve\x00" {
		t.Errorf("pid 1 as the visitor sees it: %q", out)
	}
	if out := kubectl(t, "logs", "-n", ns, "web", "-c", "visitor"); out != "" {
		t.Errorf("logs: %q", out)
	}

	t.Run("attached", func(t *testing.T) {
		in, feed, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer feed.Close()
		fmt.Fprintln(feed, "said to a container that did not exist")
		r := kubectlStart(t, nil, in, "debug", "-n", ns, "web", "-i",
			"--image=localhost/skerry/demo:1", "--container=parrot", "--profile=general", "--", "/bin/cat")
		in.Close()
		// The input ends only then: the runtime ends an attachment with its
		// input, whatever output is still on its way.
		r.sawText(t, time.Minute, "said to a container that did not exist\n")
		feed.Close()
		if code := r.wait(t, 20*time.Second); code != 0 {
			t.Errorf("exit %d: %s", code, r.stderr.tail())
		}
	})
}
