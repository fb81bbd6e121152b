package main

import (
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/skerry-io/skerry/edgecore/devices"
	"github.com/skerry-io/skerry/edgecore/link"
	"github.com/skerry-io/skerry/edgecore/localapi"
	"github.com/skerry-io/skerry/edgecore/store"
	"github.com/skerry-io/skerry/edgecore/tokens"
	"github.com/skerry-io/skerry/edgecore/walltime"
)

// DevicesConfig is the node's devices: their twins and MQTT.
type DevicesConfig struct {
	// Enabled is true by default: a node without Devices pays nothing for it.
	Enabled *bool        `json:"enabled,omitempty"`
	MQTT    devices.MQTT `json:"mqtt,omitempty"`
	// BytesPerDay is what the values that devices report may cost the disk in
	// 24 hours, like 2G (the default). Beyond it, they wait longer for it: up to
	// a minute.
	BytesPerDay string              `json:"bytesPerDay,omitempty"`
	API         DevicesAPIConfig    `json:"api,omitempty"`
	Mappers     DevicesMapperConfig `json:"mappers,omitempty"`
}

// DevicesAPIConfig is the devices' API for pods, which show their service
// account's token.
type DevicesAPIConfig struct {
	// Socket is for pods that mount its directory; default /run/skerry/api.sock,
	// "off" for none. With localAPI.pods it is also beside the Kubernetes API
	// that they find.
	Socket string `json:"socket,omitempty"`
}

// DevicesMapperConfig is for devices that speak no MQTT (profile external).
type DevicesMapperConfig struct {
	// Socket is where programs connect that speak for such devices; only root
	// may. Default /run/skerry/mappers.sock, "off" for none.
	Socket string `json:"socket,omitempty"`
}

const (
	devicesDir          = "devices" // below the data directory
	defaultTwinsSocket  = "/run/skerry/api.sock"
	defaultMapperSocket = "/run/skerry/mappers.sock"
	defaultTwinsBytes   = "2G"
)

func (c *DevicesConfig) complete(pods bool, podListen string) error {
	if c.Enabled == nil {
		yes := true
		c.Enabled = &yes
	}
	if c.BytesPerDay == "" {
		c.BytesPerDay = defaultTwinsBytes
	}
	for _, s := range []struct {
		path *string
		def  string
	}{{&c.API.Socket, defaultTwinsSocket}, {&c.Mappers.Socket, defaultMapperSocket}} {
		switch *s.path {
		case "":
			*s.path = s.def
		case "off":
			*s.path = ""
		}
	}
	var podIP netip.Addr
	if pods {
		p, err := netip.ParseAddrPort(podListen)
		if err != nil {
			return nil // the local API says what is wrong with it
		}
		podIP = p.Addr()
	}
	c.MQTT.Complete(podIP)
	return c.MQTT.Check()
}

// newDevices is nil when they are off.
func newDevices(dataDir string, cfg Config, node string, db *store.Store, source *tokens.Source,
	clock *walltime.Clock, log *slog.Logger) (*devices.Part, error) {
	if !*cfg.Devices.Enabled {
		return nil, nil
	}
	access, err := localapi.NewAccess(localapi.AccessConfig{Store: db, NodeName: node, Tokens: source, Clock: clock.Now})
	if err != nil {
		return nil, err
	}
	budget, err := resource.ParseQuantity(cfg.Devices.BytesPerDay)
	if err != nil || budget.Sign() <= 0 {
		return nil, fmt.Errorf("configuration: devices.bytesPerDay %q is not a number of bytes like 2G", cfg.Devices.BytesPerDay)
	}
	return devices.New(devices.Config{
		Store: db, NodeName: node, Dir: filepath.Join(dataDir, devicesDir), Access: access, MQTT: cfg.Devices.MQTT,
		BytesPerDay: uint64(budget.Value()), Socket: cfg.Devices.API.Socket, MapperSocket: cfg.Devices.Mappers.Socket,
		Now: func() (time.Time, bool) { return clock.Now(), clock.Sure() },
		Log: log,
	})
}

// streamsOf are the devices' conversations with the hub.
func streamsOf(p *devices.Part) []link.Stream {
	if p == nil {
		return nil
	}
	return p.Streams()
}

// conditionsOf are the Node's, as the devices' part tells them.
func conditionsOf(p *devices.Part) func() []corev1.NodeCondition {
	if p == nil {
		return nil
	}
	return p.Conditions
}

// printDevices says nothing of a node that has none.
func printDevices(w io.Writer, d *devices.Status) {
	switch {
	case d == nil:
		return
	case d.Problem != "":
		fmt.Fprintf(w, "devices   NOT SERVED: %s; pods are not affected\n", d.Problem)
	case d.Running:
		var phases []string
		for _, phase := range slices.Sorted(maps.Keys(d.Phases)) {
			phases = append(phases, fmt.Sprintf("%d %s", d.Phases[phase], strings.ToLower(phase)))
		}
		fmt.Fprintf(w, "devices   %d", d.Devices)
		if len(phases) > 0 {
			fmt.Fprintf(w, ": %s", strings.Join(phases, ", "))
		}
		fmt.Fprintln(w)
		if m := d.MQTT; m != nil && m.Connected {
			fmt.Fprintf(w, "          %s MQTT broker at %s\n", m.Mode, m.Address)
		} else if m != nil {
			fmt.Fprintf(w, "          %s MQTT broker at %s: NOT CONNECTED: %s\n", m.Mode, m.Address, m.Error)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(d.Unreadable)) {
		fmt.Fprintf(w, "          %s cannot be read: %s\n", name, d.Unreadable[name])
	}
	if d.DiskTrouble != "" {
		fmt.Fprintf(w, "          the disk takes no changes of devices: %s\n", d.DiskTrouble)
	}
}
