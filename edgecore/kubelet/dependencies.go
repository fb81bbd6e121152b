package kubelet

import (
	"fmt"
	"net/http"

	noopoteltrace "go.opentelemetry.io/otel/trace/noop"
	clientset "k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	upstream "k8s.io/kubernetes/pkg/kubelet"
	"k8s.io/kubernetes/pkg/kubelet/cadvisor"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
	"k8s.io/kubernetes/pkg/util/oom"
	"k8s.io/kubernetes/pkg/volume"
	"k8s.io/kubernetes/pkg/volume/configmap"
	"k8s.io/kubernetes/pkg/volume/csi"
	"k8s.io/kubernetes/pkg/volume/downwardapi"
	"k8s.io/kubernetes/pkg/volume/emptydir"
	"k8s.io/kubernetes/pkg/volume/hostpath"
	"k8s.io/kubernetes/pkg/volume/image"
	"k8s.io/kubernetes/pkg/volume/local"
	"k8s.io/kubernetes/pkg/volume/projected"
	"k8s.io/kubernetes/pkg/volume/secret"
	"k8s.io/kubernetes/pkg/volume/util/hostutil"
	"k8s.io/kubernetes/pkg/volume/util/subpath"
	"k8s.io/mount-utils"
)

// dependencies are what the kubelet would otherwise make for itself: clients
// over the caller's transport, and the volume plugins Skerry supports.
func dependencies(cfg *Config, containers cadvisor.Interface) (*upstream.Dependencies, error) {
	kube, err := client(cfg.Transport)
	if err != nil {
		return nil, err
	}
	// Heartbeats get a client of their own as upstream does, so that a slow
	// list never delays a lease.
	heartbeat, err := client(cfg.Transport)
	if err != nil {
		return nil, err
	}
	mounter := mount.New("")
	return &upstream.Dependencies{
		KubeClient:          kube,
		HeartbeatClient:     heartbeat,
		EventClient:         kube.CoreV1(),
		OnHeartbeatFailure:  func() {}, // there is no connection to drop
		CAdvisorInterface:   containers,
		TracerProvider:      noopoteltrace.NewTracerProvider(),
		HostUtil:            hostutil.NewHostUtil(),
		Mounter:             mounter,
		Subpather:           subpath.New(mounter),
		OOMAdjuster:         oom.NewOOMAdjuster(),
		OSInterface:         kubecontainer.RealOS{},
		VolumePlugins:       volumePlugins(cfg.CSI),
		DynamicPluginProber: noFlexVolumes{},
		TLSOptions:          nil, // the kubelet serves nothing itself
	}, nil
}

// client is a clientset without rate limits: the server is in this process.
func client(transport http.RoundTripper) (*clientset.Clientset, error) {
	c, err := clientset.NewForConfig(&rest.Config{
		Host:          "http://edge.invalid", // never resolved, the transport is in-process
		Transport:     transport,
		ContentConfig: rest.ContentConfig{ContentType: "application/json"},
		QPS:           -1,
	})
	if err != nil {
		return nil, fmt.Errorf("kubelet: make a client over the local API: %w", err)
	}
	return c, nil
}

// volumePlugins are the kinds of volume a pod may use. Network file systems and
// block protocols are left to CSI drivers.
func volumePlugins(withCSI bool) []volume.VolumePlugin {
	var all []volume.VolumePlugin
	all = append(all, emptydir.ProbeVolumePlugins()...)
	all = append(all, hostpath.ProbeVolumePlugins(volume.VolumeConfig{})...)
	all = append(all, secret.ProbeVolumePlugins()...)
	all = append(all, downwardapi.ProbeVolumePlugins()...)
	all = append(all, configmap.ProbeVolumePlugins()...)
	all = append(all, projected.ProbeVolumePlugins()...)
	all = append(all, local.ProbeVolumePlugins()...)
	all = append(all, image.ProbeVolumePlugins()...)
	if withCSI {
		all = append(all, csi.ProbeVolumePlugins()...)
	}
	return all
}

// noFlexVolumes finds no dynamic plugin: flexvolume runs programs found in a
// directory, which Skerry does not do.
type noFlexVolumes struct{}

func (noFlexVolumes) Init() error                                    { return nil }
func (noFlexVolumes) Probe() (events []volume.ProbeEvent, err error) { return nil, nil }
