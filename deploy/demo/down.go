package main

import (
	"context"
	"errors"
	"io/fs"
	"os"
)

// down removes everything that up has made, whatever state it is in.
func (d *demo) down(ctx context.Context) error {
	if _, err := os.Stat(d.dir); errors.Is(err, fs.ErrNotExist) {
		d.out.printf("there is no demo in %s\n", d.dir)
		return nil
	}
	err := errors.Join(
		d.out.step(ctx, "edge: power off and remove the machine", d.removeMachine),
		d.out.step(ctx, "cloud: stop cloudhub", d.stopHub),
	)
	if err != nil {
		return err // the folder is what a second try goes by
	}
	return d.out.step(ctx, "remove "+d.dir, func(context.Context) (string, error) { return "", os.RemoveAll(d.dir) })
}

func (d *demo) removeMachine(ctx context.Context) (string, error) {
	m, err := d.newMachine()
	if err != nil {
		return "", err
	}
	return "", m.Destroy(ctx)
}
