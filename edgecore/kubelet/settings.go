package kubelet

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

	"k8s.io/apimachinery/pkg/runtime/schema"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	kubeletconfigv1beta1 "k8s.io/kubelet/config/v1beta1"
	"k8s.io/kubernetes/pkg/kubelet/apis/config"
	kubeletscheme "k8s.io/kubernetes/pkg/kubelet/apis/config/scheme"
	"k8s.io/kubernetes/pkg/kubelet/apis/config/validation"
	"k8s.io/utils/ptr"
	kjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

// evictionHard replaces upstream's thresholds, which are shares of a server's
// disk: 15 % of an 8 GB card is more than an edge node can leave unused. Image
// collection starts before them, at imageGCHighThresholdPercent.
var evictionHard = map[string]string{
	"memory.available":   "100Mi",
	"nodefs.available":   "5%",
	"nodefs.inodesFree":  "5%",
	"imagefs.available":  "5%",
	"imagefs.inodesFree": "5%",
}

// decidedHere are the keys an overlay may not carry, with the reason told to
// whoever tries.
var decidedHere = map[string]string{
	"enableServer":             "the kubelet's API is served over the tunnel only",
	"address":                  "the kubelet's API is served over the tunnel only",
	"port":                     "the kubelet's API is served over the tunnel only",
	"readOnlyPort":             "edgecore opens no unauthenticated port",
	"healthzPort":              "edgecore opens no unauthenticated port",
	"healthzBindAddress":       "edgecore opens no unauthenticated port",
	"authentication":           "callers of the kubelet's API are checked by the hub",
	"authorization":            "callers of the kubelet's API are checked by the hub",
	"tlsCertFile":              "the kubelet's API is served over the tunnel only",
	"tlsPrivateKeyFile":        "the kubelet's API is served over the tunnel only",
	"tlsCipherSuites":          "the kubelet's API is served over the tunnel only",
	"tlsMinVersion":            "the kubelet's API is served over the tunnel only",
	"tlsCurvePreferences":      "the kubelet's API is served over the tunnel only",
	"rotateCertificates":       "the node's certificate is edgecore's",
	"serverTLSBootstrap":       "the node's certificate is edgecore's",
	"staticPodURL":             "use edgecore's static pod directory",
	"staticPodURLHeader":       "use edgecore's static pod directory",
	"logging":                  "the kubelet logs through edgecore's logger",
	"registerNode":             "an edge node always registers",
	"providerID":               "edge nodes have no cloud provider",
	"containerRuntimeEndpoint": "set runtime.endpoint",
	"imageServiceEndpoint":     "edgecore stands between the kubelet and the runtime's images",
	"cgroupRoot":               "set kubelet.cgroupRoot",
	"cgroupDriver":             "set runtime.cgroupDriver",
	"podLogsDir":               "set kubelet.podLogsDir",
	"staticPodPath":            "set kubelet.staticPodPath",
	"maxPods":                  "set kubelet.maxPods",
	"registerWithTaints":       "set node.taints",
	"clusterDNS":               "set kubelet.clusterDNS",
	"clusterDomain":            "set kubelet.clusterDomain",
}

// settings merges Skerry's settings, the overlay and upstream's defaults, in
// this order of precedence: overlay, Skerry, upstream. The result is valid.
func (c *Config) settings() (*config.KubeletConfiguration, error) {
	versioned := c.base()
	if err := applyOverlay(versioned, c.Overlay); err != nil {
		return nil, err
	}
	// Upstream's defaulting panics on an unknown gate, so ask first.
	if err := utilfeature.DefaultMutableFeatureGate.DeepCopy().SetFromMap(versioned.FeatureGates); err != nil {
		return nil, fmt.Errorf("kubelet: kubelet.config: featureGates: %w; remove it or correct its name", err)
	}
	if versioned.EvictionHard == nil {
		versioned.EvictionHard = maps.Clone(evictionHard)
	} else if ptr.Deref(versioned.MergeDefaultEvictionSettings, false) {
		merged := maps.Clone(evictionHard)
		maps.Copy(merged, versioned.EvictionHard)
		versioned.EvictionHard = merged
	}

	scheme, _, err := kubeletscheme.NewSchemeAndCodecs()
	if err != nil {
		return nil, fmt.Errorf("kubelet: settings: %w", err)
	}
	scheme.Default(versioned)
	internal := &config.KubeletConfiguration{}
	if err := scheme.Convert(versioned, internal, nil); err != nil {
		return nil, fmt.Errorf("kubelet: settings: %w", err)
	}
	if err := validation.ValidateKubeletConfiguration(internal, utilfeature.DefaultFeatureGate); err != nil {
		return nil, fmt.Errorf("kubelet: settings: %w; correct kubelet.config", err)
	}
	return internal, nil
}

