package link

import (
	"bufio"
	"context"
	"errors"
	"io"
	"sync/atomic"
	"testing"
	"time"

	"github.com/skerry-io/skerry/tunnel"
)

const kindTest = "test"

// echoing holds a conversation of lines, each answered by itself, and counts
// how many are held at once.
type echoing struct{ now, most atomic.Int32 }

func (e *echoing) serve(ctx context.Context, st *tunnel.Stream) error {
	n := e.now.Add(1)
	defer e.now.Add(-1)
	e.most.Store(max(e.most.Load(), n))
	if _, err := io.WriteString(st, "hello\n"); err != nil {
		return err
	}
	_, err := io.Copy(st, st)
	return errors.Join(err, ctx.Err())
}

// acceptExtra takes the node's stream of kindTest and its greeting.
func acceptExtra(t *testing.T, s *tunnel.Session) (*tunnel.Stream, *bufio.Reader) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	for {
		st, err := s.Accept(ctx)
		must(t, err)
		if st.Kind() != kindTest {
			continue // the sync's, which this hub leaves open
		}
		must(t, st.SetDeadline(time.Now().Add(soon)))
		r := bufio.NewReader(st)
		if line, err := r.ReadString('\n'); err != nil || line != "hello\n" {
			t.Fatalf("greeting %q, %v", line, err)
		}
		return st, r
	}
}

func TestExtraStreams(t *testing.T) {
	e := &echoing{}
	wanted := make(chan struct{})
	r := newHoldingRig(t, openStore(t), []Stream{{Kind: kindTest, Serve: e.serve, Await: func(ctx context.Context) error {
		select {
		case <-wanted:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}}})
	s := r.session()
	first, err := s.Accept(t.Context())
	must(t, err)
	if first.Kind() == kindTest {
		t.Error("a stream is open that nobody wants yet")
	}
	close(wanted)
	st, lines := acceptExtra(t, s)
	if _, err := io.WriteString(st, "one\n"); err != nil {
		t.Fatal(err)
	}
	if line, err := lines.ReadString('\n'); err != nil || line != "one\n" {
		t.Fatalf("%q, %v", line, err)
	}

	// One that ends is opened again, and the tunnel stays.
	st.Reset(tunnel.CodeInternal)
	acceptExtra(t, s)
	if got := r.State(); !got.Connected {
		t.Errorf("a stream's end ended the tunnel: %+v", got)
	}

	// A new tunnel has one of its own.
	s.Close()
	acceptExtra(t, r.session())
	if most := e.most.Load(); most != 1 {
		t.Errorf("%d conversations at once", most)
	}
}

func TestExtraStreamMovesFromADrainedTunnel(t *testing.T) {
	e := &echoing{}
	r := newHoldingRig(t, openStore(t), []Stream{{Kind: kindTest, Serve: e.serve}})
	s := r.session()
	st, lines := acceptExtra(t, s)
	drained := make(chan error, 1)
	go func() { drained <- s.Drain(t.Context(), tunnel.GoAway{Deadline: soon, Slot: time.Millisecond}) }()
	acceptExtra(t, r.session())
	if _, err := lines.ReadString('\n'); err == nil {
		t.Error("the drained tunnel's conversation goes on")
	}
	st.Close()
	select {
	case err := <-drained:
		must(t, err)
	case <-time.After(soon):
		t.Error("the conversation keeps its tunnel from being drained")
	}
	if most := e.most.Load(); most != 1 {
		t.Errorf("%d conversations at once", most)
	}
}
