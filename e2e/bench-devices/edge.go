package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"

	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/e2e/cluster"
	"github.com/skerry-io/skerry/e2e/machine"
)

// loadProgram is this program inside the machine, where the node's broker is.
const loadProgram = "/var/lib/bench/load"

// world is a hub and an edge node, with the built programs.
type world struct {
	hub    *cluster.Hub
	node   *cluster.Node
	admin  kubernetes.Interface
	client dynamic.Interface
	hubURL string
	http   *http.Client
	token  string
}

// edge is what takes the whole: the way to the hub and back, and memory.
func (b *bench) edge(ctx context.Context) error {
	w, err := b.world(ctx)
	if err != nil {
		return err
	}
	defer w.close()
	pid, err := w.node.EdgecoreHostPID()
	if err != nil {
		return err
	}
	if err := sleep(ctx, b.settle); err != nil {
		return err
	}
	idle, err := anonymous(pid)
	if err != nil {
		return err
	}
	b.add("edgecore without a device: memory", fmt.Sprintf("anon %.1f MB", idle), "", "no pod on the node")
	have := 0
	for _, n := range []int{benchDevices, 1000} {
		if err := w.addDevices(ctx, have, n); err != nil {
			return err
		}
		have = n
		// Each says something ten times.
		if _, err := w.load(ctx, n, 10, min(n, 500), time.Duration(n)*10*time.Second/time.Duration(min(n, 500))); err != nil {
			return err
		}
		if err := sleep(ctx, b.settle); err != nil {
			return err
		}
		mb, err := anonymous(pid)
		if err != nil {
			return err
		}
		goal := ""
		if n == 1000 {
			goal = "≤ +25 MB"
		}
		b.add(fmt.Sprintf("edgecore with %d devices: memory", n), fmt.Sprintf("anon %.1f MB (%+.1f MB)", mb, mb-idle), goal,
			fmt.Sprintf("%s after each has said something 10 times; 10 connections", b.settle))
		if n == benchDevices {
			if err := b.toHub(ctx, w); err != nil {
				return err
			}
			if err := b.toDevice(ctx, w); err != nil {
				return err
			}
		}
	}
	return nil
}

// toHub is from before the publish to a watcher of the hub's /v1/twins.
func (b *bench) toHub(ctx context.Context, w *world) error {
	var times [][]time.Duration
	for range b.runs {
		took, err := w.watchHub(ctx, func() error {
			_, err := w.load(ctx, benchDevices, 10, 1000, b.time)
			return err
		})
		if err != nil {
			return err
		}
		times = append(times, took)
	}
	b.add("device → hub's /v1/twins watcher, 1,000/s", percentiles(times), "p99 ≤ 250 ms", "QoS 1, 10 publishers; the newest value where several come within its gathering")
	return nil
}

// watchHub follows the hub's twins while do goes on.
func (w *world) watchHub(ctx context.Context, do func() error) ([]time.Duration, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, w.hubURL+"/v1/twins?watch=1", nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+w.token)
	res, err := w.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(res.Body, 1000))
		return nil, fmt.Errorf("watch the hub: %s: %s", res.Status, text)
	}
	synced := make(chan struct{})
	done := make(chan []time.Duration, 1)
	go func() {
		var took []time.Duration
		defer func() { done <- took }()
		last := map[string]string{}
		live := false
		lines := bufio.NewScanner(res.Body)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			var e struct {
				Type string `json:"type"`
				Twin struct {
					Name       string `json:"name"`
					Properties map[string]struct {
						Reported struct {
							Value json.RawMessage `json:"value"`
						} `json:"reported"`
					} `json:"properties"`
				} `json:"twin"`
			}
			if json.Unmarshal(lines.Bytes(), &e) != nil {
				continue
			}
			if e.Type == "synced" && !live {
				live = true
				close(synced)
				continue
			}
			v := string(e.Twin.Properties["v"].Reported.Value)
			if v == "" || v == last[e.Twin.Name] {
				continue
			}
			last[e.Twin.Name] = v
			if ns, err := strconv.ParseInt(v, 10, 64); err == nil && live {
				took = append(took, time.Since(time.Unix(0, ns)))
			}
		}
	}()
	select {
	case <-synced:
	case took := <-done:
		return took, errors.New("the hub's watch has ended at once")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if err := do(); err != nil {
		return nil, err
	}
	if err := sleep(ctx, time.Second); err != nil { // the last ones are on their way
		return nil, err
	}
	cancel()
	return <-done, nil
}

