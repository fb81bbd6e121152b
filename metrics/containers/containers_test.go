package containers

import (
	"bufio"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	cadvisorapiv2 "github.com/google/cadvisor/info/v2"
	"k8s.io/klog/v2"
)

// workerVariable makes this test binary the process that is measured.
const workerVariable = "SKERRY_TEST_WORKER"

func TestMain(m *testing.M) {
	if os.Getenv(workerVariable) != "" {
		work()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// workerMemory is what the worker touches, far above a bare process.
const workerMemory = 64 << 20

// work waits to be put into its cgroup, uses memory and processor time, says so
// and stays until its standard input ends.
func work() {
	in := bufio.NewReader(os.Stdin)
	if _, err := in.ReadString('\n'); err != nil {
		return
	}
	block := make([]byte, workerMemory)
	for i := 0; i < len(block); i += 512 {
		block[i] = 1
	}
	sum := 0
	for until := time.Now().Add(300 * time.Millisecond); time.Now().Before(until); {
		for i := range 100_000 {
			sum += i
		}
	}
	fmt.Println("worked", sum != 0)
	in.ReadString('\n')
	block[0] = 2
}

// cgroup is a control group of the test's own, in every hierarchy it needs.
type cgroup struct {
	name string
	dirs map[string]string // controller -> directory; one key "" with cgroup v2
}

func newCgroup(t *testing.T) cgroup {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("making a cgroup needs root: run as root")
	}
	c := cgroup{name: fmt.Sprintf("/skerry-metrics-test-%d", os.Getpid()), dirs: make(map[string]string)}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		c.dirs[""] = filepath.Join("/sys/fs/cgroup", c.name)
		if err := os.WriteFile("/sys/fs/cgroup/cgroup.subtree_control", []byte("+cpu +memory +pids"), 0); err != nil {
			t.Logf("enable controllers: %v", err)
		}
	} else {
		for _, h := range []string{"cpu", "cpuacct", "memory", "pids"} {
			c.dirs[h] = filepath.Join("/sys/fs/cgroup", h, c.name)
		}
	}
	for _, dir := range c.dirs {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := os.Remove(dir); err != nil {
				t.Errorf("cgroup left behind: %v", err)
			}
		})
	}
	return c
}

func (c cgroup) dir(controller string) string {
	if d, ok := c.dirs[""]; ok {
		return d
	}
	return c.dirs[controller]
}

