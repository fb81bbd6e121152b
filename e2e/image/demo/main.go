// Command demo is what pods of the tests and of the demo run. It serves HTTP,
// and has subcommands that stand in for a shell and its tools, so that an
// image of it alone can be tried in every way.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

type command struct {
	usage string
	run   func(args []string) error
}

// exitCode ends the program with that code and says nothing.
type exitCode int

func (c exitCode) Error() string { return fmt.Sprintf("exit status %d", int(c)) }

func commands() map[string]command {
	return map[string]command{
		"allocate":     {"allocate [--mib N]  takes N MiB of memory and holds them until SIGTERM", allocate},
		"stat":         {"stat FILE...  mode, owner and size", stat},
		"serve":        {"serve [--listen :8080] [--log-every 5s] [--message TEXT]  the HTTP server (the default)", serve},
		"sleep":        {"sleep DURATION  e.g. 1.5s; a bare number is seconds", sleep},
		"exit":         {"exit CODE", exit},
		"print":        {"print [--mib N]  N MiB of numbered lines to stdout, as fast as it takes them", printMiB},
		"echo":         {"echo TEXT...", echo},
		"cat":          {"cat [FILE...]", cat},
		"ls":           {"ls [PATH...]", ls},
		"env":          {"env", env},
		"get":          {"get URL  fetches it, and fails unless the answer is good", get},
		"id":           {"id  user, groups and capabilities", id},
		"tar":          {"tar cf - [-C DIR] PATH... | tar xmf - [-C DIR] | tar tf -", tarMain},
		"tty":          {"tty  the terminal's size, now and at each change, until stdin ends", tty},
		"wait-sigterm": {"wait-sigterm [--grace 1s] [--code 0]  waits for SIGTERM and ends that much later", waitSigterm},
		"write":        {"write FILE  stdin into FILE", writeFile},
	}
}

func main() {
	args := os.Args[1:]
	name := filepath.Base(os.Args[0]) // as a link named after a tool
	all := commands()
	if _, ok := all[name]; !ok {
		name = "serve"
		if len(args) > 0 {
			name, args = args[0], args[1:]
		}
	}
	c, ok := all[name]
	if !ok {
		fmt.Fprintf(os.Stderr, "demo: no command %q; there are:\n", name)
		var lines []string
		for _, c := range all {
			lines = append(lines, "  demo "+c.usage)
		}
		slices.Sort(lines)
		fmt.Fprintln(os.Stderr, strings.Join(lines, "\n"))
		os.Exit(2)
	}
	if err := c.run(args); err != nil {
		if code, ok := err.(exitCode); ok {
			os.Exit(int(code))
		}
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		os.Exit(1)
	}
}
