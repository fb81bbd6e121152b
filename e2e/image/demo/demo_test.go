package main

import (
	"archive/tar"
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The tests run this program itself, as a command named after a tool.
func TestMain(m *testing.M) {
	if os.Getenv("DEMO_MAIN") != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func tool(t *testing.T, name string, args ...string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, exe)
	cmd.Args = append([]string{name}, args...)
	cmd.Env = append(os.Environ(), "DEMO_MAIN=1")
	return cmd
}

// As kubectl cp does it, both ways.
func TestTar(t *testing.T) {
	from, to := t.TempDir(), t.TempDir()
	if err := os.MkdirAll(filepath.Join(from, "a/b"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(from, "a/b/file"), bytes.Repeat([]byte("x"), 100_000), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("b/file", filepath.Join(from, "a/link")); err != nil {
		t.Fatal(err)
	}
	archive, err := tool(t, "tar", "cf", "-", "-C", from, "a").Output()
	if err != nil {
		t.Fatal(err)
	}
	extract := tool(t, "tar", "-xmf", "-", "-C", to)
	extract.Stdin = bytes.NewReader(archive)
	if out, err := extract.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	got, err := os.ReadFile(filepath.Join(to, "a/link"))
	if err != nil || len(got) != 100_000 {
		t.Errorf("%d bytes arrived: %v", len(got), err)
	}
	if st, err := os.Stat(filepath.Join(to, "a/b/file")); err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("mode: %v, %v", st, err)
	}
}

func TestTarStaysInside(t *testing.T) {
	dir := t.TempDir()
	into := filepath.Join(dir, "into")
	if err := os.Mkdir(into, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, headers := range map[string][]tar.Header{
		"dots": {{Name: "../out", Typeflag: tar.TypeReg}},
		"link": {{Name: "l", Linkname: "..", Typeflag: tar.TypeSymlink}, {Name: "l/out", Typeflag: tar.TypeReg}},
	} {
		var buf bytes.Buffer
		tw := tar.NewWriter(&buf)
		for _, h := range headers {
			if err := tw.WriteHeader(&h); err != nil {
				t.Fatal(err)
			}
		}
		tw.Close()
		cmd := tool(t, "tar", "xf", "-", "-C", into)
		cmd.Stdin = &buf
		if out, err := cmd.CombinedOutput(); err == nil {
			t.Errorf("%s: no error: %s", name, out)
		}
		if _, err := os.Lstat(filepath.Join(dir, "out")); err == nil {
			t.Errorf("%s: a file was written outside", name)
		}
	}
}

func TestPrint(t *testing.T) {
	out, err := tool(t, "demo", "print", "--mib", "2").Output()
	if err != nil {
		t.Fatal(err)
	}
	if len(out) != 2<<20 || !bytes.HasPrefix(out, []byte("000000000000 the")) || out[len(out)-1] != '\n' {
		t.Errorf("%d bytes: %q...", len(out), out[:70])
	}
}

func TestExitCodes(t *testing.T) {
	for args, want := range map[string]int{"exit 7": 7, "no-such": 2, "exit": 1, "sleep 0": 0, "echo hi": 0, "cat /missing": 1} {
		cmd := tool(t, "demo", strings.Fields(args)...)
		cmd.Run()
		if got := cmd.ProcessState.ExitCode(); got != want {
			t.Errorf("demo %s: exit code %d; want %d", args, got, want)
		}
	}
}

func TestWaitSigterm(t *testing.T) {
	cmd := tool(t, "demo", "wait-sigterm", "--grace", "50ms", "--code", "4")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	first := make([]byte, 64)
	if n, err := out.Read(first); err != nil || !strings.HasPrefix(string(first[:n]), "waiting") {
		t.Fatalf("%q, %v", first[:n], err)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	if got := cmd.ProcessState.ExitCode(); got != 4 {
		t.Errorf("exit code %d; want 4", got)
	}
}
