package edgeapi

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
)

// KindTwins is opened by the edge and carries what is known and wanted of its
// devices, framed as a sync stream is. Device objects themselves come down with
// the sync stream, as objects of the node's set.
//
// A conversation:
//
//	edge  TwinHello, TwinDigest… (last one marked Last)
//	hub   TwinWelcome, TwinWant (what differs), TwinRestore (what it knows better)
//
// and from then on, in any order, TwinFrame/TwinAck upwards and
// TwinRequest/TwinReply both ways. A frame carries the present values of what
// changed, never a history: it may be sent twice, and one that was not
// acknowledged is made anew from the twins. The hub compares versions property
// by property and takes only what is newer.
const KindTwins = "twins"

// TwinsVersion of that conversation.
const TwinsVersion = 1

const (
	typeTwinHello   = 32 // edge → hub
	typeTwinDigest  = 33 // edge → hub
	typeTwinFrame   = 34 // edge → hub
	typeTwinFound   = 35 // edge → hub
	typeTwinWelcome = 40 // hub → edge
	typeTwinWant    = 41 // hub → edge
	typeTwinRestore = 42 // hub → edge
	typeTwinAck     = 43 // hub → edge
	typeTwinRequest = 48 // both
	typeTwinReply   = 49 // both
)

// TwinHello opens the conversation. The hub takes it from the newest
// authenticated tunnel of the node only.
type TwinHello struct {
	Version     int    `json:"version"`
	Incarnation string `json:"incarnation"`
	Epoch       uint64 `json:"epoch"`
}

// TwinWelcome answers TwinHello.
type TwinWelcome struct {
	Version int       `json:"version"`
	Now     time.Time `json:"now"`
}

// DeviceRef names a Device.
type DeviceRef struct {
	Namespace string `json:"ns"`
	Name      string `json:"n"`
}

// TwinDigest tells what the node has, so that only differences travel.
type TwinDigest struct {
	Items []TwinDigestItem `json:"items,omitempty"`
	Last  bool             `json:"last,omitempty"`
}

// TwinDigestItem is one device. Version is its latest; Hash is of the reported
// values without their times.
type TwinDigestItem struct {
	Device  DeviceRef `json:"d"`
	UID     string    `json:"uid"`
	Version string    `json:"ver"` // a v1alpha1.Version
	Hash    string    `json:"hash"`
}

// TwinWant asks for the whole of these twins, in frames.
type TwinWant struct {
	Devices []DeviceRef `json:"devices,omitempty"`
}

// TwinRestore gives back values that the hub has and the node lost with its
// power: the node adopts them as stale.
type TwinRestore struct {
	Values []TwinValue `json:"values"`
}

// TwinFrame is what changed since the last frame. States are taken before
// Values. A value is taken only of a device whose UID the node has told in this
// conversation, by a TwinDigestItem or a TwinState: names are used again.
type TwinFrame struct {
	Seq    uint64      `json:"seq"`
	Values []TwinValue `json:"values,omitempty"`
	States []TwinState `json:"states,omitempty"`
}

// TwinAck says that the hub has taken the frame Seq and all before it.
type TwinAck struct {
	Seq uint64 `json:"seq"`
}

// TwinValue is one reported value.
type TwinValue struct {
	Device   DeviceRef       `json:"d"`
	Property string          `json:"p"`
	Value    json.RawMessage `json:"v,omitempty"`
	TS       int64           `json:"ts,omitempty"` // Unix milliseconds, the device's time; 0: it gave none
	Received int64           `json:"rx"`           // Unix milliseconds, the node's corrected time
	Quality  string          `json:"q"`
	Version  string          `json:"ver"`
	Message  string          `json:"msg,omitempty"` // why the quality is bad
}

// TwinState is what is known of a device besides its values. The whole state
// is sent when any of it changes.
type TwinState struct {
	Device             DeviceRef              `json:"d"`
	UID                string                 `json:"uid"`
	ObservedGeneration int64                  `json:"gen"` // on the node's disk
	Version            string                 `json:"ver"`
	Phase              string                 `json:"phase"`
	Reason             string                 `json:"reason,omitempty"`
	LastSeen           int64                  `json:"seen,omitempty"` // Unix milliseconds
	Desired            map[string]TwinDesired `json:"desired,omitempty"`
	Overrides          []TwinOverride         `json:"overrides,omitempty"`
}

