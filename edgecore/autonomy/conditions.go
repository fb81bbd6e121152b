package autonomy

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/edgecore/store"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// scribe writes the conditions; the monitor's loop owns it.
type scribe struct {
	m      *Monitor
	wrote  time.Time // the last write
	link   Link      // as last written
	linked bool      // link is set
	most   int       // the largest outbox told of in this outage
}

// write brings the Node's conditions up to date, unless that was done a moment
// ago: then the next look does.
func (s *scribe) write(ctx context.Context, r Report) {
	if !s.wrote.IsZero() && time.Since(s.wrote) < s.m.cfg.Spare {
		return
	}
	want := []corev1.NodeCondition{s.connected()}
	if !r.At.IsZero() {
		want = append(want, ready(r))
	}
	if s.m.cfg.Conditions != nil {
		want = append(want, s.m.cfg.Conditions()...)
	}
	changed, err := s.m.setConditions(ctx, want)
	switch {
	case err != nil && ctx.Err() == nil:
		s.m.cfg.Log.Warn("the Node's conditions are not written", "err", err)
	case changed:
		s.wrote = time.Now()
	}
}

func ready(r Report) corev1.NodeCondition {
	c := corev1.NodeCondition{Type: edgeapi.ConditionAutonomyReady, Status: corev1.ConditionFalse}
	if r.Ready {
		c.Status = corev1.ConditionTrue
	}
	c.Reason, c.Message = r.words()
	return c
}

// connected is the node's own view of its tunnel. Its words change with the
// tunnel, and while it is down with the size of what waits, in powers of ten.
func (s *scribe) connected() corev1.NodeCondition {
	l := s.m.cfg.Link()
	if !s.linked || l.Connected != s.link.Connected || l.Drill != s.link.Drill || !l.Since.Equal(s.link.Since) {
		s.link, s.linked, s.most = l, true, 0
	}
	s.most = max(s.most, l.Outbox)
	at := func(t time.Time) string { return t.UTC().Format(time.RFC3339) }
	if l.Connected {
		return corev1.NodeCondition{
			Type: edgeapi.ConditionConnected, Status: corev1.ConditionTrue, Reason: "TunnelUp",
			LastTransitionTime: metav1.NewTime(l.Since), Message: "connected to the hub since " + at(l.Since),
		}
	}
	c := corev1.NodeCondition{
		Type: edgeapi.ConditionConnected, Status: corev1.ConditionFalse, Reason: "TunnelDown",
		LastTransitionTime: metav1.NewTime(l.Since), Message: "no tunnel to the hub since " + at(l.Since),
	}
	if l.Drill {
		c.Reason = "Drill"
	}
	if s.link.LastSync.IsZero() {
		c.Message += "; not in step with the cloud since edgecore started"
	} else {
		c.Message += "; last in step with the cloud at " + at(s.link.LastSync)
	}
	switch {
	case s.most == 0:
		c.Message += "; nothing waits to be sent"
	default:
		bound := 10
		for bound <= s.most {
			bound *= 10
		}
		c.Message += fmt.Sprintf("; fewer than %d changes wait to be sent", bound)
	}
	return c
}

// setConditions writes those of the conditions whose words differ from the
// Node's. It does nothing while there is no Node yet.
func (m *Monitor) setConditions(ctx context.Context, want []corev1.NodeCondition) (changed bool, err error) {
	key := store.Key{Resource: "nodes", Name: m.cfg.NodeName}
	now := metav1.NewTime(m.cfg.Clock())
	err = m.cfg.Store.Local(ctx, func(tx *store.Tx) error {
		cur, ok := tx.Get(key)
		if !ok {
			return nil
		}
		body, told, differs, err := replaceConditions(cur.Body, want, now)
		if err != nil || !differs {
			return err
		}
		if _, err := tx.Put(key, cur.UID, body); err != nil {
			return err
		}
		if told {
			tx.MarkDirty(store.Mark{Op: store.OpStatus, Key: key, UID: cur.UID})
		}
		changed = true
		return nil
	})
	return changed, err
}

// replaceConditions puts conditions into a Node, and leaves all else in it byte
// for byte. It tells whether anything differs, and whether the cloud is to hear
// of it.
func replaceConditions(body []byte, want []corev1.NodeCondition, now metav1.Time) (out []byte, told, differs bool, err error) {
	var top, status map[string]json.RawMessage
	if err := json.Unmarshal(body, &top); err != nil {
		return nil, false, false, fmt.Errorf("the Node is malformed: %w", err)
	}
	var conditions []json.RawMessage
	if raw := top["status"]; len(raw) > 0 && !bytes.Equal(raw, []byte("null")) {
		if err := json.Unmarshal(raw, &status); err != nil {
			return nil, false, false, fmt.Errorf("the Node's status is malformed: %w", err)
		}
		if raw := status["conditions"]; len(raw) > 0 {
			if err := json.Unmarshal(raw, &conditions); err != nil {
				return nil, false, false, fmt.Errorf("the Node's conditions are malformed: %w", err)
			}
		}
	}
	if status == nil {
		status = map[string]json.RawMessage{}
	}
	for _, c := range want {
		at := -1
		var cur corev1.NodeCondition
		for i, raw := range conditions {
			var have corev1.NodeCondition
			if err := json.Unmarshal(raw, &have); err != nil {
				return nil, false, false, fmt.Errorf("a condition of the Node is malformed: %w", err)
			}
			if have.Type == c.Type {
				at, cur = i, have
			}
		}
		if at >= 0 && cur.Status == c.Status && cur.Reason == c.Reason && cur.Message == c.Message {
			continue
		}
		differs = true
		told = told || c.Type != edgeapi.ConditionConnected
		if c.LastTransitionTime.IsZero() {
			c.LastTransitionTime = now
			if at >= 0 && cur.Status == c.Status {
				c.LastTransitionTime = cur.LastTransitionTime
			}
		}
		c.LastHeartbeatTime = now
		raw, err := json.Marshal(c)
		if err != nil {
			return nil, false, false, err
		}
		if at >= 0 {
			conditions[at] = raw
		} else {
			conditions = append(conditions, raw)
		}
	}
	if !differs {
		return nil, false, false, nil
	}
	if status["conditions"], err = json.Marshal(conditions); err != nil {
		return nil, false, false, err
	}
	if top["status"], err = json.Marshal(status); err != nil {
		return nil, false, false, err
	}
	out, err = json.Marshal(top)
	return out, told, true, err
}
