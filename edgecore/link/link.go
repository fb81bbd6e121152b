// Package link is the edge end of the tunnel: it keeps one to the hub, brings
// the node's store in step with the cloud over it, sends the outbox up, serves
// the kubelet's handler to the hub, holds the other parts' conversations with it,
// and lends the connection to those who ask the API server something.
//
// It owns no state that matters: what came down is in the store before it is
// acknowledged, what goes up leaves the outbox only when the API server has
// answered. The node runs without it.
//
// A Node that is deleted in the cloud ends what the link does until this machine
// has joined again, see membership.go. A hub that stalls is left, see stall.go.
//
// It never starts a pod, stops one only as WhenDeleted says, never reads the
// kubelet's objects other than through the store, and never decides who may call
// the kubelet: the hub is the only peer, authenticated by TLS, and has checked
// the caller.
package link

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/skerry-io/skerry/edgecore/store"
	"github.com/skerry-io/skerry/tunnel"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// Config of a Link.
type Config struct {
	Dialer   *tunnel.Dialer // required
	Store    *store.Store   // required
	NodeName string         // required
	Agent    string         // edgecore's version, told to the hub
	// Kubelet returns the handler that serves the hub's requests; it may wait
	// until the kubelet has started. Required.
	Kubelet func(ctx context.Context) (http.Handler, error)
	// JoinID names the joining that this node runs under, see Rejoin.
	JoinID string
	// WhenDeleted says what becomes of the pods when the Node is deleted in
	// the cloud; empty means KeepPods.
	WhenDeleted WhenDeleted
	// HubTime is told the hub's clock with each welcome; nil means nobody cares.
	HubTime func(now time.Time)
	Log     *slog.Logger // nil discards

	stall time.Duration // stallTimeout, but in tests
}

// Link is safe for concurrent use.
type Link struct {
	cfg Config
	log *slog.Logger

	extras []*extra // see Hold; not changed once Run is called

	firstSync chan struct{} // closed once the store holds a complete set
	syncOnce  sync.Once

	mu      sync.Mutex
	state   State
	session *tunnel.Session // while connected
	past    past
	talk    *talk         // the conversation under way
	pauses  int           // callers of Pause that have not resumed
	resumed chan struct{} // closed when pauses is 0 again
	cut     func()        // ends the present tunnel for a pause
}

// State is what a Link knows about itself.
type State struct {
	Connected bool
	Since     time.Time // of the present state
	LastSync  time.Time // when the store was last known to be in step
	LastError string    // why the last tunnel ended or could not be made, until one is in step
	Deleted   time.Time // when the node heard that its Node was deleted in the cloud; zero if it was not
	Hub       string    // the hub's version, once connected
	Tunnel    tunnel.Stats

	// Sync bytes since the start, before compression and on the wire.
	RawOut, WireOut, RawIn, WireIn uint64
}

