package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
)

// serve answers until SIGTERM, then finishes what it has begun.
func serve(args []string) error {
	flags := flag.NewFlagSet("serve", flag.ContinueOnError)
	listen := flags.String("listen", ":8080", "address")
	every := flags.Duration("log-every", 5*time.Second, "how often to log a line; 0 never")
	message := flags.String("message", "hello from the edge", "what / says")
	if err := flags.Parse(args); err != nil {
		return exitCode(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	log := slog.New(slog.NewJSONHandler(os.Stdout, nil))
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	s := &server{message: *message, host: host, started: time.Now()}
	s.ready.Store(true)
	srv := &http.Server{Addr: *listen, Handler: s.routes(), ReadHeaderTimeout: time.Minute, MaxHeaderBytes: 64 << 10}
	log.Info("demo serves", "listen", *listen, "host", host, "pid", os.Getpid())

	failed := make(chan error, 1)
	go func() { failed <- srv.ListenAndServe() }()
	var tick <-chan time.Time
	if *every > 0 {
		t := time.NewTicker(*every)
		defer t.Stop()
		tick = t.C
	}
	for {
		select {
		case <-tick:
			log.Info("demo is alive", "uptime", time.Since(s.started).Round(time.Second).String(), "requests", s.requests.Load())
		case err := <-failed:
			return err
		case <-ctx.Done():
			log.Info("demo stops", "requests", s.requests.Load())
			end, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			if err := srv.Shutdown(end); err != nil && !errors.Is(err, context.DeadlineExceeded) {
				return err
			}
			return nil
		}
	}
}

type server struct {
	message, host string
	started       time.Time
	requests      atomic.Int64
	ready         atomic.Bool
}

func (s *server) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s\nhost %s, up %s, request %d\n", s.message, s.host, time.Since(s.started).Round(time.Second), s.requests.Load())
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "ok\n") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		if !s.ready.Load() {
			http.Error(w, "not ready", http.StatusServiceUnavailable)
			return
		}
		io.WriteString(w, "ok\n")
	})
	mux.HandleFunc("POST /readyz/{state}", func(w http.ResponseWriter, r *http.Request) {
		state, err := strconv.ParseBool(r.PathValue("state"))
		if err != nil {
			http.Error(w, "say /readyz/true or /readyz/false", http.StatusBadRequest)
			return
		}
		s.ready.Store(state)
	})
	mux.HandleFunc("GET /env", func(w http.ResponseWriter, r *http.Request) {
		vars := os.Environ()
		slices.Sort(vars)
		for _, v := range vars {
			fmt.Fprintln(w, v)
		}
	})
	mux.HandleFunc("GET /files", func(w http.ResponseWriter, r *http.Request) {
		f, err := os.Open(r.FormValue("path"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		defer f.Close()
		if _, err := io.Copy(w, f); err != nil {
			fmt.Fprintln(w, err) // a folder, for example
		}
	})
	mux.HandleFunc("GET /burn", s.burn)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.requests.Add(1)
		mux.ServeHTTP(w, r)
	})
}

// burn keeps one CPU busy for ?for= (1s), a minute at most.
func (s *server) burn(w http.ResponseWriter, r *http.Request) {
	d := time.Second
	if text := r.FormValue("for"); text != "" {
		var err error
		if d, err = time.ParseDuration(text); err != nil || d > time.Minute {
			http.Error(w, "for: a duration of a minute at most", http.StatusBadRequest)
			return
		}
	}
	end := time.Now().Add(d)
	var rounds uint64
	for time.Now().Before(end) && r.Context().Err() == nil {
		for i := range uint64(1 << 16) {
			rounds += i % 3
		}
	}
	fmt.Fprintf(w, "burnt %s of CPU (%d)\n", d, rounds)
}
