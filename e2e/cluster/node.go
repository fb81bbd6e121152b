package cluster

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/skerry-io/skerry/e2e/machine"
)

// Paths inside a machine.
const (
	EdgeDataDir = "/var/lib/skerry/edgecore"
	edgecore    = "/opt/skerry/edgecore"
)

// NodeConfig says how to make an edge node.
type NodeConfig struct {
	Dir      string         // the machine's; required
	Name     string         // of the node; required
	Programs Programs       // required
	Images   []string       // archives to import at the first start
	Config   map[string]any // laid over edgecore's configuration
	Env      []string       // of edgecore
	Bare     bool           // a machine without containerd
	Detach   bool           // let machine and edgecore outlive this process
}

// Node is an edge node: a machine with edgecore. Its methods may be called from
// one goroutine at a time.
type Node struct {
	*machine.Machine
	cfg  NodeConfig
	proc *machine.Proc
}

// NewNode makes the machine; it starts nothing.
func NewNode(cfg NodeConfig) (*Node, error) {
	// Cgroups are named after the machine and shared by the whole host: two
	// clusters on it may have nodes of the same name.
	sum := sha256.Sum256([]byte(cfg.Dir))
	m, err := machine.New(machine.Config{
		Dir: cfg.Dir, Name: fmt.Sprintf("%s-%x", cfg.Name, sum[:3]), Detach: cfg.Detach, NoContainerd: cfg.Bare,
		Binds: []machine.Bind{{Host: cfg.Programs.Edgecore, Inside: edgecore}},
	})
	if err != nil {
		return nil, err
	}
	return &Node{Machine: m, cfg: cfg}, nil
}

// Name is the node's name in the cluster.
func (n *Node) Name() string { return n.cfg.Name }

// Boot powers the machine on, imports the images when it is the first time, and
// writes edgecore's configuration.
func (n *Node) Boot(ctx context.Context) error {
	if !n.Running() {
		if err := n.Machine.Start(ctx); err != nil {
			return err
		}
	}
	done := n.Disk("/var/lib/skerry/images-imported")
	if _, err := os.Stat(done); err == nil {
		return nil
	}
	for _, tar := range n.cfg.Images {
		if err := n.ImportImage(ctx, tar); err != nil {
			return err
		}
	}
	if err := n.WriteConfig(n.cfg.Config); err != nil {
		return err
	}
	return os.WriteFile(done, nil, 0o600)
}

// WriteConfig writes edgecore's configuration for this machine: its containerd
// and cgroup root, and long logs, with over laid over it.
func (n *Node) WriteConfig(over map[string]any) error {
	cfg := map[string]any{
		"apiVersion": "edgecore.skerry.dev/v1alpha1",
		"kind":       "Config",
		"runtime":    map[string]any{"endpoint": machine.ContainerdEndpoint},
		"kubelet": map[string]any{
			"cgroupRoot": n.CgroupRoot(),
			// The kubelet cuts logs every 10 s, at 10 MiB by default; what is
			// printed and read whole here is longer, and must not depend on when.
			"config": map[string]any{"containerLogMaxSize": "256Mi"},
		},
	}
	merge(cfg, over)
	b, err := yaml.Marshal(cfg)
	if err != nil {
		return err
	}
	dir := n.Disk(EdgeDataDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "config.yaml"), b, 0o600)
}

func merge(into, over map[string]any) {
	for k, v := range over {
		a, ok := into[k].(map[string]any)
		b, also := v.(map[string]any)
		if ok && also {
			merge(a, b)
			continue
		}
		into[k] = v
	}
}

// Join enrols the node with a new token.
func (n *Node) Join(ctx context.Context, h *Hub, tokenArgs ...string) error {
	token, err := h.Token(ctx, tokenArgs...)
	if err != nil {
		return err
	}
	res, err := n.Edgecore(ctx, "join", n.HubURL(h), "--token", token, "--node-name", n.Name())
	if err != nil {
		return err
	}
	if res.Code != 0 {
		return fmt.Errorf("edgecore join: exit %d: %s", res.Code, res.Stderr)
	}
	return nil
}

// HubURL is the hub's address as this machine reaches it.
func (n *Node) HubURL(h *Hub) string { return "https://" + n.HostIP() + ":" + h.Port() }

// Edgecore runs a subcommand of edgecore inside the machine, with the node's
// data directory.
func (n *Node) Edgecore(ctx context.Context, args ...string) (Result, error) {
	return n.Command(ctx, nil, append([]string{edgecore}, append(args, "--data-dir", EdgeDataDir)...)...)
}

// Kubectl runs kubectl on the machine, against what the node has.
func (n *Node) Kubectl(ctx context.Context, args ...string) (Result, error) {
	return n.Command(ctx, nil, append([]string{edgecore, "kubectl"}, args...)...)
}

// KubectlCommand is the command line of such a kubectl.
func KubectlCommand(args ...string) []string { return append([]string{edgecore, "kubectl"}, args...) }

