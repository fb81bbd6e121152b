package mqtt

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"
)

const (
	connectTimeout = 10 * time.Second
	writeTimeout   = 10 * time.Second
)

// dial opens the connection to a broker. Over TLS its certificate is verified,
// whatever the configuration is.
func dial(ctx context.Context, u *url.URL, cfg *ExternalConfig) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	dialer := &net.Dialer{}
	secure := u.Scheme != "mqtt" && u.Scheme != "tcp" && u.Scheme != "ws"
	var tlsConfig *tls.Config
	if secure {
		var err error
		if tlsConfig, err = clientTLS(u.Hostname(), cfg); err != nil {
			return nil, err
		}
	}
	switch {
	case u.Scheme == "ws" || u.Scheme == "wss":
		return paho.NewWebsocket(u.String(), tlsConfig, connectTimeout, http.Header{}, nil)
	case secure:
		return (&tls.Dialer{NetDialer: dialer, Config: tlsConfig}).DialContext(ctx, "tcp", u.Host)
	}
	return dialer.DialContext(ctx, "tcp", u.Host)
}

func clientTLS(host string, cfg *ExternalConfig) (*tls.Config, error) {
	c := &tls.Config{ServerName: host, MinVersion: tls.VersionTLS12}
	if cfg.CAFile != "" {
		pem, err := os.ReadFile(cfg.CAFile)
		if err != nil {
			return nil, fmt.Errorf("the MQTT broker's CA: %w", err)
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("the MQTT broker's CA: there is no certificate in %s", cfg.CAFile)
		}
	}
	if cfg.CertFile != "" {
		cert, err := tls.LoadX509KeyPair(cfg.CertFile, cfg.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("the client certificate for the MQTT broker: %w", err)
		}
		c.Certificates = []tls.Certificate{cert}
	}
	return c, nil
}

// packetConn stands between the network and the client library, which takes
// whatever length a packet says it has, up to 256 MiB, and reads its header a
// byte per system call. A PUBLISH that is too long is cut to an empty one and
// noted, so that it can be acknowledged and does not come back for ever. Every
// write has a deadline.
//
// A failed write is not told to the client, which would close the connection
// over what has arrived and was not read yet: the last words of a broker that
// died, which it will not repeat if it had not saved them. It is the reader who
// ends the connection.
type packetConn struct {
	net.Conn
	in    *bufio.Reader
	limit int

	// Owned by the reader.
	head      []byte // to be read before body
	body      int    // bytes of the packet that are still in the buffer or net
	publishes uint64 // PUBLISH packets so far

	suback atomic.Int32 // return codes that the next SUBACK may have

	mu   sync.Mutex
	cut  map[uint64]bool // numbers of PUBLISH packets that were cut
	dead error           // why it was closed
}

func newPacketConn(c net.Conn, limit int) *packetConn {
	return &packetConn{Conn: c, in: bufio.NewReaderSize(c, 16<<10), limit: limit, cut: make(map[uint64]bool)}
}

// fail closes the connection, and has the reader return why: it would take the
// error of a closed connection for a wish of its own.
func (c *packetConn) fail(why error) {
	c.mu.Lock()
	if c.dead == nil {
		c.dead = why
	}
	c.mu.Unlock()
	c.Conn.Close()
}

// reason is why the connection was, or is to be, closed, else err.
func (c *packetConn) reason(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dead != nil {
		return c.dead
	}
	return err
}

// expectCodes says how many filters the SUBSCRIBE that follows has. The client
// library would index beyond them.
func (c *packetConn) expectCodes(n int) { c.suback.Store(int32(n)) }

// wasCut says whether the nth PUBLISH was cut; asked once of each.
func (c *packetConn) wasCut(n uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	was := c.cut[n]
	delete(c.cut, n)
	return was
}

func (c *packetConn) Write(p []byte) (int, error) {
	_ = c.SetWriteDeadline(time.Now().Add(writeTimeout)) // of a closed one the write tells
	n, err := c.Conn.Write(p)
	if err == nil {
		return n, nil
	}
	c.mu.Lock()
	if c.dead == nil {
		c.dead = err
	}
	c.mu.Unlock()
	_ = c.SetReadDeadline(time.Now().Add(lastWords))
	return len(p), nil
}

