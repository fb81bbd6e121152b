package tunnel

import (
	"net"
	"sync"
)

// Listener is a net.Listener of streams that its owner accepted and sorted by
// Kind, so that an http.Server can serve one kind of them. Its backlog is
// bounded: Offer fails rather than waits.
type Listener struct {
	mu      sync.Mutex // held by Offer and Close, so that nothing is offered after the end
	backlog chan net.Conn
	done    chan struct{}
	once    sync.Once
}

// NewListener makes a Listener with room for backlog streams that nobody has
// accepted yet.
func NewListener(backlog int) *Listener {
	return &Listener{backlog: make(chan net.Conn, backlog), done: make(chan struct{})}
}

// Offer hands a stream over. It returns false, and the stream stays the
// caller's, when the backlog is full or the Listener is closed.
func (l *Listener) Offer(st net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.done:
		return false
	default:
	}
	select {
	case l.backlog <- st:
		return true
	default:
		return false
	}
}

// Accept returns the next stream, or net.ErrClosed.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case <-l.done:
		return nil, net.ErrClosed
	default:
	}
	select {
	case c := <-l.backlog:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close ends Accept. Streams in the backlog are closed.
func (l *Listener) Close() error {
	l.once.Do(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		close(l.done)
		for {
			select {
			case c := <-l.backlog:
				c.Close()
			default:
				return
			}
		}
	})
	return nil
}

// Addr returns an address without meaning beyond its name.
func (l *Listener) Addr() net.Addr { return listenerAddr{} }

type listenerAddr struct{}

func (listenerAddr) Network() string { return "tunnel" }
func (listenerAddr) String() string  { return "tunnel" }
