package profile

import (
	"fmt"
	"strings"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
)

// homie5: param id is the device's id. A property of ours is read at path
// node/property. profileConfig.base is the base topic (default homie), version
// is 5 (default) or 4, which has no version in its topics and no $target.
//
// $target is what the device has accepted as wanted: a reading of intent.
// $state is its presence; the state of its root is its parent's.
var homie5 = profile{
	text: true,
	prepare: func(c *compiler) error {
		id, err := c.need("id")
		if err != nil {
			return err
		}
		base, err := c.config("base", "homie")
		if err != nil {
			return err
		}
		version, err := c.config("version", "5")
		if err != nil {
			return err
		}
		switch version {
		case "5":
			base += "/5"
		case "4":
		default:
			return fmt.Errorf("model %s, profileConfig.version %q is neither 5 nor 4", c.model.Name, version)
		}
		if strings.ContainsAny(id, "/+#") {
			return fmt.Errorf("param id %q is no Homie device id", id)
		}
		c.device.params["homie"] = base
		c.device.params["root"] = base + "/" + id
		return nil
	},
	property: func(c *compiler, p *v1alpha1.Property) error {
		at := ""
		for i := range p.Read {
			r := &p.Read[i]
			if r.Topic != "" {
				continue
			}
			if strings.Count(r.Path, "/") != 1 {
				return fmt.Errorf("read[%d]: path %q: want node/property", i, r.Path)
			}
			if at == "" {
				at = r.Path
			}
			r.Topic, r.Path = "${root}/"+r.Path, ""
		}
		if writable(p) {
			if p.Write == nil {
				p.Write = &v1alpha1.Write{}
			}
			if p.Write.Topic == "" {
				if at == "" {
					return fmt.Errorf("set read.path to node/property, or write.topic")
				}
				p.Write.Topic = "${root}/" + at + "/set"
			}
		}
		return nil
	},
	attach: attachHomie,
}

func attachHomie(c *compiler) error {
	d, root := c.device, c.device.params["root"]
	v5 := strings.HasSuffix(c.device.params["homie"], "/5")
	for _, r := range d.routes {
		if len(r.reads) == 0 || !strings.HasPrefix(r.filter, root+"/") {
			continue
		}
		reads := r.reads
		if v5 {
			// One zero byte is the empty string: an empty payload clears.
			r.reads = nil
			r.handle = func(p *packet, out []devicetwin.Reading) []devicetwin.Reading {
				return applyAll(reads, homiePayload(p), out)
			}
			c.listen(r.filter+"/$target", true, func(p *packet, out []devicetwin.Reading) []devicetwin.Reading {
				if len(p.Payload) == 0 {
					return out
				}
				from := len(out)
				out = applyAll(reads, homiePayload(p), out)
				for i := from; i < len(out); i++ {
					out[i].Intent = true
				}
				return out
			})
		}
	}
	h := &homieDevice{compiler: c}
	d.routes = append(d.routes, &route{filter: root + "/$state", device: d, told: true, handle: h.state})
	if v5 {
		c.listen(root+"/$description", true, h.description)
	}
	// Everything else that a Homie device publishes is its own as well.
	d.morePublished = append(d.morePublished, root+"/#")
	return nil
}

func homiePayload(p *packet) *packet {
	if len(p.Payload) == 1 && p.Payload[0] == 0 {
		q := &packet{Message: p.Message}
		q.Payload = nil
		return q
	}
	return p
}

// homieDevice is what a device's description tells.
type homieDevice struct {
	*compiler
	parent string // whose $state is its parent's
}

func (h *homieDevice) state(p *packet, out []devicetwin.Reading) []devicetwin.Reading {
	if state := homieState(string(p.Payload)); state != "" {
		h.driver.sight(h.device, devicetwin.Sighting{Evidence: devicetwin.EvidenceAvailability, State: state, Retained: p.Retain})
	}
	return out
}

// homieState; "" is init, which says that nothing is to be said yet.
func homieState(said string) string {
	switch said {
	case "ready", "alert": // alert of version 4: it works, and wants looking after
		return v1alpha1.PhaseOnline
	case "sleeping":
		return v1alpha1.PhaseSleeping
	case "disconnected", "lost", "": // cleared: the device was removed
		return v1alpha1.PhaseOffline
	}
	return ""
}

func (h *homieDevice) description(p *packet, out []devicetwin.Reading) []devicetwin.Reading {
	parent := homieParent(p)
	if parent == h.parent {
		return out
	}
	h.parent = parent
	h.device.extra = nil
	if filter := h.device.params["homie"] + "/" + parent + "/$state"; parent != "" && checkTopic(filter) == nil {
		h.device.extra = []*route{{filter: filter, device: h.device,
			handle: func(p *packet, out []devicetwin.Reading) []devicetwin.Reading {
				state := homieState(string(p.Payload))
				if state == v1alpha1.PhaseSleeping {
					state = v1alpha1.PhaseOnline // it sleeps, and is there
				}
				if state != "" {
					h.driver.sight(h.device, devicetwin.Sighting{Evidence: devicetwin.EvidenceParent, State: state, Retained: p.Retain})
				}
				return out
			}}}
	}
	h.driver.resubscribe()
	return out
}

// homieParent is the root of the device's tree, whose connection is the
// device's, or else what it hangs on.
func homieParent(p *packet) string {
	o, ok := objectOf(p)
	if !ok {
		return ""
	}
	for _, name := range []string{"root", "parent"} {
		if id, ok := o[name].(string); ok && id != "" && len(id) <= 256 && !strings.ContainsAny(id, "/+#$") {
			return id
		}
	}
	return ""
}
