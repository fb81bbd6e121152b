package link

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/skerry-io/skerry/edgecore/store"
	"github.com/skerry-io/skerry/tunnel"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

const soon = 20 * time.Second // for what must come at once

// noLeaks fails the test if goroutines of the link or its tunnels outlive it.
func noLeaks(t *testing.T) {
	t.Helper()
	t.Cleanup(func() {
		var left []string
		for range 300 {
			buf := make([]byte, 4<<20)
			left = nil
			for _, g := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
				if strings.Contains(g, "testing.tRunner(") {
					continue
				}
				if strings.Contains(g, "skerry/edgecore/link.(*") || strings.Contains(g, "skerry/tunnel.(*") {
					left = append(left, g)
				}
			}
			if len(left) == 0 {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Errorf("goroutines left:\n%s", strings.Join(left, "\n\n"))
	})
}

// rig is a link with a real store, and a hub whose part the test plays.
type rig struct {
	*Link
	t        *testing.T
	store    *store.Store
	sessions chan *tunnel.Session // as the hub sees them
	dialer   *tunnel.Dialer
	stop     func() // ends Run and waits
}

func openStore(t *testing.T) *store.Store {
	t.Helper()
	s, err := store.Open(store.Config{Path: filepath.Join(t.TempDir(), "edge.db")})
	must(t, err)
	t.Cleanup(func() { must(t, s.Close()) })
	return s
}

func newRig(t *testing.T, s *store.Store, change ...func(*Config)) *rig {
	t.Helper()
	return newHoldingRig(t, s, nil, change...)
}

func newHoldingRig(t *testing.T, s *store.Store, hold []Stream, change ...func(*Config)) *rig {
	t.Helper()
	r := &rig{t: t, store: s, sessions: make(chan *tunnel.Session, 16)}
	noLeaks(t)
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if s, err := tunnel.Upgrade(w, req, tunnel.Config{}); err == nil {
			r.sessions <- s
		}
	}))
	srv.TLS = &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"http/1.1"}}
	srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	pool := x509.NewCertPool()
	pool.AddCert(srv.Certificate())
	r.dialer = &tunnel.Dialer{
		URL: srv.URL, TLS: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13},
		Proxy:   func(*http.Request) (*url.URL, error) { return nil, nil },
		Backoff: tunnel.Backoff{First: time.Millisecond, Base: time.Millisecond, Max: 10 * time.Millisecond},
	}
	cfg := Config{
		Dialer: r.dialer, Store: s, NodeName: "edge-1", Agent: "edgecore/test",
		Kubelet: func(context.Context) (http.Handler, error) { return http.NotFoundHandler(), nil },
	}
	for _, c := range change {
		c(&cfg)
	}
	l, err := New(cfg)
	must(t, err)
	must(t, l.Hold(hold...))
	r.Link = l
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			must(t, err)
		case <-time.After(soon):
			t.Error("Run does not return")
		}
		for {
			select {
			case s := <-r.sessions:
				s.Close()
			default:
				return
			}
		}
	})
	t.Cleanup(r.stop)
	return r
}

// conversation is the hub's end of one sync stream.
type conversation struct {
	*edgeapi.Conn
	t       *testing.T
	session *tunnel.Session
	stream  *tunnel.Stream
	hello   edgeapi.Hello
	items   []edgeapi.Item
	batches int
	acked   uint64
}

// session waits for the node's next tunnel.
func (r *rig) session() *tunnel.Session {
	r.t.Helper()
	select {
	case s := <-r.sessions:
		r.t.Cleanup(func() { s.Close() })
		return s
	case <-time.After(soon):
		r.t.Fatalf("the node does not connect: %+v", r.State())
		return nil
	}
}

// hello takes the next tunnel and its greeting.
func (r *rig) hello() *conversation {
	r.t.Helper()
	s := r.session()
	ctx, cancel := context.WithTimeout(r.t.Context(), soon)
	defer cancel()
	st, err := s.Accept(ctx)
	must(r.t, err)
	if st.Kind() != edgeapi.KindSync || st.Class() != tunnel.ClassSync {
		r.t.Fatalf("first stream is %q in class %d", st.Kind(), st.Class())
	}
	c := &conversation{Conn: edgeapi.NewConn(st), t: r.t, session: s, stream: st}
	c.hello = receive[edgeapi.Hello](c)
	for last := false; !last; {
		inv := receive[edgeapi.Inventory](c)
		c.items = append(c.items, inv.Items...)
		c.batches++
		last = inv.Last
	}
	return c
}

