// Package tunnel owns the one WebSocket between an edge node and the hub: it
// carries many independent byte streams over it, shares the link between them
// by class and fairness, notices when the link is dead, and brings it back.
//
// A Session is one WebSocket. Both ends Open and Accept streams; a Stream is a
// net.Conn with half-close and reset. Opening costs no round trip. Each stream
// has its own credit and there is no credit for the whole connection, so a
// stream nobody reads never stops another. Dialer brings an edge's session up
// and keeps it up; Upgrade takes one in at the hub. The wire format is in
// protocol.go.
//
// Delivery and order: bytes of one stream arrive in order and once, or the
// stream ends with an error; nothing is promised between streams. Write returns
// when its bytes are in a message on their way, not when the peer has them.
//
// On a bad link every wait ends: an attempt to dial after Dialer.Timeout (30 s,
// name servers, proxy, TLS and upgrade together), a peer's first message after
// HelloTimeout (20 s), a ping after PongTimeout (20 s), data that the network
// does not acknowledge after 20 s. The hub drops an edge that it has not heard
// for its announced interval and DeadGrace (75 s by default). Between attempts
// the edge waits at random up to a bound that doubles to Backoff.Max (30 s), so
// that it dials a few times a minute whatever answers, and is back at most that
// long after the link is; Dialer.Kick, on a change of the network, ends the wait.
// A session that did not live for Backoff.Lived (1 min) counts as a failure, so
// that a link that flaps is no reason to dial more.
//
// The package knows nothing of Kubernetes, authenticates nobody (the caller's
// TLS configuration does) and starts no listener.
//
// On links with a round trip worth the name, what bulk streams have on the way
// is bounded (pacing.go), so that an exec beside an upload stays responsive.
// That takes Linux and a plain TCP socket; elsewhere there is no bound.
//
// Not here yet, though the structure leaves their place: parking idle sessions
// on epoll (readMessage keeps no state on the stack between messages), and
// taking byte streams over to a new connection (credit is absolute, and HELLO
// may carry further settings).
package tunnel
