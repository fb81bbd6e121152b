package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"
	"golang.org/x/sync/errgroup"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/devicetwin/mqtt"
	"github.com/skerry-io/skerry/devicetwin/profile"
	"github.com/skerry-io/skerry/devicetwin/telemetry"
	"github.com/skerry-io/skerry/devicetwin/twindb"
)

// subject is something that messages go through to a listener.
type subject interface {
	url() string
	// listen has heard called with each message's time of publishing.
	listen(ctx context.Context, heard func(sent time.Time)) (stop func(), err error)
	close() error
}

var subjects = []struct {
	name string
	open func(ctx context.Context, dir string) (subject, error)
}{
	{"mosquitto → subscriber", func(ctx context.Context, dir string) (subject, error) { return startMosquitto(ctx, dir) }},
	{"embedded broker → subscriber", func(ctx context.Context, dir string) (subject, error) {
		n, err := startNode(ctx, dir, nodeConfig{})
		return mqttSubject{n}, err
	}},
	{"embedded broker → twin → local watcher", func(ctx context.Context, dir string) (subject, error) {
		return startNode(ctx, dir, nodeConfig{devices: benchDevices})
	}},
}

const benchDevices = 100

// rate is how many messages are acknowledged to publishers that wait for each.
func (b *bench) rate(ctx context.Context) error {
	for _, publishers := range []int{1, 10, 50} {
		rates := map[string][]float64{}
		heard := map[string][]float64{}
		for i := range b.runs {
			for j := range subjects {
				s := subjects[(i+j)%len(subjects)] // who goes first alternates
				err := b.with(ctx, s.open, func(on subject) error {
					var n atomic.Int64
					stop, err := on.listen(ctx, func(time.Time) { n.Add(1) })
					if err != nil {
						return err
					}
					defer stop()
					l := &load{broker: on.url(), publishers: publishers, devices: benchDevices}
					if err := l.run(ctx, b.time); err != nil {
						return err
					}
					rates[s.name] = append(rates[s.name], float64(l.acked.Load())/b.time.Seconds())
					heard[s.name] = append(heard[s.name], float64(n.Load())/b.time.Seconds())
					return nil
				})
				if err != nil {
					return fmt.Errorf("%s: %w", s.name, err)
				}
			}
		}
		for _, s := range subjects {
			at, _, _ := median(heard[s.name])
			note := fmt.Sprintf("QoS 1, each publisher waits for each PUBACK; heard %.0f/s", at)
			if strings.Contains(s.name, "watcher") {
				note += ", newest values only where it falls behind"
			}
			b.add(fmt.Sprintf("%s, %d publishers", s.name, publishers), perSecond(rates[s.name]), "", note)
		}
	}
	return nil
}

// latency is from before the publish to the listener, at 1,000/s.
func (b *bench) latency(ctx context.Context) error {
	goals := map[string]string{"embedded broker → twin → local watcher": "p99 ≤ 10 ms"}
	times := map[string][][]time.Duration{}
	for i := range b.runs {
		for j := range subjects {
			s := subjects[(i+j)%len(subjects)]
			err := b.with(ctx, s.open, func(on subject) error {
				took, err := b.measure(ctx, on)
				times[s.name] = append(times[s.name], took)
				return err
			})
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
		}
	}
	for _, s := range subjects {
		b.add(s.name+", 1,000/s", percentiles(times[s.name]), goals[s.name], "QoS 1, 10 publishers")
	}
	return nil
}

func (b *bench) measure(ctx context.Context, on subject) ([]time.Duration, error) {
	var mu sync.Mutex
	var took []time.Duration
	stop, err := on.listen(ctx, func(sent time.Time) {
		d := time.Since(sent)
		mu.Lock()
		defer mu.Unlock()
		took = append(took, d)
	})
	if err != nil {
		return nil, err
	}
	l := &load{broker: on.url(), publishers: 10, devices: benchDevices, rate: 1000}
	err = l.run(ctx, b.time)
	stop()
	mu.Lock()
	defer mu.Unlock()
	return took, err
}

// capture is the rate with each message on the disk before its PUBACK.
func (b *bench) capture(ctx context.Context) error {
	for _, publishers := range []int{1, 10, 50} {
		var rates []float64
		for range b.runs {
			err := b.with(ctx, func(ctx context.Context, dir string) (subject, error) {
				return startNode(ctx, dir, nodeConfig{devices: benchDevices, capture: true})
			}, func(on subject) error {
				l := &load{broker: on.url(), publishers: publishers, devices: benchDevices}
				if err := l.run(ctx, b.time); err != nil {
					return err
				}
				rates = append(rates, float64(l.acked.Load())/b.time.Seconds())
				return nil
			})
			if err != nil {
				return err
			}
		}
		goal := ""
		if publishers == 50 {
			goal = "≥ 10,000/s"
		}
		b.add(fmt.Sprintf("captured durably and in the twin, %d publishers", publishers), perSecond(rates), goal, "capture: sync; on the disk before the PUBACK")
	}
	return nil
}

