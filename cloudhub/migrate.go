package main

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/skerry-io/skerry/cloudhub/migrate"
)

func newMigrateCommand() *cobra.Command {
	root := &cobra.Command{Use: "migrate", Short: "Turn another system's manifests into Skerry's", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() }}
	root.AddCommand(newMigrateKubeEdgeCommand())
	return root
}

func newMigrateKubeEdgeCommand() *cobra.Command {
	var strict bool
	var unit string
	var opts migrate.Options
	c := &cobra.Command{
		Use:   "kubeedge < manifests.yaml > devices.yaml",
		Short: "Turn KubeEdge's DeviceModels and Devices into Skerry's",
		Long: `Reads DeviceModels and Devices of devices.kubeedge.io v1beta1 and v1alpha2 from
standard input, writes Skerry's to standard output, and tells on standard error
of each field that was lost or has another meaning, and what to do about it.
Convert models together with their devices: KubeEdge keeps in the devices how
they are reached, Skerry in the models.`,
		Example: `  kubectl get devicemodels.devices.kubeedge.io,devices.devices.kubeedge.io -A -o yaml \
    | cloudhub migrate kubeedge > devices.yaml`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			switch unit {
			case "ms":
				opts.CycleUnit = time.Millisecond
			case "ns":
				opts.CycleUnit = time.Nanosecond
			default:
				return fmt.Errorf("cycle unit %q: use ms or ns", unit)
			}
			if f, ok := c.InOrStdin().(*os.File); ok {
				if st, err := f.Stat(); err == nil && st.Mode()&os.ModeCharDevice != 0 {
					return errors.New("no manifests on standard input; give them as: cloudhub migrate kubeedge < manifests.yaml")
				}
			}
			res, err := migrate.KubeEdge(c.InOrStdin(), opts)
			if err != nil {
				return fmt.Errorf("manifests: %w", err)
			}
			if err := res.WriteReport(c.ErrOrStderr()); err != nil {
				return err
			}
			if _, err := c.OutOrStdout().Write(res.YAML); err != nil {
				return err
			}
			if strict && len(res.Findings) > 0 {
				return fmt.Errorf("%d fields are not carried as they are", len(res.Findings))
			}
			return nil
		},
	}
	c.Flags().BoolVar(&strict, "strict", false, "fail if a field is lost or has another meaning")
	c.Flags().StringVar(&unit, "cycle-unit", "ms", "unit of collectCycle and reportCycle: ms, as KubeEdge's mappers read them, or ns, as many manifests have them")
	c.Flags().StringVar(&opts.Profile, "profile", "", "of devices that are not reached by MQTT: external (a mapper that registers) or kubeedge (one that speaks $hw topics); default: by the manifest's version")
	return c
}
