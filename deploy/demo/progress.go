package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"golang.org/x/term"
)

// progress tells what is going on and how long it has taken: on a terminal in
// one line that counts, elsewhere with a line for each step.
type progress struct {
	out      *os.File
	terminal bool
	began    time.Time
}

func newProgress(out *os.File) *progress {
	return &progress{out: out, terminal: term.IsTerminal(int(out.Fd())), began: time.Now()}
}

// step runs do under a line of its own.
func (p *progress) step(ctx context.Context, what string, do func(context.Context) (result string, err error)) error {
	began := time.Now()
	shown := make(chan struct{})
	stop := make(chan struct{})
	go func() {
		defer close(shown)
		if !p.terminal {
			fmt.Fprintf(p.out, "... %s\n", what)
			return
		}
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		for {
			fmt.Fprintf(p.out, "\r\x1b[K... %s  %.0f s", what, time.Since(began).Seconds())
			select {
			case <-tick.C:
			case <-stop:
				fmt.Fprint(p.out, "\r\x1b[K")
				return
			}
		}
	}()
	result, err := do(ctx)
	close(stop)
	<-shown
	if err != nil {
		fmt.Fprintf(p.out, "[x] %s  failed after %.1f s\n", what, time.Since(began).Seconds())
		return fmt.Errorf("%s: %w", what, err)
	}
	if result != "" {
		result = ": " + result
	}
	fmt.Fprintf(p.out, "[ok] %s%s  (%.1f s)\n", what, result, time.Since(began).Seconds())
	return nil
}

func (p *progress) printf(format string, args ...any) { fmt.Fprintf(p.out, format, args...) }
