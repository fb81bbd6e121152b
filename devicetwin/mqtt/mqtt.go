// Package mqtt is a node's MQTT: a broker of its own, or a client of one that
// is there already, behind one interface.
//
// It owns connections, sessions, acknowledgements and who may publish what. It
// is a transport, not a queue: what has to outlive the power is written down by
// a Capture before it is acknowledged. It never knows what a topic means.
package mqtt

import (
	"context"
	"errors"
	"time"
)

// Message is one application message.
type Message struct {
	Topic   string
	Payload []byte
	QoS     byte
	Retain  bool // outgoing: keep it; incoming: it had been kept
	Dup     bool
	// AskRetain, of an incoming message: its publisher asked to keep it, as far
	// as the broker tells.
	AskRetain bool
	From      string // client id of who published it; "" for this node itself, or unknown (external)
	Received  time.Time

	// MQTT 5; zero where the peer speaks 3.1.1.
	Expiry      time.Duration
	Response    string // topic
	Correlation []byte
	ContentType string
	User        []UserProperty
}

// UserProperty of MQTT 5.
type UserProperty struct{ Key, Value string }

// Handler takes a message. It must not block for long, nor publish and wait: it
// is called on the broker's reading goroutine. The message is acknowledged
// after it has returned nil; an error leaves it unacknowledged where the
// protocol lets one, and closes the connection where not. The payload must not
// be kept without copying it.
type Handler func(Message) error

// Broker is where devices meet.
type Broker interface {
	// Run serves until ctx ends. The other methods may be called before.
	Run(ctx context.Context) error
	// Subscribe has h called for what matches filter, retained messages first.
	// It holds across reconnects until cancel, which waits for h to have
	// returned. A refusal by the peer is told in State.
	Subscribe(filter string, qos byte, h Handler) (cancel func(), err error)
	// Publish returns once the message is the broker's: for QoS 1 and 2 with an
	// external broker, acknowledged by it on the connection it was sent on.
	// ErrNotConnected: it was certainly not sent.
	Publish(ctx context.Context, m Message) error
	// State is what is known now.
	State() State
}

// ErrNotConnected says that a message was not sent, because there is no
// connection to send it on.
var ErrNotConnected = errors.New("not connected to the MQTT broker")

// State of a Broker.
type State struct {
	Mode      string // embedded or external
	Address   string
	Connected bool
	Since     time.Time // of Connected
	Error     string    // why not, or what the peer refused
	Clients   int       // embedded only
}

// Session tells of a client of the embedded broker.
type Session struct {
	Client    string
	User      string
	Connected bool
}
