package machine

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Config says what a machine is. Only Dir and Name are required.
type Config struct {
	Dir   string       // the machine's folder on the host, absolute; made if missing, removed by Destroy
	Name  string       // host name, a DNS label of at most 40 characters, unique on this host
	Index int          // 1..250, picks the networks; zero takes a free one (and the same again for the same Dir)
	Binds []Bind       // folders or files of the host to show inside
	Log   *slog.Logger // nil discards

	// Detach lets the machine outlive this process. Otherwise it is powered
	// off by the kernel as soon as this process has gone, however it went.
	Detach bool

	// NoContainerd leaves containerd out.
	NoContainerd bool
}

// A Bind shows a path of the host inside the machine.
type Bind struct {
	Host     string // absolute
	Inside   string // absolute; made if missing
	Writable bool   // else read-only
}

// Machine is one edge machine. Its methods may be called from any goroutine.
type Machine struct {
	cfg    Config
	log    *slog.Logger
	claims []net.Listener // on name and index, see claims.go
	linkMu sync.Mutex     // serialises changes of the link, and guards wire
	wire   *wire          // while the link is shaped

	mu       sync.Mutex
	boot     *boot // nil while off
	prepared bool
}

// boot is one run of the machine, from power on to power off.
type boot struct {
	pid       int
	startTime uint64 // of pid 1, in clock ticks since the host booted: tells it from a later process with its pid
	lifeline  *os.File
	gone      chan struct{} // closed once pid 1, and with it every process inside, has gone
}

// state is kept in Dir/machine.json, so that another process can find a
// detached machine.
type state struct {
	Name      string `json:"name"`
	Index     int    `json:"index"`
	PID       int    `json:"pid,omitempty"`
	StartTime uint64 `json:"startTime,omitempty"`
}

