package profile

import (
	"errors"
	"fmt"
	"math"
	"strconv"

	"google.golang.org/protobuf/encoding/protowire"
)

// Sparkplug B's payload, as org.eclipse.tahu.protobuf has it. Only what a twin
// needs is read; fields that are not known are passed over.
type spPayload struct {
	timestamp uint64 // Unix milliseconds
	metrics   []spMetric
	seq       uint64
	hasSeq    bool
}

type spMetric struct {
	name       string
	alias      uint64
	hasAlias   bool
	timestamp  uint64
	datatype   uint64
	historical bool
	null       bool
	// value is a bool, int64, uint64, float64, string or []byte; nil with null,
	// or of a kind that is not read (data sets, templates).
	value any
}

// Data types of Sparkplug.
const (
	spInt8 = 1 + iota
	spInt16
	spInt32
	spInt64
	spUInt8
	spUInt16
	spUInt32
	spUInt64
	spFloat
	spDouble
	spBoolean
	spString
	spDateTime
	spText
	spUUID
	spDataSet
	spBytes
	spFile
	spTemplate
)

const (
	maxMetrics    = 10_000 // of one payload
	maxMetricName = 1024
)

var errTruncated = errors.New("the Sparkplug payload is cut off or broken")

// fields walks the fields of one message.
func fields(b []byte, fn func(num protowire.Number, typ protowire.Type, v []byte, n uint64) error) error {
	for len(b) > 0 {
		num, typ, l := protowire.ConsumeTag(b)
		if l < 0 {
			return errTruncated
		}
		b = b[l:]
		var (
			bytes []byte
			n     uint64
		)
		switch typ {
		case protowire.VarintType:
			n, l = protowire.ConsumeVarint(b)
		case protowire.Fixed64Type:
			n, l = protowire.ConsumeFixed64(b)
		case protowire.Fixed32Type:
			var m uint32
			m, l = protowire.ConsumeFixed32(b)
			n = uint64(m)
		case protowire.BytesType:
			bytes, l = protowire.ConsumeBytes(b)
		default:
			l = protowire.ConsumeFieldValue(num, typ, b)
		}
		if l < 0 {
			return errTruncated
		}
		b = b[l:]
		if err := fn(num, typ, bytes, n); err != nil {
			return err
		}
	}
	return nil
}

func decodeSparkplug(b []byte) (spPayload, error) {
	var p spPayload
	if len(b) > MaxPayload {
		return p, errPayloadSize(len(b))
	}
	err := fields(b, func(num protowire.Number, typ protowire.Type, v []byte, n uint64) error {
		switch {
		case num == 1 && typ == protowire.VarintType:
			p.timestamp = n
		case num == 2 && typ == protowire.BytesType:
			if len(p.metrics) == maxMetrics {
				return fmt.Errorf("more than %d metrics", maxMetrics)
			}
			m, err := decodeMetric(v)
			if err != nil {
				return err
			}
			p.metrics = append(p.metrics, m)
		case num == 3 && typ == protowire.VarintType:
			if n > 255 {
				return fmt.Errorf("seq %d is beyond 255", n)
			}
			p.seq, p.hasSeq = n, true
		}
		return nil
	})
	return p, err
}

