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
type DeviceModel struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              DeviceModelSpec `json:"spec"`
}

// DeviceModelList is a list of DeviceModels.
type DeviceModelList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []DeviceModel `json:"items"`
}

// DeviceModelSpec is a kind of device.
type DeviceModelSpec struct {
	// Profile is how the device speaks; one of Profiles.
	Profile string `json:"profile"`
	// ProfileConfig is the profile's own; see package profile.
	ProfileConfig map[string]JSON `json:"profileConfig,omitempty"`
	// Params are what a Device tells of itself; ${name} stands for them in
	// topics and payloads.
	Params     []Param    `json:"params,omitempty"`
	Properties []Property `json:"properties"`
	Commands   []Command  `json:"commands,omitempty"`
	Liveness   *Liveness  `json:"liveness,omitempty"`
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
	Name     string `json:"name"`
	Required bool   `json:"required,omitempty"`
	Default  string `json:"default,omitempty"`
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
type Property struct {
	Name        string `json:"name"`
	Description string `json:"description,omitempty"`
	Type        string `json:"type"`           // one of the Type constants
	Unit        string `json:"unit,omitempty"` // UCUM, for people
	Access      string `json:"access"`         // r, w or rw

	Min       json.Number `json:"min,omitempty"` // of numbers, inclusive
	Max       json.Number `json:"max,omitempty"`
	Step      json.Number `json:"step,omitempty"`      // desired values are a multiple of it above Min (or 0)
	MaxLength int         `json:"maxLength,omitempty"` // of strings and bytes; bytes; default 1024, at most 65536
	Enum      []string    `json:"enum,omitempty"`      // of type enum

	// Tolerance is how far reported may be from desired and still count as it.
	Tolerance float64 `json:"tolerance,omitempty"`
	// Authority settles a local override against the cloud's desired value:
	// cloud (default), edge or lww (the later by corrected time; a tie goes to
	// the cloud).
	Authority     string         `json:"authority,omitempty"`
	LocalOverride *LocalOverride `json:"localOverride,omitempty"`
	// Promote: IfUnchanged lets the hub write an override into the spec, with a
	// field manager of its own, if the spec's value did not change meanwhile.
	Promote string `json:"promote,omitempty"`

	// Map translates between the device's words (keys) and values.
	Map     map[string]JSON `json:"map,omitempty"`
	Read    []Read          `json:"read,omitempty"`
	Write   *Write          `json:"write,omitempty"`
	Refresh *Refresh        `json:"refresh,omitempty"`

	Report    Report `json:"report,omitempty"`
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
	When string `json:"when,omitempty"` // never, offline (default) or always
	// TTL is how long an override holds that names none; default 12h, at most
	// 720h.
	TTL metav1.Duration `json:"ttl,omitempty"`
}

// Read is one way to a property's value.
type Read struct {
	Topic  string  `json:"topic,omitempty"`  // default: the profile's
	Path   string  `json:"path,omitempty"`   // dotted; empty: the whole payload
	Metric string  `json:"metric,omitempty"` // sparkplugB
	TS     *TSPath `json:"ts,omitempty"`     // default: the profile's, else none
	When   string  `json:"when,omitempty"`   // CEL over payload and topic; false: the message is not for this property
	Value  string  `json:"value,omitempty"`  // CEL over payload and topic, in place of Path
	Scale  float64 `json:"scale,omitempty"`  // value = raw*scale+offset; 0 means 1
	Offset float64 `json:"offset,omitempty"`
}

// TSPath is where a payload tells its time.
type TSPath struct {
	Path string `json:"path"`
	Unit string `json:"unit,omitempty"` // s, ms (default), us, ns or rfc3339
}

// Write is how a desired value or a command reaches the device.
type Write struct {
	Topic   string `json:"topic,omitempty"`   // default: the profile's
	Payload string `json:"payload,omitempty"` // default: the profile's, else ${value}
	QoS     *int32 `json:"qos,omitempty"`     // 0, 1 (default) or 2
	Retain  bool   `json:"retain,omitempty"`
	Metric  string `json:"metric,omitempty"` // sparkplugB
	Reply   *Reply `json:"reply,omitempty"`
}

// Reply is how the device answers a Write.
type Reply struct {
	Topic     string          `json:"topic"`
	Correlate string          `json:"correlate,omitempty"` // path of ${cmdSeq} in the answer
	Error     string          `json:"error,omitempty"`     // path; present and not null: refused
	Timeout   metav1.Duration `json:"timeout,omitempty"`   // default 10s, 1s to 300s
}

// Refresh asks the device for its value.
type Refresh struct {
	Topic    string          `json:"topic,omitempty"` // default: the profile's
	Payload  string          `json:"payload,omitempty"`
	On       []string        `json:"on,omitempty"` // online, edgeStart; default both
	Interval metav1.Duration `json:"interval,omitempty"`
}

// Report is when a change of the value is worth telling.
type Report struct {
	Deadband    float64         `json:"deadband,omitempty"`    // smaller changes are not reported
	MinInterval metav1.Duration `json:"minInterval,omitempty"` // between two reports upwards
	Status      *bool           `json:"status,omitempty"`      // in the Device's status; default true
}

// Command is something a device does, beyond having properties.
type Command struct {
	Name       string          `json:"name"`
	Write      Write           `json:"write"`
	Params     []CommandParam  `json:"params,omitempty"`
	Timeout    metav1.Duration `json:"timeout,omitempty"`  // default 10s, 1s to 300s
	Delivery   string          `json:"delivery,omitempty"` // online (default) or queue
	TTL        metav1.Duration `json:"ttl,omitempty"`      // of a queued one; default 10m
	Idempotent bool            `json:"idempotent,omitempty"`
	// Reflect is property==value: what to see for the command to have
	// succeeded where the device does not answer.
	Reflect string `json:"reflect,omitempty"`
}

// CommandParam is an argument of a Command, ${name} in its payload.
type CommandParam struct {
	Name     string      `json:"name"`
	Type     string      `json:"type"`
	Required bool        `json:"required,omitempty"`
	Min      json.Number `json:"min,omitempty"`
	Max      json.Number `json:"max,omitempty"`
	Enum     []string    `json:"enum,omitempty"`
}

// Liveness is how a device is known to be there.
type Liveness struct {
	Availability *Availability `json:"availability,omitempty"` // default: the profile's
	// Parent's being offline makes the device offline.
	Parent *Availability `json:"parent,omitempty"`
	// ExpectedInterval between messages; the device is stale after 2.5 times
	// that. Zero: never by time.
	ExpectedInterval metav1.Duration `json:"expectedInterval,omitempty"`
	// Sleepy devices are asleep, not offline, between messages.
	Sleepy bool `json:"sleepy,omitempty"`
}

// Availability is a topic that tells whether something is there.
type Availability struct {
	Topic   string `json:"topic"`
	Path    string `json:"path,omitempty"`
	Online  string `json:"online,omitempty"`  // default online
	Offline string `json:"offline,omitempty"` // default offline
}

// Device is one device on one node.
type Device struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              DeviceSpec   `json:"spec"`
	Status            DeviceStatus `json:"status,omitempty"`
}

