package machine

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
)

// initArg is argv[0] of a machine's pid 1, and how Main knows itself.
const initArg = "skerry-machine-init"

// ownerEnv is how pid 1 of a machine, and what is not given an environment of
// its own, tells which process of the host has started it.
func ownerEnv(pid int) string { return fmt.Sprintf("SKERRY_MACHINE_OWNER=%d:%d", pid, StartTime(pid)) }

// What pid 1 finds open, besides its console on 1 and 2.
const (
	fdControl  = 3 + iota // the listening control socket
	fdSetup               // the setup is read from it
	fdResult              // "ok" or what went wrong is written to it
	fdLifeline            // ends when the process that started the machine has ended
	fdClaim1              // only held, as the next
	fdClaim2
)

// setup is what pid 1 needs to know.
type setup struct {
	Name      string
	Disk      string // on the host
	IP        string
	HostIP    string
	PodSubnet string
	Detach    bool
	Binds     []Bind
}

func (m *Machine) setup() setup {
	return setup{
		Name: m.cfg.Name, Disk: m.Disk("/"), IP: m.IP(), HostIP: m.HostIP(), PodSubnet: m.PodSubnet(),
		Detach: m.cfg.Detach, Binds: m.cfg.Binds,
	}
}

// Main returns at once in an ordinary process. In pid 1 of a machine it is all
// that process does, and never returns.
func Main() {
	if os.Args[0] != initArg || os.Getpid() != 1 {
		return
	}
	result := os.NewFile(fdResult, "result")
	if err := initMain(result); err != nil {
		fmt.Fprintln(os.Stderr, "machine:", err)
		io.WriteString(result, err.Error())
		os.Exit(1)
	}
	os.Exit(0)
}

// initMain sets the machine up, tells the host and supervises.
func initMain(result *os.File) error {
	for fd := fdControl; fd <= fdClaim2; fd++ {
		syscall.CloseOnExec(fd)
	}
	// Nothing but the host's SIGKILL ends pid 1. The signals are caught and not
	// ignored, as a started program would inherit that it ignores them.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGPIPE)
	// The namespaces are new with this process, its mounts still the host's:
	// no change may find its way back.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	var s setup
	file := os.NewFile(fdSetup, "setup")
	if err := json.NewDecoder(file).Decode(&s); err != nil {
		return fmt.Errorf("read the setup: %w", err)
	}
	file.Close()
	if err := unix.Sethostname([]byte(s.Name)); err != nil {
		return fmt.Errorf("set the host name: %w", err)
	}
	if err := makeRoot(s); err != nil {
		return err
	}
	sv := newSupervisor()
	go sv.reap()
	for _, args := range [][]string{
		{"ip", "link", "set", "lo", "up"},
		{"ip", "addr", "add", s.IP + "/30", "dev", "eth0"},
		{"ip", "link", "set", "eth0", "up"},
		{"ip", "route", "add", "default", "via", s.HostIP},
	} {
		if err := sv.run(args...); err != nil {
			return fmt.Errorf("set up the network: %w", err)
		}
	}
	l, err := net.FileListener(os.NewFile(fdControl, "control"))
	if err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	failed := make(chan error, 2)
	go func() { failed <- sv.serve(l.(*net.UnixListener)) }()
	if !s.Detach {
		go func() {
			lifeline := os.NewFile(fdLifeline, "lifeline")
			lifeline.Read(make([]byte, 1)) // nothing is ever written to it
			failed <- errors.New("the process that owns this machine has ended")
		}()
	}
	if _, err := result.WriteString("ok"); err != nil {
		return fmt.Errorf("tell the host: %w", err)
	}
	result.Close()
	return <-failed
}
