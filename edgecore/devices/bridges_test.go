package devices

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"

	"github.com/skerry-io/skerry/devicetwin/mqtt"
)

// A bridges file carries both ways, and not to the topics of the API.
func TestBridges(t *testing.T) {
	remote, err := mqtt.NewEmbedded(mqtt.EmbeddedConfig{Listeners: []mqtt.ListenerConfig{{Address: freePort(t)}}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- remote.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	there := make(chan string, 10)
	if _, err := remote.Subscribe("site/#", 1, func(m mqtt.Message) error { there <- m.Topic + "=" + string(m.Payload); return nil }); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the other broker", func() (bool, string) { return remote.State().Connected, remote.State().Error })

	r := newRig(t)
	r.stop()
	file := filepath.Join(r.dir, "bridges.conf")
	text := fmt.Sprintf("connection cloud\naddress %s\ntopic plant/# out 1 \"\" site/\ntopic # in 1 \"\" orders/\n", remote.Addrs()[0])
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	r.start(func(c *Config) { c.MQTT.BridgesFile = file })
	eventually(t, "the bridge connected", func() (bool, string) {
		st := r.Status()
		return len(st.Bridges) == 1 && st.Bridges[0].Connected, fmt.Sprintf("%+v", st)
	})
	here := make(chan string, 10)
	c := r.client("", "")
	if tok := c.Subscribe("#", 1, func(_ paho.Client, m paho.Message) { here <- m.Topic() + "=" + string(m.Payload()) }); tok.Wait() && tok.Error() != nil {
		t.Fatal(tok.Error())
	}
	if tok := c.Publish("plant/1", 1, false, "up"); tok.Wait() && tok.Error() != nil {
		t.Fatal(tok.Error())
	}
	expect := func(ch chan string, want string) {
		t.Helper()
		for timeout := time.After(30 * time.Second); ; {
			select {
			case got := <-ch:
				if strings.HasPrefix(got, topicRoot) {
					t.Fatalf("came %s", got)
				}
				if got == want {
					return
				}
			case <-timeout:
				t.Fatalf("no %s within 30s; %+v", want, r.Status())
			}
		}
	}
	expect(there, "site/plant/1=up")
	for _, topic := range []string{"orders/" + topicRoot + "twin/home/plug/desired/set", "orders/do"} {
		if err := remote.Publish(ctx, mqtt.Message{Topic: topic, QoS: 1, Payload: []byte("x")}); err != nil {
			t.Fatal(err)
		}
	}
	expect(here, "do=x")
	st := r.Status().Bridges
	if len(st) != 1 || st[0].Name != "cloud" || !st[0].Connected || st[0].Out != 1 || st[0].Dropped != 1 {
		t.Errorf("status %+v", st)
	}
}

func TestBridgesFileErrors(t *testing.T) {
	for name, text := range map[string]string{
		"a name that is a path": "connection ../x\naddress y\ntopic a",
		"a name twice":          "connection x\naddress y\ntopic a\nconnection x\naddress y\ntopic b",
		"no topics":             "connection x\naddress y",
	} {
		path := filepath.Join(t.TempDir(), "f")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := readBridges(path); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", name, err)
		}
	}
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, []byte("connection x\naddress y\ntopic a\nremote_username u\nremote_password p"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := readBridges(path); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a password that all may read: %v", err)
	}
}
