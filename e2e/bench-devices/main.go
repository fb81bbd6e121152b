// Command bench-devices measures Skerry's devices on this host and prints one
// table: how fast messages go from a device to a twin and to who watches it, how
// long a desired value takes to the device, what it costs in memory and in bytes
// to the disk. mosquitto alone is measured in the same run with the same
// publishers: absolute figures are this machine's, and the load's at the time.
//
// The parts that are of a node alone run in this process, put together as
// edgecore does; "edge" runs the built programs and needs root.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/skerry-io/skerry/e2e/machine"
)

func main() {
	machine.Main()
	if len(os.Args) > 1 && os.Args[1] == loadCommand {
		if err := runLoad(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "bench-devices: load:", err)
			os.Exit(1)
		}
		return
	}
	b := &bench{}
	only := flag.String("only", "", "comma-separated parts: rate,latency,capture,disk,edge (default all)")
	flag.IntVar(&b.runs, "runs", 3, "repetitions of what is repeated; the median is shown")
	flag.DurationVar(&b.time, "time", 5*time.Second, "of one repetition")
	flag.DurationVar(&b.disk, "disk", 2*time.Minute, "over which bytes to the disk are counted")
	flag.DurationVar(&b.settle, "settle", 30*time.Second, "before memory is read")
	flag.Parse()
	// What was made on the host is taken down whoever ends us: each part cleans
	// up with a context of its own.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := b.run(ctx, *only); err != nil {
		fmt.Fprintln(os.Stderr, "bench-devices:", err)
		os.Exit(1)
	}
}

type bench struct {
	runs   int
	time   time.Duration
	disk   time.Duration
	settle time.Duration
	dir    string
	rows   []row
}

// row is one line of the table.
type row struct{ what, result, goal, note string }

func (b *bench) add(what, result, goal, note string) {
	b.rows = append(b.rows, row{what, result, goal, note})
	fmt.Fprintf(os.Stderr, "  %-64s %s\n", what, result)
}

func (b *bench) run(ctx context.Context, only string) (err error) {
	if b.dir, err = os.MkdirTemp("", "skerry-bench-devices-"); err != nil {
		return err
	}
	defer func() {
		if rmErr := os.RemoveAll(b.dir); err == nil {
			err = rmErr
		}
	}()
	for _, p := range []struct {
		name string
		do   func(context.Context) error
	}{{"rate", b.rate}, {"latency", b.latency}, {"capture", b.capture}, {"disk", b.diskBytes}, {"edge", b.edge}} {
		if only != "" && !slices.Contains(strings.Split(only, ","), p.name) {
			continue
		}
		fmt.Fprintln(os.Stderr, p.name)
		if err := p.do(ctx); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	load, _ := os.ReadFile("/proc/loadavg")
	fmt.Printf("\n%d cores, Linux %s, load before the table %s, %s\n\n| what | result | goal | note |\n|---|---|---|---|\n", runtime.NumCPU(),
		strings.TrimSpace(string(kernel)), strings.Fields(string(load) + " ?")[0], time.Now().UTC().Format("2006-01-02"))
	for _, r := range b.rows {
		fmt.Printf("| %s | %s | %s | %s |\n", r.what, r.result, r.goal, r.note)
	}
	return nil
}

// median of the values, with their range.
func median(v []float64) (mid, low, high float64) {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2], v[0], v[len(v)-1]
}

func perSecond(v []float64) string {
	mid, low, high := median(v)
	return fmt.Sprintf("%.0f/s (%.0f–%.0f, %d runs)", mid, low, high, len(v))
}

// percentiles of each run; the median of the runs is shown.
func percentiles(runs [][]time.Duration) string {
	var p50, p99 []float64
	n := 0
	for _, r := range runs {
		if len(r) == 0 {
			continue
		}
		r = slices.Sorted(slices.Values(r))
		p50 = append(p50, float64(r[len(r)/2])/1e6)
		p99 = append(p99, float64(r[len(r)*99/100])/1e6)
		n += len(r)
	}
	if len(p50) == 0 {
		return "nothing came"
	}
	m50, _, _ := median(p50)
	m99, low, high := median(p99)
	return fmt.Sprintf("p50 %.2f ms, p99 %.2f ms (%.2f–%.2f, %d runs, %d messages)", m50, m99, low, high, len(p50), n)
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
