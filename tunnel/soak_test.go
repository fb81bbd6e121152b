package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestSoak opens streams at random from both ends, writes, reads, half-closes,
// closes and resets them, and checks each against its model: the bytes that
// arrive are a prefix of what the seed in the stream's target generates, and
// all of it if the stream ended well.
func TestSoak(t *testing.T) {
	for name, pair := range map[string]func(t *testing.T) (edge, hub *Session){
		"pipe": func(t *testing.T) (edge, hub *Session) { return newPair(t, Config{}, Config{}, nil) },
		"tls":  func(t *testing.T) (edge, hub *Session) { return newTLSPair(t, Config{}, Config{}) },
	} {
		t.Run(name, func(t *testing.T) {
			noLeaks(t)
			edge, hub := pair(t)
			total := 400
			if testing.Short() {
				total = 100
			}
			var s soak
			var openers, acceptors sync.WaitGroup
			for _, end := range []*Session{edge, hub} {
				acceptors.Go(func() { s.accept(t, end) })
				for i := range 8 {
					openers.Go(func() {
						for range total / 16 {
							s.open(t, end, rand.New(rand.NewPCG(uint64(i), rand.Uint64())))
						}
					})
				}
			}
			openers.Wait()
			for _, end := range []*Session{edge, hub} {
				waitFor(t, func() bool { return end.Stats().Streams == 0 })
				if w := end.Stats().Windows; w != 0 {
					t.Errorf("%d bytes of window still charged", w)
				}
				if err := end.Err(); err != nil {
					t.Errorf("session ended: %v", err)
				}
			}
			_ = edge.Close()
			_ = hub.Close()
			acceptors.Wait()
			t.Logf("%d streams ended well, %d were reset, %d MiB", s.complete.Load(), s.cut.Load(), s.bytes.Load()>>20)
			if s.complete.Load() == 0 || s.cut.Load() == 0 {
				t.Error("the mix is wrong")
			}
		})
	}
}

type soak struct {
	complete, cut, bytes atomic.Int64
}

// plan is what both ends of a stream know from its target.
type soakPlan struct {
	seed          uint64
	there, back   int  // bytes each way
	cutAt         int  // the opener resets after so many bytes; -1: never
	cutByAcceptor bool // the acceptor does it instead
}

func (s *soak) open(t *testing.T, end *Session, r *rand.Rand) {
	size := func() int { return r.IntN([]int{10, 1000, 100_000, 500_000}[r.IntN(4)]) }
	p := soakPlan{seed: r.Uint64(), there: size(), back: size(), cutAt: -1, cutByAcceptor: r.IntN(2) == 0}
	if r.IntN(4) == 0 {
		p.cutAt = r.IntN(1 + max(p.there, p.back))
	}
	class := ClassStream
	if r.IntN(4) == 0 {
		class = ClassSync
	}
	var st *Stream
	var err error
	for range 1000 {
		st, err = end.Open(context.Background(), OpenRequest{Kind: "soak", Class: class, Target: fmt.Sprint(p.seed, p.there, p.back, p.cutAt, p.cutByAcceptor)})
		if !errors.Is(err, ErrTooManyStreams) {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if err != nil {
		t.Error(err)
		return
	}
	s.run(t, st, p.seed, p.there, p.seed+1, p.back, p.cutAt, !p.cutByAcceptor)
}

func (s *soak) accept(t *testing.T, end *Session) {
	var tasks sync.WaitGroup
	defer tasks.Wait()
	for {
		st, err := end.Accept(context.Background())
		if err != nil {
			return
		}
		tasks.Go(func() {
			var p soakPlan
			if _, err := fmt.Sscan(st.Target(), &p.seed, &p.there, &p.back, &p.cutAt, &p.cutByAcceptor); err != nil {
				t.Error(err)
			}
			s.run(t, st, p.seed+1, p.back, p.seed, p.there, p.cutAt, p.cutByAcceptor)
		})
	}
}

// run plays one end: it writes out bytes and expects in bytes.
func (s *soak) run(t *testing.T, st *Stream, outSeed uint64, out int, inSeed uint64, in, cutAt int, cutHere bool) {
	var tasks sync.WaitGroup
	var wrote, read int
	var werr, rerr error
	maybeCut := func(n int) {
		if cutAt >= 0 && cutHere && n >= cutAt {
			_ = st.Reset(CodeApplication)
		}
	}
	tasks.Go(func() {
		gen, r := pattern(outSeed), rand.New(rand.NewPCG(outSeed, 1))
		buf := make([]byte, 100_000)
		for wrote < out && werr == nil {
			p := buf[:min(out-wrote, 1+r.IntN(len(buf)))]
			_, _ = gen.Read(p)
			var n int
			n, werr = st.Write(p)
			wrote += n
			maybeCut(wrote)
		}
		if werr == nil {
			werr = st.CloseWrite()
		}
	})
	tasks.Go(func() {
		gen, r := pattern(inSeed), rand.New(rand.NewPCG(inSeed, 2))
		buf, want := make([]byte, 50_000), make([]byte, 50_000)
		for rerr == nil {
			var n int
			n, rerr = st.Read(buf[:1+r.IntN(len(buf))])
			_, _ = gen.Read(want[:n])
			if string(buf[:n]) != string(want[:n]) {
				t.Errorf("stream %s: wrong bytes after %d", st.Target(), read)
				_ = st.Reset(CodeInternal)
				return
			}
			read += n
			maybeCut(read)
		}
	})
	tasks.Wait()
	s.bytes.Add(int64(read))
	_ = st.Close()
	if rerr == io.EOF && werr == nil {
		s.complete.Add(1)
		if read != in || wrote != out {
			t.Errorf("stream %s ended well with %d of %d read and %d of %d written", st.Target(), read, in, wrote, out)
		}
		return
	}
	s.cut.Add(1)
	if cutAt < 0 {
		t.Errorf("stream %s: read %v, write %v, though nobody reset it", st.Target(), rerr, werr)
	}
	for _, err := range []error{rerr, werr} {
		var reset *ResetError
		if err != nil && err != io.EOF && !errors.Is(err, net.ErrClosed) && !(errors.As(err, &reset) && reset.Code == CodeApplication) {
			t.Errorf("stream %s: %v", st.Target(), err)
		}
	}
}

// pattern generates a stream's bytes. Read in pieces of any size it gives the
// same bytes.
func pattern(seed uint64) io.Reader { return &generator{state: seed} }

type generator struct{ state, word, left uint64 }

func (g *generator) Read(p []byte) (int, error) {
	for i := range p {
		if g.left == 0 {
			g.state = g.state*6364136223846793005 + 1442695040888963407
			g.word, g.left = g.state>>8, 7
		}
		p[i] = byte(g.word)
		g.word >>= 8
		g.left--
	}
	return len(p), nil
}

func waitFor(t *testing.T, cond func() bool) {
	t.Helper()
	for range 1000 {
		if cond() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Error("condition not reached")
}
