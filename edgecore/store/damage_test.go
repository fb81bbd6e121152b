package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
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

// wantWhole opens a store and wants what filled put into it.
func wantWhole(t *testing.T, cfg Config) *Store {
	t.Helper()
	s := mustOpen(t, cfg)
	list, _ := s.List("pods", "")
	for _, o := range list {
		if o.UID != "u"+o.Name {
			t.Errorf("%s has uid %s", o.Key, o.UID)
		}
	}
	if len(list) != 30 || !s.Synced() {
		t.Errorf("%d pods, synced %t", len(list), s.Synced())
	}
	sec, _ := s.Get(Key{"secrets", "default", "s"})
	if at(t, sec.Body, "data", "k") != "dg==" {
		t.Errorf("secret: %s", sec.Body)
	}
	if list, _ := s.List("configmaps", ""); len(list) != 0 {
		t.Errorf("objects of another store: %v", list)
	}
	return s
}

func overwrite(t *testing.T, path string, at int64, b []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0o600)
	must(t, err)
	_, err = f.WriteAt(b, at)
	must(t, errors.Join(err, f.Close()))
}

// newestMeta is where bbolt's later meta page is.
func newestMeta(t *testing.T, path string) int64 {
	t.Helper()
	raw, err := os.ReadFile(path)
	must(t, err)
	if binary.LittleEndian.Uint64(raw[16+48:]) > binary.LittleEndian.Uint64(raw[4096+16+48:]) {
		return 0
	}
	return 4096
}

// Each damage once beside a good copy and once without: a store is whole again,
// and says so, or refused with the way out.
func TestDamage(t *testing.T) {
	for name, tc := range map[string]struct {
		hint   string // of the refusal without a copy; empty: it is mended from the file itself
		damage func(t *testing.T, cfg Config)
	}{
		"deleted": {"missing or empty", func(t *testing.T, cfg Config) { must(t, os.Remove(cfg.Path)) }},
		"emptied": {"missing or empty", func(t *testing.T, cfg Config) { must(t, os.Truncate(cfg.Path, 0)) }},
		"zeroed":  {"no valid meta", func(t *testing.T, cfg Config) { must(t, os.WriteFile(cfg.Path, make([]byte, 64<<10), 0o600)) }},
		"text":    {"no valid meta", func(t *testing.T, cfg Config) { must(t, os.WriteFile(cfg.Path, []byte("hello"), 0o600)) }},
		"cut":     {"truncated", func(t *testing.T, cfg Config) { must(t, os.Truncate(cfg.Path, 20<<10)) }},
		"no pods": {"", func(t *testing.T, cfg Config) { dropPods(t, cfg) }},
		"no bucket": {"", func(t *testing.T, cfg Config) {
			edit(t, cfg, func(tx *bolt.Tx) error { return tx.DeleteBucket(bucketOutbox) })
		}},
		"newest meta page": {"", func(t *testing.T, cfg Config) {
			overwrite(t, cfg.Path, newestMeta(t, cfg.Path)+20, []byte{0xff})
		}},
		"both meta pages": {"", func(t *testing.T, cfg Config) {
			overwrite(t, cfg.Path, 20, []byte{0xff})
			overwrite(t, cfg.Path, 4096+20, []byte{0xff})
		}},
		"flipped record": {"", func(t *testing.T, cfg Config) {
			edit(t, cfg, func(tx *bolt.Tx) error {
				b := tx.Bucket(bucketObjects)
				k := podKey("p03").encode()
				v := append([]byte(nil), b.Get(k)...)
				v[len(v)-4] ^= 1
				return b.Put(k, v)
			})
		}},
		"moved record": {"", func(t *testing.T, cfg Config) {
			edit(t, cfg, func(tx *bolt.Tx) error {
				b := tx.Bucket(bucketObjects)
				return b.Put(podKey("p03").encode(), append([]byte(nil), b.Get(podKey("p04").encode())...))
			})
		}},
	} {
		t.Run(name, func(t *testing.T) {
			for _, copied := range []bool{true, false} {
				cfg := filled(t)
				if copied {
					s := mustOpen(t, cfg)
					_, _, err := s.copyGood()
					must(t, err)
					must(t, s.Close())
				}
				tc.damage(t, cfg)
				if err := Check(cfg); !errors.Is(err, ErrDamaged) {
					t.Errorf("check: %v", err)
				}
				if !copied && tc.hint != "" {
					wantDamage(t, cfg, tc.hint)
					wantDamage(t, cfg, "of its 30 pods")
					must(t, Reset(cfg.Path, ""))
					s := mustOpen(t, cfg)
					if list, _ := s.List("pods", ""); s.Synced() || len(list) != 0 {
						t.Error("not empty after a reset")
					}
					continue
				}
				s := wantWhole(t, cfg)
				m := s.Mended()
				if m == nil || m.Pods != 30 || m.Cause == "" {
					t.Fatalf("mended: %+v", m)
				}
				if m.Aside != "" {
					if _, err := os.Stat(m.Aside); err != nil {
						t.Error(err)
					}
				}
				must(t, s.Close())
				if s := wantWhole(t, cfg); s.Mended() != nil {
					t.Errorf("mended twice: %+v", s.Mended())
				}
			}
		})
	}
}

