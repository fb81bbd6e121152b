package v1alpha1

import (
	"encoding/json"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Group and Version of this API.
const (
	Group       = "devices.skerry.dev"
	APIVersion  = "v1alpha1"
	GroupAndVer = Group + "/" + APIVersion
)

// Resource names, lower-case plurals.
const (
	Devices     = "devices"           // namespaced
	Models      = "devicemodels"      // of the cluster
	Discoveries = "devicediscoveries" // namespaced
	Routes      = "telemetryroutes"   // namespaced
)

// JSON is a JSON value of any type, kept as it was written.
type JSON = apiextensionsv1.JSON

// DeviceModel tells what a kind of device can do and how it says so.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Cluster,categories=skerry,shortName=dm
// +kubebuilder:printcolumn:name="Profile",type=string,JSONPath=`.spec.profile`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type DeviceModel struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              DeviceModelSpec `json:"spec"`
}

// DeviceModelList is a list of DeviceModels.
//
// +kubebuilder:object:root=true
type DeviceModelList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []DeviceModel `json:"items"`
}

// DeviceModelSpec is a kind of device.
type DeviceModelSpec struct {
	// Profile is how the device speaks; one of Profiles.
	// +kubebuilder:validation:Enum=raw;json;zigbee2mqtt;tasmota;shelly2;homie5;homeassistant;sparkplugB;kubeedge;external
	Profile string `json:"profile"`
	// ProfileConfig is the profile's own; see package profile.
	// +kubebuilder:validation:MaxProperties=64
	ProfileConfig map[string]JSON `json:"profileConfig,omitempty"`
	// Params are what a Device tells of itself; ${name} stands for them in
	// topics and payloads.
	// +kubebuilder:validation:MaxItems=64
	// +listType=map
	// +listMapKey=name
	Params []Param `json:"params,omitempty"`
	// +kubebuilder:validation:MaxItems=256
	// +listType=map
	// +listMapKey=name
	Properties []Property `json:"properties"`
	// +kubebuilder:validation:MaxItems=64
	// +listType=map
	// +listMapKey=name
	Commands []Command `json:"commands,omitempty"`
	Liveness *Liveness `json:"liveness,omitempty"`
}

// Profiles, the values of DeviceModelSpec.Profile.
const (
	ProfileRaw           = "raw"
	ProfileJSON          = "json"
	ProfileZigbee2MQTT   = "zigbee2mqtt"
	ProfileTasmota       = "tasmota"
	ProfileShelly2       = "shelly2"
	ProfileHomie5        = "homie5"
	ProfileHomeAssistant = "homeassistant"
	ProfileSparkplugB    = "sparkplugB"
	ProfileKubeEdge      = "kubeedge"
	ProfileExternal      = "external"
)

// Param is one thing a Device tells of itself.
type Param struct {
	// +kubebuilder:validation:MaxLength=128
	// +kubebuilder:validation:Pattern=`^[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?$`
	Name     string `json:"name"`
	Required bool   `json:"required,omitempty"`
	// +kubebuilder:validation:MaxLength=1024
	Default string `json:"default,omitempty"`
}

// Types of a Property.
const (
	TypeBool    = "bool"
	TypeInt64   = "int64"
	TypeFloat64 = "float64"
	TypeString  = "string"
	TypeEnum    = "enum"
	TypeBytes   = "bytes"  // base64 in JSON
	TypeObject  = "object" // any JSON
)

