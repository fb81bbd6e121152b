package tunnel

import (
	"context"
	"fmt"
	"io"
	"testing"
	"time"
)

// schedule gives the link to streams as fillLocked does, total bytes in all, and
// returns who got how much. Each stream always has more to send.
func schedule(s *Session, total int) map[*Stream]int {
	got := map[*Stream]int{}
	for room := MaxMessage; total > 0; room = MaxMessage {
		for room > maxHeader {
			st, limit := s.pickLocked(MaxMessage)
			if st == nil {
				return got
			}
			n := min(limit, room-maxHeader, len(st.pend))
			got[st] += n
			s.accountLocked(st, n)
			total -= n
			room -= n + 6
		}
	}
	return got
}

func newIdleSession() *Session {
	s := &Session{mem: NewMemory(0), hub: true, streams: map[uint64]*Stream{}, base: time.Now()}
	s.nextID = 1
	return s
}

func (s *Session) testStream(class Class, pend int) *Stream {
	st := newStream(s, s.nextID, OpenRequest{Kind: "x", Class: class}, true)
	s.nextID += 2
	st.credit = 1 << 60
	st.pend = make([]byte, pend)
	s.activateLocked(st)
	return st
}

const plenty = 1 << 20

func TestSchedulerIsFair(t *testing.T) {
	s := newIdleSession()
	for range 8 {
		s.testStream(ClassStream, plenty)
	}
	for st, n := range schedule(s, 8*plenty) {
		if n < plenty-2*quantum || n > plenty+2*quantum {
			t.Errorf("stream %d got %d of %d", st.id, n, plenty)
		}
	}
}

func TestSyncGoesFirstButLeavesATenth(t *testing.T) {
	s := newIdleSession()
	sync, other := s.testStream(ClassSync, plenty), s.testStream(ClassStream, plenty)
	got := schedule(s, 10*plenty)
	if share := float64(got[other]) / float64(got[sync]+got[other]); share < 0.08 || share > 0.12 {
		t.Errorf("ClassStream got %.3f of the link", share)
	}
	other.pend = nil
	if got := schedule(s, plenty); got[other] != 0 || got[sync] < plenty {
		t.Errorf("alone, sync got %d", got[sync])
	}
}

// A stream that sends little goes before those that send much, each time.
func TestSparseStreamGoesFirst(t *testing.T) {
	s := newIdleSession()
	for range 8 {
		s.testStream(ClassStream, plenty)
	}
	schedule(s, plenty)
	exec := s.testStream(ClassStream, 64)
	for range 100 {
		st, limit := s.pickLocked(MaxMessage)
		if st != exec {
			t.Fatalf("stream %d goes first", st.id)
		}
		s.accountLocked(st, min(limit, 64))
		exec.pend = nil
		schedule(s, 8*plenty/10) // long enough for it to leave the lists
		exec.pend = make([]byte, 64)
		s.activateLocked(exec)
	}
}

// However many sparse streams there are, the others are not starved.
func TestSparseStreamsDoNotStarveOthers(t *testing.T) {
	s := newIdleSession()
	bulk := s.testStream(ClassStream, plenty)
	schedule(s, plenty)
	got := 0
	for range 1000 {
		for range 10 {
			s.testStream(ClassStream, 1000)
		}
		for s.out.fresh.len() > 0 {
			st, limit := s.pickLocked(MaxMessage)
			n := min(limit, len(st.pend))
			s.accountLocked(st, n)
			if st == bulk {
				got += n
			} else {
				st.pend = nil
			}
		}
	}
	if got < plenty/10 {
		t.Errorf("bulk got %d bytes beside 10 MB", got)
	}
}

