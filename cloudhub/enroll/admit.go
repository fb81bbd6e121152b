package enroll

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// repeatWindow is how long a join that succeeded may be repeated by the same
// node with the same key and token, for when the answer was lost on the link.
const repeatWindow = 10 * time.Minute

// joinAttempt is a join request after its form was checked.
type joinAttempt struct {
	tokenID     string
	tokenSecret string
	node        string
	replace     bool
	pub         crypto.PublicKey
	key         string // fingerprint of pub
}

// join makes a machine a node:
//
//  1. judge the token and the name, which writes nothing;
//  2. reserve one use of the token: of two joins with the last use, the API
//     server's optimistic concurrency lets one through;
//  3. write the node's record: of two joins with one name, likewise;
//  4. complete the use, which burns it.
//
// A failure after 2 undoes what was done. A crash between leaves a reservation
// that the same node and key may finish, and that others may take over when it
// is stale and shows in no record.
func (e *Enroll) join(ctx context.Context, a *joinAttempt) (NodeRecord, *x509.Certificate, error) {
	state, err := e.tokens.check(ctx, a, e.recordShows)
	if err != nil {
		return NodeRecord{}, nil, err
	}
	if err := e.nameFree(ctx, a, state.AllowReplace); err != nil {
		return NodeRecord{}, nil, err
	}
	cert, err := e.ca.issueNode(a.node, a.pub, e.now(), e.cfg.CertLifetime)
	if err != nil {
		return NodeRecord{}, nil, &unavailable{"issue the certificate of " + a.node, err}
	}

	g, err := e.tokens.reserve(ctx, a, e.recordShows)
	if err != nil {
		return NodeRecord{}, nil, err
	}
	rec, undo, err := e.writeRecord(ctx, a, g, cert)
	if err != nil {
		e.cleanUp(ctx, a.node, func(ctx context.Context) error { return e.tokens.release(ctx, g) })
		return NodeRecord{}, nil, err
	}
	if err := e.tokens.complete(ctx, g); err != nil {
		var refusal *edgeapi.JoinError
		if errors.As(err, &refusal) && !isUnavailable(err) {
			e.cleanUp(ctx, a.node, undo)
		}
		// Otherwise nobody knows whether the write arrived. Record and
		// reservation stay, and the same request finishes them.
		return NodeRecord{}, nil, err
	}
	return rec, cert, nil
}

func isUnavailable(err error) bool {
	var u *unavailable
	return errors.As(err, &u)
}

// cleanUp runs op although the join's own time may be over.
func (e *Enroll) cleanUp(ctx context.Context, node string, op func(context.Context) error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lookupTimeout)
	defer cancel()
	if err := op(ctx); err != nil {
		e.log.Warn("a failed join could not be undone at once; it runs out by itself", "node", node, "error", err)
	}
}

