package enroll_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/cloudhub/enroll"
	"github.com/skerry-io/skerry/cloudhub/enroll/enrolltest"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

func TestTokens(t *testing.T) {
	clock := &clock{}
	client := enrolltest.Client()
	hub := replicas(t, client, 1, enroll.Config{Clock: clock.now})[0]
	for _, opts := range []enroll.TokenOptions{
		{TTL: -time.Hour}, {Uses: -2}, {Uses: 1001}, {NodeName: "Not_A_Name"}, {NodeName: "edge-7", Uses: 2},
	} {
		if _, _, err := hub.Tokens().Create(t.Context(), opts); err == nil {
			t.Errorf("a token %+v was made", opts)
		}
	}
	text, info, err := hub.Tokens().Create(t.Context(), enroll.TokenOptions{Uses: 2, TTL: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	if info.Uses != 2 || info.ExpiresAt.Sub(info.CreatedAt) != time.Hour || info.State(clock.now()) != "usable" {
		t.Errorf("the token is %+v", info)
	}
	token, err := edgeapi.ParseToken(text)
	if err != nil {
		t.Fatal(err)
	}
	secrets, err := client.CoreV1().Secrets(namespace).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if stored, err := json.Marshal(secrets); err != nil || bytes.Contains(stored, []byte(token.Secret)) {
		t.Errorf("the token's secret is stored, or error %v", err)
	}
	for i, want := range []edgeapi.JoinErrorCode{"", "", edgeapi.JoinTokenUsed} {
		if err := newEdge(hub, fmt.Sprintf("edge-%d", i)).join(t, text); codeOf(err) != want || want == "" && err != nil {
			t.Errorf("join %d: %v, want %q", i, err, want)
		}
	}
	if info := tokenInfo(t, hub.Enroll, text); fmt.Sprint(info.Nodes) != "[edge-0 edge-1]" {
		t.Errorf("the token says it was used by %v", info.Nodes)
	}
	if err := hub.Tokens().Revoke(t.Context(), token.ID); err != nil {
		t.Fatal(err)
	}
	wantCode(t, newEdge(hub, "edge-0").join(t, text), edgeapi.JoinTokenRevoked)
	for _, id := range []string{"nosuchid", "../../x", ""} {
		if err := hub.Tokens().Revoke(t.Context(), id); !errors.Is(err, enroll.ErrNoToken) {
			t.Errorf("revoking %q: %v", id, err)
		}
	}
	req := newEdge(hub, "edge-9").request(t, text)
	for _, id := range []string{"", "../skerry-ca", strings.Repeat("a", 5000), "aaaaaaaa"} {
		req.TokenID = id
		_, err := newEdge(hub, "edge-9").post(edgeapi.JoinPath, req)
		wantCode(t, err, edgeapi.JoinTokenUnknown)
	}
}

func TestHousekeeping(t *testing.T) {
	client, clock := enrolltest.Client(), &clock{}
	hub := replicas(t, client, 1, enroll.Config{Clock: clock.now})[0]
	if err := newEdge(hub, "edge-7").join(t, newToken(t, hub.Enroll, enroll.TokenOptions{TTL: time.Hour})); err != nil {
		t.Fatal(err)
	}
	long := newToken(t, hub.Enroll, enroll.TokenOptions{TTL: 100 * 24 * time.Hour})
	orphan := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: "ip.100.64.9.9", Labels: map[string]string{"skerry.dev/enroll": "ip"}},
		Type:       "skerry.dev/ip-claim", Data: map[string][]byte{"node": []byte("edge-7")},
	}
	if _, err := client.CoreV1().Secrets(namespace).Create(t.Context(), orphan, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	names := func() string {
		t.Helper()
		if err := enroll.Sweep(hub.Enroll, t.Context()); err != nil {
			t.Fatal(err)
		}
		list, err := client.CoreV1().Secrets(namespace).List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var all []string
		for _, s := range list.Items {
			all = append(all, strings.SplitN(s.Name, ".", 2)[0])
		}
		return fmt.Sprint(all)
	}
	if got, want := names(), "[ip ip join-token join-token node skerry-ca]"; got != want {
		t.Errorf("at first the namespace holds %s, want %s", got, want)
	}
	clock.advance(11 * time.Minute)
	if got, want := names(), "[ip join-token join-token node skerry-ca]"; got != want {
		t.Errorf("after claims ran out the namespace holds %s, want %s", got, want)
	}
	clock.advance(8 * 24 * time.Hour)
	if got, want := names(), "[ip join-token node skerry-ca]"; got != want {
		t.Errorf("after tokens ran out the namespace holds %s, want %s", got, want)
	}
	if info := tokenInfo(t, hub.Enroll, long); info.State(clock.now()) != "usable" {
		t.Errorf("the token that is left is %+v", info)
	}
}
