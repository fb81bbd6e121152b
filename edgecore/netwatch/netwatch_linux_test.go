package netwatch

import (
	"bytes"
	"context"
	"encoding/binary"
	"os"
	"os/exec"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A link that comes up in a network namespace of its own is told, a burst of
// notices once, and the watch ends with its context.
func TestALinkThatComesUpIsTold(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test makes a network namespace: run it as root")
	}
	socket, ip := inNamespace(t)
	told := make(chan time.Time, 100)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- watch(ctx, socket, func(int) string { return "eth0" }, func() { told <- time.Now() })
	}()
	next := func(what string) {
		t.Helper()
		select {
		case <-told:
		case <-time.After(10 * time.Second):
			t.Fatalf("%s was not told", what)
		}
	}
	ip("link", "add", "e0", "type", "veth", "peer", "name", "e1")
	ip("link", "set", "e1", "up")
	began := time.Now()
	ip("link", "set", "e0", "up")
	next("the carrier")
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("told after %v", took)
	}
	for len(told) > 0 {
		<-told
	}
	ip("addr", "add", "192.0.2.2/24", "dev", "e0")
	next("the address")
	ip("route", "add", "default", "via", "192.0.2.1")
	next("the default route")
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the watch does not end")
	}
}

// inNamespace opens a socket in a new network namespace and runs ip in it.
func inNamespace(t *testing.T) (*os.File, func(args ...string)) {
	t.Helper()
	type opened struct {
		socket *os.File
		err    error
	}
	made, commands, answers := make(chan opened, 1), make(chan []string), make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread goes with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		var socket *os.File
		if err == nil {
			socket, err = open()
		}
		made <- opened{socket, err}
		for args := range commands {
			answers <- exec.Command("ip", args...).Run()
		}
	}()
	m := <-made
	if m.err != nil {
		t.Fatal(m.err)
	}
	t.Cleanup(func() { close(commands) })
	return m.socket, func(args ...string) {
		t.Helper()
		commands <- args
		if err := <-answers; err != nil {
			t.Fatalf("ip %v: %v", args, err)
		}
	}
}

func notice(kind uint16, body []byte) []byte {
	b := append(make([]byte, unix.SizeofNlMsghdr, 64), body...)
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	binary.NativeEndian.PutUint16(b[4:], kind)
	return b
}

func link(flags uint32) []byte {
	b := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(b[4:], 3)
	binary.NativeEndian.PutUint32(b[8:], flags)
	return b
}

func TestWhatIsTold(t *testing.T) {
	route := make([]byte, unix.SizeofRtMsg)
	subnet := bytes.Clone(route)
	subnet[1] = 24
	address := make([]byte, unix.SizeofIfAddrmsg)
	for _, c := range []struct {
		name   string
		notice []byte
		device string
		want   bool
	}{
		{"a carrier", notice(unix.RTM_NEWLINK, link(unix.IFF_UP|unix.IFF_RUNNING)), "eth0", true},
		{"no carrier", notice(unix.RTM_NEWLINK, link(unix.IFF_UP)), "eth0", false},
		{"a pod's link", notice(unix.RTM_NEWLINK, link(unix.IFF_RUNNING)), "veth123", false},
		{"a link that has gone since", notice(unix.RTM_NEWLINK, link(unix.IFF_RUNNING)), "", false},
		{"an address", notice(unix.RTM_NEWADDR, address), "wwan0", true},
		{"a pod's address", notice(unix.RTM_NEWADDR, address), "cni0", false},
		{"a default route", notice(unix.RTM_NEWROUTE, route), "", true},
		{"a route to a subnet", notice(unix.RTM_NEWROUTE, subnet), "", false},
		{"a link that goes", notice(unix.RTM_DELLINK, link(unix.IFF_RUNNING)), "eth0", false},
		{"the second of two", append(notice(unix.RTM_NEWROUTE, subnet), notice(unix.RTM_NEWROUTE, route)...), "", true},
		{"a notice cut off", notice(unix.RTM_NEWLINK, link(unix.IFF_RUNNING))[:20], "eth0", false},
	} {
		if got := tells(c.notice, func(int) string { return c.device }); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

func FuzzNotices(f *testing.F) {
	f.Add(notice(unix.RTM_NEWLINK, link(unix.IFF_RUNNING)))
	f.Add(notice(unix.RTM_NEWADDR, nil))
	f.Fuzz(func(_ *testing.T, b []byte) { tells(b, func(int) string { return "eth0" }) })
}
