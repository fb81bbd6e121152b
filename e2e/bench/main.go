// Command bench measures Skerry on this host and prints one table: how long
// things take, and what they cost in memory, processor and disk. Where there is
// a peer (a plain upstream kubelet against the same API server, in the same
// run), it is measured in turn with Skerry, and the ratio is what counts:
// absolute times are this machine's.
//
// It needs root, the built programs (make build), and a quiet host.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/skerry-io/skerry/e2e/cluster"
	"github.com/skerry-io/skerry/e2e/image"
	"github.com/skerry-io/skerry/e2e/machine"
)

func main() {
	machine.Main()
	runs := flag.Int("runs", 5, "repetitions of what is repeated; the median is shown")
	only := flag.String("only", "", "comma-separated parts: size,boot,demo,pods,logs,cost,cold,resync,disk (default all)")
	kubelet := flag.String("kubelet", "", "a plain upstream kubelet to compare with; make bench builds one")
	settle := flag.Duration("settle", 60*time.Second, "idle time over which memory and processor are read")
	idle := flag.Duration("idle", 10*time.Minute, "idle time over which bytes to disk are counted")
	flag.Parse()
	// What was made on the host is taken down whoever ends us: each part cleans
	// up with a context of its own.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	b := &bench{runs: *runs, settle: *settle, idle: *idle, kubelet: *kubelet}
	if b.kubelet != "" {
		var err error
		if b.kubelet, err = filepath.Abs(b.kubelet); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
	}
	if err := b.run(ctx, *only); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

type bench struct {
	runs    int
	settle  time.Duration
	idle    time.Duration
	kubelet string // path of a plain kubelet

	dir      string
	programs cluster.Programs
	images   []string
	rows     []row
	cleanups []func()
}

// row is one line of the table.
type row struct{ what, result, goal, note string }

func (b *bench) add(what, result, goal, note string) {
	b.rows = append(b.rows, row{what, result, goal, note})
	fmt.Fprintf(os.Stderr, "  %-58s %s\n", what, result)
}

func (b *bench) run(ctx context.Context, only string) (err error) {
	if b.programs, err = cluster.FindPrograms(); err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp("", "skerry-bench-"); err != nil {
		return err
	}
	defer func() {
		for _, c := range slices.Backward(b.cleanups) {
			c()
		}
		if rmErr := os.RemoveAll(b.dir); err == nil {
			err = rmErr
		}
	}()
	for _, build := range []func(context.Context, string) (string, error){image.Pause, image.Demo} {
		tar, err := build(ctx, filepath.Join(b.dir, "images"))
		if err != nil {
			return err
		}
		b.images = append(b.images, tar)
	}
	parts := []struct {
		name string
		do   func(context.Context) error
	}{
		{"size", b.sizes}, {"boot", b.boot}, {"demo", b.demo}, {"pods", b.pods}, {"logs", b.logs}, {"cost", b.cost},
		{"cold", b.cold}, {"resync", b.resync}, {"disk", b.disk},
	}
	for _, p := range parts {
		if only != "" && !slices.Contains(strings.Split(only, ","), p.name) {
			continue
		}
		fmt.Fprintln(os.Stderr, p.name)
		if err := p.do(ctx); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	b.print()
	return nil
}

func (b *bench) print() {
	fmt.Printf("\n%s\n\n| what | result | goal | note |\n|---|---|---|---|\n", conditions())
	for _, r := range b.rows {
		fmt.Printf("| %s | %s | %s | %s |\n", r.what, r.result, r.goal, r.note)
	}
}

func conditions() string {
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	load, _ := os.ReadFile("/proc/loadavg")
	return fmt.Sprintf("%d cores, Linux %s, load before the table %s, %s", cores(),
		strings.TrimSpace(string(kernel)), strings.Fields(string(load) + " ?")[0], time.Now().UTC().Format("2006-01-02"))
}

// median of the values, with their range.
func median(d []time.Duration) (mid, low, high time.Duration) {
	d = slices.Sorted(slices.Values(d))
	return d[len(d)/2], d[0], d[len(d)-1]
}

func seconds(d []time.Duration) string {
	mid, low, high := median(d)
	return fmt.Sprintf("%.2f s (%.2f–%.2f, %d runs)", mid.Seconds(), low.Seconds(), high.Seconds(), len(d))
}
