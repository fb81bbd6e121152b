package machine

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A Footprint is what machines can leave behind on a host: mounts, links,
// packet filter rules, cgroups, and the processes and namespaces that are not
// the host's own.
type Footprint map[string]bool

// Snapshot takes the footprint of everything on this host but the machines of
// other processes.
func Snapshot(ctx context.Context) (Footprint, error) {
	f := Footprint{}
	for _, add := range []func(context.Context, Footprint) error{addProcesses, addMounts, addLinks, addRules, addCgroups} {
		if err := add(ctx, f); err != nil {
			return nil, fmt.Errorf("machine: snapshot: %w", err)
		}
	}
	return f, nil
}

// Leaks returns what is there now and was not in before. It gives the kernel
// up to 15 seconds to finish taking things down.
func Leaks(ctx context.Context, before Footprint) ([]string, error) {
	var left []string
	err := poll(ctx, 15*time.Second, func() (bool, error) {
		now, err := Snapshot(ctx)
		if err != nil {
			return false, err
		}
		left = left[:0]
		for item := range now {
			if !before[item] {
				left = append(left, item)
			}
		}
		return len(left) == 0, nil
	})
	slices.Sort(left)
	if errors.Is(err, errTimeout) {
		err = nil
	}
	return left, err
}

// addProcesses adds all namespaces that processes are in, and the processes
// that are not in this one's pid namespace: those inside machines.
func addProcesses(_ context.Context, f Footprint) error {
	own, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return err
	}
	procs, err := readProcesses()
	if err != nil {
		return err
	}
	for pid, p := range procs {
		if ofOthers(procs, pid) {
			continue
		}
		for _, kind := range []string{"mnt", "net", "pid"} {
			if ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind)); err == nil { // else it has just ended
				f["namespace "+ns] = true
				if kind == "pid" && ns != own {
					f[fmt.Sprintf("process %d: %s", pid, strings.Join(p.args, " "))] = true
				}
			}
		}
	}
	return nil
}

type hostProcess struct {
	parent int
	args   []string
}

func readProcesses() (map[int]hostProcess, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	procs := map[int]hostProcess{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue // it has just ended; so below
		}
		cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil {
			continue
		}
		fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
		parent, err := strconv.Atoi(string(fields[1]))
		if err != nil {
			return nil, fmt.Errorf("/proc/%d/stat: %w", pid, err)
		}
		procs[pid] = hostProcess{parent: parent, args: strings.Split(strings.TrimRight(string(cmdline), "\x00"), "\x00")}
	}
	return procs, nil
}

// ofOthers tells whether a process belongs to a machine that another process
// has started. All processes of a machine descend from its pid 1.
func ofOthers(procs map[int]hostProcess, pid int) bool {
	for ; pid > 1; pid = procs[pid].parent {
		if procs[pid].args == nil {
			return false
		}
		if procs[pid].args[0] == initArg {
			env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
			return err == nil && !slices.Contains(strings.Split(string(env), "\x00"), ownerEnv(os.Getpid()))
		}
	}
	return false
}

func addMounts(_ context.Context, f Footprint) error {
	mounts, err := readMounts("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for _, m := range mounts {
		f[fmt.Sprintf("mount %s on %s", m.fstype, m.point)] = true
	}
	named, err := filepath.Glob("/run/netns/*")
	for _, n := range named {
		f["network namespace "+n] = true
	}
	return err
}

func addLinks(_ context.Context, f Footprint) error {
	claims, err := othersClaims()
	if err != nil {
		return err
	}
	links, err := net.Interfaces()
	for _, l := range links {
		ofOthers := false
		for _, prefix := range []string{bridgePrefix, hostLinkPrefix, wirePrefix} {
			index, ok := strings.CutPrefix(l.Name, prefix)
			ofOthers = ofOthers || ok && claims[claimIndex+index]
		}
		if !ofOthers {
			f["link "+l.Name] = true
		}
	}
	return err
}

// addRules adds what the packet filter programs that are installed list.
func addRules(ctx context.Context, f Footprint) error {
	for _, args := range [][]string{{"iptables-save"}, {"ip6tables-save"}, {"nft", "list", "ruleset"}} {
		if _, err := lookPath(args[0]); err != nil {
			continue
		}
		out, err := output(ctx, args[0], args[1:]...)
		if err != nil {
			return err
		}
		for line := range bytes.Lines(out) {
			line = bytes.TrimSpace(line)
			if len(line) == 0 || line[0] == '#' {
				continue // a comment carries the time
			}
			if i := bytes.LastIndex(line, []byte(" [")); line[0] == ':' && i > 0 {
				line = line[:i] // counters
			}
			f[fmt.Sprintf("rule (%s) %s", args[0], line)] = true
		}
	}
	return nil
}

// addCgroups adds all cgroups but those of systemd's units, which come and go,
// and of others' machines.
func addCgroups(_ context.Context, f Footprint) error {
	claims, err := othersClaims()
	if err != nil {
		return err
	}
	hierarchies, err := cgroupHierarchies()
	if err != nil {
		return err
	}
	for _, h := range hierarchies {
		err := filepath.WalkDir(h, func(path string, d fs.DirEntry, err error) error {
			switch {
			case errors.Is(err, fs.ErrNotExist):
				return nil // removed meanwhile
			case err != nil:
				return err
			case !d.IsDir():
				return nil
			case strings.HasSuffix(path, ".slice") || strings.HasSuffix(path, ".scope"):
				return fs.SkipDir
			}
			if name, ok := strings.CutPrefix(path, h+cgroupPrefix); ok && claims[claimName+name] {
				return fs.SkipDir
			}
			f["cgroup "+path] = true
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

type mount struct{ point, fstype string }

// readMounts reads a mountinfo file, see proc(5).
func readMounts(file string) ([]mount, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var all []mount
	for lines := bufio.NewScanner(bytes.NewReader(data)); lines.Scan(); {
		head, tail, ok := strings.Cut(lines.Text(), " - ")
		fields, source := strings.Fields(head), strings.Fields(tail)
		if !ok || len(fields) < 5 || len(source) < 1 {
			return nil, fmt.Errorf("%s: unexpected line %q", file, lines.Text())
		}
		all = append(all, mount{point: unescape(fields[4]), fstype: source[0]})
	}
	return all, nil
}

// unescape undoes the octal escapes of spaces and the like in mountinfo.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
