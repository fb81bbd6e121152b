package devices

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/skerry-io/skerry/devicetwin/mqtt"
	"github.com/skerry-io/skerry/devicetwin/telemetry"
)

// bridges carry topics between the node's broker and others.
type bridges struct {
	all    []*mqtt.Bridge
	names  []string
	local  []*mqtt.External // of an external broker, a client for each bridge
	queues []*telemetry.Queue
}

const bridgesDir = "bridges"

// bridges reads the bridges file and makes what it says.
func (r *running) openBridges() (err error) {
	path := r.part.cfg.MQTT.BridgesFile
	if path == "" {
		return nil
	}
	specs, err := readBridges(path)
	if err != nil {
		return err
	}
	for _, spec := range specs {
		if err := r.openBridge(spec); err != nil {
			return errors.Join(fmt.Errorf("%s: connection %s: %w", path, spec.Name, err), r.bridges.close())
		}
	}
	return nil
}

func readBridges(path string) ([]mqtt.BridgeSpec, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("bridges: %w", err)
	}
	defer f.Close()
	specs, err := mqtt.ParseBridges(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	seen := map[string]bool{}
	for _, s := range specs {
		if s.Name == "." || s.Name == ".." || strings.ContainsAny(s.Name, "/\\ \t") || seen[s.Name] {
			return nil, fmt.Errorf("%s: connection %q: its name must be its own, and that of a directory", path, s.Name)
		}
		seen[s.Name] = true
		if info, err := f.Stat(); err == nil && s.Password != "" && info.Mode().Perm()&0o077 != 0 {
			return nil, fmt.Errorf("%s holds a password and others may read it; chmod 600 it", path)
		}
	}
	return specs, nil
}

func (r *running) openBridge(spec mqtt.BridgeSpec) error {
	cfg := spec.Config(r.part.cfg.NodeName)
	cfg.Log = r.log
	// The API's topics are judged by who asks, and a bridge asks for nobody.
	cfg.Reserved = func(topic string) bool {
		return strings.HasPrefix(topic, topicRoot) || topic == strings.TrimSuffix(topicRoot, "/")
	}
	cfg.Local = r.broker
	if r.choice.Mode == mqtt.ModeExternal {
		own := r.externalConfig(r.choice.URL)
		own.ClientID = "skerry-bridge-" + spec.Name
		own.CleanSession, own.Bridge = spec.LocalCleanSession, true
		local, err := mqtt.NewExternal(own)
		if err != nil {
			return err
		}
		r.bridges.local = append(r.bridges.local, local)
		cfg.Local = local
	}
	for _, way := range []struct {
		name string
		used bool
		to   *mqtt.Queue
	}{{"out", spec.Carries(mqtt.BridgeOut), &cfg.Out}, {"in", spec.Carries(mqtt.BridgeIn), &cfg.In}} {
		if !way.used {
			continue
		}
		q, err := telemetry.OpenQueue(telemetry.QueueConfig{
			Dir:  filepath.Join(r.part.cfg.Dir, bridgesDir, spec.Name, way.name),
			Name: spec.Name + "/" + way.name, Cursors: r.db, Now: r.part.cfg.Now, Log: r.log,
		})
		if err != nil {
			return err
		}
		r.bridges.queues = append(r.bridges.queues, q)
		*way.to = q
	}
	b, err := mqtt.NewBridge(cfg)
	if err != nil {
		return err
	}
	r.bridges.all = append(r.bridges.all, b)
	r.bridges.names = append(r.bridges.names, spec.Name)
	return nil
}

func (b *bridges) start(ctx context.Context, g *errgroup.Group) {
	for _, bridge := range b.all {
		g.Go(func() error { return bridge.Run(ctx) })
	}
	for _, local := range b.local {
		g.Go(func() error { return local.Run(ctx) })
	}
}

// close is called once all has ended.
func (b *bridges) close() error {
	var errs []error
	for _, q := range b.queues {
		errs = append(errs, q.Close())
	}
	return errors.Join(errs...)
}

// BridgeStatus is of one connection of the bridges file.
type BridgeStatus struct {
	Name string `json:"name"`
	mqtt.State
	mqtt.BridgeStats
}

func (b *bridges) status() (all []BridgeStatus) {
	for i, bridge := range b.all {
		all = append(all, BridgeStatus{b.names[i], bridge.State(), bridge.Stats()})
	}
	return all
}
