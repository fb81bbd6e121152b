// Command sim is simulated devices at a broker, until it is ended:
//
//	sim --broker tcp://127.0.0.1:1883 --state DIR thermostat:trv-kitchen plug:plug-1
//
// SIGUSR1 has somebody press each plug's button and turn each thermostat's
// wheel.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/skerry-io/skerry/deploy/devices"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "sim:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("sim", flag.ContinueOnError)
	broker := flags.String("broker", "tcp://127.0.0.1:1883", "where the devices connect")
	username := flags.String("username", "", "of the devices")
	password := flags.String("password-file", "", "file with the devices' password")
	state := flags.String("state", "", "folder for what the devices keep over a power cut")
	interval := flags.Duration("interval", 10*time.Second, "longest time between two reports of a device")
	speed := flags.Float64("speed", 1, "how much faster than in a real room temperatures change")
	flags.Usage = func() {
		fmt.Fprintln(flags.Output(), "sim [flags] thermostat:NAME|plug:TOPIC ...")
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() == 0 {
		flags.Usage()
		return errors.New("name a device, such as thermostat:trv-kitchen")
	}
	secret := ""
	if *password != "" {
		data, err := os.ReadFile(*password)
		if err != nil {
			return err
		}
		secret = strings.TrimSpace(string(data))
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	presses := make(chan os.Signal, 1)
	signal.Notify(presses, syscall.SIGUSR1)
	defer signal.Stop(presses)

	all, ctx := errgroup.WithContext(ctx)
	var buttons []chan struct{}
	for i, arg := range flags.Args() {
		kind, name, _ := strings.Cut(arg, ":")
		var d devices.Device
		switch {
		case name == "":
			return fmt.Errorf("%q: want a kind and a name, such as thermostat:trv-kitchen", arg)
		case kind == "thermostat":
			// Each has a Zigbee2MQTT of its own, which lists its devices whole: a
			// base topic may be written before the name.
			base := ""
			if at := strings.LastIndexByte(name, '/'); at >= 0 {
				base, name = name[:at], name[at+1:]
			}
			d = devices.NewThermostat(devices.ThermostatConfig{Name: name, Base: base, Interval: *interval, Speed: *speed,
				IEEE: fmt.Sprintf("0x842e14fffe%06x", i+1)})
		case kind == "plug":
			d = devices.NewPlug(devices.PlugConfig{Topic: name, TelePeriod: *interval, MAC: fmt.Sprintf("98F4AB%06X", i+1)})
		default:
			return fmt.Errorf("%q: want thermostat or plug", arg)
		}
		cfg := devices.Config{Device: d, Broker: *broker, Username: *username, Password: secret, Log: log.With("device", name)}
		if *state != "" {
			cfg.State = filepath.Join(*state, kind+"-"+name+".json")
		}
		button := make(chan struct{}, 1)
		buttons = append(buttons, button)
		cfg.Press = button
		all.Go(func() error { return devices.Run(ctx, cfg) })
	}
	all.Go(func() error {
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-presses:
				for _, b := range buttons {
					select {
					case b <- struct{}{}:
					default:
					}
				}
			}
		}
	})
	return all.Wait()
}
