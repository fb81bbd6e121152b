package mqtt

import (
	"errors"
	"fmt"
	"strings"
	"time"

	mochi "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"
)

// hook is where mochi hands over. Its methods run on the reading goroutine of
// the connection they are about.
type hook struct {
	mochi.HookBase
	b *Embedded
}

func (h *hook) ID() string { return "skerry" }

func (h *hook) Provides(method byte) bool {
	switch method {
	case mochi.OnConnect, mochi.OnConnectAuthenticate, mochi.OnSessionEstablished, mochi.OnPacketRead, mochi.OnPacketEncode:
		return true
	}
	return false
}

// OnConnectAuthenticate: OnConnect has already judged.
func (h *hook) OnConnectAuthenticate(*mochi.Client, packets.Packet) bool { return true }

// OnConnect lets a client in, or answers why not.
func (h *hook) OnConnect(cl *mochi.Client, pk packets.Packet) error {
	c := cl.Net.Conn.(*conn)
	c.cl, c.id, c.version = cl, cl.ID, pk.ProtocolVersion
	// Two connections of one client never meet in mochi's tables: the cleanup
	// of the first would take the second's away.
	cl.ID = fmt.Sprintf("%s\x00%d", c.id, c.no)
	if err := h.b.admit(c, pk); err != nil {
		code := packets.ErrServerUnavailable
		errors.As(err, &code)
		if _, known := packets.V5CodesToV3[code]; known || c.version == 5 {
			h.b.mochi.SendConnack(cl, code, false, nil)
		}
		return code
	}
	return nil
}

// admit authenticates c and gives it its session.
func (b *Embedded) admit(c *conn, pk packets.Packet) error {
	if pk.Properties.AuthenticationMethod != "" {
		return packets.ErrBadAuthenticationMethod // [MQTT-4.12.0-1]
	}
	cr := Credentials{ClientID: c.id, User: string(pk.Connect.Username), Password: pk.Connect.Password,
		Certificate: c.certificate, Remote: c.RemoteAddr().String(), Loopback: c.loopback, Listener: c.listener.Addr().String()}
	p, err := b.auth.Authenticate(c.ctx, cr)
	if err != nil {
		b.stats.authFailed.Add(1)
		b.slow.Warn("an MQTT client was refused", "client", c.id, "user", cr.User, "remote", cr.Remote, "error", err)
		// Guessing is slow. The room that this still takes bounds it too.
		select {
		case <-time.After(200 * time.Millisecond):
		case <-c.ctx.Done():
		case <-b.closing:
		}
		return packets.ErrBadUsernameOrPassword
	}
	c.principal = p
	if c.will != nil {
		if b.checkTopic(c.will.Topic) != nil {
			return packets.ErrTopicNameInvalid
		}
		if !b.acl.May(p, c.will.Topic, true) {
			b.stats.denied.Add(1)
			b.slow.Warn("an MQTT client may not publish its will; it has none", "client", c.id, "user", p.Name, "topic", c.will.Topic)
			c.will = nil
		}
	}
	c.window, c.maxPacket = b.limit.Inflight, pk.Properties.MaximumPacketSize
	if n := int(pk.Properties.ReceiveMaximum); n > 0 {
		c.window = min(c.window, n)
	}
	c.expiring = b.sessionExpiry(pk)
	c.expiry = c.expiring
	return b.attach(c, pk.Connect.Clean)
}

// sessionExpiry is for how long a session is kept: MQTT 5 says, 3.1.1 has for
// ever, which nobody can.
func (b *Embedded) sessionExpiry(pk packets.Packet) time.Duration {
	switch {
	case pk.ProtocolVersion == 5:
		return min(time.Duration(pk.Properties.SessionExpiryInterval)*time.Second, b.limit.SessionExpiry)
	case pk.Connect.Clean:
		return 0
	}
	return b.limit.SessionExpiry
}

