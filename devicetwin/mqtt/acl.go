package mqtt

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
)

// ACL says who may do what.
//
// It is asked with the topic of each message, as it is published and again as
// it is about to be delivered; and with the filter of a subscription where that
// has no wildcard. A subscription with wildcards is accepted, and what comes
// over it is what its owner may read.
type ACL interface {
	May(p Principal, topic string, write bool) bool
}

// ReservedTopics are the node's own API: its ACL is the Reserved of ACLConfig.
const ReservedTopics = "skerry/v1"

// ACLConfig is what an ACLTable is made from.
type ACLConfig struct {
	// Local lets anonymous clients on loopback use all topics but the reserved.
	Local bool
	// Reserved judges topics below skerry/v1/; nil refuses them to everyone.
	Reserved func(p Principal, topic string, write bool) bool
}

// Grants are the filters of topics that a principal may use.
type Grants struct{ Publish, Subscribe []string }

// ACLTable is the ACL of a node: what the mappings of its devices need, and no
// more. What nothing grants is refused.
type ACLTable struct {
	cfg    ACLConfig
	grants atomic.Pointer[map[string]*grant]
}

type grant struct{ publish, subscribe filterSet }

// NewACLTable grants nothing yet.
func NewACLTable(cfg ACLConfig) *ACLTable {
	t := &ACLTable{cfg: cfg}
	t.grants.Store(&map[string]*grant{})
	return t
}

// Set replaces what is granted, by the names of principals. Filters that are
// none are left out and told in the error; the rest holds.
func (t *ACLTable) Set(grants map[string]Grants) error {
	var errs []error
	compile := func(name string, filters []string) filterSet {
		var set filterSet
		for _, f := range filters {
			if err := CheckFilter(f); err != nil {
				errs = append(errs, fmt.Errorf("acl of %q: %w", name, err))
				continue
			}
			set.add(f)
		}
		return set
	}
	compiled := make(map[string]*grant, len(grants))
	for name, g := range grants {
		compiled[name] = &grant{publish: compile(name, g.Publish), subscribe: compile(name, g.Subscribe)}
	}
	t.grants.Store(&compiled)
	return errors.Join(errs...)
}

func (t *ACLTable) May(p Principal, topic string, write bool) bool {
	if topic == ReservedTopics || strings.HasPrefix(topic, ReservedTopics+"/") {
		return t.cfg.Reserved != nil && t.cfg.Reserved(p, topic, write)
	}
	if write && strings.HasPrefix(topic, "$SYS") {
		return false
	}
	if p.Kind == PrincipalLocal {
		return t.cfg.Local
	}
	g := (*t.grants.Load())[p.Name]
	if g == nil || p.Name == "" {
		return false
	}
	if write {
		return g.publish.match(topic)
	}
	return g.subscribe.match(topic)
}

// filterSet is a set of filters, by levels.
type filterSet struct {
	next map[string]*filterSet
	end  bool // a filter ends here
	rest bool // one ends here with #
}

func (s *filterSet) add(filter string) {
	for level := range strings.SplitSeq(filter, "/") {
		if level == "#" {
			s.rest = true
			return
		}
		if s.next == nil {
			s.next = map[string]*filterSet{}
		}
		if s.next[level] == nil {
			s.next[level] = &filterSet{}
		}
		s = s.next[level]
	}
	s.end = true
}

func (s *filterSet) match(topic string) bool {
	if strings.HasPrefix(topic, "$") {
		level, _, _ := strings.Cut(topic, "/")
		if s.next[level] == nil {
			return false // [MQTT-4.7.2-1]
		}
		named := &filterSet{next: map[string]*filterSet{level: s.next[level]}}
		return named.matchBelow(topic, true)
	}
	return s.matchBelow(topic, true)
}

func (s *filterSet) matchBelow(topic string, more bool) bool {
	if s.rest {
		return true
	}
	if !more {
		return s.end
	}
	level, rest, more := strings.Cut(topic, "/")
	if n := s.next[level]; n != nil && n.matchBelow(rest, more) {
		return true
	}
	n := s.next["+"]
	return n != nil && n.matchBelow(rest, more)
}
