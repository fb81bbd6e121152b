// Command soak lets a hub and two edge nodes work for as long as it is told,
// under constant change and random faults, and checks all the while what
// Skerry promises. It prints a report and ends with an error when a promise
// was broken.
//
// It goes in rounds: for some minutes the churn (churn.go) and the faults
// (faults.go) run, then all faults end, and within a bound the nodes, the
// containers on them and the cloud have to agree (agree.go). What must hold at
// every moment, such as that no pod runs twice, is watched throughout
// (watch.go). The seed decides all that is random in it, though not how the
// parts' timing falls out.
//
// Everything is real, as in the other tests; it needs root and the built
// programs (make soak).
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/skerry-io/skerry/e2e/machine"
)

func main() {
	machine.Main()
	cfg := config{}
	flag.DurationVar(&cfg.time, "time", 10*time.Minute, "how long to go on; starting and ending come on top")
	flag.Uint64Var(&cfg.seed, "seed", uint64(time.Now().UnixNano()%1e9), "decides what is random")
	flag.StringVar(&cfg.reports, "reports", "e2e/reports", "folder for the report")
	flag.BoolVar(&cfg.verbose, "v", false, "tell each fault and step on stderr")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ok, err := soakAndReport(ctx, cfg)
	if err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
	}
	if err != nil || !ok {
		os.Exit(1)
	}
}

type config struct {
	time    time.Duration
	seed    uint64
	reports string
	verbose bool
}

// soakAndReport is the whole program; ok tells that no promise was broken.
func soakAndReport(ctx context.Context, cfg config) (ok bool, err error) {
	fmt.Fprintf(os.Stderr, "soak: seed %d, %s\n", cfg.seed, cfg.time)
	before, err := machine.Snapshot(ctx)
	if err != nil {
		return false, err
	}
	s, err := newSoak(ctx, cfg)
	if err != nil {
		return false, err
	}
	err = s.run(ctx)
	interrupted := ctx.Err() != nil
	switch {
	case interrupted:
		s.t.note("interrupted after %s", time.Since(s.began).Round(time.Second))
	case err != nil:
		s.t.violate("the soak could not go on: %v", err)
	}
	if downErr := s.takeDown(); downErr != nil {
		s.t.violate("taking down: %v", downErr)
	}
	left, leakErr := machine.Leaks(context.WithoutCancel(ctx), before)
	if leakErr != nil || len(left) > 0 {
		s.t.violate("left behind on the host: %d things, among them %v %v", len(left), left[:min(len(left), 10)], leakErr)
	}
	text := s.report()
	fmt.Print(text)
	path := filepath.Join(cfg.reports, fmt.Sprintf("soak-%s-%d.md", s.began.UTC().Format("2006-01-02"), cfg.seed))
	if err := os.MkdirAll(cfg.reports, 0o755); err != nil {
		return false, err
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		return false, err
	}
	fmt.Fprintln(os.Stderr, "soak: report in", path)
	return len(s.t.violations) == 0 && !interrupted, nil
}
