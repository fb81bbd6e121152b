package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// talker has a container that logs a line with its time ten times a second,
// one that has printed 1 MiB and ended, and one before them.
const talker = `
apiVersion: v1
kind: Pod
metadata: {name: talker}
spec:
  nodeName: edge-1
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  initContainers:
  - name: first
    image: localhost/skerry/demo:1
    command: [/bin/echo, the first container was here]
  containers:
  - name: ticker
    image: localhost/skerry/demo:1
    args: [serve, --log-every, 100ms]
  - name: printer
    image: localhost/skerry/demo:1
    args: [print, --mib, "1"]
`

// printed is what the demo's "print" prints.
func printed(mib int) string {
	var b strings.Builder
	for i := range mib << 20 / 64 {
		fmt.Fprintf(&b, "%012d %s\n", i, "the quick brown fox jumps over the lazy dog. 01234")
	}
	return b.String()
}

// tick is a line of the ticker.
type tick struct {
	Time time.Time `json:"time"`
	Msg  string    `json:"msg"`
}

func ticks(t *testing.T, text string) []tick {
	t.Helper()
	var all []tick
	for line := range strings.Lines(text) {
		var one tick
		if err := json.Unmarshal([]byte(line), &one); err != nil {
			t.Fatalf("log line %q: %v", line, err)
		}
		all = append(all, one)
	}
	return all
}

func lineCount(text string) int { return strings.Count(text, "\n") }

func TestLogs(t *testing.T) {
	t.Parallel()
	ns := apply(t, talker)
	awaitPod(t, ns, "talker", time.Minute, "to have printed", containerEnded("printer"))
	whole := printed(1)
	logs := func(t *testing.T, args ...string) string {
		t.Helper()
		return kubectl(t, append([]string{"logs", "-n", ns, "talker"}, args...)...)
	}

	t.Run("whole", func(t *testing.T) {
		if out := logs(t, "-c", "printer"); out != whole {
			t.Errorf("%d bytes; want the %d that were printed", len(out), len(whole))
		}
	})
	t.Run("a container of several", func(t *testing.T) {
		res := kubectlAny(t, "", "logs", "-n", ns, "talker")
		if res.Code != 0 || !strings.Contains(res.Stderr, `Defaulted container "ticker" out of: ticker, printer, first (init)`) {
			t.Errorf("exit %d, stderr %q", res.Code, res.Stderr)
		}
		if all := ticks(t, res.Stdout); all[0].Msg != "demo serves" {
			t.Errorf("the first line: %+v", all[0])
		}
		if out := logs(t, "-c", "first"); out != "the first container was here\n" {
			t.Errorf("of the init container: %q", out)
		}
	})
	t.Run("all containers", func(t *testing.T) {
		out := logs(t, "--all-containers", "--prefix", "--tail=2")
		for _, want := range []string{
			"[pod/talker/first] the first container was here\n",
			"[pod/talker/printer] " + whole[len(whole)-64:],
			`[pod/talker/ticker] {"time"`,
		} {
			if !strings.Contains(out, want) {
				t.Errorf("no %q in %q", want, out)
			}
		}
	})
	t.Run("tail", func(t *testing.T) {
		if out := logs(t, "-c", "printer", "--tail=3"); out != whole[len(whole)-3*64:] {
			t.Errorf("%q", out)
		}
		if out := logs(t, "-c", "printer", "--tail=0"); out != "" {
			t.Errorf("tail of nothing: %q", out)
		}
	})
	t.Run("limit-bytes", func(t *testing.T) {
		if out := logs(t, "-c", "printer", "--limit-bytes=100000"); out != whole[:100000] {
			t.Errorf("%d bytes", len(out))
		}
	})
	t.Run("timestamps", func(t *testing.T) {
		out := logs(t, "-c", "printer", "--timestamps", "--tail=100")
		last := time.Time{}
		var rest strings.Builder
		for line := range strings.Lines(out) {
			stamp, text, _ := strings.Cut(line, " ")
			at, err := time.Parse(time.RFC3339Nano, stamp)
			if err != nil {
				t.Fatal(err)
			}
			if at.Before(last) || time.Since(at) > time.Hour || at.After(time.Now()) {
				t.Fatalf("stamp %s after %s", at, last)
			}
			last = at
			rest.WriteString(text)
		}
		if rest.String() != whole[len(whole)-100*64:] {
			t.Errorf("beside the stamps: %q", rest.String())
		}
	})
	t.Run("since", func(t *testing.T) {
		awaitTicks(t, ns, 30)
		all := ticks(t, logs(t, "-c", "ticker"))
		pivot := all[len(all)/2].Time
		// The stamp of the CRI is a moment later than the line's own, and
		// --since-time takes whole seconds.
		since := pivot.Truncate(time.Second).Add(time.Second)
		got := ticks(t, logs(t, "-c", "ticker", "--since-time="+since.UTC().Format(time.RFC3339)))
		if len(got) == 0 {
			t.Fatal("nothing since " + since.String())
		}
		if early := since.Sub(got[0].Time); early > 50*time.Millisecond {
			t.Errorf("since %s: the first line is %s too early", since, early)
		}
		if late := got[0].Time.Sub(since); late > time.Second {
			t.Errorf("since %s: the first line is %s later", since, late)
		}
		before := time.Now()
		got = ticks(t, logs(t, "-c", "ticker", "--since=1s"))
		if len(got) == 0 {
			t.Fatal("nothing in the last second")
		}
		// The kubelet counts from when it is asked, which is after before.
		if early := before.Add(-time.Second - 50*time.Millisecond).Sub(got[0].Time); early > 0 {
			t.Errorf("--since=1s: the first line is %s too early", early)
		}
	})
	t.Run("follow", func(t *testing.T) {
		r := kubectlStart(t, nil, nil, "logs", "-n", ns, "talker", "-c", "ticker", "-f", "--tail=1")
		started := time.Now()
		r.saw(t, 20*time.Second, "lines logged after it began", func(out string) bool {
			if i := strings.LastIndexByte(out, '\n'); i >= 0 {
				out = out[:i+1]
			}
			return slices.ContainsFunc(ticks(t, out), func(k tick) bool { return k.Time.After(started.Add(time.Second)) })
		})
		// Each line came when it was logged and not when a buffer was full: one
		// logged from now on is here within a second, though a line has but
		// some 100 bytes.
		mark := time.Now()
		text, _ := r.stdout.read()
		have := lineCount(text)
		r.saw(t, 5*time.Second, "the next lines", func(out string) bool { return lineCount(out) >= have+3 })
		if took := time.Since(mark); took > 3*time.Second {
			t.Errorf("three lines of a ticker of 100 ms took %s", took)
		}
		r.interrupt(t)
		r.wait(t, 5*time.Second)
	})
	t.Run("follow to the end", func(t *testing.T) {
		r := kubectlStart(t, nil, nil, "logs", "-n", ns, "talker", "-c", "printer", "-f")
		if code := r.wait(t, 20*time.Second); code != 0 {
			t.Errorf("exit %d: %s", code, r.stderr.tail())
		}
		if out, _ := r.stdout.read(); out != whole {
			t.Errorf("%d bytes; want %d", len(out), len(whole))
		}
	})
	t.Run("refused", func(t *testing.T) {
		for _, c := range []struct {
			name, path string
			code       int
			text       string
		}{
			{"no such container, by the API server", "/api/v1/namespaces/" + ns + "/pods/talker/log?container=nope", http.StatusBadRequest, "container nope is not valid for pod talker"},
			{"no earlier run, by the kubelet", "/api/v1/namespaces/" + ns + "/pods/talker/log?container=ticker&previous=true", http.StatusBadRequest, `previous terminated container \"ticker\" in pod \"talker\" not found`},
			{"no such container, by the kubelet", nodePath("edge-1", "/containerLogs/"+ns+"/talker/nope"), http.StatusNotFound, `container "nope" not found in pod "talker"`},
			{"no such pod, by the kubelet", nodePath("edge-1", "/containerLogs/"+ns+"/nobody/nope"), http.StatusNotFound, `pod "nobody" does not exist`},
			{"no such path, by the kubelet", nodePath("edge-1", "/nosuch"), http.StatusNotFound, "404 page not found"},
		} {
			a := request(t, http.MethodGet, c.path)
			if a.code != c.code || !strings.Contains(string(a.body), c.text) {
				t.Errorf("%s: %d %q; want %d with %q", c.name, a.code, a.body, c.code, c.text)
			}
		}
		res := kubectlAny(t, "", "logs", "-n", ns, "talker", "-c", "ticker", "--previous")
		if res.Code != 1 || !strings.Contains(res.Stderr, `previous terminated container "ticker" in pod "talker" not found`) {
			t.Errorf("exit %d, %q", res.Code, res.Stderr)
		}
	})
}

