package mqtt

import (
	"encoding/binary"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
)

// Control packets that this broker writes itself, with the flags that MQTT
// prescribes for them.
const (
	packetPuback  byte = packets.Puback << 4
	packetPubrec  byte = packets.Pubrec << 4
	packetPubrel  byte = packets.Pubrel<<4 | 2
	packetPubcomp byte = packets.Pubcomp << 4
	packetSuback  byte = packets.Suback << 4
	packetUnsub   byte = packets.Unsuback << 4
)

// appendAck encodes PUBACK, PUBREC, PUBREL or PUBCOMP. It never has properties:
// those of the PUBLISH do not belong there, and parsers stop at them.
func appendAck(b []byte, kind byte, id uint16, reason, version byte) []byte {
	if version < 5 || reason == 0 {
		return append(b, kind, 2, byte(id>>8), byte(id))
	}
	return append(b, kind, 3, byte(id>>8), byte(id), reason)
}

// appendSuback encodes SUBACK or UNSUBACK.
func appendSuback(b []byte, kind byte, id uint16, reasons []byte, version byte) []byte {
	n := 2 + len(reasons)
	if version == 5 {
		n++
	}
	b = binary.AppendUvarint(append(b, kind), uint64(n))
	b = append(b, byte(id>>8), byte(id))
	if version == 5 {
		b = append(b, 0)
	}
	return append(b, reasons...)
}

// appendPublish encodes PUBLISH. MQTT's variable byte integer is protobuf's.
func appendPublish(b []byte, o *outgoing, version byte, now time.Time) []byte {
	m := o.m
	first := packets.Publish<<4 | o.qos<<1
	if o.retain {
		first |= 1
	}
	if o.again && o.qos > 0 {
		first |= 1 << 3
	}
	n := 2 + len(m.Topic) + len(m.Payload)
	if o.qos > 0 {
		n += 2
	}
	var props []byte
	if version == 5 {
		props = appendProperties(nil, o, now)
		n += len(binary.AppendUvarint(nil, uint64(len(props)))) + len(props)
	}
	b = binary.AppendUvarint(append(b, first), uint64(n))
	b = appendText(b, m.Topic)
	if o.qos > 0 {
		b = binary.BigEndian.AppendUint16(b, o.packetID)
	}
	if version == 5 {
		b = binary.AppendUvarint(b, uint64(len(props)))
		b = append(b, props...)
	}
	return append(b, m.Payload...)
}

func appendText[T string | []byte](b []byte, s T) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(len(s)))
	return append(b, s...)
}

func appendProperties(b []byte, o *outgoing, now time.Time) []byte {
	m := o.m
	if m.format > 0 {
		b = append(b, packets.PropPayloadFormat, m.format-1)
	}
	if !m.expires.IsZero() {
		left := max(1, int64(m.expires.Sub(now)/time.Second)) // [MQTT-3.3.2-6]
		b = append(b, packets.PropMessageExpiryInterval)
		b = binary.BigEndian.AppendUint32(b, uint32(left))
	}
	if m.ContentType != "" {
		b = appendText(append(b, packets.PropContentType), m.ContentType)
	}
	if m.Response != "" {
		b = appendText(append(b, packets.PropResponseTopic), m.Response)
	}
	if len(m.Correlation) > 0 {
		b = appendText(append(b, packets.PropCorrelationData), m.Correlation)
	}
	for _, id := range o.ids {
		b = binary.AppendUvarint(append(b, packets.PropSubscriptionIdentifier), uint64(id))
	}
	for _, u := range m.User {
		b = appendText(append(b, packets.PropUser), u.Key)
		b = appendText(b, u.Value)
	}
	return b
}
