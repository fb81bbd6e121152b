// Command demo shows Skerry at work on one host: a cloudhub with its control
// plane, and one edge machine (see e2e/machine) that runs an edgecore and
// containerd. It is what `make demo` and `make demo-down` run.
//
// It uses the two programs as a user does, by their commands alone, and keeps
// everything below one folder, by which "down" finds it again. It touches
// nothing of the host besides: no package, no file, no service.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/skerry-io/skerry/e2e/machine"
)

func main() {
	machine.Main()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	dir := flags.String("dir", ".work/demo", "folder of all state")
	bin := flags.String("bin", "bin", "folder of the programs cloudhub and edgecore")
	flags.Usage = func() {
		fmt.Fprintln(flags.Output(), "demo [--dir D] [--bin B] up|down")
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	d, err := newDemo(*dir, *bin)
	if err != nil {
		return err
	}
	switch flags.Arg(0) {
	case "up":
		return d.up(ctx)
	case "down":
		return d.down(ctx)
	}
	flags.Usage()
	return errors.New("say up or down")
}

// demo is the paths and names of it all.
type demo struct {
	dir      string // all state
	bin      string // the programs
	out      *progress
	kubectl  []string // how to call it, as the user would
	shownBin string   // bin as the user would write it
}

const (
	nodeName   = "demo-edge" // of the machine and the node
	insideBin  = "/opt/skerry/bin"
	insideData = "/var/lib/skerry/edgecore"
	insideLog  = "/var/log/edgecore.log"
)

func newDemo(dir, bin string) (*demo, error) {
	d := &demo{out: newProgress(os.Stdout), shownBin: bin}
	var err error
	if d.dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	if d.bin, err = filepath.Abs(bin); err != nil {
		return nil, err
	}
	d.kubectl = []string{filepath.Join(d.bin, "cloudhub"), "kubectl"}
	return d, nil
}

func (d *demo) path(name string) string { return filepath.Join(d.dir, name) }

func (d *demo) kubeconfig() string { return d.path("hub/admin.kubeconfig") }

// newMachine finds the machine, or makes a new one that is off.
func (d *demo) newMachine() (*machine.Machine, error) {
	return machine.New(machine.Config{
		Dir:    d.path("machine"),
		Name:   nodeName,
		Detach: true,
		Binds:  []machine.Bind{{Host: d.bin, Inside: insideBin}},
	})
}
