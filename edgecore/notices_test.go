package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/skerry-io/skerry/edgecore/store"
)

func openStore(t *testing.T, cfg store.Config) *store.Store {
	t.Helper()
	cfg.Path = filepath.Join(t.TempDir(), "store.db")
	s, err := store.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// told returns the node's own Events.
func told(t *testing.T, s *store.Store, reason string) []corev1.Event {
	t.Helper()
	var out []corev1.Event
	list, _ := s.List("events", "default")
	for _, o := range list {
		var e corev1.Event
		if err := json.Unmarshal(o.Body, &e); err != nil {
			t.Fatal(err)
		}
		if e.Reason == reason {
			out = append(out, e)
		}
	}
	return out
}

// What was dropped while the node was away is told once it is in step again,
// once.
func TestDroppedEventsAreTold(t *testing.T) {
	s := openStore(t, store.Config{MaxEvents: 10})
	began := time.Now().Truncate(time.Second)
	for i := range 25 {
		k := store.Key{Resource: "events", Namespace: "default", Name: fmt.Sprintf("e%02d", i)}
		err := s.Local(t.Context(), func(tx *store.Tx) error {
			tx.MarkDirty(store.Mark{Op: store.OpEvent, Key: k, UID: "u"})
			_, err := tx.Put(k, "u", []byte(`{}`))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	away := true
	n := &notices{store: s, node: "n1", inStep: func() bool { return !away }, log: slog.New(slog.DiscardHandler)}
	n.drops(t.Context())
	if got := told(t, s, "EventsDropped"); len(got) != 0 {
		t.Fatalf("told while away: %+v", got)
	}
	away = false
	n.drops(t.Context())
	got := told(t, s, "EventsDropped")
	if len(got) != 1 || !strings.HasPrefix(got[0].Message, "15 Events were dropped") || got[0].InvolvedObject.Name != "n1" ||
		got[0].FirstTimestamp.Time.Before(began) || got[0].LastTimestamp.Time.Before(got[0].FirstTimestamp.Time) {
		t.Fatalf("told: %+v", got)
	}
	// The notice itself may have pushed one out; that is told too, and then no more.
	for range 3 {
		n.drops(t.Context())
	}
	d := s.Outbox().Unreported()
	if d.Events > 1 || d.States != 0 {
		t.Errorf("unreported: %+v", d)
	}
}

func TestProcessWritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "io")
	if err := os.WriteFile(path, []byte("rchar: 7\nwrite_bytes: 4096\ncancelled_write_bytes: 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if n := processWritten(path); n != 4096 {
		t.Errorf("%d", n)
	}
	if n := processWritten(path + "x"); n != 0 {
		t.Errorf("%d without the file", n)
	}
}

func TestPrintBytes(t *testing.T) {
	since := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	b := Bytes{
		Since: since, Process: 9000,
		Disk: store.Wear{Total: 8192, LastDay: 8192, Budget: 5000, Spaced: true, Classes: map[string]uint64{"pods": 8000, "store": 192}},
		Sent: map[string]uint64{"sync": 100}, Received: map[string]uint64{"sync": 50},
	}
	var out bytes.Buffer
	if err := printBytes(&out, b, since.Add(6*time.Hour)); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"disk pods   8000  32000", "disk: the store   8192  32768", "sent sync    100    400", "8192 of its 5000 bytes", "six times"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in\n%s", want, out.String())
		}
	}
}
