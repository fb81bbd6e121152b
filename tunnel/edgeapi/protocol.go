package edgeapi

import (
	"encoding/json"
	"time"
)

// Version history of the sync protocol. A hub serves every version from
// MinVersion to Version; an edge names its own in Hello and the hub refuses
// what it cannot speak with a Goodbye that says which side is too old.
//
//	1  2026-11-21  first version
const (
	Version    = 1
	MinVersion = 1
)

// Kinds of stream, the Kind of tunnel.OpenRequest.
const (
	// KindSync is opened once by the edge, in the sync class, and carries the
	// framed messages of this file for as long as the tunnel lives.
	KindSync = "sync"

	// KindAPI is opened by the edge and carries one HTTP/1.1 connection whose
	// requests the hub sends to the Kubernetes API server as this node. It is
	// for what needs an answer, such as TokenRequest; state goes over KindSync.
	KindAPI = "api"

	// KindKubelet is opened by the hub and carries one HTTP/1.1 connection to
	// the node's kubelet handler. After an Upgrade its bytes are opaque.
	KindKubelet = "kubelet"
)

// Framing of a sync stream. Each message is
//
//	type    1 byte, one of the constants below
//	flags   1 byte; bit 0: the payload is DEFLATE (RFC 1951) with the preset
//	        dictionary dictV1. Other bits are zero; a set one is an error.
//	length  unsigned varint (LEB128, at most 4 bytes): bytes of payload
//	payload JSON, after decompression
//
// A payload is at most MaxPayload bytes, before and after decompression. An
// unknown type is an error: a side sends only what the other's version has.
//
// A conversation:
//
//	edge  Hello, Inventory… (last one marked Last)
//	hub   Welcome, Delta… (one marked Synced once the node's set is complete)
//	edge  Ack for each Delta, after its commit
//
// and from then on, in any order, Delta/Ack downwards and Write/WriteResult
// upwards. Everything may be sent twice over the life of an object, because a
// tunnel may end between a commit and its acknowledgement: Deltas and Writes
// are idempotent.
const (
	typeHello       = 1 // edge → hub
	typeInventory   = 2 // edge → hub
	typeAck         = 3 // edge → hub
	typeWrite       = 4 // edge → hub
	typeWelcome     = 16
	typeDelta       = 17
	typeWriteResult = 18
	typeGoodbye     = 19

	flagDeflate = 1

	// MaxPayload bounds one message. etcd's own request limit, 1.5 MiB, bounds
	// an object; JSON may be larger than the protobuf stored there.
	MaxPayload = 8 << 20

	// BatchBytes is where a sender closes a batch of Inventory items or Delta
	// objects; a single larger object travels alone.
	BatchBytes = 128 << 10

	// compressFrom is the smallest payload worth compressing.
	compressFrom = 128
)

// Message is one of the message types of this package.
type Message interface{ messageType() byte }

// Hello opens a sync stream.
type Hello struct {
	Version int    `json:"version"`
	Agent   string `json:"agent"` // edgecore's version, for people
	// StoreID names this incarnation of the node's store. It changes when the
	// store was made anew.
	StoreID string `json:"storeID"`
	// Synced says that a complete set was committed before: the node already
	// runs, or could run, from its store.
	Synced bool `json:"synced"`
	// Outbox is how many changes made on the node wait to go up, and
	// EventsDropped how many Events the node had to drop unsent. For people: the
	// hub tells them, and relies on neither.
	Outbox        int    `json:"outbox,omitempty"`
	EventsDropped uint64 `json:"eventsDropped,omitempty"`
}

// Inventory tells the hub what the node has, in one or more messages. The hub
// answers with differences only.
type Inventory struct {
	Items []Item `json:"items,omitempty"`
	Last  bool   `json:"last,omitempty"`
}

// Ref names an object. Resource is the lower-case plural ("pods").
type Ref struct {
	Resource  string `json:"r"`
	Namespace string `json:"ns,omitempty"`
	Name      string `json:"n"`
}

