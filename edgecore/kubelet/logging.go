package kubelet

import (
	"log/slog"

	"k8s.io/klog/v2"
)

// routeKlog sends the lines of every Kubernetes library in this process to log.
// klog has one destination per process, so this is called once, from Run. The
// kubelet's verbose lines (V(1) and up) have levels between Info and Debug and
// show when log's handler lets these through.
func routeKlog(log *slog.Logger) {
	klog.SetSlogLogger(log.With("component", "kubelet"))
}
