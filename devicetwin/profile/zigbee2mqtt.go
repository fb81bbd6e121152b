package profile

import (
	"strings"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
)

// zigbee2mqtt: param topic is base/friendlyName. The state is one JSON object on
// that topic, not retained unless the user has it so; <topic>/set takes a part
// of it, <topic>/get asks. profileConfig.base is for bridges whose base topic
// has a slash in it; else it is the first level of topic.
var zigbee2mqtt = profile{
	prepare: func(c *compiler) error {
		_, err := c.need("topic")
		return err
	},
	property: func(c *compiler, p *v1alpha1.Property) error {
		words(p, "ON", "OFF")
		if len(p.Read) == 0 && p.Access != "w" {
			p.Read = []v1alpha1.Read{{Path: p.Name}}
		}
		own := false
		for i := range p.Read {
			if p.Read[i].Topic == "" {
				p.Read[i].Topic, own = "${topic}", true
				if p.Read[i].TS == nil {
					p.Read[i].TS = &v1alpha1.TSPath{Path: "last_seen", Unit: unitAuto}
				}
			}
		}
		at, err := firstPath(p)
		if err != nil {
			return err
		}
		if len(at) == 0 {
			at = path{p.Name}
		}
		if writable(p) {
			if p.Write == nil {
				p.Write = &v1alpha1.Write{}
			}
			if p.Write.Topic == "" {
				p.Write.Topic = "${topic}/set"
			}
			if p.Write.Payload == "" {
				if p.Write.Payload, err = nested(at, "${value}"); err != nil {
					return err
				}
			}
		}
		if p.Refresh == nil && own && writable(p) {
			// Of what a battery device only reports, asking fails: only what can
			// be written is asked for, unless the model says otherwise.
			p.Refresh = &v1alpha1.Refresh{}
		}
		if p.Refresh != nil {
			if p.Refresh.Topic == "" {
				p.Refresh.Topic = "${topic}/get"
			}
			if p.Refresh.Payload == "" {
				if p.Refresh.Payload, err = nested(at[:1], `""`); err != nil {
					return err
				}
			}
		}
		return nil
	},
	command: func(c *compiler, cmd *v1alpha1.Command) error {
		if cmd.Write.Topic == "" {
			cmd.Write.Topic = "${topic}/set"
		}
		return nil
	},
	availability: func(c *compiler) *v1alpha1.Availability {
		return &v1alpha1.Availability{Topic: "${topic}/availability", Path: "state"}
	},
	parent: func(c *compiler) *v1alpha1.Availability {
		base, _, _ := strings.Cut(c.device.params["topic"], "/")
		if configured, err := c.config("base", ""); err == nil && configured != "" {
			base = configured
		}
		return &v1alpha1.Availability{Topic: base + "/bridge/state", Path: "state"}
	},
}