func (c cgroup) number(t *testing.T, controller, file string) uint64 {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(c.dir(controller), file))
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// cpuNanoseconds is the processor time the kernel counted for the cgroup.
func (c cgroup) cpuNanoseconds(t *testing.T) uint64 {
	t.Helper()
	if _, v2 := c.dirs[""]; !v2 {
		return c.number(t, "cpuacct", "cpuacct.usage")
	}
	b, err := os.ReadFile(filepath.Join(c.dir(""), "cpu.stat"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); f[0] == "usage_usec" {
			n, err := strconv.ParseUint(f[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n * 1000
		}
	}
	t.Fatal("cpu.stat has no usage_usec")
	return 0
}

func (c cgroup) memoryBytes(t *testing.T) uint64 {
	t.Helper()
	if _, v2 := c.dirs[""]; v2 {
		return c.number(t, "", "memory.current")
	}
	return c.number(t, "memory", "memory.usage_in_bytes")
}

// startWorker runs a worker inside c and returns when its work is done.
func startWorker(t *testing.T, c cgroup) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), workerVariable+"=1")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("worker: %v", err)
		}
	})
	for _, dir := range c.dirs {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := io.WriteString(stdin, "\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
}

// TestFiguresMatchTheCgroupFiles is one test because cAdvisor's manager can be
// made once per process.
func TestFiguresMatchTheCgroupFiles(t *testing.T) {
	klog.SetSlogLogger(slog.New(slog.DiscardHandler)) // cAdvisor looks for runtimes that are not there
	c := newCgroup(t)
	startWorker(t, c)

	root := t.TempDir()
	m, err := New(Config{RootDir: filepath.Join(root, "kubelet"), CgroupRoots: []string{c.name}, ContainerdEndpoint: "unix://" + root + "/none.sock", Interval: time.Second, Disk: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Stop(); err != nil {
			t.Error(err)
		}
	})

	t.Run("machine", func(t *testing.T) {
		info, err := m.MachineInfo()
		if err != nil {
			t.Fatal(err)
		}
		var kib uint64
		text, err := os.ReadFile("/proc/meminfo")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Sscanf(string(text), "MemTotal: %d kB", &kib); err != nil {
			t.Fatal(err)
		}
		if info.MemoryCapacity != kib<<10 {
			t.Errorf("memory = %d, /proc says %d", info.MemoryCapacity, kib<<10)
		}
	})

	t.Run("container", func(t *testing.T) {
		wantCPU, wantMemory := c.cpuNanoseconds(t), c.memoryBytes(t)
		if wantMemory < workerMemory {
			t.Fatalf("the worker's cgroup holds %d bytes, less than it touched", wantMemory)
		}
		stats := awaitStats(t, m, c.name, func(s *cadvisorapiv2.ContainerStats) bool {
			return s.Cpu != nil && s.Memory != nil && s.Cpu.Usage.Total >= wantCPU
		})
		// The worker sleeps now, so both stand still.
		if got := stats.Cpu.Usage.Total; got > c.cpuNanoseconds(t) {
			t.Errorf("cpu = %d ns, the kernel says %d", got, c.cpuNanoseconds(t))
		}
		const slack = 4 << 20
		if got := stats.Memory.Usage; got+slack < wantMemory || got > wantMemory+slack {
			t.Errorf("memory = %d, the kernel says %d", got, wantMemory)
		}
		if stats.Processes == nil || stats.Processes.ProcessCount != 1 {
			t.Errorf("processes = %+v, want 1", stats.Processes)
		}
	})

	t.Run("root file system", func(t *testing.T) {
		// The figure comes with the first look at the root cgroup.
		awaitStats(t, m, "/", func(*cadvisorapiv2.ContainerStats) bool { return true })
		info, err := m.RootFsInfo()
		if err != nil {
			t.Fatal(err)
		}
		if info.Capacity == 0 || info.Available > info.Capacity {
			t.Errorf("capacity %d, available %d", info.Capacity, info.Available)
		}
	})

	t.Run("others are left alone", func(t *testing.T) {
		all, err := m.GetRequestedContainersInfo("/", cadvisorapiv2.RequestOptions{IdType: cadvisorapiv2.TypeName, Count: 1, Recursive: true})
		if err != nil {
			t.Fatal(err)
		}
		for name := range all {
			if name != "/" && name != c.name {
				t.Errorf("%s is measured too", name)
			}
		}
	})

	t.Run("images are the runtime's", func(t *testing.T) {
		if _, err := m.ImagesFsInfo(t.Context()); err == nil {
			t.Error("cAdvisor claims to know the image file system")
		}
		if _, err := m.ContainerFsInfo(t.Context()); err == nil {
			t.Error("cAdvisor claims to know the container file system")
		}
	})
}

// awaitStats asks until a sample satisfies enough. OnDemand makes cAdvisor look
// at once instead of at its next turn.
func awaitStats(t *testing.T, m *Containers, name string, enough func(*cadvisorapiv2.ContainerStats) bool) *cadvisorapiv2.ContainerStats {
	t.Helper()
	age := time.Duration(0)
	deadline := time.Now().Add(20 * time.Second)
	for {
		infos, err := m.ContainerInfoV2(name, cadvisorapiv2.RequestOptions{IdType: cadvisorapiv2.TypeName, Count: 1, MaxAge: &age})
		if err == nil && len(infos[name].Stats) > 0 {
			if last := infos[name].Stats[len(infos[name].Stats)-1]; enough(last) {
				return last
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("no fitting sample of %s in 20 s: %v", name, err)
		}
	}
}

func TestNewChecksItsConfig(t *testing.T) {
	for name, cfg := range map[string]Config{
		"no root directory":         {CgroupRoots: []string{"/kubepods"}},
		"no cgroup roots":           {RootDir: "/var/lib/kubelet"},
		"interval below a second":   {RootDir: "/x", CgroupRoots: []string{"/y"}, Interval: time.Millisecond},
		"keeps less than a turn":    {RootDir: "/x", CgroupRoots: []string{"/y"}, Interval: time.Minute, Keep: time.Second},
		"longest below the minimum": {RootDir: "/x", CgroupRoots: []string{"/y"}, Interval: time.Minute, MaxInterval: time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := New(cfg); err == nil {
				t.Error("accepted")
			}
		})
	}
}

func TestPressureAvailable(t *testing.T) {
	if pressureAvailable(filepath.Join(t.TempDir(), "cpu.pressure")) {
		t.Error("found in an empty directory")
	}
	file := filepath.Join(t.TempDir(), "cpu.pressure")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if !pressureAvailable(file) {
		t.Error("not found")
	}
}
