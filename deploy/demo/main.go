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

	"github.com/skerry-io/skerry/e2e/cluster"
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
	switch flags.Arg(0) {
	case "up":
		if err := up(ctx, *dir, *bin); err != nil {
			return fmt.Errorf("%w\ngo on with: make demo; or take it down with: make demo-down", err)
		}
		return nil
	case "down":
		return down(ctx, *dir, *bin)
	}
	flags.Usage()
	return errors.New("say up or down")
}

// demo is the hub and the node, whether they run or not.
type demo struct {
	dir  string // all state
	bin  string // the programs, as the user named their folder
	out  *progress
	hub  *cluster.Hub
	node *cluster.Node
	st   state
}

const nodeName = "demo-edge" // also the machine's

// open finds the hub and the node of dir, or settles on new ones.
func open(dir, bin string) (*demo, error) {
	d := &demo{bin: bin, out: newProgress(os.Stdout)}
	var err error
	if d.dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	if bin, err = filepath.Abs(bin); err != nil {
		return nil, err
	}
	programs := cluster.Programs{Cloudhub: filepath.Join(bin, "cloudhub"), Edgecore: filepath.Join(bin, "edgecore")}
	if d.st, err = loadState(d.statePath()); err != nil {
		return nil, err
	}
	images := d.path("images")
	d.node, err = cluster.NewNode(cluster.NodeConfig{
		Dir: d.path("machine"), Name: nodeName, Programs: programs, Detach: true,
		Images: []string{filepath.Join(images, "pause.tar"), filepath.Join(images, "demo.tar")},
	})
	if err != nil {
		return nil, err
	}
	if d.st.Listen == "" { // kept from one run to the next: nodes and kubeconfig have them
		if d.st.Listen, err = freeAddress("0.0.0.0", "10443"); err != nil {
			return nil, err
		}
		if d.st.API, err = freeAddress("127.0.0.1", "6443"); err != nil {
			return nil, err
		}
	}
	d.hub, err = cluster.NewHub(cluster.HubConfig{
		Dir: d.path("hub"), Programs: programs, Listen: d.st.Listen, API: d.st.API,
		Names: []string{d.node.HostIP()}, Detach: true,
	})
	return d, err
}

func (d *demo) path(name string) string { return filepath.Join(d.dir, name) }

func (d *demo) statePath() string { return d.path("demo.json") }
