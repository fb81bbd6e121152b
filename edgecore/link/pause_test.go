package link

import (
	"testing"
	"time"
)

// awaitState waits for the link's state to be as it should.
func (r *rig) awaitState(want string, is func(State) bool) {
	r.t.Helper()
	for end := time.Now().Add(soon); !is(r.State()); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatalf("not %s: %+v", want, r.State())
		}
	}
}

func TestPauseCutsTheTunnelAndKeepsItCut(t *testing.T) {
	r := newRig(t, openStore(t))
	first := r.session()
	r.awaitState("connected", func(s State) bool { return s.Connected })
	resume, also := r.Pause(), r.Pause()
	<-first.Done()
	r.awaitState("disconnected", func(s State) bool { return !s.Connected })
	resume()
	resume() // once is enough
	select {
	case <-r.sessions:
		t.Fatal("a tunnel while the link is paused")
	case <-time.After(300 * time.Millisecond):
	}
	also()
	r.session()
	// Stopping while paused is no error: the rig checks.
	r.Pause()
}
