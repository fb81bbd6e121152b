package host

import (
	"context"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"
)

// Config says how often the host is measured.
type Config struct {
	Period time.Duration // between samples; zero means 15 s, at least 1 s
	Log    *slog.Logger  // nil discards
}

// Sampler holds the latest sample. It is a prometheus.Collector.
type Sampler struct {
	cfg    Config
	latest atomic.Pointer[Sample]
	failed atomic.Uint64 // parts of samples that could not be measured

	// Owned by the goroutine in Run or Measure.
	previous CPU
	trouble  map[string]string // part -> its last error, so that a log line tells a change
}

// New checks cfg; it measures nothing.
func New(cfg Config) (*Sampler, error) {
	if cfg.Period == 0 {
		cfg.Period = 15 * time.Second
	}
	if cfg.Period < time.Second {
		return nil, fmt.Errorf("metrics: host sampling every %v costs more than it shows; choose 1s or more", cfg.Period)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Sampler{cfg: cfg, trouble: make(map[string]string)}, nil
}

// Run takes a sample at once and then one per period, until ctx ends.
func (s *Sampler) Run(ctx context.Context) error {
	tick := time.NewTicker(s.cfg.Period)
	defer tick.Stop()
	for {
		sample := s.measure(ctx)
		if ctx.Err() != nil {
			return nil
		}
		s.latest.Store(&sample)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// Latest is the newest sample; false before the first.
func (s *Sampler) Latest() (Sample, bool) {
	p := s.latest.Load()
	if p == nil {
		return Sample{}, false
	}
	return *p, true
}

// note logs a part that began to fail, or works again, and counts failures. A
// part that fails is left empty; the others are measured all the same.
func (s *Sampler) note(part string, err error) {
	was := s.trouble[part]
	if err == nil {
		if was != "" {
			s.cfg.Log.Info("host figures are measured again", "part", part)
			delete(s.trouble, part)
		}
		return
	}
	s.failed.Add(1)
	if was != err.Error() {
		s.cfg.Log.Warn("host figures cannot be measured", "part", part, "err", err)
		s.trouble[part] = err.Error()
	}
}