// TwinDesired is how far a desired value has come.
type TwinDesired struct {
	Generation int64  `json:"gen"` // that last changed this property
	State      string `json:"state"`
	Message    string `json:"msg,omitempty"`
}

// TwinOverride is a desired value set on the node.
type TwinOverride struct {
	Property string          `json:"p"`
	Value    json.RawMessage `json:"v"`
	By       string          `json:"by"`
	BaseGen  int64           `json:"base"`
	Since    int64           `json:"since"`   // Unix milliseconds
	Expires  int64           `json:"expires"` // Unix milliseconds
}

// TwinFound tells devices that announced themselves, whole per source and
// latest only.
type TwinFound struct {
	Discovery  DeviceRef       `json:"discovery"` // the DeviceDiscovery
	Candidates []TwinCandidate `json:"candidates"`
	Dropped    int             `json:"dropped,omitempty"` // beyond the caps
}

// TwinCandidate is one of them.
type TwinCandidate struct {
	Name       string            `json:"name"`
	Attributes map[string]string `json:"attributes,omitempty"`
	Params     map[string]string `json:"params,omitempty"`
	LastSeen   int64             `json:"seen"` // Unix milliseconds
}

// Ops of a TwinRequest.
const (
	// TwinOpCommand has the device do something; hub → edge. Body is a
	// TwinCommand.
	TwinOpCommand = "command"
	// TwinOpRefresh has the device asked for its values; hub → edge.
	TwinOpRefresh = "refresh"
	// TwinOpBase asks whether the generation that the node knows of a property
	// is still the cloud's; edge → hub. Body is a TwinBase.
	TwinOpBase = "base"
)

// TwinRequest asks the other side for something. It is answered within
// Timeout, or void.
type TwinRequest struct {
	ID      uint64          `json:"id"` // of the asking side
	Op      string          `json:"op"`
	Device  DeviceRef       `json:"d"`
	Timeout int64           `json:"timeout"` // milliseconds
	By      string          `json:"by,omitempty"`
	Body    json.RawMessage `json:"body,omitempty"`
}

// TwinCommand is the body of TwinOpCommand. ID makes it idempotent.
type TwinCommand struct {
	ID   string                     `json:"id"`
	Name string                     `json:"name"`
	Args map[string]json.RawMessage `json:"args,omitempty"`
}

// TwinBase is the body of TwinOpBase.
type TwinBase struct {
	UID        string   `json:"uid"`
	Properties []string `json:"properties"`
	Generation int64    `json:"generation"` // of the Device, as the node has it
}

// TwinReply answers a TwinRequest. Code is an HTTP status.
type TwinReply struct {
	ID      uint64          `json:"id"`
	Code    int             `json:"code"`
	Message string          `json:"message,omitempty"`
	Body    json.RawMessage `json:"body,omitempty"`
}

func (TwinHello) messageType() byte   { return typeTwinHello }
func (TwinDigest) messageType() byte  { return typeTwinDigest }
func (TwinFrame) messageType() byte   { return typeTwinFrame }
func (TwinFound) messageType() byte   { return typeTwinFound }
func (TwinWelcome) messageType() byte { return typeTwinWelcome }
func (TwinWant) messageType() byte    { return typeTwinWant }
func (TwinRestore) messageType() byte { return typeTwinRestore }
func (TwinAck) messageType() byte     { return typeTwinAck }
func (TwinRequest) messageType() byte { return typeTwinRequest }
func (TwinReply) messageType() byte   { return typeTwinReply }

// TwinHash is the Hash of a TwinDigestItem: of the properties' values and
// qualities, in any order, whatever their times and versions. Both sides make
// it, so a value counts as it looks after having been sent.
func TwinHash(values []TwinValue) (string, error) {
	sorted := slices.Clone(values)
	slices.SortFunc(sorted, func(a, b TwinValue) int { return strings.Compare(a.Property, b.Property) })
	h := sha256.New()
	for _, v := range sorted {
		value := []byte("null")
		if len(v.Value) > 0 {
			var err error
			if value, err = json.Marshal(v.Value); err != nil {
				return "", fmt.Errorf("value of property %s: %w", v.Property, err)
			}
		}
		for _, part := range [][]byte{[]byte(v.Property), value, []byte(v.Quality)} {
			var size [4]byte
			binary.BigEndian.PutUint32(size[:], uint32(len(part)))
			h.Write(size[:])
			h.Write(part)
		}
	}
	return base64.RawURLEncoding.EncodeToString(h.Sum(nil)[:12]), nil
}