// Property is one value of a device.
//
// +kubebuilder:validation:XValidation:rule="self.type != 'enum' || has(self.enum)",message="a property of type enum needs its enum"
// +kubebuilder:validation:XValidation:rule="!has(self.min) || !has(self.max) || self.min <= self.max",message="min is above max"
type Property struct {
	// +kubebuilder:validation:MaxLength=128
	// +kubebuilder:validation:Pattern=`^[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?$`
	Name string `json:"name"`
	// +kubebuilder:validation:MaxLength=1024
	Description string `json:"description,omitempty"`
	// +kubebuilder:validation:Enum=bool;int64;float64;string;enum;bytes;object
	Type string `json:"type"` // one of the Type constants
	// +kubebuilder:validation:MaxLength=32
	Unit string `json:"unit,omitempty"` // UCUM, for people
	// +kubebuilder:validation:Enum=r;w;rw
	Access string `json:"access"` // r, w or rw

	// +kubebuilder:validation:Schemaless
	// +kubebuilder:validation:Type=number
	Min json.Number `json:"min,omitempty"` // of numbers, inclusive
	// +kubebuilder:validation:Schemaless
	// +kubebuilder:validation:Type=number
	Max json.Number `json:"max,omitempty"`
	// +kubebuilder:validation:Schemaless
	// +kubebuilder:validation:Type=number
	Step json.Number `json:"step,omitempty"` // desired values are a multiple of it above Min (or 0)
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=65536
	MaxLength int `json:"maxLength,omitempty"` // of strings and bytes; bytes; default 1024, at most 65536
	// +kubebuilder:validation:MaxItems=128
	// +kubebuilder:validation:items:MaxLength=256
	// +listType=atomic
	Enum []string `json:"enum,omitempty"` // of type enum

	// Tolerance is how far reported may be from desired and still count as it.
	// +kubebuilder:validation:Minimum=0
	Tolerance float64 `json:"tolerance,omitempty"`
	// Authority settles a local override against the cloud's desired value:
	// cloud (default), edge or lww (the later by corrected time; a tie goes to
	// the cloud).
	// +kubebuilder:validation:Enum=cloud;edge;lww
	Authority     string         `json:"authority,omitempty"`
	LocalOverride *LocalOverride `json:"localOverride,omitempty"`
	// Promote: IfUnchanged lets the hub write an override into the spec, with a
	// field manager of its own, if the spec's value did not change meanwhile.
	// +kubebuilder:validation:Enum=IfUnchanged
	Promote string `json:"promote,omitempty"`

	// Map translates between the device's words (keys) and values.
	// +kubebuilder:validation:MaxProperties=128
	Map map[string]JSON `json:"map,omitempty"`
	// +kubebuilder:validation:MaxItems=16
	// +listType=atomic
	Read    []Read   `json:"read,omitempty"`
	Write   *Write   `json:"write,omitempty"`
	Refresh *Refresh `json:"refresh,omitempty"`

	// +optional
	Report Report `json:"report,omitzero"`
	// +kubebuilder:validation:MaxLength=253
	Telemetry string `json:"telemetry,omitempty"` // name of a TelemetryRoute of the Device's namespace
	// Metric has a numeric or boolean property shown on the hub's /metrics.
	Metric bool `json:"metric,omitempty"`
}

// Values of Property.Authority, and of Property.Promote.
const (
	AuthorityCloud     = "cloud"
	AuthorityEdge      = "edge"
	AuthorityLWW       = "lww"
	PromoteIfUnchanged = "IfUnchanged"
)

// LocalOverride is when the node itself may set what is desired.
type LocalOverride struct {
	// +kubebuilder:validation:Enum=never;offline;always
	When string `json:"when,omitempty"` // never, offline (default) or always
	// TTL is how long an override holds that names none; default 12h, at most
	// 720h.
	// +optional
	// +kubebuilder:validation:Schemaless
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=20
	// +kubebuilder:validation:Pattern=`^(0|([0-9]{1,9}(\.[0-9]{1,9})?(ns|us|ms|s)|[0-9]{1,6}(\.[0-9]{1,9})?(m|h))+)$`
	TTL metav1.Duration `json:"ttl,omitzero"`
}

// Read is one way to a property's value.
type Read struct {
	// +kubebuilder:validation:MaxLength=1024
	Topic string `json:"topic,omitempty"` // default: the profile's
	// +kubebuilder:validation:MaxLength=512
	Path string `json:"path,omitempty"` // dotted; empty: the whole payload
	// +kubebuilder:validation:MaxLength=512
	Metric string  `json:"metric,omitempty"` // sparkplugB
	TS     *TSPath `json:"ts,omitempty"`     // default: the profile's, else none
	// +kubebuilder:validation:MaxLength=2048
	When string `json:"when,omitempty"` // CEL over payload and topic; false: the message is not for this property
	// +kubebuilder:validation:MaxLength=2048
	Value  string  `json:"value,omitempty"` // CEL over payload and topic, in place of Path
	Scale  float64 `json:"scale,omitempty"` // value = raw*scale+offset; 0 means 1
	Offset float64 `json:"offset,omitempty"`
}

