package devices

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"testing"
	"time"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// FuzzConversation: whatever a node sends, the hub does not fall, ends the
// conversation, and counts what it holds rightly.
func FuzzConversation(f *testing.F) {
	add := func(messages ...edgeapi.Message) {
		var b bytes.Buffer
		c := edgeapi.NewConn(&b)
		for _, m := range messages {
			if err := c.Send(m); err != nil {
				f.Fatal(err)
			}
		}
		f.Add(b.Bytes())
	}
	hello, last := edgeapi.TwinHello{Version: 1, Incarnation: life, Epoch: 5}, edgeapi.TwinDigest{Last: true}
	add(hello, last, edgeapi.TwinFrame{Seq: 1, States: []edgeapi.TwinState{state("a", 5, 1, 1)}, Values: []edgeapi.TwinValue{val("a", "temp", "1", 5, 2), val("a", "temp", `{"x":[1]}`, 5, 1)}})
	add(hello, edgeapi.TwinDigest{Items: []edgeapi.TwinDigestItem{{Device: refOf("home", "a"), UID: "uid-a", Version: version(5, 1), Hash: "x"}}, Last: true})
	add(hello, last, edgeapi.TwinFound{Discovery: refOf("home", "z"), Candidates: []edgeapi.TwinCandidate{{Name: "n"}}}, edgeapi.TwinReply{ID: 7}, edgeapi.TwinRequest{ID: 1, Op: edgeapi.TwinOpBase, Device: refOf("home", "a"), Body: json.RawMessage(`{"uid":"uid-a"}`)})
	f.Fuzz(func(t *testing.T, b []byte) {
		h := newHub(t)
		h.setModel(thermostat())
		h.setDevice(device("a", "pi", 1, "20"))
		mine, theirs := net.Pipe()
		done := make(chan struct{})
		go func() { defer close(done); _ = h.Serve(context.Background(), "pi", theirs) }()
		go io.Copy(io.Discard, mine) //nolint:errcheck // until it is closed
		mine.SetWriteDeadline(time.Now().Add(5 * time.Second))
		_, _ = mine.Write(b)
		mine.Close()
		<-done
		if _, err := json.Marshal(must(h.twinOf("home", "a"))); err != nil {
			t.Fatal(err)
		}
		st, _ := h.composeLocked(h.twins[refOf("home", "a")], time.Now())
		if _, err := json.Marshal(st); err != nil {
			t.Fatal(err)
		}
		want := 0
		for _, r := range h.twins[refOf("home", "a")].values {
			want += r.size()
		}
		if got := h.Stats().LiveBytes; got != want {
			t.Fatalf("%d bytes are counted, %d held", got, want)
		}
	})
}

func must(t *Twin, err error) *Twin {
	if err != nil {
		panic(err)
	}
	return t
}

// FuzzIfMatch: an ETag comes back as it went, and nothing else is taken for one.
func FuzzIfMatch(f *testing.F) {
	f.Add("u-1", int64(3), version(5, 1))
	f.Add("", int64(0), "")
	f.Fuzz(func(t *testing.T, uid string, generation int64, version string) {
		twin := Twin{UID: uid, Generation: generation, Version: version}
		gotUID, got, err := desiredOf(twin.etag())
		if bytes.ContainsAny([]byte(uid), `."`) {
			return // no UID has them
		}
		if err != nil && uid != "" && uid[0] != 'W' || err == nil && (gotUID != uid || got != generation) {
			t.Fatalf("%s: %q %d, %v", twin.etag(), gotUID, got, err)
		}
	})
}