// diskBytes counts what 30 devices with 3 messages a second write.
func (b *bench) diskBytes(ctx context.Context) error {
	return b.with(ctx, func(ctx context.Context, dir string) (subject, error) {
		return startNode(ctx, dir, nodeConfig{devices: 30})
	}, func(on subject) error {
		n := on.(*node)
		before, own := n.db.Stats(), written()
		l := &load{broker: n.url(), publishers: 30, devices: 30, rate: 90}
		if err := l.run(ctx, b.disk); err != nil {
			return err
		}
		after, day := n.db.Stats(), float64(24*time.Hour)/float64(b.disk)
		b.add("30 devices × 3/s: twin store, bytes to the disk per day", fmt.Sprintf("%.2f GB", float64(after.Bytes-before.Bytes)*day/1e9), "≤ 2 GB",
			fmt.Sprintf("over %s: %d commits, %d messages; the process wrote %.2f GB/day to files", b.disk, after.Commits-before.Commits, l.acked.Load(), float64(written()-own)*day/1e9))
		return nil
	})
}

// written is what this process had the kernel write to files.
func written() uint64 {
	text, _ := os.ReadFile("/proc/self/io")
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(line, "write_bytes: "); ok {
			n, _ := strconv.ParseUint(strings.TrimSpace(v), 10, 64)
			return n
		}
	}
	return 0
}

func (b *bench) with(ctx context.Context, open func(context.Context, string) (subject, error), do func(subject) error) error {
	dir, err := os.MkdirTemp(b.dir, "run-")
	if err != nil {
		return err
	}
	on, err := open(ctx, dir)
	if err != nil {
		return err
	}
	return errors.Join(do(on), on.close(), os.RemoveAll(dir))
}

// mosquitto alone, as it comes, with no limit to its queues.
type mosquitto struct {
	address string
	cmd     *exec.Cmd
}

func startMosquitto(ctx context.Context, dir string) (subject, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	at := l.Addr().(*net.TCPAddr)
	l.Close()
	conf := filepath.Join(dir, "mosquitto.conf")
	text := fmt.Sprintf("listener %d 127.0.0.1\nallow_anonymous true\nuser root\nmax_queued_messages 0\nset_tcp_nodelay true\n", at.Port)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		return nil, err
	}
	path, err := exec.LookPath("mosquitto")
	if err != nil {
		path = "/usr/sbin/mosquitto"
	}
	m := &mosquitto{address: "tcp://" + at.String(), cmd: exec.Command(path, "-c", conf)}
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := m.cmd.Start(); err != nil {
		return nil, fmt.Errorf("%w; install it with: make deps", err)
	}
	for {
		c, err := net.Dial("tcp", at.String())
		if err == nil {
			c.Close()
			return m, nil
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return nil, errors.Join(err, m.close())
		}
	}
}

func (m *mosquitto) url() string { return m.address }

func (m *mosquitto) close() error {
	if err := m.cmd.Process.Kill(); err != nil {
		return err
	}
	_ = m.cmd.Wait() // it was killed
	return nil
}

func (m *mosquitto) listen(ctx context.Context, heard func(time.Time)) (func(), error) {
	return subscribe(ctx, m.address, heard)
}

func subscribe(ctx context.Context, url string, heard func(time.Time)) (func(), error) {
	c, err := connect(ctx, url, "listener", func(_ paho.Client, m paho.Message) { heard(sentAt(m.Payload())) })
	if err != nil {
		return nil, err
	}
	return func() { c.Disconnect(500) }, await(ctx, c.Subscribe("bench/+/state", 1, nil))
}

// sentAt reads {"v":NANOSECONDS}.
func sentAt(payload []byte) time.Time {
	n, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimPrefix(string(payload), `{"v":`), "}"), 10, 64)
	return time.Unix(0, n)
}

type nodeConfig struct {
	devices int
	capture bool
}

// node is what edgecore has for devices, in this process.
type node struct {
	broker *mqtt.Embedded
	twins  *devicetwin.Twins
	db     *twindb.DB
	cancel context.CancelFunc
	g      *errgroup.Group
}

// mqttSubject is the node's broker with a subscriber at it.
type mqttSubject struct{ *node }

func (m mqttSubject) listen(ctx context.Context, heard func(time.Time)) (func(), error) {
	return subscribe(ctx, m.url(), heard)
}

