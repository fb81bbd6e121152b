package drill

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/skerry-io/skerry/edgecore/autonomy"
	"github.com/skerry-io/skerry/edgecore/store"
)

// Bounds of how long a drill keeps the node offline.
const (
	MinOffline = 5 * time.Second
	MaxOffline = time.Hour
)

// Config of a Manager.
type Config struct {
	Path       string       // of the file that outlives the process; required
	Store      *store.Store // required
	Runtime    string       // CRI endpoint, "unix:///…"; required
	KubeletDir string       // the kubelet's root directory; required
	// Pause cuts the tunnel until the function it returns is called. Required.
	Pause func() (resume func())
	// Ready is the node's readiness for being alone, looked at now. Required.
	Ready func(ctx context.Context) autonomy.Report
	Log   *slog.Logger // nil discards
}

// Request asks for a drill.
type Request struct {
	Offline    time.Duration `json:"offlineNanoseconds"`
	Reboot     bool          `json:"reboot"`
	Namespaces []string      `json:"namespaces,omitempty"`
	Force      bool          `json:"force"` // though something would break
}

// Manager carries out one drill at a time. It is safe for concurrent use.
type Manager struct {
	cfg Config
	log *slog.Logger

	began   chan struct{} // a drill began
	stopped chan struct{} // the drill is to end now

	mu     sync.Mutex
	state  *State // nil: there was none yet
	resume func() // while the tunnel is cut
}

// New takes up a drill that the last process was in, its tunnel cut from the
// first moment. It starts nothing.
func New(cfg Config) (*Manager, error) {
	if cfg.Path == "" || cfg.Store == nil || cfg.Runtime == "" || cfg.KubeletDir == "" || cfg.Pause == nil || cfg.Ready == nil {
		return nil, errors.New("drill: Path, Store, Runtime, KubeletDir, Pause and Ready are required")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	m := &Manager{cfg: cfg, log: cfg.Log, began: make(chan struct{}, 1), stopped: make(chan struct{}, 1)}
	state, err := load(cfg.Path)
	if err != nil {
		// A node whose file is spoilt must not stay cut off, nor off.
		m.log.Warn("the record of the last drill is lost", "err", err)
		return m, nil
	}
	m.state = state
	if state == nil || state.Phase == PhaseDone {
		return m, nil
	}
	bootID, now, err := sinceBoot()
	if err != nil {
		return nil, err
	}
	if bootID != state.BootID || now >= state.Until {
		m.finish("edgecore was not running when the drill ended")
		return m, nil
	}
	m.resume = cfg.Pause()
	m.began <- struct{}{}
	return m, nil
}

// Begin starts a drill. With Reboot its caller has to restart the process next.
func (m *Manager) Begin(ctx context.Context, r Request) (State, error) {
	if r.Offline < MinOffline || r.Offline > MaxOffline {
		return State{}, fmt.Errorf("a drill keeps the node offline for %s to %s, not %s", MinOffline, MaxOffline, r.Offline)
	}
	if !m.cfg.Store.Synced() {
		return State{}, errors.New("the node's first sync with the hub is not complete: there is nothing to try yet")
	}
	if report := m.cfg.Ready(ctx); !report.Ready && !r.Force {
		return State{}, &NotReadyError{report}
	}
	bootID, now, err := sinceBoot()
	if err != nil {
		return State{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state != nil && m.state.Phase != PhaseDone {
		return State{}, fmt.Errorf("a drill is under way, for another %s; end it with edgecore drill --stop", (m.state.Until - now).Round(time.Second))
	}
	s := &State{
		Phase: PhaseWatch, Reboot: r.Reboot, Namespaces: r.Namespaces, Offline: r.Offline, Started: time.Now(),
		BootID: bootID, Until: now + r.Offline, Pods: m.pods(r),
	}
	if r.Reboot {
		// Its time begins when the pods have been stopped; this is the limit of
		// a process that does not get that far.
		s.Phase, s.Until = PhaseReboot, s.Until+stopTimeout
	}
	if err := save(m.cfg.Path, s); err != nil {
		return State{}, fmt.Errorf("%w; a drill whose end is not on disk is not begun", err)
	}
	m.log.Warn("drill: the tunnel is cut on purpose", "for", r.Offline, "reboot", r.Reboot, "pods", len(s.Pods))
	m.state, m.resume = s, m.cfg.Pause()
	if !r.Reboot {
		m.began <- struct{}{}
	}
	return s.clone(), nil
}

// NotReadyError is why a drill was not begun: it would do harm.
type NotReadyError struct{ Report autonomy.Report }

func (e *NotReadyError) Error() string {
	lines := []string{"the node is not ready to be alone, so a drill would do harm (--force does it all the same):"}
	for _, f := range e.Report.Findings {
		if f.Breaks {
			lines = append(lines, "  "+f.String()+"; "+f.Remedy)
		}
	}
	return strings.Join(lines, "\n")
}

// Stop ends a drill at once.
func (m *Manager) Stop() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.resume != nil {
		select {
		case m.stopped <- struct{}{}:
		default:
		}
	}
}

// State returns the drill under way or the last one; false when there was none.
func (m *Manager) State() (State, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state == nil {
		return State{}, false
	}
	return m.state.clone(), true
}

func (s *State) clone() State {
	c := *s
	c.Pods = slices.Clone(s.Pods)
	return c
}

// Cut tells whether a drill keeps the node offline now.
func (m *Manager) Cut() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.resume != nil
}

// Run sees drills through until ctx ends. A drill that is not over then goes on
// in the next process.
func (m *Manager) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-m.began:
		}
		why := m.watch(ctx)
		if ctx.Err() != nil {
			return nil
		}
		m.finish(why)
	}
}

