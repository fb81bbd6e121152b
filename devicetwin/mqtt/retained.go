package mqtt

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"
)

// RetainedBucket is where retained messages are kept in a RetainedDB.
const RetainedBucket = "retained"

// RetainedDB keeps retained messages over a restart; twindb.DB is one. Dirty
// does not block: what it was told is written with the next batch, so that a
// power cut loses the last seconds' changes and a clean stop none.
type RetainedDB interface {
	Load(bucket string, fn func(key string, value []byte) error) error
	Dirty(bucket, key string, encode func() []byte)
}

// errRetainedFull says that a message cannot be kept for later subscribers.
var errRetainedFull = errors.New("no room for more retained messages")

// retainedCost is what a message costs beside its topic and payload.
const retainedCost = 256

// retainedStore holds the last retained message of each topic: the broker's
// own never expire unless their sender said so.
type retainedStore struct {
	db       RetainedDB // nil: RAM alone
	messages int        // limits
	bytes    int

	mu    sync.RWMutex
	root  retainedNode
	count int
	size  int
	timed int // of count, those that expire
}

type retainedNode struct {
	next map[string]*retainedNode
	m    *stored
}

// load takes in what the DB has. A record that cannot be decoded, or for which
// there is no room, is removed and counted.
func (r *retainedStore) load(now time.Time) (lost int, err error) {
	if r.db == nil {
		return 0, nil
	}
	var remove []string
	err = r.db.Load(RetainedBucket, func(key string, value []byte) error {
		m, err := decodeRetained(key, value)
		if err == nil && m.expired(now) {
			remove = append(remove, key)
			return nil
		}
		if err == nil {
			_, err = r.put(m)
		}
		if err != nil {
			remove = append(remove, key)
			lost++
		}
		return nil
	})
	for _, key := range remove {
		r.db.Dirty(RetainedBucket, key, func() []byte { return nil })
	}
	return lost, err
}

// keep remembers m, or forgets what its topic had where m has no payload
// [MQTT-3.3.1-10]. What goes to the DB is what is kept when it asks.
func (r *retainedStore) keep(m *stored) error {
	if len(m.Payload) == 0 {
		if old := r.drop(m.Topic, nil); old != nil {
			r.dirty(old, nil)
		}
		return nil
	}
	old, err := r.put(m)
	if err == nil {
		r.dirty(old, m)
	}
	return err
}

// lasting says whether m is for the DB: what this node itself says it says
// again after a restart, and often.
func (m *stored) lasting() bool { return m != nil && m.From != "" }

// dirty tells the DB of a change.
func (r *retainedStore) dirty(old, m *stored) {
	if r.db == nil || !old.lasting() && !m.lasting() {
		return
	}
	topic := cmp.Or(m, old).Topic
	r.db.Dirty(RetainedBucket, topic, func() []byte {
		if m := r.get(topic); m.lasting() {
			return encodeRetained(m)
		}
		return nil
	})
}

// put gives what was there.
func (r *retainedStore) put(m *stored) (was *stored, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	cost := retainedSize(m)
	count, size := r.count+1, r.size+cost
	if old := r.seekLocked(m.Topic); old != nil && old.m != nil {
		was = old.m
		count, size = r.count, size-retainedSize(was)
	}
	// A topic that is there may always shrink.
	if count > r.messages && was == nil || size > r.bytes && size > r.size {
		return nil, errRetainedFull
	}
	r.setLocked(m)
	r.count, r.size = count, size
	r.timed += m.timed() - was.timed()
	return was, nil
}

func retainedSize(m *stored) int {
	n := retainedCost + 2*len(m.Topic) + len(m.Payload) + len(m.Response) + len(m.Correlation) + len(m.ContentType)
	for _, u := range m.User {
		n += len(u.Key) + len(u.Value) + 32
	}
	return n
}

func (r *retainedStore) setLocked(m *stored) {
	n := &r.root
	for level := range strings.SplitSeq(m.Topic, "/") {
		if n.next == nil {
			n.next = map[string]*retainedNode{}
		}
		if n.next[level] == nil {
			n.next[strings.Clone(level)] = &retainedNode{}
		}
		n = n.next[level]
	}
	n.m = m
}

func (r *retainedStore) seekLocked(topic string) *retainedNode {
	n := &r.root
	for level := range strings.SplitSeq(topic, "/") {
		if n = n.next[level]; n == nil {
			return nil
		}
	}
	return n
}

// get is what topic has; nil: nothing.
func (r *retainedStore) get(topic string) *stored {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if n := r.seekLocked(topic); n != nil {
		return n.m
	}
	return nil
}

// drop forgets what topic has, where only is not nil only if it is that. It
// gives what was there.
func (r *retainedStore) drop(topic string, only *stored) *stored {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.seekLocked(topic)
	if n == nil || n.m == nil || only != nil && n.m != only {
		return nil
	}
	was := n.m
	r.count--
	r.size -= retainedSize(was)
	r.timed -= was.timed()
	n.m = nil
	r.root.trim(topic, true)
	return was
}