func TestRefusesWhatIsNotItsOwn(t *testing.T) {
	for name, tc := range map[string]struct {
		hint   string
		damage func(t *testing.T, cfg Config)
	}{
		"replaced": {"not the database", func(t *testing.T, cfg Config) {
			other := testConfig(t)
			must(t, mustOpen(t, Config{Path: other.Path, KeyFile: cfg.Path + ".key"}).Close())
			must(t, os.Rename(other.Path, cfg.Path))
		}},
		"other key": {"not the one", func(t *testing.T, cfg Config) { must(t, os.WriteFile(cfg.Path+".key", make([]byte, 32), 0o600)) }},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := filled(t)
			tc.damage(t, cfg)
			wantDamage(t, cfg, tc.hint)
		})
	}
}

// A commit that was acknowledged and is gone, because the file was put back or
// the disk lost it: found out by the ledger, and mended.
func TestAnOlderFileIsNoticed(t *testing.T) {
	cfg := testConfig(t)
	s := mustOpen(t, cfg)
	upsertPod(t, s, "stays", "u1", "1", "")
	upsertPod(t, s, "ends", "u2", "1", "")
	upsertPod(t, s, "job", "u3", "1", "")
	upsertPod(t, s, "drained", "u4", "1", "")
	apply(t, s, Delta{Synced: "e"})
	_, _, err := s.copyGood()
	must(t, err)
	must(t, s.Close())
	older, err := os.ReadFile(cfg.Path)
	must(t, err)

	s = mustOpen(t, cfg)
	kubeletDelete(t, s, podKey("ends"))
	patchStatus(t, s, podKey("job"), `{"phase":"Succeeded"}`)
	apply(t, s, Delta{Upserts: []Upsert{{podKey("drained"), "u4", "2",
		[]byte(`{"metadata":{"deletionTimestamp":"2026-01-01T00:00:00Z","deletionGracePeriodSeconds":5},"spec":{}}`)}}})
	must(t, s.Close())
	must(t, os.WriteFile(cfg.Path, older, 0o600))

	s = mustOpen(t, cfg)
	if m := s.Mended(); m == nil || !strings.Contains(m.Cause, "older") {
		t.Fatalf("mended: %+v", m)
	}
	var names []string
	list, _ := s.List("pods", "")
	for _, o := range list {
		names = append(names, o.Name)
	}
	same(t, "pods", names, "drained", "job", "stays")
	if o, _ := s.Get(podKey("job")); at(t, o.Body, "status", "phase") != "Succeeded" {
		t.Errorf("a finished pod would run again: %s", o.Body)
	}
	if o, _ := s.Get(podKey("drained")); at(t, o.Body, "metadata", "deletionTimestamp") == nil {
		t.Errorf("a pod that is to end would run on: %s", o.Body)
	}
	must(t, s.Close())

	// A pod that came after the copy and is in neither: refused, by name.
	s = mustOpen(t, cfg)
	upsertPod(t, s, "late", "u5", "1", "")
	must(t, s.Close())
	must(t, os.Remove(cfg.Path))
	wantDamage(t, cfg, "default/late")
}

func TestALedgerIsMadeAnew(t *testing.T) {
	cfg := filled(t)
	must(t, os.WriteFile(ledgerPath(cfg.Path), []byte("{"), 0o600))
	if err := Check(cfg); !errors.Is(err, ErrDamaged) {
		t.Errorf("check: %v", err)
	}
	must(t, wantWhole(t, cfg).Close())
	must(t, os.Remove(ledgerPath(cfg.Path)))
	must(t, wantWhole(t, cfg).Close())
	must(t, os.Remove(cfg.Path))
	wantDamage(t, cfg, "missing or empty")
	// Without either there is nothing that tells a damaged store from a new one's
	// beginnings but the ledger itself.
	must(t, os.WriteFile(ledgerPath(cfg.Path), []byte("{"), 0o600))
	wantDamage(t, cfg, "ledger")
}