// attach gives c its session, once an older connection of the same client has
// gone.
func (b *Embedded) attach(c *conn, clean bool) error {
	var will *stored // of a session that this ends
	for {
		b.mu.Lock()
		if b.closed {
			b.mu.Unlock()
			return packets.ErrServerUnavailable
		}
		s := b.sessions[c.id]
		var old *conn
		if s != nil {
			s.mu.Lock()
			old = s.conn
			s.mu.Unlock()
		}
		if old == nil {
			for other := range b.open {
				// One whose session was ended, but which is not gone.
				if other != c && other.session != nil && other.id == c.id {
					old = other
					break
				}
			}
		}
		if old != nil {
			if !old.principal.is(c.principal) {
				b.mu.Unlock()
				b.slow.Warn("an MQTT client asked for the name of another that is connected", "client", c.id, "user", c.principal.Name)
				return packets.ErrClientIdentifierNotValid
			}
			b.mu.Unlock()
			b.stats.takenOver.Add(1)
			old.kick(packets.ErrSessionTakenOver)
			select {
			case <-old.finished:
				continue
			case <-c.ctx.Done():
				return packets.ErrServerUnavailable
			case <-b.closing:
				return packets.ErrServerUnavailable
			}
		}
		if b.connected >= b.limit.Clients {
			b.mu.Unlock()
			b.stats.refused.Add(1)
			b.slow.Warn("an MQTT client was refused: there are as many as are allowed", "client", c.id, "allowed", b.limit.Clients)
			return packets.ErrServerUnavailable
		}
		if s != nil && (clean || !s.owner.Load().is(c.principal)) {
			will = s.takeWill()
			b.endLocked(s)
			s = nil
		}
		c.present = s != nil
		if s == nil {
			s = newSession(b, c)
			b.sessions[c.id] = s
		} else {
			b.stats.resumed.Add(1)
		}
		s.mu.Lock()
		s.attachLocked(c)
		s.mu.Unlock()
		c.session = s
		b.connected++
		b.decidedLocked(c)
		b.mu.Unlock()
		break
	}
	b.sendWill(will)
	if b.cfg.Sessions != nil {
		b.cfg.Sessions(Session{Client: c.id, User: c.principal.Name, Connected: true})
	}
	return nil
}

// OnPacketEncode completes the CONNACK.
func (h *hook) OnPacketEncode(cl *mochi.Client, pk packets.Packet) packets.Packet {
	if pk.FixedHeader.Type != packets.Connack || pk.ReasonCode != 0 {
		return pk
	}
	c := cl.Net.Conn.(*conn)
	pk.SessionPresent = c.present && c.version > 3
	pk.Properties.MaximumPacketSize = uint32(h.b.limit.PacketBytes)
	pk.Properties.TopicAliasMaximum = uint16(h.b.limit.TopicAliases)
	asked := time.Duration(cl.Properties.Props.SessionExpiryInterval) * time.Second
	if c.version == 5 && asked != c.expiring {
		pk.Properties.SessionExpiryInterval = uint32(c.expiring / time.Second)
		pk.Properties.SessionExpiryIntervalFlag = true
	}
	return pk
}

// OnSessionEstablished: CONNACK is out.
func (h *hook) OnSessionEstablished(cl *mochi.Client, _ packets.Packet) {
	c := cl.Net.Conn.(*conn)
	c.started.Store(true)
	go c.write()
}

// nothing is a packet that mochi does nothing for.
var nothing = packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Puback}}

// OnPacketRead does what the packet asks for. An error closes the connection.
func (h *hook) OnPacketRead(cl *mochi.Client, pk packets.Packet) (packets.Packet, error) {
	c := cl.Net.Conn.(*conn)
	if pk.FixedHeader.Type == packets.Connect {
		if c.session == nil {
			return h.b.takeWill(c, pk), nil
		}
		return pk, nil // mochi refuses a second one
	}
	if c.session == nil {
		return pk, nil // nor the first if it is another
	}
	var err error
	if pk.FixedHeader.Type != packets.Publish {
		if err := c.settle(); err != nil {
			return pk, c.drop(err)
		}
	}
	switch pk.FixedHeader.Type {
	case packets.Publish:
		err = h.b.published(c, pk)
	case packets.Puback, packets.Pubcomp:
		c.session.acked(c, pk.PacketID)
	case packets.Pubrec:
		err = c.pubrec(pk)
	case packets.Pubrel:
		reason := byte(0)
		if !c.session.release(pk.PacketID) {
			reason = packets.ErrPacketIdentifierNotFound.Code
		}
		err = c.ack(packetPubcomp, pk.PacketID, reason)
	case packets.Subscribe:
		err = h.b.subscribed(c, pk)
	case packets.Unsubscribe:
		err = h.b.unsubscribed(c, pk)
	case packets.Disconnect:
		return c.disconnecting(pk)
	default: // mochi answers, after what was answered before
		if err = c.flush(); err == nil {
			return pk, nil
		}
	}
	if err != nil {
		return pk, c.drop(err)
	}
	return nothing, nil
}