// watch looks at the pods until the drill's end, and returns what was wrong
// with it.
func (m *Manager) watch(ctx context.Context) (problem string) {
	_, now, err := sinceBoot()
	if err != nil {
		return err.Error()
	}
	m.mu.Lock()
	left := m.state.Until - now
	m.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, max(left, 0))
	defer cancel()
	changes := make(chan struct{}, 1)
	watched := make(chan error, 1)
	go func() { watched <- m.follow(ctx, changes) }()
	defer func() { cancel(); <-watched }()
	m.look()
	for {
		select {
		case <-ctx.Done():
			m.look()
			return ""
		case <-m.stopped:
			m.look()
			return "it was stopped before its time"
		case <-changes:
			m.look()
		}
	}
}

// follow tells of changes to pods until ctx ends.
func (m *Manager) follow(ctx context.Context, changes chan<- struct{}) error {
	for {
		w, err := m.cfg.Store.Watch(ctx, "pods", m.cfg.Store.RV())
		if err != nil {
			return err
		}
		for {
			_, _, err := w.Next(ctx, 0)
			if err != nil && !errors.Is(err, store.ErrExpired) {
				return err
			}
			select {
			case changes <- struct{}{}:
			default:
			}
			if err != nil {
				break
			}
		}
	}
}

// finish writes the report and lets the tunnel come back.
func (m *Manager) finish(problem string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.state
	s.Phase, s.Ended = PhaseDone, time.Now()
	if s.Problem == "" {
		s.Problem = problem
	}
	s.Passed = s.Problem == ""
	for i := range s.Pods {
		if s.Pods[i].failed() {
			s.Passed = false
		}
	}
	if err := save(m.cfg.Path, s); err != nil {
		m.log.Error("the drill's report is not kept", "err", err)
	}
	if m.resume != nil {
		m.resume()
		m.resume = nil
	}
	select { // asked for too late
	case <-m.stopped:
	default:
	}
	m.log.Info("drill: over", "passed", s.Passed, "problem", s.Problem)
}

// pods are those that a drill is about, as they are now.
func (m *Manager) pods(r Request) []Pod {
	var pods []Pod
	objects, _ := m.cfg.Store.List("pods", "")
	for _, o := range objects {
		if len(r.Namespaces) > 0 && !slices.Contains(r.Namespaces, o.Namespace) {
			continue
		}
		var pod corev1.Pod
		if json.Unmarshal(o.Body, &pod) != nil || pod.DeletionTimestamp != nil || pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
			continue
		}
		p := Pod{Namespace: o.Namespace, Name: o.Name, UID: o.UID, WasReady: isReady(&pod)}
		if policy := pod.Spec.RestartPolicy; r.Reboot && policy != corev1.RestartPolicyAlways && policy != "" {
			p.Skipped = "restartPolicy " + string(policy) + ": it was left running"
		}
		if r.Reboot {
			for _, c := range pod.Status.ContainerStatuses {
				p.Containers = append(p.Containers, c.ContainerID)
			}
		}
		pods = append(pods, p)
	}
	return pods
}

// look brings the report up to date.
func (m *Manager) look() {
	_, now, err := sinceBoot()
	if err != nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range m.state.Pods {
		p := &m.state.Pods[i]
		if p.Skipped == "" {
			m.judge(p, (now - m.state.Restarted).Seconds())
		}
	}
}

func (m *Manager) judge(p *Pod, after float64) {
	was := p.Why
	p.Back, p.Why = false, ""
	o, ok := m.cfg.Store.Get(store.Key{Resource: "pods", Namespace: p.Namespace, Name: p.Name})
	var pod corev1.Pod
	switch {
	case !ok:
		p.Why = "it is gone from the node"
		return
	case o.UID != p.UID:
		p.Why = "another pod of its name took its place"
		return
	case json.Unmarshal(o.Body, &pod) != nil:
		p.Why = "the node's copy of it is unreadable"
		return
	}
	if p.Why = notRunning(&pod, p.Containers); p.Why != "" {
		// The kubelet counts a start that failed for want of an image as a
		// crash, and soon shows nothing but that it holds back.
		if strings.Contains(p.Why, crashLoop) && strings.HasPrefix(was, "container ") && !strings.Contains(was, crashLoop) {
			p.Why = was
		}
		return
	}
	if m.state.Reboot && p.Running == 0 {
		p.Running = after
	}
	if !isReady(&pod) {
		p.Why = "it runs, and is not ready"
		return
	}
	if m.state.Reboot && p.Ready == 0 {
		p.Ready = after
	}
	p.Back = true
}

const crashLoop = ": CrashLoopBackOff"

// notRunning says which of a pod's containers does not run, apart from those of
// before.
func notRunning(pod *corev1.Pod, before []string) string {
	for _, list := range [][]corev1.ContainerStatus{pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses} {
		for _, c := range list {
			if w := c.State.Waiting; w != nil && w.Message != "" {
				return fmt.Sprintf("container %s: %s: %s", c.Name, w.Reason, w.Message)
			}
		}
	}
	if len(pod.Status.ContainerStatuses) < len(pod.Spec.Containers) {
		return "it has not started"
	}
	for _, c := range pod.Status.ContainerStatuses {
		switch {
		case c.State.Running == nil && c.State.Waiting != nil:
			return fmt.Sprintf("container %s: %s", c.Name, c.State.Waiting.Reason)
		case c.State.Running == nil:
			return "container " + c.Name + " does not run"
		case slices.Contains(before, c.ContainerID):
			return "container " + c.Name + " has not been started again"
		}
	}
	return ""
}

func isReady(pod *corev1.Pod) bool {
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}
