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

// Snapshot takes the footprint of everything on this host.
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
// up to 15 seconds to finish taking things down. What others have started on
// this host meanwhile counts as well, so tests that ask run one after another
// (go test -p 1).
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
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return err
	}
	for _, dir := range procs {
		for _, kind := range []string{"mnt", "net", "pid"} {
			if ns, err := os.Readlink(filepath.Join(dir, "ns", kind)); err == nil { // else it has just ended
				f["namespace "+ns] = true
			}
		}
		ns, err := os.Readlink(filepath.Join(dir, "ns/pid"))
		if err != nil || ns == own {
			continue
		}
		if cmdline, err := os.ReadFile(filepath.Join(dir, "cmdline")); err == nil {
			args := strings.ReplaceAll(strings.TrimRight(string(cmdline), "\x00"), "\x00", " ")
			f[fmt.Sprintf("process %s: %s", filepath.Base(dir), args)] = true
		}
	}
	return nil
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
	links, err := net.Interfaces()
	for _, l := range links {
		f["link "+l.Name] = true
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

// addCgroups adds all cgroups but those of systemd's units, which come and go.
func addCgroups(_ context.Context, f Footprint) error {
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