// drop closes the connection, telling why; mochi goes on to end it.
func (c *conn) drop(why error) error {
	var code packets.Code
	if !errors.As(why, &code) {
		code = packets.ErrUnspecifiedError
	}
	c.flush()
	c.kick(code)
	c.b.log.Debug("an MQTT connection is closed", "client", c.id, "reason", why)
	return packets.ErrRejectPacket
}

// takeWill keeps the will for finish; mochi has none, so sends none.
func (b *Embedded) takeWill(c *conn, pk packets.Packet) packets.Packet {
	cp := &pk.Connect
	if !cp.WillFlag {
		return pk
	}
	w := newStored(cp.WillTopic, cp.WillPayload, cp.WillQos, cp.WillRetain, cp.WillProperties)
	w.From = cp.ClientIdentifier
	c.will, c.willDelay = w, time.Duration(cp.WillProperties.WillDelayInterval)*time.Second
	if w.QoS > 2 {
		return pk // mochi refuses it
	}
	cp.WillFlag, cp.WillRetain, cp.WillQos, cp.WillTopic, cp.WillPayload = false, false, 0, "", nil
	return pk
}

func newStored(topic string, payload []byte, qos byte, retain bool, p packets.Properties) *stored {
	m := &stored{Message: Message{Topic: topic, Payload: payload, QoS: qos, Retain: retain, Received: time.Now(),
		Expiry:   time.Duration(p.MessageExpiryInterval) * time.Second,
		Response: p.ResponseTopic, Correlation: p.CorrelationData, ContentType: p.ContentType}}
	for _, u := range p.User {
		m.User = append(m.User, UserProperty{u.Key, u.Val})
	}
	if p.PayloadFormatFlag {
		m.format = formatBytes + min(p.PayloadFormat, 1)
	}
	if m.Expiry > 0 {
		m.expires = m.Received.Add(m.Expiry)
	}
	return m
}

// published takes a PUBLISH and answers it.
func (b *Embedded) published(c *conn, pk packets.Packet) error {
	if code := pk.PublishValidate(uint16(b.limit.TopicAliases)); code != packets.CodeSuccess {
		return code
	}
	topic, err := c.resolve(pk)
	if err != nil {
		return err
	}
	qos := pk.FixedHeader.Qos
	if qos == 2 {
		if c.session.has(pk.PacketID) { // sent again
			return c.ack(packetPubrec, pk.PacketID, 0)
		}
		if c.session.taken() >= b.limit.Inflight {
			return packets.ErrReceiveMaximum
		}
	}
	b.stats.received.Add(1)
	a := unanswered{m: newStored(topic, pk.Payload, qos, pk.FixedHeader.Retain, pk.Properties), id: pk.PacketID}
	a.m.From, a.m.Dup = c.id, pk.FixedHeader.Dup
	switch {
	case b.checkSize(topic) != nil:
		a.reason = packets.ErrTopicNameInvalid.Code
		b.stats.denied.Add(1)
		b.slow.Warn("a topic is too long or too deep; what is published to it is dropped", "client", c.id, "bytes", len(topic))
	case !b.acl.May(c.principal, topic, true):
		a.reason = packets.ErrNotAuthorized.Code
		b.stats.denied.Add(1)
		b.slow.Warn("an MQTT client may not publish what it did; it is dropped", "client", c.id, "user", c.principal.Name, "topic", topic)
	}
	c.arrived = append(c.arrived, a)
	if b.cfg.CaptureAll == nil || qos == 2 || len(c.arrived) >= maxArrived {
		return c.settle()
	}
	return nil
}

// unanswered is a PUBLISH that is not yet answered.
type unanswered struct {
	m      *stored
	id     uint16
	reason byte // of its refusal
}

// maxArrived bounds what is captured at a time; a buffer of small messages has
// about as many.
const maxArrived = 64

