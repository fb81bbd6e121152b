package kubelet

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
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

func (f Finding) String() string { return string(f.Severity) + ": " + f.text() }

func (f Finding) text() string { return fmt.Sprintf("%s: %s; %s", f.Subject, f.Problem, f.Remedy) }

// CheckError is what Run returns when the host cannot run a kubelet.
type CheckError struct{ Findings []Finding }

func (e *CheckError) Error() string {
	lines := make([]string, len(e.Findings))
	for i, f := range e.Findings {
		lines[i] = f.text()
	}
	return "kubelet: cannot start: " + strings.Join(lines, " | ")
}

// Check looks at the host as Run would, errors first. It changes nothing but
// for a probe file that it removes again. No Error among the findings means
// that the kubelet can start. A runtime that is not there is an Error here,
// while Run waits for it.
func Check(ctx context.Context, cfg Config) []Finding {
	if err := cfg.complete(); err != nil {
		return []Finding{{Error, "configuration", err.Error(), "correct edgecore's configuration"}}
	}
	settings, err := cfg.settings()
	if err != nil {
		return []Finding{{Error, "configuration", err.Error(), "correct edgecore's configuration"}}
	}
	findings := checkHost(hostAt("/"), &cfg, settings)

	info, err := probeRuntime(ctx, cfg.RuntimeEndpoint)
	var re *runtimeError
	switch {
	case errors.As(err, &re):
		findings = append(findings, re.Finding)
	case err == nil:
		findings = append(findings, checkRuntime(&cfg, info)...)
	}
	slices.SortStableFunc(findings, func(a, b Finding) int { return cmp.Compare(a.Severity, b.Severity) })
	return findings
}

// refuseOnErrors logs what Check would say of the host and fails on an Error.
func (k *Kubelet) refuseOnErrors(runtime runtimeInfo) error {
	findings := append(checkHost(hostAt("/"), &k.cfg, k.settings), checkRuntime(&k.cfg, runtime)...)
	var fatal []Finding
	for _, f := range findings {
		if f.Severity == Error {
			fatal = append(fatal, f)
			continue
		}
		k.cfg.Log.Warn("host check", "subject", f.Subject, "problem", f.Problem, "remedy", f.Remedy)
	}
	if len(fatal) > 0 {
		return &CheckError{Findings: fatal}
	}
	return nil
}

// checkRuntime judges a runtime that answers.
func checkRuntime(cfg *Config, info runtimeInfo) []Finding {
	var findings []Finding
	subject := socketPath(cfg.RuntimeEndpoint)
	if info.Name != "containerd" {
		findings = append(findings, Finding{Warning, subject, fmt.Sprintf("the runtime is %s %s; Skerry is tested with containerd", info.Name, info.Version), "use containerd if pods misbehave"})
	}
	if !info.NetworkReady {
		findings = append(findings, Finding{Warning, subject, "the pod network is not ready: " + info.NetworkMessage, "put a CNI configuration into /etc/cni/net.d; until then the node stays NotReady and only pods with hostNetwork run"})
	}
	if used := cgroupDriver("", info); cfg.CgroupDriver != "" && cfg.CgroupDriver != used {
		findings = append(findings, Finding{Error, "cgroup driver", fmt.Sprintf("runtime.cgroupDriver is %s, but the runtime uses %s", cfg.CgroupDriver, used), "remove runtime.cgroupDriver, or change SystemdCgroup in the runtime's configuration"})
	}
	return findings
}