var nameForm = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?$`)

// New checks cfg and claims the machine's networks; it starts nothing. When a
// detached machine already runs in cfg.Dir, New returns it, running.
func New(cfg Config) (*Machine, error) {
	if !filepath.IsAbs(cfg.Dir) {
		return nil, fmt.Errorf("machine: Dir %q is not an absolute path", cfg.Dir)
	}
	if !nameForm.MatchString(cfg.Name) {
		return nil, fmt.Errorf("machine: name %q is not a DNS label of at most 40 characters", cfg.Name)
	}
	for _, b := range cfg.Binds {
		if !filepath.IsAbs(b.Host) || !filepath.IsAbs(b.Inside) {
			return nil, fmt.Errorf("machine %s: bind %q on %q: both must be absolute paths", cfg.Name, b.Host, b.Inside)
		}
	}
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("machine %s: making namespaces, mounts and links needs root; run as root", cfg.Name)
	}
	m := &Machine{cfg: cfg, log: cfg.Log}
	if m.log == nil {
		m.log = slog.New(slog.DiscardHandler)
	}
	m.log = m.log.With("machine", cfg.Name)
	if err := os.MkdirAll(cfg.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("machine %s: %w", cfg.Name, err)
	}
	st, err := m.loadState()
	if err != nil {
		return nil, err
	}
	if st.Name != "" && st.Name != cfg.Name {
		return nil, fmt.Errorf("machine %s: %s is the folder of machine %q; choose another", cfg.Name, cfg.Dir, st.Name)
	}
	if st.Index != 0 && (cfg.Index == 0 || cfg.Index == st.Index) {
		m.cfg.Index = st.Index
		if st.PID != 0 && StartTime(st.PID) == st.StartTime {
			m.adopt(st)
			return m, nil
		}
	}
	if err := m.claim(); err != nil {
		return nil, err
	}
	if err := m.saveState(state{Name: cfg.Name, Index: m.cfg.Index}); err != nil {
		m.dropClaims()
		return nil, err
	}
	return m, nil
}

// Start powers the machine on and returns when its containerd serves. After
// PowerOff it is a reboot: same disk, all else new.
func (m *Machine) Start(ctx context.Context) (err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.boot != nil && !m.boot.over() {
		return fmt.Errorf("machine %s: already running", m.cfg.Name)
	}
	began := time.Now()
	if err := m.prepareLocked(ctx); err != nil {
		return err
	}
	if err := m.makeCgroups(); err != nil {
		return err
	}
	b, err := m.powerOnLocked(ctx)
	if err != nil {
		return err
	}
	m.boot = b
	defer func() {
		if err != nil {
			err = errors.Join(err, m.powerOffLocked(context.WithoutCancel(ctx)))
		}
	}()
	if err := m.saveState(state{Name: m.cfg.Name, Index: m.cfg.Index, PID: b.pid, StartTime: b.startTime}); err != nil {
		return err
	}
	if !m.cfg.NoContainerd {
		if err := m.startContainerd(ctx, b); err != nil {
			return err
		}
	}
	m.log.Info("machine is up", "pid", b.pid, "ip", m.IP(), "took", time.Since(began).Round(time.Millisecond))
	return nil
}

// PowerOff pulls the plug: every process inside is killed at once, mounts and
// network vanish with them, and the disk stays. It returns when all are gone.
// Powering off a machine that is off does nothing.
func (m *Machine) PowerOff(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.powerOffLocked(ctx)
}

func (m *Machine) powerOffLocked(ctx context.Context) error {
	b := m.boot
	if b == nil {
		return nil
	}
	// First of all the network: who loses power says goodbye to nobody, while
	// the kernel of a killed process still ends its connections in order.
	if err := m.removeLink(ctx); err != nil {
		return err
	}
	// The start time guards against killing a stranger that got the pid.
	if !b.over() && StartTime(b.pid) == b.startTime {
		if err := syscall.Kill(b.pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("machine %s: power off: kill pid 1 (%d): %w", m.cfg.Name, b.pid, err)
		}
	}
	select {
	case <-b.gone:
	case <-ctx.Done():
		return fmt.Errorf("machine %s: power off: processes are not gone yet: %w", m.cfg.Name, ctx.Err())
	}
	if b.lifeline != nil {
		b.lifeline.Close()
	}
	m.boot = nil
	if err := m.removeCgroups(ctx); err != nil {
		return err
	}
	m.log.Info("machine is off")
	return m.saveState(state{Name: m.cfg.Name, Index: m.cfg.Index})
}

// Destroy powers the machine off and removes everything it made on the host:
// link, bridge, cgroups and Dir. The Machine must not be used afterwards.
func (m *Machine) Destroy(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	err := errors.Join(m.powerOffLocked(ctx), m.removeCgroups(ctx), m.removeBridge(ctx))
	m.dropClaims()
	if err != nil {
		return err // Dir stays, so that another Destroy can finish
	}
	if err := removeTree(m.cfg.Dir); err != nil {
		return fmt.Errorf("machine %s: destroy: %w", m.cfg.Name, err)
	}
	return nil
}

// Running tells whether the machine is on.
func (m *Machine) Running() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.boot != nil && !m.boot.over()
}

// Name returns the machine's host name.
func (m *Machine) Name() string { return m.cfg.Name }

// Dir returns the machine's folder on the host.
func (m *Machine) Dir() string { return m.cfg.Dir }

// Disk returns where a path inside the machine lies on the host, for paths
// that are on its disk: not those below /run, /proc, /sys, /dev, /usr and the
// binds. It works while the machine is off, too.
func (m *Machine) Disk(inside string) string {
	return filepath.Join(m.cfg.Dir, "disk", filepath.Join("/", inside))
}

// Path returns the way from the host to a path inside the running machine,
// its /run included. The way must not lead over absolute symbolic links, such
// as /var/run, as these would be followed on the host.
func (m *Machine) Path(inside string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.boot == nil {
		return m.Disk(inside)
	}
	return m.boot.path(inside)
}

func (b *boot) path(inside string) string {
	return filepath.Join("/proc", fmt.Sprint(b.pid), "root", filepath.Join("/", inside))
}

func (b *boot) over() bool {
	select {
	case <-b.gone:
		return true
	default:
		return false
	}
}

// abortTimeout bounds how long is waited for the remains of a machine that did
// not start.
const abortTimeout = 30 * time.Second

// powerOnLocked starts pid 1 and returns when it serves requests.
func (m *Machine) powerOnLocked(ctx context.Context) (*boot, error) {
	fail := func(err error) (*boot, error) {
		return nil, fmt.Errorf("machine %s: power on: %w", m.cfg.Name, err)
	}
	control, err := listenControl(m.cfg.Dir)
	if err != nil {
		return fail(err)
	}
	defer control.Close()
	setupR, setupW, err := os.Pipe()
	if err != nil {
		return fail(err)
	}
	defer setupR.Close()
	defer setupW.Close()
	resultR, resultW, err := os.Pipe()
	if err != nil {
		return fail(err)
	}
	defer resultR.Close()
	defer resultW.Close()
	lifeR, lifeW, err := os.Pipe()
	if err != nil {
		return fail(err)
	}
	defer lifeR.Close()
	console, err := os.OpenFile(filepath.Join(m.cfg.Dir, "console.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		lifeW.Close()
		return fail(err)
	}
	defer console.Close()
	claims, err := m.claimFiles()
	for _, c := range claims {
		defer c.Close()
	}
	if err != nil {
		lifeW.Close()
		return fail(err)
	}

	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{initArg}
	cmd.Dir = "/"
	cmd.Env = []string{pathEnv, "HOME=/root", ownerEnv(os.Getpid())}
	cmd.Stdout, cmd.Stderr = console, console
	cmd.ExtraFiles = append([]*os.File{control, setupR, resultW, lifeR}, claims...) // fds 3.. of pid 1, see init.go
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true,
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
	}
	if err := cmd.Start(); err != nil {
		lifeW.Close()
		return fail(err)
	}
	b := &boot{pid: cmd.Process.Pid, startTime: StartTime(cmd.Process.Pid), lifeline: lifeW, gone: make(chan struct{})}
	go func() {
		cmd.Wait() // how it ended is told by the result pipe or by whoever powered it off
		close(b.gone)
	}()
	abort := func(err error) (*boot, error) {
		cmd.Process.Kill()
		<-b.gone
		lifeW.Close()
		// What ended ctx must not keep what was made from being removed.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), abortTimeout)
		defer cancel()
		return fail(errors.Join(err, m.awaitLinkGone(ctx), m.removeCgroups(ctx)))
	}
	if err := m.connectLink(ctx, b.pid); err != nil {
		return abort(err)
	}
	setup := m.setup()
	if err := json.NewEncoder(setupW).Encode(setup); err != nil {
		return abort(fmt.Errorf("pid 1 ended early: %w (see %s)", err, console.Name()))
	}
	setupW.Close()
	resultW.Close()
	stop := context.AfterFunc(ctx, func() { resultR.SetReadDeadline(time.Now()) })
	defer stop()
	answer, err := io.ReadAll(io.LimitReader(resultR, 64<<10))
	if err != nil {
		return abort(fmt.Errorf("wait for pid 1: %w (see %s)", err, console.Name()))
	}
	if string(answer) != "ok" {
		if len(answer) == 0 {
			answer = fmt.Appendf(nil, "pid 1 ended early; see %s", console.Name())
		}
		return abort(errors.New(string(answer)))
	}
	return b, nil
}

// adopt takes over a running machine that another process has started.
func (m *Machine) adopt(st state) {
	b := &boot{pid: st.PID, startTime: st.StartTime, gone: make(chan struct{})}
	m.boot, m.prepared = b, true
	go func() {
		// Not our child: a pidfd tells of its end without racing for its pid.
		defer close(b.gone)
		fd, err := unix.PidfdOpen(st.PID, 0)
		if err != nil {
			return // gone already
		}
		defer unix.Close(fd)
		for StartTime(st.PID) == st.StartTime {
			unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 1000)
		}
	}()
}

func (m *Machine) statePath() string { return filepath.Join(m.cfg.Dir, "machine.json") }

func (m *Machine) loadState() (state, error) {
	var st state
	data, err := os.ReadFile(m.statePath())
	if errors.Is(err, fs.ErrNotExist) {
		return st, nil
	}
	if err == nil {
		err = json.Unmarshal(data, &st)
	}
	if err != nil {
		return st, fmt.Errorf("machine %s: read %s: %w", m.cfg.Name, m.statePath(), err)
	}
	return st, nil
}

func (m *Machine) saveState(st state) error {
	data, err := json.Marshal(st)
	if err == nil {
		tmp := m.statePath() + ".tmp"
		if err = os.WriteFile(tmp, append(data, '\n'), 0o644); err == nil {
			err = os.Rename(tmp, m.statePath())
		}
	}
	if err != nil {
		return fmt.Errorf("machine %s: save %s: %w", m.cfg.Name, m.statePath(), err)
	}
	return nil
}

// StartTime tells a process from a later one with its pid: it is when the
// process started, in clock ticks since the host booted, and zero when there
// is no such process or it is a zombie.
func StartTime(pid int) uint64 {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	// The name in parentheses may hold anything; what follows it does not.
	fields := bytes.Fields(data[bytes.LastIndexByte(data, ')')+1:])
	if len(fields) < 20 || string(fields[0]) == "Z" {
		return 0
	}
	start, _ := strconv.ParseUint(string(fields[19]), 10, 64)
	return start
}