// DeviceList is a list of Devices.
type DeviceList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Device `json:"items"`
}

// DeviceSpec is where the device is and what is wanted of it. Nodes never
// write it.
type DeviceSpec struct {
	ModelRef ModelRef          `json:"modelRef"`
	NodeName string            `json:"nodeName,omitempty"`
	Params   map[string]string `json:"params,omitempty"`
	Desired  map[string]JSON   `json:"desired,omitempty"` // by property
	// CredentialsSecret names a Secret of the namespace with the keys username
	// and password, or certificate, by which the device is known to the broker.
	CredentialsSecret string `json:"credentialsSecret,omitempty"`
}

// ModelRef names a DeviceModel.
type ModelRef struct {
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
	ObservedGeneration int64              `json:"observedGeneration,omitempty"` // on the node's disk
	ReportedVersion    string             `json:"reportedVersion,omitempty"`    // a Version
	Phase              string             `json:"phase,omitempty"`
	PhaseReason        string             `json:"phaseReason,omitempty"`
	Summary            string             `json:"summary,omitempty"` // key values, for kubectl get
	LastSeenTime       *metav1.MicroTime  `json:"lastSeenTime,omitempty"`
	Conditions         []metav1.Condition `json:"conditions,omitempty"`
	Properties         []PropertyStatus   `json:"properties,omitempty"`
	Overrides          []OverrideStatus   `json:"overrides,omitempty"`
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
type DeviceDiscovery struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              DeviceDiscoverySpec   `json:"spec"`
	Status            DeviceDiscoveryStatus `json:"status,omitempty"`
}

// DeviceDiscoveryList is a list of DeviceDiscoveries.
type DeviceDiscoveryList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []DeviceDiscovery `json:"items"`
}

// DeviceDiscoverySpec is where to look and what to make of what is found.
type DeviceDiscoverySpec struct {
	NodeSelector map[string]string   `json:"nodeSelector,omitempty"` // labels of Nodes
	Source       DiscoverySource     `json:"source"`
	Match        map[string][]string `json:"match,omitempty"` // by attribute of a candidate; * stands for any text
	Block        map[string][]string `json:"block,omitempty"` // after Match
	Mode         string              `json:"mode,omitempty"`  // Suggest (default) or Create
	Template     DiscoveryTemplate   `json:"template,omitempty"`
	Limits       DiscoveryLimits     `json:"limits,omitempty"`
}

