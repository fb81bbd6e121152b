// Package netwatch tells when the machine's network has changed: a carrier that
// came back, an address, a route. It listens to the kernel's own notices
// (rtnetlink), which cost nothing while nothing changes.
//
// It never changes the network, and says nothing of what has changed: whoever
// cares looks. The network of pods, which changes with every pod, is not told.
package netwatch

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// settle is how long notices are gathered into one: a carrier, its addresses
// and its routes come together.
const settle = 200 * time.Millisecond

// Run calls changed after each change until ctx ends.
func Run(ctx context.Context, changed func()) error {
	socket, err := open()
	if err != nil {
		return fmt.Errorf("watch the network: %w", err)
	}
	if err := watch(ctx, socket, interfaceName, changed); err != nil {
		return fmt.Errorf("watch the network: %w", err)
	}
	return nil
}

func open() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open a netlink socket: %w", err)
	}
	const groups = unix.RTMGRP_LINK | unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR | unix.RTMGRP_IPV4_ROUTE | unix.RTMGRP_IPV6_ROUTE
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		return nil, errors.Join(fmt.Errorf("bind the netlink socket: %w", err), unix.Close(fd))
	}
	// A file, so that the runtime's poller waits and Close ends the wait.
	return os.NewFile(uintptr(fd), "rtnetlink"), nil
}

// watch reads notices from socket, which it closes.
func watch(ctx context.Context, socket *os.File, name func(index int) string, changed func()) error {
	defer socket.Close()
	defer context.AfterFunc(ctx, func() { socket.Close() })()
	buf := make([]byte, 32<<10)
	for {
		n, err := socket.Read(buf)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS): // notices were lost: something has changed
		case err != nil:
			return err
		case !tells(buf[:n], name):
			continue
		}
		timer := time.NewTimer(settle)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
		drain(socket, buf)
		changed()
	}
}

// drain drops what came meanwhile: it is told with what was seen.
func drain(socket *os.File, buf []byte) {
	if socket.SetReadDeadline(time.Now()) != nil {
		return
	}
	defer socket.SetReadDeadline(time.Time{})
	for range 1000 {
		if _, err := socket.Read(buf); err != nil {
			return
		}
	}
}

func interfaceName(index int) string {
	i, err := net.InterfaceByIndex(index)
	if err != nil {
		return ""
	}
	return i.Name
}

// tells reports whether one of the notices is about a way out that may be new.
func tells(b []byte, name func(index int) string) bool {
	for len(b) >= unix.SizeofNlMsghdr {
		size := int(binary.NativeEndian.Uint32(b))
		if size < unix.SizeofNlMsghdr || size > len(b) {
			return false
		}
		if matters(binary.NativeEndian.Uint16(b[4:]), b[unix.SizeofNlMsghdr:size], name) {
			return true
		}
		b = b[min((size+3)&^3, len(b)):]
	}
	return false
}

func matters(kind uint16, body []byte, name func(index int) string) bool {
	var index int
	switch kind {
	case unix.RTM_NEWLINK:
		if len(body) < unix.SizeofIfInfomsg {
			return false
		}
		if flags := binary.NativeEndian.Uint32(body[8:]); flags&unix.IFF_RUNNING == 0 {
			return false
		}
		index = int(int32(binary.NativeEndian.Uint32(body[4:])))
	case unix.RTM_NEWADDR:
		if len(body) < unix.SizeofIfAddrmsg {
			return false
		}
		index = int(binary.NativeEndian.Uint32(body[4:]))
	case unix.RTM_NEWROUTE:
		return len(body) >= unix.SizeofRtMsg && body[1] == 0 // a default route
	default:
		return false
	}
	// A link that is no way out: loopback, and those of pods.
	n := name(index)
	for _, prefix := range []string{"lo", "veth", "cni", "cali", "docker", "br-"} {
		if strings.HasPrefix(n, prefix) {
			return false
		}
	}
	return n != ""
}
