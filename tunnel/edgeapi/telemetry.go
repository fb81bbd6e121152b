package edgeapi

import (
	"encoding/json"
	"time"
)

// KindTelemetry is opened by the edge and carries what TelemetryRoutes with a
// hub sink collected, framed as a sync stream is.
//
// A conversation:
//
//	edge  TelemetryHello
//	hub   TelemetryWelcome
//
// and from then on TelemetryBatch upwards, up to TelemetryWindow of them
// unacknowledged, and a TelemetryAck for each, in any order. An ack of code 200
// means that the batch is durable at the hub, or has been taken by the sink.
// Whatever was not acknowledged is sent again over the next stream: records are
// told apart by their IDs, which do not change.
const KindTelemetry = "telemetry"

// TelemetryVersion of that conversation.
const TelemetryVersion = 1

// Bounds of the conversation.
const (
	// TelemetryWindow is large enough for some routes with a slow sink behind the
	// hub not to hold up the others.
	TelemetryWindow     = 16
	TelemetryMaxRecords = 1000
)

const (
	typeTelemetryHello   = 64 // edge → hub
	typeTelemetryBatch   = 65 // edge → hub
	typeTelemetryWelcome = 72 // hub → edge
	typeTelemetryAck     = 73 // hub → edge
)

// TelemetryHello opens the conversation.
type TelemetryHello struct {
	Version int `json:"version"`
}

// TelemetryWelcome answers TelemetryHello.
type TelemetryWelcome struct {
	Version int       `json:"version"`
	Now     time.Time `json:"now"`
}

// TelemetryBatch is records of one route for one of its sinks.
type TelemetryBatch struct {
	Seq     uint64            `json:"seq"`   // of this stream, from 1 on
	Route   DeviceRef         `json:"route"` // the TelemetryRoute
	Sink    int               `json:"sink"`  // index into its spec.to
	Records []TelemetryRecord `json:"records"`
}

// TelemetryAck answers the batch Seq. Code is an HTTP status: 200 is done; 429
// and 5xx are worth another try, after RetryAfter, and so are 401, 403, 404 and
// 409, which are not about the records; any other is a refusal that no retry
// mends, and the records are given up and counted.
type TelemetryAck struct {
	Seq        uint64 `json:"seq"`
	Code       int    `json:"code"`
	Message    string `json:"message,omitempty"`
	RetryAfter int64  `json:"retryAfter,omitempty"` // milliseconds
}

// TelemetryRecord is one thing that a route collected: a reading (Device,
// Property and Value), an MQTT message as it was (Topic and Payload), or a gap.
type TelemetryRecord struct {
	// ID is incarnation-segment-offset of the node's log, the same however
	// often the record is sent.
	ID       string          `json:"id"`
	Device   *DeviceRef      `json:"device,omitempty"`
	Property string          `json:"property,omitempty"`
	Value    json.RawMessage `json:"value,omitempty"`
	Topic    string          `json:"topic,omitempty"`
	Payload  []byte          `json:"payload,omitempty"`
	TS       int64           `json:"ts"`                 // Unix milliseconds: when it was so, as well as is known
	Received int64           `json:"received,omitempty"` // Unix milliseconds, when another than TS
	Quality  string          `json:"q,omitempty"`        // empty: good
	// Backfill: it is late, and newer ones may have been sent before it.
	Backfill bool          `json:"backfill,omitempty"`
	Gap      *TelemetryGap `json:"gap,omitempty"`
}

// TelemetryGap tells that records are missing: they were dropped because of the
// bounds of the route's buffer, or a disk that took nothing. From and To are
// IDs, To that of the first record after the gap.
type TelemetryGap struct {
	From  string `json:"from"`
	To    string `json:"to"`
	Count uint64 `json:"count"` // 0: not known
}

func (TelemetryHello) messageType() byte   { return typeTelemetryHello }
func (TelemetryBatch) messageType() byte   { return typeTelemetryBatch }
func (TelemetryWelcome) messageType() byte { return typeTelemetryWelcome }
func (TelemetryAck) messageType() byte     { return typeTelemetryAck }
