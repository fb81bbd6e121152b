package seglog

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"strconv"
)

const (
	magic      = "SKSEGL01"
	headerSize = 36
	recordHead = 8 + 1 + 8
	frameHead  = 8

	// MaxPayload bounds one record.
	MaxPayload = 1 << 20
)

// KindGap is the kind of record that tells of missing ones; its payload is a
// Gap. Callers have kinds from 1 on.
const KindGap = 0

// Record is one record.
type Record struct {
	Kind    byte
	TS      int64 // Unix milliseconds, the caller's
	Payload []byte
	ID      string // set by a Reader

	at Pos
}

// Gap is the payload of a record of KindGap.
type Gap struct {
	From  string `json:"from"`
	To    string `json:"to"` // ID of the first record after it
	Count uint64 `json:"count"`
}

// Pos is where a record is. Index counts the records of its segment.
type Pos struct {
	Segment uint64 `json:"s"`
	Offset  uint32 `json:"o"`
	Index   uint32 `json:"i"`
}

// At is where a record that a Reader returned is.
func (r Record) At() Pos { return r.at }

// Before tells whether p is nearer to the log's beginning.
func (p Pos) Before(q Pos) bool { return p.before(q) }

func (p Pos) before(q Pos) bool {
	return p.Segment < q.Segment || p.Segment == q.Segment && p.Offset < q.Offset
}

func (p Pos) id(incarnation string) string {
	return incarnation + "-" + strconv.FormatUint(p.Segment, 10) + "-" + strconv.FormatUint(uint64(p.Offset), 10)
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(segment uint64, offset uint32, body []byte) uint32 {
	var seed [12]byte
	binary.LittleEndian.PutUint64(seed[:], segment)
	binary.LittleEndian.PutUint32(seed[8:], offset)
	return crc32.Update(crc32.Checksum(seed[:], castagnoli), castagnoli, body)
}

// appendRecord appends r as it is at a position.
func appendRecord(b []byte, segment uint64, offset uint32, r Record) []byte {
	start := len(b)
	b = binary.LittleEndian.AppendUint32(b, uint32(9+len(r.Payload)))
	b = append(b, 0, 0, 0, 0, r.Kind)
	b = binary.LittleEndian.AppendUint64(b, uint64(r.TS))
	b = append(b, r.Payload...)
	binary.LittleEndian.PutUint32(b[start+4:], checksum(segment, offset, b[start+8:]))
	return b
}

var (
	errShort  = errors.New("record is cut off")
	errDamage = errors.New("record is damaged")
)

// recordSize tells how long the record is that begins with head, which has 4
// bytes at least.
func recordSize(head []byte) (int, error) {
	n := binary.LittleEndian.Uint32(head)
	if n < 9 || n > 9+MaxPayload {
		return 0, errDamage
	}
	return 8 + int(n), nil
}

// decodeRecord reads the record that b begins with. The payload is b's.
func decodeRecord(b []byte, segment uint64, offset uint32) (r Record, size int, err error) {
	if len(b) < recordHead {
		return Record{}, 0, errShort
	}
	size, err = recordSize(b)
	if err != nil {
		return Record{}, 0, err
	}
	if size > len(b) {
		return Record{}, 0, errShort
	}
	if binary.LittleEndian.Uint32(b[4:]) != checksum(segment, offset, b[8:size]) {
		return Record{}, 0, errDamage
	}
	return Record{Kind: b[8], TS: int64(binary.LittleEndian.Uint64(b[9:])), Payload: b[recordHead:size]}, size, nil
}

// header of a segment. created is 0 when the clock was not to be trusted.
type header struct {
	incarnation string
	segment     uint64
	created     int64
}

func (h header) encode() []byte {
	b := append(make([]byte, 0, headerSize), magic...)
	inc, err := hex.DecodeString(h.incarnation)
	if err != nil || len(inc) != 8 {
		panic("seglog: incarnation " + h.incarnation) // made or decoded here
	}
	b = append(b, inc...)
	b = binary.LittleEndian.AppendUint64(b, h.segment)
	b = binary.LittleEndian.AppendUint64(b, uint64(h.created))
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func decodeHeader(b []byte) (header, error) {
	if len(b) < headerSize || string(b[:8]) != magic || binary.LittleEndian.Uint32(b[32:]) != crc32.Checksum(b[:32], castagnoli) {
		return header{}, errors.New("no header of a segment")
	}
	return header{
		incarnation: hex.EncodeToString(b[8:16]),
		segment:     binary.LittleEndian.Uint64(b[16:]),
		created:     int64(binary.LittleEndian.Uint64(b[24:])),
	}, nil
}

func (g Gap) record(ts int64) Record {
	b, err := json.Marshal(g)
	if err != nil {
		panic(err) // strings and a number
	}
	return Record{Kind: KindGap, TS: ts, Payload: b}
}

// ParseGap reads the payload of a record of KindGap.
func ParseGap(r Record) (Gap, error) {
	var g Gap
	if err := json.Unmarshal(r.Payload, &g); err != nil {
		return Gap{}, fmt.Errorf("gap record %s: %w", r.ID, err)
	}
	if g.From == "" { // written into the log where the missing ones would be
		g.From, g.To = r.ID, r.ID
	}
	return g, nil
}
