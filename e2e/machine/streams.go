package machine

import (
	"bytes"
	"errors"
	"io"
	"os"
	"sync"
)

// streams are the three standard streams of a process: the ends it gets, and
// the copying between our ends and what the caller gave.
type streams struct {
	fds    []int
	theirs []*os.File // to close once they are handed over
	ours   []*os.File
	feed   func()   // copies the input; nil without one
	drain  []func() // copy the outputs
}

func (p *Proc) streams(c Command) (*streams, error) {
	s := &streams{}
	err := errors.Join(s.input(c.Stdin, c.Detach), s.output(c.Stdout, c.Detach))
	if c.Stderr != nil && c.Stderr == c.Stdout && err == nil {
		s.fds = append(s.fds, s.fds[1])
		return s, nil
	}
	return s, errors.Join(err, s.output(c.Stderr, c.Detach))
}

func (s *streams) input(r io.Reader, detach bool) error {
	if r == nil {
		return s.null(os.O_RDONLY)
	}
	if f, ok := r.(*os.File); ok {
		s.fds = append(s.fds, int(f.Fd()))
		return nil
	}
	if detach {
		return errors.New("the streams of a detached process must be files")
	}
	theirs, ours, err := os.Pipe()
	if err != nil {
		return err
	}
	s.add(theirs, ours)
	s.feed = func() {
		io.Copy(ours, r) // ends with an error when the process does not read on
		ours.Close()
	}
	return nil
}

func (s *streams) output(w io.Writer, detach bool) error {
	if w == nil {
		return s.null(os.O_WRONLY)
	}
	if f, ok := w.(*os.File); ok {
		s.fds = append(s.fds, int(f.Fd()))
		return nil
	}
	if detach {
		return errors.New("the streams of a detached process must be files")
	}
	ours, theirs, err := os.Pipe()
	if err != nil {
		return err
	}
	s.add(theirs, ours)
	s.drain = append(s.drain, func() {
		io.Copy(w, ours)
		ours.Close()
	})
	return nil
}

func (s *streams) null(flag int) error {
	f, err := os.OpenFile(os.DevNull, flag, 0)
	if err != nil {
		return err
	}
	s.theirs, s.fds = append(s.theirs, f), append(s.fds, int(f.Fd()))
	return nil
}

func (s *streams) add(theirs, ours *os.File) {
	s.fds = append(s.fds, int(theirs.Fd()))
	s.theirs, s.ours = append(s.theirs, theirs), append(s.ours, ours)
}

// start copies until the process has ended. Wait waits for the outputs only:
// the caller's input may block for ever, and its goroutine ends with it.
func (s *streams) start(p *Proc) {
	if s.feed != nil {
		go s.feed()
	}
	for _, d := range s.drain {
		p.copies.Go(d)
	}
}

func (s *streams) abandon() {
	for _, f := range s.ours {
		f.Close()
	}
}

// lockedBuffer takes the writes of two copies at once.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) Bytes() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return bytes.Clone(b.buf.Bytes())
}

func lastLines(text []byte, limit int) []byte {
	text = bytes.TrimSpace(text)
	if len(text) > limit {
		text = text[len(text)-limit:]
	}
	return text
}
