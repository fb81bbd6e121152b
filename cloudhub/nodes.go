package main

import (
	"context"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/duration"
	"k8s.io/client-go/kubernetes"

	"github.com/skerry-io/skerry/cloudhub/enroll"
	"github.com/skerry-io/skerry/cloudhub/presence"
)

// listedNode is a node as "cloudhub node list" tells of it: its enrolment, and
// what its Node and its Lease say. The hub itself is not asked; it need not run.
type listedNode struct {
	enroll.NodeRecord

	// Registered says that there is a Node.
	Registered bool `json:"registered"`
	Ready      bool `json:"ready"`
	// Connected is null if the Node does not say.
	Connected *bool     `json:"connected"`
	Since     time.Time `json:"since,omitzero"` // that it is, or is not
	Reason    string    `json:"reason,omitempty"`
	Message   string    `json:"message,omitempty"`
	LastHeard time.Time `json:"lastHeard,omitzero"`
	LastSync  time.Time `json:"lastSync,omitzero"`
}

// listNodes joins what is known of every enrolled node, by name.
func listNodes(ctx context.Context, client kubernetes.Interface, reg *enroll.Enroll) ([]listedNode, error) {
	records, err := reg.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list Nodes: %w", err)
	}
	leases, err := client.CoordinationV1().Leases(corev1.NamespaceNodeLease).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list the nodes' Leases: %w", err)
	}
	at := make(map[string]int, len(records))
	out := make([]listedNode, len(records))
	for i, r := range records {
		at[r.Name], out[i] = i, listedNode{NodeRecord: r}
	}
	for i := range leases.Items {
		l := &leases.Items[i]
		if j, ok := at[l.Name]; ok {
			if l.Spec.RenewTime != nil {
				out[j].LastHeard = l.Spec.RenewTime.UTC()
			}
			out[j].LastSync = presence.SyncedBy(l)
		}
	}
	for i := range nodes.Items {
		if j, ok := at[nodes.Items[i].Name]; ok {
			out[j].tell(&nodes.Items[i])
		}
	}
	return out, nil
}

func (n *listedNode) tell(node *corev1.Node) {
	n.Registered = true
	for _, c := range node.Status.Conditions {
		n.Ready = n.Ready || c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	}
	c := presence.Of(node)
	if c == nil {
		return
	}
	up := c.Status == corev1.ConditionTrue
	n.Connected, n.Since, n.Reason, n.Message = &up, c.LastTransitionTime.UTC(), c.Reason, c.Message
	if !up {
		// The condition tells the second; the Lease, to ten.
		n.LastHeard = n.Since
		if n.LastSync.After(n.Since) {
			n.LastSync = n.Since
		}
	}
}

func printNodes(w io.Writer, nodes []listedNode, now time.Time) error {
	ago := func(t time.Time) string {
		if t.IsZero() {
			return "-"
		}
		return duration.HumanDuration(now.Sub(t)) + " ago"
	}
	tw := tabwriter.NewWriter(w, 0, 8, 3, ' ', 0)
	fmt.Fprintln(tw, "NAME\tVIRTUAL IP\tCONNECTED\tSINCE\tLAST SYNC\tREADY\tCERTIFICATE ENDS IN\tENROLMENT")
	for _, n := range nodes {
		connected, since := "unknown", "-"
		switch {
		case !n.Registered:
			connected = "never"
		case n.Connected != nil && *n.Connected:
			connected, since = "yes", duration.HumanDuration(now.Sub(n.Since))
		case n.Connected != nil:
			connected, since = "no ("+n.Reason+")", duration.HumanDuration(now.Sub(n.Since))
		}
		ready := "no"
		if n.Ready {
			ready = "yes"
		}
		enrolment := "since " + n.JoinedAt.Local().Format(time.DateOnly)
		if n.Revoked() {
			enrolment = "revoked " + n.RevokedAt.Local().Format(time.RFC3339)
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", n.Name, n.VirtualIP, connected, since, ago(n.LastSync), ready,
			duration.HumanDuration(n.NotAfter.Sub(now)), enrolment)
	}
	return tw.Flush()
}
