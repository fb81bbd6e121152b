package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/skerry-io/skerry/edgecore/identity"
)

// edgecoreRuns tells whether an edgecore answers for dataDir.
func edgecoreRuns(ctx context.Context, dataDir string) bool {
	_, _, err := askStatus(ctx, dataDir)
	return err == nil
}

func newJoinCommand() *cobra.Command {
	var dataDir, token, nodeName string
	var replace, force bool
	c := &cobra.Command{
		Use:   "join https://HUB:PORT --token TOKEN",
		Short: "Enrol this machine as a node of a hub",
		Long: `Enrol this machine as a node of a hub: check that the hub is the one the token
is from, make a key, get a certificate for it, and write both and a first
configuration below --data-dir. "cloudhub token create" prints the command.`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if token == "" {
				token = os.Getenv("SKERRY_TOKEN")
			}
			if token == "" {
				return fmt.Errorf("no token: give --token or set SKERRY_TOKEN")
			}
			id, err := identity.Join(c.Context(), identity.JoinOptions{
				HubURL: args[0], Token: token, NodeName: nodeName, Replace: replace, Force: force,
				DataDir: dataDir,
			})
			if err != nil {
				return err
			}
			running := edgecoreRuns(c.Context(), dataDir)
			if err := ensureConfig(dataDir); err != nil {
				return err
			}
			fmt.Fprintf(c.OutOrStdout(), "node %s joined %s; its certificate ends %s\n", id.NodeName(), args[0], id.Certificate().NotAfter.Local().Format("2006-01-02"))
			next := "start it with: systemctl enable --now edgecore, or: edgecore run --data-dir " + dataDir
			if running {
				next = "edgecore runs as the node it was before; pods stay when it is restarted with: systemctl restart edgecore"
			}
			fmt.Fprintf(c.ErrOrStderr(), "configuration: %s\n%s\n", filepath.Join(dataDir, configFile), next)
			return nil
		},
	}
	c.Flags().StringVar(&dataDir, "data-dir", defaultDataDir, "directory of the node's state")
	c.Flags().StringVar(&token, "token", "", "join token (or set SKERRY_TOKEN, which other users cannot read from the process list)")
	c.Flags().StringVar(&nodeName, "node-name", "", "name of the node (default: the host's name)")
	c.Flags().BoolVar(&replace, "replace", false, "take over the name of a node that joined before; the token must allow it")
	c.Flags().BoolVar(&force, "force", false, "give up the identity this machine has")
	return c
}
