package machine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
)

// The control protocol, between this package on the host and pid 1 inside: a
// SOCK_SEQPACKET connection for each request, one JSON message a packet.
//
//	host   -> pid 1   request; a "start" carries three file descriptors: stdin, stdout, stderr
//	pid 1  -> host    response
//	pid 1  -> host    after "start" and "wait": a second response with Exit, when the process has ended
//
// A connection that ends before the process does ends the process with it,
// unless it was started with Detach.

const (
	controlSocket = "control.sock"
	maxMessage    = 128 << 10
	pathEnv       = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)

type request struct {
	Op     string   `json:"op"` // start, signal, wait, list
	Name   string   `json:"name,omitempty"`
	Args   []string `json:"args,omitempty"`
	Env    []string `json:"env,omitempty"`
	Dir    string   `json:"dir,omitempty"`
	Detach bool     `json:"detach,omitempty"`
	PID    int      `json:"pid,omitempty"`
	Signal int      `json:"signal,omitempty"`
}

type response struct {
	Error string       `json:"error,omitempty"`
	PID   int          `json:"pid,omitempty"`
	Exit  *ExitStatus  `json:"exit,omitempty"`
	Procs []ProcStatus `json:"procs,omitempty"`
}

// ExitStatus is how a process ended.
type ExitStatus struct {
	Code   int            `json:"code"`             // -1 when a signal ended it
	Signal syscall.Signal `json:"signal,omitempty"` // zero when it exited
}

// Error makes a bad end an error value.
func (e *ExitStatus) Error() string {
	if e.Signal != 0 {
		return "killed by signal " + e.Signal.String()
	}
	return fmt.Sprintf("exit status %d", e.Code)
}

// ProcStatus is one named process of a machine.
type ProcStatus struct {
	Name string      `json:"name"`
	PID  int         `json:"pid"` // inside
	Args []string    `json:"args"`
	Exit *ExitStatus `json:"exit,omitempty"` // nil while it runs
}

// A Command is what Exec starts.
type Command struct {
	Name string   // to find it again with Proc; one running process per name; may be empty
	Args []string // program and arguments; a program without a slash is looked up in the machine's PATH
	Env  []string // added to PATH and HOME
	Dir  string   // zero means /

	Stdin          io.Reader // nil reads nothing. An *os.File is handed over as it is; so with the next two
	Stdout, Stderr io.Writer // nil discards

	// Detach lets the process outlive this one and the ctx of Exec. Its
	// streams must be files, or nil.
	Detach bool
}

// Proc is a process inside a machine.
type Proc struct {
	m      *Machine
	pid    int
	copies sync.WaitGroup // of its streams
	done   chan struct{}
	status *ExitStatus // before done is closed
	err    error       // the same
}

// Exec starts a process inside the machine. When ctx ends the process is
// killed, unless it is detached.
func (m *Machine) Exec(ctx context.Context, c Command) (*Proc, error) {
	p, err := m.exec(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("machine %s: exec %s: %w", m.cfg.Name, strings.Join(c.Args, " "), err)
	}
	return p, nil
}

func (m *Machine) exec(ctx context.Context, c Command) (*Proc, error) {
	conn, err := m.dialControl()
	if err != nil {
		return nil, err
	}
	return m.execOn(ctx, conn, c)
}

// execOn starts c by way of conn, which is the process's from then on.
func (m *Machine) execOn(ctx context.Context, conn *controlConn, c Command) (_ *Proc, err error) {
	defer func() {
		if err != nil {
			conn.Close()
		}
	}()
	if len(c.Args) == 0 {
		return nil, errors.New("no program")
	}
	if c.Detach && c.Name == "" {
		return nil, errors.New("a detached process needs a name")
	}
	p := &Proc{m: m, done: make(chan struct{})}
	streams, err := p.streams(c)
	defer func() {
		for _, f := range streams.theirs {
			f.Close()
		}
	}()
	if err != nil {
		return nil, err
	}
	started := false
	defer func() {
		if !started {
			streams.abandon()
		}
	}()
	resp, err := conn.ask(request{
		Op: "start", Name: c.Name, Args: c.Args, Dir: c.Dir, Detach: c.Detach,
		Env: slices.Concat([]string{pathEnv, "HOME=/root"}, c.Env),
	}, streams.fds...)
	if err != nil {
		return nil, err
	}
	started = true
	p.pid = resp.PID
	streams.start(p)
	p.follow(ctx, conn, !c.Detach)
	return p, nil
}

// Run starts a process, waits for it and returns its output, both streams
// together; a bad end is an error that shows them.
func (m *Machine) Run(ctx context.Context, args ...string) ([]byte, error) {
	var out lockedBuffer
	p, err := m.Exec(ctx, Command{Args: args, Stdout: &out, Stderr: &out})
	if err != nil {
		return nil, err
	}
	if err := p.Wait(ctx); err != nil {
		return out.Bytes(), fmt.Errorf("machine %s: %s: %w: %s", m.cfg.Name, strings.Join(args, " "), err, lastLines(out.Bytes(), 2000))
	}
	return out.Bytes(), nil
}

