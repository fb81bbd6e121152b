package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestBuild(t *testing.T) {
	dir := t.TempDir()
	program := filepath.Join(dir, "program")
	if err := os.WriteFile(program, []byte("ELF"), 0o600); err != nil {
		t.Fatal(err)
	}
	spec := Spec{
		Name: "localhost/test:1", Entrypoint: []string{"/opt/bin/program"}, User: "1000", Ports: []string{"80/tcp"}, Arch: "arm",
		Out: filepath.Join(dir, "image.tar"),
		Files: []File{
			{Path: "/opt/bin/program", Host: program},
			{Path: "/opt/bin/link", Link: "program"},
			{Path: "/tmp", Dir: true, Mode: 0o777 | os.ModeSticky},
			{Path: "/etc/motd", Text: "hi", Mode: 0o644},
		},
	}
	out, err := Build(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	files := readTar(t, out)

	// Follow the archive as an importer does, checking every digest.
	var index, manifest struct {
		Manifests []descriptor `json:"manifests"`
		Config    descriptor   `json:"config"`
		Layers    []descriptor `json:"layers"`
	}
	decode(t, files["index.json"], &index)
	if len(index.Manifests) != 1 || index.Manifests[0].Annotations["io.containerd.image.name"] != spec.Name {
		t.Fatalf("index: %s", files["index.json"])
	}
	if p := index.Manifests[0].Platform; *p != (platform{"arm", "linux", "v7"}) {
		t.Errorf("platform = %+v", *p)
	}
	decode(t, blobOf(t, files, index.Manifests[0]), &manifest)
	if len(manifest.Layers) != 1 {
		t.Fatalf("layers: %v", manifest.Layers)
	}
	var config struct {
		Config struct {
			Entrypoint []string
			User       string
		} `json:"config"`
		RootFS struct {
			DiffIDs []string `json:"diff_ids"`
		} `json:"rootfs"`
	}
	decode(t, blobOf(t, files, manifest.Config), &config)
	if config.Config.User != "1000" || !slices.Equal(config.Config.Entrypoint, spec.Entrypoint) {
		t.Errorf("config = %+v", config.Config)
	}
	if !slices.Equal(config.RootFS.DiffIDs, []string{manifest.Layers[0].Digest}) {
		t.Errorf("diff ids = %v; the layer is %s", config.RootFS.DiffIDs, manifest.Layers[0].Digest)
	}

	var names []string
	tr := tar.NewReader(bytes.NewReader(blobOf(t, files, manifest.Layers[0])))
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
		if h.Name == "tmp/" && h.Mode != 0o1777 {
			t.Errorf("mode of /tmp = %o", h.Mode)
		}
	}
	if want := "etc/ etc/motd opt/ opt/bin/ opt/bin/link opt/bin/program tmp/"; strings.Join(names, " ") != want {
		t.Errorf("layer holds %q; want %q", names, want)
	}

	spec.Out = filepath.Join(dir, "again.tar")
	if _, err := Build(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	first, second := read(t, out), read(t, spec.Out)
	if !bytes.Equal(first, second) {
		t.Error("two builds differ")
	}
}

func TestBuildRefuses(t *testing.T) {
	ok := Spec{Name: "localhost/test:1", Entrypoint: []string{"/a"}, Out: filepath.Join(t.TempDir(), "x.tar")}
	for name, edit := range map[string]func(*Spec){
		"no tag":           func(s *Spec) { s.Name = "localhost:5000/test" },
		"no entrypoint":    func(s *Spec) { s.Entrypoint = nil },
		"no out":           func(s *Spec) { s.Out = "" },
		"relative path":    func(s *Spec) { s.Files = []File{{Path: "a", Dir: true}} },
		"path leading out": func(s *Spec) { s.Files = []File{{Path: "/../a", Dir: true}} },
		"two kinds":        func(s *Spec) { s.Files = []File{{Path: "/a", Dir: true, Text: "x"}} },
		"missing file":     func(s *Spec) { s.Files = []File{{Path: "/a", Host: "/nonexistent"}} },
	} {
		s := ok
		edit(&s)
		if _, err := Build(t.Context(), s); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func blobOf(t *testing.T, files map[string][]byte, d descriptor) []byte {
	t.Helper()
	data, ok := files[blobPath(d)]
	sum := sha256.Sum256(data)
	if !ok || d.Digest != "sha256:"+hex.EncodeToString(sum[:]) || d.Size != int64(len(data)) {
		t.Fatalf("blob %+v is not what the archive has at %s", d, blobPath(d))
	}
	return data
}

func readTar(t *testing.T, path string) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	tr := tar.NewReader(bytes.NewReader(read(t, path)))
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[h.Name], err = io.ReadAll(tr); err != nil {
			t.Fatal(err)
		}
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func decode(t *testing.T, data []byte, v any) {
	t.Helper()
	if err := json.Unmarshal(data, v); err != nil {
		t.Fatalf("%v in %s", err, data)
	}
}
