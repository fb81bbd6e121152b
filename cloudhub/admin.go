package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/skerry-io/skerry/cloudhub/controlplane"
	"github.com/skerry-io/skerry/cloudhub/enroll"
)

// clusterFlags is how administrative commands reach the cluster.
type clusterFlags struct {
	dataDir    string
	kubeconfig string
	output     string

	flags *pflag.FlagSet
}

func (f *clusterFlags) bind(c *cobra.Command) {
	fs := c.PersistentFlags()
	f.flags = fs
	fs.StringVar(&f.dataDir, "data-dir", defaultDataDir, "data directory of a standalone hub on this host")
	fs.StringVar(&f.kubeconfig, "kubeconfig", "", "access to the hub's cluster (default: that of --data-dir if given, else KUBECONFIG, else the default data directory's)")
	fs.StringVarP(&f.output, "output", "o", "", `"json" for scripts`)
}

func (f *clusterFlags) connect(ctx context.Context) (kubernetes.Interface, *enroll.Enroll, error) {
	path := f.kubeconfig
	if path == "" && !f.flags.Changed("data-dir") {
		path = os.Getenv("KUBECONFIG")
	}
	if path == "" {
		path = controlplane.AdminKubeconfigPath(f.dataDir)
	}
	if _, err := os.Stat(path); err != nil {
		return nil, nil, fmt.Errorf("no access to the cluster: %w; name its kubeconfig with --kubeconfig, or the standalone hub's directory with --data-dir", err)
	}
	rc, err := clientcmd.BuildConfigFromFlags("", path)
	if err != nil {
		return nil, nil, fmt.Errorf("kubeconfig %s: %w", path, err)
	}
	rc.Timeout = 15 * time.Second
	client, err := kubernetes.NewForConfig(rc)
	if err != nil {
		return nil, nil, fmt.Errorf("kubeconfig %s: %w", path, err)
	}
	reg, err := enroll.New(ctx, enroll.Config{Client: client, Namespace: systemNamespace})
	if err != nil {
		return nil, nil, fmt.Errorf("cluster of %s: %w", path, err)
	}
	return client, reg, nil
}

func (f *clusterFlags) json(w io.Writer, v any) (bool, error) {
	switch f.output {
	case "":
		return false, nil
	case "json":
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return true, enc.Encode(v)
	}
	return true, fmt.Errorf("output %q: only json is known", f.output)
}

