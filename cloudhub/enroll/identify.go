package enroll

import (
	"context"
	"crypto/x509"
	"errors"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// lookupTimeout bounds a live read made for a caller the index does not know.
const lookupTimeout = 5 * time.Second

// Identify tells which node a TLS peer is: its certificate must end in the
// hub's CA and be in date, and its record must know its key and not be
// revoked. Refusals are *edgeapi.JoinError; answer them with WriteRefusal.
//
// It reads the index; only what the index does not know, or refuses, is read
// from the API server, at a bounded rate. A hub that keeps a connection open
// must ask Current after it has entered the connection where OnRevoked finds
// it: a revocation in between would be missed otherwise.
func (e *Enroll) Identify(cert *x509.Certificate) (NodeRecord, error) {
	ctx, cancel := context.WithTimeout(context.Background(), lookupTimeout)
	defer cancel()
	return e.identify(ctx, cert, 0)
}

// Current reports whether rec's enrollment is still the node's and stands.
func (e *Enroll) Current(rec NodeRecord) bool {
	now, ok := e.index.node(rec.Name)
	return ok && now.Enrollment == rec.Enrollment && !now.Revoked()
}

func (e *Enroll) identify(ctx context.Context, cert *x509.Certificate, grace time.Duration) (NodeRecord, error) {
	if cert == nil {
		return NodeRecord{}, refuse(edgeapi.JoinNoCertificate, "the connection has no client certificate; a node must show the one it got when it joined")
	}
	if err := e.verifyChain(cert, e.now(), grace); err != nil {
		return NodeRecord{}, err
	}
	name := strings.TrimPrefix(cert.Subject.CommonName, edgeapi.NodeUserPrefix)
	key := fingerprint(cert.RawSubjectPublicKeyInfo)

	rec, known := e.index.node(name)
	if !known || rec.admits(key) != nil {
		// A hub that has just started meets all its nodes at once: better to
		// wait for the index than to look each of them up.
		select {
		case <-e.synced:
		case <-ctx.Done():
			return NodeRecord{}, refuse(edgeapi.JoinUnavailable, "the hub is still reading its nodes")
		}
		rec, known = e.index.node(name)
	}
	if !known || rec.admits(key) != nil {
		// A node that joined at another replica a moment ago is not in the
		// index so far; ask before turning anyone away.
		var err error
		if rec, err = e.lookUp(ctx, name, key); err != nil {
			return NodeRecord{}, err
		}
	}
	if rec.NextKey == key {
		e.sawNextKey(name, key)
	}
	return rec, nil
}

// verifyChain checks all a certificate says by itself. Up to grace after its
// end it is judged as of its last moment.
func (e *Enroll) verifyChain(cert *x509.Certificate, now time.Time, grace time.Duration) error {
	at := now
	if now.After(cert.NotAfter) {
		if now.Sub(cert.NotAfter) > grace {
			return refuse(edgeapi.JoinCertificateExpired, "the certificate of %q expired at %s, %s ago",
				clip(cert.Subject.CommonName, 300), stamp(cert.NotAfter), roughly(now.Sub(cert.NotAfter)))
		}
		at = cert.NotAfter
	}
	if now.Before(cert.NotBefore) {
		return refuse(edgeapi.JoinUnavailable, "the certificate is valid from %s on, but this hub's clock says %s, %s before: set the hub's clock",
			stamp(cert.NotBefore), stamp(now), roughly(cert.NotBefore.Sub(now)))
	}
	_, err := cert.Verify(x509.VerifyOptions{
		Roots:       e.ca.pool,
		CurrentTime: at,
		KeyUsages:   []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return refuse(edgeapi.JoinUnknownNode, "the certificate is not a node certificate of this hub; the node joined another hub, or this hub began anew")
	}
	if !strings.HasPrefix(cert.Subject.CommonName, edgeapi.NodeUserPrefix) ||
		len(cert.Subject.Organization) != 1 || cert.Subject.Organization[0] != edgeapi.NodesGroup {
		return refuse(edgeapi.JoinUnknownNode, "the certificate is for %q, which is no node", clip(cert.Subject.CommonName, 300))
	}
	return nil
}

// admits judges a key against the record.
func (r NodeRecord) admits(key string) error {
	switch {
	case r.Revoked():
		why := ""
		if r.RevokeReason != "" {
			why = ": " + r.RevokeReason
		}
		return refuse(edgeapi.JoinNodeRevoked, "node %s was revoked at %s%s", r.Name, stamp(r.RevokedAt), why)
	case r.Key != key && r.NextKey != key:
		return refuse(edgeapi.JoinNodeReplaced, "the name %s belongs to another key since %s: another machine took it over, or this one runs on an old copy of its identity", r.Name, stamp(r.lastKeyChange()))
	}
	return nil
}

func (r NodeRecord) lastKeyChange() time.Time {
	if r.RenewedAt.IsZero() {
		return r.JoinedAt
	}
	return r.RenewedAt
}

// lookUp asks the API server about a node and remembers a refusal shortly, so
// that a node that was turned away and keeps trying costs nothing.
func (e *Enroll) lookUp(ctx context.Context, name, key string) (NodeRecord, error) {
	if err := e.unknown.get(name, key, e.now()); err != nil {
		return NodeRecord{}, err
	}
	if !e.lookups.Allow() {
		return NodeRecord{}, refuse(edgeapi.JoinUnavailable, "the hub is looking up too many nodes at once")
	}
	secret, err := e.secrets.Get(ctx, nodePrefix+name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		e.unlearn(name)
		err = refuse(edgeapi.JoinUnknownNode, "the hub has no node %s: it was forgotten, or it never joined this hub", name)
		e.unknown.put(name, key, e.now(), err)
		return NodeRecord{}, err
	}
	if err != nil {
		return NodeRecord{}, &unavailable{"read node " + name, err}
	}
	rec, err := decodeNode(secret)
	if err != nil {
		return NodeRecord{}, &unavailable{"read node " + name, err}
	}
	e.learn(rec, secret.ResourceVersion)
	if err := rec.admits(key); err != nil {
		e.unknown.put(name, key, e.now(), err)
		return NodeRecord{}, err
	}
	return rec, nil
}

// sawNextKey notes that a renewal arrived: its key was used. If the queue is
// full the note is dropped; the old key then stays valid until the node's next
// connection, which is safe.
func (e *Enroll) sawNextKey(name, key string) {
	select {
	case e.promote <- promotion{name, key}:
	default:
	}
}

type promotion struct{ node, key string }

// promoteKeys makes next keys that were used the only ones.
func (e *Enroll) promoteKeys(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case p := <-e.promote:
			if rec, ok := e.index.node(p.node); ok && rec.NextKey != p.key {
				continue // noted twice
			}
			opCtx, cancel := context.WithTimeout(ctx, joinTimeout)
			_, err := e.updateNode(opCtx, p.node, func(r *NodeRecord) error {
				if r.NextKey != p.key {
					return errUnchanged
				}
				r.Key, r.NextKey = r.NextKey, ""
				return nil
			})
			cancel()
			switch {
			case err == nil:
				e.log.Info("node uses its new key; the old one is refused from now on", "node", p.node)
			case ctx.Err() == nil && !errors.Is(err, ErrNoNode):
				e.log.Warn("the node's old key stays valid until its next connection", "node", p.node, "error", err)
			}
		}
	}
}

// refusals remembers for a few seconds whom the API server did not know.
type refusals struct {
	mu    sync.Mutex
	seen  map[string]refused
	sweep time.Time // when seen may be searched again for what has run out
}

type refused struct {
	until time.Time
	err   error
}

const (
	refusalTTL  = 5 * time.Second
	maxRefusals = 4096
)

func newRefusals() *refusals { return &refusals{seen: map[string]refused{}} }

func (m *refusals) get(name, key string, now time.Time) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r, ok := m.seen[name+"\x00"+key]; ok && now.Before(r.until) {
		return r.err
	}
	return nil
}

// put remembers err. When full, what has run out goes; if nothing has, the
// newcomer is not remembered and costs a read.
func (m *refusals) put(name, key string, now time.Time, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.seen) >= maxRefusals && !now.Before(m.sweep) {
		for k, r := range m.seen {
			if !now.Before(r.until) {
				delete(m.seen, k)
			}
		}
		m.sweep = now.Add(time.Second)
	}
	if len(m.seen) >= maxRefusals {
		return
	}
	m.seen[name+"\x00"+key] = refused{now.Add(refusalTTL), err}
}
