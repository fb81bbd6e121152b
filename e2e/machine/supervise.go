package machine

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
)

// supervisor is pid 1's table of processes. It starts them with
// syscall.ForkExec, as it alone may wait: it reaps every process of the
// machine, its own and orphans, with wait4(-1), which os/exec does not share.
type supervisor struct {
	mu      sync.Mutex // held over fork and entry, so that an exit finds its entry
	running map[int]*process
	named   map[string]*process // the last process of each name, also after its end
}

type process struct {
	name string
	args []string
	pid  int
	exit *ExitStatus   // before done is closed
	done chan struct{} // closed at its end
}

func newSupervisor() *supervisor {
	return &supervisor{running: map[int]*process{}, named: map[string]*process{}}
}

// reap collects dead processes for as long as pid 1 lives.
func (s *supervisor) reap() {
	// One signal may stand for many deaths; a buffer of one loses none, as
	// each collects all there are.
	children := make(chan os.Signal, 1)
	signal.Notify(children, syscall.SIGCHLD)
	for {
		for s.reapOne() {
		}
		<-children
	}
}

func (s *supervisor) reapOne() bool {
	var ws syscall.WaitStatus
	s.mu.Lock()
	defer s.mu.Unlock()
	pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil)
	if errors.Is(err, syscall.EINTR) {
		return true
	}
	if err != nil || pid <= 0 {
		return false
	}
	p := s.running[pid]
	if p == nil {
		return true // an orphan
	}
	p.exit = &ExitStatus{Code: ws.ExitStatus()}
	if ws.Signaled() {
		p.exit = &ExitStatus{Code: -1, Signal: ws.Signal()}
	}
	delete(s.running, pid)
	close(p.done)
	return true
}

// start starts a process in a session of its own.
func (s *supervisor) start(req request, files []uintptr) (*process, error) {
	path, err := findProgram(req.Args[0])
	if err != nil {
		return nil, err
	}
	dir := req.Dir
	if dir == "" {
		dir = "/"
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.named[req.Name]; old != nil && s.running[old.pid] == old {
		return nil, fmt.Errorf("process %q already runs as %d", req.Name, old.pid)
	}
	pid, err := syscall.ForkExec(path, req.Args, &syscall.ProcAttr{
		Dir: dir, Env: req.Env, Files: files, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return nil, fmt.Errorf("start %s in %s: %w", path, dir, err)
	}
	p := &process{name: req.Name, args: req.Args, pid: pid, done: make(chan struct{})}
	s.running[pid] = p
	if p.name != "" {
		s.named[p.name] = p
	}
	return p, nil
}

// run runs one of the machine's own programs to its end.
func (s *supervisor) run(args ...string) error {
	out, err := os.CreateTemp("", "init-*")
	if err != nil {
		return err
	}
	defer out.Close()
	os.Remove(out.Name())
	p, err := s.start(request{Args: args, Env: os.Environ()}, []uintptr{0, out.Fd(), out.Fd()})
	if err != nil {
		return err
	}
	<-p.done
	if *p.exit == (ExitStatus{}) {
		return nil
	}
	text := make([]byte, 4096)
	n, _ := out.ReadAt(text, 0)
	return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), p.exit, strings.TrimSpace(string(text[:n])))
}

// serve answers the host until pid 1 is killed.
func (s *supervisor) serve(l *net.UnixListener) error {
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			return fmt.Errorf("accept on the control socket: %w", err)
		}
		go func() {
			defer conn.Close()
			s.handle(conn)
		}()
	}
}

func (s *supervisor) handle(conn *net.UnixConn) {
	buf, oob := make([]byte, maxMessage), make([]byte, syscall.CmsgSpace(3*4))
	n, oobn, _, _, err := conn.ReadMsgUnix(buf, oob)
	if err != nil || n == 0 {
		return
	}
	files := receivedFiles(oob[:oobn])
	var req request
	err = json.Unmarshal(buf[:n], &req)
	var p *process
	var resp response
	switch {
	case err != nil:
	case req.Op == "start" && len(files) == 3 && len(req.Args) > 0:
		p, err = s.start(req, []uintptr{files[0].Fd(), files[1].Fd(), files[2].Fd()})
	case req.Op == "wait":
		p, err = s.find(req.Name)
	case req.Op == "signal":
		err = s.signal(req.PID, syscall.Signal(req.Signal))
	case req.Op == "list":
		resp.Procs = s.list()
	default:
		err = fmt.Errorf("malformed request %q", req.Op)
	}
	for _, f := range files {
		f.Close()
	}
	if err != nil {
		resp.Error = err.Error()
	}
	if p == nil {
		send(conn, resp)
		return
	}
	resp.PID = p.pid
	send(conn, resp)

	hungUp := make(chan struct{})
	go func() { // ends at the latest when handle's caller closes conn
		defer close(hungUp)
		conn.Read(make([]byte, 1))
	}()
	select {
	case <-p.done:
		send(conn, response{Exit: p.exit})
	case <-hungUp:
		if req.Op == "start" && !req.Detach {
			s.signal(p.pid, syscall.SIGKILL) // fails when it has just ended
		}
	}
}

func (s *supervisor) find(name string) (*process, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.named[name]
	if p == nil || s.running[p.pid] != p {
		return nil, errors.New("no such process runs")
	}
	return p, nil
}

// signal sends sig to one of the processes that pid 1 started. As only
// reapOne frees pids, and needs the lock, pid cannot be a stranger's.
func (s *supervisor) signal(pid int, sig syscall.Signal) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.running[pid] == nil {
		return syscall.ESRCH
	}
	return syscall.Kill(pid, sig)
}

func (s *supervisor) list() []ProcStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []ProcStatus
	for _, p := range s.named {
		all = append(all, ProcStatus{Name: p.name, PID: p.pid, Args: p.args, Exit: p.exit})
	}
	slices.SortFunc(all, func(a, b ProcStatus) int { return strings.Compare(a.Name, b.Name) })
	return all
}

func send(conn *net.UnixConn, resp response) {
	data, err := json.Marshal(resp)
	if err == nil {
		_, err = conn.Write(data)
	}
	if err != nil && !errors.Is(err, syscall.EPIPE) {
		fmt.Fprintln(os.Stderr, "machine: answer the host:", err)
	}
}

func receivedFiles(oob []byte) []*os.File {
	messages, err := syscall.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	var files []*os.File
	for _, m := range messages {
		fds, err := syscall.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			syscall.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "stream"))
		}
	}
	return files
}

func findProgram(name string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	for dir := range strings.SplitSeq(strings.TrimPrefix(pathEnv, "PATH="), ":") {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s: %w in the machine's PATH", name, exec.ErrNotFound)
}
