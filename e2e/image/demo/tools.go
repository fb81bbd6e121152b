package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func sleep(args []string) error {
	if len(args) != 1 {
		return errors.New("say for how long")
	}
	d, err := time.ParseDuration(args[0])
	if seconds, serr := strconv.ParseFloat(args[0], 64); serr == nil {
		d, err = time.Duration(seconds*float64(time.Second)), nil
	}
	if err != nil {
		return err
	}
	time.Sleep(d)
	return nil
}

func exit(args []string) error {
	if len(args) != 1 {
		return errors.New("say which code")
	}
	code, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	return exitCode(code)
}

// printMiB prints lines of 64 bytes, each with its number, so that a reader
// can tell what was lost.
func printMiB(args []string) error {
	flags := flag.NewFlagSet("print", flag.ContinueOnError)
	mib := flags.Int("mib", 1, "MiB to print")
	if err := flags.Parse(args); err != nil {
		return exitCode(2)
	}
	w := bufio.NewWriterSize(os.Stdout, 256<<10)
	for i := range *mib << 20 / 64 {
		if _, err := fmt.Fprintf(w, "%012d %s\n", i, "the quick brown fox jumps over the lazy dog. 01234"); err != nil {
			return err
		}
	}
	return w.Flush()
}

func echo(args []string) error {
	_, err := fmt.Println(strings.Join(args, " "))
	return err
}

func cat(args []string) error {
	if len(args) == 0 {
		args = []string{"-"}
	}
	for _, name := range args {
		if err := catOne(name); err != nil {
			return err
		}
	}
	return nil
}

func catOne(name string) error {
	in := os.Stdin
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		in = f
	}
	_, err := io.Copy(os.Stdout, in)
	return err
}

func ls(args []string) error {
	if len(args) == 0 {
		args = []string{"."}
	}
	for _, name := range args {
		st, err := os.Stat(name)
		if err != nil {
			return err
		}
		if !st.IsDir() {
			fmt.Println(name)
			continue
		}
		entries, err := os.ReadDir(name)
		if err != nil {
			return err
		}
		for _, e := range entries {
			fmt.Println(e.Name())
		}
	}
	return nil
}

func env([]string) error {
	vars := os.Environ()
	slices.Sort(vars)
	_, err := fmt.Println(strings.Join(vars, "\n"))
	return err
}

func get(args []string) error {
	if len(args) != 1 {
		return errors.New("say what to get")
	}
	client := http.Client{Timeout: 10 * time.Second}
	resp, err := client.Get(args[0])
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(os.Stdout, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode/100 != 2 {
		return errors.New(resp.Status)
	}
	return nil
}

func id([]string) error {
	groups, err := os.Getgroups()
	if err != nil {
		return err
	}
	fmt.Printf("uid=%d gid=%d groups=%v\n", os.Getuid(), os.Getgid(), groups)
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(status)) {
		if strings.HasPrefix(line, "Cap") || strings.HasPrefix(line, "NoNewPrivs") || strings.HasPrefix(line, "Seccomp:") {
			fmt.Print(line)
		}
	}
	return nil
}

// allocate takes memory and writes to all of it, so that it counts, then waits
// to be ended.
func allocate(args []string) error {
	flags := flag.NewFlagSet("allocate", flag.ContinueOnError)
	mib := flags.Int("mib", 64, "MiB to take")
	if err := flags.Parse(args); err != nil {
		return exitCode(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	var held [][]byte
	for i := range *mib {
		b := make([]byte, 1<<20)
		for at := 0; at < len(b); at += 4096 {
			b[at] = byte(i + 1)
		}
		held = append(held, b)
	}
	fmt.Printf("holding %d MiB\n", len(held))
	<-ctx.Done()
	runtime.KeepAlive(held)
	return nil
}

// stat prints "MODE UID:GID SIZE NAME" of each file, links followed.
func stat(args []string) error {
	for _, name := range args {
		st, err := os.Stat(name)
		if err != nil {
			return err
		}
		sys, ok := st.Sys().(*syscall.Stat_t)
		if !ok {
			return fmt.Errorf("%s: its owner is not known", name)
		}
		fmt.Printf("%s %d:%d %d %s\n", st.Mode(), sys.Uid, sys.Gid, st.Size(), name)
	}
	return nil
}

func writeFile(args []string) error {
	if len(args) != 1 {
		return errors.New("say into which file")
	}
	if err := os.MkdirAll(filepath.Dir(args[0]), 0o755); err != nil {
		return err
	}
	f, err := os.Create(args[0])
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.Copy(f, os.Stdin); err != nil {
		return err
	}
	return f.Close()
}

// tty prints "ROWS COLS", or "not a tty", then the size at each change.
func tty([]string) error {
	size := func() error {
		ws, err := unix.IoctlGetWinsize(0, unix.TIOCGWINSZ)
		if err != nil {
			return err
		}
		fmt.Printf("%d %d\n", ws.Row, ws.Col)
		return nil
	}
	changes := make(chan os.Signal, 8)
	signal.Notify(changes, syscall.SIGWINCH)
	if err := size(); err != nil {
		fmt.Println("not a tty")
		return nil
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		lines := bufio.NewScanner(os.Stdin)
		for lines.Scan() && strings.TrimSpace(lines.Text()) != "quit" {
		}
	}()
	for {
		select {
		case <-changes:
			if err := size(); err != nil {
				return err
			}
		case <-ended:
			return nil
		}
	}
}

func waitSigterm(args []string) error {
	flags := flag.NewFlagSet("wait-sigterm", flag.ContinueOnError)
	grace := flags.Duration("grace", time.Second, "how long to go on after SIGTERM")
	code := flags.Int("code", 0, "exit code")
	if err := flags.Parse(args); err != nil {
		return exitCode(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	fmt.Println("waiting for SIGTERM")
	<-ctx.Done()
	fmt.Println("got SIGTERM")
	time.Sleep(*grace)
	fmt.Printf("ending after %s\n", *grace)
	if *code != 0 {
		return exitCode(*code)
	}
	return nil
}
