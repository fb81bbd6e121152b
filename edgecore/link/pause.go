package link

import (
	"context"
	"sync"
)

// Pause cuts the tunnel, and no other is dialled until the function it returns
// is called. It may be called before Run.
func (l *Link) Pause() (resume func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pauses++
	if l.pauses == 1 {
		l.resumed = make(chan struct{})
		if l.cut != nil {
			l.cut()
		}
	}
	return sync.OnceFunc(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.pauses--; l.pauses == 0 {
			close(l.resumed)
		}
	})
}

// awaitTurn waits while the link is paused, and returns a context that ends
// with the next pause.
func (l *Link) awaitTurn(ctx context.Context) (context.Context, context.CancelFunc) {
	for {
		l.mu.Lock()
		if l.pauses == 0 {
			turn, cancel := context.WithCancel(ctx)
			l.cut = cancel
			l.mu.Unlock()
			return turn, cancel
		}
		resumed := l.resumed
		l.mu.Unlock()
		select {
		case <-resumed:
		case <-ctx.Done():
			return ctx, func() {}
		}
	}
}