// Modes of a DeviceDiscovery.
const (
	DiscoverySuggest = "Suggest"
	DiscoveryCreate  = "Create"
)

// DiscoverySource is a profile's announcements.
type DiscoverySource struct {
	Profile string            `json:"profile"`
	Params  map[string]string `json:"params,omitempty"`
}

// DiscoveryTemplate is what a Device made from a candidate has.
type DiscoveryTemplate struct {
	ModelRef ModelRef          `json:"modelRef,omitempty"`
	Labels   map[string]string `json:"labels,omitempty"`
}

// DiscoveryLimits keep a flood of announcements from becoming one of objects.
type DiscoveryLimits struct {
	MaxDevices int             `json:"maxDevices,omitempty"` // default 200, at most 500 per node
	AbsentFor  metav1.Duration `json:"absentFor,omitempty"`  // after which a Device this object made is deleted; default 168h
}

// DeviceDiscoveryStatus is what was found.
type DeviceDiscoveryStatus struct {
	Candidates []Candidate        `json:"candidates,omitempty"`
	Found      int                `json:"found,omitempty"`
	Created    int                `json:"created,omitempty"`
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
type TelemetryRoute struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              TelemetryRouteSpec   `json:"spec"`
	Status            TelemetryRouteStatus `json:"status,omitempty"`
}

// TelemetryRouteList is a list of TelemetryRoutes.
type TelemetryRouteList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []TelemetryRoute `json:"items"`
}

// TelemetryRouteSpec is what a route carries, how it is kept and where it goes.
type TelemetryRouteSpec struct {
	From    RouteSource `json:"from,omitempty"`
	Capture string      `json:"capture,omitempty"` // async (default: at most 200 ms are lost with the power) or sync (on disk before the PUBACK)
	Lane    string      `json:"lane,omitempty"`    // normal (default) or alarm
	Buffer  RouteBuffer `json:"buffer,omitempty"`
	To      []RouteSink `json:"to"`
}

// RouteSource is what a route carries, besides what names it.
type RouteSource struct {
	DeviceSelector *metav1.LabelSelector `json:"deviceSelector,omitempty"`
	Properties     []string              `json:"properties,omitempty"`
	Topics         []string              `json:"topics,omitempty"` // MQTT filters, payloads as they are
}

// RouteBuffer bounds what waits for its way up.
type RouteBuffer struct {
	MaxBytes string          `json:"maxBytes,omitempty"` // a quantity; default 256Mi
	MaxAge   metav1.Duration `json:"maxAge,omitempty"`   // default 72h
	Policy   string          `json:"policy,omitempty"`   // dropOldest (default), dropNewest or thin
}

// RouteSink is one end of a route. Exactly one field is set.
type RouteSink struct {
	Hub         *HubSink         `json:"hub,omitempty"`
	MQTT        *MQTTSink        `json:"mqtt,omitempty"`
	Webhook     *WebhookSink     `json:"webhook,omitempty"`
	RemoteWrite *RemoteWriteSink `json:"remoteWrite,omitempty"`
}

// HubSink ends at the hub, which sends on to the one sink it names. From there
// on the URL is reached by the hub and not by the node.
type HubSink struct {
	MQTT        *MQTTSink        `json:"mqtt,omitempty"`
	Webhook     *WebhookSink     `json:"webhook,omitempty"`
	RemoteWrite *RemoteWriteSink `json:"remoteWrite,omitempty"`
}

// MQTTSink publishes each record.
type MQTTSink struct {
	URL       string     `json:"url"`   // mqtt://, mqtts://
	Topic     string     `json:"topic"` // ${node}, ${namespace}, ${device}, ${property}, ${route}
	QoS       *int32     `json:"qos,omitempty"`
	SecretRef *SecretRef `json:"secretRef,omitempty"` // username, password, ca.crt, tls.crt, tls.key
}

// WebhookSink posts batches of JSON lines.
type WebhookSink struct {
	URL       string     `json:"url"`
	SecretRef *SecretRef `json:"secretRef,omitempty"` // token, ca.crt, tls.crt, tls.key
}

// RemoteWriteSink speaks Prometheus remote write 1.0.
type RemoteWriteSink struct {
	URL       string     `json:"url"`
	SecretRef *SecretRef `json:"secretRef,omitempty"` // token, or username and password; ca.crt, tls.crt, tls.key
}

// SecretRef names a Secret of the same namespace.
type SecretRef struct {
	Name string `json:"name"`
}

// TelemetryRouteStatus is how a route does, over all nodes.
type TelemetryRouteStatus struct {
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}
