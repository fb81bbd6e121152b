// Package edges knows which nodes are connected, where and since when. It
// takes their tunnels, serves the streams on them, opens streams to kubelets,
// and tells the cluster that a node is alive for as long as its tunnel is.
//
// A node is who its certificate says; nothing a node sends names it. The newest
// authenticated tunnel of a node wins and ends the older one.
//
// The package never reads or writes Kubernetes objects other than the Lease
// that stands for a node's heartbeat: objects go down through cloudhub/feed and
// up through cloudhub/upstream. It never renews the Lease of a silent node, be
// its tunnel up or not: the cluster shall see the truth.
package edges

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/kubernetes"

	"github.com/skerry-io/skerry/cloudhub/enroll"
	"github.com/skerry-io/skerry/cloudhub/feed"
	"github.com/skerry-io/skerry/cloudhub/presence"
	"github.com/skerry-io/skerry/tunnel"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// apiBacklog is how many API connections of a node may wait to be served.
const apiBacklog = 32

// Registry tells who a node is. See enroll.Enroll.
type Registry interface {
	// Identify tells which node shows the certificate, or refuses it.
	Identify(cert *x509.Certificate) (enroll.NodeRecord, error)
	// Current reports whether what Identify returned still stands.
	Current(rec enroll.NodeRecord) bool
	// NodeByIP returns the node with that virtual IP.
	NodeByIP(ip netip.Addr) (name string, ok bool)
}

// Syncer holds the sync conversation with a node. See feed.Feed.Serve.
type Syncer interface {
	Serve(ctx context.Context, node string, stream net.Conn, w feed.Writer) error
}

// Conversation holds one more conversation with a node. See devices.Devices.
type Conversation interface {
	Serve(ctx context.Context, node string, stream net.Conn) error
}

// Upstream acts at the API server as a node. See upstream.Upstream.
type Upstream interface {
	feed.Writer
	Relay(ctx context.Context, node string, conns net.Listener) error
}

// Presence is told of nodes that go away, and of silent ones that are heard
// again. It must not block. See presence.Presence.
type Presence interface {
	Away(node string, a presence.Absence)
	Heard(node string)
	// LastSync is when the node was last in step, zero if that is not known.
	LastSync(node string, heard time.Time) time.Time
}

// Config of Edges. All but Others, Tunnel, Clock and Log are required.
type Config struct {
	Registry Registry
	Feed     Syncer
	Upstream Upstream
	Presence Presence
	Client   kubernetes.Interface // for Leases
	// Others are conversations besides the sync, by the kind of stream. A node
	// has one of a kind at a time; its end does not end the tunnel.
	Others map[string]Conversation
	Tunnel tunnel.Config
	Clock  func() time.Time // nil means time.Now
	Log    *slog.Logger     // nil discards
}

// Edges is safe for concurrent use.
type Edges struct {
	cfg Config
	log *slog.Logger
	now func() time.Time

	kubelets *http.Client // by node name, over the tunnels

	started chan struct{}   // closed by Run
	ctx     context.Context // Run's
	wg      sync.WaitGroup  // sessions

	mu       sync.Mutex
	stopped  bool
	nodes    map[string]*edge     // connected
	lastSeen map[string]time.Time // when a node that is away was last heard
}

// edge is one connected tunnel.
type edge struct {
	name       string
	enrollment string
	session    *tunnel.Session
	remote     string
	since      time.Time
	pulse      func() (heard time.Time, within time.Duration) // when it was heard, and how soon it promised to be again
	silent     bool                                           // it broke that promise; guarded by Edges.mu
	cancel     context.CancelCauseFunc                        // with an ending, which the node is told
	done       chan struct{}                                  // closed once nothing is done for this tunnel any more
}

// ending is why the hub ends a tunnel.
type ending struct {
	code   uint32
	reason string
}

func (e ending) Error() string { return e.reason }

var stopping = ending{tunnel.CloseDrain, "the hub is stopping"}

