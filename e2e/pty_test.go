package e2e

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// terminal is the user's side of a pseudo terminal with a kubectl on it.
type terminal struct {
	*running // its stdout is what the terminal shows
	master   *os.File
}

// kubectlOnTerminal runs kubectl with a real terminal of that size as its
// standard streams and its controlling terminal.
func kubectlOnTerminal(t *testing.T, env []string, rows, cols uint16, args ...string) *terminal {
	t.Helper()
	master, slave, err := openTerminal()
	if err != nil {
		t.Fatal(err)
	}
	defer slave.Close()
	cmd := world.hub.KubectlCommand(t.Context(), args...)
	cmd.Env = append(cmd.Env, env...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 0, Pdeathsig: syscall.SIGKILL}
	s := &terminal{
		running: &running{cmd: cmd, stdout: newOutput(), stderr: newOutput(), done: make(chan struct{})},
		master:  master,
	}
	s.resize(t, rows, cols)
	if err := cmd.Start(); err != nil {
		master.Close()
		t.Fatal(err)
	}
	shown := make(chan struct{})
	go func() {
		defer close(shown)
		io.Copy(s.stdout, master) // ends with EIO when the last slave is closed
	}()
	go func() {
		s.err = cmd.Wait()
		<-shown
		close(s.done)
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-s.done
		master.Close()
	})
	return s
}

func openTerminal() (master, slave *os.File, err error) {
	// Non-blocking, so that Close ends a Read.
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("open a pseudo terminal: %w", err)
	}
	master = os.NewFile(uintptr(fd), "/dev/ptmx")
	defer func() {
		if err != nil {
			master.Close()
		}
	}()
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return nil, nil, fmt.Errorf("unlock a pseudo terminal: %w", err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		return nil, nil, fmt.Errorf("number of a pseudo terminal: %w", err)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	return master, slave, err
}

func (s *terminal) resize(t *testing.T, rows, cols uint16) {
	t.Helper()
	raw, err := s.master.SyscallConn()
	if err == nil {
		var failed error
		err = raw.Control(func(fd uintptr) {
			failed = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols})
		})
		err = errors.Join(err, failed)
	}
	if err != nil {
		t.Fatalf("resize the terminal: %v", err)
	}
}

// press sends keys.
func (s *terminal) press(t *testing.T, keys string) {
	t.Helper()
	s.master.SetWriteDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.WriteString(s.master, keys); err != nil {
		t.Fatalf("write to the terminal: %v", err)
	}
}
