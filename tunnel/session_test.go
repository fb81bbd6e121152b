package tunnel

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"testing"
	"time"
)

// eachPair runs a test over a pipe, where every write waits for its reader, and
// over loopback with TLS; and with either end as the opener.
func eachPair(t *testing.T, run func(t *testing.T, opener, acceptor *Session)) {
	for name, pair := range map[string]func(t *testing.T) (edge, hub *Session){
		"pipe": func(t *testing.T) (edge, hub *Session) { return newPair(t, Config{}, Config{}, nil) },
		"tls":  func(t *testing.T) (edge, hub *Session) { return newTLSPair(t, Config{}, Config{}) },
	} {
		t.Run(name+"/edge opens", func(t *testing.T) {
			noLeaks(t)
			edge, hub := pair(t)
			run(t, edge, hub)
		})
		t.Run(name+"/hub opens", func(t *testing.T) {
			noLeaks(t)
			edge, hub := pair(t)
			run(t, hub, edge)
		})
	}
}

func TestEcho(t *testing.T) {
	eachPair(t, func(t *testing.T, a, b *Session) {
		serveEcho(t, b)
		st, err := a.Open(t.Context(), OpenRequest{Kind: "echo", Target: "some/where"})
		if err != nil {
			t.Fatal(err)
		}
		defer st.Close()
		sent := make([]byte, 1<<20)
		rand.NewChaCha8([32]byte{}).Read(sent)
		go func() {
			_, _ = st.Write(sent)
			_ = st.CloseWrite()
		}()
		got, err := io.ReadAll(st)
		if err != nil || !bytes.Equal(got, sent) {
			t.Fatalf("got %d bytes, %v; want the %d sent", len(got), err, len(sent))
		}
	})
}

func TestOpenCarriesRequest(t *testing.T) {
	eachPair(t, func(t *testing.T, a, b *Session) {
		want := OpenRequest{Kind: "kubelet", Target: strings.Repeat("x", maxTarget), Class: ClassSync}
		st, err := a.Open(t.Context(), want)
		if err != nil {
			t.Fatal(err)
		}
		defer st.Close()
		got := acceptStream(t, b)
		defer got.Close()
		if got.Kind() != want.Kind || got.Target() != want.Target || got.Class() != want.Class {
			t.Errorf("accepted %q %q %v", got.Kind(), got.Target(), got.Class())
		}
	})
}

