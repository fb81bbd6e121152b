package presence

import (
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// LastSync is the annotation on a node's Lease that tells when the node was last
// in step with the cluster. Its form is that of time.RFC3339.
const LastSync = "skerry.dev/last-sync"

// Reasons of the condition.
const (
	ReasonUp        = "TunnelUp"
	ReasonSilent    = "TunnelSilent"   // nothing was heard for longer than the node promised
	ReasonClosed    = "TunnelClosed"   // the node ended it
	ReasonBroken    = "TunnelBroken"   // the connection beneath it failed
	ReasonEnrolment = "EnrolmentEnded" // the node was revoked, forgotten or replaced
	ReasonRestart   = "HubRestarted"   // the node did not come back after the hub's restart
)

// Absence is how a node went away.
type Absence struct {
	Heard   time.Time // when it was last heard
	Reason  string    // one of the Reason constants
	Message string    // for people; may be empty
}

// up is the condition of a node that is connected.
func up(since time.Time, away time.Duration, h edgeapi.Hello) corev1.NodeCondition {
	m := "tunnel up since " + stamp(since)
	if away > 0 {
		m += "; was away " + away.Round(time.Second).String()
	}
	if h.Outbox > 0 {
		m += "; " + count(h.Outbox, "change was", "changes were") + " waiting on the node"
	}
	if h.EventsDropped > 0 {
		m += "; the node dropped " + count(h.EventsDropped, "Event", "Events")
	}
	return corev1.NodeCondition{
		Type: edgeapi.ConditionConnected, Status: corev1.ConditionTrue, Reason: ReasonUp, Message: m,
		LastTransitionTime: metav1.NewTime(since), LastHeartbeatTime: metav1.NewTime(since),
	}
}

// down is the condition of a node that is away. synced may be zero; waiting is
// what the node had still to send, as far as known.
func down(a Absence, synced time.Time, waiting int) corev1.NodeCondition {
	m := "last heard " + stamp(a.Heard)
	if a.Message != "" {
		m += " (" + clean(a.Message) + ")"
	}
	if synced.IsZero() {
		m += "; not known when last in step"
	} else {
		m += "; last in step " + stamp(synced)
	}
	if waiting > 0 {
		m += "; " + count(waiting, "change was", "changes were") + " still to be sent"
	}
	return corev1.NodeCondition{
		Type: edgeapi.ConditionConnected, Status: corev1.ConditionFalse, Reason: a.Reason, Message: m,
		LastTransitionTime: metav1.NewTime(a.Heard), LastHeartbeatTime: metav1.NewTime(a.Heard),
	}
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func count[N int | uint64](n N, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// Of returns the Connected condition of a Node, nil if it has none.
func Of(n *corev1.Node) *corev1.NodeCondition {
	for i := range n.Status.Conditions {
		if n.Status.Conditions[i].Type == edgeapi.ConditionConnected {
			return &n.Status.Conditions[i]
		}
	}
	return nil
}

// clean makes a reason given by a peer fit for one line of a condition.
func clean(s string) string {
	const most = 200
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}
