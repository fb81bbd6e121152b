package drill

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/edgecore/autonomy"
	"github.com/skerry-io/skerry/edgecore/store"
)

// fakeRuntime has sandboxes that can be stopped.
type fakeRuntime struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	sandboxes []*runtimeapi.PodSandbox
	mu        sync.Mutex
	stopped   []string
	fail      string // the sandbox that cannot be stopped
}

func (f *fakeRuntime) ListPodSandbox(context.Context, *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error) {
	return &runtimeapi.ListPodSandboxResponse{Items: f.sandboxes}, nil
}

func (f *fakeRuntime) StopPodSandbox(_ context.Context, req *runtimeapi.StopPodSandboxRequest) (*runtimeapi.StopPodSandboxResponse, error) {
	if req.PodSandboxId == f.fail {
		return nil, errors.New("stuck")
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.stopped = append(f.stopped, req.PodSandboxId)
	return &runtimeapi.StopPodSandboxResponse{}, nil
}

type rig struct {
	*fakeRuntime
	t     *testing.T
	cfg   Config
	store *store.Store
	cuts  atomic.Int32 // pauses that have not been resumed
}

func newRig(t *testing.T) *rig {
	t.Helper()
	dir, err := os.MkdirTemp("", "drill") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	r := &rig{t: t, fakeRuntime: &fakeRuntime{}}
	if r.store, err = store.Open(store.Config{Path: filepath.Join(dir, "store.db")}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.store.Close() })
	l, err := net.Listen("unix", filepath.Join(dir, "runtime.sock"))
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	runtimeapi.RegisterRuntimeServiceServer(srv, r.fakeRuntime)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	t.Cleanup(func() { srv.Stop(); <-served })
	r.cfg = Config{
		Path: filepath.Join(dir, "drill.json"), Store: r.store, Runtime: "unix://" + l.Addr().String(), KubeletDir: filepath.Join(dir, "kubelet"),
		Pause: func() func() { r.cuts.Add(1); return func() { r.cuts.Add(-1) } },
		Ready: func(context.Context) autonomy.Report { return autonomy.Report{Ready: true} },
	}
	return r
}

func (r *rig) manager() *Manager {
	r.t.Helper()
	m, err := New(r.cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	return m
}

// run lets a manager work until the function it returns ends it.
func (r *rig) run(m *Manager) (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	end = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			r.t.Error(err)
		}
	})
	r.t.Cleanup(end)
	return end
}

func (r *rig) put(name string, policy corev1.RestartPolicy, container string, ready bool) {
	r.t.Helper()
	p := corev1.Pod{Spec: corev1.PodSpec{RestartPolicy: policy, Containers: []corev1.Container{{Name: "c"}}}}
	p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "c", ContainerID: container, State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}}}
	if ready {
		p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	}
	body, err := json.Marshal(p)
	if err != nil {
		r.t.Fatal(err)
	}
	key := store.Key{Resource: "pods", Namespace: "ns", Name: name}
	if _, known := r.store.Get(key); !known {
		err = r.store.ApplyDelta(r.t.Context(), store.Delta{Synced: "1", Upserts: []store.Upsert{{Key: key, UID: "uid-" + name, Rev: "1", Body: body}}})
	} else { // the status is the kubelet's
		err = r.store.Local(r.t.Context(), func(tx *store.Tx) error { _, err := tx.Put(key, "uid-"+name, body); return err })
	}
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) await(m *Manager, what string, is func(State) bool) State {
	r.t.Helper()
	for range 2000 {
		if s, ok := m.State(); ok && is(s) {
			return s
		}
		time.Sleep(10 * time.Millisecond)
	}
	s, _ := m.State()
	r.t.Fatalf("not %s: %+v", what, s)
	return s
}

func done(s State) bool { return s.Phase == PhaseDone }

func podOf(s State, name string) Pod {
	for _, p := range s.Pods {
		if p.Name == name {
			return p
		}
	}
	return Pod{}
}

