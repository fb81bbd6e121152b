package machine_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/e2e/image"
	"github.com/skerry-io/skerry/e2e/machine"
	"github.com/skerry-io/skerry/e2e/netem"
)

func TestMain(m *testing.M) {
	machine.Main()
	if len(os.Args) == 3 && os.Args[1] == "fetch" { // inside a machine, see fetcher
		client := http.Client{Timeout: 2 * time.Second}
		resp, err := client.Get(os.Args[2])
		if err == nil {
			_, err = io.Copy(io.Discard, resp.Body)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if dir := os.Getenv("MACHINE_OWNER_DIR"); dir != "" { // see TestOwnerDies
		os.Exit(ownMachine(dir))
	}
	if os.Getenv("MACHINE_UNIFIED") != "" { // see TestUnifiedCgroups
		if err := mountUnified(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// fetcher puts this program into a machine, where "fetcher fetch URL" is a
// client that every host has.
func fetcher(t *testing.T) func(*machine.Config) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return func(c *machine.Config) {
		c.NoContainerd = true
		c.Binds = []machine.Bind{{Host: exe, Inside: "/opt/fetcher"}}
	}
}

// newMachine makes a machine that the test's end destroys, and checks then
// that the host is as it was.
func newMachine(t *testing.T, name string, edit func(*machine.Config)) *machine.Machine {
	t.Helper()
	before, err := machine.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	cfg := machine.Config{Dir: filepath.Join(t.TempDir(), name), Name: name, Log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	if edit != nil {
		edit(&cfg)
	}
	m, err := machine.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
		defer cancel()
		if err := m.Destroy(ctx); err != nil {
			t.Error(err)
		}
		left, err := machine.Leaks(ctx, before)
		if err != nil {
			t.Error(err)
		}
		for _, l := range left {
			t.Errorf("left behind: %s", l)
		}
		if _, err := os.Stat(cfg.Dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the machine's folder is still there: %v", err)
		}
	})
	return m
}

func start(t *testing.T, m *machine.Machine) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	began := time.Now()
	if err := m.Start(ctx); err != nil {
		console, _ := os.ReadFile(filepath.Join(m.Dir(), "console.log"))
		t.Fatalf("%v\nconsole:\n%s", err, console)
	}
	t.Logf("started in %s", time.Since(began).Round(time.Millisecond))
}

func noContainerd(c *machine.Config) { c.NoContainerd = true }

func run(t *testing.T, m *machine.Machine, args ...string) string {
	t.Helper()
	out, err := m.Run(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func TestProcesses(t *testing.T) {
	bound := t.TempDir()
	if err := os.WriteFile(filepath.Join(bound, "note"), []byte("from the host"), 0o600); err != nil {
		t.Fatal(err)
	}
	m := newMachine(t, "procs", func(c *machine.Config) {
		c.NoContainerd = true
		c.Binds = []machine.Bind{{Host: bound, Inside: "/opt/bound"}}
	})
	if _, err := m.Exec(t.Context(), machine.Command{Args: []string{"true"}}); err == nil {
		t.Error("exec in a machine that is off gave no error")
	}
	start(t, m)
	if err := m.Start(t.Context()); err == nil {
		t.Error("a second Start gave no error")
	}

	t.Run("inside", func(t *testing.T) {
		if got := strings.TrimSpace(run(t, m, "hostname")); got != "procs" {
			t.Errorf("host name = %q", got)
		}
		if got := run(t, m, "cat", "/opt/bound/note"); got != "from the host" {
			t.Errorf("bound file = %q", got)
		}
		if _, err := m.Run(t.Context(), "touch", "/opt/bound/new"); err == nil {
			t.Error("a read-only bind was written to")
		}
		if _, err := m.Run(t.Context(), "touch", "/usr/skerry-test"); err == nil {
			t.Error("the host's /usr was written to")
		}
		if got := run(t, m, "cat", "/proc/1/cmdline"); !strings.HasPrefix(got, "skerry-machine-init") {
			t.Errorf("pid 1 = %q", got)
		}
		if mounts := run(t, m, "cat", "/proc/1/mountinfo"); strings.Contains(mounts, m.Dir()+"/") && strings.Contains(mounts, " /home ") {
			t.Errorf("the host's mounts are visible:\n%s", mounts)
		}
	})
	t.Run("streams", func(t *testing.T) {
		big := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
		var out, msg bytes.Buffer
		p, err := m.Exec(t.Context(), machine.Command{Args: []string{"cat"}, Stdin: bytes.NewReader(big), Stdout: &out, Stderr: &msg})
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(out.Bytes(), big) || msg.Len() > 0 {
			t.Errorf("%d bytes came back of %d; stderr %q", out.Len(), len(big), msg.Bytes())
		}
	})
	t.Run("endings", func(t *testing.T) {
		var status *machine.ExitStatus
		if _, err := m.Run(t.Context(), "ls", "/missing"); !errors.As(err, &status) || status.Code != 2 || !strings.Contains(err.Error(), "missing") {
			t.Errorf("ls of a missing file: %v", err)
		}
		if _, err := m.Exec(t.Context(), machine.Command{Args: []string{"no-such-program"}}); err == nil || !strings.Contains(err.Error(), "no-such-program") {
			t.Errorf("a program that is not there: %v", err)
		}
		p, err := m.Exec(t.Context(), machine.Command{Args: []string{"sleep", "100"}})
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if err := p.Wait(t.Context()); !errors.As(err, &status) || status.Signal != syscall.SIGTERM {
			t.Errorf("sleep ended with %v; want SIGTERM", err)
		}
		if err := p.Signal(syscall.SIGTERM); err == nil {
			t.Error("a signal to an ended process gave no error")
		}
	})
	t.Run("cancel", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		p, err := m.Exec(ctx, machine.Command{Name: "sleeper", Args: []string{"sleep", "100"}})
		if err != nil {
			t.Fatal(err)
		}
		again, err := m.Proc(t.Context(), "sleeper")
		if err != nil || again.PID() != p.PID() {
			t.Fatalf("Proc = %v, %v; want pid %d", again, err, p.PID())
		}
		if _, err := m.Exec(ctx, machine.Command{Name: "sleeper", Args: []string{"true"}}); err == nil {
			t.Error("two processes of one name run")
		}
		cancel()
		var status *machine.ExitStatus
		if err := again.Wait(t.Context()); !errors.As(err, &status) || status.Signal != syscall.SIGKILL {
			t.Errorf("after cancel: %v; want SIGKILL", err)
		}
		if err := p.Wait(t.Context()); !errors.Is(err, context.Canceled) {
			t.Errorf("Wait = %v; want context.Canceled", err)
		}
		procs, err := m.Procs()
		if err != nil || len(procs) != 1 || procs[0].Name != "sleeper" || procs[0].Exit == nil {
			t.Errorf("Procs = %+v, %v", procs, err)
		}
	})
	t.Run("orphans are reaped", func(t *testing.T) {
		// setsid forks when it leads a group, as it does here, and leaves its child to pid 1.
		run(t, m, "setsid", "--fork", "true")
		await(t, "no zombie", func() (bool, string) {
			out := run(t, m, "ps", "-eo", "stat,args")
			return !strings.Contains(out, "\nZ"), out
		})
	})
}

func TestPowerOff(t *testing.T) {
	m := newMachine(t, "power", noContainerd)
	start(t, m)
	boot := run(t, m, "cat", "/proc/sys/kernel/random/boot_id")
	id := run(t, m, "cat", "/etc/machine-id")
	if err := os.WriteFile(m.Path("/var/lib/kept"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(m.Path("/run/lost"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, dir := range cgroupsOf(t, m) {
		run(t, m, "mkdir", "-p", dir+"/kubepods/pod1") // the kubelet makes such, and they stay when the power goes
	}
	p, err := m.Exec(t.Context(), machine.Command{Name: "sleeper", Detach: true, Args: []string{"sleep", "100"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.PowerOff(t.Context()); err != nil {
		t.Fatal(err)
	}
	var status *machine.ExitStatus
	if err := p.Wait(t.Context()); err == nil || errors.As(err, &status) {
		t.Errorf("the process under the plug ended with %v; want that the machine is off", err)
	}
	if m.Running() {
		t.Error("the machine runs after PowerOff")
	}
	if left := cgroupsOf(t, m); len(left) > 0 {
		t.Errorf("cgroups are left: %v", left)
	}
	start(t, m)
	if _, err := os.Stat(m.Path("/var/lib/kept")); err != nil {
		t.Errorf("lost from the disk: %v", err)
	}
	if _, err := os.Stat(m.Path("/run/lost")); err == nil {
		t.Error("/run outlived the reboot")
	}
	if again := run(t, m, "cat", "/proc/sys/kernel/random/boot_id"); again == boot {
		t.Error("the boot id is the same after a reboot")
	}
	if again := run(t, m, "cat", "/etc/machine-id"); again != id {
		t.Error("the machine id has changed with a reboot")
	}
	if procs, err := m.Procs(); err != nil || len(procs) != 0 {
		t.Errorf("processes after a reboot: %+v, %v", procs, err)
	}
}

func TestNetwork(t *testing.T) {
	one := newMachine(t, "one", fetcher(t))
	start(t, one)
	two := newMachine(t, "two", fetcher(t)) // what is there before it includes one
	start(t, two)
	if one.IP() == two.IP() || one.PodSubnet() == two.PodSubnet() {
		t.Fatalf("two machines share a network: %s %s", one.IP(), two.IP())
	}
	url := "http://" + serveOn(t, one.HostIP())

	fetch := func(m *machine.Machine) error {
		_, err := m.Run(t.Context(), "/opt/fetcher", "fetch", url)
		return err
	}
	for _, m := range []*machine.Machine{one, two} {
		// Nothing listens there: that the machine says so is its answer.
		if _, err := net.DialTimeout("tcp", m.IP()+":9", 5*time.Second); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("host to machine %s: %v; want connection refused", m.Name(), err)
		}
		if links := run(t, m, "ls", "/sys/class/net"); links != "eth0\nlo\n" {
			t.Errorf("links of machine %s: %q", m.Name(), links)
		}
	}
	if err := fetch(one); err != nil {
		t.Errorf("machine to host: %v", err)
	}
	for how, carrier := range map[machine.LinkCut]string{machine.LinkDown: "0", machine.LinkBlackhole: "1"} {
		if err := one.CutLink(t.Context(), how); err != nil {
			t.Fatal(err)
		}
		if got := strings.TrimSpace(run(t, one, "cat", "/sys/class/net/eth0/carrier")); got != carrier {
			t.Errorf("cut %d: carrier = %s; want %s", how, got, carrier)
		}
		if err := fetch(one); err == nil {
			t.Errorf("cut %d: the host is reached", how)
		}
		if err := one.RestoreLink(t.Context()); err != nil {
			t.Fatal(err)
		}
		await(t, "the host is reached again", func() (bool, string) {
			err := fetch(one)
			return err == nil, fmt.Sprint(err)
		})
	}
}

func TestShapedLink(t *testing.T) {
	m := newMachine(t, "shaped", fetcher(t))
	start(t, m)
	base := "http://" + serveOn(t, m.HostIP())
	fetch := func(path string) (time.Duration, error) {
		began := time.Now()
		_, err := m.Run(t.Context(), "/opt/fetcher", "fetch", base+path)
		return time.Since(began), err
	}
	shape := func(up, down netem.Shape) {
		t.Helper()
		if err := m.ShapeLink(t.Context(), up, down, 1); err != nil {
			t.Fatal(err)
		}
	}
	plain, err := fetch("/large")
	if err != nil {
		t.Fatal(err)
	}
	const delay = 200 * time.Millisecond
	shape(netem.Shape{Delay: delay}, netem.Shape{Delay: delay})
	took, err := fetch("/")
	if err != nil || took < 4*delay { // the connection's round trip and the request's
		t.Errorf("with a round trip of %s: %s, %v", 2*delay, took, err)
	}
	shape(netem.Shape{}, netem.Shape{Rate: 2 << 20})
	if took, err := fetch("/large"); err != nil || took < plain+200*time.Millisecond {
		t.Errorf("1 MiB at 2 MiB a second: %s, %v; without a limit %s", took, err, plain)
	}
	shape(netem.Shape{Loss: 0.1}, netem.Shape{Loss: 0.1})
	if _, err := fetch("/"); err != nil {
		t.Logf("with a loss of 10 %%: %v", err) // the client gives up after two seconds
	}
	if carried, lost := m.LinkStats(); carried == 0 || lost == 0 {
		t.Errorf("carried %d packets, lost %d", carried, lost)
	}
	for name, way := range map[string][2]netem.Shape{"up": {{Loss: 1}, {}}, "down": {{}, {Loss: 1}}} {
		shape(way[0], way[1])
		if _, err := fetch("/"); err == nil {
			t.Errorf("the host is reached with nothing carried %s", name)
		}
	}
	shape(netem.Shape{}, netem.Shape{})
	await(t, "the host is reached over a line that loses nothing", func() (bool, string) {
		_, err := fetch("/large")
		return err == nil, fmt.Sprint(err)
	})
	if err := m.RestoreLink(t.Context()); err != nil {
		t.Fatal(err)
	}
	await(t, "the host is reached as before", func() (bool, string) {
		_, err := fetch("/large")
		return err == nil, fmt.Sprint(err)
	})
	shape(netem.Shape{}, netem.Shape{}) // that it is gone after Destroy is checked at the end
}

// serveOn says "hub" to whoever asks, until the test ends.
func serveOn(t *testing.T, ip string) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", ip+":0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/large" {
			w.Write(make([]byte, 1<<20))
			return
		}
		io.WriteString(w, "hub")
	})}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return l.Addr().String()
}

// A machine that was told to goes on when the process that started it has
// ended, and another finds it; here, another Machine stands for that.
func TestDetached(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "m")
	detached := func(c *machine.Config) { c.NoContainerd, c.Detach, c.Dir = true, true, dir }
	m := newMachine(t, "detached", detached)
	start(t, m)
	if _, err := m.Exec(t.Context(), machine.Command{Name: "sleeper", Args: []string{"sleep", "100"}, Detach: true}); err != nil {
		t.Fatal(err)
	}
	cfg := machine.Config{Name: "detached"}
	detached(&cfg)
	again, err := machine.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if !again.Running() || again.IP() != m.IP() {
		t.Fatalf("found machine: running %v, ip %s; want %s", again.Running(), again.IP(), m.IP())
	}
	p, err := again.Proc(t.Context(), "sleeper")
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	if err := again.PowerOff(t.Context()); err != nil {
		t.Fatal(err)
	}
	await(t, "the first Machine knows", func() (bool, string) { return !m.Running(), "" })
}

func cgroupsOf(t *testing.T, m *machine.Machine) []string {
	t.Helper()
	var found []string
	for _, pattern := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
		dirs, err := filepath.Glob(pattern + m.CgroupRoot())
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, dirs...)
	}
	if m.Running() && len(found) == 0 {
		t.Errorf("there is no cgroup %s", m.CgroupRoot())
	}
	return found
}

// A machine goes with the process that owns it, however that ends, and what
// it could not take along is put right by the next one.
func TestOwnerDies(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "m")
	m := newMachine(t, "owned", func(c *machine.Config) { c.NoContainerd, c.Dir = true, dir })
	owned := filepath.Join(t.TempDir(), "m")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	owner := exec.CommandContext(t.Context(), exe)
	owner.Env = append(os.Environ(), "MACHINE_OWNER_DIR="+owned)
	out, err := owner.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := owner.Start(); err != nil {
		t.Fatal(err)
	}
	said, err := bufio.NewReader(out).ReadString('\n')
	var index, pid int
	if _, serr := fmt.Sscanf(said, "index %d pid %d", &index, &pid); serr != nil {
		t.Fatalf("the owner said %q, %v", said, err)
	}
	bridge := fmt.Sprintf("link skbr%d", index)
	if now, err := machine.Snapshot(t.Context()); err != nil || now[bridge] {
		t.Errorf("the footprint shows the machine of another process: %v", err)
	}
	owner.Process.Kill()
	owner.Wait()
	await(t, "pid 1 has ended", func() (bool, string) {
		err := syscall.Kill(pid, 0)
		return errors.Is(err, syscall.ESRCH), fmt.Sprint(err)
	})
	if now, err := machine.Snapshot(t.Context()); err != nil || !now[bridge] {
		t.Errorf("the footprint does not show what a dead process has left: %v", err)
	}
	again, err := machine.New(machine.Config{Dir: owned, Name: "owned-1", NoContainerd: true})
	if err != nil {
		t.Fatal(err)
	}
	if again.Running() || again.Index() != index {
		t.Errorf("found machine: running %v, index %d; want it off, %d", again.Running(), again.Index(), index)
	}
	start(t, again)
	if err := again.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	start(t, m) // its end checks what is left
}

