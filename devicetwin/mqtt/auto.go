package mqtt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/eclipse/paho.mqtt.golang/packets"
)

// Modes of a node's MQTT.
const (
	ModeAuto     = "auto"
	ModeEmbedded = "embedded"
	ModeExternal = "external"
)

// LocalBroker is where a broker of this node's own is looked for.
const LocalBroker = "127.0.0.1:1883"

// probeTimeout bounds the looking.
const probeTimeout = 2 * time.Second

// Choice is which broker a node uses. It is made once per start and not changed
// while running: two brokers would split what is retained, and devices do not
// move.
type Choice struct {
	Mode   string // ModeEmbedded or ModeExternal
	URL    string // of the external one
	Reason string
}

// Choose decides which broker to use. Of mode auto (or ""), an explicit url
// wins; else whatever on LocalBroker answers to a CONNECT, be it by refusing it,
// is the broker; else it is the embedded one. It takes some seconds at most, and
// next to nothing where nothing listens.
func Choose(ctx context.Context, mode, url string) (Choice, error) {
	return choose(ctx, mode, url, LocalBroker)
}

func choose(ctx context.Context, mode, url, local string) (Choice, error) {
	switch mode {
	case ModeEmbedded:
		if url != "" {
			return Choice{}, fmt.Errorf("mqtt: mode embedded has no use for a URL (%s): take it out, or set mode external", url)
		}
		return Choice{Mode: ModeEmbedded, Reason: "configured"}, nil
	case ModeExternal:
		if url == "" {
			return Choice{}, errors.New("mqtt: mode external needs the broker's URL")
		}
	case ModeAuto, "":
	default:
		return Choice{}, fmt.Errorf("mqtt: mode %q: it must be auto, embedded or external", mode)
	}
	if url != "" {
		if _, err := brokerURL(url); err != nil {
			return Choice{}, err
		}
		return Choice{Mode: ModeExternal, URL: url, Reason: "configured"}, nil
	}
	said, err := probe(ctx, local)
	if err != nil {
		return Choice{Mode: ModeEmbedded, Reason: fmt.Sprintf("no broker at %s: %v", local, err)}, nil
	}
	return Choice{Mode: ModeExternal, URL: "mqtt://" + local, Reason: fmt.Sprintf("a broker at %s: %s", local, said)}, nil
}

// probe says CONNECT to addr and returns what the answer was. It leaves no
// session behind.
func probe(ctx context.Context, addr string) (string, error) {
	dialer := &net.Dialer{Timeout: probeTimeout}
	conn, err := dialer.DialContext(ctx, "tcp", addr)
	if err != nil {
		return "", err
	}
	return greet(ctx, conn)
}

// greet says CONNECT, returns what the answer was, and hangs up.
func greet(ctx context.Context, conn net.Conn) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()

	connect := packets.NewControlPacket(packets.Connect).(*packets.ConnectPacket)
	connect.ProtocolName, connect.ProtocolVersion = "MQTT", 4
	connect.CleanSession = true
	connect.Keepalive = 10
	if err := connect.Write(conn); err != nil {
		return "", err
	}
	var answer [4]byte
	if _, err := io.ReadFull(conn, answer[:]); err != nil {
		if ctx.Err() != nil {
			return "", errors.New("something listens, and does not answer to a CONNECT")
		}
		return "", fmt.Errorf("something listens, and does not speak MQTT: %w", err)
	}
	if answer[0] != kindConnack<<4 || answer[1] != 2 {
		return "", errors.New("something listens, and does not speak MQTT")
	}
	if code := answer[3]; code != packets.Accepted {
		return fmt.Sprintf("it refuses a client without credentials (code %d)", code), nil
	}
	_ = packets.NewControlPacket(packets.Disconnect).Write(conn)
	return "it answers", nil
}
