package telemetry

import "strings"

// tree finds what was put under the MQTT filters that match a topic, in time
// that depends on the topic's levels and not on how many filters there are.
type tree[T any] struct{ root node[T] }

type node[T any] struct {
	down map[string]*node[T]
	here []T // filters that end here
	all  []T // filters that end in #
}

func (t *tree[T]) add(filter string, v T) {
	if rest, ok := strings.CutPrefix(filter, "$share/"); ok {
		_, filter, _ = strings.Cut(rest, "/")
	}
	n := &t.root
	for level := range strings.SplitSeq(filter, "/") {
		if level == "#" {
			n.all = append(n.all, v)
			return
		}
		if n.down == nil {
			n.down = map[string]*node[T]{}
		}
		next := n.down[level]
		if next == nil {
			next = &node[T]{}
			n.down[level] = next
		}
		n = next
	}
	n.here = append(n.here, v)
}

// match calls fn with each value whose filter matches, perhaps more than once.
func (t *tree[T]) match(topic string, fn func(T)) {
	t.root.match(topic, true, fn)
}

func (n *node[T]) match(rest string, first bool, fn func(T)) {
	// Topics that begin with $ are for filters that do [MQTT-4.7.2-1].
	wild := !first || !strings.HasPrefix(rest, "$")
	if wild {
		for _, v := range n.all {
			fn(v)
		}
	}
	level, below, more := strings.Cut(rest, "/")
	for _, key := range []string{level, "+"} {
		next := n.down[key]
		if next == nil || key == "+" && !wild {
			continue
		}
		if more {
			next.match(below, false, fn)
			continue
		}
		for _, v := range next.here {
			fn(v)
		}
		for _, v := range next.all { // a/# matches a
			fn(v)
		}
	}
}
