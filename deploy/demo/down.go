package main

import (
	"context"
	"errors"
	"io/fs"
	"os"
)

// down removes everything that up has made, whatever state it is in.
func down(ctx context.Context, dir, bin string) error {
	out := newProgress(os.Stdout)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		out.printf("there is no demo in %s\n", dir)
		return nil
	}
	d, err := open(dir, bin)
	if err != nil {
		return err
	}
	err = errors.Join(
		out.step(ctx, "edge: power off and remove the machine", func(ctx context.Context) (string, error) { return "", d.node.Destroy(ctx) }),
		out.step(ctx, "cloud: stop cloudhub", d.stopHub),
	)
	if err != nil {
		return err // the folder is what a second try goes by
	}
	return out.step(ctx, "remove "+dir, func(context.Context) (string, error) { return "", os.RemoveAll(d.dir) })
}
