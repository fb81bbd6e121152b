package profile

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
)

// profile is what a way of speaking adds to a model. Every function may be nil.
type profile struct {
	text      bool // a payload read without a path is text, not JSON
	ownReads  bool // properties are read without topics
	ownWrites bool // properties are written without topics

	// prepare looks at params and profileConfig before the properties.
	prepare func(c *compiler) error
	// property fills in what the model leaves out.
	property     func(c *compiler, p *v1alpha1.Property) error
	command      func(c *compiler, cmd *v1alpha1.Command) error
	availability func(c *compiler) *v1alpha1.Availability
	parent       func(c *compiler) *v1alpha1.Availability
	// attach adds routes and ways of the profile's own, after the properties.
	attach func(c *compiler) error
}

// profiles by name. It is never written to.
var profiles = map[string]profile{
	v1alpha1.ProfileExternal:      externalProfile,
	v1alpha1.ProfileRaw:           {text: true},
	v1alpha1.ProfileJSON:          {},
	v1alpha1.ProfileZigbee2MQTT:   zigbee2mqtt,
	v1alpha1.ProfileHomeAssistant: homeassistant,
	v1alpha1.ProfileTasmota:       tasmota,
	v1alpha1.ProfileShelly2:       shelly2,
	v1alpha1.ProfileHomie5:        homie5,
	v1alpha1.ProfileKubeEdge:      kubeedge,
	v1alpha1.ProfileSparkplugB:    sparkplugB,
}

// words gives a bool property without a map the words of its profile.
func words(p *v1alpha1.Property, yes, no string) {
	if p.Type == v1alpha1.TypeBool && len(p.Map) == 0 {
		p.Map = map[string]v1alpha1.JSON{yes: {Raw: []byte("true")}, no: {Raw: []byte("false")}}
	}
}

// writable tells whether the device is told this property.
func writable(p *v1alpha1.Property) bool { return p.Access == "w" || p.Access == "rw" }

// nested is a JSON payload with ${value} at a path: {"a":{"b":${value}}}.
func nested(p path, value string) (string, error) {
	if len(p) == 0 {
		return value, nil
	}
	out := value
	for i := len(p) - 1; i >= 0; i-- {
		if strings.Trim(p[i], "0123456789") == "" {
			return "", fmt.Errorf("path %s has an index; set write.payload", strings.Join(p, "."))
		}
		key, err := json.Marshal(p[i])
		if err != nil {
			return "", err
		}
		out = "{" + string(key) + ":" + out + "}"
	}
	return out, nil
}

// firstPath is the path of the first read, which is what writes and questions
// are made after.
func firstPath(p *v1alpha1.Property) (path, error) {
	for _, r := range p.Read {
		if r.Path != "" {
			return parsePath(r.Path)
		}
	}
	return nil, nil
}