// New checks cfg; it starts nothing.
func New(cfg Config) (*Edges, error) {
	if cfg.Registry == nil || cfg.Feed == nil || cfg.Upstream == nil || cfg.Presence == nil || cfg.Client == nil {
		return nil, errors.New("edges: Registry, Feed, Upstream, Presence and Client are required")
	}
	if cfg.Clock == nil {
		cfg.Clock = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	e := &Edges{
		cfg: cfg, log: cfg.Log, now: cfg.Clock,
		started:  make(chan struct{}),
		nodes:    map[string]*edge{},
		lastSeen: map[string]time.Time{},
	}
	e.kubelets = e.kubeletClient()
	return e, nil
}

// Run renews the Leases of connected nodes until ctx ends, then ends all
// tunnels and waits for what they carried.
func (e *Edges) Run(ctx context.Context) error {
	e.ctx = ctx
	close(e.started)
	e.renewLeases(ctx)
	e.mu.Lock()
	e.stopped = true // from here on no tunnel is entered; those there are see ctx
	e.mu.Unlock()
	e.wg.Wait()
	e.kubelets.CloseIdleConnections()
	return nil
}

// ServeHTTP takes a node's tunnel. The request's TLS connection must carry a
// verified client certificate.
func (e *Edges) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	select {
	case <-e.started:
	default:
		w.Header().Set("Retry-After", "1")
		http.Error(w, "the hub is starting", http.StatusServiceUnavailable)
		return
	}
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		http.Error(w, "a node certificate is required: join this node first", http.StatusUnauthorized)
		return
	}
	rec, err := e.cfg.Registry.Identify(r.TLS.PeerCertificates[0])
	if err != nil {
		e.log.Warn("tunnel refused", "remote", r.RemoteAddr, "err", err)
		enroll.WriteRefusal(w, err, e.now())
		return
	}
	session, err := tunnel.Upgrade(w, r, e.cfg.Tunnel)
	if err != nil {
		e.log.Warn("tunnel upgrade failed", "node", rec.Name, "remote", r.RemoteAddr, "err", err)
		return // Upgrade has answered
	}
	ctx, cancel := context.WithCancelCause(e.ctx)
	n := &edge{name: rec.Name, enrollment: rec.Enrollment, session: session, remote: r.RemoteAddr, since: e.now(), cancel: cancel, done: make(chan struct{}),
		pulse: func() (time.Time, time.Duration) {
			st := session.Stats()
			return st.LastHeard, st.PingInterval
		}}
	old, ok := e.connect(n)
	if !ok {
		cancel(stopping)
		session.CloseWith(stopping.code, stopping.reason)
		return
	}
	if !e.cfg.Registry.Current(rec) {
		// Revoked between the two looks, when Cut could not find the tunnel.
		e.Cut(rec.Name, rec.Enrollment, "this node's enrolment was revoked")
	}
	// The handler returns, so that net/http's buffers and this stack go.
	go func() {
		defer e.wg.Done()
		defer close(n.done)
		defer cancel(nil)
		if old != nil {
			<-old.done // a write of the older tunnel must not land after one of this
		}
		err := e.serve(ctx, n)
		e.disconnect(n, absence(ctx, n.session.Err(), err))
	}()
}

// connect enters n as the node's tunnel. An older one is told to end, and
// returned.
func (e *Edges) connect(n *edge) (old *edge, ok bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.stopped {
		return nil, false
	}
	if old = e.nodes[n.name]; old != nil {
		old.cancel(ending{tunnel.CloseReplaced, "a newer tunnel of this node took over"})
	}
	e.nodes[n.name] = n
	delete(e.lastSeen, n.name)
	e.wg.Add(1)
	e.log.Info("node connected", "node", n.name, "remote", n.remote)
	return old, true
}

