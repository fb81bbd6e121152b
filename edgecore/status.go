package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/util/duration"

	"github.com/skerry-io/skerry/edgecore/drill"
	"github.com/skerry-io/skerry/edgecore/identity"
	"github.com/skerry-io/skerry/edgecore/kubelet"
	"github.com/skerry-io/skerry/edgecore/link"
)

func newStatusCommand() *cobra.Command {
	var dataDir, output string
	c := &cobra.Command{
		Use: "status", Short: "Tell how the running node is", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			st, raw, err := askStatus(c.Context(), dataDir)
			if err != nil {
				return err
			}
			switch output {
			case "json":
				_, err := c.OutOrStdout().Write(raw)
				return err
			case "":
				printStatus(c.OutOrStdout(), st)
				return nil
			}
			return fmt.Errorf("output %q: only json is known", output)
		},
	}
	c.Flags().StringVar(&dataDir, "data-dir", defaultDataDir, "directory of the node's state")
	c.Flags().StringVarP(&output, "output", "o", "", `"json" for scripts`)
	return c
}

const maxStatus = 1 << 20

func askStatus(ctx context.Context, dataDir string) (Status, []byte, error) {
	path := filepath.Join(dataDir, adminSocket)
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://edgecore/v1/status", nil)
	if err != nil {
		return Status{}, nil, err
	}
	res, err := client.Do(req)
	if err != nil {
		return Status{}, nil, fmt.Errorf("ask edgecore at %s: %w; is it running? Start it with: systemctl start edgecore", path, err)
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(res.Body, maxStatus))
	if err != nil {
		return Status{}, nil, fmt.Errorf("ask edgecore at %s: %w", path, err)
	}
	var st Status
	if err := json.Unmarshal(raw, &st); err != nil {
		return Status{}, nil, fmt.Errorf("ask edgecore at %s: %w", path, err)
	}
	return st, raw, nil
}

func printStatus(w io.Writer, st Status) {
	ago := func(t time.Time) string { return duration.HumanDuration(time.Since(t)) }
	fmt.Fprintf(w, "node      %s, edgecore %s, up %s\n", st.Node, st.Version, ago(st.Started))
	if !st.NodeDeleted.IsZero() {
		fmt.Fprintf(w, "DELETED   the Node object was deleted in the cloud, as heard %s ago; the pods here are this machine's alone\n", ago(st.NodeDeleted))
		fmt.Fprintf(w, "          to join again, %s\n", link.RejoinHint(st.Node))
	}
	if st.Connected {
		fmt.Fprintf(w, "hub       %s, %s, connected for %s, round trip %s\n", st.Hub, st.HubVersion, ago(st.Since), st.RTT)
	} else {
		fmt.Fprintf(w, "hub       %s, not connected for %s: %s\n", st.Hub, ago(st.Since), st.LastError)
	}
	if st.ClockOff != "" {
		fmt.Fprintf(w, "clock     this machine's clock is off by %s; certificates and tokens go by the last time known from the hub\n", st.ClockOff)
	}
	switch {
	case !st.Synced:
		fmt.Fprintf(w, "store     waiting for the first sync; no pod starts before it\n")
	case st.LastSync.IsZero():
		fmt.Fprintf(w, "store     from an earlier run, %d pods\n", st.Objects["pods"])
	default:
		fmt.Fprintf(w, "store     in step %s ago, %d pods\n", ago(st.LastSync), st.Objects["pods"])
	}
	fmt.Fprintf(w, "outbox    %d changes to send, %d events dropped\n", st.Outbox, st.EventsDropped)
	if st.StatesDropped > 0 {
		fmt.Fprintf(w, "          %d last statuses and deletions of pods that are gone were dropped\n", st.StatesDropped)
	}
	if t := st.StoreTrouble; t != nil {
		fmt.Fprintf(w, "disk      TAKES NO WRITES for %s: %s; pods run on from memory\n", ago(t.Since), t.Error)
	}
	if m := st.StoreMended; m != nil {
		fmt.Fprintf(w, "disk      the store was DAMAGED and mended %s ago (%s): %d pods, %d objects\n", ago(m.At), m.Cause, m.Pods, m.Objects)
	}
	printDevices(w, st.Devices)
	printReadiness(w, st)
	fmt.Fprintf(w, "bytes     %d written by the store, %d sent and %d received on this tunnel\n", st.StoreWritten, st.TunnelSent, st.TunnelRecv)
}

// shown is how many findings are printed; -o json has all.
const shown = 20

func printReadiness(w io.Writer, st Status) {
	switch r := st.Autonomy; {
	case r.Ready && len(r.Findings) == 0:
		fmt.Fprintf(w, "alone     ready: all %d pods would start again without the cloud\n", r.Pods)
	case r.Ready:
		fmt.Fprintf(w, "alone     ready: all %d pods would start again without the cloud, with %d warnings\n", r.Pods, r.Warnings())
	default:
		fmt.Fprintf(w, "alone     NOT READY: after a restart without the cloud %d things would be missing\n", r.Breaking())
	}
	for i, f := range st.Autonomy.Findings {
		if i == shown {
			fmt.Fprintf(w, "          and %d more, see -o json\n", len(st.Autonomy.Findings)-shown)
			break
		}
		severity := "warning"
		if f.Breaks {
			severity = "missing"
		}
		fmt.Fprintf(w, "  %s %s: %s; %s\n", severity, f, f.Reason, f.Remedy)
	}
	if d := st.Drill; d != nil {
		switch {
		case d.Phase != drill.PhaseDone:
			fmt.Fprintf(w, "drill     under way since %s; the tunnel is cut on purpose\n", d.Started.Format(time.DateTime))
		case d.Passed:
			fmt.Fprintf(w, "drill     passed at %s\n", d.Ended.Format(time.DateTime))
		default:
			fmt.Fprintf(w, "drill     failed at %s; see edgecore drill --last\n", d.Ended.Format(time.DateTime))
		}
	}
}

func newCheckCommand() *cobra.Command {
	var dataDir string
	c := &cobra.Command{
		Use:   "check",
		Short: "Tell whether this machine can run pods, and what to do if not",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := loadConfig(dataDir)
			if err != nil {
				return err
			}
			log, err := newLog(cfg.Log)
			if err != nil {
				return err
			}
			id, err := identity.Load(dataDir)
			if err != nil {
				return err
			}
			kcfg, err := kubeletConfig(cfg, id.NodeName(), log)
			if err != nil {
				return err
			}
			bad := 0
			for _, f := range kubelet.Check(c.Context(), kcfg) {
				fmt.Fprintln(c.OutOrStdout(), f)
				if f.Severity == kubelet.Error {
					bad++
				}
			}
			if bad > 0 {
				return fmt.Errorf("%d of the findings above keep pods from running", bad)
			}
			fmt.Fprintln(c.OutOrStdout(), "this machine can run pods")
			return nil
		},
	}
	c.Flags().StringVar(&dataDir, "data-dir", defaultDataDir, "directory of the node's state")
	return c
}
