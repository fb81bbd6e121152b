package image

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

// Spec describes an image of one layer.
type Spec struct {
	Name       string   // reference with a tag, as pods will name it; required
	Files      []File   // what the layer holds; parent folders are added
	Entrypoint []string // required
	Cmd        []string
	Env        []string // KEY=value
	User       string   // zero means root
	WorkDir    string   // zero means /
	Ports      []string // "8080/tcp"
	Arch       string   // GOARCH of the programs; zero means this host's
	Out        string   // the archive to write; required
}

// File is a file, folder or symbolic link in the image. Exactly one of Host,
// Text, Link and Dir is given.
type File struct {
	Path string      // absolute, in the image
	Host string      // a file of this host to copy
	Text string      // the content itself
	Link string      // what a symbolic link points to
	Dir  bool        // a folder
	Mode os.FileMode // zero means 0755
}

// Media types of the OCI image specification.
const (
	typeIndex    = "application/vnd.oci.image.index.v1+json"
	typeManifest = "application/vnd.oci.image.manifest.v1+json"
	typeConfig   = "application/vnd.oci.image.config.v1+json"
	typeLayer    = "application/vnd.oci.image.layer.v1.tar"
)

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Platform    *platform         `json:"platform,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

type platform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
	Variant      string `json:"variant,omitempty"`
}

// Build writes the image's archive to spec.Out and returns that path. The same
// spec and files give the same bytes.
func Build(ctx context.Context, spec Spec) (string, error) {
	if err := spec.check(); err != nil {
		return "", fmt.Errorf("image %q: %w", spec.Name, err)
	}
	if err := write(ctx, spec); err != nil {
		return "", fmt.Errorf("image %s: write %s: %w", spec.Name, spec.Out, err)
	}
	return spec.Out, nil
}

func (s *Spec) check() error {
	if s.Arch == "" {
		s.Arch = runtime.GOARCH
	}
	if base := s.Name[strings.LastIndexByte(s.Name, '/')+1:]; !strings.Contains(base, ":") {
		return errors.New("the name needs a tag")
	}
	if len(s.Entrypoint) == 0 {
		return errors.New("no entrypoint")
	}
	if s.Out == "" {
		return errors.New("no file to write to")
	}
	for _, f := range s.Files {
		if !path.IsAbs(f.Path) || path.Clean(f.Path) != f.Path || f.Path == "/" {
			return fmt.Errorf("path %q is not absolute and clean", f.Path)
		}
		given := 0
		for _, b := range []bool{f.Host != "", f.Text != "", f.Link != "", f.Dir} {
			if b {
				given++
			}
		}
		if given != 1 {
			return fmt.Errorf("%s: give one of Host, Text, Link and Dir", f.Path)
		}
	}
	return nil
}

func write(ctx context.Context, s Spec) (err error) {
	layer, err := os.CreateTemp(filepath.Dir(s.Out), ".layer-*")
	if err != nil {
		return err
	}
	defer os.Remove(layer.Name())
	defer layer.Close()
	sum := sha256.New()
	if err := writeLayer(ctx, io.MultiWriter(layer, sum), s.Files); err != nil {
		return err
	}
	size, err := layer.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	if _, err := layer.Seek(0, io.SeekStart); err != nil {
		return err
	}
	layerDesc := descriptor{MediaType: typeLayer, Digest: "sha256:" + hex.EncodeToString(sum.Sum(nil)), Size: size}
	config, configDesc, err := blob(typeConfig, s.config(layerDesc.Digest))
	if err != nil {
		return err
	}
	manifest, manifestDesc, err := blob(typeManifest, map[string]any{
		"schemaVersion": 2, "mediaType": typeManifest, "config": configDesc, "layers": []descriptor{layerDesc},
	})
	if err != nil {
		return err
	}
	p := s.platform()
	manifestDesc.Platform = &p
	manifestDesc.Annotations = map[string]string{
		// The first is the specification's and may hold the tag only, so
		// importers that want the whole name read the second.
		"org.opencontainers.image.ref.name": s.Name,
		"io.containerd.image.name":          s.Name,
	}
	index, _, err := blob(typeIndex, map[string]any{
		"schemaVersion": 2, "mediaType": typeIndex, "manifests": []descriptor{manifestDesc},
	})
	if err != nil {
		return err
	}

	out, err := os.CreateTemp(filepath.Dir(s.Out), ".image-*")
	if err != nil {
		return err
	}
	defer os.Remove(out.Name()) // fails once it has its name
	defer out.Close()
	tw := tar.NewWriter(out)
	add := func(name string, data []byte) {
		err = errors.Join(err, header(tw, name, int64(len(data)), 0o644))
		_, werr := tw.Write(data)
		err = errors.Join(err, werr)
	}
	add("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	add("index.json", index)
	add(blobPath(manifestDesc), manifest)
	add(blobPath(configDesc), config)
	err = errors.Join(err, header(tw, blobPath(layerDesc), size, 0o644))
	if err != nil {
		return err
	}
	if _, err := io.Copy(tw, layer); err != nil {
		return err
	}
	if err := errors.Join(tw.Close(), out.Close()); err != nil {
		return err
	}
	return os.Rename(out.Name(), s.Out)
}

func (s *Spec) platform() platform {
	p := platform{Architecture: s.Arch, OS: "linux"}
	if s.Arch == "arm" {
		p.Variant = "v7"
	}
	return p
}

func (s *Spec) config(diffID string) map[string]any {
	run := map[string]any{
		"Entrypoint": s.Entrypoint,
		"Env":        append([]string{"PATH=/bin"}, s.Env...),
	}
	if len(s.Cmd) > 0 {
		run["Cmd"] = s.Cmd
	}
	if s.User != "" {
		run["User"] = s.User
	}
	if s.WorkDir != "" {
		run["WorkingDir"] = s.WorkDir
	}
	if len(s.Ports) > 0 {
		ports := map[string]struct{}{}
		for _, p := range s.Ports {
			ports[p] = struct{}{}
		}
		run["ExposedPorts"] = ports
	}
	c := map[string]any{
		"architecture": s.Arch, "os": "linux", "config": run,
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{diffID}},
	}
	if v := s.platform().Variant; v != "" {
		c["variant"] = v
	}
	return c
}

// writeLayer writes the files with their parent folders, each once and before
// what is in it.
func writeLayer(ctx context.Context, w io.Writer, files []File) error {
	files = slices.Clone(files)
	listed := map[string]bool{"/": true}
	for _, f := range files {
		listed[f.Path] = true
	}
	for _, f := range slices.Clone(files) {
		for dir := path.Dir(f.Path); !listed[dir]; dir = path.Dir(dir) {
			listed[dir] = true
			files = append(files, File{Path: dir, Dir: true})
		}
	}
	slices.SortFunc(files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	tw := tar.NewWriter(w)
	for _, f := range files {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := writeFile(tw, f); err != nil {
			return fmt.Errorf("%s: %w", f.Path, err)
		}
	}
	return tw.Close()
}

func writeFile(tw *tar.Writer, f File) error {
	name, mode := f.Path[1:], f.Mode
	if mode == 0 {
		mode = 0o755
	}
	switch {
	case f.Dir:
		h := tarHeader(name+"/", 0, mode)
		h.Typeflag = tar.TypeDir
		return tw.WriteHeader(h)
	case f.Link != "":
		h := tarHeader(name, 0, 0o777)
		h.Typeflag, h.Linkname = tar.TypeSymlink, f.Link
		return tw.WriteHeader(h)
	case f.Text != "":
		if err := header(tw, name, int64(len(f.Text)), mode); err != nil {
			return err
		}
		_, err := io.WriteString(tw, f.Text)
		return err
	}
	file, err := os.Open(f.Host)
	if err != nil {
		return err
	}
	defer file.Close()
	st, err := file.Stat()
	if err != nil {
		return err
	}
	if err := header(tw, name, st.Size(), mode); err != nil {
		return err
	}
	_, err = io.Copy(tw, file)
	return err
}

func header(tw *tar.Writer, name string, size int64, mode os.FileMode) error {
	return tw.WriteHeader(tarHeader(name, size, mode))
}

// tarHeader leaves out all that differs from one build to the next. The file
// mode's sticky and set-id bits are where tar wants them, not where Go has them.
func tarHeader(name string, size int64, mode os.FileMode) *tar.Header {
	bits := int64(mode.Perm())
	if mode&os.ModeSticky != 0 {
		bits |= 0o1000
	}
	return &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: bits, ModTime: time.Unix(0, 0), Format: tar.FormatPAX}
}

func blob(mediaType string, v any) ([]byte, descriptor, error) {
	var buf bytes.Buffer
	if err := json.NewEncoder(&buf).Encode(v); err != nil {
		return nil, descriptor{}, err
	}
	sum := sha256.Sum256(buf.Bytes())
	return buf.Bytes(), descriptor{MediaType: mediaType, Digest: "sha256:" + hex.EncodeToString(sum[:]), Size: int64(buf.Len())}, nil
}

func blobPath(d descriptor) string { return "blobs/" + strings.Replace(d.Digest, ":", "/", 1) }
