package enroll

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// claimGrace is how old a claim without a record must be before it is freed:
// no join takes that long.
const claimGrace = 10 * time.Minute

// keepHouse removes what has run out, every ten minutes or so. Every replica
// does it; whoever comes second finds nothing.
func (e *Enroll) keepHouse(ctx context.Context) error {
	for {
		timer := time.NewTimer(housekeepingEvery + rand.N(housekeepingEvery/4))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil
		}
		if err := e.sweep(ctx); err != nil && ctx.Err() == nil {
			e.log.Warn("housekeeping is left for the next round", "error", err)
		}
	}
}

func (e *Enroll) sweep(ctx context.Context) error {
	tokens, err := e.tokens.sweep(ctx)
	if err != nil {
		return err
	}
	claims, err := e.sweepClaims(ctx)
	if err != nil {
		return err
	}
	if tokens+claims > 0 {
		e.log.Info("removed what had run out", "tokens", tokens, "addresses", claims)
	}
	return nil
}

// sweepClaims frees addresses no record rests on: of joins that died half way
// and of nodes whose record was deleted by hand.
func (e *Enroll) sweepClaims(ctx context.Context) (freed int, err error) {
	list, err := e.secrets.List(ctx, metav1.ListOptions{LabelSelector: labelKind + "=" + kindIP})
	if err != nil {
		return 0, fmt.Errorf("list virtual IP claims: %w", err)
	}
	for i := range list.Items {
		claim := &list.Items[i]
		ip, ok := claimedAddress(claim.Name)
		if !ok || e.now().Sub(claim.CreationTimestamp.Time) < claimGrace {
			continue
		}
		if _, used := e.index.nodeByIP(ip); used {
			continue
		}
		// The index may lag; the record itself decides.
		node := string(claim.Data[ipField])
		record, err := e.secrets.Get(ctx, nodePrefix+node, metav1.GetOptions{})
		if err == nil {
			rec, err := decodeNode(record)
			if err != nil || rec.VirtualIP == ip {
				continue
			}
		} else if !apierrors.IsNotFound(err) {
			return freed, fmt.Errorf("read %s: %w", nodePrefix+strings.TrimSpace(node), err)
		}
		err = e.secrets.Delete(ctx, claim.Name, deleteExactly(claim))
		switch {
		case err == nil:
			e.index.removeClaim(ip)
			freed++
		case !apierrors.IsNotFound(err) && !apierrors.IsConflict(err):
			return freed, fmt.Errorf("free virtual IP %s: %w", ip, err)
		}
	}
	return freed, nil
}
