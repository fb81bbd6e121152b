package edgeapi

import (
	"bufio"
	"bytes"
	"compress/flate"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
)

// Conn frames messages over a sync stream. Send may be called from several
// goroutines; Receive from one.
type Conn struct {
	r *bufio.Reader

	mu  sync.Mutex // guards w and buf
	w   io.Writer
	buf bytes.Buffer

	rawOut, wireOut, rawIn, wireIn atomic.Uint64
}

// NewConn frames messages over rw. The caller closes rw.
func NewConn(rw io.ReadWriter) *Conn {
	return &Conn{r: bufio.NewReaderSize(rw, 4<<10), w: rw}
}

// Send writes one message, compressed when that pays.
func (c *Conn) Send(m Message) error {
	payload, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("encode %T: %w", m, err)
	}
	if len(payload) > MaxPayload {
		return fmt.Errorf("encode %T: %d bytes exceed the limit of %d", m, len(payload), MaxPayload)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rawOut.Add(uint64(len(payload)))
	// The payload goes behind room for the longest head, so that a message is
	// one write and the tunnel can put it into one frame.
	const room = 2 + binary.MaxVarintLen32
	var flags byte
	c.buf.Reset()
	c.buf.Write(make([]byte, room))
	if len(payload) >= compressFrom {
		if err := deflate(&c.buf, payload); err != nil {
			return fmt.Errorf("compress %T: %w", m, err)
		}
		flags = flagDeflate
	}
	if n := c.buf.Len() - room; n == 0 || n >= len(payload) {
		c.buf.Truncate(room)
		c.buf.Write(payload)
		flags = 0
	}
	head := binary.AppendUvarint([]byte{m.messageType(), flags}, uint64(c.buf.Len()-room))
	wire := c.buf.Bytes()[room-len(head):]
	copy(wire, head)
	c.wireOut.Add(uint64(len(wire)))
	_, err = c.w.Write(wire)
	if c.buf.Cap() > 1<<20 {
		c.buf = bytes.Buffer{} // do not keep the room of one large object
	}
	return err
}

// Receive reads the next message. The error is io.EOF when the peer closed the
// stream between messages.
func (c *Conn) Receive() (Message, error) {
	typ, err := c.r.ReadByte()
	if err != nil {
		return nil, err
	}
	flags, err := c.r.ReadByte()
	if err != nil {
		return nil, unexpected(err)
	}
	if flags&^flagDeflate != 0 {
		return nil, fmt.Errorf("sync message type %d: unknown flags %#x", typ, flags)
	}
	size, err := readUvarint(c.r)
	if err != nil {
		return nil, err
	}
	if size > MaxPayload {
		return nil, fmt.Errorf("sync message type %d: %d bytes exceed the limit of %d", typ, size, MaxPayload)
	}
	// The length is the peer's claim: grow with what really arrives.
	var wire bytes.Buffer
	if _, err := io.CopyN(&wire, c.r, int64(size)); err != nil {
		return nil, unexpected(err)
	}
	payload := wire.Bytes()
	if flags&flagDeflate != 0 {
		if payload, err = inflate(payload); err != nil {
			return nil, fmt.Errorf("sync message type %d: %w", typ, err)
		}
	}
	c.wireIn.Add(size + 2)
	c.rawIn.Add(uint64(len(payload)))
	return decode(typ, payload)
}

// Bytes returns how many payload bytes went out and came in, before
// compression and on the wire.
func (c *Conn) Bytes() (rawOut, wireOut, rawIn, wireIn uint64) {
	return c.rawOut.Load(), c.wireOut.Load(), c.rawIn.Load(), c.wireIn.Load()
}

func decode(typ byte, payload []byte) (Message, error) {
	switch typ {
	case typeHello:
		return decodeAs[Hello](payload)
	case typeInventory:
		return decodeAs[Inventory](payload)
	case typeAck:
		return decodeAs[Ack](payload)
	case typeWrite:
		return decodeAs[Write](payload)
	case typeWelcome:
		return decodeAs[Welcome](payload)
	case typeDelta:
		return decodeAs[Delta](payload)
	case typeWriteResult:
		return decodeAs[WriteResult](payload)
	case typeGoodbye:
		return decodeAs[Goodbye](payload)
	case typeTwinHello:
		return decodeAs[TwinHello](payload)
	case typeTwinDigest:
		return decodeAs[TwinDigest](payload)
	case typeTwinFrame:
		return decodeAs[TwinFrame](payload)
	case typeTwinFound:
		return decodeAs[TwinFound](payload)
	case typeTwinWelcome:
		return decodeAs[TwinWelcome](payload)
	case typeTwinWant:
		return decodeAs[TwinWant](payload)
	case typeTwinRestore:
		return decodeAs[TwinRestore](payload)
	case typeTwinAck:
		return decodeAs[TwinAck](payload)
	case typeTwinRequest:
		return decodeAs[TwinRequest](payload)
	case typeTwinReply:
		return decodeAs[TwinReply](payload)
	case typeTelemetryHello:
		return decodeAs[TelemetryHello](payload)
	case typeTelemetryBatch:
		return decodeAs[TelemetryBatch](payload)
	case typeTelemetryWelcome:
		return decodeAs[TelemetryWelcome](payload)
	case typeTelemetryAck:
		return decodeAs[TelemetryAck](payload)
	}
	return nil, fmt.Errorf("sync message of unknown type %d", typ)
}

func decodeAs[M Message](payload []byte) (Message, error) {
	var m M
	if err := json.Unmarshal(payload, &m); err != nil {
		return nil, fmt.Errorf("decode %T: %w", m, err)
	}
	return m, nil
}

// readUvarint is binary.ReadUvarint limited to four bytes, which hold
// MaxPayload with room to spare.
func readUvarint(r io.ByteReader) (uint64, error) {
	var v uint64
	for shift := 0; shift < 28; shift += 7 {
		b, err := r.ReadByte()
		if err != nil {
			return 0, unexpected(err)
		}
		v |= uint64(b&0x7f) << shift
		if b < 0x80 {
			return v, nil
		}
	}
	return 0, errors.New("sync message: length takes more than four bytes")
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// A flate.Writer takes about 0.8 MB; the pool lets the collector have it back
// between bursts, which matters on an edge node.
var (
	writers = sync.Pool{New: func() any {
		w, err := flate.NewWriterDict(io.Discard, 6, dictV1)
		if err != nil {
			panic(err) // the level is a constant
		}
		return w
	}}
	readers = sync.Pool{New: func() any { return flate.NewReaderDict(bytes.NewReader(nil), dictV1) }}
)

func deflate(dst *bytes.Buffer, src []byte) error {
	w := writers.Get().(*flate.Writer)
	defer writers.Put(w)
	w.Reset(dst) // keeps the dictionary
	if _, err := w.Write(src); err != nil {
		return err
	}
	return w.Close()
}

func inflate(src []byte) ([]byte, error) {
	r := readers.Get().(io.ReadCloser)
	defer readers.Put(r)
	in := bytes.NewReader(src)
	if err := r.(flate.Resetter).Reset(in, dictV1); err != nil {
		return nil, err
	}
	out, err := io.ReadAll(io.LimitReader(r, MaxPayload+1))
	if err != nil {
		return nil, fmt.Errorf("decompress: %w", err)
	}
	if len(out) > MaxPayload {
		return nil, fmt.Errorf("decompress: more than the limit of %d bytes", MaxPayload)
	}
	if in.Len() != 0 {
		return nil, errors.New("decompress: bytes after the end of the stream")
	}
	return out, nil
}