func TestWhatIsNotBegun(t *testing.T) {
	r := newRig(t)
	m := r.manager()
	if _, ok := m.State(); ok {
		t.Error("a drill from nowhere")
	}
	want := func(req Request, text string) {
		t.Helper()
		if _, err := m.Begin(t.Context(), req); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%+v: %v, want %q", req, err, text)
		}
		if r.cuts.Load() != 0 {
			t.Error("the tunnel is cut")
		}
	}
	want(Request{Offline: time.Second}, "5s to 1h0m0s")
	want(Request{Offline: 2 * time.Hour}, "5s to 1h0m0s")
	want(Request{Offline: time.Minute}, "first sync")
	r.put("p", corev1.RestartPolicyAlways, "old", true)
	m.cfg.Ready = func(context.Context) autonomy.Report {
		return autonomy.Report{Findings: []autonomy.Finding{{Breaks: true, Subject: "pod ns/p", Problem: "image x is not on this node", Remedy: "import it"}}}
	}
	want(Request{Offline: time.Minute}, "image x is not on this node; import it")
	m.cfg.Path = filepath.Join(t.TempDir(), "none", "drill.json")
	want(Request{Offline: time.Minute, Force: true}, "not on disk is not begun")
	m.cfg.Path = r.cfg.Path
	if _, err := m.Begin(t.Context(), Request{Offline: time.Minute, Force: true}); err != nil || r.cuts.Load() != 1 || !m.Cut() {
		t.Fatal(err)
	}
	if _, err := m.Begin(t.Context(), Request{Offline: time.Minute, Force: true}); err == nil || !strings.Contains(err.Error(), "under way") || r.cuts.Load() != 1 {
		t.Errorf("a second one: %v", err)
	}
}

func TestARebootThroughAnotherProcess(t *testing.T) {
	r := newRig(t)
	r.put("back", corev1.RestartPolicyAlways, "old", true)
	r.put("lost", corev1.RestartPolicyAlways, "old", true)
	r.put("never-was", corev1.RestartPolicyAlways, "old", false)
	r.put("once", corev1.RestartPolicyNever, "old", true)
	for _, name := range []string{"back", "lost", "never-was", "once", "unknown"} {
		r.sandboxes = append(r.sandboxes, &runtimeapi.PodSandbox{Id: name, Metadata: &runtimeapi.PodSandboxMetadata{Namespace: "ns", Name: name, Uid: "uid-" + name}})
	}
	first := r.manager()
	end := r.run(first)
	s, err := first.Begin(t.Context(), Request{Offline: 5 * time.Second, Reboot: true})
	if err != nil || s.Phase != PhaseReboot || len(s.Pods) != 4 {
		t.Fatalf("%+v %v", s, err)
	}
	end()

	// The new process: cut from the first moment, pods stopped before the kubelet.
	r.cuts.Store(0)
	m := r.manager()
	if r.cuts.Load() != 1 || !m.Cut() {
		t.Fatal("the tunnel is up")
	}
	if err := m.BeforeKubelet(t.Context()); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(strings.Join(r.stopped, " "), "once") || strings.Contains(strings.Join(r.stopped, " "), "unknown") || len(r.stopped) != 3 {
		t.Errorf("stopped %v", r.stopped)
	}
	if err := m.BeforeKubelet(t.Context()); err != nil || len(r.stopped) != 3 {
		t.Errorf("stopped once more: %v %v", r.stopped, err)
	}
	r.run(m)
	time.Sleep(50 * time.Millisecond)
	r.put("back", corev1.RestartPolicyAlways, "new", false)
	r.await(m, "running", func(s State) bool { return podOf(s, "back").Running > 0 })
	r.put("back", corev1.RestartPolicyAlways, "new", true)
	s = r.await(m, "done", done)
	if s.Passed || r.cuts.Load() != 0 || s.Problem != "" {
		t.Errorf("%+v, %d cuts", s, r.cuts.Load())
	}
	if p := podOf(s, "back"); !p.Back || p.Ready < p.Running || p.Running < 0.05 || p.Why != "" {
		t.Errorf("%+v", p)
	}
	if p := podOf(s, "lost"); p.Back || p.Why != "container c has not been started again" || !p.failed() {
		t.Errorf("%+v", p)
	}
	if p := podOf(s, "never-was"); p.failed() {
		t.Errorf("%+v", p)
	}
	if p := podOf(s, "once"); p.failed() || !strings.Contains(p.Skipped, "Never") {
		t.Errorf("%+v", p)
	}
	// The report is there for the next process too.
	if again, ok := r.manager().State(); !ok || again.Passed || !done(again) || len(again.Pods) != 4 || r.cuts.Load() != 0 {
		t.Errorf("%+v", again)
	}
}

