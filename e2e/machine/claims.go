package machine

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
)

const maxIndex = 250

// Claims keep two machines of one host apart: no two have the same index, and
// so networks, or the same name, and so cgroups. A claim is an abstract unix
// socket, which leaves no file behind; it is held by the Machine and by its
// pid 1, whichever lives longer.
const (
	claimPrefix = "@skerry-machine-"
	claimIndex  = claimPrefix + "index-"
	claimName   = claimPrefix + "name-"
)

// claim reserves the machine's name and index, an unused one if it has none.
func (m *Machine) claim() error {
	if m.cfg.Index < 0 || m.cfg.Index > maxIndex {
		return fmt.Errorf("machine %s: index %d is not in 1..%d", m.cfg.Name, m.cfg.Index, maxIndex)
	}
	name, err := net.Listen("unix", claimName+m.cfg.Name)
	if err != nil {
		return fmt.Errorf("machine %s: the name is in use by another machine on this host", m.cfg.Name)
	}
	first, last := m.cfg.Index, m.cfg.Index
	if m.cfg.Index == 0 {
		first, last = 1, maxIndex
	}
	for i := first; i <= last; i++ {
		index, err := net.Listen("unix", fmt.Sprint(claimIndex, i))
		if err == nil {
			m.claims, m.cfg.Index = []net.Listener{name, index}, i
			return nil
		}
	}
	name.Close()
	if m.cfg.Index != 0 {
		return fmt.Errorf("machine %s: index %d is in use by another machine on this host", m.cfg.Name, m.cfg.Index)
	}
	return fmt.Errorf("machine %s: all %d indexes are in use on this host", m.cfg.Name, maxIndex)
}

func (m *Machine) dropClaims() {
	for _, c := range m.claims {
		c.Close()
	}
	m.claims = nil
}

// claimFiles returns the claims for pid 1 to hold as well.
func (m *Machine) claimFiles() ([]*os.File, error) {
	if m.claims == nil { // the machine was found running, and has been powered off since
		if err := m.claim(); err != nil {
			return nil, err
		}
	}
	var files []*os.File
	var failed error
	for _, c := range m.claims {
		f, err := c.(*net.UnixListener).File()
		failed = errors.Join(failed, err)
		files = append(files, f)
	}
	return files, failed
}

// othersClaims returns the claims that are held on this host, but not by this
// process.
func othersClaims() (map[string]bool, error) {
	table, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		return nil, err
	}
	own := map[string]bool{}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil, err
	}
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil {
			own[to] = true
		}
	}
	claims := map[string]bool{}
	for line := range bytes.Lines(table) {
		// Num RefCount Protocol Flags Type St Inode Path
		fields := strings.Fields(string(line))
		if len(fields) == 8 && strings.HasPrefix(fields[7], claimPrefix) && !own["socket:["+fields[6]+"]"] {
			claims[fields[7]] = true
		}
	}
	return claims, nil
}
