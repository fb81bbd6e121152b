package main

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/skerry-io/skerry/cloudhub/enroll"
	"github.com/skerry-io/skerry/cloudhub/presence"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// record is a node's as package enroll stores it.
func record(t *testing.T, name, ip string, change func(*enroll.NodeRecord)) *corev1.Secret {
	t.Helper()
	r := enroll.NodeRecord{Name: name, Enrollment: "1", VirtualIP: netip.MustParseAddr(ip), Key: "k",
		NotAfter: listedAt.Add(60 * 24 * time.Hour), JoinedAt: listedAt.Add(-30 * 24 * time.Hour)}
	if change != nil {
		change(&r)
	}
	body, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	return &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: systemNamespace, Name: "node." + name, Labels: map[string]string{"skerry.dev/enroll": "node"}},
		Type:       "skerry.dev/node", Data: map[string][]byte{"node.json": body},
	}
}

var listedAt = time.Date(2026, 11, 24, 13, 0, 0, 0, time.UTC)

func TestNodeList(t *testing.T) {
	node := func(name string, ready corev1.ConditionStatus, conds ...corev1.NodeCondition) *corev1.Node {
		return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NodeStatus{
			Conditions: append(conds, corev1.NodeCondition{Type: corev1.NodeReady, Status: ready})}}
	}
	connected := func(s corev1.ConditionStatus, reason string, since time.Duration) corev1.NodeCondition {
		return corev1.NodeCondition{Type: edgeapi.ConditionConnected, Status: s, Reason: reason, LastTransitionTime: metav1.NewTime(listedAt.Add(-since))}
	}
	lease := func(name string, renewed, synced time.Duration) *coordinationv1.Lease {
		at := metav1.NewMicroTime(listedAt.Add(-renewed))
		return &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: corev1.NamespaceNodeLease, Name: name,
			Annotations: map[string]string{presence.LastSync: listedAt.Add(-synced).Format(time.RFC3339)}},
			Spec: coordinationv1.LeaseSpec{RenewTime: &at}}
	}
	client := fake.NewClientset(
		node("a", corev1.ConditionTrue, connected(corev1.ConditionTrue, "TunnelUp", 3*time.Hour)), lease("a", 4*time.Second, 8*time.Second),
		node("b", corev1.ConditionUnknown, connected(corev1.ConditionFalse, "TunnelSilent", 2*time.Hour)), lease("b", 2*time.Hour-8*time.Second, 150*time.Minute),
		node("c", corev1.ConditionTrue), node("not-an-edge-node", corev1.ConditionTrue),
	)
	reg, err := enroll.New(t.Context(), enroll.Config{Client: client, Namespace: systemNamespace})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []*corev1.Secret{
		record(t, "a", "100.64.0.1", nil), record(t, "b", "100.64.0.2", nil), record(t, "c", "100.64.0.3", nil),
		record(t, "d", "100.64.0.4", func(r *enroll.NodeRecord) { r.RevokedAt = listedAt.Add(-time.Hour) }),
	} {
		if _, err := client.CoreV1().Secrets(systemNamespace).Create(t.Context(), s, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	nodes, err := listNodes(t.Context(), client, reg)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := printNodes(&out, nodes, listedAt); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, line := range strings.Split(strings.TrimSpace(out.String()), "\n") {
		got = append(got, strings.Join(strings.Fields(line), " "))
	}
	want := []string{
		"NAME VIRTUAL IP CONNECTED SINCE LAST SYNC READY CERTIFICATE ENDS IN ENROLMENT",
		"a 100.64.0.1 yes 3h 8s ago yes 60d since 2026-10-25",
		"b 100.64.0.2 no (TunnelSilent) 120m 150m ago no 60d since 2026-10-25",
		"c 100.64.0.3 unknown - - yes 60d since 2026-10-25",
		"d 100.64.0.4 never - - no 60d revoked " + listedAt.Add(-time.Hour).Local().Format(time.RFC3339),
	}
	for i := range want {
		if i >= len(got) || got[i] != want[i] {
			t.Errorf("line %d of\n%s\nwant %q", i, out.String(), want[i])
		}
	}

	body, err := json.Marshal(nodes[1])
	if err != nil {
		t.Fatal(err)
	}
	var b map[string]any
	if err := json.Unmarshal(body, &b); err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]any{
		"name": "b", "virtualIP": "100.64.0.2", "registered": true, "ready": false, "connected": false, "reason": "TunnelSilent",
		"since": "2026-11-24T11:00:00Z", "lastHeard": "2026-11-24T11:00:00Z", "lastSync": "2026-11-24T10:30:00Z",
	} {
		if b[key] != want {
			t.Errorf("%s is %v, want %v", key, b[key], want)
		}
	}
}