// Proc finds a running process that was started under name, maybe by another
// process of the host.
func (m *Machine) Proc(ctx context.Context, name string) (*Proc, error) {
	conn, err := m.dialControl()
	if err != nil {
		return nil, err
	}
	resp, err := conn.ask(request{Op: "wait", Name: name})
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("machine %s: process %q: %w", m.cfg.Name, name, err)
	}
	p := &Proc{m: m, pid: resp.PID, done: make(chan struct{})}
	p.follow(ctx, conn, false)
	return p, nil
}

// Procs lists the processes that were started under a name since the machine
// was powered on.
func (m *Machine) Procs() ([]ProcStatus, error) {
	conn, err := m.dialControl()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	resp, err := conn.ask(request{Op: "list"})
	return resp.Procs, err
}

// PID returns the process's id inside the machine.
func (p *Proc) PID() int { return p.pid }

// Signal sends sig to the process alone.
func (p *Proc) Signal(sig syscall.Signal) error {
	conn, err := p.m.dialControl()
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := conn.ask(request{Op: "signal", PID: p.pid, Signal: int(sig)}); err != nil {
		return fmt.Errorf("machine %s: signal process %d: %w", p.m.cfg.Name, p.pid, err)
	}
	return nil
}

// Done is closed when the process has ended, its output read to the end.
func (p *Proc) Done() <-chan struct{} { return p.done }

// Wait returns nil once the process has exited with zero, an *ExitStatus for
// any other end, and another error when the machine was powered off under it
// or ctx ended first.
func (p *Proc) Wait(ctx context.Context) error {
	select {
	case <-p.done:
	case <-ctx.Done():
		return ctx.Err()
	}
	if p.err != nil {
		return p.err
	}
	if *p.status != (ExitStatus{}) {
		return p.status
	}
	return nil
}

// follow waits for the end of the process on conn.
func (p *Proc) follow(ctx context.Context, conn *controlConn, kill bool) {
	stop := func() bool { return false }
	if kill {
		stop = context.AfterFunc(ctx, func() { conn.Close() }) // pid 1 then kills it
	}
	go func() {
		defer close(p.done)
		defer conn.Close()
		resp, err := conn.receive()
		stop()
		if err == nil && resp.Exit == nil {
			err = errors.New("no exit status")
		}
		switch {
		case err == nil:
			p.status = resp.Exit
		case ctx.Err() != nil && kill:
			p.err = ctx.Err()
		default:
			p.err = fmt.Errorf("machine %s: powered off under process %d: %w", p.m.cfg.Name, p.pid, err)
		}
		p.copies.Wait()
	}()
}

// controlConn is the host's end of a control connection.
type controlConn struct{ *net.UnixConn }

func (m *Machine) dialControl() (*controlConn, error) {
	if !m.Running() {
		return nil, fmt.Errorf("machine %s is off", m.cfg.Name)
	}
	return m.dialBoot()
}

// dialBoot is dialControl for Start, which holds the lock.
func (m *Machine) dialBoot() (*controlConn, error) {
	var conn net.Conn
	err := shortPath(m.cfg.Dir, func(dir string) (err error) {
		conn, err = net.Dial("unixpacket", filepath.Join(dir, controlSocket))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("machine %s: reach pid 1: %w", m.cfg.Name, err)
	}
	return &controlConn{conn.(*net.UnixConn)}, nil
}

// listenControl makes the socket that pid 1 will serve.
func listenControl(dir string) (*os.File, error) {
	if err := os.Remove(filepath.Join(dir, controlSocket)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	var file *os.File
	err := shortPath(dir, func(short string) error {
		l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: filepath.Join(short, controlSocket), Net: "unixpacket"})
		if err != nil {
			return err
		}
		l.SetUnlinkOnClose(false)
		defer l.Close()
		file, err = l.File()
		return err
	})
	if err != nil {
		return nil, err
	}
	return file, os.Chmod(filepath.Join(dir, controlSocket), 0o600)
}

// shortPath calls use with a path to dir of a few bytes, as the path of a unix
// socket must be shorter than 108.
func shortPath(dir string, use func(short string) error) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return use(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
}

func (c *controlConn) ask(req request, fds ...int) (response, error) {
	data, err := json.Marshal(req)
	if err != nil {
		return response{}, err
	}
	if len(data) > maxMessage {
		return response{}, fmt.Errorf("arguments and environment are %d bytes; at most %d can be sent", len(data), maxMessage)
	}
	if _, _, err := c.WriteMsgUnix(data, syscall.UnixRights(fds...), nil); err != nil {
		return response{}, err
	}
	resp, err := c.receive()
	if err == nil && resp.Error != "" {
		err = errors.New(resp.Error)
	}
	return resp, err
}

func (c *controlConn) receive() (response, error) {
	var resp response
	buf := make([]byte, maxMessage)
	n, err := c.Read(buf)
	if err == nil && n == 0 {
		err = io.EOF // how a SOCK_SEQPACKET connection ends
	}
	if err != nil {
		return resp, err
	}
	return resp, json.Unmarshal(buf[:n], &resp)
}
