package devices

import (
	"context"
	"encoding/json"
	"errors"
	"iter"
	"maps"
	"slices"
	"time"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/profile"
	"github.com/skerry-io/skerry/devicetwin/value"
)

// twins is what the APIs need of devicetwin.Twins.
type twins interface {
	Get(devicetwin.Key) (*devicetwin.Doc, bool)
	List() []*devicetwin.Doc
	Watch(ctx context.Context, from v1alpha1.Version) iter.Seq[devicetwin.Change]
	SetDesired(context.Context, devicetwin.Key, devicetwin.Patch) devicetwin.Result
	Command(context.Context, devicetwin.Key, devicetwin.CommandCall) devicetwin.CommandStatus
	Refresh(context.Context, devicetwin.Key) error
}

// changes is Watch as a channel, which is closed at its end. It holds one
// change at most: the watch itself keeps no more than the latest of each device.
func changes(ctx context.Context, t twins, from v1alpha1.Version) <-chan devicetwin.Change {
	c := make(chan devicetwin.Change)
	go func() {
		defer close(c)
		for change := range t.Watch(ctx, from) {
			select {
			case c <- change:
			case <-ctx.Done():
				return
			}
		}
	}()
	return c
}

// views are the twins as KubeEdge's topics and mappers want them.
type views struct{ twins }

// SetDesired implements profile.Twins.
func (v views) SetDesired(ctx context.Context, dev devicetwin.Key, props map[string]any, by string) error {
	p := devicetwin.Patch{Props: make(map[string]json.RawMessage, len(props)), By: by}
	for name, val := range props {
		p.Props[name] = value.JSON(val)
	}
	res := v.twins.SetDesired(ctx, dev, p)
	if res.Code < 300 {
		return nil
	}
	text := res.Message
	for _, name := range slices.Sorted(maps.Keys(res.Props)) {
		text += "; " + name + ": " + res.Props[name]
	}
	return errors.New(text)
}

// maxValue is how long a string, or what is as long as one, may be at all.
const maxValue = 64 << 10

// View implements profile.Twins.
func (v views) View(dev devicetwin.Key) (map[string]profile.PropertyView, bool) {
	d, ok := v.twins.Get(dev)
	if !ok {
		return nil, false
	}
	out := make(map[string]profile.PropertyView, len(d.Properties))
	for name, p := range d.Properties {
		as := v1alpha1.Property{Name: name, Type: p.Type, Access: p.Access, MaxLength: maxValue}
		if as.Type == v1alpha1.TypeEnum {
			as.Type = v1alpha1.TypeString // its words were checked
		}
		typ, err := value.Compile(&as)
		if err != nil {
			continue
		}
		parse := func(raw json.RawMessage) any {
			if len(raw) == 0 {
				return nil
			}
			val, err := typ.Parse(raw)
			if err != nil {
				return nil
			}
			return val
		}
		var view profile.PropertyView
		if r := p.Reported; r != nil {
			view.Reported, view.ReportedAt = parse(r.Value), r.TS
		}
		if view.Desired = parse(p.Want); view.Desired != nil {
			view.DesiredAt = desiredAt(p)
		}
		out[name] = view
	}
	return out, true
}

// desiredAt is since when a value is wanted, where that is known.
func desiredAt(p devicetwin.DocProperty) time.Time {
	if p.Override != nil {
		return p.Override.Since
	}
	return time.Time{}
}
