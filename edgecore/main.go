// Command edgecore is the edge end of Skerry: the upstream kubelet over this
// node's own copy of its cluster objects, so that pods start, heal and stop
// with or without the cloud, and one tunnel to the hub that keeps the copy in
// step and carries kubectl's streams.
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

	"github.com/skerry-io/skerry/edgecore/kubectl"
	"github.com/skerry-io/skerry/edgecore/localapi"
)

// version is stamped by the linker.
var version = "v0.0.0-dev"

const defaultDataDir = "/var/lib/skerry/edgecore"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// A second signal ends the process at once, as it would without us.
	context.AfterFunc(ctx, stop)
	if err := newCommand().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "edgecore:", err)
		os.Exit(1)
	}
}

func newCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "edgecore",
		Short:         "The edge end of Skerry: Kubernetes for devices that are often cut off",
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
		RunE:          func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	root.AddCommand(
		newJoinCommand(),
		newRunCommand(),
		newStatusCommand(),
		newBytesCommand(),
		newTwinCommand(),
		newDrillCommand(),
		newCheckCommand(),
		newResetCommand(),
		kubectl.NewCommand(defaultDataDir, localapi.Kubeconfig),
	)
	return root
}

func newLog(c LogConfig) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.Level)); err != nil {
		return nil, fmt.Errorf("log level %q: use debug, info, warn or error", c.Level)
	}
	opts := &slog.HandlerOptions{Level: level}
	switch c.Format {
	case "text":
		return slog.New(slog.NewTextHandler(os.Stderr, opts)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(os.Stderr, opts)), nil
	}
	return nil, fmt.Errorf("log format %q: use text or json", c.Format)
}

// ended turns the end that was asked for into success.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}
