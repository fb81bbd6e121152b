package migrate

import "encoding/json"

// The parts of devices.kubeedge.io that are read. Names are KubeEdge's.

type object struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Metadata   meta   `json:"metadata"`
}

type meta struct {
	Name        string            `json:"name"`
	Namespace   string            `json:"namespace"`
	Labels      map[string]string `json:"labels"`
	Annotations map[string]string `json:"annotations"`

	Finalizers      []string          `json:"finalizers"`
	OwnerReferences []json.RawMessage `json:"ownerReferences"`

	// What the API server writes; it writes its own.
	GenerateName               string          `json:"generateName"`
	SelfLink                   string          `json:"selfLink"`
	UID                        string          `json:"uid"`
	ResourceVersion            string          `json:"resourceVersion"`
	Generation                 int64           `json:"generation"`
	CreationTimestamp          json.RawMessage `json:"creationTimestamp"`
	DeletionTimestamp          json.RawMessage `json:"deletionTimestamp"`
	DeletionGracePeriodSeconds json.RawMessage `json:"deletionGracePeriodSeconds"`
	ManagedFields              json.RawMessage `json:"managedFields"`
}

type modelV1beta1 struct {
	object `json:",inline"`
	Spec   struct {
		Properties []modelProperty `json:"properties"`
		Protocol   string          `json:"protocol"`
	} `json:"spec"`
}

type modelProperty struct {
	Name        string `json:"name"`
	Description string `json:"description"`
	Type        string `json:"type"`
	AccessMode  string `json:"accessMode"`
	Minimum     string `json:"minimum"`
	Maximum     string `json:"maximum"`
	Unit        string `json:"unit"`
}

type deviceV1beta1 struct {
	object `json:",inline"`
	Spec   deviceSpec   `json:"spec"`
	Status deviceStatus `json:"status"`
}

type deviceSpec struct {
	DeviceModelRef struct {
		Name string `json:"name"`
	} `json:"deviceModelRef"`
	NodeName   string           `json:"nodeName"`
	Properties []deviceProperty `json:"properties"`
	Protocol   protocol         `json:"protocol"`
	Methods    []method         `json:"methods"`
}

type protocol struct {
	ProtocolName string                     `json:"protocolName"`
	ConfigData   map[string]json.RawMessage `json:"configData"`
}

type deviceProperty struct {
	Name          string       `json:"name"`
	Desired       twinProperty `json:"desired"`
	Visitors      protocol     `json:"visitors"`
	ReportCycle   int64        `json:"reportCycle"`
	CollectCycle  int64        `json:"collectCycle"`
	ReportToCloud bool         `json:"reportToCloud"`
	PushMethod    *pushMethod  `json:"pushMethod"`
}

type twinProperty struct {
	Value    string            `json:"value"`
	Metadata map[string]string `json:"metadata"`
}

type method struct {
	Name          string   `json:"name"`
	Description   string   `json:"description"`
	PropertyNames []string `json:"propertyNames"`
}

type pushMethod struct {
	HTTP *struct {
		HostName    string `json:"hostName"`
		Port        int64  `json:"port"`
		RequestPath string `json:"requestPath"`
		Timeout     int64  `json:"timeout"`
	} `json:"http"`
	MQTT *struct {
		Address  string `json:"address"`
		Topic    string `json:"topic"`
		QoS      int32  `json:"qos"`
		Retained bool   `json:"retained"`
	} `json:"mqtt"`
	OTEL *struct {
		EndpointURL string `json:"endpointURL"`
	} `json:"otel"`
	DBMethod map[string]json.RawMessage `json:"dbMethod"`
}

type deviceStatus struct {
	Twins []struct {
		PropertyName    string       `json:"propertyName"`
		Reported        twinProperty `json:"reported"`
		ObservedDesired twinProperty `json:"observedDesired"`
	} `json:"twins"`
	State          string          `json:"state"`
	LastOnlineTime string          `json:"lastOnlineTime"`
	ReportToCloud  bool            `json:"reportToCloud"`
	ReportCycle    int64           `json:"reportCycle"`
	Extensions     json.RawMessage `json:"extensions"`
}
