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
	"sync/atomic"
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

	once   sync.Once
	failed atomic.Pointer[error] // set when the end is not a clean one
}

// clientEnd is what the API server holds. TLS takes a connection that just
// ends for one that was closed; here it fails with the reason instead.
type clientEnd struct {
	net.Conn
	served *connection
}

func (c *clientEnd) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if errors.Is(err, io.EOF) {
		if why := c.served.failed.Load(); why != nil {
			return n, *why
		}
	}
	return n, err
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
		err = fmt.Errorf("TLS handshake with the API server: %w", err)
		c.abort(err)
		return err
	}
	sent := make(chan error, 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		err := c.send()
		sent <- err
		// A client that said goodbye may go on reading. If its socket has
		// ended too it is gone, and a node that streams to it (logs -f) must
		// hear so now and not at its next write.
		if err == nil && gone(c.raw) {
			c.abort(errors.New("the client has gone"))
		}
	})
	err = c.receive()
	if e := <-sent; err == nil {
		err = e
	}
	c.finish()
	wg.Wait()
	return err
}

// send copies what the API server sends to the node.
func (c *connection) send() error {
	_, err := io.CopyBuffer(onlyWriter{c.upstream}, onlyReader{c.tls}, make([]byte, copyBuffer))
	if err == nil {
		err = closeWrite(c.upstream)
	}
	if err != nil {
		err = fmt.Errorf("send to the node: %w", err)
		c.abort(err)
	}
	return err
}

// receive copies what the node sends to the API server.
func (c *connection) receive() error {
	_, err := io.CopyBuffer(onlyWriter{c.tls}, onlyReader{c.upstream}, make([]byte, copyBuffer))
	if err == nil {
		err = c.tls.CloseWrite()
	}
	if err != nil {
		err = fmt.Errorf("receive from the node: %w", err)
		c.abort(err)
	}
	return err
}

// gone waits for the raw socket's end after TLS has ended: a client that only
// closed its sending side keeps it open until it goes.
func gone(raw *net.UnixConn) bool {
	var b [1]byte
	_, err := raw.Read(b[:])
	return errors.Is(err, io.EOF)
}

// abort ends both sides at once; the API server's end fails with why.
func (c *connection) abort(why error) {
	c.once.Do(func() {
		c.failed.Store(&why)
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