// TSPath is where a payload tells its time.
type TSPath struct {
	// +kubebuilder:validation:MaxLength=512
	Path string `json:"path"`
	// +kubebuilder:validation:Enum=s;ms;us;ns;rfc3339
	Unit string `json:"unit,omitempty"` // s, ms (default), us, ns or rfc3339
}

// Write is how a desired value or a command reaches the device.
type Write struct {
	// +kubebuilder:validation:MaxLength=1024
	Topic string `json:"topic,omitempty"` // default: the profile's
	// +kubebuilder:validation:MaxLength=16384
	Payload string `json:"payload,omitempty"` // default: the profile's, else ${value}
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=2
	QoS    *int32 `json:"qos,omitempty"` // 0, 1 (default) or 2
	Retain bool   `json:"retain,omitempty"`
	// +kubebuilder:validation:MaxLength=512
	Metric string `json:"metric,omitempty"` // sparkplugB
	Reply  *Reply `json:"reply,omitempty"`
}

// Reply is how the device answers a Write.
type Reply struct {
	// +kubebuilder:validation:MaxLength=1024
	Topic string `json:"topic"`
	// +kubebuilder:validation:MaxLength=512
	Correlate string `json:"correlate,omitempty"` // path of ${cmdSeq} in the answer
	// +kubebuilder:validation:MaxLength=512
	Error string `json:"error,omitempty"` // path; present and not null: refused
	// +optional
	// +kubebuilder:validation:Schemaless
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=20
	// +kubebuilder:validation:Pattern=`^(0|([0-9]{1,9}(\.[0-9]{1,9})?(ns|us|ms|s)|[0-9]{1,6}(\.[0-9]{1,9})?(m|h))+)$`
	Timeout metav1.Duration `json:"timeout,omitzero"` // default 10s, 1s to 300s
}

// Refresh asks the device for its value.
type Refresh struct {
	// +kubebuilder:validation:MaxLength=1024
	Topic string `json:"topic,omitempty"` // default: the profile's
	// +kubebuilder:validation:MaxLength=16384
	Payload string `json:"payload,omitempty"`
	// +kubebuilder:validation:MaxItems=2
	// +kubebuilder:validation:items:Enum=online;edgeStart
	// +listType=atomic
	On []string `json:"at,omitempty"` // online, edgeStart; default both. Not "on": YAML takes that for true
	// +optional
	// +kubebuilder:validation:Schemaless
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=20
	// +kubebuilder:validation:Pattern=`^(0|([0-9]{1,9}(\.[0-9]{1,9})?(ns|us|ms|s)|[0-9]{1,6}(\.[0-9]{1,9})?(m|h))+)$`
	Interval metav1.Duration `json:"interval,omitzero"`
}

// Report is when a change of the value is worth telling.
type Report struct {
	// +kubebuilder:validation:Minimum=0
	Deadband float64 `json:"deadband,omitempty"` // smaller changes are not reported
	// +optional
	// +kubebuilder:validation:Schemaless
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=20
	// +kubebuilder:validation:Pattern=`^(0|([0-9]{1,9}(\.[0-9]{1,9})?(ns|us|ms|s)|[0-9]{1,6}(\.[0-9]{1,9})?(m|h))+)$`
	MinInterval metav1.Duration `json:"minInterval,omitzero"` // between two reports upwards
	Status      *bool           `json:"status,omitempty"`     // in the Device's status; default true
}

// Command is something a device does, beyond having properties.
type Command struct {
	// +kubebuilder:validation:MaxLength=128
	// +kubebuilder:validation:Pattern=`^[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?$`
	Name  string `json:"name"`
	Write Write  `json:"write"`
	// +kubebuilder:validation:MaxItems=32
	// +listType=map
	// +listMapKey=name
	Params []CommandParam `json:"params,omitempty"`
	// +optional
	// +kubebuilder:validation:Schemaless
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=20
	// +kubebuilder:validation:Pattern=`^(0|([0-9]{1,9}(\.[0-9]{1,9})?(ns|us|ms|s)|[0-9]{1,6}(\.[0-9]{1,9})?(m|h))+)$`
	Timeout metav1.Duration `json:"timeout,omitzero"` // default 10s, 1s to 300s
	// +kubebuilder:validation:Enum=online;queue
	Delivery string `json:"delivery,omitempty"` // online (default) or queue
	// +optional
	// +kubebuilder:validation:Schemaless
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=20
	// +kubebuilder:validation:Pattern=`^(0|([0-9]{1,9}(\.[0-9]{1,9})?(ns|us|ms|s)|[0-9]{1,6}(\.[0-9]{1,9})?(m|h))+)$`
	TTL        metav1.Duration `json:"ttl,omitzero"` // of a queued one; default 10m
	Idempotent bool            `json:"idempotent,omitempty"`
	// Reflect is property==value: what to see for the command to have
	// succeeded where the device does not answer.
	// +kubebuilder:validation:MaxLength=512
	Reflect string `json:"reflect,omitempty"`
}