func ownMachine(dir string) int {
	m, err := machine.New(machine.Config{Dir: dir, Name: "owned-1", NoContainerd: true})
	if err == nil {
		err = m.Start(context.Background())
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Printf("index %d pid %s\n", m.Index(), strings.Split(m.Path("/"), "/")[2])
	select {} // until it is killed
}

func TestConfig(t *testing.T) {
	for name, cfg := range map[string]machine.Config{
		"relative folder": {Dir: "x", Name: "a"},
		"bad name":        {Dir: t.TempDir(), Name: "A_b"},
		"bad index":       {Dir: t.TempDir(), Name: "a", Index: 251},
		"relative bind":   {Dir: t.TempDir(), Name: "a", Binds: []machine.Bind{{Host: "x", Inside: "/x"}}},
	} {
		if _, err := machine.New(cfg); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestClaims(t *testing.T) {
	m := newMachine(t, "first", nil)
	for what, cfg := range map[string]machine.Config{
		"index": {Name: "second", Index: m.Index()},
		"name":  {Name: "first"},
	} {
		cfg.Dir = t.TempDir()
		if _, err := machine.New(cfg); err == nil || !strings.Contains(err.Error(), what) || !strings.Contains(err.Error(), "in use") {
			t.Errorf("a second machine of the same %s: %v; want an error", what, err)
		}
	}
}

// A pod runs with a sandbox and a network of its own, is reached from the host
// and reaches it, and is gone after the plug was pulled.
func TestPod(t *testing.T) {
	images := buildImages(t)
	m := newMachine(t, "pods", nil)
	start(t, m)
	for _, tar := range images {
		if err := m.ImportImage(t.Context(), tar); err != nil {
			t.Fatal(err)
		}
	}
	pod := runPod(t, m, "web")
	t.Run("host to pod", func(t *testing.T) {
		await(t, "the pod answers", func() (bool, string) {
			resp, err := http.Get("http://" + pod.ip + ":8080/env")
			if err != nil {
				return false, err.Error()
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			return bytes.Contains(body, []byte("GREETING=hello")), fmt.Sprint(string(body), err)
		})
	})
	t.Run("pod to host", func(t *testing.T) {
		url := "http://" + serveOn(t, m.HostIP())
		if out, stderr, code := pod.exec(t, "/bin/demo", "get", url); code != 0 || out != "hub" {
			t.Errorf("get %s = %q, %q, exit code %d", url, out, stderr, code)
		}
	})
	t.Run("tools", func(t *testing.T) {
		if out, stderr, code := pod.exec(t, "env"); code != 0 || !strings.Contains(out, "GREETING=hello") {
			t.Errorf("env = %q %q %d", out, stderr, code)
		}
		if _, stderr, code := pod.exec(t, "/bin/demo", "exit", "3"); code != 3 {
			t.Errorf("exit code = %d, stderr %q; want 3", code, stderr)
		}
		out, stderr, code := pod.exec(t, "tar", "cf", "-", "/etc/passwd")
		if code != 0 || !strings.Contains(out, "etc/passwd") {
			t.Errorf("tar = %d bytes, %q %d", len(out), stderr, code)
		}
		if out, _, _ := pod.exec(t, "ls", "/bin"); !strings.Contains(out, "demo\n") {
			t.Errorf("ls /bin = %q", out)
		}
		if out, _, _ := pod.exec(t, "id"); !strings.Contains(out, "uid=0 gid=0") || !strings.Contains(out, "CapEff") {
			t.Errorf("id = %q", out)
		}
	})
	t.Run("cgroup", func(t *testing.T) {
		found, err := filepath.Glob("/sys/fs/cgroup/memory" + m.CgroupRoot() + "/*/cgroup.procs")
		if v2, _ := filepath.Glob("/sys/fs/cgroup" + m.CgroupRoot() + "/*/cgroup.procs"); len(v2) > 0 {
			found = v2
		}
		if err != nil || len(found) == 0 {
			t.Errorf("no container is below %s: %v", m.CgroupRoot(), err)
		}
	})
	t.Run("containerd restart", func(t *testing.T) {
		if err := m.RestartContainerd(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := http.Get("http://" + pod.ip + ":8080/healthz"); err != nil {
			t.Errorf("the pod went with containerd: %v", err)
		}
	})
	if err := m.PowerOff(t.Context()); err != nil {
		t.Fatal(err)
	}
	start(t, m)
	client := criClient(t, m)
	list, err := client.ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if len(list.Items) != 1 || list.Items[0].State != cri.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("sandboxes after the reboot: %v; want the one, not ready", list.Items)
	}
	again := runPod(t, m, "web-2") // the images are still there
	if again.ip == pod.ip {
		t.Errorf("the new pod has the old one's address %s, which is still taken", pod.ip)
	}
}

// The same on a host that has the unified cgroup hierarchy alone, or in a mount
// namespace that looks as if. No pods: the controllers they need are bound to
// where the host has mounted them.
func TestUnifiedCgroups(t *testing.T) {
	if os.Getenv("MACHINE_UNIFIED") != "" {
		t.Fatal("in a circle")
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe, "-test.run=^(TestProcesses|TestPowerOff)$", "-test.v")
	cmd.Env = append(os.Environ(), "MACHINE_UNIFIED=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("--- PASS: TestPowerOff ")) {
		t.Errorf("%v:\n%s", err, out)
	}
}

func mountUnified() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	return unix.Mount("cgroup2", "/sys/fs/cgroup", "cgroup2", 0, "")
}

func buildImages(t *testing.T) []string {
	t.Helper()
	dir := t.TempDir()
	pause, err := image.Pause(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	demo, err := image.Demo(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	return []string{pause, demo}
}

type pod struct {
	client    cri.RuntimeServiceClient
	container string
	ip        string
}

func criClient(t *testing.T, m *machine.Machine) cri.RuntimeServiceClient {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+m.ContainerdSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return cri.NewRuntimeServiceClient(conn)
}

func runPod(t *testing.T, m *machine.Machine, name string) *pod {
	t.Helper()
	client := criClient(t, m)
	sandboxConfig := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Namespace: "default", Uid: name},
		Hostname:     name,
		LogDirectory: "/var/log/pods/" + name,
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent:    m.CgroupRoot(),
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{}},
		},
	}
	sandbox, err := client.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: sandboxConfig})
	if err != nil {
		t.Fatal(err)
	}
	status, err := client.PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: sandbox.PodSandboxId})
	if err != nil {
		t.Fatal(err)
	}
	created, err := client.CreateContainer(t.Context(), &cri.CreateContainerRequest{
		PodSandboxId:  sandbox.PodSandboxId,
		SandboxConfig: sandboxConfig,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "demo"},
			Image:    &cri.ImageSpec{Image: image.DemoName},
			Envs:     []*cri.KeyValue{{Key: "GREETING", Value: []byte("hello")}},
			LogPath:  "demo.log",
			Linux:    &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.StartContainer(t.Context(), &cri.StartContainerRequest{ContainerId: created.ContainerId}); err != nil {
		t.Fatal(err)
	}
	return &pod{client: client, container: created.ContainerId, ip: status.Status.Network.Ip}
}

func (p *pod) exec(t *testing.T, args ...string) (stdout, stderr string, code int32) {
	t.Helper()
	resp, err := p.client.ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: p.container, Cmd: args, Timeout: 20})
	if err != nil {
		t.Fatalf("exec %v: %v", args, err)
	}
	return string(resp.Stdout), string(resp.Stderr), resp.ExitCode
}

func await(t *testing.T, what string, done func() (bool, string)) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		ok, last := done()
		if ok {
			return
		}
		select {
		case <-deadline:
			t.Fatalf("waited in vain that %s; last: %s", what, last)
		case <-tick.C:
		}
	}
}
