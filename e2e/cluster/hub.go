package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// HubConfig says how to run a standalone hub.
type HubConfig struct {
	Dir      string   // holds data, log and pid; required
	Programs Programs // required
	Listen   string   // for edge nodes; empty means a free port on all addresses
	API      string   // of the API server; empty means a free port on loopback
	Names    []string // server names before 127.0.0.1 and localhost
	Args     []string // further flags
	Env      []string // added to this process's environment
	// Detach lets the hub outlive this process.
	Detach bool
}

// Hub is a standalone hub. Its methods may be called from one goroutine at a
// time, but for Kubectl, which is safe from several.
type Hub struct {
	cfg  HubConfig
	proc *process
}

// NewHub settles on ports and addresses; it starts nothing.
func NewHub(cfg HubConfig) (*Hub, error) {
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, err
	}
	for _, addr := range []*string{&cfg.Listen, &cfg.API} {
		if *addr != "" {
			continue
		}
		port, err := freePort()
		if err != nil {
			return nil, err
		}
		if addr == &cfg.API {
			*addr = "127.0.0.1:" + port
		} else {
			*addr = "0.0.0.0:" + port
		}
	}
	return &Hub{cfg: cfg}, nil
}

func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	return port, err
}

// DataDir, Kubeconfig and LogPath tell where the hub's things are.
func (h *Hub) DataDir() string    { return filepath.Join(h.cfg.Dir, "data") }
func (h *Hub) Kubeconfig() string { return filepath.Join(h.DataDir(), "admin.kubeconfig") }
func (h *Hub) LogPath() string    { return filepath.Join(h.cfg.Dir, "cloudhub.log") }

// Port is where edge nodes dial.
func (h *Hub) Port() string {
	_, port, _ := net.SplitHostPort(h.cfg.Listen)
	return port
}

// APIAddress is the API server's.
func (h *Hub) APIAddress() string { return h.cfg.API }

// Start runs the hub and returns when it serves nodes.
func (h *Hub) Start(ctx context.Context) error {
	if err := h.start(); err != nil {
		return err
	}
	return h.Wait(ctx)
}

// StartReadyz runs the hub and returns when its API server answers /readyz.
func (h *Hub) StartReadyz(ctx context.Context) error {
	if err := h.start(); err != nil {
		return err
	}
	return h.proc.waitFor(ctx, "the API server's /readyz", func() bool { return h.readyz(ctx) })
}

func (h *Hub) readyz(ctx context.Context) bool {
	client, err := h.Client()
	if err != nil {
		return false
	}
	_, err = client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
	return err == nil
}

func (h *Hub) start() error {
	// The first is the one that join commands name.
	names := append(slices.Clone(h.cfg.Names), "127.0.0.1", "localhost")
	args := append([]string{"standalone", "--data-dir", h.DataDir(), "--listen", h.cfg.Listen,
		"--apiserver-listen", h.cfg.API, "--server-names", strings.Join(names, ",")}, h.cfg.Args...)
	p, err := startProcess(h.cfg.Programs.Cloudhub, args, h.cfg.Env, h.LogPath(), h.cfg.Detach)
	if err != nil {
		return err
	}
	h.proc = p
	return nil
}

// Wait returns when the hub serves nodes.
func (h *Hub) Wait(ctx context.Context) error {
	return h.proc.waitFor(ctx, "the hub to serve nodes", func() bool {
		c, err := net.DialTimeout("tcp", "127.0.0.1:"+h.Port(), time.Second)
		if err != nil {
			return false
		}
		c.Close()
		if !h.readyz(ctx) {
			return false
		}
		// The listener is open from the first moment; the log line tells that
		// it is served.
		return h.proc.logged("serving edge nodes")
	})
}

// Stop ends the hub as an operator does, and returns its error if it did not
// end well.
func (h *Hub) Stop(ctx context.Context) error { return h.proc.stop(ctx, syscall.SIGTERM) }

// Kill ends it without a chance to do anything.
func (h *Hub) Kill(ctx context.Context) error {
	err := h.proc.stop(ctx, syscall.SIGKILL)
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil
	}
	return err
}

// Pause stops the hub's process where it is: the kernel goes on accepting
// connections for it, and nobody answers. Resume lets it go on.
func (h *Hub) Pause() error { return h.proc.cmd.Process.Signal(syscall.SIGSTOP) }

// Resume undoes Pause.
func (h *Hub) Resume() error { return h.proc.cmd.Process.Signal(syscall.SIGCONT) }

