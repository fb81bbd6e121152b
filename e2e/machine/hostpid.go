package machine

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// HostPID returns the process's id on the host, to read its /proc there.
func (p *Proc) HostPID() (int, error) {
	p.m.mu.Lock()
	b := p.m.boot
	p.m.mu.Unlock()
	if b == nil {
		return 0, fmt.Errorf("machine %s is off", p.m.cfg.Name)
	}
	ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", b.pid))
	if err != nil {
		return 0, fmt.Errorf("machine %s: %w", p.m.cfg.Name, err)
	}
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return 0, err
	}
	for _, dir := range procs {
		if its, err := os.Readlink(dir + "/ns/pid"); err != nil || its != ns {
			continue // another's, or it has just ended
		}
		if insidePID(dir) == p.pid {
			return strconv.Atoi(filepath.Base(dir))
		}
	}
	return 0, fmt.Errorf("machine %s: no process %d", p.m.cfg.Name, p.pid)
}

// insidePID reads the id that a process has in its own pid namespace.
func insidePID(dir string) int {
	status, err := os.ReadFile(dir + "/status")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(status)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "NSpid:" {
			pid, _ := strconv.Atoi(f[len(f)-1])
			return pid
		}
	}
	return 0
}
