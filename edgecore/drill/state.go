package drill

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Phases of a drill.
const (
	PhaseReboot = "reboot" // pods are to be stopped before the kubelet starts
	PhaseWatch  = "watch"  // offline; pods are looked at
	PhaseDone   = "done"
)

// State is a drill under way, or the last one. It is the file's content.
type State struct {
	Phase      string        `json:"phase"`
	Reboot     bool          `json:"reboot"`
	Namespaces []string      `json:"namespaces,omitempty"` // of the pods restarted; none: all
	Offline    time.Duration `json:"offlineNanoseconds"`
	Started    time.Time     `json:"started"`
	Ended      time.Time     `json:"ended,omitzero"`
	Pods       []Pod         `json:"pods"`
	// Problem is what kept the drill from being carried out as planned.
	Problem string `json:"problem,omitempty"`
	// Passed says that every pod that was to be there is.
	Passed bool `json:"passed"`

	// Since the machine with that boot ID booted.
	BootID    string        `json:"bootID"`
	Until     time.Duration `json:"untilNanoseconds"`
	Restarted time.Duration `json:"restartedNanoseconds,omitempty"` // the pods were stopped
}

// Pod is one pod of a drill.
type Pod struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	UID       string `json:"uid"`
	// Skipped says why the pod was left alone; empty: it was restarted, or is
	// watched.
	Skipped  string `json:"skipped,omitempty"`
	WasReady bool   `json:"wasReady"` // before; of others nothing is expected

	Running float64 `json:"runningAfterSeconds,omitempty"` // all its containers, after the restart
	Ready   float64 `json:"readyAfterSeconds,omitempty"`
	Back    bool    `json:"back"` // Ready at the end of the drill
	Why     string  `json:"why,omitempty"`

	// Containers are the IDs from before a restart.
	Containers []string `json:"containers,omitempty"`
}

// failed tells whether the pod is missing though it was there.
func (p *Pod) failed() bool { return p.Skipped == "" && p.WasReady && !p.Back }

// maxState bounds the file: some hundred bytes for each of a node's pods.
const maxState = 4 << 20

// load reads the file; nil when there is none.
func load(path string) (*State, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("drill: %w", err)
	}
	defer f.Close()
	s, err := decode(json.NewDecoder(&limited{f, maxState}))
	if err != nil {
		return nil, fmt.Errorf("drill: %s: %w", path, err)
	}
	return s, nil
}

func decode(d *json.Decoder) (*State, error) {
	var s State
	if err := d.Decode(&s); err != nil {
		return nil, err
	}
	switch s.Phase {
	case PhaseReboot, PhaseWatch, PhaseDone:
	default:
		return nil, fmt.Errorf("unknown phase %q", s.Phase)
	}
	if s.Offline < 0 || s.Offline > MaxOffline || s.Until < 0 {
		return nil, errors.New("times out of range")
	}
	return &s, nil
}

// limited is an io.LimitedReader whose end is an error of the decoder.
type limited struct {
	f    *os.File
	left int
}

func (l *limited) Read(p []byte) (int, error) {
	if l.left <= 0 {
		return 0, errors.New("the file is too large")
	}
	n, err := l.f.Read(p[:min(len(p), l.left)])
	l.left -= n
	return n, err
}

// save replaces the file.
func save(path string, s *State) error {
	b, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("drill: %w", err)
	}
	part := path + ".part"
	f, err := os.OpenFile(part, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("drill: %w", err)
	}
	_, err = f.Write(b)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("drill: write %s: %w", part, err)
	}
	if err := os.Rename(part, path); err != nil {
		return fmt.Errorf("drill: %w", err)
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("drill: %w", err)
	}
	defer dir.Close()
	if err := dir.Sync(); err != nil {
		return fmt.Errorf("drill: %w", err)
	}
	return nil
}

// sinceBoot is the machine's own time: it goes on in sleep, and nobody sets it.
func sinceBoot() (bootID string, now time.Duration, err error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", 0, fmt.Errorf("drill: %w", err)
	}
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return "", 0, fmt.Errorf("drill: read the time since boot: %w", err)
	}
	return strings.TrimSpace(string(b)), time.Duration(ts.Nano()), nil
}
