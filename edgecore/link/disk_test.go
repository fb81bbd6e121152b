package link

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/skerry-io/skerry/edgecore/store"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// A node whose disk is full keeps its tunnel, through which someone can make
// room: statuses go up, a delta that finds no room waits without an Ack, and is
// acknowledged when there is some.
func TestAFullDiskKeepsTheTunnel(t *testing.T) {
	dir := t.TempDir()
	must(t, syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=2m"))
	t.Cleanup(func() { must(t, syscall.Unmount(dir, syscall.MNT_DETACH)) })
	s, err := store.Open(store.Config{Path: filepath.Join(dir, "edge.db")})
	must(t, err)
	t.Cleanup(func() { must(t, s.Close()) })
	r := newRig(t, s)
	c := r.synced(upsert("pods", "a", "u1", ""))
	asserted := receive[edgeapi.Write](c)
	c.result(asserted, 200)

	filler := filepath.Join(dir, "filler")
	f, err := os.Create(filler)
	must(t, err)
	for err = nil; err == nil; {
		_, err = f.Write(make([]byte, 4096))
	}
	must(t, f.Close())
	c.send(edgeapi.Delta{Seq: 2, Upserts: []edgeapi.Upsert{
		upsert("configmaps", "big", "u2", `,"data":{"k":"`+strings.Repeat("x", 1<<20)+`"}`)}})
	r.await("told", func() bool { return strings.Contains(r.State().LastError, "no space left") })
	for range 3 {
		r.report("a", "u1", "from a full disk")
		w := receive[edgeapi.Write](c)
		if message(t, w) != "from a full disk" {
			t.Fatalf("%+v", w)
		}
		c.result(w, 200)
		r.await("its answer is taken", func() bool { return s.Outbox().Depth() == 0 })
		r.report("a", "u1", "again")
		c.result(receive[edgeapi.Write](c), 200)
	}
	c.quiet("no ack without a commit")
	must(t, os.Remove(filler))
	if a := receive[edgeapi.Ack](c); a.Seq != 2 {
		t.Errorf("%+v", a)
	}
	r.await("no error any more", func() bool { return r.State().LastError == "" })
}
