package connlimit

import (
	"errors"
	"io"
	"net"
	"testing"
	"time"
)

func TestLimit(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := New(inner, 2)
	accepted := make(chan net.Conn)
	go func() {
		defer close(accepted)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	dial := func() net.Conn {
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	dial()
	first := <-accepted
	dial()
	<-accepted

	third := dial()
	third.SetReadDeadline(time.Now().Add(10 * time.Second))
	var timeout net.Error
	if n, err := third.Read(make([]byte, 1)); n != 0 || err == nil || errors.As(err, &timeout) && timeout.Timeout() {
		t.Fatalf("one too many was not closed: %d bytes, %v", n, err)
	}

	// A place is free once, however often its connection is closed.
	first.Close()
	first.Close()
	dial()
	fourth := <-accepted
	over := dial()
	over.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := over.Read(make([]byte, 1)); err == nil || errors.As(err, &timeout) && timeout.Timeout() {
		t.Fatalf("a second one took the same place: %v", err)
	}
	if _, err := io.WriteString(fourth, "x"); err != nil {
		t.Error(err)
	}
	l.Close()
	<-accepted
}
