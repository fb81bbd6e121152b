package link

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// recorder is what net/http gives a handler, as far as lines need it.
type recorder struct {
	mu      sync.Mutex
	header  http.Header
	code    int
	written bytes.Buffer
	flushed int // bytes that a Flush has sent
	flushes int
	err     error
}

func (r *recorder) Header() http.Header { return r.header }

func (r *recorder) WriteHeader(code int) { r.code = code }

func (r *recorder) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		return 0, r.err
	}
	return r.written.Write(p)
}

func (r *recorder) Flush() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.flushed = r.written.Len()
	r.flushes++
}

func (r *recorder) state() (flushed, flushes int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.flushed, r.flushes
}

func serveLines(t *testing.T, rec *recorder, path string, handler http.HandlerFunc) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, path, nil)
	if err != nil {
		t.Fatal(err)
	}
	gatherLines(handler).ServeHTTP(rec, req)
}

const logsPath = "/containerLogs/default/pod/container"

func TestLinesShareFlushes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rec := &recorder{header: http.Header{}}
		var want bytes.Buffer
		serveLines(t, rec, logsPath, func(w http.ResponseWriter, _ *http.Request) {
			for i := range 10_000 { // no time passes meanwhile
				line := fmt.Appendf(nil, "line %d\n", i)
				want.Write(line)
				if n, err := w.Write(line); n != len(line) || err != nil {
					t.Fatalf("%d, %v", n, err)
				}
				w.(http.Flusher).Flush()
			}
		})
		if !bytes.Equal(rec.written.Bytes(), want.Bytes()) {
			t.Errorf("%d bytes arrived of %d", rec.written.Len(), want.Len())
		}
		if rec.flushes != 1 {
			t.Errorf("%d flushes; want the first line's alone, as the end flushes by itself", rec.flushes)
		}
	})
}

func TestALineIsNotHeldBackForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rec := &recorder{header: http.Header{}}
		serveLines(t, rec, logsPath, func(w http.ResponseWriter, _ *http.Request) {
			say := func(text string) {
				w.Write([]byte(text))
				w.(http.Flusher).Flush()
			}
			want := func(what string, bytes, flushes int) {
				t.Helper()
				if b, f := rec.state(); b != bytes || f != flushes {
					t.Errorf("%s: %d bytes in %d flushes; want %d in %d", what, b, f, bytes, flushes)
				}
			}
			say("1")
			want("the first", 1, 1)
			say("2")
			say("3")
			want("two more at once", 1, 1)
			time.Sleep(lineDelay)
			synctest.Wait()
			want("a moment later", 3, 2)
			time.Sleep(lineDelay / 2)
			say("4")
			time.Sleep(lineDelay / 2)
			synctest.Wait()
			want("the delay counts from the last flush", 4, 3)
			time.Sleep(time.Hour)
			say("5")
			want("after a pause", 5, 4)
			say("6")
		})
		if rec.written.String() != "123456" {
			t.Errorf("at the end: %q", rec.written.String())
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if rec.flushes != 4 {
			t.Error("a flush after the handler's end")
		}
	})
}

func TestLinesOfAnySize(t *testing.T) {
	rec := &recorder{header: http.Header{}}
	var want bytes.Buffer
	rnd := rand.New(rand.NewPCG(1, 2))
	serveLines(t, rec, logsPath, func(w http.ResponseWriter, _ *http.Request) {
		for range 2000 {
			line := make([]byte, rnd.IntN(200))
			if rnd.IntN(50) == 0 {
				line = make([]byte, rnd.IntN(3*lineBuffer))
			}
			for i := range line {
				line[i] = byte(rnd.Uint32())
			}
			want.Write(line)
			if _, err := w.Write(line); err != nil {
				t.Fatal(err)
			}
			clear(line) // the writer may not keep it
			if rnd.IntN(3) > 0 {
				w.(http.Flusher).Flush()
			}
		}
	})
	if !bytes.Equal(rec.written.Bytes(), want.Bytes()) {
		t.Errorf("%d bytes arrived of %d, or others", rec.written.Len(), want.Len())
	}
}

func TestLinesTellOfAReaderThatIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gone := errors.New("gone")
		rec := &recorder{header: http.Header{}}
		serveLines(t, rec, logsPath, func(w http.ResponseWriter, _ *http.Request) {
			say := func() error {
				_, err := w.Write([]byte("line\n"))
				w.(http.Flusher).Flush()
				return err
			}
			if err := say(); err != nil {
				t.Error(err)
			}
			rec.err = gone
			if err := say(); err != nil {
				t.Errorf("before it is known: %v", err)
			}
			time.Sleep(lineDelay)
			synctest.Wait()
			if err := say(); !errors.Is(err, gone) {
				t.Errorf("after: %v", err)
			}
		})
	})
}

func TestOtherRequestsAreNotGathered(t *testing.T) {
	rec := &recorder{header: http.Header{}}
	serveLines(t, rec, "/exec/default/pod/container", func(w http.ResponseWriter, _ *http.Request) {
		if w != http.ResponseWriter(rec) {
			t.Errorf("exec, which takes the connection over, got a %T", w)
		}
	})
	serveLines(t, rec, logsPath, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotFound) })
	if rec.code != http.StatusNotFound {
		t.Errorf("code %d", rec.code)
	}
}