func (e *Edges) disconnect(n *edge, a presence.Absence) {
	if a.Heard, _ = n.pulse(); a.Heard.IsZero() {
		a.Heard = n.since
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.nodes[n.name] != n {
		return // replaced: the node is not away
	}
	delete(e.nodes, n.name)
	e.lastSeen[n.name] = a.Heard
	e.cfg.Presence.Away(n.name, a)
	e.log.Info("node disconnected", "node", n.name, "remote", n.remote,
		"after", e.now().Sub(n.since).Round(time.Millisecond), "reason", a.Message)
}

// absence tells why a tunnel ended: the hub ended it, which ctx tells; or else
// its session did; or else serving it failed, and the hub closed the session.
func absence(ctx context.Context, ended, served error) presence.Absence {
	a := presence.Absence{Reason: presence.ReasonBroken}
	var hub ending
	var closed *tunnel.CloseError
	switch {
	case errors.As(context.Cause(ctx), &hub):
		a.Message = hub.reason
		if hub.code == tunnel.CloseRevoked {
			a.Reason = presence.ReasonEnrolment
		}
		return a
	case errors.As(ended, &closed) && closed.Remote:
		a.Reason = presence.ReasonClosed
	case errors.As(ended, &closed) && closed.Code == tunnel.CloseDead:
		a.Reason = presence.ReasonSilent
	case errors.As(ended, &closed) && closed.Code == tunnel.CloseNormal && served != nil:
		ended = served
	}
	if ended != nil {
		a.Message = ended.Error()
	}
	return a
}

// serve takes the streams of one tunnel until it ends.
func (e *Edges) serve(ctx context.Context, n *edge) error {
	ended := ctx // by the hub, with an ending as its cause
	// What the tunnel carries outlives that end until the node has been told
	// why: a node that saw its sync stream go first would leave not knowing.
	g, ctx := errgroup.WithContext(context.WithoutCancel(ctx))
	api := tunnel.NewListener(apiBacklog)
	g.Go(func() error { return e.cfg.Upstream.Relay(ctx, n.name, api) })
	g.Go(func() error {
		defer api.Close()
		syncing := false
		others := openKinds{open: map[string]bool{}}
		for {
			st, err := n.session.Accept(ctx)
			if err != nil {
				return err
			}
			switch st.Kind() {
			case edgeapi.KindSync:
				if syncing {
					st.Reset(tunnel.CodeRefused)
					continue
				}
				syncing = true
				g.Go(func() error {
					if err := e.cfg.Feed.Serve(ctx, n.name, st, e.cfg.Upstream); err != nil {
						return fmt.Errorf("sync: %w", err)
					}
					return errors.New("the node ended its sync stream")
				})
			case edgeapi.KindAPI:
				if !api.Offer(st) {
					st.Reset(tunnel.CodeRefused)
				}
			default:
				if other := e.cfg.Others[st.Kind()]; other != nil {
					kind := st.Kind()
					if !others.take(kind) {
						st.Reset(tunnel.CodeRefused)
						continue
					}
					g.Go(func() error {
						err := other.Serve(ctx, n.name, st)
						others.leave(kind)
						if err != nil && ctx.Err() == nil && n.session.Err() == nil {
							e.log.Warn("a conversation with a node failed; the node opens it again", "node", n.name, "kind", kind, "err", err)
						}
						return nil
					})
					continue
				}
				e.log.Debug("stream of unknown kind refused", "node", n.name, "kind", st.Kind())
				st.Reset(tunnel.CodeNoKind)
			}
		}
	})
	// Whatever ends first ends the tunnel: a node without its sync is not
	// connected in any useful sense, and will come again.
	g.Go(func() error {
		why := ending{code: tunnel.CloseNormal}
		select {
		case <-ended.Done():
			if !errors.As(context.Cause(ended), &why) {
				why = stopping
			}
		case <-ctx.Done():
		}
		return n.session.CloseWith(why.code, why.reason)
	})
	err := g.Wait()
	if cause := n.session.Err(); cause != nil && errors.Is(err, context.Canceled) {
		return cause
	}
	return err
}

// openKinds are the kinds of stream that a tunnel has open.
type openKinds struct {
	mu   sync.Mutex
	open map[string]bool
}

func (o *openKinds) take(kind string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.open[kind] {
		return false
	}
	o.open[kind] = true
	return true
}

func (o *openKinds) leave(kind string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.open, kind)
}

// Cut ends the tunnel of an identity that lost its standing. A newer enrolment
// of the same name is left alone.
func (e *Edges) Cut(name, enrollment, reason string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if n := e.nodes[name]; n != nil && n.enrollment == enrollment {
		n.cancel(ending{tunnel.CloseRevoked, reason})
	}
}

// Node is what is known of one connected node.
type Node struct {
	Name   string
	Remote string // address the tunnel comes from
	Since  time.Time
	Tunnel tunnel.Stats
}

// Connected returns the connected nodes in no particular order.
func (e *Edges) Connected() []Node {
	e.mu.Lock()
	defer e.mu.Unlock()
	out := make([]Node, 0, len(e.nodes))
	for _, n := range e.nodes {
		out = append(out, Node{Name: n.name, Remote: n.remote, Since: n.since, Tunnel: n.session.Stats()})
	}
	return out
}
