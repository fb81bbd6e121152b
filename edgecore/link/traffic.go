package link

import "github.com/skerry-io/skerry/tunnel"

// Traffic is what went over all tunnels since the start, by class.
type Traffic struct {
	Sent, Received map[string]uint64
	Tunnels        uint64 // that ended
}

// past sums up tunnels that have ended.
type past struct {
	in, out [len(tunnel.Stats{}.BytesIn)]uint64
	tunnels uint64
}

func (p *past) add(s tunnel.Stats) {
	for i := range p.in {
		p.in[i] += s.BytesIn[i]
		p.out[i] += s.BytesOut[i]
	}
}

// Traffic returns what went over the tunnels, the present one included.
func (l *Link) Traffic() Traffic {
	l.mu.Lock()
	sum, s := l.past, l.session
	l.mu.Unlock()
	if s != nil {
		sum.add(s.Stats())
	}
	t := Traffic{Sent: map[string]uint64{}, Received: map[string]uint64{}, Tunnels: sum.tunnels}
	for i := range sum.in {
		name := "control"
		switch tunnel.Class(i) {
		case tunnel.ClassSync:
			name = "sync"
		case tunnel.ClassStream:
			name = "stream"
		}
		t.Sent[name] += sum.out[i]
		t.Received[name] += sum.in[i]
	}
	return t
}

// InStep tells whether the node is connected and has met the cloud's set since.
func (l *Link) InStep() bool {
	s := l.State()
	return s.Connected && !s.LastSync.Before(s.Since)
}
