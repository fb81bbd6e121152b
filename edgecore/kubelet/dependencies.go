package kubelet

import (
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"strconv"
	"time"

	noopoteltrace "go.opentelemetry.io/otel/trace/noop"
	clientset "k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	upstream "k8s.io/kubernetes/pkg/kubelet"
	"k8s.io/kubernetes/pkg/kubelet/apis/config"
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
func dependencies(transport http.RoundTripper, settings *config.KubeletConfiguration, withCSI bool, containers cadvisor.Interface) (*upstream.Dependencies, error) {
	// No rate limit where upstream has one to protect the API server: it is in
	// this process. Events are limited all the same, as they end at the cloud's.
	local := rest.Config{
		Host:          "http://edge.invalid", // never resolved
		Transport:     transport,
		ContentConfig: rest.ContentConfig{ContentType: "application/json"},
		QPS:           -1,
	}
	heartbeats, events := local, local
	heartbeats.Timeout = min(settings.NodeStatusUpdateFrequency.Duration, time.Duration(settings.NodeLeaseDurationSeconds)*time.Second)
	events.QPS, events.Burst = float32(settings.EventRecordQPS), int(settings.EventBurst)

	kube, err1 := clientset.NewForConfig(&local)
	heartbeat, err2 := clientset.NewForConfig(&heartbeats)
	event, err3 := clientset.NewForConfig(&events)
	if err := errors.Join(err1, err2, err3); err != nil {
		return nil, fmt.Errorf("kubelet: make clients of the local API: %w", err)
	}
	mounter := mount.New("")
	return &upstream.Dependencies{
		KubeClient:          kube,
		HeartbeatClient:     heartbeat,
		EventClient:         event.CoreV1(),
		OnHeartbeatFailure:  func() {}, // there is no connection to drop
		CAdvisorInterface:   containers,
		TracerProvider:      noopoteltrace.NewTracerProvider(),
		HostUtil:            hostutil.NewHostUtil(),
		Mounter:             mounter,
		Subpather:           subpath.New(mounter),
		OOMAdjuster:         oomAdjuster(),
		OSInterface:         kubecontainer.RealOS{},
		VolumePlugins:       volumePlugins(withCSI),
		DynamicPluginProber: noFlexVolumes{},
		TLSOptions:          nil, // the kubelet serves nothing itself
	}, nil
}

// oomAdjuster is upstream's, but takes a refusal for an answer: where the host
// does not let root lower the score, two more tries would only delay the start.
func oomAdjuster() *oom.OOMAdjuster {
	adjuster := oom.NewOOMAdjuster()
	patient := adjuster.ApplyOOMScoreAdj
	adjuster.ApplyOOMScoreAdj = func(pid, score int) error {
		process := "self"
		if pid != 0 {
			process = strconv.Itoa(pid)
		}
		err := os.WriteFile("/proc/"+process+"/oom_score_adj", []byte(strconv.Itoa(score)), 0)
		if err == nil || errors.Is(err, fs.ErrPermission) {
			return err
		}
		return patient(pid, score)
	}
	return adjuster
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
