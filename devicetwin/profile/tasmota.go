package profile

import (
	"fmt"
	"strings"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
)

// tasmota: param topic is the device's Topic. profileConfig.fullTopic is its
// FullTopic (default %prefix%/%topic%/), cmndPrefix, statPrefix and telePrefix
// its Prefix1 to 3.
//
// A property without a topic is looked for wherever a Tasmota tells it: the
// answer to a command, the periodic state and sensors, and the answers to
// Status 8, 10 and 11.
var tasmota = profile{
	text: true,
	prepare: func(c *compiler) error {
		if _, err := c.need("topic"); err != nil {
			return err
		}
		full, err := c.config("fullTopic", "%prefix%/%topic%/")
		if err != nil {
			return err
		}
		if !strings.Contains(full, "%prefix%") || !strings.Contains(full, "%topic%") {
			return fmt.Errorf("model %s, profileConfig.fullTopic %q: wants %%prefix%% and %%topic%%", c.model.Name, full)
		}
		if !strings.HasSuffix(full, "/") {
			full += "/"
		}
		for _, kind := range []string{"cmnd", "stat", "tele"} {
			prefix, err := c.config(kind+"Prefix", kind)
			if err != nil {
				return err
			}
			c.device.params[kind] = strings.NewReplacer("%prefix%", prefix, "%topic%", c.device.params["topic"]).Replace(full)
		}
		return nil
	},
	property: func(c *compiler, p *v1alpha1.Property) error {
		words(p, "ON", "OFF")
		if len(p.Read) == 0 && p.Access != "w" {
			p.Read = []v1alpha1.Read{{Path: p.Name}}
		}
		at, err := firstPath(p)
		if err != nil {
			return err
		}
		var reads []v1alpha1.Read
		own := false
		for _, r := range p.Read {
			if r.Topic != "" || r.Path == "" {
				reads = append(reads, r)
				continue
			}
			own = true
			for _, from := range []struct{ topic, under string }{
				{"${stat}RESULT", ""}, {"${tele}STATE", ""}, {"${tele}SENSOR", ""},
				{"${stat}STATUS8", "StatusSNS."}, {"${stat}STATUS10", "StatusSNS."}, {"${stat}STATUS11", "StatusSTS."},
			} {
				one := r
				one.Topic, one.Path = from.topic, from.under+r.Path
				reads = append(reads, one)
			}
		}
		p.Read = reads
		if writable(p) {
			if p.Write == nil {
				p.Write = &v1alpha1.Write{}
			}
			if p.Write.Topic == "" {
				if len(at) == 0 {
					return fmt.Errorf("no path to name the command after; set write.topic")
				}
				p.Write.Topic = "${cmnd}" + at[len(at)-1]
			}
		}
		if p.Refresh == nil && own {
			p.Refresh = &v1alpha1.Refresh{}
		}
		if p.Refresh != nil && p.Refresh.Topic == "" {
			// State answers with what is switched, Status 10 with sensors.
			p.Refresh.Topic = "${cmnd}State"
			if len(at) > 1 {
				p.Refresh.Topic, p.Refresh.Payload = "${cmnd}Status", "10"
			}
		}
		return nil
	},
	command: func(c *compiler, cmd *v1alpha1.Command) error {
		if cmd.Write.Topic == "" {
			cmd.Write.Topic = "${cmnd}" + cmd.Name
		}
		return nil
	},
	availability: func(c *compiler) *v1alpha1.Availability {
		return &v1alpha1.Availability{Topic: "${tele}LWT", Online: "Online", Offline: "Offline"}
	},
}