// toDevice is from before a patch of the Device to its message at the device.
func (b *bench) toDevice(ctx context.Context, w *world) error {
	var took []time.Duration
	patched := map[string]time.Time{}
	patches := max(20, 10*b.runs)
	loadErr := make(chan error, 1)
	var out []byte
	go func() {
		var err error
		out, err = w.load(ctx, 1, 1, 1, time.Duration(patches)*250*time.Millisecond+5*time.Second)
		loadErr <- err
	}()
	if err := sleep(ctx, 3*time.Second); err != nil { // it has subscribed
		return err
	}
	devices := w.client.Resource(v1alpha1.Resource(v1alpha1.Devices)).Namespace("default")
	for i := range patches {
		want := strconv.Itoa(1000 + i)
		patched[want] = time.Now()
		if _, err := devices.Patch(ctx, fmt.Sprintf("d%d", i%benchDevices), types.MergePatchType,
			[]byte(`{"spec":{"desired":{"want":`+want+`}}}`), metav1.PatchOptions{}); err != nil {
			return err
		}
		if err := sleep(ctx, 200*time.Millisecond); err != nil {
			return err
		}
	}
	if err := <-loadErr; err != nil {
		return err
	}
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		if len(f) != 4 || f[0] != "set" {
			continue
		}
		at, err := strconv.ParseInt(f[3], 10, 64)
		if began, ok := patched[f[2]]; ok && err == nil {
			took = append(took, time.Unix(0, at).Sub(began))
			delete(patched, f[2]) // written again until the device says so
		}
	}
	note := "from before the API server has it; one patch each 200 ms"
	if len(patched) > 0 {
		note += fmt.Sprintf("; %d came not within the run", len(patched))
	}
	b.add("patch of a Device's desired value → message at the device", percentiles([][]time.Duration{took}), "≤ 1 s", note)
	return nil
}

// load publishes inside the machine, and returns what it printed.
func (w *world) load(ctx context.Context, devices, publishers, rate int, d time.Duration) ([]byte, error) {
	var out, complaint bytes.Buffer
	p, err := w.node.Exec(ctx, machine.Command{Stdout: &out, Stderr: &complaint, Args: []string{loadProgram, loadCommand,
		"-devices", strconv.Itoa(devices), "-publishers", strconv.Itoa(publishers), "-rate", strconv.Itoa(rate), "-time", d.String()}})
	if err != nil {
		return nil, err
	}
	if err := p.Wait(ctx); err != nil {
		return nil, fmt.Errorf("load: %w: %s", err, complaint.Bytes())
	}
	return out.Bytes(), nil
}