// CommandParam is an argument of a Command, ${name} in its payload.
type CommandParam struct {
	// +kubebuilder:validation:MaxLength=128
	// +kubebuilder:validation:Pattern=`^[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?$`
	Name string `json:"name"`
	// +kubebuilder:validation:Enum=bool;int64;float64;string;enum;bytes;object
	Type     string `json:"type"`
	Required bool   `json:"required,omitempty"`
	// +kubebuilder:validation:Schemaless
	// +kubebuilder:validation:Type=number
	Min json.Number `json:"min,omitempty"`
	// +kubebuilder:validation:Schemaless
	// +kubebuilder:validation:Type=number
	Max json.Number `json:"max,omitempty"`
	// +kubebuilder:validation:MaxItems=128
	// +kubebuilder:validation:items:MaxLength=256
	// +listType=atomic
	Enum []string `json:"enum,omitempty"`
}

// Liveness is how a device is known to be there.
type Liveness struct {
	Availability *Availability `json:"availability,omitempty"` // default: the profile's
	// Parent's being offline makes the device offline.
	Parent *Availability `json:"parent,omitempty"`
	// ExpectedInterval between messages; the device is stale after 2.5 times
	// that. Zero: never by time.
	// +optional
	// +kubebuilder:validation:Schemaless
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=20
	// +kubebuilder:validation:Pattern=`^(0|([0-9]{1,9}(\.[0-9]{1,9})?(ns|us|ms|s)|[0-9]{1,6}(\.[0-9]{1,9})?(m|h))+)$`
	ExpectedInterval metav1.Duration `json:"expectedInterval,omitzero"`
	// Sleepy devices are asleep, not offline, between messages.
	Sleepy bool `json:"sleepy,omitempty"`
}

// Availability is a topic that tells whether something is there.
type Availability struct {
	// +kubebuilder:validation:MaxLength=1024
	Topic string `json:"topic"`
	// +kubebuilder:validation:MaxLength=512
	Path string `json:"path,omitempty"`
	// +kubebuilder:validation:MaxLength=256
	Online string `json:"online,omitempty"` // default online
	// +kubebuilder:validation:MaxLength=256
	Offline string `json:"offline,omitempty"` // default offline
}

// Device is one device on one node.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Namespaced,categories=skerry,shortName=dev
// +kubebuilder:printcolumn:name="Phase",type=string,JSONPath=`.status.phase`
// +kubebuilder:printcolumn:name="Last seen",type=date,JSONPath=`.status.lastSeenTime`
// +kubebuilder:printcolumn:name="Values",type=string,JSONPath=`.status.summary`
// +kubebuilder:printcolumn:name="Synced",type=string,JSONPath=`.status.conditions[?(@.type=="DesiredSynced")].status`
// +kubebuilder:printcolumn:name="Node",type=string,JSONPath=`.spec.nodeName`
// +kubebuilder:printcolumn:name="Model",type=string,JSONPath=`.spec.modelRef.name`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Reason",type=string,priority=1,JSONPath=`.status.phaseReason`
type Device struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              DeviceSpec `json:"spec"`
	// +optional
	Status DeviceStatus `json:"status,omitzero"`
}

// DeviceList is a list of Devices.
//
// +kubebuilder:object:root=true
type DeviceList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Device `json:"items"`
}

