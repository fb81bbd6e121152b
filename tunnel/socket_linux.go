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
	fds [1]unix.PollFd
	ok  bool

	queued int
	info   *unix.TCPInfo

	// Made once, as a closure for each question would be allocated.
	ask, askQueue, askInfo func(fd uintptr)
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
	p.askQueue = func(fd uintptr) {
		n, err := unix.IoctlGetInt(int(fd), unix.SIOCOUTQ)
		p.queued, p.ok = n, err == nil
	}
	p.askInfo = func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		p.info, p.ok = info, err == nil
	}
	return p
}

// outstanding is how many bytes the socket holds that the peer has not
// acknowledged.
func (p *probe) outstanding() int {
	p.ok = false
	if p.rc.Control(p.askQueue) != nil || !p.ok {
		return 0
	}
	return p.queued
}

// path is what TCP knows of the way to the peer: the least round trip and the
// bytes a second it delivers.
func (p *probe) path() (minRTT time.Duration, rate float64, ok bool) {
	p.ok = false
	if p.rc.Control(p.askInfo) != nil || !p.ok {
		return 0, 0, false
	}
	return time.Duration(p.info.Min_rtt) * time.Microsecond, float64(p.info.Delivery_rate), true
}

// writable is called by one goroutine at a time: Session.mu is held.
func (p *probe) writable() bool {
	p.ok = false
	return p.rc.Control(p.ask) == nil && p.ok
}