func awaitTicks(t *testing.T, ns string, n int) {
	t.Helper()
	r := kubectlStart(t, nil, nil, "logs", "-n", ns, "talker", "-c", "ticker", "-f")
	r.saw(t, 30*time.Second, fmt.Sprintf("%d lines", n), func(out string) bool { return lineCount(out) >= n })
	r.interrupt(t)
	r.wait(t, 5*time.Second)
}

const parrot = `
apiVersion: v1
kind: Pod
metadata: {name: parrot}
spec:
  nodeName: edge-1
  terminationGracePeriodSeconds: 0
  containers:
  - name: parrot
    image: localhost/skerry/demo:1
    command: [/bin/cat]
    stdin: true
    stdinOnce: true
`

// A container that says what is said to it, and ends when nothing more is:
// attach feeds it, and its logs are those of the run before once it runs
// again.
func TestAttachAndLogsOfTheRunBefore(t *testing.T) {
	t.Parallel()
	for name, env := range protocols {
		t.Run(name, func(t *testing.T) {
			ns := apply(t, parrot)
			ready(t, ns, "parrot")
			in, feed, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer feed.Close()
			r := kubectlStart(t, env, in, "attach", "-n", ns, "-i", "parrot")
			in.Close()
			// What is written before kubectl has attached waits in the pipe.
			for i := range 3 {
				line := fmt.Sprintf("line %d from outside\n", i)
				fmt.Fprint(feed, line)
				r.sawText(t, 20*time.Second, line)
			}
			feed.Close()
			if code := r.wait(t, 20*time.Second); code != 0 {
				t.Errorf("exit %d: %s", code, r.stderr.tail())
			}
			awaitPod(t, ns, "parrot", time.Minute, "to run again", func(p *corev1.Pod) bool {
				s := containerStatus(p, "parrot")
				return s.RestartCount == 1 && s.State.Running != nil
			})
			if out := kubectl(t, "logs", "-n", ns, "parrot", "--previous"); out != "line 0 from outside\nline 1 from outside\nline 2 from outside\n" {
				t.Errorf("logs of the run before: %q", out)
			}
			if out := kubectl(t, "logs", "-n", ns, "parrot"); out != "" {
				t.Errorf("logs of this run: %q", out)
			}
		})
	}
}