// recordShows reports whether node's record has key: a join that got so far
// has used its token.
func (e *Enroll) recordShows(ctx context.Context, node, key string) (bool, error) {
	secret, err := e.secrets.Get(ctx, nodePrefix+node, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	rec, err := decodeNode(secret)
	return err == nil && (rec.Key == key || rec.NextKey == key), nil
}

// nameFree judges whether a's node may have its name, before anything is
// written. writeRecord judges again.
func (e *Enroll) nameFree(ctx context.Context, a *joinAttempt, allowReplace bool) error {
	secret, err := e.secrets.Get(ctx, nodePrefix+a.node, metav1.GetOptions{})
	if err == nil {
		rec, err := decodeNode(secret)
		if err != nil {
			return &unavailable{"read node " + a.node, err}
		}
		return e.mayTake(rec, a, allowReplace)
	}
	if !apierrors.IsNotFound(err) {
		return &unavailable{"read node " + a.node, err}
	}

	// A name without a record may still be a node's that came to the cluster
	// another way. Whoever gets a certificate for it acts as that node.
	if a.replace && allowReplace {
		return nil
	}
	_, err = e.cfg.Client.CoreV1().Nodes().Get(ctx, a.node, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil
	case err != nil:
		return &unavailable{"look for a Node named " + a.node, err}
	}
	return refuse(edgeapi.JoinNameInUse, "the cluster has a Node %s that is not on this hub's record; %s", a.node, howToTake(a, allowReplace, "delete it with: kubectl delete node "+a.node))
}

// mayTake judges whether a may have the name that rec holds.
func (e *Enroll) mayTake(rec NodeRecord, a *joinAttempt, allowReplace bool) error {
	if a.replace && allowReplace {
		return nil
	}
	if rec.Revoked() {
		return refuse(edgeapi.JoinNodeRevoked, "node %s was revoked at %s; %s", rec.Name, stamp(rec.RevokedAt), howToTake(a, allowReplace, "forget it with: cloudhub node forget "+rec.Name))
	}
	if rec.Key == a.key || rec.NextKey == a.key {
		return nil // the same machine, which holds the key
	}
	return refuse(edgeapi.JoinNameInUse, "the name %s belongs to a node that joined at %s; %s", rec.Name, stamp(rec.JoinedAt), howToTake(a, allowReplace, "remove that one with: cloudhub node forget "+rec.Name))
}

// howToTake says what would make a name available.
func howToTake(a *joinAttempt, allowReplace bool, remove string) string {
	switch {
	case !allowReplace && a.replace:
		return "this token does not allow taking it over: make one with cloudhub token create --allow-replace, or " + remove
	case !allowReplace:
		return "choose another name, take it over with --replace and a token from cloudhub token create --allow-replace, or " + remove
	default:
		return "choose another name, or take it over with --replace"
	}
}

// writeRecord enters the node. undo puts back what was there before.
func (e *Enroll) writeRecord(ctx context.Context, a *joinAttempt, g *grant, cert *x509.Certificate) (rec NodeRecord, undo func(context.Context) error, err error) {
	for {
		undo = nil
		rec, err = e.updateNode(ctx, a.node, func(r *NodeRecord) error {
			if err := e.mayTake(*r, a, g.allowReplace); err != nil {
				return err
			}
			before := *r
			e.enter(r, a, cert)
			undo = func(ctx context.Context) error { return e.restore(ctx, *r, before) }
			return nil
		})
		if err == nil || !errors.Is(err, ErrNoNode) {
			return rec, undo, joinWriteError(a.node, err)
		}
		rec, undo, err = e.createRecord(ctx, a, cert)
		if !apierrors.IsAlreadyExists(err) {
			return rec, undo, joinWriteError(a.node, err)
		}
		// Somebody took the name in between; judge the one who did.
	}
}

// enter writes a's identity into r. The address stays with the name.
func (e *Enroll) enter(r *NodeRecord, a *joinAttempt, cert *x509.Certificate) {
	now := e.now().UTC().Truncate(time.Second)
	same := !r.Revoked() && (r.Key == a.key || r.NextKey == a.key)
	if !same {
		*r = NodeRecord{Name: a.node, VirtualIP: r.VirtualIP, Enrollment: randomText(10), JoinedAt: now}
	}
	r.Key, r.NextKey = a.key, ""
	r.TokenID = a.tokenID
	r.Serial, r.NotAfter = serialText(cert), cert.NotAfter.UTC()
}

func serialText(cert *x509.Certificate) string { return cert.SerialNumber.Text(16) }

func (e *Enroll) createRecord(ctx context.Context, a *joinAttempt, cert *x509.Certificate) (NodeRecord, func(context.Context) error, error) {
	ip, err := e.claimAddress(ctx, a.node)
	if err != nil {
		return NodeRecord{}, nil, err
	}
	rec := NodeRecord{VirtualIP: ip}
	e.enter(&rec, a, cert)
	secret, err := rec.encode(nil)
	if err == nil {
		secret, err = e.secrets.Create(ctx, secret, metav1.CreateOptions{})
	}
	if err != nil {
		// After a lost answer the record may exist and rest on the claim.
		if apierrors.IsAlreadyExists(err) {
			e.cleanUp(ctx, a.node, func(ctx context.Context) error { return e.releaseAddress(ctx, ip, a.node) })
		}
		return NodeRecord{}, nil, err
	}
	e.learn(rec, secret.ResourceVersion)
	undo := func(ctx context.Context) error {
		if err := e.secrets.Delete(ctx, secret.Name, deleteExactly(secret)); err != nil {
			return err
		}
		e.unlearn(a.node)
		return e.releaseAddress(ctx, ip, a.node)
	}
	return rec, undo, nil
}

// restore puts before back if the record is still as written.
func (e *Enroll) restore(ctx context.Context, written, before NodeRecord) error {
	_, err := e.updateNode(ctx, written.Name, func(r *NodeRecord) error {
		if r.Enrollment != written.Enrollment || r.Serial != written.Serial {
			return errUnchanged
		}
		*r = before
		return nil
	})
	return err
}

func joinWriteError(node string, err error) error {
	var refusal *edgeapi.JoinError
	if err == nil || errors.As(err, &refusal) {
		return err
	}
	return &unavailable{"write node " + node, err}
}
