package enroll

import (
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// maxLimiters bounds how many callers are remembered at once.
const maxLimiters = 4096

// limiters is a bounded set of token buckets by name.
type limiters struct {
	limit rate.Limit
	burst int

	mu     sync.Mutex
	byName map[string]*rate.Limiter
	sweep  time.Time // when the set may be searched for full buckets again
	// overflow serves everybody who is not remembered when the set is full of
	// callers whose buckets are not: a flood from many addresses shares one.
	overflow *rate.Limiter
}

func newLimiters(limit rate.Limit, burst int) *limiters {
	return &limiters{limit: limit, burst: burst, byName: map[string]*rate.Limiter{}, overflow: rate.NewLimiter(limit, burst)}
}

func (l *limiters) allow(name string, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	bucket, ok := l.byName[name]
	if !ok {
		if len(l.byName) >= maxLimiters && !now.Before(l.sweep) {
			// Not at every request: a flood must not cost a search each.
			l.dropFullLocked(now)
			l.sweep = now.Add(time.Second)
		}
		if len(l.byName) >= maxLimiters {
			return l.overflow.AllowN(now, 1)
		}
		bucket = rate.NewLimiter(l.limit, l.burst)
		l.byName[name] = bucket
	}
	return bucket.AllowN(now, 1)
}

// dropFullLocked forgets callers whose bucket is full again: a new bucket is
// the same.
func (l *limiters) dropFullLocked(now time.Time) {
	for name, bucket := range l.byName {
		if bucket.TokensAt(now) >= float64(l.burst) {
			delete(l.byName, name)
		}
	}
}

// addressLimiter limits join requests by the address they come from.
type addressLimiter struct{ *limiters }

func newAddressLimiter(perSecond float64, burst int) *addressLimiter {
	return &addressLimiter{newLimiters(rate.Limit(perSecond), burst)}
}

func (l *addressLimiter) allow(remote string, now time.Time) bool {
	return l.limiters.allow(addressKey(remote), now)
}

// addressKey is the caller's address; of IPv6 the /64, as one host has all of
// it.
func addressKey(remote string) string {
	ap, err := netip.ParseAddrPort(remote)
	if err != nil {
		return remote
	}
	ip := ap.Addr().Unmap().WithZone("")
	if ip.Is6() {
		if p, err := ip.Prefix(64); err == nil {
			return p.String()
		}
	}
	return ip.String()
}

// newNodeLimiter limits a node's renewals: a handful at once, then one each
// ten seconds.
func newNodeLimiter() *limiters { return newLimiters(rate.Every(10*time.Second), 5) }
