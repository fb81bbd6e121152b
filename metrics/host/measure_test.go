package host

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func take(t *testing.T) Sample {
	t.Helper()
	s, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	sample := s.measure(t.Context())
	if n := s.failed.Load(); n != 0 {
		t.Fatalf("%d parts failed: %v", n, s.trouble)
	}
	return sample
}

func slurp(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// meminfo reads one line of /proc/meminfo, in bytes.
func meminfo(t *testing.T, key string) uint64 {
	t.Helper()
	for line := range strings.Lines(slurp(t, "/proc/meminfo")) {
		if f := strings.Fields(line); f[0] == key+":" {
			n, err := strconv.ParseUint(f[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n << 10
		}
	}
	t.Fatalf("/proc/meminfo has no %s", key)
	return 0
}

func TestMemoryMatchesProc(t *testing.T) {
	before := meminfo(t, "MemAvailable")
	m := take(t).Memory
	after := meminfo(t, "MemAvailable")
	if want := meminfo(t, "MemTotal"); m.Total != want {
		t.Errorf("total = %d, /proc says %d", m.Total, want)
	}
	if want := meminfo(t, "SwapTotal"); m.SwapTotal != want {
		t.Errorf("swap total = %d, /proc says %d", m.SwapTotal, want)
	}
	// Memory moves while we look; it stays near what was seen around it.
	const slack = 256 << 20
	if low, high := min(before, after), max(before, after); m.Available+slack < low || m.Available > high+slack {
		t.Errorf("available = %d, /proc said %d before and %d after", m.Available, before, after)
	}
}

// procStat reads the cpu line of /proc/stat in seconds: user, nice, system,
// idle, iowait, irq, softirq, steal.
func procStat(t *testing.T) [8]float64 {
	t.Helper()
	f := strings.Fields(slurp(t, "/proc/stat"))
	var v [8]float64
	for i := range v {
		n, err := strconv.ParseFloat(f[1+i], 64)
		if err != nil {
			t.Fatal(err)
		}
		v[i] = n / 100 // USER_HZ is 100 on every Linux
	}
	return v
}

func TestCPUMatchesProc(t *testing.T) {
	before := procStat(t)
	c := take(t).CPU
	after := procStat(t)
	got := [8]float64{c.User, c.Nice, c.System, c.Idle, c.IOWait, c.IRQ, c.SoftIRQ, c.Steal}
	for i, name := range []string{"user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal"} {
		if got[i] < before[i]-0.02 || got[i] > after[i]+0.02 {
			t.Errorf("%s = %v s, /proc/stat said %v before and %v after", name, got[i], before[i], after[i])
		}
	}
	online := 0
	for line := range strings.Lines(slurp(t, "/proc/cpuinfo")) {
		if strings.HasPrefix(line, "processor") {
			online++
		}
	}
	if online > 0 && c.Cores != online {
		t.Errorf("cores = %d, /proc/cpuinfo has %d", c.Cores, online)
	}
}

func TestCPUUsedIsAShareOfTheTimeBetweenSamples(t *testing.T) {
	s, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	first := s.measure(t.Context()).CPU
	if first.Used != 0 {
		t.Errorf("first sample: used = %v, want 0", first.Used)
	}
	// Burn until the kernel has counted a fifth of a second.
	deadline := time.Now().Add(10 * time.Second)
	var second CPU
	for x := 0; ; x++ {
		if x%1_000_000 != 0 {
			continue
		}
		s.cpu(t.Context(), &second)
		if second.busy()-first.busy() > 0.2 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the kernel counted no processor time in 10 s of work")
		}
		s.previous = first
	}
	want := (second.busy() - first.busy()) / (second.all() - first.all())
	if second.Used <= 0 || second.Used > 1 || second.Used < want-0.01 || second.Used > want+0.01 {
		t.Errorf("used = %v, want %v", second.Used, want)
	}
}

func TestUptimeAndLoadMatchProc(t *testing.T) {
	sample := take(t)
	up, err := strconv.ParseFloat(strings.Fields(slurp(t, "/proc/uptime"))[0], 64)
	if err != nil {
		t.Fatal(err)
	}
	if got := sample.Uptime.Seconds(); got < up-5 || got > up+1 {
		t.Errorf("uptime = %v s, /proc says %v", got, up)
	}
	var one, five, fifteen float64
	if _, err := fmt.Sscan(slurp(t, "/proc/loadavg"), &one, &five, &fifteen); err != nil {
		t.Fatal(err)
	}
	// The kernel updates it every 5 s, between two reads too.
	if d := sample.Load.Fifteen - fifteen; d < -0.5 || d > 0.5 {
		t.Errorf("15-minute load = %v, /proc says %v", sample.Load.Fifteen, fifteen)
	}
}

func TestFileSystemsMatchStatfs(t *testing.T) {
	sample := take(t)
	if len(sample.FileSystems) == 0 && strings.Contains(slurp(t, "/proc/self/mounts"), "/dev/root / ") {
		t.Error("the root device is mounted but not measured")
	}
	seen := make(map[string]bool)
	for _, f := range sample.FileSystems {
		if seen[f.Device] {
			t.Errorf("device %s is there twice", f.Device)
		}
		seen[f.Device] = true
		var st syscall.Statfs_t
		if err := syscall.Statfs(f.Mountpoint, &st); err != nil {
			t.Fatal(err)
		}
		if want := st.Blocks * uint64(st.Bsize); f.Size != want {
			t.Errorf("%s: size = %d, statfs says %d", f.Mountpoint, f.Size, want)
		}
		if f.Inodes != st.Files {
			t.Errorf("%s: inodes = %d, statfs says %d", f.Mountpoint, f.Inodes, st.Files)
		}
		const slack = 256 << 20 // others write meanwhile
		if want := st.Bavail * uint64(st.Bsize); f.Available+slack < want || f.Available > want+slack {
			t.Errorf("%s: available = %d, statfs says %d", f.Mountpoint, f.Available, want)
		}
	}
}

// netDev reads the received and sent bytes of every interface.
func netDev(t *testing.T) map[string][2]uint64 {
	t.Helper()
	all := make(map[string][2]uint64)
	for s := bufio.NewScanner(strings.NewReader(slurp(t, "/proc/net/dev"))); s.Scan(); {
		name, rest, ok := strings.Cut(s.Text(), ":")
		if f := strings.Fields(rest); ok && len(f) >= 9 {
			in, _ := strconv.ParseUint(f[0], 10, 64)
			out, _ := strconv.ParseUint(f[8], 10, 64)
			all[strings.TrimSpace(name)] = [2]uint64{in, out}
		}
	}
	return all
}

func TestInterfacesMatchProc(t *testing.T) {
	before := netDev(t)
	sample := take(t)
	after := netDev(t)
	if len(sample.Interfaces) == 0 {
		t.Fatal("no interface, not even lo")
	}
	for _, i := range sample.Interfaces {
		b, ok := before[i.Name]
		a, ok2 := after[i.Name]
		if !ok || !ok2 {
			continue // came or went meanwhile
		}
		if i.ReceivedBytes < b[0] || i.ReceivedBytes > a[0] || i.SentBytes < b[1] || i.SentBytes > a[1] {
			t.Errorf("%s: received %d, sent %d; /proc said %v before and %v after", i.Name, i.ReceivedBytes, i.SentBytes, b, a)
		}
	}
}

func TestDisksMatchSys(t *testing.T) {
	for _, d := range take(t).Disks {
		text, err := os.ReadFile(filepath.Join("/sys/class/block", d.Device, "stat"))
		if err != nil {
			continue
		}
		f := strings.Fields(string(text))
		sectors, err := strconv.ParseUint(f[2], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		if d.ReadBytes > sectors*512 {
			t.Errorf("%s: read %d bytes, the kernel counts %d", d.Device, d.ReadBytes, sectors*512)
		}
	}
}

func TestBoundedKeepsTheSameFirstNames(t *testing.T) {
	var all []Interface
	for i := range 100 {
		all = append(all, Interface{Name: fmt.Sprintf("eth%03d", 99-i)})
	}
	got := bounded(all, func(i Interface) string { return i.Name })
	if len(got) != maxOfEach || got[0].Name != "eth000" || got[maxOfEach-1].Name != "eth031" {
		t.Errorf("kept %d: first %s", len(got), got[0].Name)
	}
}

func TestMeasureStopsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	s, err := New(Config{Period: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	for {
		if _, ok := s.Latest(); ok {
			break
		}
		select {
		case err := <-done:
			t.Fatalf("Run returned early: %v", err)
		default:
			runtime.Gosched()
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func BenchmarkMeasure(b *testing.B) {
	s, err := New(Config{})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		s.measure(b.Context())
	}
}