// PID of the hub's process.
func (h *Hub) PID() int { return h.proc.cmd.Process.Pid }

// Running tells whether the hub's process is there.
func (h *Hub) Running() bool { return h.proc != nil && !h.proc.ended() }

// RESTConfig is the administrator's access to the cluster.
func (h *Hub) RESTConfig() (*rest.Config, error) {
	rc, err := clientcmd.BuildConfigFromFlags("", h.Kubeconfig())
	if err != nil {
		return nil, err
	}
	rc.QPS = -1
	return rc, nil
}

// Client is the administrator's client.
func (h *Hub) Client() (kubernetes.Interface, error) {
	rc, err := h.RESTConfig()
	if err != nil {
		return nil, err
	}
	return kubernetes.NewForConfig(rc)
}

// Result is what a command did.
type Result struct {
	Stdout, Stderr string
	Code           int
}

// Kubectl runs "cloudhub kubectl" as the administrator. A bad exit is in the
// Result; the error says that it could not be run.
func (h *Hub) Kubectl(ctx context.Context, args ...string) (Result, error) {
	return h.KubectlIn(ctx, nil, args...)
}

// KubectlIn is Kubectl with something on standard input.
func (h *Hub) KubectlIn(ctx context.Context, stdin io.Reader, args ...string) (Result, error) {
	return run(h.KubectlCommand(ctx, args...), stdin)
}

// KubectlCommand is the command that Kubectl runs, for callers that want its
// streams.
func (h *Hub) KubectlCommand(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, h.cfg.Programs.Cloudhub, append([]string{"kubectl"}, args...)...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+h.Kubeconfig())
	return cmd
}

// Cloudhub runs a subcommand of cloudhub against this hub.
func (h *Hub) Cloudhub(ctx context.Context, args ...string) (Result, error) {
	return run(exec.CommandContext(ctx, h.cfg.Programs.Cloudhub, append(args, "--data-dir", h.DataDir())...), nil)
}

// Token makes a join token.
func (h *Hub) Token(ctx context.Context, args ...string) (string, error) {
	res, err := h.Cloudhub(ctx, append([]string{"token", "create", "-o", "json"}, args...)...)
	if err != nil {
		return "", err
	}
	if res.Code != 0 {
		return "", fmt.Errorf("cloudhub token create: exit %d: %s", res.Code, res.Stderr)
	}
	var out struct {
		Token string `json:"token"`
	}
	if err := json.Unmarshal([]byte(res.Stdout), &out); err != nil {
		return "", fmt.Errorf("cloudhub token create: %w in %q", err, res.Stdout)
	}
	return out.Token, nil
}

func run(cmd *exec.Cmd, stdin io.Reader) (Result, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &stdout, &stderr
	cmd.WaitDelay = 5 * time.Second
	err := cmd.Run()
	res := Result{Stdout: stdout.String(), Stderr: stderr.String()}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		res.Code = exit.ExitCode()
		err = nil
	}
	return res, err
}

// process is a program of the host with its output in a file.
type process struct {
	cmd  *exec.Cmd
	log  string
	from int64 // where this run's output starts

	done chan struct{}
	err  error // set before done is closed
}

func startProcess(program string, args, env []string, log string, detach bool) (*process, error) {
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = f, f
	if detach {
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	} else {
		// Whatever ends this process, the hub goes with it.
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &process{cmd: cmd, log: log, from: end, done: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

func (p *process) logged(text string) bool {
	b, err := p.output()
	return err == nil && bytes.Contains(b, []byte(text))
}

func (p *process) output() ([]byte, error) {
	f, err := os.Open(p.log)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.NewSectionReader(f, p.from, 16<<20))
}

func (p *process) waitFor(ctx context.Context, what string, ready func() bool) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if ready() {
			return nil
		}
		select {
		case <-p.done:
			out, _ := p.output()
			return fmt.Errorf("waiting for %s: it ended (%v):\n%s", what, p.err, tail(out, 2000))
		case <-ctx.Done():
			out, _ := p.output()
			return fmt.Errorf("waiting for %s: %w; its log ends with:\n%s", what, ctx.Err(), tail(out, 2000))
		case <-tick.C:
		}
	}
}

func (p *process) stop(ctx context.Context, sig syscall.Signal) error {
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		return fmt.Errorf("%s did not end on %v: %w", p.cmd.Path, sig, ctx.Err())
	}
}

func tail(b []byte, n int) []byte {
	if len(b) > n {
		b = b[len(b)-n:]
	}
	return b
}
