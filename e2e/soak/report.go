package main

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"time"
)

// report is the run in Markdown.
func (s *soak) report() string {
	s.checkMemory()
	s.t.mu.Lock()
	defer s.t.mu.Unlock()
	var b strings.Builder
	verdict := "No promise was broken."
	if n := len(s.t.violations) + s.t.unkept; n > 0 {
		verdict = fmt.Sprintf("**%d violations.**", n)
	}
	fmt.Fprintf(&b, "# Soak of %s, seed %d\n\n%s\n\n", s.cfg.time, s.cfg.seed, verdict)
	s.conditions(&b)
	s.violated(&b)
	s.faultTable(&b)
	s.stepTable(&b)
	s.costTable(&b)
	return b.String()
}

func (s *soak) conditions(b *strings.Builder) {
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	load, _ := os.ReadFile("/proc/loadavg")
	fmt.Fprintf(b, "| condition | |\n|---|---|\n")
	row := func(k, v string) { fmt.Fprintf(b, "| %s | %s |\n", k, v) }
	row("began", s.began.UTC().Format("2006-01-02 15:04:05Z"))
	row("lasted", time.Since(s.began).Round(time.Second).String()+", with start and end")
	row("commit", commit())
	row("machine", fmt.Sprintf("%d cores, Linux %s, %s, load at the end %s", runtime.NumCPU(), strings.TrimSpace(string(kernel)), runtime.GOARCH, strings.Fields(string(load) + " ?")[0]))
	row("cluster", fmt.Sprintf("one standalone hub, %d edge nodes with containerd, each in namespaces of its own", len(s.nodes)))
	row("again", fmt.Sprintf("`make soak TIME=%s SEED=%d`", s.cfg.time, s.cfg.seed))
	fmt.Fprintln(b)
}

func (s *soak) violated(b *strings.Builder) {
	if len(s.t.violations) == 0 {
		return
	}
	fmt.Fprintf(b, "## Violations\n\n")
	for _, v := range s.t.violations {
		fmt.Fprintf(b, "```\n%s\n```\n", v)
	}
	if s.t.unkept > 0 {
		fmt.Fprintf(b, "\nAnd %d more.\n", s.t.unkept)
	}
	fmt.Fprintln(b)
}

func (s *soak) faultTable(b *strings.Builder) {
	fmt.Fprintf(b, "## Faults\n\nIn step: from the fault's end until the node is connected and its store has been in step with the cloud since. "+
		"It is not told where the hub was away as well.\n\n| fault | times | in step: median | p95 | max |\n|---|---|---|---|---|\n")
	var all []time.Duration
	n := 0
	line := func(name string, times int, took []time.Duration) {
		if len(took) == 0 {
			fmt.Fprintf(b, "| %s | %d | | | |\n", name, times)
			return
		}
		fmt.Fprintf(b, "| %s | %d | %s | %s | %s |\n", name, times, sec(at(took, 50)), sec(at(took, 95)), sec(at(took, 100)))
	}
	for _, name := range slices.Sorted(maps.Keys(s.t.faults)) {
		times := s.t.faults[name]
		n += len(times)
		took := slices.DeleteFunc(slices.Clone(times), func(d time.Duration) bool { return d == 0 })
		line(name, len(times), took)
		all = append(all, took...)
	}
	line("**all**", n, all)
	fmt.Fprintf(b, "\n## At rest\n\nFrom the end of all faults and changes until cloud, nodes and containers agree: each pod, its UID, container, restart count and whole status; "+
		"workloads complete; outboxes empty. And until every mounted ConfigMap is the newest.\n\n| | times | median | p95 | max |\n|---|---|---|---|---|\n")
	line("all agree", len(s.t.agreement), s.t.agreement)
	line("mounts renewed after that", len(s.t.mounts), s.t.mounts)
	fmt.Fprintln(b)
}

func (s *soak) stepTable(b *strings.Builder) {
	fmt.Fprintf(b, "## Changes\n\nA step fails while the hub or the node is away; what was acknowledged must hold.\n\n| step | times | failed |\n|---|---|---|\n")
	for _, name := range slices.Sorted(maps.Keys(s.t.steps)) {
		fmt.Fprintf(b, "| %s | %d | %d |\n", name, s.t.steps[name].done, s.t.steps[name].failed)
	}
	fmt.Fprintf(b, "\n| seen | |\n|---|---|\n")
	for _, name := range slices.Sorted(maps.Keys(s.t.counts)) {
		fmt.Fprintf(b, "| %s | %d |\n", name, s.t.counts[name])
	}
	s.book.mu.Lock()
	fmt.Fprintf(b, "| Jobs acknowledged | %d |\n| of these, complete and deleted before the end | %d |\n| jobs' pods that ended well | %d |\n| of these, run again after that | %d |\n",
		s.book.created, s.book.done, len(s.book.ran), s.book.jobsTwice)
	s.book.mu.Unlock()
	for _, n := range s.t.notes {
		fmt.Fprintf(b, "\n%s\n", strings.ToUpper(n[:1])+n[1:]+".")
	}
	fmt.Fprintln(b)
}

func (s *soak) costTable(b *strings.Builder) {
	fmt.Fprintf(b, "## Costs\n\nMemory is anonymous (and of mapped files) in MB; at rest means after each round, when all agree.\n\n"+
		"| program | first | median | max | at rest: first | last | max | mapped files, max | goroutines at rest: first | last | max |\n|---|---|---|---|---|---|---|---|---|---|---|\n")
	for _, name := range s.gaugeNames() {
		g := s.gaugeOf(name)
		if len(g.anon) == 0 || len(g.rest) == 0 {
			continue
		}
		fmt.Fprintf(b, "| %s | %.0f | %.0f | %.0f | %.0f | %.0f | %.0f | %.0f | %.0f | %.0f | %.0f |\n", name,
			g.anon[0], at(g.anon, 50), slices.Max(g.anon), g.rest[0], g.rest[len(g.rest)-1], slices.Max(g.rest), slices.Max(g.file),
			g.routine[0], g.routine[len(g.routine)-1], slices.Max(g.routine))
	}
	fmt.Fprintf(b, "\n| program | written to disk | of this, counted by the store | sent over the tunnel | received | Events dropped |\n|---|---|---|---|---|---|\n")
	for _, name := range s.gaugeNames() {
		g := s.gaugeOf(name)
		store, sent, recv, dropped := "", "", "", ""
		if name != "cloudhub" {
			store, sent, recv, dropped = mb(g.store), mb(g.sent), mb(g.recv), fmt.Sprint(g.dropped)
		}
		fmt.Fprintf(b, "| %s | %s | %s | %s | %s | %s |\n", name, mb(g.written+g.current), store, sent, recv, dropped)
	}
}

func mb(n uint64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }

func sec(d time.Duration) string { return fmt.Sprintf("%.1f s", d.Seconds()) }

// at returns a percentile.
func at[T int | float64 | time.Duration](all []T, percent int) T {
	sorted := slices.Sorted(slices.Values(all))
	return sorted[min(len(sorted)-1, len(sorted)*percent/100)]
}

// commit tells what was built, as far as git knows.
func commit() string {
	out, err := exec.Command("git", "describe", "--always", "--dirty", "--abbrev=12").Output()
	if err != nil {
		return "unknown"
	}
	return string(bytes.TrimSpace(out))
}
