package link

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/skerry-io/skerry/tunnel"
)

// Stream is a conversation with the hub besides the sync: the link opens it on
// each tunnel and opens it again when it ends, as long as there is one. What
// goes wrong with it leaves the tunnel alone.
type Stream struct {
	Kind string // required
	// Class is how it shares the link; zero means ClassStream.
	Class tunnel.Class
	// Await returns once there is something to converse about; nil: there is.
	// A node that has none of it opens no stream.
	Await func(ctx context.Context) error
	// Serve holds the conversation. Its stream is reset when ctx ends. There is
	// one call at a time: while a tunnel is drained, the newer one takes the
	// conversation over. Required.
	Serve func(ctx context.Context, st *tunnel.Stream) error
}

const (
	// minStreamWait and maxStreamWait bound the wait before a stream that ended
	// is opened again.
	minStreamWait = time.Second
	maxStreamWait = time.Minute
	// noKindWait is for a hub that does not know the kind; it may be replaced
	// by one that does without our hearing of it.
	noKindWait = 5 * time.Minute
	// steadyAfter is how long a conversation has to last for the next wait to be
	// the shortest again.
	steadyAfter = time.Minute
)

// extra is a Stream with the tunnel that holds it now.
type extra struct {
	Stream

	mu      sync.Mutex
	present *holding
}

type holding struct {
	cancel context.CancelFunc
	done   chan struct{}
}

// Hold has the link hold conversations. It is called before Run: who converses
// may need the Link first.
func (l *Link) Hold(streams ...Stream) error {
	for _, s := range streams {
		if s.Kind == "" || s.Serve == nil {
			return errors.New("link: a stream needs Kind and Serve")
		}
		l.extras = append(l.extras, &extra{Stream: s})
	}
	return nil
}

// streams keeps all extra streams on s until the tunnel ends.
func (l *Link) streams(ctx context.Context, s *tunnel.Session) error {
	var g errgroup.Group
	for _, x := range l.extras {
		g.Go(func() error {
			l.keepOpen(ctx, s, x)
			return nil
		})
	}
	return g.Wait()
}

// keepOpen holds one conversation after the other until the tunnel ends or a
// newer one takes them over.
func (l *Link) keepOpen(ctx context.Context, s *tunnel.Session, x *extra) {
	ctx, end := x.take(ctx)
	defer end()
	wait := minStreamWait
	for ctx.Err() == nil {
		began := time.Now()
		err := converse(ctx, s, x)
		if ctx.Err() != nil {
			return
		}
		pause := wait
		var reset *tunnel.ResetError
		switch {
		case errors.As(err, &reset) && reset.Code == tunnel.CodeNoKind:
			pause = noKindWait
			l.log.Info("the hub does not know this kind of stream; it may be of an earlier version", "kind", x.Kind, "again", pause)
		case time.Since(began) > steadyAfter:
			wait, pause = minStreamWait, minStreamWait
			fallthrough
		default:
			l.log.Info("a conversation with the hub ended", "kind", x.Kind, "err", err, "again", pause)
			wait = min(2*wait, maxStreamWait)
		}
		t := time.NewTimer(pause/2 + rand.N(pause))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
	}
}

// converse opens the stream and holds one conversation over it.
func converse(ctx context.Context, s *tunnel.Session, x *extra) error {
	if x.Await != nil {
		if err := x.Await(ctx); err != nil {
			return err
		}
	}
	st, err := s.Open(ctx, tunnel.OpenRequest{Kind: x.Kind, Class: x.Class})
	if err != nil {
		return err
	}
	defer st.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { st.Reset(tunnel.CodeCancelled) })()
	return x.Serve(ctx, st)
}

// take ends the conversation that an older tunnel holds, and waits for its end.
func (x *extra) take(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	h := &holding{cancel, make(chan struct{})}
	x.mu.Lock()
	older := x.present
	x.present = h
	x.mu.Unlock()
	if older != nil {
		older.cancel()
		<-older.done
	}
	return ctx, func() {
		cancel()
		close(h.done)
		x.mu.Lock()
		defer x.mu.Unlock()
		if x.present == h {
			x.present = nil
		}
	}
}