// welcome takes the next tunnel and welcomes the node.
func (r *rig) welcome() *conversation {
	r.t.Helper()
	c := r.hello()
	c.send(edgeapi.Welcome{Version: edgeapi.Version, Agent: "hub/test", NodeName: "edge-1", Now: time.Now()})
	return c
}

// synced does so and sends a complete set.
func (r *rig) synced(ups ...edgeapi.Upsert) *conversation {
	r.t.Helper()
	c := r.welcome()
	c.delta(edgeapi.Delta{Seq: 1, Upserts: ups, Synced: true})
	return c
}

func (c *conversation) send(m edgeapi.Message) {
	c.t.Helper()
	if err := c.Send(m); err != nil {
		c.t.Fatal(err)
	}
}

// delta sends one and waits for its Ack; writes may come before.
func (c *conversation) delta(d edgeapi.Delta) {
	c.t.Helper()
	c.send(d)
	if a := receive[edgeapi.Ack](c); a.Seq != d.Seq {
		c.t.Fatalf("delta %d was answered with an ack of %d", d.Seq, a.Seq)
	}
}

// receive takes the next message, which must be an M.
func receive[M edgeapi.Message](c *conversation) M {
	c.t.Helper()
	must(c.t, c.stream.SetReadDeadline(time.Now().Add(soon)))
	m, err := c.Receive()
	must(c.t, err)
	out, ok := m.(M)
	if !ok {
		c.t.Fatalf("got %#v, want %T", m, out)
	}
	return out
}

// quiet fails if the node says something although it should wait.
func (c *conversation) quiet(why string) {
	c.t.Helper()
	must(c.t, c.stream.SetReadDeadline(time.Now().Add(100*time.Millisecond)))
	m, err := c.Receive()
	var timeout net.Error
	if !errors.As(err, &timeout) || !timeout.Timeout() {
		c.t.Fatalf("%s, got %#v, %v", why, m, err)
	}
}

// ended waits until the node has ended the tunnel.
func (c *conversation) ended() {
	c.t.Helper()
	select {
	case <-c.session.Done():
	case <-time.After(soon):
		c.t.Fatal("the node keeps the tunnel")
	}
}

func (c *conversation) result(w edgeapi.Write, code int) {
	c.t.Helper()
	c.send(edgeapi.WriteResult{ID: w.ID, Code: code, Message: http.StatusText(code)})
}

func (r *rig) await(what string, cond func() bool) {
	r.t.Helper()
	for deadline := time.Now().Add(soon); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			r.t.Fatalf("not so: %s; %+v", what, r.State())
		}
	}
}

// upsert makes an object as the hub sends it.
func upsert(resource, name, uid, more string) edgeapi.Upsert {
	kind := map[string]string{"pods": "Pod", "nodes": "Node", "configmaps": "ConfigMap"}[resource]
	ref := edgeapi.Ref{Resource: resource, Name: name, Namespace: "default"}
	meta := `"namespace":"default",`
	if resource == "nodes" {
		ref.Namespace, meta = "", ""
	}
	return edgeapi.Upsert{Ref: ref, UID: uid, Rev: "rev-" + uid,
		Body: json.RawMessage(fmt.Sprintf(`{"kind":%q,"apiVersion":"v1","metadata":{%s"name":%q,"uid":%q}%s}`, kind, meta, name, uid, more))}
}

// report writes a pod's status as the facade does for the kubelet.
func (r *rig) report(name, uid, message string) {
	r.t.Helper()
	key := store.Key{Resource: "pods", Namespace: "default", Name: name}
	must(r.t, r.store.Local(r.t.Context(), func(tx *store.Tx) error {
		body := fmt.Sprintf(`{"kind":"Pod","apiVersion":"v1","metadata":{"namespace":"default","name":%q,"uid":%q},"status":{"message":%q}}`, name, uid, message)
		if _, err := tx.Put(key, uid, []byte(body)); err != nil {
			return err
		}
		tx.MarkDirty(store.Mark{Op: store.OpStatus, Key: key, UID: uid})
		return nil
	}))
}

func message(t *testing.T, w edgeapi.Write) string {
	t.Helper()
	var p struct{ Status struct{ Message string } }
	must(t, json.Unmarshal(w.Body, &p))
	return p.Status.Message
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