// Command runs a program inside the machine and keeps its streams apart.
func (n *Node) Command(ctx context.Context, stdin io.Reader, args ...string) (Result, error) {
	var stdout, stderr syncBuffer
	p, err := n.Exec(ctx, machine.Command{Args: args, Stdin: stdin, Stdout: &stdout, Stderr: &stderr})
	if err != nil {
		return Result{}, err
	}
	err = p.Wait(ctx)
	res := Result{Stdout: stdout.String(), Stderr: stderr.String()}
	var exit *machine.ExitStatus
	if errors.As(err, &exit) {
		res.Code, err = exit.Code, nil
	}
	return res, err
}

type syncBuffer struct {
	mu sync.Mutex
	b  []byte
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.b = append(s.b, p...)
	return len(p), nil
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return string(s.b)
}

// LogPath is where edgecore's output goes, on the host.
func (n *Node) LogPath() string { return filepath.Join(n.cfg.Dir, "edgecore.log") }

// Run starts edgecore; it does not wait for anything.
func (n *Node) Run(ctx context.Context) error {
	f, err := os.OpenFile(n.LogPath(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	n.proc, err = n.Exec(context.WithoutCancel(ctx), machine.Command{
		Name: "edgecore", Args: []string{edgecore, "run", "--data-dir", EdgeDataDir}, Env: n.cfg.Env,
		Stdout: f, Stderr: f, Detach: n.cfg.Detach,
	})
	return err
}

// StopEdgecore ends edgecore as an operator does; pods run on.
func (n *Node) StopEdgecore(ctx context.Context) error { return n.end(ctx, syscall.SIGTERM) }

// KillEdgecore ends it without a chance to do anything.
func (n *Node) KillEdgecore(ctx context.Context) error {
	err := n.end(ctx, syscall.SIGKILL)
	var exit *machine.ExitStatus
	if errors.As(err, &exit) && exit.Signal == syscall.SIGKILL {
		return nil
	}
	return err
}

func (n *Node) end(ctx context.Context, sig syscall.Signal) error {
	if n.proc == nil {
		return errors.New("edgecore was not started")
	}
	if err := n.proc.Signal(sig); err != nil {
		return err
	}
	return n.proc.Wait(ctx)
}

// EdgecoreEnded is closed when edgecore has ended.
func (n *Node) EdgecoreEnded() <-chan struct{} { return n.proc.Done() }

// EdgecorePID is edgecore's process id inside the machine.
func (n *Node) EdgecorePID() int { return n.proc.PID() }

// EdgecoreHostPID is edgecore's process id on the host.
func (n *Node) EdgecoreHostPID() (int, error) { return n.proc.HostPID() }

// Status is what "edgecore status -o json" tells.
type Status struct {
	Connected bool      `json:"connected"`
	Since     time.Time `json:"since"` // connected or not
	Synced    bool      `json:"synced"`
	LastSync  time.Time `json:"lastSync"`
	LastError string    `json:"lastError"`
	Outbox    int       `json:"outbox"`

	EventsDropped   uint64    `json:"eventsDropped"`
	NodeDeleted     time.Time `json:"nodeDeleted"`
	CertificateEnds time.Time `json:"certificateEnds"`

	Objects map[string]int `json:"objects"`

	// StoreMended tells that the store was damaged and mended at the start.
	StoreMended *struct {
		Cause string `json:"cause"`
		Pods  int    `json:"pods"`
	} `json:"storeMended"`
	// StoreTrouble tells why the disk takes no writes.
	StoreTrouble *struct {
		Error string `json:"error"`
	} `json:"storeTrouble"`
	// Bytes is what "edgecore bytes -o json" tells.
	Bytes struct {
		Disk struct {
			Total   uint64            `json:"total"`
			Commits uint64            `json:"commits"`
			Classes map[string]uint64 `json:"classes"`
		} `json:"disk"`
		Process uint64 `json:"process"`
	} `json:"bytes"`

	StoreWritten uint64 `json:"storeWrittenBytes"`
	TunnelSent   uint64 `json:"tunnelSentBytes"`
	TunnelRecv   uint64 `json:"tunnelReceivedBytes"`
}

// AdminClient talks to edgecore's own socket, for callers that ask too often to
// start a program each time. URLs have the host "edgecore". It serves through
// restarts of edgecore and of the machine.
func (n *Node) AdminClient() *http.Client {
	return &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			dir, err := os.Open(n.Path(EdgeDataDir)) // as the machine mounts it
			if err != nil {
				return nil, err
			}
			defer dir.Close()
			var d net.Dialer // the path of a unix socket must be short
			return d.DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), "edgecore.sock"))
		},
	}}
}

// StatusBySocket is Status without starting a program.
func (n *Node) StatusBySocket(ctx context.Context) (Status, error) {
	var st Status
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://edgecore/v1/status", nil)
	if err != nil {
		return st, err
	}
	res, err := n.AdminClient().Do(req)
	if err != nil {
		return st, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return st, errors.New("edgecore's socket: " + res.Status)
	}
	return st, json.NewDecoder(res.Body).Decode(&st)
}

// Status asks edgecore.
func (n *Node) Status(ctx context.Context) (Status, error) {
	var st Status
	res, err := n.Edgecore(ctx, "status", "-o", "json")
	if err != nil {
		return st, err
	}
	if res.Code != 0 {
		return st, fmt.Errorf("edgecore status: exit %d: %s", res.Code, res.Stderr)
	}
	return st, json.Unmarshal([]byte(res.Stdout), &st)
}
