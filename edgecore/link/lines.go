package link

import (
	"net/http"
	"strings"
	"sync"
	"time"
)

const (
	// lineBuffer is what one stream of log lines holds back at most.
	lineBuffer = 32 << 10
	// lineDelay is for how long at most. The first line after a pause is not
	// held back at all.
	lineDelay = 5 * time.Millisecond
)

// gatherLines lets the kubelet's log lines share messages. The kubelet flushes
// after every line, and each flush would be a chunk, a message and a TLS record
// of its own on the tunnel, and again between hub and API server: 4 MB/s of
// lines of 64 bytes where gathered ones reach more than ten times that.
func gatherLines(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasPrefix(r.URL.Path, "/containerLogs/") {
			h.ServeHTTP(w, r)
			return
		}
		g := &gatherer{ResponseWriter: w, now: time.Now}
		defer g.finish()
		h.ServeHTTP(g, r)
	})
}

// gatherer is a http.ResponseWriter whose Flush may come a little later.
type gatherer struct {
	http.ResponseWriter // used with mu held, but for Header
	now                 func() time.Time

	mu       sync.Mutex
	begun    bool   // something was sent, and with it the header
	held     []byte // written, not yet sent
	wanted   bool   // a Flush has asked for what is held
	sent     time.Time
	timer    *time.Timer // set once a Flush had to wait
	finished bool
	err      error // of a send that nobody waited for
}

// Unwrap is for http.ResponseController.
func (g *gatherer) Unwrap() http.ResponseWriter { return g.ResponseWriter }

func (g *gatherer) WriteHeader(code int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.sendLocked()
	g.ResponseWriter.WriteHeader(code)
}

func (g *gatherer) Write(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.err != nil {
		return 0, g.err
	}
	if len(g.held)+len(p) > lineBuffer {
		g.sendLocked()
	}
	if len(p) > lineBuffer {
		if g.err != nil {
			return 0, g.err
		}
		g.begun = true
		return g.ResponseWriter.Write(p)
	}
	if g.held == nil {
		g.held = make([]byte, 0, lineBuffer)
	}
	g.held = append(g.held, p...)
	return len(p), g.err
}

// Flush implements http.Flusher.
func (g *gatherer) Flush() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.wanted && len(g.held) > 0 {
		return // the timer runs
	}
	wait := lineDelay - g.now().Sub(g.sent)
	// The header goes out from the handler's goroutine, which alone may touch
	// it.
	if !g.begun || wait <= 0 {
		g.sendLocked()
		g.flushLocked()
		return
	}
	g.wanted = true
	if g.timer == nil {
		g.timer = time.AfterFunc(wait, g.late)
	} else {
		g.timer.Reset(wait)
	}
}

// late sends what a Flush has left to the timer.
func (g *gatherer) late() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.finished && g.wanted {
		g.sendLocked()
		g.flushLocked()
	}
}

func (g *gatherer) finish() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.finished = true
	if g.timer != nil {
		g.timer.Stop()
	}
	g.sendLocked()
}

func (g *gatherer) sendLocked() {
	if len(g.held) == 0 || g.err != nil {
		return
	}
	g.begun = true
	_, g.err = g.ResponseWriter.Write(g.held)
	g.held = g.held[:0]
}

func (g *gatherer) flushLocked() {
	g.begun = true
	g.wanted = false
	g.sent = g.now()
	if f, ok := g.ResponseWriter.(http.Flusher); ok {
		f.Flush()
	}
}
