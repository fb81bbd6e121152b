package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/skerry-io/skerry/edgecore/link"
	"github.com/skerry-io/skerry/edgecore/store"
)

// Bytes is what edgecore wrote to the disk and sent over the link since its
// start: flash and the uplink are budgets.
type Bytes struct {
	Since time.Time  `json:"since"`
	Disk  store.Wear `json:"disk"` // the store
	// Process is what the kernel counts for the whole process: the store, the
	// kubelet's files and the identity's, without the file system's own. It
	// counts what became dirty in the page cache by its unit there, which may be
	// several pages for one that was written: an upper bound.
	Process  uint64            `json:"process"`
	Sent     map[string]uint64 `json:"sent"` // over all tunnels, by class
	Received map[string]uint64 `json:"received"`
	Tunnels  uint64            `json:"tunnels"` // that ended
}

func bytesNow(since time.Time, db *store.Store, l *link.Link) Bytes {
	t := l.Traffic()
	return Bytes{
		Since: since, Disk: db.Wear(), Process: processWritten("/proc/self/io"),
		Sent: t.Sent, Received: t.Received, Tunnels: t.Tunnels,
	}
}

// processWritten reads write_bytes, what the process caused to be written to a
// disk; 0 where the kernel does not count.
func processWritten(path string) uint64 {
	raw, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	for line := range bytes.Lines(raw) {
		if v, ok := strings.CutPrefix(string(line), "write_bytes:"); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(v), 10, 64)
			if err != nil {
				return 0
			}
			return n
		}
	}
	return 0
}

func newBytesCommand() *cobra.Command {
	var dataDir, output string
	c := &cobra.Command{
		Use:   "bytes",
		Short: "Tell what the running node wrote to the disk and sent over the link",
		Long: `Tell what the running node wrote to the disk and sent over the link since
edgecore started, and what that makes in a day. The store's bytes are those of
whole pages, shared out among the records in them. The process's are the kernel's
count, an upper bound: it takes a larger unit than a page on some file systems.
What the file system writes of its own is in neither.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			st, _, err := askStatus(c.Context(), dataDir)
			if err != nil {
				return err
			}
			switch output {
			case "json":
				e := json.NewEncoder(c.OutOrStdout())
				e.SetIndent("", "  ")
				return e.Encode(st.Bytes)
			case "":
				return printBytes(c.OutOrStdout(), st.Bytes, time.Now())
			}
			return fmt.Errorf("output %q: only json is known", output)
		},
	}
	c.Flags().StringVar(&dataDir, "data-dir", defaultDataDir, "directory of the node's state")
	c.Flags().StringVarP(&output, "output", "o", "", `"json" for scripts`)
	return c
}

func printBytes(out io.Writer, b Bytes, now time.Time) error {
	up := now.Sub(b.Since)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	row := func(what string, n uint64) {
		fmt.Fprintf(w, "%s\t%d\t%s\t\n", what, n, perDay(n, up))
	}
	table := func(title string, rows map[string]uint64) {
		names := make([]string, 0, len(rows))
		for name := range rows {
			names = append(names, name)
		}
		slices.Sort(names)
		for _, name := range names {
			row(title+" "+name, rows[name])
		}
	}
	fmt.Fprintf(w, "since %s\tbytes\ta day\t\n", b.Since.Format(time.RFC3339))
	table("disk", b.Disk.Classes)
	row("disk: the store", b.Disk.Total)
	row("disk: the process", b.Process)
	table("sent", b.Sent)
	table("received", b.Received)
	if err := w.Flush(); err != nil {
		return err
	}
	if b.Disk.Budget == 0 {
		return nil
	}
	note := ""
	if b.Disk.Spaced {
		note = "; over it, so what may wait waits six times longer"
	}
	_, err := fmt.Fprintf(out, "the store wrote %d of its %d bytes for 24 hours%s\n", b.Disk.LastDay, b.Disk.Budget, note)
	return err
}

// perDay is what n bytes in a time make in a day, once the time says something.
func perDay(n uint64, in time.Duration) string {
	if in < time.Minute {
		return "-"
	}
	return strconv.FormatUint(uint64(float64(n)*float64(24*time.Hour)/float64(in)), 10)
}
