package devices

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	mqtt "github.com/eclipse/paho.mqtt.golang"
)

// A plug and a thermostat at a real mosquitto: told what to do, cut off with
// the broker, and pulled.
func TestRunAtMosquitto(t *testing.T) {
	b := startMosquitto(t)
	dir := t.TempDir()
	plugState := filepath.Join(dir, "plug.json")
	button := make(chan struct{})
	pull := start(t, Config{Device: NewPlug(PlugConfig{}), Broker: b.url, State: plugState, Press: button})
	start(t, Config{Device: NewThermostat(ThermostatConfig{}), Broker: b.url, Tick: 50 * time.Millisecond})

	w := b.watch(t)
	w.await(t, "tele/plug-1/LWT", "Online")
	w.await(t, "zigbee2mqtt/bridge/state", `"online"`)
	w.await(t, "zigbee2mqtt/trv-kitchen/availability", `"online"`)
	w.publish(t, "cmnd/plug-1/POWER", "ON")
	w.await(t, "stat/plug-1/RESULT", `{"POWER":"ON"}`)
	w.publish(t, "zigbee2mqtt/trv-kitchen/set", `{"occupied_heating_setpoint":23}`)
	w.await(t, "zigbee2mqtt/trv-kitchen", `"occupied_heating_setpoint":23`)
	button <- struct{}{}
	w.await(t, "stat/plug-1/RESULT", `{"POWER":"OFF"}`)
	button <- struct{}{}
	w.await(t, "stat/plug-1/RESULT", `{"POWER":"ON"}`)

	b.restart(t)
	w = b.watch(t)
	w.await(t, "tele/plug-1/LWT", "Online")
	w.await(t, "tele/plug-1/STATE", `"POWER":"ON"`)
	w.await(t, "zigbee2mqtt/trv-kitchen", `"occupied_heating_setpoint":23`)

	pull()
	w.await(t, "tele/plug-1/LWT", "Offline")
	start(t, Config{Device: NewPlug(PlugConfig{}), Broker: b.url, State: plugState})
	w.await(t, "tele/plug-1/LWT", "Online")
	w.await(t, "tele/plug-1/STATE", `"POWER":"ON"`)
}

func start(t *testing.T, cfg Config) (end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, cfg) }()
	ended := false
	end = func() {
		if ended {
			return
		}
		ended = true
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(end)
	return end
}

type mosquitto struct {
	url, conf string
	cmd       *exec.Cmd
}

func startMosquitto(t *testing.T) *mosquitto {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().(*net.TCPAddr)
	l.Close()
	b := &mosquitto{url: "tcp://" + addr.String(), conf: filepath.Join(t.TempDir(), "mosquitto.conf")}
	conf := fmt.Sprintf("listener %d 127.0.0.1\nallow_anonymous true\nuser root\n", addr.Port)
	if err := os.WriteFile(b.conf, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	b.run(t)
	t.Cleanup(func() { b.kill() })
	return b
}

func (b *mosquitto) run(t *testing.T) {
	t.Helper()
	path, err := exec.LookPath("mosquitto")
	if err != nil {
		path = "/usr/sbin/mosquitto" // Debian's, which users have not on their PATH
	}
	b.cmd = exec.Command(path, "-c", b.conf)
	b.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := b.cmd.Start(); err != nil {
		t.Fatalf("%v; install it with: make deps", err)
	}
}

func (b *mosquitto) kill() {
	_ = b.cmd.Process.Kill()
	_ = b.cmd.Wait()
}

func (b *mosquitto) restart(t *testing.T) {
	t.Helper()
	b.kill()
	b.run(t)
}

type watcher struct {
	client mqtt.Client
	heard  chan mqtt.Message
	unread []mqtt.Message
}

// watch hears everything.
func (b *mosquitto) watch(t *testing.T) *watcher {
	t.Helper()
	w := &watcher{heard: make(chan mqtt.Message, 4096)}
	opts := mqtt.NewClientOptions().AddBroker(b.url).SetClientID("watcher").SetAutoReconnect(false).
		SetConnectRetry(true).SetConnectRetryInterval(20 * time.Millisecond).
		SetDefaultPublishHandler(func(_ mqtt.Client, m mqtt.Message) { w.heard <- m })
	w.client = mqtt.NewClient(opts)
	if tk := w.client.Connect(); !tk.WaitTimeout(20*time.Second) || tk.Error() != nil {
		t.Fatalf("connect: %v", tk.Error())
	}
	if tk := w.client.Subscribe("#", 1, nil); !tk.WaitTimeout(20*time.Second) || tk.Error() != nil {
		t.Fatal(tk.Error())
	}
	t.Cleanup(func() { w.client.Disconnect(0) })
	return w
}

func (w *watcher) publish(t *testing.T, topic, payload string) {
	t.Helper()
	if tk := w.client.Publish(topic, 1, false, payload); !tk.WaitTimeout(20*time.Second) || tk.Error() != nil {
		t.Fatal(tk.Error())
	}
}

// await takes what topic says until it says part.
func (w *watcher) await(t *testing.T, topic, part string) {
	t.Helper()
	limit := time.NewTimer(40 * time.Second)
	defer limit.Stop()
	for {
		for i, m := range w.unread {
			if m.Topic() == topic && strings.Contains(string(m.Payload()), part) {
				other := slices.DeleteFunc(slices.Clone(w.unread[:i]), func(m mqtt.Message) bool { return m.Topic() == topic })
				w.unread = append(other, w.unread[i+1:]...)
				return
			}
		}
		select {
		case m := <-w.heard:
			w.unread = append(w.unread, m)
		case <-limit.C:
			t.Fatalf("%s never said %s", topic, part)
		}
	}
}
