package store

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
)

// filled makes a closed store with pods and a secret.
func filled(t testing.TB) Config {
	t.Helper()
	cfg := testConfig(t)
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 30 {
		name := fmt.Sprintf("p%02d", i)
		upsertPod(t, s, name, "u"+name, "1", fmt.Sprintf(`,"status":{"pad":%q}`, strings.Repeat("x", 700)))
		patchStatus(t, s, podKey(name), `{"phase":"Running"}`)
	}
	apply(t, s, Delta{Synced: "e", Upserts: []Upsert{{Key{"secrets", "default", "s"}, "us", "1", []byte(`{"data":{"k":"dg=="}}`)}}})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return cfg
}

func wantDamage(t *testing.T, cfg Config, hint string) {
	t.Helper()
	s, err := Open(cfg)
	if err == nil {
		s.Close()
		t.Fatal("opened")
	}
	if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "edgecore reset") || !strings.Contains(err.Error(), hint) || !strings.Contains(err.Error(), cfg.Path) {
		t.Errorf("error: %v", err)
	}
}

func edit(t *testing.T, cfg Config, fn func(tx *bolt.Tx) error) {
	t.Helper()
	db, err := bolt.Open(cfg.Path, 0o600, boltOptions(time.Second))
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Update(fn); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestRefusesDamage(t *testing.T) {
	for name, tc := range map[string]struct {
		hint   string
		damage func(t *testing.T, cfg Config)
	}{
		"deleted": {"missing or empty", func(t *testing.T, cfg Config) { must(t, os.Remove(cfg.Path)) }},
		"emptied": {"missing or empty", func(t *testing.T, cfg Config) { must(t, os.Truncate(cfg.Path, 0)) }},
		"zeroed":  {"no valid meta", func(t *testing.T, cfg Config) { must(t, os.WriteFile(cfg.Path, make([]byte, 64<<10), 0o600)) }},
		"text":    {"no valid meta", func(t *testing.T, cfg Config) { must(t, os.WriteFile(cfg.Path, []byte("hello"), 0o600)) }},
		"cut":     {"truncated", func(t *testing.T, cfg Config) { must(t, os.Truncate(cfg.Path, 20<<10)) }},
		"marker":  {"marker", func(t *testing.T, cfg Config) { must(t, os.WriteFile(markerPath(cfg.Path), []byte("{"), 0o600)) }},
		"no pods": {"it holds", func(t *testing.T, cfg Config) { dropPods(t, cfg) }},
		"no buckt": {"bucket", func(t *testing.T, cfg Config) {
			edit(t, cfg, func(tx *bolt.Tx) error { return tx.DeleteBucket(bucketOutbox) })
		}},
		"replaced": {"not the database", func(t *testing.T, cfg Config) {
			other := testConfig(t)
			must(t, mustOpen(t, Config{Path: other.Path, KeyFile: cfg.Path + ".key"}).Close())
			must(t, os.Rename(other.Path, cfg.Path))
		}},
		"other key": {"not the one", func(t *testing.T, cfg Config) { must(t, os.WriteFile(cfg.Path+".key", make([]byte, 32), 0o600)) }},
		"flipped record": {"checksum", func(t *testing.T, cfg Config) {
			edit(t, cfg, func(tx *bolt.Tx) error {
				b := tx.Bucket(bucketObjects)
				k := podKey("p03").encode()
				v := append([]byte(nil), b.Get(k)...)
				v[len(v)-4] ^= 1
				return b.Put(k, v)
			})
		}},
		"moved record": {"checksum", func(t *testing.T, cfg Config) {
			edit(t, cfg, func(tx *bolt.Tx) error {
				b := tx.Bucket(bucketObjects)
				return b.Put(podKey("p03").encode(), append([]byte(nil), b.Get(podKey("p04").encode())...))
			})
		}},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := filled(t)
			tc.damage(t, cfg)
			wantDamage(t, cfg, tc.hint)
			must(t, Reset(cfg.Path, ""))
			s := mustOpen(t, cfg)
			if list, _ := s.List("pods", ""); s.Synced() || len(list) != 0 {
				t.Error("not empty after a reset")
			}
		})
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func dropPods(t *testing.T, cfg Config) {
	edit(t, cfg, func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketObjects)
		c := b.Cursor()
		for k, _ := c.First(); k != nil; k, _ = c.Next() {
			if strings.HasPrefix(string(k), "pods") {
				if err := c.Delete(); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

func TestRefusesWithoutKey(t *testing.T) {
	cfg := filled(t)
	must(t, os.Rename(cfg.Path+".key", cfg.Path+".away"))
	if _, err := Open(cfg); err == nil || !strings.Contains(err.Error(), "missing") || !strings.Contains(err.Error(), "edgecore reset") {
		t.Errorf("without a key: %v", err)
	}
	if _, err := os.Stat(cfg.Path + ".key"); !errors.Is(err, fs.ErrNotExist) {
		t.Error("a new key was made for an old store")
	}
	must(t, os.Rename(cfg.Path+".away", cfg.Path+".key"))
	must(t, os.Chmod(cfg.Path+".key", 0o644))
	if _, err := Open(cfg); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("with a readable key: %v", err)
	}
}

func TestLockedByAnother(t *testing.T) {
	cfg := testConfig(t)
	mustOpen(t, cfg)
	if _, err := Open(cfg); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), "in use by another edgecore") {
		t.Errorf("second open: %v", err)
	}
	if err := Reset(cfg.Path, ""); !errors.Is(err, ErrLocked) {
		t.Errorf("reset of a store in use: %v", err)
	}
}

// Whatever single bit of a data page goes bad, Open either refuses or has every object whole.
// It runs in a child process: a fault would take down the process that opens.
func TestEveryFlippedByteIsNoticed(t *testing.T) {
	if os.Getenv("SKERRY_STORE_FLIP") != "" {
		openFlipped(t, Config{Path: os.Getenv("SKERRY_STORE_FLIP"), LockTimeout: time.Second})
		return
	}
	cfg := filled(t)
	cmd := exec.Command(os.Args[0], "-test.run=^TestEveryFlippedByteIsNoticed$", "-test.v")
	cmd.Env = append(os.Environ(), "SKERRY_STORE_FLIP="+cfg.Path)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func openFlipped(t *testing.T, cfg Config) {
	whole, err := os.ReadFile(cfg.Path)
	must(t, err)
	s, err := Open(cfg)
	must(t, err)
	want := map[Key]string{}
	for _, res := range []string{"pods", "secrets"} {
		list, _ := s.List(res, "")
		for _, o := range list {
			want[o.Key] = string(o.Body)
		}
	}
	must(t, s.Close())
	rng := rand.New(rand.NewPCG(1, 2))
	refused := 0
	for i := range 400 {
		bad := append([]byte(nil), whole...)
		switch i % 3 {
		case 0:
			// Not the two meta pages: with one bad bbolt goes by the other, a
			// commit older, as it must after a torn write.
			bad[8192+rng.IntN(len(bad)-8192)] ^= byte(1 << rng.IntN(8))
		case 1: // page headers and element tables are where it hurts
			bad[(2+rng.IntN(len(bad)/4096-2))*4096+rng.IntN(128)] ^= byte(1 << rng.IntN(8))
		case 2:
			bad = bad[:rng.IntN(len(bad))]
		}
		must(t, os.WriteFile(cfg.Path, bad, 0o600))
		s, err := Open(cfg)
		if err != nil {
			if !errors.Is(err, ErrDamaged) {
				t.Fatalf("error: %v", err)
			}
			refused++
			continue
		}
		for k, body := range want {
			if o, ok := s.Get(k); !ok || string(o.Body) != body {
				t.Fatalf("round %d: %s is not what it was", i, k)
			}
		}
		must(t, s.Close())
	}
	t.Logf("%d of 400 refused", refused)
}

func TestBackupAndRestore(t *testing.T) {
	cfg := filled(t)
	s := mustOpen(t, cfg)
	backup := cfg.Path + ".backup"
	must(t, s.Backup(backup))
	if err := s.Backup(backup); err == nil {
		t.Error("a backup was overwritten")
	}
	must(t, s.Close())
	must(t, os.Truncate(cfg.Path, 8192))
	wantDamage(t, cfg, "")
	if err := Check(cfg); !errors.Is(err, ErrDamaged) {
		t.Errorf("check: %v", err)
	}
	if err := Restore(cfg, cfg.Path); err == nil {
		t.Error("restored from a damaged copy")
	}
	must(t, Restore(cfg, backup))
	must(t, Check(cfg))
	s = mustOpen(t, cfg)
	if list, _ := s.List("pods", ""); len(list) != 30 || !s.Synced() || s.Outbox().Depth() != 30 {
		t.Errorf("restored %d pods, synced %t, outbox %d", len(list), s.Synced(), s.Outbox().Depth())
	}
}

// A crash between commit and marker must not make a good store look bad.
func TestMarkerErrsOnTheSafeSide(t *testing.T) {
	cfg := testConfig(t)
	s := mustOpen(t, cfg)
	upsertPod(t, s, "a", "u1", "1", "")
	m, err := readMarker(cfg.Path)
	if err != nil || m == nil || !m.Pods {
		t.Fatalf("marker after the first pod: %+v %v", m, err)
	}
	kubeletDelete(t, s, podKey("a"))
	m, err = readMarker(cfg.Path)
	if err != nil || m.Pods {
		t.Fatalf("marker after the last pod: %+v %v", m, err)
	}
	must(t, s.Close())
	must(t, os.Remove(cfg.Path)) // nothing was lost that would kill containers
	mustOpen(t, cfg)
}
