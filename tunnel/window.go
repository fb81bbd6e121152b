package tunnel

import "time"

// rttFresh is how old a measured round trip may be while windows grow by it.
const rttFresh = time.Second

// consumedLocked looks, after a Read, whether the peer should get more credit,
// and how far. The stream's rmu is held.
//
// Credit returns when half a window is consumed. A window that turns over
// within two round trips holds the stream back and doubles, as far as the
// budgets allow; one that nobody used for a while starts over. The round trip
// is the least one seen: measured under load it would contain our own queue,
// and the window would grow it.
func (st *Stream) consumedLocked() (offset uint64, grant bool) {
	if st.eof || st.rerr != nil {
		return 0, false
	}
	consumed := st.consumed
	if st.granted-consumed > st.window/2 {
		return 0, false
	}
	s, now := st.s, st.s.now()
	if st.window > InitialWindow && now-st.lastRead > int64(windowIdle) {
		st.resizeLocked(InitialWindow)
		st.turnStart, st.turnFrom = now, consumed
	}
	st.lastRead = now
	if consumed-st.turnFrom >= st.window {
		rtt := max(s.rttMin.Load(), int64(minRTT))
		if now-st.turnStart <= 2*rtt {
			st.resizeLocked(min(2*st.window, uint64(s.cfg.MaxWindow)))
		}
		st.turnStart, st.turnFrom = now, consumed
	}
	if consumed+st.window <= st.granted {
		return 0, false // it shrank; what is granted cannot be taken back
	}
	st.granted = consumed + st.window
	return st.granted, true
}

// resizeLocked changes the window within the budgets. The stream's rmu is held.
func (st *Stream) resizeLocked(to uint64) {
	s := st.s
	diff := int64(to) - int64(st.window)
	if st.uncharged || diff > 0 && s.windows.Load()+diff > s.cfg.WindowBudget {
		return
	}
	if diff > 0 {
		if !s.mem.grow(diff) {
			return
		}
	} else {
		s.mem.used.Add(diff)
	}
	s.windows.Add(diff)
	st.window = to
}

// releaseWindow ends the charge for a stream's window.
func (st *Stream) releaseWindow() {
	st.rmu.Lock()
	defer st.rmu.Unlock()
	st.releaseWindowLocked()
}

func (st *Stream) releaseWindowLocked() {
	if !st.uncharged {
		st.uncharged = true
		st.s.windows.Add(-int64(st.window))
		st.s.mem.used.Add(-int64(st.window))
	}
}

// sendCredit queues a CREDIT; one that waits already takes the new offset.
func (st *Stream) sendCredit(offset uint64) {
	s := st.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if st.failed != nil || st.peerFin || s.err != nil {
		return
	}
	st.grant = max(st.grant, offset)
	if !st.granting {
		st.granting = true
		s.pushControlLocked(control{typ: frameCredit, id: st.id, st: st})
	}
	if s.now()-s.rttAsked.Load() > int64(rttFresh) {
		s.pushPingLocked() // while data flows the round trip is worth knowing
	}
	s.kickLocked(true)
}
