package main

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// tarMain does as much of tar(1) as `kubectl cp` asks for: create, extract and
// list, on stdin and stdout or a file.
func tarMain(args []string) error {
	var mode byte
	file, dir := "-", "."
	var paths []string
	for i := 0; i < len(args); i++ {
		a := args[i]
		if i > 0 && !strings.HasPrefix(a, "-") || a == "-" {
			paths = append(paths, a)
			continue
		}
		for _, c := range strings.TrimPrefix(a, "-") {
			switch c {
			case 'c', 'x', 't':
				mode = byte(c)
			case 'f', 'C':
				if i++; i >= len(args) {
					return fmt.Errorf("option %c needs a value", c)
				}
				if c == 'f' {
					file = args[i]
				} else {
					dir = args[i]
				}
			case 'm', 'v', 'p', 'o': // the time of extraction is what we set anyway
			default:
				return fmt.Errorf("option %c is not known", c)
			}
		}
	}
	if err := os.Chdir(dir); err != nil {
		return err
	}
	switch mode {
	case 'c':
		return withFile(file, os.Stdout, os.Create, func(f *os.File) error { return create(f, paths) })
	case 'x':
		return withFile(file, os.Stdin, os.Open, extract)
	case 't':
		return withFile(file, os.Stdin, os.Open, list)
	}
	return errors.New("say c, x or t")
}

func withFile(name string, std *os.File, open func(string) (*os.File, error), use func(*os.File) error) error {
	if name == "-" {
		return use(std)
	}
	f, err := open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	return use(f)
}

func create(w io.Writer, paths []string) error {
	if len(paths) == 0 {
		return errors.New("no path given")
	}
	tw := tar.NewWriter(w)
	for _, top := range paths {
		err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			return pack(tw, path, d)
		})
		if err != nil {
			return err
		}
	}
	return tw.Close()
}

func pack(tw *tar.Writer, path string, d fs.DirEntry) error {
	st, err := d.Info()
	if err != nil {
		return err
	}
	link := ""
	if st.Mode()&fs.ModeSymlink != 0 {
		if link, err = os.Readlink(path); err != nil {
			return err
		}
	}
	h, err := tar.FileInfoHeader(st, link)
	if err != nil {
		return err // a socket, for example
	}
	h.Name = strings.TrimPrefix(path, "/")
	if h.Name == "" {
		h.Name = "."
	}
	if st.IsDir() {
		h.Name += "/"
	}
	if err := tw.WriteHeader(h); err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return nil
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	// A file that grows meanwhile is taken as long as it was.
	_, err = io.CopyN(tw, f, h.Size)
	return err
}

// extract writes below the working directory only; os.Root sees to it that no
// name and no link leads out.
func extract(r *os.File) error {
	root, err := os.OpenRoot(".")
	if err != nil {
		return err
	}
	defer root.Close()
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := unpack(root, h, tr); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
	}
}

func unpack(root *os.Root, h *tar.Header, r io.Reader) error {
	name := filepath.Clean(strings.TrimPrefix(h.Name, "/"))
	perm := h.FileInfo().Mode().Perm()
	if dir := filepath.Dir(name); dir != "." {
		if err := root.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	switch h.Typeflag {
	case tar.TypeDir:
		return root.MkdirAll(name, perm)
	case tar.TypeSymlink:
		if err := root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return root.Symlink(h.Linkname, name)
	case tar.TypeReg:
		f, err := root.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, perm)
		if err != nil {
			return err
		}
		if _, err := io.Copy(f, r); err != nil {
			f.Close()
			return err
		}
		return f.Close()
	}
	return fmt.Errorf("entries of type %q are not taken", h.Typeflag)
}

func list(r *os.File) error {
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		fmt.Println(h.Name)
	}
}