// DeviceSpec is where the device is and what is wanted of it. Nodes never
// write it.
type DeviceSpec struct {
	ModelRef ModelRef `json:"modelRef"`
	// +kubebuilder:validation:MaxLength=253
	NodeName string `json:"nodeName,omitempty"`
	// +kubebuilder:validation:MaxProperties=64
	Params map[string]string `json:"params,omitempty"`
	// +kubebuilder:validation:MaxProperties=256
	Desired map[string]JSON `json:"desired,omitempty"` // by property
	// CredentialsSecret names a Secret of the namespace with the keys username
	// and password, or certificate, by which the device is known to the broker.
	// +kubebuilder:validation:MaxLength=253
	CredentialsSecret string `json:"credentialsSecret,omitempty"`
}

// ModelRef names a DeviceModel.
type ModelRef struct {
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name"`
}

// Phases of a Device, from its liveness.
const (
	PhaseOnline   = "Online"
	PhaseOffline  = "Offline"
	PhaseSleeping = "Sleeping"
	PhaseStale    = "Stale"
	PhaseUnknown  = "Unknown"
)

// Condition types of a Device.
const (
	ConditionDesiredSynced = "DesiredSynced" // the device has what is desired
	ConditionDesiredValid  = "DesiredValid"  // the model allows what is desired
	ConditionNodeConnected = "NodeConnected" // what is shown is live
)

// DeviceStatus is what was last known, coalesced; live values are at the hub's
// /v1/twins.
type DeviceStatus struct {
	ObservedGeneration int64             `json:"observedGeneration,omitempty"` // on the node's disk
	ReportedVersion    string            `json:"reportedVersion,omitempty"`    // a Version
	Phase              string            `json:"phase,omitempty"`
	PhaseReason        string            `json:"phaseReason,omitempty"`
	Summary            string            `json:"summary,omitempty"` // key values, for kubectl get
	LastSeenTime       *metav1.MicroTime `json:"lastSeenTime,omitempty"`
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// +kubebuilder:validation:MaxItems=256
	// +listType=map
	// +listMapKey=name
	Properties []PropertyStatus `json:"properties,omitempty"`
	// +kubebuilder:validation:MaxItems=256
	// +listType=map
	// +listMapKey=name
	Overrides []OverrideStatus `json:"overrides,omitempty"`
}

// Qualities of a value.
const (
	QualityGood      = "good"
	QualityUncertain = "uncertain" // its time is not known
	QualityStale     = "stale"     // from before a restart, or of a device that is not heard
	QualityBad       = "bad"       // the last reading could not be used; the value is the last good one
)

// States of a desired value on its way.
const (
	DesiredPending    = "pending"
	DesiredSent       = "sent"
	DesiredApplied    = "applied"
	DesiredRejected   = "rejected"
	DesiredTimeout    = "timeout"
	DesiredOverridden = "overridden"
	DesiredInvalid    = "invalid"
)

// PropertyStatus is one reported value.
type PropertyStatus struct {
	Name         string            `json:"name"`
	Value        *JSON             `json:"value,omitempty"`
	Truncated    bool              `json:"truncated,omitempty"` // beyond 256 bytes
	TS           *metav1.MicroTime `json:"ts,omitempty"`
	Quality      string            `json:"q,omitempty"`
	DesiredState string            `json:"desiredState,omitempty"`
	Message      string            `json:"message,omitempty"`
}

// OverrideStatus is a desired value set on the node.
type OverrideStatus struct {
	Name    string           `json:"name"`
	Value   JSON             `json:"value"`
	By      string           `json:"by"`
	BaseGen int64            `json:"baseGeneration"`
	Since   metav1.MicroTime `json:"since"`
	Expires metav1.MicroTime `json:"expires"`
}

// DeviceDiscovery turns what announces itself on nodes into Devices.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:path=devicediscoveries,scope=Namespaced,categories=skerry,shortName=dd
// +kubebuilder:printcolumn:name="Profile",type=string,JSONPath=`.spec.source.profile`
// +kubebuilder:printcolumn:name="Mode",type=string,JSONPath=`.spec.mode`
// +kubebuilder:printcolumn:name="Found",type=integer,JSONPath=`.status.found`
// +kubebuilder:printcolumn:name="Created",type=integer,JSONPath=`.status.created`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type DeviceDiscovery struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              DeviceDiscoverySpec `json:"spec"`
	// +optional
	Status DeviceDiscoveryStatus `json:"status,omitzero"`
}

// DeviceDiscoveryList is a list of DeviceDiscoveries.
//
// +kubebuilder:object:root=true
type DeviceDiscoveryList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []DeviceDiscovery `json:"items"`
}