// Whatever byte of the ledger goes bad, the store opens, and what was said
// before still holds.
func TestLedgerSlots(t *testing.T) {
	cfg := filled(t)
	raw, err := os.ReadFile(ledgerPath(cfg.Path))
	must(t, err)
	for slot := range 2 {
		bad := append([]byte(nil), raw...)
		for i := range 40 {
			bad[slot*len(raw)/2+i] ^= 0x55
		}
		must(t, os.WriteFile(ledgerPath(cfg.Path), bad, 0o600))
		must(t, wantWhole(t, cfg).Close())
	}
	// It grows with the pods.
	s := mustOpen(t, cfg)
	var d Delta
	for i := range 300 {
		name := fmt.Sprintf("more-%03d-%s", i, strings.Repeat("x", 40))
		d.Upserts = append(d.Upserts, Upsert{podKey(name), "u" + name, "1", podBody(name, "u"+name, "")})
	}
	apply(t, s, d)
	must(t, s.Close())
	l, said, bad, err := openLedger(cfg.Path)
	if err != nil || bad != nil || len(said.Pods) != 330 {
		t.Fatalf("%v %v %d pods", err, bad, len(said.Pods))
	}
	l.close()
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
	ledger, err := os.ReadFile(ledgerPath(cfg.Path))
	must(t, err)
	s, err := Open(cfg)
	must(t, err)
	var used int64
	must(t, s.db.View(func(tx *bolt.Tx) error { used = tx.Size(); return nil }))
	whole = whole[:used] // the rest is set aside
	want := map[Key]string{}
	for _, res := range []string{"pods", "secrets"} {
		list, _ := s.List(res, "")
		for _, o := range list {
			want[o.Key] = string(o.Body)
		}
	}
	must(t, s.Close())
	rng := rand.New(rand.NewPCG(1, 2))
	refused, mended := 0, 0
	for i := range 400 {
		bad := append([]byte(nil), whole...)
		switch i % 3 {
		case 0:
			bad[rng.IntN(len(bad))] ^= byte(1 << rng.IntN(8))
		case 1: // page headers and element tables are where it hurts
			bad[(2+rng.IntN(len(bad)/4096-2))*4096+rng.IntN(128)] ^= byte(1 << rng.IntN(8))
		case 2:
			bad = bad[:rng.IntN(len(bad))]
		}
		must(t, os.WriteFile(cfg.Path, bad, 0o600))
		must(t, os.WriteFile(ledgerPath(cfg.Path), ledger, 0o600))
		s, err := Open(cfg)
		if err != nil {
			if !errors.Is(err, ErrDamaged) {
				t.Fatalf("error: %v", err)
			}
			refused++
			continue
		}
		if s.Mended() != nil {
			mended++
		}
		for k, body := range want {
			o, ok := s.Get(k)
			if s.Mended() != nil && ok && o.UID == "u"+k.Name {
				continue // it may be a little old
			}
			if s.Mended() != nil && !ok && k.Resource == "secrets" {
				continue // a pod would not be
			}
			if !ok || string(o.Body) != body {
				t.Fatalf("round %d: %s is not what it was", i, k)
			}
		}
		must(t, s.Close())
	}
	t.Logf("%d of 400 refused, %d mended", refused, mended)
	if mended < 50 {
		t.Error("hardly any was mended")
	}
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
	wantDamage(t, cfg, "30 of its 30 pods")
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

// The ledger follows the pods, and errs on the safe side between two writes.
func TestLedgerFollows(t *testing.T) {
	cfg := testConfig(t)
	s := mustOpen(t, cfg)
	says := func(want ...string) {
		t.Helper()
		l, said, bad, err := openLedger(cfg.Path)
		if err != nil || bad != nil {
			t.Fatal(err, bad)
		}
		l.close()
		var got []string
		for uid, n := range said.Pods {
			got = append(got, fmt.Sprintf("%s %s %s %t", n.Name, uid, n.Phase, n.Deleted))
		}
		slices.Sort(got)
		same(t, "ledger", got, want...)
	}
	says()
	upsertPod(t, s, "a", "u1", "1", "")
	says("default/a u1  false")
	written := s.Wear().Classes["ledger"]
	patchStatus(t, s, podKey("a"), `{"phase":"Running"}`)
	if n := s.Wear().Classes["ledger"] - written; n != 0 {
		t.Errorf("a status cost %d bytes of ledger", n)
	}
	apply(t, s, Delta{Deletions: []Deletion{{podKey("a"), "u1"}}})
	says("default/a u1  true")
	patchStatus(t, s, podKey("a"), `{"phase":"Failed"}`)
	says("default/a u1 Failed true")
	kubeletDelete(t, s, podKey("a"))
	says()
	must(t, s.Local(t.Context(), func(tx *Tx) error {
		_, err := tx.Put(podKey("m"), "um", []byte(`{"metadata":{"annotations":{"kubernetes.io/config.mirror":"h"}}}`))
		return err
	}))
	says()
	must(t, s.Close())
	must(t, os.Remove(cfg.Path)) // nothing was lost that would kill containers
	mustOpen(t, cfg)
}