func (w *world) addDevices(ctx context.Context, from, to int) error {
	model, devices := benchSet(to)
	put := func(o any, resource string, namespace string) error {
		u, err := runtime.DefaultUnstructuredConverter.ToUnstructured(o)
		if err != nil {
			return err
		}
		delete(u, "status")
		unstructured.RemoveNestedField(u, "metadata", "uid")
		unstructured.RemoveNestedField(u, "metadata", "generation")
		_, err = w.client.Resource(v1alpha1.Resource(resource)).Namespace(namespace).Create(ctx, &unstructured.Unstructured{Object: u}, metav1.CreateOptions{})
		return err
	}
	if from == 0 {
		if err := put(model, v1alpha1.Models, ""); err != nil {
			return err
		}
	}
	for i := from; i < to; i++ {
		devices[i].Spec.NodeName = w.node.Name()
		if err := put(&devices[i], v1alpha1.Devices, "default"); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for {
		n, err := w.twins(ctx)
		if err == nil && n == to {
			return nil
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return fmt.Errorf("the node has %d twins of %d: %w", n, to, err)
		}
	}
}

// twins counts those of the node.
func (w *world) twins(ctx context.Context) (int, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://edgecore/v1/twins", nil)
	if err != nil {
		return 0, err
	}
	res, err := w.node.AdminClient().Do(req)
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	var list struct {
		Items []json.RawMessage `json:"items"`
	}
	err = json.NewDecoder(res.Body).Decode(&list)
	return len(list.Items), err
}

func (b *bench) world(ctx context.Context) (_ *world, err error) {
	programs, err := cluster.FindPrograms()
	if err != nil {
		return nil, err
	}
	w := &world{}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	if w.node, err = cluster.NewNode(cluster.NodeConfig{Dir: filepath.Join(b.dir, "edge-1"), Name: "edge-1", Programs: programs}); err != nil {
		return nil, err
	}
	if w.hub, err = cluster.NewHub(cluster.HubConfig{Dir: filepath.Join(b.dir, "hub"), Programs: programs, Names: []string{w.node.HostIP()}}); err != nil {
		return nil, err
	}
	for _, step := range []func(context.Context) error{
		w.hub.Start, w.node.Boot,
		func(ctx context.Context) error { return w.node.Join(ctx, w.hub) },
		w.node.Run, w.connected, w.access,
	} {
		if err := step(ctx); err != nil {
			return nil, err
		}
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return nil, err
	}
	path := w.node.Disk(loadProgram)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	return w, os.WriteFile(path, self, 0o755)
}

func (w *world) connected(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		if st, err := w.node.StatusBySocket(ctx); err == nil && st.Connected && st.Synced {
			return nil
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return fmt.Errorf("the node does not connect: %w", err)
		}
	}
}

// access is an administrator's, by certificate at the API server and by token
// at the hub.
func (w *world) access(ctx context.Context) error {
	rc, err := w.hub.RESTConfig()
	if err != nil {
		return err
	}
	if w.admin, err = kubernetes.NewForConfig(rc); err != nil {
		return err
	}
	if w.client, err = dynamic.NewForConfig(rc); err != nil {
		return err
	}
	meta := metav1.ObjectMeta{Name: "bench", Namespace: "default"}
	if _, err := w.admin.CoreV1().ServiceAccounts("default").Create(ctx, &corev1.ServiceAccount{ObjectMeta: meta}, metav1.CreateOptions{}); err != nil {
		return err
	}
	binding := &rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: "bench"},
		RoleRef:  rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "cluster-admin"},
		Subjects: []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Name: "bench", Namespace: "default"}}}
	if _, err := w.admin.RbacV1().ClusterRoleBindings().Create(ctx, binding, metav1.CreateOptions{}); err != nil {
		return err
	}
	token, err := w.admin.CoreV1().ServiceAccounts("default").CreateToken(ctx, "bench", &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	w.token = token.Status.Token
	ca, err := os.ReadFile(w.node.Disk(cluster.EdgeDataDir + "/identity/ca.crt"))
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return errors.New("the hub's CA has no certificate")
	}
	w.hubURL = w.node.HubURL(w.hub)
	w.http = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}}
	return nil
}

func (w *world) close() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var errs []error
	if w.node != nil {
		errs = append(errs, w.node.Destroy(ctx))
	}
	if w.hub != nil && w.hub.Running() {
		errs = append(errs, w.hub.Stop(ctx))
	}
	if err := errors.Join(errs...); err != nil {
		fmt.Fprintln(os.Stderr, "bench-devices: clean up:", err)
	}
}

// anonymous memory of a process in MB.
func anonymous(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			kb, err := strconv.ParseFloat(strings.Fields(v)[0], 64)
			return kb * 1024 / 1e6, err
		}
	}
	return 0, fmt.Errorf("process %d tells no RssAnon", pid)
}
