package devices

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/client-go/tools/cache"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// hub is Devices without a cluster: what informers would tell is told by the
// test, and writes are kept.
type hub struct {
	*Devices
	client *fake.Clientset

	mu     sync.Mutex
	writes []write
	fail   error
}

type write struct {
	at     time.Time
	name   string
	status v1alpha1.DeviceStatus
}

func newHub(t testing.TB) *hub {
	t.Helper()
	idle := func() cache.SharedIndexInformer {
		return cache.NewSharedIndexInformer(&cache.ListWatch{}, nil, 0, cache.Indexers{})
	}
	dyn := dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{
		v1alpha1.Resource(v1alpha1.Devices): "DeviceList", v1alpha1.Resource(v1alpha1.Discoveries): "DeviceDiscoveryList",
	})
	h := &hub{client: fake.NewClientset()}
	dyn.PrependReactor("patch", "devices", func(a clienttesting.Action) (bool, runtime.Object, error) {
		patch := a.(clienttesting.PatchAction)
		if patch.GetSubresource() != "status" {
			return false, nil, nil
		}
		var body struct {
			Status v1alpha1.DeviceStatus `json:"status"`
		}
		if err := json.Unmarshal(patch.GetPatch(), &body); err != nil {
			return true, nil, err
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.fail != nil {
			return true, nil, h.fail
		}
		h.writes = append(h.writes, write{time.Now(), patch.GetName(), body.Status})
		return true, nil, nil
	})
	d, err := New(Config{Client: h.client, Dynamic: dyn, Devices: idle(), Models: idle(), Discoveries: idle(), Routes: idle()})
	if err != nil {
		t.Fatal(err)
	}
	h.Devices = d
	return h
}

func (h *hub) written() []write {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.writes)
}

const life = "9f3c01aa77e2b410"

func thermostat() *v1alpha1.DeviceModel {
	return &v1alpha1.DeviceModel{
		ObjectMeta: metav1.ObjectMeta{Name: "trv"},
		Spec: v1alpha1.DeviceModelSpec{Profile: v1alpha1.ProfileJSON, Properties: []v1alpha1.Property{
			{Name: "temp", Type: v1alpha1.TypeFloat64, Unit: "Cel", Access: "r", Metric: true},
			{Name: "setpoint", Type: v1alpha1.TypeFloat64, Access: "rw", Min: "5", Max: "30", Promote: v1alpha1.PromoteIfUnchanged},
			{Name: "note", Type: v1alpha1.TypeString, Access: "r"},
		}, Commands: []v1alpha1.Command{{Name: "boost", Params: []v1alpha1.CommandParam{{Name: "minutes", Type: v1alpha1.TypeInt64, Required: true}}}}},
	}
}

func device(name, node string, generation int64, desired string) *v1alpha1.Device {
	dev := &v1alpha1.Device{
		ObjectMeta: metav1.ObjectMeta{Namespace: "home", Name: name, UID: types.UID("uid-" + name), Generation: generation, Labels: map[string]string{"room": "kitchen"}},
		Spec:       v1alpha1.DeviceSpec{ModelRef: v1alpha1.ModelRef{Name: "trv"}, NodeName: node},
	}
	if desired != "" {
		dev.Spec.Desired = map[string]v1alpha1.JSON{"setpoint": {Raw: []byte(desired)}}
	}
	return dev
}

// peer is a node at the other end of the conversation.
type peer struct {
	t    *testing.T
	conn *edgeapi.Conn
	raw  net.Conn
	done chan error
	seq  uint64
}

func (h *hub) dial(t *testing.T, node string, epoch uint64, digests ...edgeapi.TwinDigestItem) *peer {
	t.Helper()
	mine, theirs := net.Pipe()
	ctx, cancel := context.WithCancel(context.Background())
	p := &peer{t: t, conn: edgeapi.NewConn(mine), raw: mine, done: make(chan error, 1)}
	go func() { p.done <- h.Serve(ctx, node, theirs) }()
	t.Cleanup(func() { cancel(); mine.Close() })
	p.send(edgeapi.TwinHello{Version: edgeapi.TwinsVersion, Incarnation: life, Epoch: epoch})
	p.send(edgeapi.TwinDigest{Items: digests, Last: true})
	if _, ok := p.receive().(edgeapi.TwinWelcome); !ok {
		t.Fatal("no welcome")
	}
	return p
}

func (p *peer) send(m edgeapi.Message) {
	p.t.Helper()
	if err := p.conn.Send(m); err != nil {
		p.t.Fatal(err)
	}
}

func (p *peer) receive() edgeapi.Message {
	p.t.Helper()
	m, err := p.conn.Receive()
	if err != nil {
		p.t.Fatalf("receive: %v", err)
	}
	return m
}

// agreed takes what follows the welcome.
func (p *peer) agreed() ([]edgeapi.DeviceRef, []edgeapi.TwinValue) {
	p.t.Helper()
	want, ok := p.receive().(edgeapi.TwinWant)
	if !ok {
		p.t.Fatal("no TwinWant")
	}
	restore, ok := p.receive().(edgeapi.TwinRestore)
	if !ok {
		p.t.Fatal("no TwinRestore")
	}
	return want.Devices, restore.Values
}

// frame sends a frame and takes its acknowledgement, and what came before it.
func (p *peer) frame(states []edgeapi.TwinState, values ...edgeapi.TwinValue) []edgeapi.TwinValue {
	p.t.Helper()
	p.seq++
	p.send(edgeapi.TwinFrame{Seq: p.seq, States: states, Values: values})
	var restored []edgeapi.TwinValue
	for {
		switch m := p.receive().(type) {
		case edgeapi.TwinRestore:
			restored = append(restored, m.Values...)
		case edgeapi.TwinAck:
			if m.Seq != p.seq {
				p.t.Fatalf("ack %d, want %d", m.Seq, p.seq)
			}
			return restored
		default:
			p.t.Fatalf("got %T", m)
		}
	}
}

func version(epoch, seq uint64) string {
	return v1alpha1.Version{Incarnation: life, Epoch: epoch, Seq: seq}.String()
}

func state(name string, epoch, seq uint64, generation int64) edgeapi.TwinState {
	return edgeapi.TwinState{
		Device: refOf("home", name), UID: "uid-" + name, ObservedGeneration: generation, Version: version(epoch, seq),
		Phase: v1alpha1.PhaseOnline, LastSeen: 1_763_000_000_000,
	}
}

func val(name, property, v string, epoch, seq uint64) edgeapi.TwinValue {
	return edgeapi.TwinValue{
		Device: refOf("home", name), Property: property, Value: json.RawMessage(v), Received: 1_763_000_000_000 + int64(seq), Quality: "good", Version: version(epoch, seq),
	}
}

// live is the value of a property as /v1/twins shows it.
func (h *hub) live(t *testing.T, name, property string) string {
	t.Helper()
	twin, err := h.twinOf("home", name)
	if err != nil {
		return err.Error()
	}
	p := twin.Properties[property]
	if p == nil || p.Reported == nil {
		return ""
	}
	return fmt.Sprintf("%s %s", p.Reported.Value, p.Reported.Quality)
}
