package mqtt

import (
	"strings"
	"sync"
)

// tree finds the subscribers of a topic.
type tree struct {
	mu   sync.RWMutex
	root treeNode
}

type treeNode struct {
	next    map[string]*treeNode
	inlines []*inline
	subs    map[*session]*clientSub
	shared  map[string]*shareGroup
}

// shareGroup is those who share what a filter matches: each message goes to one.
type shareGroup struct {
	members []*target
	turn    int // guarded by mu
	mu      sync.Mutex
}

// target is a session that a message goes to, and how.
type target struct {
	session *session
	qos     byte
	asKept  bool  // RETAIN as it was published [MQTT-3.3.1-13]
	noLocal bool  // not to who published it [MQTT-3.8.3-3]
	ids     []int // subscription identifiers
}

// clientSub is a subscription of a session.
type clientSub struct {
	filter  string // without $share/group/
	group   string // of a shared one
	qos     byte
	id      int
	noLocal bool
	asKept  bool
}

func (s *clientSub) target(of *session) *target {
	t := &target{session: of, qos: s.qos, asKept: s.asKept, noLocal: s.noLocal}
	if s.id > 0 {
		t.ids = []int{s.id}
	}
	return t
}

func (t *tree) subscribe(s *session, sub *clientSub) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.reachLocked(sub.filter)
	if sub.group == "" {
		if n.subs == nil {
			n.subs = map[*session]*clientSub{}
		}
		n.subs[s] = sub
		return
	}
	g := n.shared[sub.group]
	if g == nil {
		if n.shared == nil {
			n.shared = map[string]*shareGroup{}
		}
		g = &shareGroup{}
		n.shared[sub.group] = g
	}
	g.remove(s)
	g.members = append(g.members, sub.target(s))
}

func (g *shareGroup) remove(s *session) {
	for i, m := range g.members {
		if m.session == s {
			g.members = append(g.members[:i:i], g.members[i+1:]...)
			return
		}
	}
}

func (t *tree) unsubscribe(s *session, sub *clientSub) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.seekLocked(sub.filter)
	if n == nil {
		return
	}
	if sub.group == "" {
		delete(n.subs, s)
	} else if g := n.shared[sub.group]; g != nil {
		if g.remove(s); len(g.members) == 0 {
			delete(n.shared, sub.group)
		}
	}
	t.root.trim(sub.filter, true)
}

func (t *tree) subscribeInline(in *inline) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.reachLocked(in.filter)
	n.inlines = append(n.inlines, in)
}

func (t *tree) unsubscribeInline(in *inline) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.seekLocked(in.filter)
	if n == nil {
		return
	}
	for i, each := range n.inlines {
		if each == in {
			n.inlines = append(n.inlines[:i:i], n.inlines[i+1:]...)
			break
		}
	}
	t.root.trim(in.filter, true)
}

func (t *tree) reachLocked(filter string) *treeNode {
	n := &t.root
	for level := range strings.SplitSeq(filter, "/") {
		if n.next == nil {
			n.next = map[string]*treeNode{}
		}
		if n.next[level] == nil {
			n.next[strings.Clone(level)] = &treeNode{}
		}
		n = n.next[level]
	}
	return n
}

func (t *tree) seekLocked(filter string) *treeNode {
	n := &t.root
	for level := range strings.SplitSeq(filter, "/") {
		if n = n.next[level]; n == nil {
			return nil
		}
	}
	return n
}

func (n *treeNode) trim(filter string, more bool) {
	if !more {
		return
	}
	level, rest, more := strings.Cut(filter, "/")
	below := n.next[level]
	if below == nil {
		return
	}
	below.trim(rest, more)
	if len(below.next)+len(below.inlines)+len(below.subs)+len(below.shared) == 0 {
		delete(n.next, level)
	}
}

// match gives who is subscribed to topic: each session once, with the most of
// what its subscriptions ask for, and one of each shared group.
func (t *tree) match(topic, from string) (inlines []*inline, targets []*target) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	var nodes []*treeNode
	t.root.match(topic, true, true, &nodes)
	plain := 0 // nodes that have plain subscribers
	for _, n := range nodes {
		inlines = append(inlines, n.inlines...)
		if len(n.subs) > 0 {
			plain++
		}
	}
	var merged map[*session]*target
	if plain > 1 {
		merged = map[*session]*target{}
	}
	for _, n := range nodes {
		for s, sub := range n.subs {
			if sub.noLocal && s.id == from {
				continue
			}
			to := sub.target(s)
			if merged != nil {
				if had := merged[s]; had != nil {
					had.qos = max(had.qos, to.qos)
					had.asKept = had.asKept || to.asKept
					had.ids = append(had.ids, to.ids...)
					continue
				}
				merged[s] = to
			}
			targets = append(targets, to)
		}
		for _, g := range n.shared {
			if to := g.pick(); to != nil {
				targets = append(targets, to)
			}
		}
	}
	return inlines, targets
}

// pick takes turns, and passes over those who are away while another is there.
func (g *shareGroup) pick() *target {
	g.mu.Lock()
	defer g.mu.Unlock()
	for range g.members {
		g.turn = (g.turn + 1) % len(g.members)
		if m := g.members[g.turn]; m.session.present() {
			return m
		}
	}
	if len(g.members) == 0 {
		return nil
	}
	return g.members[g.turn%len(g.members)]
}

func (n *treeNode) match(topic string, more, top bool, found *[]*treeNode) {
	level, rest, below := "", "", false
	if more {
		level, rest, below = strings.Cut(topic, "/")
	}
	wild := !top || !strings.HasPrefix(topic, "$") // [MQTT-4.7.2-1]
	if hash := n.next["#"]; hash != nil && wild {
		*found = append(*found, hash)
	}
	if !more {
		*found = append(*found, n)
		return
	}
	if next := n.next[level]; next != nil {
		next.match(rest, below, false, found)
	}
	if plus := n.next["+"]; plus != nil && wild {
		plus.match(rest, below, false, found)
	}
}