func decodeMetric(b []byte) (spMetric, error) {
	var (
		m   spMetric
		raw struct {
			num   protowire.Number
			n     uint64
			bytes []byte
		}
	)
	err := fields(b, func(num protowire.Number, typ protowire.Type, v []byte, n uint64) error {
		varint, bytes := typ == protowire.VarintType, typ == protowire.BytesType
		switch {
		case num == 1 && bytes:
			if len(v) > maxMetricName {
				return fmt.Errorf("a metric name of %d bytes", len(v))
			}
			m.name = string(v)
		case num == 2 && varint:
			m.alias, m.hasAlias = n, true
		case num == 3 && varint:
			m.timestamp = n
		case num == 4 && varint:
			m.datatype = n
		case num == 5 && varint:
			m.historical = n != 0
		case num == 7 && varint:
			m.null = n != 0
		case (num == 10 || num == 11 || num == 14) && varint,
			num == 12 && typ == protowire.Fixed32Type,
			num == 13 && typ == protowire.Fixed64Type,
			(num == 15 || num == 16) && bytes:
			raw.num, raw.n, raw.bytes = num, n, v
		}
		return nil
	})
	if err != nil || m.null {
		return m, err
	}
	switch raw.num {
	case 10:
		m.value = signed(uint64(uint32(raw.n)), m.datatype)
	case 11:
		m.value = signed(raw.n, m.datatype)
	case 12:
		f := math.Float32frombits(uint32(raw.n))
		// 21.3 in 32 bits is 21.3, not 21.299999237060547.
		m.value, _ = strconv.ParseFloat(strconv.FormatFloat(float64(f), 'g', -1, 32), 64)
	case 13:
		m.value = math.Float64frombits(raw.n)
	case 14:
		m.value = raw.n != 0
	case 15:
		m.value = string(raw.bytes)
	case 16:
		m.value = append([]byte{}, raw.bytes...)
	}
	return m, nil
}

// signed makes of the two's complement on the wire what the data type says. A
// metric of later messages may have none: see spNode.
func signed(n, datatype uint64) any {
	switch datatype {
	case spInt8:
		return int64(int8(n))
	case spInt16:
		return int64(int16(n))
	case spInt32:
		return int64(int32(n))
	case spInt64:
		return int64(n)
	}
	return n
}

func encodeSparkplug(p spPayload) []byte {
	var b []byte
	b = protowire.AppendTag(b, 1, protowire.VarintType)
	b = protowire.AppendVarint(b, p.timestamp)
	for _, m := range p.metrics {
		b = protowire.AppendTag(b, 2, protowire.BytesType)
		b = protowire.AppendBytes(b, encodeMetric(m))
	}
	if p.hasSeq {
		b = protowire.AppendTag(b, 3, protowire.VarintType)
		b = protowire.AppendVarint(b, p.seq)
	}
	return b
}

func encodeMetric(m spMetric) []byte {
	var b []byte
	varint := func(num protowire.Number, v uint64) {
		b = protowire.AppendTag(b, num, protowire.VarintType)
		b = protowire.AppendVarint(b, v)
	}
	if m.name != "" {
		b = protowire.AppendTag(b, 1, protowire.BytesType)
		b = protowire.AppendString(b, m.name)
	}
	if m.hasAlias {
		varint(2, m.alias)
	}
	if m.timestamp != 0 {
		varint(3, m.timestamp)
	}
	if m.datatype != 0 {
		varint(4, m.datatype)
	}
	if m.historical {
		varint(5, 1)
	}
	if m.null {
		varint(7, 1)
		return b
	}
	switch v := m.value.(type) {
	case bool:
		n := uint64(0)
		if v {
			n = 1
		}
		varint(14, n)
	case int64:
		switch m.datatype {
		case spInt8, spInt16, spInt32:
			varint(10, uint64(uint32(v)))
		case spUInt8, spUInt16:
			varint(10, uint64(uint32(v)))
		default:
			varint(11, uint64(v))
		}
	case uint64:
		switch m.datatype {
		case spUInt8, spUInt16:
			varint(10, v)
		default:
			varint(11, v)
		}
	case float64:
		if m.datatype == spFloat {
			b = protowire.AppendTag(b, 12, protowire.Fixed32Type)
			b = protowire.AppendFixed32(b, math.Float32bits(float32(v)))
		} else {
			b = protowire.AppendTag(b, 13, protowire.Fixed64Type)
			b = protowire.AppendFixed64(b, math.Float64bits(v))
		}
	case string:
		b = protowire.AppendTag(b, 15, protowire.BytesType)
		b = protowire.AppendString(b, v)
	case []byte:
		b = protowire.AppendTag(b, 16, protowire.BytesType)
		b = protowire.AppendBytes(b, v)
	}
	return b
}
