package identity

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// renewingDir makes this test binary a process that does nothing but what a
// renewal does on disk, over and over, until it is killed.
const renewingDir = "SKERRY_TEST_RENEWING_IN"

func TestKilledWhileRenewing(t *testing.T) {
	if dir := os.Getenv(renewingDir); dir != "" {
		renewForEver(t, dir)
		return
	}
	ca := newTestCA(t)
	first := newMaterial(t, ca, time.Hour)
	dir := t.TempDir()
	if err := install(dir, first); err != nil {
		t.Fatal(err)
	}
	changed := 0
	last := first.cert.Leaf.Raw
	for range 60 {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestKilledWhileRenewing$")
		cmd.Env = append(os.Environ(), renewingDir+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		began := make([]byte, 1) // it has come as far as renewing
		if _, err := out.Read(began); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(rand.Int64N(int64(60 * time.Millisecond))))
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()

		// Whole, whichever it is: Load compares key, certificate and name.
		id, err := Load(dir)
		if err != nil {
			t.Fatalf("no identity after a kill: %v", err)
		}
		if now := id.Certificate().Raw; !bytes.Equal(now, last) {
			changed++
			last = now
		}
		// The key of a renewal under way is whole too, or made anew.
		if _, _, err := id.nextKey(); err != nil {
			t.Fatal(err)
		}
	}
	if changed < 10 {
		t.Errorf("the identity changed %d times in 60 runs", changed)
	}
	left, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range left {
		if !strings.HasPrefix(e.Name(), "identity") {
			t.Errorf("left behind: %s", e.Name())
		}
	}
}

func renewForEver(t *testing.T, dir string) {
	id, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	ca := newTestCA(t)
	fresh := []*material{newMaterial(t, ca, time.Hour), newMaterial(t, ca, 2*time.Hour), newMaterial(t, ca, 3*time.Hour)}
	_, _ = os.Stdout.WriteString("x")
	for i := 0; ; i++ {
		if _, _, err := id.nextKey(); err != nil {
			t.Fatal(err)
		}
		if err := install(dir, fresh[i%len(fresh)]); err != nil {
			t.Fatal(err)
		}
	}
}

// A certificate of minutes, whose hub backdates it by an hour, is renewed when a
// third of its minutes is left, and not at once and for ever.
func TestShortLivedCertificates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newTestCA(t)
		const life = 3 * time.Minute
		backdated := func() *material {
			m := newMaterial(t, ca, life)
			m.cert.Leaf.NotBefore = m.cert.Leaf.NotBefore.Add(-time.Hour)
			return m
		}
		id := newIdentity(t.TempDir(), backdated())
		renewed := 0
		r, err := NewRenewer(RenewerConfig{Identity: id, Renewed: func() { renewed++ }})
		if err != nil {
			t.Fatal(err)
		}
		r.attempt = func(context.Context) error { id.adopt(backdated()); return nil }
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		time.Sleep(time.Hour)
		synctest.Wait()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if renewed < 28 || renewed > 33 {
			t.Errorf("renewed %d times in an hour; it lives %v", renewed, life)
		}
	})
}

// However often the hub refuses the node, it is not asked for a certificate
// more than twice a minute.
func TestKicksAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		id := newIdentity(t.TempDir(), newMaterial(t, newTestCA(t), 90*24*time.Hour))
		r, err := NewRenewer(RenewerConfig{Identity: id})
		if err != nil {
			t.Fatal(err)
		}
		var mu sync.Mutex
		tries := 0
		r.attempt = func(context.Context) error {
			mu.Lock()
			defer mu.Unlock()
			tries++
			return errors.New("no")
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		for range 600 {
			r.Kick()
			time.Sleep(time.Second)
		}
		cancel()
		<-done
		if tries < 15 || tries > 21 {
			t.Errorf("%d tries in ten minutes", tries)
		}
	})
}

// The clock that the node was given judges, and never before the certificate's
// own issue.
func TestAnotherClock(t *testing.T) {
	m := newMaterial(t, newTestCA(t), time.Hour)
	id := newIdentity(t.TempDir(), m)
	at := time.Now().Add(30 * 24 * time.Hour)
	id.UseClock(func() time.Time { return at })
	if got := id.ClientTLS().Time(); !got.Equal(at) {
		t.Errorf("judged at %v, want %v", got, at)
	}
	id.UseClock(func() time.Time { return time.Unix(0, 0) })
	if got := id.ClientTLS().Time(); !got.Equal(m.meta.IssuedAt) {
		t.Errorf("judged at %v, want %v", got, m.meta.IssuedAt)
	}
}
