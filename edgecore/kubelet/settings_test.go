package kubelet

import (
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

func settingsOf(t *testing.T, cfg Config) (*Kubelet, error) {
	t.Helper()
	if cfg.NodeName == "" {
		cfg.NodeName = "edge-1"
	}
	cfg.Transport = http.DefaultTransport
	return New(cfg)
}

func mustSettings(t *testing.T, cfg Config) *Kubelet {
	t.Helper()
	k, err := settingsOf(t, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestNoPortIsEverOpened(t *testing.T) {
	s := mustSettings(t, Config{}).settings
	if s.EnableServer || s.ReadOnlyPort != 0 || s.HealthzPort != 0 {
		t.Errorf("server %v, read-only port %d, healthz port %d", s.EnableServer, s.ReadOnlyPort, s.HealthzPort)
	}
	if s.Authentication.Anonymous.Enabled || s.Authentication.Webhook.Enabled {
		t.Error("anonymous or webhook authentication is on")
	}
}

func TestEdgeSettings(t *testing.T) {
	k := mustSettings(t, Config{
		RuntimeEndpoint: "/run/x/containerd.sock", CgroupRoot: "/skerry", MaxPods: 30,
		ClusterDNS: []string{"10.96.0.10"}, StaticPodPath: "/etc/skerry/pods",
		Taints: []corev1.Taint{{Key: "edge", Effect: corev1.TaintEffectNoSchedule}},
	})
	s := k.settings
	if s.ContainerRuntimeEndpoint != "unix:///run/x/containerd.sock" {
		t.Errorf("endpoint %q", s.ContainerRuntimeEndpoint)
	}
	if s.CgroupRoot != "/skerry" || s.MaxPods != 30 || s.StaticPodPath != "/etc/skerry/pods" || !slices.Equal(s.ClusterDNS, []string{"10.96.0.10"}) || len(s.RegisterWithTaints) != 1 {
		t.Errorf("settings are not the config's: %+v", s)
	}
	if s.FailCgroupV1 || s.FailSwapOn {
		t.Error("a board with cgroup v1 or swap would be refused")
	}
	if !maps.Equal(s.EvictionHard, evictionHard) {
		t.Errorf("eviction thresholds %v", s.EvictionHard)
	}
	if s.ClusterDomain != "cluster.local" || s.PodLogsDir != "/var/log/pods" {
		t.Errorf("domain %q, logs %q", s.ClusterDomain, s.PodLogsDir)
	}
	flags := k.server(nil).KubeletFlags
	if flags.KubeConfig == "" || flags.HostnameOverride != "edge-1" || flags.RootDirectory != "/var/lib/kubelet" || flags.NodeIP != "" {
		t.Errorf("flags %+v", flags)
	}
}

func TestOverlayGoesOverSkerry(t *testing.T) {
	s := mustSettings(t, Config{Overlay: []byte(`
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failSwapOn: true
imageGCHighThresholdPercent: 70
imageGCLowThresholdPercent: 60
evictionHard:
  memory.available: 32Mi
`)}).settings
	if !s.FailSwapOn || s.ImageGCHighThresholdPercent != 70 {
		t.Errorf("failSwapOn %v, image GC at %d", s.FailSwapOn, s.ImageGCHighThresholdPercent)
	}
	if want := map[string]string{"memory.available": "32Mi"}; !maps.Equal(s.EvictionHard, want) {
		t.Errorf("eviction thresholds %v, want %v", s.EvictionHard, want)
	}
	if s.EnableServer {
		t.Error("the overlay turned the server on")
	}
}

func TestOverlayMergesEvictionWhenAsked(t *testing.T) {
	s := mustSettings(t, Config{Overlay: []byte("mergeDefaultEvictionSettings: true\nevictionHard: {memory.available: 32Mi}\n")}).settings
	want := maps.Clone(evictionHard)
	want["memory.available"] = "32Mi"
	if !maps.Equal(s.EvictionHard, want) {
		t.Errorf("eviction thresholds %v, want %v", s.EvictionHard, want)
	}
	if evictionHard["memory.available"] != "100Mi" {
		t.Error("the defaults themselves were changed")
	}
}

func TestOverlayIsRefused(t *testing.T) {
	for name, c := range map[string]struct{ overlay, want string }{
		"unknown key":       {"maxPodz: 3\n", `unknown field "maxPodz"`},
		"unknown inner key": {"memorySwap:\n  swapBehaviour: NoSwap\n", `unknown field "memorySwap.swapBehaviour"`},
		"key written twice": {"failSwapOn: true\nfailSwapOn: false\n", `"failSwapOn" already set`},
		"port":              {"readOnlyPort: 10255\n", `key "readOnlyPort" is decided by edgecore: edgecore opens no unauthenticated port`},
		"server":            {"enableServer: true\n", `key "enableServer" is decided by edgecore`},
		"authentication":    {"authentication: {anonymous: {enabled: true}}\n", `key "authentication" is decided by edgecore`},
		"other case":        {"EnableServer: true\n", `unknown field "EnableServer"`},
		"own key":           {"maxPods: 5\n", "set kubelet.maxPods"},
		"other kind":        {"apiVersion: v1\nkind: Pod\n", "it is a /v1, Kind=Pod"},
		"older version":     {"apiVersion: kubelet.config.k8s.io/v1alpha1\nkind: KubeletConfiguration\n", "write apiVersion: kubelet.config.k8s.io/v1beta1"},
		"unknown gate":      {"featureGates: {NoSuchGate: true}\n", "unrecognized feature gate: NoSuchGate"},
		"not a mapping":     {"- a\n", "not a mapping"},
		"not YAML":          {"a: [\n", "kubelet.config"},
		"invalid value":     {"imageGCHighThresholdPercent: 10\n", "imageGCLowThresholdPercent"},
		"wrong type":        {"failSwapOn: maybe\n", "failSwapOn"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := settingsOf(t, Config{Overlay: []byte(c.overlay)})
			if err == nil {
				t.Fatal("accepted")
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %q does not say %q", err, c.want)
			}
		})
	}
}

func TestConfigIsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		cfg  Config
		want string
	}{
		"node name":     {Config{NodeName: "Edge_1"}, `node name "Edge_1"`},
		"endpoint":      {Config{RuntimeEndpoint: "tcp://127.0.0.1:1"}, `runtime endpoint "tcp://127.0.0.1:1"`},
		"root":          {Config{RootDir: "var"}, `root directory "var" is not absolute`},
		"cgroup driver": {Config{CgroupDriver: "docker"}, `cgroup driver "docker" is unknown`},
		"cgroup root":   {Config{CgroupRoot: "skerry"}, `cgroup root "skerry" is not absolute`},
		"pods":          {Config{MaxPods: -1}, "-1 pods"},
		"node address":  {Config{NodeIP: net.ParseIP("127.0.0.1")}, "node address 127.0.0.1 cannot be reported"},
		"cluster DNS":   {Config{ClusterDNS: []string{"dns.local"}}, `"dns.local" is not an IP address`},
		"label":         {Config{NodeLabels: map[string]string{"kubernetes.io/role": "x"}}, "kubernetes.io/role"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := settingsOf(t, c.cfg)
			if err == nil {
				t.Fatal("accepted")
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %q does not say %q", err, c.want)
			}
		})
	}
	if _, err := New(Config{NodeName: "edge-1"}); err == nil {
		t.Error("accepted without a transport")
	}
}

func FuzzOverlay(f *testing.F) {
	f.Add([]byte("failSwapOn: true\n"))
	f.Add([]byte("featureGates: {NodeSwap: false}\nevictionHard: {}\n"))
	f.Add([]byte("apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n"))
	f.Fuzz(func(t *testing.T, overlay []byte) {
		k, err := settingsOf(t, Config{Overlay: overlay})
		if err == nil && (k.settings.EnableServer || k.settings.ReadOnlyPort != 0 || k.settings.HealthzPort != 0) {
			t.Errorf("overlay %q opens a port", overlay)
		}
	})
}