func startNode(ctx context.Context, dir string, cfg nodeConfig) (_ *node, err error) {
	n := &node{}
	now := func() (time.Time, bool) { return time.Now(), true }
	if n.db, err = twindb.Open(twindb.Config{Path: filepath.Join(dir, "twins.db")}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.db.Close())
		}
	}()
	router, err := telemetry.New(telemetry.Config{Dir: filepath.Join(dir, "telemetry"), Node: "bench", Cursors: n.db,
		DeviceTopics: func(b devicetwin.Bound) []string { topics, _ := profile.Filters("bench", b); return topics }})
	if err != nil {
		return nil, err
	}
	observe := func(devicetwin.Observation) {}
	brokerConfig := mqtt.EmbeddedConfig{Listeners: []mqtt.ListenerConfig{{Address: "127.0.0.1:0"}}, Retained: n.db}
	if cfg.capture {
		observe, brokerConfig.Capture = router.Observe, router.Capture
	}
	if n.twins, err = devicetwin.New(devicetwin.Config{Node: "bench", DB: n.db, Now: now, Observe: observe}); err != nil {
		return nil, err
	}
	if n.broker, err = mqtt.NewEmbedded(brokerConfig); err != nil {
		return nil, err
	}
	driver, err := profile.New(profile.Config{Node: "bench", Broker: n.broker, Sink: n.twins})
	if err != nil {
		return nil, err
	}
	n.twins.Use(driver)
	model, devices := benchSet(cfg.devices)
	var bound []devicetwin.Bound
	for i := range devices {
		bound = append(bound, devicetwin.Bound{Device: &devices[i], Model: model})
	}
	if cfg.capture {
		router.Set([]*v1alpha1.TelemetryRoute{{
			ObjectMeta: metav1.ObjectMeta{Name: "bench", Namespace: "default", UID: "route"},
			Spec: v1alpha1.TelemetryRouteSpec{From: v1alpha1.RouteSource{DeviceSelector: &metav1.LabelSelector{}}, Capture: "sync",
				To: []v1alpha1.RouteSink{{Hub: &v1alpha1.HubSink{}}}},
		}}, bound)
	}
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	n.cancel = cancel
	n.g, run = errgroup.WithContext(run)
	n.g.Go(func() error { return driver.Run(run) })
	n.g.Go(func() error { return n.twins.Run(run) })
	n.g.Go(func() error { return router.Run(run) })
	n.twins.Set(bound, nil)
	select {
	case <-driver.Subscribed():
	case <-ctx.Done():
	}
	n.g.Go(func() error { return n.broker.Run(run) })
	for len(n.broker.Addrs()) == 0 && run.Err() == nil {
		if err := sleep(ctx, 5*time.Millisecond); err != nil {
			cancel()
			return nil, errors.Join(err, n.g.Wait())
		}
	}
	return n, nil
}

// benchSet is what is measured: one value that is the time of its publishing,
// and one that is wanted.
func benchSet(n int) (*v1alpha1.DeviceModel, []v1alpha1.Device) {
	model := &v1alpha1.DeviceModel{
		TypeMeta:   metav1.TypeMeta{APIVersion: v1alpha1.GroupAndVer, Kind: "DeviceModel"},
		ObjectMeta: metav1.ObjectMeta{Name: "bench"},
		Spec: v1alpha1.DeviceModelSpec{Profile: v1alpha1.ProfileJSON, Params: []v1alpha1.Param{{Name: "id", Required: true}},
			Properties: []v1alpha1.Property{
				{Name: "v", Type: v1alpha1.TypeInt64, Access: "r", Read: []v1alpha1.Read{{Topic: "bench/${id}/state", Path: "v"}}},
				{Name: "want", Type: v1alpha1.TypeInt64, Access: "rw", Read: []v1alpha1.Read{{Topic: "bench/${id}/state", Path: "want"}},
					Write: &v1alpha1.Write{Topic: "bench/${id}/set"}},
			}},
	}
	devices := make([]v1alpha1.Device, n)
	for i := range devices {
		devices[i] = v1alpha1.Device{
			TypeMeta:   metav1.TypeMeta{APIVersion: v1alpha1.GroupAndVer, Kind: "Device"},
			ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("d%d", i), Namespace: "default", UID: types.UID(fmt.Sprintf("uid-%d", i)), Generation: 1},
			Spec:       v1alpha1.DeviceSpec{ModelRef: v1alpha1.ModelRef{Name: "bench"}, Params: map[string]string{"id": strconv.Itoa(i)}},
		}
	}
	return model, devices
}

func (n *node) url() string { return "tcp://" + n.broker.Addrs()[0].String() }

func (n *node) close() error {
	n.cancel()
	return errors.Join(n.g.Wait(), n.db.Close())
}

func (n *node) listen(ctx context.Context, heard func(time.Time)) (func(), error) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	ready := make(chan struct{})
	go func() {
		defer close(done)
		last := map[devicetwin.Key]string{}
		var once sync.Once
		for c := range n.twins.Watch(ctx, v1alpha1.Version{}) {
			if c.Doc == nil {
				once.Do(func() { close(ready) })
				continue
			}
			r := c.Doc.Properties["v"].Reported
			if r == nil || last[c.Key] == string(r.Value) {
				continue
			}
			last[c.Key] = string(r.Value)
			ns, _ := strconv.ParseInt(string(r.Value), 10, 64)
			heard(time.Unix(0, ns))
		}
	}()
	select {
	case <-ready:
	case <-ctx.Done():
	}
	return func() { cancel(); <-done }, nil
}