// The same over a link: while sync and other streams fill it, all move.
func TestClassesShareALink(t *testing.T) {
	noLeaks(t)
	edge, hub := newTLSPair(t, Config{}, Config{})
	var nears, fars []*Stream
	for _, class := range []Class{ClassSync, ClassStream, ClassStream} {
		near, far := streamPair(t, edge, hub, class)
		nears, fars = append(nears, near), append(fars, far)
	}
	done := make(chan error, 2*len(nears))
	for i := range nears {
		go func() {
			_, err := nears[i].Write(make([]byte, 8<<20))
			_ = nears[i].CloseWrite()
			done <- err
		}()
		go func() {
			n, err := io.Copy(io.Discard, fars[i])
			if err == nil && n != 8<<20 {
				err = fmt.Errorf("%d bytes", n)
			}
			done <- err
		}()
	}
	for range cap(done) {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	for i := range nears {
		nears[i].Close()
		fars[i].Close()
	}
}

// Streams opened faster than the link takes them: each OPEN goes before its
// data, whatever message it falls in.
func TestManyOpensAtOnce(t *testing.T) {
	noLeaks(t)
	edge, hub := newPair(t, Config{}, Config{AcceptBacklog: 1000}, nil)
	if _, err := edge.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	const n = 500
	target := string(make([]byte, 1000))
	done := make(chan error, n)
	for range n {
		go func() {
			st, err := edge.Open(context.Background(), OpenRequest{Kind: "x", Target: target})
			if err == nil {
				_, err = st.Write([]byte("x"))
				_ = st.Close()
			}
			done <- err
		}()
	}
	for range n {
		st := acceptStream(t, hub)
		if got, err := io.ReadAll(st); err != nil || string(got) != "x" {
			t.Fatalf("%q, %v", got, err)
		}
		st.Close()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
}

// Whatever room a message has left, filling it comes to an end, and the FIN
// goes out.
func TestFinInAnyRoom(t *testing.T) {
	edge, hub := newPair(t, Config{}, Config{}, nil)
	for room := 1; room < 100; room++ {
		n := MaxMessage - room
		near, err := edge.Open(t.Context(), OpenRequest{Kind: "fill"})
		if err != nil {
			t.Fatal(err)
		}
		far := acceptStream(t, hub)
		edge.mu.Lock()
		near.pend, near.finWanted = make([]byte, n), true
		edge.activateLocked(near)
		last := newStream(edge, edge.nextID, OpenRequest{Kind: "last", Class: ClassStream}, true)
		edge.nextID += 2
		edge.streams[last.id] = last
		last.finWanted, last.abandon = true, true
		edge.pushControlLocked(control{typ: frameOpen, id: last.id, data: appendOpen(nil, ClassStream, "last", "")})
		edge.activateLocked(last)
		edge.kickLocked(false)
		edge.mu.Unlock()
		if got, err := io.Copy(io.Discard, far); err != nil || got != int64(n) {
			t.Fatalf("%d bytes, %v", got, err)
		}
		far.Close()
		near.Close()
		st := acceptStream(t, hub)
		if _, err := io.ReadAll(st); err != nil {
			t.Fatal(err)
		}
		st.Close()
	}
}

// A stream that waited long with much to send has not become one that sends
// little.
func TestWaitingIsNotIdling(t *testing.T) {
	s := newIdleSession()
	bulk := s.testStream(ClassStream, plenty)
	schedule(s, plenty/2)
	s.base = s.base.Add(-time.Minute) // a minute of waiting passes
	if st, _ := s.pickLocked(MaxMessage); st != bulk || st.listed != inRest {
		t.Fatal("bulk is not where it was")
	}
	s.out.pace = pacer{minRTT: time.Second, rate: 1000} // so slow that this test's own time does not count
	next := bulk.pend
	bulk.pend = nil
	s.pickLocked(MaxMessage) // finds it empty
	bulk.pend = next
	if s.activateLocked(bulk); bulk.listed != inRest {
		t.Error("bulk goes first after a pause of nothing")
	}
	bulk.pend = nil
	s.pickLocked(MaxMessage)
	s.base = s.base.Add(-time.Minute) // this minute it is idle
	bulk.pend = make([]byte, 10)
	if s.activateLocked(bulk); bulk.listed != inFresh {
		t.Error("after a minute of silence it does not go first")
	}
}
