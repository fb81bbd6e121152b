package profile

import (
	"iter"
	"slices"
	"strings"

	"github.com/skerry-io/skerry/devicetwin/mqtt"
)

// Replay takes messages that were heard before this start, oldest first, for
// the devices of the last Set. It is called before Run. They say what was, and
// nothing of who is there: to the twin they are as what a broker has kept. For
// telemetry they are readings that come late, some of them for the second time.
func (d *Driver) Replay(messages iter.Seq[mqtt.Message]) {
	exact, wild := map[string][]*route{}, []*route(nil)
	for _, r := range d.routes() {
		switch {
		case r.device == nil:
		case strings.ContainsAny(r.filter, "+#"):
			wild = append(wild, r)
		default:
			exact[r.filter] = append(exact[r.filter], r)
		}
	}
	for m := range messages {
		m.Retain = true
		p := &packet{Message: m}
		for _, r := range exact[m.Topic] {
			d.replay(r, p)
		}
		for _, r := range wild {
			if mqtt.Match(r.filter, m.Topic) {
				d.replay(r, p)
			}
		}
	}
}

func (d *Driver) replay(r *route, p *packet) {
	dev := r.device
	dev.mu.Lock()
	defer dev.mu.Unlock()
	if dev.gone.Load() {
		return
	}
	was := applyAll(r.reads, p, nil)
	if r.handle != nil {
		was = r.handle(p, was)
	}
	if len(was) == 0 {
		return
	}
	late := slices.Clone(was)
	for i := range was {
		if was[i].TS.IsZero() {
			was[i].TS = p.Received
		}
		late[i] = was[i]
		late[i].Retained, late[i].Historical = false, true
	}
	d.cfg.Sink.Report(dev.key, was)
	d.cfg.Sink.Report(dev.key, late)
}