// New checks cfg; it starts nothing.
func New(cfg Config) (*Link, error) {
	if cfg.Dialer == nil || cfg.Store == nil || cfg.Kubelet == nil || cfg.NodeName == "" {
		return nil, errors.New("link: Dialer, Store, Kubelet and NodeName are required")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.stall == 0 {
		cfg.stall = stallTimeout
	}
	switch cfg.WhenDeleted {
	case "":
		cfg.WhenDeleted = KeepPods
	case KeepPods, StopPods:
	default:
		return nil, fmt.Errorf("link: WhenDeleted %q: use %s or %s", cfg.WhenDeleted, KeepPods, StopPods)
	}
	gone, _, err := storedDeletion(cfg.Store)
	if err != nil {
		return nil, err
	}
	l := &Link{cfg: cfg, log: cfg.Log, firstSync: make(chan struct{}), state: State{Since: time.Now(), Deleted: gone.At}}
	told := cfg.Dialer.Retry
	cfg.Dialer.Retry = func(err error, wait time.Duration) error {
		// A tunnel that was closed here was closed for a reason, which is noted
		// already.
		var closed *tunnel.CloseError
		if !errors.As(err, &closed) || closed.Remote {
			l.setError(err)
		}
		if told != nil {
			return told(err, wait)
		}
		return nil
	}
	if cfg.Store.Synced() {
		l.syncOnce.Do(func() { close(l.firstSync) })
	}
	return l, nil
}

// Run keeps the tunnel until ctx ends, and returns when all it started has
// stopped.
func (l *Link) Run(ctx context.Context) error {
	if l.isDeleted() {
		l.log.Warn("this node's Node object was deleted in the cloud before; it needs a new join", "node", l.cfg.NodeName,
			"pods", string(l.cfg.WhenDeleted), "next", RejoinHint(l.cfg.NodeName))
		if l.cfg.WhenDeleted == StopPods { // also for an operator who chose it since
			if err := l.stopPods(ctx); err != nil {
				return fmt.Errorf("stop the pods of the deleted node: %w", err)
			}
		}
	}
	for {
		turn, end := l.awaitTurn(ctx)
		err := l.cfg.Dialer.Run(turn, l.serve)
		paused := turn.Err() != nil
		end()
		if ctx.Err() != nil {
			return nil
		}
		if !paused {
			return err
		}
	}
}

// FirstSync is closed once the store holds a complete set of this node's
// objects, from this run or an earlier one. The kubelet must not start before:
// it would stop every container that is missing from its list.
func (l *Link) FirstSync() <-chan struct{} { return l.firstSync }

// State returns what the link knows about itself.
func (l *Link) State() State {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.state
	if l.session != nil {
		s.Tunnel = l.session.Stats()
	}
	if l.talk != nil {
		l.talk.countInto(&s)
	}
	return s
}

// serve uses one tunnel until it ends.
func (l *Link) serve(ctx context.Context, s *tunnel.Session) error {
	l.connected(s)
	g, ctx := errgroup.WithContext(ctx)
	kubelet := tunnel.NewListener(kubeletBacklog)
	g.Go(func() error { return l.accept(ctx, s, kubelet) })
	g.Go(func() error { return l.serveKubelet(ctx, kubelet) })
	g.Go(func() error { return l.sync(ctx, s) })
	g.Go(func() error { return l.streams(ctx, s) })
	g.Go(func() error {
		// Whatever ends first ends the tunnel, and with it the others.
		<-ctx.Done()
		s.Close()
		return nil
	})
	err := g.Wait()
	if cause := s.Err(); cause != nil && errors.Is(err, context.Canceled) {
		err = cause
	}
	l.disconnected(s, err)
	return err
}

// kubeletBacklog is how many connections of the hub may wait to be served.
const kubeletBacklog = 64

// accept sorts the streams that the hub opens.
func (l *Link) accept(ctx context.Context, s *tunnel.Session, kubelet *tunnel.Listener) error {
	defer kubelet.Close()
	for {
		st, err := s.Accept(ctx)
		if err != nil {
			return err
		}
		switch {
		case st.Kind() != edgeapi.KindKubelet:
			st.Reset(tunnel.CodeNoKind)
		case !kubelet.Offer(st):
			st.Reset(tunnel.CodeRefused)
		}
	}
}

// serveKubelet serves the kubelet's handler on the hub's streams. exec, attach
// and port-forward take their connection over; it ends with the tunnel's
// session, as every stream does.
func (l *Link) serveKubelet(ctx context.Context, streams net.Listener) error {
	srv := &http.Server{
		Handler: gatherLines(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			h, err := l.cfg.Kubelet(r.Context())
			if err != nil {
				http.Error(w, fmt.Sprintf("node %s: %v", l.cfg.NodeName, err), http.StatusServiceUnavailable)
				return
			}
			h.ServeHTTP(w, r)
		})),
		ReadHeaderTimeout: 20 * time.Second,
		IdleTimeout:       30 * time.Second, // an idle stream keeps the hub from parking the tunnel
		MaxHeaderBytes:    64 << 10,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ErrorLog:          slog.NewLogLogger(l.log.Handler(), slog.LevelDebug),
	}
	err := srv.Serve(streams)
	srv.Close()
	if errors.Is(err, net.ErrClosed) || errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serve the kubelet's handler: %w", err)
}

// NetworkChanged is told when the machine's network has changed: the hub is
// dialled without further waiting, or the tunnel is tested at once.
func (l *Link) NetworkChanged() {
	l.mu.Lock()
	s := l.session
	l.mu.Unlock()
	if s != nil {
		s.Probe()
	}
	l.cfg.Dialer.Kick() // also for a tunnel that the test finds dead
}

// DialAPI opens a connection whose HTTP/1.1 requests the hub sends to the API
// server as this node. It fails at once while there is no tunnel.
func (l *Link) DialAPI(ctx context.Context) (net.Conn, error) {
	l.mu.Lock()
	s := l.session
	l.mu.Unlock()
	if s == nil {
		return nil, ErrOffline
	}
	return s.Open(ctx, tunnel.OpenRequest{Kind: edgeapi.KindAPI, Class: tunnel.ClassStream})
}

// ErrOffline is returned by DialAPI while there is no tunnel.
var ErrOffline = errors.New("not connected to the hub")

func (l *Link) connected(s *tunnel.Session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.session = s
	l.state.Connected, l.state.Since = true, time.Now()
	l.log.Info("connected to the hub", "url", l.cfg.Dialer.URL)
}

func (l *Link) disconnected(s *tunnel.Session, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.past.add(s.Stats())
	l.past.tunnels++
	if l.session != s {
		return // it was drained: the next one serves already
	}
	l.session = nil
	l.state.Connected, l.state.Since = false, time.Now()
	if err != nil {
		l.state.LastError = err.Error()
	}
	l.log.Warn("disconnected from the hub; pods keep running", "err", err)
}

func (l *Link) setError(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.state.LastError = err.Error()
}