// settle captures what has arrived, takes it, and answers, in its order
// [MQTT-4.6.0-2].
func (c *conn) settle() error {
	if len(c.arrived) == 0 {
		return nil
	}
	err := c.b.capture(c.arrived)
	singly := err != nil && c.b.cfg.CaptureAll != nil && c.b.cfg.Capture != nil
	for _, a := range c.arrived {
		if singly && a.reason == 0 {
			err = c.b.cfg.Capture(a.m.Message)
		}
		if err != nil && a.reason == 0 {
			c.b.stats.captureFailed.Add(1)
		}
		if err := c.answer(a, err); err != nil {
			c.arrived = nil // the connection ends without an answer to them
			return err
		}
	}
	clear(c.arrived)
	c.arrived = c.arrived[:0]
	return nil
}

// capture captures those that were not refused.
func (b *Embedded) capture(arrived []unanswered) error {
	if b.cfg.Capture == nil && b.cfg.CaptureAll == nil {
		return nil
	}
	ms := make([]Message, 0, len(arrived))
	for _, a := range arrived {
		if a.reason == 0 {
			ms = append(ms, a.m.Message)
		}
	}
	var err error
	switch {
	case len(ms) == 0:
	case b.cfg.CaptureAll != nil:
		err = b.cfg.CaptureAll(ms)
	default:
		err = b.cfg.Capture(ms[0]) // settle is called for each
	}
	if err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	return nil
}

// answer takes a message, unless it was refused or could not be captured, and
// acknowledges it.
func (c *conn) answer(a unanswered, err error) error {
	b, qos := c.b, a.m.QoS
	if a.reason == 0 {
		if err == nil {
			err = b.take(c, a.m)
		}
		if errors.Is(err, errRetainedFull) {
			err, a.reason = nil, packets.ErrQuotaExceeded.Code
		}
		if err != nil {
			b.slow.Warn("a message was refused, so it is not acknowledged", "client", c.id, "topic", a.m.Topic, "error", err)
			if qos > 0 && c.version < 5 {
				return packets.ErrQuotaExceeded
			}
			a.reason = packets.ErrQuotaExceeded.Code
		}
	}
	switch qos {
	case 1:
		return c.ack(packetPuback, a.id, a.reason)
	case 2:
		if c.version < 5 || a.reason < packets.ErrUnspecifiedError.Code {
			c.session.remember(a.id)
		}
		return c.ack(packetPubrec, a.id, a.reason)
	}
	return nil
}

// resolve is the topic of a PUBLISH, which may be given by its alias.
func (c *conn) resolve(pk packets.Packet) (string, error) {
	topic := pk.TopicName
	if alias := pk.Properties.TopicAlias; pk.Properties.TopicAliasFlag {
		if topic == "" {
			known, ok := c.aliases[alias]
			if !ok {
				return "", packets.ErrProtocolViolationNoTopic // ~[MQTT-3.3.2-8]
			}
			return known, nil
		}
		if c.aliases == nil {
			c.aliases = map[uint16]string{}
		}
		c.aliases[alias] = strings.Clone(topic)
	}
	if err := CheckTopic(topic); err != nil {
		return "", packets.ErrTopicNameInvalid
	}
	return topic, nil
}

func (c *conn) pubrec(pk packets.Packet) error {
	if pk.ReasonCode >= packets.ErrUnspecifiedError.Code {
		c.session.acked(c, pk.PacketID) // [MQTT-4.3.3-4]: it will not have it
		return nil
	}
	reason := byte(0)
	if !c.session.pubrec(pk.PacketID) {
		reason = packets.ErrPacketIdentifierNotFound.Code
	}
	return c.ack(packetPubrel, pk.PacketID, reason)
}

// subscribed adds subscriptions, answers, and then owes what is retained.
func (b *Embedded) subscribed(c *conn, pk packets.Packet) error {
	if code := pk.SubscribeValidate(); code != packets.CodeSuccess {
		return code
	}
	if pk.PacketID == 0 {
		return packets.ErrProtocolViolationNoPacketID
	}
	reasons := make([]byte, len(pk.Filters))
	var owed []backlog
	for i, asked := range pk.Filters {
		sub, refused := b.judge(c, asked)
		if refused != 0 {
			reasons[i] = refused
			if c.version < 5 {
				reasons[i] = packets.ErrUnspecifiedError.Code // [MQTT-3.9.3-2]: it knows no other
			}
			continue
		}
		reasons[i] = sub.qos
		isNew, ok := c.session.subscribe(asked.Filter, sub)
		if !ok {
			reasons[i] = packets.ErrQuotaExceeded.Code
			if c.version < 5 {
				reasons[i] = packets.ErrUnspecifiedError.Code
			}
			continue
		}
		if sub.group == "" && (asked.RetainHandling == 0 || asked.RetainHandling == 1 && isNew) { // [MQTT-3.3.1-10]
			run := backlog{since: b.seq.Load(), kept: b.retained.match(sub.filter), qos: sub.qos}
			if sub.id > 0 {
				run.ids = []int{sub.id}
			}
			owed = append(owed, run)
		}
	}
	c.acks = appendSuback(c.acks, packetSuback, pk.PacketID, reasons, c.version)
	if err := c.flush(); err != nil {
		return err
	}
	c.session.owe(owed)
	c.poke()
	return nil
}

