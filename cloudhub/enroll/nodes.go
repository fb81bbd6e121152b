package enroll

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// ErrNoNode is returned for a node that is not on record.
var ErrNoNode = errors.New("no such node")

// Nodes reads every node's record, by name.
func (e *Enroll) Nodes(ctx context.Context) ([]NodeRecord, error) {
	list, err := e.secrets.List(ctx, metav1.ListOptions{LabelSelector: labelKind + "=" + kindNode})
	if err != nil {
		return nil, fmt.Errorf("list nodes: %w", err)
	}
	records := make([]NodeRecord, 0, len(list.Items))
	var broken []error
	for i := range list.Items {
		rec, err := decodeNode(&list.Items[i])
		if err != nil {
			broken = append(broken, err)
			continue
		}
		records = append(records, rec)
	}
	sort.Slice(records, func(i, j int) bool { return records[i].Name < records[j].Name })
	return records, errors.Join(broken...)
}

// Node returns a node's record as the index has it.
func (e *Enroll) Node(name string) (NodeRecord, bool) { return e.index.node(name) }

// Revoke keeps a node out but on record, name and virtual IP included, until
// it is forgotten or replaced.
func (e *Enroll) Revoke(ctx context.Context, name, reason string) error {
	_, err := e.updateNode(ctx, name, func(r *NodeRecord) error {
		if r.Revoked() {
			return errUnchanged
		}
		r.RevokedAt = e.now().UTC().Truncate(time.Second)
		r.RevokeReason = clip(reason, 200)
		return nil
	})
	if err != nil {
		return fmt.Errorf("revoke node %s: %w", name, err)
	}
	return nil
}

// Forget removes a node from the record: its certificate is refused, and its
// name and virtual IP are free. The Node object is the caller's to delete.
func (e *Enroll) Forget(ctx context.Context, name string) error {
	secret, err := e.secrets.Get(ctx, nodePrefix+name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return fmt.Errorf("forget node %s: %w", name, ErrNoNode)
	}
	if err != nil {
		return fmt.Errorf("forget node %s: %w", name, err)
	}
	err = e.secrets.Delete(ctx, secret.Name, metav1.DeleteOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("forget node %s: %w", name, err)
	}
	e.unlearn(name)
	rec, err := decodeNode(secret)
	if err != nil {
		return nil // a damaged record; housekeeping frees its address
	}
	if err := e.releaseAddress(ctx, rec.VirtualIP, name); err != nil {
		e.log.Warn("a forgotten node's address is freed later", "node", name, "error", err)
	}
	return nil
}

// updateNode changes a record under optimistic concurrency: change may run
// several times, each on a record read anew; errUnchanged ends it.
func (e *Enroll) updateNode(ctx context.Context, name string, change func(*NodeRecord) error) (NodeRecord, error) {
	var rec NodeRecord
	err := retryConflicts(ctx, func() error {
		secret, err := e.secrets.Get(ctx, nodePrefix+name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return ErrNoNode
		}
		if err != nil {
			return err
		}
		if rec, err = decodeNode(secret); err != nil {
			return err
		}
		if err := change(&rec); err != nil {
			if errors.Is(err, errUnchanged) {
				return nil
			}
			return err
		}
		if secret, err = rec.encode(secret); err != nil {
			return err
		}
		if secret, err = e.secrets.Update(ctx, secret, metav1.UpdateOptions{}); err != nil {
			return err
		}
		e.learn(rec, secret.ResourceVersion)
		return nil
	})
	return rec, err
}
