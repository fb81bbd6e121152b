package localapi

import (
	"fmt"
	"net/http"
	"testing"

	kubeauthorizer "k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/endpoints/request"
)

func TestAccess(t *testing.T) {
	r := newRig(t)
	a, err := NewAccess(AccessConfig{Store: r.store, NodeName: node, Tokens: r.tokens, Clock: r.cfg.Clock})
	if err != nil {
		t.Fatal(err)
	}
	for _, token := range []string{r.cloudToken(t, "shop", "a", reader), r.edgeToken(t, "shop", "a", reader)} {
		who, err := a.Authenticate(token)
		if err != nil || who.GetName() != "system:serviceaccount:shop:reader" {
			t.Fatalf("%v, %v", who, err)
		}
		for namespace, want := range map[string]bool{"shop": true, "bank": false} {
			ok, _, err := a.Allowed(t.Context(), kubeauthorizer.AttributesRecord{User: who, Verb: "list", Namespace: namespace, Resource: "pods", APIVersion: "v1", ResourceRequest: true})
			if err != nil || ok != want {
				t.Errorf("list pods in %s: %v, %v", namespace, ok, err)
			}
		}
	}
	admin, err := readSecret(r.dir + "/" + adminFile)
	if err != nil {
		t.Fatal(err)
	}
	for _, token := range []string{"", "x", string(admin), r.cloudToken(t, "shop", "gone", reader)} {
		if who, err := a.Authenticate(token); err == nil {
			t.Errorf("%.20q is %v", token, who)
		}
	}
}

func TestDevicesBesideTheAPI(t *testing.T) {
	r := newRig(t)
	get := func() (int, string) { return r.get(t, r.cloudToken(t, "shop", "a", reader), "/v1/twins") }
	if code, _ := get(); code != http.StatusNotFound && code != http.StatusForbidden {
		t.Errorf("without devices: %d", code)
	}
	r.cfg.Devices = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		who, _ := request.UserFrom(req.Context())
		fmt.Fprintf(w, "%s asks for %s", who.GetName(), req.URL.Path)
	})
	if code, text := get(); code != http.StatusOK || text != "system:serviceaccount:shop:reader asks for /v1/twins" {
		t.Errorf("%d %q", code, text)
	}
	if code, _ := r.get(t, "x", "/v1/twins"); code != http.StatusUnauthorized {
		t.Errorf("with a bad token: %d", code)
	}
}