// base is what Skerry sets over upstream's defaults.
func (c *Config) base() *kubeletconfigv1beta1.KubeletConfiguration {
	kc := &kubeletconfigv1beta1.KubeletConfiguration{
		// No port of any kind; see Handler.
		EnableServer: ptr.To(false),
		HealthzPort:  ptr.To[int32](0),

		ContainerRuntimeEndpoint: c.RuntimeEndpoint,
		ImageServiceEndpoint:     c.ImageEndpoint,
		CgroupRoot:               c.CgroupRoot,
		CgroupDriver:             c.CgroupDriver,
		PodLogsDir:               c.PodLogsDir,
		StaticPodPath:            c.StaticPodPath,
		MaxPods:                  int32(c.MaxPods),
		ClusterDNS:               c.ClusterDNS,
		ClusterDomain:            c.ClusterDomain,
		RegisterWithTaints:       c.Taints,

		// Many edge boards still boot with cgroup v1 and with swap on.
		FailCgroupV1: ptr.To(false),
		FailSwapOn:   ptr.To(false),

		// An image that was collected may not be pulled again for weeks.
		ImageGCHighThresholdPercent: ptr.To[int32](90),
		ImageGCLowThresholdPercent:  ptr.To[int32](85),

		LocalStorageCapacityIsolation: ptr.To(true),

		// The chains guard 127.0.0.0/8 where kube-proxy has opened it to
		// others (route_localnet). No kube-proxy runs here, and an edge node
		// need not have iptables.
		MakeIPTablesUtilChains: ptr.To(false),
	}
	kc.Authentication.Anonymous.Enabled = ptr.To(false)
	// Webhooks ask the API server about every request; offline there is none.
	kc.Authentication.Webhook.Enabled = ptr.To(false)
	kc.Authorization.Mode = kubeletconfigv1beta1.KubeletAuthorizationModeAlwaysAllow
	return kc
}

// applyOverlay decodes the user's KubeletConfiguration strictly over kc.
func applyOverlay(kc *kubeletconfigv1beta1.KubeletConfiguration, overlay []byte) error {
	if len(bytes.TrimSpace(overlay)) == 0 {
		return nil
	}
	asJSON, err := yaml.YAMLToJSONStrict(overlay)
	if err != nil {
		return fmt.Errorf("kubelet: kubelet.config: %w", err)
	}
	var keys map[string]json.RawMessage
	if err := json.Unmarshal(asJSON, &keys); err != nil {
		return errors.New("kubelet: kubelet.config: not a mapping; write a KubeletConfiguration")
	}
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		if why, ok := decidedHere[key]; ok {
			return fmt.Errorf("kubelet: kubelet.config: key %q is decided by edgecore: %s", key, why)
		}
	}

	// Not encoding/json, which would take "EnableServer" for "enableServer".
	strict, err := kjson.UnmarshalStrict(asJSON, kc)
	if err := errors.Join(append(strict, err)...); err != nil {
		return fmt.Errorf("kubelet: kubelet.config: %w; see the KubeletConfiguration (v1beta1) reference for the keys there are", err)
	}
	want := kubeletconfigv1beta1.SchemeGroupVersion.WithKind("KubeletConfiguration")
	if kc.APIVersion == "" && kc.Kind == "" {
		return nil
	}
	if got := schema.FromAPIVersionAndKind(kc.APIVersion, kc.Kind); got != want {
		return fmt.Errorf("kubelet: kubelet.config: it is a %s; write apiVersion: %s and kind: %s, or neither", got, want.GroupVersion(), want.Kind)
	}
	return nil
}