func TestOpenRefusesBadRequests(t *testing.T) {
	edge, _ := newPair(t, Config{}, Config{}, nil)
	for _, req := range []OpenRequest{
		{}, {Kind: strings.Repeat("k", maxKind+1)}, {Kind: "k", Target: strings.Repeat("t", maxTarget+1)}, {Kind: "k", Class: 3},
	} {
		if _, err := edge.Open(t.Context(), req); err == nil {
			t.Errorf("Open(%+v) succeeded", req)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := edge.Open(ctx, OpenRequest{Kind: "k"}); !errors.Is(err, context.Canceled) {
		t.Errorf("Open with a dead context: %v", err)
	}
}

func TestHalfClose(t *testing.T) {
	eachPair(t, func(t *testing.T, a, b *Session) {
		near, far := streamPair(t, a, b, ClassStream)
		defer near.Close()
		defer far.Close()
		if _, err := near.Write([]byte("question")); err != nil {
			t.Fatal(err)
		}
		if err := near.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if _, err := near.Write([]byte("more")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Write after CloseWrite: %v", err)
		}
		if got, err := io.ReadAll(far); err != nil || string(got) != "question" {
			t.Fatalf("far read %q, %v", got, err)
		}
		if _, err := far.Write([]byte("answer")); err != nil {
			t.Fatal(err)
		}
		far.Close()
		if got, err := io.ReadAll(near); err != nil || string(got) != "answer" {
			t.Fatalf("near read %q, %v", got, err)
		}
	})
}

// What was written before Close arrives, though the closing end reads no more.
func TestCloseDeliversThenRefuses(t *testing.T) {
	eachPair(t, func(t *testing.T, a, b *Session) {
		near, far := streamPair(t, a, b, ClassStream)
		defer far.Close()
		if _, err := near.Write([]byte("last words")); err != nil {
			t.Fatal(err)
		}
		near.Close()
		if _, err := near.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Read after Close: %v", err)
		}
		if got, err := io.ReadAll(far); err != nil || string(got) != "last words" {
			t.Fatalf("far read %q, %v", got, err)
		}
		var reset *ResetError
		for {
			if _, err := far.Write(make([]byte, 4096)); err != nil {
				if !errors.As(err, &reset) || reset.Code != CodeClosed || !reset.Remote {
					t.Errorf("far write: %v; want a remote reset with CodeClosed", err)
				}
				return
			}
		}
	})
}

func TestResetIsSeenByReaderAndWriter(t *testing.T) {
	eachPair(t, func(t *testing.T, a, b *Session) {
		near, far := streamPair(t, a, b, ClassStream)
		defer far.Close()
		errs := make(chan error, 2)
		go func() { // blocks on credit
			_, err := far.Write(make([]byte, 1<<20))
			errs <- err
		}()
		go func() { // blocks on data
			_, err := far.Read(make([]byte, 1))
			errs <- err
		}()
		if _, err := io.ReadFull(near, make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		near.Reset(CodeApplication + 7)
		for range 2 {
			var reset *ResetError
			if err := <-errs; !errors.As(err, &reset) || reset.Code != CodeApplication+7 || !reset.Remote {
				t.Errorf("got %v; want the remote reset", err)
			}
		}
		// The session goes on.
		again, _ := streamPair(t, a, b, ClassStream)
		again.Close()
	})
}

func TestDeadlines(t *testing.T) {
	eachPair(t, func(t *testing.T, a, b *Session) {
		near, far := streamPair(t, a, b, ClassStream)
		defer near.Close()
		defer far.Close()
		near.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		if _, err := near.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Read: %v", err)
		}
		// Nobody reads at the far end: the write stops at the credit, and says
		// how far it came.
		near.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
		n, err := near.Write(make([]byte, 2*InitialWindow))
		var timeout net.Error
		if !errors.As(err, &timeout) || !timeout.Timeout() || n != InitialWindow {
			t.Errorf("Write = %d, %v; want %d and a timeout", n, err, InitialWindow)
		}
		near.SetDeadline(time.Time{})
		if _, err := io.ReadFull(far, make([]byte, InitialWindow)); err != nil {
			t.Fatal(err)
		}
		if _, err := near.Write([]byte("x")); err != nil {
			t.Errorf("Write after the deadline was lifted: %v", err)
		}
		if _, err := io.ReadFull(far, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		// A deadline in the past ends a Read that waits already.
		done := make(chan error)
		go func() {
			_, err := near.Read(make([]byte, 1))
			done <- err
		}()
		near.SetReadDeadline(time.Now().Add(-time.Second))
		if err := <-done; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Read: %v", err)
		}
	})
}

func TestCloseUnblocks(t *testing.T) {
	eachPair(t, func(t *testing.T, a, b *Session) {
		near, far := streamPair(t, a, b, ClassStream)
		defer far.Close()
		errs := make(chan error, 2)
		go func() {
			_, err := near.Read(make([]byte, 1))
			errs <- err
		}()
		go func() {
			_, err := near.Write(make([]byte, 1<<20))
			errs <- err
		}()
		if _, err := io.ReadFull(far, make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		near.Close()
		for range 2 {
			if err := <-errs; !errors.Is(err, net.ErrClosed) {
				t.Errorf("got %v", err)
			}
		}
	})
}

func TestSessionCloseTellsReason(t *testing.T) {
	eachPair(t, func(t *testing.T, a, b *Session) {
		near, far := streamPair(t, a, b, ClassStream)
		_, _ = near, far
		if err := a.CloseWith(CloseReplaced, "there is a newer one"); err != nil {
			t.Fatal(err)
		}
		<-b.Done()
		var closed *CloseError
		if !errors.As(b.Err(), &closed) || closed.Code != CloseReplaced || closed.Reason != "there is a newer one" || !closed.Remote {
			t.Errorf("peer's error: %v", b.Err())
		}
		for _, st := range []*Stream{near, far} {
			if _, err := st.Read(make([]byte, 1)); !errors.As(err, &closed) || closed.Code != CloseReplaced {
				t.Errorf("Read after the end: %v", err)
			}
			if _, err := st.Write(make([]byte, 1)); !errors.As(err, &closed) {
				t.Errorf("Write after the end: %v", err)
			}
			st.Close()
		}
		if _, err := b.Accept(t.Context()); !errors.As(err, &closed) {
			t.Errorf("Accept after the end: %v", err)
		}
		if _, err := b.Open(t.Context(), OpenRequest{Kind: "x"}); !errors.As(err, &closed) {
			t.Errorf("Open after the end: %v", err)
		}
	})
}

func TestStreamLimits(t *testing.T) {
	noLeaks(t)
	edge, hub := newPair(t, Config{}, Config{MaxStreams: 8, AcceptBacklog: 4}, nil)
	if _, err := edge.Ping(t.Context()); err != nil { // the hub's HELLO has come
		t.Fatal(err)
	}
	var open []*Stream
	for range 4 {
		open = append(open, openStream(t, edge, "x"))
	}
	refused := openStream(t, edge, "x")
	var reset *ResetError
	if _, err := refused.Read(make([]byte, 1)); !errors.As(err, &reset) || reset.Code != CodeRefused {
		t.Errorf("stream beyond the backlog: %v", err)
	}
	refused.Close()
	for range 4 {
		acceptStream(t, hub)
	}
	for range 4 {
		open = append(open, openStream(t, edge, "x"))
	}
	if _, err := edge.Open(t.Context(), OpenRequest{Kind: "x"}); !errors.Is(err, ErrTooManyStreams) {
		t.Errorf("Open beyond the limit: %v", err)
	}
	open[0].Close()
	if _, err := edge.Ping(t.Context()); err != nil { // the FIN is out
		t.Fatal(err)
	}
	// The slot is free here; the hub still holds its end and says so.
	late := openStream(t, edge, "x")
	if _, err := late.Read(make([]byte, 1)); !errors.As(err, &reset) || reset.Code != CodeLimit {
		t.Errorf("stream beyond the hub's limit: %v", err)
	}
}

func TestStats(t *testing.T) {
	edge, hub := newPair(t, Config{}, Config{}, nil)
	near, far := streamPair(t, edge, hub, ClassSync)
	if _, err := near.Write(make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(far, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	if rtt, err := hub.Ping(t.Context()); err != nil || rtt <= 0 {
		t.Fatalf("Ping = %v, %v", rtt, err)
	}
	e, h := edge.Stats(), hub.Stats()
	if e.BytesOut[ClassSync] != 1000 || h.BytesIn[ClassSync] != 1000 {
		t.Errorf("sync bytes: %d out, %d in", e.BytesOut[ClassSync], h.BytesIn[ClassSync])
	}
	if h.Streams != 1 || h.Windows != InitialWindow || h.MinRTT <= 0 || h.PingInterval != 50*time.Second {
		t.Errorf("hub: %+v", h)
	}
	if since := time.Since(h.LastHeard); since < 0 || since > time.Minute {
		t.Errorf("last heard %v ago", since)
	}
	near.Close()
	far.Close()
	if _, err := edge.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	if h := hub.Stats(); h.Streams != 0 || h.Windows != 0 {
		t.Errorf("after closing: %+v", h)
	}
}

// An end that closes at once still says why, after its HELLO.
func TestCloseAtOnce(t *testing.T) {
	for range 20 {
		ws, hub := newRawEdge(t, Config{}, nil)
		edge, err := Client(ws, Config{})
		if err != nil {
			t.Fatal(err)
		}
		edge.CloseWith(CloseApplication+1, "changed my mind")
		<-hub.Done()
		var closed *CloseError
		if !errors.As(hub.Err(), &closed) || closed.Code != CloseApplication+1 {
			t.Fatalf("hub: %v", hub.Err())
		}
	}
}
