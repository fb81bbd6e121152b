package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/skerry-io/skerry/e2e/machine"
)

// state is kept in demo.json, for the next run.
type state struct {
	Listen string `json:"listen"` // the hub's, for edge nodes
	API    string `json:"api"`    // the API server's

	HubPID   int    `json:"hubPID,omitempty"`
	HubStart uint64 `json:"hubStart,omitempty"` // see machine.StartTime
}

func loadState(path string) (state, error) {
	var st state
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return st, nil
	}
	if err == nil {
		err = json.Unmarshal(data, &st)
	}
	if err != nil {
		return st, fmt.Errorf("read %s: %w", path, err)
	}
	return st, nil
}

func (d *demo) saveState() error {
	data, err := json.Marshal(d.st)
	if err != nil {
		return err
	}
	return os.WriteFile(d.statePath(), append(data, '\n'), 0o600)
}

func (st state) hubRuns() bool { return st.HubPID != 0 && machine.StartTime(st.HubPID) == st.HubStart }

// startHub starts the hub unless it runs. It outlives this program.
func (d *demo) startHub(ctx context.Context) (string, error) {
	result := fmt.Sprintf("Kubernetes API at https://%s, edge nodes at %s", d.st.API, d.node.HubURL(d.hub))
	if d.st.hubRuns() {
		return result + ", already up", await(ctx, time.Minute, func() error {
			_, err := d.kubectl(ctx, nil, "get", "--raw", "/readyz")
			return err
		})
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	err := d.hub.Start(ctx)
	if d.hub.Running() { // even if it does not serve, so that "down" finds it
		d.st.HubPID, d.st.HubStart = d.hub.PID(), machine.StartTime(d.hub.PID())
		err = errors.Join(err, d.saveState())
	}
	return result, err
}

// stopHub ends the hub, and does nothing if it does not run.
func (d *demo) stopHub(ctx context.Context) (string, error) {
	if !d.st.hubRuns() {
		return "was not running", nil
	}
	pid := d.st.HubPID
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		return "", fmt.Errorf("stop cloudhub (process %d): %w", pid, err)
	}
	gone := func() error {
		if d.st.hubRuns() {
			return fmt.Errorf("cloudhub (process %d) still runs", pid)
		}
		return nil
	}
	if err := await(ctx, 30*time.Second, gone); err == nil {
		return "", nil
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return "", fmt.Errorf("kill cloudhub (process %d): %w", pid, err)
	}
	return "it had to be killed", await(ctx, 10*time.Second, gone)
}

// freeAddress takes the usual port if nobody has it, and any other else.
func freeAddress(ip, port string) (string, error) {
	l, err := net.Listen("tcp4", net.JoinHostPort(ip, port))
	if err != nil {
		if l, err = net.Listen("tcp4", net.JoinHostPort(ip, "0")); err != nil {
			return "", err
		}
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// fatal is an error that no further try can mend.
type fatal struct{ error }

// await tries until there is no error, it is fatal, ctx ends or limit has
// passed, and then returns the last one.
func await(ctx context.Context, limit time.Duration, try func() error) error {
	return awaitEvery(ctx, 300*time.Millisecond, limit, try)
}

func awaitEvery(ctx context.Context, every, limit time.Duration, try func() error) error {
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		err := try()
		if f := (fatal{}); err == nil || errors.As(err, &f) {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		case <-deadline.C:
			return fmt.Errorf("not within %s: %w", limit, err)
		}
	}
}