// lastWords is for how long a connection is read that cannot be written to, and
// from which nothing comes. Of one that has ended at the other side the end
// comes after what is left.
const lastWords = 2 * stall

func (c *packetConn) Read(p []byte) (int, error) {
	for len(c.head) == 0 && c.body == 0 {
		if err := c.next(); err != nil {
			return 0, c.reason(err)
		}
	}
	if len(c.head) > 0 {
		n := copy(p, c.head)
		c.head = c.head[n:]
		return n, nil
	}
	n, err := c.in.Read(p[:min(len(p), c.body)])
	c.body -= n
	if err != nil {
		err = c.reason(err)
	}
	return n, err
}

// errStrange: to a version that it does not know, a broker of MQTT 5 says 0x84
// (unsupported protocol version) or 0x82 (protocol error).
var errStrange = errors.New("the MQTT broker refuses this client")

// Kinds of packets, as in the first byte.
const (
	kindConnack = 2
	kindPublish = 3
	kindSuback  = 9
)

// next reads a packet's header, and decides on it.
func (c *packetConn) next() error {
	if c.reason(nil) != nil {
		_ = c.SetReadDeadline(time.Now().Add(lastWords))
	}
	first, err := c.in.ReadByte()
	if err != nil {
		return err
	}
	length, err := readLength(c.in)
	if err != nil {
		return err
	}
	switch kind := first >> 4; {
	case kind == kindPublish:
		c.publishes++
		if length > c.limit {
			return c.cutPublish(first, length)
		}
	case kind == kindSuback:
		if most := 2 + int(c.suback.Load()); length > most {
			return fmt.Errorf("a SUBACK of %d bytes where %d are the most", length, most)
		}
	case kind == kindConnack && length == 2:
		answer, err := c.in.Peek(2)
		if err != nil {
			return err
		}
		// One that MQTT 3.1.1 does not have, as a broker of MQTT 5 may say, the
		// client library takes for a success on a connection that it closes.
		if code := answer[1]; code > 5 {
			return fmt.Errorf("%w with code %#x", errStrange, code)
		}
	case length > 4:
		return fmt.Errorf("an MQTT packet of kind %d with %d bytes", kind, length)
	}
	c.head = appendLength([]byte{first}, length)
	c.body = length
	return nil
}

// cutPublish reads a PUBLISH away and leaves one without payload in its place.
func (c *packetConn) cutPublish(first byte, length int) error {
	var size [2]byte
	if _, err := io.ReadFull(c.in, size[:]); err != nil {
		return err
	}
	n := int(binary.BigEndian.Uint16(size[:]))
	if first>>1&3 > 0 {
		n += 2 // packet identifier
	}
	if 2+n > length {
		return errors.New("a PUBLISH shorter than its topic")
	}
	rest := make([]byte, n)
	if _, err := io.ReadFull(c.in, rest); err != nil {
		return err
	}
	if _, err := io.CopyN(io.Discard, c.in, int64(length-2-n)); err != nil {
		return err
	}
	c.head = append(append(appendLength([]byte{first}, 2+n), size[:]...), rest...)
	c.mu.Lock()
	c.cut[c.publishes] = true
	c.mu.Unlock()
	return nil
}

// readLength reads a Remaining Length, which has at most 4 bytes [MQTT-2.2.3].
func readLength(r io.ByteReader) (int, error) {
	n := 0
	for shift := 0; shift < 28; shift += 7 {
		b, err := r.ReadByte()
		if err != nil {
			return 0, err
		}
		n |= int(b&0x7f) << shift
		if b&0x80 == 0 {
			return n, nil
		}
	}
	return 0, errors.New("an MQTT packet whose length has more than 4 bytes")
}

func appendLength(b []byte, n int) []byte {
	for n > 0x7f {
		b = append(b, byte(n)|0x80)
		n >>= 7
	}
	return append(b, byte(n))
}
