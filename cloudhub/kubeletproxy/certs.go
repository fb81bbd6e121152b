package kubeletproxy

import (
	"container/list"
	"crypto/tls"
	"net/netip"
	"sync"
	"time"
)

// maxCerts bounds the cache; issuing another costs less than a millisecond.
const maxCerts = 4096

// certCache keeps the serving certificates last used.
type certCache struct {
	issue func(netip.Addr) (*tls.Certificate, error)

	mu    sync.Mutex
	order *list.List // of *cachedCert, last used in front
	byIP  map[netip.Addr]*list.Element
}

type cachedCert struct {
	ip    netip.Addr
	cert  *tls.Certificate
	renew time.Time
}

func newCertCache(issue func(netip.Addr) (*tls.Certificate, error)) *certCache {
	return &certCache{issue: issue, order: list.New(), byIP: make(map[netip.Addr]*list.Element)}
}

// get returns a certificate for ip that has at least half of its life left.
// Issuing is done under the lock: it takes no I/O, and a burst of dials to one
// node wants one certificate.
func (c *certCache) get(ip netip.Addr) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, ok := c.byIP[ip]; ok {
		if entry := e.Value.(*cachedCert); time.Now().Before(entry.renew) {
			c.order.MoveToFront(e)
			return entry.cert, nil
		}
		c.removeLocked(e)
	}
	cert, err := c.issue(ip)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	entry := &cachedCert{ip: ip, cert: cert, renew: now.Add(cert.Leaf.NotAfter.Sub(now) / 2)}
	c.byIP[ip] = c.order.PushFront(entry)
	if c.order.Len() > maxCerts {
		c.removeLocked(c.order.Back())
	}
	return cert, nil
}

func (c *certCache) removeLocked(e *list.Element) {
	c.order.Remove(e)
	delete(c.byIP, e.Value.(*cachedCert).ip)
}