// DeviceDiscoverySpec is where to look and what to make of what is found.
type DeviceDiscoverySpec struct {
	// +kubebuilder:validation:MaxProperties=32
	NodeSelector map[string]string `json:"nodeSelector,omitempty"` // labels of Nodes
	Source       DiscoverySource   `json:"source"`
	// +kubebuilder:validation:MaxProperties=32
	Match map[string][]string `json:"match,omitempty"` // by attribute of a candidate; * stands for any text
	// +kubebuilder:validation:MaxProperties=32
	Block map[string][]string `json:"block,omitempty"` // after Match
	// +kubebuilder:validation:Enum=Suggest;Create
	Mode string `json:"mode,omitempty"` // Suggest (default) or Create
	// +optional
	Template DiscoveryTemplate `json:"template,omitzero"`
	// +optional
	Limits DiscoveryLimits `json:"limits,omitzero"`
}

// Modes of a DeviceDiscovery.
const (
	DiscoverySuggest = "Suggest"
	DiscoveryCreate  = "Create"
)

// DiscoverySource is a profile's announcements.
type DiscoverySource struct {
	// +kubebuilder:validation:Enum=raw;json;zigbee2mqtt;tasmota;shelly2;homie5;homeassistant;sparkplugB;kubeedge;external
	Profile string `json:"profile"`
	// +kubebuilder:validation:MaxProperties=64
	Params map[string]string `json:"params,omitempty"`
}

// DiscoveryTemplate is what a Device made from a candidate has.
type DiscoveryTemplate struct {
	// +optional
	ModelRef ModelRef `json:"modelRef,omitzero"`
	// +kubebuilder:validation:MaxProperties=32
	Labels map[string]string `json:"labels,omitempty"`
}

// DiscoveryLimits keep a flood of announcements from becoming one of objects.
type DiscoveryLimits struct {
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=500
	MaxDevices int `json:"maxDevices,omitempty"` // default 200, at most 500 per node
	// +optional
	// +kubebuilder:validation:Schemaless
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=20
	// +kubebuilder:validation:Pattern=`^(0|([0-9]{1,9}(\.[0-9]{1,9})?(ns|us|ms|s)|[0-9]{1,6}(\.[0-9]{1,9})?(m|h))+)$`
	AbsentFor metav1.Duration `json:"absentFor,omitzero"` // after which a Device this object made is deleted; default 168h
}

// DeviceDiscoveryStatus is what was found.
type DeviceDiscoveryStatus struct {
	// +kubebuilder:validation:MaxItems=500
	// +listType=atomic
	Candidates []Candidate `json:"candidates,omitempty"`
	Found      int         `json:"found,omitempty"`
	Created    int         `json:"created,omitempty"`
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// Candidate is a device that announced itself.
type Candidate struct {
	Name       string            `json:"name"` // profile-slug-hash6, the same at every sight
	Node       string            `json:"node"`
	Attributes map[string]string `json:"attributes,omitempty"`
	Params     map[string]string `json:"params,omitempty"`
	Device     string            `json:"device,omitempty"` // of the Device made from it
	LastSeen   metav1.Time       `json:"lastSeen"`
}

// TelemetryRoute is where readings go, beyond the twin.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Namespaced,categories=skerry,shortName=tr
// +kubebuilder:printcolumn:name="Capture",type=string,JSONPath=`.spec.capture`
// +kubebuilder:printcolumn:name="Lane",type=string,JSONPath=`.spec.lane`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type TelemetryRoute struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              TelemetryRouteSpec `json:"spec"`
	// +optional
	Status TelemetryRouteStatus `json:"status,omitzero"`
}

// TelemetryRouteList is a list of TelemetryRoutes.
//
// +kubebuilder:object:root=true
type TelemetryRouteList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []TelemetryRoute `json:"items"`
}

// TelemetryRouteSpec is what a route carries, how it is kept and where it goes.
type TelemetryRouteSpec struct {
	// +optional
	From RouteSource `json:"from,omitzero"`
	// +kubebuilder:validation:Enum=async;sync
	Capture string `json:"capture,omitempty"` // async (default: at most 200 ms are lost with the power) or sync (on disk before the PUBACK)
	// +kubebuilder:validation:Enum=normal;alarm
	Lane string `json:"lane,omitempty"` // normal (default) or alarm
	// +optional
	Buffer RouteBuffer `json:"buffer,omitzero"`
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=8
	// +listType=atomic
	To []RouteSink `json:"to"`
}

