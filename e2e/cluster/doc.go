// Package cluster brings up the whole of Skerry on one host, from the built
// programs: a standalone hub as a process of the host, and edge nodes, each in
// a private machine (package machine) of its own. Tests, benchmarks and the
// demo share it.
//
// It starts, stops, kills and asks; it asserts nothing. Everything it talks to
// is real: the programs that users run, over the network, with kubectl.
//
// As it runs machines, a program that uses it must call machine.Main first.
package cluster

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Programs are the paths of the built programs.
type Programs struct {
	Cloudhub, Edgecore string
}

// FindPrograms returns the programs that "make build" puts into bin/ of this
// module; the working directory has to be inside it.
func FindPrograms() (Programs, error) {
	root, err := ModuleRoot()
	if err != nil {
		return Programs{}, err
	}
	p := Programs{Cloudhub: filepath.Join(root, "bin/cloudhub"), Edgecore: filepath.Join(root, "bin/edgecore")}
	for _, path := range []string{p.Cloudhub, p.Edgecore} {
		if _, err := os.Stat(path); err != nil {
			return Programs{}, fmt.Errorf("%w; run: make build", err)
		}
	}
	return p, nil
}

// ModuleRoot returns the folder of go.mod above the working directory.
func ModuleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		} else if !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", errors.New("no go.mod above the working directory: run this inside the module")
		}
		dir = up
	}
}
