package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/skerry-io/skerry/edgecore/identity"
	"github.com/skerry-io/skerry/edgecore/localapi"
	"github.com/skerry-io/skerry/edgecore/store"
)

func newResetCommand() *cobra.Command {
	var dataDir, restore string
	var keepIdentity, all bool
	c := &cobra.Command{
		Use:   "reset --keep-identity | --restore COPY | --all",
		Short: "Drop this node's objects, or put a copy of them back, or retire the node",
		Long: `Drop this node's objects, or put a copy of them back, or retire the node.

  --keep-identity  drop the store: the next start fetches all objects from the
                   hub before any pod starts. Changes that the hub has not
                   confirmed are lost.
  --restore COPY   put a copy of the store back, after checking it.
  --all            drop the identity and the configuration as well: the machine
                   is no node any more. Containers that run are not stopped.

edgecore must not run.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			db, key := filepath.Join(dataDir, storeFile), filepath.Join(dataDir, storeKeyFile)
			out := c.OutOrStdout()
			switch {
			case restore != "":
				if err := store.Restore(store.Config{Path: db, KeyFile: key}, restore); err != nil {
					return err
				}
				fmt.Fprintf(out, "store %s put back from %s\n", db, restore)
				return nil
			case keepIdentity, all:
				if err := store.Reset(db, key); err != nil {
					return err
				}
				fmt.Fprintf(out, "store %s removed\n", db)
			}
			if !all {
				return nil
			}
			if err := identity.Remove(dataDir); err != nil {
				return err
			}
			if err := os.RemoveAll(filepath.Join(dataDir, devicesDir)); err != nil {
				return err
			}
			for _, name := range append(localapi.Files(), configFile, issuerFile, clockFile, metricsToken) {
				if err := os.Remove(filepath.Join(dataDir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
					return err
				}
			}
			fmt.Fprintf(out, "identity and configuration in %s removed; end the enrolment at the hub with: cloudhub node forget NAME\n", dataDir)
			return nil
		},
	}
	c.Flags().StringVar(&dataDir, "data-dir", defaultDataDir, "directory of the node's state")
	c.Flags().BoolVar(&keepIdentity, "keep-identity", false, "drop the store only")
	c.Flags().StringVar(&restore, "restore", "", "copy of the store to put back")
	c.Flags().BoolVar(&all, "all", false, "drop everything")
	c.MarkFlagsMutuallyExclusive("keep-identity", "restore", "all")
	c.MarkFlagsOneRequired("keep-identity", "restore", "all")
	return c
}
