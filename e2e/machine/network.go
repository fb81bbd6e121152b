package machine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"time"
)

// LinkCut says how the machine loses its network.
type LinkCut int

const (
	// LinkDown pulls the cable: both ends see the carrier go.
	LinkDown LinkCut = iota
	// LinkBlackhole keeps the carrier and loses every packet both ways, as a
	// dead router on the way does: connections become half open.
	LinkBlackhole
)

// IP returns the machine's address, as the host reaches it.
func (m *Machine) IP() string { return fmt.Sprintf("10.199.%d.2", m.cfg.Index) }

// HostIP returns the host's address, as the machine reaches it. It exists from
// Prepare or the first Start until Destroy, also while the machine is off.
func (m *Machine) HostIP() string { return fmt.Sprintf("10.199.%d.1", m.cfg.Index) }

// PodSubnet returns the network of the machine's pods.
func (m *Machine) PodSubnet() string { return fmt.Sprintf("10.200.%d.0/24", m.cfg.Index) }

// Index returns the number that picked the networks.
func (m *Machine) Index() int { return m.cfg.Index }

const (
	bridgePrefix   = "skbr"
	hostLinkPrefix = "skve"
)

func (m *Machine) bridge() string   { return fmt.Sprint(bridgePrefix, m.cfg.Index) }
func (m *Machine) hostLink() string { return fmt.Sprint(hostLinkPrefix, m.cfg.Index) }

// Prepare makes the host's end of the network, so that a server can listen on
// HostIP before the machine is on. Start does it otherwise.
func (m *Machine) Prepare(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.prepareLocked(ctx)
}

func (m *Machine) prepareLocked(ctx context.Context) error {
	if m.prepared {
		return nil
	}
	// Ours by the index lock: what is there was left by a process that died.
	if err := m.removeBridge(ctx); err != nil {
		return err
	}
	for _, args := range [][]string{
		// Its address is its own, or it would change with the links on it, and
		// the machine would go on sending to the one before.
		{"link", "add", m.bridge(), "address", fmt.Sprintf("02:73:6b:62:72:%02x", m.cfg.Index), "type", "bridge", "forward_delay", "0"},
		{"addr", "add", m.HostIP() + "/30", "dev", m.bridge()},
		{"link", "set", m.bridge(), "up"},
		{"route", "add", m.PodSubnet(), "via", m.IP(), "dev", m.bridge()},
	} {
		if err := ip(ctx, args...); err != nil {
			return fmt.Errorf("machine %s: prepare the network: %w", m.cfg.Name, err)
		}
	}
	m.prepared = true
	return nil
}

// connectLink gives the network namespace of pid its eth0.
func (m *Machine) connectLink(ctx context.Context, pid int) error {
	if err := ip(ctx, "link", "add", m.hostLink(), "type", "veth", "peer", "name", "eth0", "netns", fmt.Sprint(pid)); err != nil {
		return err
	}
	return ip(ctx, "link", "set", m.hostLink(), "master", m.bridge(), "up")
}

// CutLink takes the machine's network away until RestoreLink.
func (m *Machine) CutLink(ctx context.Context, how LinkCut) error {
	m.linkMu.Lock()
	defer m.linkMu.Unlock()
	if how == LinkBlackhole {
		m.unshapeLocked()
	}
	args := []string{"link", "set", m.hostLink(), "down"}
	if how == LinkBlackhole {
		// Without its bridge, the host's end must not answer for the host.
		args = []string{"link", "set", m.hostLink(), "nomaster", "arp", "off"}
	}
	if err := ip(ctx, args...); err != nil {
		return fmt.Errorf("machine %s: cut the link: %w", m.cfg.Name, err)
	}
	return nil
}

// RestoreLink undoes CutLink and ShapeLink.
func (m *Machine) RestoreLink(ctx context.Context) error {
	m.linkMu.Lock()
	defer m.linkMu.Unlock()
	m.unshapeLocked()
	if err := ip(ctx, "link", "set", m.hostLink(), "master", m.bridge(), "arp", "on", "up"); err != nil {
		return fmt.Errorf("machine %s: restore the link: %w", m.cfg.Name, err)
	}
	return nil
}

// removeLink takes away the veth pair. Left alone it would go with the network
// namespace, which connections to a peer out of reach keep for minutes.
func (m *Machine) removeLink(ctx context.Context) error {
	m.linkMu.Lock()
	defer m.linkMu.Unlock()
	m.unshapeLocked()
	if err := ip(ctx, "link", "del", m.hostLink()); err != nil && linkExists(m.hostLink()) {
		return fmt.Errorf("machine %s: remove link %s: %w", m.cfg.Name, m.hostLink(), err)
	}
	return nil
}

// awaitLinkGone waits until the kernel has taken away the veth pair: it does
// so some time after the last process in the network namespace has gone.
func (m *Machine) awaitLinkGone(ctx context.Context) error {
	err := poll(ctx, 20*time.Second, func() (bool, error) { return !linkExists(m.hostLink()), nil })
	if err != nil {
		return fmt.Errorf("machine %s: link %s is still there after power off: %w", m.cfg.Name, m.hostLink(), err)
	}
	return nil
}

func (m *Machine) removeBridge(ctx context.Context) error {
	for _, link := range []string{m.hostLink(), m.bridge()} {
		if !linkExists(link) {
			continue
		}
		if err := ip(ctx, "link", "del", link); err != nil && linkExists(link) {
			return fmt.Errorf("machine %s: remove link %s: %w", m.cfg.Name, link, err)
		}
	}
	m.prepared = false
	return nil
}

func linkIndex(name string) (int, error) {
	l, err := net.InterfaceByName(name)
	if err != nil {
		return 0, fmt.Errorf("link %s: %w", name, err)
	}
	return l.Index, nil
}

func linkExists(name string) bool {
	_, err := os.Lstat("/sys/class/net/" + name)
	return err == nil
}

func ip(ctx context.Context, args ...string) error {
	_, err := output(ctx, "ip", args...)
	return err
}

// output runs a program of the host and returns what it printed; its error
// carries the command and what it said.
func output(ctx context.Context, name string, args ...string) ([]byte, error) {
	path, err := lookPath(name)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path, args...)
	var out, msg bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &msg
	if err := cmd.Run(); err != nil {
		return out.Bytes(), fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(msg.Bytes()))
	}
	return out.Bytes(), nil
}

// lookPath also looks where a user's PATH often does not lead.
func lookPath(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if p, err := exec.LookPath(dir + "/" + name); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s is not installed; run `make deps`", name)
}

var errTimeout = errors.New("timed out")

// poll asks until done says yes, an error comes, ctx ends or limit has passed.
func poll(ctx context.Context, limit time.Duration, done func() (bool, error)) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, errTimeout)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		ok, err := done()
		if ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
}