// judge makes a subscription of what is asked for, or says why not.
func (b *Embedded) judge(c *conn, asked packets.Subscription) (*clientSub, byte) {
	if CheckFilter(asked.Filter) != nil || b.checkSize(asked.Filter) != nil {
		return nil, packets.ErrTopicFilterInvalid.Code
	}
	if len(asked.Filter) >= 7 && strings.EqualFold(asked.Filter[:7], "$share/") && !strings.HasPrefix(asked.Filter, "$share/") {
		return nil, packets.ErrTopicFilterInvalid.Code
	}
	sub := &clientSub{filter: unshared(asked.Filter), qos: asked.Qos, id: asked.Identifier, noLocal: asked.NoLocal, asKept: asked.RetainAsPublished}
	if rest, ok := strings.CutPrefix(asked.Filter, "$share/"); ok {
		sub.group, _, _ = strings.Cut(rest, "/")
		if sub.noLocal {
			return nil, packets.ErrProtocolViolationInvalidSharedNoLocal.Code // [MQTT-3.8.3-4]
		}
	}
	if !strings.ContainsAny(sub.filter, "+#") && !b.acl.May(c.principal, sub.filter, false) {
		return nil, packets.ErrNotAuthorized.Code
	}
	return sub, 0
}

// subscribe adds one; not ok: there are too many.
func (s *session) subscribe(filter string, sub *clientSub) (isNew, ok bool) {
	s.mu.Lock()
	old, had := s.subs[filter]
	if s.ended || !had && len(s.subs) >= s.b.limit.Subscriptions {
		s.mu.Unlock()
		return false, false
	}
	s.subs[filter] = sub
	s.mu.Unlock()
	if had && old.group != "" {
		s.b.tree.unsubscribe(s, old)
	}
	s.b.tree.subscribe(s, sub)
	if s.over() { // ended meanwhile, without this one
		s.b.tree.unsubscribe(s, sub)
	}
	return !had, true
}

func (s *session) over() bool {
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}

func (s *session) owe(owed []backlog) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ended {
		s.backlog = append(s.backlog, owed...)
	}
}

func (b *Embedded) unsubscribed(c *conn, pk packets.Packet) error {
	if code := pk.UnsubscribeValidate(); code != packets.CodeSuccess {
		return code
	}
	if pk.PacketID == 0 {
		return packets.ErrProtocolViolationNoPacketID
	}
	reasons := make([]byte, len(pk.Filters))
	s := c.session
	for i, f := range pk.Filters {
		s.mu.Lock()
		sub := s.subs[f.Filter]
		delete(s.subs, f.Filter)
		s.mu.Unlock()
		if sub == nil {
			reasons[i] = packets.CodeNoSubscriptionExisted.Code
			continue
		}
		b.tree.unsubscribe(s, sub)
	}
	if c.version < 5 {
		reasons = nil
	}
	c.acks = appendSuback(c.acks, packetUnsub, pk.PacketID, reasons, c.version)
	return nil
}

// disconnecting notes what DISCONNECT says; mochi then closes.
func (c *conn) disconnecting(pk packets.Packet) (packets.Packet, error) {
	c.flush()
	if p := pk.Properties; p.SessionExpiryIntervalFlag {
		if p.SessionExpiryInterval > 0 && c.expiring == 0 {
			return pk, c.drop(packets.ErrProtocolViolationZeroNonZeroExpiry)
		}
		s := c.session
		s.mu.Lock()
		c.expiry = min(time.Duration(p.SessionExpiryInterval)*time.Second, c.b.limit.SessionExpiry)
		s.mu.Unlock()
	}
	c.left = pk.ReasonCode != packets.CodeDisconnectWillMessage.Code
	return pk, nil
}
