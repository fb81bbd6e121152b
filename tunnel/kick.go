package tunnel

import (
	"context"
	"sync"
	"time"
)

// kickEvery is how often a pause may be cut short: a network that comes and
// goes each second has the hub dialled twelve times a minute, not sixty.
const kickEvery = 5 * time.Second

// pauseKind is why Run waits before it dials.
type pauseKind int

const (
	pauseBackoff pauseKind = iota // the last attempt or session failed
	pauseAsked                    // the hub, or serve, wants it to come later
	pauseSlot                     // it is a drained hub's turn for this edge
)

// kicks are reasons not to wait any longer. One of each may be waiting.
type kicks struct {
	once              sync.Once
	network, standing chan struct{}
}

func (k *kicks) init() {
	k.once.Do(func() { k.network, k.standing = make(chan struct{}, 1), make(chan struct{}, 1) })
}

// Kick tells Run that the network has changed: a pause because of failures ends
// now, or a few seconds after the one that was last cut short. A pause that the
// hub asked for goes on.
func (d *Dialer) Kick() { d.kicks.init(); push(d.kicks.network) }

// Redial tells Run that the hub may have another answer now, as to another
// certificate: a pause that it asked for ends too, but for a drained hub's slot.
func (d *Dialer) Redial() { d.kicks.init(); push(d.kicks.standing) }

func push(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default: // one waits already
	}
}

// rest waits for as long as was planned, or is worth it.
func (r *runner) rest(ctx context.Context) error {
	if r.pause <= 0 {
		return ctx.Err()
	}
	r.d.kicks.init()
	network, standing := r.d.kicks.network, r.d.kicks.standing
	if r.fixed >= pauseAsked {
		network = nil
	}
	if r.fixed >= pauseSlot {
		standing = nil
	}
	timer := time.NewTimer(r.pause)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	case <-network:
	case <-standing:
	}
	if left := kickEvery - time.Since(r.kicked); !r.kicked.IsZero() && left > 0 {
		soon := time.NewTimer(left)
		defer soon.Stop()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
			return nil
		case <-soon.C:
		}
	}
	r.kicked = time.Now()
	r.log.Debug("tunnel: the wait is cut short")
	return nil
}