func newTokenCommand() *cobra.Command {
	var cluster clusterFlags
	root := &cobra.Command{Use: "token", Short: "Create, list and revoke join tokens"}
	cluster.bind(root)

	var opts enroll.TokenOptions
	var hubURL string
	create := &cobra.Command{
		Use:   "create",
		Short: "Create a token that lets a node join",
		Long: `Create a token that lets a node join. The token goes to standard output; the
command to run on the node goes to standard error.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			client, reg, err := cluster.connect(c.Context())
			if err != nil {
				return err
			}
			if hubURL == "" {
				s, err := client.CoreV1().Secrets(systemNamespace).Get(c.Context(), hubSecret, metav1.GetOptions{})
				if err != nil {
					return fmt.Errorf("find the hub's URL: %w; is cloudhub running? Or give --hub-url", err)
				}
				hubURL = string(s.Data[hubSecretURL])
			}
			token, info, err := reg.Tokens().Create(c.Context(), opts)
			if err != nil {
				return err
			}
			join := "edgecore join " + hubURL + " --token " + token
			if info.NodeName != "" {
				join += " --node-name " + info.NodeName
			}
			if info.AllowReplace {
				join += " --replace"
			}
			if done, err := cluster.json(c.OutOrStdout(), map[string]any{"token": token, "joinCommand": join, "info": info}); done {
				return err
			}
			fmt.Fprintln(c.OutOrStdout(), token)
			fmt.Fprintf(c.ErrOrStderr(), "Good for %s, until %s. Join a node with:\n\n  %s\n", usesText(info), info.ExpiresAt.Local().Format(time.RFC3339), join)
			return nil
		},
	}
	create.Flags().DurationVar(&opts.TTL, "ttl", 24*time.Hour, "how long the token is good for")
	create.Flags().IntVar(&opts.Uses, "uses", 1, "how many nodes may join with it; -1 means any number")
	create.Flags().BoolVar(&opts.AllowReplace, "allow-replace", false, "a node may take over the name of one that joined before")
	create.Flags().StringVar(&opts.NodeName, "node-name", "", "only the node of this name may join with it")
	create.Flags().StringVar(&hubURL, "hub-url", "", "URL in the join command (default: what the hub published)")

	list := &cobra.Command{
		Use: "list", Short: "List join tokens", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			_, reg, err := cluster.connect(c.Context())
			if err != nil {
				return err
			}
			tokens, err := reg.Tokens().List(c.Context())
			if err != nil {
				return err
			}
			if done, err := cluster.json(c.OutOrStdout(), tokens); done {
				return err
			}
			now := time.Now()
			w := tabwriter.NewWriter(c.OutOrStdout(), 0, 8, 3, ' ', 0)
			fmt.Fprintln(w, "ID\tSTATE\tUSED\tEXPIRES\tREPLACE\tNODE\tJOINED")
			for _, t := range tokens {
				fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%v\t%s\t%v\n", t.ID, t.State(now), t.Used, t.ExpiresAt.Local().Format(time.RFC3339), t.AllowReplace, t.NodeName, t.Nodes)
			}
			return w.Flush()
		},
	}
	revoke := &cobra.Command{
		Use: "revoke ID...", Short: "Revoke join tokens", Args: cobra.MinimumNArgs(1),
		RunE: func(c *cobra.Command, ids []string) error {
			_, reg, err := cluster.connect(c.Context())
			if err != nil {
				return err
			}
			for _, id := range ids {
				if err := reg.Tokens().Revoke(c.Context(), id); err != nil {
					return err
				}
				fmt.Fprintf(c.OutOrStdout(), "token %s revoked\n", id)
			}
			return nil
		},
	}
	root.AddCommand(create, list, revoke)
	return root
}

func usesText(t enroll.TokenInfo) string {
	switch {
	case t.Uses == 1:
		return "one node"
	case t.Uses < 0:
		return "any number of nodes"
	}
	return fmt.Sprintf("%d nodes", t.Uses)
}

func newNodeCommand() *cobra.Command {
	var cluster clusterFlags
	root := &cobra.Command{Use: "node", Short: "List and forget enrolled nodes"}
	cluster.bind(root)
	list := &cobra.Command{
		Use: "list", Short: "List enrolled nodes", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			client, reg, err := cluster.connect(c.Context())
			if err != nil {
				return err
			}
			nodes, err := listNodes(c.Context(), client, reg)
			if err != nil {
				return err
			}
			if done, err := cluster.json(c.OutOrStdout(), nodes); done {
				return err
			}
			return printNodes(c.OutOrStdout(), nodes, time.Now())
		},
	}
	forget := &cobra.Command{
		Use:   "forget NAME...",
		Short: "End the enrolment of nodes: their certificates are refused, their names are free",
		Long: `End the enrolment of nodes: their tunnels are cut, their certificates are
refused, and their names are free for other machines. Nothing is stopped: a
machine that was forgotten runs its pods on, and its Node object stays. To have
a machine end its pods as well, set node.whenDeleted: stop in its configuration
and delete its Node first, while it can still hear of that:
cloudhub kubectl delete node NAME.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(c *cobra.Command, names []string) error {
			client, reg, err := cluster.connect(c.Context())
			if err != nil {
				return err
			}
			for _, name := range names {
				if err := reg.Forget(c.Context(), name); err != nil {
					return err
				}
				fmt.Fprintf(c.OutOrStdout(), "node %s forgotten\n", name)
				fmt.Fprintf(c.ErrOrStderr(), "the machine runs its pods on, until it has joined a hub again or its containers are stopped there\n")
				if _, err := client.CoreV1().Nodes().Get(c.Context(), name, metav1.GetOptions{}); err == nil {
					fmt.Fprintf(c.ErrOrStderr(), "its Node object is kept; remove it, and its pods from the cloud, with: cloudhub kubectl delete node %s\n", name)
				}
			}
			return nil
		},
	}
	root.AddCommand(list, forget)
	return root
}
