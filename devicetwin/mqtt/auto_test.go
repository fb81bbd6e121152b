package mqtt

import (
	"context"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
)

func TestChoose(t *testing.T) {
	ctx := context.Background()
	open, closed := startMosquitto(t), startMosquitto(t, "listener %p 127.0.0.1", "allow_anonymous false")
	for _, c := range []struct {
		mode, url, local string
		want, reason     string
	}{
		{"auto", "mqtt://broker:1884", open.addr, "mqtt://broker:1884", "configured"},
		{"", "", open.addr, "mqtt://" + open.addr, "it answers"},
		{"auto", "", closed.addr, "mqtt://" + closed.addr, "refuses"},
		{"auto", "", freeAddr(t), "", "refused"},
		{"auto", "", listening(t, func(c net.Conn) { c.Close() }), "", "does not speak MQTT"},
		{"auto", "", listening(t, func(c net.Conn) { _, _ = io.WriteString(c, "SSH-2.0-x\r\n") }), "", "does not speak MQTT"},
		{"embedded", "", open.addr, "", "configured"},
		{"external", "mqtts://broker", open.addr, "mqtts://broker", "configured"},
	} {
		got, err := choose(ctx, c.mode, c.url, c.local)
		if err != nil {
			t.Errorf("%+v: %v", c, err)
			continue
		}
		mode := ModeEmbedded
		if c.want != "" {
			mode = ModeExternal
		}
		if got.Mode != mode || got.URL != c.want || !strings.Contains(got.Reason, c.reason) {
			t.Errorf("%+v: got %+v", c, got)
		}
	}
	for _, c := range [][2]string{{"external", ""}, {"embedded", "mqtt://x"}, {"neither", ""}, {"auto", "x"}} {
		if got, err := choose(ctx, c[0], c[1], open.addr); err == nil {
			t.Errorf("%v: %+v", c, got)
		}
	}
}

// TestProbeEnds: something that listens and says nothing is no broker, and holds
// nobody up for long.
func TestProbeEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		defer server.Close()
		go func() { _, _ = io.Copy(io.Discard, server) }()
		_, err := greet(t.Context(), client)
		if err == nil || !strings.Contains(err.Error(), "does not answer") {
			t.Errorf("got %v", err)
		}
	})
}

// listening serves each connection to it with serve.
func listening(t *testing.T, serve func(net.Conn)) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serve(c)
		}
	}()
	return l.Addr().String()
}
