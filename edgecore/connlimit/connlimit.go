// Package connlimit bounds how many connections a listener of the node serves
// at once: the local Kubernetes API and the devices' API for pods.
//
// It owns the count and nothing else. One connection too many is closed at
// once, which a client can tell from a server that hangs; it never queues.
package connlimit

import (
	"net"
	"sync"
)

// New limits l to n connections at once. Its methods may be called from several
// goroutines, as l's may.
func New(l net.Listener, n int) net.Listener {
	return &limited{Listener: l, places: make(chan struct{}, n)}
}

type limited struct {
	net.Listener
	places chan struct{}
}

func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case l.places <- struct{}{}:
			return &placed{Conn: c, done: func() { <-l.places }}, nil
		default:
			c.Close()
		}
	}
}

type placed struct {
	net.Conn
	once sync.Once
	done func()
}

func (p *placed) Close() error {
	err := p.Conn.Close()
	p.once.Do(p.done)
	return err
}
