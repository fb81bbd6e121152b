package kubelet

import (
	"context"
	"fmt"
	"net/http"

	"k8s.io/kubernetes/pkg/kubelet/server"
	"k8s.io/kubernetes/pkg/kubelet/server/stats"
)

// Handler waits until the kubelet can be asked and returns its API: containerLogs,
// exec, attach, portForward, stats/summary, metrics, pods, configz, healthz.
//
// It asks for no credentials; that is the caller's duty. exec, attach and
// portForward take over the connection, so it must be served by an http.Server
// on real connections, not called with a recorder.
func (k *Kubelet) Handler(ctx context.Context) (http.Handler, error) {
	select {
	case <-k.live:
	case <-ctx.Done():
		return nil, fmt.Errorf("kubelet: handler: the kubelet has not started: %w", ctx.Err())
	}
	k.handlerOnce.Do(func() {
		// The kubelet's own analyzer, started by it, fills the pods' volume
		// figures in. This one is never started: it would walk every volume a
		// second time, and only its summary, built on request, is used.
		analyzer := stats.NewResourceAnalyzer(ctx, k.instance, 0, k.deps.Recorder)
		s := server.NewServer(ctx, k.instance, analyzer, k.deps.ContainerManager.GetHealthCheckers(), nil, nil, k.settings)
		k.handler = &s
	})
	return k.handler, nil
}
