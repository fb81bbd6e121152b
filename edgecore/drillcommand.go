package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/skerry-io/skerry/edgecore/drill"
)

func newDrillCommand() *cobra.Command {
	var (
		dataDir, output string
		req             drill.Request
		stop, last      bool
	)
	c := &cobra.Command{
		Use:   "drill",
		Short: "Prove that the node can be alone",
		Long: `Prove that the node can be alone: cut its tunnel for a while and report whether
its pods stayed or, with --reboot, came back as they have to after a power loss
with no cloud. --reboot kills all pods of the node, with no grace, and what they
hold in memory is lost; pods that would not be started again (restartPolicy Never
or OnFailure) are left alone. While it lasts the cloud sees the node as away.

The node reconnects by itself, also when this command is ended. The exit code is
1 if a pod that was ready before is not afterwards.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if output != "" && output != "json" {
				return fmt.Errorf("output %q: only json is known", output)
			}
			a := adminClient{filepath.Join(dataDir, adminSocket)}
			switch {
			case stop:
				if _, err := a.drill(c.Context(), http.MethodDelete, nil); err != nil {
					return err
				}
			case !last:
				s, err := a.drill(c.Context(), http.MethodPost, &req)
				if err != nil {
					return err
				}
				fmt.Fprintf(c.ErrOrStderr(), "%d pods; offline for %s\n", len(s.Pods), req.Offline)
			}
			s, err := a.awaitDrill(c.Context(), req.Offline, !last)
			if err != nil {
				return err
			}
			if output == "json" {
				err = json.NewEncoder(c.OutOrStdout()).Encode(s)
			} else {
				err = printDrill(c.OutOrStdout(), s)
			}
			if err == nil && !s.Passed && s.Phase == drill.PhaseDone {
				return errors.New("the drill failed")
			}
			return err
		},
	}
	f := c.Flags()
	f.StringVar(&dataDir, "data-dir", defaultDataDir, "directory of the node's state")
	f.DurationVar(&req.Offline, "offline", 2*time.Minute, fmt.Sprintf("how long, %s to %s", drill.MinOffline, drill.MaxOffline))
	f.BoolVar(&req.Reboot, "reboot", false, "kill the node's pods and restart edgecore, as a power loss would")
	f.StringSliceVarP(&req.Namespaces, "namespace", "n", nil, "only pods of these namespaces; default: all")
	f.BoolVar(&req.Force, "force", false, "though edgecore status says that something would break")
	f.BoolVar(&stop, "stop", false, "end the drill that is under way")
	f.BoolVar(&last, "last", false, "show the last drill, or the one under way, and start none")
	f.StringVarP(&output, "output", "o", "", `"json" for scripts`)
	c.MarkFlagsMutuallyExclusive("stop", "last")
	return c
}

// adminClient asks the running edgecore through its socket.
type adminClient struct{ path string }

var errNoDrill = errors.New("there was no drill on this node yet")

// drill sends one request about drills.
func (a adminClient) drill(ctx context.Context, method string, body *drill.Request) (drill.State, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", a.path)
	}}}
	var send io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return drill.State{}, err
		}
		send = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://edgecore/v1/drill", send)
	if err != nil {
		return drill.State{}, err
	}
	res, err := client.Do(req)
	if err != nil {
		return drill.State{}, &unreachableError{fmt.Errorf("ask edgecore at %s: %w; is it running? Start it with: systemctl start edgecore", a.path, err)}
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(res.Body, 8<<20))
	switch {
	case err != nil:
		return drill.State{}, &unreachableError{fmt.Errorf("ask edgecore at %s: %w", a.path, err)}
	case res.StatusCode == http.StatusNotFound:
		return drill.State{}, errNoDrill
	case res.StatusCode != http.StatusOK:
		return drill.State{}, errors.New(string(bytes.TrimSpace(raw)))
	}
	var s drill.State
	if err := json.Unmarshal(raw, &s); err != nil {
		return s, fmt.Errorf("ask edgecore at %s: %w", a.path, err)
	}
	return s, nil
}

// unreachableError is an edgecore that does not answer, maybe as it restarts.
type unreachableError struct{ error }

func (e *unreachableError) Unwrap() error { return e.error }

// awaitDrill asks until the drill is over. edgecore is away for a moment in a
// drill with a reboot.
func (a adminClient) awaitDrill(ctx context.Context, offline time.Duration, wait bool) (drill.State, error) {
	const patience = 2 * time.Minute // beyond the drill's own time: a start on a slow board
	ctx, cancel := context.WithTimeout(ctx, offline+patience)
	defer cancel()
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for {
		s, err := a.drill(ctx, http.MethodGet, nil)
		var unreachable *unreachableError
		switch {
		case err == nil && (!wait || s.Phase == drill.PhaseDone):
			return s, nil
		case err != nil && (!wait || !errors.As(err, &unreachable)):
			return s, err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return s, fmt.Errorf("the drill goes on, and the node reconnects by itself; see edgecore drill --last: %w", context.Cause(ctx))
		}
	}
}

func printDrill(w io.Writer, s drill.State) error {
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(tw, "POD\tRUNNING AFTER\tREADY AFTER\tRESULT")
	after := func(seconds float64) string {
		if seconds == 0 {
			return "-"
		}
		return fmt.Sprintf("%.1f s", seconds)
	}
	for _, p := range s.Pods {
		result := "back"
		switch {
		case p.Skipped != "":
			result = "left alone: " + p.Skipped
		case p.Back && !s.Reboot:
			result = "ready all the same"
		case p.Back:
		case !p.WasReady:
			result = "not ready, nor was it before: " + p.Why
		case s.Phase != drill.PhaseDone:
			result = "awaited: " + p.Why
		default:
			result = "NOT BACK: " + p.Why
		}
		fmt.Fprintf(tw, "%s/%s\t%s\t%s\t%s\n", p.Namespace, p.Name, after(p.Running), after(p.Ready), result)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	var verdict string
	switch {
	case s.Phase != drill.PhaseDone:
		verdict = "under way"
	case s.Problem != "":
		verdict = "failed: " + s.Problem
	case s.Passed:
		verdict = "passed"
	default:
		verdict = "failed"
	}
	_, err := fmt.Fprintf(w, "\ndrill of %s, offline for %s, reboot %v: %s\n", s.Started.Format(time.DateTime), s.Offline, s.Reboot, verdict)
	return err
}

// registerDrill serves drills on the socket.
func (s *ownServer) registerDrill(mux *http.ServeMux) {
	answer := func(w http.ResponseWriter, state drill.State) {
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(state); err != nil {
			s.log.Debug("drill not sent", "err", err)
		}
	}
	last := func(w http.ResponseWriter) {
		state, ok := s.ready.drill.State()
		if !ok {
			http.Error(w, errNoDrill.Error(), http.StatusNotFound)
			return
		}
		answer(w, state)
	}
	mux.HandleFunc("GET /v1/drill", func(w http.ResponseWriter, _ *http.Request) { last(w) })
	mux.HandleFunc("DELETE /v1/drill", func(w http.ResponseWriter, _ *http.Request) {
		s.ready.drill.Stop()
		last(w)
	})
	mux.HandleFunc("POST /v1/drill", func(w http.ResponseWriter, r *http.Request) {
		var req drill.Request
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 64<<10)).Decode(&req); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		state, err := s.ready.drill.Begin(r.Context(), req)
		if err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
			return
		}
		answer(w, state)
		if req.Reboot {
			if err := http.NewResponseController(w).Flush(); err != nil {
				s.log.Debug("drill not sent", "err", err)
			}
			s.ready.restart <- struct{}{} // has room: there is one drill at a time
		}
	})
}
