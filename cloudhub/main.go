// Command cloudhub is the cloud end of Skerry: it holds the tunnels of edge
// nodes, keeps each node's objects in step with the cluster, does the nodes'
// writes as the nodes themselves, and lets the API server reach their kubelets.
// With "standalone" it carries the cluster's control plane in the same process.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/skerry-io/skerry/cloudhub/controlplane"
	"github.com/skerry-io/skerry/cloudhub/kubectl"
)

// version is stamped by the linker.
var version = "v0.0.0-dev"

const defaultDataDir = "/var/lib/skerry/cloudhub"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// A second signal ends the process at once, as it would without us.
	context.AfterFunc(ctx, stop)
	if err := newCommand().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "cloudhub:", err)
		os.Exit(1)
	}
}

func newCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "cloudhub",
		Short:         "The cloud end of Skerry: Kubernetes for devices that are often cut off",
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
		RunE:          func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	root.AddCommand(
		newStandaloneCommand(),
		newTokenCommand(),
		newNodeCommand(),
		newMigrateCommand(),
		kubectl.NewCommand(controlplane.AdminKubeconfigPath(defaultDataDir)),
	)
	return root
}

func newLog(c LogConfig) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.Level)); err != nil {
		return nil, fmt.Errorf("log level %q: use debug, info, warn or error", c.Level)
	}
	opts := &slog.HandlerOptions{Level: level}
	var h slog.Handler
	switch c.Format {
	case "text":
		h = slog.NewTextHandler(os.Stderr, opts)
	case "json":
		h = slog.NewJSONHandler(os.Stderr, opts)
	default:
		return nil, fmt.Errorf("log format %q: use text or json", c.Format)
	}
	return slog.New(h), nil
}

// ended turns the end that was asked for into success.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}
