// Package kubectl is the upstream kubectl as a subcommand, so that a host with
// nothing but the hub's binary can be administered. It adds one thing: on a
// host with a standalone hub, its kubeconfig is found without being named. It
// owns no behaviour of kubectl's and parses none of its output.
package kubectl

import (
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	_ "k8s.io/client-go/plugin/pkg/client/auth" // credential plugins that kubeconfigs may name
	"k8s.io/component-base/cli"
	"k8s.io/component-base/logs"
	"k8s.io/kubectl/pkg/cmd"
	"k8s.io/kubectl/pkg/cmd/plugin"
	"k8s.io/kubectl/pkg/cmd/util"
)

// NewCommand is the subcommand "kubectl". Where the user gives no kubeconfig
// (--kubeconfig, KUBECONFIG, ~/.kube/config), defaultKubeconfig is used if it
// exists; empty means none.
//
// kubectl itself is built only when the subcommand runs: its construction
// reads the user's preferences and plugins and changes process-wide settings,
// none of which the other subcommands want. Like kubectl it exits the process
// when it fails.
func NewCommand(defaultKubeconfig string) *cobra.Command {
	streams := genericiooptions.IOStreams{In: os.Stdin, Out: os.Stdout, ErrOut: os.Stderr}
	return &cobra.Command{
		Use:                "kubectl [command]",
		Short:              "Run kubectl against this hub's cluster",
		DisableFlagParsing: true,
		Run: func(_ *cobra.Command, args []string) {
			// kubectl catches signals where it has something to tidy up, and
			// elsewhere (exec, cp, get -w) ends by them: the program's own
			// handling, which waits for a context nobody looks at, would
			// swallow the first Ctrl-C.
			signal.Reset(os.Interrupt, syscall.SIGTERM)
			if err := useKubeconfig(defaultKubeconfig); err != nil {
				util.CheckErr(err)
			}
			logs.GlogSetter(cmd.GetLogVerbosity(args)) //nolint:errcheck // a wrong -v is reported when flags are parsed
			if err := cli.RunNoErrOutput(newKubectl(args, streams)); err != nil {
				util.CheckErr(err)
			}
		},
	}
}

func newKubectl(args []string, streams genericiooptions.IOStreams) *cobra.Command {
	flags := genericclioptions.NewConfigFlags(true).
		WithDeprecatedPasswordFlag().
		WithDiscoveryBurst(300).
		WithDiscoveryQPS(50).
		WithWarningPrinter(streams)
	c := cmd.NewDefaultKubectlCommandWithArgs(cmd.KubectlOptions{
		PluginHandler: cmd.NewDefaultPluginHandler(plugin.ValidPluginFilenamePrefixes),
		Arguments:     append([]string{"kubectl"}, args...),
		ConfigFlags:   flags,
		IOStreams:     streams,
	})
	c.SetArgs(args)
	c.SetIn(streams.In)
	c.SetOut(streams.Out)
	c.SetErr(streams.ErrOut)
	return c
}

// useKubeconfig makes the default file KUBECONFIG where the user has none of
// his own. The variable and not a flag, as "kubectl config" and plugins know
// only that.
func useKubeconfig(defaultPath string) error {
	path := findKubeconfig(defaultPath)
	if path == "" {
		return nil
	}
	return os.Setenv("KUBECONFIG", path)
}

// findKubeconfig is the default file, where the user has none of his own.
func findKubeconfig(defaultPath string) string {
	if defaultPath == "" || os.Getenv("KUBECONFIG") != "" {
		return ""
	}
	if home, err := os.UserHomeDir(); err == nil {
		if _, err := os.Stat(filepath.Join(home, ".kube", "config")); err == nil {
			return ""
		}
	}
	if _, err := os.Stat(defaultPath); err != nil {
		return ""
	}
	return defaultPath
}
