package kubeletproxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/skerry-io/skerry/tunnel"
)

var (
	_ halfCloser = (*tunnel.Stream)(nil)
	_ resetter   = (*tunnel.Stream)(nil)
)

// copyBuffer is what one direction of one connection holds in this process
// besides the socket's and the stream's own buffers.
const copyBuffer = 16 << 10 // a TLS record

// connection is one connection of the API server to one node.
type connection struct {
	ip       netip.Addr
	raw      *net.UnixConn // this end of the socket pair
	tls      *tls.Conn     // over raw
	upstream net.Conn      // the stream to the node

	once sync.Once
}

// halfCloser is a connection whose sending side can be closed alone.
type halfCloser interface{ CloseWrite() error }

// resetter is a stream that can be ended so that its peer does not take the
// end for a clean one.
type resetter interface{ Reset(code uint32) error }

// serve copies until both directions have ended, or either has failed. A
// clean end of one direction closes that direction at the other end; a
// failure ends both at once and unclean, so that a cut answer is never taken
// for a whole one.
func (c *connection) serve(handshake time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), handshake)
	err := c.tls.HandshakeContext(ctx)
	cancel()
	if err != nil {
		c.abort()
		return fmt.Errorf("TLS handshake with the API server: %w", err)
	}
	up := make(chan error, 1)
	go func() { up <- c.send() }()
	err = c.receive()
	if err != nil {
		c.abort()
	}
	if e := <-up; err == nil {
		err = e
	}
	c.finish()
	return err
}

// send copies what the API server sends to the node.
func (c *connection) send() error {
	if _, err := io.CopyBuffer(onlyWriter{c.upstream}, onlyReader{c.tls}, make([]byte, copyBuffer)); err != nil {
		c.abort()
		return fmt.Errorf("from the API server: %w", err)
	}
	// The client said goodbye. If its socket has ended too it is gone, not
	// half closed, and a node that streams to it (logs -f) must hear so now
	// and not at its next write.
	if gone(c.raw) {
		c.abort()
		return nil
	}
	return closeWrite(c.upstream)
}

// receive copies what the node sends to the API server.
func (c *connection) receive() error {
	if _, err := io.CopyBuffer(onlyWriter{c.tls}, onlyReader{c.upstream}, make([]byte, copyBuffer)); err != nil {
		return fmt.Errorf("from the node: %w", err)
	}
	return c.tls.CloseWrite()
}

// gone waits for the raw socket to say something after TLS has ended: a
// client that only closed its sending side stays silent until it goes.
func gone(raw *net.UnixConn) bool {
	var b [1]byte
	_, err := raw.Read(b[:])
	return errors.Is(err, io.EOF)
}

// abort ends both sides at once. The API server sees its connection break
// without TLS's goodbye.
func (c *connection) abort() {
	c.once.Do(func() {
		if r, ok := c.upstream.(resetter); ok {
			r.Reset(tunnel.CodeCancelled) //nolint:errcheck // closed below in any case
		}
		c.upstream.Close()
		c.raw.Close()
	})
}

// finish closes both sides after a clean end.
func (c *connection) finish() {
	c.once.Do(func() {
		c.upstream.Close()
		c.tls.Close()
	})
}

func closeWrite(c net.Conn) error {
	if h, ok := c.(halfCloser); ok {
		return h.CloseWrite()
	}
	return nil
}

// onlyReader and onlyWriter keep io.CopyBuffer to its buffer: a ReadFrom or
// WriteTo of either end would bring one of its own.
type onlyReader struct{ io.Reader }
type onlyWriter struct{ io.Writer }

// socketPair is a connection within this process. A pipe in memory would have
// no buffer: its two ends can wait for each other's writes for ever, as an
// HTTP client that writes its request does while TLS still writes to it.
func socketPair() (net.Conn, *net.UnixConn, error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a socket pair: %w", err)
	}
	a, errA := unixConn(fds[0])
	b, errB := unixConn(fds[1])
	if err := errors.Join(errA, errB); err != nil {
		if a != nil {
			a.Close()
		}
		if b != nil {
			b.Close()
		}
		return nil, nil, fmt.Errorf("make a socket pair: %w", err)
	}
	return a, b, nil
}

func unixConn(fd int) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), "kubelet connection")
	defer f.Close() // FileConn has its own copy
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return c.(*net.UnixConn), nil
}
