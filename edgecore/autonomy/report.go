package autonomy

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Reasons of a Finding, and of the condition AutonomyReady when False.
const (
	// These break.
	ReasonNotSynced           = "NotSynced"
	ReasonImageMissing        = "ImageMissing"
	ReasonPullPolicyAlways    = "PullPolicyAlways"
	ReasonSecretMissing       = "SecretMissing"
	ReasonConfigMapMissing    = "ConfigMapMissing"
	ReasonVolumeMissing       = "VolumeMissing"
	ReasonVolumeNeedsCloud    = "VolumeNeedsCloud"
	ReasonRuntimeClassMissing = "RuntimeClassMissing"
	ReasonNeedsCloud          = "NeedsCloud"
	ReasonDiskFull            = "DiskFull"
	ReasonStoreTrouble        = "StoreTrouble"

	// These warn.
	ReasonDiskNearlyFull     = "DiskNearlyFull"
	ReasonTokenForOthers     = "TokenForOthers"
	ReasonPullSecretMissing  = "PullSecretMissing"
	ReasonRuntimeUnknown     = "RuntimeUnknown"
	ReasonCertificateExpires = "CertificateExpires"
	ReasonClockWrong         = "ClockWrong"
)

// Finding is one thing that would not be as it was.
type Finding struct {
	Breaks  bool   `json:"breaks"` // else a warning
	Reason  string `json:"reason"`
	Subject string `json:"subject"` // "pod NAMESPACE/NAME", "node", a directory
	Problem string `json:"problem"`
	Remedy  string `json:"remedy"`
}

func (f Finding) String() string { return f.Subject + ": " + f.Problem }

// Report is a verdict.
type Report struct {
	Ready    bool      `json:"ready"` // nothing breaks
	At       time.Time `json:"at"`
	Pods     int       `json:"pods"` // that would have to come back
	Findings []Finding `json:"findings,omitempty"`
}

// Breaking and Warnings count the findings.
func (r Report) Breaking() int {
	n := 0
	for _, f := range r.Findings {
		if f.Breaks {
			n++
		}
	}
	return n
}

func (r Report) Warnings() int { return len(r.Findings) - r.Breaking() }

// finish puts the findings into an order that depends on them alone, so that
// the same state gives the same words.
func (r *Report) finish() {
	slices.SortFunc(r.Findings, func(a, b Finding) int {
		if a.Breaks != b.Breaks {
			if a.Breaks {
				return -1
			}
			return 1
		}
		return cmp.Or(strings.Compare(a.Reason, b.Reason), strings.Compare(a.Subject, b.Subject), strings.Compare(a.Problem, b.Problem))
	})
	r.Findings = slices.CompactFunc(r.Findings, func(a, b Finding) bool { return a == b })
	r.Ready = r.Breaking() == 0
}

// told is how many findings a condition's message names; the others are in
// "edgecore status".
const told = 3

// words are the condition's reason and message.
func (r Report) words() (reason, message string) {
	n := r.Breaking()
	if n == 0 {
		reason, message = "AllIsHere", "every pod would start again without the cloud"
		if len(r.Findings) > 0 {
			message += "; but " + list(r.Findings, r.Warnings())
		}
		return reason, message
	}
	return r.Findings[0].Reason, "would not come back as it is: " + list(r.Findings, n)
}

func list(findings []Finding, n int) string {
	var parts []string
	for _, f := range findings[:min(n, told)] {
		parts = append(parts, f.String())
	}
	if more := n - told; more > 0 {
		parts = append(parts, fmt.Sprintf("and %d more, see edgecore status", more))
	}
	return strings.Join(parts, "; ")
}
