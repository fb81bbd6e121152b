package tunnel

import (
	"sync"
	"sync/atomic"
)

// Memory is what the sessions of one process share: pooled buffers, and a
// budget over their receive windows beyond which windows stop growing.
type Memory struct {
	limit int64
	used  atomic.Int64 // sum of all receive windows

	write  sync.Pool // gorilla's write buffers
	large  sync.Pool // *chunk of chunkLarge
	little sync.Pool // *chunk of chunkLittle
}

// NewMemory returns a Memory whose windows may come to limit bytes; zero means
// no limit.
func NewMemory(limit int64) *Memory { return &Memory{limit: limit} }

// Windows returns what the receive windows of all sessions come to.
func (m *Memory) Windows() int64 { return m.used.Load() }

// grow charges n more bytes of window unless that goes over the budget.
func (m *Memory) grow(n int64) bool {
	if m.used.Add(n) > m.limit && m.limit > 0 {
		m.used.Add(-n)
		return false
	}
	return true
}

// wsBufferSize makes gorilla build a message in one buffer and send it with
// one write.
const wsBufferSize = 16 << 10

const (
	chunkLittle = 2 << 10
	chunkLarge  = 16 << 10
)

// chunk is a piece of a stream's received bytes.
type chunk struct {
	next *chunk
	r, w int // unread bytes are buf[r:w]
	buf  []byte
}

func (m *Memory) getChunk(little bool) *chunk {
	pool, size := &m.large, chunkLarge
	if little {
		pool, size = &m.little, chunkLittle
	}
	if c, ok := pool.Get().(*chunk); ok {
		return c
	}
	return &chunk{buf: make([]byte, size)}
}

func (m *Memory) putChunk(c *chunk) {
	c.next, c.r, c.w = nil, 0, 0
	if len(c.buf) == chunkLittle {
		m.little.Put(c)
	} else {
		m.large.Put(c)
	}
}

// receiveBuffer holds the bytes of a stream that were received and not read:
// a list of chunks, each full but the last, so that it never takes more than
// about the bytes it holds plus one chunk. The stream's rmu guards it.
type receiveBuffer struct {
	head, tail *chunk
	filling    *chunk // the read loop writes beyond its w; must not be freed
	size       int
}

// space returns where the next n bytes may go, perhaps fewer. The caller fills
// it without the lock and then calls filled.
func (b *receiveBuffer) space(m *Memory, n int) []byte {
	if b.tail == nil || b.tail.w == len(b.tail.buf) {
		c := m.getChunk(b.head == nil && n <= chunkLittle)
		if b.tail == nil {
			b.head = c
		} else {
			b.tail.next = c
		}
		b.tail = c
	}
	b.filling = b.tail
	free := b.tail.buf[b.tail.w:]
	return free[:min(n, len(free))]
}

// filled says that n bytes of the last space are there.
func (b *receiveBuffer) filled(n int) {
	b.filling.w += n
	b.filling = nil
	b.size += n
}

// read moves bytes out.
func (b *receiveBuffer) read(m *Memory, p []byte) (n int) {
	for b.size > 0 && n < len(p) {
		c := b.head
		k := copy(p[n:], c.buf[c.r:c.w])
		c.r += k
		n += k
		b.size -= k
		if c.r < c.w || c == b.filling {
			break
		}
		b.head = c.next
		if b.head == nil {
			b.tail = nil
		}
		m.putChunk(c)
	}
	return n
}

// drop frees all but the chunk that is being filled; what that one gets is
// freed by the next drop.
func (b *receiveBuffer) drop(m *Memory) {
	for b.head != nil && b.head != b.filling {
		c := b.head
		b.head = c.next
		m.putChunk(c)
	}
	b.size = 0
	if b.head == nil {
		b.tail = nil
	} else {
		b.head.r = b.head.w
	}
}
