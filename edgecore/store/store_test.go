package store

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func testConfig(t testing.TB) Config {
	return Config{Path: filepath.Join(t.TempDir(), "edge.db"), LockTimeout: 100 * time.Millisecond}
}

func mustOpen(t testing.TB, cfg Config) *Store {
	t.Helper()
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return s
}

func podKey(name string) Key { return Key{"pods", "default", name} }

func podBody(name, uid, extra string) []byte {
	return fmt.Appendf(nil, `{"metadata":{"name":%q,"namespace":"default","uid":%q},"spec":{"nodeName":"n1","containers":[{"name":"c","image":"i"}]}%s}`, name, uid, extra)
}

func apply(t testing.TB, s *Store, d Delta) {
	t.Helper()
	if err := s.ApplyDelta(context.Background(), d); err != nil {
		t.Fatal(err)
	}
}

func upsertPod(t testing.TB, s *Store, name, uid, rev, extra string) {
	t.Helper()
	apply(t, s, Delta{Upserts: []Upsert{{Key: podKey(name), UID: uid, Rev: rev, Body: podBody(name, uid, extra)}}})
}

// at decodes a value inside a body, nil when absent.
func at(t testing.TB, body []byte, path ...string) any {
	t.Helper()
	var v any
	if err := json.Unmarshal(body, &v); err != nil {
		t.Fatal(err)
	}
	for _, p := range path {
		m, ok := v.(map[string]any)
		if !ok {
			return nil
		}
		v = m[p]
	}
	return v
}

func TestSurvivesRestart(t *testing.T) {
	cfg := testConfig(t)
	s := mustOpen(t, cfg)
	if s.Synced() {
		t.Error("a new store says it is synced")
	}
	upsertPod(t, s, "a", "u1", "100", `,"status":{"phase":"Pending"}`)
	apply(t, s, Delta{Upserts: []Upsert{{Key: Key{"secrets", "default", "s"}, UID: "us", Rev: "7", Body: []byte(`{"metadata":{"name":"s"},"data":{"k":"c2VjcmV0LXdvcmQ="}}`)}}, Synced: "e1"})
	rv := s.RV()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(cfg.Path)
	if err != nil {
		t.Fatal(err)
	}
	for _, plain := range []string{"c2VjcmV0", "secret-word"} {
		if contains(raw, plain) {
			t.Errorf("the file holds %q in the clear", plain)
		}
	}
	s = mustOpen(t, cfg)
	if !s.Synced() || s.SyncEpoch() != "e1" {
		t.Errorf("epoch %q", s.SyncEpoch())
	}
	if s.RV() <= rv {
		t.Errorf("resourceVersion went from %d to %d", rv, s.RV())
	}
	o, ok := s.Get(podKey("a"))
	if !ok || o.UID != "u1" || o.Rev != "100" || at(t, o.Body, "kind") != "Pod" || at(t, o.Body, "status", "phase") != "Pending" {
		t.Errorf("pod after restart: %+v %s", o, o.Body)
	}
	sec, ok := s.Get(Key{"secrets", "default", "s"})
	if !ok || at(t, sec.Body, "data", "k") != "c2VjcmV0LXdvcmQ=" {
		t.Errorf("secret after restart: %s", sec.Body)
	}
	for _, p := range []string{cfg.Path, cfg.Path + ".key", cfg.Path + ".pods", cfg.Path + ".lock"} {
		info, err := os.Stat(p)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %o", p, info.Mode().Perm())
		}
	}
}

func contains(b []byte, s string) bool {
	for i := 0; i+len(s) <= len(b); i++ {
		if string(b[i:i+len(s)]) == s {
			return true
		}
	}
	return false
}
