package devicetwin

import (
	"encoding/json"
	"time"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
)

// Doc is one twin as readers see it: over HTTP, as the retained MQTT document,
// on the command line.
type Doc struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	UID       string `json:"uid"`
	Model     string `json:"model"`
	// Version is of the latest change of anything below, besides lastSeen and
	// the times of values that did not change. It is the ETag.
	Version    v1alpha1.Version  `json:"version"`
	Generation int64             `json:"generation"` // of the Device that Desired is from
	Labels     map[string]string `json:"labels,omitempty"`

	Phase    string     `json:"phase"`
	Reason   string     `json:"reason,omitempty"`
	LastSeen *time.Time `json:"lastSeen,omitempty"`
	// Problem is why the device cannot be served as its model has it.
	Problem string `json:"problem,omitempty"`

	Properties map[string]DocProperty `json:"properties"`
}

// DocProperty is one property of a Doc.
type DocProperty struct {
	Type     string       `json:"type"`
	Unit     string       `json:"unit,omitempty"`
	Access   string       `json:"access"`
	Reported *DocReported `json:"reported,omitempty"`
	// Desired is the cloud's, Override the node's; Want is what of the two
	// holds.
	Desired  *DocDesired     `json:"desired,omitempty"`
	Override *DocOverride    `json:"override,omitempty"`
	Want     json.RawMessage `json:"want,omitempty"`
	By       string          `json:"by,omitempty"` // whose Want is: cloud, or the override's By
	// State is how far Want has come, one of v1alpha1's Desired constants.
	State   string `json:"state,omitempty"`
	Message string `json:"message,omitempty"`
}

// DocReported is a value of the device.
type DocReported struct {
	Value    json.RawMessage  `json:"value"`
	TS       time.Time        `json:"ts"`       // the device's, or Received where it gave none that can be
	Received time.Time        `json:"received"` // by this node, in the hub's time
	Quality  string           `json:"q"`
	Version  v1alpha1.Version `json:"version"`
	Message  string           `json:"message,omitempty"` // why q is bad
}

// DocDesired is what the cloud wants.
type DocDesired struct {
	Value      json.RawMessage `json:"value"`
	Generation int64           `json:"generation"`        // that last changed this property
	Message    string          `json:"message,omitempty"` // why it cannot be: it is withheld
}

// DocOverride is what was set on the node.
type DocOverride struct {
	Value          json.RawMessage `json:"value"`
	By             string          `json:"by"`
	BaseGeneration int64           `json:"baseGeneration"`
	Since          time.Time       `json:"since"`
	Expires        time.Time       `json:"expires"`
}

// Delta is where a device is not as it should be.
type Delta struct {
	Version v1alpha1.Version      `json:"ver"`
	Props   map[string]DeltaValue `json:"props"` // empty: all is as it should be
}

// DeltaValue is one such property.
type DeltaValue struct {
	Want       json.RawMessage `json:"want"`
	Have       json.RawMessage `json:"have,omitempty"` // nothing: never reported
	By         string          `json:"by"`             // cloud, or who set the override
	Generation int64           `json:"gen,omitempty"`  // of the cloud's desired value
	State      string          `json:"state"`
}

// ByCloud is the By of what a Device's spec wants.
const ByCloud = "cloud"

// Types of a Change.
const (
	ChangeSnapshot = "snapshot" // what there is, at the start of a watch or after it fell behind
	ChangeUpdate   = "update"
	ChangeDelete   = "delete"
	ChangeSynced   = "synced" // the snapshot is complete; of no device
)

// Change is what a watch tells: a twin as it is now. Changes that follow each
// other faster than the watcher reads are told as one.
type Change struct {
	Type    string           `json:"type"`
	Key     Key              `json:"-"`
	Version v1alpha1.Version `json:"version"` // resume from here
	Doc     *Doc             `json:"doc,omitempty"`
	Delta   *Delta           `json:"delta,omitempty"`
	// Reported names the properties whose reported values changed, Wanted those
	// whose desired side did. All, for a snapshot.
	Reported []string `json:"reported,omitempty"`
	Wanted   []string `json:"wanted,omitempty"`
}

// Patch sets desired values on the node: overrides.
type Patch struct {
	ID string // the same ID again: the same answer, once; at most 64 bytes
	// Props are values by property; null takes the override back.
	Props map[string]json.RawMessage
	TTL   time.Duration // zero: the model's
	// Base is what the caller has seen: what of Props was changed by someone
	// else since is a conflict. So is, by BaseGen, what the cloud changed after
	// that generation. Nil: not checked.
	Base    *v1alpha1.Version
	BaseGen *int64
	By      string // who; shown, at most 128 bytes
}

// Result answers a Patch. Code is an HTTP status: 200, 400, 403 (the model does
// not let the node set it, now), 404, 409 (Base is behind), 422 (no such value)
// or 503 (the disk takes nothing). A Patch is taken whole or not at all.
type Result struct {
	ID      string            `json:"id,omitempty"`
	Code    int               `json:"code"`
	State   string            `json:"state,omitempty"` // the least advanced of the properties'
	Version v1alpha1.Version  `json:"ver,omitzero"`
	Message string            `json:"message,omitempty"`
	Props   map[string]string `json:"props,omitempty"` // what is wrong with each
}

// States of a command.
const (
	CommandQueued    = "queued"
	CommandSent      = "sent"
	CommandSucceeded = "succeeded"
	CommandFailed    = "failed"
	CommandTimeout   = "timeout" // whether the device did it is not known
	CommandExpired   = "expired"
)

// CommandCall has a device do something.
type CommandCall struct {
	ID      string // idempotency key; empty: a new one; at most 64 bytes
	Name    string
	Args    map[string]json.RawMessage
	Timeout time.Duration // zero: the model's
	By      string
}

// CommandStatus is how far a command has come. Code is an HTTP status: 200,
// 202 (not ended yet), 404, 409 (the ID is another command's), 422, 429,
// 502 (the device refused), 503 (not there), 504.
type CommandStatus struct {
	ID      string          `json:"id"`
	Name    string          `json:"name"`
	State   string          `json:"state"`
	Code    int             `json:"code"`
	Message string          `json:"message,omitempty"`
	Result  json.RawMessage `json:"result,omitempty"`
	By      string          `json:"by,omitempty"`
	Created time.Time       `json:"created"`
	Updated time.Time       `json:"updated"`
}

// Done tells whether the command has ended.
func (s *CommandStatus) Done() bool { return s.State != CommandQueued && s.State != CommandSent }

// Observation is one reading that was taken, for telemetry.
type Observation struct {
	Device   Key
	Property string
	Value    any // as in Reading
	TS       time.Time
	Received time.Time
	Quality  string
	// Historical: said late, the twin does not show it.
	Historical bool
}

// Event is for people, as a Kubernetes Event. Each reason is told of a device
// at most once a minute.
type Event struct {
	Device  Key
	UID     string
	Warning bool
	Reason  string
	Message string
}

// Reasons of Events.
const (
	ReasonBadReading         = "BadReading"
	ReasonDesiredConflict    = "DesiredConflict"
	ReasonDesiredRejected    = "DesiredRejected"
	ReasonDesiredInvalid     = "DesiredInvalid"
	ReasonGenerationWentBack = "GenerationWentBack"
	ReasonModelInvalid       = "ModelInvalid"
)