// Item is one object of an Inventory. Rev is the revision the hub gave with
// the object; it is opaque to the edge.
type Item struct {
	Ref
	UID string `json:"uid,omitempty"`
	Rev string `json:"rev,omitempty"`
}

// Welcome answers Hello.
type Welcome struct {
	Version  int       `json:"version"`
	Agent    string    `json:"agent"`
	NodeName string    `json:"nodeName"`
	Now      time.Time `json:"now"` // the hub's clock, for the edge's offset
}

// Delta changes the node's set: first the deletions, then the upserts, in one
// commit. Objects stand after what they refer to.
type Delta struct {
	Seq     uint64   `json:"seq"`
	Upserts []Upsert `json:"upserts,omitempty"`
	Deletes []Item   `json:"deletes,omitempty"`
	// Synced says that with this delta the node's set is complete. It is set
	// on one delta of every conversation, which may otherwise be empty.
	Synced bool `json:"synced,omitempty"`
}

// Upsert is an object as the node shall have it. Body is its JSON with
// apiVersion and kind.
type Upsert struct {
	Ref
	UID  string          `json:"uid,omitempty"`
	Rev  string          `json:"rev"`
	Body json.RawMessage `json:"body"`
}

// Ack says that the delta Seq and all before it are on the node's disk.
type Ack struct {
	Seq uint64 `json:"seq"`
}

// Ops of a Write.
const (
	// OpCreate creates the object: a Node, a mirror pod, a CSINode.
	OpCreate = "create"
	// OpStatus asserts the object's status as the node sees it; Body is the
	// whole object.
	OpStatus = "status"
	// OpUpdate asserts the whole object, for kinds that the node owns; of its
	// Node only the label and annotation keys that the write names.
	OpUpdate = "update"
	// OpDelete confirms a deletion: grace period 0, with the UID as its
	// precondition.
	OpDelete = "delete"
	// OpEvent creates an Event, or asserts its count if it is there.
	OpEvent = "event"
)

// Write is a change made on the node, to be done at the API server as that
// node. UID, if not empty, is the precondition.
type Write struct {
	ID uint64 `json:"id"`
	Op string `json:"op"`
	Ref
	UID  string          `json:"uid,omitempty"`
	Body json.RawMessage `json:"body,omitempty"`
	// Labels and Annotations are the keys that an OpUpdate of a Node sets from
	// Body, or removes when absent there.
	Labels      []string `json:"labels,omitempty"`
	Annotations []string `json:"annotations,omitempty"`
}

// WriteResult answers the Write with the same ID, in any order: an edge has
// never two writes of one object on their way.
// Code is the API server's HTTP status: 2xx is done; 404, 409 and 410 say that
// the object has moved on and the write is void; 403, 400 and 422 are refusals
// that no retry mends; anything else is worth another try.
type WriteResult struct {
	ID      uint64 `json:"id"`
	Code    int    `json:"code"`
	Message string `json:"message,omitempty"`
	UID     string `json:"uid,omitempty"` // the object's UID after a create
}

// Goodbye tells why the hub ends the conversation.
type Goodbye struct {
	Reason  string `json:"reason"` // one of the Reason constants
	Message string `json:"message"`
}

// Reasons of a Goodbye.
const (
	ReasonVersion  = "Version"  // the two sides share no protocol version
	ReasonReplaced = "Replaced" // a newer tunnel of the same node took over
	ReasonRevoked  = "Revoked"  // the node is no longer enrolled

	// ReasonNodeDeleted says that the cluster had this node's Node object and
	// has it no more. It comes in place of the differences: the node is not
	// told which of its pods are gone. What it does about it is its operator's
	// choice; it registers itself again only after it has joined again.
	ReasonNodeDeleted = "NodeDeleted"
)

func (Hello) messageType() byte       { return typeHello }
func (Inventory) messageType() byte   { return typeInventory }
func (Ack) messageType() byte         { return typeAck }
func (Write) messageType() byte       { return typeWrite }
func (Welcome) messageType() byte     { return typeWelcome }
func (Delta) messageType() byte       { return typeDelta }
func (WriteResult) messageType() byte { return typeWriteResult }
func (Goodbye) messageType() byte     { return typeGoodbye }
