package kubelet

import (
	"context"
	"log/slog"

	"k8s.io/klog/v2"
)

// routeKlog sends the lines of every Kubernetes library in this process to log,
// from level on. klog has one destination per process, so this is called once,
// from Run. The kubelet's verbose lines (V(1) and up) have levels between Info
// and Debug.
func routeKlog(log *slog.Logger, level slog.Leveler) {
	handler := log.With("component", "kubelet").Handler()
	klog.SetSlogLogger(slog.New(levelHandler{handler, level}))
}

// levelHandler drops what is below its level, whatever the handler behind it
// lets through.
type levelHandler struct {
	slog.Handler
	level slog.Leveler
}

func (h levelHandler) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= h.level.Level() && h.Handler.Enabled(ctx, level)
}

func (h levelHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return levelHandler{h.Handler.WithAttrs(attrs), h.level}
}

func (h levelHandler) WithGroup(name string) slog.Handler {
	return levelHandler{h.Handler.WithGroup(name), h.level}
}
