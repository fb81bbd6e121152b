// Package kubectl is the upstream kubectl as a subcommand of edgecore, against
// this node's local API: what reads, and what reaches into containers. kubectl's
// other half writes, which is done at the cluster, and would cost a device
// three more megabytes. It owns no behaviour of kubectl's and parses none of its
// output.
package kubectl

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"k8s.io/client-go/rest"
	"k8s.io/component-base/cli"
	"k8s.io/kubectl/pkg/cmd/apiresources"
	"k8s.io/kubectl/pkg/cmd/attach"
	"k8s.io/kubectl/pkg/cmd/auth"
	"k8s.io/kubectl/pkg/cmd/cp"
	"k8s.io/kubectl/pkg/cmd/describe"
	"k8s.io/kubectl/pkg/cmd/events"
	"k8s.io/kubectl/pkg/cmd/exec"
	"k8s.io/kubectl/pkg/cmd/get"
	"k8s.io/kubectl/pkg/cmd/logs"
	"k8s.io/kubectl/pkg/cmd/portforward"
	"k8s.io/kubectl/pkg/cmd/util"
	"k8s.io/kubectl/pkg/cmd/version"
	"k8s.io/kubectl/pkg/cmd/wait"
)

// NewCommand is the subcommand "kubectl". The kubeconfig is what edgecore wrote
// into its data directory: defaultDir, or that of a --data-dir before kubectl's
// own arguments.
//
// Like kubectl it exits the process when it fails.
func NewCommand(defaultDir, kubeconfig string) *cobra.Command {
	streams := genericiooptions.IOStreams{In: os.Stdin, Out: os.Stdout, ErrOut: os.Stderr}
	return &cobra.Command{
		Use:                "kubectl [--data-dir DIR] [command]",
		Short:              "Run kubectl against what this node has, with or without the cloud",
		DisableFlagParsing: true,
		Run: func(_ *cobra.Command, args []string) {
			// As in kubectl, Ctrl-C ends the process; the program's own handling
			// would swallow it.
			signal.Reset(os.Interrupt, syscall.SIGTERM)
			dir := defaultDir
			if len(args) >= 2 && args[0] == "--data-dir" {
				dir, args = args[1], args[2:]
			}
			path, err := findKubeconfig(filepath.Join(dir, kubeconfig))
			if err != nil {
				util.CheckErr(err)
			}
			if err := cli.RunNoErrOutput(newKubectl(path, args, streams)); err != nil {
				util.CheckErr(err)
			}
		},
	}
}

func findKubeconfig(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("the local API's kubeconfig: %w; edgecore writes it when it runs with localAPI on, and only root reads it (name another directory with: edgecore kubectl --data-dir DIR …)", err)
	}
	return path, f.Close()
}

func newKubectl(kubeconfig string, args []string, streams genericiooptions.IOStreams) *cobra.Command {
	flags := genericclioptions.NewConfigFlags(true).WithDiscoveryBurst(300).WithDiscoveryQPS(50).WithWarningPrinter(streams)
	flags.KubeConfig = &kubeconfig
	// It also fills in what some commands take for granted.
	f := util.NewFactory(util.NewMatchVersionFlags(flags))
	root := &cobra.Command{
		Use:   "kubectl",
		Short: "kubectl against this node's local API",
		Long: `kubectl against this node's local API. It answers from the node's own store:
what is listed is what this node has. Nothing can be changed here; that is done
at the cluster, and comes down to the node by itself.`,
		SilenceUsage: true, SilenceErrors: true,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	flags.AddFlags(root.PersistentFlags())
	// As kubectl has them: each warning once, on stderr.
	warnings := rest.NewWarningWriter(streams.ErrOut, rest.WarningWriterOptions{Deduplicate: true})
	rest.SetDefaultWarningHandler(warnings)
	strict := root.PersistentFlags().Bool("warnings-as-errors", false, "Treat warnings received from the server as errors and exit with a non-zero exit code")
	root.PersistentPostRunE = func(*cobra.Command, []string) error {
		if n := warnings.WarningCount(); *strict && n > 0 {
			return fmt.Errorf("%d warnings received", n)
		}
		return nil
	}
	root.AddCommand(
		get.NewCmdGet("kubectl", f, streams),
		describe.NewCmdDescribe("kubectl", f, streams),
		events.NewCmdEvents(f, streams),
		logs.NewCmdLogs(f, streams),
		exec.NewCmdExec(f, streams),
		attach.NewCmdAttach(f, streams),
		portforward.NewCmdPortForward(f, streams),
		cp.NewCmdCp(f, streams),
		wait.NewCmdWait(flags, streams),
		auth.NewCmdAuth(f, streams),
		apiresources.NewCmdAPIResources(flags, streams),
		version.NewCmdVersion(f, streams),
	)
	root.SetArgs(args)
	root.SetContext(context.Background())
	root.SetIn(streams.In)
	root.SetOut(streams.Out)
	root.SetErr(streams.ErrOut)
	return root
}
