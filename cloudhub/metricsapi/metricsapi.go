package metricsapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apiserver/pkg/registry/rest"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/client-go/informers"
	statsv1alpha1 "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
	"k8s.io/metrics/pkg/apis/metrics"
	metricsinstall "k8s.io/metrics/pkg/apis/metrics/install"
	metricsv1beta1 "k8s.io/metrics/pkg/apis/metrics/v1beta1"
)

// Source is where figures come from.
type Source interface {
	// Summary asks one node; ctx bounds the question.
	Summary(ctx context.Context, node string) (*statsv1alpha1.Summary, error)
	// Nodes are the nodes that can be asked now.
	Nodes() []string
}

// Config for an API.
type Config struct {
	Source Source // required
	// CacheFor is how long an answer is used again; zero means 15 s.
	CacheFor time.Duration
	// Timeout bounds the question to one node; zero means 5 s.
	Timeout time.Duration
	// MaxConcurrent is how many nodes are asked at a time, over all requests;
	// zero means 64.
	MaxConcurrent int
	// Window is the interval a kubelet averages CPU usage over, as reported to
	// clients; zero means 10 s, the kubelet's default.
	Window time.Duration
	Log    *slog.Logger // nil discards
}

// API is the metrics.k8s.io group.
type API struct {
	cfg       Config
	collector *collector
}

// New checks cfg; it starts nothing.
func New(cfg Config) (*API, error) {
	if cfg.Source == nil {
		return nil, errors.New("metrics API: no source given")
	}
	if cfg.CacheFor == 0 {
		cfg.CacheFor = 15 * time.Second
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 5 * time.Second
	}
	if cfg.MaxConcurrent == 0 {
		cfg.MaxConcurrent = 64
	}
	if cfg.Window == 0 {
		cfg.Window = 10 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &API{cfg: cfg, collector: newCollector(cfg)}, nil
}

// Install adds the group to a server that does not run yet. ctx ends when the
// server stops; questions to nodes end with it. The informers' pods and nodes
// say which of a node's figures are a live pod's, and carry the labels.
func (a *API) Install(ctx context.Context, server *genericapiserver.GenericAPIServer, informers informers.SharedInformerFactory) error {
	scheme := runtime.NewScheme()
	metricsinstall.Install(scheme)
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	info := genericapiserver.NewDefaultAPIGroupInfo(metrics.GroupName, scheme, runtime.NewParameterCodec(scheme), serializer.NewCodecFactory(scheme))
	core := informers.Core().V1()
	a.collector.stop = ctx
	info.VersionedResourcesStorageMap[metricsv1beta1.SchemeGroupVersion.Version] = map[string]rest.Storage{
		"nodes": &nodeMetrics{collector: a.collector, nodes: core.Nodes().Lister(), window: a.cfg.Window},
		"pods":  &podMetrics{collector: a.collector, pods: core.Pods().Lister(), window: a.cfg.Window},
	}
	// Asking for the informers is what starts them with the others.
	core.Nodes().Informer()
	core.Pods().Informer()
	if err := server.InstallAPIGroup(&info); err != nil {
		return fmt.Errorf("metrics API: install %s: %w", metricsv1beta1.SchemeGroupVersion, err)
	}
	return server.AddPostStartHook("skerry-metrics-api", a.publish)
}
