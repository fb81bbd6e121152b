package devicetwin

import (
	"context"
	"encoding/json"
	"time"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
)

// Key names a Device.
type Key struct{ Namespace, Name string }

// String is namespace/name.
func (k Key) String() string { return k.Namespace + "/" + k.Name }

// Reading is what a mapping made of a message.
type Reading struct {
	Property string
	// Value is of the property's type: bool, int64, float64, string (string and
	// enum), []byte or, of type object, json.RawMessage. Of another type it is
	// a bad reading.
	Value any
	TS    time.Time // the device's own time; zero: it gave none
	// Bad is why the mapping could make no value of what came.
	Bad error
	// Retained: the broker had kept it; when it was said is not known.
	Retained bool
	// Historical: said late; for telemetry only, it does not move the twin.
	Historical bool
	// Intent: the device tells not what is but what it has accepted as wanted.
	Intent bool
}

// Sighting is evidence of a device's being there, or not.
type Sighting struct {
	Evidence string // one of the Evidence constants
	State    string // v1alpha1.PhaseOnline, PhaseOffline or PhaseSleeping
	Retained bool
}

// Kinds of evidence.
const (
	EvidenceMessage      = "Message"      // it spoke
	EvidenceAvailability = "Availability" // its availability topic
	EvidenceSession      = "Session"      // its session with the embedded broker
	EvidenceBirth        = "Birth"        // Sparkplug
	EvidenceParent       = "Parent"       // what it hangs on
)

// Sink takes what drivers hear. Twins is one. Its methods do not block.
type Sink interface {
	Report(dev Key, readings []Reading)
	Sight(dev Key, s Sighting)
	// Found tells the devices that a discovery sees, all of them at each call.
	Found(discovery Key, candidates []v1alpha1.Candidate, dropped int)
}

// Driver reaches devices. It is level-triggered: it is told the whole set.
type Driver interface {
	// Set tells which devices there are. It does not block.
	Set(devices []Bound, discoveries []*v1alpha1.DeviceDiscovery)
	// Write tells the device a desired value. It returns once that was handed
	// over, or answered where the model has a Reply. ErrNotConnected: it was
	// certainly not sent.
	Write(ctx context.Context, w WriteRequest) error
	// Command has the device do something.
	Command(ctx context.Context, c CommandRequest) (json.RawMessage, error)
	// Refresh asks the device for its values.
	Refresh(ctx context.Context, dev Key) error
}

// Bound is a Device with its model.
type Bound struct {
	Device *v1alpha1.Device
	Model  *v1alpha1.DeviceModel // nil: not there (yet)
}

// WriteRequest is one desired value on its way.
type WriteRequest struct {
	Device   Key
	Property string
	Value    any           // as in Reading
	Expires  time.Duration // after which it must not act; zero: never
}

// CommandRequest is one command on its way.
type CommandRequest struct {
	Device  Key
	Name    string
	ID      string // idempotency key, at most 64 bytes
	Args    map[string]json.RawMessage
	Timeout time.Duration
}