func TestTheCauseIsKeptThroughABackOff(t *testing.T) {
	r := newRig(t)
	r.put("p", corev1.RestartPolicyAlways, "old", true)
	m := r.manager()
	if _, err := m.Begin(t.Context(), Request{Offline: time.Minute}); err != nil {
		t.Fatal(err)
	}
	waits := func(reason, message string) string {
		t.Helper()
		key := store.Key{Resource: "pods", Namespace: "ns", Name: "p"}
		body, err := json.Marshal(corev1.Pod{Status: corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{{
			Name: "c", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: message}}}}}})
		if err != nil {
			t.Fatal(err)
		}
		if err := r.store.Local(t.Context(), func(tx *store.Tx) error { _, err := tx.Put(key, "uid-p", body); return err }); err != nil {
			t.Fatal(err)
		}
		m.look()
		s, _ := m.State()
		return podOf(s, "p").Why
	}
	const crash, image = "container c: CrashLoopBackOff: back-off 1m20s", "container c: RegistryUnavailable: x is not on this node"
	if got := waits("CrashLoopBackOff", "back-off 1m20s"); got != crash {
		t.Errorf("%q", got)
	}
	if got := waits("RegistryUnavailable", "x is not on this node"); got != image {
		t.Errorf("%q", got)
	}
	if got := waits("CrashLoopBackOff", "back-off 1m20s"); got != image {
		t.Errorf("%q", got)
	}
}

func TestWithoutARebootPodsHaveToStay(t *testing.T) {
	r := newRig(t)
	r.put("stays", corev1.RestartPolicyAlways, "old", true)
	r.put("once", corev1.RestartPolicyNever, "old", true)
	m := r.manager()
	r.run(m)
	if _, err := m.Begin(t.Context(), Request{Offline: time.Minute}); err != nil {
		t.Fatal(err)
	}
	r.await(m, "looked at", func(s State) bool { return podOf(s, "stays").Back && podOf(s, "once").Back })
	r.put("once", corev1.RestartPolicyNever, "old", false)
	r.await(m, "looked at again", func(s State) bool { return !podOf(s, "once").Back })
	m.Stop()
	s := r.await(m, "done", done)
	if s.Passed || s.Problem != "it was stopped before its time" || !podOf(s, "stays").Back || r.cuts.Load() != 0 {
		t.Errorf("%+v", s)
	}
}

func TestANodeNeverStaysCutOff(t *testing.T) {
	for name, spoil := range map[string]func(s *State) []byte{
		"its time passed meanwhile": func(s *State) []byte { s.Until = 1; return nil },
		"the machine rebooted":      func(s *State) []byte { s.BootID = "another"; return nil },
		"the file is spoilt":        func(*State) []byte { return []byte(`{"phase":"watch","untilNanoseconds":9e99}`) },
		"the file is empty":         func(*State) []byte { return []byte{} },
		"the file is for ever":      func(s *State) []byte { s.Offline = 1000 * time.Hour; return nil },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			r.put("p", corev1.RestartPolicyAlways, "old", true)
			if _, err := r.manager().Begin(t.Context(), Request{Offline: time.Hour, Reboot: true}); err != nil {
				t.Fatal(err)
			}
			r.cuts.Store(0)
			s, err := load(r.cfg.Path)
			if err != nil {
				t.Fatal(err)
			}
			if b := spoil(s); b != nil {
				err = os.WriteFile(r.cfg.Path, b, 0o600)
			} else {
				err = save(r.cfg.Path, s)
			}
			if err != nil {
				t.Fatal(err)
			}
			m := r.manager()
			if err := m.BeforeKubelet(t.Context()); err != nil || len(r.stopped) > 0 {
				t.Errorf("pods were stopped: %v %v", r.stopped, err)
			}
			if r.cuts.Load() != 0 || m.Cut() {
				t.Error("the node is cut off")
			}
			if s, ok := m.State(); ok && (s.Phase != PhaseDone || s.Passed) {
				t.Errorf("%+v", s)
			}
		})
	}
}

func TestAPodThatCannotBeStoppedIsTold(t *testing.T) {
	r := newRig(t)
	r.put("p", corev1.RestartPolicyAlways, "old", true)
	r.sandboxes = []*runtimeapi.PodSandbox{{Id: "p", Metadata: &runtimeapi.PodSandboxMetadata{Namespace: "ns", Name: "p"}}}
	r.fail = "p"
	if _, err := r.manager().Begin(t.Context(), Request{Offline: MinOffline, Reboot: true}); err != nil {
		t.Fatal(err)
	}
	m := r.manager()
	if err := m.BeforeKubelet(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s, _ := m.State(); s.Phase != PhaseWatch || !strings.Contains(s.Problem, "stop the sandbox of pod ns/p") {
		t.Errorf("%+v", s)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"phase":"watch","offlineNanoseconds":5000000000,"untilNanoseconds":1,"pods":[{"name":"p"}]}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := decode(json.NewDecoder(bytes.NewReader(b)))
		if err == nil && (s.Offline < 0 || s.Offline > MaxOffline) {
			t.Errorf("%+v", s)
		}
	})
}