// trim takes away the nodes of topic that hold nothing any more.
func (n *retainedNode) trim(topic string, more bool) {
	if !more {
		return
	}
	level, rest, more := strings.Cut(topic, "/")
	below := n.next[level]
	below.trim(rest, more)
	if below.m == nil && len(below.next) == 0 {
		delete(n.next, level)
	}
}

// match gives what is kept for filter; those of one moment.
func (r *retainedStore) match(filter string) (found []*stored) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	r.root.match(filter, true, true, &found)
	return found
}

func (n *retainedNode) match(filter string, more, top bool, found *[]*stored) {
	if !more {
		if n.m != nil {
			*found = append(*found, n.m)
		}
		return
	}
	level, rest, more := strings.Cut(filter, "/")
	switch level {
	case "#":
		n.all(top, found)
	case "+":
		for key, below := range n.next {
			if !top || !strings.HasPrefix(key, "$") {
				below.matchRest(rest, more, found)
			}
		}
	default:
		if below := n.next[level]; below != nil {
			below.matchRest(rest, more, found)
		}
	}
}

func (n *retainedNode) matchRest(rest string, more bool, found *[]*stored) {
	if more && rest == "#" { // a/# is for a too [MQTT-4.7.1-2]
		n.all(false, found)
		return
	}
	n.match(rest, more, false, found)
}

func (n *retainedNode) all(top bool, found *[]*stored) {
	if n.m != nil {
		*found = append(*found, n.m)
	}
	for key, below := range n.next {
		if !top || !strings.HasPrefix(key, "$") { // [MQTT-4.7.2-1]
			below.all(false, found)
		}
	}
}

// timed is 1 for a message that expires.
func (m *stored) timed() int {
	if m == nil || m.expires.IsZero() {
		return 0
	}
	return 1
}

// expire forgets what its sender wanted forgotten by now [MQTT-3.3.2-5].
func (r *retainedStore) expire(now time.Time) {
	var all []*stored
	r.mu.RLock()
	if r.timed > 0 {
		r.root.all(false, &all)
	}
	r.mu.RUnlock()
	for _, m := range all {
		if m.expired(now) && r.drop(m.Topic, m) != nil {
			r.dirty(m, nil)
		}
	}
}

func (r *retainedStore) usage() (count, size int) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.count, r.size
}

// A record is: version 1, QoS, flags, Unix nanoseconds of receipt and of expiry
// (0: none), then the payload, sender, response topic, correlation data,
// content type and the user properties, each after its length. Its key is the
// topic.
const retainedVersion = 1

func encodeRetained(m *stored) []byte {
	b := []byte{retainedVersion, m.QoS, m.format}
	b = binary.BigEndian.AppendUint64(b, uint64(m.Received.UnixNano()))
	var expires uint64
	if !m.expires.IsZero() {
		expires = uint64(m.expires.UnixNano())
	}
	b = binary.BigEndian.AppendUint64(b, expires)
	b = appendField(b, m.Payload)
	b = appendField(b, m.From)
	b = appendField(b, m.Response)
	b = appendField(b, m.Correlation)
	b = appendField(b, m.ContentType)
	for _, u := range m.User {
		b = appendField(b, u.Key)
		b = appendField(b, u.Value)
	}
	return b
}

func appendField[T string | []byte](b []byte, field T) []byte {
	b = binary.AppendUvarint(b, uint64(len(field)))
	return append(b, field...)
}

func decodeRetained(topic string, b []byte) (*stored, error) {
	if err := CheckTopic(topic); err != nil {
		return nil, fmt.Errorf("a retained record: %w", err)
	}
	if len(b) < 19 || b[0] != retainedVersion || b[1] > 2 || b[2] > formatText {
		return nil, fmt.Errorf("the retained record of %q is not one of version %d", topic, retainedVersion)
	}
	m := &stored{Message: Message{Topic: topic, QoS: b[1], Retain: true}, format: b[2]}
	m.Received = time.Unix(0, int64(binary.BigEndian.Uint64(b[3:])))
	if expires := binary.BigEndian.Uint64(b[11:]); expires != 0 {
		m.expires = time.Unix(0, int64(expires))
	}
	b = b[19:]
	field := func() (out []byte, err error) {
		n, used := binary.Uvarint(b)
		if used <= 0 || n > uint64(len(b)-used) {
			return nil, fmt.Errorf("the retained record of %q ends early", topic)
		}
		out, b = b[used:used+int(n)], b[used+int(n):]
		return out, nil
	}
	var fields [5][]byte
	for i := range fields {
		f, err := field()
		if err != nil {
			return nil, err
		}
		fields[i] = f
	}
	// The DB's memory is not ours.
	m.Payload = append([]byte(nil), fields[0]...)
	m.From, m.Response, m.ContentType = string(fields[1]), string(fields[2]), string(fields[4])
	if len(fields[3]) > 0 {
		m.Correlation = append([]byte(nil), fields[3]...)
	}
	for len(b) > 0 {
		key, err := field()
		if err != nil {
			return nil, err
		}
		value, err := field()
		if err != nil {
			return nil, err
		}
		m.User = append(m.User, UserProperty{string(key), string(value)})
	}
	if len(m.Payload) == 0 {
		return nil, fmt.Errorf("the retained record of %q has no payload", topic)
	}
	return m, nil
}
