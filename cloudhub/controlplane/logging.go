package controlplane

import (
	"context"
	"log/slog"
	"os"
	"strings"
	"sync/atomic"

	"go.uber.org/zap/zapcore"
	"k8s.io/klog/v2"
)

// RedirectKlog sends what the Kubernetes libraries log to log. It is for the
// whole process: call it once in main, before any of them runs.
//
// The libraries log their normal course as information and every failure they
// will retry as an error. In a hub's log both are a level less. From when ctx
// ends, which should be when the plane is told to stop, everything is debug
// output: components that are stopped in order report each other's absence.
//
// A component that cannot go on ends the process through klog; the reason is
// then logged as an error.
func RedirectKlog(ctx context.Context, log *slog.Logger) {
	last := new(atomic.Pointer[string])
	klog.SetSlogLogger(slog.New(demoted{next: log.Handler(), stopping: ctx.Done(), last: last}).With("component", "kubernetes"))
	klog.OsExit = func(code int) {
		reason := "unknown"
		if m := last.Load(); m != nil {
			reason = *m
		}
		log.Error("a Kubernetes component cannot go on and ends the process", "reason", reason)
		os.Exit(code)
	}
}

// demoted logs errors as warnings and information as debug output.
type demoted struct {
	next     slog.Handler
	stopping <-chan struct{}
	last     *atomic.Pointer[string] // the message logged last
}

func (d demoted) level(l slog.Level) slog.Level {
	if l < slog.LevelDebug {
		return l
	}
	if l < slog.LevelWarn {
		return slog.LevelDebug
	}
	select {
	case <-d.stopping:
		return slog.LevelDebug
	default:
		return slog.LevelWarn
	}
}

// Enabled lets information through to Handle, which keeps it as the reason of
// a fatal end; klog logs that as information too.
func (d demoted) Enabled(ctx context.Context, l slog.Level) bool {
	return l >= slog.LevelInfo || d.next.Enabled(ctx, d.level(l))
}

func (d demoted) Handle(ctx context.Context, r slog.Record) error {
	d.last.Store(&r.Message)
	r.Level = d.level(r.Level)
	if !d.next.Enabled(ctx, r.Level) {
		return nil
	}
	return d.next.Handle(ctx, r)
}

func (d demoted) WithAttrs(attrs []slog.Attr) slog.Handler {
	return demoted{d.next.WithAttrs(attrs), d.stopping, d.last}
}

func (d demoted) WithGroup(name string) slog.Handler {
	return demoted{d.next.WithGroup(name), d.stopping, d.last}
}

// zapCore sends etcd's log to slog: its information and warnings as debug
// output (it warns of every slow request on a busy disk), its errors as
// warnings.
type zapCore struct {
	log    *slog.Logger
	fields []zapcore.Field
}

func (c *zapCore) level(l zapcore.Level) slog.Level {
	if l >= zapcore.ErrorLevel {
		return slog.LevelWarn
	}
	return slog.LevelDebug
}

// Enabled implements zapcore.Core.
func (c *zapCore) Enabled(l zapcore.Level) bool {
	return c.log.Enabled(context.Background(), c.level(l))
}

// With implements zapcore.Core.
func (c *zapCore) With(fields []zapcore.Field) zapcore.Core {
	return &zapCore{log: c.log, fields: append(c.fields[:len(c.fields):len(c.fields)], fields...)}
}

// Check implements zapcore.Core.
func (c *zapCore) Check(e zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return checked.AddCore(e, c)
	}
	return checked
}

// Write implements zapcore.Core.
func (c *zapCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range c.fields {
		f.AddTo(enc)
	}
	for _, f := range fields {
		f.AddTo(enc)
	}
	level := c.level(e.Level)
	if err, _ := enc.Fields["error"].(string); strings.Contains(err, "server closed") {
		level = slog.LevelDebug // how its listeners end on a clean stop
	}
	attrs := make([]slog.Attr, 0, len(enc.Fields))
	for k, v := range enc.Fields {
		attrs = append(attrs, slog.Any(k, v))
	}
	c.log.LogAttrs(context.Background(), level, e.Message, attrs...)
	return nil
}

// Sync implements zapcore.Core.
func (c *zapCore) Sync() error { return nil }
