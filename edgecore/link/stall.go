package link

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/skerry-io/skerry/tunnel"
)

// A tunnel may be alive while the hub behind it is not: its pings are answered
// by a read loop that waits for nobody. So each wait for the hub is bounded, by
// the time without any progress rather than by the time for all of it, as links
// are slow:
//
//   - greetTimeout for the Welcome, once the inventory is on its way;
//   - stallTimeout without a byte of the differences, until the first are complete;
//   - stallTimeout without any result, while writes wait for theirs. The hub
//     gives the API server 30 s for one, and answers then;
//   - stallTimeout for each sendChunk of what is sent.
const (
	greetTimeout = 45 * time.Second
	stallTimeout = 2 * time.Minute
	sendChunk    = 16 << 10
)

var errHubStalls = errors.New("the hub keeps the tunnel up but says nothing; trying another connection")

// patient is a sync stream with an end to its patience.
type patient struct {
	*tunnel.Stream
	stall time.Duration

	mu     sync.Mutex
	within time.Duration // the next byte is awaited within this; zero means no limit
	what   string
}

// expect bounds the wait for each next byte from now on.
func (p *patient) expect(what string, within time.Duration) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.what, p.within = what, within
	return p.armLocked()
}

func (p *patient) armLocked() error {
	var at time.Time
	if p.within > 0 {
		at = time.Now().Add(p.within)
	}
	return p.Stream.SetReadDeadline(at)
}

func (p *patient) Read(b []byte) (int, error) {
	p.mu.Lock()
	err := p.armLocked()
	p.mu.Unlock()
	if err != nil {
		return 0, err
	}
	n, err := p.Stream.Read(b)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		p.mu.Lock()
		defer p.mu.Unlock()
		err = fmt.Errorf("%w (waited %v for %s)", errHubStalls, p.within, p.what)
	}
	return n, err
}

func (p *patient) Write(b []byte) (sent int, err error) {
	for sent < len(b) && err == nil {
		var n int
		if err = p.Stream.SetWriteDeadline(time.Now().Add(p.stall)); err == nil {
			n, err = p.Stream.Write(b[sent:min(sent+sendChunk, len(b))])
		}
		sent += n
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("%w (it took no data for %v)", errHubStalls, p.stall)
	}
	return sent, err
}
