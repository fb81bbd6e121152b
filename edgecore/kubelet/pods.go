package kubelet

import (
	"context"
	"net/http"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"
	podconfig "k8s.io/kubernetes/pkg/kubelet/config"
	"k8s.io/kubernetes/pkg/kubelet/server"
	kubetypes "k8s.io/kubernetes/pkg/kubelet/types"
	"k8s.io/kubernetes/pkg/kubelet/util"
)

const (
	// nodePoll is how often the kubelet's copy of its Node is looked for. The
	// Node comes from memory of this process.
	nodePoll = 2 * time.Millisecond
	// nodePatience is after how long upstream's own loop asks again, a second
	// later.
	nodePatience = 5 * time.Second
)

// podSources are upstream's (kubelet.go, makePodSourceConfig), with one
// difference: they watch the pods as soon as the kubelet knows its Node.
// Upstream looks right after it has asked for the Node, and then once a second,
// so that every start would wait for a second.
func (k *Kubelet) podSources(ctx context.Context) {
	logger := klog.FromContext(ctx)
	// As upstream makes them later, if they are not there.
	broadcaster := record.NewBroadcaster(record.WithContext(ctx))
	broadcaster.StartStructuredLogging(3)
	broadcaster.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: k.deps.EventClient.Events("")})
	k.deps.Recorder = broadcaster.NewRecorder(scheme.Scheme, corev1.EventSource{Component: server.ComponentKubelet, Host: k.cfg.NodeName})
	k.deps.PodStartupLatencyTracker = util.NewPodStartupLatencyTracker()

	sources := podconfig.NewPodConfig(k.deps.Recorder, k.deps.PodStartupLatencyTracker)
	node := types.NodeName(k.cfg.NodeName)
	if path := k.settings.StaticPodPath; path != "" {
		podconfig.NewSourceFile(logger, path, node, k.settings.FileCheckFrequency.Duration, sources.Channel(ctx, kubetypes.FileSource))
	}
	if url := k.settings.StaticPodURL; url != "" {
		podconfig.NewSourceURL(logger, url, http.Header(k.settings.StaticPodURLHeader), node, k.settings.HTTPCheckFrequency.Duration, sources.Channel(ctx, kubetypes.HTTPSource))
	}
	podconfig.NewSourceApiserver(logger, k.deps.KubeClient, node, func() bool { return k.knowsNode(ctx) }, sources.Channel(ctx, kubetypes.ApiserverSource))
	k.deps.PodConfig = sources
}

// knowsNode waits until the kubelet has its Node, by whose labels and taints it
// admits pods. A Node that is not registered yet is not waited for: upstream
// admits by what it is about to register.
func (k *Kubelet) knowsNode(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, nodePatience)
	defer cancel()
	select {
	case <-k.built:
	case <-ctx.Done():
		return false
	}
	tick := time.NewTicker(nodePoll)
	defer tick.Stop()
	for {
		if _, err := k.instance.GetNode(ctx); err == nil {
			return true
		}
		if _, err := k.deps.KubeClient.CoreV1().Nodes().Get(ctx, k.cfg.NodeName, metav1.GetOptions{}); apierrors.IsNotFound(err) {
			return true
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return false
		}
	}
}
