package main

import (
	"bufio"
	"context"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/skerry-io/skerry/e2e/machine"
)

// What is more than this is a leak, or a bound that does not hold. A process at
// rest is compared with itself: a fifth more, and 16 MB, than half-way through
// is growth that goes on.
const (
	maxEdgeAnonMB   = 160
	maxHubAnonMB    = 900
	growthFactor    = 1.2
	growthAllowance = 16 // MB
)

// gauge is what was measured of one program, over all its processes.
type gauge struct {
	mu      sync.Mutex
	anon    []float64 // MB, each some seconds
	file    []float64
	rest    []float64 // anon at rest, after each round
	routine []float64 // goroutines at rest
	pid     int
	began   uint64
	written uint64 // bytes to disk, by ended processes
	current uint64 // by the present one
	store   uint64 // bytes that edgecore counts itself, likewise
	storeAt uint64
	sent    uint64 // by the tunnel
	sentAt  uint64
	recv    uint64
	recvAt  uint64
	dropped uint64 // Events
}

// measure reads the programs' memory and bytes until ctx ends.
func (s *soak) measure(ctx context.Context) error {
	for pause(ctx, 2*time.Second) {
		s.gaugeOf("cloudhub").sample(int(s.hubPID.Load()))
		for _, n := range s.nodes {
			pid := int(n.pid.Load())
			if pid == 0 {
				continue
			}
			g := s.gaugeOf(n.Name())
			g.sample(pid)
			limited, cancel := context.WithTimeout(ctx, time.Second)
			st, err := n.StatusBySocket(limited)
			cancel()
			if err == nil {
				g.mu.Lock()
				g.store, g.storeAt = grow(g.store, g.storeAt, st.StoreWritten)
				g.sent, g.sentAt = grow(g.sent, g.sentAt, st.TunnelSent)
				g.recv, g.recvAt = grow(g.recv, g.recvAt, st.TunnelRecv)
				g.dropped = max(g.dropped, st.EventsDropped)
				g.mu.Unlock()
			}
		}
	}
	return ctx.Err()
}

// grow adds to a sum what a counter that starts anew now and then has gone up.
func grow(sum, at, now uint64) (uint64, uint64) {
	if now < at {
		return sum + now, now
	}
	return sum + now - at, now
}

func (s *soak) gaugeOf(name string) *gauge {
	s.gaugesMu.Lock()
	defer s.gaugesMu.Unlock()
	if s.gauges[name] == nil {
		s.gauges[name] = &gauge{}
	}
	return s.gauges[name]
}

func (g *gauge) sample(pid int) {
	if pid == 0 {
		return
	}
	began := machine.StartTime(pid)
	anon, file, err := memory(pid)
	written, ioErr := writtenBytes(pid)
	if err != nil || ioErr != nil || began == 0 {
		return // it has just ended
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.pid != pid || g.began != began {
		g.written += g.current
		g.pid, g.began, g.current = pid, began, 0
	}
	g.current = written
	g.anon, g.file = append(g.anon, anon), append(g.file, file)
}

// restFigures notes memory and goroutines of a system at rest.
func (s *soak) restFigures(ctx context.Context) {
	note := func(name string, pid int, routines float64, err error) {
		anon, _, memErr := memory(pid)
		if err != nil || memErr != nil {
			s.t.note("figures of %s at rest: %v %v", name, err, memErr)
			return
		}
		g := s.gaugeOf(name)
		g.mu.Lock()
		defer g.mu.Unlock()
		g.rest, g.routine = append(g.rest, anon), append(g.routine, routines)
	}
	body, err := s.cloud.Discovery().RESTClient().Get().AbsPath("/metrics").DoRaw(ctx)
	note("cloudhub", int(s.hubPID.Load()), goroutines(string(body)), err)
	for _, n := range s.nodes {
		routines, err := n.goroutines(ctx)
		note(n.Name(), int(n.pid.Load()), routines, err)
	}
}

func (n *edge) goroutines(ctx context.Context) (float64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://edgecore/metrics", nil)
	if err != nil {
		return 0, err
	}
	res, err := n.admin.Do(req)
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	for sc := bufio.NewScanner(res.Body); sc.Scan(); {
		if v := goroutines(sc.Text()); v > 0 {
			return v, nil
		}
	}
	return 0, fmt.Errorf("the metrics tell no goroutines")
}

func goroutines(metrics string) float64 {
	for line := range strings.Lines(metrics) {
		if v, ok := strings.CutPrefix(line, "go_goroutines "); ok {
			f, _ := strconv.ParseFloat(strings.TrimSpace(v), 64)
			return f
		}
	}
	return 0
}

// checkMemory tells of memory that is too much or does not stop to grow.
func (s *soak) checkMemory() {
	for _, name := range s.gaugeNames() {
		g := s.gaugeOf(name)
		limit := float64(maxEdgeAnonMB)
		if name == "cloudhub" {
			limit = maxHubAnonMB
		}
		if len(g.anon) > 0 && slices.Max(g.anon) > limit {
			s.t.violate("%s: %.0f MB of anonymous memory, more than %.0f", name, slices.Max(g.anon), limit)
		}
		for what, series := range map[string][]float64{"MB of anonymous memory": g.rest, "goroutines": g.routine} {
			if len(series) < 6 {
				continue // too short a run to tell growth
			}
			half, last := series[len(series)/2], slices.Min(series[len(series)-2:])
			if last > half*growthFactor+growthAllowance {
				s.t.violate("%s: %s at rest grow: %.0f half-way, %.0f at the end", name, what, half, last)
			}
		}
	}
}

func (s *soak) gaugeNames() []string {
	names := []string{"cloudhub"}
	for _, n := range s.nodes {
		names = append(names, n.Name())
	}
	return names
}

// memory of a process in MB: what is its own, and the pages of files it maps.
func memory(pid int) (anon, file float64, err error) {
	return readKB(fmt.Sprintf("/proc/%d/status", pid), "RssAnon:", "RssFile:")
}

func readKB(path, first, second string) (a, b float64, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		kb, _ := strconv.ParseFloat(f[1], 64)
		switch f[0] {
		case first:
			a = kb * 1024 / 1e6
		case second:
			b = kb * 1024 / 1e6
		}
	}
	return a, b, nil
}

// writtenBytes is what a process has caused to be written to disk.
func writtenBytes(pid int) (uint64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(line, "write_bytes: "); ok {
			return strconv.ParseUint(strings.TrimSpace(v), 10, 64)
		}
	}
	return 0, fmt.Errorf("/proc/%d/io has no write_bytes", pid)
}
