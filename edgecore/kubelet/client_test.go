package kubelet_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// exec runs a command in the pod's first container by way of the kubelet.
func (e *edge) exec(t *testing.T, pod string, command ...string) (stdout, stderr string, code int) {
	t.Helper()
	stdout, stderr, code = e.tryExec(t, pod, command...)
	if code < 0 {
		t.Fatalf("exec %v in %s: %s", command, pod, stderr)
	}
	return stdout, stderr, code
}

// dial opens a WebSocket to the kubelet. Channels: 0 stdin, 1 stdout, 2 stderr,
// 3 the end.
func (e *edge) dial(t *testing.T, path string) (*websocket.Conn, error) {
	t.Helper()
	d := websocket.Dialer{
		Subprotocols: []string{"v4.channel.k8s.io"},
		NetDialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", e.m.Path(kubeletSocket))
		},
	}
	ws, res, err := d.DialContext(t.Context(), "ws://kubelet"+path, nil)
	if err != nil {
		if res != nil {
			b, _ := io.ReadAll(io.LimitReader(res.Body, 1<<16))
			err = fmt.Errorf("%w: %s", err, b)
		}
		return nil, err
	}
	return ws, ws.SetReadDeadline(time.Now().Add(30 * time.Second))
}

// tryExec returns code -1 and the reason in stderr when nothing could be run.
func (e *edge) tryExec(t *testing.T, pod string, command ...string) (stdout, stderr string, code int) {
	t.Helper()
	query := url.Values{"output": {"1"}, "error": {"1"}, "command": command}
	ws, err := e.dial(t, "/exec/default/"+pod+"/main?"+query.Encode())
	if err != nil {
		return "", err.Error(), -1
	}
	defer ws.Close()
	var streams [4]bytes.Buffer
	for {
		_, b, err := ws.ReadMessage()
		if err != nil {
			break
		}
		if len(b) > 0 && int(b[0]) < len(streams) {
			streams[b[0]].Write(b[1:])
		}
	}
	var status metav1.Status
	if err := json.Unmarshal(streams[3].Bytes(), &status); err != nil {
		return "", "no exit status: " + streams[3].String(), -1
	}
	if status.Status != metav1.StatusSuccess {
		code = -1
		if status.Details != nil {
			for _, c := range status.Details.Causes {
				if c.Type == "ExitCode" {
					fmt.Sscan(c.Message, &code)
				}
			}
		}
	}
	return streams[1].String(), streams[2].String() + status.Message, code
}

// call makes one request and returns the body of a good answer.
func call(t *testing.T, c *http.Client, method, path string, body []byte) ([]byte, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://edge"+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	res, err := c.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, 64<<20))
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s %s: %s: %s", method, path, res.Status, bytes.TrimSpace(b))
	}
	return b, nil
}

func get(t *testing.T, c *http.Client, path string, into any) error {
	t.Helper()
	b, err := call(t, c, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, into)
}

// fatal ends an await at once.
type fatal struct{ error }

// await polls until check returns nil.
func await(t *testing.T, what string, check func() error) {
	t.Helper()
	awaitEvery(t, 50*time.Millisecond, what, check)
}

func awaitEvery(t *testing.T, period time.Duration, what string, check func() error) {
	t.Helper()
	deadline := time.After(2 * time.Minute)
	tick := time.NewTicker(period)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		var f fatal
		if errors.As(err, &f) {
			t.Fatalf("%s: %v", what, err)
		}
		select {
		case <-deadline:
			t.Fatalf("not in time: %s: %v", what, err)
		case <-tick.C:
		}
	}
}
