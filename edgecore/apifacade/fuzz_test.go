package apifacade

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/edgecore/store"
)

func FuzzPatch(f *testing.F) {
	body, err := json.Marshal(pod("a", "u1"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(uint8(0), []byte(`{"status":{"phase":"Running","conditions":[{"type":"Ready","status":"True"}]}}`))
	f.Add(uint8(0), []byte(`{"spec":{"containers":[{"$patch":"delete","name":"c"}],"$setElementOrder/containers":[{"name":"c"}]}}`))
	f.Add(uint8(0), []byte(`{"status":{"conditions":[{"$patch":"replace"}]},"$retainKeys":["spec"]}`))
	f.Add(uint8(1), []byte(`{"status":null,"metadata":{"labels":{"a":null}}}`))
	f.Add(uint8(2), []byte(`[{"op":"replace","path":"/status/phase","value":"x"},{"op":"move","from":"/spec","path":"/status/x"}]`))
	f.Add(uint8(2), []byte(`[{"op":"add","path":"/spec/containers/-1","value":1}]`))
	f.Fuzz(func(t *testing.T, kind uint8, patch []byte) {
		p, err := newPatch([]types.PatchType{types.StrategicMergePatchType, types.MergePatchType, types.JSONPatchType}[kind%3], patch, &corev1.Pod{})
		if err != nil {
			return
		}
		out, err := p(body)
		if err == nil && !json.Valid(out) {
			t.Fatalf("patched into %q", out)
		}
	})
}

func FuzzQuery(f *testing.F) {
	r := newRig(f)
	r.deliver(f, upsert(f, "pods", pod("a", "u1"), "1"))
	for _, seed := range []string{
		"watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true",
		"fieldSelector=spec.nodeName%3Dn1,status.phase!%3DFailed&labelSelector=app+in+(a,b),!x",
		"watch&resourceVersion=1&timeoutSeconds=1", "limit=500&resourceVersion=0", "fieldSelector=metadata.name%3Da",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, query string) {
		if strings.ContainsAny(query, "#") {
			return
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		req := httptest.NewRequestWithContext(ctx, http.MethodGet, "/api/v1/pods", nil)
		req.URL = &url.URL{Path: "/api/v1/pods", RawQuery: query}
		w := httptest.NewRecorder()
		r.ServeHTTP(w, req)
		dec := json.NewDecoder(w.Body)
		for dec.More() {
			var v map[string]any
			if err := dec.Decode(&v); err != nil {
				t.Fatalf("%d %v", w.Code, err)
			}
		}
		if w.Code >= 500 && w.Code != 504 {
			t.Fatalf("%q answered %d", query, w.Code)
		}
	})
}

func FuzzPath(f *testing.F) {
	r := newRig(f)
	for _, p := range []string{"/api/v1/namespaces/d/pods/a/status", "/apis/coordination.k8s.io/v1/leases", "/api/v1/namespaces//pods", "//", "/apis", "/api/v1/pods/../nodes"} {
		f.Add("GET", p, []byte(`{}`))
		f.Add("PUT", p, []byte(`{"metadata":{"name":"a"}}`))
		f.Add("DELETE", p, []byte(``))
	}
	f.Fuzz(func(t *testing.T, method, path string, body []byte) {
		req := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/", strings.NewReader(string(body)))
		req.Method, req.URL = method, &url.URL{Path: path}
		w := httptest.NewRecorder()
		r.ServeHTTP(w, req)
		if w.Code == http.StatusInternalServerError {
			t.Fatalf("%s %q answered %d: %s", method, path, w.Code, w.Body)
		}
		for _, o := range list(r.store) {
			if !json.Valid(o.Body) {
				t.Fatalf("stored %q", o.Body)
			}
		}
	})
}

func list(s *store.Store) []store.Object {
	var out []store.Object
	for _, res := range []string{"pods", "nodes", "leases", "events", "csinodes"} {
		objs, _ := s.List(res, "")
		out = append(out, objs...)
	}
	return out
}
