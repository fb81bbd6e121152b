package tunnel

import (
	"errors"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// userTimeout is how long sent data may stay unacknowledged.
	userTimeout = 20 * time.Second

	// notSentLowat bounds what waits in the kernel beyond what is on the way:
	// what the scheduler has let go it cannot overtake.
	notSentLowat = 32 << 10
)

// tuneConn sets the socket options. TCP keepalive is off as the session's own
// pings cost a quarter of its bytes and are seen by the peer's program.
func tuneConn(c net.Conn) error {
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return nil
	}
	errs := []error{tcp.SetKeepAlive(false), tcp.SetNoDelay(true)}
	rc, err := tcp.SyscallConn()
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	err = rc.Control(func(fd uintptr) {
		errs = append(errs,
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(userTimeout/time.Millisecond)),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, notSentLowat))
	})
	return errors.Join(append(errs, err)...)
}

// probe asks a socket whether a write would be taken at once.
type probe struct {
	rc  syscall.RawConn
	ask func(fd uintptr) // made once; a closure for each question would be allocated
	fds [1]unix.PollFd
	ok  bool
}

func newProbe(c net.Conn) *probe {
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return nil
	}
	rc, err := tcp.SyscallConn()
	if err != nil {
		return nil
	}
	p := &probe{rc: rc}
	p.ask = func(fd uintptr) {
		p.fds[0] = unix.PollFd{Fd: int32(fd), Events: unix.POLLOUT}
		n, err := unix.Poll(p.fds[:], 0)
		p.ok = err == nil && n == 1 && p.fds[0].Revents&unix.POLLOUT != 0
	}
	return p
}

// writable is called by one goroutine at a time: Session.mu is held.
func (p *probe) writable() bool {
	p.ok = false
	return p.rc.Control(p.ask) == nil && p.ok
}
