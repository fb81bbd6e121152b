package machine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/skerry-io/skerry/e2e/netem"
)

const wirePrefix = "skwi"

func (m *Machine) wireLink() string { return fmt.Sprint(wirePrefix, m.cfg.Index) }

// wire stands between the bridge and the machine's link while the link is
// shaped: its lines carry whole Ethernet frames between the host's end of the
// veth pair, which has left the bridge, and a TAP device that has taken its
// place there.
type wire struct {
	machine, bridge *os.File
	up, down        *netem.Line // from the machine, to the machine
	lines           sync.WaitGroup
}

// ShapeLink lets packets from the machine (up) and to it (down) fare as the
// shapes say, until RestoreLink or PowerOff; it undoes CutLink and any shape
// before. A Loss of 1 one way makes a link of which one end hears nothing and
// the other all. The same packets are lost for the same seed.
func (m *Machine) ShapeLink(ctx context.Context, up, down netem.Shape, seed uint64) error {
	m.linkMu.Lock()
	defer m.linkMu.Unlock()
	if err := m.shapeLocked(ctx, up, down, seed); err != nil {
		return fmt.Errorf("machine %s: shape the link: %w", m.cfg.Name, err)
	}
	return nil
}

func (m *Machine) shapeLocked(ctx context.Context, up, down netem.Shape, seed uint64) error {
	if m.wire == nil {
		w, err := m.newWire(ctx, netem.NewLine(up, seed), netem.NewLine(down, seed+1))
		if err != nil {
			return err
		}
		m.wire = w
	}
	m.wire.up.Set(up)
	m.wire.down.Set(down)
	return ip(ctx, "link", "set", m.hostLink(), "up")
}

// LinkStats tells how many packets a shaped link has carried and lost, each
// way; zero when it is not shaped.
func (m *Machine) LinkStats() (carried, lost uint64) {
	m.linkMu.Lock()
	defer m.linkMu.Unlock()
	if m.wire == nil {
		return 0, 0
	}
	c1, l1 := m.wire.up.Stats()
	c2, l2 := m.wire.down.Stats()
	return c1 + c2, l1 + l2
}

func (m *Machine) newWire(ctx context.Context, up, down *netem.Line) (_ *wire, err error) {
	// A frame is what the network would carry: the machine must not hand over
	// 64 KiB at once, as a veth pair lets it.
	if _, err := m.Run(ctx, "ip", "link", "set", "eth0", "gso_max_segs", "1"); err != nil {
		return nil, err
	}
	// Without its bridge, the host's end must not answer for the host.
	if err := ip(ctx, "link", "set", m.hostLink(), "nomaster", "arp", "off", "up"); err != nil {
		return nil, err
	}
	w := &wire{up: up, down: down}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	if w.machine, err = openPacketSocket(m.hostLink()); err != nil {
		return nil, err
	}
	if w.bridge, err = openTAP(m.wireLink()); err != nil {
		return nil, err
	}
	if err := ip(ctx, "link", "set", m.wireLink(), "master", m.bridge(), "up"); err != nil {
		return nil, err
	}
	w.lines.Go(func() { up.Carry(w.machine, w.bridge) })
	w.lines.Go(func() { down.Carry(w.bridge, w.machine) })
	return w, nil
}

// unshapeLocked takes the wire away; the link is then nowhere, until
// RestoreLink puts it on the bridge again. The caller holds linkMu.
func (m *Machine) unshapeLocked() {
	if m.wire != nil {
		m.wire.close()
		m.wire = nil
	}
}

func (w *wire) close() {
	for _, f := range []*os.File{w.machine, w.bridge} {
		if f != nil {
			f.Close() // the TAP device goes with its file
		}
	}
	w.lines.Wait()
}

// Both files carry a virtio-net header before each frame, the same for both:
// checksums that the kernel has left to the device stay so.

func openPacketSocket(link string) (*os.File, error) {
	const all = uint16(unix.ETH_P_ALL>>8 | unix.ETH_P_ALL&0xff<<8) // in network order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("packet socket: %w", err)
	}
	index, err := linkIndex(link)
	err = errors.Join(err,
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1),
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: index}))
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("packet socket on %s: %w", link, err)
	}
	return os.NewFile(uintptr(fd), link), nil
}

func openTAP(link string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	req, err := unix.NewIfreq(link)
	if err == nil {
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("make TAP device %s: %w", link, err)
	}
	return os.NewFile(uintptr(fd), link), nil
}
