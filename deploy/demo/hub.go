package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// hubState is kept in hub.json, for the next run.
type hubState struct {
	PID       int    `json:"pid"`
	StartTime string `json:"startTime"` // of the process, see processStart
	Listen    string `json:"listen"`
	APIServer string `json:"apiserver"`
}

func (d *demo) loadHub() (hubState, error) {
	var st hubState
	data, err := os.ReadFile(d.path("hub.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return st, nil
	}
	if err == nil {
		err = json.Unmarshal(data, &st)
	}
	if err != nil {
		return st, fmt.Errorf("read %s: %w", d.path("hub.json"), err)
	}
	return st, nil
}

func (st hubState) running() bool { return st.PID != 0 && processStart(st.PID) == st.StartTime }

// startHub starts the hub unless it runs. It outlives this program.
func (d *demo) startHub(ctx context.Context, ip string) (string, error) {
	st, err := d.loadHub()
	if err != nil {
		return "", err
	}
	if !st.running() {
		if st.Listen == "" { // kept from one run to the next, as nodes and kubeconfig have it
			if st.Listen, err = freeAddress(ip, "10443"); err != nil {
				return "", err
			}
			if st.APIServer, err = freeAddress("127.0.0.1", "6443"); err != nil {
				return "", err
			}
		}
		if err := d.launchHub(&st, ip); err != nil {
			return "", err
		}
	}
	err = d.await(ctx, 3*time.Minute, func() error {
		if !st.running() {
			return fatal{fmt.Errorf("cloudhub has ended; the end of %s:\n%s", d.path("hub.log"), tail(d.path("hub.log")))}
		}
		if _, err := os.Stat(d.kubeconfig()); err != nil {
			return err
		}
		_, err := d.run(ctx, d.kubectl[0], "kubectl", "get", "--raw", "/readyz")
		return err
	})
	return fmt.Sprintf("Kubernetes API at https://%s, edge nodes at https://%s", st.APIServer, st.Listen), err
}

func (d *demo) launchHub(st *hubState, ip string) error {
	log, err := os.OpenFile(d.path("hub.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(d.bin, "cloudhub"), "standalone", "--data-dir", d.path("hub"),
		"--listen", st.Listen, "--server-names", ip, "--apiserver-listen", st.APIServer)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	go cmd.Wait() // so that a hub that ends at once is no zombie, which looks alive
	st.PID, st.StartTime = cmd.Process.Pid, processStart(cmd.Process.Pid)
	data, err := json.Marshal(st)
	if err == nil {
		err = os.WriteFile(d.path("hub.json"), append(data, '\n'), 0o600)
	}
	if err != nil {
		cmd.Process.Kill() // or nobody would find it again
	}
	return err
}

// stopHub ends the hub, and does nothing if it does not run.
func (d *demo) stopHub(ctx context.Context) (string, error) {
	st, err := d.loadHub()
	if err != nil || !st.running() {
		return "was not running", err
	}
	if err := syscall.Kill(st.PID, syscall.SIGTERM); err != nil {
		return "", fmt.Errorf("stop cloudhub (process %d): %w", st.PID, err)
	}
	gone := func() error {
		if st.running() {
			return fmt.Errorf("cloudhub (process %d) still runs", st.PID)
		}
		return nil
	}
	if err := d.await(ctx, 30*time.Second, gone); err == nil {
		return "", nil
	}
	if err := syscall.Kill(st.PID, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return "", fmt.Errorf("kill cloudhub (process %d): %w", st.PID, err)
	}
	return "it had to be killed", d.await(ctx, 10*time.Second, gone)
}

// freeAddress takes the usual port if nobody has it, and any other else.
func freeAddress(ip, port string) (string, error) {
	l, err := net.Listen("tcp", net.JoinHostPort(ip, port))
	if err != nil {
		if l, err = net.Listen("tcp", net.JoinHostPort(ip, "0")); err != nil {
			return "", err
		}
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// run runs a command with access to the cluster and returns its output.
func (d *demo) run(ctx context.Context, args ...string) ([]byte, error) {
	return d.runWith(ctx, nil, args...)
}

func (d *demo) runWith(ctx context.Context, stdin []byte, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+d.kubeconfig())
	cmd.Stdin = bytes.NewReader(stdin)
	var msg bytes.Buffer
	cmd.Stderr = &msg
	out, err := cmd.Output()
	if err != nil {
		return out, fmt.Errorf("%s %s: %w: %s", filepath.Base(args[0]), strings.Join(args[1:], " "), err, bytes.TrimSpace(msg.Bytes()))
	}
	return out, nil
}

// fatal is an error that no further try can mend.
type fatal struct{ error }

// await tries until there is no error, it is fatal, ctx ends or limit has
// passed, and then returns the last one.
func (d *demo) await(ctx context.Context, limit time.Duration, try func() error) error {
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	tick := time.NewTicker(300 * time.Millisecond)
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

// processStart tells one process from a later one with its pid: when it
// started, in ticks since boot; empty when it is gone or a zombie.
func processStart(pid int) string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	// The name in parentheses may hold anything; what follows it does not.
	fields := bytes.Fields(data[bytes.LastIndexByte(data, ')')+1:])
	if len(fields) < 20 || string(fields[0]) == "Z" {
		return ""
	}
	return string(fields[19])
}

func tail(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	return strings.Join(lines[max(0, len(lines)-12):], "\n")
}
