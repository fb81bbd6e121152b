package autonomy

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"github.com/skerry-io/skerry/edgecore/store"
)

// Images is what the runtime knows of images.
type Images interface {
	Missing(ctx context.Context, refs []string) ([]string, error)
	Filesystems(ctx context.Context) ([]string, error)
	SandboxImage(ctx context.Context) string
}

// Link is the state of the tunnel.
type Link struct {
	Connected bool
	Drill     bool      // it is cut on purpose
	Since     time.Time // of the present state
	LastSync  time.Time
	Outbox    int
}

// Config of a Monitor.
type Config struct {
	Store       *store.Store             // required
	NodeName    string                   // required
	Images      Images                   // required
	Link        func() Link              // required
	Certificate func() *x509.Certificate // the node's; required, may return nil
	StrictPull  bool                     // imagePullPolicy Always needs the registry
	CSI         bool                     // the kubelet has the CSI volume plugin
	// Conditions are further ones of the Node, in the words of other parts; nil
	// means none.
	Conditions func() []corev1.NodeCondition
	Dirs       map[string]string // directories that need room, by what they are for

	Settle time.Duration    // after the last change; zero means 10 s
	Period time.Duration    // without any change; zero means 10 min
	Spare  time.Duration    // between two writes of the conditions; zero means 30 s
	Clock  func() time.Time // nil means time.Now
	Log    *slog.Logger     // nil discards
}

// Monitor keeps the verdict up to date. It is safe for concurrent use.
type Monitor struct {
	cfg    Config
	statfs func(dir string) (freeSpace, unix.Fsid, error)
	kick   chan struct{} // something changed

	mu   sync.Mutex
	last Report
}

// linkPeriod is how often the link's state is looked at; a tunnel that comes
// and goes within it is not told.
const linkPeriod = 10 * time.Second

// New checks cfg; it starts nothing.
func New(cfg Config) (*Monitor, error) {
	if cfg.Store == nil || cfg.NodeName == "" || cfg.Images == nil || cfg.Link == nil || cfg.Certificate == nil {
		return nil, errors.New("autonomy: Store, NodeName, Images, Link and Certificate are required")
	}
	if cfg.Settle <= 0 {
		cfg.Settle = 10 * time.Second
	}
	if cfg.Period <= 0 {
		cfg.Period = 10 * time.Minute
	}
	if cfg.Spare <= 0 {
		cfg.Spare = 30 * time.Second
	}
	if cfg.Clock == nil {
		cfg.Clock = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Monitor{cfg: cfg, statfs: statfs, kick: make(chan struct{}, 1)}, nil
}

// Run looks and writes until ctx ends.
func (m *Monitor) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, resource := range []string{"pods", "secrets", "configmaps", "persistentvolumeclaims", "persistentvolumes"} {
		g.Go(func() error { return m.follow(ctx, resource) })
	}
	g.Go(func() error { return m.loop(ctx) })
	err := g.Wait()
	if ctx.Err() != nil || errors.Is(err, store.ErrClosed) {
		return nil
	}
	return err
}

// Last is the verdict of the last look; At is zero before the first.
func (m *Monitor) Last() Report {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.last
}

// Now looks at everything and keeps the verdict.
func (m *Monitor) Now(ctx context.Context) Report {
	r := m.Check(ctx)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.last.At.IsZero() || m.last.Ready != r.Ready {
		m.cfg.Log.Info("readiness for being alone", "ready", r.Ready, "breaks", r.Breaking(), "warnings", r.Warnings())
	}
	m.last = r
	return r
}

// follow kicks the loop when an object of the resource changes.
func (m *Monitor) follow(ctx context.Context, resource string) error {
	for {
		w, err := m.cfg.Store.Watch(ctx, resource, m.cfg.Store.RV())
		if err != nil {
			return fmt.Errorf("autonomy: watch %s: %w", resource, err)
		}
		for {
			_, _, err := w.Next(ctx, 0)
			if errors.Is(err, store.ErrExpired) {
				break // much has changed
			}
			if err != nil {
				return err
			}
			m.changed()
		}
		m.changed()
	}
}

// Changed tells of a change that is not the store's: of the runtime's images.
func (m *Monitor) Changed() { m.changed() }

func (m *Monitor) changed() {
	select {
	case m.kick <- struct{}{}:
	default:
	}
}

// loop looks once things have settled, or after ten times that if they do not.
func (m *Monitor) loop(ctx context.Context) error {
	var (
		settle   = time.NewTimer(m.cfg.Settle) // the first look waits for the pods' start
		pending  = time.Now()                  // when what is to be looked at began
		waiting  = true
		period   = time.NewTicker(m.cfg.Period)
		links    = time.NewTicker(linkPeriod)
		scribe   = scribe{m: m}
		quietest = 10 * m.cfg.Settle
	)
	defer settle.Stop()
	defer period.Stop()
	defer links.Stop()
	look := func() {
		waiting = false
		scribe.write(ctx, m.Now(ctx))
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-m.kick:
			if !waiting {
				waiting, pending = true, time.Now()
			}
			settle.Reset(min(m.cfg.Settle, max(0, quietest-time.Since(pending))))
		case <-settle.C:
			look()
		case <-period.C:
			look()
		case <-links.C:
			// The report may be fresher: edgecore status looks as well.
			scribe.write(ctx, m.Last())
		}
	}
}