// RouteSource is what a route carries, besides what names it.
type RouteSource struct {
	DeviceSelector *metav1.LabelSelector `json:"deviceSelector,omitempty"`
	// +kubebuilder:validation:MaxItems=256
	// +listType=atomic
	Properties []string `json:"properties,omitempty"`
	// +kubebuilder:validation:MaxItems=64
	// +listType=atomic
	Topics []string `json:"topics,omitempty"` // MQTT filters, payloads as they are
}

// RouteBuffer bounds what waits for its way up.
type RouteBuffer struct {
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:Pattern=`^[0-9]+([KMG]i?|k)?$`
	MaxBytes string `json:"maxBytes,omitempty"` // a quantity; default 256Mi
	// +optional
	// +kubebuilder:validation:Schemaless
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=20
	// +kubebuilder:validation:Pattern=`^(0|([0-9]{1,9}(\.[0-9]{1,9})?(ns|us|ms|s)|[0-9]{1,6}(\.[0-9]{1,9})?(m|h))+)$`
	MaxAge metav1.Duration `json:"maxAge,omitzero"` // default 72h
	// +kubebuilder:validation:Enum=dropOldest;dropNewest;thin
	Policy string `json:"policy,omitempty"` // dropOldest (default), dropNewest or thin
}

// RouteSink is one end of a route. Exactly one field is set.
//
// +kubebuilder:validation:XValidation:rule="[has(self.hub), has(self.mqtt), has(self.webhook), has(self.remoteWrite)].filter(x, x).size() == 1",message="exactly one of hub, mqtt, webhook and remoteWrite is to be set"
type RouteSink struct {
	Hub         *HubSink         `json:"hub,omitempty"`
	MQTT        *MQTTSink        `json:"mqtt,omitempty"`
	Webhook     *WebhookSink     `json:"webhook,omitempty"`
	RemoteWrite *RemoteWriteSink `json:"remoteWrite,omitempty"`
}

// HubSink ends at the hub, which sends on to the one sink it names. From there
// on the URL is reached by the hub and not by the node.
//
// +kubebuilder:validation:XValidation:rule="[has(self.mqtt), has(self.webhook), has(self.remoteWrite)].filter(x, x).size() == 1",message="exactly one of mqtt, webhook and remoteWrite is to be set"
type HubSink struct {
	MQTT        *MQTTSink        `json:"mqtt,omitempty"`
	Webhook     *WebhookSink     `json:"webhook,omitempty"`
	RemoteWrite *RemoteWriteSink `json:"remoteWrite,omitempty"`
}

// MQTTSink publishes each record.
type MQTTSink struct {
	// +kubebuilder:validation:MaxLength=2048
	// +kubebuilder:validation:Pattern=`^mqtts?://.+`
	URL string `json:"url"` // mqtt://, mqtts://
	// +kubebuilder:validation:MaxLength=1024
	Topic string `json:"topic"` // ${node}, ${namespace}, ${device}, ${property}, ${route}
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=2
	QoS       *int32     `json:"qos,omitempty"`
	SecretRef *SecretRef `json:"secretRef,omitempty"` // username, password, ca.crt, tls.crt, tls.key
}

// WebhookSink posts batches of JSON lines.
type WebhookSink struct {
	// +kubebuilder:validation:MaxLength=2048
	// +kubebuilder:validation:Pattern=`^https?://.+`
	URL       string     `json:"url"`
	SecretRef *SecretRef `json:"secretRef,omitempty"` // token, ca.crt, tls.crt, tls.key
}

// RemoteWriteSink speaks Prometheus remote write 1.0.
type RemoteWriteSink struct {
	// +kubebuilder:validation:MaxLength=2048
	// +kubebuilder:validation:Pattern=`^https?://.+`
	URL       string     `json:"url"`
	SecretRef *SecretRef `json:"secretRef,omitempty"` // token, or username and password; ca.crt, tls.crt, tls.key
}

// SecretRef names a Secret of the same namespace.
type SecretRef struct {
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name"`
}

// TelemetryRouteStatus is how a route does, over all nodes.
type TelemetryRouteStatus struct {
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}
