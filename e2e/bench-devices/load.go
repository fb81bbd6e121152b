package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	mqtt "github.com/eclipse/paho.mqtt.golang"
	"golang.org/x/sync/errgroup"
)

// loadCommand has this program publish, for where the broker can be reached
// from alone: inside an edge machine.
const loadCommand = "load"

// load publishes {"v":NANOSECONDS} of QoS 1 on bench/I/state for each of
// devices, from as many connections as publishers.
type load struct {
	broker     string
	publishers int
	devices    int
	rate       int // messages per second over all; 0: as fast as they are acknowledged
	acked      atomic.Int64
}

func (l *load) run(ctx context.Context, d time.Duration) error {
	var clients []mqtt.Client
	defer func() {
		for _, c := range clients {
			c.Disconnect(100)
		}
	}()
	for i := range l.publishers {
		c, err := connect(ctx, l.broker, fmt.Sprintf("load-%d", i), nil)
		if err != nil {
			return err
		}
		clients = append(clients, c)
	}
	end, stop := context.WithTimeout(ctx, d)
	defer stop()
	g, running := errgroup.WithContext(end)
	for i, c := range clients {
		g.Go(func() error { return l.publish(running, c, i) })
	}
	if err := g.Wait(); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return ctx.Err()
}

// publish is one connection, which waits for each acknowledgement. It keeps to
// its pace by the clock, not by the last message.
func (l *load) publish(ctx context.Context, c mqtt.Client, i int) error {
	began := time.Now()
	for n := 0; ctx.Err() == nil; n++ {
		if l.rate > 0 {
			at := began.Add(time.Duration(n*l.publishers+i) * time.Second / time.Duration(l.rate))
			if sleep(ctx, time.Until(at)) != nil {
				return nil
			}
		}
		topic := fmt.Sprintf("bench/%d/state", (n*l.publishers+i)%l.devices)
		if err := await(ctx, c.Publish(topic, 1, false, fmt.Sprintf(`{"v":%d}`, time.Now().UnixNano()))); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		l.acked.Add(1)
	}
	return nil
}

func connect(ctx context.Context, broker, id string, heard mqtt.MessageHandler) (mqtt.Client, error) {
	c := mqtt.NewClient(mqtt.NewClientOptions().AddBroker(broker).SetClientID(id).SetAutoReconnect(false).
		SetConnectTimeout(20 * time.Second).SetDefaultPublishHandler(heard))
	return c, await(ctx, c.Connect())
}

func await(ctx context.Context, t mqtt.Token) error {
	select {
	case <-t.Done():
		return t.Error()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// runLoad also answers what is wanted of the devices: it says on
// bench/I/state what bench/I/set tells it, and prints when it was told.
func runLoad(args []string) error {
	flags := flag.NewFlagSet(loadCommand, flag.ContinueOnError)
	l := &load{}
	flags.StringVar(&l.broker, "broker", "tcp://127.0.0.1:1883", "")
	flags.IntVar(&l.publishers, "publishers", 1, "")
	flags.IntVar(&l.devices, "devices", 1, "")
	flags.IntVar(&l.rate, "rate", 1, "")
	d := flags.Duration("time", time.Second, "")
	if err := flags.Parse(args); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var out sync.Mutex
	c, err := connect(ctx, l.broker, "actuator", func(_ mqtt.Client, m mqtt.Message) {
		out.Lock()
		defer out.Unlock()
		fmt.Printf("set %s %s %d\n", strings.Split(m.Topic(), "/")[1], m.Payload(), time.Now().UnixNano())
	})
	if err != nil {
		return err
	}
	defer c.Disconnect(100)
	if err := await(ctx, c.Subscribe("bench/+/set", 1, nil)); err != nil {
		return err
	}
	if err := l.run(ctx, *d); err != nil {
		return err
	}
	fmt.Printf("acked %d\n", l.acked.Load())
	return nil
}
