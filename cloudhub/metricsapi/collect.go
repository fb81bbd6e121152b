package metricsapi

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	statsv1alpha1 "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
)

// retryAfter is how long a node that failed to answer is not asked again, so
// that a client in a loop cannot hold a question open to it all the time.
const retryAfter = 3 * time.Second

// collector asks nodes for their summaries, each one once at a time and not
// more often than its cache allows.
type collector struct {
	cfg  Config
	stop context.Context // set by Install; questions end with it
	slot chan struct{}   // one token per question under way

	mu     sync.Mutex
	byNode map[string]*answer
	pruned time.Time
}

// answer is a node's last summary, or the question under way. All but done
// are written before done is closed and read after.
type answer struct {
	done    chan struct{}
	summary *statsv1alpha1.Summary
	err     error
	until   time.Time // when to ask again
}

func newCollector(cfg Config) *collector {
	return &collector{
		cfg:    cfg,
		stop:   context.Background(),
		slot:   make(chan struct{}, cfg.MaxConcurrent),
		byNode: make(map[string]*answer),
	}
}

// all asks every node that can be asked; those that fail are left out.
func (c *collector) all(ctx context.Context) map[string]*statsv1alpha1.Summary {
	nodes := c.cfg.Source.Nodes()
	out := make(map[string]*statsv1alpha1.Summary, len(nodes))
	var mu sync.Mutex
	var g errgroup.Group
	g.SetLimit(c.cfg.MaxConcurrent)
	for _, node := range nodes {
		g.Go(func() error {
			s, err := c.one(ctx, node)
			if err != nil {
				c.cfg.Log.Debug("node left out of metrics", "node", node, "err", err)
				return nil
			}
			mu.Lock()
			out[node] = s
			mu.Unlock()
			return nil
		})
	}
	g.Wait() //nolint:errcheck // the functions return none
	return out
}

// connected asks one node if it can be asked at all.
func (c *collector) connected(ctx context.Context, node string) (*statsv1alpha1.Summary, error) {
	if !slices.Contains(c.cfg.Source.Nodes(), node) {
		return nil, fmt.Errorf("node %s is not connected", node)
	}
	return c.one(ctx, node)
}

func (c *collector) one(ctx context.Context, node string) (*statsv1alpha1.Summary, error) {
	for {
		a, mine := c.claim(node)
		if mine {
			c.ask(ctx, node, a)
			return a.summary, a.err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-a.done:
		}
		// Whoever asked may have been called off; then it is our turn.
		if a.err != nil && a.until.IsZero() {
			continue
		}
		return a.summary, a.err
	}
}

// claim returns the answer to wait for, or a new one that the caller must
// complete.
func (c *collector) claim(node string) (a *answer, mine bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	c.pruneLocked(now)
	if a, ok := c.byNode[node]; ok && !a.staleAt(now) {
		return a, false
	}
	a = &answer{done: make(chan struct{})}
	c.byNode[node] = a
	return a, true
}

// staleAt says whether a is answered and of no more use.
func (a *answer) staleAt(now time.Time) bool {
	select {
	case <-a.done:
		return !now.Before(a.until)
	default:
		return false
	}
}

// pruneLocked forgets answers of no more use, so that the cache holds no more
// than the nodes asked for lately.
func (c *collector) pruneLocked(now time.Time) {
	if now.Sub(c.pruned) < c.cfg.CacheFor {
		return
	}
	c.pruned = now
	for node, a := range c.byNode {
		if a.staleAt(now) {
			delete(c.byNode, node)
		}
	}
}

func (c *collector) ask(ctx context.Context, node string, a *answer) {
	defer close(a.done)
	select {
	case c.slot <- struct{}{}:
		defer func() { <-c.slot }()
	case <-ctx.Done():
		a.err = ctx.Err()
		return
	}
	askCtx, cancel := context.WithTimeout(ctx, c.cfg.Timeout)
	defer cancel()
	defer context.AfterFunc(c.stop, cancel)()
	a.summary, a.err = c.cfg.Source.Summary(askCtx, node)
	switch {
	case a.err == nil && a.summary == nil:
		a.err = fmt.Errorf("node %s answered without a summary", node)
		a.until = time.Now().Add(retryAfter)
	case a.err == nil:
		a.until = time.Now().Add(c.cfg.CacheFor)
	case ctx.Err() != nil:
		// The one who asked has gone; that says nothing about the node.
	default:
		a.until = time.Now().Add(retryAfter)
	}
}
